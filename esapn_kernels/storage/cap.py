"""How many pages a table may have whose bytes are capped."""

from __future__ import annotations

from collections.abc import Sequence

from ..ops.layout import index_dtype

__all__ = ["most_pages", "pages_within", "table_bytes"]


def table_bytes(num_rows: int, sizes: Sequence[int], page: int, pages: int, itemsize: int) -> int:
    """Bytes of an arena's storage, of ``itemsize`` bytes a number, and of its locations.

    >>> table_bytes(1000, (2, 4), 128, 16, 4)  # rows; starts, levels of pages, sizes, moves
    12237
    """
    storage, starts = pages * page * itemsize, (num_rows + 1) * index_dtype(pages * page).itemsize
    return storage + starts + (pages + 1) + 8 * len(sizes) + 8


def pages_within(budget: int, num_rows: int, sizes: Sequence[int], page: int, itemsize: int) -> int:
    """The most pages with ``table_bytes(...) <= budget``; -1: not even none of them.

    >>> pages_within(12237, 1000, (2, 4), 128, 4), pages_within(12236, 1000, (2, 4), 128, 4)
    (16, 15)
    """
    low, high = -1, max(budget, 0) // (page * itemsize) + 1
    while high - low > 1:
        middle = (low + high) // 2
        fits = table_bytes(num_rows, sizes, page, middle, itemsize) <= budget
        low, high = (middle, high) if fits else (low, middle)
    return low


def most_pages(num_rows: int, sizes: Sequence[int], page: int) -> int:
    """Pages that any sequence of calls can use at most: as if each size had all rows in turn.

    A level takes a page only when its own are full, and one row alone keeps a page.

    >>> most_pages(1000, (2, 4), 128)
    48
    """
    return sum(-(-num_rows // (page // size)) for size in sizes)
