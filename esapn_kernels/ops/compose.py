"""Composition of the chain: from ``n - 1`` hops to one affine map for every level.

The chain is affine, so carrying a row of level ``k`` to the last level is one product,

    y = M_k e + c_k,    M_k = W_{n-2} ... W_k,    M_{n-1} = I,    c_{n-1} = 0

Written row-wise and with the bias as one more input column that is always 1, hop ``k`` is the block
``T_k = [W_k | b_k]^T`` of shape ``[d_k + 1, d_{k+1}]`` and the composed map is

    A_k = T_k A'_{k+1} + [0; c_{k+1}]      A_k = [M_k | c_k]^T, shape [d_k + 1, d_n]; A' without c

``composed`` stacks A_0 ... A_{n-2}: K = sum_{k<n-1} (d_k + 1) rows of d_n numbers, 99 x 128 for the
default sizes. Every kernel reads this one operand: a row of level ``k`` meets the block that begins
at ``operand_offsets(sizes)[k]``.

Both directions are recursions whose columns never meet, so one launch does either, a program per
block of columns:

    A_k = T_k A'_{k+1} + [0; c_{k+1}]                               k = n-2 ... 0, columns of d_n
    R_{j+1} = dA_{j+1} A'_{k+1}^T + [T_j^T R_j; r_j],  dT_k = R_k  j = 0 ... k,  columns of d_{k+1}

R_j is ``G_j A'_{k+1}^T`` with G_j the gradient of A_j from all hops before it, r_j its last row;
carrying the product in place of G_j leaves no sum across programs. Nothing is summed by atomics.
A bias is added, never multiplied by a 1 among zeros, and rows of zeros take part in no product: a
hop that is not finite spreads no further than through the rows that pass it.

Costs ``2 sum (d_k + 1) d_{k+1} d_n`` FLOP once per weight version (0.4 MFLOP for the default
sizes), against 18,768 FLOP per row of size 2 for the chain itself.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..gpu import launch
from .backend import launch_kernel, own_precision, tl, triton

__all__ = [
    "ComposedCache",
    "chain_numel",
    "compose",
    "compose_bwd",
    "compute_dtype",
    "operand_offsets",
]


def operand_offsets(sizes: Sequence[int]) -> list[int]:
    """First row of every level's block in ``composed``, and the number of rows K at the end.

    >>> operand_offsets((2, 4, 8))
    [0, 3, 8]
    """
    offsets = [0]
    for d in sizes[:-1]:
        offsets.append(offsets[-1] + d + 1)
    return offsets


def chain_numel(sizes: Sequence[int]) -> int:
    """Numbers in the packed chain, ``sum_k (d_k + 1) d_{k+1}``.

    >>> chain_numel((2, 4, 8, 16, 64, 128))
    9604
    """
    return sum((a + 1) * b for a, b in zip(sizes, sizes[1:], strict=False))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Products and sums run in fp32, in fp64 for fp64 rows."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@triton.jit
def _compose_kernel(
    chain_ptr,
    composed_ptr,
    SIZES: tl.constexpr,
    K: tl.constexpr,
    CHAIN: tl.constexpr,
    DIM: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    offs_dim = tl.program_id(0) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
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


def _constants(sizes: Sequence[int], dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time arguments of both kernels.

    Never plain ``tf32``: weights are few, and every row is made from them.
    """
    return {
        "SIZES": tuple(sizes),
        "DIM": sizes[-1],
        "ACC": launch.accumulator(dtype),
        "PRECISION": "ieee" if dtype == torch.float64 else "tf32x3",
        **launch.block_constants(launch.choose_compose(sizes[-1], dtype)),
    }


def _launch_compose(chain: Tensor, sizes: Sequence[int]) -> Tensor:
    rows = operand_offsets(sizes)[-1]
    composed = chain.new_empty(rows, sizes[-1], dtype=compute_dtype(chain.dtype))
    if rows:
        constants = _constants(sizes, chain.dtype)
        launch_kernel(
            _compose_kernel,
            (triton.cdiv(sizes[-1], constants["BLOCK_DIM"]),),
            chain,
            composed,
            K=rows,
            CHAIN=chain.numel(),
            **constants,
        )
    return composed


def _launch_compose_bwd(
    grad_composed: Tensor, chain: Tensor, composed: Tensor, sizes: Sequence[int]
) -> Tensor:
    grad_chain = torch.empty_like(chain)
    if chain.numel():
        constants = _constants(sizes, chain.dtype)
        offsets = operand_offsets(sizes)
        room = sum(k * d for k, d in zip(offsets, sizes[1:], strict=False))
        programs = sum(triton.cdiv(d, constants["BLOCK_DIM"]) for d in sizes[1:])
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


@torch.library.custom_op("esapn_kernels::compose", mutates_args=())
def compose_op(chain: Tensor, sizes: Sequence[int]) -> Tensor:
    """The kernel as an opaque operator, for ``torch.compile``."""
    return _launch_compose(chain, sizes)


@compose_op.register_fake
def _(chain, sizes):
    dtype = compute_dtype(chain.dtype)
    return chain.new_empty(operand_offsets(sizes)[-1], sizes[-1], dtype=dtype)


@torch.library.custom_op("esapn_kernels::compose_bwd", mutates_args=())
def compose_bwd_op(
    grad_composed: Tensor, chain: Tensor, composed: Tensor, sizes: Sequence[int]
) -> Tensor:
    """Its reverse, likewise."""
    return _launch_compose_bwd(grad_composed, chain, composed, sizes)


@compose_bwd_op.register_fake
def _(grad_composed, chain, composed, sizes):
    return torch.empty_like(chain)


def _blocks(chain: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    shapes = [(a + 1, b) for a, b in zip(sizes, sizes[1:], strict=False)]
    parts = chain.split([a * b for a, b in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def compose(chain: Tensor, sizes: Sequence[int], *, backend: str = "torch") -> Tensor:
    """Compose the packed chain into one affine map per level; no gradient is recorded.

    Args:
        chain: packed hops, ``[sum_k (d_k + 1) d_{k+1}]``, any float dtype.
        sizes: increasing sizes ``d_1 < ... < d_n``.
        backend: ``triton`` for one launch, ``torch`` (and ``reference``) for a product per hop.

    Returns:
        ``[K, d_n]``, fp32 (fp64 for an fp64 chain), blocks ``[M_k | c_k]^T`` one below the other.

    Example:
        >>> compose(torch.tensor([1.0, 2.0, 3.0, 4.0]), (1, 2))
        tensor([[1., 2.],
                [3., 4.]])
    """
    if backend == "triton":
        run = compose_op if torch.compiler.is_compiling() else _launch_compose
        return run(chain.detach().contiguous(), sizes)
    chain = chain.detach().to(compute_dtype(chain.dtype))
    hops = _blocks(chain, sizes)
    # Out of place: torch.func cannot write into memory of its own outside.
    levels = hops[-1:]
    with own_precision(chain):
        for hop in hops[-2::-1]:
            level = torch.mm(hop, levels[0][:-1])
            level[-1] += levels[0][-1]
            levels.insert(0, level)
    return torch.cat(levels) if levels else chain.new_empty(0, sizes[-1])


class ComposedCache:
    """:func:`compose` of the chain last seen, kept where a look at the chain is cheap: on a CPU.

    The chain's numbers are compared, which takes far less than to compose them (see
    ``bench/overhead.py``): its version counter would miss what is written through ``chain.data``.
    A copy of the cache is empty.
    """

    def __init__(self) -> None:
        self._seen: bytes | None = None
        self._composed: Tensor | None = None

    def __call__(self, chain: Tensor, sizes: Sequence[int]) -> Tensor:
        """``compose(chain, sizes)``, not to be written to; chain on a CPU, in plain eager code."""
        address, length = ctypes.c_void_p(chain.data_ptr()), chain.nbytes
        if self._composed is None or self._seen != ctypes.string_at(address, length):
            # What inference mode made could not be saved for a backward outside of it.
            with torch.inference_mode(False):
                self._composed = compose(chain, sizes)
            self._seen = ctypes.string_at(address, length)
        return self._composed

    def __reduce__(self) -> tuple[type[ComposedCache], tuple[()]]:
        return ComposedCache, ()


def compose_bwd(
    grad_composed: Tensor,
    chain: Tensor,
    composed: Tensor,
    sizes: Sequence[int],
    *,
    backend: str = "torch",
) -> Tensor:
    """Gradient of the packed chain from that of ``composed``; no gradient is recorded.

    With G_0 = dA_0: ``dT_k = G_k A'_{k+1}^T`` and ``G_{k+1} = dA_{k+1} + T_k^{+T} G_k``.

    Args:
        grad_composed: ``[K, d_n]``, dtype of ``composed``; may be used as scratch.
        chain, sizes, backend: as for :func:`compose`.
        composed: what :func:`compose` gave for them.

    Returns:
        Shape and dtype of ``chain``.

    Example:
        >>> chain = torch.tensor([2.0, 0.0, 3.0, 0.0])  # 3 (2 x + 0) + 0, all sizes 1
        >>> compose_bwd(torch.tensor([[1.0], [0.0], [0.0], [0.0]]), chain,
        ...             compose(chain, (1, 1, 1)), (1, 1, 1))
        tensor([3., 0., 2., 0.])
    """
    if backend == "triton":
        chain = chain.detach().contiguous()
        run = compose_bwd_op if torch.compiler.is_compiling() else _launch_compose_bwd
        return run(grad_composed.contiguous(), chain, composed, sizes)
    dtype = chain.dtype
    chain = chain.detach().to(composed.dtype)
    hops = _blocks(chain, sizes)
    rows = [d + 1 for d in sizes[:-1]]
    levels, grads = composed.split(rows), grad_composed.split(rows)
    grad_chain = torch.empty_like(chain)
    grad_hops = _blocks(grad_chain, sizes)
    with own_precision(chain):
        for k in range(len(hops)):
            if k == len(hops) - 1:
                grad_hops[k].copy_(grads[k])
            else:
                # Zero times what is not finite is NaN: rows of zeros take part in no product.
                unused = ~grads[k].any(1, keepdim=True)
                torch.mm(grads[k], levels[k + 1][:-1].t(), out=grad_hops[k])
                grad_hops[k].masked_fill_(unused, 0)
                grads[k + 1][:-1].addmm_(hops[k].masked_fill(unused, 0).t(), grads[k])
                grads[k + 1][-1].add_(grads[k][-1])
    return grad_chain.to(dtype)
