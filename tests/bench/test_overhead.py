"""bench/overhead.py: its rows, what it prints and writes, and its errors."""

from __future__ import annotations

import json

import overhead
import pytest


def test_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(overhead, "CALLS", 2)
    monkeypatch.setattr(overhead, "ROWS", 60)
    out = tmp_path / "x.json"
    assert overhead.main(["--ids", "5", "--turns", "2", "--seed", "3", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["benchmark"] == "overhead" and result["provenance"]["torch"]
    assert [result[name] for name in ("ids", "turns", "calls", "seed")] == [5, 2, 2, 3]
    modules = ["nn.Embedding", "one size", "six sizes"]
    assert [row["module"] for row in result["rows"]] == modules * len(overhead.MODES)
    for row in result["rows"]:
        assert row["microseconds"] > 0 and row["ratio"] > 0
        assert row["ratio"] == 1 or row["module"] != "nn.Embedding"
        assert row["goal"] == overhead.GOALS.get((row["mode"], row["module"]))
    text = capsys.readouterr().out
    assert text.startswith("5 ids of 60 rows, 128 wide, fp32, CPU, ")
    assert text.splitlines()[1:] == overhead.lines(result["rows"])


def test_goals_stand_beside_their_rows():
    row = {"mode": "forward", "microseconds": 7.0, "p20": 1.5, "p80": 2.5}
    rows = [
        {**row, "module": "one size", "ratio": 2.0, "goal": 3.0},
        {**row, "module": "six sizes", "ratio": 11.0, "goal": 10.0},
        {**row, "module": "nn.Embedding", "ratio": 1.0, "goal": None},
    ]
    lines = overhead.lines(rows)[1:]
    assert lines[0].endswith("at most 3: met") and lines[1].endswith("at most 10: missed")
    assert lines[2].endswith("1.50 - 2.50")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--ids", "0"], "argument --ids: must be at least 1, got 0"),
        (["--turns", "1"], "argument --turns: must be at least 2, got 1"),
        (["--seed", "-1"], "argument --seed: must be in [0, 2**63), got -1"),
        (["--out", "/no/such/folder/x.json"], "cannot write /no/such/folder/x.json: No such file"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        overhead.main(arguments)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out
    assert err == f"bench/overhead.py: error: {err.partition('error: ')[2]}" and message in err
    assert err.count("\n") == 1
