"""``main``: errors as one line and a status, and the commands as a user starts them."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys

import pytest
import torch

from esapn.compare import figures, workers
from esapn.config import SearchConfig
from esapn.data.load import load_ratings
from esapn.run.loop import Run, stream_of
from tests.esapn.commands import CSV, ROOT, ROWS, SMALL, refused, run, search
from tests.esapn.compare.planned import in_this_process

pytestmark = pytest.mark.usefixtures("no_figure", "threads")

# Errors


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_no_memory(error, tmp_path, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("esapn.run.command.stream_of", fail)
    assert refused(capsys, *SMALL, "--out", tmp_path).endswith("error: out of memory\n")


def test_an_error_of_the_program_is_not_hidden(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr("esapn.run.command.stream_of", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        search(*SMALL, "--out", tmp_path)


@pytest.mark.parametrize("place", ["esapn.cli.load_ratings", "esapn.run.loop.Run.step"])
def test_an_interrupt_is_one_line(place, tmp_path, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(place, interrupt)
    assert search(*SMALL, "--out", tmp_path) == 130
    # The progress bar, where there is one, draws over its own line.
    *bar, line = capsys.readouterr().err.splitlines()
    assert line == "interrupted; --resume goes on"
    assert all(not text or "batch" in text for text in bar)
    assert list(tmp_path.iterdir()) == []


def test_as_a_process(tmp_path):
    """A run the way a user starts it: no traceback, no warning, and its figure is drawn."""
    command = [sys.executable, "-m", "esapn", "search", *SMALL, "--sizes", "1", "3", "5"]
    out = tmp_path / "out"
    done = subprocess.run([*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    assert (out / "run.png").is_file()


def test_a_mistake_is_the_status_of_the_process(tmp_path, monkeypatch, capsys):
    arguments = ["search", "--sizes", "3", "1", "--out", str(tmp_path / "not")]
    monkeypatch.setattr(sys, "argv", ["esapn", *arguments])
    monkeypatch.delitem(sys.modules, "esapn.__main__")
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("esapn", run_name="__main__", alter_sys=True)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == ""
    assert captured.err == (
        "python -m esapn search: error: "
        "--sizes must be positive and strictly increasing, got [3, 1]\n"
    )
    assert not list(tmp_path.iterdir())


# Comparisons (the rest is in tests/esapn/compare)


def test_a_comparison_of_a_file_in_time_order(tmp_path, capsys):
    data, out = tmp_path / "ratings.csv", tmp_path / "out"
    data.write_text(CSV + ROWS + "1,2,NaN,3\n")
    arguments = ["--data", data, "--order", "time", "--batch-size", 50, "--sizes", 2, 4]
    arguments += ["--malformed", "skip", "--tasks", "binary", "--seeds", 2, "--workers", 1]
    arguments += ["--methods", "esapn,hidden=8", "biases", "--out", out]
    assert run("compare", *arguments) == 0
    header = json.loads((out / "compare.json").read_text())
    assert header["order"] == "time" and header["seeds"] == [0, 1]
    assert header["data"]["counts"]["skipped"] == 1
    records = [json.loads(path.read_text()) for path in sorted((out / "runs").iterdir())]
    assert len(records) == 4
    for record in records:
        assert record["config"]["order"] == "time"
        assert record["data"] == header["data"]
    assert {r["config"]["hidden"] for r in records if r["family"] == "esapn"} == {8}
    assert not list((out / "checkpoints").glob("*"))
    captured = capsys.readouterr()
    assert "4 runs, 1 at once" in captured.out and "1 skipped" in captured.out
    assert f"wrote {out / 'report.html'}" in captured.out
    page = (out / "report.html").read_text()
    assert "esapn,hidden=8" in page and "ratings.csv" in page and "4 of 4" in page


def test_a_comparison_on_another_shuffle(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "run_jobs", in_this_process)
    monkeypatch.setattr(figures, "FIGURES", {})
    data = tmp_path / "ratings.csv"
    data.write_text(CSV + ROWS)
    arguments = ["--data", data, "--batch-size", 50, "--tasks", "binary", "--seeds", 1]
    arguments += ["--methods", "biases", "--workers", 1, "--order-seed", 3]
    assert run("compare", *arguments, "--out", tmp_path / "out") == 0
    (path,) = (tmp_path / "out" / "runs").iterdir()
    record = json.loads(path.read_text())
    assert record["config"]["order_seed"] == 3 and record["config"]["seed"] == 0
    # The biases draw nothing: only the order differs.
    ratings, losses = load_ratings(data), {}
    for order_seed in (0, 3):
        config = SearchConfig(method="biases", batch_size=50, order_seed=order_seed)
        losses[order_seed] = Run(config, stream_of(config, ratings)).walk().test["loss"]
    assert record["test"]["loss"] == losses[3] != losses[0]
