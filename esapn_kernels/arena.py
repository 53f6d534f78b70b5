"""One flat arena for rows of several sizes, cut into pages that each hold rows of one size.

    storage     |2 2 2 2 2 2 .|8 8 8 . . . .|4 4 4 4 . . .|. . . . . . .|     one 1-D Parameter
    page_level   0             2             1             -1                 int8, one per page
    row_start   [0, 2, 4, P, P + 8, ...]                                      int32, one per row

A row is found by its first element; its level is that of its page. Free rows of every level form a
stack, and so do free pages; rows are taken from and given back to them by prefix sums, wholly on
the device and without a host synchronisation. A page whose rows are all free can serve another
level (``reclaim``); ``compact`` closes every hole. ``storage`` keeps its identity as a Parameter
while it grows, and every tensor of its shape (gradient, optimizer state: see ``optim``) grows and
moves with it.

This is the slab allocator's idea, and that of paged KV caches, applied to embedding rows. One arena
rather than a table per size: one base pointer for the kernels, and the bytes allocated are exactly
what the report says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import companions
from .resize import fill_rows, promote_rows
from .torch_path import gather_rows

__all__ = ["Arena", "ArenaBytes", "page_elements"]

_PAGE = 4096
_INT32_LIMIT = 2**31 - 1


def page_elements(sizes: Sequence[int], num_rows: int = 1 << 30) -> int:
    """Elements per page: a common multiple of the sizes where their own is small.

    About 4,096 for a large table; a sixteenth of a small table at its smallest size, so that a page
    begun for every level costs a small table little.

    >>> page_elements((2, 4, 8, 16, 64, 128)), page_elements((2, 4, 8, 16, 64, 128), num_rows=1000)
    (4096, 128)
    >>> page_elements((1, 3, 5, 33)), page_elements((127, 512))
    (4125, 4096)
    """
    small = num_rows * sizes[0] // 16
    common = math.lcm(*sizes)
    if common <= 4 * _PAGE:
        return common * max(-(-min(_PAGE, small) // common), 1)
    # The largest rows fill a page to 7 / 8 at least, unless the table is small.
    return max(min(max(_PAGE, 8 * max(sizes)), small), max(sizes))


def _can_look(tensor: Tensor) -> bool:
    """Whether the host reads values without waiting for a device."""
    return tensor.device.type == "cpu"


@dataclass(frozen=True)
class ArenaBytes:
    """Bytes really allocated by an arena.

    ``payload``: rows in use, ``sum_x d(x) * itemsize``. ``slack``: the rest of ``storage`` (free
    rows, page tails, free pages). ``locations``: row starts, page levels, free lists and their
    counters.
    """

    payload: int
    slack: int
    locations: int

    @property
    def total(self) -> int:
        return self.payload + self.slack + self.locations


class Arena(nn.Module):
    """Rows ``0 .. num_rows - 1``, each at one of ``sizes``, in one flat Parameter.

    Args:
        num_rows: number of rows ``N``.
        sizes: increasing row sizes.
        level: initial level of every row: an int, an integer tensor ``[N]`` (-1: no row yet), or
            -1 for an empty arena.
        device, dtype: of ``storage``.

    Attributes:
        storage: Parameter ``[capacity]``; zero wherever no row has been written.
        row_start: int32 (int64 past 2^31 elements) ``[N + 1]``: first element, -1 for no row. The
            last entry is a sink for masked writes.
        page_level: int8 ``[pages + 1]``, -1 for a free page; the last entry is a sink.
        free_rows: stacks of free row starts, one segment per level, and a sink.
        free_pages: stack of free page numbers, and a sink.
        free_count: int64 ``[n + 1]``: height of every level's stack, then of the page stack.
        free_base: int64 ``[n + 1]``: where every level's segment begins.
        row_size: int64 ``[n]``: the sizes, so that a checkpoint says what its levels are.
    """

    storage: nn.Parameter
    row_start: Tensor
    page_level: Tensor
    free_rows: Tensor
    free_pages: Tensor
    free_count: Tensor
    free_base: Tensor
    row_size: Tensor
    _rows_per_page: Tensor

    def __init__(
        self,
        num_rows: int,
        sizes: Sequence[int],
        *,
        level: int | Tensor = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_rows = num_rows
        self.sizes = tuple(sizes)
        self.page = page_elements(self.sizes, num_rows)
        self.rows_per_page = [self.page // d for d in self.sizes]
        if not isinstance(level, Tensor):
            level = torch.full((num_rows,), level, dtype=torch.int8)
        starts, page_level, free = self._layout(level.cpu())
        self.storage = nn.Parameter(
            torch.zeros(len(page_level) * self.page, device=device, dtype=dtype)
        )
        index = self._index_dtype(self.storage.numel())
        sink = torch.tensor([-1])
        self._set("row_start", torch.cat([starts, sink]).to(index), device)
        self._set("page_level", torch.cat([page_level, sink.to(torch.int8)]), device)
        self._set("free_pages", torch.zeros(1, dtype=torch.int32), device)
        # A level's stack holds at least a page of rows: the leftover of the page in use.
        room = [max(len(rows), per) for rows, per in zip(free, self.rows_per_page, strict=True)]
        base = torch.tensor([0, *torch.tensor(room).cumsum(0).tolist()])
        stacks = torch.zeros(int(base[-1]) + 1, dtype=index)
        for rows, begin in zip(free, base.tolist(), strict=False):
            stacks[begin : begin + len(rows)] = rows
        self._set("free_rows", stacks, device)
        self._set("free_base", base, device)
        self._set("free_count", torch.tensor([*(len(rows) for rows in free), 0]), device)
        self._set("row_size", torch.tensor(self.sizes), device)
        rows_per_page = torch.tensor(self.rows_per_page, device=device)
        self.register_buffer("_rows_per_page", rows_per_page, persistent=False)
        self._reset_bounds()
        companions.track(self)

    def _set(self, name: str, value: Tensor, device: torch.device | str | None = None) -> None:
        self.register_buffer(name, value.to(device) if device is not None else value)

    @staticmethod
    def _index_dtype(numel: int) -> torch.dtype:
        return torch.int32 if numel <= _INT32_LIMIT else torch.int64

    def _layout(self, level: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Densest placement: row starts, page levels, and the free rows of every level."""
        starts = torch.full((len(level),), -1, dtype=torch.int64)
        page_level: list[Tensor] = []
        free: list[Tensor] = []
        pages = 0
        for k, (dim, per) in enumerate(zip(self.sizes, self.rows_per_page, strict=True)):
            mine = (level == k).nonzero()[:, 0]
            need = -(-len(mine) // per)
            slots = torch.arange(need * per)
            place = (pages + slots // per) * self.page + slots % per * dim
            starts[mine] = place[: len(mine)]
            free.append(place[len(mine) :].flip(0))
            page_level.append(torch.full((need,), k, dtype=torch.int8))
            pages += need
        return starts, torch.cat(page_level), free

    def _reset_bounds(self) -> None:
        """Forget what the host believes of the stacks: the next reservation looks."""
        self._pages_at_least = 0
        self._rows_at_most = [0] * len(self.sizes)
        self._room = [0] * len(self.sizes)

    # ---- reading ----------------------------------------------------------------------------

    @property
    def locations(self) -> tuple[Tensor, Tensor]:
        """``(row_start [N], page_level [pages])`` as the lookup takes them."""
        return self.row_start[:-1], self.page_level[:-1]

    def level(self, ids: Tensor | None = None) -> Tensor:
        """Level of every row of ``ids`` (of all rows), int64; -1 where there is no row."""
        start = self.row_start[:-1] if ids is None else self.row_start[ids]
        # No row: -1 // page is -1, the sink, which always holds -1.
        return self.page_level[start // self.page].long()

    def read(self, index: int) -> Tensor:
        """A copy of one row."""
        start = int(self.row_start[index])
        dim = self.sizes[int(self.page_level[start // self.page])]
        return self.storage.detach()[start : start + dim].clone()

    def bytes(self) -> ArenaBytes:
        """Exact bytes: the three parts sum to what the tensors' allocations hold."""
        level = self.level()
        counts = torch.bincount(level[level >= 0], minlength=len(self.sizes)).tolist()
        elements = sum(c * d for c, d in zip(counts, self.sizes, strict=True))
        payload = elements * self.storage.element_size()
        allocated = self.storage.untyped_storage().nbytes()
        locations = sum(b.untyped_storage().nbytes() for b in self.buffers(recurse=False))
        return ArenaBytes(payload, allocated - payload, locations)

    # ---- taking and giving rows --------------------------------------------------------------

    def _rank(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """Position of every entry among those of its level, and their number per level."""
        levels = torch.arange(len(self.sizes), device=level.device)
        chosen = (level[:, None] == levels).long()
        rank = (chosen.cumsum(0) - 1).gather(1, level.clamp(min=0)[:, None])[:, 0]
        return rank, chosen.sum(0)

    def reserve(self, target: Tensor, source: Tensor) -> None:
        """Make room for one :meth:`take` of levels ``target`` and one :meth:`give` of ``source``.

        The host keeps a lower bound of the free pages and an upper bound of the stacks' heights,
        and reads the real counters (the one synchronisation) only when a bound runs out.
        """
        rows = target.numel()
        pages = -(-rows // min(self.rows_per_page)) + len(self.sizes)
        if self._pages_at_least >= pages and all(
            height + rows <= room
            for height, room in zip(self._rows_at_most, self._room, strict=True)
        ):
            self._pages_at_least -= pages
            self._rows_at_most = [height + rows for height in self._rows_at_most]
            return
        pages = self._pages_for(target)
        if int(self.free_count[-1]) < pages:
            self.reclaim()
            pages = self._pages_for(target)
        missing = pages - int(self.free_count[-1])
        if missing > 0:
            # An eighth more at a time: amortised growth with at most that much slack.
            self._grow(max(missing, (self.page_level.numel() - 1) // 8))
        given = torch.bincount(source[source >= 0], minlength=len(self.sizes)).tolist()
        count = self.free_count.tolist()
        heights = [
            max(c, per) + g for c, per, g in zip(count, self.rows_per_page, given, strict=False)
        ]
        # Room for several calls more where looking costs a synchronisation, but within 1 / 64 of
        # the table: every call raises the bound of every level, even of those that take nothing.
        spare = 0 if _can_look(target) else min(8 * rows, max(self.num_rows // 64, 1024))
        self._grow_stacks([height + spare for height in heights])
        self._pages_at_least = count[-1] - pages
        self._rows_at_most = heights
        base = self.free_base.tolist()
        self._room = [b - a for a, b in zip(base, base[1:], strict=False)]

    def _pages_for(self, target: Tensor) -> int:
        """Fresh pages that rows of these levels need beyond what lies on the stacks."""
        taken = torch.bincount(target[target >= 0], minlength=len(self.sizes)).tolist()
        free = self.free_count.tolist()
        return sum(
            -(-max(t - f, 0) // per)
            for t, f, per in zip(taken, free, self.rows_per_page, strict=False)
        )

    def take(self, level: Tensor) -> Tensor:
        """Take one free row of every ``level >= 0``; returns their starts (int64, -1 elsewhere).

        Rows on the level's stack first, then rows of fresh pages, whose rest goes on the stack.
        Room must have been reserved.
        """
        rank, need = self._rank(level)
        n = len(self.sizes)
        device = level.device
        sizes, per = self.row_size, self._rows_per_page
        free, n_pages = self.free_count[:n], self.free_count[n]
        short = (need - free).clamp(min=0)
        pages = (short + per - 1) // per
        first = pages.cumsum(0) - pages

        k = level.clamp(min=0)
        on_stack = rank < free[k]
        sink = self.free_rows.numel() - 1
        stacked = self.free_rows[
            torch.where(on_stack, self.free_base[k] + free[k] - 1 - rank, sink)
        ].long()
        beyond = rank - free[k]
        entry = n_pages - 1 - first[k] - beyond.div(per[k], rounding_mode="floor")
        wanted = (level >= 0) & ~on_stack
        page = self.free_pages[torch.where(wanted, entry, self.free_pages.numel() - 1)].long()
        fresh = page * self.page + beyond.remainder(per[k]) * sizes[k]
        start = torch.where(level >= 0, torch.where(on_stack, stacked, fresh), -1)
        self.page_level[start.div(self.page, rounding_mode="floor")] = level.to(torch.int8)

        if not _can_look(level) or bool(pages.any()):
            leftover = pages * per - short
            last = self.free_pages[
                torch.where(pages > 0, n_pages - first - pages, self.free_pages.numel() - 1)
            ].long()
            slot = torch.arange(max(self.rows_per_page), device=device)
            valid = slot < leftover[:, None]
            value = (last * self.page)[:, None] + (per[:, None] - 1 - slot) * sizes[:, None]
            place = torch.where(valid, self.free_base[:n, None] + slot, sink)
            self.free_rows[place] = value.to(self.free_rows.dtype)
            self.free_count[:n] = torch.where(pages > 0, leftover, free - need)
            self.free_count[n] -= pages.sum()
        else:
            self.free_count[:n] -= need
        return start

    def give(self, start: Tensor, level: Tensor) -> None:
        """Put the rows ``(start, level)`` with ``level >= 0`` back on their level's stack."""
        rank, count = self._rank(level)
        k = level.clamp(min=0)
        sink = self.free_rows.numel() - 1
        place = torch.where(level >= 0, self.free_base[k] + self.free_count[k] + rank, sink)
        self.free_rows[place] = start.to(self.free_rows.dtype)
        self.free_count[: len(self.sizes)] += count

    def place(self, ids: Tensor, start: Tensor) -> None:
        """``row_start[ids] = start`` wherever ``start >= 0``."""
        self.row_start[torch.where(start >= 0, ids.long(), self.num_rows)] = torch.where(
            start >= 0, start, -1
        ).to(self.row_start.dtype)

    @torch.no_grad()
    def insert(self, ids: Tensor, level: int) -> None:
        """Give distinct ``ids`` that have no row a zero row of ``level``.

        Raises:
            ValueError: an id that already has a row, or an id twice; nothing is changed.
        """
        if ids.numel() != ids.unique().numel():
            raise ValueError("insert takes distinct ids")
        if bool((self.row_start[ids] >= 0).any()):
            raise ValueError("insert takes ids that have no row")
        target = torch.full((ids.numel(),), level, device=ids.device)
        self.reserve(target, torch.full_like(target, -1))
        start = self.take(target)
        self.place(ids, start)
        self.fill(start, target)

    @torch.no_grad()
    def free(self, ids: Tensor) -> None:
        """Give the rows of distinct ``ids`` back; their ids have no row afterwards.

        Raises:
            ValueError: an id without a row, or an id twice; nothing is changed.
        """
        if ids.numel() != ids.unique().numel():
            raise ValueError("free takes distinct ids")
        if bool((self.row_start[ids] < 0).any()):
            raise ValueError("free takes ids that have a row")
        level = self.level(ids)
        self.reserve(torch.full_like(level, -1), level)
        self.give(self.row_start[ids].long(), level)
        self.row_start[ids] = -1

    @torch.no_grad()
    def promote(
        self, ids: Tensor, chain: Tensor, mask: Tensor | None = None, *, backend: str = "auto"
    ) -> None:
        """Move the rows of ``ids`` (where ``mask``) one level up: ``e' = W_k e + b_k``.

        An id twice moves once; rows at the last level stay. The state of moved rows starts afresh.

        Args:
            ids: int ``[R]``, in range, with rows.
            chain: packed hops.
            mask: bool ``[R]``.
        """
        if mask is not None and _can_look(ids):
            ids, mask = ids[mask], None
        if not ids.numel():
            return
        # One decision per id, and an order that does not depend on that of ids.
        key = ids.long() if mask is None else torch.where(mask, ids.long(), self.num_rows)
        key = key.sort().values
        first = torch.ones_like(key, dtype=torch.bool)
        first[1:] = key[1:] != key[:-1]
        source = self.level(key)
        source = torch.where(first & (source < len(self.sizes) - 1), source, -1)
        if _can_look(ids):
            key, source = key[source >= 0], source[source >= 0]
            if not key.numel():
                return
        target = torch.where(source >= 0, source + 1, -1)
        self.reserve(target, source)
        old_start = self.row_start[key].long()
        start = self.take(target)
        storage = self.storage.detach()
        promote_rows(
            storage,
            chain.detach(),
            old_start,
            start,
            source,
            sizes=self.sizes,
            page=self.page,
            backend=backend,
        )
        self._reset_companions(start, target, backend)
        self.place(key, start)
        self.give(old_start, source)

    def fill(self, start: Tensor, level: Tensor) -> None:
        """Rows ``(start, level)`` become zero and their optimizer state that of a fresh row."""
        fill_rows([(self.storage.detach(), 0.0)], start, level, sizes=self.sizes)
        self._reset_companions(start, level)

    def _reset_companions(self, start: Tensor, level: Tensor, backend: str = "auto") -> None:
        """Gradient and optimizer state of the rows ``(start, level)`` become a fresh row's."""
        fresh = [(c.tensor, c.fresh) for c in companions.of(self)]
        fill_rows(fresh, start, level, sizes=self.sizes, backend=backend)

    # ---- between steps: growth, reclaiming, compaction ----------------------------------------

    def _everything(self) -> Iterator[companions.Companion]:
        """``storage`` itself, then every tensor that moves with it."""
        yield companions.Companion(self.storage.detach(), 0.0, self._replace_storage)
        yield from companions.of(self)

    def _replace_storage(self, value: Tensor) -> None:
        # A graph that is still alive (the last step's loss) holds the node that accumulates into
        # storage, and with it the old shape. Only another dtype makes autograd forget that node.
        other = torch.float64 if value.dtype == torch.float32 else torch.float32
        self.storage.data = value.new_empty(0, dtype=other)
        self.storage.data = value

    def _grow(self, pages: int) -> None:
        old = self.page_level.numel() - 1
        new = old + pages
        torch.autograd.graph.increment_version(self.storage)
        for companion in list(self._everything()):
            grown = companion.tensor.new_full((new * self.page,), companion.fresh)
            grown[: companion.tensor.numel()] = companion.tensor
            companion.replace(grown)
        index = self._index_dtype(self.storage.numel())
        self.row_start = self.row_start.to(index)
        self.free_rows = self.free_rows.to(index)
        levels = self.page_level.new_full((new + 1,), -1)
        levels[:old] = self.page_level[:old]
        self.page_level = levels
        # Every page may become free; lower pages are taken first.
        height = int(self.free_count[-1])
        stack = self.free_pages.new_zeros(new + 1)
        fresh = torch.arange(new - 1, old - 1, -1, dtype=stack.dtype, device=stack.device)
        stack[:pages] = fresh
        stack[pages : pages + height] = self.free_pages[:height]
        self.free_pages = stack
        self.free_count[-1] += pages

    def _grow_stacks(self, heights: Sequence[int]) -> None:
        base = self.free_base.tolist()
        room = [b - a for a, b in zip(base, base[1:], strict=False)]
        if all(h <= r for h, r in zip(heights, room, strict=True)):
            return
        room = [r if h <= r else h + h // 2 for h, r in zip(heights, room, strict=True)]
        self._relay_stacks(room, [self._stack(k) for k in range(len(self.sizes))])

    def _stack(self, k: int) -> Tensor:
        begin = int(self.free_base[k])
        return self.free_rows[begin : begin + int(self.free_count[k])]

    def _relay_stacks(self, room: Sequence[int], stacks: Sequence[Tensor]) -> None:
        base = [0]
        for r in room:
            base.append(base[-1] + r)
        rows = self.free_rows.new_zeros(base[-1] + 1)
        for begin, stack in zip(base, stacks, strict=False):
            rows[begin : begin + len(stack)] = stack
        self.free_rows = rows
        self.free_base = torch.tensor(base, device=rows.device)
        for k, stack in enumerate(stacks):
            self.free_count[k] = len(stack)

    @torch.no_grad()
    def reclaim(self) -> int:
        """Return pages without a row in use to the page stack; gives their number."""
        pages = self.page_level.numel() - 1
        start = self.row_start[self.row_start >= 0].long()
        used = torch.bincount(start // self.page, minlength=pages) > 0
        empty = ~used & (self.page_level[:-1] >= 0)
        found = empty.nonzero()[:, 0]
        if not len(found):
            return 0
        stacks = [self._stack(k) for k in range(len(self.sizes))]
        stacks = [s[~empty[s.long() // self.page]] for s in stacks]
        base = self.free_base.tolist()
        self._relay_stacks([b - a for a, b in zip(base, base[1:], strict=False)], stacks)
        self.page_level[found] = -1
        if self.free_pages.numel() < pages + 1:
            stack = self.free_pages.new_zeros(pages + 1)
            stack[: self.free_pages.numel() - 1] = self.free_pages[:-1]
            self.free_pages = stack
        height = int(self.free_count[-1])
        self.free_pages[height : height + len(found)] = found.flip(0).to(self.free_pages.dtype)
        self.free_count[-1] += len(found)
        self._reset_bounds()
        return len(found)

    @torch.no_grad()
    def compact(self) -> None:
        """Rewrite the arena without holes: the fewest pages that hold the rows in use."""
        # Places saved for a pending backward are no longer where the rows are.
        torch.autograd.graph.increment_version(self.storage)
        level = self.level()
        old_start = self.row_start[:-1].long()
        starts, page_level, free = self._layout(level.cpu())
        device = self.storage.device
        starts = starts.to(device)
        for companion in list(self._everything()):
            packed = companion.tensor.new_full((len(page_level) * self.page,), companion.fresh)
            for k, dim in enumerate(self.sizes):
                mine = (level == k).nonzero()[:, 0]
                if len(mine):
                    rows = gather_rows(companion.tensor, old_start[mine], dim)
                    into = starts[mine][:, None] + torch.arange(dim, device=device)
                    packed[into] = rows
            companion.replace(packed)
        index = self._index_dtype(self.storage.numel())
        sink = torch.tensor([-1], device=device)
        self.row_start = torch.cat([starts, sink]).to(index)
        self.page_level = torch.cat([page_level.to(device), sink.to(torch.int8)])
        self.free_rows = self.free_rows.to(index)
        room = [max(len(rows), per) for rows, per in zip(free, self.rows_per_page, strict=True)]
        self._relay_stacks(room, [rows.to(device) for rows in free])
        self.free_pages = self.free_pages.new_zeros(1)
        self.free_count[-1] = 0
        self._reset_bounds()

    # ---- state --------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the saved arena's shapes: rows of a checkpoint may have grown."""
        rows = state_dict.get(prefix + "row_start")
        if not self._fits(state_dict, prefix):
            args[-1].append(f"{prefix[:-1]} was saved with other sizes than {list(self.sizes)}.")
            return
        if rows is not None and rows.shape == self.row_start.shape:
            saved = state_dict.get(prefix + "storage")
            if saved is not None and saved.shape != self.storage.shape:
                for companion in list(self._everything()):
                    companion.replace(companion.tensor.new_full(saved.shape, companion.fresh))
            for name, buffer in list(self.named_buffers(recurse=False)):
                saved = state_dict.get(prefix + name)
                if saved is not None:
                    setattr(self, name, torch.empty_like(saved, device=buffer.device))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._reset_bounds()

    def _fits(self, state_dict: dict[str, Any], prefix: str) -> bool:
        """Whether a saved arena has the same sizes and pages of the same length."""
        names = ("row_size", "page_level", "storage")
        if any(prefix + name not in state_dict for name in names):
            return True  # missing keys are reported as such
        sizes, level, storage = (state_dict[prefix + name] for name in names)
        same_page = storage.numel() == (level.numel() - 1) * self.page
        return sizes.tolist() == list(self.sizes) and same_page

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset_bounds()
        companions.track(self)
