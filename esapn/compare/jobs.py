"""The plan of a comparison: one job for every task, mode, method and seed, on one stream.

DIR/compare.json                             what is compared, and on which data
DIR/runs/{task}-{mode}-{label}-s{seed}.json  the record of one finished run
DIR/checkpoints/                             of unfinished runs
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from esapn_kernels import info

from ..config import SearchConfig, mode_defaults
from ..data.ratings import Ratings
from ..jsonfile import load_json
from ..methods import DEFAULT_METHODS, REFERENCES, method_settings
from ..run.loop import check_budget, stream_of
from ..run.result import describe_data
from ..run.resume import check_origin

__all__ = ["Job", "is_finished", "plan", "record_name"]


def record_name(task: str, mode: str, label: str, seed: int) -> str:
    """File name of a run's record, without its ending."""
    return f"{task}-{mode}-{label}-s{seed}"


@dataclass(frozen=True)
class Job:
    """One planned run; ``checksum`` is the SHA-256 of its data."""

    label: str
    config: SearchConfig
    folder: Path
    checksum: str

    @property
    def name(self) -> str:
        """Of its record and of its folder of checkpoints."""
        return record_name(self.config.task, self.config.mode, self.label, self.config.seed)

    @property
    def path(self) -> Path:
        """Of its record."""
        return self.folder / "runs" / f"{self.name}.json"

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.folder / "checkpoints" / self.name


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

    Args:
        ratings: the data of all runs.
        common: settings of all runs.
        tasks: what is predicted.
        modes: whose defaults the runs have.
        methods: as :func:`method_settings` takes them; None: ``DEFAULT_METHODS`` of each mode.
        seeds: one run of every task, mode and method for each.
        folder: of the comparison.

    Raises:
        ConfigError: an unknown method, or a setting out of range.
        DataError: the ratings cannot be ordered or cut in batches as ``common`` says.
    """
    tasks, modes = list(dict.fromkeys(tasks)), list(dict.fromkeys(modes))
    seeds = list(dict.fromkeys(seeds))
    listed = [
        _method(mode, label, tasks)
        for mode in modes
        for label in dict.fromkeys(methods or DEFAULT_METHODS[mode])
    ]
    # The longest first within a seed would end better; seeds that complete one by one read better.
    jobs = [
        Job(method["label"], _config(method, common, task, seed), folder, ratings.checksum)
        for seed in seeds
        for task in tasks
        for method in listed
    ]
    stream = stream_of(jobs[0].config, ratings)
    for job in jobs:
        check_budget(job.config, stream)
    header = {
        "data": describe_data(ratings, stream),
        "order": common["order"],
        "tasks": tasks,
        "modes": modes,
        "seeds": seeds,
        "methods": listed,
        "reference": {mode: _reference(mode, listed) for mode in modes},
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "info": info.collect(),
    }
    return header, jobs


def _method(mode: str, label: str, tasks: Sequence[str]) -> dict[str, Any]:
    """What ``compare.json`` says of a method; settings that differ by task are named with it."""
    family, settings = method_settings(label)
    if settings.get("hops") == "tails":
        family += ", tails"
    return {
        "label": label,
        "family": family,
        "mode": mode,
        "text": ", ".join(f"{k} {v}" for k, v in settings.items()),
        "options": {**_by_task(mode, settings, tasks), **settings},
    }


def _by_task(mode: str, settings: dict[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    found = {task: mode_defaults(mode, {**settings, "task": task}) for task in tasks}
    options: dict[str, Any] = {}
    for name in dict.fromkeys(name for defaults in found.values() for name in defaults):
        values = {task: defaults[name] for task, defaults in found.items() if name in defaults}
        if len(values) == len(tasks) and len(set(values.values())) == 1:
            options[name] = values[tasks[0]]
        else:
            options[name] = ", ".join(f"{value} ({task})" for task, value in values.items())
    return options


def _config(method: dict[str, Any], common: dict[str, Any], task: str, seed: int) -> SearchConfig:
    _, settings = method_settings(method["label"])
    return SearchConfig.of_mode(method["mode"], **common, task=task, seed=seed, **settings)


def _reference(mode: str, listed: Sequence[dict[str, Any]]) -> str:
    """The mode's own reference, else the first search, else the first method."""
    labels = [method["label"] for method in listed if method["mode"] == mode]
    if REFERENCES[mode] in labels:
        return REFERENCES[mode]
    searches = [label for label in labels if label.startswith("esapn")]
    return (searches or labels)[0]


def is_finished(job: Job) -> bool:
    """Whether the job's record is there and whole.

    Raises:
        ConfigError: it is there, but of other settings or data.
    """
    if not job.path.exists():
        return False
    try:
        held = load_json(job.path)
        config, checksum = dict(held["config"]), held["data"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    check_origin(job.path, config, checksum, job.config, job.checksum)
    return True
