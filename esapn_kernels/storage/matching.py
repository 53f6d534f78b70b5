"""Rows that take the sizes and the places that they have in another arena, for averages.

    longer there                      carried up, e' = W_k e + b_k, hop by hop
    of one size                       copied
    shorter there, or no row here     the numbers of the other arena
    no row there                      none

An average is of the same ids as what it averages, and element to element only where both lie alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.backend import own_precision
from ..ops.chain import compute_dtype, full_chain, hop_blocks
from ..ops.layout import Filled, Layout, gather_rows, row_table

__all__ = ["Moving", "find_moving"]


@dataclass(frozen=True)
class Moving:
    """The rows whose place or size differs, and what they will hold.

    Attributes:
        resized: ids of the rows whose size differs.
        start: by size, where the rows will begin.
        rows: of every tensor, by size in the same order, its rows.
    """

    resized: Tensor
    start: list[Tensor]
    rows: list[list[Tensor]]

    def write(self, tensors: Sequence[Tensor]) -> None:
        """Write the rows into their places."""
        for tensor, parts in zip(tensors, self.rows, strict=True):
            for start, rows in zip(self.start, parts, strict=True):
                row_table(tensor, rows.shape[1]).index_copy_(0, start, rows)


def find_moving(
    mine: Layout, theirs: Layout, storage: Tensor, states: Filled, chain: Tensor, source: Tensor
) -> Moving:
    """Read the rows that move from the layout ``mine`` to ``theirs``; nothing is written.

    Waits for the device: for the ids, and for every two sizes between which rows move.

    Args:
        mine, theirs: of as many ids and the same sizes, on one device; with sinks, as in
            :class:`~esapn_kernels.ops.layout.Places`.
        storage: the rows as ``mine`` has them.
        states: what goes with them; fresh where a row is resized.
        chain: packed hops or tails.
        source: the rows as ``theirs`` has them, on any device.
    """
    chain = full_chain(chain, mine.sizes)
    ids = _differing(mine, theirs).nonzero()[:, 0]
    (old, was), (new, now) = (_located(ids, layout) for layout in (mine, theirs))
    found = Moving(ids[was != now], [], [[] for _ in range(1 + len(states))])
    steps = len(mine.sizes) + 1
    for step in ((was + 1) * steps + now + 1).unique().tolist():
        k, m = step // steps - 1, step % steps - 1
        if m < 0:
            continue
        at = ((was == k) & (now == m)).nonzero()[:, 0]
        dim = mine.sizes[m]
        if 0 <= k <= m:
            rows = _carry_up(gather_rows(storage, old[at], mine.sizes[k]), chain, mine.sizes, k, m)
        else:
            rows = gather_rows(source, new[at].to(source.device), dim).to(storage)
        found.start.append(new[at])
        found.rows[0].append(rows)
        for (state, fresh), parts in zip(states, found.rows[1:], strict=True):
            fresh_rows = state.new_full((len(at), dim), fresh)
            parts.append(gather_rows(state, old[at], dim) if k == m else fresh_rows)
    return found


def _carry_up(rows: Tensor, chain: Tensor, sizes: Sequence[int], level: int, target: int) -> Tensor:
    """``rows`` of ``level`` at the size of ``target``, rounded once.

    >>> _carry_up(torch.tensor([[3.0]]), torch.tensor([1.0, 2.0, 0.0, 5.0]), (1, 2), 0, 1)
    tensor([[ 3., 11.]])
    """
    dtype = compute_dtype(rows.dtype)
    carried = rows.to(dtype)
    with own_precision(rows):
        for hop in hop_blocks(chain, sizes)[level:target]:
            carried = torch.addmm(hop[-1].to(dtype), carried, hop[:-1].to(dtype))
    return carried.to(rows.dtype)


def _differing(mine: Layout, theirs: Layout) -> Tensor:
    """Bool ``[N]``: whether a row lies elsewhere or is of another size."""
    differs = mine.row_start != theirs.row_start
    pages = min(len(mine.page_level), len(theirs.page_level))
    other = mine.page_level[:pages] != theirs.page_level[:pages]
    # Pages that were free held no row: most calls need no more than starts.
    other &= mine.page_level[:pages] >= 0
    if other.any():
        page = (mine.row_start // mine.page).clamp(max=pages - 1)
        differs |= other[page] & (mine.row_start >= 0)
    return differs


def _located(ids: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Where the rows of ``ids`` begin, and their levels; -1 twice without a row."""
    start = layout.row_start[ids].long()
    return start, layout.page_level[start // layout.page].long()
