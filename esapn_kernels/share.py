"""A budget of bytes for several tables together."""

from __future__ import annotations

import math
from collections.abc import Mapping

from .budget import budget_bytes
from .module import ResizableEmbedding
from .storage.arena import Arena
from .storage.cap import most_pages, table_bytes

__all__ = ["share_budget", "shares"]


def share_budget(tables: Mapping[str, ResizableEmbedding], budget: int | str) -> None:
    """Give every table a budget of its own, so that all together take ``budget`` at most.

    A table gets what its rows take now, and of the rest a part in proportion to the square root of
    its rows, as far as its rows at the largest size take it, and then as far as holes between rows
    that move could: what ``d = s sqrt(count)`` takes of tables that are looked up
    equally often, with one ``s`` for all.

    Args:
        tables: by name; those of one size get what they take, and one under two names counts once.
        budget: bytes, a text as ``"64 MB"``, or a share of all the plain tables as ``"3%"``.

    Raises:
        ValueError: it does not hold the rows as they are, or is no budget, or a table has
            ``max_elements``; nothing is changed.
        RuntimeError: rows are shared with other processes, or computed; nothing is changed.

    Example:
        >>> from esapn_kernels import ResizableEmbedding
        >>> tables = {"user": ResizableEmbedding(9000, 16), "item": ResizableEmbedding(1000, 16)}
        >>> share_budget(tables, "50%")
        >>> sum(table.budget for table in tables.values()) <= 10_000 * 16 * 4 // 2
        True
    """
    budgets = shares(tables, budget)
    for name, most in budgets.items():
        tables[name].check_budget(most)
    for name, most in budgets.items():
        tables[name].set_budget(most)


def shares(tables: Mapping[str, ResizableEmbedding], budget: int | str) -> dict[str, int]:
    """The bytes that :func:`share_budget` gives, of tables on the meta device too.

    Raises:
        ValueError: they do not hold the rows as they are, or are no budget.
    """
    names = {table: name for name, table in tables.items()}
    tables = {name: table for table, name in names.items()}
    plain = {
        name: table.arena.num_rows * table.sizes[-1] * table.arena.storage.element_size()
        for name, table in tables.items()
    }
    least = {name: table.least_budget for name, table in tables.items()}
    total, needed = budget_bytes(budget, sum(plain.values())), sum(least.values())
    if total < needed:
        raise ValueError(
            f"a budget of {total} bytes does not hold the rows as they are: {needed} bytes do"
        )
    rest = min(total - needed, 1 << 62)  # beyond what a float holds
    budgets = dict(least)
    for holes in (False, True):
        lacking = {
            name: max(_most_bytes(table, plain[name], holes) - budgets[name], 0)
            for name, table in tables.items()
        }
        weights = {name: math.sqrt(max(table.num_embeddings, 1)) for name, table in tables.items()}
        for name in sorted(tables, key=lambda name: lacking[name] / weights[name]):
            part = min(int(rest * weights[name] / sum(weights.values())), lacking[name])
            rest -= part
            del weights[name]
            budgets[name] += part
    # Those of one size and no row take nothing, which is no budget.
    return {name: most for name, most in budgets.items() if most}


def _most_bytes(table: ResizableEmbedding, plain: int, holes: bool) -> int:
    """What a table takes with all rows at the largest size, and a page begun for every size.

    Or the most that it can take at all, with the ``holes`` that any moves leave.
    """
    arena = table.arena
    if not isinstance(arena, Arena):
        return plain
    pages = -(-arena.num_rows // arena.rows_per_page[-1]) + len(table.sizes)
    if holes:
        pages = max(pages, most_pages(arena.num_rows, table.sizes, arena.page))
    itemsize = arena.storage.element_size()
    rows = table_bytes(arena.num_rows, table.sizes, arena.page, pages, itemsize)
    return rows + table.chain.nbytes
