"""One flat arena for rows of several sizes, cut into pages that each hold rows of one size.

    storage     |2 2 2 2 2 2 .|8 8 8 . . . .|4 4 4 4 . . .|. . . . . . .|     one 1-D Parameter
    page_level   0             2             1             -1                 int8, one per page
    row_start   [0, 2, 4, P, P + 8, ...]                                      int32, one per row

A row is found by its first element; its level is that of its page. Which places and pages are free
follows from that (``room``): it is derived before the first row moves, and no checkpoint holds it.
A page whose rows have all gone serves any level; ``compact`` closes every hole.

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

import torch
from torch import Tensor

from ..ops import resize
from ..ops.backend import on_large_pages, resolve_backend
from ..ops.fit import DownHops
from ..ops.layout import FreePlaces, Layout
from ..ops.memory import ArenaBytes
from .followers import with_dense_gradient
from .locations import unrecorded
from .matching import find_moving
from .room import Room

__all__ = ["Arena"]


class Arena(Room):
    """Rows ``0 .. num_rows - 1``, each at one of ``sizes``, in one flat Parameter.

    Args:
        num_rows: number of rows ``N``.
        sizes: increasing row sizes.
        level: initial level of every row: an int, an integer tensor ``[N]`` (-1: no row yet), or
            -1 for an empty arena.
        max_elements: the arena never grows beyond so many elements (whole pages of them); default:
            no limit.
        budget: the bytes of storage, locations and ``beside`` never exceed it. The storage has at
            once all pages that it allows; rows that find no room stay and are counted
            (``refusals``), on every backend.
        beside: bytes of what else counts.
        device, dtype: of ``storage``.

    Raises:
        ValueError: the rows do not fit in ``max_elements`` or in the budget.

    For its tensors, and how they are checked, see :class:`~.locations.Locations`.
    """

    def bytes(self) -> ArenaBytes:
        """Exact bytes: the first three parts sum to what the tensors' allocations hold."""
        elements = sum(c * d for c, d in zip(self.count_rows(), self.sizes, strict=True))
        payload = elements * self.storage.element_size()
        allocated = self.storage.untyped_storage().nbytes()
        locations = sum(b.untyped_storage().nbytes() for b in self.buffers(recurse=False))
        scratch = 0 if self._free is None else self._free.bytes()
        composed = 0 if self._down is None else self._down.bytes()
        return ArenaBytes(payload, allocated - payload, locations, scratch, composed)

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
        movers = None
        if backend != "triton":
            movers = self._find_movers(ids, mask, call, backend)
            if self.budget is not None:
                enters = [k + step for k in range(len(self.sizes))]
                movers = self._that_fit(movers, ids, call, enters)
            given = movers.per_level
            if not any(given):
                return movers.moved
            taken = [0, *given[:-1]] if step > 0 else [*given[1:], 0]
        before = None
        if carries and self.followers.has_sums():
            in_range = (ids >= 0) & (ids < self.num_rows)
            known = torch.where(in_range, ids, self.num_rows)  # else the sink, without a row
            before = known, self.row_start[known], self.level(known)
        places: FreePlaces
        if movers is None:
            places = self._begin_unread(ids.numel())
        else:
            places = self._begin(taken, given, movers.backend)
        operands = ids, mask, self.storage.detach(), chain.detach(), places
        states = self.followers.fresh()
        with self._changing_places():
            if step > 0:
                moved = resize.promote(*operands, *states, movers)
            else:
                self._down = self._down or DownHops()
                moved = resize.demote(*operands, *states, movers, self._down)
        self._end()
        self.followers.note_fresh(ids, moved)
        if before is not None:
            self.followers.carry(*before, moved, self.row_size, step)
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
        movers = None
        places: FreePlaces
        if backend == "triton":
            places = self._begin_unread(ids.numel())
        else:
            movers = self._find_movers(ids, None, "insert", backend)
            if self.budget is not None:
                movers = self._that_fit(movers, ids, "insert", [level] * len(self.sizes))
            entering = sum(movers.per_level)
            taken = [entering if k == level else 0 for k in range(len(self.sizes))]
            places = self._begin(taken, [0] * len(taken), movers.backend)
        operands = ids, level, self.storage.detach(), places
        with self._changing_places():
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
        movers = None
        places: FreePlaces
        if backend == "triton":
            places = self._begin_unread(ids.numel(), takes=False)
        else:
            movers = self._find_movers(ids, None, "free", backend)
            places = self._begin([0] * len(self.sizes), movers.per_level, movers.backend)
        with self._changing_places():
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
                f"the rows take {numel} elements, {self.cap} allows {self.max_elements}"
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
