"""bench/gpu.py and bench/kernels.py: a rehearsal, what fails or is ended, and their errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu
import kernels
import pytest
import torch
from gpu import Stage
from torch.autograd import DeviceType

from esapn_kernels.ops.backend import TRITON_ERROR
from tests.bench.small import BENCH, run
from tests.helpers import install_command

needs_triton = pytest.mark.skipif(TRITON_ERROR is not None, reason=str(TRITON_ERROR))
FACTS = {
    "rehearsal": False,
    "provenance": {"devices": [], "commit": None, "dirty": None, "torch": "2", "triton": "3"},
}


def program(name: str, text: str, seconds: float = 60, **more: Any) -> Stage:
    return Stage(name, f"what {name} does", seconds, [sys.executable, "-c", text], **more)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a rehearsal, and what it printed."""
    folder = tmp_path_factory.mktemp("gpu") / "new"
    done = run("gpu.py", "--rehearse", "--out", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


@needs_triton
def test_a_rehearsal_runs_every_stage(rehearsal: tuple[Path, str]) -> None:
    folder, _ = rehearsal
    result = json.loads((folder / "summary.json").read_text())
    assert result["rehearsal"] and result["complete"] and result["provenance"]["torch"]
    found = {entry["stage"]: entry for entry in result["stages"]}
    assert list(found) == list(gpu.LIMITS)
    for name in ("memcheck", "initcheck"):
        assert found.pop(name)["status"] == "not available"
    assert {entry["status"] for entry in found.values()} == {"passed"}
    assert found["race"]["counts"] == {"passed": 3}
    assert found["tests"]["counts"] == {"passed": 5}
    assert found["native"]["counts"]["passed"] == 3 and found["native"]["counts"]["skipped"] > 2
    for name in ("race", "tests", "native"):
        assert not found[name]["failures"] + found[name]["running"] + found[name]["not_reached"]
    times = json.loads((folder / "kernels.json").read_text())
    assert times["rehearsal"] and times["complete"]
    cases = ["forward", "dense step", "adam step", "deferred", "promotion"]
    assert [case["case"] for case in times["cases"]] == cases
    for case in times["cases"]:
        assert case["kernels_us"] == pytest.approx(sum(row["us"] for row in case["kernels"]))
        assert 0 < case["host_us"] <= case["host_and_gpu_us"]


@needs_triton
def test_a_rehearsal_says_that_it_is_one(rehearsal: tuple[Path, str]) -> None:
    folder, printed = rehearsal
    assert sorted(path.name for path in folder.iterdir()) == sorted(gpu.FILES)
    assert len(gpu.FILES) <= 8
    text = (folder / "summary.md").read_text()
    assert text.startswith("# Rehearsal on a CPU") and "they say nothing" in text
    assert printed.endswith(text)
    log = (folder / "log.txt").read_text()
    assert log.count("\n== ") == len(gpu.LIMITS) - 1 and log in printed


def test_the_stages_fit_nine_minutes(tmp_path: Path) -> None:
    assert sum(gpu.LIMITS.values()) <= 9 * 60 - 5 * len(gpu.LIMITS)  # and 5 s to end each of them
    stages = gpu.make_stages(tmp_path, False)
    assert {stage.name: stage.seconds for stage in stages} == gpu.LIMITS
    for path in {*gpu.TESTED, gpu.NATIVE}:
        assert (gpu.ROOT / path).is_file()


def test_what_fails_and_what_is_ended_does_not_keep_the_others(tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "kernels.json").write_text("of an earlier run")
    record = tmp_path / "tests.jsonl"
    lines = [
        {"collected": ["t.py::a", "t.py::b", "t.py::c", "t.py::d"]},
        {"started": "t.py::a"},
        {"test": "t.py::a", "outcome": "passed", "seconds": 0.1},
        {"started": "t.py::b"},
        {"test": "t.py::b", "outcome": "failed", "seconds": 0.1, "text": "x\nE   assert 1 == 2"},
        {"started": "t.py::c"},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    hangs = "import subprocess, sys, time; "
    hangs += f"open({str(record)!r}, 'a').write({text!r}); "
    hangs += "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
    hangs += "print('child', child.pid, flush=True); time.sleep(600)"
    stages = [
        program("hangs", hangs, 3, tests=True),
        program("wrong", "print('before'); raise ValueError('the reason')"),
        program("absent", "", missing="it is not here"),
        program("good", "print('good')"),
        program("checked", "print('one'); print('========= Invalid read'); exit(1)"),
    ]
    result = gpu.run(stages, tmp_path, FACTS)
    found = {entry["stage"]: entry for entry in result["stages"]}
    assert result == json.loads((tmp_path / "summary.json").read_text())
    statuses = {name: entry["status"] for name, entry in found.items()}
    expected = ["timed out", "failed", "not available", "passed", "failed"]
    assert statuses == dict(zip(found, expected, strict=True))
    assert found["wrong"]["text"][-1] == "ValueError: the reason"
    assert found["wrong"]["returncode"] == 1
    assert found["checked"]["text"] == ["========= Invalid read", "one"]
    ended = found["hangs"]
    assert ended["counts"] == {"passed": 1, "failed": 1}
    assert ended["failures"] == [{"test": "t.py::b", "text": ["assert 1 == 2"]}]
    assert ended["running"] == ["t.py::c"] and ended["not_reached"] == ["t.py::d"]
    summary = (tmp_path / "summary.md").read_text()
    for words in ("assert 1 == 2", "1 x t.py::c", "1 x t.py", "ValueError: the reason"):
        assert words in summary
    assert "it is not here" in summary and "earlier" not in summary
    printed = capfd.readouterr().out
    assert "good\n" in printed and (tmp_path / "log.txt").read_text() == printed
    child = int(next(line for line in printed.splitlines() if line.startswith("child")).split()[1])
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text():
        time.sleep(0.01)


def test_time_that_is_left_goes_to_the_next_stage(tmp_path: Path, monkeypatch: Any) -> None:
    clock = [0.0]
    given = []

    def process(stage: Stage, seconds: float, log: Any) -> dict[str, Any]:
        given.append(seconds)
        clock[0] += {"short": 4, "long": seconds + 1, "last": 2}[stage.name]
        return {"status": "passed"}

    monkeypatch.setattr(gpu, "run_process", process)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])
    stages = [program("short", "", 10), program("absent", "", 5, missing="it is not here")]
    stages += [program("long", "", 20), program("last", "", 30)]
    gpu.run(stages, tmp_path, FACTS)
    assert given == [10, 6 + 5 + 20, 30]


def test_every_result_of_pytest_is_recorded(tmp_path: Path) -> None:
    tests = """
import os, pytest
@pytest.fixture
def device(): pass
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_good(backend, device): pass
@pytest.mark.cuda
def test_bad(): assert 1 == 2
def test_skipped(device): pytest.skip("why")
def test_dies(device): os._exit(1)
@pytest.fixture
def broken(): raise ValueError("in the fixture")
def test_not_set_up(broken, device): pass
def test_elsewhere(): raise ValueError("on a CPU")
"""
    (tmp_path / "test_some.py").write_text(tests)
    record = tmp_path / "record"
    command = [sys.executable, "-m", "pytest", "-p", "harness.gpu_tests", "--record", str(record)]
    command += ["-p", "no:cacheprovider", "-W", "ignore", "-n", "1", "test_some.py"]
    env = {**os.environ, "PYTHONPATH": str(BENCH)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = record.read_text().splitlines()
    assert json.loads(lines[0])["collected"] == [
        f"test_some.py::{name}"
        for name in (
            "test_good[triton]",
            "test_bad",
            "test_skipped",
            "test_dies",
            "test_not_set_up",
            "test_good[torch]",
        )
    ]
    found = gpu.read_tests(lines)
    assert found["counts"] == {"passed": 2, "failed": 3, "skipped": 1}
    failures = {f["test"].partition("::")[2]: f["text"][0] for f in found["failures"]}
    assert failures["test_bad"] == "assert 1 == 2"
    assert failures["test_not_set_up"] == "ValueError: in the fixture"
    assert "crashed" in failures["test_dies"]
    assert not found["running"] and not found["not_reached"]


def test_the_sanitizer_is_looked_for(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpu, "glob", lambda _: [])
    stages = {stage.name: stage for stage in gpu.make_stages(tmp_path, False)}
    assert stages["memcheck"].missing == "compute-sanitizer is not installed"
    assert not stages["kernels"].missing
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    stages = {stage.name: stage for stage in gpu.make_stages(tmp_path, False)}
    for name in ("memcheck", "initcheck"):
        assert not stages[name].missing
        assert stages[name].command[:3] == [str(tool), "--tool", name]
    tool.unlink()
    installed = ["/usr/local/cuda-12.8/bin/compute-sanitizer", "/usr/local/cuda/bin/compute-sanit"]
    monkeypatch.setattr(gpu, "glob", lambda _: installed)
    assert gpu.find_sanitizer() in installed


def error(capsys: Any, main: Any, *arguments: str) -> str:
    """The line of a mistake."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out and err.count("\n") == 1
    return err


def test_without_a_gpu(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = error(capsys, gpu.main, "--out", str(tmp_path / "new"))
    assert line.startswith("bench/gpu.py: error: torch finds no CUDA device")
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    assert "torch finds no CUDA device" in error(capsys, kernels.main)


def test_without_what_the_tests_need(capsys: Any, monkeypatch: Any) -> None:
    absent = {"xdist", "hypothesis"}
    monkeypatch.setattr(gpu, "find_spec", lambda name: None if name in absent else object())
    line = error(capsys, gpu.main)
    assert install_command(line) == ["pip", "install", "pytest-xdist", "hypothesis"]


def test_mistakes_are_one_line(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    assert "unrecognized arguments: --bogus" in error(capsys, gpu.main, "--bogus")
    (tmp_path / "file").write_text("")
    line = error(capsys, gpu.main, "--rehearse", "--out", str(tmp_path / "file"))
    assert "argument --out: cannot make" in line
    assert "must be at least 1, got 0" in error(capsys, kernels.main, "--ids", "0")
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    assert "needs TRITON_INTERPRET=1" in error(capsys, kernels.main, "--rehearse")
    monkeypatch.setattr(kernels, "INTERPRETED", True)
    assert "interpreted kernels are not timed" in error(capsys, kernels.main)


def test_kernels_that_the_profiler_sees(monkeypatch: Any) -> None:
    def event(name: str, us: float, kind: Any = DeviceType.CUDA, annotation: bool = False) -> Any:
        span = SimpleNamespace(elapsed_us=lambda: us)
        return SimpleNamespace(
            name=name, device_type=kind, is_user_annotation=annotation, time_range=span
        )

    class Profiler:
        def __init__(self, activities: Any) -> None:
            pass

        def __enter__(self) -> Profiler:
            return self

        def __exit__(self, *_: Any) -> None:
            pass

        def events(self) -> list[Any]:
            made = [event("_rows_kernel", 5.0), event("_rows_kernel", 7.0), event("fill", 2.0)]
            made.append(event("Optimizer.step", 90.0, annotation=True))
            return [*made, event("cudaLaunchKernel", 80.0, DeviceType.CPU)]

    monkeypatch.setattr(kernels, "profile", Profiler)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    called = []
    calls = [lambda: called.append(1)] * 2
    found = kernels.profiled(calls, torch.device("cuda"))
    assert len(called) == 2
    assert found == [
        {"kernel": "_rows_kernel", "us": 6.0, "launches": 1.0},
        {"kernel": "fill", "us": 1.0, "launches": 0.5},
    ]

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    shares = kernels.predictions("3.7.1", torch.device("cuda"))
    assert kernels.predictions("0.0", torch.device("cuda")) == {}
    case = kernels.Case("adam step", 500, lambda n: calls[:n], 18_000, "adam")
    bench: Any = SimpleNamespace(rehearse=False, device=torch.device("cuda"))
    result = kernels.measure(case, 3_000.0, shares, bench)
    rows = {row["kernel"]: row["predicted_share_busy_idle"] for row in result["kernels"]}
    assert rows == {"_rows_kernel": shares["rows, adam"], "fill": None}
    assert shares["rows, adam"] is not None


def test_text_of_a_case() -> None:
    rows = [
        {"kernel": "_rows_kernel", "us": 6.0, "launches": 1.0},
        {"kernel": "k" * 300, "us": 1.0, "launches": 0.5},
    ]
    for row, shares in zip(rows, ([0.4, 1.0], None), strict=True):
        row["predicted_share_busy_idle"] = shares
    case = {"case": "adam step", "ids": 65_536, "kernels_us": 7.0, "host_us": 3.0, "kernels": rows}
    case |= {"host_and_gpu_us": 9.0, "fewest_bytes": 7_000_000, "gb_per_s": 1000.0}
    heading, _, first, second = kernels.lines({**case, "share_of_copy": 0.5})
    assert heading.startswith("adam step, 65,536 ids: kernels 7.0 us, host 3.0 us, both 9.0 us")
    assert heading.endswith("at least 7.00 MB, 1,000 GB/s, 50.0% of a copy")
    assert first.split() == ["6.0", "1.0", "_rows_kernel", "40%", "-", "100%"]
    assert len(second) <= 100
    nothing = {**case, "kernels_us": 0.0, "gb_per_s": None, "share_of_copy": None, "kernels": []}
    assert kernels.lines(nothing)[0].endswith("the profiler saw no kernel")


@needs_triton
def test_every_kernel_once() -> None:
    """As compute-sanitizer runs it."""
    command = [sys.executable, str(BENCH / "kernels.py"), "--rehearse", "--once", "--ids", "6"]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(BENCH.parent)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "every kernel has run\n"
