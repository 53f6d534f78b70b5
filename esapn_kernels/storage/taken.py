"""Which places of an arena are taken, as a bit for each: free places for native kernels.

    page      |level 0, 2048 places |level 2, 512 places |free
    taken      1110 1101 ...         1111 ...             0000 ...     a bit a place
    used       1893                  512                  0            rows in the page
    vacant     0                     -2: full             -1: free     int8

A row takes the lowest free place of its level's lowest page that has one, else the first of the
lowest free page. A page whose last row leaves is free at once, for any level. Rows that come and go
so fill the front of the arena, and its back empties. All of it follows from where the rows lie: an
arena that was loaded goes on as the one that was saved would.

A free row could hold the next one's place, and cost nothing. But optimizers with weight decay,
averages and casts write to all of ``storage``, free rows too; a bit a place is 1.6 % of the
smallest row (2 numbers of 4 bytes).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.layout import Layout, TakenPlaces
from ..ops.resize import find_places

__all__ = ["TakenBits"]


class TakenBits:
    """The places of a layout, by bits.

    Args:
        layout: with the sinks of :class:`~esapn_kernels.ops.layout.Places`, on a CPU; pages without
            a row become free ones.

    Attributes:
        taken, used, vacant, count, lowest: as in :class:`~esapn_kernels.ops.layout.TakenPlaces`.
    """

    def __init__(self, layout: Layout) -> None:
        pages, levels = layout.page_level.numel() - 1, len(layout.sizes)
        self._per = [layout.page // d for d in layout.sizes]
        words = -(-self._per[0] // 64)
        self.taken = torch.empty(pages, words, dtype=torch.int64, device="cpu")
        self.used = torch.empty(pages, dtype=torch.int32, device="cpu")
        self.vacant = torch.empty(pages, dtype=torch.int8, device="cpu")
        self.count = torch.empty(levels + 1, dtype=torch.int64, device="cpu")
        self.lowest = torch.empty(levels + 1, dtype=torch.int64, device="cpu")
        find_places(self.at(layout, self.count))

    def at(self, layout: Layout, moves: Tensor) -> TakenPlaces:
        """What rows that move on ``layout`` work on."""
        return TakenPlaces(
            layout, self.taken, self.used, self.vacant, self.count, self.lowest, moves
        )

    def bytes(self) -> int:
        """Bytes allocated."""
        held = (self.taken, self.used, self.vacant, self.count, self.lowest)
        return sum(t.untyped_storage().nbytes() for t in held)

    def missing(self, taken: Sequence[int]) -> int:
        """Pages missing for so many rows of every level; below 0 where some are left."""
        *free, pages = self.count.tolist()
        levels = zip(taken, free, self._per, strict=True)
        return sum(-(-max(take - left, 0) // per) for take, left, per in levels) - pages

    def with_pages(self, first: int, pages: int, index: torch.dtype) -> list[Tensor]:
        """``taken``, ``used`` and ``vacant`` with so many free pages more."""
        return [
            torch.cat([old, old.new_full((pages, *old.shape[1:]), value)])
            for old, value in ((self.taken, 0), (self.used, 0), (self.vacant, -1))
        ]

    def add_pages(self, pages: int, grown: Sequence[Tensor]) -> None:
        """Take what :meth:`with_pages` gave for so many pages."""
        self.taken, self.used, self.vacant = grown
        self.count[-1] += pages
