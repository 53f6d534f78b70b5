"""Gradient and optimizer state of rows that move.

Any ``torch.optim`` optimizer that holds an arena's ``storage`` keeps, per element, state of the
same shape (Adam's moments, Adagrad's sum, SGD's momentum). When a row moves, that state must move
or be reset, and when the arena grows, it must grow. One hook, run before every optimizer step,
finds the optimizers that hold an arena, so user code does not register anything; rows that move
before an optimizer's first step find no state to move. State that is older than that step
(Adagrad's is made when it is built; a checkpoint brings some) is taken to the rows' places then:
the arena remembers the layout that its own checkpoint had. The optimizers of ``optim`` are followed
from construction on, and say themselves which of their state goes with rows
(``state_per_element``) and which with ids (``state_per_id``).

Documented behaviour: the state of a *resized* row starts afresh (zero; Adagrad's configured
``initial_accumulator_value``, Rprop's ``lr``), as that of a row never seen; the state of every
other row is untouched wherever the row moves. The shared step counter of Adam goes on. There is one
exception, Adagrad's sums under hops that keep a row's numbers: zero-padding hops that are not
trained (``B = 0``, ``b = 0``), and tails, trained or not,

    e' = [g e; B e + b],   g = sqrt(d_{k+1} / d_k)
    dL/de_j = g dL/de'_j + (B^T dL/de'_tail)_j      (j < d_k)

where the sum of squared gradients of the old numbers carries over, ``s'_j = s_j / g^2``, and only
the new numbers start afresh: without it, a grown row moves by the whole learning rate again. While
``B = 0`` this is the sum that the larger row would have had, exactly. Once tails have been learnt
it is not: what came by way of ``B`` stays in ``s_j``, although ``e'_j`` has no such gradient. A
demotion is the reverse: ``s_j = g^2 s'_j``, and the sums of the other numbers go.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..ops.backend import host_reads
from ..ops.chain import compute_dtype
from ..ops.layout import Filled, Layout, chunks, row_table
from ..ops.row_gradient import RowGradient
from ..ops.update import RowStep

__all__ = ["Follower", "Followers", "with_dense_gradient"]

SUM = "sum"
"""The name of Adagrad's state."""


class Followed(Protocol):
    """What is followed: an arena, or a table."""

    @property
    def parameter(self) -> nn.Parameter:
        """What holds its rows."""

    @property
    def layout(self) -> Layout:
        """Where its rows lie."""

    @property
    def fused_optimizer(self) -> RowStep | None:
        """The optimizer of ``optim`` that steps them."""


class HasState(Protocol):
    """What keeps state of rows, as an optimizer does."""

    @property
    def state(self) -> Mapping[Any, dict[str, Any]]:
        """Of ``Followed.parameter``, tensors by name."""

    @property
    def state_per_element(self) -> Mapping[str, float]:
        """Names of those of the parameter's shape, and what a fresh row has there."""

    @property
    def state_per_id(self) -> Mapping[str, float]:
        """Names of those with a number a row, and what a fresh row has there."""


@dataclass(frozen=True)
class Follower:
    """A tensor that goes with the rows; ``fresh`` is what it holds for a row never seen."""

    name: str
    tensor: Tensor
    fresh: float
    replace: Callable[[Tensor], None]


class Followers:
    """Everything that goes with the rows of one arena.

    Args:
        rows: the arena, which owns this object.
    """

    def __init__(self, rows: Followed) -> None:
        self._rows = weakref.ref(rows)
        self._optimizers: weakref.WeakSet[Any] = weakref.WeakSet()
        self._was_loaded = False
        self._loaded: tuple[Tensor, Tensor] | None = None
        _every.add(self)

    @property
    def _arena(self) -> Followed:
        arena = self._rows()
        assert arena is not None
        return arena

    def add(self, optimizer: torch.optim.Optimizer | HasState) -> None:
        """From now on ``optimizer``'s state goes with the rows."""
        self._optimizers.add(optimizer)

    def discard(self, optimizer: torch.optim.Optimizer) -> None:
        """The opposite of :meth:`add`."""
        self._optimizers.discard(optimizer)

    def per_element(self) -> Iterator[Follower]:
        """Tensors of the storage's shape: its gradient, and what optimizers hold for it."""
        storage: nn.Parameter | None = self._arena.parameter
        if storage is None:
            return  # a table whose weight is computed
        grad = storage.grad
        if grad is not None and not grad.is_sparse and not isinstance(grad, RowGradient):
            yield Follower("grad", grad, 0.0, lambda value: setattr(storage, "grad", value))
        for optimizer in self._optimizers:
            state = optimizer.state.get(storage)
            if state:
                yield from _followers(state, _per_element(optimizer, storage))

    def per_id(self) -> Iterator[Follower]:
        """State with one number per id, ``[N]``, that the optimizers of ``optim`` hold."""
        for optimizer in self._optimizers:
            declared = getattr(optimizer, "state_per_id", None)
            if declared:
                yield from _followers(optimizer.state[self._arena.parameter], declared)

    def fresh(self) -> tuple[Filled, Filled]:
        """All of them, per element and per id, with what a fresh row holds."""
        return (
            [(f.tensor, f.fresh) for f in self.per_element()],
            [(f.tensor, f.fresh) for f in self.per_id()],
        )

    def state_bytes(self) -> int:
        """Bytes of the optimizer state; the gradient is not among it."""
        found = [f for f in self.per_element() if f.name != "grad"]
        found += self.per_id()
        return sum(f.tensor.untyped_storage().nbytes() for f in found)

    def has_sums(self) -> bool:
        """Whether there is something to :meth:`carry`."""
        return bool(self._sums())

    def _sums(self) -> list[Follower]:
        return [follower for follower in self.per_element() if follower.name == SUM]

    def carry(
        self,
        ids: Tensor,
        start: Tensor,
        level: Tensor,
        moved: Tensor,
        row_size: Tensor,
        step: int = 1,
    ) -> None:
        """Adagrad's sums of resized rows, ``s'_j = s_j d / d'`` for the numbers of both.

        Reads nothing on the host where ``ids`` are on a GPU.

        Args:
            ids: int ``[R]``, as they were given to a promotion or demotion by hops that keep a
                row's numbers; ``N`` in place of ids out of range.
            start, level: ``[R]``, where the rows lay before it.
            moved: bool ``[R]``, what it returned.
            row_size: int64 ``[n]``, the sizes.
            step: 1 of a promotion, -1 of a demotion.
        """
        sums = self._sums()
        if not sums or not self._arena.parameter.numel():
            return
        layout = self._arena.layout
        if host_reads(ids):
            kept = moved.nonzero()[:, 0]
            ids, start, level, moved = ids[kept], start[kept], level[kept], moved[kept]
        moved = moved & _first_of_equal(ids, moved, layout.num_rows)
        width = row_size[level.clamp(min=0)]
        now = row_size[(level + step).clamp(min=0, max=len(layout.sizes) - 1)]
        column = torch.arange(layout.dim, device=ids.device)
        carried = moved[:, None] & (column < torch.minimum(width, now)[:, None])
        new_start = layout.row_start[ids.clamp(max=layout.num_rows - 1)]
        for follower in sums:
            flat = follower.tensor
            # Resized rows left their old places as they were: no row of the call enters them.
            old = flat[_elements(start, column, flat)]
            dtype = compute_dtype(flat.dtype)
            ratio = (width.to(dtype) / now)[:, None]
            # Beyond what a fresh row has, so that adding is setting; the rest adds nothing.
            value = torch.where(carried, old.to(dtype) * ratio - follower.fresh, 0.0)
            into = _elements(new_start, column, flat)
            flat.index_put_((into,), value.to(flat.dtype), accumulate=True)

    def note_loading(self) -> None:
        """The arena was loaded: state that is loaded with it lies in the present layout."""
        self._was_loaded, self._loaded = True, None

    def remember_layout(self) -> None:
        """Before rows move: keep where a checkpoint had them, until an optimizer has stepped.

        The state of an optimizer that is loaded as well lies there, and no step has shown it yet.
        """
        if self._was_loaded and self._loaded is None:
            layout = self._arena.layout
            self._loaded = layout.row_start.clone(), layout.page_level.clone()

    def note_fresh(self, ids: Tensor, moved: Tensor) -> None:
        """Rows of ``ids`` are others where ``moved``, and no checkpoint has state of them.

        Their size does not say so: a row may have gone up and down again.
        """
        if self._loaded is None or not ids.numel() or not self._loaded[0].numel():
            return
        start = self._loaded[0]
        # The least value stays, so that ids may come twice; the host reads nothing.
        value = torch.where(moved, -1, torch.iinfo(start.dtype).max).to(start.dtype)
        start.scatter_reduce_(0, ids.long().clamp(0, len(start) - 1), value, "amin")

    def forget_layout(self) -> None:
        """State goes with the rows from now on: an optimizer has stepped, or all of it is fresh."""
        self._was_loaded, self._loaded = False, None

    def holds_any(self, parameters: set[int]) -> bool:
        """Whether the storage is one of ``parameters``, by ``id``; False once the arena is gone."""
        arena = self._rows()
        return arena is not None and id(arena.parameter) in parameters

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """``optimizer``, which holds the storage, is about to step.

        Raises:
            RuntimeError: another optimizer, a deferred one, steps the rows.
        """
        # The optimizers of optim say themselves when to follow.
        declares = hasattr(optimizer, "state_per_element")
        own = self._arena.fused_optimizer
        deferred = own is not None and own.deferred
        if not declares and deferred and self._arena.parameter.grad is not None:
            raise RuntimeError(
                f"{type(optimizer).__name__} would step rows that a deferred "
                f"{type(own).__name__} steps: build it on the parameters without "
                "arena.storage (with one size weight)"
            )
        if not declares and optimizer not in self._optimizers:
            self.add(optimizer)
            self._fit(optimizer)
        self.forget_layout()

    @torch.inference_mode(False)
    @torch.no_grad()
    def _fit(self, optimizer: torch.optim.Optimizer) -> None:
        """Bring state that was made, or loaded, before rows moved to where they are now."""
        storage = self._arena.parameter
        if storage.dim() != 1:
            return  # a table, whose rows stay where they are
        layout = self._arena.layout
        for name, value in optimizer.state.get(storage, {}).items():
            if not isinstance(value, Tensor) or value.dim() != 1 or value.numel() % layout.page:
                continue
            if not value.numel():
                continue
            fresh = _fresh(_group(optimizer, storage), name)
            if self._loaded is not None:
                moved = value.new_full(storage.shape, fresh)
                _relocate(value, moved, self._loaded, layout)
                optimizer.state[storage][name] = moved
            elif value.shape != storage.shape:
                fitted = value.new_full(storage.shape, fresh)
                if value.numel() < storage.numel():
                    fitted[: value.numel()] = value  # growth moves no row
                optimizer.state[storage][name] = fitted


_every: weakref.WeakSet[Followers] = weakref.WeakSet()


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if not _every:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for followers in _every:
        if followers.holds_any(held):
            followers.before_step(optimizer)


register_optimizer_step_pre_hook(_before_step)


def with_dense_gradient(move: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a method that moves an arena's rows: a sparse gradient is dense meanwhile.

    One that lists rows is brought to where they are then.
    """

    @functools.wraps(move)
    def moving(arena: Followed, *args: Any, **kwargs: Any) -> Any:
        storage = arena.parameter
        if storage.is_leaf and isinstance(storage.grad, RowGradient):
            listed, storage.grad = storage.grad, None
            try:
                return move(arena, *args, **kwargs)
            finally:
                storage.grad = listed.at(arena.layout, storage)
        if not storage.is_leaf or storage.grad is None or not storage.grad.is_sparse:
            return move(arena, *args, **kwargs)
        sparse = storage.grad
        storage.grad = sparse.to_dense()
        try:
            result = move(arena, *args, **kwargs)
        except BaseException:
            storage.grad = sparse
            raise
        storage.grad = storage.grad.to_sparse()
        return result

    return moving


def _relocate(state: Tensor, into: Tensor, loaded: tuple[Tensor, Tensor], layout: Layout) -> None:
    """Copy ``state`` of the rows that kept their size, from the layout ``loaded`` to the present.

    A tensor of another layout leaves ``into`` as it is, and so do rows that were resized.
    """
    row_start, page_level = loaded
    if state.numel() != page_level.numel() * layout.page or not into.numel():
        return
    for part in chunks(layout.num_rows):
        old_start, new_start = row_start[part].long(), layout.row_start[part].long()
        old, new = (
            torch.where(start >= 0, level[start.clamp(min=0) // layout.page], -1)
            for start, level in ((old_start, page_level), (new_start, layout.page_level))
        )
        for k, dim in enumerate(layout.sizes):
            mine = (old == k) & (new == k)
            rows = row_table(state, dim).index_select(0, old_start[mine])
            row_table(into, dim).index_copy_(0, new_start[mine], rows)


def _first_of_equal(ids: Tensor, chosen: Tensor, beyond: int) -> Tensor:
    """Bool ``[R]``: whether a position is the first of the ``chosen`` ones with its id."""
    key, order = torch.where(chosen, ids, beyond).sort(stable=True)
    first = torch.ones_like(chosen)
    first[1:] = key[1:] != key[:-1]
    return torch.empty_like(chosen).scatter_(0, order, first)


def _elements(start: Tensor, column: Tensor, flat: Tensor) -> Tensor:
    """Positions ``[R, len(column)]`` from each row's first element on, inside ``flat``."""
    return (start.long()[:, None] + column).clamp(min=0, max=flat.numel() - 1)


def _fresh(group: dict[str, Any], name: str) -> float:
    """What an element of the state ``name`` starts as."""
    if name == SUM:
        return group.get("initial_accumulator_value", 0.0)
    return float(group["lr"]) if name == "step_size" else 0.0  # Rprop's


def _group(optimizer: torch.optim.Optimizer, storage: Tensor) -> dict[str, Any]:
    return next(g for g in optimizer.param_groups if any(p is storage for p in g["params"]))


def _per_element(optimizer: torch.optim.Optimizer, storage: Tensor) -> Mapping[str, float]:
    """Names of the state in the arena's layout, and what an element of it starts as."""
    declared = getattr(optimizer, "state_per_element", None)
    if declared is not None:
        return declared
    group = _group(optimizer, storage)
    for name, value in list(optimizer.state[storage].items()):
        if isinstance(value, Tensor) and value.is_sparse:
            # SGD's momentum begins as the first gradient; dense, it takes sparse ones as well.
            optimizer.state[storage][name] = value.to_dense()
    return {
        name: _fresh(group, name)
        for name, value in optimizer.state[storage].items()
        if isinstance(value, Tensor) and value.shape == storage.shape
    }


def _followers(state: dict[str, Any], fresh: Mapping[str, float]) -> Iterator[Follower]:
    for name, value in fresh.items():

        def replace(moved: Tensor, name: str = name) -> None:
            state[name] = moved

        yield Follower(name, state[name], value, replace)
