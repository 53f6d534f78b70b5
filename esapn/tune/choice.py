"""What the trials say: a method's best settings, by how much, and settings for all methods."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .schedule import Listed
from .space import ROWS

__all__ = ["Choice", "choose", "lines", "loss_by_order", "shared_rows"]


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


def shared_rows(choices: Sequence[Choice]) -> dict[str, Any]:
    """The rows' settings of the method that is nearest to all others'; none if none has them all.

    Distances are those of logarithms, each in parts of its range.
    """
    rows = [
        {name: choice.settings[name] for name in ROWS}
        for choice in choices
        if set(ROWS) <= set(choice.settings)
    ]
    return min(rows, key=lambda mine: sum(_distance(mine, other) for other in rows), default={})


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
