"""Which implementation a call runs; Triton and the native kernels, where they are installed.

The kernels' files take ``triton``, ``tl`` and ``native`` from here: where one is missing they can
still be imported, and a call with its backend says why it cannot run.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

__all__ = [
    "BACKENDS",
    "INTERPRETED",
    "NATIVE_ERROR",
    "TRITON_ERROR",
    "forget_kernels",
    "host_reads",
    "is_capturing",
    "launch_kernel",
    "manages_memory",
    "native",
    "on_large_pages",
    "own_precision",
    "resolve_backend",
    "runs_native",
    "tl",
    "triton",
    "untouched_zeros",
]

triton: Any
tl: Any
native: Any


class _Absent:
    """Stands for modules that are missing while kernel sources are read; nothing ever runs it."""

    def __getattr__(self, name: str) -> Any:
        return _Absent()

    def __call__(self, argument: Any = None, *args: Any, **kwargs: Any) -> Any:
        # A decorator with arguments gives a decorator.
        return self if argument is None else argument


INTERPRETED = False
"""Whether ``@triton.jit`` gives interpreted kernels: settled when this package is imported."""

TRITON_ERROR: str | None = None
"""Why Triton cannot be used, ``None`` where it can."""

# Classes of what ``@triton.jit`` gives where it does not interpret, and of what Triton makes of it.
_compilable: Any = ()
_compiled: Any = ()

try:
    import triton as _triton
    import triton.language as _language
    from triton.compiler import CompiledKernel

    triton, tl = _triton, _language
    _compilable, _compiled = triton.JITFunction, CompiledKernel
    INTERPRETED = bool(triton.knobs.runtime.interpret)
except ImportError as error:
    TRITON_ERROR = f"triton cannot be imported ({error})"
except AttributeError:
    TRITON_ERROR = "triton is older than 3.6"
if TRITON_ERROR is not None:
    triton = tl = _Absent()

NATIVE_ERROR: str | None = None
"""Why the native kernels cannot be used, ``None`` where they can."""


_INTERFACE = 7  # csrc/binding.cpp has the same
_AGAIN = "make install builds them in a checkout, and pip install wherever g++ or clang is"


def _why_not_built() -> str:
    """What setup.py left of its failure: what is missing, and what to install."""
    try:
        return (Path(__file__).parents[1] / "_native_error.txt").read_text(encoding="utf-8").strip()
    except OSError:
        return _AGAIN


try:
    # By name: to what reads import statements it would be an import of the whole package.
    native = importlib.import_module("esapn_kernels._native")
    if getattr(native, "INTERFACE", None) != _INTERFACE:
        NATIVE_ERROR = f"the native kernels are of another version: {_AGAIN}"
except ModuleNotFoundError:
    NATIVE_ERROR = f"the native kernels are not built: {_why_not_built()}"
except ImportError as error:
    NATIVE_ERROR = f"the native kernels cannot be loaded ({error})"
if NATIVE_ERROR is not None:
    native = _Absent()

_FORCED = os.environ.get("ESAPN_CPU_BACKEND", "")

BACKENDS = ("triton", "native", "torch", "reference")
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
    package goes through here. What Triton compiled is kept, and launched without Triton's own
    search for it, which takes several times as long. (Triton's knobs, ``TRITON_DEBUG`` for one,
    count at a kernel's first launch.)

    Args:
        kernel: what ``@triton.jit`` gave.
        grid: one to three numbers of programs.
        first, args: tensors and integers, the kernel's arguments at run time, in order.
        known: its compile-time arguments and options, hashable.
    """
    device = first.get_device()
    if first.is_cuda and torch.cuda.current_device() != device:
        with torch.cuda.device(device):
            launch_kernel(kernel, grid, first, *args, **known)
        return
    if not isinstance(kernel, _compilable):
        kernel[grid](first, *args, **known)
        return
    # What Triton's own key holds, compared as Triton compares it: of a tensor its dtype and whether
    # it is aligned, of an integer that it does not specialise the width.
    key: list[Any] = [id(kernel), device, first.dtype]
    addresses = first.data_ptr()
    for value in args:
        if type(value) is int:
            key.append(0 if -(1 << 31) <= value < 1 << 31 else 1 if value < 1 << 63 else 2)
        else:
            key.append(value.dtype)
            addresses |= value.data_ptr()
    if addresses & 15:
        key += [type(value) is int or value.data_ptr() % 16 == 0 for value in (first, *args)]
    key += known
    key += known.values()
    found = tuple(key)
    kept = _kept.get(found)
    if kept is None:
        compiled = kernel[grid](first, *args, **known)
        _keep(found, kernel, compiled, (first, *args), known)
    else:
        _, compiled, constants = kept
        compiled[(*grid, 1, 1)[:3]](first, *args, *constants)


# The kernel itself stands in the value: as long as it lives, its id in the key is its own.
_kept: dict[tuple[Any, ...], tuple[Any, Any, tuple[Any, ...]]] = {}


def forget_kernels() -> None:
    """Let Triton find every compiled kernel anew: for tests that change what it would find."""
    _kept.clear()


def _keep(
    key: tuple[Any, ...], kernel: Any, compiled: Any, args: tuple[Any, ...], known: dict[str, Any]
) -> None:
    """Keep what Triton has just launched, where the key holds all that it compiled this for."""
    names = kernel.arg_names[len(args) :]
    # A hook may have kept Triton from compiling; its AMD backend looks at more than alignment.
    if (
        isinstance(compiled, _compiled)
        and compiled.metadata.target.backend == "cuda"
        and all(name in known for name in names)
        and not any(_is_specialized(*pair) for pair in zip(kernel.params, args, strict=False))
    ):
        _kept[key] = kernel, compiled, tuple(known[name] for name in names)


def _is_specialized(parameter: Any, value: Any) -> bool:
    """Whether Triton compiles other code for other numbers."""
    return type(value) is int and not parameter.do_not_specialize


def host_reads(tensor: Tensor) -> bool:
    """Whether the host reads a tensor's values without waiting for a device."""
    return tensor.device.type == "cpu"


def on_large_pages(memory: Tensor) -> Tensor:
    """``memory``, on the system's large pages where it is much and on a CPU.

    Rows are read in any order: on small pages the address of nearly every one has to be looked up.
    """
    if manages_memory() and memory.is_cpu and type(memory) is Tensor:  # fakes have no memory
        native.use_large_pages(memory.data_ptr(), memory.nbytes)
    return memory


def untouched_zeros(like: Tensor, numel: int) -> Tensor:
    """``like.new_zeros(numel)``; a CPU takes memory only for what is written."""
    if not like.is_cpu or type(like) is not Tensor or not numel:
        return like.new_zeros(numel)
    memory = numpy.zeros(numel * like.element_size(), numpy.uint8)
    return torch.from_numpy(memory).view(like.dtype)


def manages_memory() -> bool:
    """Whether native functions tell the system how the memory of CPU tensors is used."""
    return NATIVE_ERROR is None and _FORCED != "torch"


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

    ``"auto"`` takes ``"triton"`` for CUDA tensors when Triton can be imported, ``"native"`` for CPU
    tensors when the native kernels are built, and ``"torch"`` for everything else. The environment
    variable ``ESAPN_CPU_BACKEND``, ``native`` or ``torch``, chooses for CPU tensors; it is read
    when this package is imported. This costs well under a microsecond and touches no device.

    Args:
        backend: ``"auto"``, ``"triton"``, ``"native"``, ``"torch"`` or ``"reference"``.
        device: The device of the tensors.

    Returns:
        ``"triton"``, ``"native"``, ``"torch"`` or ``"reference"``.

    Raises:
        ValueError: ``backend`` is none of these names, or the environment variable neither of its.
        RuntimeError: ``"triton"`` or ``"native"`` cannot run on ``device``.

    Example:
        >>> resolve_backend("torch", torch.device("cpu"))
        'torch'
        >>> resolve_backend("reference", torch.device("cuda"))
        'reference'
    """
    kind = device.type
    if backend == "auto":
        if kind == "cpu":
            return _forced() if _FORCED else "native" if NATIVE_ERROR is None else "torch"
        return "triton" if kind == "cuda" and TRITON_ERROR is None else "torch"
    if backend == "triton":
        if TRITON_ERROR is None and (kind == "cuda" or (kind == "cpu" and INTERPRETED)):
            return "triton"
        raise RuntimeError(_refusal(kind))
    if backend == "native":
        if NATIVE_ERROR is None and kind in ("cpu", "meta"):
            return "native"
        raise RuntimeError(_native_refusal(kind))
    if backend in ("torch", "reference"):
        return backend
    names = ", ".join(repr(name) for name in ("auto", *BACKENDS))
    raise ValueError(f"unknown backend {backend!r}: expected one of {names}")


def runs_native(backend: str) -> bool:
    """Whether ``backend`` is native, and here: a program may be exported where it is not."""
    return backend == "native" and NATIVE_ERROR is None


def _forced() -> str:
    if _FORCED not in ("native", "torch"):
        raise ValueError(f"ESAPN_CPU_BACKEND must be native or torch, got {_FORCED!r}")
    if _FORCED == "native" and NATIVE_ERROR is not None:
        raise RuntimeError(f"ESAPN_CPU_BACKEND is native, but {NATIVE_ERROR}")
    return _FORCED


def _native_refusal(kind: str) -> str:
    if NATIVE_ERROR is not None:
        return f"backend 'native' is not available: {NATIVE_ERROR}; or use backend='torch'"
    return f"backend 'native' needs CPU tensors, but got tensors on {kind}; use backend='torch'"


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
