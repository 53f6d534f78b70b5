"""The command line: what a run prints and writes, and every mistake a user can make."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from esapn.__main__ import main

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--events", "600", "--batch-size", "50", "--hidden", "8"]
SMALL += ["--policy-hidden", "8", "--max-frequency", "16"]
CSV = "user,item,rating,timestamp\n"
ROWS = "".join(f"{t % 7},{t % 5},{t % 10 / 2 + 0.5},{t}\n" for t in range(300))


@pytest.fixture(autouse=True)
def threads():
    """A run sets the number of threads of the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def search(*arguments: object) -> int:
    """Runs ``main`` in this process; argparse leaves by SystemExit."""
    try:
        return main(["search", *map(str, arguments)])
    except SystemExit as leave:
        return int(leave.code or 0)


# Runs


@pytest.mark.parametrize(
    ("task", "method", "order"),
    [
        ("binary", "esapn", "shuffle"),
        ("binary", "fixed", "time"),
        ("multiclass", "esapn", "time"),
        ("multiclass", "fixed", "shuffle"),
    ],
)
def test_runs(task, method, order, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    arguments = [*SMALL, "--task", task, "--method", method, "--order", order, "--fixed-size", 6]
    assert search(*arguments, "--sizes", 1, 3, 5, "--seed", 2, "--device", "cpu", "--out", out) == 0
    assert sorted(path.name for path in out.iterdir()) == ["result.json", "run.png"]
    saved = json.loads((out / "result.json").read_text())
    given = {"task": task, "method": method, "order": order, "seed": 2, "sizes": [1, 3, 5]}
    assert given.items() <= saved["config"].items()
    sizes = ["1", "3", "5"] if method == "esapn" else ["6"]
    for side in saved["memory"].values():
        assert list(side["rows_per_size"]) == sizes
    assert saved["test"]["events"] + saved["train"]["events"] == 600
    printed = capsys.readouterr().out
    name = "esapn (paper)" if method == "esapn" else "fixed"
    assert f"{name}, {task}, {order} order, seed 2" in printed
    assert "600 events, 50 users, 50 items; test part from event 450 on; cpu" in printed
    assert f"accuracy {saved['test']['accuracy']:.4f}" in printed
    assert f"wrote {out / 'result.json'} and {out / 'run.png'}" in printed


def test_a_file_of_ratings(tmp_path):
    data, out = tmp_path / "ratings.csv", tmp_path / "out"
    data.write_text(CSV + ROWS)
    assert search(*SMALL, "--data", data, "--sizes", 2, "--order", "time", "--out", out) == 0
    saved = json.loads((out / "result.json").read_text())
    assert saved["data"]["name"] == "ratings.csv"
    assert [saved["data"][key] for key in ("events", "users", "items")] == [300, 7, 5]


def test_equal_runs_give_equal_results_and_replace_earlier_ones(tmp_path):
    saved = []
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "result.json").write_text("earlier" * 10_000)
    for name in ("a", "b"):
        assert search(*SMALL, "--seed", 4, "--out", tmp_path / name) == 0
        saved.append(json.loads((tmp_path / name / "result.json").read_text()))
    for key in ("test", "train", "memory", "log", "config", "data"):
        assert saved[0][key] == saved[1][key]


def test_help_names_every_setting(capsys):
    assert search("--help") == 0
    text = capsys.readouterr().out
    for flag in ("--sizes", "--policy-lr", "--train-fraction", "--out", "--threads"):
        assert flag in text
    assert "(default: 500)" in text


# Mistakes


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a mistake gives."""
    assert search(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith("\n") and captured.err.count("\n") == 1
    assert re.match(r"python -m esapn( search)?: error: \S", captured.err)
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--sizez", "2"], "--sizez"),
        (["--task", "ternary"], "--task"),
        (["--method", "darts"], "--method"),
        (["--order", "random"], "--order"),
        (["--device", "tpu"], "--device"),
        (["--sizes", "4", "2"], "--sizes must be positive and strictly increasing"),
        (["--sizes", "0", "2"], "--sizes must be positive and strictly increasing"),
        (["--sizes", "2.5"], "--sizes"),
        (["--sizes"], "--sizes"),
        (["--batch-size", "1"], "--batch-size must be at least 2"),
        (["--batch-size", "many"], "--batch-size"),
        (["--lr", "nan"], "--lr must be positive"),
        (["--lr", "inf"], "--lr must be positive"),
        (["--train-fraction", "1"], "--train-fraction"),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(2**80)], "--seed"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--events", "0"], "--events must be at least 1"),
        (["--events", "60"], "60 events are fewer than two batches of 50"),
        (["--data", "nowhere.csv"], "nowhere.csv: no such file"),
    ],
)
def test_mistakes_in_settings(arguments, expected, tmp_path, capsys):
    out = tmp_path / "out"
    assert expected in refused(capsys, *SMALL, *arguments, "--out", out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("content", "arguments", "expected"),
    [
        ("", [], "file is empty"),
        (CSV, [], "holds no ratings"),
        ("user,item\n1,2\n", [], "column 'rating' not found"),
        (CSV + "1,2,NaN,3\n" + ROWS, [], "row 1: rating 'NaN' is not a finite number"),
        (CSV + ROWS + "1,2,9,3\n", [], "row 301: rating '9' is outside 0.5..5"),
        (CSV + ROWS + "1,,4,3\n", [], "row 301: item is missing"),
        ("user,item,rating\n" + "1,2,4\n" * 300, ["--order", "time"], "timestamps"),
    ],
)
def test_mistakes_in_data(content, arguments, expected, tmp_path, capsys):
    data, out = tmp_path / "ratings.csv", tmp_path / "out"
    data.write_text(content)
    line = refused(capsys, *SMALL, *arguments, "--data", data, "--out", out)
    assert expected in line and "ratings.csv" in line
    assert not out.exists()


@pytest.mark.parametrize("below", [(), ("deeper",)])
def test_a_file_where_the_folder_should_be(below, tmp_path, capsys):
    place = tmp_path / "taken"
    place.write_text("mine")
    assert "--out " in refused(capsys, *SMALL, "--out", place.joinpath(*below))
    assert place.read_text() == "mine"


def test_a_folder_where_the_result_should_be(tmp_path, capsys):
    (tmp_path / "result.json").mkdir()
    assert "--out " in refused(capsys, *SMALL, "--out", tmp_path)


def test_an_earlier_result_survives_a_mistake(tmp_path, capsys):
    (tmp_path / "result.json").write_text("earlier")
    refused(capsys, *SMALL, "--data", "nowhere.csv", "--out", tmp_path)
    assert (tmp_path / "result.json").read_text() == "earlier"


def test_out_is_required(capsys):
    assert "--out" in refused(capsys, *SMALL)


@pytest.mark.parametrize("arguments", [[], ["train"]])
def test_a_command_is_required(arguments, capsys):
    with pytest.raises(SystemExit) as leave:
        main(arguments)
    assert leave.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1


def test_no_cuda_device(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "out"
    line = refused(capsys, *SMALL, "--device", "cuda", "--out", out)
    assert "--device cuda: no CUDA device was found" in line
    assert not out.exists()


# Ctrl-C


@pytest.mark.parametrize("place", ["esapn.__main__.load_ratings", "esapn.run.Run.step"])
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
    """One run and one mistake the way a user starts them: nothing but one line, no traceback."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "esapn", "search", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

    done = run(*SMALL, "--sizes", 1, 3, 5, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and (tmp_path / "out" / "run.png").is_file()
    failed = run("--sizes", 3, 1, "--out", tmp_path / "not")
    assert failed.returncode == 2 and failed.stdout == ""
    assert failed.stderr == (
        "python -m esapn search: error: "
        "--sizes must be positive and strictly increasing, got [3, 1]\n"
    )
