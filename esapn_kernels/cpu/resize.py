"""Rows that move, in torch calls: the rows of one level after the other, in the order of their ids.

Where rows go follows from the order in which they are given, as in ``gpu/resize``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.backend import own_precision
from ..ops.chain import compute_dtype, hop_blocks
from ..ops.layout import Filled, Layout, Places, gather_rows, row_table
from .lookup import by_level

__all__ = [
    "Movers",
    "carry_rows",
    "fill_rows",
    "find_movers",
    "free",
    "hop",
    "insert",
    "shift_rows",
]


class Movers(NamedTuple):
    """Distinct rows that a call moves, found before room is made for them.

    Attributes:
        moved: bool ``[R]``: True where the position names one of them.
        per_level: their number by the level that they leave; inserted rows count as of level 0.
        backend: ``native`` or ``torch``: which one found them.
        found: what it notes of them.
    """

    moved: Tensor
    per_level: list[int]
    backend: str
    found: tuple[Tensor, ...]


def find_movers(ids: Tensor, mask: Tensor | None, layout: Layout, call: str) -> Movers:
    """See :func:`esapn_kernels.ops.resize.find_movers`; found are ids, ascending, and levels."""
    level = _level(ids, layout)
    if call == "insert":
        moved = level < 0
    else:
        moved = (level >= (call == "demote")) & (level < len(layout.sizes) - (call == "promote"))
    if mask is not None:
        moved &= mask
    # One decision per id, and an order that does not depend on that of ids.
    key, order = ids[moved].long().sort()
    first = torch.ones_like(key, dtype=torch.bool)
    first[1:] = key[1:] != key[:-1]
    distinct, source = key[first], level[moved][order[first]]
    per_level = torch.bincount(source.clamp(min=0), minlength=len(layout.sizes)).tolist()
    return Movers(moved, per_level, "torch", (distinct, source))


def hop(
    call: str,
    movers: Movers,
    storage: Tensor,
    chain: Tensor,
    places: Places,
    states: Filled,
    per_id: Filled,
) -> None:
    """``promote`` or ``demote``, see :mod:`esapn_kernels.ops.resize`; there is room for all."""
    layout, (ids, source) = places.layout, movers.found
    step = 1 if call == "promote" else -1
    old_start = layout.row_start[ids].long()
    new_start = _take(places, source + step)
    carry_rows(storage, chain, old_start, new_start, source, layout.sizes, step)
    fill_rows(states, new_start, source + step, layout.sizes)
    _place(ids, new_start, layout, per_id)
    _give(places, old_start, source)
    places.moves.add_(1)


def insert(
    movers: Movers, level: int, storage: Tensor, places: Places, states: Filled, per_id: Filled
) -> None:
    """See :func:`esapn_kernels.ops.resize.insert`; there is room for all of them."""
    ids = movers.found[0]
    target = torch.full_like(ids, level)
    start = _take(places, target)
    _place(ids, start, places.layout, per_id)
    fill_rows([(storage, 0.0), *states], start, target, places.layout.sizes)
    places.moves.add_(1)


def free(movers: Movers, storage: Tensor, places: Places) -> None:
    """See :func:`esapn_kernels.ops.resize.free`."""
    layout, (ids, source) = places.layout, movers.found
    _give(places, layout.row_start[ids].long(), source)
    layout.row_start[ids] = -1
    places.moves.add_(1)


def _level(ids: Tensor, layout: Layout) -> Tensor:
    """Levels, int64; of an id without a row that of the sink, -1."""
    return layout.page_level[layout.row_start[ids] // layout.page].long()


def _place(ids: Tensor, start: Tensor, layout: Layout, per_id: Filled) -> None:
    """The rows of ``ids`` begin at ``start``; state per id starts afresh."""
    layout.row_start[ids] = start.to(layout.row_start.dtype)
    for tensor, fresh in per_id:
        tensor.index_fill_(0, ids, fresh)


def _take(places: Places, level: Tensor) -> Tensor:
    """Take one free row of every level; returns their starts, int64.

    Rows on the level's stack first, from its top, then rows of fresh pages.
    """
    layout, start = places.layout, torch.empty_like(level)
    bases, [*heights, n_pages] = places.free_base.tolist(), places.free_count.tolist()
    for k, at in by_level(level, len(heights)):
        stack, dim, need = places.free_rows[bases[k] :], layout.sizes[k], at.numel()
        per = layout.page // dim
        popped = min(need, heights[k])
        opened = -(-(need - popped) // per)
        heights[k] -= popped
        n_pages -= opened
        pages = places.free_pages[n_pages : n_pages + opened].flip(0).long()
        layout.page_level[pages] = k
        fresh = pages[:, None] * layout.page + dim * torch.arange(per, device=level.device)
        # In the order in which they are taken; what is left goes on the stack, the next on top.
        rows = torch.cat([stack[heights[k] :][:popped].flip(0), fresh.reshape(-1)])
        start[at], rest = rows[:need], rows[need:].flip(0)
        stack[heights[k] :][: rest.numel()] = rest
        heights[k] += rest.numel()
    places.free_count.copy_(torch.tensor([*heights, n_pages], device=level.device))
    return start


def _give(places: Places, start: Tensor, level: Tensor) -> None:
    """Put the rows ``(start, level)`` back on their level's stack."""
    tops = (places.free_base + places.free_count).tolist()
    for k, at in by_level(level, len(places.layout.sizes)):
        places.free_rows[tops[k] :][: at.numel()] = start[at].to(places.free_rows.dtype)
        places.free_count[k] += at.numel()


def carry_rows(
    storage: Tensor,
    chain: Tensor,
    old_start: Tensor,
    new_start: Tensor,
    level: Tensor,
    sizes: Sequence[int],
    step: int = 1,
) -> None:
    """``storage[new] = W_k storage[old] + b_k`` for every entry with ``new_start >= 0``.

    ``step`` -1: one level down, and ``chain`` holds down hops.
    """
    dtype = compute_dtype(storage.dtype)
    hops = hop_blocks(chain, sizes[::step])
    with own_precision(storage):
        for k, at in by_level(level.where(new_start >= 0, -1), len(sizes)):
            hop = hops[k if step > 0 else -k].to(dtype)
            rows = gather_rows(storage, old_start[at], sizes[k]).to(dtype)
            rows = torch.addmm(hop[-1], rows, hop[:-1]).to(storage.dtype)
            row_table(storage, sizes[k + step]).index_copy_(0, new_start[at].long(), rows)


def fill_rows(targets: Filled, start: Tensor, level: Tensor, sizes: Sequence[int]) -> None:
    """Set the rows ``(start, level)`` with ``start >= 0`` of every tensor to its value."""
    for k, at in by_level(level.where(start >= 0, -1), len(sizes)):
        elements = start[at].long()[:, None] + torch.arange(sizes[k], device=start.device)
        for tensor, value in targets:
            tensor[elements] = value


def shift_rows(
    tensors: Sequence[Tensor], old: Tensor, new: Tensor, level: Tensor, sizes: Sequence[int]
) -> None:
    """Copy the rows ``(old, level)`` of every tensor to ``new``: read all, then write them."""
    groups = list(by_level(level, len(sizes)))
    if not groups:
        return
    column = torch.arange(sizes[-1], device=old.device)
    read, written = (
        torch.cat([(start[at].long()[:, None] + column[: sizes[k]]).view(-1) for k, at in groups])
        for start in (old, new)
    )
    for tensor in tensors:
        tensor[written] = tensor[read]
