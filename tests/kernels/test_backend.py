"""backend.py: which implementation a call takes, and what it says where it cannot run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from esapn_kernels.ops import backend as backend_module
from esapn_kernels.ops.backend import resolve_backend

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
CUDA = torch.device("cuda")
META = torch.device("meta")
NO_TRITON = "triton cannot be imported (No module named 'triton')"
NO_NATIVE = "the native kernels are not built: no C++ compiler was found; install g++ or clang"


def set_state(monkeypatch, *, triton_error=None, interpreted=False, native_error=None, forced=""):
    monkeypatch.setattr(backend_module, "TRITON_ERROR", triton_error)
    monkeypatch.setattr(backend_module, "INTERPRETED", interpreted)
    monkeypatch.setattr(backend_module, "NATIVE_ERROR", native_error)
    monkeypatch.setattr(backend_module, "_FORCED", forced)


@pytest.mark.parametrize(
    ("backend", "device", "state", "expected"),
    [
        ("auto", CPU, {}, "native"),
        ("auto", CPU, {"interpreted": True}, "native"),
        ("auto", CPU, {"triton_error": NO_TRITON}, "native"),
        ("auto", CPU, {"native_error": NO_NATIVE}, "torch"),
        ("auto", CPU, {"forced": "native"}, "native"),
        ("auto", CPU, {"forced": "torch"}, "torch"),
        ("auto", CPU, {"forced": "torch", "native_error": NO_NATIVE}, "torch"),
        ("auto", CUDA, {}, "triton"),
        ("auto", torch.device("cuda:1"), {}, "triton"),
        ("auto", CUDA, {"triton_error": NO_TRITON}, "torch"),
        ("auto", CUDA, {"forced": "native"}, "triton"),
        ("auto", META, {}, "torch"),
        ("triton", CUDA, {}, "triton"),
        ("triton", CPU, {"interpreted": True}, "triton"),
        ("native", CPU, {}, "native"),
        ("native", CPU, {"forced": "torch"}, "native"),
        ("native", META, {}, "native"),
        ("torch", CPU, {}, "torch"),
        ("torch", CPU, {"forced": "native"}, "torch"),
        ("torch", CUDA, {}, "torch"),
        ("reference", CPU, {}, "reference"),
        ("reference", CUDA, {"triton_error": NO_TRITON}, "reference"),
    ],
)
def test_resolve_backend(monkeypatch, backend, device, state, expected):
    set_state(monkeypatch, **state)
    assert resolve_backend(backend, device) == expected


@pytest.mark.parametrize(
    ("device", "state", "says"),
    [
        (CPU, {}, "set TRITON_INTERPRET=1 before importing esapn_kernels"),
        (CPU, {"interpreted": True, "triton_error": NO_TRITON}, "No module named 'triton'"),
        (CUDA, {"triton_error": NO_TRITON}, "to install: pip install 'triton>=3.6'"),
        (META, {"interpreted": True}, "got tensors on meta"),
    ],
)
def test_triton_where_it_cannot_run_says_what_to_do(monkeypatch, device, state, says):
    set_state(monkeypatch, **state)
    with pytest.raises(RuntimeError) as caught:
        resolve_backend("triton", device)
    message = str(caught.value)
    assert says in message
    assert "\n" not in message


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("backend", ["", "Triton", "cuda"])
def test_unknown_backend_lists_the_names(backend, device):
    with pytest.raises(
        ValueError, match="'auto', 'triton', 'native', 'torch', 'reference'"
    ) as caught:
        resolve_backend(backend, device)
    assert repr(backend) in str(caught.value)


@pytest.mark.parametrize(
    ("backend", "device", "state", "says"),
    [
        ("native", CPU, {"native_error": NO_NATIVE}, f"{NO_NATIVE}; or use backend='torch'"),
        ("native", CUDA, {}, "backend 'native' needs CPU tensors, but got tensors on cuda"),
        ("auto", CPU, {"native_error": NO_NATIVE, "forced": "native"}, f", but {NO_NATIVE}"),
    ],
)
def test_native_where_it_cannot_run_says_what_to_do(monkeypatch, backend, device, state, says):
    set_state(monkeypatch, **state)
    with pytest.raises(RuntimeError) as caught:
        resolve_backend(backend, device)
    message = str(caught.value)
    assert says in message
    assert "\n" not in message


def test_another_word_in_the_environment_names_the_variable(monkeypatch):
    set_state(monkeypatch, forced="nativ")
    with pytest.raises(ValueError, match="^ESAPN_CPU_BACKEND must be native or torch, got 'nativ'"):
        resolve_backend("auto", CPU)
    assert resolve_backend("torch", CPU) == "torch"


def lines_of(code: str, **env: str) -> list[str]:
    """What ``code`` prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("forced", ["native", "torch"])
def test_the_environment_chooses_for_cpus(forced):
    if forced == "native" and backend_module.NATIVE_ERROR is not None:
        pytest.skip(backend_module.NATIVE_ERROR)
    code = (
        "import torch\n"
        "from esapn_kernels.ops.backend import resolve_backend\n"
        "print(resolve_backend('auto', torch.device('cpu')))\n"
    )
    assert lines_of(code, ESAPN_CPU_BACKEND=forced) == [forced]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("ModuleNotFoundError", "the native kernels are not built: "),
        ("ImportError", "the native kernels cannot be loaded (undefined symbol)"),
    ],
)
def test_without_the_module_torch_runs(answer, says):
    code = (
        "import sys, torch\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'esapn_kernels._native':\n"
        f"            raise {answer}('undefined symbol')\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from esapn_kernels import ResizableEmbedding\n"
        "from esapn_kernels.ops import backend\n"
        "print(backend.NATIVE_ERROR)\n"
        "module = ResizableEmbedding(10, sizes=(2, 4))\n"
        "module(torch.tensor([1, 1])).sum().backward()\n"
        "print(int(module.arena.storage.grad.count_nonzero()))\n"
    )
    error, written = lines_of(code, ESAPN_CPU_BACKEND="")
    assert error.startswith(says)
    assert written == "2"
