"""A comparison of runs of under a second, and its jobs."""

from __future__ import annotations

from pathlib import Path

from esapn.compare.jobs import Job, plan
from esapn.data.load import load_ratings

OPTIONS = (("malformed", "refuse"),)
SEARCH = "esapn,hidden=6,policy_hidden=6"


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
