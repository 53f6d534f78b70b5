"""How the hops are packed: the chain's blocks, and the blocks of its composition.

    chain     one block T_k = [W_k | b_k]^T of shape [d_k + 1, d_{k+1}] per hop,  k = 0 ... n - 2
    composed  one block A_k = [M_k | c_k]^T of shape [d_k + 1, D] per level below the last

``D = d_{n-1}`` is the largest size. ``W_k`` and ``b_k`` carry a row of level ``k`` to level
``k + 1``, ``M_k`` and ``c_k`` to the last one; ``ops.compose`` makes the second from the first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = [
    "chain_numel",
    "compute_dtype",
    "draw_hops",
    "hop_blocks",
    "operand_offsets",
    "split_chain",
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


def hop_blocks(chain: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Views ``T_k`` of the packed chain, ``[d_k + 1, d_{k+1}]``: ``W_k`` transposed, then ``b_k``.

    >>> [tuple(block.shape) for block in hop_blocks(torch.zeros(chain_numel((2, 4, 8))), (2, 4, 8))]
    [(3, 4), (5, 8)]
    """
    shapes = [(a + 1, b) for a, b in zip(sizes, sizes[1:], strict=False)]
    parts = chain.split([a * b for a, b in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def split_chain(chain: Tensor, sizes: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Views ``(W_k, b_k)`` of the packed chain, shapes ``[d_{k+1}, d_k]`` and ``[d_{k+1}]``.

    >>> (w, b), = split_chain(torch.tensor([1.0, 2.0, 3.0, 4.0]), (1, 2))
    >>> w.tolist(), b.tolist()
    ([[1.0], [2.0]], [3.0, 4.0])
    """
    return [(block[:-1].t(), block[-1]) for block in hop_blocks(chain, sizes)]


@torch.no_grad()
def draw_hops(chain: Tensor, sizes: Sequence[int], init: str) -> None:
    """Fill ``chain`` with hops of the kind ``init``, from torch's generator.

        isometric  W_k^T W_k = (d_{k+1} / d_k) I,  b_k = 0
        padded     W_k = sqrt(d_{k+1} / d_k) [I; 0],  b_k = 0
        linear     W_k, b_k uniform in +-1/sqrt(d_k), as nn.Linear

    >>> chain = torch.empty(chain_numel((1, 4)))
    >>> draw_hops(chain, (1, 4), "padded")
    >>> chain.tolist()
    [2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    """
    for weight, bias in split_chain(chain, sizes):
        d_out, d_in = weight.shape
        if init == "linear":
            bound = 1 / math.sqrt(d_in)
            weight.uniform_(-bound, bound)
            bias.uniform_(-bound, bound)
            continue
        gain = math.sqrt(d_out / d_in)
        columns = torch.empty(d_out, d_in, device=weight.device)
        if init == "isometric":
            weight.copy_(nn.init.orthogonal_(columns, gain=gain))
        else:
            weight.copy_(nn.init.eye_(columns).mul_(gain))
        bias.zero_()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Products and sums run in fp32, in fp64 for fp64 rows."""
    return torch.float64 if dtype == torch.float64 else torch.float32
