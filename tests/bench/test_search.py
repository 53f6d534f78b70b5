"""bench/search.py: its run, its errors, and the all-sizes baseline that it measures against."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from esapn.config import SearchConfig
from esapn.data.load import load_ratings
from esapn.data.stream import build_stream

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "search.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs the script as a user does."""
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=env,
    )


@pytest.fixture(scope="module")
def bench() -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("bench_search", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=[True, False], ids=["lean", "full"])
def side(bench, request) -> Any:
    """Six IDs at sizes 1, 1, 2, 2, 4, 4 of (1, 2, 4)."""
    side = bench.AllSizesSide(6, SearchConfig(sizes=(1, 2, 4)), lean=request.param)
    side.level.copy_(torch.tensor([0, 0, 1, 1, 2, 2]))
    return side


def carried(side: Any, ids: torch.Tensor) -> torch.Tensor:
    """y(x) of every id: its row at its own size, hop by hop to the largest."""
    out = []
    for index in ids.tolist():
        level = int(side.level[index])
        row = side.tables[level].weight[index]
        for hop in list(side.hops)[level:]:
            row = hop(row)
        out.append(row)
    return torch.stack(out)


def check(result: dict, tolerance: float) -> None:
    """What every result holds, and that both walked the same stream about as well."""
    assert result["steps"] == 6 and result["ratio"] > 0
    cpu = result["cpu_seconds"]
    assert result["ratio"] == pytest.approx(cpu["all-sizes"] / cpu["ragged"])
    low, high = result["ratio_p20_p80"]
    assert 0 < low <= result["ratio_median"] <= high
    one, two = result["quality"]["ragged"], result["quality"]["all-sizes"]
    assert one["events"] == two["events"] == 1_000
    assert abs(one["loss"] - two["loss"]) < tolerance


def test_a_run(tmp_path):
    out = tmp_path / "deep" / "result.json"
    done = run("--events", 3000, "--turn", 2, "--seed", 1, "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    result = json.loads(out.read_text())
    check(result, tolerance=0.05)
    assert result["baseline"] == "full" and result["config"]["seed"] == 1 and result["info"]
    assert f"all-sizes / ragged: {result['ratio']:.2f} in total" in done.stdout
    assert "synthetic, binary, 6 steps, full baseline, 1 thread" in done.stdout


def test_a_long_run(tmp_path):
    out = tmp_path / "result.json"
    done = run("--long", 25_000, "--seed", 1, "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    result = json.loads(out.read_text())
    assert result["events"] == result["config"]["events"] == 25_000 and result["info"]
    assert result["part"] == 6_250 and result["quality"]["events"] == 6_500
    first, last = result["us_per_event"]["first"], result["us_per_event"]["last"]
    assert result["ratio"] == pytest.approx(last["us"] / first["us"])
    assert result["ratio_cpu"] == pytest.approx(last["us_cpu"] / first["us_cpu"])
    assert min(*first.values(), *last.values()) > 0
    assert result["events_per_second"] == pytest.approx(25_000 / result["wall_seconds"])
    start, end = result["memory"]["start"], result["memory"]["end"]
    assert 50 < start["peak_rss_mib"] <= end["peak_rss_mib"] < 20_000
    assert f"last / first: {result['ratio']:.3f}" in done.stdout
    assert f"peak RSS {start['peak_rss_mib']} MiB when training began" in done.stdout
    assert "synthetic, binary, 25000 events, 1 thread" in done.stdout


def test_windows_of_a_long_run(bench, monkeypatch):
    """An event takes 2 us in the first part and 3 in the last; warm-up and the rest take more."""
    stream = build_stream(load_ratings("synthetic", events=2_130), batch_size=10)
    config = SearchConfig(batch_size=10, log_every=5, sizes=(1, 2), hidden=4, policy_hidden=4)
    clock = [0.0]

    def step(self):
        done = self.measures.seen
        us = 9 if done < 50 else 2 if done < 600 else 3 if 1_570 <= done < 2_100 else 7
        clock[0] += 10 * us * 1e-6
        return real(self)

    real = bench.Run.step
    monkeypatch.setattr(bench.Run, "step", step)
    for name in ("process_time", "perf_counter"):
        monkeypatch.setattr(bench.time, name, lambda: clock[0])
    result = bench.walk_long(config, stream)
    assert result["part"] == 532
    assert result["us_per_event"]["first"] == pytest.approx({"us": 2, "us_cpu": 2})
    assert result["us_per_event"]["last"] == pytest.approx({"us": 3, "us_cpu": 3})
    assert result["ratio"] == result["ratio_cpu"] == pytest.approx(1.5)


def test_five_classes_against_the_lean_baseline(bench):
    config = SearchConfig(task="multiclass", seed=1, sizes=(2, 4), hidden=16)
    stream = build_stream(load_ratings("synthetic", events=3000), task="multiclass")
    result = bench.compare(config, stream, True, 4)  # the last turn is shorter
    check(result, tolerance=0.15)
    assert set(result["cpu_seconds"]) == set(result["ms_per_step"]) == {"ragged", "all-sizes"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--events", "100"], "100 events are fewer than two batches of 500"),
        (["--data", "nowhere.csv"], "nowhere.csv: no such file"),
        (["--seed", "-1"], "--seed"),
        (["--turn", "0"], "--turn must be at least 1"),
        (["--long", "0"], "--events must be at least 1"),
        (["--long", "4000", "--data", "nowhere.csv"], "--long walks the synthetic stream"),
        (["--events", "1000", "--out", "{taken}/result.json"], "taken"),
    ],
)
def test_mistakes_are_one_line(bench, arguments, expected, tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.write_text("mine")
    threads = torch.get_num_threads()
    try:
        status = bench.main([text.replace("{taken}", str(taken)) for text in arguments])
    finally:
        torch.set_num_threads(threads)
    captured = capsys.readouterr()
    assert status == 2 and captured.out == ""
    assert captured.err.startswith("bench/search.py: error: ") and expected in captured.err
    assert captured.err.count("\n") == 1 and taken.read_text() == "mine"


def test_promoted_rows_keep_the_output(side):
    everyone, moved = torch.arange(6), torch.tensor([3, 0])
    before, level = carried(side, everyone), side.level.clone()
    side.write_promoted(moved)
    assert torch.equal(side.level, level) and torch.equal(carried(side, everyone), before)
    side.level[moved] += 1
    torch.testing.assert_close(carried(side, everyone), before, atol=1e-6, rtol=1e-5)
    for index in moved.tolist():  # the row written is W e + b of the one before
        k = int(side.level[index]) - 1
        expected = side.hops[k](side.tables[k].weight[index])
        torch.testing.assert_close(side.tables[k + 1].weight[index], expected)
    side.write_promoted(torch.tensor([], dtype=torch.int64))


def test_forward_selects_each_row_at_its_own_size(side):
    """Statistics over the selected rows (lean), or for every size over all rows (full)."""
    ids = torch.tensor([0, 5, 2, 2, 4, 1])

    def norm(x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()

    if side.lean:
        expected = torch.tanh(norm(carried(side, ids)))
    else:
        own, expected = side.level[ids].tolist(), torch.empty(len(ids), 4)
        for level in range(3):
            h = side.tables[level](ids)
            for hop in list(side.hops)[level:]:
                h = hop(h)
            mine = [row for row, k in enumerate(own) if k == level]
            expected[mine] = torch.tanh(norm(h))[mine]
    torch.testing.assert_close(side(ids, side.level[ids]), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("lean", [True, False])
def test_all_sizes_search_grows_rows_one_size_a_batch(bench, lean):
    stream = build_stream(load_ratings("synthetic", events=1_000), batch_size=100)
    config = SearchConfig(sizes=(1, 2, 4), batch_size=100, hidden=8, max_frequency=16)
    search = bench.AllSizesSearch(config, stream, lean)
    level = {name: side.level.clone() for name, side, *_ in search.sides}
    for index in range(len(stream.bounds)):
        search.step()
        for name, side, *_ in search.sides:
            grown = side.level - level[name]
            assert set(grown.tolist()) <= {0, 1} and int(side.level.max()) <= 2
            absent = torch.ones(len(grown), dtype=torch.bool)
            absent[getattr(stream.batch(index), name)] = False
            assert grown[absent].eq(0).all()
            level[name] = side.level.clone()
    assert all(int(counts.max()) == 2 for counts in level.values())
    assert search.measures.seen == 1_000
    assert all(value.isfinite().all() for value in search.measures.buffers())
