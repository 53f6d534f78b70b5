"""``RowGradient``: the gradient of the rows that lookups met, in the place of that of all rows.

    dense        [capacity], zeros but for a batch's rows
    here         the rows of the batches alone:  ids [R],  level [R],  place [R],  values

It is the ``grad`` of the Parameter that holds the rows and has that one's shape and dtype, so that
what reads and scales gradients works on it as on others: the engine adds it up, ``GradScaler``,
``clip_grad_norm_`` and ``clip_grad_value_``, ``norm``, hooks that scale. All elements that are not
listed are 0. Only deferred optimizers of ``esapn_kernels.optim`` make it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..cpu import native, row_step
from ..cpu.lookup import by_level
from ..gpu.row_step import launch_row_step
from .backend import resolve_backend, runs_native
from .chain import compute_dtype
from .layout import Layout, row_table
from .update import CollectedRows, Update

__all__ = ["RowGradient", "step_rows"]

_aten = torch.ops.aten

_ALIASES = {_aten.detach.default, _aten.alias.default}
_VIEWS = {_aten.view.default, _aten._unsafe_view.default, _aten._reshape_alias.default}
_SUMS = {_aten.add.Tensor, _aten.add_.Tensor}
# Of these the zeros that are not listed stay zeros, or count for nothing.
_SCALINGS = {
    _aten.clone.default,
    _aten.mul.Tensor,
    _aten.mul_.Tensor,
    _aten.div.Tensor,
    _aten.div_.Tensor,
    _aten.neg.default,
    _aten.neg_.default,
}
_CLAMPS = {_aten.clamp.default, _aten.clamp_.default}
_NORMS = {
    _aten.linalg_vector_norm.default,
    _aten.norm.Scalar,
    _aten.norm.ScalarOpt_dim,
}
_FOREACH_NORM = _aten._foreach_norm.Scalar
_FOREACH_SCALINGS = {_aten._foreach_mul_.Tensor, _aten._foreach_mul_.Scalar}
_UNSCALE = _aten._amp_foreach_non_finite_check_and_unscale_.default

_CANNOT = (
    "{} cannot write to a gradient that holds the rows of the batch alone: set grad to its "
    "to_dense() first, or build the optimizer without deferred=True"
)


class RowGradient(Tensor):
    """Gradients of rows as a tensor of the rows' shape and dtype.

    Args:
        parts: what lookups collected; equal ids may be in several.
        layout: where the rows lie.
        like: the Parameter, or what has its shape and dtype.

    Notes:
        The numbers are kept in the dtype of the sums, fp32 (fp64 for fp64 rows), whatever the
        dtype. What is not written for the rows alone runs on :meth:`to_dense`, if it returns a new
        tensor, and raises if it writes in place; a part (``grad[3]``) is a copy. Aliases share
        their numbers.
    """

    parts: list[CollectedRows]  # shared by aliases
    row_layout: Layout

    @staticmethod
    def __new__(
        cls, parts: list[CollectedRows], layout: Layout, like: Tensor, shape: Sequence[int] = ()
    ) -> RowGradient:
        new: RowGradient = Tensor._make_wrapper_subclass(
            cls, shape or like.shape, dtype=like.dtype, device=like.device
        )
        new.parts, new.row_layout = parts, layout
        return new

    # Operators come to __torch_dispatch__ alone.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self) -> str:  # type: ignore[override]
        rows = sum(part.ids.numel() for part in self.parts)
        return f"{type(self).__name__}(shape={tuple(self.shape)}, rows={rows}, dtype={self.dtype})"

    def __setitem__(self, index: Any, value: Any) -> None:
        # torch would write to a part of a dense copy.
        raise RuntimeError(_CANNOT.format("an assignment to a part"))

    def share_memory_(self) -> RowGradient:
        """The rows' numbers in shared memory; there are no others."""
        for part in self.parts:
            for tensor in (part.ids, part.level, part.place, part.values):
                tensor.share_memory_()
        return self

    @classmethod
    def of(cls, grad: Tensor, layout: Layout) -> RowGradient:
        """``grad`` itself; of another gradient, dense or sparse, that of all rows."""
        if isinstance(grad, cls):
            return grad
        dense = grad.detach().to_dense().reshape(-1).to(compute_dtype(grad.dtype))
        ids = (layout.row_start >= 0).nonzero()[:, 0]
        start = layout.row_start[ids].long()
        level = layout.page_level[start // layout.page]
        values = dense.new_zeros(ids.numel(), layout.dim)
        for k, at in by_level(level, len(layout.sizes)):
            dim = layout.sizes[k]
            values[at, :dim] = row_table(dense, dim)[start[at]]
        place = torch.arange(ids.numel(), device=ids.device) * layout.dim
        return cls([CollectedRows(ids, level, place, values.view(-1), True)], layout, grad)

    def at(self, layout: Layout, like: Tensor) -> RowGradient:
        """The same where rows moved to ``layout``; those that were resized have no gradient."""
        return RowGradient([_present(part, layout) for part in self.parts], layout, like)

    def summed(self) -> CollectedRows:
        """The gradient of every row once, from now on."""
        if len(self.parts) != 1:
            self.parts[:] = [_sum(_together(self.parts, self), self.row_layout)]
        return self.parts[0]

    def written(self) -> Tensor:
        """The numbers of :meth:`summed`, to be written to: parts may be in other gradients, too."""
        if len(self.parts) == 1:
            part = self.parts[0]
            self.parts[:] = [part._replace(values=part.values.clone())]
        return self.summed().values

    def to_dense(self, *args: Any, **options: Any) -> Tensor:  # type: ignore[override]
        """A plain tensor of this shape and dtype, zero where no row is listed."""
        rows, layout = self.summed(), self.row_layout
        dense = rows.values.new_zeros(self.shape.numel())
        start = layout.row_start[rows.ids.clamp(min=0)].long()
        for k, at in by_level(torch.where(rows.ids >= 0, rows.level, -1), len(layout.sizes)):
            grad = row_table(rows.values, layout.sizes[k])[rows.place[at]]
            row_table(dense, layout.sizes[k]).index_copy_(0, start[at], grad)
        return dense.view(self.shape).to(self.dtype)

    def holding(self, parts: list[CollectedRows], shape: Sequence[int] = ()) -> RowGradient:
        """``parts`` as a gradient like this one."""
        return RowGradient(parts, self.row_layout, self, shape)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        mine = args[0]
        if func is _UNSCALE:
            for grad in mine:
                func([_written(grad)], *args[1:])
            return None
        if func in _FOREACH_SCALINGS and _scales(args[1:]):
            return func([_written(grad) for grad in mine], *args[1:])
        if func is _FOREACH_NORM and _of_all(*args[1:], **kwargs):
            return func([_measured(grad) for grad in mine], *args[1:], **kwargs)
        if not isinstance(mine, cls):
            return _on_dense(func, args, kwargs)
        if func in _ALIASES:
            return mine.holding(mine.parts)
        if func is _aten.detach_.default:
            return mine
        if func in _VIEWS:
            return mine.holding(mine.parts, _shape(args[1], mine.shape.numel()))
        if func in _SUMS:
            return _add(func, *args, **kwargs)
        if func is _aten.zero_.default:
            mine.parts.clear()
            return mine
        if func in _NORMS and _of_all(*args[1:], **kwargs):
            return func(_measured(mine), *args[1:], **kwargs)
        scales = func in _SCALINGS and _scales(args[1:])
        if scales or (func in _CLAMPS and _keeps_zero(*args, **kwargs)):
            if func._schema.is_mutable:
                func(mine.written(), *args[1:], **kwargs)
                return mine
            rows = mine.summed()
            values = func(rows.values, *args[1:], **kwargs)
            if values.dtype is rows.values.dtype:
                return mine.holding([rows._replace(values=values)])
        return _on_dense(func, args, kwargs)


def _written(grad: Tensor) -> Tensor:
    return grad.written() if isinstance(grad, RowGradient) else grad


def _measured(grad: Tensor) -> Tensor:
    if not isinstance(grad, RowGradient):
        return grad
    values = grad.summed().values
    # Without a row there are zeros all the same: of nothing torch knows no largest number.
    return values if values.numel() else values.new_zeros(1)


def _scales(others: Sequence[Any]) -> bool:
    """Whether an operator's other arguments are numbers."""
    tensors = [other for other in others if isinstance(other, Tensor)]
    return all(type(o) is Tensor and o.numel() == 1 and o.dim() <= 1 for o in tensors)


def _of_all(order: Any = 2, dim: Any = None, keepdim: bool = False, **dtype: Any) -> bool:
    """Whether a norm is one number that zeros do not change."""
    return (order is None or float(order) > 0) and not dim and not keepdim


def _keeps_zero(grad: Tensor, low: Any = None, high: Any = None, **named: Any) -> bool:
    low, high = named.get("min", low), named.get("max", high)
    return (low is None or low <= 0) and (high is None or high >= 0)


def _shape(shape: Sequence[int], numel: int) -> list[int]:
    known = 1
    for size in shape:
        known *= size if size >= 0 else 1
    return [size if size >= 0 else numel // max(known, 1) for size in shape]


def _add(func: Any, one: Any, other: Any, alpha: Any = 1) -> Any:
    in_place = func is _aten.add_.Tensor
    if alpha == 1 and isinstance(other, RowGradient):
        parts = one.parts + other.parts
        if len(parts) == 1:
            # Several parts are summed into memory of their own before anything is written.
            parts = [parts[0]._replace(values=parts[0].values.clone())]
        if not in_place:
            return one.holding(parts)
        one.parts[:] = parts
        return one
    if in_place and isinstance(other, Tensor) and other.shape == one.shape:
        dense = other.to_dense() * alpha
        one.parts += RowGradient.of(dense, one.row_layout).parts
        return one
    return _on_dense(func, (one, other), {"alpha": alpha})


def _on_dense(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    for at, argument in enumerate(func._schema.arguments):
        given = args[at] if at < len(args) else kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write and _holds(given):
            raise RuntimeError(_CANNOT.format(func))
    args, kwargs = tree_map_only(RowGradient, RowGradient.to_dense, (args, kwargs))
    return func(*args, **kwargs)


def _holds(given: Any) -> bool:
    several = given if isinstance(given, (list, tuple)) else [given]
    return any(isinstance(each, RowGradient) for each in several)


def _present(part: CollectedRows, layout: Layout) -> CollectedRows:
    """Without rows that have another size in ``layout``: their gradient starts afresh, as state."""
    ids, sizes = part.ids, layout.sizes
    start = layout.row_start.index_select(0, ids.clamp(min=0)).long()
    level = layout.page_level.index_select(0, start.clamp(min=0) // layout.page)
    stay = (ids >= 0) & (start >= 0) & (level == part.level)
    if part.full_width:
        # Nothing is read by the host: the others stay, as no rows.
        values = part.values.view(-1, layout.dim).masked_fill(~stay[:, None], 0)
        return part._replace(ids=ids.masked_fill(~stay, -1), values=values.view(-1))
    if stay.all():
        return part
    stays_of_elements = torch.repeat_interleave(stay, torch.tensor(sizes)[part.level.long()])
    kept = ids[stay], part.level[stay]
    size = torch.tensor(sizes)[kept[1].long()]
    place = size.cumsum(0) - size
    return CollectedRows(*kept, place, part.values[stays_of_elements], False)


def _together(parts: list[CollectedRows], like: RowGradient) -> CollectedRows:
    if not parts:
        none = torch.empty(0, dtype=torch.int64, device=like.device)
        values = torch.empty(0, dtype=compute_dtype(like.dtype), device=like.device)
        return CollectedRows(none, none.to(torch.int8), none, values, True)
    full_width = all(part.full_width for part in parts)
    if not full_width:
        parts = [_listed(part) for part in parts]
    places, before = [], 0
    for part in parts:
        places.append(part.place + before)
        before += part.values.numel()
    ids = torch.cat([part.ids for part in parts])
    level = torch.cat([part.level for part in parts])
    values = torch.cat([part.values for part in parts])
    return CollectedRows(ids, level, torch.cat(places), values, full_width)


def _listed(rows: CollectedRows) -> CollectedRows:
    """As native kernels take them, without -1; rows on a CPU."""
    listed = rows.ids >= 0
    if not rows.full_width or listed.all():
        return rows
    return CollectedRows(
        rows.ids[listed], rows.level[listed], rows.place[listed], rows.values, False
    )


def _sum(rows: CollectedRows, layout: Layout) -> CollectedRows:
    if rows.full_width:
        return row_step.sum_rows(rows, layout.dim) if rows.ids.numel() else rows
    return native.sum_rows(_listed(rows), layout)


def step_rows(
    grad: RowGradient, storage: Tensor, layout: Layout, update: Update, backend: str
) -> None:
    """Step the rows that ``grad`` lists by ``update``, rows and state in place.

    Args:
        grad: of the rows in ``storage``.
        storage: all rows, ``[capacity]``, or of one size ``[N, d]``; contiguous.
        layout: where they lie; rows that had another size at backward have no gradient.
        update: the rule, its state and its clock, which moves on.
        backend: as for ``lookup``.
    """
    storage = storage.detach().view(-1)
    # A layout is the same object until rows move.
    rows = (grad if grad.row_layout is layout else grad.at(layout, storage)).summed()
    # A module may have changed its dtype since backward.
    rows = rows._replace(values=rows.values.to(compute_dtype(storage.dtype)))
    backend = resolve_backend(backend, storage.device)
    if backend == "triton":
        launch_row_step(rows, storage, layout, update)
    elif runs_native(backend) and native.takes_state(update, storage):
        native.step_rows(_listed(rows), storage, layout, update)
    else:
        row_step.step_rows(rows, storage, layout, update)
