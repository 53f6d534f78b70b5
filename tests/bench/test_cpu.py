"""bench/cpu.py: a rehearsal as a user runs it, what it prints and writes, and its errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cpu
import pytest
from harness import allocator, peers
from harness.gate import GateError

from tests.bench.small import BENCH, SMALL, run

ROOT = BENCH.parent


@pytest.fixture(autouse=True)
def small(monkeypatch: Any) -> None:
    """In this process: a table of a few rows, and little memory."""
    monkeypatch.setattr(cpu, "PAPER_ROWS", {size: 100 * rows for size, rows in SMALL.items()})
    monkeypatch.setattr(cpu, "_QUICK_WARM_BYTES", 1 << 12)
    monkeypatch.setattr(cpu, "_QUICK_PRODUCT", 8)


def test_a_rehearsal(tmp_path: Path) -> None:
    """The present checkout stands in for an earlier one."""
    out = tmp_path / "x.json"
    rows = ["forward-65536-uniform", "step-sgd-500-uniform-before"]
    arguments = ["--quick", "--turns", 2, "--before", ROOT, "--seed", 3, "--out", out]
    done = run("cpu.py", *arguments, "--rows", *rows)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["benchmark"] == "cpu" and result["complete"] and result["quick"]
    assert (result["turns"], result["seed"], result["gate"]["passed"]) == (2, 3, True)
    assert result["provenance"]["torch"] and result["product_gflops"]["1"] > 0
    measured = [(row["name"], row["allocator"], row["turns"]) for row in result["rows"]]
    wanted = [(name, "warm", 2) for name in rows]
    if allocator.has_glibc():
        wanted.append((rows[0], "default", 2))
        pinned, default = result["allocators"]
        assert "MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592" in pinned
        assert pinned.startswith("allocator, warm: glibc ") and "no variables" in default
    assert measured == wanted
    for row in result["rows"]:
        assert row["ratio"] > 0 and row["gate_error"] < 5e-5 and len(row["ours_samples_us"]) == 2
    assert result["rows"][1]["other"] == "before"
    assert any(line.startswith("before: commit ") for line in result["conditions"])
    lines = done.stdout.splitlines()
    assert lines[0].startswith("warm memory ") and max(map(len, lines[:6])) <= 130
    assert [line.split()[0] for line in lines[1:3]] == rows
    for line in (*result["conditions"], *result["allocators"], *result["notes"]):
        assert line in lines


def test_rows_without_their_flag_are_left_out_and_named(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(cpu, "cores", lambda: 1)
    rows = ["dense-500-*", "forward-64-*", "step-adam-500*", "*sgd*uniform-fbgemm", "*uniform-2-*"]
    assert cpu.main(["--quick", "--rows", *rows]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["forward-64-uniform", "dense-500-uniform"]
    assert not lines[3]
    assert [line for line in lines if line.startswith("left out")] == [
        "left out, for it needs --before PATH: step-adam-500-uniform-before",
        "left out, for it needs --peers: step-sgd-65536-uniform-fbgemm",
        "left out, for it needs two cores: forward-65536-uniform-2-threads",
    ]


def test_the_allocator_of_a_default_process(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "x.json"
    arguments = ["--quick", "--allocator", "default", "--rows", "forward-*-uniform"]
    assert cpu.main([*arguments, "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith("default memory")
    rows = json.loads(out.read_text())["rows"]
    assert [(row["name"], row["allocator"]) for row in rows] == [
        ("forward-65536-uniform", "default")
    ]


def test_out_has_every_row_as_soon_as_it_is_measured(
    tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    """And the gate's word where it ends the run; then nothing is printed."""
    out = tmp_path / "x.json"
    found = []
    measure = cpu.Bench.measure

    def measured(bench: Any, case: Any) -> Any:
        found.append(json.loads(out.read_text()))
        if len(found) == 2:
            raise GateError("ours: outputs off by 1.0e+00")
        return measure(bench, case)

    monkeypatch.setattr(cpu.Bench, "measure", measured)
    arguments = ["--quick", "--rows", "forward-64-*", "forward-500-*", "--out", str(out)]
    assert cpu.main(arguments) == 1
    assert not found[0]["rows"] and len(found[1]["rows"]) == 1 and not found[1]["complete"]
    ended = json.loads(out.read_text())
    assert not ended["gate"]["passed"] and not ended["complete"]
    assert ended["rows"] == found[1]["rows"]
    assert ended["notes"][-1] == "ended before forward-500-uniform: ours: outputs off by 1.0e+00"
    text, err = capsys.readouterr()
    assert not text and err.splitlines()[-1] == "not timed: ours: outputs off by 1.0e+00"


def test_a_default_process_that_fails_ends_the_run(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(allocator, "has_glibc", lambda: True)
    monkeypatch.setattr(cpu.sys, "executable", "/bin/false")
    assert cpu.main(["--quick", "--rows", "forward-65536-uniform"]) == 1
    text, err = capsys.readouterr()
    assert not text
    said = "not timed: the process with the default allocator ended with status 1"
    assert err.splitlines()[-1] == said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--turns", "1"], "argument --turns: must be at least 2, got 1"),
        (["--seed", "-1"], "argument --seed: must be in [0, 2**63), got -1"),
        (["--out", "/no/such/folder/x.json"], "cannot write /no/such/folder/x.json: No such file"),
        (["--rows", "x"], "argument --rows: no row is called x: --help lists them"),
        (["--rows", "*-before"], "nothing to measure: left out, for it needs --before PATH: step-"),
        (["--allocator", "default", "--rows", "bits-*"], "no such row is measured with this"),
        (["--before", "/no/such"], "argument --before: no esapn_kernels package in /no/such"),
        (["--backend", "gpu"], "argument --backend: invalid choice: 'gpu'"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        cpu.main(arguments)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out
    assert err.startswith("bench/cpu.py: error: ") and message in err and err.count("\n") == 1


def test_what_cannot_run_is_one_line(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    def refuse(backend: str, device: Any) -> str:
        raise RuntimeError("backend 'native' is not built")

    package = tmp_path / "esapn_kernels"
    package.mkdir()
    (package / "__init__.py").write_text("import no_such_module_anywhere\n")
    monkeypatch.setattr(peers, "fbgemm_error", lambda: "No module named 'fbgemm_gpu'")
    monkeypatch.setattr(cpu.sys, "meta_path", cpu.sys.meta_path[:])
    for arguments, message in [
        (["--peers"], "argument --peers: fbgemm_gpu cannot be imported (No module named 'fbg"),
        (["--before", str(tmp_path)], "argument --before: its package cannot be imported (No mo"),
        (["--backend", "native"], "argument --backend: backend 'native' is not built"),
    ]:
        if "native" in arguments:
            monkeypatch.setattr(cpu, "resolve_backend", refuse)
        with pytest.raises(SystemExit) as stop:
            cpu.parse(arguments)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and message in err and err.count("\n") == 1
