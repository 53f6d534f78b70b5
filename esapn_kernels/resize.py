"""Rows that move one level up, and rows that start afresh.

    promote:  e' = W_k e + b_k      e in R^{d_k} at its old place, e' in R^{d_{k+1}} at its new one

so that ``y(x)`` does not change at that moment: M_k e + c_k = M_{k+1} (W_k e + b_k) + c_{k+1}. The
new rows were free before, hence disjoint from every old row, and one launch moves rows of all
levels.
Source: Liu et al., SIGIR 2020.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import launch, torch_path
from .backend import resolve_backend, tl, triton
from .lookup import block_constants, kernel_constants

__all__ = ["fill_rows", "promote_rows"]


@triton.jit
def _promote_kernel(
    storage_ptr,
    chain_ptr,
    old_start_ptr,
    new_start_ptr,
    level_ptr,
    n_rows,
    SIZES: tl.constexpr,
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
    mask_row = offs_row < n_rows
    old_start = tl.load(old_start_ptr + offs_row, mask=mask_row, other=-1).to(tl.int64)
    new_start = tl.load(new_start_ptr + offs_row, mask=mask_row, other=-1).to(tl.int64)
    level = tl.load(level_ptr + offs_row, mask=mask_row, other=-1).to(tl.int32)
    hop = 0
    for k in tl.static_range(len(SIZES) - 1):
        mask_level = (level == k) & (new_start >= 0)
        if tl.max(mask_level.to(tl.int32), axis=0) > 0:
            for n in range(0, SIZES[k + 1], BLOCK_DIM):
                offs_dim = n + tl.arange(0, BLOCK_DIM)
                mask_dim = offs_dim < SIZES[k + 1]
                bias_ptr = chain_ptr + hop + SIZES[k] * SIZES[k + 1]
                bias = tl.load(bias_ptr + offs_dim, mask=mask_dim, other=0.0).to(ACC)
                acc = tl.zeros([BLOCK_ROWS, BLOCK_DIM], dtype=ACC) + bias[None, :]
                for j in range(0, SIZES[k], BLOCK_K):
                    offs_k = j + tl.arange(0, BLOCK_K)
                    mask_k = offs_k < SIZES[k]
                    e = tl.load(
                        storage_ptr + old_start[:, None] + offs_k[None, :],
                        mask=mask_level[:, None] & mask_k[None, :],
                        other=0.0,
                    ).to(ACC)  # [BLOCK_ROWS, BLOCK_K]
                    w = tl.load(
                        chain_ptr + hop + offs_k[:, None] * SIZES[k + 1] + offs_dim[None, :],
                        mask=mask_k[:, None] & mask_dim[None, :],
                        other=0.0,
                    ).to(ACC)  # [BLOCK_K, BLOCK_DIM]
                    acc = tl.dot(e, w, acc, input_precision=PRECISION, out_dtype=ACC)
                tl.store(
                    storage_ptr + new_start[:, None] + offs_dim[None, :],
                    acc.to(storage_ptr.dtype.element_ty),
                    mask=mask_level[:, None] & mask_dim[None, :],
                )
        hop += (SIZES[k] + 1) * SIZES[k + 1]


@triton.jit
def _fill_rows_kernel(
    storage_ptr,
    start_ptr,
    level_ptr,
    value,
    n_rows,
    SIZES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    offs_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask_row = offs_row < n_rows
    start = tl.load(start_ptr + offs_row, mask=mask_row, other=-1).to(tl.int64)
    level = tl.load(level_ptr + offs_row, mask=mask_row, other=-1).to(tl.int32)
    dim = tl.zeros_like(level)
    for k in tl.static_range(len(SIZES)):
        dim = tl.where((level == k) & (start >= 0), SIZES[k], dim)
    for n in range(0, SIZES[len(SIZES) - 1], BLOCK_DIM):
        offs_dim = n + tl.arange(0, BLOCK_DIM)
        block = tl.zeros([BLOCK_ROWS, BLOCK_DIM], dtype=tl.float32) + value
        tl.store(
            storage_ptr + start[:, None] + offs_dim[None, :],
            block.to(storage_ptr.dtype.element_ty),
            mask=offs_dim[None, :] < dim[:, None],
        )


def promote_rows(
    storage: Tensor,
    chain: Tensor,
    old_start: Tensor,
    new_start: Tensor,
    level: Tensor,
    *,
    sizes: Sequence[int],
    page: int,
    backend: str = "auto",
) -> None:
    """``storage[new] = W_k storage[old] + b_k``, in place, for every entry with ``new_start >= 0``.

    Args:
        storage: flat ``[capacity]``; written at the new rows only.
        chain: packed hops, dtype of ``storage``.
        old_start, new_start: int64 ``[R]``, first elements; ``-1`` in ``new_start`` skips an entry.
        level: ``[R]``, the level ``k`` a row leaves; below the last.
        sizes, page, backend: as for ``lookup``.
    """
    if resolve_backend(backend, storage.device) != "triton":
        torch_path.promote_rows(storage, chain, old_start, new_start, level, sizes, page)
        return
    n_rows = level.numel()
    if not n_rows:
        return
    config = launch.choose_promote(n_rows, sizes[-1], storage.dtype)
    _promote_kernel[(triton.cdiv(n_rows, config.block_rows),)](
        storage,
        chain,
        old_start,
        new_start,
        level,
        n_rows,
        **kernel_constants(sizes, page, storage.dtype),
        **block_constants(config),
    )
    # The kernel writes through a pointer; autograd must know that saved rows are stale.
    torch.autograd.graph.increment_version(storage)


def fill_rows(
    targets: Sequence[tuple[Tensor, float]],
    start: Tensor,
    level: Tensor,
    *,
    sizes: Sequence[int],
    backend: str = "auto",
) -> None:
    """Set every element of the rows ``(start, level)`` with ``start >= 0``, in place.

    Args:
        targets: flat tensors of the storage's shape, each with the value that its rows take.
        start, level: int64 ``[R]``, first elements and levels.
        sizes, backend: as for ``lookup``.
    """
    n_rows = level.numel()
    if not n_rows or not targets:
        return
    if resolve_backend(backend, start.device) != "triton":
        torch_path.fill_rows(targets, start, level, sizes)
        return
    for tensor, value in targets:
        config = launch.choose_promote(n_rows, sizes[-1], tensor.dtype)
        _fill_rows_kernel[(triton.cdiv(n_rows, config.block_rows),)](
            tensor,
            start,
            level,
            value,
            n_rows,
            SIZES=tuple(sizes),
            BLOCK_ROWS=config.block_rows,
            BLOCK_DIM=config.block_dim,
            num_warps=config.num_warps,
            enable_fp_fusion=True,
        )
        torch.autograd.graph.increment_version(tensor)
