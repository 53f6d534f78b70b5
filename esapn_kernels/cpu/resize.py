"""Rows that move, for CPUs: torch calls that rank the rows and take and give their places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.chain import compute_dtype, hop_blocks
from ..ops.layout import Filled, Layout, Places, gather_rows, row_table
from .lookup import group_levels, spans

__all__ = ["Movers", "fill_rows", "find_movers", "free", "insert", "promote", "promote_rows"]


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
        moved = (level >= 0) & (level < len(layout.sizes) - (call == "promote"))
    if mask is not None:
        moved &= mask
    # One decision per id, and an order that does not depend on that of ids.
    key, order = ids[moved].long().sort()
    first = torch.ones_like(key, dtype=torch.bool)
    first[1:] = key[1:] != key[:-1]
    distinct, source = key[first], level[moved][order[first]]
    per_level = torch.bincount(source.clamp(min=0), minlength=len(layout.sizes)).tolist()
    return Movers(moved, per_level, "torch", (distinct, source))


def promote(
    movers: Movers,
    storage: Tensor,
    chain: Tensor,
    places: Places,
    states: Filled,
    per_id: Filled,
) -> None:
    """See :func:`esapn_kernels.ops.resize.promote`; there is room for all of them."""
    layout, (ids, source) = places.layout, movers.found
    old_start = layout.row_start[ids].long()
    new_start = _take(places, source + 1)
    promote_rows(storage, chain, old_start, new_start, source, layout.sizes)
    fill_rows(states, new_start, source + 1, layout.sizes)
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


def _rank(level: Tensor, n_levels: int) -> tuple[Tensor, Tensor]:
    """Position of every entry among those of its level, and their number per level."""
    levels = torch.arange(n_levels, device=level.device)
    chosen = (level[:, None] == levels).long()
    rank = (chosen.cumsum(0) - 1).gather(1, level[:, None])[:, 0]
    return rank, chosen.sum(0)


def _take(places: Places, level: Tensor) -> Tensor:
    """Take one free row of every level; returns their starts, int64.

    Rows on the level's stack first, then rows of fresh pages, whose rest goes on the stack.
    """
    layout = places.layout
    n, device, page_elements = len(layout.sizes), level.device, layout.page
    free_rows, free_pages, free_base = places.free_rows, places.free_pages, places.free_base
    rank, need = _rank(level, n)
    sizes, per = places.row_size, places.rows_per_page
    free, n_pages = places.free_count[:n], places.free_count[n]
    short = (need - free).clamp(min=0)
    pages = (short + per - 1) // per
    first = pages.cumsum(0) - pages

    on_stack = rank < free[level]
    sink = free_rows.numel() - 1
    stacked = free_rows[
        torch.where(on_stack, free_base[level] + free[level] - 1 - rank, sink)
    ].long()
    beyond = rank - free[level]
    entry = n_pages - 1 - first[level] - beyond.div(per[level], rounding_mode="floor")
    page = free_pages[torch.where(on_stack, free_pages.numel() - 1, entry)].long()
    fresh = page * page_elements + beyond.remainder(per[level]) * sizes[level]
    start = torch.where(on_stack, stacked, fresh)
    layout.page_level[start.div(page_elements, rounding_mode="floor")] = level.to(torch.int8)

    if bool(pages.any()):
        leftover = pages * per - short
        last = free_pages[
            torch.where(pages > 0, n_pages - first - pages, free_pages.numel() - 1)
        ].long()
        slot = torch.arange(page_elements // layout.sizes[0], device=device)
        valid = slot < leftover[:, None]
        value = (last * page_elements)[:, None] + (per[:, None] - 1 - slot) * sizes[:, None]
        place = torch.where(valid, free_base[:n, None] + slot, sink)
        free_rows[place] = value.to(free_rows.dtype)
        places.free_count[:n] = torch.where(pages > 0, leftover, free - need)
        places.free_count[n] -= pages.sum()
    else:
        places.free_count[:n] -= need
    return start


def _give(places: Places, start: Tensor, level: Tensor) -> None:
    """Put the rows ``(start, level)`` back on their level's stack."""
    n = len(places.layout.sizes)
    rank, count = _rank(level, n)
    place = places.free_base[level] + places.free_count[level] + rank
    places.free_rows[place] = start.to(places.free_rows.dtype)
    places.free_count[:n] += count


def promote_rows(
    storage: Tensor,
    chain: Tensor,
    old_start: Tensor,
    new_start: Tensor,
    level: Tensor,
    sizes: Sequence[int],
) -> None:
    """``storage[new] = W_k storage[old] + b_k`` for every entry with ``new_start >= 0``."""
    # Entries that stay count as rows of the last level, which no row leaves.
    level = torch.where(new_start >= 0, level, len(sizes) - 1).to(torch.int8)
    dtype = compute_dtype(storage.dtype)
    hops = hop_blocks(chain, sizes)
    order, counts = group_levels(level, len(sizes))
    if order is not None:
        old_start, new_start = old_start.index_select(0, order), new_start.index_select(0, order)
    for k, span in spans(counts[:-1], len(level)):
        hop = hops[k].to(dtype)
        rows = gather_rows(storage, old_start[span], sizes[k]).to(dtype)
        rows = torch.addmm(hop[-1], rows, hop[:-1]).to(storage.dtype)
        row_table(storage, sizes[k + 1]).index_copy_(0, new_start[span].long(), rows)


def fill_rows(targets: Filled, start: Tensor, level: Tensor, sizes: Sequence[int]) -> None:
    """Set the rows ``(start, level)`` with ``start >= 0`` of every tensor to its value."""
    if not targets:
        return
    dim = torch.tensor([*sizes, 0], device=start.device)[torch.where(start >= 0, level, -1)]
    before = dim.cumsum(0) - dim
    elements = torch.repeat_interleave(start - before, dim)
    elements += torch.arange(elements.numel(), device=start.device)
    for tensor, value in targets:
        tensor[elements] = value
