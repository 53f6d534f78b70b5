"""One flat arena for rows of several sizes, cut into pages that each hold rows of one size.

    storage     |2 2 2 2 2 2 .|8 8 8 . . . .|4 4 4 4 . . .|. . . . . . .|     one 1-D Parameter
    page_level   0             2             1             -1                 int8, one per page
    row_start   [0, 2, 4, P, P + 8, ...]                                      int32, one per row

A row is found by its first element; its level is that of its page. Free rows of every level form a
stack, and so do free pages; rows are taken from and given back to them by prefix sums. A page whose
rows are all free can serve another level (``reclaim``); ``compact`` closes every hole. ``storage``
keeps its identity as a Parameter while it grows, and every tensor of its shape (gradient, optimizer
state: see ``companions``) grows and moves with it.

With the Triton backend rows move in three launches (``resize``) and the host waits for nothing: it
keeps bounds of the device's counters (``ledger``) and grows the arena by the worst case when rows
may not fit.

This is the slab allocator's idea, and that of paged KV caches, applied to embedding rows. One arena
rather than a table per size: one base pointer for the kernels, and the bytes allocated are exactly
what the report says.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..cpu.lookup import gather_rows, promote_rows
from ..gpu.resize import NOBODY, Places, fill_rows, launch_free, launch_insert, launch_promote
from ..ops.backend import is_capturing, resolve_backend
from . import followers as companions
from .ledger import Ledger

if TYPE_CHECKING:
    from ..optim import FusedOptimizer

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


def _upload(values: Sequence[int], device: torch.device) -> Tensor:
    """``torch.tensor(values, device=device)`` that does not wait for the device."""
    pinned = torch.tensor(values, pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)


@dataclass(frozen=True)
class ArenaBytes:
    """Bytes really allocated by an arena.

    ``payload``: rows in use, ``sum_x d(x) * itemsize``. ``slack``: the rest of ``storage`` (free
    rows, page tails, free pages). ``locations``: row starts, page levels, free lists and their
    counters. ``scratch``: 4 bytes per row once rows have moved by the Triton backend; training
    memory like optimizer state, in no checkpoint and not in ``total``.
    """

    payload: int
    slack: int
    locations: int
    scratch: int = 0

    @property
    def total(self) -> int:
        """What serving takes."""
        return self.payload + self.slack + self.locations


class Arena(nn.Module):
    """Rows ``0 .. num_rows - 1``, each at one of ``sizes``, in one flat Parameter.

    Args:
        num_rows: number of rows ``N``.
        sizes: increasing row sizes.
        level: initial level of every row: an int, an integer tensor ``[N]`` (-1: no row yet), or
            -1 for an empty arena.
        max_elements: the arena never grows beyond so many elements (whole pages of them); default:
            no limit.
        device, dtype: of ``storage``.

    Raises:
        ValueError: the rows do not fit in ``max_elements``.

    Attributes:
        storage: Parameter ``[capacity]``; zero wherever no row has been written.
        row_start: int32 (int64 past 2^31 elements) ``[N + 1]``: first element, -1 for no row. The
            last entry is a sink, always -1.
        page_level: int8 ``[pages + 1]``, -1 for a free page; the last entry is a sink.
        free_rows: stacks of free row starts, one segment per level, and a sink.
        free_pages: stack of free page numbers, and a sink.
        free_count: int64 ``[n + 1]``: height of every level's stack, then of the page stack.
        free_base: int64 ``[n + 1]``: where every level's segment begins.
        row_size: int64 ``[n]``: the sizes, so that a checkpoint says what its levels are.
        is_table: whether ``storage`` is a table of all rows in order (one size, none ever moved).
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
    _fused: weakref.ref[FusedOptimizer] | None = None
    _owner: Tensor | None
    _room: list[int]
    _initial_level: Tensor | None
    is_table: bool
    loaded_layout: tuple[Tensor, Tensor] | None
    _located: tuple[Any, ...] | None

    def __init__(
        self,
        num_rows: int,
        sizes: Sequence[int],
        *,
        level: int | Tensor = 0,
        max_elements: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_rows = num_rows
        self.max_elements = max_elements
        self.sizes = tuple(sizes)
        self.page = page_elements(self.sizes, num_rows)
        self.rows_per_page = [self.page // d for d in self.sizes]
        with torch.device("cpu"):
            if not isinstance(level, Tensor):
                level = torch.full((num_rows,), level, dtype=torch.int8)
            level = level.cpu()
            starts, page_level, free = self._layout(level)
        if max_elements is not None and len(page_level) * self.page > max_elements:
            raise ValueError(
                f"the rows take {len(page_level) * self.page} elements, "
                f"max_elements={max_elements} allows fewer"
            )
        self.storage = nn.Parameter(
            torch.zeros(len(page_level) * self.page, device=device, dtype=dtype)
        )
        self._lay_out(starts, page_level, free)
        # On the meta device there are no locations: to_empty makes them, and needs to know.
        self._initial_level = level if self.storage.is_meta else None
        self._owner = None
        self._captured = False
        self._located = None
        self._was_loaded = False
        self.loaded_layout = None
        companions.track(self)

    def _lay_out(self, starts: Tensor, page_level: Tensor, free: Sequence[Tensor]) -> None:
        """Make every buffer, from a layout on the CPU."""
        index = self._index_dtype(self.storage.numel())
        # A level's stack holds at least a page of rows: the leftover of the page in use.
        room = [max(len(rows), per) for rows, per in zip(free, self.rows_per_page, strict=True)]
        counts = [*(len(rows) for rows in free), 0]
        with torch.device("cpu"):
            sink = torch.tensor([-1])
            base = torch.tensor([0, *torch.tensor(room).cumsum(0).tolist()])
            stacks = torch.zeros(int(base[-1]) + 1, dtype=index)
            for rows, begin in zip(free, base.tolist(), strict=False):
                stacks[begin : begin + len(rows)] = rows
            self._set("row_start", torch.cat([starts, sink]).to(index))
            self._set("page_level", torch.cat([page_level, sink.to(torch.int8)]))
            self._set("free_pages", torch.zeros(1, dtype=torch.int32))
            self._set("free_rows", stacks)
            self._set("free_base", base)
            self._set("free_count", torch.tensor(counts))
            self._set("row_size", torch.tensor(self.sizes))
            self._set("_rows_per_page", torch.tensor(self.rows_per_page), persistent=False)
        self._room = room
        self._ledger = Ledger(self.rows_per_page, counts)
        self.is_table = self._is_table(starts)

    def _set(self, name: str, value: Tensor, persistent: bool = True) -> None:
        self.register_buffer(name, value.to(self.storage.device), persistent)

    def _is_table(self, starts: Tensor) -> bool:
        """Whether ``storage`` is a table of all rows in order: one size, and none ever moved."""
        dim = self.sizes[0]
        if len(self.sizes) > 1 or self.page % dim:
            return False
        return torch.equal(starts.long(), torch.arange(len(starts), device=starts.device) * dim)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Arena:
        super()._apply(fn, recurse)
        if self._initial_level is not None and not self.storage.is_meta:
            with torch.device("cpu"):
                self._lay_out(*self._layout(self._initial_level))
            self._initial_level = None
        return self

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

    # ---- room ---------------------------------------------------------------------------------

    def _forget(self) -> None:
        """Other tensors than before: look at them, once, before the next row moves."""
        self._ledger.see([])
        self._room = []

    def _glance(self) -> None:
        if not self._room:
            base = self.free_base.tolist()
            self._room = [b - a for a, b in zip(base, base[1:], strict=False)]
        self._ledger.glance(self.free_count, look=_can_look(self.free_count))

    def _pages_allowed(self) -> int:
        """Pages by which the arena may still grow."""
        if self.max_elements is None:
            return 1 << 62
        return max(self.max_elements // self.page - (self.page_level.numel() - 1), 0)

    def _make_room(self, rows: int, *, takes: bool = True, strict: bool = False) -> None:
        """Grow, if ``rows`` more rows might not find room, as far as ``max_elements`` allows."""
        self._glance()
        missing = self._ledger.worst(rows)[0] if takes else 0
        if strict and missing > self._pages_allowed():
            raise self._full(rows, missing)
        if missing > 0:
            self._grow(missing, at_once=strict)
        self._grow_stacks(self._ledger.worst(rows)[1])

    def _full(self, rows: int, missing: int) -> RuntimeError:
        return RuntimeError(
            f"the arena is full: {rows} more rows may need {missing} more pages of {self.page} "
            f"elements, max_elements={self.max_elements} allows {self._pages_allowed()}"
        )

    def _begin(self, rows: int, *, takes: bool = True) -> Places:
        """What a launch that moves up to ``rows`` rows works on."""
        self.remember_layout()
        owner = self._owner
        if is_capturing(self.free_count):
            # The graph holds the addresses: from here on nothing is replaced unasked.
            self._captured = True
            if owner is None:
                owner = self._new_owner()  # filled by the graph, at every replay
        else:
            if not self._captured:
                rows = min(rows, self.num_rows)
                self._make_room(rows, takes=takes)
                self._ledger.promise(rows)
            if owner is None or owner.device != self.storage.device:
                owner = self._owner = self._new_owner()
        lists = self.free_rows, self.free_pages, self.free_count, self.free_base
        return Places(self.row_start, self.page_level, *lists, owner)

    def _new_owner(self) -> Tensor:
        return torch.full_like(self.row_start[:-1], NOBODY, dtype=torch.int32)

    def _end(self) -> None:
        """Send for the counters, unless somebody is under way."""
        quiet = _can_look(self.free_count) or is_capturing(self.free_count)
        if not quiet:
            self._ledger.send_for(self.free_count)

    @companions.with_dense_gradient
    def reserve(self, rows: int) -> None:
        """Make room so that ``rows`` more rows can move, in any number of calls.

        A promotion grows the arena by itself, except while a CUDA graph is captured and after that,
        because the graph holds the addresses: rows that find no room stay as they are. Reserve for
        all replays before capturing; reserving again may move the arena, then capture anew.

        Args:
            rows: rows to be promoted or inserted, counted once for every level they go up.

        Raises:
            RuntimeError: ``max_elements`` does not allow it, or a graph is being captured; nothing
                is changed.

        Notes:
            Waits for the device only once a promotion was captured: the host cannot know how often
            the graph was replayed.
        """
        if is_capturing(self.free_count):
            raise RuntimeError("reserve before capturing a graph, not while it is captured")
        self.remember_layout()  # a graph would record the copying
        if self._captured:
            self._ledger.see(self.free_count.tolist())
        self._make_room(rows, strict=True)
        self._captured = False
        if self._owner is None and not _can_look(self.storage):
            self._owner = self._new_owner()

    @property
    def fused_optimizer(self) -> FusedOptimizer | None:
        """The optimizer that steps the rows in backward, see ``optim``."""
        return None if self._fused is None else self._fused()

    # ---- reading ----------------------------------------------------------------------------

    @property
    def locations(self) -> tuple[Tensor, Tensor]:
        """``(row_start [N], page_level [pages])`` as the lookup takes them."""
        if torch.compiler.is_compiling():
            return self.row_start[:-1], self.page_level[:-1]
        # Sliced once for the tensors of the moment, for the sake of small batches.
        whole: tuple[Any, ...] = self._buffers["row_start"], self._buffers["page_level"]
        located = self._located
        if located is None or located[0] is not whole[0] or located[1] is not whole[1]:
            located = self._located = (*whole, whole[0][:-1], whole[1][:-1])
        return located[2], located[3]

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
        scratch = 0 if self._owner is None else self._owner.untyped_storage().nbytes()
        return ArenaBytes(payload, allocated - payload, locations, scratch)

    # ---- taking and giving rows --------------------------------------------------------------

    def _rank(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """Position of every entry among those of its level, and their number per level."""
        levels = torch.arange(len(self.sizes), device=level.device)
        chosen = (level[:, None] == levels).long()
        rank = (chosen.cumsum(0) - 1).gather(1, level[:, None])[:, 0]
        return rank, chosen.sum(0)

    def _reserve(self, target: Tensor, source: Tensor) -> None:
        """Make room for one :meth:`take` of levels ``target`` and one :meth:`give` of ``source``.

        The counters are read only when what the host knows of them does not do.

        Raises:
            RuntimeError: ``max_elements`` does not allow it.
        """
        rows = target.numel()
        if self._ledger.counts and self._room:
            missing, heights = self._ledger.worst(rows)
            if missing <= 0 and all(h <= r for h, r in zip(heights, self._room, strict=True)):
                self._ledger.promise(rows)
                return
        pages = self._pages_for(target)
        if int(self.free_count[-1]) < pages:
            self.reclaim()
            pages = self._pages_for(target)
        self._ledger.see(self.free_count.tolist())
        self._glance()
        missing = pages - self._ledger.counts[-1]
        if missing > self._pages_allowed():
            raise self._full(rows, missing)
        if missing > 0:
            self._grow(missing)
        given = torch.bincount(source[source >= 0], minlength=len(self.sizes)).tolist()
        *counts, free = self._ledger.counts
        heights = [
            max(count, per) + give
            for count, per, give in zip(counts, self.rows_per_page, given, strict=True)
        ]
        self._grow_stacks(heights)
        self._ledger.see([*heights, free - pages])

    def _pages_for(self, target: Tensor) -> int:
        """Fresh pages that rows of these levels need beyond what lies on the stacks."""
        taken = torch.bincount(target[target >= 0], minlength=len(self.sizes)).tolist()
        free = self.free_count.tolist()
        return sum(
            -(-max(t - f, 0) // per)
            for t, f, per in zip(taken, free, self.rows_per_page, strict=False)
        )

    def take(self, level: Tensor) -> Tensor:
        """Take one free row of every level; returns their starts, int64.

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

        on_stack = rank < free[level]
        sink = self.free_rows.numel() - 1
        stacked = self.free_rows[
            torch.where(on_stack, self.free_base[level] + free[level] - 1 - rank, sink)
        ].long()
        beyond = rank - free[level]
        entry = n_pages - 1 - first[level] - beyond.div(per[level], rounding_mode="floor")
        page = self.free_pages[torch.where(on_stack, self.free_pages.numel() - 1, entry)].long()
        fresh = page * self.page + beyond.remainder(per[level]) * sizes[level]
        start = torch.where(on_stack, stacked, fresh)
        self.page_level[start.div(self.page, rounding_mode="floor")] = level.to(torch.int8)

        if bool(pages.any()):
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
        """Put the rows ``(start, level)`` back on their level's stack."""
        rank, count = self._rank(level)
        place = self.free_base[level] + self.free_count[level] + rank
        self.free_rows[place] = start.to(self.free_rows.dtype)
        self.free_count[: len(self.sizes)] += count

    def place(self, ids: Tensor, start: Tensor) -> None:
        """``row_start[ids] = start``; state per id starts afresh."""
        self.row_start[ids] = start.to(self.row_start.dtype)
        companions.reset_ids(self, ids)

    @torch.no_grad()
    @companions.with_dense_gradient
    def insert(self, ids: Tensor, level: int, *, backend: str = "auto") -> Tensor:
        """Give ``ids`` that have no row a zero row of ``level``, with fresh state.

        Args:
            ids: int ``[R]``.
            level: index of the rows' size.
            backend: as for :meth:`promote`.

        Returns:
            Bool ``[R]``: True where this call gave the id its row.

        Raises:
            ValueError: an id that already has a row, or an id twice; nothing is changed. The Triton
                backend passes over the former and inserts the latter once.
            RuntimeError: as for :meth:`promote`.
        """
        if resolve_backend(backend, ids.device) == "triton":
            places = self._begin(ids.numel())
            self.is_table = False
            rows = ids, level, self.storage.detach(), places
            moved = launch_insert(*rows, *self._state(), sizes=self.sizes, page=self.page)
            self._end()
            return moved
        if ids.numel() != ids.unique().numel():
            raise ValueError("insert takes distinct ids")
        if bool((self.row_start[ids] >= 0).any()):
            raise ValueError("insert takes ids that have no row")
        self.remember_layout()
        self.is_table = False
        target = torch.full((ids.numel(),), level, device=ids.device)
        self._reserve(target, torch.full_like(target, -1))
        start = self.take(target)
        self.place(ids, start)
        fill_rows([(self.storage.detach(), 0.0)], start, target, sizes=self.sizes, backend="torch")
        self._reset_companions(start, target)
        return torch.ones_like(ids, dtype=torch.bool)

    @torch.no_grad()
    def free(self, ids: Tensor, *, backend: str = "auto") -> Tensor:
        """Give the rows of ``ids`` back; their ids have no row afterwards.

        Args:
            ids: int ``[R]``.
            backend: as for :meth:`promote`.

        Returns:
            Bool ``[R]``: True where this call took the id's row.

        Raises:
            ValueError: an id without a row, or an id twice; nothing is changed. The Triton backend
                passes over the former and frees the latter once.
        """
        if resolve_backend(backend, ids.device) == "triton":
            places = self._begin(ids.numel(), takes=False)
            self.is_table = False
            rows = ids, self.storage.detach(), places
            moved = launch_free(*rows, sizes=self.sizes, page=self.page)
            self._end()
            return moved
        if ids.numel() != ids.unique().numel():
            raise ValueError("free takes distinct ids")
        if bool((self.row_start[ids] < 0).any()):
            raise ValueError("free takes ids that have a row")
        self.remember_layout()
        self.is_table = False
        level = self.level(ids)
        self._reserve(torch.full_like(level, -1), level)
        self.give(self.row_start[ids].long(), level)
        self.row_start[ids] = -1
        return torch.ones_like(ids, dtype=torch.bool)

    @torch.no_grad()
    @companions.with_dense_gradient
    def promote(
        self, ids: Tensor, chain: Tensor, mask: Tensor | None = None, *, backend: str = "auto"
    ) -> Tensor:
        """Move the rows of ``ids`` (where ``mask``) one level up: ``e' = W_k e + b_k``.

        An id twice moves once; rows at the last level stay. The state of moved rows starts afresh.

        Args:
            ids: int ``[R]``, in range (the Triton backend passes over others).
            chain: packed hops.
            mask: bool ``[R]``.
            backend: ``auto`` | ``triton`` | ``torch``.

        Returns:
            Bool ``[R]``: True where the position asked for a row that this call moved; every
            occurrence of an id that ``mask`` admits says the same.

        Raises:
            RuntimeError: ``max_elements`` does not allow it; no row is changed. The Triton backend
                moves the rows that fit, by level and then in the order of ``ids``.
        """
        if resolve_backend(backend, ids.device) == "triton":
            places = self._begin(ids.numel())
            rows = ids, mask, self.storage.detach(), chain.detach(), places
            moved = launch_promote(*rows, *self._state(), sizes=self.sizes, page=self.page)
            self._end()
            return moved
        chosen = ids if mask is None else ids[mask]
        level = self.level(chosen)
        moved = (level >= 0) & (level < len(self.sizes) - 1)
        # One decision per id, and an order that does not depend on that of ids.
        key, order = chosen[moved].long().sort()
        if key.numel():
            first = torch.ones_like(key, dtype=torch.bool)
            first[1:] = key[1:] != key[:-1]
            self._promote_distinct(key[first], level[moved][order[first]], chain.detach())
        if mask is None:
            return moved
        return torch.zeros_like(mask).masked_scatter_(mask, moved)

    def _promote_distinct(self, ids: Tensor, source: Tensor, chain: Tensor) -> None:
        target = source + 1
        self.remember_layout()
        self._reserve(target, source)
        old_start = self.row_start[ids].long()
        start = self.take(target)
        storage = self.storage.detach()
        promote_rows(storage, chain, old_start, start, source, self.sizes)
        self._reset_companions(start, target)
        self.place(ids, start)
        self.give(old_start, source)

    def _state(self) -> tuple[list[tuple[Tensor, float]], list[tuple[Tensor, float]]]:
        """Gradient and optimizer state, per element and per id, with a fresh row's values."""
        return (
            [(c.tensor, c.fresh) for c in companions.of(self)],
            [(c.tensor, c.fresh) for c in companions.of_ids(self)],
        )

    def _reset_companions(self, start: Tensor, level: Tensor) -> None:
        """Gradient and optimizer state of the rows ``(start, level)`` become a fresh row's."""
        fill_rows(self._state()[0], start, level, sizes=self.sizes, backend="torch")

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

    def _grow(self, pages: int, *, at_once: bool = False) -> None:
        """Add pages; an eighth at least unless ``at_once``, at most what is allowed."""
        old = self.page_level.numel() - 1
        # Amortised growth, with at most that much slack.
        pages = min(pages if at_once else max(pages, old // 8), self._pages_allowed())
        if not pages:
            return
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
        # Every page may become free; lower pages are taken first. The new ones go below the old,
        # which are copied with what lies above the top: its height is not asked for.
        stack = self.free_pages.new_zeros(new + 1)
        stack[:pages] = torch.arange(new - 1, old - 1, -1, dtype=stack.dtype, device=stack.device)
        height = self.free_pages.numel() - 1
        stack[pages : pages + height] = self.free_pages[:-1]
        self.free_pages = stack
        self.free_count[-1] += pages
        self._ledger.grow(pages)

    def _grow_stacks(self, heights: Sequence[int]) -> None:
        # No stack holds more rows than the pages do.
        pages = self.page_level.numel() - 1
        need = [min(h, pages * per) for h, per in zip(heights, self.rows_per_page, strict=True)]
        if all(h <= r for h, r in zip(need, self._room, strict=True)):
            return
        room = [r if h <= r else h + h // 2 for h, r in zip(need, self._room, strict=True)]
        # Whole segments: their heights are not asked for.
        old = self.free_rows[:-1].split(self._room)
        self._lay_stacks(room, old)

    def _stack(self, k: int) -> Tensor:
        begin = int(self.free_base[k])
        return self.free_rows[begin : begin + int(self.free_count[k])]

    def _lay_stacks(self, room: Sequence[int], stacks: Sequence[Tensor]) -> None:
        """Segments of these lengths, each with a stack at its bottom."""
        base = [0]
        for r in room:
            base.append(base[-1] + r)
        rows = self.free_rows.new_zeros(base[-1] + 1)
        for begin, stack in zip(base, stacks, strict=False):
            rows[begin : begin + len(stack)] = stack
        self.free_rows = rows
        self.free_base = _upload(base, rows.device)
        self._room = list(room)

    def _set_heights(self, stacks: Sequence[Tensor]) -> None:
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
        self._lay_stacks([b - a for a, b in zip(base, base[1:], strict=False)], stacks)
        self._set_heights(stacks)
        self.page_level[found] = -1
        if self.free_pages.numel() < pages + 1:
            stack = self.free_pages.new_zeros(pages + 1)
            stack[: self.free_pages.numel() - 1] = self.free_pages[:-1]
            self.free_pages = stack
        height = int(self.free_count[-1])
        self.free_pages[height : height + len(found)] = found.flip(0).to(self.free_pages.dtype)
        self.free_count[-1] += len(found)
        self._ledger.see(self.free_count.tolist())
        return len(found)

    @torch.no_grad()
    @companions.with_dense_gradient
    def compact(self) -> None:
        """Rewrite the arena without holes: the fewest pages that hold the rows in use."""
        # Places saved for a pending backward are no longer where the rows are.
        torch.autograd.graph.increment_version(self.storage)
        self.remember_layout()
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
        self._lay_stacks(room, [rows.to(device) for rows in free])
        self._set_heights(free)
        self.free_pages = self.free_pages.new_zeros(1)
        self.free_count[-1] = 0
        self._ledger.see([*(len(rows) for rows in free), 0])
        self.is_table = self._is_table(starts)

    # ---- state --------------------------------------------------------------------------------

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *lists: Any
    ) -> None:
        """Take the saved arena's shapes: rows of a checkpoint may have grown. All or nothing."""
        missing, _, errors = lists
        errors += self._misfits(state_dict, prefix)
        if not self.fits(state_dict, prefix):
            missing += [prefix + name for name in self._keys() if prefix + name not in state_dict]
            return
        held = prefix + "storage" in state_dict
        if held:
            saved = {name: state_dict[prefix + name] for name in self._keys()}
            if saved["storage"].shape != self.storage.shape:
                for companion in list(self._everything()):
                    fresh = companion.tensor.new_full(saved["storage"].shape, companion.fresh)
                    companion.replace(fresh)
            for name, buffer in list(self.named_buffers(recurse=False)):
                if name in saved:
                    setattr(self, name, torch.empty_like(saved[name], device=buffer.device))
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)
        self._forget()
        if held and not self.storage.is_meta:
            self.is_table = self._is_table(self.row_start[:-1])
            self._initial_level = None
            self._was_loaded, self.loaded_layout = True, None

    def _keys(self) -> list[str]:
        return ["storage", *(name for name in self._buffers if name != "_rows_per_page")]

    def fits(self, state_dict: dict[str, Any], prefix: str) -> bool:
        """Whether a saved arena, if ``state_dict`` holds one at ``prefix``, can be loaded."""
        held = sum(prefix + name in state_dict for name in self._keys())
        return held in (0, len(self._keys())) and not self._misfits(state_dict, prefix)

    def _misfits(self, state_dict: dict[str, Any], prefix: str) -> list[str]:
        """Why what is saved does not fit this arena; missing keys aside."""
        if any(prefix + name not in state_dict for name in self._keys()):
            return []
        saved = {name: state_dict[prefix + name] for name in self._keys()}
        rows, sizes = saved["row_start"].shape, saved["row_size"]
        numel, pages = saved["storage"].numel(), saved["page_level"].numel() - 1
        if rows != self.row_start.shape:
            return [
                f"size mismatch for {prefix}row_start: copying a param with shape {rows} from "
                f"checkpoint, the shape in current model is {self.row_start.shape}."
            ]
        if sizes.tolist() != list(self.sizes) or numel != pages * self.page:
            return [f"{prefix[:-1]} was saved with other sizes than {list(self.sizes)}."]
        if self.max_elements is not None and numel > self.max_elements:
            return [
                f"{prefix[:-1]} was saved with {numel} elements, max_elements={self.max_elements} "
                "allows fewer."
            ]
        return []

    def remember_layout(self) -> None:
        """Before rows move: keep where a checkpoint had them, until an optimizer has stepped.

        The state of an optimizer that is loaded as well lies there, and no step has shown it yet.
        """
        if self._was_loaded and self.loaded_layout is None:
            self.loaded_layout = self.row_start.clone(), self.page_level.clone()

    def forget_layout(self) -> None:
        """An optimizer has stepped, and its state goes with the rows from now on."""
        self._was_loaded, self.loaded_layout = False, None

    def __getstate__(self) -> dict[str, Any]:
        # A copy has no fused optimizer, and its own scratch.
        ledger = Ledger(self.rows_per_page, [])
        alone = {"_fused": None, "_owner": None, "_ledger": ledger, "_located": None}
        return {**self.__dict__, **alone, "_was_loaded": False, "loaded_layout": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        self._captured = False
        companions.track(self)
