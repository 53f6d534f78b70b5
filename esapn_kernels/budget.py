"""Budgets: how many bytes tables may take to serve, given in bytes or as a share of plain ones."""

from __future__ import annotations

import re
from fractions import Fraction

__all__ = ["budget_bytes"]

_UNITS = {
    "": 1,
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", start=1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", start=1)},
}


def budget_bytes(budget: int | str, plain: int) -> int:
    """Bytes that ``budget`` names.

    Args:
        budget: bytes; or a text: ``"64 MB"`` (10^6), ``"64 MiB"`` (2^20), also kB, GB and TB; or
            ``"3%"`` of ``plain``.
        plain: bytes of the tables of one size that these rows replace.

    Raises:
        ValueError: anything else, or less than a byte.

    >>> budget_bytes("64 MB", 0), budget_bytes("1.5 KiB", 0), budget_bytes("3%", 2000)
    (64000000, 1536, 60)
    """
    if isinstance(budget, int) and not isinstance(budget, bool):
        found = budget
    else:
        match = isinstance(budget, str) and re.fullmatch(
            r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%|[a-z]*)\s*", budget.lower(), re.ASCII
        )
        number, unit = match.groups() if match else ("", "?")
        if unit == "%":
            found = int(Fraction(number) * plain / 100)
        elif unit in _UNITS:
            found = int(Fraction(number) * _UNITS[unit])
        else:
            raise ValueError(
                f"budget must be bytes, a text as '64 MB', or a share of the plain table as '3%', "
                f"got {budget!r}"
            )
    if found < 1:
        raise ValueError(f"budget must be at least a byte, got {budget!r}")
    return found
