"""bench/growth.py: its rows, what it prints and writes, and its errors."""

from __future__ import annotations

import json

import growth
import pytest
import torch


@pytest.fixture
def short(monkeypatch):
    """Pieces of three steps of 40 events; rows of few fields."""
    monkeypatch.setattr(growth, "PIECE", 3)
    monkeypatch.setattr(growth, "BATCH", 40)
    for field in list(growth.FIELDS):
        monkeypatch.setitem(growth.FIELDS, field, min(growth.FIELDS[field], 500))


def test_a_run(short, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(growth, "MEASURED", 280)  # seven steps: two pieces and one step
    out = tmp_path / "x.json"
    arguments = ["--events", "800", "--every", "2", "--budget", "60%", "--seed", "3"]
    assert growth.main([*arguments, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["benchmark"] == "growth" and result["provenance"]["torch"]
    asked = ("events", "budget", "every", "seed")
    assert [result[name] for name in asked] == [800, "60%", 2, 3]
    assert [(row["part"], row["events"]) for row in result["rows"]] == [
        ("first", 280),
        ("last", 280),
    ]
    for row in result["rows"]:
        assert 0 < row["moving_ms"] < row["step_ms"]
        assert row["share"] == pytest.approx(row["moving_ms"] / row["step_ms"])
        assert 0 < row["p20"] <= row["p80"] and row["memory_mib"] >= 0
    text = capsys.readouterr().out
    assert text.startswith("800 events, budget 60%, rows move every 2 steps\n")
    assert text.splitlines()[1:] == growth.lines(result["rows"])


def of_clicks(moving):
    return [table.sizes_of() for table in moving.model.tables]


def of_search(moving):
    return [table.sizes_of() for table in moving.run.model.tables().values()]


@pytest.mark.parametrize("search", [False, True])
def test_rows_of_the_other_model_stay(search, short, monkeypatch, tmp_path, capsys):
    """It takes sizes and numbers at the beginning of a piece, and trains on."""
    built, measure = [], growth.measure

    def remember(build, stream, steps, measured):
        def building(moves):
            built.append(build(moves))
            return built[-1]

        return measure(building, stream, steps, measured)

    monkeypatch.setattr(growth, "measure", remember)
    if search:
        ratings = tmp_path / "ratings.csv"
        rows = (
            f"{(t * 7919 % 1000) ** 2 // 1000},{t * t % 83},{t % 5 + 1},{t}\n"
            for t in range(24 * 500)
        )
        ratings.write_text("user,item,rating,timestamp\n" + "".join(rows))
        monkeypatch.setattr(growth, "BATCH", 500)
        arguments = ["--search", str(ratings), "--budget", "200%"]
    else:
        arguments = ["--events", str(2 * 4 * 3 * 40), "--budget", "60%"]
    growth.main([*arguments, "--every", "2"])
    assert f"budget {arguments[-1]}, rows move every 2 steps" in capsys.readouterr().out
    sizes_of = of_search if search else of_clicks
    moving, still = (sizes_of(one) for one in (built[0], built[-1]))
    assert all((one >= 2).all() for one in still) and any((one > 2).any() for one in still)
    assert any(not torch.equal(one, other) for one, other in zip(moving, still, strict=True))
    # What moves, and one for each piece.
    assert len(built) == 1 + 8


def test_the_goal_stands_beside_its_rows():
    row = {"part": "first", "events": 7, "step_ms": 2.0, "moving_ms": 0.1}
    row |= {"share": 0.05, "beside": 1.0625, "p20": 1.03125, "p80": 1.5, "memory_mib": 1234}
    first, last = growth.lines([row, {**row, "beside": 1.25}])[1:]
    assert first.endswith("at most 1.1: met") and last.endswith("at most 1.1: missed")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--events", "199999"], "argument --events: must be at least 200000, got 199999"),
        (["--every", "0"], "argument --every: must be at least 1, got 0"),
        (["--budget", "1%"], "does not hold the rows as they are"),
        (["--budget", "much"], "much"),
        (["--search", "/no/such.csv"], "/no/such.csv"),
        (["--search", "synthetic", "--budget", "1%"], "does not hold the rows"),
        (["--seed", "-1"], "argument --seed: must be in [0, 2**63), got -1"),
        (["--out", "/no/such/folder/x.json"], "cannot write /no/such/folder/x.json: No such file"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        growth.main(arguments)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out
    assert err == f"bench/growth.py: error: {err.partition('error: ')[2]}" and message in err
    assert err.count("\n") == 1


def test_help_says_the_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        growth.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "(default: 50%)" in said
