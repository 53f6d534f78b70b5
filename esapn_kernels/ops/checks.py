"""Checks of arguments, and of how a call is made; the modules check ids once, at their door."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["check_ids", "check_out", "is_eager", "is_opaque"]


def is_eager() -> bool:
    """Whether plain eager code runs: neither compiled, nor traced, nor transformed."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
    )


def is_opaque(tensor: Tensor) -> bool:
    """Whether no kernel can read a tensor's numbers, and the operators' fakes stand in."""
    traced = torch.compiler.is_compiling() or tensor.is_meta
    return traced or torch._C._len_torch_dispatch_stack() > 0


def check_ids(ids: Tensor, num_rows: int, *, read: bool = True) -> None:
    """Refuse ids that are not int32 / int64 or, where the host reads them freely, out of range.

    Args:
        read: on a CPU, read the numbers too.

    Raises:
        TypeError: no tensor at all.
        RuntimeError: other dtypes, in torch's own words.
        IndexError: an id outside ``[0, num_rows)``, on a CPU. On a GPU the lookup's kernels fail
            an assertion of their own and those that move rows pass over the id; neither reads or
            writes outside.
    """
    if not isinstance(ids, Tensor):
        raise TypeError(
            f"embedding(): argument 'indices' (position 2) must be Tensor, not {type(ids).__name__}"
        )
    if ids.dtype not in (torch.int64, torch.int32):
        raise RuntimeError(
            "Expected tensor for argument #1 'indices' to have one of the following scalar types: "
            f"Long, Int; but got {ids.type()} instead (while checking arguments for embedding)"
        )
    if read and ids.device.type == "cpu" and ids.numel() and is_eager():
        low, high = torch.aminmax(ids)
        if low.item() < 0 or high.item() >= num_rows:
            raise IndexError("index out of range in self")


def check_out(out: Tensor, shape: tuple[int, ...], dtype: torch.dtype, storage: Tensor) -> None:
    """Refuse memory that cannot take the output of a lookup.

    Raises:
        RuntimeError: a gradient would be recorded.
        ValueError: another shape, dtype or device, or memory that is not contiguous.
    """
    if out.requires_grad or (torch.is_grad_enabled() and storage.requires_grad):
        raise RuntimeError(
            "lookup(): functions with out=... arguments don't support automatic differentiation, "
            "but one of the arguments requires grad."
        )
    if out.shape != shape or out.dtype != dtype or out.device != storage.device:
        raise ValueError(
            f"out must be {list(shape)}, {dtype}, on {storage.device}; "
            f"got {list(out.shape)}, {out.dtype}, on {out.device}"
        )
    if not out.is_contiguous():
        raise ValueError("out must be contiguous")
