"""What is tried: the ranges of a method's settings, and points that all methods share.

What sets the bytes (a width, a threshold, a power's scale, a budget) is the method's name and is
not tuned; nor is what a method is given by name, as in ``power-1,row_lr=0.4``.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

from ..config import SearchConfig

__all__ = ["ROWS", "SETTINGS", "SPREAD", "Range", "ranges", "rounded", "spread"]


class Range(NamedTuple):
    """From ``low`` to ``high``, evenly in the logarithm."""

    low: float
    high: float
    whole: bool = False


# Of the rows of every method, then a method's own.
ROWS = {
    "row_lr": Range(0.02, 2.0),
    "row_accumulator": Range(1e-3, 1.0),
    "init_std": Range(1e-3, 0.3),
}
_POLICY = {"policy_lr": Range(1e-5, 1e-2)}
_OWN = {
    "esapn": _POLICY,
    "darts": _POLICY,
    "autoemb": _POLICY,
    "counts": {"count_scale": Range(0.5, 8.0), "move_every": Range(5, 80, whole=True)},
}
_TAILS = {"tail_lr": Range(1e-3, 0.1)}
SETTINGS = {**ROWS, **_POLICY, **_OWN["counts"], **_TAILS}

SPREAD = 8
"""Trials of every method at the same points, spread over all ranges; those after them follow."""


def ranges(config: SearchConfig, given: Iterable[str] = ()) -> dict[str, Range]:
    """The settings that a method has to be tuned in, less those ``given`` by its name.

    Example:
        >>> list(ranges(SearchConfig.of_mode("tuned", method="darts"), ["row_lr"]))
        ['row_accumulator', 'init_std', 'policy_lr']
    """
    if config.method == "biases":
        return {}
    found = {**ROWS, **_OWN.get(config.method, {})}
    if config.row_optimizer != "adagrad":
        del found["row_accumulator"]
    if config.hops == "tails" and len(config.row_sizes) > 1:
        found |= _TAILS
    return {name: span for name, span in found.items() if name not in set(given)}


def spread(index: int, names: Iterable[str]) -> dict[str, Any]:
    """The ``index``-th point: a setting has the same values in every method.

    Source: Sobol's sequence, scrambled (Owen, J. Complexity 1998).
    """
    point = dict(zip(SETTINGS, _points()[index], strict=True))
    return {
        name: rounded(name, span.low * (span.high / span.low) ** point[name])
        for name, span in SETTINGS.items()
        if name in set(names)
    }


@lru_cache(maxsize=1)
def _points() -> Any:
    from scipy.stats import qmc  # type: ignore[import-untyped]

    return qmc.Sobol(len(SETTINGS), seed=0).random(SPREAD)


def rounded(name: str, value: float) -> Any:
    """Three digits are enough for a setting, and are read more easily.

    >>> rounded("row_lr", 0.0412345), rounded("move_every", 19.7)
    (0.0412, 20)
    """
    return round(value) if SETTINGS[name].whole else float(f"{value:.3g}")
