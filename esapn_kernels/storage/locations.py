"""The tensors of an arena, which are copied, loaded, moved and written to as any module's are.

    storage, row_start, page_level    the same objects as long as the arena lives, see ``arena``
    layout                            the locations, checked wherever these tensors have changed

Loaders assign tensors and averages of parameters write to them, without a call of the arena. So
``layout`` compares the tensors and their versions with those *accepted* last, which takes six
comparisons; other tensors, or the same after a write, are checked before they are used.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.backend import is_capturing, on_large_pages, untouched_zeros
from ..ops.checks import is_eager
from ..ops.counts import DeviceCount
from ..ops.fit import DownHops
from ..ops.layout import (
    Layout,
    chunks,
    count_levels,
    index_dtype,
    page_elements,
    place_densely,
    write_rows,
)
from .cap import most_pages, pages_within, table_bytes
from .checks import digest, fault_of, is_hooked, is_shared, version
from .followers import Follower, Followers, with_dense_gradient
from .free import FreeLists
from .replacing import replace_follower, replace_parameter, run_all
from .rows import Rows
from .taken import TakenBits

__all__ = ["Locations", "unrecorded"]

_SHARED = (
    "rows in shared memory do not move, for other processes read them: resize them before "
    "share_memory(), or resize a copy.deepcopy of the module"
)
_COMPUTED = (
    "rows move only in a Parameter, and arena.storage is computed by a parametrization, by pruning "
    "or for a replica of nn.DataParallel: resize the rows of the module itself, before"
)
_HOOKED = (
    "growth would lose the hook on the autograd node of arena.storage: register the hook on "
    "arena.storage itself"
)
_MIXED = (
    "rows have moved in this table or in the one that it is averaged or copied from, so that its "
    "numbers mix rows: average by esapn_kernels.averaging, or load a whole state dict"
)


def unrecorded(call: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a method whose tensors last: without gradient, and no inference tensors.

    But a copy that was made in inference mode holds such tensors, and keeps to that mode.
    """

    @functools.wraps(call)
    def decorated(arena: Locations, *args: Any, **kwargs: Any) -> Any:
        with arena.mode(), torch.no_grad():
            return call(arena, *args, **kwargs)

    return decorated


class Locations(nn.Module, Rows):
    """Rows in one flat Parameter and where they lie: an arena before any row moves.

    The arguments are those of :class:`~esapn_kernels.storage.arena.Arena`.

    Attributes:
        storage: Parameter ``[capacity]``; zero wherever no row has been written.
        row_start: int32 (int64 past 2^31 elements) ``[N + 1]``: first element, -1 for no row. The
            last entry is a sink, always -1.
        page_level: int8 ``[pages + 1]``, -1 for a free page; the last entry is a sink.
        row_size: int64 ``[n]``: the sizes, so that a checkpoint says what its levels are.
        moves: int64, calls by which rows may have moved; in no checkpoint. A copy that is updated
            in place (an average of parameters) tells from it that its rows lie elsewhere.
        refusals: how many rows did not move, because ``max_elements`` left no room; in no
            checkpoint.
    """

    storage: nn.Parameter
    row_start: Tensor
    page_level: Tensor
    row_size: Tensor
    moves: Tensor
    followers: Followers
    refusals: DeviceCount
    _initial_level: int | Tensor | None
    _free: FreeLists | TakenBits | None
    # Also of arenas that were pickled without it.
    budget: int | None = None
    # What demotions have solved for.
    _down: DownHops | None = None
    # A CUDA graph that moves rows holds the addresses.
    _captured: bool = False
    # The tensors last accepted, how often row_start and moves were written to then, the layout.
    _held: tuple[Tensor, Tensor, Tensor, Tensor, int, int, Layout] | None
    # What moves should hold (None: a CUDA graph counts), and a digest of row_start, if known.
    _counted: int | None
    _digest: Tensor | int | None
    # The layouts of this arena and of another whose rows lay alike when they were last compared.
    _alike: tuple[weakref.ref[Layout], weakref.ref[Layout]] | None

    @torch.inference_mode(False)
    def __init__(
        self,
        num_rows: int,
        sizes: Sequence[int],
        *,
        level: int | Tensor = 0,
        max_elements: int | None = None,
        budget: int | None = None,
        beside: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_rows = num_rows
        self.max_elements = max_elements
        self.budget = budget
        self.sizes = tuple(sizes)
        self.page = page_elements(self.sizes, num_rows)
        self.rows_per_page = [self.page // d for d in self.sizes]
        if isinstance(level, Tensor):
            level = level.cpu()
        none = torch.empty(0, device=device, dtype=dtype)
        starts, page_level = self._place(level, none.device)
        pages = len(page_level) - 1
        if budget is not None:
            pages = self._pages_of_budget(pages, beside, none.element_size())
            self.max_elements = pages * self.page
        make = none.new_zeros if budget is None else partial(untouched_zeros, none)
        storage = make(pages * self.page)
        self.storage = nn.Parameter(on_large_pages(storage))
        self._free = self._held = self._digest = self._alike = None
        self._set_locations(starts, page_level, pages)
        # On the meta device there are no locations: to_empty makes them, and needs to know.
        self._initial_level = level if self.storage.is_meta else None
        self.followers = Followers(self)
        self.refusals = DeviceCount()

    def _pages_of_budget(self, needed: int, beside: int, itemsize: int) -> int:
        """The pages that ``budget`` has room for; rows at their first sizes take ``needed``.

        Raises:
            ValueError: the budget has room for fewer.
        """
        assert self.budget is not None
        table = self.num_rows, self.sizes, self.page
        pages = pages_within(self.budget - beside, *table, itemsize)
        if pages < needed:
            least = table_bytes(*table, needed, itemsize) + beside
            raise ValueError(
                f"a budget of {self.budget} bytes does not hold {self.num_rows} rows at their "
                f"first sizes, with what says where they lie and the hops: {least} bytes do"
            )
        return min(pages, most_pages(*table))

    def _place(
        self, level: int | Tensor, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """``row_start`` and ``page_level`` of the densest placement, see :func:`place_densely`.

        Raises:
            ValueError: ``max_elements`` allows fewer pages.
        """
        placed = place_densely(level, self.num_rows, self.sizes, self.page, device)
        elements = (len(placed[1]) - 1) * self.page
        if self.max_elements is not None and elements > self.max_elements:
            raise ValueError(f"the rows take {elements} elements, {self.cap} allows fewer")
        return placed

    @property
    def cap(self) -> str:
        """What limits the arena, for messages."""
        if self.budget is None:
            return f"max_elements={self.max_elements}"
        return f"the budget of {self.budget} bytes"

    def _set_locations(self, row_start: Tensor, page_level: Tensor, pages: int) -> None:
        """Make every buffer anew, of so many pages: those that are left are free."""
        device = self.storage.device
        row_start = row_start.to(index_dtype(pages * self.page))
        page_level = F.pad(page_level, (0, pages + 1 - len(page_level)), value=-1)
        self.register_buffer("row_start", row_start.to(device))
        self.register_buffer("page_level", page_level.to(device))
        self.register_buffer("row_size", torch.tensor(self.sizes, device="cpu").to(device))
        moves = torch.zeros((), dtype=torch.int64, device=device)
        self.register_buffer("moves", moves, persistent=False)
        self._counted = 0
        self._accept()

    def mode(self) -> torch.inference_mode:
        """Inference mode off, unless the tensors are such as can be written to in it alone."""
        tensors = (self.storage, self.row_start, self.page_level, self.moves)
        return torch.inference_mode(any(t.is_inference() for t in tensors))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> nn.Module:
        """As ``nn.Module``'s, but that integers stay what they are."""
        with self.mode():
            return self._convert(fn, recurse)

    def _convert(self, fn: Callable[..., Any], recurse: bool) -> nn.Module:
        self._refuse_mixed()
        level = self._initial_level if self._is_on_meta() else None
        if self.moves.is_meta and not self.storage.is_meta:
            self._count_anew()  # no loader brings it

        def keep(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if tensor.is_floating_point() or result is tensor:
                return result
            if result.dtype != tensor.dtype:
                return tensor.to(result.device)
            if not tensor.is_meta and not result.is_meta:
                result.copy_(tensor)  # to_empty brings no numbers
            return result

        super()._apply(keep, recurse)
        self._free = None
        if level is not None and not self.storage.is_meta:
            pages = self.storage.numel() // self.page
            self._set_locations(*self._place(level, self.storage.device), pages)
            self._initial_level = None
        return self

    def _is_on_meta(self) -> bool:
        return all(tensor.is_meta for tensor in self._tensors().values())

    @property
    def parameter(self) -> nn.Parameter:
        """``storage``."""
        return self.storage

    @property
    def places(self) -> tuple[Tensor, ...]:
        """The buffers that say where rows lie: integers, which no average may round."""
        return self.row_start, self.page_level, self.row_size, self.moves

    @property
    def layout(self) -> Layout:
        """Where the rows lie, as the lookup takes it.

        Raises:
            RuntimeError: the tensors were replaced by some that do not fit together, or written to
                so that rows are mixed (see ``moves``).
        """
        # Past nn.Module's own lookup of attributes, for the sake of small batches.
        buffers: Any = self._buffers
        row_start, page_level = buffers["row_start"], buffers["page_level"]
        if torch.compiler.is_compiling() or torch._C._is_tracing():
            return self._sliced(row_start, page_level)
        if self._held is not None:
            storage, start, level, moves, starts_written, moves_written, layout = self._held
            try:
                if (
                    starts_written == start._version
                    and moves_written == moves._version
                    and start is row_start
                    and level is page_level
                    and storage is self._parameters.get("storage")
                    and moves is buffers["moves"]
                ):
                    return layout
            except RuntimeError:
                pass  # inference tensors do not count what is written to them
        return self._revalidate()

    def _sliced(self, row_start: Tensor, page_level: Tensor) -> Layout:
        return Layout(row_start[:-1], page_level[:-1], self.sizes, self.page)

    def levels(self, size: int = 1 << 18) -> Iterator[tuple[slice, Tensor]]:
        """The levels of all rows, int8, so many at a time; -1 where there is no row."""
        for part in chunks(self.num_rows, size):
            # No row: -1 // page is -1, the sink, which always holds -1.
            yield part, self.page_level[self.row_start[part] // self.page]

    def count_rows(self) -> list[int]:
        """How many rows every size has; on the meta device, at the start."""
        if isinstance(self._initial_level, int) and self._is_on_meta():
            return [self.num_rows * (k == self._initial_level) for k in range(len(self.sizes))]
        self._check_accepted()
        total = torch.zeros(len(self.sizes), dtype=torch.int64, device=self.row_start.device)
        for _, level in self.levels():
            total += count_levels(level, len(self.sizes))
        return total.tolist()

    def _tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds."""
        names = ("storage", "row_start", "page_level", "row_size")
        return {name: getattr(self, name) for name in names}

    @torch.inference_mode(False)
    def _revalidate(self) -> Layout:
        """Check tensors that were assigned or written to since the last call, and accept them."""
        layout = self._sliced(self.row_start, self.page_level)
        tensors = self._tensors()
        plain = all(type(t) in (Tensor, nn.Parameter) for t in tensors.values())
        if not plain or not is_eager() or is_capturing(self.storage) or self._is_on_meta():
            return layout
        written = self._is_written()
        if written and self._is_mixed():
            raise RuntimeError(_MIXED)
        on_meta = [name for name, t in tensors.items() if t.is_meta]
        known = self._digest is not None if written else written is False
        if known and not on_meta and self._fits_pages():
            # The numbers that were there, or another storage alone (torch.func.functional_call).
            self._remember()
            return layout
        why = f"{on_meta[0]} has not been loaded" if on_meta else self._fault(tensors)
        if why:
            raise RuntimeError(
                f"the tensors of the arena do not fit together, {why}: load a state dict as a whole"
            )
        if not written:
            self._recount()
        self._free = self._initial_level = None
        self._accept()
        return layout

    def _fits_pages(self) -> bool:
        fits = self.storage.shape == ((self.page_level.numel() - 1) * self.page,)
        return fits and self.storage.is_floating_point()

    def _fault(self, tensors: Mapping[str, Tensor]) -> str:
        return fault_of(tensors, self.num_rows, self.sizes, self.page)

    def _is_written(self) -> bool | None:
        """Whether the accepted locations were written to; ``None``: these are other tensors."""
        held = self._held
        if held is None or held[1] is not self.row_start or held[2] is not self.page_level:
            return None
        if held[3] is not self.moves:
            return None
        return (held[4], held[5]) != (version(self.row_start), version(self.moves))

    def _is_mixed(self) -> bool:
        """Whether the locations that were written are not those where storage has its rows."""
        if self._counted is not None and int(self.moves) != self._counted:
            return True
        known = self._digest
        return known is not None and bool(digest(self.row_start) != known)

    def _refuse_faulty(self) -> None:
        """Raise if the locations are not places of rows."""
        if why := self._fault(self._tensors()):
            raise RuntimeError(
                f"the tensors of the arena do not fit together, {why}: average by "
                "esapn_kernels.averaging, or load a state dict as a whole"
            )

    def _refuse_mixed(self) -> None:
        if self._is_written():
            self._revalidate()

    def _recount(self) -> None:
        """Keep ``moves`` where it moved with the rows, to another device; else make it anew."""
        moves, counted = self.moves, self._counted
        if moves.device == self.storage.device and counted in (None, int(moves)):
            self._counted = int(moves)
        else:
            self._count_anew()

    def _count_anew(self) -> None:
        """Give ``moves`` a count that no earlier locations had."""
        self._counted = (int(self.moves) if self._counted is None else self._counted) + 1
        self.moves = torch.full((), self._counted, dtype=torch.int64, device=self.storage.device)

    def _accept(self) -> None:
        """Accept the present tensors: the locations are sound, and storage has its rows there."""
        self._digest = digest(self.row_start)
        self._remember()

    def _remember(self) -> None:
        """Note the present tensors and versions, after the arena's own writes."""
        row_start, page_level, moves = self.row_start, self.page_level, self.moves
        writes = version(row_start), version(moves)
        layout = self._sliced(row_start, page_level)
        self._held = self.storage, row_start, page_level, moves, *writes, layout

    def _check_accepted(self) -> None:
        """Raise what :attr:`layout` raises."""
        _ = self.layout

    def _refuse_replacing(self, numel: int) -> None:
        """Raise where memory for ``numel`` elements in place of the present must not be taken."""
        self._check_movable()
        if numel != self.storage.numel() and is_hooked(self.storage):
            raise RuntimeError(_HOOKED)

    def _fresh_followers(self, numel: int, begin: int = 0) -> list[tuple[Follower, Tensor]]:
        """Everything that goes with the rows, and memory for it with fresh rows from ``begin``."""
        found = []
        for follower in self.followers.per_element():
            value = on_large_pages(follower.tensor.new_empty(numel))
            value[begin:] = follower.fresh
            found.append((follower, value))
        return found

    def _replace(
        self,
        storage: Tensor,
        row_start: Tensor,
        page_level: Tensor,
        grown: list[tuple[Follower, Tensor]],
        *,
        moves: bool = False,
    ) -> None:
        """Take new memory, allocated before, for everything; aliases of the old keep it whole.

        Args:
            grown: empty afterwards.
            moves: the present numbers move to the beginning of what takes their place.
        """
        # Places saved for a pending backward are no longer where the rows are.
        if not self.storage.is_inference():
            torch.autograd.graph.increment_version(self.storage)
        data = [storage]
        if storage.shape != self.storage.shape:
            # A graph that is still alive (the last step's loss) holds the node that accumulates
            # into storage, and with it the old shape. Only another dtype makes autograd forget it.
            other = torch.float64 if storage.dtype == torch.float32 else torch.float32
            data.insert(0, storage.new_empty(0, dtype=other))
        steps: list[Callable[[], None]] = [
            self._remember,
            partial(setattr, self.page_level, "data", page_level),
            partial(setattr, self.row_start, "data", row_start),
        ]
        # What is replaced is given back before the next: no follower stays in a list.
        while grown:
            steps.append(partial(replace_follower, *grown.pop(), moves))
        steps.append(partial(replace_parameter, self.storage, storage, data, moves))
        run_all(steps)

    def _check_movable(self) -> None:
        if self._parameters.get("storage") is None:
            raise RuntimeError(_COMPUTED)
        if is_shared([self.storage, self.row_start]):
            raise RuntimeError(_SHARED)

    def _save_to_state_dict(self, *args: Any) -> None:
        self._refuse_mixed()
        if self._digest is None and not self.storage.is_meta:
            # What is saved may be written to in place, by averages of what a state dict holds.
            self._digest = digest(self.row_start)
        super()._save_to_state_dict(*args)

    @unrecorded
    @with_dense_gradient
    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *lists: Any
    ) -> None:
        """Take the saved arena's shapes: rows of a checkpoint may have grown. All or nothing.

        Only an arena on the meta device takes tensors one by one; they are checked at first use.
        """
        missing, _, errors = lists
        saved, own = self._saved(state_dict, prefix), self._tensors()
        assign = metadata.get("assign_to_params_buffers", False)
        faults = self._loading_faults(saved, prefix)
        if faults or not self._is_loadable(saved):
            errors += faults
            missing += [prefix + name for name in own if name not in saved]
            return
        if assign:
            # Of inference tensors copies, from which gradients can be taken.
            with torch.inference_mode(False):
                saved = {name: t.clone() if t.is_inference() else t for name, t in saved.items()}
        if assign or any(t.is_meta for t in own.values()):
            # What is assigned must be of the shape of what it takes the place of.
            for name, tensor in saved.items():
                if tensor.shape != own[name].shape:
                    self._put_placeholder(name, tensor)
        elif saved and saved["storage"].shape != self.storage.shape:
            numel = saved["storage"].numel()
            try:
                self._replace(
                    self.storage.detach().new_empty(numel),
                    self.row_start.new_empty(self.row_start.shape, dtype=index_dtype(numel)),
                    self.page_level.new_empty(saved["page_level"].shape),
                    self._fresh_followers(numel, numel),
                )
                # Once the old is given back.
                for tensor, fresh in self.followers.fresh()[0]:
                    tensor.fill_(fresh)
            finally:
                self._held = None  # no numbers are there yet
        present = {prefix + name: tensor for name, tensor in saved.items()}
        if saved:
            self._held = None  # its views would hinder torch from swapping what they are of
        found = len(errors)
        super()._load_from_state_dict({**state_dict, **present}, prefix, metadata, strict, *lists)
        if len(errors) > found:
            return  # what was taken is checked at first use
        if len(saved) == len(own) and not self.storage.is_meta:
            self._free = self._initial_level = None
            self._count_anew()
            self._accept()
            self.followers.note_loading()

    def state_of(self, rows: Tensor) -> dict[str, Tensor]:
        """What a checkpoint would hold, were all rows of the largest size and these, ``[N, D]``.

        Raises:
            ValueError: ``max_elements`` does not allow it.
        """
        row_start, page_level = self._place(len(self.sizes) - 1, rows.device)
        state = self._state(row_start, page_level, rows.dtype)
        write_rows(state["storage"], row_start, rows.detach())
        return state

    def check_levels(self, level: Tensor) -> None:
        """Raise what :meth:`state_at` would; nothing is allocated but locations."""
        self._place(level, level.device)

    def state_at(self, level: Tensor) -> dict[str, Tensor]:
        """What a checkpoint would hold, were the rows of these levels, ``[N]``, and zeros.

        It has the pages that the arena has now, or those that it needs where these are more.

        Raises:
            ValueError: ``max_elements`` does not allow it.
        """
        row_start, page_level = self._place(level, self.storage.device)
        pages = max(len(page_level), self.page_level.numel())
        page_level = F.pad(page_level, (0, pages - len(page_level)), value=-1)
        row_start = row_start.to(index_dtype((pages - 1) * self.page))
        return self._state(row_start, page_level, self.storage.dtype)

    def _state(
        self, row_start: Tensor, page_level: Tensor, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        elements, device = (len(page_level) - 1) * self.page, row_start.device
        storage = torch.zeros(elements, dtype=dtype, device=device)
        sizes = torch.tensor(self.sizes, device=device)
        state = (storage, row_start, page_level, sizes)
        return dict(zip(self._tensors(), state, strict=True))

    def _put_placeholder(self, name: str, saved: Tensor) -> None:
        """Assign a tensor of the shape of ``saved``, without numbers."""
        own = getattr(self, name)
        empty = torch.empty(saved.shape, dtype=own.dtype, device="meta")
        if name == "storage":
            empty = nn.Parameter(empty, own.requires_grad)
        setattr(self, name, empty)

    def _saved(self, state_dict: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
        """What ``state_dict`` holds of an arena at ``prefix``."""
        names = (name for name in self._tensors() if prefix + name in state_dict)
        return {name: state_dict[prefix + name] for name in names}

    def _is_loadable(self, saved: Mapping[str, Tensor]) -> bool:
        """Whether nothing is missing: a part can be loaded only in place of no numbers at all."""
        own = self._tensors()
        return len(saved) in (0, len(own)) or any(t.is_meta for t in own.values())

    def fits(self, state_dict: Mapping[str, Any], prefix: str) -> bool:
        """Whether a saved arena, if ``state_dict`` holds one at ``prefix``, can be loaded."""
        saved = self._saved(state_dict, prefix)
        return self._is_loadable(saved) and not self._loading_faults(saved, prefix)

    def _loading_faults(self, saved: Mapping[str, Tensor], prefix: str) -> list[str]:
        """Why what is saved does not fit this arena; missing keys aside."""
        own = self._tensors()
        if len(saved) < len(own):
            return []
        rows, name = saved["row_start"].shape, prefix[:-1] or "the arena"
        if rows != self.row_start.shape:
            return [
                f"size mismatch for {prefix}row_start: copying a param with shape {rows} from "
                f"checkpoint, the shape in current model is {self.row_start.shape}."
            ]
        on_meta = any(t.is_meta for t in saved.values())
        if on_meta and not self._is_on_meta():
            return [f"{name} was saved on the meta device, without numbers."]
        sizes, pages = saved["row_size"], saved["page_level"].numel() - 1
        readable = not on_meta and sizes.dtype == torch.int64
        numel = saved["storage"].numel()
        if readable and sizes.tolist() != list(self.sizes):
            return [f"{name} was saved with other sizes than {list(self.sizes)}."]
        if numel != pages * self.page:
            return [
                f"{name} was saved with {numel} elements in {pages} pages, which are {self.page} "
                "elements long here: load it where it was saved, and save to_embedding()."
            ]
        if self.max_elements is not None and numel > self.max_elements:
            return [
                f"{name} was saved with {numel} elements, {self.cap} allows {self.max_elements}."
            ]
        why = self._fault(saved)
        if why:
            return [f"{name} cannot be loaded: {why}."]
        if numel != self.storage.numel() and not self._is_on_meta():
            try:
                self._refuse_replacing(numel)
            except RuntimeError as error:
                return [f"{name} cannot be loaded: {error}."]
        return []

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_mixed()
        # A copy has no fused optimizer, its own free places and solutions, and keeps no page.
        alone = dict.fromkeys(
            ("_fused", "_free", "_down", "_held", "_digest", "_alike", "followers")
        )
        alone["_captured"], alone["kept_pages"] = False, 0
        counted = int(self.moves) if self._counted is None else self._counted
        accepted = self._is_written() is False
        return {**self.__dict__, **alone, "_counted": counted, "_accepted": accepted}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        accepted = state.pop("_accepted")
        state.setdefault("refusals", DeviceCount())
        super().__setstate__(state)
        self.followers = Followers(self)
        # A copied optimizer's state lies as the rows do now, and no step has shown it yet.
        self.followers.note_loading()
        if accepted:
            self._accept()
