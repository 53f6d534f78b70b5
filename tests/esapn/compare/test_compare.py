"""A comparison's plan, its jobs one by one, and what is left of it when something breaks."""

from __future__ import annotations

import csv
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from esapn.__main__ import main
from esapn.compare import contrasts as statistics
from esapn.compare import jobs as comparison
from esapn.compare import page
from esapn.compare.jobs import (
    COMMON,
    DEFAULT_METHODS,
    KNOBS,
    PRESETS,
    REFERENCES,
    Clock,
    Job,
    is_finished,
    method_settings,
    plan,
    run_job,
)
from esapn.config import CHOICES, MODES, ConfigError, SearchConfig
from esapn.data.load import DataError, build_stream, load_ratings, synthetic_ratings
from esapn.run.result import write_json

ROOT = Path(__file__).resolve().parents[3]
SIDES = {"n_users": 30, "n_items": 20}
COMMAND = ["--events", "3000", "--batch-size", "50", "--tasks", "binary", "--seeds", "2"]
COMMAND += ["--checkpoint-seconds", "0", "--log-every", "1", "--workers", "1"]
COMMAND += ["--methods", "esapn", "biases"]
OPTIONS = (("malformed", "refuse"),)


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """A job sets the number of threads of the whole process, a comparison that of its workers."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


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


def only_job(folder: Path, method: str = "esapn,hidden=6,policy_hidden=6") -> Job:
    (job,) = planned(folder, methods=[method])[1]
    return job


def command(out: Path, *more: object) -> int:
    try:
        return main(["compare", *COMMAND, "--out", str(out), *map(str, more)])
    except SystemExit as leave:
        return int(leave.code or 0)


# Methods


@pytest.mark.parametrize("label", PRESETS)
def test_presets(label):
    family, settings = method_settings(label)
    assert settings == PRESETS[label] and family == settings["method"]
    settings["hidden"] = 1
    assert "hidden" not in PRESETS[label]


@pytest.mark.parametrize(
    ("spec", "family", "setting", "value"),
    [
        ("fixed-16", "fixed", "fixed_size", 16),
        ("fixed-222", "fixed", "fixed_size", 222),
        ("esapn-dwell-0.5", "esapn", "dwell", 0.5),
        ("always-dwell-8", "always", "dwell", 8.0),
        ("random-1e-3", "random", "promote_probability", None),
        ("random-0.02", "random", "promote_probability", 0.02),
        ("thresholds-16", "thresholds", "threshold", 16.0),
        ("power-0.5", "power", "power_scale", 0.5),
    ],
)
def test_knobs(spec, family, setting, value):
    if value is None:
        with pytest.raises(ConfigError, match="unknown method 'random-1e-3'"):
            method_settings(spec)
        return
    found, settings = method_settings(spec)
    assert (found, settings["method"]) == (family, family)
    assert settings[setting] == value and type(settings[setting]) is type(value)


def test_settings_of_its_own_win_over_those_of_the_preset():
    family, settings = method_settings("esapn-rich,policy_lr=1e-2,history=3,state=paper")
    assert family == "esapn"
    changed = {"policy_lr": 0.01, "history": 3, "state": "paper"}
    assert settings == PRESETS["esapn-rich"] | changed
    assert type(settings["history"]) is int
    assert method_settings("fixed-16,tower=plain")[1]["tower"] == "plain"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("nothing", "unknown method 'nothing' (known: esapn, "),
        ("nothing-3", "unknown method 'nothing-3'"),
        ("fixed", "unknown method 'fixed'"),
        ("fixed-", "unknown method 'fixed-'"),
        ("fixed--4", "unknown method 'fixed--4'"),
        ("esapn-dwell", "unknown method 'esapn-dwell'"),
        ("fixed-x", "'x' in 'fixed-x' is no int"),
        ("fixed-1.5", "'1.5' in 'fixed-1.5' is no int"),
        ("power-many", "'many' in 'power-many' is no float"),
        ("esapn,history", "'history' in 'esapn,history' is no setting of a method"),
        ("esapn,", "'' in 'esapn,' is no setting of a method"),
        ("esapn,histories=3", "'histories=3'"),
        ("esapn,history=3.5", "'3.5' in 'esapn,history=3.5' is no int"),
        *((f"esapn,{name}=1", f"'{name}=1' in") for name in COMMON),
        ("", "''"),
        ("esapn, history=3", "'esapn, history=3' has other signs"),
        ("../esapn", "'../esapn' has other signs"),
        ("fixed-\N{FULLWIDTH DIGIT FOUR}", "has other signs"),
        ("esapn\n", "'esapn\\n' has other signs"),
    ],
)
def test_a_method_that_is_refused_is_named_on_one_line(spec, expected):
    with pytest.raises(ConfigError) as caught:
        method_settings(spec)
    message = str(caught.value)
    assert message.startswith("--methods: ") and expected in message and "\n" not in message


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("fixed-0", "--fixed-size must be at least 1, got 0"),
        ("random-2", "--promote-probability must lie between 0 and 1, got 2.0"),
        ("power-nan", "--power-scale must be positive and finite, got nan"),
        ("esapn,tower=round", "--tower must be one of norm, plain, got round"),
    ],
)
def test_a_setting_out_of_range_is_found_when_planning(method, expected, tmp_path):
    with pytest.raises(ConfigError) as caught:
        planned(tmp_path, methods=["biases", method])
    assert str(caught.value) == expected


@pytest.mark.parametrize("mode", MODES)
def test_the_default_methods_of_a_mode(mode):
    labels = DEFAULT_METHODS[mode]
    assert len(set(labels)) == len(labels) and REFERENCES[mode] in labels
    families = set()
    for label in labels:
        family, settings = method_settings(label)
        config = SearchConfig.of_mode(mode, **settings)
        assert config.method == family and config.mode == mode
        families.add(family)
    assert families == set(CHOICES["method"])


def test_every_family_of_a_knob_is_a_setting():
    for setting, kind, others in KNOBS.values():
        assert type(getattr(SearchConfig(), setting)) is kind and others.keys() == {"method"}


# The plan


@pytest.mark.parametrize(
    ("events", "batch_size", "fraction"),
    [
        (600, 50, 0.75),
        (601, 50, 0.75),
        (651, 50, 0.75),
        (100, 50, 0.75),
        (101, 50, 0.99),
        (777, 50, 0.01),
        (1000, 7, 0.29),
        (100, 2, 0.29),
        (1000, 100, 0.999),
    ],
)
@pytest.mark.parametrize("order", CHOICES["order"])
def test_the_header_says_what_the_streams_are(events, batch_size, fraction, order, tmp_path):
    ratings = synthetic_ratings(events, **SIDES)
    cut = {"order": order, "batch_size": batch_size, "train_fraction": fraction}
    header, _ = planned(tmp_path, ratings, tasks=["multiclass", "binary"], **cut)
    for task in header["tasks"]:
        stream = build_stream(ratings, task=task, **cut)
        assert header["data"] == {
            "name": "synthetic",
            "sha256": ratings.checksum,
            "events": len(stream.user),
            "users": stream.n_users,
            "items": stream.n_items,
            "train_events": stream.n_train,
            "counts": ratings.counts,
        }


def test_the_plan_is_complete(tmp_path):
    tasks, modes, seeds = ["multiclass", "binary"], ["tuned", "paper"], range(3)
    header, jobs = planned(tmp_path, tasks=tasks, modes=modes, seeds=seeds)
    assert (header["tasks"], header["settings"], header["seeds"]) == (tasks, modes, [0, 1, 2])
    assert header["order"] == "shuffle" and header["reference"] == REFERENCES
    assert header["info"]["torch"] and header["started"].endswith("+00:00")
    listed = [(m["setting"], m["label"]) for m in header["methods"]]
    assert listed == [(mode, label) for mode in modes for label in DEFAULT_METHODS[mode]]
    wanted = {(t, s, *m) for t in tasks for s in seeds for m in listed}
    found = [(j.config.task, j.config.seed, j.config.mode, j.label) for j in jobs]
    assert len(found) == len(wanted) and set(found) == wanted
    assert [seed for _, seed, *_ in found] == sorted(seed for _, seed, *_ in found)
    for job in jobs:
        settings = method_settings(job.label)[1]
        assert (settings | {"sizes": (1, 2, 4), "order_seed": 0}).items() <= vars(
            job.config
        ).items()
    for method in header["methods"]:
        settings = method_settings(method["label"])[1]
        assert method["options"] == {**MODES[method["setting"]], **settings}
        assert all(f"{key} {value}" in method["text"] for key, value in settings.items())
    json.dumps(header)


def test_what_is_named_twice_is_done_once(tmp_path):
    twice = {"tasks": ["binary"] * 2, "modes": ["paper"] * 2, "methods": ["esapn"] * 2}
    header, jobs = planned(tmp_path, **twice, seeds=iter([3, 3]))
    assert [len(header[name]) for name in ("tasks", "settings", "methods", "seeds")] == [1] * 4
    assert len(jobs) == 1


@pytest.mark.parametrize(
    ("methods", "reference"),
    [
        (["fixed-4", "esapn-rich", "esapn"], "esapn"),
        (["fixed-4", "esapn-rich", "esapn-argmax"], "esapn-rich"),
        (["fixed-4", "darts"], "fixed-4"),
    ],
)
def test_the_reference_is_among_the_methods(methods, reference, tmp_path):
    assert planned(tmp_path, methods=methods)[0]["reference"] == {"paper": reference}


def test_a_stream_that_cannot_be_built_is_found_when_planning(tmp_path):
    with pytest.raises(DataError, match="fewer than two batches"):
        planned(tmp_path, batch_size=500)
    ratings = replace(synthetic_ratings(600), timestamp=None)
    with pytest.raises(DataError, match="timestamps"):
        planned(tmp_path, ratings, order="time")


def test_names_are_files_of_their_own(tmp_path):
    methods = ["esapn", "esapn,lr=0.1", "esapn,lr=+0.1", "esapn,lr=1e-1", "esapn,hidden=3,lr=0.1"]
    methods += ["fixed-1", "fixed-01", "random-0.1", "random-.1"]
    tasks, modes = CHOICES["task"], tuple(MODES)
    header, jobs = planned(tmp_path, methods=methods, tasks=tasks, modes=modes, seeds=range(12))
    paths = {str(job.path).lower() for job in jobs}
    assert len(paths) == len(jobs) == 2 * 2 * 12 * len(methods)
    for job in jobs:
        assert job.path.parent == tmp_path / "runs" and job.path.suffix == ".json"
        assert not set(job.name) & set('/\\:*?"<>| ')
    # The names that the report looks for.
    write_json(tmp_path / "compare.json", header)
    assert set(statistics.load(tmp_path).missing) == {job.name for job in jobs}


# One job


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Job:
    job = only_job(tmp_path_factory.mktemp("finished"))
    job.path.parent.mkdir()
    label, seconds = run_job(job, OPTIONS, 60.0)
    assert label == job.label and seconds > 0
    return job


def test_a_record_is_what_the_report_needs(finished, tmp_path):
    header, (job,) = planned(tmp_path, methods=[finished.label])
    job.path.parent.mkdir()
    job.path.write_bytes(finished.path.read_bytes())
    write_json(tmp_path / "compare.json", header)
    loaded = statistics.load(tmp_path)
    (run,) = loaded.runs
    assert (loaded.missing, loaded.not_finite) == ((), ())
    about = (run.task, run.setting, run.label, run.family, run.seed)
    assert about == ("binary", "paper", job.label, "esapn", 0)
    held = run.record
    assert about == tuple(held[key] for key in ("task", "setting", "label", "family", "seed"))
    assert held["config"] == job.config.to_json() and held["data"] == header["data"]
    shown = ("loss", "accuracy", "log_loss", "auc", *statistics.BYTES, "cpu_seconds")
    for name in (*shown, "wall_seconds", "events_per_second", "peak_rss"):
        assert run.value(name) is not None, name
    text = page.write(tmp_path).read_text()
    assert job.label in text and "1 of 1" in text

    # Neither of this comparison: a run of an earlier plan, and something else.
    (job.path.parent / "binary-paper-esapn-s0.json").write_bytes(job.path.read_bytes())
    (job.path.parent / "notes.json").write_text("{")
    assert main(["report", str(tmp_path)]) == 0
    with (tmp_path / "results.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert about == (
        *(row[key] for key in ("task", "setting", "label", "family")),
        int(row["seed"]),
    )
    for name in ("loss", "accuracy", "log_loss", "auc"):
        assert float(row[name]) == pytest.approx(held["test"][name], abs=1e-6)
    for name in statistics.BYTES:
        assert int(row[f"{name}_bytes"]) == round(held["bytes"][name])
    assert float(row["cpu_seconds"]) == pytest.approx(held["cpu_seconds"], abs=0.06)


def test_a_run_depends_on_its_job_alone(finished, tmp_path):
    """Neither on the runs that its process made before nor on where its folder is."""
    other, job = only_job(tmp_path, "autoemb,hidden=6"), only_job(tmp_path)
    job.path.parent.mkdir()
    run_job(other, OPTIONS, 60.0)
    run_job(job, OPTIONS, 60.0)
    records = [json.loads(path.read_text()) for path in (finished.path, job.path)]
    for name in ("test", "train", "memory", "bytes", "log", "by_frequency"):
        assert records[0][name] == records[1][name]


def test_finished(finished, tmp_path):
    assert is_finished(finished)
    assert not is_finished(replace(finished, folder=tmp_path))
    elsewhere = replace(finished.config, data="copied.csv", device="auto")
    assert is_finished(replace(finished, config=elsewhere))


def test_other_settings_or_data_are_not_finished(finished):
    changed = replace(finished, config=replace(finished.config, lr=0.5, history=2))
    with pytest.raises(ConfigError, match=r"history 5 -> 2, lr 0.001 -> 0.5\); use another --out"):
        is_finished(changed)
    with pytest.raises(ConfigError, match="was made on other data"):
        is_finished(replace(finished, checksum="0" * 64))


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"config": {}}', '{"config": 3}'])
def test_half_a_record_is_none(content, tmp_path):
    job = only_job(tmp_path)
    job.path.parent.mkdir()
    job.path.write_text(content)
    assert not is_finished(job)


def test_clock():
    clock = Clock(workers=4)
    assert clock.left(["a"]) is None
    clock.took("a", 10.0)
    clock.took("a", 30.0)  # 20 on average
    clock.took("b", 60.0)
    # Nobody knows of c: the mean of 20 and 60.
    assert clock.left(["a", "a", "b", "c"]) == (20 + 20 + 60 + 40) / 4
    assert clock.left([]) == 0


# Whole comparisons


def test_nothing_left_to_do():
    said = []
    comparison.compare([], (), done=3, workers=1, seconds=1, progress=lambda *a: said.append(a))
    assert said == [(3, 3, "", None)]


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


def wait_for(ready) -> None:
    while not ready():
        time.sleep(0.02)


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


@needs_proc
def test_a_killed_worker_is_one_line_and_the_same_command_goes_on(tmp_path, capsys):
    killed: list[int] = []

    def kill(folder: Path, ended: threading.Event) -> None:
        wait_for(lambda: any(folder.glob("checkpoints/*/step-*.pt")) or ended.is_set())
        for child in workers_of(os.getpid()):
            os.kill(child, signal.SIGKILL)
            killed.append(child)

    for attempt in itertools.count():
        out, ended = tmp_path / str(attempt), threading.Event()
        killer = threading.Thread(target=kill, args=(out, ended))
        capsys.readouterr()
        killer.start()
        status = command(out)
        ended.set()
        killer.join()
        if status or killed:
            break
        # All runs ended before the killer's turn came, on a busy machine: once more.
    assert status == 2 and len(killed) == 1
    *bar, line = capsys.readouterr().err.splitlines()
    assert line == (
        "python -m esapn compare: error: a run's process was killed (out of memory?); "
        "finished runs and checkpoints stay: the same command goes on"
    )
    assert not any("Traceback" in text or "Error" in text for text in bar)
    wait_for(lambda: not workers_of(os.getpid()))
    header = json.loads((out / "compare.json").read_text())
    held = {path: path.read_bytes() for path in (out / "runs").glob("*.json")}
    assert len(held) < 4 and not (out / "report.html").exists()

    assert command(out) == 0
    assert all(path.read_bytes() == content for path, content in held.items())
    assert len(statistics.load(out).runs) == 4
    assert json.loads((out / "compare.json").read_text())["started"] == header["started"]
    assert (out / "report.html").exists()
    assert not list((out / "checkpoints").iterdir())


@needs_proc
def test_an_interrupt_ends_the_workers(tmp_path, capsys, monkeypatch):
    """Else each would first finish its run, and the next one that it was given already."""

    ignored = []

    def interrupted(futures):
        wait_for(lambda: list((tmp_path / "checkpoints").glob("*/step-*.pt")))
        (worker,) = workers_of(os.getpid())
        # Ctrl-C goes to workers as well: each would print a traceback.
        status = Path(f"/proc/{worker}/status").read_text().partition("SigIgn:")[2]
        ignored.append(int(status.split()[0], 16) >> (signal.SIGINT - 1) & 1)
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "as_completed", interrupted)
    assert command(tmp_path, "--events", 100_000) == 130 and ignored == [1]
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted; the same command goes on"
    wait_for(lambda: not workers_of(os.getpid()))
    assert not list((tmp_path / "runs").iterdir())


@needs_proc
def test_workers_end_with_a_killed_comparison(tmp_path):
    """They would write beside those of the same command, given again."""
    line = [sys.executable, "-m", "esapn", "compare", *COMMAND, "--events", "100000"]
    process = subprocess.Popen(
        [*line, "--out", str(tmp_path)],
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
