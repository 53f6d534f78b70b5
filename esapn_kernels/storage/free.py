"""Which rows and pages of an arena are free, as stacks on the device: for Triton, and for torch.

    rows     |level 0: 6 4 2 0 . .|level 1: 40 32 .|...|sink|    starts of free rows, lowest on top
    base      0                    6                             where every level's segment begins
    pages    |9 8 7 . . .|sink|                                  numbers of free pages
    count    [4, 2, ..., 3]                                      heights: of every level, of pages

All of it follows from where the rows lie, so it is derived when rows are first to move and no
checkpoint holds it. Free are the places of a level's pages in which no row starts, and the pages of
level -1. Rows and pages are taken from the tops by prefix sums, on the device (``ops.resize``). The
places of a page whose rows have all gone stay on their level's stack until ``release``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.layout import UNCLAIMED, Layout, Places, chunks
from .ledger import Ledger

__all__ = ["FreeLists"]

_SLOTS = 1 << 18
"""Places that are looked at together."""


class FreeLists:
    """The free rows and pages of a layout.

    Args:
        row_start, page_level: where the rows lie, with their sinks. Reads the device, once.
        sizes, page: as in :class:`~esapn_kernels.ops.layout.Layout`.

    Attributes:
        rows: stacks of free row starts, one segment per level, and a sink.
        pages: stack of free page numbers, and a sink.
        count: int64 ``[n + 1]``: height of every level's stack, then of the page stack.
        base: int64 ``[n + 1]``: where every level's segment begins.
        room: length of every level's segment.
        owner: int32 ``[N]``, scratch of the Triton backend, once it has moved rows.
        ledger: what the host knows of ``count``.
        given: rows that were given back since the last :meth:`release`, at most.
    """

    def __init__(
        self, row_start: Tensor, page_level: Tensor, sizes: Sequence[int], page: int
    ) -> None:
        self.sizes, self.page = tuple(sizes), page
        self._per = [page // d for d in sizes]
        taken = self._taken(row_start, page_level)
        stacks = [
            self._places(k, taken, (page_level[:-1] == k).nonzero()[:, 0].flip(0), row_start.dtype)
            for k in range(len(sizes))
        ]
        del taken
        pages = (page_level[:-1] < 0).nonzero()[:, 0].flip(0)
        self.rows = row_start.new_zeros(1)
        # The stack of pages holds all of them, should they become free.
        self.pages = page_level.new_zeros(page_level.shape, dtype=torch.int32)
        self.pages[: len(pages)] = pages
        # A level's stack holds at least a page of rows: the leftover of the page in use.
        self.lay([max(len(rows), per) for rows, per in zip(stacks, self._per, strict=True)], stacks)
        counts = [*(len(rows) for rows in stacks), len(pages)]
        self.count = _upload(counts, row_start.device)
        self.row_size = _upload(self.sizes, row_start.device)
        self.rows_per_page = _upload(self._per, row_start.device)
        self.owner: Tensor | None = None
        self.ledger = Ledger(self._per, counts)
        self.given = 0

    def _taken(self, row_start: Tensor, page_level: Tensor) -> Tensor:
        """Whether a row lies there: bool, as many for every page as rows of the first size fit."""
        most, device = self._per[0], row_start.device
        dims = torch.tensor(self.sizes, device=device)
        # One more, for ids without a row.
        taken = torch.zeros((len(page_level) - 1) * most + 1, dtype=torch.bool, device=device)
        for part in chunks(len(row_start) - 1):
            start = row_start[part].long()
            level = page_level[start // self.page]  # no row: -1, the sink, which holds -1
            slot = start % self.page // dims[level.clamp(min=0).long()]
            place = torch.where(level >= 0, start // self.page * most + slot, len(taken) - 1)
            taken.index_fill_(0, place, True)
        return taken[:-1].view(-1, most)

    def _places(self, k: int, taken: Tensor, pages: Tensor, index: torch.dtype) -> Tensor:
        """Free starts in the ``pages`` of level ``k``, of falling numbers; lowest last."""
        per, dim = self._per[k], self.sizes[k]
        found = [pages.new_empty(0, dtype=index)]
        for part in chunks(len(pages), max(_SLOTS // per, 1)):
            free = (~taken[pages[part], :per]).flip(1).nonzero()
            start = pages[part][free[:, 0]] * self.page + (per - 1 - free[:, 1]) * dim
            found.append(start.to(index))
        return torch.cat(found)

    def stacks(self) -> list[Tensor]:
        """Every level's stack, then that of the pages; what is taken first stands last."""
        *heights, pages = self.count.tolist()
        levels = zip(self.rows[:-1].split(self.room), heights, strict=True)
        return [*(stack[:height] for stack, height in levels), self.pages[:pages]]

    def reorder(self, stacks: Sequence[Tensor]) -> None:
        """Take the order of ``stacks``, which another arena of the same layout gave.

        Raises:
            ValueError: other rows or pages are free; nothing is changed.
        """
        present = self.stacks()
        if len(stacks) != len(present) or any(
            not torch.equal(mine.sort()[0], given.to(mine).sort()[0])
            for mine, given in zip(present, stacks, strict=True)
        ):
            raise ValueError("the order is of free rows and pages that are not free here")
        for mine, given in zip(present, stacks, strict=True):
            mine.copy_(given)

    def at(
        self,
        layout: Layout,
        owner: Tensor | None,
        moves: Tensor,
        refused: Tensor,
        kept: int = 0,
    ) -> Places:
        """What rows that move on ``layout`` work on; only the Triton backend has an ``owner``."""
        return Places(
            layout,
            self.rows,
            self.pages,
            self.count,
            self.base,
            self.row_size,
            self.rows_per_page,
            owner,
            moves,
            refused,
            kept,
        )

    def new_owner(self, num_rows: int) -> Tensor:
        """Scratch of the Triton backend for ``num_rows`` ids, all unclaimed."""
        device = self.rows.device
        return torch.full((num_rows,), UNCLAIMED, dtype=torch.int32, device=device)

    def bytes(self) -> int:
        """Bytes allocated."""
        held = [self.rows, self.pages, self.count, self.base, self.row_size, self.rows_per_page]
        if self.owner is not None:
            held.append(self.owner)
        return sum(t.untyped_storage().nbytes() for t in held)

    def missing(self, taken: Sequence[int]) -> int:
        """Pages missing for so many rows of every level; below 0 where some are left. Reads."""
        *free, pages = self.count.tolist()
        levels = zip(taken, free, self._per, strict=True)
        return sum(-(-max(take - left, 0) // per) for take, left, per in levels) - pages

    def release(self, page_level: Tensor) -> None:
        """Pages whose places are all free become free pages. The host does not wait."""
        self.given = 0
        device, sink = self.rows.device, page_level.numel() - 1
        number = torch.arange(sink + 1, dtype=torch.int32, device=device)
        for k, stack in enumerate(self.rows[:-1].split(self.room)):
            held = torch.arange(len(stack), device=device) < self.count[k]
            page = torch.where(held, stack // self.page, sink).long()
            places = torch.zeros_like(number).index_add_(0, page, torch.ones_like(page).int())
            empty = places == self._per[k]
            empty[-1] = False
            stays = held & ~empty[page]
            # What is on no stack any more goes to the entry behind.
            to = torch.where(stays, stays.cumsum(0) - 1, len(stack))
            kept = stack.new_zeros(len(stack) + 1).index_copy_(0, to, stack)
            stack.copy_(kept[:-1])
            to = torch.where(empty, self.count[-1] + empty.cumsum(0) - 1, sink)
            self.pages.index_copy_(0, to, number)
            page_level.masked_fill_(empty, -1)
            freed = empty.sum()
            self.count[k] -= freed * self._per[k]
            self.count[-1] += freed

    def lower(self, start: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """Give the rows ``(start, level)`` free places before them, the last rows the first places.

        Returns:
            Positions in ``start`` of the rows that go, and where they go, int64. Reads the device.
        """
        positions, places = [], []
        stacks = zip(self.rows[:-1].split(self.room), self.count[:-1].tolist(), strict=True)
        for k, (stack, height) in enumerate(stacks):
            mine = (level == k).nonzero()[:, 0]
            free = stack[:height].sort().values
            begins, order = start[mine].to(free).sort(descending=True)
            n = min(height, len(mine))
            go = int((free[:n] < begins[:n]).sum())
            positions.append(mine[order[:go]])
            places.append(free[:go].long())
            stack[:height] = torch.cat([free[go:], begins[:go]]).sort(descending=True).values
        return torch.cat(positions), torch.cat(places)

    def with_pages(self, first: int, pages: int, index: torch.dtype) -> tuple[Tensor, Tensor]:
        """``rows`` in ``index``, ``pages`` with ``first``, ... as well, which are taken last."""
        # Below the old ones, which are copied with what lies above their top: the height of the
        # stack is not read.
        fresh = torch.arange(
            first + pages - 1, first - 1, -1, dtype=torch.int32, device=self.pages.device
        )
        return self.rows.to(index), torch.cat([fresh, self.pages])

    def add_pages(self, pages: int, grown: Sequence[Tensor]) -> None:
        """Take what :meth:`with_pages` gave for so many pages."""
        self.rows, self.pages = grown
        self.count[-1] += pages
        self.ledger.grow(pages)

    def reach(self, heights: Sequence[int]) -> None:
        """Make room for stacks of rows as high as ``heights``."""
        if all(h <= r for h, r in zip(heights, self.room, strict=True)):
            return
        room = [r if h <= r else h + h // 2 for h, r in zip(heights, self.room, strict=True)]
        # Whole segments: the heights of their stacks are not read.
        self.lay(room, self.rows[:-1].split(self.room))

    def lay(self, room: Sequence[int], stacks: Sequence[Tensor]) -> None:
        """Segments of these lengths, each with a stack at its bottom."""
        base = [0]
        for r in room:
            base.append(base[-1] + r)
        rows = self.rows.new_zeros(base[-1] + 1)
        for begin, stack in zip(base, stacks, strict=False):
            rows[begin : begin + len(stack)] = stack
        self.rows = rows
        self.base = _upload(base, rows.device)
        self.room = list(room)


def _upload(values: Sequence[int], device: torch.device) -> Tensor:
    """``torch.tensor(values, device=device)`` that does not wait for the device."""
    pinned = torch.tensor(values, device="cpu", pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)
