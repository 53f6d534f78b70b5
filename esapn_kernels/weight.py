"""``weight`` of rows of several sizes: a dense table, computed at access, that writes through.

Reading it is reading a tensor ``[N, D]``. What is written to it, or to memory that it shares with
its views, goes to the rows at once, each at its own size:

    values   ``copy_``, ``weight[i] = t``, ``weight.data = t``, arithmetic in place: the row whose
             output is nearest (:func:`.ops.fit.nearest`); rows of the largest size hold the numbers
    draws    ``normal_``, ``uniform_``, all of ``nn.init``: the draft, dense, from torch's own
             generator; then rows whose outputs have its mean and variance (:func:`.ops.fit.drawn`)

A write is run on the dense table and the rows that it changed are found by comparison, so no
operation needs a rule of its own. The object that was drawn into reads as the draft, since what
follows (``trunc_normal_`` and ``sparse_`` are several calls) goes on with it; after a write of
values an object reads as the outputs, and a fresh ``weight`` always does.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._guards import CompileContext
from torch.utils._pytree import tree_leaves

from .ops.checks import is_eager
from .ops.fit import drawn, level_maps, nearest
from .ops.layout import row_table

__all__ = ["Weight", "check_assigned", "dense_weight"]

_CHUNK = 1 << 16
_RANDOM = (
    "bernoulli cauchy exponential geometric log_normal normal random uniform rand randint randn "
    "kaiming_normal kaiming_uniform sparse trunc_normal xavier_normal xavier_uniform"
)
_DRAWS = set(_RANDOM.split())
_OPERATORS = "add and div floordiv lshift mod mul or pow rshift sub truediv xor"
_IN_PLACE = {"__setitem__", *(f"__i{name}__" for name in _OPERATORS.split())}
_SHAPING = (
    "as_strided_ detach_ rename_ resize_ resize_as_ resize_as_sparse_ set_ share_memory_ "
    "sparse_resize_ sparse_resize_and_clear_ squeeze_ swapaxes_ swapdims_ t_ transpose_ unsqueeze_"
)
_METADATA = set(_SHAPING.split())
_WEIGHT = "weight of rows of several sizes is computed at every access"
_ASSIGNED = f"{_WEIGHT} and cannot be replaced: use weight.data.copy_, or from_pretrained"
_SHAPE = (
    f"{_WEIGHT}: its shape, dtype and memory cannot be changed; build a module of the rows needed, "
    "use module.to for another dtype or device, and weight.data.copy_ for other numbers"
)
_GRAD = f"{_WEIGHT} and holds no gradient: use arena.storage.grad and chain.grad"
_HOOK = f"{_WEIGHT} and takes no hooks: register them on arena.storage and chain"
_OPTIMIZER = f"{_WEIGHT} and cannot be optimized: give the optimizer the module's parameters()"
_PARAMETER = (
    f"{_WEIGHT} and is no Parameter, nor is a view of it: to tie a layer to it use "
    "F.linear(x, emb.weight), to freeze it emb.weight.requires_grad_(False), to copy it "
    "emb.weight.detach().clone()"
)
_LISTS = f"{_WEIGHT}: functions that write to lists of tensors do not take it; write to it alone"
_MOVED = "the module has moved to another device: take its weight anew"
_STALE = "the rows have changed since this weight was taken: take it anew"
_COMPUTED = "arena.storage is computed itself: write to what it is computed from"
_DIVERGED = "chain holds numbers that are not finite: call reset_parameters() or write to it first"


class Access:
    """One access to ``weight``: the dense table, and the way from it to the rows.

    Args:
        module: has ``arena`` and ``chain``.
        outputs: the lookup, ``[R]`` to ``[R, D]``.
        dense: all outputs.
    """

    def __init__(self, module: Any, outputs: Callable[[Tensor], Tensor], dense: Tensor) -> None:
        self.module = module
        self.outputs = outputs
        # Shares memory and version counter with the weight.
        self.dense = dense.detach()
        self.drawn = torch.zeros(len(dense), dtype=torch.bool, device=dense.device)
        self._seen = self._versions()

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        """The Parameters that the table is computed from."""
        return self.module.arena.storage, self.module.chain

    def _versions(self) -> list[tuple[int, int]]:
        # Inference tensors have no version.
        return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in self.leaves]

    def shares(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` lies in the memory of the table."""
        if tensor.layout is not torch.strided:
            return False
        return tensor.untyped_storage().data_ptr() == self.dense.untyped_storage().data_ptr()

    def _refuse_computed(self) -> None:
        # By a parametrization, or for a replica of nn.DataParallel: a write would be lost.
        if "storage" not in self.module.arena._parameters:
            raise RuntimeError(_COMPUTED)

    @torch.no_grad()
    def begin(self) -> Tensor:
        """Bring the table up to date before it is written to; returns a copy of it."""
        storage, chain = self.leaves
        self._refuse_computed()
        if self.dense.device != storage.device:
            raise RuntimeError(_MOVED)
        if not chain.isfinite().all():
            raise RuntimeError(_DIVERGED)
        if self._seen != self._versions():
            self.dense.copy_(self._all())
            self.drawn = torch.zeros_like(self.drawn)
            self._seen = self._versions()
        return self.dense.clone()

    def _all(self) -> Tensor:
        return self.outputs(torch.arange(len(self.dense), device=self.dense.device))

    def covered(self, views: Iterable[Tensor]) -> Tensor:
        """Bool ``[N]``: rows that ``views`` of the table cover wholly."""
        hit = torch.zeros_like(self.dense, dtype=torch.bool)
        for view in views:
            if view.dtype == self.dense.dtype:
                hit.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
        return hit.all(1)

    @torch.no_grad()
    def settle(self, before: Tensor | None, drawn_now: Tensor | None, goes_on: bool) -> None:
        """Bring the rows to what the table was changed to.

        Args:
            before: the table before; default: the outputs of the rows.
            drawn_now: bool ``[N]``, rows that were just drawn.
            goes_on: rows drawn earlier stay drawn, although they were changed.
        """
        if before is None:
            self._refuse_computed()
            if self._seen != self._versions():
                raise RuntimeError(_STALE)
            before = self._all()
        changed = (_bits(self.dense) != _bits(before)).any(1)
        stay = self.drawn & goes_on
        if drawn_now is not None:
            changed, stay = changed | drawn_now, stay | drawn_now
        self.drawn = torch.where(changed, stay, self.drawn)
        ids = changed.nonzero()[:, 0]
        arena, storage = self.module.arena, self.leaves[0].detach()
        level = arena.level(ids)
        maps = level_maps(self.leaves[1], arena.sizes)
        for k, dim in enumerate(arena.sizes):
            # In pieces, for the sake of the fp64 copies.
            for mine in ids[level == k].split(_CHUNK):
                if not len(mine):
                    continue
                rows = self.dense[mine]
                if k < len(maps):
                    fits = drawn(rows, maps[k]), nearest(rows, maps[k])
                    rows = torch.where(self.drawn[mine, None], *fits)
                start = arena.layout.row_start[mine].long()
                row_table(storage, dim).index_copy_(0, start, rows.to(storage.dtype))
        values = ids[~self.drawn[ids]]
        self.dense[values] = self.outputs(values).to(self.dense.dtype)
        self._seen = self._versions()


def _bits(tensor: Tensor) -> Tensor:
    """The numbers as integers: NaN equals itself, and -0 is not 0."""
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def _refuse(sentence: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(sentence)

    return refuse


def _is_inspected() -> bool:
    """Whether ``torch.compile`` reads the attributes of its inputs."""
    return CompileContext.try_get() is not None


class Weight(Tensor):
    """What ``weight`` gives, and views of it: a tensor whose memory is that of an :class:`Access`.

    Also what ``torch.where`` makes of a draft, with memory of its own: copied back, it is a draft.
    """

    access: Access
    is_whole = False
    """``weight`` itself, with gradient, not a view of it."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # Breaks the graph: a compiled write would change the table and not the rows.
        if torch.compiler.is_dynamo_compiling() and _writes(func.__name__, kwargs):
            return _call_uncompiled(func, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return _call(func, args, kwargs) if is_eager() else func(*args, **kwargs)

    register_hook = register_post_accumulate_grad_hook = _refuse(_HOOK)
    retain_grad = _refuse(_GRAD)
    set_ = _refuse(_SHAPE)  # which torch does not hand to __torch_function__

    retains_grad = property(_refuse(_OPTIMIZER))  # type: ignore[assignment]

    @property
    def is_leaf(self) -> bool:  # type: ignore[override]
        """False: an optimizer takes what is a leaf, or ``retains_grad``."""
        return super().is_leaf if _is_inspected() else False

    @property
    def grad(self) -> None:  # type: ignore[override]
        """Refused: rows and hops have gradients."""
        if not _is_inspected():
            raise RuntimeError(_GRAD)

    @grad.setter
    def grad(self, value: Any) -> None:
        raise RuntimeError(_GRAD)

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        """Of ``weight``: whether rows or hops require a gradient; of views: as in torch."""
        if self.is_whole and not _is_inspected():
            return any(leaf.requires_grad for leaf in self.access.leaves)
        return super().requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> Weight:
        """Freeze or unfreeze rows and hops."""
        if not self.is_whole:
            raise RuntimeError(_PARAMETER)
        for leaf in self.access.leaves:
            leaf.requires_grad_(requires_grad)
        return self

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """A view without gradient; assigned to, it copies."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        same = operator.attrgetter("shape", "dtype", "device")
        if not isinstance(value, Tensor) or same(value) != same(self):
            raise RuntimeError(_SHAPE)
        self.detach().copy_(value)

    def numpy(self, *, force: bool = False) -> Any:
        """Read-only: NumPy's writes would not reach the rows."""
        array = super().numpy(force=force)
        array.flags.writeable = False
        return array

    def __dlpack__(self, **options: Any) -> Any:
        return self.clone().__dlpack__(**options)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.detach().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().clone().__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor).__repr__(tensor_contents=tensor_contents)  # type: ignore[call-arg]


def _bind(tensor: Tensor, access: Access) -> Weight:
    weight = tensor.as_subclass(Weight)
    weight.access = access
    return weight


def dense_weight(module: Any, outputs: Callable[[Tensor], Tensor]) -> Tensor:
    """``weight`` of ``module``: ``outputs`` of all its ids; see :class:`Access` for the arguments.

    A plain tensor where the code is compiled, traced or transformed, and on the meta device.
    """
    grad = torch.is_grad_enabled()
    if not is_eager() or module.chain.is_meta:
        return outputs(torch.arange(module.arena.num_rows, device=module.chain.device))
    # What inference mode made could not be written to outside of it.
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        dense = outputs(torch.arange(module.arena.num_rows, device=module.chain.device))
        weight = _bind(dense, Access(module, outputs, dense))
    # Attributes that clients set on the Parameter, such as transformers' mark of a loaded one.
    vars(weight).update(vars(module.arena.storage))
    weight.is_whole = True
    return weight


def check_assigned(module: Any, value: Any) -> None:
    """Refuse ``module.weight = value``, unless it ends ``module.weight *= 2`` or the like."""
    if not isinstance(value, Weight) or not value.is_whole or value.access.module is not module:
        raise AttributeError(_ASSIGNED)


def _call(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """``func``; then the rows follow what it wrote to, and views become :class:`Weight`."""
    name = getattr(func, "__name__", "").split(".")[0]  # also of torch.ops.aten.mul_.Tensor
    weights = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Weight)]
    accesses = {id(t.access): t.access for t in weights}.values()
    targets = _targets(name, args, kwargs)
    if targets:
        _check_target(name, func, targets, "out" in kwargs)
    elif name.startswith("_foreach_") and name.endswith("_"):
        raise RuntimeError(_LISTS)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not targets):
        before = {t.access: t.access.begin() for t in targets}
        versions = [access.dense._version for access in accesses]
        result = func(*args, **kwargs)
    for access, version in zip(accesses, versions, strict=True):
        # Also of functions whose names do not tell that they write: F.embedding with max_norm.
        if access in before or access.dense._version != version:
            draws = access in before and name.removesuffix("_") in _DRAWS
            mine = access.covered(t for t in targets if t.access is access) if draws else None
            goes_on = access in before and _goes_on(name, args, kwargs, access)
            access.settle(before.get(access), mine, goes_on)
    if name == "where" and type(result) is Tensor:
        for access in accesses:
            if access.drawn.any():
                return _bind(result, access)
    return _wrap(result, accesses)


@torch.compiler.disable
def _call_uncompiled(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs)


def _writes(name: str, kwargs: Any) -> bool:
    """Whether a function writes, as far as its name and arguments tell."""
    in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    return in_place or bool(kwargs.get("inplace")) or kwargs.get("out") is not None


def _targets(name: str, args: Any, kwargs: Any) -> list[Weight]:
    """What a function that writes writes to."""
    found: Any = ()
    if kwargs.get("out") is not None:
        found = tree_leaves(kwargs["out"])
    elif _writes(name, kwargs):
        found = (*args, *kwargs.values())[:1]
    return [t for t in found if isinstance(t, Weight) and t.access.shares(t)]


def _check_target(name: str, func: Any, targets: list[Weight], is_out: bool) -> None:
    """Refuse what torch refuses of a leaf, in its words, and what a computed table cannot do."""
    if name in _METADATA:
        raise RuntimeError(_SHAPE)
    if not torch.is_grad_enabled() or getattr(func, "__module__", "") == "torch.nn.init":
        return
    for target in targets:
        if target.requires_grad and is_out:
            raise RuntimeError(
                f"{name}(): functions with out=... arguments don't support automatic "
                "differentiation, but one of the arguments requires grad."
            )
        if target.requires_grad:
            is_leaf = target.is_whole and name != "__setitem__"
            leaf = "a leaf Variable" if is_leaf else "a view of a leaf Variable"
            raise RuntimeError(f"{leaf} that requires grad is being used in an in-place operation.")


def _goes_on(name: str, args: Any, kwargs: Any, access: Access) -> bool:
    """Whether drawn rows stay drawn: what a write brings is the same for all columns of a row."""
    if "out" in kwargs:
        return False
    is_copy = name in ("copy_", "__setitem__")
    brought = args[2:] if name == "__setitem__" else (*args, *kwargs.values())[1:]

    def is_one_number(value: Any) -> bool:
        if isinstance(value, Weight) and value.access is access and not access.shares(value):
            return True  # a draft, by torch.where
        if isinstance(value, Tensor):
            # Other functions take masks and indexes.
            is_index = not is_copy and not value.is_floating_point()
            return is_index or value.dim() == 0 or value.shape[-1] == 1
        return not is_copy or isinstance(value, (bool, int, float))

    return all(is_one_number(value) for value in brought)


def _wrap(result: Any, accesses: Iterable[Access]) -> Any:
    """Views of the table write through, too."""
    if type(result) in (tuple, list):
        return type(result)(_wrap(value, accesses) for value in result)
    if type(result) is Tensor:
        for access in accesses:
            if access.shares(result):
                return _bind(result, access)
    return result
