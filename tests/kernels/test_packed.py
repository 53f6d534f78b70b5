"""Rows one behind the other, and back into an arena that lies otherwise."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from esapn_kernels import ResizableEmbedding
from esapn_kernels.storage.packed import pack, unpack

SIZES = (2, 4, 8, 16)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.randoms(use_true_random=False))
def test_rows_go_from_one_arena_to_another(levels, random):
    """In any order of ids, and of part of them; the others stay."""
    level = torch.tensor(levels)
    table = ResizableEmbedding(len(levels), sizes=SIZES, initial_size=torch.tensor(SIZES)[level])
    ids = torch.tensor(random.sample(range(len(levels)), random.randint(0, len(levels))))
    ids = ids.long()
    packed = pack(table.arena, table.arena.storage.detach(), ids)
    rows = [table.arena.read(i) for i in ids.tolist()]
    assert torch.equal(packed, torch.cat([*rows, packed[:0]]))

    # The same sizes, reached by moves: rows lie elsewhere.
    other = ResizableEmbedding(len(levels), sizes=SIZES)
    for size in SIZES[1:]:
        other.resize((level >= SIZES.index(size)).nonzero()[:, 0], size)
    before = [other.arena.read(i) for i in range(len(levels))]
    unpack(other.arena, packed, other.arena.storage.data, ids)
    for i in range(len(levels)):
        expected = table.arena.read(i) if i in ids.tolist() else before[i]
        assert torch.equal(other.arena.read(i), expected)


def test_an_arena_takes_levels():
    """As a checkpoint that has them, with no fewer pages than it has."""
    level = torch.tensor([3, 0, 1, 3, 2])
    table = ResizableEmbedding(5, sizes=SIZES, budget=8192)
    storage, pages = table.arena.storage, table.arena.page_level.numel()
    table.arena.load_state_dict(table.arena.state_at(level))
    assert table.arena.storage is storage
    assert table.arena.page_level.numel() == pages
    assert table.sizes_of().tolist() == [16, 2, 4, 16, 8]
    assert not table.arena.storage.any()
