"""``python -m esapn compare`` and ``report``: what they write, and mistakes a user can make."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from esapn.__main__ import main
from esapn.compare import figures, workers
from esapn.compare.records import load
from esapn.config import ConfigError
from esapn.jsonfile import write_json
from tests.esapn.compare.planned import SEARCH, in_this_process, measures, planned

COMMAND = ["--events", "600", "--batch-size", "50", "--tasks", "binary", "--seeds", "2"]
COMMAND += ["--sizes", "1", "2", "4", "--workers", "1", "--methods", SEARCH, "biases"]
pytestmark = pytest.mark.usefixtures("threads")


def command(out: Path, *more: object) -> int:
    try:
        return main(["compare", *COMMAND, "--out", str(out), *map(str, more)])
    except SystemExit as leave:
        return int(leave.code or 0)


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ConfigError("a run was killed"), 2, "python -m esapn compare: error: a run was killed"),
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on"),
    ],
)
def test_the_same_command_goes_on(error, status, said, tmp_path, capsys, monkeypatch):
    begun = []

    def broken(jobs, *arguments, **options):
        in_this_process(jobs[:2], *arguments, **options)
        raise error

    def whole(jobs, *arguments, **options):
        begun.extend(job.name for job in jobs)
        in_this_process(jobs, *arguments, **options)

    monkeypatch.setattr(workers, "run_jobs", broken)
    assert command(tmp_path) == status
    *bar, line = capsys.readouterr().err.splitlines()
    assert line == said
    assert not any("Traceback" in text or "Error" in text for text in bar)
    header = json.loads((tmp_path / "compare.json").read_text())
    held = {path: path.read_bytes() for path in (tmp_path / "runs").glob("*.json")}
    assert len(held) == 2 and not (tmp_path / "report.html").exists()

    monkeypatch.setattr(workers, "run_jobs", whole)
    monkeypatch.setattr(figures, "FIGURES", {})
    assert command(tmp_path) == 0
    assert begun == [f"binary-paper-{label}-s1" for label in (SEARCH, "biases")]
    assert all(path.read_bytes() == content for path, content in held.items())
    loaded = load(tmp_path)
    assert len(loaded.records) == 4 and loaded.header["started"] == header["started"]
    assert "4 of 4 runs" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "results.csv").exists()
    assert not list((tmp_path / "checkpoints").glob("*"))

    capsys.readouterr()
    assert command(tmp_path, "--sizes", 2, 4) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "other settings (sizes" in line and "another --out" in line


def test_ratings_on_another_scale(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(workers, "run_jobs", in_this_process)
    monkeypatch.setattr(figures, "FIGURES", {})
    data, out = tmp_path / "ratings.csv", tmp_path / "out"
    rows = "".join(f"{t % 7},{t % 5},{t % 10 + 1}\n" for t in range(300))
    data.write_text("user,item,rating\n" + rows)
    options = ["--data", data, "--seeds", 1, "--methods", "never,row_accumulator=0.5"]
    assert command(out, *options, "--positive-above", 7.5) == 0
    (held,) = load(out).records
    assert held.content["config"]["positive_above"] == 7.5
    assert held.content["config"]["row_accumulator"] == 0.5
    capsys.readouterr()
    assert command(out, *options, "--positive-above", 6) == 2
    assert "other settings (positive_above 7.5 -> 6.0)" in capsys.readouterr().err
    # Of two tasks, five classes cannot hold such ratings.
    both = ["--tasks", "binary", "multiclass"]
    assert command(tmp_path / "both", *options, *both) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "row 6: rating 6 is outside 0.5..5 (150 rows are bad in this way, of 300)" in line
    assert command(tmp_path / "both", *options, *both, "--malformed", "skip") == 0
    records = load(tmp_path / "both").records
    assert [r.content["data"]["events"] for r in records] == [150, 150]


# The methods of a comparison, and the arguments that give each in a search.
SINGLE = {
    "esapn": [],
    "fixed-4": ["--method", "fixed", "--fixed-size", "4"],
    "biases": ["--method", "biases"],
}


def test_runs_are_those_of_single_searches(no_figure, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "run_jobs", in_this_process)
    monkeypatch.setattr(figures, "FIGURES", {})
    parts, common = tmp_path / "parts", ["--events", "1000", "--batch-size", "50"]
    common += ["--log-every", "1"]
    whole = [*common, "--tasks", "binary", "--seeds", "2", "--methods", *SINGLE]
    assert main(["compare", *whole, "--out", str(parts)]) == 0
    page = (parts / "report.html").read_text()
    assert all(label in page for label in SINGLE)
    assert len(list((parts / "runs").iterdir())) == 6
    for label, arguments in SINGLE.items():
        for seed in (0, 1):
            out = tmp_path / f"{label}-{seed}"
            one = [*common, *arguments, "--seed", str(seed), "--out", str(out)]
            assert main(["search", *one]) == 0
            record = parts / "runs" / f"binary-paper-{label}-s{seed}.json"
            assert measures(record) == measures(out / "result.json")


@pytest.mark.parametrize("taken", ["out", "out/runs", "out/compare.json"])
def test_an_out_that_cannot_be_written(taken, tmp_path, capsys):
    out, place = tmp_path / "out", tmp_path / taken
    place.parent.mkdir(exist_ok=True)
    if place.suffix:
        place.mkdir()
    else:
        place.write_text("mine")
    assert command(out) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == "" and line.startswith("python -m esapn compare: error: ")
    assert str(place) in line
    assert place.is_dir() or place.read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--workers", -1], "--workers must be at least 0, got -1"),
        (["--checkpoint-seconds", -1], "--checkpoint-seconds must be at least 0, got -1.0"),
        (["--methods", "esapn,batch_size=100"], "'batch_size=100'"),
        (["--methods", "esapn,order_seed=1"], "'order_seed=1'"),
        (["--events", 99], "fewer than two batches"),
        (["--tasks", "other"], "--tasks"),
        (["--methods"], "--methods"),
        (["--methods", "nothing"], "unknown method 'nothing'"),
        (["--methods", "fixed-x"], "'x' in 'fixed-x' is no int"),
        (["--methods", "esapn,seed=3"], "'seed=3' in 'esapn,seed=3' is no setting of a method"),
        (["--methods", "esapn,history=0"], "--history must be at least 1"),
        (["--seeds", 0], "--seeds must be at least 1"),
        (["--modes", "odd"], "invalid choice: 'odd'"),
        (["--data", "absent.csv"], "absent.csv"),
    ],
)
def test_mistakes_leave_nothing_behind(arguments, expected, tmp_path, capsys):
    out = tmp_path / "out"
    assert command(out, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line and not out.exists()


def test_a_comparison_of_other_data_stays_as_it_is(tmp_path, capsys):
    header, _ = planned(tmp_path, events=700)
    write_json(tmp_path / "compare.json", header)
    before = (tmp_path / "compare.json").read_bytes()
    assert command(tmp_path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is of other data or another order; use another --out" in line
    assert (tmp_path / "compare.json").read_bytes() == before


def test_a_report_of_nothing_is_one_line(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m esapn report: error: ") and "compare.json" in line
    assert not list(tmp_path.iterdir())
