"""Gradient of the composed chain from the rows below the last level.

    d M_k = sum_x g e^T,   d c_k = sum_x g        x the distinct rows of level k, g their gradients

    partial [programs, K, D]   the blocks of ``composed`` that a program worked on

Every program takes an equal share of consecutive tiles of runs, keeps the gradient of its level's
map in registers and writes it once; a second launch adds these in the order of the programs, so
equal inputs give equal bits. In a small batch one program takes a whole level, in one launch.
Bytes per row, fp32: 4 D + 4 d_k + 8 (its place). Source of the operator: Liu et al., SIGIR 2020.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..ops.backend import launch_kernel, tl, triton
from . import launch
from .segments import rows_of_runs, share, sources, summed_grads

__all__ = ["launch_chain_grad"]


@triton.jit
def _chain_level(
    run_start_ptr,
    run_first_ptr,
    grad_out_ptr,
    sums_ptr,
    storage_ptr,
    block_ptr,
    level_run,
    level_end,
    tile_lo,
    tile_hi,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    DIM: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """A block of ``[M_k | c_k]^T``: summed over this program's tiles, then written."""
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_dim = tl.program_id(2) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    acc = tl.zeros([BLOCK_D, BLOCK_DIM], dtype=ACC)
    acc_bias = tl.zeros([BLOCK_ROWS, BLOCK_DIM], dtype=ACC)
    for tile in range(tile_lo, tile_hi):
        first_run = level_run + tile * BLOCK_ROWS
        mask_run = tl.arange(0, BLOCK_ROWS) < level_end - first_run
        start = rows_of_runs(run_start_ptr, first_run, mask_run, ALIGN, BLOCK_ROWS)
        alone, summed = sources(run_first_ptr, first_run, mask_run, BLOCK_ROWS)
        total = summed_grads(grad_out_ptr, sums_ptr, alone, summed, offs_dim, DIM, ACC)
        row = tl.load(
            storage_ptr + start[None, :] + offs_d[:, None],
            mask=mask_run[None, :] & (offs_d < D)[:, None],
            other=0.0,
        ).to(ACC)  # [BLOCK_D, BLOCK_ROWS]
        acc = tl.dot(row, total, acc, input_precision=PRECISION, out_dtype=ACC)
        acc_bias += total
    mask_dim = offs_dim < DIM
    tl.store(
        block_ptr + offs_d[:, None] * DIM + offs_dim[None, :],
        acc,
        mask=(offs_d < D)[:, None] & mask_dim[None, :],
    )
    if tl.program_id(1) == 0:
        tl.store(block_ptr + D * DIM + offs_dim, tl.sum(acc_bias, axis=0), mask=mask_dim)


@triton.jit
def _chain_kernel(
    run_start_ptr,
    run_first_ptr,
    level_begin_ptr,
    grad_out_ptr,
    sums_ptr,
    storage_ptr,
    partial_ptr,
    SIZES: tl.constexpr,
    ALIGN: tl.constexpr,
    PADS: tl.constexpr,
    K: tl.constexpr,
    DIM: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """WHOLE: a program takes all tiles of a level, and ``partial`` is the gradient itself."""
    pid = tl.program_id(0).to(tl.int64)
    lo, hi = share(level_begin_ptr, pid, tl.num_programs(0), len(SIZES) - 1, BLOCK_ROWS)
    tile_base = tl.zeros_like(pid)
    offset = 0
    for k in tl.static_range(len(SIZES) - 1):
        level_run = tl.load(level_begin_ptr + k)
        level_end = tl.load(level_begin_ptr + k + 1)
        n_tiles = tl.cdiv(level_end - level_run, BLOCK_ROWS)
        tile_lo = tl.maximum(lo - tile_base, 0).to(tl.int32)
        tile_hi = tl.minimum(hi - tile_base, n_tiles).to(tl.int32)
        block = pid * K
        is_mine = tile_lo < tile_hi
        if WHOLE:
            tile_lo, tile_hi = tl.zeros_like(tile_lo), n_tiles.to(tl.int32)
            block = tl.zeros_like(pid)
            is_mine = pid == k
        if is_mine & (tl.program_id(1) * BLOCK_K < SIZES[k]):
            _chain_level(
                run_start_ptr,
                run_first_ptr,
                grad_out_ptr,
                sums_ptr,
                storage_ptr,
                partial_ptr + (block + offset) * DIM,
                level_run,
                level_end,
                tile_lo,
                tile_hi,
                SIZES[k],
                ALIGN[k],
                DIM,
                ACC,
                PRECISION,
                BLOCK_ROWS,
                min(PADS[k], BLOCK_K),
                BLOCK_DIM,
            )
        tile_base += n_tiles
        offset += SIZES[k] + 1


@triton.jit(do_not_specialize=["n_programs"])
def _chain_sum_kernel(
    partial_ptr,
    level_begin_ptr,
    grad_composed_ptr,
    n_programs,
    SIZES: tl.constexpr,
    K: tl.constexpr,
    DIM: tl.constexpr,
    ACC: tl.constexpr,
    STRETCH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """One row of ``composed``: the partial sums of the programs that worked on its level."""
    N_LOWER: tl.constexpr = len(SIZES) - 1
    line = tl.program_id(0)
    offs_dim = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    tile_base = tl.zeros_like(line).to(tl.int64)
    tile_lo = tl.zeros_like(line).to(tl.int64)
    tile_hi = tl.zeros_like(line).to(tl.int64)
    offset = 0
    for k in tl.static_range(N_LOWER):
        n_runs = tl.load(level_begin_ptr + k + 1) - tl.load(level_begin_ptr + k)
        n_tiles = tl.cdiv(n_runs, BLOCK_ROWS)
        mine = (line >= offset) & (line < offset + SIZES[k] + 1)
        tile_lo = tl.where(mine, tile_base, tile_lo)
        tile_hi = tl.where(mine, tile_base + n_tiles, tile_hi)
        tile_base += n_tiles
        offset += SIZES[k] + 1
    total = tl.zeros([BLOCK_DIM], dtype=ACC)
    # Programs that own the first and the last tile of the level; tile_base is now all tiles.
    if tile_lo < tile_hi:
        first = ((tile_lo + 1) * n_programs - 1) // tile_base
        last = (tile_hi * n_programs - 1) // tile_base
        for at in range(first, last + 1, STRETCH):
            program = at + tl.arange(0, STRETCH)
            lo = tl.maximum(tile_base * program // n_programs, tile_lo)
            hi = tl.minimum(tile_base * (program + 1) // n_programs, tile_hi)
            values = tl.load(
                partial_ptr + (program * K + line)[:, None] * DIM + offs_dim[None, :],
                mask=((lo < hi) & (program <= last))[:, None] & (offs_dim < DIM)[None, :],
                other=0.0,
            )  # [STRETCH, BLOCK_DIM]
            total += tl.sum(values, axis=0)
    tl.store(grad_composed_ptr + line * DIM + offs_dim, total, mask=offs_dim < DIM)


def launch_chain_grad(
    grad_composed: Tensor,
    where: tuple[Tensor, ...],
    sums: Tensor,
    storage: Tensor,
    shared: dict[str, Any],
    config: launch.PassConfig,
) -> None:
    """Write the gradient of ``composed``.

    Args:
        grad_composed: ``[K, D]`` fp32 (fp64), written.
        where: ``run_start, run_first, level_begin`` of the runs, and the output's gradient.
        sums: summed gradients of the runs longer than one, ``[U, D]``.
        storage: the rows, not yet stepped.
        shared: compile-time arguments that this pass has in common with the others.
        config: tiles.
    """
    n_k, dim = grad_composed.shape
    columns = launch.cdiv(dim, config.blocks["BLOCK_DIM"])
    blocks = launch.cdiv(shared["SIZES"][-2], config.blocks["BLOCK_K"])
    partial, whole = grad_composed, config.blocks["WHOLE"]
    if not whole:
        partial = grad_composed.new_empty(config.programs, n_k, dim)
    launch_kernel(
        _chain_kernel,
        (config.programs, blocks, columns),
        *where,
        sums,
        storage,
        partial,
        **shared,
        K=n_k,
        **config.constants,
    )
    if whole:
        return
    level_begin = where[2]
    launch_kernel(
        _chain_sum_kernel,
        (n_k, columns),
        partial,
        level_begin,
        grad_composed,
        config.programs,
        SIZES=shared["SIZES"],
        K=n_k,
        DIM=dim,
        ACC=shared["ACC"],
        STRETCH=32,
        BLOCK_ROWS=config.blocks["BLOCK_ROWS"],
        BLOCK_DIM=config.blocks["BLOCK_DIM"],
        num_warps=4,
        enable_fp_fusion=True,
    )
