"""One flat arena for rows of several sizes, cut into pages that each hold rows of one size.

    storage     |2 2 2 2 2 2 .|8 8 8 . . . .|4 4 4 4 . . .|. . . . . . .|     one 1-D Parameter
    page_level   0             2             1             -1                 int8, one per page
    row_start   [0, 2, 4, P, P + 8, ...]                                      int32, one per row

A row is found by its first element; its level is that of its page. Free rows of every level form a
stack, and so do free pages; rows are taken from and given back to them by prefix sums. A page whose
rows are all free can serve another level (``reclaim``); ``compact`` closes every hole. ``storage``
keeps its identity as a Parameter while it grows, and every tensor of its shape (gradient, optimizer
state: see ``followers``) grows and moves with it.

With the Triton backend rows move in three launches (``resize``) and the host waits for nothing: it
keeps bounds of the device's counters (``ledger``) and grows the arena by the worst case when rows
may not fit.

This is the slab allocator's idea, and that of paged KV caches, applied to embedding rows. One arena
rather than a table per size: one base pointer for the kernels, and the bytes allocated are exactly
what the report says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import resize
from ..ops.backend import host_reads, is_capturing, resolve_backend
from ..ops.layout import (
    UNCLAIMED,
    Layout,
    Places,
    gather_rows,
    index_dtype,
    page_elements,
    place_densely,
)
from ..ops.memory import ArenaBytes
from .followers import Follower, Followers, with_dense_gradient
from .ledger import Ledger
from .rows import Rows

__all__ = ["Arena"]


def _upload(values: Sequence[int], device: torch.device) -> Tensor:
    """``torch.tensor(values, device=device)`` that does not wait for the device."""
    pinned = torch.tensor(values, pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)


class Arena(nn.Module, Rows):
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
    _owner: Tensor | None
    _room: list[int]
    _initial_level: Tensor | None
    _layout: tuple[Tensor, Tensor, Layout] | None

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
            starts, page_level, free = self._place(level)
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
        self._layout = None
        self.followers = Followers(self)

    def _lay_out(self, starts: Tensor, page_level: Tensor, free: Sequence[Tensor]) -> None:
        """Make every buffer, from a layout on the CPU."""
        index = index_dtype(self.storage.numel())
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

    def _place(self, level: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        return place_densely(level, self.sizes, self.page)

    def _set(self, name: str, value: Tensor, persistent: bool = True) -> None:
        self.register_buffer(name, value.to(self.storage.device), persistent)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Arena:
        super()._apply(fn, recurse)
        if self._initial_level is not None and not self.storage.is_meta:
            with torch.device("cpu"):
                self._lay_out(*self._place(self._initial_level))
            self._initial_level = None
        return self

    # ---- room ---------------------------------------------------------------------------------

    def forget_counters(self) -> None:
        """Read the free lists' counters anew, once, before the next row moves.

        For tensors that were replaced, and for replicas, whose hosts must know the same.
        """
        self._ledger.see([])
        self._room = []

    def _refresh(self) -> None:
        """Bring what the host knows of the free lists up to date, as far as that costs nothing."""
        if not self._room:
            base = self.free_base.tolist()
            self._room = [b - a for a, b in zip(base, base[1:], strict=False)]
        self._ledger.refresh(self.free_count, read=host_reads(self.free_count))

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
        self._refresh()
        missing, heights = self._ledger.worst(rows)
        missing = missing if takes else 0
        suffices = missing <= 0 and all(h <= r for h, r in zip(heights, self._room, strict=True))
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
        if int(self.free_count[-1]) < pages:
            self.reclaim()
            pages = self._pages_for(taken)
        counts = self.free_count.tolist()
        self._ledger.see(counts)
        levels = zip(counts[:-1], self.rows_per_page, given, strict=True)
        return pages - counts[-1], [max(count, per) + give for count, per, give in levels]

    def _pages_for(self, taken: list[int]) -> int:
        """Fresh pages that so many rows of every level need beyond those on the stacks."""
        levels = zip(taken, self.free_count.tolist(), self.rows_per_page, strict=False)
        return sum(-(-max(take - free, 0) // per) for take, free, per in levels)

    def _begin(
        self,
        rows: int,
        *,
        takes: bool = True,
        exact: tuple[list[int], list[int]] | None = None,
    ) -> Places:
        """What a call that moves up to ``rows`` rows works on; see :meth:`_make_room`.

        The torch backend, which says its ``exact`` needs, has no use for ``owner``. It needs room
        for all rows, so it grows the arena after a capture too; during one it cannot run.
        """
        self.followers.remember_layout()
        is_exact = exact is not None
        owner = None if is_exact else self._owner
        if is_capturing(self.free_count) and not is_exact:
            # The graph holds the addresses: from here on nothing is replaced unasked.
            self._captured = True
            if owner is None:
                owner = self._new_owner()  # filled by the graph, at every replay
        else:
            if is_exact or not self._captured:
                rows = min(rows, self.num_rows)
                self._make_room(rows, takes=takes, exact=exact)
                self._ledger.promise(rows)
            if not is_exact and (owner is None or owner.device != self.storage.device):
                owner = self._owner = self._new_owner()
        return Places(
            Layout(self.row_start, self.page_level, self.sizes, self.page),
            self.free_rows,
            self.free_pages,
            self.free_count,
            self.free_base,
            self.row_size,
            self._rows_per_page,
            owner,
        )

    def _new_owner(self) -> Tensor:
        return torch.full_like(self.row_start[:-1], UNCLAIMED, dtype=torch.int32)

    def _end(self) -> None:
        """Request a copy of the counters, where the host does not read them anyway."""
        if not host_reads(self.free_count) and not is_capturing(self.free_count):
            self._ledger.request(self.free_count)

    @with_dense_gradient
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
        self.followers.remember_layout()  # a graph would record the copying
        if self._captured:
            self._ledger.see(self.free_count.tolist())
        self._make_room(rows, strict=True)
        self._captured = False
        if self._owner is None and not host_reads(self.storage):
            self._owner = self._new_owner()

    # ---- reading ----------------------------------------------------------------------------

    @property
    def parameter(self) -> nn.Parameter:
        """``storage``."""
        return self.storage

    @property
    def layout(self) -> Layout:
        """Where the rows lie, as the lookup takes it."""
        # Past nn.Module's own lookup of attributes, for the sake of small batches.
        buffers: Any = self._buffers
        row_start, page_level = buffers["row_start"], buffers["page_level"]
        if torch.compiler.is_compiling():
            return self._sliced(row_start, page_level)
        # Sliced once for the tensors of the moment.
        held = self._layout
        if held is None or held[0] is not row_start or held[1] is not page_level:
            held = self._layout = row_start, page_level, self._sliced(row_start, page_level)
        return held[2]

    def _sliced(self, row_start: Tensor, page_level: Tensor) -> Layout:
        return Layout(row_start[:-1], page_level[:-1], self.sizes, self.page)

    def level(self, ids: Tensor | None = None) -> Tensor:
        """Level of every row of ``ids`` (of all rows), int64; -1 where there is no row."""
        start = self.row_start[:-1] if ids is None else self.row_start[ids]
        # No row: -1 // page is -1, the sink, which always holds -1.
        return self.page_level[start // self.page].long()

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

    # ---- rows that move -----------------------------------------------------------------------

    @torch.no_grad()
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
            ids: int ``[R]``, in range (the Triton backend passes over others).
            chain: packed hops.
            mask: bool ``[R]``.
            carries: the hops pad with zeros and are not trained: Adagrad's sums go along, see
                ``followers``.
            backend: ``auto`` | ``triton`` | ``torch``.

        Returns:
            Bool ``[R]``: True where the position named a row that this call moved; every
            occurrence of an id that ``mask`` admits says the same.

        Raises:
            RuntimeError: ``max_elements`` does not allow it; no row is changed. The Triton backend
                moves the rows that fit, by level and then in the order of ``ids``.
        """
        backend = resolve_backend(backend, ids.device)
        exact = movers = None
        if backend == "torch":
            layout = Layout(self.row_start, self.page_level, self.sizes, self.page)
            movers = resize.find_movers(ids, mask, layout)
            if not movers[0].numel():
                return torch.zeros_like(ids, dtype=torch.bool)
            given = torch.bincount(movers[1], minlength=len(self.sizes)).tolist()
            exact = [0, *given[:-1]], given
        before = None
        if carries:
            in_range = (ids >= 0) & (ids < self.num_rows)
            known = torch.where(in_range, ids, self.num_rows)  # others: the sink, without a row
            before = known, self.row_start[known], self.level(known)
        places = self._begin(ids.numel(), exact=exact)
        operands = ids, mask, self.storage.detach(), chain.detach(), places
        states = self.followers.fresh()
        moved = resize.promote(*operands, *states, backend=backend, movers=movers)
        if before is not None:
            self.followers.carry(*before, moved, self.row_size)
        self._end()
        return moved

    @torch.no_grad()
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
        exact = None
        if backend == "torch":
            _refuse_repeated(ids, "insert")
            if bool((self.row_start[ids] >= 0).any()):
                raise ValueError("insert takes ids that have no row")
            taken = [ids.numel() if k == level else 0 for k in range(len(self.sizes))]
            exact = taken, [0] * len(taken)
        places = self._begin(ids.numel(), exact=exact)
        operands = ids, level, self.storage.detach(), places
        moved = resize.insert(*operands, *self.followers.fresh(), backend=backend)
        self._end()
        return moved

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
        backend = resolve_backend(backend, ids.device)
        exact = None
        if backend == "torch":
            _refuse_repeated(ids, "free")
            if bool((self.row_start[ids] < 0).any()):
                raise ValueError("free takes ids that have a row")
            given = torch.bincount(self.level(ids), minlength=len(self.sizes)).tolist()
            exact = [0] * len(given), given
        places = self._begin(ids.numel(), takes=False, exact=exact)
        moved = resize.free(ids, self.storage.detach(), places, backend=backend)
        self._end()
        return moved

    # ---- between steps: growth, reclaiming, compaction ----------------------------------------

    def _everything(self) -> Iterator[Follower]:
        """``storage`` itself, then every tensor that moves with it."""
        yield Follower("storage", self.storage.detach(), 0.0, self._replace_storage)
        yield from self.followers.per_element()

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
        for follower in list(self._everything()):
            grown = follower.tensor.new_full((new * self.page,), follower.fresh)
            grown[: follower.tensor.numel()] = follower.tensor
            follower.replace(grown)
        index = index_dtype(self.storage.numel())
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
    @with_dense_gradient
    def compact(self) -> None:
        """Rewrite the arena without holes: the fewest pages that hold the rows in use."""
        # Places saved for a pending backward are no longer where the rows are.
        torch.autograd.graph.increment_version(self.storage)
        self.followers.remember_layout()
        level = self.level()
        old_start = self.row_start[:-1].long()
        starts, page_level, free = self._place(level.cpu())
        device = self.storage.device
        starts = starts.to(device)
        for follower in list(self._everything()):
            packed = follower.tensor.new_full((len(page_level) * self.page,), follower.fresh)
            for k, dim in enumerate(self.sizes):
                mine = (level == k).nonzero()[:, 0]
                if len(mine):
                    rows = gather_rows(follower.tensor, old_start[mine], dim)
                    into = starts[mine][:, None] + torch.arange(dim, device=device)
                    packed[into] = rows
            follower.replace(packed)
        index = index_dtype(self.storage.numel())
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
                for follower in list(self._everything()):
                    fresh = follower.tensor.new_full(saved["storage"].shape, follower.fresh)
                    follower.replace(fresh)
            for name, buffer in list(self.named_buffers(recurse=False)):
                if name in saved:
                    setattr(self, name, torch.empty_like(saved[name], device=buffer.device))
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)
        self.forget_counters()
        if held and not self.storage.is_meta:
            self._initial_level = None
            self.followers.note_loading()

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

    def __getstate__(self) -> dict[str, Any]:
        # A copy has no fused optimizer, and its own scratch.
        alone = {"_fused": None, "_owner": None, "_layout": None, "followers": None}
        return {**self.__dict__, **alone, "_ledger": Ledger(self.rows_per_page, [])}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.forget_counters()
        self._captured = False
        self.followers = Followers(self)


def _refuse_repeated(ids: Tensor, call: str) -> None:
    if ids.numel() != ids.unique().numel():
        raise ValueError(f"{call} takes distinct ids")
