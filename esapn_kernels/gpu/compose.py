"""Composition of the chain and its reverse, one launch each; see ``ops/compose.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..ops.backend import launch_kernel, tl, triton
from ..ops.chain import chain_numel, compute_dtype, operand_offsets
from . import launch

__all__ = [
    "compose_columns",
    "composition",
    "empty_composed",
    "launch_compose",
    "launch_compose_bwd",
]


@triton.jit
def compose_columns(
    chain_ptr,
    composed_ptr,
    block_dim,
    HOPS: tl.constexpr,
):
    """A block of columns of all maps, from the last hop to the first; see :func:`composition`."""
    SIZES: tl.constexpr = HOPS[0]
    K: tl.constexpr = HOPS[1]
    CHAIN: tl.constexpr = HOPS[2]
    DIM: tl.constexpr = HOPS[3]
    PRECISION: tl.constexpr = HOPS[4]
    BLOCK_ROWS: tl.constexpr = HOPS[5]
    BLOCK_K: tl.constexpr = HOPS[6]
    BLOCK_DIM: tl.constexpr = HOPS[7]
    # Not in HOPS: Triton's hooks write constants as JSON, which holds no type in a tuple.
    ACC: tl.constexpr = composed_ptr.dtype.element_ty
    offs_dim = block_dim * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    mask_dim = offs_dim < DIM
    hop = CHAIN
    base = K
    for k in tl.static_range(len(SIZES) - 2, -1, -1):
        below = base
        hop -= (SIZES[k] + 1) * SIZES[k + 1]
        base -= SIZES[k] + 1
        for r in range(0, SIZES[k] + 1, BLOCK_ROWS):
            offs_row = r + tl.arange(0, BLOCK_ROWS)
            mask = (offs_row <= SIZES[k])[:, None] & mask_dim[None, :]
            if k == len(SIZES) - 2:
                hop_ptr = chain_ptr + hop + offs_row[:, None] * DIM + offs_dim[None, :]
                block = tl.load(hop_ptr, mask=mask, other=0.0).to(ACC)
            else:
                bias_ptr = composed_ptr + (below + SIZES[k + 1]) * DIM + offs_dim
                bias = tl.load(bias_ptr, mask=mask_dim, other=0.0)
                block = tl.where((offs_row == SIZES[k])[:, None], bias[None, :], 0.0).to(ACC)
                for j in range(0, SIZES[k + 1], BLOCK_K):
                    offs_k = j + tl.arange(0, BLOCK_K)
                    mask_k = offs_k < SIZES[k + 1]
                    t = tl.load(
                        chain_ptr + hop + offs_row[:, None] * SIZES[k + 1] + offs_k[None, :],
                        mask=(offs_row <= SIZES[k])[:, None] & mask_k[None, :],
                        other=0.0,
                    ).to(ACC)  # [BLOCK_ROWS, BLOCK_K]
                    a = tl.load(
                        composed_ptr + (below + offs_k[:, None]) * DIM + offs_dim[None, :],
                        mask=mask_k[:, None] & mask_dim[None, :],
                        other=0.0,
                    )  # [BLOCK_K, BLOCK_DIM]
                    block = tl.dot(t, a, block, input_precision=PRECISION, out_dtype=ACC)
            tl.store(
                composed_ptr + (base + offs_row[:, None]) * DIM + offs_dim[None, :],
                block,
                mask=mask,
            )
        # The next level reads what other threads of this program have just stored.
        tl.debug_barrier()


@triton.jit
def _compose_kernel(chain_ptr, composed_ptr, HOPS: tl.constexpr):
    compose_columns(chain_ptr, composed_ptr, tl.program_id(0), HOPS)


@triton.jit
def _compose_bwd_kernel(
    grad_composed_ptr,
    chain_ptr,
    composed_ptr,
    scratch_ptr,
    grad_chain_ptr,
    SIZES: tl.constexpr,
    DIM: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    # Which hop k this program differentiates: its number, width d_{k+1}, and where its gradient,
    # A_{k+1} and its scratch (R_0 ... R_{k-1} stacked) begin.
    pid = tl.program_id(0)
    level = 0
    width = 0
    target = 0
    maps = 0
    scratch = 0
    column = 0
    first = 0
    hop = 0
    base = 0
    room = 0
    for k in tl.static_range(len(SIZES) - 1):
        mine = pid >= first
        level = tl.where(mine, k, level)
        width = tl.where(mine, SIZES[k + 1], width)
        target = tl.where(mine, hop, target)
        maps = tl.where(mine, base + SIZES[k] + 1, maps)
        scratch = tl.where(mine, room, scratch)
        column = tl.where(mine, (pid - first) * BLOCK_DIM, column)
        first += tl.cdiv(SIZES[k + 1], BLOCK_DIM)
        room += base * SIZES[k + 1]
        hop += (SIZES[k] + 1) * SIZES[k + 1]
        base += SIZES[k] + 1
    is_last = level == len(SIZES) - 2
    offs_col = column + tl.arange(0, BLOCK_DIM)
    mask_col = offs_col < width
    # A_{n-1} is the identity: nothing to multiply by.
    n_dim = tl.where(is_last, 0, DIM)
    mask_last = offs_col < tl.where(is_last, width, 0)

    hop = 0
    base = 0
    before = 0
    for j in tl.static_range(len(SIZES) - 1):
        if j <= level:
            for r in range(0, SIZES[j] + 1, BLOCK_ROWS):
                offs_row = r + tl.arange(0, BLOCK_ROWS)
                mask_row = offs_row <= SIZES[j]
                mask = mask_row[:, None] & mask_col[None, :]
                grad_ptr = grad_composed_ptr + (base + offs_row[:, None]) * DIM
                acc = tl.load(
                    grad_ptr + offs_col[None, :],
                    mask=mask_row[:, None] & mask_last[None, :],
                    other=0.0,
                )  # [BLOCK_ROWS, BLOCK_DIM]
                used = tl.zeros([BLOCK_ROWS], dtype=tl.int32) + tl.where(is_last, 1, 0)
                for n in range(0, n_dim, BLOCK_K):
                    offs_k = n + tl.arange(0, BLOCK_K)
                    mask_k = offs_k < DIM
                    grad = tl.load(
                        grad_ptr + offs_k[None, :],
                        mask=mask_row[:, None] & mask_k[None, :],
                        other=0.0,
                    )  # [BLOCK_ROWS, BLOCK_K]
                    a = tl.load(
                        composed_ptr + (maps + offs_col[None, :]) * DIM + offs_k[:, None],
                        mask=mask_k[:, None] & mask_col[None, :],
                        other=0.0,
                    )  # [BLOCK_K, BLOCK_DIM]
                    acc = tl.dot(grad, a, acc, input_precision=PRECISION, out_dtype=ACC)
                    used += tl.sum((grad != 0).to(tl.int32), axis=1)
                acc = tl.where((used > 0)[:, None], acc, 0.0).to(ACC)
                if j > 0:
                    below_ptr = scratch_ptr + scratch + before * width + offs_col[None, :]
                    passed = tl.zeros([BLOCK_ROWS, BLOCK_DIM], dtype=ACC)
                    for i in range(0, SIZES[j - 1] + 1, BLOCK_K):
                        offs_k = i + tl.arange(0, BLOCK_K)
                        mask_k = offs_k <= SIZES[j - 1]
                        r_below = tl.load(
                            below_ptr + offs_k[:, None] * width,
                            mask=mask_k[:, None] & mask_col[None, :],
                            other=0.0,
                        )  # [BLOCK_K, BLOCK_DIM]
                        kept = tl.sum((r_below != 0).to(tl.int32), axis=1) > 0
                        t = tl.load(
                            chain_ptr + hop + offs_k[None, :] * SIZES[j] + offs_row[:, None],
                            mask=(mask_k & kept)[None, :] & (offs_row < SIZES[j])[:, None],
                            other=0.0,
                        ).to(ACC)  # [BLOCK_ROWS, BLOCK_K]
                        passed = tl.dot(
                            t, r_below, passed, input_precision=PRECISION, out_dtype=ACC
                        )
                    bias = tl.load(
                        below_ptr + SIZES[j - 1] * width, mask=mask_col[None, :], other=0.0
                    )  # [1, BLOCK_DIM]
                    acc += tl.where((offs_row == SIZES[j])[:, None], bias, passed)
                offset = offs_row[:, None] * width + offs_col[None, :]
                if j == level:
                    tl.store(
                        grad_chain_ptr + target + offset,
                        acc.to(grad_chain_ptr.dtype.element_ty),
                        mask=mask,
                    )
                else:
                    tl.store(scratch_ptr + scratch + base * width + offset, acc, mask=mask)
        # The next R reads what other threads of this program have just stored.
        tl.debug_barrier()
        if j > 0:
            hop += (SIZES[j - 1] + 1) * SIZES[j]
        before = base
        base += SIZES[j] + 1


@lru_cache
def _constants(sizes: tuple[int, ...], dtype: torch.dtype) -> Mapping[str, Any]:
    """Compile-time arguments of both kernels.

    Never plain ``tf32``: weights are few, and every row is made from them.
    """
    return {
        "SIZES": sizes,
        "DIM": sizes[-1],
        "ACC": launch.accumulator(dtype),
        "PRECISION": "ieee" if dtype == torch.float64 else "tf32x3",
        **launch.block_constants(launch.choose_compose(sizes[-1], dtype)),
    }


@lru_cache
def _extents(sizes: tuple[int, ...], block_dim: int) -> tuple[int, int, int]:
    """Rows of ``composed``; programs of its reverse, and the numbers in their scratch."""
    offsets = operand_offsets(sizes)
    room = sum(k * d for k, d in zip(offsets, sizes[1:], strict=False))
    return offsets[-1], sum(launch.cdiv(d, block_dim) for d in sizes[1:]), room


@lru_cache
def composition(sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[int, tuple[Any, ...]]:
    """Programs that compose hops of ``dtype``, and what :func:`compose_columns` takes as HOPS."""
    known = _constants(sizes, dtype)
    rows, _, _ = _extents(sizes, known["BLOCK_DIM"])
    blocks = (known["BLOCK_ROWS"], known["BLOCK_K"], known["BLOCK_DIM"])
    extents = (rows, chain_numel(sizes), known["DIM"])
    hops = (sizes, *extents, known["PRECISION"], *blocks)
    return launch.cdiv(sizes[-1], known["BLOCK_DIM"]), hops


def empty_composed(chain: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """``[K, D]``, not written."""
    rows, _, _ = _extents(sizes, _constants(sizes, chain.dtype)["BLOCK_DIM"])
    return chain.new_empty(rows, sizes[-1], dtype=compute_dtype(chain.dtype))


def launch_compose(chain: Tensor, sizes: Sequence[int]) -> Tensor:
    sizes = tuple(sizes)
    composed = empty_composed(chain, sizes)
    if len(sizes) > 1:
        programs, hops = composition(sizes, chain.dtype)
        known = _constants(sizes, chain.dtype)
        options = {name: known[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
        launch_kernel(_compose_kernel, (programs,), chain, composed, HOPS=hops, **options)
    return composed


def launch_compose_bwd(
    grad_composed: Tensor, chain: Tensor, composed: Tensor, sizes: Sequence[int]
) -> Tensor:
    grad_chain = torch.empty_like(chain)
    if chain.numel():
        sizes = tuple(sizes)
        constants = _constants(sizes, chain.dtype)
        _, programs, room = _extents(sizes, constants["BLOCK_DIM"])
        launch_kernel(
            _compose_bwd_kernel,
            (programs,),
            grad_composed,
            chain,
            composed,
            composed.new_empty(room),
            grad_chain,
            **constants,
        )
    return grad_chain
