"""Numbers of a comparison as the texts of its page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .intervals import Difference, Interval
from .records import Group

__all__ = [
    "NONE",
    "PERCENT",
    "count",
    "difference",
    "loss",
    "mean",
    "of_fixed128",
    "p_value",
    "percent",
    "plain",
    "plural",
    "short",
    "signed",
]

NONE = "\N{EN DASH}"
PERCENT = "\N{NO-BREAK SPACE}%"


def loss(value: float) -> str:
    """A loss, or another measure of its size."""
    return f"{value:.5f}"


def short(value: float) -> str:
    """A number to three significant digits.

    >>> short(0.177991), short(72.5)
    ('0.178', '72.5')
    """
    return f"{value:.3g}"


def percent(value: float) -> str:
    """A share of 1 in percent, without the sign."""
    return f"{100 * value:.2f}"


def count(value: float) -> str:
    """A number of things, rounded, with commas."""
    return f"{value:,.0f}"


def mean(interval: Interval | None, show: Callable[[float], str]) -> str:
    """A mean and half of its interval's width, where it has one.

    Example:
        >>> mean(Interval(0.25, 0.01, 5), loss), mean(Interval(0.25, None, 1), loss)
        ('0.25000 ± 0.01000', '0.25000')
    """
    if interval is None:
        return NONE
    if interval.half is None:
        return show(interval.mean)
    return f"{show(interval.mean)} ± {show(interval.half)}"


def signed(value: float, digits: int) -> str:
    """With a sign, unless the text rounds to zero.

    Example:
        >>> signed(0.25, 1), signed(-0.001, 2)
        ('+0.2', '0.00')
    """
    text = f"{value:+.{digits}f}"
    return text[1:] if not text.strip("+-0.") else text.replace("-", "\N{MINUS SIGN}")


def difference(d: Difference, *, accuracy: bool = False) -> str:
    """A difference with its interval; one of accuracies in percentage points."""
    scale, digits = (100, 2) if accuracy else (1, 5)
    text = signed(scale * d.mean, digits)
    if d.half is None:
        return f"{text} (one seed)"
    return f"{text} [{signed(scale * d.low, digits)}, {signed(scale * d.high, digits)}]"


def p_value(value: float | None) -> str:
    """A p; a dash where one seed gives none."""
    if value is None:
        return NONE
    return "< 0.0001" if value < 0.0001 else f"{value:.4f}"


def of_fixed128(group: Group, label: str, name: str) -> str:
    """A method's bytes ``name`` as a share of those of plain tables of the largest size."""
    return f"{100 * group.mean(label, name) / group.mean(label, 'fixed128'):.1f}{PERCENT}"


def plural(n: int, noun: str, plural: str = "") -> str:
    """A number and its noun.

    Example:
        >>> plural(1, "seed"), plural(3, "family", "families")
        ('1 seed', '3 families')
    """
    return f"{n} {noun if n == 1 else plural or noun + 's'}"


def plain(value: Any) -> str:
    """A JSON value in words; nested lists and objects on one line.

    Example:
        >>> plain({"events": 1000, "ids": [1, 2]})
        'events 1,000; ids 1, 2'
    """
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return "; ".join(f"{name} {plain(inner)}" for name, inner in value.items())
    if isinstance(value, Iterable):
        return ", ".join(map(plain, value)) or NONE
    return str(value)
