"""What the host knows of an arena's counters without waiting for the device that keeps them.

The counters (free rows per level, free pages) change on the device. The host knows how they stood
when it last read them and how many rows were to move since, which bounds them:

    free pages     >= seen - ceil(r / rows of the largest size in a page) - levels
    stack heights  <= max(seen, rows in a page) + r                        r rows since

A level opens a page only when its stack is empty, so r rows open at most ``ceil(r / rows)`` pages
and one more for every other level; a page's unused rows go on a stack that was empty. Copies of the
counters arrive whenever the device gets to them and make the bounds tight again. They decide how
much is kept in reserve, never which rows move or what they hold.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Ledger", "Snapshot"]


class Snapshot:
    """The counters on their way to the host; ``rows`` to move and ``pages`` added since."""

    def __init__(self, counters: Tensor) -> None:
        cuda = counters.is_cuda
        self.values = torch.empty(
            counters.shape, dtype=counters.dtype, device="cpu", pin_memory=cuda
        )
        self.values.copy_(counters, non_blocking=True)
        self.event = torch.cuda.Event() if cuda else None
        if self.event is not None:
            self.event.record(torch.cuda.current_stream(counters.device))
        self.rows = self.pages = 0

    def arrived(self) -> bool:
        return self.event is None or self.event.query()


class Ledger:
    """Bounds of the counters ``[n + 1]``: the height of every level's stack, the free pages.

    Args:
        rows_per_page: of every level.
        counts: the counters as they are.

    Example:
        >>> ledger = Ledger([8, 2], [3, 0, 5])
        >>> ledger.worst(4)  # pages missing (none, 1 to spare), heights at most
        (-1, [12, 6])
    """

    def __init__(self, rows_per_page: Sequence[int], counts: list[int]) -> None:
        self.rows_per_page = rows_per_page
        self.see(counts)

    def see(self, counts: list[int], rows: int = 0) -> None:
        """The counters as they were ``rows`` rows ago; none: they have to be read."""
        self.counts = counts
        self.rows = rows
        self.snapshot: Snapshot | None = None

    def refresh(self, counters: Tensor, *, read: bool) -> None:
        """Take a copy that has arrived; or ``read`` the counters, as where none is known."""
        snapshot = self.snapshot
        if read or not self.counts:
            self.see(counters.tolist())
        elif snapshot is not None and snapshot.arrived():
            *heights, pages = snapshot.values.tolist()
            self.see([*heights, pages + snapshot.pages], snapshot.rows)

    def request(self, counters: Tensor) -> None:
        """Request a copy of the counters, unless one is on its way."""
        if self.snapshot is None:
            self.snapshot = Snapshot(counters)

    def worst(self, rows: int) -> tuple[int, list[int]]:
        """Pages that may be missing, and how high stacks may stand, ``rows`` rows from now."""
        rows += self.rows
        *heights, pages = self.counts
        opened = -(-rows // min(self.rows_per_page)) + len(heights)
        bounds = zip(heights, self.rows_per_page, strict=True)
        return opened - pages, [max(height, per) + rows for height, per in bounds]

    def promise(self, rows: int) -> None:
        """So many more rows are to move."""
        self.rows += rows
        if self.snapshot is not None:
            self.snapshot.rows += rows

    def grow(self, pages: int) -> None:
        """So many free pages were added."""
        if self.counts:
            self.counts[-1] += pages
        if self.snapshot is not None:
            self.snapshot.pages += pages
