"""Means over seeds with their intervals, paired differences, Holm's correction, the Pareto front.

interval            m +- t(0.975, n - 1) s / sqrt(n)
paired difference   the same for d_s = a_s - b_s, over the seeds s that both have
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtr, stdtrit  # type: ignore[import-untyped]

__all__ = [
    "LEVEL",
    "Difference",
    "Interval",
    "difference_of",
    "holm",
    "mean_interval",
    "paired_difference",
    "pareto_front",
]

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean of ``n`` values; ``half`` is half the width of its 95 % interval, None if n = 1."""

    mean: float
    half: float | None
    n: int

    @property
    def low(self) -> float:
        return self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        return self.mean + (self.half or 0.0)


@dataclass(frozen=True)
class Difference(Interval):
    """A paired difference a - b; ``p`` is of the two-sided t test, None with one seed."""

    p: float | None


def mean_interval(values: Iterable[float]) -> Interval:
    """Mean m and half-width t(0.975, n - 1) s / sqrt(n), s with n - 1 in the denominator.

    Args:
        values: at least one, in any unit; one per seed.

    Returns:
        The interval in the unit of the values; its ``half`` is None for one value.

    Raises:
        ValueError: no value.

    Example:
        >>> m = mean_interval([1.0, 2.0, 3.0])
        >>> f"{m.mean:.1f} +- {m.half:.3f}"
        '2.0 +- 2.484'
    """
    values = list(values)
    n = len(values)
    if n == 0:
        raise ValueError("a mean needs at least one value")
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, None, 1)
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    return Interval(mean, float(stdtrit(n - 1, (1 + LEVEL) / 2)) * spread / math.sqrt(n), n)


def paired_difference(a: Mapping[int, float], b: Mapping[int, float]) -> Difference:
    """Mean of a_s - b_s over the common seeds s, its 95 % interval and p = 2 P(T > |t|).

    Args:
        a: seed to value.
        b: seed to value, in the same unit.

    Returns:
        The difference in that unit, ``n`` the number of common seeds.

    Raises:
        ValueError: no seed in common.

    Example:
        >>> d = paired_difference({0: 3.0, 1: 5.0, 7: 9.0}, {0: 2.0, 1: 2.0})
        >>> d.mean, d.n
        (2.0, 2)
    """
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        raise ValueError("a paired difference needs a common seed")
    return difference_of(a[s] - b[s] for s in seeds)


def difference_of(values: Iterable[float]) -> Difference:
    """Mean of differences that are paired already, its 95 % interval and p = 2 P(T > |t|).

    Args:
        values: at least one; one per unit, as seeds or orders.

    Raises:
        ValueError: no value.

    Example:
        >>> d = difference_of([1.0, 3.0])
        >>> d.mean, round(d.p, 3)
        (2.0, 0.295)
    """
    interval = mean_interval(values)
    if interval.half is None:
        return Difference(interval.mean, None, 1, None)
    if interval.half == 0:  # every unit differs by the same amount: t is 0 / 0 or infinite
        p = 1.0 if interval.mean == 0 else 0.0
    else:
        t = abs(interval.mean) / interval.half * float(stdtrit(interval.n - 1, (1 + LEVEL) / 2))
        p = 2 * float(stdtr(interval.n - 1, -t))
    return Difference(interval.mean, interval.half, interval.n, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p: of the sorted p_(1) <= ... <= p_(m), max over j <= i of (m - j + 1) p_(j).

    Args:
        p_values: m values from 0 to 1.

    Returns:
        Adjusted values at most 1, in the order given. Rejecting those below 0.05 keeps the chance
        of any false rejection among the m below 5 % (Holm, 1979).

    Example:
        >>> [round(p, 3) for p in holm([0.04, 0.01, 0.03])]
        [0.06, 0.03, 0.06]
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (bytes, loss) that no other point matches in both and beats in one.

    Example:
        >>> pareto_front([(8, 0.3), (1, 0.5), (4, 0.4), (9, 0.35)])
        [1, 2, 0]
    """
    front: list[int] = []
    for i in sorted(range(len(points)), key=points.__getitem__):
        last = points[front[-1]] if front else None
        if last is None or points[i][1] < last[1] or points[i] == last:
            front.append(i)
    return front
