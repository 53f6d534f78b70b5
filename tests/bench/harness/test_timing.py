"""The order in which regions are prepared and timed."""

from __future__ import annotations

from typing import Any

from harness.table import Row
from harness.timing import Entry, Timer

from tests.bench.small import CPU


def test_entries_are_prepared_and_timed_in_turns() -> None:
    seen: list[tuple[str, int]] = []

    def entry(name: str) -> Any:
        made = Row("t", 1, "uniform", 1, 1, "forward", name, 1, bytes=1)
        return Entry(
            made, lambda turn, given: seen.append((given, turn)), lambda turn: f"{name}{turn}"
        )

    rows = Timer(CPU).measure([entry("a"), entry("b")], 2)
    warm = [("a0", 0), ("b0", 0)]
    assert seen == [*warm, ("b0", 0), ("a0", 0), ("a1", 1), ("b1", 1)]
    assert [row.repeats for row in rows] == [2, 2]


def test_a_sample_is_the_time_of_one_call() -> None:
    calls: list[int] = []
    timer = Timer(CPU)
    timer.clock = lambda: float(len(calls))
    made = Row("t", 1, "uniform", 1, 1, "forward", "a", 1, bytes=1)
    prepared: list[int] = []
    entry = Entry(made, lambda call, _: calls.append(call), prepared.append, calls=3)
    # A second a call by this clock, in milliseconds.
    assert timer.sample(entry, 2) == 1000.0
    assert calls == [6, 7, 8] and prepared == [2]
