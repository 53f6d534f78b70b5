"""Runs that are killed, whose disk fills or whose checkpoints are damaged end as if undisturbed."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from esapn.run import checkpoint
from tests.esapn.commands import ROOT, run

pytestmark = pytest.mark.usefixtures("no_figure", "threads")

SMALL = ["--events", "2000", "--batch-size", "50", "--hidden", "8", "--policy-hidden", "8"]
SMALL += ["--max-frequency", "16", "--log-every", "1", "--checkpoint-seconds", "0"]
METHODS = {
    "paper": [],
    "rich": ["--mode", "tuned", "--state", "rich", "--advantage", "normalised"],
}
MEASURES = ("test", "train", "memory", "bytes", "log", "by_frequency", "sizes_by_frequency")


def measures(path: Path) -> dict:
    saved = json.loads(path.read_text())
    return {name: saved[name] for name in MEASURES}


def search(*arguments: object) -> int:
    return run("search", *SMALL, *arguments)


def start(command: str, *arguments: object) -> subprocess.Popen:
    """The command as a process group of its own, to be killed with all its children."""
    line = [sys.executable, "-m", "esapn", command, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        line,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def stop_when(process: subprocess.Popen, ready, moment: float) -> None:
    """SIGKILL for the process and its children, ``moment`` seconds after ``ready()``."""
    while not ready() and process.poll() is None:
        time.sleep(0.05)
    time.sleep(moment)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.fixture(scope="module")
def undisturbed(no_figure, tmp_path_factory) -> dict[str, dict]:
    found = {}
    for name, arguments in METHODS.items():
        out = tmp_path_factory.mktemp(name)
        assert search(*arguments, "--out", out) == 0
        assert not (out / "checkpoints").exists()
        found[name] = measures(out / "result.json")
    return found


class Interrupted(Exception):
    pass


def break_off(monkeypatch, step: int, out: Path, *arguments: object) -> None:
    """A run that dies, without any chance to clean up, when it has saved ``step``."""
    real = checkpoint.save

    def dying(folder, at, state, **options):
        path = real(folder, at, state, **options)
        if at >= step:
            raise Interrupted
        return path

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", dying)
        with pytest.raises(Interrupted):
            search(*arguments, "--out", out)


def test_killed_at_random_moments(undisturbed, tmp_path):
    generator = random.Random("rich")
    folder = tmp_path / "checkpoints"
    for attempt in range(2):
        resume = ["--resume"] if attempt else []
        before = max(folder.glob("step-*.pt"), default=None)
        process = start("search", *SMALL, *METHODS["rich"], "--out", tmp_path, *resume)
        stop_when(
            process,
            lambda before=before: max(folder.glob("step-*.pt"), default=None) != before,
            generator.uniform(0, 0.4),
        )
    if not (tmp_path / "result.json").exists():
        assert search(*METHODS["rich"], "--out", tmp_path, "--resume") == 0
    assert measures(tmp_path / "result.json") == undisturbed["rich"]


@pytest.mark.parametrize("name", METHODS)
def test_a_truncated_checkpoint_is_passed_over(name, undisturbed, tmp_path, monkeypatch, capsys):
    break_off(monkeypatch, 20, tmp_path, *METHODS[name])
    newest = max((tmp_path / "checkpoints").glob("step-*.pt"))
    newest.write_bytes(newest.read_bytes()[:-100])
    capsys.readouterr()
    assert search(*METHODS[name], "--out", tmp_path, "--resume") == 0
    said = capsys.readouterr().out
    assert newest.name in said and "resumed at event 950 from step-000000019.pt" in said
    assert measures(tmp_path / "result.json") == undisturbed[name]


def test_no_good_checkpoint_is_one_line(tmp_path, monkeypatch, capsys):
    break_off(monkeypatch, 5, tmp_path)
    files = sorted((tmp_path / "checkpoints").glob("step-*.pt"))
    for path in files:
        path.write_bytes(b"nothing")
    capsys.readouterr()
    assert search("--out", tmp_path, "--resume") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "error" in line and "checkpoints" in line
    assert sorted((tmp_path / "checkpoints").glob("step-*.pt")) == files


def test_a_full_disk_stops_the_run_and_nothing_is_lost(undisturbed, tmp_path, monkeypatch, capsys):
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 25:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert search("--out", tmp_path) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "No space left on device" in line and "still stands" in line
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))
    assert search("--out", tmp_path, "--resume") == 0
    assert measures(tmp_path / "result.json") == undisturbed["paper"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--lr", 0.5], "lr 0.001 -> 0.5"),
        (["--events", 4000], "other data"),
        (["--method", "darts"], "method esapn -> darts"),
    ],
)
def test_other_settings_are_refused(arguments, expected, tmp_path, monkeypatch, capsys):
    break_off(monkeypatch, 5, tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()}
    capsys.readouterr()
    assert search(*arguments, "--out", tmp_path, "--resume") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line
    assert {path: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()} == before


def test_an_unfinished_run_is_not_overwritten(tmp_path, monkeypatch, capsys):
    break_off(monkeypatch, 5, tmp_path)
    capsys.readouterr()
    assert search("--out", tmp_path) == 2
    assert "--resume" in capsys.readouterr().err
