"""bench/search.py: its runs and its errors."""

from __future__ import annotations

import json

import pytest
import search
import torch

from esapn.config import SearchConfig
from esapn.data.load import load_ratings
from esapn.data.stream import build_stream
from tests.bench.small import run


@pytest.fixture(autouse=True)
def threads():
    """The command sets them for its process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


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
    done = run("search.py", "--events", 3000, "--turn", 2, "--seed", 1, "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    result = json.loads(out.read_text())
    check(result, tolerance=0.05)
    assert result["baseline"] == "full" and result["config"]["seed"] == 1 and result["info"]
    assert f"all-sizes / ragged: {result['ratio']:.2f} in total" in done.stdout
    assert "synthetic, binary, 6 steps, full baseline, 1 thread" in done.stdout


def test_a_long_run(tmp_path, capsys):
    out = tmp_path / "result.json"
    assert search.main(["--long", "25000", "--seed", "1", "--out", str(out)]) == 0
    text, errors = capsys.readouterr()
    assert errors == ""
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
    assert f"last / first: {result['ratio']:.3f}" in text
    assert f"peak RSS {start['peak_rss_mib']} MiB when training began" in text
    assert "synthetic, binary, 25000 events, 1 thread" in text


def test_windows_of_a_long_run(monkeypatch):
    """An event takes 2 us in the first part and 3 in the last; warm-up and the rest take more."""
    stream = build_stream(load_ratings("synthetic", events=2_130), batch_size=10)
    config = SearchConfig(batch_size=10, log_every=5, sizes=(1, 2), hidden=4, policy_hidden=4)
    clock = [0.0]

    def step(self):
        done = self.measures.seen
        us = 9 if done < 50 else 2 if done < 600 else 3 if 1_570 <= done < 2_100 else 7
        clock[0] += 10 * us * 1e-6
        return real(self)

    real = search.Run.step
    monkeypatch.setattr(search.Run, "step", step)
    for name in ("process_time", "perf_counter"):
        monkeypatch.setattr(search.time, name, lambda: clock[0])
    result = search.walk_long(config, stream)
    assert result["part"] == 532
    assert result["us_per_event"]["first"] == pytest.approx({"us": 2, "us_cpu": 2})
    assert result["us_per_event"]["last"] == pytest.approx({"us": 3, "us_cpu": 3})
    assert result["ratio"] == result["ratio_cpu"] == pytest.approx(1.5)


def test_five_classes_against_the_lean_baseline():
    config = SearchConfig(task="multiclass", seed=1, sizes=(2, 4), hidden=16)
    stream = build_stream(load_ratings("synthetic", events=3000), task="multiclass")
    result = search.compare(config, stream, True, 4)  # the last turn is shorter
    check(result, tolerance=0.15)
    assert set(result["cpu_seconds"]) == set(result["ms_per_step"]) == {"ragged", "all-sizes"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--events", "100"], "100 events are fewer than two batches of 500"),
        (["--data", "nowhere.csv"], "nowhere.csv: no such file"),
        (["--seed", "-1"], "argument --seed: must be in [0, 2**63), got -1"),
        (["--turn", "0"], "argument --turn: must be at least 1, got 0"),
        (["--long", "0"], "argument --long: must be at least 1, got 0"),
        (["--events", "0"], "--events must be at least 1"),
        (["--long", "4000", "--data", "nowhere.csv"], "--long walks the synthetic stream"),
        (["--mode", "tuned"], "--mode and --dwell go with --long"),
        (["--dwell", "1"], "--mode and --dwell go with --long"),
        (["--events", "1000", "--out", "{taken}/result.json"], "taken"),
    ],
)
def test_mistakes_are_one_line(arguments, expected, tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.write_text("mine")
    with pytest.raises(SystemExit) as stop:
        search.main([text.replace("{taken}", str(taken)) for text in arguments])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == ""
    assert captured.err.startswith("bench/search.py: error: ") and expected in captured.err
    assert captured.err.count("\n") == 1 and taken.read_text() == "mine"
