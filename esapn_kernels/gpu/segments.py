"""Distinct rows of a batch: a sort, the runs of equal rows, and the sums over every run.

Memory picture, B occurrences of U distinct rows at n levels:

    key          [B]      ``level << bits | row start // unit``, sorted; no row: level n
    order        [B]      where each stood in the batch
    run_begin    [U + 1]  first position of every run, then that behind the last
    run_start    [U]      where its row starts in the storage
    run_first    [U]      ``order`` at its first position; ``-1 -`` that if it is longer than one
    level_begin  [n + 1]  first run of every level, then U
    hot          [B // HOT, d]  sums of the stretches of HOT positions that lie inside one run

The sort is stable and every sum has a fixed order, so equal inputs give equal bits; and no row is
too hot, because all programs add up the occurrences of one (``hot``) and its own program only what
is left. Nothing is read by the host: U stays on the device, grids are bounded by B.

Source of sorting first: the embedding gradients of torch and FBGEMM.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..ops.backend import launch_kernel, tl, triton
from ..ops.layout import Layout
from . import launch
from .group import find_rows, page_levels

__all__ = [
    "Runs",
    "Tick",
    "find_runs",
    "pack_keys",
    "rows_of_runs",
    "run_sums",
    "share",
    "sources",
    "sum_hot",
    "summed_grads",
]

_INT32, _INT64 = 32, 64

Tick = tuple[Tensor, Tensor]
"""Adam's clock, and the numbers that a step multiplies it by."""


@triton.jit
def _pack(start, page_level_ptr, page_shift, N_LEVELS: tl.constexpr, KEY: tl.constexpr):
    """Keys (int64, without the bias) of row starts."""
    level = tl.load(page_level_ptr + (tl.maximum(start, 0) >> page_shift)).to(tl.int64)
    level = tl.where(start >= 0, level, N_LEVELS)
    return (level << KEY[1]) | tl.where(start >= 0, start // KEY[0], 0)


@triton.jit
def _tick(clock_ptr, numbers_ptr):
    """Adam's clock moves on: ``t + 1, beta1^t beta1, beta2^t beta2``."""
    lane = tl.arange(0, 4)
    clock = tl.load(clock_ptr + lane, mask=lane < 3, other=0.0)
    clock *= tl.load(numbers_ptr + lane, mask=lane < 3, other=0.0)
    # Every warp reads, one writes.
    tl.debug_barrier()
    tl.store(clock_ptr + lane, clock + tl.where(lane == 0, 1.0, 0.0), mask=lane < 3)


@triton.jit(do_not_specialize=["n_ids", "n_rows", "page_shift"])
def _key_kernel(
    ids_ptr,
    row_start_ptr,
    page_level_ptr,
    key_ptr,
    clock_ptr,
    numbers_ptr,
    n_ids,
    n_rows,
    page_shift,
    N_LEVELS: tl.constexpr,
    KEY: tl.constexpr,
    TICK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    start = find_rows(ids_ptr, row_start_ptr, offs, n_ids, n_rows, True)
    key = _pack(start, page_level_ptr, page_shift, N_LEVELS, KEY)
    tl.store(key_ptr + offs, (key - KEY[2]).to(key_ptr.dtype.element_ty), mask=offs < n_ids)
    if TICK and tl.program_id(0) == 0:
        _tick(clock_ptr, numbers_ptr)


@triton.jit
def _keys_at(key_ptr, pos, n_ids, N_LEVELS: tl.constexpr, KEY: tl.constexpr):
    """Keys at sorted positions: -1 before the first, that of no row behind the last."""
    inside = (pos >= 0) & (pos < n_ids)
    # Clamped and not masked, see :func:`run_sums`.
    key = tl.load(key_ptr + tl.maximum(tl.minimum(pos, n_ids - 1), 0)).to(tl.int64) + KEY[2]
    # Shifted as int64: a constant of more than 31 bits would be taken as unsigned.
    no_row = (tl.zeros_like(key) + N_LEVELS) << KEY[1]
    return tl.where(inside, key, tl.where(pos < 0, tl.zeros_like(key) - 1, no_row))


@triton.jit(do_not_specialize=["n_ids"])
def _run_count_kernel(
    key_ptr,
    count_ptr,
    n_ids,
    N_LEVELS: tl.constexpr,
    KEY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    pos = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = _keys_at(key_ptr, pos, n_ids, N_LEVELS, KEY)
    first = (key != _keys_at(key_ptr, pos - 1, n_ids, N_LEVELS, KEY)) & (pos <= n_ids)
    tl.store(count_ptr + pid, tl.sum(first.to(tl.int32), axis=0))


@triton.jit
def _store_runs(
    key_ptr,
    order_ptr,
    found,
    pos,
    before,
    n_ids,
    N_LEVELS: tl.constexpr,
    KEY: tl.constexpr,
):
    """The runs that begin at ``pos``, sorted positions that follow one another; ``before``: how
    many begin before them. ``found``: pointers ``(run_begin, run_start, run_first, level_begin)``.
    """
    run_begin_ptr, run_start_ptr, run_first_ptr, level_begin_ptr = found
    key = _keys_at(key_ptr, pos, n_ids, N_LEVELS, KEY)
    previous = _keys_at(key_ptr, pos - 1, n_ids, N_LEVELS, KEY)
    # The first position without a row begins one run more: the end of the last one.
    first = (key != previous) & (pos <= n_ids)
    run = before + tl.cumsum(first.to(tl.int32), axis=0) - 1
    tl.store(run_begin_ptr + run, pos.to(tl.int32), mask=first)
    mask = first & (pos < n_ids)
    start = (key & ((1 << KEY[1]) - 1)) * KEY[0]
    tl.store(run_start_ptr + run, start.to(run_start_ptr.dtype.element_ty), mask=mask)
    occurrence = tl.load(order_ptr + tl.minimum(pos, n_ids - 1)).to(tl.int32)
    alone = key != _keys_at(key_ptr, pos + 1, n_ids, N_LEVELS, KEY)
    tl.store(run_first_ptr + run, tl.where(alone, occurrence, -1 - occurrence), mask=mask)
    level, level_before = key >> KEY[1], previous >> KEY[1]
    for k in tl.static_range(N_LEVELS + 1):
        into_ptr = level_begin_ptr + k + tl.zeros_like(run)
        tl.store(into_ptr, run, mask=first & (level_before < k) & (k <= level))


@triton.jit(do_not_specialize=["n_ids"])
def _run_begin_kernel(
    key_ptr,
    order_ptr,
    count_ptr,
    run_begin_ptr,
    run_start_ptr,
    run_first_ptr,
    level_begin_ptr,
    n_ids,
    N_LEVELS: tl.constexpr,
    KEY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    counts = tl.zeros([BLOCK], dtype=tl.int32)
    for block in range(0, pid, BLOCK):
        counts += tl.load(count_ptr + block + offs, mask=block + offs < pid, other=0)
    pos = pid.to(tl.int64) * BLOCK + offs
    found = (run_begin_ptr, run_start_ptr, run_first_ptr, level_begin_ptr)
    before = tl.sum(counts, axis=0)
    _store_runs(key_ptr, order_ptr, found, pos, before, n_ids, N_LEVELS, KEY)


@triton.jit(do_not_specialize=["n_ids", "n_rows", "page_shift"])
def _few_runs_kernel(
    ids_ptr,
    row_start_ptr,
    page_level_ptr,
    key_ptr,
    order_ptr,
    run_begin_ptr,
    run_start_ptr,
    run_first_ptr,
    level_begin_ptr,
    clock_ptr,
    numbers_ptr,
    n_ids,
    n_rows,
    page_shift,
    N_LEVELS: tl.constexpr,
    KEY: tl.constexpr,
    TICK: tl.constexpr,
    LOG_BLOCK: tl.constexpr,
):
    """All of it in one program, for fewer than BLOCK ids."""
    BLOCK: tl.constexpr = 1 << LOG_BLOCK
    pos = tl.arange(0, BLOCK).to(tl.int64)
    start = find_rows(ids_ptr, row_start_ptr, pos, n_ids, n_rows, True)
    key = _pack(start, page_level_ptr, page_shift, N_LEVELS, KEY)
    # The position is the last part of what is sorted: stable. What is no id comes last.
    key = tl.sort((key << LOG_BLOCK) | pos)
    tl.store(order_ptr + pos, key & (BLOCK - 1), mask=pos < n_ids)
    tl.store(key_ptr + pos, key >> LOG_BLOCK, mask=pos < n_ids)
    # Other threads read the keys beside theirs.
    tl.debug_barrier()
    found = (run_begin_ptr, run_start_ptr, run_first_ptr, level_begin_ptr)
    _store_runs(key_ptr, order_ptr, found, pos, 0, n_ids, N_LEVELS, KEY)
    if TICK:
        _tick(clock_ptr, numbers_ptr)


@triton.jit
def _sum_rows(
    order_ptr,
    rows_ptr,
    begin,
    end,
    offs_dim,
    INDIRECT: tl.constexpr,
    DIM: tl.constexpr,
    ACC: tl.constexpr,
    STRETCH: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Sum of the rows ``begin .. end - 1``, in order; behind ``order`` where INDIRECT."""
    total = tl.zeros([BLOCK_DIM], dtype=ACC)
    for at in range(begin, end, STRETCH):
        row = at + tl.arange(0, STRETCH)
        mask = row < end
        if INDIRECT:
            row = tl.load(order_ptr + row, mask=mask, other=0)
        values = tl.load(
            rows_ptr + row.to(tl.int64)[:, None] * DIM + offs_dim[None, :],
            mask=mask[:, None] & (offs_dim < DIM)[None, :],
            other=0.0,
        )  # [STRETCH, BLOCK_DIM]
        total += tl.sum(values.to(ACC), axis=0)
    return total


@triton.jit(do_not_specialize=["n_ids"])
def _hot_kernel(
    key_ptr,
    order_ptr,
    grad_out_ptr,
    hot_ptr,
    n_ids,
    N_LEVELS: tl.constexpr,
    KEY: tl.constexpr,
    DIM: tl.constexpr,
    ACC: tl.constexpr,
    HOT: tl.constexpr,
    STRETCH: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    for chunk in range(tl.program_id(0), n_ids // HOT, tl.num_programs(0)):
        begin = chunk * HOT
        key = _keys_at(key_ptr, begin, n_ids, N_LEVELS, KEY)
        last = _keys_at(key_ptr, begin + HOT - 1, n_ids, N_LEVELS, KEY)
        if (key == last) & ((key >> KEY[1]) < N_LEVELS):
            for n in range(0, DIM, BLOCK_DIM):
                offs_dim = n + tl.arange(0, BLOCK_DIM)
                total = _sum_rows(
                    order_ptr,
                    grad_out_ptr,
                    begin,
                    begin + HOT,
                    offs_dim,
                    True,
                    DIM,
                    ACC,
                    STRETCH,
                    BLOCK_DIM,
                )
                place = (tl.zeros_like(offs_dim).to(tl.int64) + chunk) * DIM + offs_dim
                tl.store(hot_ptr + place, total, mask=offs_dim < DIM)


@triton.jit
def run_sums(
    batch,
    tile,
    offs_dim,
    DIM: tl.constexpr,
    ACC: tl.constexpr,
    WALKS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Sum of every run's gradients ``[BLOCK_ROWS, BLOCK_DIM]``, their columns ``offs_dim``.

    ``batch``: pointers ``(run_begin, order, grad_out, hot)`` and how many stretches ``hot`` has, of
    which 0 are none. ``tile``: ``(first_run, n_runs,
    first, begin, end)``, of the runs ``first_run + lane``: where the first occurrence stood in the
    batch, -1 for a lane without a run, and the positions.
    """
    run_begin_ptr, order_ptr, grad_out_ptr, hot_ptr, n_hot = batch
    first_run, n_runs, first, begin, end = tile
    WALK: tl.constexpr = WALKS[0]
    UNROLL: tl.constexpr = WALKS[1]
    HOT: tl.constexpr = WALKS[2]
    STRETCH: tl.constexpr = WALKS[3]
    mask_dim = offs_dim < DIM
    # Lanes without an occurrence read one that is there, and drop it: of masks, ptxas holds seven,
    # and waits for a load before the next one.
    mask = mask_dim[None, :]
    total = tl.load(
        grad_out_ptr + tl.maximum(first, 0).to(tl.int64)[:, None] * DIM + offs_dim[None, :],
        mask=mask,
        other=0.0,
    ).to(ACC)  # [BLOCK_ROWS, BLOCK_DIM]
    total = tl.where((first >= 0)[:, None], total, 0.0)
    longest = tl.max(end - begin, axis=0)
    # The next WALK occurrences of all runs side by side, UNROLL rows of each in flight.
    for step in range(1, tl.minimum(longest, WALK + 1), UNROLL):
        for i in tl.static_range(UNROLL):
            pos = begin + step + i
            row = tl.load(order_ptr + tl.maximum(tl.minimum(pos, end - 1), 0)).to(tl.int64)
            values = tl.load(
                grad_out_ptr + row[:, None] * DIM + offs_dim[None, :], mask=mask, other=0.0
            ).to(ACC)  # [BLOCK_ROWS, BLOCK_DIM]
            total += tl.where((pos < end)[:, None], values, 0.0)
    if longest > WALK + 1:
        # What is left of the long ones, one after the other: singles up to the first stretch of
        # HOT positions, the sums of whole stretches, singles again.
        lane = tl.arange(0, BLOCK_ROWS)
        for r in range(0, tl.minimum(BLOCK_ROWS, n_runs)):
            at = tl.load(run_begin_ptr + first_run + r) + WALK + 1
            stop = tl.load(run_begin_ptr + first_run + r + 1)
            if at < stop:
                chunk = tl.cdiv(at, HOT)
                chunk_end = tl.maximum(tl.minimum(stop // HOT, n_hot), chunk)
                head = tl.where(n_hot > 0, tl.minimum(chunk * HOT, stop), stop)
                tail = tl.maximum(chunk_end * HOT, head)
                rest = _sum_rows(
                    order_ptr, grad_out_ptr, at, head, offs_dim, True, DIM, ACC, STRETCH, BLOCK_DIM
                )
                rest += _sum_rows(
                    order_ptr,
                    hot_ptr,
                    chunk,
                    chunk_end,
                    offs_dim,
                    False,
                    DIM,
                    ACC,
                    STRETCH,
                    BLOCK_DIM,
                )
                rest += _sum_rows(
                    order_ptr,
                    grad_out_ptr,
                    tail,
                    stop,
                    offs_dim,
                    True,
                    DIM,
                    ACC,
                    STRETCH,
                    BLOCK_DIM,
                )
                total += tl.where(lane[:, None] == r, rest[None, :], 0.0)
    return total


@triton.jit
def rows_of_runs(
    run_start_ptr,
    first_run,
    mask_run,
    ALIGN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Where the rows of a tile's runs start, all at multiples of ALIGN."""
    lane = tl.arange(0, BLOCK_ROWS)
    start = tl.load(run_start_ptr + first_run + lane, mask=mask_run, other=0).to(tl.int64)
    # The compiler learns how rows are aligned and moves them in words of up to 16 bytes.
    return start // ALIGN * ALIGN


@triton.jit
def share(level_begin_ptr, program, n_programs, N_LEVELS: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Tiles ``[lo, hi)`` of a program: tiles are numbered through the levels, shares are equal."""
    tiles = tl.zeros_like(program).to(tl.int64)
    for k in tl.static_range(N_LEVELS):
        n_runs = tl.load(level_begin_ptr + k + 1) - tl.load(level_begin_ptr + k)
        tiles += tl.cdiv(n_runs, BLOCK_ROWS)
    return tiles * program // n_programs, tiles * (program + 1) // n_programs


@triton.jit
def sources(run_first_ptr, first_run, mask_run, BLOCK_ROWS: tl.constexpr):
    """Where a tile's summed gradients are: rows of the output's gradient and of ``sums``, or -1."""
    lane = tl.arange(0, BLOCK_ROWS)
    first = tl.load(run_first_ptr + first_run + lane, mask=mask_run, other=0)
    alone = tl.where(mask_run & (first >= 0), first, -1).to(tl.int64)
    return alone, tl.where(mask_run & (first < 0), first_run + lane, -1).to(tl.int64)


@triton.jit
def summed_grads(
    grad_out_ptr, sums_ptr, alone, summed, offs_dim, DIM: tl.constexpr, ACC: tl.constexpr
):
    """Their columns ``offs_dim``: in either place, zero in the other."""
    mask_dim = (offs_dim < DIM)[None, :]
    if grad_out_ptr.dtype.element_ty == tl.float32 and tl.float32 == ACC:
        # One load where both hold fp32: half the copies. (In fp64 the rows' pass would spill.)
        place = tl.where(
            alone >= 0, grad_out_ptr + tl.maximum(alone, 0) * DIM, sums_ptr + summed * DIM
        )
        mask = ((alone >= 0) | (summed >= 0))[:, None] & mask_dim
        return tl.load(place[:, None] + offs_dim[None, :], mask=mask, other=0.0).to(ACC)
    one = tl.load(
        grad_out_ptr + alone[:, None] * DIM + offs_dim[None, :],
        mask=(alone >= 0)[:, None] & mask_dim,
        other=0.0,
    )  # [BLOCK_ROWS, len(offs_dim)]
    many = tl.load(
        sums_ptr + summed[:, None] * DIM + offs_dim[None, :],
        mask=(summed >= 0)[:, None] & mask_dim,
        other=0.0,
    )
    return one.to(ACC) + many


@dataclass(frozen=True)
class Runs:
    """The sorted batch; see the memory picture of this file. ``packing``: see :func:`pack_keys`."""

    key: Tensor
    order: Tensor
    run_begin: Tensor
    run_start: Tensor
    run_first: Tensor
    level_begin: Tensor
    packing: tuple[int, int, int]


@lru_cache
def pack_keys(capacity: int, sizes: tuple[int, ...]) -> tuple[int, int, int]:
    """How a row's level and place are packed into its key: ``(unit, bits, bias)``.

    ``unit`` divides every row start. The levels 0 .. n (n: no row) stand above the ``bits`` of the
    place. A key is an int32, moved by ``bias`` so that all its bits count, or, where the places of
    ``capacity`` elements need more, an int64 (bias 0): an arena that grows keeps its kernels.

    >>> pack_keys(9_216_000, (2, 4, 8, 16, 64, 128))
    (2, 29, 2147483648)
    >>> pack_keys(1 << 31, (2, 4, 8, 16, 64, 128))
    (2, 60, 0)
    """
    unit = min(launch.alignments(sizes))
    levels = len(sizes).bit_length()
    bits = _INT32 - levels
    if capacity - 1 < unit << bits:
        return unit, bits, 1 << (_INT32 - 1)
    return unit, _INT64 - 1 - levels, 0


@lru_cache
def _pack_few_keys(sizes: tuple[int, ...]) -> tuple[int, int, int]:
    """:func:`pack_keys` where 11 bits are left for the position in the batch."""
    return min(launch.alignments(sizes)), _INT64 - 12 - len(sizes).bit_length(), 0


def find_runs(ids: Tensor, layout: Layout, *, capacity: int, tick: Tick | None = None) -> Runs:
    """Sort the batch by level and row and find the runs of equal rows.

    Args:
        ids: int ``[B]``, B > 0; ids that do not exist or have no row take part in no run.
        layout: where the rows lie.
        capacity: elements of the storage.
        tick: Adam's clock, which moves on, and the numbers it is multiplied by.
    """
    n_ids, n_levels = ids.numel(), len(layout.sizes)
    few = launch.choose_few_runs(n_ids)
    packing = _pack_few_keys(layout.sizes) if few else pack_keys(capacity, layout.sizes)
    constants: dict[str, Any] = {"N_LEVELS": n_levels, "KEY": packing}
    key = ids.new_empty(n_ids, dtype=torch.int32 if packing[2] else torch.int64)
    # One position more than there are occurrences: there ends the last run.
    run_begin = ids.new_empty(n_ids + 1, dtype=torch.int32)
    # The last run may be that of ids without a row, and count as one of the table's and one more.
    runs = min(n_ids, layout.num_rows + 1)
    run_start = ids.new_empty(runs, dtype=layout.row_start.dtype)
    run_first = ids.new_empty(runs, dtype=torch.int32)
    level_begin = ids.new_empty(n_levels + 1, dtype=torch.int32)
    found = (run_begin, run_start, run_first, level_begin)
    where = (ids, layout.row_start, page_levels(layout), key)
    clock = tick or (layout.row_start, layout.row_start)
    counts = (n_ids, layout.num_rows, layout.page_shift)
    flags = {**constants, "TICK": tick is not None}
    if few is not None:
        order = ids.new_empty(n_ids, dtype=torch.int64)
        launch_kernel(
            _few_runs_kernel, (1,), *where, order, *found, *clock, *counts, **flags, **few
        )
        return Runs(key, order, *found, packing)
    blocks = launch.cdiv(n_ids, launch.SCAN["BLOCK"])
    launch_kernel(_key_kernel, (blocks,), *where, *clock, *counts, **flags, **launch.SCAN)
    key, order = torch.sort(key, stable=True)
    blocks = launch.cdiv(n_ids + 1, launch.SCAN["BLOCK"])
    count = ids.new_empty(blocks, dtype=torch.int32)
    constants.update(launch.SCAN)
    launch_kernel(_run_count_kernel, (blocks,), key, count, n_ids, **constants)
    launch_kernel(_run_begin_kernel, (blocks,), key, order, count, *found, n_ids, **constants)
    return Runs(key, order, *found, packing)


def sum_hot(
    runs: Runs, rows: Tensor, n_levels: int, config: launch.BwdConfig
) -> tuple[Tensor, int]:
    """Sums of ``rows [B, d]`` over the stretches of ``hot`` positions that lie inside one run.

    Returns ``[B // hot, d]`` in fp32 (fp64 for fp64), written where a stretch is whole, and its
    length; that is 0 where the batch is not long enough to be worth a launch.
    """
    n_ids, dim = rows.shape
    _, _, hot, stretch = config.walk
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    n_hot = n_ids // hot if n_ids >= 4 * hot else 0
    sums = rows.new_empty(n_hot, dim, dtype=dtype)
    if n_hot:
        launch_kernel(
            _hot_kernel,
            (min(n_hot, 1024),),
            runs.key,
            runs.order,
            rows,
            sums,
            n_ids,
            N_LEVELS=n_levels,
            KEY=runs.packing,
            DIM=dim,
            ACC=launch.accumulator(rows.dtype),
            HOT=hot,
            STRETCH=stretch,
            BLOCK_DIM=config.sums.blocks["BLOCK_DIM"],
            num_warps=4,
            maxnreg=128,  # left to itself the assembler spills 8 bytes of fp64 to save some
            enable_fp_fusion=True,
        )
    return sums, n_hot
