"""info.py: which backend a call takes, and what is reported about the machine."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from esapn_kernels import info
from esapn_kernels.ops import backend

ROOT = Path(__file__).resolve().parents[2]
NO_TRITON = "triton cannot be imported (No module named 'triton')"
NO_NATIVE = "the native kernels are not built: no C++ compiler was found; install g++ or clang"
SETS = SimpleNamespace(
    instruction_sets=lambda: ["avx512", "avx2", "baseline"], instruction_set=lambda: "avx2"
)


def set_state(
    monkeypatch, *, triton_error=None, interpreted=False, cuda=False, native_error=None, forced=""
):
    monkeypatch.setattr(backend, "TRITON_ERROR", triton_error)
    monkeypatch.setattr(backend, "INTERPRETED", interpreted)
    monkeypatch.setattr(backend, "NATIVE_ERROR", native_error)
    monkeypatch.setattr(backend, "native", SETS)
    monkeypatch.setattr(backend, "_FORCED", forced)
    monkeypatch.setattr(info, "_cuda_available", lambda: cuda)
    if not cuda:
        monkeypatch.setattr(info, "_devices", lambda: [])


def run_python(*args, **env):
    return subprocess.run(
        [sys.executable, *args],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )


def test_interpreted_is_settled_at_import(monkeypatch):
    before = info.backend_status()
    monkeypatch.setenv("TRITON_INTERPRET", "0" if backend.INTERPRETED else "1")
    assert info.backend_status() == before


def test_backend_status(monkeypatch):
    set_state(monkeypatch)
    assert info.backend_status() == {
        "triton": "no CUDA device; runs interpreted with TRITON_INTERPRET=1",
        "native": None,
        "torch": None,
        "reference": None,
    }
    set_state(monkeypatch, native_error=NO_NATIVE)
    assert info.backend_status()["native"] == NO_NATIVE
    set_state(monkeypatch, interpreted=True)
    assert info.backend_status()["triton"] is None
    set_state(monkeypatch, cuda=True)
    assert info.backend_status()["triton"] is None
    set_state(monkeypatch, cuda=True, triton_error=NO_TRITON)
    assert info.backend_status()["triton"] == NO_TRITON
    assert tuple(info.backend_status()) == backend.BACKENDS


def test_collect_survives_json():
    collected = info.collect()
    assert json.loads(json.dumps(collected)) == collected
    assert collected["torch"] == torch.__version__
    assert collected["threads"] == torch.get_num_threads()
    assert set(collected["backends"]) == set(backend.BACKENDS)


def test_collect_without_git_driver_or_cpuinfo(monkeypatch):
    def missing(*args, **kwargs):
        raise FileNotFoundError("no such program")

    monkeypatch.setattr(info.subprocess, "run", missing)
    collected = info.collect()
    assert collected["commit"] is None
    assert collected["dirty"] is None
    assert collected["driver"] is None


def test_versions_of_triton_that_were_tested(capsys):
    tested = info.collect()["triton_tested"]
    numbers = [tuple(map(int, version.split("."))) for version in tested]
    assert numbers == sorted(numbers)
    # The version that constraints.txt installs is among them.
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = re.search(r"^triton==([\d.]+)", constraints, re.MULTILINE)
    assert pinned and pinned[1] in tested
    assert info.main([]) == 0
    assert "triton tested" in (out := capsys.readouterr().out) and ", ".join(tested) in out


def test_commit_is_that_of_the_files(monkeypatch, tmp_path):
    git = ("git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.org")
    if info._run("git", "--version") is None:
        pytest.skip("git is not installed")
    package = tmp_path / "package"
    package.mkdir()
    source = package / "info.py"
    source.write_text("")
    (tmp_path / "other").write_text("")
    monkeypatch.setattr(info, "__file__", str(source))

    info._run(*git, "init", "--quiet")
    info._run(*git, "add", "other")
    info._run(*git, "commit", "--quiet", "--message", "one")
    assert info._commit() == (None, None)  # in a checkout that does not track the package

    info._run(*git, "add", "package")
    info._run(*git, "commit", "--quiet", "--message", "two")
    head = info._run(*git, "rev-parse", "HEAD")
    assert head is not None
    assert info._commit() == (head, False)

    source.write_text("changed = True\n")
    assert info._commit() == (head, True)


def test_text_names_every_backend_and_device(monkeypatch, capsys):
    device = {
        "device": "cuda:0",
        "name": "Some GPU",
        "capability": "90",
        "memory_bytes": 80 * 2**30,
        "multiprocessors": 132,
    }
    set_state(monkeypatch, cuda=True)
    monkeypatch.setattr(info, "_devices", lambda: [device])
    assert info.main([]) == 0
    out = capsys.readouterr().out
    assert "Some GPU, sm_90, 80.0 GiB" in out
    for name in backend.BACKENDS:
        assert f"{name} backend" in out

    set_state(monkeypatch, triton_error=NO_TRITON)
    assert info.main([]) == 0
    out = capsys.readouterr().out
    assert out.count(NO_TRITON) == 2  # as a version and as a backend


def test_the_instruction_set_of_the_native_backend(monkeypatch, capsys):
    set_state(monkeypatch)
    collected = info.collect()
    assert collected["instruction_set"] == "avx2"
    assert collected["instruction_sets"] == ["avx512", "avx2", "baseline"]
    assert collected["auto"]["cpu"] == "native"
    assert info.main([]) == 0
    out = capsys.readouterr().out
    assert re.search("^native backend +available, avx2 \\(of avx512, avx2, baseline\\)$", out, re.M)
    assert re.search("^auto on cpu +native$", out, re.M)

    set_state(monkeypatch, native_error=NO_NATIVE)
    collected = info.collect()
    assert (collected["instruction_set"], collected["instruction_sets"]) == (None, [])
    assert collected["auto"]["cpu"] == "torch"
    assert info.main([]) == 0
    assert re.search(f"^native backend +{re.escape(NO_NATIVE)}$", capsys.readouterr().out, re.M)


def test_the_built_module_names_the_sets_of_this_machine():
    if backend.NATIVE_ERROR is not None:
        pytest.skip(backend.NATIVE_ERROR)
    collected = info.collect()
    assert collected["instruction_sets"][-1] == "baseline"
    assert collected["instruction_set"] == backend.native.instruction_set()
    before = backend.native.use("baseline")
    try:
        assert info.collect()["instruction_set"] == "baseline"
    finally:
        assert backend.native.use(before) == "baseline"


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"forced": "nativ"}, "ESAPN_CPU_BACKEND must be native or torch, got 'nativ'"),
        ({"forced": "native", "native_error": NO_NATIVE}, f"but {NO_NATIVE}"),
    ],
)
def test_a_forced_backend_that_cannot_run_is_one_line(monkeypatch, capsys, state, says):
    set_state(monkeypatch, **state)
    assert info.collect()["auto"]["cpu"] is None
    with pytest.raises(SystemExit) as ended:
        info.main([])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.endswith(f"{says}\n") and error.count("error: ") == 1


def test_command_prints_json():
    """Importing initialises no device, and Triton interprets as the variable says."""
    here = os.environ.get("TRITON_INTERPRET", "0")
    assert backend.TRITON_ERROR is not None or info.collect()["interpreted"] is (here == "1")
    there = "0" if here == "1" else "1"
    code = (
        "import runpy, torch, esapn_kernels\n"
        "assert not torch.cuda.is_initialized()\n"
        "runpy.run_module('esapn_kernels.info', run_name='__main__', alter_sys=True)\n"
    )
    done = run_python("-c", code, "--json", TRITON_INTERPRET=there)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    printed = json.loads(done.stdout)
    assert printed["triton_error"] is not None or printed["interpreted"] is (there == "1")


@pytest.mark.cuda
def test_devices_on_cuda():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    devices = info.collect()["devices"]
    assert len(devices) == torch.cuda.device_count()
    assert devices[0]["name"] == torch.cuda.get_device_name(0)
    assert devices[0]["memory_bytes"] > 0
