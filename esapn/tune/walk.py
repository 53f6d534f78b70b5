"""One walk of one trial: a method with settings, on one order of the part to train on.

    the ratings   | part to train on                                | test part: never read
    a walk        | quarter | quarter | quarter | last quarter: validation, prequential

Order ``k`` is a shuffle of the part to train on by seed ``k``, which seeds the run too; in time
order the events stay as they are and the run's seed alone differs.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from ..config import SearchConfig
from ..data.load import load_ratings
from ..data.ratings import Ratings
from ..data.stream import Stream, training_part
from ..methods import method_settings
from ..run.loop import Run, stream_of

__all__ = ["QUARTERS", "Job", "Options", "Part", "Walked", "config_of", "part_of", "walk"]

QUARTERS = 4
# Arguments of load_ratings as pairs, so that they can be a key of a cache.
Options = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Part:
    """Which events are the part to train on: settings of a run as pairs, and how they are read."""

    common: Options
    options: Options

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that all walks have in common."""
        return dict(self.common)


@dataclass(frozen=True)
class Job:
    """A walk to be made; it stops where a quarter's loss is above its limit."""

    method: str
    trial: str
    order: int
    settings: Options
    limits: tuple[float, ...] = (math.inf,) * QUARTERS


@dataclass(frozen=True)
class Walked:
    """A walk that was made; fewer than four losses: it was stopped."""

    method: str
    trial: str
    order: int
    settings: Mapping[str, Any]
    losses: tuple[float, ...]
    accuracy: float
    serving: int
    seconds: float

    @property
    def stopped(self) -> bool:
        """Whether it has no finite validation loss."""
        return len(self.losses) < QUARTERS or not math.isfinite(self.losses[-1])

    @property
    def loss(self) -> float:
        """On the validation quarter."""
        return math.inf if self.stopped else self.losses[-1]


def config_of(part: Part, method: str, settings: Mapping[str, Any], order: int) -> SearchConfig:
    """The settings of a walk: the mode ``tuned``, the method's name, the trial.

    Raises:
        ConfigError: an unknown method, or a setting out of range.
    """
    _, own = method_settings(method)
    common = {**part.settings, "order_seed": order, "seed": order}
    return SearchConfig.of_mode("tuned", **{**common, **settings, **own})


def part_of(part: Part) -> Ratings:
    """The part to train on, which is read; see :func:`~esapn.data.stream.training_part`.

    Raises:
        DataError: the data cannot be read or cut so.
    """
    common = part.settings
    ratings = load_ratings(
        common["data"], events=common["events"], seed=common["order_seed"], **dict(part.options)
    )
    return training_part(
        ratings,
        order=common["order"],
        seed=common["order_seed"],
        batch_size=common["batch_size"],
        train_fraction=common["train_fraction"],
    )


@lru_cache(maxsize=1)
def _part(part: Part) -> Ratings:
    # What is odd about the data was said once, by the process that started this one.
    with redirect_stderr(io.StringIO()):
        return part_of(part)


@lru_cache(maxsize=8)
def _stream(part: Part, order: int, history: int) -> Stream:
    common = {**part.settings, "order_seed": order, "history": history, "train_fraction": 0.75}
    return stream_of(SearchConfig(**common), _part(part))


def walk(job: Job, part: Part) -> Walked:
    """Make a walk in this process, on one thread."""
    torch.set_num_threads(1)
    config = config_of(part, job.method, dict(job.settings), job.order)
    stream = _stream(part, job.order, config.history)
    started = time.monotonic()
    run = Run(config, stream)
    losses, accuracy = [], math.nan
    for end, limit in zip(_ends(stream), job.limits, strict=True):
        while run.index < end:
            run.step()
        loss, accuracy = run.measures.window()
        losses.append(loss)
        # NaN stops as well.
        if not (loss <= limit and loss < math.inf):
            break
    serving = sum(side["serving"] for side in run.memory().values())
    took = time.monotonic() - started
    return Walked(
        job.method,
        job.trial,
        job.order,
        dict(job.settings),
        tuple(losses),
        accuracy,
        serving,
        took,
    )


def _ends(stream: Stream) -> Sequence[int]:
    """The batches at which quarters end; the last one is what a run calls its test part."""
    train = stream.n_train // stream.bounds.batch_size
    cut = QUARTERS - 1
    return [train * k // cut for k in range(1, QUARTERS)] + [len(stream.bounds)]
