"""Many methods, seeds and tasks on the same stream: one record a run, resumed where it stopped.

    DIR/compare.json                             what is compared, and on which data
    DIR/runs/{task}-{mode}-{label}-s{seed}.json  one finished run (``report.record``)
    DIR/checkpoints/                             runs under way

Every run is one process and one thread; as many run at once as there are cores. A method is a
preset, or a preset with settings of its own: ``esapn,history=3``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from functools import lru_cache
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any

import torch

from esapn_kernels import info

from ..config import MODES, ConfigError, SearchConfig
from ..data.load import Ratings, Stream, load_ratings
from ..run.loop import Run, stream_of
from ..run.result import describe_data, forget_peak, record, write_json
from ..run.resume import Saver, check_origin, resume_or_start

__all__ = ["DEFAULT_METHODS", "Job", "compare", "method_settings"]

# label -> settings; a number behind a family's name is its knob.
PRESETS: dict[str, dict[str, Any]] = {
    "esapn": {"method": "esapn"},
    "esapn-rich": {"method": "esapn", "state": "rich"},
    "esapn-normalised": {"method": "esapn", "advantage": "normalised"},
    "esapn-entropy": {"method": "esapn", "entropy": 0.01},
    "esapn-argmax": {"method": "esapn", "acting": "argmax"},
    "darts": {"method": "darts"},
    "autoemb": {"method": "autoemb"},
    "always": {"method": "always"},
    "never": {"method": "never"},
    "biases": {"method": "biases"},
    # The authors' FIXED: as wide as all sizes together, no BatchNorm and tanh on the towers.
    "fixed-222-plain": {"method": "fixed", "fixed_size": 222, "tower": "plain"},
}
# Families with a knob: the setting that the number is, its kind, and what else they set.
KNOBS: dict[str, tuple[str, type, dict[str, Any]]] = {
    "esapn-dwell": ("dwell", float, {"method": "esapn"}),
    "always-dwell": ("dwell", float, {"method": "always"}),
    "fixed": ("fixed_size", int, {"method": "fixed"}),
    "random": ("promote_probability", float, {"method": "random"}),
    "thresholds": ("threshold", float, {"method": "thresholds"}),
    "power": ("power_scale", float, {"method": "power"}),
}
DEFAULT_METHODS = {
    "paper": (
        "esapn",
        "fixed-128",
        "fixed-222-plain",
        "darts",
        "autoemb",
        "always",
        "never",
        "random-0.5",
        "thresholds-16",
        "power-1",
        "biases",
    ),
    "tuned": (
        "esapn-dwell-0.5",
        "esapn-dwell-1",
        "esapn-dwell-0.25",
        "esapn",
        "fixed-4",
        "fixed-8",
        "fixed-16",
        "fixed-64",
        "fixed-128",
        "darts",
        "autoemb",
        "always",
        "always-dwell-0.5",
        "never",
        "random-0.02",
        "random-0.005",
        "thresholds-32",
        "thresholds-16",
        "thresholds-8",
        "thresholds-4",
        "power-0.5",
        "power-1",
        "power-2",
        "biases",
    ),
}
REFERENCES = {"paper": "esapn", "tuned": "esapn-dwell-0.5"}
# What a stream depends on, beside the task and the device.
STREAM = ("data", "events", "order", "order_seed", "train_fraction", "batch_size", "history")
# What a comparison sets for all its runs: no method may change it.
COMMON = (
    *("data", "events", "task", "mode", "method", "order", "order_seed", "seed", "device"),
    *("train_fraction", "batch_size", "sizes", "log_every", "patience"),
)


@dataclass(frozen=True)
class Job:
    """One run to be made."""

    label: str
    config: SearchConfig
    folder: Path
    checksum: str

    @property
    def name(self) -> str:
        """File name without its ending."""
        return f"{self.config.task}-{self.config.mode}-{self.label}-s{self.config.seed}"

    @property
    def path(self) -> Path:
        """Where its record goes."""
        return self.folder / "runs" / f"{self.name}.json"


def method_settings(spec: str) -> tuple[str, dict[str, Any]]:
    """The family and the settings of a method named on the command line.

    Raises:
        ConfigError: an unknown method or setting, or a value that is none.

    >>> method_settings("fixed-16")
    ('fixed', {'method': 'fixed', 'fixed_size': 16})
    >>> method_settings("esapn,history=3")[1]
    {'method': 'esapn', 'history': 3}
    """
    if not re.fullmatch(r"[\w.,=+-]+", spec, re.ASCII):
        # It becomes part of a file's name.
        raise ConfigError(f"--methods: {spec!r} has other signs than letters, digits and _.,=+-")
    name, *own = spec.split(",")
    family, _, knob = name.rpartition("-")
    if name in PRESETS:
        settings = dict(PRESETS[name])
        family = str(settings["method"])
    elif family in KNOBS and knob:
        setting, kind, others = KNOBS[family]
        settings = {**others, setting: _number(spec, knob, kind)}
        family = str(settings["method"])
    else:
        known = ", ".join([*PRESETS, *(f"{k}-N" for k in KNOBS)])
        raise ConfigError(f"--methods: unknown method '{name}' (known: {known})")
    defaults = {f.name: getattr(SearchConfig(), f.name) for f in fields(SearchConfig)}
    for pair in own:
        key, equals, text = pair.partition("=")
        if not equals or key not in defaults or key in COMMON:
            raise ConfigError(f"--methods: '{pair}' in '{spec}' is no setting of a method")
        settings[key] = _number(spec, text, type(defaults[key]))
    return family, settings


def _number(spec: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"--methods: '{text}' in '{spec}' is no {kind.__name__}") from None


@lru_cache(maxsize=1)
def _ratings(data: str, events: int, seed: int, options: tuple[tuple[str, str], ...]) -> Ratings:
    chosen: dict[str, Any] = dict(options)
    return load_ratings(data, events=events, seed=seed, **chosen)


@lru_cache(maxsize=1)
def _stream(config: SearchConfig, options: tuple[tuple[str, str], ...]) -> tuple[Ratings, Stream]:
    ratings = _ratings(config.data, config.events, config.order_seed, options)
    return ratings, stream_of(config, ratings)


def run_job(job: Job, options: tuple[tuple[str, str], ...], seconds: float) -> tuple[str, float]:
    """Make one run in this process, going on from its checkpoint; returns label and seconds."""
    torch.set_num_threads(1)
    started = time.monotonic()
    c = job.config
    shared = {name: getattr(c, name) for name in (*STREAM, "task", "device")}
    ratings, stream = _stream(SearchConfig(**shared), options)
    forget_peak()
    run = Run(c, stream)
    folder = job.folder / "checkpoints" / job.name
    resume_or_start(run, folder, ratings.checksum)
    result = run.walk(pause=Saver(folder, ratings.checksum, seconds))
    family, _ = method_settings(job.label)
    about = {"task": c.task, "setting": c.mode, "label": job.label, "family": family}
    write_json(job.path, {**about, "seed": c.seed, **record(c, ratings, stream, result)})
    shutil.rmtree(folder, ignore_errors=True)
    return job.label, time.monotonic() - started


def plan(
    ratings: Ratings,
    *,
    common: dict[str, Any],
    tasks: Sequence[str],
    modes: Sequence[str],
    methods: Sequence[str] | None,
    seeds: Iterable[int],
    folder: Path,
) -> tuple[dict[str, Any], list[Job]]:
    """``compare.json`` and every job of a comparison, finished or not.

    Raises:
        ConfigError: an unknown method, or a setting out of range.
        DataError: the ratings cannot be ordered or cut in batches as ``common`` says.
    """
    tasks, modes = list(dict.fromkeys(tasks)), list(dict.fromkeys(modes))
    seeds = list(dict.fromkeys(seeds))
    jobs: list[Job] = []
    listed: list[dict[str, Any]] = []
    references: dict[str, str] = {}
    for mode in modes:
        labels = list(dict.fromkeys(methods or DEFAULT_METHODS[mode]))
        mine = REFERENCES[mode]
        searches = [label for label in labels if label.startswith("esapn")]
        references[mode] = mine if mine in labels else (searches or labels)[0]
        for label in labels:
            family, settings = method_settings(label)
            text = ", ".join(f"{k} {v}" for k, v in settings.items())
            about = {"label": label, "family": family, "setting": mode}
            listed.append({**about, "text": text, "options": {**MODES[mode], **settings}})
    # The longest first within a seed would end better; seeds that complete one by one read better.
    for seed in seeds:
        for task in tasks:
            for method in listed:
                options = method_settings(method["label"])[1]
                config = SearchConfig.of_mode(
                    method["setting"], **{**common, "task": task, "seed": seed}, **options
                )
                jobs.append(Job(method["label"], config, folder, ratings.checksum))
    header = {
        "data": describe_data(ratings, stream_of(jobs[0].config, ratings)),
        "order": common["order"],
        "tasks": tasks,
        "settings": modes,
        "seeds": seeds,
        "methods": listed,
        "reference": references,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "info": info.collect(),
    }
    return header, jobs


def is_finished(job: Job) -> bool:
    """Whether the job's record is there.

    Raises:
        ConfigError: it is there, but of other settings or data.
    """
    if not job.path.exists():
        return False
    try:
        held = json.loads(job.path.read_text())
        config, checksum = dict(held["config"]), held["data"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return False  # half a record is none
    check_origin(job.path, config, checksum, job.config, job.checksum)
    return True


class Clock:
    """Remaining time from how long each method's runs took so far.

    Example:
        >>> clock = Clock(workers=2)
        >>> clock.took("fixed-16", 10.0)
        >>> clock.left(["fixed-16", "fixed-16"])
        10.0
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.times: dict[str, list[float]] = {}

    def took(self, label: str, seconds: float) -> None:
        """A run of ``label`` has ended."""
        self.times.setdefault(label, []).append(seconds)

    def left(self, labels: Sequence[str]) -> float | None:
        """Seconds until runs of ``labels`` have ended; None while nothing is known."""
        if not self.times:
            return None
        known = {label: statistics.mean(times) for label, times in self.times.items()}
        usual = statistics.mean(known.values())
        return sum(known.get(label, usual) for label in labels) / self.workers


def _follow_parent() -> None:
    """Begin a worker that leaves Ctrl-C to its parent and ends with it.

    Left alone it would go on with the runs that the same command, given again, makes as well.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        if (parent := parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def compare(
    jobs: Sequence[Job],
    options: tuple[tuple[str, str], ...],
    *,
    done: int,
    workers: int,
    seconds: float,
    progress: Callable[[int, int, str, float | None], None],
) -> None:
    """Make runs that have no record yet.

    Args:
        jobs: of :func:`plan`, those that are not finished.
        done: how many are.
        options: of ``load_ratings``, as pairs.
        workers: processes at once.
        seconds: between the checkpoints of a run.
        progress: called with runs done, of how many, the label just done, and the seconds left.

    Raises:
        ConfigError: a process was killed; what had finished stays, and so do checkpoints.
    """
    total = done + len(jobs)
    progress(done, total, "", None)
    if not jobs:
        return
    clock = Clock(workers)
    waiting = [job.label for job in jobs]
    os.environ["OMP_NUM_THREADS"] = "1"
    # spawn: a process forked after torch has made threads can hang.
    others = set(active_children())
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_follow_parent)
    try:
        futures = [pool.submit(run_job, job, options, seconds) for job in jobs]
        for future in as_completed(futures):
            label, took = future.result()
            clock.took(label, took)
            waiting.remove(label)
            done += 1
            progress(done, total, label, clock.left(waiting))
    except BrokenProcessPool:
        raise ConfigError(
            "a run's process was killed (out of memory?); finished runs and checkpoints stay: "
            "the same command goes on"
        ) from None
    except BaseException:
        # Runs under way, and the next ones that are handed out already, would be ended first.
        for worker in set(active_children()) - others:
            worker.terminate()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
