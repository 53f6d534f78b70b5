"""Which walk comes next: a method's trials, their early stop, and where the next one is put.

Every method is tuned the same way:

1. Trial 0 has the mode's own settings, the ``SPREAD`` trials after it have points that all methods
   share, each further one is put where a Gaussian process over those before it expects most
   (``optuna``). It follows the first order alone.
2. On the first order such a trial, and no other, stops at the end of its second or third quarter
   if that quarter's loss is above the median of the trials before it.
3. Then the best third of all trials walks the second order, the best third of these the third one,
   and so on; trial 0 walks them all.

The choice is among the trials that walked every order. What comes next depends on the walks made
and not on when they ended, so a tuning that was interrupted goes on as if it had not been: walks
that do not depend on each other may be made at once, those that follow a trial wait for it.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..config import SearchConfig
from .space import SPREAD, Range, rounded, spread
from .walk import QUARTERS, Job, Walked

__all__ = ["Listed", "Tuning"]

_NO_LIMITS = (math.inf,) * QUARTERS


class Listed:
    """Walks of a method with settings that are known: every one on every order.

    Args:
        method: as in ``--methods``.
        listed: settings by their name.
        orders: to walk.
    """

    def __init__(
        self, method: str, listed: Mapping[str, Mapping[str, Any]], orders: Sequence[int]
    ) -> None:
        self.method = method
        self.orders = list(orders)
        self.settings = {name: dict(settings) for name, settings in listed.items()}
        self.walks: dict[str, dict[int, Walked]] = {name: {} for name in listed}
        self.open: set[tuple[str, int]] = set()

    @property
    def begun(self) -> int:
        """Walks made or begun."""
        return sum(map(len, self.walks.values())) + len(self.open)

    @property
    def total(self) -> int:
        """All walks, as far as they are known."""
        return len(self.settings) * len(self.orders)

    def has(self, trial: str) -> bool:
        """Whether it is one of these."""
        return trial in self.settings

    def fits(self, walked: Walked) -> bool:
        """Whether a walk's settings are those of its name, here."""
        return dict(walked.settings) == self.settings.get(walked.trial)

    def add(self, walked: Walked) -> None:
        """A walk was made."""
        self.settings.setdefault(walked.trial, dict(walked.settings))
        self.walks.setdefault(walked.trial, {})[walked.order] = walked
        self.open.discard((walked.trial, walked.order))

    def next(self) -> Job | None:
        """The next walk to be made; None: there is none, or it depends on those that are open."""
        for trial in self.settings:
            for order in self.orders:
                if order not in self.walks[trial] and (trial, order) not in self.open:
                    return self._begin(trial, order)
        return None

    def _begin(self, trial: str, order: int, limits: tuple[float, ...] = _NO_LIMITS) -> Job:
        self.open.add((trial, order))
        return Job(self.method, trial, order, tuple(self.settings[trial].items()), limits)


class Tuning(Listed):
    """The trials of one method.

    Args:
        method: as in ``--methods``.
        config: the settings of its trial 0.
        ranges: of the settings that are tried.
        trials: how many.
        orders: the first one is walked by all.
    """

    def __init__(
        self,
        method: str,
        config: SearchConfig,
        ranges: Mapping[str, Range],
        *,
        trials: int,
        orders: Sequence[int],
    ) -> None:
        super().__init__(method, {}, orders)
        self.config, self.ranges, self.trials = config, dict(ranges), trials

    @property
    def default(self) -> dict[str, Any]:
        """The settings of trial 0."""
        return {name: getattr(self.config, name) for name in self.ranges}

    def has(self, trial: str) -> bool:
        """Whether it is one of the first ``trials``."""
        return trial in {str(number) for number in range(self.trials)}

    def fits(self, walked: Walked) -> bool:
        """Whether a walk's settings can be those of its trial, here."""
        return walked.trial != "0" or dict(walked.settings) == self.default

    @property
    def total(self) -> int:
        """If no trial were stopped, and trial 0 were none of the best."""
        rungs = range(len(self.orders))
        return sum(math.ceil(self.trials / 3**rung) for rung in rungs) + len(self.orders) - 1

    def next(self) -> Job | None:
        """The next walk: a new trial's first, or once there is none one of the best trials'."""
        number = next(k for k in itertools.count() if str(k) not in self.settings)
        if number < self.trials:
            follows = number > SPREAD
            if follows and self.open:
                return None
            trial = str(number)
            self.settings[trial] = self._settings(number)
            self.walks[trial] = {}
            return self._begin(trial, self.orders[0], self._limits() if follows else _NO_LIMITS)
        for rung in range(1, len(self.orders)):
            order = self.orders[rung]
            if any(k != order for _, k in self.open):
                return None  # who is best is not known yet
            for trial in self._best(rung):
                if order not in self.walks[trial] and (trial, order) not in self.open:
                    return self._begin(trial, order)
        return None

    def _best(self, rung: int) -> list[str]:
        """Those that walk one order more than ``rung``: the best, and trial 0."""
        walked = self.orders[:rung]
        means = {t: mean for t in self.walks if (mean := self._mean(t, walked)) is not None}
        ranked = sorted(means, key=lambda trial: (means[trial], int(trial)))
        best = ranked[: math.ceil(self.trials / 3**rung)]
        return [*best, *(t for t in ranked[len(best) :] if t == "0")]

    def _mean(self, trial: str, orders: Sequence[int]) -> float | None:
        """A trial's mean loss on ``orders``; None if it did not walk them all."""
        losses = [self.walks[trial][k].loss for k in orders if k in self.walks[trial]]
        if len(losses) < len(orders) or not losses or math.inf in losses:
            return None
        return statistics.mean(losses)

    def _first(self) -> list[Walked]:
        """Walks on the first order, by the trials' numbers."""
        walks = (self.walks[trial].get(self.orders[0]) for trial in sorted(self.walks, key=int))
        return [walked for walked in walks if walked is not None]

    def _limits(self) -> tuple[float, ...]:
        """Of a walk on the first order: medians, once the shared points have been walked."""
        first = self._first()
        medians = [_median(first, quarter) for quarter in range(QUARTERS)]
        return (math.inf, *medians[1:-1], math.inf)

    def _settings(self, number: int) -> dict[str, Any]:
        if number == 0:
            return self.default
        if number <= SPREAD:
            return spread(number - 1, self.ranges)
        return self._suggested(number)

    def _suggested(self, number: int) -> dict[str, Any]:
        """Where the process expects most, given the losses on the first order."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        spans: dict[str, Any] = {
            name: (
                optuna.distributions.IntDistribution(int(span.low), int(span.high), log=True)
                if span.whole
                else optuna.distributions.FloatDistribution(span.low, span.high, log=True)
            )
            for name, span in self.ranges.items()
        }
        # A sampler of its own for every trial: what it suggests does not depend on a resume.
        sampler = optuna.samplers.GPSampler(seed=number, n_startup_trials=0)
        study = optuna.create_study(sampler=sampler)
        for walked, score in _scores(self._first()):
            inside = all(
                span.low <= walked.settings[name] <= span.high for name, span in self.ranges.items()
            )
            if inside:
                study.add_trial(
                    optuna.trial.create_trial(
                        params=dict(walked.settings), distributions=spans, value=score
                    )
                )
        asked = study.ask(spans)
        found = {}
        for name, span in self.ranges.items():
            value = min(max(asked.params[name], span.low), span.high)
            found[name] = rounded(name, value)
        return found


def _median(walks: Sequence[Walked], quarter: int) -> float:
    losses = [w.losses[quarter] for w in walks if len(w.losses) > quarter]
    losses = [loss for loss in losses if math.isfinite(loss)]
    return statistics.median(losses) if losses else math.inf


def _scores(walks: Sequence[Walked]) -> list[tuple[Walked, float]]:
    """Validation losses; of a stopped walk what it lost to the median so far, from the median on.

    One that diverged counts as the worst.
    """
    ended = [walked.loss for walked in walks if not walked.stopped]
    if not ended:
        return []
    middle, found, lost = statistics.median(ended), [], []
    for walked in walks:
        last = walked.losses[-1]
        if not walked.stopped:
            found.append((walked, walked.loss))
        elif math.isfinite(last):
            behind = last - _median(walks, len(walked.losses) - 1)
            found.append((walked, middle + max(behind, 0.0)))
        else:
            lost.append(walked)
    worst = max(score for _, score in found)
    return found + [(walked, worst) for walked in lost]
