"""Where rows lie, as every operator takes it: :class:`Layout`, and the arithmetic of pages.

    page of row x      row_start[x] // page
    level of row x     page_level[row_start[x] // page]
    elements of row x  row_start[x] ... row_start[x] + sizes[level] - 1

All rows lie in one flat tensor that is cut into pages of ``page`` elements; a page holds rows of
one size, so a row needs no level of its own. Nothing here allocates storage or moves a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "UNCLAIMED",
    "Filled",
    "FreePlaces",
    "Layout",
    "Places",
    "TakenPlaces",
    "gather_rows",
    "index_dtype",
    "page_elements",
    "place_densely",
    "row_table",
]

_PAGE = 4096
_INT32_LIMIT = 2**31 - 1

UNCLAIMED = 2**31 - 1
"""What ``Places.owner`` holds for an id that no position claims."""

Filled = Sequence[tuple[Tensor, float]]
"""Tensors whose rows start afresh, each with the value that its rows take."""


@dataclass(frozen=True)
class Layout:
    """Locations of ``N`` rows of ``n`` sizes.

    Attributes:
        row_start: int32 or int64 ``[N]``, first element of every row; -1: the id has no row.
        page_level: int8 ``[pages]``, index into ``sizes`` of a page's rows; -1: a free page.
        sizes: increasing row sizes ``d_0 < ... < d_{n-1}``.
        page: elements per page, for the Triton backend a power of two. No row crosses a page, but
            in a table of one size.
    """

    row_start: Tensor
    page_level: Tensor
    sizes: tuple[int, ...]
    page: int

    @property
    def num_rows(self) -> int:
        """``N``."""
        return self.row_start.numel()

    @property
    def flat(self) -> tuple[Tensor, Tensor, tuple[int, ...], int]:
        """``(row_start, page_level, sizes, page)``, for custom operators and the reference."""
        return self.row_start, self.page_level, self.sizes, self.page

    @property
    def page_shift(self) -> int:
        """``log2(page)``: the page of an element by a shift.

        Raises:
            ValueError: ``page`` is no power of two.
        """
        if self.page & (self.page - 1):
            raise ValueError(f"kernels take pages of a power of two, got page={self.page}")
        return self.page.bit_length() - 1

    @property
    def elements(self) -> int:
        """How many elements the pages have."""
        return self.page_level.numel() * self.page

    @property
    def dim(self) -> int:
        """The largest size, which is the width of the output."""
        return self.sizes[-1]


@dataclass(frozen=True)
class Places:
    """A layout together with stacks of the free rows and pages, which moving rows take and give.

    Attributes:
        layout: brought up to date, in place, where rows move. ``row_start`` ``[N + 1]`` and
            ``page_level`` ``[pages + 1]`` end with a sink that holds -1.
        free_rows: stacks of free row starts, one segment per level, and a sink.
        free_pages: stack of free page numbers, and a sink.
        free_count: int64 ``[n + 1]``, height of every level's stack, then of the stack of pages.
        free_base: int64 ``[n + 1]``, where every level's segment begins.
        row_size, rows_per_page: int64 ``[n]``, the sizes, and how many rows of each a page holds.
        owner: int32 ``[N]``, ``UNCLAIMED`` everywhere before a call and after it; only the Triton
            backend has one.
        moves: int64, the calls by which rows may have moved; every operator counts on.
        refused: int64, rows that found no room so far; the Triton backend counts on.
    """

    layout: Layout
    free_rows: Tensor
    free_pages: Tensor
    free_count: Tensor
    free_base: Tensor
    row_size: Tensor
    rows_per_page: Tensor
    owner: Tensor | None
    moves: Tensor
    refused: Tensor


@dataclass(frozen=True)
class TakenPlaces:
    """A layout together with a bit for each place, by which native kernels find free ones.

    Attributes:
        layout: brought up to date, in place, where rows move; with sinks, as in :class:`Places`.
        taken: int64 ``[pages, words]``, bit ``i % 64`` of word ``i // 64`` for place ``i``.
        used: int32 ``[pages]``, rows in the page.
        vacant: int8 ``[pages]``, a page's level while it has a free place; -1: free, -2: full.
        free_count: int64 ``[n + 1]``, free places of every level, then free pages.
        lowest: int64 ``[n + 1]``, no page before this one has such a place, or is free.
        moves: as in :class:`Places`.
    """

    layout: Layout
    taken: Tensor
    used: Tensor
    vacant: Tensor
    free_count: Tensor
    lowest: Tensor
    moves: Tensor


FreePlaces = Places | TakenPlaces
"""What rows that move work on; the Triton backend and torch on the former, native kernels on the
latter."""


def page_elements(sizes: Sequence[int], num_rows: int = 1 << 30) -> int:
    """Elements per page: a power of two, so that kernels find a row's page by a shift.

    The smallest that rows of every size fill to 7 / 8 at least; then as many as 4,096, but no more
    than a sixteenth of the table at its smallest size, so that a page begun for every level costs a
    small table little.

    >>> page_elements((2, 4, 8, 16, 64, 128)), page_elements((2, 4, 8, 16, 64, 128), num_rows=1000)
    (4096, 128)
    >>> page_elements((1, 3, 5, 33), num_rows=1000), page_elements((127, 2049))
    (256, 16384)
    """
    page = 1 << (max(sizes) - 1).bit_length()
    while any(8 * (page % d) > page for d in sizes):
        page *= 2
    while 2 * page <= min(_PAGE, num_rows * sizes[0] // 16):
        page *= 2
    return page


def index_dtype(numel: int) -> torch.dtype:
    """The dtype of row starts in a storage of ``numel`` elements."""
    return torch.int32 if numel <= _INT32_LIMIT else torch.int64


def place_densely(level: Tensor, sizes: Sequence[int], page: int) -> tuple[Tensor, Tensor]:
    """The densest placement of rows of the given levels, level after level.

    Args:
        level: int ``[N]`` on the CPU; -1: no row.
        sizes, page: as in :class:`Layout`.

    Returns:
        Row starts int64 ``[N]`` and page levels int8 ``[pages]``.
    """
    starts = torch.full((len(level),), -1, dtype=torch.int64, device=level.device)
    page_level: list[Tensor] = []
    pages = 0
    for k, dim in enumerate(sizes):
        per = page // dim
        mine = (level == k).nonzero()[:, 0]
        need = -(-len(mine) // per)
        slots = torch.arange(need * per, device=level.device)
        place = (pages + slots // per) * page + slots % per * dim
        starts[mine] = place[: len(mine)]
        page_level.append(torch.full((need,), k, dtype=torch.int8, device=level.device))
        pages += need
    return starts, torch.cat(page_level)


def row_table(flat: Tensor, dim: int) -> Tensor:
    """The row that begins at every element, ``[len - dim + 1, dim]``: a view that overlaps itself.

    Rows in use do not overlap, so they are read and written through it, whatever their alignment.
    """
    return flat.as_strided((flat.numel() - dim + 1, dim), (1, 1))


def gather_rows(storage: Tensor, start: Tensor, dim: int) -> Tensor:
    """``storage[start_i : start_i + dim]`` as ``[len(start), dim]``, for any alignment."""
    return row_table(storage, dim).index_select(0, start)
