"""The goals: each follows from the rows and facts of a run."""

from __future__ import annotations

from typing import Any

import pytest
from harness import goals

from tests.bench.small import measured_row


def test_goals_come_from_rows() -> None:
    rows = [
        measured_row("forward", "ours", 2.0),
        measured_row("forward", "eager", 7.0),
        measured_row("forward out=", "ours", 8.0, bytes=800),
        measured_row("forward out=", "fixed", 2.0, bytes=1000),
    ]
    judged = {g["name"]: g for g in goals.judge(rows, {}, "cpu") if g["device"] == "cpu"}
    loop = judged["eager / ours, 65,536 uniform, ml-20m, forward"]
    # 7 / 2 ms; our roof is 1 ms (1 MB at 1 GB/s), so 7 at the most.
    assert (loop["value"], loop["limit"], loop["status"]) == (3.5, pytest.approx(7.0), "met")
    out = next(g for name, g in judged.items() if "index_select" in name)
    assert (out["value"], out["limit"], out["status"]) == (4.0, 0.8, "missed")
    assert judged["eager / ours, 65,536 uniform, ml-20m, forward + backward"]["value"] is None
    on_gpu = [g for g in goals.judge(rows, {}, "cpu") if g["device"] == "cuda"]
    assert on_gpu and {g["status"] for g in on_gpu} == {"needs a GPU"}
    assert all(len(line) <= 120 for line in goals.lines(on_gpu))


def test_goals_on_a_gpu_come_from_the_rows() -> None:
    large: dict[str, Any] = {"ids": 1_048_576}
    cold = {"table": "ml-20m x100", **large}
    rows = [
        measured_row("forward", "ours", 8.0, **cold),
        measured_row("forward", "fixed", 10.0, **{**cold, "bytes": 1_250_000}),
        measured_row("forward", "ours", 4.0),
        measured_row("forward", "eager", 10.0),
        measured_row("both", "ours", 5.0),
        measured_row("both", "eager", 20.0),
        measured_row("step adam", "ours", 2.0),
        measured_row("step adam", "fixed", 7.0, bytes=4_000_000),
        measured_row("backward sgd", "ours", 10.0, **large),
        measured_row("backward sgd", "ours", 12.0, traffic="zipf", **large),
    ]
    facts = {
        "exact": {"runs": 20, "ours": {"a": 20, "b": 19}},
        "promotion": {"ids": 10_240, "launches": 3, "synchronisations": 1},
    }
    at, far = "65,536 uniform, ml-20m", "1,048,576 uniform, ml-20m x100"
    expected = {
        f"forward fp32 / fixed, {far}": (0.8, 0.82, 0.8, "met"),
        f"share of the roof, forward, {far}": (0.125, 0.85, 1.0, "missed"),
        f"share of the roof, backward, {far}": (None, 0.65, None, "not measured"),
        f"eager / ours, {at}, forward": (2.5, 15.0, 10.0, "missed"),
        f"eager / ours, {at}, forward + backward": (4.0, None, 20.0, "reported"),
        f"fixed / ours, {at}, step with Adam": (3.5, 3.0, 4.0, "met"),
        "backward Zipf / uniform, 1,048,576, ml-20m": (1.2, 1.15, 1.0, "missed"),
        "runs of ours with equal bits, of 20, in its only mode": (19, 20, 20, "missed"),
        "promotion of 10,240 rows: launches": (3, 3, 3, "met"),
        "promotion of 10,240 rows: synchronisations": (1, 0, 0, "missed"),
    }
    found = {goal["name"]: goal for goal in goals.judge(rows, facts, "cuda")}
    for name, (value, bound, limit, status) in expected.items():
        got = tuple(found[name][key] for key in ("value", "goal", "limit", "status"))
        assert got == (pytest.approx(value), bound, pytest.approx(limit), status), name
    lines = goals.lines(list(found.values()))
    assert max(map(len, lines)) <= 120 and len(lines) == 1 + len(found)
    assert lines[1].split()[-5:] == ["0.80", "<=", "0.82", "0.80", "met"]


def test_goals_without_rows() -> None:
    for device in ("cpu", "cuda"):
        judged = goals.judge([], {}, device)
        assert {goal["value"] for goal in judged} == {None}
        assert {goal["status"] for goal in judged} <= {"needs a GPU", "not measured"}
