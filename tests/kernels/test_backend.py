"""backend.py: which implementation a call takes, and what it says where it cannot run."""

import pytest
import torch

from esapn_kernels.ops import backend as backend_module
from esapn_kernels.ops.backend import resolve_backend

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
NO_TRITON = "triton cannot be imported (No module named 'triton')"


def set_state(monkeypatch, *, triton_error=None, interpreted=False):
    monkeypatch.setattr(backend_module, "TRITON_ERROR", triton_error)
    monkeypatch.setattr(backend_module, "INTERPRETED", interpreted)


@pytest.mark.parametrize(
    ("backend", "device", "state", "expected"),
    [
        ("auto", CPU, {}, "torch"),
        ("auto", CPU, {"interpreted": True}, "torch"),
        ("auto", CPU, {"triton_error": NO_TRITON}, "torch"),
        ("auto", CUDA, {}, "triton"),
        ("auto", torch.device("cuda:1"), {}, "triton"),
        ("auto", CUDA, {"triton_error": NO_TRITON}, "torch"),
        ("auto", torch.device("meta"), {}, "torch"),
        ("triton", CUDA, {}, "triton"),
        ("triton", CPU, {"interpreted": True}, "triton"),
        ("torch", CPU, {}, "torch"),
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
        (torch.device("meta"), {"interpreted": True}, "got tensors on meta"),
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
    with pytest.raises(ValueError, match="'auto', 'triton', 'torch', 'reference'") as caught:
        resolve_backend(backend, device)
    assert repr(backend) in str(caught.value)
