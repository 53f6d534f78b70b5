"""Rows one behind the other, in any order of their ids: what is written of rows that will be read
where pages lie otherwise, or beside other rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..ops.layout import chunks
from .arena import Arena

__all__ = ["pack", "unpack"]

_ROWS = 1 << 15
"""Rows whose places are found at a time."""


def pack(arena: Arena, tensor: Tensor, ids: Tensor) -> Tensor:
    """On the CPU, the numbers of the rows of ``ids`` in ``tensor``, as long as the storage.

    Example:
        >>> arena = Arena(3, (2, 4), level=torch.tensor([1, 0, 1]))
        >>> numbers = torch.arange(arena.storage.numel())
        >>> first, second = arena.row_start[:2].tolist()
        >>> found = pack(arena, numbers, torch.tensor([1, 0]))
        >>> found.tolist() == [second, second + 1, *range(first, first + 4)]
        True
    """
    numel = sum(int(dims.sum()) for _, dims in _starts(arena, ids))
    packed, first = torch.empty(numel, dtype=tensor.dtype), 0
    for index in _places(arena, ids):
        packed[first : first + len(index)] = tensor[index]
        first += len(index)
    return packed


def unpack(arena: Arena, packed: Tensor, tensor: Tensor, ids: Tensor) -> None:
    """The opposite of :func:`pack`: write ``packed`` to ``tensor``."""
    first = 0
    for index in _places(arena, ids):
        tensor[index] = packed[first : first + len(index)].to(tensor.device, tensor.dtype)
        first += len(index)


def _starts(arena: Arena, ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Where rows begin, and their sizes; some at a time."""
    sizes = torch.tensor([*arena.sizes, 0], device=arena.row_start.device)
    for part in chunks(len(ids), _ROWS):
        start = arena.row_start[ids[part]]
        yield start.long(), sizes[arena.page_level[start // arena.page].long()]


def _places(arena: Arena, ids: Tensor) -> Iterator[Tensor]:
    """Where the numbers of rows are."""
    for start, dims in _starts(arena, ids):
        before = dims.cumsum(0) - dims
        within = torch.arange(int(dims.sum()), device=start.device)
        yield (start - before).repeat_interleave(dims) + within
