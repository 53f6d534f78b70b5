"""How ``ByCounts`` splits a budget over tables, and counts the ids of short ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from esapn_kernels import ResizableEmbedding
from esapn_kernels.grow import ByCounts


def test_short_tables_get_all_that_they_need():
    """A table's part goes with the root of its rows; what a short one leaves, longer ones take."""
    rows = (3, 40, 6_400, 25_600)
    model = nn.ModuleList(ResizableEmbedding(n, 16) for n in rows)
    least = [table.least_budget for table in model]
    total = sum(n * 16 * 4 for n in rows) // 4
    ByCounts(model, budget=total)
    budgets = [table.budget for table in model]
    assert total - len(rows) <= sum(budgets) <= total
    for table in model[:2]:
        ids = torch.arange(table.num_embeddings)
        for _ in range(8):  # within a budget not all rows move at once
            table.promote(ids)
            table.compact()
        assert (table.sizes_of() == 16).all()
    parts = [budget - needed for budget, needed in zip(budgets, least, strict=True)]
    assert parts[3] / parts[2] == pytest.approx(2, rel=1e-3)


@pytest.mark.parametrize("rows", [7, 900, 1_000_000])
def test_counts_are_the_same_with_and_without_sorting(rows):
    model = ResizableEmbedding(rows, sizes=(2, 4), padding_idx=1)
    growth = ByCounts(model, budget=2 * model.least_budget, every=1)
    counted = []
    growth.count = lambda name, ids, counts: counted.append((ids, counts))
    ids = torch.randint(7, (40,), generator=torch.Generator().manual_seed(0))
    growth.note("", ids)
    growth.step()
    expected = ids[ids != 1].unique(return_counts=True)
    assert len(counted) == 1
    assert all(torch.equal(a, b) for a, b in zip(counted[0], expected, strict=True))
