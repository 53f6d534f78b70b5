"""The runs of a comparison in processes of their own.

Killed runs go on from their checkpoints when the same command is given
again, and finished ones are not made twice.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from functools import lru_cache
from typing import Any

import torch

from ..config import SearchConfig
from ..data.load import load_ratings
from ..data.ratings import Ratings
from ..data.stream import Stream
from ..jsonfile import write_json
from ..methods import method_settings
from ..run.loop import Run, stream_of
from ..run.processes import pool
from ..run.result import forget_peak, record
from ..run.resume import Saver, resume_or_start
from .jobs import Job

__all__ = ["RemainingTime", "run_job", "run_jobs"]

# Arguments of load_ratings as pairs, so that they can be a key of a cache.
Options = tuple[tuple[str, str | bool], ...]
# The settings that a stream depends on.
STREAM = (
    *("data", "events", "order", "order_seed", "train_fraction", "batch_size", "history"),
    *("task", "positive_above", "device"),
)


@lru_cache(maxsize=1)
def _ratings(data: str, events: int, seed: int, options: Options) -> Ratings:
    chosen: dict[str, Any] = dict(options)
    return load_ratings(data, events=events, seed=seed, **chosen)


@lru_cache(maxsize=1)
def _stream(config: SearchConfig, options: Options) -> tuple[Ratings, Stream]:
    ratings = _ratings(config.data, config.events, config.order_seed, options)
    return ratings, stream_of(config, ratings)


def run_job(job: Job, options: Options, seconds: float) -> tuple[str, float]:
    """Make one run in this process, from its newest checkpoint on, and write its record.

    Args:
        job: of :func:`plan`.
        options: of ``load_ratings``, as pairs.
        seconds: between two checkpoints.

    Returns:
        The job's label and the seconds that it took.

    Raises:
        ConfigError: its checkpoints are of other settings or data.
        CheckpointError: none of its checkpoints is good.
    """
    torch.set_num_threads(1)
    started = time.monotonic()
    config = job.config
    ratings, stream = _stream(
        SearchConfig(**{name: getattr(config, name) for name in STREAM}), options
    )
    forget_peak()
    run = Run(config, stream)
    resume_or_start(run, job.checkpoints, ratings.checksum)
    result = run.walk(pause=Saver(job.checkpoints, ratings.checksum, seconds))
    family, _ = method_settings(job.label)
    about = {"task": config.task, "mode": config.mode, "label": job.label, "family": family}
    content = record(config, ratings, stream, result)
    write_json(job.path, {**about, "seed": config.seed, **content})
    shutil.rmtree(job.checkpoints, ignore_errors=True)
    return job.label, time.monotonic() - started


class RemainingTime:
    """An estimate from the mean time of each method's finished runs.

    Example:
        >>> remaining = RemainingTime(workers=2)
        >>> remaining.took("fixed-16", 10.0)
        >>> remaining.of(["fixed-16", "fixed-16"])
        10.0
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.times: dict[str, list[float]] = {}

    def took(self, label: str, seconds: float) -> None:
        """Count a finished run of ``label``."""
        self.times.setdefault(label, []).append(seconds)

    def of(self, labels: Sequence[str]) -> float | None:
        """Seconds until runs of ``labels`` have ended; None while no run has finished.

        A method without a finished run counts as the mean of those with one.
        """
        if not self.times:
            return None
        known = {label: statistics.mean(times) for label, times in self.times.items()}
        usual = statistics.mean(known.values())
        return sum(known.get(label, usual) for label in labels) / self.workers


def run_jobs(
    jobs: Sequence[Job],
    options: Options,
    *,
    done: int,
    workers: int,
    seconds: float,
    progress: Callable[[int, int, str, float | None], None],
) -> None:
    """Make the runs of ``jobs`` in processes of their own.

    Args:
        jobs: of :func:`plan`, those that are not finished.
        options: of ``load_ratings``, as pairs.
        done: number of finished ones.
        workers: processes at once.
        seconds: between two checkpoints of a run.
        progress: called with the number of runs done, their total, the label that was done last,
            and the seconds left.

    Raises:
        ConfigError: a process was killed; finished runs and checkpoints stay.
    """
    total = done + len(jobs)
    progress(done, total, "", None)
    if not jobs:
        return
    remaining = RemainingTime(workers)
    waiting = [job.label for job in jobs]
    with pool(workers) as processes:
        futures = [processes.submit(run_job, job, options, seconds) for job in jobs]
        for future in as_completed(futures):
            label, took = future.result()
            remaining.took(label, took)
            waiting.remove(label)
            done += 1
            progress(done, total, label, remaining.of(waiting))
