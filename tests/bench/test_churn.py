"""bench/churn.py and bench/stalls.py: their rows, what they print and write, and their errors."""

from __future__ import annotations

import json

import churn
import pytest
import stalls


def test_rows_come_and_go(tmp_path, capsys):
    out = tmp_path / "x.json"
    settings = ["--rows", "600", "--moves", "3000", "--ids", "20", "--seed", "3"]
    assert churn.main([*settings, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["benchmark"] == "churn" and result["provenance"]["torch"]
    assert [result[name] for name in ("rows", "moves", "ids", "seed")] == [600, 3000, 20, 3]
    assert list(result["cases"]) == list(churn.CASES)
    for rows in result["cases"].values():
        assert len(rows) == churn.TENTHS
        for tenth, row in enumerate(rows, start=1):
            assert row["moves"] >= tenth * 300 and row["microseconds"] > 0
            assert row["payload"] <= row["pages"] <= row["allocated"]
    level = result["cases"]["level"]
    # Every size keeps its rows.
    assert len({row["payload"] for row in level}) == 1
    assert level[-1]["allocated"] == level[0]["allocated"]
    text = capsys.readouterr().out.splitlines()
    assert text[0].startswith("600 rows of sizes 2 to 128, 20 ids a call")
    assert text[1:] == churn.lines(result["cases"])


def test_the_longest_step(tmp_path, capsys):
    out = tmp_path / "x.json"
    settings = ["--rows", "3000", "--ids", "500", "--steps", "4", "--seed", "3"]
    assert stalls.main([*settings, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["benchmark"] == "stalls" and result["provenance"]["torch"]
    growing, reserved = result["cases"]["growing"], result["cases"]["reserved"]
    assert len(growing["milliseconds"]) == len(reserved["milliseconds"]) == 4
    assert growing["grown"] > 0 == reserved["grown"]
    assert growing["moved"] == reserved["moved"] > 0
    text = capsys.readouterr().out.splitlines()
    assert text[0] == "3,000 rows, 500 ids a step, 4 steps, fp32, CPU"
    assert text[1:] == stalls.lines(result["cases"])


def test_the_ratio_is_of_the_median():
    case = {"milliseconds": [30.0, 2.0, 1.0], "grown": 1, "moved": 9}
    assert stalls.lines({"growing": case})[1].split() == [
        "growing",
        "2.0",
        "30.0",
        "30.0",
        "15.0",
        "1",
    ]


@pytest.mark.parametrize("command", [churn, stalls])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--rows", "99"], "argument --rows: must be at least 100, got 99"),
        (["--ids", "0"], "argument --ids: must be at least 1, got 0"),
        (["--seed", "-1"], "argument --seed: must be in [0, 2**63), got -1"),
        (["--out", "/no/such/folder/x.json"], "cannot write /no/such/folder/x.json: No such file"),
    ],
)
def test_mistakes_are_one_line(command, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    out, err = capsys.readouterr()
    name = command.__name__
    assert stop.value.code == 2 and not out
    assert err == f"bench/{name}.py: error: {err.partition('error: ')[2]}" and message in err
    assert err.count("\n") == 1
