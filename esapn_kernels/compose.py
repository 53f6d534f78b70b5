"""Composition of the chain: from ``n - 1`` hops to one affine map for every level.

The chain is affine, so carrying a row of level ``k`` to the last level is one product,

    y = M_k e + c_k,    M_k = W_{n-2} ... W_k,    M_{n-1} = I,    c_{n-1} = 0

Written row-wise and with the bias as one more input column that is always 1, hop ``k`` is the block
``T_k = [W_k | b_k]^T`` of shape ``[d_k + 1, d_{k+1}]`` and the composed map is

    A_k = T_k A'_{k+1} + [0; c_{k+1}]      A_k = [M_k | c_k]^T, shape [d_k + 1, d_n]; A' without c

``composed`` stacks A_0 ... A_{n-2}: K = sum_{k<n-1} (d_k + 1) rows of d_n numbers, 99 x 128 for the
default sizes. Every kernel reads this one operand: a row of level ``k`` is a sparse row of K
numbers, its entries at ``operand_offsets(sizes)[k]``, a 1 behind them, zeros elsewhere.

Costs ``2 sum (d_k + 1) d_{k+1} d_n`` FLOP once per weight version (0.4 MFLOP for the default
sizes), against 18,768 FLOP per row of size 2 for the chain itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["chain_numel", "compose", "compose_bwd", "compute_dtype", "operand_offsets"]


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


def _blocks(chain: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    shapes = [(a + 1, b) for a, b in zip(sizes, sizes[1:], strict=False)]
    parts = chain.split([a * b for a, b in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def compose(chain: Tensor, sizes: Sequence[int]) -> Tensor:
    """Compose the packed chain into one affine map per level; no gradient is recorded.

    Args:
        chain: packed hops, ``[sum_k (d_k + 1) d_{k+1}]``, any float dtype.
        sizes: increasing sizes ``d_1 < ... < d_n``.

    Returns:
        ``[K, d_n]``, fp32 (fp64 for an fp64 chain), blocks ``[M_k | c_k]^T`` one below the other.

    Example:
        >>> compose(torch.tensor([1.0, 2.0, 3.0, 4.0]), (1, 2))
        tensor([[1., 2.],
                [3., 4.]])
    """
    chain = chain.detach().to(compute_dtype(chain.dtype))
    hops = _blocks(chain, sizes)
    composed = chain.new_empty(operand_offsets(sizes)[-1], sizes[-1])
    levels = composed.split([d + 1 for d in sizes[:-1]])
    for k in range(len(hops) - 1, -1, -1):
        if k == len(hops) - 1:
            levels[k].copy_(hops[k])
        else:
            torch.mm(hops[k], levels[k + 1][:-1], out=levels[k])
            levels[k][-1].add_(levels[k + 1][-1])
    return composed


def compose_bwd(
    grad_composed: Tensor, chain: Tensor, composed: Tensor, sizes: Sequence[int]
) -> Tensor:
    """Gradient of the packed chain from that of ``composed``, in the dtype of ``chain``.

    ``dT_k = dA_k A'_{k+1}^T``; then ``dA'_{k+1} += T_k^T dA_k`` and ``dc_{k+1} += dc_k``, for
    k = 0, 1, ...; ``grad_composed`` is used as scratch.
    """
    dtype = chain.dtype
    chain = chain.detach().to(composed.dtype)
    hops = _blocks(chain, sizes)
    rows = [d + 1 for d in sizes[:-1]]
    levels, grads = composed.split(rows), grad_composed.split(rows)
    grad_chain = torch.empty_like(chain)
    grad_hops = _blocks(grad_chain, sizes)
    for k in range(len(hops)):
        if k == len(hops) - 1:
            grad_hops[k].copy_(grads[k])
        else:
            torch.mm(grads[k], levels[k + 1][:-1].t(), out=grad_hops[k])
            grads[k + 1][:-1].addmm_(hops[k].t(), grads[k])
            grads[k + 1][-1].add_(grads[k][-1])
    return grad_chain.to(dtype)
