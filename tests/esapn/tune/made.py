"""Walks without runs: a method's losses as a formula."""

from __future__ import annotations

import math
from collections.abc import Callable

from esapn.tune.schedule import Listed
from esapn.tune.walk import Job, Walked


def walked(job: Job, *losses: float) -> Walked:
    """The walk of a job with these losses of its quarters."""
    return Walked(job.method, job.trial, job.order, dict(job.settings), losses, 0.5, 8, 1.0)


def make(job: Job, loss: Callable[[Job], float]) -> Walked:
    """Every quarter has the loss; it stops where a real walk stops."""
    found, losses = loss(job), []
    for limit in job.limits:
        losses.append(found)
        if not (found <= limit and found < math.inf):
            break
    return walked(job, *losses)


def exhaust(listed: Listed, loss: Callable[[Job], float]) -> list[Job]:
    """All walks, one at a time."""
    jobs = []
    while (job := listed.next()) is not None:
        jobs.append(job)
        listed.add(make(job, loss))
    assert not listed.open
    return jobs
