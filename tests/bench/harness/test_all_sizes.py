"""The all-sizes baseline: promoted rows, selection, and growth by one size a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness.all_sizes import AllSizesSearch, AllSizesSide

from esapn.config import SearchConfig
from esapn.data.load import load_ratings
from esapn.data.stream import build_stream


@pytest.fixture(params=[True, False], ids=["lean", "full"])
def side(request) -> Any:
    """Six IDs at sizes 1, 1, 2, 2, 4, 4 of (1, 2, 4)."""
    side = AllSizesSide(6, SearchConfig(sizes=(1, 2, 4)), lean=request.param)
    side.level.copy_(torch.tensor([0, 0, 1, 1, 2, 2]))
    return side


def carried(side: Any, ids: torch.Tensor) -> torch.Tensor:
    """y(x) of every id: its row at its own size, hop by hop to the largest."""
    out = []
    for index in ids.tolist():
        level = int(side.level[index])
        row = side.tables[level].weight[index]
        for hop in list(side.hops)[level:]:
            row = hop(row)
        out.append(row)
    return torch.stack(out)


def test_promoted_rows_keep_the_output(side):
    everyone, moved = torch.arange(6), torch.tensor([3, 0])
    before, level = carried(side, everyone), side.level.clone()
    side.write_promoted(moved)
    assert torch.equal(side.level, level) and torch.equal(carried(side, everyone), before)
    side.level[moved] += 1
    torch.testing.assert_close(carried(side, everyone), before, atol=1e-6, rtol=1e-5)
    for index in moved.tolist():  # the row written is W e + b of the one before
        k = int(side.level[index]) - 1
        expected = side.hops[k](side.tables[k].weight[index])
        torch.testing.assert_close(side.tables[k + 1].weight[index], expected)
    side.write_promoted(torch.tensor([], dtype=torch.int64))


def test_forward_selects_each_row_at_its_own_size(side):
    """Statistics over the selected rows (lean), or for every size over all rows (full)."""
    ids = torch.tensor([0, 5, 2, 2, 4, 1])

    def norm(x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()

    if side.lean:
        expected = torch.tanh(norm(carried(side, ids)))
    else:
        own, expected = side.level[ids].tolist(), torch.empty(len(ids), 4)
        for level in range(3):
            h = side.tables[level](ids)
            for hop in list(side.hops)[level:]:
                h = hop(h)
            mine = [row for row, k in enumerate(own) if k == level]
            expected[mine] = torch.tanh(norm(h))[mine]
    torch.testing.assert_close(side(ids, side.level[ids]), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("lean", [True, False])
def test_all_sizes_search_grows_rows_one_size_a_batch(lean):
    stream = build_stream(load_ratings("synthetic", events=1_000), batch_size=100)
    config = SearchConfig(sizes=(1, 2, 4), batch_size=100, hidden=8, max_frequency=16)
    search = AllSizesSearch(config, stream, lean)
    level = {side.name: side.tables.level.clone() for side in search.sides}
    for index in range(len(stream.bounds)):
        search.step()
        for name, tables, *_ in search.sides:
            grown = tables.level - level[name]
            assert set(grown.tolist()) <= {0, 1} and int(tables.level.max()) <= 2
            absent = torch.ones(len(grown), dtype=torch.bool)
            absent[getattr(stream.batch(index), name)] = False
            assert grown[absent].eq(0).all()
            level[name] = tables.level.clone()
    assert all(int(counts.max()) == 2 for counts in level.values())
    assert search.measures.seen == 1_000
    assert all(value.isfinite().all() for value in search.measures.buffers())
