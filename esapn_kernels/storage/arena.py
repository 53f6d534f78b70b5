"""One flat arena for rows of several sizes, cut into pages that each hold rows of one size.

    storage     |2 2 2 2 2 2 .|8 8 8 . . . .|4 4 4 4 . . .|. . . . . . .|     one 1-D Parameter
    page_level   0             2             1             -1                 int8, one per page
    row_start   [0, 2, 4, P, P + 8, ...]                                      int32, one per row

A row is found by its first element; its level is that of its page. Which rows and pages are free
follows from that (``free``): it is derived before the first row moves, and no checkpoint holds it.
A page whose rows are all free can serve another level (``reclaim``); ``compact`` closes every hole.

``storage``, ``row_start`` and ``page_level`` are the same objects as long as the arena lives. Rows
move in place; where the arena grows or shrinks, all three get new memory in one go. The objects
always show the present arena. Aliases of their memory (a state dict) show it until then, as of any
module, and the whole table as it was afterwards. Every tensor of the shape of ``storage``
(gradient, optimizer state: see ``followers``) grows and moves with it.

With the Triton backend rows move in three launches (``resize``) and the host waits for nothing: it
keeps bounds of the device's counters (``ledger``) and grows the arena by the worst case when rows
may not fit. The other backends find the rows first and grow it by what these need.

This is the slab allocator's idea, and that of paged KV caches, applied to embedding rows. One arena
rather than a table per size: one base pointer for the kernels, and the bytes allocated are exactly
what the report says.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import resize
from ..ops.backend import host_reads, is_capturing, on_large_pages, resolve_backend
from ..ops.layout import Layout, Places, gather_rows, index_dtype
from ..ops.memory import ArenaBytes
from .followers import with_dense_gradient
from .free import FreeLists
from .locations import Locations, unrecorded
from .matching import find_moving
from .replacing import is_alone

__all__ = ["Arena"]


class Arena(Locations):
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

    For its tensors, and how they are checked, see :class:`~.locations.Locations`.
    """

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

    def bytes(self) -> ArenaBytes:
        """Exact bytes: the first three parts sum to what the tensors' allocations hold."""
        elements = sum(c * d for c, d in zip(self.count_rows(), self.sizes, strict=True))
        payload = elements * self.storage.element_size()
        allocated = self.storage.untyped_storage().nbytes()
        locations = sum(b.untyped_storage().nbytes() for b in self.buffers(recurse=False))
        scratch = 0 if self._free is None else self._free.bytes()
        return ArenaBytes(payload, allocated - payload, locations, scratch)

    def forget_counters(self) -> None:
        """Read the free lists' counters anew, once, before the next row moves.

        For replicas, whose hosts must hold the same bounds.
        """
        if self._free is not None:
            self._free.ledger.see([])

    def forget_free_lists(self) -> None:
        """Derive the free lists anew, before the next row moves: for replicas of one state."""
        self._free = None

    def free_places(self) -> list[Tensor]:
        """Starts of the free rows of every level, and the free pages, what is taken first last.

        A state dict does not hold their order: a loaded arena takes the lowest places first. So
        rows that move later lie elsewhere than in the arena that was saved, unless it also takes
        the order, by :meth:`order_free_places`. No output depends on it.
        """
        self._check_accepted()
        return [stack.clone() for stack in self._free_lists().stacks()]

    @unrecorded
    def order_free_places(self, places: Sequence[Tensor]) -> None:
        """Take the order that :meth:`free_places` of an arena of the same layout gave.

        Raises:
            ValueError: other rows or pages are free; nothing is changed.
        """
        self._check_accepted()
        self._free_lists().reorder(places)

    def _free_lists(self) -> FreeLists:
        """Free rows and pages; derived from the locations where they are not known."""
        if self._free is None:
            if is_capturing(self.storage):
                raise RuntimeError("call reserve before capturing a graph in which rows move")
            self._free = FreeLists(self.row_start, self.page_level, self.sizes, self.page)
        return self._free

    def _pages_allowed(self) -> int:
        """Pages by which the arena may still grow."""
        if self.max_elements is None:
            return 1 << 62
        return max(self.max_elements // self.page - (self.page_level.numel() - 1), 0)

    def _make_room(
        self,
        rows: int,
        *,
        takes: bool = True,
        strict: bool = False,
        exact: tuple[list[int], list[int]] | None = None,
    ) -> None:
        """Grow, if ``rows`` more rows might not find room, as far as ``max_elements`` allows.

        Args:
            rows: rows that move, at most.
            takes: whether they take places; rows that are freed only give theirs back.
            strict: refuse where ``max_elements`` allows less, and grow by no more than is missing.
            exact: the rows that every level takes and gives back. Where the bounds of the ledger do
                not suffice these decide, strictly.

        Raises:
            RuntimeError: ``max_elements`` allows less, where that is refused.
        """
        free = self._free_lists()
        free.ledger.refresh(free.count, read=host_reads(free.count))
        missing, heights = free.ledger.worst(rows)
        missing = missing if takes else 0
        suffices = missing <= 0 and all(h <= r for h, r in zip(heights, free.room, strict=True))
        if exact is not None and not suffices:
            taken, given = exact
            missing, heights = self._needs(taken, given)
            rows = max(sum(taken), sum(given))
        if missing > self._pages_allowed() and (strict or exact is not None):
            raise RuntimeError(
                f"the arena is full: {rows} more rows may need {missing} more pages of {self.page} "
                f"elements, max_elements={self.max_elements} allows {self._pages_allowed()}"
            )
        if missing > 0:
            self._grow(missing, at_once=strict)
        self._grow_stacks(heights)

    def _needs(self, taken: list[int], given: list[int]) -> tuple[int, list[int]]:
        """Pages missing for rows of every level, and how high their stacks will stand at most."""
        pages = self._pages_for(taken)
        if int(self._free_lists().count[-1]) < pages:
            self.reclaim()
            pages = self._pages_for(taken)
        free = self._free_lists()
        counts = free.count.tolist()
        free.ledger.see(counts)
        levels = zip(counts[:-1], self.rows_per_page, given, strict=True)
        return pages - counts[-1], [max(count, per) + give for count, per, give in levels]

    def _pages_for(self, taken: list[int]) -> int:
        """Fresh pages that so many rows of every level need beyond those on the stacks."""
        counts = self._free_lists().count.tolist()
        levels = zip(taken, counts, self.rows_per_page, strict=False)
        return sum(-(-max(take - free, 0) // per) for take, free, per in levels)

    def _begin(
        self,
        rows: int,
        *,
        takes: bool = True,
        exact: tuple[list[int], list[int]] | None = None,
    ) -> Places:
        """What a call that moves up to ``rows`` rows works on; see :meth:`_make_room`.

        The backends that say their ``exact`` needs have no use for ``owner``. They need room for
        all rows, so they grow the arena after a capture too; during one they cannot run.
        """
        self._check_movable()
        self.followers.remember_layout()
        is_exact = exact is not None
        free = self._free_lists()
        if is_capturing(self.storage) and not is_exact:
            # The graph holds the addresses: from here on nothing is replaced unasked. It counts its
            # replays itself, and fills the scratch at every one.
            self._captured, self._counted = True, None
            owner = free.owner
            if owner is None:
                owner = free.new_owner(self.num_rows)
        else:
            if is_exact or not self._captured:
                rows = min(rows, self.num_rows)
                self._make_room(rows, takes=takes, exact=exact)
                free = self._free_lists()
                free.ledger.promise(rows)
            if not is_exact and free.owner is None:
                free.owner = free.new_owner(self.num_rows)
            owner = free.owner
        # The operators count, and ``_end`` does: should a kernel fail, what it wrote is looked at.
        self._digest = None
        if not is_exact:
            torch.autograd.graph.increment_version(self.moves)
        layout = Layout(self.row_start, self.page_level, self.sizes, self.page)
        return free.at(layout, owner, self.moves)

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
        free = self._free_lists()
        if not host_reads(free.count) and not is_capturing(self.storage):
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
        free = self._free_lists()
        if self._captured:
            free.ledger.see(free.count.tolist())
            self._counted = int(self.moves)
        self._make_room(rows, strict=True)
        self._captured = False
        free = self._free_lists()
        if free.owner is None and not host_reads(self.storage):
            free.owner = free.new_owner(self.num_rows)

    @unrecorded
    @with_dense_gradient
    def promote(
        self,
        ids: Tensor,
        chain: Tensor,
        mask: Tensor | None = None,
        *,
        carries: bool = False,
        backend: str = "auto",
    ) -> Tensor:
        """Move the rows of ``ids`` (where ``mask``) one level up: ``e' = W_k e + b_k``.

        An id twice moves once; rows at the last level stay. The state of moved rows starts afresh.

        Args:
            ids: int ``[R]``, in range (the Triton backend passes over ids that are not).
            chain: packed hops or tails.
            mask: bool ``[R]``.
            carries: the hops keep a row's numbers, as padded ones that are not trained and tails
                do: Adagrad's sums go along, see ``followers``.
            backend: ``auto`` | ``triton`` | ``native`` | ``torch``.

        Returns:
            Bool ``[R]``: True where the position named a row that this call moved; every
            occurrence of an id that ``mask`` admits says the same.

        Raises:
            RuntimeError: ``max_elements`` does not allow it, or the rows are shared with other
                processes; no row is changed. Within ``max_elements`` the Triton backend moves the
                rows that fit, by level and then in the order of ``ids``.
        """
        return self._hop("promote", ids, chain, mask, carries, backend)

    @unrecorded
    @with_dense_gradient
    def demote(
        self,
        ids: Tensor,
        chain: Tensor,
        mask: Tensor | None = None,
        *,
        carries: bool = False,
        backend: str = "auto",
    ) -> Tensor:
        """Move the rows of ``ids`` (where ``mask``) one level down, to the nearest output.

        As :meth:`promote`; rows at the first level stay, and within ``max_elements`` the Triton
        backend takes rows of higher levels first.
        """
        return self._hop("demote", ids, chain, mask, carries, backend)

    def _hop(
        self,
        call: str,
        ids: Tensor,
        chain: Tensor,
        mask: Tensor | None,
        carries: bool,
        backend: str,
    ) -> Tensor:
        """``promote`` or ``demote``."""
        backend = resolve_backend(backend, ids.device)
        self._check_accepted()
        step = 1 if call == "promote" else -1
        exact = movers = None
        if backend != "triton":
            movers = self._find_movers(ids, mask, call, backend)
            given = movers.per_level
            if not any(given):
                return movers.moved
            exact = ([0, *given[:-1]] if step > 0 else [*given[1:], 0]), given
        before = None
        if carries:
            in_range = (ids >= 0) & (ids < self.num_rows)
            known = torch.where(in_range, ids, self.num_rows)  # else the sink, without a row
            before = known, self.row_start[known], self.level(known)
        places = self._begin(ids.numel(), exact=exact)
        operands = ids, mask, self.storage.detach(), chain.detach(), places
        states = self.followers.fresh()
        move = resize.promote if step > 0 else resize.demote
        moved = move(*operands, *states, movers)
        self._end()
        self.followers.note_fresh(ids, moved)
        if before is not None:
            self.followers.carry(*before, moved, places.row_size, step)
        return moved

    @unrecorded
    @with_dense_gradient
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
        backend = resolve_backend(backend, ids.device)
        self._check_accepted()
        exact = movers = None
        if backend != "triton":
            movers = self._find_movers(ids, None, "insert", backend)
            taken = [ids.numel() if k == level else 0 for k in range(len(self.sizes))]
            exact = taken, [0] * len(taken)
        places = self._begin(ids.numel(), exact=exact)
        operands = ids, level, self.storage.detach(), places
        moved = resize.insert(*operands, *self.followers.fresh(), movers)
        self._end()
        self.followers.note_fresh(ids, moved)
        return moved

    @unrecorded
    @with_dense_gradient
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
        backend = resolve_backend(backend, ids.device)
        self._check_accepted()
        exact = movers = None
        if backend != "triton":
            movers = self._find_movers(ids, None, "free", backend)
            exact = [0] * len(self.sizes), movers.per_level
        places = self._begin(ids.numel(), takes=False, exact=exact)
        moved = resize.free(ids, self.storage.detach(), places, movers)
        self._end()
        return moved

    def _find_movers(
        self, ids: Tensor, mask: Tensor | None, call: str, backend: str
    ) -> resize.Movers:
        """The rows that ``call`` moves on a backend other than Triton.

        Raises:
            ValueError: ids that ``insert`` or ``free`` does not take.
        """
        layout = Layout(self.row_start, self.page_level, self.sizes, self.page)
        movers = resize.find_movers(ids, mask, layout, call, backend=backend)
        if call in ("insert", "free") and sum(movers.per_level) != ids.numel():
            if ids.numel() != ids.unique().numel():
                raise ValueError(f"{call} takes distinct ids")
            raise ValueError(f"{call} takes ids that have {'no' if call == 'insert' else 'a'} row")
        return movers

    def _grow(self, pages: int, *, at_once: bool = False) -> None:
        """Add pages; an eighth at least unless ``at_once``, at most what is allowed."""
        old = self.page_level.numel() - 1
        # Amortised growth, with at most that much slack.
        pages = min(pages if at_once else max(pages, old // 8), self._pages_allowed())
        if not pages:
            return
        free, numel = self._free_lists(), (old + pages) * self.page
        self._refuse_replacing(numel)
        index = index_dtype(numel)
        held = self.storage.numel()
        storage = on_large_pages(self.storage.detach().new_empty(numel))
        storage[held:] = 0
        grown = self._fresh_followers(numel, held)
        row_start = self.row_start.detach()
        if row_start.dtype != index or not is_alone(self.row_start, views=2):
            row_start = row_start.to(index, copy=True)
        page_level = self.page_level.new_full((old + pages + 1,), -1)
        page_level[:old] = self.page_level[:old]
        lists = free.with_pages(old, pages, index)
        self._replace(storage, row_start, page_level, grown, moves=True)
        free.add_pages(pages, *lists)

    def _grow_stacks(self, heights: Sequence[int]) -> None:
        # No stack holds more rows than the pages do.
        pages = self.page_level.numel() - 1
        limits = zip(heights, self.rows_per_page, strict=True)
        self._free_lists().reach([min(h, pages * per) for h, per in limits])

    @unrecorded
    def reclaim(self) -> int:
        """Return pages without a row in use to the page stack; gives their number."""
        self._check_accepted()
        pages = self.page_level.numel() - 1
        start = self.row_start[self.row_start >= 0].long()
        used = torch.bincount(start // self.page, minlength=pages) > 0
        found = (~used & (self.page_level[:-1] >= 0)).nonzero()[:, 0]
        if len(found):
            self._check_movable()
            self._count_move()
            self.page_level[found] = -1
            self._free = None
            self._remember()
        return len(found)

    @unrecorded
    @with_dense_gradient
    def compact(self) -> None:
        """Rewrite the arena without holes: the fewest pages that hold the rows in use."""
        self.followers.remember_layout()
        level, device = self.level(), self.storage.device
        old_start = self.row_start[:-1].long()
        starts, page_level = (t.to(device) for t in self._place(level.cpu()))
        numel = (len(page_level) - 1) * self.page
        self._refuse_replacing(numel)
        storage = on_large_pages(self.storage.detach().new_zeros(numel))
        grown = self._fresh_followers(numel)
        for old, packed in [(self.storage.detach(), storage), *((f.tensor, v) for f, v in grown)]:
            for k, dim in enumerate(self.sizes):
                mine = (level == k).nonzero()[:, 0]
                if len(mine):
                    into = starts[mine].long()[:, None] + torch.arange(dim, device=device)
                    packed[into] = gather_rows(old, old_start[mine], dim)
        self._count_move()
        self._replace(storage, starts, page_level, grown)
        self._free = None

    @unrecorded
    def lies_as(self, other: Arena) -> bool:
        """Whether every row has the size and the place that it has in ``other``.

        If so, this arena takes over the other's count of moves.

        Args:
            other: an arena of as many ids and the same sizes.

        Raises:
            RuntimeError: rows are mixed in one of the two, see :attr:`layout`.
        """
        mine, theirs = self.layout, other.layout
        # A layout is the same object until rows move or the locations are written to, so that an
        # average that is updated after every step reads nothing, on no device. Only the replays of
        # a CUDA graph go unseen by the host.
        known = self._alike
        graphs = self.moved_by_graphs or other.moved_by_graphs
        if known is not None and not graphs and known[0]() is mine and known[1]() is theirs:
            return True
        alike = self.storage.shape == other.storage.shape and all(
            own.dtype == place.dtype and torch.equal(own, place.to(own.device))
            for own, place in (
                (mine.row_start, theirs.row_start),
                (mine.page_level, theirs.page_level),
            )
        )
        if alike:
            self._take_count(other)
            self._remember()
            self._note_alike(other)
        return alike

    def _take_count(self, other: Arena) -> None:
        """Whoever copies all buffers of ``other``, as averages do, finds what is there."""
        self._counted = int(other.moves)
        self.moves.fill_(self._counted)

    def _note_alike(self, other: Arena) -> None:
        self._alike = weakref.ref(self.layout), weakref.ref(other.layout)

    @property
    def moved_by_graphs(self) -> bool:
        """Whether a CUDA graph that was captured moves rows, which the host does not see."""
        return self._counted is None

    def refuse_matching(self, other: Arena) -> None:
        """Raise what :meth:`match` raises; change nothing."""
        self._check_accepted()
        numel = other.storage.numel()
        if self.max_elements is not None and numel > self.max_elements:
            raise RuntimeError(
                f"the rows take {numel} elements, max_elements={self.max_elements} allows fewer"
            )
        self._refuse_replacing(numel)

    @unrecorded
    @with_dense_gradient
    def match(self, other: Arena, chain: Tensor) -> None:
        """Give every row the size and the place that it has in ``other``, as ``matching`` says.

        The state of rows whose size changes starts afresh.

        Args:
            other: an arena of as many ids and the same sizes, on any device.
            chain: packed hops or tails, by which rows that are longer there are carried up.

        Raises:
            RuntimeError: ``max_elements`` does not allow it, the rows are shared with other
                processes or computed; nothing is changed.
        """
        self.refuse_matching(other)
        self.followers.remember_layout()
        storage, numel = self.storage.detach(), other.storage.numel()
        row_start, page_level = (place.to(storage.device) for place in other.places[:2])
        moving = find_moving(
            Layout(self.row_start, self.page_level, self.sizes, self.page),
            Layout(row_start, page_level, self.sizes, self.page),
            storage,
            self.followers.fresh()[0],
            chain.detach(),
            other.storage.detach(),
        )
        for follower in self.followers.per_id():
            follower.tensor[moving.resized] = follower.fresh
        self._take_count(other)
        self._digest = self._free = None
        if numel == storage.numel():
            moving.write([storage, *(f.tensor for f in self.followers.per_element())])
            self.row_start.copy_(row_start)
            self.page_level.copy_(page_level)
            self._remember()
        else:
            # Other memory for everything: aliases keep the old table whole.
            grown = self._fresh_followers(numel)
            packed, kept = storage.new_zeros(numel), min(numel, storage.numel())
            packed = on_large_pages(packed)
            for old, into in [(storage, packed), *((f.tensor, value) for f, value in grown)]:
                into[:kept] = old[:kept]
            moving.write([packed, *(value for _, value in grown)])
            self._replace(packed, row_start.clone(), page_level.clone(), grown)
        self._note_alike(other)
