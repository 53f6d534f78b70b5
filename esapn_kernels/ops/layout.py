"""Where rows lie, as every operator takes it: :class:`Layout`, and the arithmetic of pages.

    page of row x      row_start[x] // page
    level of row x     page_level[row_start[x] // page]
    elements of row x  row_start[x] ... row_start[x] + sizes[level] - 1

All rows lie in one flat tensor that is cut into pages of ``page`` elements; a page holds rows of
one size, so a row needs no level of its own. Nothing here allocates storage or moves a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    "chunks",
    "count_levels",
    "gather_rows",
    "index_dtype",
    "page_elements",
    "place_densely",
    "row_table",
    "write_rows",
]

_PAGE = 4096
_INT32_LIMIT = 2**31 - 1
_CHUNK = 1 << 18

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
        kept: free pages that only rows on their way down take; the Triton backend leaves them.
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
    kept: int = 0


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


def chunks(count: int, size: int = _CHUNK) -> Iterator[slice]:
    """Slices that cover ``count`` ids: what is computed of every id takes little memory at a time.

    >>> list(chunks(5, 2))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    for begin in range(0, count, size):
        yield slice(begin, min(begin + size, count))


def count_levels(level: Tensor, levels: int) -> Tensor:
    """How many of ``level`` are of each level, int64 ``[levels]``; others are not counted.

    >>> count_levels(torch.tensor([1, -1, 1, 0]), 3)
    tensor([1, 2, 0])
    """
    counted = level.long().clamp(-1, levels).add_(1)
    return torch.bincount(counted, minlength=levels + 2)[1:-1]


def place_densely(
    level: int | Tensor,
    num_rows: int,
    sizes: Sequence[int],
    page: int,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """The densest placement of rows of the given levels, level after level.

    Args:
        level: of all rows, or an integer tensor ``[N]``; -1: no row.
        num_rows: ``N``.
        sizes, page: as in :class:`Layout`.
        device: of the result; that of ``level`` where it is a tensor.

    Returns:
        Row starts ``[N + 1]`` and page levels int8 ``[pages + 1]``, as in :class:`Layout` but for
        the sinks, -1, that they end with.

    >>> place_densely(1, 3, (2, 4), 8)
    (tensor([ 0,  4,  8, -1], dtype=torch.int32), tensor([ 1,  1, -1], dtype=torch.int8))
    """
    if isinstance(level, Tensor):
        device, counts = level.device, [0] * len(sizes)
        for part in chunks(num_rows):
            found = count_levels(level[part], len(sizes)).tolist()
            counts = [a + b for a, b in zip(counts, found, strict=True)]
    else:
        counts = [num_rows if k == level else 0 for k in range(len(sizes))]
    pages = [-(-count // (page // dim)) for count, dim in zip(counts, sizes, strict=True)]
    index = index_dtype(sum(pages) * page)
    page_level = torch.full((sum(pages) + 1,), -1, dtype=torch.int8, device=device)
    row_start = torch.empty(num_rows + 1, dtype=index, device=device)
    row_start[-1:] = -1
    levels, begin = [], 0
    for k, (dim, need) in enumerate(zip(sizes, pages, strict=True)):
        page_level[begin : begin + need] = k
        if need:
            levels.append((k, dim, begin * page))
        begin += need
    placed = dict.fromkeys(range(len(sizes)), 0)
    for part in chunks(num_rows):
        into = row_start[part]
        if isinstance(level, Tensor):
            into.fill_(-1)
            for k, dim, first in levels:
                mine = (level[part] == k).nonzero()[:, 0]
                start = torch.arange(placed[k], placed[k] + len(mine), dtype=index, device=device)
                into[mine] = _nth_start(start, dim, page).add_(first)
                placed[k] += len(mine)
        elif levels:
            torch.arange(part.start, part.stop, dtype=index, device=device, out=into)
            _nth_start(into, levels[0][1], page)
        else:
            into.fill_(-1)
    return row_start, page_level


def _nth_start(n: Tensor, dim: int, page: int) -> Tensor:
    """Where the ``n``-th of rows of ``dim`` begins in pages that hold such rows alone; in place."""
    per = page // dim
    tails = (n // per).mul_(page - per * dim) if page != per * dim else None
    n.mul_(dim)
    return n if tails is None else n.add_(tails)


def row_table(flat: Tensor, dim: int) -> Tensor:
    """The row that begins at every element, ``[len - dim + 1, dim]``: a view that overlaps itself.

    Rows in use do not overlap, so they are read and written through it, whatever their alignment.
    """
    return flat.as_strided((flat.numel() - dim + 1, dim), (1, 1))


def gather_rows(storage: Tensor, start: Tensor, dim: int) -> Tensor:
    """``storage[start_i : start_i + dim]`` as ``[len(start), dim]``, for any alignment."""
    return row_table(storage, dim).index_select(0, start)


def write_rows(storage: Tensor, start: Tensor, rows: Tensor) -> None:
    """Write ``rows``, ``[N, dim]``, to the places that begin at ``start``."""
    table = row_table(storage, rows.shape[1]) if len(rows) else storage
    for part in chunks(len(rows)):
        table.index_copy_(0, start[part].long(), rows[part])
