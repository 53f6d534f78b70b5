"""``search`` as a command: what a run prints and writes, and the mistakes that it refuses."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest
import torch

from esapn.config import CHOICES, SearchConfig, mode_defaults
from esapn.data.load import load_ratings
from esapn.data.stream import build_stream
from esapn.run import checkpoint
from esapn.run.loop import Run
from tests.esapn.commands import CSV, ROWS, SMALL, refused, result, search
from tests.helpers import install_command

pytestmark = pytest.mark.usefixtures("no_figure", "threads")

# Runs


@pytest.mark.parametrize(
    ("task", "method", "order"),
    [
        ("binary", "esapn", "shuffle"),
        ("binary", "fixed", "time"),
        ("multiclass", "esapn", "time"),
        ("multiclass", "fixed", "shuffle"),
        *(("binary", m, "shuffle") for m in CHOICES["method"] if m not in ("esapn", "fixed")),
    ],
)
def test_runs(task, method, order, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    arguments = [*SMALL, "--task", task, "--method", method, "--order", order, "--fixed-size", 6]
    if method == "counts":
        arguments += ["--budget", "2 kB", "--move-every", 2]
    assert search(*arguments, "--sizes", 1, 3, 5, "--seed", 2, "--device", "cpu", "--out", out) == 0
    assert sorted(path.name for path in out.iterdir()) == ["result.json", "run.png"]
    saved = json.loads((out / "result.json").read_text())
    given = {"task": task, "method": method, "order": order, "seed": 2, "sizes": [1, 3, 5]}
    assert given.items() <= saved["config"].items()
    sizes = {"fixed": ["6"], "darts": ["9"], "autoemb": ["9"], "biases": []}
    for side in saved["memory"].values():
        assert list(side["rows_per_size"]) == sizes.get(method, ["1", "3", "5"])
    assert saved["test"]["events"] + saved["train"]["events"] == 600
    printed = capsys.readouterr().out
    assert f"{method} (paper), {task}, {order} order, seed 2" in printed
    assert "600 events, 50 users, 50 items; test part from event 450 on; cpu" in printed
    assert f"accuracy {saved['test']['accuracy']:.4f}" in printed
    assert f"wrote {out / 'result.json'} and {out / 'run.png'}" in printed
    assert f"rows: {saved['data']['counts']['duplicates']} duplicates\n" in printed


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


@pytest.mark.parametrize("resumed", [False, True])
def test_a_mode_changes_defaults_and_a_flag_wins(resumed, tmp_path):
    flags = ["--row-lr", "0.02", "--mode", "tuned", "--hops", "linear"]
    more = ["--resume"] if resumed else []
    assert search(*SMALL, *flags, *more, "--out", tmp_path) == 0
    config = result(tmp_path)["config"]
    defaults = mode_defaults("tuned", {"method": "esapn"})
    expected = {"mode": "tuned", **defaults, "row_lr": 0.02, "hops": "linear"}
    assert expected.items() <= config.items()
    paper = SearchConfig().to_json()
    given = {"events", "batch_size", "hidden", "policy_hidden", "max_frequency"}
    assert {k for k in config if config[k] != paper[k]} - given == expected.keys() - {"hops"}


@pytest.mark.parametrize(
    ("user", "item"),
    [
        (lambda t: f"user-{t % 7}", lambda t: f"item {t % 5}"),
        (lambda t: 2**31 + t % 7, lambda t: 2**62 - t % 5),
    ],
    ids=["strings", "large"],
)
def test_ids_of_any_kind(user, item, tmp_path):
    data, out = tmp_path / "ratings.csv", tmp_path / "out"
    rows = [f"{user(t)},{item(t)},{t % 10 / 2 + 0.5},{t}\n" for t in range(300)]
    data.write_text(CSV + "".join(rows))
    assert search(*SMALL, "--data", data, "--out", out) == 0
    plain = tmp_path / "plain.csv"
    plain.write_text(CSV + ROWS)
    assert search(*SMALL, "--data", plain, "--out", tmp_path / "plain") == 0
    mine, other = result(out), result(tmp_path / "plain")
    assert [mine["data"][key] for key in ("events", "users", "items")] == [300, 7, 5]
    assert mine["data"]["counts"] == other["data"]["counts"]
    if isinstance(user(0), str):  # of the same order, so the codes are the same
        assert mine["test"] == other["test"]


def test_malformed_rows_are_skipped_and_counted(tmp_path, capsys):
    data, out = tmp_path / "ratings.csv", tmp_path / "out"
    data.write_text(CSV + "1,2,9,3\n" + ROWS + "1,,4,3\n" + "1,2,NaN,3\n")
    data_options = ["--data", data, "--malformed", "skip"]
    assert search(*SMALL, *data_options, "--task", "multiclass", "--out", out) == 0
    captured = capsys.readouterr()
    (counted,) = [x for x in captured.out.splitlines() if x.startswith("rows: ")]
    assert "265 duplicates" in counted and "3 skipped" in counted
    assert "1 item is missing" in counted
    assert "ratings.csv: skipped 3 of 303 rows" in captured.err
    counts = result(out)["data"]["counts"]
    assert (counts["rows"], counts["skipped"], counts["duplicates"]) == (300, 3, 265)
    # Two classes take any rating.
    assert search(*SMALL, *data_options, "--out", tmp_path / "binary") == 0
    counts = result(tmp_path / "binary")["data"]["counts"]
    assert (counts["rows"], counts["skipped"]) == (301, 2)


def test_ratings_on_another_scale(tmp_path):
    """Twice the ratings and twice the limit: the same run."""
    one, two = tmp_path / "one.csv", tmp_path / "two.csv"
    one.write_text(CSV + ROWS)
    frame = [line.split(",") for line in ROWS.splitlines()]
    two.write_text(CSV + "".join(f"{u},{i},{2 * float(r)},{t}\n" for u, i, r, t in frame))
    runs = {}
    for name, arguments in {
        "one": ["--data", one],
        "two": ["--data", two, "--positive-above", "7"],
        "other": ["--data", two, "--positive-above", "7.5"],
        "default": ["--data", two],
    }.items():
        assert search(*SMALL, *arguments, "--out", tmp_path / name) == 0
        runs[name] = result(tmp_path / name)
    assert runs["one"]["config"]["positive_above"] == 3.5
    assert runs["two"]["config"]["positive_above"] == 7.0
    assert runs["one"]["test"] == runs["two"]["test"] == runs["other"]["test"]
    assert runs["default"]["test"] != runs["one"]["test"]


def test_patience_stops_early_and_says_so(tmp_path, capsys):
    late = ["--lr", "0.5", "--log-every", "1", "--patience", "3"]
    assert search(*SMALL, *late, "--out", tmp_path) == 0
    saved = result(tmp_path)
    assert saved["stopped_early"] is True
    loss = [line["loss"] for line in saved["log"]]
    assert len(loss) < 12 and loss.index(min(loss)) == len(loss) - 1 - 3
    printed = capsys.readouterr().out
    assert f"stopped early, after {saved['log'][-1]['events']:,} events; test part" in printed


def test_the_best_model_is_kept(tmp_path):
    best = tmp_path / "best"
    # Of an earlier, longer run.
    checkpoint.save(best, 999, {"stale": True})
    assert search(*SMALL, "--log-every", 2, "--keep-best", "--out", tmp_path) == 0
    saved = result(tmp_path)
    found = checkpoint.load(best)
    assert [path.name for path in best.iterdir()] == [found.path.name]
    loss = [line["loss"] for line in saved["log"]]
    assert found.step == 2 * (loss.index(min(loss)) + 1)
    config = SearchConfig(**{**saved["config"], "sizes": tuple(saved["config"]["sizes"])})
    run = Run(config, build_stream(load_ratings("synthetic", events=600), batch_size=50))
    run.load_state_dict(found.state)
    assert (run.index, run.log[-1]["loss"]) == (found.step, min(loss))
    assert run.log == saved["log"][: len(run.log)]


def test_without_keep_best_there_is_none(tmp_path):
    assert search(*SMALL, "--out", tmp_path) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result.json", "run.png"]


def test_tensorboard_gets_the_log(tmp_path, monkeypatch):
    written = {}

    class SummaryWriter:
        def __init__(self, folder):
            written["folder"] = folder

        def add_scalar(self, name, value, step):
            written.setdefault(name, []).append((step, value))

        def close(self):
            written["closed"] = True

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("esapn.cli.find_spec", lambda name: name)
    assert search(*SMALL, "--log-every", 4, "--tensorboard", "--out", tmp_path) == 0
    assert written.pop("folder") == str(tmp_path / "tensorboard") and written.pop("closed")
    log = result(tmp_path)["log"]
    for name in ("loss", "accuracy", "serving_bytes", "mean_user_size", "mean_item_size"):
        assert written.pop(name) == [(line["events"], line[name]) for line in log]
    assert written == {}


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--sizez", "2"], "--sizez"),
        (["--task", "ternary"], "--task"),
        (["--method", "nothing"], "--method"),
        (["--mode", "fast"], "--mode"),
        (["--malformed", "keep"], "--malformed"),
        (["--patience", "-1"], "--patience must be at least 0"),
        (["--checkpoint-seconds", "-1"], "--checkpoint-seconds must be at least 0"),
        (["--checkpoint-seconds", "nan"], "--checkpoint-seconds must be at least 0"),
        (["--archive", "a.zip"], "archive is for one of ml-100k"),
        (["--url", "https://a"], "url is for one of ml-100k"),
        (["--data", "ml-1m", "--archive", "absent.zip"], "absent.zip: no such file"),
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
        (
            CSV + "1,2,NaN,3\n1,2,inf,3\n" + ROWS,
            [],
            "row 1: rating 'NaN' is not a finite number (2 rows are bad in this way, of 302)",
        ),
        (CSV + "1,,4,3\n" * 300, ["--malformed", "skip"], "every row is malformed; row 1"),
        (
            CSV + ROWS + "1,2,9,3\n",
            ["--task", "multiclass"],
            "row 301: rating 9 is outside 0.5..5",
        ),
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


@pytest.mark.parametrize(
    "text",
    [
        CSV.replace("timestamp", "x" * 200_000) + ROWS,
        CSV.replace("timestamp", '"x') + ROWS,
        CSV + ROWS + '1,1,"4,9\n',
    ],
    ids=["long field", "open quote", "open quote below"],
)
def test_files_that_no_reader_takes(text, tmp_path, capsys):
    path = tmp_path / "ratings.csv"
    path.write_text(text, newline="")
    line = refused(capsys, *SMALL, "--data", path, "--out", tmp_path / "out")
    assert "ratings.csv: cannot be read: line " in line and len(line) < 500
    assert [found.name for found in tmp_path.iterdir()] == ["ratings.csv"]


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


@pytest.mark.parametrize(
    ("missing", "named", "installed"),
    [
        (["tensorboard"], "tensorboard", ["tensorboard"]),
        (["tqdm"], "tqdm", ["esapn-kernels[train]"]),
        (["torchmetrics"], "torchmetrics", ["esapn-kernels[train]"]),
        (["matplotlib", "tqdm"], "tqdm and matplotlib", ["esapn-kernels[train]"]),
        (
            ["tqdm", "torchmetrics", "matplotlib", "tensorboard"],
            "tqdm, torchmetrics, matplotlib and tensorboard",
            ["esapn-kernels[train]", "tensorboard"],
        ),
    ],
)
def test_packages_that_are_missing(missing, named, installed, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("esapn.cli.find_spec", lambda n: None if n in missing else n)
    line = refused(capsys, *SMALL, "--tensorboard", "--out", tmp_path / "out")
    assert f"error: this needs {named}; to install: " in line
    assert install_command(line) == ["pip", "install", *installed]
    assert not (tmp_path / "out").exists()


def test_no_cuda_device(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "out"
    line = refused(capsys, *SMALL, "--device", "cuda", "--out", out)
    assert "--device cuda: no CUDA device was found" in line
    assert not out.exists()


def test_a_backend_that_the_environment_misspells(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("esapn_kernels.ops.backend._FORCED", "nativ")
    out = tmp_path / "out"
    line = refused(capsys, *SMALL, "--device", "cpu", "--out", out)
    assert "ESAPN_CPU_BACKEND must be native or torch, got 'nativ'" in line
    assert not out.exists()
