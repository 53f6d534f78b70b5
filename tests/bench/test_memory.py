"""bench/memory.py: its cases, what it prints and writes, and its errors."""

from __future__ import annotations

import json
import os
from pathlib import Path

import memory
import pytest
import torch

from tests.bench.small import run

ONLY_LINUX = pytest.mark.skipif(
    not os.access(memory.CLEAR, os.W_OK), reason="peaks are told by Linux alone"
)


@ONLY_LINUX
def test_a_run(tmp_path):
    out = tmp_path / "x.json"
    done = run(
        "memory.py", "--rows", 200_000, "--case", "construct", "promote", "grow", "--out", out
    )
    assert done.returncode == 0 and not done.stderr
    result = json.loads(out.read_text())
    assert result["benchmark"] == "memory" and result["rows"] == 200_000
    assert result["provenance"]["torch"]
    assert [row["case"] for row in result["cases"]] == ["construct", "promote", "grow"]
    for row in result["cases"]:
        assert row["peak"] > 0 and row["ratio"] == row["peak"] / row["held"]
    constructed, promoted, grown = result["cases"]
    # Rows of two numbers, and where they begin, in whole pages; and hops.
    assert 200_000 * 12 < constructed["held"] < 200_000 * 12 + 100_000
    assert promoted["held"] > constructed["held"] and promoted["first_ms"] > 0
    assert grown["grown"] == 2 and grown["held"] > 1.5 * constructed["held"]
    first, *lines = done.stdout.splitlines()
    assert first.startswith("200,000 rows, fp32, CPU, ")
    assert lines == [memory.header(), *map(memory.line, result["cases"])]


@ONLY_LINUX
@pytest.mark.parametrize("name", memory.CASES)
def test_every_case(name):
    row = memory.CASES[name](2000)
    assert row["held"] > 2000 * 12
    assert row["ratio"] == row["peak"] / row["held"]


@ONLY_LINUX
def test_a_peak_begins_anew():
    meter = memory.Meter()
    numbers = torch.zeros(100 << 20, dtype=torch.uint8)
    assert meter.peak() > 90 << 20
    del numbers
    meter.restart()
    assert meter.peak() < 50 << 20


def test_mixed_sizes():
    sizes = memory.mixed_sizes(100_000)
    found = [int((sizes == size).sum()) / 1000 for size in memory.SIZES]
    assert found == pytest.approx(memory.SHARES, abs=0.5)


def test_the_goal_stands_beside_a_case():
    row = {"case": "construct", "held": 2e6, "peak": 3e6, "ratio": 1.5}
    assert memory.line(row).endswith("at most 1.5: met")
    times = {"first_ms": 2.0, "median_ms": 1.0}
    text = memory.line({**row, "ratio": 1.51, **times})
    assert text.endswith("missed; the first 2.0 ms, the median 1.0 ms")


def test_elsewhere_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(memory, "CLEAR", Path("/proc/no/such/file"))
    with pytest.raises(SystemExit) as stop:
        memory.main([])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out
    assert err.startswith("bench/memory.py: error: needs Linux, ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--rows", "10"], "argument --rows: must be at least 1000, got 10"),
        (["--case", "other"], "argument --case: invalid choice: 'other'"),
        (["--out", "/no/such/folder/x.json"], "cannot write /no/such/folder/x.json: No such file"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        memory.main(arguments)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out
    assert err == f"bench/memory.py: error: {err.partition('error: ')[2]}" and message in err
    assert err.count("\n") == 1
