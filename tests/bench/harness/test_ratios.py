"""Lines of two times: ratios turn by turn, goals, and the printed table."""

from __future__ import annotations

from typing import Any

import pytest
from harness.ratios import Line, judge, lines
from harness.table import fill

from tests.bench.small import measured_row


def line(name: str = "forward-500-uniform", **more: Any) -> Line:
    made = {"allocator": "warm", "threads": 1, "clock": "CPU", "ids": 500, **more}
    return Line(name, "nn.Embedding", **made)


def row(samples: list[float], **more: Any) -> Any:
    made = measured_row("forward", "ours", 1.0, **more)
    fill(made, samples, 5.0)
    return made


def test_ratios_are_taken_turn_by_turn() -> None:
    found = line(goal=2.0, stretch=3.0)
    found.take(row([1.0, 2.0, 4.0], gate_error=1e-7), row([2.0, 8.0, 4.0], gate_error=3e-7))
    # 2, 4 and 1: the ratio of the medians would be 2 as well, its spread would not.
    assert (found.ratio, found.p20, found.p80) == (2.0, pytest.approx(1.4), pytest.approx(3.2))
    assert (found.ours_us, found.other_us, found.turns) == (2000.0, 4000.0, 3)
    assert found.ours_samples_us == [1000.0, 2000.0, 4000.0]
    assert found.other_samples_us == [2000.0, 8000.0, 4000.0]
    assert (found.copy_gb_per_s, found.gate_error, found.status) == (5.0, 3e-7, "met")


def test_a_median_of_ratios_is_no_ratio_of_medians() -> None:
    found = line()
    found.take(row([1.0, 2.0, 3.0]), row([6.0, 2.0, 3.0]))
    assert found.ratio == 1.0 and found.other_us == 1.5 * found.ours_us
    assert (found.gate_error, found.status) == (None, "")


@pytest.mark.parametrize(
    ("value", "goal", "stretch", "status"),
    [
        (0.99, 1.0, 1.3, "missed"),
        (1.0, 1.0, 1.3, "met"),
        (1.3, 1.0, 1.3, "stretch"),
        (90.0, 9.0, None, "met"),
        (0.1, None, None, ""),
        (20, 20, None, "met"),
        (19, 20, None, "missed"),
    ],
)
def test_goals(value: float, goal: float | None, stretch: float | None, status: str) -> None:
    assert judge(value, goal, stretch) == status


def test_the_table() -> None:
    timed = line(goal=1.15, stretch=1.5)
    timed.take(row([1.0, 1.0]), row([1.25, 1.25]))
    timed.floor_bytes_ms, timed.floor_products_ms = 0.5, 0.25
    counted = line("bits-sgd", goal=20, equal=19, runs=20, status="missed")
    default = line("step-rowwise-adagrad-65536-uniform-fbgemm", allocator="default")
    default.take(row([12.34, 12.34]), row([123.4, 123.4]))
    text = lines([timed, counted, default])
    assert [text[0][:11], text[3], text[4][:14]] == ["warm memory", "", "default memory"]
    assert text[1].split() == [
        *("forward-500-uniform", "1000.0", "1250.0", "1.25", "[1.25,", "1.25]"),
        *("1.15", "1.5", "met", "0.500", "0.250"),
    ]
    assert text[2].split() == ["bits-sgd", "19", "of", "20", "equal", "20", "missed"]
    assert text[5].split()[1:4] == ["12340.0", "123400.0", "10.00"]
    assert max(map(len, text)) <= 130
