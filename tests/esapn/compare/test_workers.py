"""Runs one by one and in processes of their own, and what a killed process leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing import active_children
from pathlib import Path

import pytest

from esapn.__main__ import main
from esapn.compare import figures, page, workers
from esapn.compare.jobs import Job
from esapn.compare.records import BYTES, load
from esapn.compare.workers import RemainingTime, run_job, run_jobs
from esapn.config import ConfigError
from esapn.jsonfile import write_json
from tests.esapn.compare.planned import (
    OPTIONS,
    SEARCH,
    in_this_process,
    measures,
    only_job,
    planned,
)

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.usefixtures("threads")


# One run


def test_a_record_is_what_the_report_needs(finished, tmp_path):
    header, (job,) = planned(tmp_path, methods=[finished.label])
    job.path.parent.mkdir()
    job.path.write_bytes(finished.path.read_bytes())
    # Neither is of this comparison: a run of an earlier plan, and something else.
    (job.path.parent / "binary-paper-esapn-s0.json").write_bytes(job.path.read_bytes())
    (job.path.parent / "notes.json").write_text("{")
    write_json(tmp_path / "compare.json", header)
    loaded = load(tmp_path)
    (record,) = loaded.records
    assert (loaded.missing, loaded.not_finite) == ((), ())
    about = (record.task, record.mode, record.label, record.family, record.seed)
    assert about == ("binary", "paper", job.label, "esapn", 0)
    held = record.content
    assert about == tuple(held[key] for key in ("task", "mode", "label", "family", "seed"))
    assert held["config"] == job.config.to_json() and held["data"] == header["data"]
    shown = ("loss", "accuracy", "log_loss", "auc", *BYTES, "cpu_seconds")
    for name in (*shown, "wall_seconds", "events_per_second", "peak_rss"):
        assert record.value(name) is not None, name
    text = page.render(loaded, [[]])
    assert job.label in text and "1 of 1" in text


def test_a_run_depends_on_its_job_alone(finished, tmp_path):
    """Neither on the runs that its process made before nor on where its folder is."""
    other, job = only_job(tmp_path, "autoemb,hidden=6"), only_job(tmp_path)
    job.path.parent.mkdir()
    run_job(other, OPTIONS, 60.0)
    run_job(job, OPTIONS, 60.0)
    assert measures(job.path) == measures(finished.path)


# Many runs


def test_remaining_time():
    remaining = RemainingTime(workers=4)
    assert remaining.of(["a"]) is None
    remaining.took("a", 10.0)
    remaining.took("a", 30.0)  # 20 on average
    remaining.took("b", 60.0)
    # c has no finished run: the mean of 20 and 60.
    assert remaining.of(["a", "a", "b", "c"]) == (20 + 20 + 60 + 40) / 4
    assert remaining.of([]) == 0


def test_nothing_left_to_do():
    said = []
    run_jobs([], (), done=3, workers=1, seconds=1, progress=lambda *a: said.append(a))
    assert said == [(3, 3, "", None)]


def wait_for(ready) -> None:
    while not ready():
        time.sleep(0.005)


def in_one_process(jobs: list[Job], progress) -> None:
    """The jobs one after another, a checkpoint at every line of their logs."""
    run_jobs(jobs, OPTIONS, done=0, workers=1, seconds=0, progress=progress)


def checkpoints(job: Job) -> set[str]:
    return {path.name for path in job.checkpoints.glob("step-*.pt")}


def test_a_killed_worker_is_one_line_and_its_run_goes_on(finished, tmp_path, monkeypatch):
    others, killed = set(active_children()), []

    def kill(done: int, total: int, label: str, left: float | None) -> None:
        if done == 1:
            wait_for(lambda: checkpoints(second) or second.path.exists())
            (worker,) = set(active_children()) - others
            worker.kill()
            killed.append(second.path.exists())

    for attempt in range(20):
        _, (first, second) = planned(tmp_path / str(attempt), methods=["biases", SEARCH])
        first.path.parent.mkdir(parents=True)
        killed.clear()
        try:
            in_one_process([first, second], kill)
        except ConfigError as error:
            assert "\n" not in str(error)
            assert str(error).startswith("a run's process was killed (out of memory?); ")
            if not second.path.exists():
                break
        # On a busy machine the second run ended before it was killed: once more.
        assert killed == [True] or second.path.exists()
    assert killed == [False] and first.path.exists() and checkpoints(second)

    said, real = [], workers.resume_or_start
    monkeypatch.setattr(workers, "resume_or_start", lambda *a: said.extend(real(*a)))
    run_job(second, OPTIONS, 60.0)
    assert said[-1].startswith("resumed at event ")
    assert measures(second.path) == measures(finished.path) and not second.checkpoints.exists()


def test_an_interrupt_ends_the_workers(tmp_path):
    """They would first end the run that they are in, and the next one in their queue."""
    first = only_job(tmp_path, "biases")
    methods, stream = [SEARCH, "never,hidden=6"], {"events": 10_000, "batch_size": 20}
    long, last = planned(tmp_path, methods=methods, **stream)[1]
    first.path.parent.mkdir()
    others, left_alone = set(active_children()), []

    def interrupt(done: int, total: int, label: str, left: float | None) -> None:
        if done == 1:
            wait_for(lambda: checkpoints(long))
            (worker,) = set(active_children()) - others
            # Ctrl-C goes to workers as well, and must not end their runs with a traceback each.
            os.kill(worker.pid, signal.SIGINT)
            before = checkpoints(long)
            wait_for(lambda: checkpoints(long) - before or checkpoints(last))
            left_alone.append(not checkpoints(last))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        in_one_process([first, long, last], interrupt)
    assert left_alone == [True]
    wait_for(lambda: set(active_children()) <= others or long.path.exists())
    assert [path.name for path in first.path.parent.iterdir()] == [first.path.name]


def workers_of(parent: int) -> list[int]:
    """Processes that run jobs of ``parent``; its others only keep count of semaphores."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state = (path / "stat").read_text().rpartition(")")[2].split()
            line = (path / "cmdline").read_text()
        except OSError:
            continue  # it has just ended
        if int(state[1]) == parent and state[0] != "Z" and "spawn_main" in line:
            found.append(int(path.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_workers_end_with_a_killed_comparison(tmp_path, monkeypatch):
    """They would write beside those of the same command, given again, which goes on."""
    command = ["compare", "--out", str(tmp_path), "--workers", "1", "--methods", SEARCH]
    command += ["--events", "4000", "--batch-size", "20", "--tasks", "binary", "--seeds", "1"]
    command += ["--log-every", "1", "--checkpoint-seconds"]
    process = subprocess.Popen(
        [sys.executable, "-m", "esapn", *command, "0"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        saved = (tmp_path / "checkpoints").glob
        wait_for(lambda: any(saved("*/step-*.pt")) or process.poll() is not None)
        (worker,) = workers_of(process.pid)
        process.kill()
        process.wait()
        wait_for(lambda: not Path(f"/proc/{worker}").exists())
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            process.wait()

    (run,) = (tmp_path / "checkpoints").iterdir()
    record = tmp_path / "runs" / f"{run.name}.json"
    assert not record.exists()
    said, real = [], workers.resume_or_start
    monkeypatch.setattr(workers, "resume_or_start", lambda *a: said.extend(real(*a)))
    monkeypatch.setattr(workers, "run_jobs", in_this_process)
    monkeypatch.setattr(figures, "FIGURES", {})
    assert main([*command, "60"]) == 0
    assert said[-1].startswith("resumed at event ") and not run.exists()
    assert len(json.loads(record.read_text())["log"]) == 200
    assert "1 of 1 runs" in (tmp_path / "report.html").read_text()
