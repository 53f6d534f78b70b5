"""Memory that the operators for CPUs use again, and large results on huge pages.

A page fault for every 4 KB of fresh memory costs more than the arithmetic of a lookup.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["TILE", "Scratch", "borrow_scratch", "with_huge_pages"]

TILE = 1 << 22
"""Numbers of output at a time, which bounds the scratch: 16 MB of fp32."""

_SMALL = 1 << 14
"""So few numbers come sooner from the allocator than from scratch."""

_HUGE = 1 << 24
"""Bytes from which a result asks for huge pages; smaller memory is mostly used again."""


class Scratch:
    """Memory that one call after the other uses; never part of a result."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(
        self, name: str, rows: int, dim: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """``[rows, dim]``, not initialised; ``name`` tells apart what is in use together."""
        numel = rows * dim
        if numel <= _SMALL or device.type != "cpu":
            return torch.empty(rows, dim, dtype=dtype, device=device)
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < numel:
            # Memory from inference mode could not be written outside of it.
            with torch.inference_mode(False):
                buffer = torch.empty(max(numel, TILE), dtype=dtype, device=device)
            self._buffers[name, dtype] = buffer
        return buffer[:numel].view(rows, dim)


_idle: list[Scratch] = []
_IDLE = 4


@contextlib.contextmanager
def borrow_scratch() -> Iterator[Scratch]:
    """Scratch that no other thread uses meanwhile, nor another call inside this one."""
    try:
        scratch = _idle.pop()
    except IndexError:
        scratch = Scratch()
    yield scratch
    if len(_idle) < _IDLE:
        _idle.append(scratch)


def with_huge_pages(fresh: Tensor) -> Tensor:
    """``fresh``, after asking for huge pages if it is large: 37 MB of zeros in 3 ms, not in 9."""
    if fresh.device.type == "cpu" and fresh.nbytes >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        first = -(-fresh.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = ctypes.c_size_t(fresh.data_ptr() + fresh.nbytes - first)
        # Advice only: where it is not taken, nothing changes.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), length, mmap.MADV_HUGEPAGE)
    return fresh
