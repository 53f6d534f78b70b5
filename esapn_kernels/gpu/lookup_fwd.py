"""Kernels of the forward lookup: rows of mixed sizes carried to the largest one.

Memory picture: ``ids -> row_start (int32, 4 B) -> page_level (int8, one per page, cached)`` gives
where a row begins and how long it is; rows lie in one flat ``storage``. Small batches take one
launch, without a sort: a tile holds rows of mixed levels, meets the map of every level in turn, and
each row keeps the result of its own,

    Y = sum_k [level = k] (E_k M_k^T + c_k)        E_k: rows of level k, zeros elsewhere

Large batches are grouped by level first (see ``group``), and a tile meets one map only. Either way
a row meets no number of another level's map that it keeps: a map that is not finite spreads no
further than in the definition.

Bytes per id, fp32: 8 (id) + 4 (location) + 4 d_k (row) + 4 D (out).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.backend import launch_kernel, tl, triton
from ..ops.layout import Layout
from . import launch
from .group import assertions, find_rows, group_by_level

__all__ = ["launch_fwd", "launch_grouped", "launch_small"]


@triton.jit
def _project(
    storage_ptr,
    map_ptr,
    start,
    mask_row,
    offs_dim,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    DIM: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Tile of ``M e + c`` for rows of one size D: by FMA where a dot's padding would cost more."""
    mask_dim = offs_dim < DIM
    map_ptr += offs_dim
    bias = tl.load(map_ptr + D * DIM, mask=mask_dim, other=0.0)
    y = tl.broadcast_to(bias[None, :], start.shape[0], offs_dim.shape[0])
    if D <= 8:
        for j in tl.static_range(D):
            x = tl.load(storage_ptr + start + j, mask=mask_row, other=0.0).to(ACC)
            a = tl.load(map_ptr + j * DIM, mask=mask_dim, other=0.0)
            y += x[:, None] * a[None, :]
    else:
        for j in range(0, D, PADDED):
            offs_k = j + tl.arange(0, PADDED)
            mask_k = offs_k < D
            x = tl.load(
                storage_ptr + start[:, None] + offs_k[None, :],
                mask=mask_row[:, None] & mask_k[None, :],
                other=0.0,
            ).to(ACC)  # [BLOCK_ROWS, PADDED]
            a = tl.load(
                map_ptr[None, :] + offs_k[:, None] * DIM,
                mask=mask_k[:, None] & mask_dim[None, :],
                other=0.0,
            )  # [PADDED, BLOCK_DIM]
            y = tl.dot(x, a, y, input_precision=PRECISION, out_dtype=ACC)
    return y


@triton.jit(do_not_specialize=["n_ids", "n_rows", "page_shift"])
def _lookup_fwd_kernel(
    ids_ptr,
    storage_ptr,
    composed_ptr,
    row_start_ptr,
    page_level_ptr,
    out_ptr,
    n_ids,
    n_rows,
    page_shift,
    SIZES: tl.constexpr,
    ALIGN: tl.constexpr,
    PADDED: tl.constexpr,
    DIM: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    offs_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    offs_dim = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    mask_dim = offs_dim < DIM
    start = find_rows(ids_ptr, row_start_ptr, offs_row, n_ids, n_rows, False)
    level = tl.load(page_level_ptr + (start >> page_shift), mask=start >= 0, other=-1).to(tl.int32)

    y = tl.zeros([BLOCK_ROWS, BLOCK_DIM], dtype=ACC)  # of ids that have no row
    base = 0
    for k in tl.static_range(len(SIZES)):
        mine = level == k
        # Rows then move in vectors of 16 bytes.
        first = start // ALIGN[k] * ALIGN[k]
        if k == len(SIZES) - 1:
            row = tl.load(
                storage_ptr + first[:, None] + offs_dim[None, :],
                mask=mine[:, None] & mask_dim[None, :],
                other=0.0,
            )  # [BLOCK_ROWS, BLOCK_DIM]
            y = tl.where(mine[:, None], row.to(ACC), y)
        # What takes few operations is done without asking for whom: no load waits for a branch.
        elif SIZES[k] <= 8 or tl.max(mine.to(tl.int32), axis=0) > 0:
            projected = _project(
                storage_ptr,
                composed_ptr + base * DIM,
                first,
                mine,
                offs_dim,
                SIZES[k],
                PADDED[k],
                DIM,
                ACC,
                PRECISION,
            )  # [BLOCK_ROWS, BLOCK_DIM]
            y = tl.where(mine[:, None], projected, y)
        base += SIZES[k] + 1
    tl.store(
        out_ptr + offs_row[:, None] * DIM + offs_dim[None, :],
        y.to(out_ptr.dtype.element_ty),
        mask=(offs_row < n_ids)[:, None] & mask_dim[None, :],
    )


@triton.jit
def _lookup_grouped_kernel(
    order_ptr,
    start_ptr,
    level_begin_ptr,
    storage_ptr,
    composed_ptr,
    out_ptr,
    SIZES: tl.constexpr,
    ALIGN: tl.constexpr,
    PADDED: tl.constexpr,
    DIM: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    n_programs = tl.num_programs(0)
    # Tiles are numbered through all levels; this program takes every n_programs-th of them.
    first = tl.program_id(0)
    base = 0
    for k in tl.static_range(len(SIZES) + 1):
        begin = tl.load(level_begin_ptr + k)
        end = tl.load(level_begin_ptr + k + 1)
        tiles = tl.cdiv(end - begin, BLOCK_ROWS)
        for tile in range(first, tiles, n_programs):
            offs_row = begin + tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
            mask_row = offs_row < end
            position = tl.load(order_ptr + offs_row, mask=mask_row, other=0).to(tl.int64)
            start = tl.load(start_ptr + offs_row, mask=mask_row, other=0).to(tl.int64)
            if k < len(SIZES):
                # Rows then move in vectors of 16 bytes.
                start = tl.multiple_of(start, tl.constexpr(ALIGN[k]))
            for n in range(0, DIM, BLOCK_DIM):
                offs_dim = n + tl.arange(0, BLOCK_DIM)
                mask = mask_row[:, None] & (offs_dim < DIM)[None, :]
                if k == len(SIZES):  # ids that have no row
                    y = tl.zeros([BLOCK_ROWS, BLOCK_DIM], dtype=ACC)
                elif k == len(SIZES) - 1:
                    row_ptr = storage_ptr + start[:, None] + offs_dim[None, :]
                    y = tl.load(row_ptr, mask=mask, other=0.0)
                else:
                    y = _project(
                        storage_ptr,
                        composed_ptr + base * DIM,
                        start,
                        mask_row,
                        offs_dim,
                        SIZES[k],
                        PADDED[k],
                        DIM,
                        ACC,
                        PRECISION,
                    )  # [BLOCK_ROWS, BLOCK_DIM]
                tl.store(
                    out_ptr + position[:, None] * DIM + offs_dim[None, :],
                    y.to(out_ptr.dtype.element_ty),
                    mask=mask,
                )
        behind = tiles - first
        first = tl.cdiv(behind, n_programs) * n_programs - behind
        if k < len(SIZES):
            base += SIZES[k] + 1


def launch_small(
    out: Tensor,
    ids: Tensor,
    storage: Tensor,
    composed: Tensor,
    layout: Layout,
) -> None:
    config = launch.choose_fwd(layout.dim, storage.dtype)
    grid = (launch.cdiv(ids.numel(), config.block_rows), launch.cdiv(layout.dim, config.block_dim))
    launch_kernel(
        _lookup_fwd_kernel,
        grid,
        ids,
        storage,
        composed,
        layout.row_start,
        layout.page_level,
        out,
        ids.numel(),
        layout.num_rows,
        layout.page_shift,
        **config.constants(layout.sizes, storage.dtype),
        **assertions(ids),
    )


def launch_grouped(
    out: Tensor,
    ids: Tensor,
    storage: Tensor,
    composed: Tensor,
    layout: Layout,
    chain: Tensor | None = None,
) -> None:
    groups = group_by_level(ids, layout, None if chain is None else (chain, composed))
    config = launch.choose_fwd_grouped(ids.numel(), layout.sizes, storage.dtype)
    launch_kernel(
        _lookup_grouped_kernel,
        (config.programs,),
        groups.order,
        groups.start,
        groups.level_begin,
        storage,
        composed,
        out,
        **config.constants(layout.sizes, storage.dtype),
    )


def launch_fwd(
    ids: Tensor,
    storage: Tensor,
    composed: Tensor,
    layout: Layout,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    chain: Tensor | None = None,
) -> Tensor:
    """``[B, D]`` in ``out_dtype`` (that of ``storage``), or into the contiguous ``out``.

    With a ``chain`` ``composed`` is not written yet: for batches that are grouped.
    """
    if out is None:
        out = storage.new_empty(ids.numel(), layout.dim, dtype=out_dtype)
    if ids.numel():
        if not layout.num_rows:
            raise IndexError("index out of range in self")
        # Kernels count from the first id: of a strided view, that is not where the second lies.
        operands = (out, ids.contiguous(), storage, composed, layout)
        if launch.groups_ids(ids.numel(), layout.sizes, storage.dtype):
            launch_grouped(*operands, chain)
        else:
            assert chain is None
            launch_small(*operands)
    return out
