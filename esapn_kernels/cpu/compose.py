"""Composition of the chain and its reverse: a product per hop; see ``ops/compose.py``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.backend import own_precision
from ..ops.chain import compute_dtype, hop_blocks

__all__ = ["compose", "compose_bwd"]


def compose(chain: Tensor, sizes: Sequence[int]) -> Tensor:
    """``[K, d_{n-1}]``: see :func:`esapn_kernels.ops.compose.compose`."""
    chain = chain.detach().to(compute_dtype(chain.dtype))
    hops = hop_blocks(chain, sizes)
    # Out of place: torch.func cannot write into memory of its own outside.
    levels = hops[-1:]
    with own_precision(chain):
        for hop in hops[-2::-1]:
            level = torch.mm(hop, levels[0][:-1])
            level[-1] += levels[0][-1]
            levels.insert(0, level)
    return torch.cat(levels) if levels else chain.new_empty(0, sizes[-1])


def compose_bwd(
    grad_composed: Tensor, chain: Tensor, composed: Tensor, sizes: Sequence[int]
) -> Tensor:
    """Shape and dtype of ``chain``: see :func:`esapn_kernels.ops.compose.compose_bwd`."""
    dtype = chain.dtype
    chain = chain.detach().to(composed.dtype)
    hops = hop_blocks(chain, sizes)
    rows = [d + 1 for d in sizes[:-1]]
    levels, grads = composed.split(rows), grad_composed.split(rows)
    grad_chain = torch.empty_like(chain)
    grad_hops = hop_blocks(grad_chain, sizes)
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
