"""Rows that grow and keep what their optimizer knows of them.

A promoted row starts with fresh optimizer state. Under Adagrad that undoes its annealing: the next
step moves every number of the row by the whole learning rate again. With zero-padding hops

    e' = [g e; 0],   g = sqrt(d' / d)        dL/de_j = g dL/de'_j   (j <= d)

the sum of squared gradients of the old numbers carries over exactly, ``s'_j = s_j / g^2``, and only
the new numbers start at zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esapn_kernels import ResizableEmbedding

__all__ = ["promote_keeping"]


@torch.no_grad()
def promote_keeping(embedding: ResizableEmbedding, ids: Tensor, mask: Tensor, state: str) -> Tensor:
    """``embedding.promote`` of padded hops, the fused optimizer's ``state`` carried over.

    Args:
        embedding: with ``init="padded"`` hops as they were made, and a fused optimizer.
        ids: int64 ``[B]``, distinct where ``mask``.
        mask: bool ``[B]``.
        state: name of the state in the arena's layout, such as ``sum``.

    Returns:
        Bool ``[B]``: which rows moved.

    Example:
        >>> from esapn_kernels import optim
        >>> table = ResizableEmbedding(3, sizes=(2, 4), init="padded")
        >>> rows = optim.Adagrad(table, lr=0.1)
        >>> table(torch.tensor([1])).sum().backward()
        >>> before = rows.state[table.arena.storage]["sum"][2:4].clone()
        >>> moved = promote_keeping(table, torch.tensor([1]), torch.tensor([True]), "sum")
        >>> start = int(table.arena.row_start[1])
        >>> after = rows.state[table.arena.storage]["sum"][start : start + 4]
        >>> torch.allclose(after, torch.cat([before / 2, torch.zeros(2)]))
        True
    """
    arena = embedding.arena
    optimizer = arena.fused_optimizer
    if optimizer is None:
        raise ValueError("promote_keeping needs a fused optimizer on the embedding")
    if ids.device.type == "cpu":
        # Only rows that move: on a CPU looking is free.
        chosen = mask.nonzero()[:, 0]
        whole = torch.zeros_like(mask)
        whole[chosen] = promote_keeping_all(embedding, ids[chosen], None, state)
        return whole
    return promote_keeping_all(embedding, ids, mask, state)


def promote_keeping_all(
    embedding: ResizableEmbedding, ids: Tensor, mask: Tensor | None, state: str
) -> Tensor:
    """The same without a look at the device."""
    arena = embedding.arena
    sums = arena.fused_optimizer.state[arena.storage]  # type: ignore[union-attr]
    sizes = arena.row_size
    level = arena.level(ids)
    old = sums[state][_elements(arena.row_start[ids], embedding.embedding_dim, sums[state])]
    moved = embedding.promote(ids, mask)
    into = _elements(arena.row_start[ids], embedding.embedding_dim, sums[state])
    width = sizes[level.clamp(min=0)]
    grown = sizes[(level + 1).clamp(max=len(arena.sizes) - 1)]
    column = torch.arange(embedding.embedding_dim, device=ids.device)
    carried = moved[:, None] & (column < width[:, None])
    # Beyond what a fresh row has, so that adding is setting; the rest of the tile adds nothing.
    fresh = arena.fused_optimizer.state_per_element[state]  # type: ignore[union-attr]
    value = torch.where(carried, old * (width / grown)[:, None].to(old.dtype) - fresh, 0.0)
    sums[state].index_put_((into,), value, accumulate=True)
    return moved


def _elements(start: Tensor, width: int, flat: Tensor) -> Tensor:
    """Positions ``[B, width]`` from each row's first element on, inside ``flat``."""
    column = torch.arange(width, device=start.device)
    return (start.long()[:, None] + column).clamp(min=0, max=flat.numel() - 1)
