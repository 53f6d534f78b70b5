"""Which implementation a call runs, and Triton itself where it is installed.

The kernels' files take ``triton`` and ``tl`` from here: where Triton is missing they can still be
imported, and a call with the Triton backend says why it cannot run.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "BACKENDS",
    "INTERPRETED",
    "TRITON_ERROR",
    "host_reads",
    "is_capturing",
    "launch_kernel",
    "own_precision",
    "resolve_backend",
    "tl",
    "triton",
]

triton: Any
tl: Any


class _Absent:
    """Stands for Triton's modules while the kernel sources are read; nothing ever runs it."""

    def __getattr__(self, name: str) -> Any:
        return _Absent()

    def __call__(self, argument: Any = None, *args: Any, **kwargs: Any) -> Any:
        # A decorator with arguments gives a decorator.
        return self if argument is None else argument


INTERPRETED = False
"""Whether ``@triton.jit`` gives interpreted kernels: settled when this package is imported."""

TRITON_ERROR: str | None = None
"""Why Triton cannot be used, ``None`` where it can."""

try:
    import triton as _triton
    import triton.language as _language

    triton, tl = _triton, _language
    INTERPRETED = bool(triton.knobs.runtime.interpret)
except ImportError as error:
    TRITON_ERROR = f"triton cannot be imported ({error})"
except AttributeError:
    TRITON_ERROR = "triton is older than 3.6"
if TRITON_ERROR is not None:
    triton = tl = _Absent()

BACKENDS = ("triton", "torch", "reference")
"""Names that ``backend=`` takes besides ``"auto"``."""


def _on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """The device of ``tensor`` as the current one; nothing where there is nothing to change."""
    if tensor.is_cuda and torch.cuda.current_device() != tensor.get_device():
        return torch.cuda.device(tensor.get_device())
    return contextlib.nullcontext()


def launch_kernel(
    kernel: Any, grid: tuple[int, ...], first: Tensor, /, *args: Any, **known: Any
) -> None:
    """Launch a Triton kernel on the device of its first argument, in that device's stream.

    Triton itself launches on the *current* device, wherever the tensors are: every launch of this
    package goes through here.
    """
    with _on_device(first):
        kernel[grid](first, *args, **known)


def host_reads(tensor: Tensor) -> bool:
    """Whether the host reads a tensor's values without waiting for a device."""
    return tensor.device.type == "cpu"


def is_capturing(tensor: Tensor) -> bool:
    """Whether the current stream of a tensor's device records a CUDA graph rather than runs."""
    if not tensor.is_cuda:
        return False
    with _on_device(tensor):
        return bool(torch.cuda.is_current_stream_capturing())


def own_precision(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """Autocast leaves a lookup alone, as it does ``nn.Embedding``: the rows set the precision."""
    kind = tensor.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


def resolve_backend(backend: str, device: torch.device) -> str:
    """Returns the implementation that a call with tensors on ``device`` runs.

    ``"auto"`` takes ``"triton"`` for CUDA tensors when Triton can be imported and ``"torch"`` for
    everything else. It costs well under a microsecond and never touches a device.

    Args:
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.
        device: The device of the tensors.

    Returns:
        ``"triton"``, ``"torch"`` or ``"reference"``.

    Raises:
        ValueError: ``backend`` is none of these names.
        RuntimeError: ``"triton"`` cannot run on ``device``.

    Example:
        >>> resolve_backend("auto", torch.device("cpu"))
        'torch'
        >>> resolve_backend("reference", torch.device("cuda"))
        'reference'
    """
    kind = device.type
    if backend == "auto":
        return "triton" if kind == "cuda" and TRITON_ERROR is None else "torch"
    if backend == "triton":
        if TRITON_ERROR is None and (kind == "cuda" or (kind == "cpu" and INTERPRETED)):
            return "triton"
        raise RuntimeError(_refusal(kind))
    if backend in ("torch", "reference"):
        return backend
    names = ", ".join(repr(name) for name in ("auto", *BACKENDS))
    raise ValueError(f"unknown backend {backend!r}: expected one of {names}")


def _refusal(kind: str) -> str:
    if TRITON_ERROR is not None:
        return (
            f"backend 'triton' is not available: {TRITON_ERROR}; use backend='torch', or "
            "to install: pip install 'triton>=3.6'"
        )
    if kind == "cpu":
        return (
            "backend 'triton' needs CUDA tensors, but got tensors on cpu; use backend='torch', or "
            "set TRITON_INTERPRET=1 before importing esapn_kernels to run the kernels interpreted"
        )
    return f"backend 'triton' needs CUDA tensors, but got tensors on {kind}; use backend='torch'"
