"""Fixtures of several files of tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from esapn.compare.jobs import Job
    from esapn.compare.records import Group


@pytest.fixture
def threads(monkeypatch):
    """A job sets the number of threads of the whole process, a comparison that of its workers."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Job:
    """A job with its record."""
    from esapn.compare.workers import run_job
    from tests.esapn.compare.planned import OPTIONS, only_job

    job = only_job(tmp_path_factory.mktemp("finished"))
    job.path.parent.mkdir()
    label, seconds = run_job(job, OPTIONS, 60.0)
    assert label == job.label and seconds > 0
    return job


@pytest.fixture(scope="session")
def tuned(tmp_path_factory) -> Group:
    """A group of made-up records of 18 methods and five seeds."""
    from esapn.compare.records import load
    from tests.esapn.fake_comparison import write_comparison

    folder = tmp_path_factory.mktemp("comparison") / "out"
    write_comparison(folder, tasks=("binary",), modes=("tuned",))
    return load(folder).groups[0]
