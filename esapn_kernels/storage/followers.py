"""Optimizer state of rows that move.

Any ``torch.optim`` optimizer that holds an arena's ``storage`` keeps, per element, state of the
same shape (Adam's moments, Adagrad's sum, SGD's momentum). When a row moves, that state must move
or be reset, and when the arena grows, it must grow. One hook, run before every optimizer step,
finds the optimizers that hold an arena, so user code does not register anything; rows that move
before an optimizer's first step find no state to move. State that is older than that step,
Adagrad's, made when it is built, or loaded with a checkpoint, is brought to the rows' places then:
the arena remembers the layout that its own checkpoint had. The optimizers of ``optim`` are followed
from construction on, and say themselves which of their state goes with rows
(``state_per_element``) and which with ids (``state_per_id``).

Documented behaviour: the state of a *resized* row starts afresh (zero; Adagrad's configured
``initial_accumulator_value``, Rprop's ``lr``), as that of a row never seen; the state of every
other row is untouched wherever the row moves. The shared step counter of Adam goes on.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..ops.update import row_table

if TYPE_CHECKING:
    from .arena import Arena

__all__ = [
    "Companion",
    "follow",
    "of",
    "of_ids",
    "reset_ids",
    "state_bytes",
    "track",
    "unfollow",
    "with_dense_gradient",
]

_arenas: weakref.WeakSet[Arena] = weakref.WeakSet()
_optimizers: weakref.WeakKeyDictionary[Arena, weakref.WeakSet[torch.optim.Optimizer]] = (
    weakref.WeakKeyDictionary()
)


@dataclass(frozen=True)
class Companion:
    """A tensor that goes with the rows; ``fresh`` is what it holds for a row never seen."""

    tensor: Tensor
    fresh: float
    replace: Callable[[Tensor], None]


def track(arena: Arena) -> None:
    """Follow ``arena``: optimizers that step it are found from now on."""
    _arenas.add(arena)


def follow(arena: Arena, optimizer: torch.optim.Optimizer) -> None:
    """From now on ``optimizer``'s state goes with the rows of ``arena``."""
    _optimizers.setdefault(arena, weakref.WeakSet()).add(optimizer)


def unfollow(arena: Arena, optimizer: torch.optim.Optimizer) -> None:
    """The opposite of :func:`follow`."""
    _optimizers.setdefault(arena, weakref.WeakSet()).discard(optimizer)


def _find(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if not _arenas:
        return
    # The optimizers of optim say themselves when to follow.
    followed = hasattr(optimizer, "state_per_element")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for arena in _arenas:
        if id(arena.storage) in held:
            if not followed and optimizer not in _optimizers.get(arena, ()):
                follow(arena, optimizer)
                _fit(arena, optimizer)
            arena.forget_layout()


def _fresh(group: dict[str, Any], name: str) -> float:
    """What an element of the state ``name`` starts as."""
    if name == "sum":
        return group.get("initial_accumulator_value", 0.0)
    return float(group["lr"]) if name == "step_size" else 0.0  # Rprop's


def _fit(arena: Arena, optimizer: torch.optim.Optimizer) -> None:
    """Bring state that was made, or loaded, before rows moved to where they are now."""
    storage = arena.storage
    for name, value in optimizer.state.get(storage, {}).items():
        whole = isinstance(value, Tensor) and value.dim() == 1 and value.numel() % arena.page == 0
        if not whole or not value.numel():
            continue
        fresh = _fresh(_group(optimizer, storage), name)
        if arena.loaded_layout is not None:
            optimizer.state[storage][name] = _relocated(arena, value, fresh)
        elif value.shape != storage.shape:
            fitted = value.new_full(storage.shape, fresh)
            if value.numel() < storage.numel():
                fitted[: value.numel()] = value  # growth moves no row
            optimizer.state[storage][name] = fitted


def _relocated(arena: Arena, state: Tensor, fresh: float) -> Tensor:
    """``state`` as it lay in the layout that the arena was loaded with, in the present one.

    Rows that were resized since hold ``fresh``, as does a tensor of another layout.
    """
    assert arena.loaded_layout is not None
    row_start, page_level = arena.loaded_layout
    moved = state.new_full(arena.storage.shape, fresh)
    if state.numel() != (page_level.numel() - 1) * arena.page:
        return moved
    old_start, new_start = row_start[:-1].long(), arena.row_start[:-1].long()
    level = page_level[old_start // arena.page]
    stays = level == arena.level()
    for k, dim in enumerate(arena.sizes):
        mine = stays & (level == k)
        rows = row_table(state, dim).index_select(0, old_start[mine])
        row_table(moved, dim).index_copy_(0, new_start[mine], rows)
    return moved


def _group(optimizer: torch.optim.Optimizer, storage: Tensor) -> dict[str, Any]:
    return next(g for g in optimizer.param_groups if any(p is storage for p in g["params"]))


register_optimizer_step_pre_hook(_find)


def of(arena: Arena) -> Iterator[Companion]:
    """Tensors of the storage's shape: its gradient, and the state that optimizers hold for it."""
    storage = arena.storage
    if storage.grad is not None and not storage.grad.is_sparse:
        yield Companion(storage.grad, 0.0, lambda value: setattr(storage, "grad", value))
    for optimizer in _optimizers.get(arena, ()):
        state = optimizer.state.get(storage)
        if state:
            yield from _companions(state, _per_element(optimizer, storage))


def with_dense_gradient(move: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a method that moves an arena's rows: a sparse gradient is dense meanwhile."""

    @functools.wraps(move)
    def moving(arena: Arena, *args: Any, **kwargs: Any) -> Any:
        storage = arena.storage
        if storage.grad is None or not storage.grad.is_sparse:
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


def _per_element(optimizer: torch.optim.Optimizer, storage: Tensor) -> dict[str, float]:
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


def _companions(state: dict[str, Any], fresh: dict[str, float]) -> Iterator[Companion]:
    for name, value in fresh.items():

        def replace(moved: Tensor, name: str = name) -> None:
            state[name] = moved

        yield Companion(state[name], value, replace)


def of_ids(arena: Arena) -> Iterator[Companion]:
    """State with one number per id, ``[num_rows]``, that the optimizers of ``optim`` hold."""
    for optimizer in _optimizers.get(arena, ()):
        declared = getattr(optimizer, "state_per_id", None)
        if declared:
            yield from _companions(optimizer.state[arena.storage], declared)


def reset_ids(arena: Arena, ids: Tensor) -> None:
    """State with one number per id becomes that of an id never seen."""
    for companion in of_ids(arena):
        companion.tensor.index_fill_(0, ids.long(), companion.fresh)


def state_bytes(arena: Arena) -> int:
    """Bytes of the optimizer state held for ``arena.storage``."""
    found = [c for c in of(arena) if c.tensor is not arena.storage.grad]
    found += of_ids(arena)
    return sum(c.tensor.untyped_storage().nbytes() for c in found)
