"""Lines that set a time of ours against another's, turn by turn, and the printed table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from .table import Row


@dataclass
class Line:
    """One line of the report; a ratio above 1 says that ours is faster.

    Attributes:
        name: of the case.
        other: what ours is measured against.
        allocator: ``warm`` or ``default``, see allocator.py.
        clock: ``CPU`` or ``wall`` time.
        calls: of each in a turn.
        ours_us, other_us: medians of a call, microseconds.
        ratio, p20, p80: of the other's time over ours, taken turn by turn.
        goal, stretch: the least ratio aimed at, and hoped for; ``None``: for information.
        floor_bytes_ms: fewest bytes at the bandwidth of a large copy around the measurement.
        floor_products_ms: products of a forward at the rate of a large one.
        gate_error: the largest relative error against float64, of both.
        equal, runs: in place of times, how many of so many runs have the bits of the first.
    """

    name: str
    other: str
    allocator: str
    threads: int
    clock: str
    ids: int
    calls: int = 1
    turns: int = 0
    ours_us: float | None = None
    other_us: float | None = None
    ratio: float | None = None
    p20: float | None = None
    p80: float | None = None
    goal: float | None = None
    stretch: float | None = None
    floor_bytes_ms: float | None = None
    floor_products_ms: float | None = None
    copy_gb_per_s: float | None = None
    gate_error: float | None = None
    equal: int | None = None
    runs: int | None = None
    ours_samples_us: list[float] = field(default_factory=list)
    other_samples_us: list[float] = field(default_factory=list)
    status: str = ""

    def take(self, ours: Row, other: Row) -> None:
        """Set what follows from two rows measured in the same turns."""
        pairs = list(zip(ours.samples_ms, other.samples_ms, strict=True))
        ratios = [theirs / mine for mine, theirs in pairs]
        self.turns = len(ratios)
        self.ours_samples_us = [round(1e3 * mine, 3) for mine, _ in pairs]
        self.other_samples_us = [round(1e3 * theirs, 3) for _, theirs in pairs]
        self.ours_us = 1e3 * statistics.median(ours.samples_ms)
        self.other_us = 1e3 * statistics.median(other.samples_ms)
        self.ratio = statistics.median(ratios)
        fifths = statistics.quantiles(ratios, n=5, method="inclusive")
        self.p20, self.p80 = fifths[0], fifths[3]
        self.copy_gb_per_s = ours.copy_gb_per_s
        errors = [e for e in (ours.gate_error, other.gate_error) if e is not None]
        self.gate_error = max(errors, default=None)
        self.status = judge(self.ratio, self.goal, self.stretch)


def judge(value: float, goal: float | None, stretch: float | None) -> str:
    """``stretch | met | missed``, or nothing where there is no goal.

    >>> [judge(value, 1.15, 1.5) for value in (1.1, 1.15, 1.5)]
    ['missed', 'met', 'stretch']
    """
    if goal is None:
        return ""
    if stretch is not None and value >= stretch:
        return "stretch"
    return "met" if value >= goal else "missed"


def lines(found: Sequence[Line]) -> list[str]:
    """The lines as text, a block per allocator, at most 130 columns."""
    text: list[str] = []
    for kind in dict.fromkeys(line.allocator for line in found):
        text += [
            "",
            f"{kind + ' memory':<42}{'ours us':>10}{'other us':>10}{'ratio':>6} {'[p20, p80]':<14}"
            f"{'goal':>4}{'stretch':>8} {'met?':<8}{'floor ms: bytes, products':>26}",
        ]
        text += [_text(line) for line in found if line.allocator == kind]
    return text[1:]


def _text(line: Line) -> str:
    if line.ratio is None:
        measured = f"{f'{line.equal} of {line.runs} equal':>26}{'':<15}"
    else:
        spread = f"[{line.p20:.2f}, {line.p80:.2f}]"
        measured = f"{line.ours_us:>10.1f}{line.other_us:>10.1f}{line.ratio:>6.2f} {spread:<14}"
    goals = f"{_number(line.goal):>4}{_number(line.stretch):>8} {line.status:<8}"
    floors = ""
    if line.floor_bytes_ms is not None and line.floor_products_ms is not None:
        floors = f"{line.floor_bytes_ms:>15.3f}{line.floor_products_ms:>11.3f}"
    return f"{line.name:<42}{measured}{goals}{floors}".rstrip()


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"
