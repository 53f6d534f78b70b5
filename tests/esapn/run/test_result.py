"""What a run leaves: the lines, the memory table, result.json and run.png."""

from __future__ import annotations

import json
import struct
import sys

import numpy as np
import pytest

from esapn.config import SearchConfig
from esapn.data.load import load_ratings
from esapn.data.stream import build_stream
from esapn.run import result as report
from esapn.run.loop import Run

PNG = b"\x89PNG\r\n\x1a\n"

MEMORY = {
    "user": {
        "rows_per_size": {"2": 1000, "4": 10, "8": 90},
        "payload": 11_040,
        "slack": 60,
        "locations": 400,
        "chain": 100,
        "optimizer": 22_080,
        "serving": 11_600,
        "fixed": 35_200,
    },
    "item": {
        "rows_per_size": {"2": 0, "4": 0, "8": 50},
        "payload": 1_600,
        "slack": 0,
        "locations": 200,
        "chain": 100,
        "optimizer": 3_200,
        "serving": 1_900,
        "fixed": 1_600,
    },
}


def test_memory_table_numbers():
    lines = [line.split() for line in report.memory_table(MEMORY).splitlines()]
    assert " ".join(lines[0]) == "IDs at size 2 4 8 dims IDs x largest of fixed"
    dims = 2 * 1000 + 4 * 10 + 8 * 90
    assert lines[1] == f"user 1,000 10 90 {dims:,} {8 * 1100:,} {dims / 8800:.2%}".split()
    assert lines[2] == ["item", "0", "0", "50", "400", "400", "100.00%"]
    assert lines[3] == []
    assert " ".join(lines[4]) == "bytes payload slack locations chain serving fixed of fixed"
    assert lines[5] == f"user 11,040 60 400 100 11,600 35,200 {11_600 / 35_200:.2%}".split()
    assert lines[6] == f"item 1,600 0 200 100 1,900 1,600 {1_900 / 1_600:.2%}".split()
    assert lines[7] == f"both 12,640 60 600 200 13,500 36,800 {13_500 / 36_800:.2%}".split()
    assert lines[8] == ["optimizer", "state", "while", "training:", "25,280", "bytes"]
    assert len(lines) == 9


def test_memory_table_columns_line_up():
    lines = report.memory_table(MEMORY).splitlines()
    assert len({len(line) for line in lines[:3]}) == 1
    assert len({len(line) for line in lines[4:8]}) == 1


def test_memory_table_of_a_method_without_rows():
    side = MEMORY["item"] | {"rows_per_size": {}}
    lines = report.memory_table({"user": side, "item": side}).splitlines()
    assert lines[0].startswith("bytes ") and len(lines) == 5
    assert lines[3].split()[-1] == f"{1_900 / 1_600:.2%}"


def small_config(task: str, method: str, **more) -> SearchConfig:
    settings = {
        "task": task,
        "method": method,
        "events": 1_000,
        "batch_size": 100,
        "sizes": (1, 2, 4),
        "fixed_size": 3,
        "hidden": 8,
        "policy_hidden": 8,
        "max_frequency": 16,
        "log_every": 4,
        "seed": 3,
    }
    return SearchConfig(**settings | more)


def watched(run: Run) -> list[tuple[float, bool]]:
    """Every event's loss and whether its label was predicted, as ``run`` records them."""
    events, record = [], run.measures.record

    def watch(logits, target, loss, frequency):
        label = logits[:, 0] > 0 if logits.shape[1] == 1 else logits.argmax(dim=1)
        events.extend(zip(loss.tolist(), (label == target).tolist(), strict=True))
        record(logits, target, loss, frequency)

    run.measures.record = watch
    return events


@pytest.fixture(
    scope="module",
    params=["binary-esapn", "multiclass-fixed", "binary-darts", "multiclass-biases"],
)
def run(request):
    task, method = request.param.split("-")
    config = small_config(task, method)
    ratings = load_ratings("synthetic", events=config.events)
    stream = build_stream(ratings, task=task, batch_size=config.batch_size)
    walked = Run(config, stream)
    events = watched(walked)
    return config, ratings, stream, walked.walk(), events


def test_saved_result(run, tmp_path):
    config, ratings, stream, result, _ = run
    report.save(tmp_path, config, ratings, stream, result)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result.json", "run.png"]
    saved = json.loads((tmp_path / "result.json").read_text())
    assert saved["config"] == config.to_json()
    assert saved["data"] == {
        "name": "synthetic",
        "sha256": ratings.checksum,
        "events": 1_000,
        "users": ratings.n_users,
        "items": ratings.n_items,
        "train_events": 700,
        "counts": ratings.counts,
    }
    assert saved["train"] == result.train and saved["test"] == result.test
    assert (saved["train"]["events"], saved["test"]["events"]) == (700, 300)
    assert ("auc" in saved["test"]) == (config.task == "binary")
    assert saved["memory"] == result.memory and saved["bytes"] == result.bytes
    assert saved["by_frequency"] == result.by_frequency
    assert saved["sizes_by_frequency"] == result.sizes_by_frequency
    assert [line["events"] for line in saved["log"]] == [400, 800, 1_000]
    assert saved["cpu_seconds"] > 0 and saved["wall_seconds"] > 0
    assert saved["events_per_second"] == pytest.approx(1_000 / saved["wall_seconds"])
    assert saved["stopped_early"] is False
    assert saved["info"] and saved["peak_rss"] > 50e6

    picture = (tmp_path / "run.png").read_bytes()
    assert picture.startswith(PNG)
    width, height = struct.unpack(">II", picture[16:24])
    assert 800 < width < 2_000 and 500 < height < 1_500 and len(picture) > 10_000


def test_memory_of_a_run_adds_up(run):
    config, ratings, _, result, _ = run
    sizes = {"esapn": [1, 2, 4], "fixed": [3], "darts": [7], "biases": []}[config.method]
    for name, n in (("user", ratings.n_users), ("item", ratings.n_items)):
        side = result.memory[name]
        assert [int(size) for size in side["rows_per_size"]] == sizes
        assert side["fixed"] == 4 * n * 4
        parts = ("payload", "slack", "locations", "chain")
        assert side["serving"] == sum(side[part] for part in parts)
        if config.method == "biases":
            continue
        assert sum(side["rows_per_size"].values()) == n
        dims = sum(int(size) * count for size, count in side["rows_per_size"].items())
        weights = 3 * n if config.method == "darts" else 0
        assert side["payload"] == 4 * (dims + weights)
    assert result.bytes["serving"] == sum(side["serving"] for side in result.memory.values())


def test_log_lines_are_windows_of_the_stream(run):
    _, _, stream, result, events = run
    begin = 0
    for line in result.log:
        loss, right = zip(*events[begin : line["events"]], strict=True)
        assert line["loss"] == pytest.approx(sum(loss) / len(loss))
        assert line["accuracy"] == pytest.approx(sum(right) / len(right))
        begin = line["events"]
    assert begin == len(events) == len(stream.user)
    for name in ("user", "item"):
        counts = result.memory[name]["rows_per_size"]
        mean = sum(int(size) * n for size, n in counts.items()) / max(sum(counts.values()), 1)
        assert result.log[-1][f"mean_{name}_size"] == pytest.approx(mean)


def test_measures_are_means_over_their_part(run):
    _, _, stream, result, events = run
    for part, mine in ((result.train, events[: stream.n_train]), (result.test, events[700:])):
        loss, right = zip(*mine, strict=True)
        assert part["loss"] == pytest.approx(sum(loss) / len(loss))
        assert part["accuracy"] == pytest.approx(sum(right) / len(right))


def test_result_lines(run):
    config, _, _, result, _ = run
    head, quality, seconds = report.result_lines(config, result).splitlines()
    assert head == f"{config.method} (paper), {config.task}, shuffle order, seed 3"
    assert quality.startswith("test part, prequential, 300 events: ")
    assert f"300 events: accuracy {result.test['accuracy']:.4f}, " in quality
    loss = "MSE" if config.task == "binary" else "cross-entropy"
    assert f"{loss} {result.test['loss']:.4f}" in quality
    assert ("AUC" in quality) == (config.task == "binary")
    assert seconds == f"{result.cpu_seconds:.1f} CPU s, {result.wall_seconds:.1f} s"


def test_a_run_that_stopped_before_the_test_part(tmp_path):
    config = small_config("binary", "biases", log_every=1, patience=1)
    ratings = load_ratings("synthetic", events=config.events)
    stream = build_stream(ratings, batch_size=config.batch_size)
    run = Run(config, stream)
    run.best = {"loss": 0.0, "line": 0}
    result = run.walk()
    assert result.stopped_early and result.test["events"] == 0
    quality = report.result_lines(config, result).splitlines()[1]
    assert quality == ("stopped early, after 200 events; test part, prequential, 0 events: none")
    report.save(tmp_path, config, ratings, stream, result)
    assert json.loads((tmp_path / "result.json").read_text())["stopped_early"] is True


def test_size_by_frequency(run):
    config, _, stream, result, _ = run
    if config.method not in ("esapn", "fixed"):
        assert result.sizes_by_frequency == {}
        return
    embedding = result.run.model.user
    count = stream.user.bincount(minlength=embedding.num_embeddings).tolist()
    sizes = embedding.sizes_of().tolist()
    expected = {}
    for n, size in zip(count, sizes, strict=True):
        if n:
            expected.setdefault(2 ** (n.bit_length() - 1), []).append(size)
    found = result.sizes_by_frequency["user"]
    assert [bucket["from"] for bucket in found] == sorted(expected)
    for bucket in found:
        mine = expected[bucket["from"]]
        assert bucket["to"] == 2 * bucket["from"] and bucket["ids"] == len(mine)
        assert bucket["mean_size"] == pytest.approx(sum(mine) / len(mine))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a peak begin anew")
def test_the_peak_of_an_earlier_run_is_forgotten():
    held = np.ones(25_000_000)
    high = report.peak_rss()
    del held
    report.forget_peak()
    assert report.peak_rss() < high - 150e6
