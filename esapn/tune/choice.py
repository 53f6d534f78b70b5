"""What the trials say: a method's best settings, by how much, and rows' settings for all."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .schedule import Listed
from .space import ROWS

__all__ = ["DEFAULT", "SHARED_ROWS", "Choice", "choose", "lines", "loss_by_order", "shared_rows"]

# Names of settings that a check walks with: the mode's, and those with the rows' for all methods.
DEFAULT, SHARED_ROWS = "default", "shared"


@dataclass(frozen=True)
class Choice:
    """The trial of a method with the lowest mean loss over all orders.

    ``less`` is its loss less that of another trial, order by order: of ``"default"``, the mode's
    own settings, and of ``"second"``, the next best.
    """

    method: str
    trial: str
    settings: Mapping[str, Any]
    loss: float
    less: Mapping[str, Sequence[float]]
    trials: int

    def to_json(self) -> dict[str, Any]:
        """As ``settings.json`` holds it."""
        return {
            "trial": self.trial,
            "settings": dict(self.settings),
            "loss": self.loss,
            "less": {name: list(values) for name, values in self.less.items()},
            "trials": self.trials,
        }


def loss_by_order(listed: Listed, trial: str) -> list[float] | None:
    """A trial's losses in the order of ``listed.orders``; None if it lacks one."""
    walks = listed.walks.get(trial, {})
    losses = [walks[k].loss for k in listed.orders if k in walks]
    return losses if len(losses) == len(listed.orders) and math.inf not in losses else None


def choose(listed: Listed, default: str = "0") -> Choice | None:
    """The choice among the trials that walked all orders; None if there is none."""
    walked = {t: found for t in listed.walks if (found := loss_by_order(listed, t)) is not None}
    if not walked:
        return None
    best, *others = sorted(walked, key=lambda trial: statistics.mean(walked[trial]))
    less = {}
    for name, other in (("default", default), ("second", others[0] if others else None)):
        if other in walked:
            less[name] = [a - b for a, b in zip(walked[best], walked[other], strict=True)]
    return Choice(
        listed.method,
        best,
        listed.settings[best],
        statistics.mean(walked[best]),
        less,
        len(listed.walks),
    )


def shared_rows(chosen: Iterable[tuple[Mapping[str, Any], str]]) -> tuple[dict[str, Any], str]:
    """The rows' settings that are nearest to all others, and where they are from.

    Distances are those of logarithms, each in parts of its range.

    Args:
        chosen: settings of a method, and a name; those that lack one of the rows are left out.

    Example:
        >>> some = [{"row_lr": x, "row_accumulator": 0.1, "init_std": 0.1} for x in (0.1, 0.2, 2.0)]
        >>> shared_rows(zip(some, "abc"))
        ({'row_lr': 0.2, 'row_accumulator': 0.1, 'init_std': 0.1}, 'b')
    """
    rows = [
        ({name: settings[name] for name in ROWS}, source)
        for settings, source in chosen
        if set(ROWS) <= set(settings)
    ]
    return min(
        rows,
        key=lambda mine: sum(_distance(mine[0], other) for other, _ in rows),
        default=({}, ""),
    )


def _distance(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """Zero counts as the least of its range."""
    total = 0.0
    for name, span in ROWS.items():
        a, b = (math.log(max(x[name], span.low)) for x in (one, other))
        total += abs(a - b) / math.log(span.high / span.low)
    return total


def lines(choices: Sequence[Choice]) -> list[str]:
    """A table of the choices: loss, less that of the default and of the second, settings."""
    width = max((len(choice.method) for choice in choices), default=0)
    found = [f"{'method':<{width}}  loss     less default  less second  settings"]
    for choice in choices:
        cells = [_less(choice.less.get(name)) for name in ("default", "second")]
        settings = " ".join(f"{name}={value:g}" for name, value in choice.settings.items())
        name = f"{choice.method:<{width}}"
        found.append(f"{name}  {choice.loss:.5f}  {cells[0]:>12}  {cells[1]:>11}  {settings}")
    return found


def _less(values: Sequence[float] | None) -> str:
    if not values:
        return "-"
    return f"{statistics.mean(values):+.5f}"
