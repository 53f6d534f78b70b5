"""What a run leaves: the lines, the memory table, result.json and run.png."""

from __future__ import annotations

import json
import struct

import pytest

from esapn import report
from esapn.config import SearchConfig
from esapn.data import build_stream, load_ratings
from esapn.search import run_search

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
    assert " ".join(lines[0]) == "IDs at size 2 4 8 dims IDs x 8 of fixed"
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


@pytest.fixture(scope="module", params=["binary-esapn", "multiclass-fixed"])
def run(request):
    task, method = request.param.split("-")
    config = SearchConfig(
        task=task,
        method=method,
        events=1_000,
        batch_size=100,
        sizes=(1, 2, 4),
        fixed_size=3,
        hidden=8,
        policy_hidden=8,
        max_frequency=16,
        log_every=4,
        seed=3,
    )
    ratings = load_ratings("synthetic", events=config.events)
    stream = build_stream(ratings, task=task, batch_size=config.batch_size)
    return config, ratings, stream, run_search(config, stream)


def test_saved_result(run, tmp_path):
    config, ratings, stream, result = run
    report.save(tmp_path, config, ratings, stream, result)
    saved = json.loads((tmp_path / "result.json").read_text())
    assert saved["config"] == config.to_json()
    assert saved["data"] == {
        "name": "synthetic",
        "sha256": ratings.checksum,
        "events": 1_000,
        "users": ratings.n_users,
        "items": ratings.n_items,
        "train_events": 700,
    }
    assert saved["train"] == result.train and saved["test"] == result.test
    assert (saved["train"]["events"], saved["test"]["events"]) == (700, 300)
    assert ("auc" in saved["test"]) == (config.task == "binary")
    assert saved["memory"] == result.memory
    assert [line["events"] for line in saved["log"]] == [400, 800, 1_000]
    assert saved["cpu_seconds"] > 0 and saved["wall_seconds"] > 0
    assert saved["info"]

    picture = (tmp_path / "run.png").read_bytes()
    assert picture.startswith(PNG)
    width, height = struct.unpack(">II", picture[16:24])
    assert 800 < width < 2_000 and 500 < height < 1_500 and len(picture) > 10_000


def test_memory_of_a_run_adds_up(run):
    config, ratings, _, result = run
    for name, n in (("user", ratings.n_users), ("item", ratings.n_items)):
        side = result.memory[name]
        assert [int(size) for size in side["rows_per_size"]] == list(config.row_sizes)
        assert sum(side["rows_per_size"].values()) == n
        dims = sum(int(size) * count for size, count in side["rows_per_size"].items())
        assert side["payload"] == 4 * dims
        assert side["fixed"] == 4 * n * config.row_sizes[-1]
        parts = ("payload", "slack", "locations", "chain")
        assert side["serving"] == sum(side[part] for part in parts)


def test_log_lines_are_windows_of_the_stream(run):
    config, _, stream, result = run
    measures, begin = result.search.measures, 0
    for line in result.log:
        part = slice(begin, line["events"])
        assert line["loss"] == pytest.approx(measures.loss[part].mean().item())
        correct = measures.correct[part].double().mean().item()
        assert line["accuracy"] == pytest.approx(correct)
        begin = line["events"]
    assert begin == len(stream.user)
    for name in ("user", "item"):
        mean = getattr(result.search.model, name).sizes_of().double().mean().item()
        assert result.log[-1][f"mean_{name}_size"] == pytest.approx(mean)


def test_result_lines(run):
    config, _, _, result = run
    head, quality, seconds = report.result_lines(config, result).splitlines()
    name = "esapn (paper)" if config.method == "esapn" else "fixed"
    assert head == f"{name}, {config.task}, shuffle order, seed 3"
    assert f"300 events: accuracy {result.test['accuracy']:.4f}, " in quality
    loss = "MSE" if config.task == "binary" else "cross-entropy"
    assert f"{loss} {result.test['loss']:.4f}" in quality
    assert ("AUC" in quality) == (config.task == "binary")
    assert seconds == f"{result.cpu_seconds:.1f} CPU s, {result.wall_seconds:.1f} s"


def test_size_by_frequency(run):
    _, _, stream, result = run
    embedding = result.search.model.user
    x, y = report._size_by_frequency(embedding, stream.user)
    count = stream.user.bincount(minlength=embedding.num_embeddings).tolist()
    sizes = embedding.sizes_of().tolist()
    expected = {}
    for n, size in zip(count, sizes, strict=True):
        if n:
            expected.setdefault(2 ** (n.bit_length() - 1), []).append(size)
    assert x == sorted(expected)
    assert y == pytest.approx([sum(expected[b]) / len(expected[b]) for b in x])
