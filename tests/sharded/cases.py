"""What the ranks do in the tests: every function is called on all of them."""

from __future__ import annotations

from typing import Any

import torch

from tests.sharded.beside import Pair, batches


def equal(
    optimizer: str = "adagrad",
    *,
    steps: int = 8,
    weighted: bool = False,
    mean: bool = True,
    rtol: float = 1e-5,
    atol: float = 1e-6,
    **options: Any,
) -> None:
    """Sharded tables give what whole ones do, while rows grow and shrink."""
    pair = Pair(optimizer, model={"weighted": weighted, "mean": mean}, **options)
    g = torch.Generator().manual_seed(1)
    for step in range(steps):
        resize_both(pair, g)
        data = batches(step, pair.world, weighted)
        out, expected = pair.step(data)
        torch.testing.assert_close(out, expected[pair.rank], rtol=rtol, atol=atol)
    pair.check_tables(rtol, atol)


def resize_both(pair: Pair, g: torch.Generator) -> None:
    """Some rows grow and some shrink; each rank names some of them."""
    for name, table in pair.tables.items():
        ids = torch.randint(0, table.num_embeddings, (16,), generator=g)
        whole = pair.whole.tables[name]
        for sharded, one, part in (
            (table.promote, whole.promote, ids[:12]),
            (table.demote, whole.demote, ids[12:]),
        ):
            moved, sizes = one(part), whole.sizes_of(part)
            mine = slice(pair.rank, None, pair.world)
            assert torch.equal(sharded(part[mine]), moved[mine])
            assert torch.equal(table.sizes_of(part[mine]), sizes[mine])
