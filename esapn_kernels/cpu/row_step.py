"""Gradients that lookups collected, summed by id and put into the optimizers' rules: torch calls.

The summing runs on any device and waits for none; it is that of the Triton backend, too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.layout import Layout, row_table
from ..ops.update import CollectedRows, Update
from .lookup import by_level
from .update import update_rows

__all__ = ["step_rows", "sum_rows"]


def sum_rows(rows: CollectedRows, dim: int) -> CollectedRows:
    """The gradients of equal ids added up, in their order; as many places, -1 behind the last id.

    Args:
        rows: of full width.
        dim: the largest size.

    Example:
        >>> values = torch.tensor([1.0, 2.0, 30.0, 40.0, 5.0, 0.0])
        >>> level = torch.tensor([1, 1, 0], dtype=torch.int8)
        >>> ids = torch.tensor([7, 7, 3])
        >>> rows = CollectedRows(ids, level, torch.arange(3) * 2, values, True)
        >>> summed = sum_rows(rows, 2)
        >>> summed.ids, summed.values
        (tensor([ 3,  7, -1]), tensor([ 5.,  0., 31., 42.,  0.,  0.]))
    """
    count = rows.ids.numel()
    key, order = rows.ids.sort(stable=True)
    first = torch.ones_like(key, dtype=torch.bool)
    first[1:] = key[1:] != key[:-1]
    # The others write behind the end.
    run = torch.where(first, first.cumsum(0) - 1, count)
    position = torch.arange(count, device=key.device)
    begin = key.new_full((count + 1,), count).scatter_(0, run, position)
    ids = key.new_full((count + 1,), -1).scatter_(0, run, key)[:count]
    level = rows.level.new_zeros(count + 1).scatter_(0, run, rows.level[order])[:count]
    values = F.embedding_bag(order, rows.values.view(count, dim), begin[:count], mode="sum")
    return CollectedRows(ids, level, rows.place, values.view(-1), True)


def step_rows(rows: CollectedRows, storage: Tensor, layout: Layout, update: Update) -> None:
    """Step every row of ``rows`` by its gradient and move ``update``'s clock on.

    Args:
        rows: distinct ids, but for -1, of the sizes that rows have in ``layout``.
        storage: the rows, stepped in place.
        layout: where they lie.
        update: the rule and its state.
    """
    update.tick()
    for k, at in by_level(torch.where(rows.ids >= 0, rows.level, -1), len(layout.sizes)):
        ids = rows.ids[at]
        grad = row_table(rows.values, layout.sizes[k]).index_select(0, rows.place[at])
        update_rows(update, storage, layout.row_start[ids].long(), ids, grad)
