"""bench/hops.py: its lines, what it prints and writes, and its errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hops
import pytest
import torch

from tests.bench.small import SMALL

HOPS = ("tails", "padded")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hops, "ROWS", SMALL)
    for name in ("_IDS_A_TURN", "_CALLS", "WARM_BYTES"):
        monkeypatch.setattr(hops, name, 64)
    monkeypatch.setattr(hops, "_BATCHES", 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run(dtype: str, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "x.json"
    arguments = ["--ids", "9", "40", "--turns", "2", "--seed", "3", "--dtype", dtype]
    threads = torch.get_num_threads()
    assert hops.main([*arguments, "--out", str(out)]) == 0
    assert torch.get_num_threads() == threads
    result = json.loads(out.read_text())
    assert result["benchmark"] == "hops" and result["provenance"]["torch"]
    assert [result[name] for name in ("ids", "turns", "seed", "dtype", "device", "table_rows")] == [
        [9, 40],
        2,
        3,
        dtype,
        "cpu",
        23,
    ]
    lookups = [(w, n, t) for n in (9, 40) for t in ("uniform", "zipf") for w in ("forward", "step")]
    small = [("hops changed", 64, "uniform"), ("compose", 0, ""), ("compose_bwd", 0, "")]
    below = 23 - SMALL[128]
    expected = [(*line, *HOPS) for line in [*lookups, *small, ("promotion", below, "")]]
    for kind in HOPS:
        pairs = [("demotion", "promotion"), ("another", "promotion"), ("solve", "demotion")]
        expected += [(f"{kind} hops", below, "", *pair) for pair in pairs]
    names = ("what", "ids", "traffic", "over", "under")
    assert [tuple(row[name] for name in names) for row in result["rows"]] == expected
    for row in result["rows"]:
        assert 0 < row["q1"] <= row["ratio"] <= row["q3"] and row["turns"] == 2
        assert row["over_us"] > 0 and row["under_us"] > 0
        assert 0 < row["gate_error"] <= (5e-5 if dtype == "float32" else 1.6e-2)
        assert (row["aim"] == 1.05) == (row["over"] == "tails")
        met = "met" if row["ratio"] <= 1.05 else "missed"
        assert row["status"] == (met if row["over"] == "tails" else "")
    first, heading, *lines = capsys.readouterr().out.splitlines()
    assert first == f"{dtype}, cpu, 23 rows of the ml-20m mix, 2 turns" and heading == hops.HEADING
    assert len(lines) == len(expected)
    for line, row in zip(lines, result["rows"], strict=True):
        assert line.startswith(row["what"]) and f"{row['over_us']:.1f}" in line
        assert len(line) <= 120 and row["status"] in line


def test_both_tables_hold_the_same_rows_and_none_is_of_zeros() -> None:
    spec = hops.make_table_spec("small", SMALL, torch.Generator().manual_seed(0))
    tables = hops.Tables(spec, torch.device("cpu"), torch.float64, 0).of
    tails, padded = tables["tails"], tables["padded"]
    ids = torch.arange(len(spec))
    assert tails.module.chain.numel() < padded.module.chain.numel()
    assert tails.module.chain.count_nonzero() == tails.module.chain.numel()
    with torch.no_grad():
        assert tails(ids).any(1).all()
        torch.testing.assert_close(tails(ids), padded(ids))


def test_nothing_is_timed_that_is_wrong(monkeypatch: Any, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "x.json"

    def wrong(chain: Any, sizes: Any) -> torch.Tensor:
        return 1.01 * expand(chain, sizes)

    expand = hops.expand_tails
    monkeypatch.setattr(hops, "expand_tails", wrong)
    monkeypatch.setattr(hops, "relative_error", lambda value, wanted: 0.1)
    assert hops.main(["--ids", "9", "--turns", "2", "--out", str(out)]) == 1
    assert capsys.readouterr().err.startswith("not timed: tails: outputs off by 1.0e-01 (limit ")
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--ids", "0"], "argument --ids: must be at least 1, got 0"),
        (["--turns", "1"], "argument --turns: must be at least 2, got 1"),
        (["--seed", "-1"], "argument --seed: must be in [0, 2**63), got -1"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--device", "tpu"], "argument --device: must be cpu or cuda, got tpu"),
        (["--out", "/no/such/folder/x.json"], "cannot write /no/such/folder/x.json: No such file"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        hops.main(arguments)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out
    assert err == f"bench/hops.py: error: {err.partition('error: ')[2]}" and message in err
    assert err.count("\n") == 1
