"""Kernels of the forward lookup: rows of mixed sizes carried to the largest one.

Memory picture: ``ids -> row_start (int32, 4 B) -> page_level (int8, one per page, cached)`` gives
where a row begins and how long it is; rows lie in one flat ``storage``. In small batches a tile of
rows of mixed levels becomes the sparse operand X of shape ``[rows, K]`` (see ``compose``), so all
levels are one matrix product in one launch, without a sort,

    Y = X composed  (+ the row itself at the last level)

and blocks of K that no row of the tile touches are skipped. Large batches are grouped by level
first (see ``group``), and a tile meets the map of its own level alone.

Bytes per id, fp32: 8 (id) + 4 (location) + 4 d_k (row) + 4 d_n (out).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import launch
from .backend import tl, triton
from .group import assertions, find_rows, group_by_level
from .launch import block_constants, kernel_constants

__all__ = ["launch_fwd"]


@triton.jit
def _operand_columns(level, SIZES: tl.constexpr):
    """Columns of X that a row fills: the first, and how many entries (-1 if none: last level)."""
    base = tl.zeros_like(level)
    dim = tl.zeros_like(level) - 1
    offset = 0
    for k in tl.static_range(len(SIZES) - 1):
        base = tl.where(level == k, offset, base)
        dim = tl.where(level == k, SIZES[k], dim)
        offset += SIZES[k] + 1
    return base, dim


@triton.jit
def _operand(storage_ptr, start, base, dim, offs_k, ACC: tl.constexpr):
    """Block of X: the row's entries, the 1 behind them, zeros elsewhere."""
    column = offs_k[None, :] - base[:, None]  # [BLOCK_ROWS, BLOCK_K]
    mask_entry = (column >= 0) & (column < dim[:, None])
    x = tl.load(storage_ptr + start[:, None] + column, mask=mask_entry, other=0.0).to(ACC)
    return tl.where(column == dim[:, None], 1.0, x).to(ACC)


@triton.jit
def _touches(base, dim, k, BLOCK_K: tl.constexpr):
    """Whether any row of the tile has columns in ``[k, k + BLOCK_K)``."""
    hit = (base < k + BLOCK_K) & (base + dim >= k)
    return tl.max(hit.to(tl.int32), axis=0) > 0


@triton.jit
def _lookup_fwd_kernel(
    ids_ptr,
    storage_ptr,
    composed_ptr,
    row_start_ptr,
    page_level_ptr,
    out_ptr,
    n_ids,
    n_rows,
    SIZES: tl.constexpr,
    ALIGN: tl.constexpr,
    PAGE: tl.constexpr,
    K: tl.constexpr,
    DIM: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    offs_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    offs_dim = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    mask_dim = offs_dim < DIM
    start = find_rows(ids_ptr, row_start_ptr, offs_row, n_ids, n_rows)
    level = tl.load(page_level_ptr + start // PAGE, mask=start >= 0, other=-1).to(tl.int32)
    base, dim = _operand_columns(level, SIZES)

    # Rows of the last level are copied: their part of X is empty, and nothing is added to them.
    is_copy = level == len(SIZES) - 1
    row = start // ALIGN[len(SIZES) - 1] * ALIGN[len(SIZES) - 1]  # itself, in vectors of 16 bytes
    acc = tl.load(
        storage_ptr + row[:, None] + offs_dim[None, :],
        mask=is_copy[:, None] & mask_dim[None, :],
        other=0.0,
    ).to(ACC)  # [BLOCK_ROWS, BLOCK_DIM]
    for k in range(0, K, BLOCK_K):
        if _touches(base, dim, k, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            x = _operand(storage_ptr, start, base, dim, offs_k, ACC)  # [BLOCK_ROWS, BLOCK_K]
            mask_a = (offs_k < K)[:, None] & mask_dim[None, :]
            a = tl.load(
                composed_ptr + offs_k[:, None] * DIM + offs_dim[None, :], mask=mask_a, other=0.0
            )  # [BLOCK_K, BLOCK_DIM]
            acc = tl.dot(x, a, acc, input_precision=PRECISION, out_dtype=ACC)
    tl.store(
        out_ptr + offs_row[:, None] * DIM + offs_dim[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=(offs_row < n_ids)[:, None] & mask_dim[None, :],
    )


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


def _launch_small(
    out: Tensor,
    ids: Tensor,
    storage: Tensor,
    composed: Tensor,
    row_start: Tensor,
    page_level: Tensor,
    sizes: Sequence[int],
    page: int,
) -> None:
    config = launch.choose_fwd(ids.numel(), sizes[-1], storage.dtype)
    grid = (triton.cdiv(ids.numel(), config.block_rows), triton.cdiv(sizes[-1], config.block_dim))
    _lookup_fwd_kernel[grid](
        ids,
        storage,
        composed,
        row_start,
        page_level,
        out,
        ids.numel(),
        row_start.numel(),
        ALIGN=launch.alignments(sizes, page),
        **kernel_constants(sizes, page, storage.dtype),
        **block_constants(config),
        **assertions(ids),
    )


def _launch_grouped(
    out: Tensor,
    ids: Tensor,
    storage: Tensor,
    composed: Tensor,
    row_start: Tensor,
    page_level: Tensor,
    sizes: Sequence[int],
    page: int,
) -> None:
    groups = group_by_level(ids, row_start, page_level, sizes, page)
    config = launch.choose_fwd_grouped(ids.numel(), sizes, storage.dtype)
    _lookup_grouped_kernel[(config.programs,)](
        groups.order,
        groups.start,
        groups.level_begin,
        storage,
        composed,
        out,
        **config.constants(sizes, page, storage.dtype),
    )


def launch_fwd(
    ids: Tensor,
    storage: Tensor,
    composed: Tensor,
    row_start: Tensor,
    page_level: Tensor,
    sizes: Sequence[int],
    page: int,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``[B, d_n]`` in ``out_dtype`` (that of ``storage``), or into the contiguous ``out``."""
    if out is None:
        out = storage.new_empty(ids.numel(), sizes[-1], dtype=out_dtype)
    if ids.numel():
        grouped = launch.groups_ids(ids.numel(), sizes, storage.dtype)
        run = _launch_grouped if grouped else _launch_small
        # Kernels count from the first id: of a strided view, that is not where the second lies.
        run(out, ids.contiguous(), storage, composed, row_start, page_level, sizes, page)
    return out
