"""What one rank refuses all do, in one line, and go on."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    "what, own, others",
    [
        ("ids", "IndexError: id 10000 is out of range", "rank 1 refuses its batch"),
        ("key", "features ['f'] are missing", "rank 1 refuses its batch"),
        ("dtype", "must be int32 or int64, got torch.float32", "rank 1 refuses its batch"),
        ("promote", "IndexError: index out of range in self", "another rank raised"),
        ("size", "ValueError", "another rank raised"),
        ("save", "TypeError: Object of type set is not JSON serializable", "rank 1: Object of"),
    ],
)
@pytest.mark.parametrize("grows", [False, True])
def test_all_ranks_refuse(ranks, world, what, own, others, grows):
    for rank, said in enumerate(ranks(world).run("refuse", what=what, grows=grows)):
        assert (own if rank == 1 else others) in said
        assert "\n" not in said
