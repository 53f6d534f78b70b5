"""A comparison of runs of under a second, and its jobs."""

from __future__ import annotations

import json
from pathlib import Path

from esapn.compare.jobs import Job, plan
from esapn.compare.workers import run_job
from esapn.data.load import load_ratings

OPTIONS = (("malformed", "refuse"),)
SEARCH = "esapn,hidden=6,policy_hidden=6"
MEASURES = ("test", "train", "memory", "bytes", "log", "by_frequency", "sizes_by_frequency")


def planned(folder: Path, ratings=None, **changes):
    """Header and jobs of a small comparison."""
    common = {
        "data": "synthetic",
        "order": "shuffle",
        "device": "cpu",
        "train_fraction": 0.75,
        "events": 600,
        "sizes": (1, 2, 4),
        "batch_size": 50,
        "log_every": 2,
    }
    whole = {"tasks": ["binary"], "modes": ["paper"], "methods": None, "seeds": range(1)}
    common |= {key: value for key, value in changes.items() if key in common}
    whole |= {key: value for key, value in changes.items() if key in whole}
    ratings = load_ratings("synthetic", events=common["events"]) if ratings is None else ratings
    return plan(ratings, common=common, folder=folder, **whole)


def only_job(folder: Path, method: str = SEARCH, **changes) -> Job:
    (job,) = planned(folder, methods=[method], **changes)[1]
    return job


def in_this_process(jobs, options, *, done, workers, seconds, progress):
    """``run_jobs`` without processes."""
    total = done + len(jobs)
    for job in jobs:
        label, _ = run_job(job, options, seconds)
        done += 1
        progress(done, total, label, None)


def measures(path: Path) -> dict:
    """What a record or a result holds that does not depend on the machine."""
    content = json.loads(path.read_text())
    return {name: content[name] for name in MEASURES}
