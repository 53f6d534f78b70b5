"""How the hops are packed: the chain's blocks, and the blocks of its composition.

    chain     one block T_k = [W_k | b_k]^T of shape [d_k + 1, d_{k+1}] per hop,  k = 0 ... n - 2
    composed  one block A_k = [M_k | c_k]^T of shape [d_k + 1, D] per level below the last

``D = d_{n-1}`` is the largest size. ``W_k`` and ``b_k`` carry a row of level ``k`` to level
``k + 1``, ``M_k`` and ``c_k`` to the last one; ``ops.compose`` makes the second from the first.

Hops that keep a row's numbers and learn only the appended ones are packed without their fixed part,

    e' = [g e; B_k e + b_k]      g = sqrt(d_{k+1} / d_k),   B_k in R^{(d_{k+1} - d_k) x d_k}
    tails     one block [B_k | b_k]^T of shape [d_k + 1, d_{k+1} - d_k] per hop

one behind the other. Tails are always fewer numbers than the chain that they stand for, so the
length says which of the two is given, and both go by the name ``chain``: :func:`full_chain` gives
the hops themselves. ``g`` is rounded to the dtype of the tails.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from .backend import is_capturing
from .checks import is_eager

__all__ = [
    "chain_numel",
    "compute_dtype",
    "draw_hops",
    "expand_tails",
    "full_chain",
    "gather_tails",
    "hop_blocks",
    "is_tails",
    "operand_offsets",
    "split_chain",
    "tails_numel",
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


def tails_numel(sizes: Sequence[int]) -> int:
    """Numbers in packed tails, ``sum_k (d_k + 1) (d_{k+1} - d_k)``.

    >>> tails_numel((2, 4, 8, 16, 64, 128))
    5074
    """
    return sum((a + 1) * (b - a) for a, b in zip(sizes, sizes[1:], strict=False))


def is_tails(chain: Tensor, sizes: Sequence[int]) -> bool:
    """Whether ``chain`` holds tails, by its length.

    >>> is_tails(torch.zeros(2), (1, 2)), is_tails(torch.zeros(4), (1, 2))
    (True, False)
    """
    return chain.numel() != chain_numel(sizes) and chain.numel() == tails_numel(sizes)


def full_chain(chain: Tensor, sizes: Sequence[int]) -> Tensor:
    """``chain`` itself, or the hops whose tails it holds (:func:`expand_tails`)."""
    return expand_tails(chain, sizes) if is_tails(chain, sizes) else chain


def expand_tails(tails: Tensor, sizes: Sequence[int]) -> Tensor:
    """The packed chain whose hops are ``W_k = [g I; B_k]``, ``b_k = [0; b_k]``. Differentiable.

    >>> expand_tails(torch.tensor([3.0, 5.0, 7.0, 9.0, 11.0, 13.0]), (1, 4)).view(2, 4)
    tensor([[ 2.,  3.,  5.,  7.],
            [ 0.,  9., 11., 13.]])
    """
    if is_eager() and not is_capturing(tails):
        # One write; what was made while other code traces or records would not outlive it.
        base, places = _frame(tuple(sizes), tails.dtype, tails.device)
        return base.scatter(0, places, tails)
    blocks = []
    for (d, wide), part in zip(_steps(sizes), tails.split(_tails_of_hops(sizes)), strict=True):
        head = torch.eye(d + 1, d, dtype=tails.dtype, device=tails.device) * math.sqrt(wide / d)
        blocks.append(torch.cat([head, part.reshape(d + 1, wide - d)], 1).reshape(-1))
    return torch.cat(blocks)


def gather_tails(chain: Tensor, sizes: Sequence[int]) -> Tensor:
    """The tails' numbers of a packed chain: of gradients, the reverse of :func:`expand_tails`.

    >>> gather_tails(torch.arange(8.0), (1, 4))
    tensor([1., 2., 3., 5., 6., 7.])
    """
    if is_eager() and not is_capturing(chain):
        return chain.index_select(0, _frame(tuple(sizes), chain.dtype, chain.device)[1])
    blocks = zip(hop_blocks(chain, sizes), sizes, strict=False)
    return torch.cat([block[:, d:].reshape(-1) for block, d in blocks])


def _steps(sizes: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(sizes, sizes[1:], strict=False))


def _tails_of_hops(sizes: Sequence[int]) -> list[int]:
    return [(d + 1) * (wide - d) for d, wide in _steps(sizes)]


@lru_cache(64)
@torch.inference_mode(False)
def _frame(
    sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The chain of zero tails, and where in it tails stand. Not to be written to."""
    base = torch.zeros(chain_numel(sizes), dtype=dtype, device=device)
    for (d, wide), block in zip(_steps(sizes), hop_blocks(base, sizes), strict=True):
        block.diagonal().fill_(math.sqrt(wide / d))
    every = torch.arange(base.numel(), device=device)
    parts = zip(hop_blocks(every, sizes), sizes, strict=False)
    return base, torch.cat([block[:, d:].reshape(-1) for block, d in parts])


def hop_blocks(chain: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Views ``T_k`` of the packed chain, ``[d_k + 1, d_{k+1}]``: ``W_k`` transposed, then ``b_k``.

    Of a full chain: see :func:`full_chain`.

    >>> [tuple(block.shape) for block in hop_blocks(torch.zeros(chain_numel((2, 4, 8))), (2, 4, 8))]
    [(3, 4), (5, 8)]
    """
    shapes = [(a + 1, b) for a, b in zip(sizes, sizes[1:], strict=False)]
    parts = chain.split([a * b for a, b in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def split_chain(chain: Tensor, sizes: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """``(W_k, b_k)`` of all hops, shapes ``[d_{k+1}, d_k]`` and ``[d_{k+1}]``.

    Views of the packed chain; of tails, views of what they are expanded to.

    >>> (w, b), = split_chain(torch.tensor([1.0, 2.0, 3.0, 4.0]), (1, 2))
    >>> w.tolist(), b.tolist()
    ([[1.0], [2.0]], [3.0, 4.0])
    """
    return [(block[:-1].t(), block[-1]) for block in hop_blocks(full_chain(chain, sizes), sizes)]


@torch.no_grad()
def draw_hops(chain: Tensor, sizes: Sequence[int], init: str) -> None:
    """Fill ``chain`` with hops of the kind ``init``, from torch's generator.

        isometric  W_k^T W_k = (d_{k+1} / d_k) I,  b_k = 0
        padded     W_k = sqrt(d_{k+1} / d_k) [I; 0],  b_k = 0
        linear     W_k, b_k uniform in +-1/sqrt(d_k), as nn.Linear
        tails      B_k = 0, b_k = 0: the hops of padded, packed as tails

    Raises:
        ValueError: ``chain`` is not as long as hops of this kind.

    >>> chain = torch.empty(chain_numel((1, 4)))
    >>> draw_hops(chain, (1, 4), "padded")
    >>> chain.tolist()
    [2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    """
    if is_tails(chain, sizes) != (init == "tails"):
        raise ValueError(f"the hops are not of the kind {init}: build a module with init={init!r}")
    if init == "tails":
        chain.zero_()
        return
    for weight, bias in split_chain(chain, sizes):
        d_out, d_in = weight.shape
        if init == "linear":
            bound = 1 / math.sqrt(d_in)
            weight.uniform_(-bound, bound)
            bias.uniform_(-bound, bound)
            continue
        gain = math.sqrt(d_out / d_in)
        if init == "isometric":
            columns = torch.empty(d_out, d_in, device=weight.device)
            weight.copy_(nn.init.orthogonal_(columns, gain=gain))
        else:
            weight.zero_().diagonal().fill_(gain)
        bias.zero_()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Products and sums run in fp32, in fp64 for fp64 rows."""
    return torch.float64 if dtype == torch.float64 else torch.float32
