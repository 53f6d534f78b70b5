"""Room for rows that move: free places and pages, growth, and compaction in bounded steps.

    a row comes    to a free place of its level, else to a free page, else the arena grows
    a row goes     its place is free for its level; a page without rows is free for any level
    compact        rows move to lower pages of their level until all but one are full, free pages
                   gather at the end, and their memory is given back

Which places are free follows from where the rows lie and is derived before the first row moves:
as bits for native kernels (``taken``), as stacks on the device for the others (``free``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..ops import resize
from ..ops.backend import (
    host_reads,
    is_capturing,
    on_large_pages,
    resolve_backend,
    untouched_zeros,
)
from ..ops.layout import FreePlaces, Layout, Places, index_dtype
from .cap import table_bytes
from .followers import with_dense_gradient
from .free import FreeLists
from .locations import Locations, unrecorded
from .replacing import is_alone
from .taken import TakenBits

__all__ = ["Room"]

_STEP = 1 << 16
"""Rows, or elements of pages, that compaction moves at a time."""


class Room(Locations):
    """An arena's places: which are free, and how it grows and shrinks.

    The arguments are those of :class:`~esapn_kernels.storage.arena.Arena`.
    """

    # The id that compaction in steps goes on from.
    cursor = 0

    kept_pages = 0
    """Free pages of an arena with a budget that only demotions take: in a full one rows shrink."""

    def level(self, ids: Tensor | None = None) -> Tensor:
        """Level of every row of ``ids`` (of all rows), int64; -1 where there is no row."""
        self._check_accepted()
        if ids is None:
            level = torch.empty(self.num_rows, dtype=torch.int64, device=self.row_start.device)
            for part, found in self.levels():
                level[part] = found
            return level
        # No row: -1 // page is -1, the sink, which always holds -1.
        return self.page_level[self.row_start[ids] // self.page].long()

    def forget_counters(self) -> None:
        """Read the counters of the stacks anew, once, before the next row moves.

        For replicas, whose hosts must hold the same bounds.
        """
        if isinstance(self._free, FreeLists):
            self._free.ledger.see([])

    def forget_free_places(self) -> None:
        """Derive the free places anew, before the next row moves: for replicas of one state.

        Compaction in steps begins anew as well, with the same id on all of them.
        """
        self._free, self.cursor = None, 0

    def free_places(self) -> list[Tensor]:
        """The stacks of free places, and of free pages, what is taken first last; or nothing.

        Nothing where the lowest places are taken first, as native kernels always do, and an arena
        in which no row has moved yet. A state dict does not hold the order of stacks: a loaded
        arena takes the lowest places first. So rows that move later lie elsewhere than in the arena
        that was saved, unless it also takes the order, by :meth:`order_free_places`. No output
        depends on it.
        """
        self._check_accepted()
        if not isinstance(self._free, FreeLists):
            return []
        return [stack.clone() for stack in self._free.stacks()]

    @unrecorded
    def order_free_places(self, places: Sequence[Tensor]) -> None:
        """Take the order that :meth:`free_places` of an arena of the same layout gave.

        Raises:
            ValueError: other rows or pages are free; nothing is changed.
        """
        self._check_accepted()
        if places:
            self._stacks().reorder(places)
        else:
            self._free = None

    def _layout_with_sinks(self) -> Layout:
        return Layout(self.row_start, self.page_level, self.sizes, self.page)

    def _stacks(self) -> FreeLists:
        """Free places on stacks, derived where they are not known so."""
        if not isinstance(self._free, FreeLists):
            if is_capturing(self.storage):
                raise RuntimeError("call reserve before capturing a graph in which rows move")
            self._free = FreeLists(self.row_start, self.page_level, self.sizes, self.page)
        return self._free

    def _bits(self) -> TakenBits:
        """Free places by bits, derived where they are not known so."""
        if not isinstance(self._free, TakenBits):
            try:
                self._free = TakenBits(self._layout_with_sinks())
            except RuntimeError:
                # Written through ``.data``, which no version counts: rows overlap.
                self._refuse_faulty()
                raise
        return self._free

    def _free_places(self) -> FreeLists | TakenBits:
        """Free places as they are known, else as the backend that is chosen here takes them."""
        if self._free is not None:
            return self._free
        backend = resolve_backend("auto", self.storage.device)
        return self._bits() if resize.is_native(backend, self.row_start) else self._stacks()

    @contextlib.contextmanager
    def _changing_places(self) -> Iterator[None]:
        """Derive free places anew, should what changes them fail, as where memory runs out.

        Stacks whose addresses a CUDA graph holds stay.
        """
        free = self._free
        try:
            yield
        except BaseException:
            if not self._captured:
                self._free = None
            raise
        self._free = free

    def _release(self, stacks: FreeLists) -> None:
        """Make pages without a row free ones."""
        with self._changing_places():
            stacks.release(self.page_level)

    def _pages_allowed(self) -> int:
        """Pages by which the arena may still grow."""
        if self.max_elements is None:
            return 1 << 62
        return max(self.max_elements // self.page - (self.page_level.numel() - 1), 0)

    def _grow_for(self, rows: int, missing: int, *, strict: bool) -> None:
        """Grow by the ``missing`` pages of so many rows, as far as ``max_elements`` allows.

        Args:
            strict: refuse where ``max_elements`` allows less.

        Raises:
            RuntimeError: ``max_elements`` allows less, where that is refused.
        """
        if strict and missing > self._pages_allowed():
            raise RuntimeError(
                f"the arena is full: {rows} more rows may need {missing} more pages of {self.page} "
                f"elements, {self.cap} allows {self._pages_allowed()}"
            )
        if missing > 0:
            self._grow(missing)

    def _that_fit(
        self, movers: resize.Movers, ids: Tensor, call: str, enters: Sequence[int]
    ) -> resize.Movers:
        """Those of the movers that find room; the others are counted as refused.

        As in the Triton backend, by level, of a demotion from the last one on, and then in the
        order of ``ids``.

        Args:
            movers: what :func:`~esapn_kernels.ops.resize.find_movers` found for ``ids``.
            call: ``promote``, ``demote`` or ``insert``.
            enters: by level the level that its rows take places of; -1: none of them moves.
        """
        free = self._bits() if movers.backend == "native" else self._stacks()
        taken = [0] * len(self.sizes)
        for rows, k in zip(movers.per_level, enters, strict=True):
            if rows:
                taken[k] += rows
        kept = 0 if call == "demote" else self.kept_pages
        if not kept and free.missing(taken) <= self._pages_allowed():
            return movers
        if isinstance(free, FreeLists):
            self._release(free)
            free.ledger.see(free.count.tolist())
        *places, pages = free.count.tolist()
        pages = max(pages + self._pages_allowed() - kept, 0)
        fit = list(movers.per_level)
        for k in range(len(fit))[:: -1 if call == "demote" else 1]:
            if not fit[k]:
                continue
            per, left = self.rows_per_page[enters[k]], places[enters[k]]
            fit[k] = min(fit[k], left + pages * per)
            pages -= -(-max(fit[k] - left, 0) // per)
        refused = sum(movers.per_level) - sum(fit)
        if not refused:
            return movers
        self.refusals.prepare(self.storage.device).add_(refused)
        going = self._first_of(ids[movers.moved], fit)
        layout = self._layout_with_sinks()
        found = resize.find_movers(going, None, layout, call, backend=movers.backend)
        return found._replace(moved=movers.moved & torch.isin(ids, going))

    def _first_of(self, ids: Tensor, counts: Sequence[int]) -> Tensor:
        """So many of ``ids`` of every level, those named first, each once; ids without a row count
        as of level 0."""
        named, position = ids.long().sort(stable=True)
        fresh = torch.ones_like(named, dtype=torch.bool)
        fresh[1:] = named[1:] != named[:-1]
        distinct = ids[position[fresh].sort().values].long()
        level = self.level(distinct).clamp(min=0)
        return torch.cat([distinct[level == k][:count] for k, count in enumerate(counts)])

    def _begin(self, taken: list[int], given: list[int], backend: str) -> FreePlaces:
        """What a call works on that takes and gives so many rows of every level; there is room.

        Raises:
            RuntimeError: ``max_elements`` does not allow it; nothing is changed.
        """
        self._check_movable()
        self.followers.remember_layout()
        rows = max(sum(taken), sum(given))
        if backend == "native":
            self._grow_for(rows, self._bits().missing(taken), strict=True)
            self._digest = None
            return self._bits().at(self._layout_with_sinks(), self.moves)
        stacks = self._stacks()
        missing = stacks.missing(taken)
        if missing > 0:
            self._release(stacks)
            missing = stacks.missing(taken)
        self._grow_for(rows, missing, strict=True)
        counts = stacks.count.tolist()
        levels = zip(counts[:-1], self.rows_per_page, given, strict=True)
        self._grow_stacks([max(count, per) + give for count, per, give in levels])
        stacks.ledger.see(counts)
        stacks.ledger.promise(rows)
        self._digest = None
        refused = self.refusals.prepare(self.storage.device)
        return stacks.at(self._layout_with_sinks(), None, self.moves, refused)

    def _make_room(self, rows: int, *, takes: bool = True, strict: bool = False) -> None:
        """Grow, if ``rows`` more rows might not find room on the stacks; the host does not wait.

        Args:
            rows: rows that move, at most.
            takes: whether they take places; rows that are freed only give theirs back.
            strict: refuse where ``max_elements`` allows less.

        Raises:
            RuntimeError: ``max_elements`` allows less, where that is refused.
        """
        stacks = self._stacks()
        reads = host_reads(stacks.count)
        stacks.ledger.refresh(stacks.count, read=reads)
        missing, heights = stacks.ledger.worst(rows)
        # A few launches, so on a GPU when it is worth them, or where no growth can do instead.
        due = reads or stacks.given >= max(self.rows_per_page)
        due = due or (stacks.given > 0 and missing > self._pages_allowed())
        if takes and missing > 0 and due:
            self._release(stacks)
            stacks.ledger.refresh(stacks.count, read=reads)
            missing, heights = stacks.ledger.worst(rows)
        if takes:
            self._grow_for(rows, missing, strict=strict)
        self._grow_stacks(heights)

    def _begin_unread(self, rows: int, *, takes: bool = True) -> Places:
        """What a call of the Triton backend works on that moves up to ``rows`` rows.

        See :meth:`_make_room`. A captured graph holds the addresses: during the capture and from
        then on nothing is replaced unasked.
        """
        self._check_movable()
        self.followers.remember_layout()
        stacks = self._stacks()
        if is_capturing(self.storage):
            # The graph counts its replays itself, and fills the scratch at every one.
            self._captured, self._counted = True, None
            owner = stacks.owner
            if owner is None:
                owner = stacks.new_owner(self.num_rows)
        else:
            if not self._captured:
                rows = min(rows, self.num_rows)
                self._make_room(rows, takes=takes)
                stacks.ledger.promise(rows)
                stacks.given += rows
            if stacks.owner is None:
                stacks.owner = stacks.new_owner(self.num_rows)
            owner = stacks.owner
        # The operators count, and ``_end`` does: should a kernel fail, what it wrote is looked at.
        self._digest = None
        torch.autograd.graph.increment_version(self.moves)
        refused = self.refusals.prepare(self.storage.device)
        kept = 0 if self.budget is None else self.kept_pages
        return stacks.at(self._layout_with_sinks(), owner, self.moves, refused, kept)

    def _count_move(self) -> None:
        self._digest = None
        self.moves.add_(1)
        if self._counted is not None:
            self._counted += 1

    def _end(self) -> None:
        """Count what was counted; request the counters, where the host does not read them."""
        if self._counted is not None:
            self._counted += 1
        self._remember()
        free = self._free
        if not isinstance(free, FreeLists) or host_reads(free.count):
            return
        if not is_capturing(self.storage):
            free.ledger.request(free.count)

    @unrecorded
    @with_dense_gradient
    def reserve(self, rows: int) -> None:
        """Make room so that ``rows`` more rows can move, in any number of calls.

        A promotion grows the arena by itself, except while a CUDA graph is captured and after that,
        because the graph holds the addresses: rows that find no room stay as they are. Reserve for
        all replays before capturing; reserving again may move the arena, then capture anew.

        Args:
            rows: rows to be resized or inserted, counted once for every level they go.

        Raises:
            RuntimeError: ``max_elements`` does not allow it, or a graph is being captured; nothing
                is changed.

        Notes:
            Waits for the device only before the first row moves, and once a promotion was captured:
            the host cannot know how often the graph was replayed.
        """
        if is_capturing(self.storage):
            raise RuntimeError("reserve before capturing a graph, not while it is captured")
        self._check_accepted()
        self.followers.remember_layout()  # a graph would record the copying
        free = self._free_places()
        if isinstance(free, TakenBits):
            # No more than is missing; the larger the row, the fewer in a page.
            opened = -(-rows // min(self.rows_per_page)) + len(self.sizes)
            self._grow_for(rows, opened + free.missing([0] * len(self.sizes)), strict=True)
            return
        if self._captured:
            free.ledger.see(free.count.tolist())
            self._counted = int(self.moves)
        self._make_room(rows, strict=True)
        self._captured = False
        free = self._stacks()
        if free.owner is None and not host_reads(self.storage):
            free.owner = free.new_owner(self.num_rows)

    def _grow(self, pages: int, *, at_once: bool = False) -> None:
        """Add pages; an eighth at least unless ``at_once``, at most what is allowed.

        Within a budget all that is allowed: one that was loaded may have fewer.
        """
        old = self.page_level.numel() - 1
        # Amortised growth, with at most that much slack.
        if self.budget is not None:
            pages = self._pages_allowed()
        pages = min(pages if at_once else max(pages, old // 8), self._pages_allowed())
        if not pages:
            return
        free, numel = self._free_places(), (old + pages) * self.page
        self._refuse_replacing(numel)
        held = self.storage.numel()
        if self.budget is None:
            storage = self.storage.detach().new_empty(numel)
            storage[held:] = 0
        else:
            storage = untouched_zeros(self.storage.detach(), numel)
        on_large_pages(storage)
        grown = self._fresh_followers(numel, held)
        row_start = self._row_start_for(numel)
        page_level = self.page_level.new_full((old + pages + 1,), -1)
        page_level[:old] = self.page_level[:old]
        lists = free.with_pages(old, pages, row_start.dtype)
        with self._changing_places():
            self._replace(storage, row_start, page_level, grown, moves=True)
            free.add_pages(pages, lists)

    def _grow_stacks(self, heights: Sequence[int]) -> None:
        # No stack holds more rows than the pages do.
        pages = self.page_level.numel() - 1
        limits = zip(heights, self.rows_per_page, strict=True)
        stacks = self._stacks()
        with self._changing_places():
            stacks.reach([min(h, pages * per) for h, per in limits])

    @unrecorded
    def reclaim(self) -> int:
        """Give pages without a row to any level that needs one; gives their number.

        Native kernels do so as soon as a page's last row goes, the others where pages run short.
        """
        self._check_accepted()
        free = self._free_places()
        if isinstance(free, TakenBits):
            return 0
        before = int(free.count[-1])
        self._release(free)
        found = int(free.count[-1]) - before
        if found:
            free.ledger.see([])
            self._count_move()
            self._remember()
        return found

    @unrecorded
    @with_dense_gradient
    def compact(self, rows: int | None = None) -> int:
        """Move rows to lower pages of their levels, until all pages but one of each are full.

        Args:
            rows: how many rows are looked at, from where the last such call stopped, so that a step
                takes bounded time; pages that become empty serve any level. ``num_rows`` looked at
                while no others move, and no hole is left. Default: all rows, then the memory of
                free pages is given back, but within a budget, which keeps it.

        Returns:
            How many rows moved to holes; those of pages that move whole are not counted.

        Raises:
            RuntimeError: rows are shared with other processes, or computed; nothing is changed.
        """
        self._check_accepted()
        self._check_movable()
        self.followers.remember_layout()
        if rows is not None:
            ahead = range(self.cursor, min(self.cursor + rows, self.num_rows))
            begun = range(min(rows - len(ahead), self.cursor))
            self.cursor = (self.cursor + len(ahead) + len(begun)) % max(self.num_rows, 1)
            return sum(self._close_holes(ids) for ids in (ahead, begun) if ids)
        pages = self._pages_needed()
        if self.budget is None:
            self._refuse_replacing(pages * self.page)
        moved = sum(self._close_holes(ids) for ids in self._steps())
        free = self._free_places()
        if isinstance(free, FreeLists):
            self._release(free)
        self._give_back(pages)
        return moved

    def least_bytes(self) -> int:
        """The smallest budget that holds the rows as they are."""
        return table_bytes(
            self.num_rows, self.sizes, self.page, self._pages_needed(), self.storage.element_size()
        )

    def _pages_needed(self) -> int:
        """The fewest pages that hold the rows."""
        levels = zip(self.count_rows(), self.rows_per_page, strict=True)
        return sum(-(-count // per) for count, per in levels)

    @unrecorded
    @with_dense_gradient
    def limit_to(self, budget: int) -> None:
        """From now on storage and locations take ``budget`` bytes at most; the storage is at its
        cap.

        Raises:
            ValueError: the rows take more; nothing is changed.
            RuntimeError: rows are shared with other processes, or computed; nothing is changed.
        """
        pages, held = self.pages_within(budget), self.page_level.numel() - 1
        if held > pages:
            self.budget = None  # which would keep the memory
            self.compact()
            held = self.page_level.numel() - 1
        self.budget = budget
        self.max_elements = pages * self.page
        self._grow(pages - held, at_once=True)

    def pages_within(self, budget: int) -> int:
        """The pages that :meth:`limit_to` leaves; raises as it does, and changes nothing."""
        self._check_accepted()
        before, self.budget = self.budget, budget
        try:
            pages = self._pages_of_budget(self._pages_needed(), 0, self.storage.element_size())
            self._refuse_replacing(pages * self.page)
        finally:
            self.budget = before
        return pages

    def _steps(self) -> Iterator[range]:
        """All ids, some at a time."""
        for first in range(0, self.num_rows, _STEP):
            yield range(first, min(first + _STEP, self.num_rows))

    def _moving(self) -> list[Tensor]:
        """``storage`` and what goes with it."""
        return [self.storage.detach(), *(f.tensor for f in self.followers.per_element())]

    def _close_holes(self, ids: range) -> int:
        """Move the rows of ``ids`` to free places of their levels in lower pages."""
        free, known = self._free_places(), self._digest
        self._digest = None  # should something fail in between
        if isinstance(free, TakenBits):
            places = free.at(self._layout_with_sinks(), self.moves)
            moved = resize.lower_rows(places, ids, self._moving())
        else:
            start = self.row_start[ids.start : ids.stop]
            level = self.page_level[start // self.page].long()
            with self._changing_places():
                at, new = free.lower(start, level)
                if moved := len(at):
                    resize.shift_rows(self._moving(), start[at], new, level[at], self.sizes)
                    start[at] = new.to(start.dtype)
        if moved:
            self._count_move()
            self._remember()
        else:
            self._digest = known
        return moved

    def _give_back(self, pages: int) -> None:
        """Move the pages in use to the front, which are so many; give the others' memory back."""
        level = self.page_level[:-1]
        high = (level[pages:] >= 0).nonzero()[:, 0] + pages
        low = (level[:pages] < 0).nonzero()[:, 0]
        if len(high):
            self._move_pages(high, low)
        numel = pages * self.page
        self._free = None
        if numel < self.storage.numel() and self.budget is None:
            kept = self._fresh_followers(numel, numel)
            storage = on_large_pages(self.storage.detach().new_empty(numel))
            page_level = self.page_level.new_full((pages + 1,), -1)
            page_level[:pages] = level[:pages]
            self._count_move()
            row_start = self._row_start_for(numel)
            self._replace(storage, row_start, page_level, kept, moves=True)

    def _move_pages(self, old: Tensor, new: Tensor) -> None:
        """The pages ``old``, in use, move to the free pages ``new``."""
        step = max(_STEP // self.page, 1)
        for tensor in self._moving():
            pages = tensor.view(-1, self.page)
            for source, target in zip(old.split(step), new.split(step), strict=True):
                pages[target] = pages[source]
        by = torch.zeros_like(self.page_level, dtype=self.row_start.dtype)
        by[old] = ((new - old) * self.page).to(by.dtype)
        # Both hold rows until all have moved, should memory run out in between.
        self._digest = self._free = None
        self.page_level[new] = self.page_level[old]
        for ids in self._steps():
            start = self.row_start[ids.start : ids.stop]
            start += by[start // self.page]  # of an id without a row: the sink's, 0
        self.page_level[old] = -1
        self._count_move()
        self._remember()

    def _row_start_for(self, numel: int) -> Tensor:
        """``row_start`` for a storage of so many elements; a copy, where others hold its memory."""
        row_start, index = self.row_start.detach(), index_dtype(numel)
        if row_start.dtype == index and is_alone(self.row_start, views=2):
            return row_start
        return row_start.to(index, copy=True)
