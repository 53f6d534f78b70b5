"""Ids of a batch grouped by level: a stable counting sort in two launches, wholly on the device.

    level(i) = page_level[row_start[ids[i]] // page],   n for an id that has no row
    order    = positions i in the batch, sorted by (level(i), i)

Large lookups work through one level after another, where every row of a tile has the same size and
the same map. ``n`` keys only, so a counting sort reads the batch twice, against the passes of a
radix sort over full keys. Memory picture, P programs with one stretch of the batch each, L the
power of two above n + 1:

    count   ids -> found [B] (row starts, batch order)      counts [P, L] (ids of every level);
            programs more compose the hops meanwhile, where the caller has not
    place   found, counts -> order [B], start [B], level_begin [n + 2]

Program p puts its ids of level k behind those of lower levels and those of level k in the stretches
before its own, ranked by cumulative sums: no atomics, so the order is the same in every run. Bytes
per id beside the location: 8 (id), 8 (found), 8 (order, start).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.backend import launch_kernel, tl, triton
from ..ops.layout import Layout
from . import launch
from .compose import compose_columns, composition

__all__ = ["Groups", "assertions", "find_rows", "group_by_level", "page_levels"]


@triton.jit
def find_rows(ids_ptr, row_start_ptr, offs_row, n_ids, n_rows, MANY: tl.constexpr):
    """Row starts (int64) of a tile of ids, -1 for ids that have none.

    An id out of range fails a device assertion where the launch says ``debug``; without, it is one
    that has no row. MANY: several ids a thread, whose loads are clamped and not masked: of masks,
    ptxas holds seven, and waits for a load before the next one. There are ids, rows and page levels
    (:func:`page_levels`) to read.
    """
    mask_row = offs_row < n_ids
    if MANY:
        ids = tl.load(ids_ptr + tl.minimum(offs_row, n_ids - 1)).to(tl.int64)
    else:
        ids = tl.load(ids_ptr + offs_row, mask=mask_row, other=-1).to(tl.int64)
    mask_id = (ids >= 0) & (ids < n_rows)
    tl.device_assert(mask_id | ~mask_row, "index out of range in self")
    if MANY:
        start = tl.load(row_start_ptr + tl.maximum(tl.minimum(ids, n_rows - 1), 0)).to(tl.int64)
        return tl.where(mask_id & mask_row, start, -1)
    return tl.load(row_start_ptr + ids, mask=mask_id, other=-1).to(tl.int64)


@triton.jit
def _is_level(page_level_ptr, start, mask_row, page_shift, N: tl.constexpr, L: tl.constexpr):
    """One-hot levels of a tile of row starts, int32 ``[BLOCK_ROWS, L]``; N for no row."""
    level = tl.load(page_level_ptr + (tl.maximum(start, 0) >> page_shift)).to(tl.int32)
    level = tl.where((start < 0) | (level < 0), N, level)
    hit = (level[:, None] == tl.arange(0, L)[None, :]) & mask_row[:, None]
    return hit.to(tl.int32)


@triton.jit(do_not_specialize=["n_ids", "n_rows", "page_shift", "stretch", "n_programs"])
def _group_count_kernel(
    ids_ptr,
    row_start_ptr,
    page_level_ptr,
    found_ptr,
    counts_ptr,
    chain_ptr,
    composed_ptr,
    n_ids,
    n_rows,
    page_shift,
    stretch,
    n_programs,
    N: tl.constexpr,
    L: tl.constexpr,
    HOPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """HOPS: what the programs behind ``n_programs`` compose, see ``compose.composition``."""
    pid = tl.program_id(0)
    if len(HOPS) > 0 and pid >= n_programs:
        compose_columns(chain_ptr, composed_ptr, pid - n_programs, HOPS)
        return
    begin = pid.to(tl.int64) * stretch
    counts = tl.zeros([L], dtype=tl.int32)
    for i in range(0, stretch, BLOCK_ROWS):
        offs_row = begin + i + tl.arange(0, BLOCK_ROWS)
        start = find_rows(ids_ptr, row_start_ptr, offs_row, n_ids, n_rows, True)
        tl.store(found_ptr + offs_row, start.to(found_ptr.dtype.element_ty), mask=offs_row < n_ids)
        counts += tl.sum(
            _is_level(page_level_ptr, start, offs_row < n_ids, page_shift, N, L), axis=0
        )
    tl.store(counts_ptr + pid * L + tl.arange(0, L), counts)


@triton.jit(do_not_specialize=["n_ids", "page_shift", "stretch", "n_programs"])
def _group_place_kernel(
    found_ptr,
    page_level_ptr,
    counts_ptr,
    order_ptr,
    start_ptr,
    level_begin_ptr,
    n_ids,
    page_shift,
    stretch,
    n_programs,
    N: tl.constexpr,
    L: tl.constexpr,
    BLOCK_COUNTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    pid = tl.program_id(0)
    offs_level = tl.arange(0, L)
    before = tl.zeros([L], dtype=tl.int32)
    total = tl.zeros([L], dtype=tl.int32)
    for p in range(0, n_programs, BLOCK_COUNTS):
        offs_program = p + tl.arange(0, BLOCK_COUNTS)
        counts = tl.load(
            counts_ptr + offs_program[:, None] * L + offs_level[None, :],
            mask=offs_program[:, None] < n_programs,
            other=0,
        )  # [BLOCK_COUNTS, L]
        total += tl.sum(counts, axis=0)
        before += tl.sum(tl.where(offs_program[:, None] < pid, counts, 0), axis=0)
    level_begin = tl.cumsum(total, axis=0) - total
    # Levels beyond N count nothing: entry N + 1 is the number of ids. The first program writes.
    n_entries = tl.where(pid == 0, N + 2, 0)
    tl.store(level_begin_ptr + offs_level, level_begin, mask=offs_level < n_entries)

    target = level_begin + before
    begin = pid.to(tl.int64) * stretch
    for i in range(0, stretch, BLOCK_ROWS):
        offs_row = begin + i + tl.arange(0, BLOCK_ROWS)
        mask_row = offs_row < n_ids
        start = tl.load(found_ptr + tl.minimum(offs_row, n_ids - 1)).to(tl.int64)
        hit = _is_level(page_level_ptr, start, mask_row, page_shift, N, L)
        rank = tl.cumsum(hit, axis=0) - 1 + target[None, :]
        slot = tl.sum(tl.where(hit > 0, rank, 0), axis=1)
        tl.store(order_ptr + slot, offs_row.to(tl.int32), mask=mask_row)
        tl.store(start_ptr + slot, start.to(start_ptr.dtype.element_ty), mask=mask_row)
        target += tl.sum(hit, axis=0)


@dataclass(frozen=True)
class Groups:
    """A batch of B ids in the order of their levels.

    ``order``: int32 ``[B]``, ``order[j]`` the position in the batch of the j-th id by (level,
    position). ``start``: ``row_start[ids[order]]``, -1 for an id that has no row. ``level_begin``:
    int32 ``[n + 2]``, ``level_begin[k]`` = number of ids below level k, those that have no row
    being level n; the last entry is B.
    """

    order: Tensor
    start: Tensor
    level_begin: Tensor


def page_levels(layout: Layout) -> Tensor:
    """``layout.page_level``; of a table without pages, a byte that may be read in its place."""
    level = layout.page_level
    return level if level.numel() else level.new_empty(1)


def assertions(ids: Tensor) -> dict[str, Any]:
    """Launch options under which a kernel refuses ids out of range: on a GPU.

    There the host does not read them. Overflow checks, which ``debug`` would bring too, stay off.
    """
    return {"debug": True, "sanitize_overflow": False} if ids.is_cuda else {}


def group_by_level(
    ids: Tensor, layout: Layout, hops: tuple[Tensor, Tensor] | None = None
) -> Groups:
    """Sort a batch by level with Triton; nothing waits for the device.

    Args:
        ids: int32 or int64 ``[B]``, B < 2^31; an id out of range has no row (on a GPU it also
            fails a device assertion).
        layout: where the rows lie.
        hops: the packed chain and ``composed``, which is written by programs of the first launch.

    Returns:
        :class:`Groups`; stable, hence the same in every run.
    """
    n_ids, n_levels = ids.numel(), len(layout.sizes)
    order = torch.empty(n_ids, dtype=torch.int32, device=ids.device)
    start = layout.row_start.new_empty(n_ids)
    if not n_ids:
        level_begin = torch.zeros(n_levels + 2, dtype=torch.int32, device=ids.device)
        return Groups(order, start, level_begin)
    config = launch.choose_group(n_ids, n_levels)
    level_begin = torch.empty(n_levels + 2, dtype=torch.int32, device=ids.device)
    counts = torch.empty(config.programs, config.levels, dtype=torch.int32, device=ids.device)
    found = torch.empty_like(start)
    constants = {"N": n_levels, **config.constants()}
    programs, chain, composed, known = 0, counts, counts, ()
    if hops is not None:
        chain, composed = hops
        programs, known = composition(layout.sizes, chain.dtype)
    launch_kernel(
        _group_count_kernel,
        (config.programs + programs,),
        ids,
        layout.row_start,
        page_levels(layout),
        found,
        counts,
        chain,
        composed,
        n_ids,
        layout.num_rows,
        layout.page_shift,
        config.stretch,
        config.programs,
        HOPS=known,
        maxnreg=168,  # left to itself the assembler spills 8 bytes to save some
        **constants,
        **assertions(ids),
    )
    launch_kernel(
        _group_place_kernel,
        (config.programs,),
        found,
        page_levels(layout),
        counts,
        order,
        start,
        level_begin,
        n_ids,
        layout.page_shift,
        config.stretch,
        config.programs,
        BLOCK_COUNTS=config.block_counts,
        **constants,
    )
    return Groups(order, start, level_begin)
