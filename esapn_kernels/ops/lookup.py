"""Ragged embedding lookup fused with the projection to the largest size.

    y(x) = M_k e + c_k        e in R^{d_k} the row of x, k its level, y in R^{d_n}

with ``(M_k, c_k)`` from ``ops.compose``. The kernels are in ``lookup_fwd`` and
``lookup_bwd``, the CPU path in ``torch_path``; here they become operators with gradients. Source of
the operator: Liu et al., "Automated Embedding Size Search in Deep Recommender Systems", SIGIR 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from ..cpu import lookup as torch_path
from ..gpu.lookup_bwd import launch_bwd, launch_bwd_update
from ..gpu.lookup_fwd import launch_fwd
from ..reference import lookup_reference, split_chain
from .backend import own_precision, resolve_backend
from .compose import compose, compose_bwd, compute_dtype
from .update import Update

__all__ = ["check_ids", "is_eager", "lookup", "lookup_eager"]


def is_eager() -> bool:
    """Whether plain eager code runs: nobody compiles, traces or transforms it."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _is_opaque(storage: Tensor) -> bool:
    """Whether no kernel can read the tensors, and the operators' fakes stand in."""
    traced = torch.compiler.is_compiling() or storage.is_meta
    return traced or torch._C._len_torch_dispatch_stack() > 0


def _lookup_fwd(
    ids: Tensor,
    storage: Tensor,
    composed: Tensor,
    row_start: Tensor,
    page_level: Tensor,
    sizes: Sequence[int],
    page: int,
    backend: str,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    where = (ids, storage, composed, row_start, page_level, sizes, page)
    if backend == "triton":
        return launch_fwd(*where, out_dtype, out)
    if out_dtype is None or out_dtype == storage.dtype:
        return torch_path.lookup_fwd(*where, out)
    wide = torch_path.lookup_fwd(*where)
    return wide.to(out_dtype) if out is None else out.copy_(wide)


def _lookup_bwd(
    grad_out: Tensor,
    ids: Tensor,
    storage: Tensor,
    composed: Tensor,
    row_start: Tensor,
    page_level: Tensor,
    sizes: Sequence[int],
    page: int,
    backend: str,
    want_composed: bool = True,
) -> tuple[Tensor, Tensor | None]:
    run = launch_bwd if backend == "triton" else torch_path.lookup_bwd
    where = (storage, composed, row_start, page_level, sizes, page)
    with own_precision(storage):
        return run(grad_out, ids, *where, want_composed=want_composed)


@torch.library.custom_op("esapn_kernels::lookup_fwd", mutates_args=())
def lookup_fwd_op(
    ids: Tensor,
    storage: Tensor,
    composed: Tensor,
    row_start: Tensor,
    page_level: Tensor,
    sizes: Sequence[int],
    page: int,
    backend: str,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Forward as an opaque operator, for ``torch.compile``."""
    where = (ids, storage, composed, row_start, page_level, sizes, page, backend)
    return _lookup_fwd(*where, out_dtype)


@lookup_fwd_op.register_fake
def _(ids, storage, composed, row_start, page_level, sizes, page, backend, out_dtype=None):
    return storage.new_empty(ids.shape[0], sizes[-1], dtype=out_dtype or storage.dtype)


@torch.library.custom_op("esapn_kernels::lookup_bwd", mutates_args=())
def lookup_bwd_op(
    grad_out: Tensor,
    ids: Tensor,
    storage: Tensor,
    composed: Tensor,
    row_start: Tensor,
    page_level: Tensor,
    sizes: Sequence[int],
    page: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Backward as an opaque operator, for ``torch.compile``."""
    where = (storage, composed, row_start, page_level, sizes, page, backend)
    grad_storage, grad_composed = _lookup_bwd(grad_out, ids, *where)
    assert grad_composed is not None
    return grad_storage, grad_composed


@lookup_bwd_op.register_fake
def _(grad_out, ids, storage, composed, row_start, page_level, sizes, page, backend):
    return torch.empty_like(storage), torch.empty_like(composed)


def _formula(
    ids: Tensor,
    storage: Tensor,
    chain: Tensor,
    row_start: Tensor,
    page_level: Tensor,
    sizes: Sequence[int],
    page: int,
) -> Tensor:
    """The lookup hop by hop for all ids at once, in operators that torch differentiates itself."""
    storage, chain = storage.to(compute_dtype(storage.dtype)), chain.to(compute_dtype(chain.dtype))
    start = row_start[ids].long()
    level = page_level[start // page]
    y = storage.new_zeros(*ids.shape, sizes[0])
    for k, dim in enumerate(sizes):
        if k > 0:
            weight, bias = split_chain(chain, sizes)[k - 1]
            # Only rows of lower levels pass this hop, forward and in the derivatives.
            y = torch.where((level < k)[:, None], y, 0) @ weight.t() + bias
        # Of a longer row only the first entries, of a shorter one also what lies behind it: both
        # are replaced or masked, and the last row's end is not passed.
        entries = start[:, None] + torch.arange(dim, device=ids.device)
        row = storage[entries.clamp(max=storage.numel() - 1)]
        y = torch.where((level == k)[:, None], row, y)
    return y


def _weigh(
    grad_out: Tensor, ids: Tensor, num_rows: int, padding_idx: int | None, scale_grad_by_freq: bool
) -> Tensor:
    """Gradient of every occurrence as ``nn.Embedding``'s options weigh it.

    That of ``padding_idx`` is zero; with ``scale_grad_by_freq`` it is divided by the number of
    times its id stands in ``ids``.
    """
    if padding_idx is not None:
        grad_out = grad_out.masked_fill((ids == padding_idx)[:, None], 0)
    if scale_grad_by_freq:
        # Counts over the table: of a batch alone they would have to wait for a GPU.
        count = ids.new_zeros(num_rows).index_add(0, ids, torch.ones_like(ids))
        grad_out = grad_out / count[ids][:, None]
    return grad_out


def _each(
    function: Callable[..., Any], batch: int, in_dims: Sequence[Any], args: Sequence[Any]
) -> list[Any]:
    """``function`` of every element of the batch in turn."""

    def element(i: int) -> Iterator[Any]:
        for value, dim in zip(args, in_dims, strict=True):
            yield value.select(dim, i) if isinstance(dim, int) else value

    return [function(*element(i)) for i in range(batch)]


class _LookupBwd(torch.autograd.Function):
    """Gradients of the rows and of the chain, which can be differentiated again."""

    @staticmethod
    def forward(
        grad_out: Tensor,
        ids: Tensor,
        storage: Tensor,
        chain: Tensor,
        composed: Tensor,
        row_start: Tensor,
        page_level: Tensor,
        sizes: tuple[int, ...],
        page: int,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        where = (row_start, page_level, sizes, page, backend)
        grad_storage, grad_composed = _lookup_bwd(grad_out, ids, storage, composed, *where)
        assert grad_composed is not None
        return grad_storage, compose_bwd(grad_composed, chain, composed, sizes, backend=backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        grad_out, ids, storage, chain, _, *where = inputs
        ctx.save_for_backward(grad_out, ids, storage, chain, *where[:2])
        ctx.layout = where[2:4]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_out, ids, storage, chain, row_start, page_level = ctx.saved_tensors
        where = (row_start, page_level, *ctx.layout)

        def vjp(g: Tensor, rows: Tensor, hops: Tensor) -> tuple[Tensor, Tensor]:
            def formula(rows: Tensor, hops: Tensor) -> Tensor:
                return _formula(ids, rows, hops, *where).to(g.dtype)

            gradients: tuple[Tensor, Tensor] = torch.func.vjp(formula, rows, hops)[1](g)
            return gradients

        pull = torch.func.vjp(vjp, grad_out, storage, chain)[1]
        to_out, to_storage, to_chain = pull(grads)
        return to_out, None, to_storage, to_chain, *[None] * 6

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        grads = _each(_LookupBwd.apply, info.batch_size, in_dims, args)
        return tuple(torch.stack(g) for g in zip(*grads, strict=True)), (0, 0)


class _Lookup(torch.autograd.Function):
    """The lookup wherever other code transforms it: ``torch.compile``, ``torch.func``, export."""

    @staticmethod
    def forward(
        ids: Tensor,
        storage: Tensor,
        chain: Tensor,
        composed: Tensor,
        row_start: Tensor,
        page_level: Tensor,
        sizes: tuple[int, ...],
        page: int,
        backend: str,
        out_dtype: torch.dtype | None,
        padding_idx: int | None,
        scale_grad_by_freq: bool,
    ) -> Tensor:
        # The operator's boundary costs as much as a small lookup: only for those who need it.
        run = lookup_fwd_op if _is_opaque(storage) else _lookup_fwd
        return run(ids, storage, composed, row_start, page_level, sizes, page, backend, out_dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:6])
        ctx.layout, ctx.weights = inputs[6:9], inputs[10:12]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        ids, storage, chain, composed, *where = ctx.saved_tensors
        grad_out = _weigh(grad_out, ids, where[0].numel(), *ctx.weights)
        where += ctx.layout
        if _is_opaque(storage):
            grad_storage, grad_composed = lookup_bwd_op(grad_out, ids, storage, composed, *where)
            sizes, _, backend = ctx.layout
            grad_chain = compose_bwd(grad_composed, chain, composed, sizes, backend=backend)
        else:
            grad_storage, grad_chain = _LookupBwd.apply(
                grad_out, ids, storage, chain, composed, *where
            )
        return None, grad_storage, grad_chain, *[None] * 9

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        ids, operands = args[0], args[1:]
        if not any(isinstance(dim, int) for dim in in_dims[1:]):
            ids = ids.movedim(in_dims[0], 0)
            out = _Lookup.apply(ids.reshape(-1), *operands)
            return out.view(*ids.shape, out.shape[-1]), 0
        return torch.stack(_each(_Lookup.apply, info.batch_size, in_dims, args)), 0


class _EagerLookup(torch.autograd.Function):
    """:class:`_Lookup` in plain eager code: less overhead, and no gradient that nobody asked for.

    With ``sparse`` the gradient of the storage is a COO tensor.
    """

    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        storage: Tensor,
        chain: Tensor,
        where: tuple[Any, ...],
        options: tuple[int | None, bool, bool],
    ) -> Tensor:
        # Locations need no guard against writing: rows that move write to the storage too.
        ctx.save_for_backward(ids, storage, chain)
        ctx.where, ctx.options = where[:-1], options
        return _lookup_fwd(ids, storage, *where)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        ids, storage, chain = ctx.saved_tensors
        composed, row_start, page_level, sizes, page, backend = ctx.where
        padding_idx, scale_grad_by_freq, sparse = ctx.options
        grad_out = _weigh(grad_out, ids, row_start.numel(), padding_idx, scale_grad_by_freq)
        if torch.is_grad_enabled():
            if sparse:
                raise RuntimeError("a sparse gradient has no derivative: use sparse=False")
            grads = _LookupBwd.apply(grad_out, ids, storage, chain, *ctx.where)
            return None, *grads, None, None
        wanted = ctx.needs_input_grad[2]
        operands = (grad_out, ids, storage, composed, row_start, page_level, sizes, page)
        if sparse:
            with own_precision(storage):
                grad_storage, grad_composed = torch_path.lookup_bwd_sparse(
                    *operands, padding_idx=padding_idx, want_composed=wanted
                )
        else:
            grad_storage, grad_composed = _lookup_bwd(*operands, backend, want_composed=wanted)
        grad_chain = None
        if grad_composed is not None:
            grad_chain = compose_bwd(grad_composed, chain, composed, sizes, backend=backend)
        return None, grad_storage, grad_chain, None, None


class _FusedLookup(torch.autograd.Function):
    """:class:`_Lookup` whose backward steps the rows instead of returning their gradient."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return _lookup_fwd(*inputs[:2], *inputs[3:10])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:6])
        ctx.layout, ctx.weights, ctx.begin_step = inputs[6:9], inputs[10:12], inputs[-1]
        ctx.storage, ctx.version = inputs[1], inputs[1]._version

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.storage._version != ctx.version:
            raise RuntimeError(
                "the rows changed between this lookup and its backward: a fused optimizer steps "
                "them in backward, so look up all ids of a step in one call, and resize between "
                "steps"
            )
        ids, storage, chain, composed, *where = ctx.saved_tensors
        sizes, page, backend = ctx.layout
        grad_out = _weigh(grad_out, ids, where[0].numel(), *ctx.weights)
        run: Callable[..., Tensor | None] = torch_path.lookup_bwd_update
        if backend == "triton":
            run = launch_bwd_update
        grad_composed = run(
            grad_out,
            ids,
            storage,
            composed,
            *where,
            sizes,
            page,
            update=ctx.begin_step(),
            want_composed=ctx.needs_input_grad[2],
        )
        grad_chain = None
        if grad_composed is not None:
            grad_chain = compose_bwd(grad_composed, chain, composed, sizes, backend=backend)
        return None, None, grad_chain, *[None] * 10


@torch.compiler.disable
def _fused(*inputs: Any) -> Tensor:
    out: Tensor = _FusedLookup.apply(*inputs)
    return out


def lookup_eager(
    ids: Tensor,
    storage: Tensor,
    chain: Tensor,
    where: tuple[Any, ...],
    options: tuple[int | None, bool, bool],
) -> Tensor:
    """:func:`lookup` in plain eager code, of arguments that are checked.

    Args:
        where: ``(composed, row_start, page_level, sizes, page, backend, out_dtype)``.
        options: ``(padding_idx, scale_grad_by_freq, sparse)``.
    """
    flat = ids if ids.dim() == 1 else ids.reshape(-1)
    y: Tensor
    if torch.is_grad_enabled() and (storage.requires_grad or chain.requires_grad):
        y = _EagerLookup.apply(flat, storage, chain, where, options)
    else:
        y = _lookup_fwd(flat, storage, *where)
    return y if flat is ids else y.view(*ids.shape, y.shape[1])


_sparse = torch.compiler.disable(lookup_eager)


def check_ids(ids: Tensor, num_rows: int, *, look: bool = True) -> None:
    """Refuse ids that are not int32 / int64 or, where a look costs nothing, out of range.

    Args:
        look: on a CPU, look at the numbers too.

    Raises:
        TypeError: no tensor at all.
        RuntimeError: other dtypes, in torch's own words.
        IndexError: an id outside ``[0, num_rows)``, on a CPU. On a GPU the lookup's kernels fail
            an assertion of their own and those that move rows pass over the id; neither reads or
            writes outside.
    """
    if not isinstance(ids, Tensor):
        raise TypeError(
            f"embedding(): argument 'indices' (position 2) must be Tensor, not {type(ids).__name__}"
        )
    if ids.dtype not in (torch.int64, torch.int32):
        raise RuntimeError(
            "Expected tensor for argument #1 'indices' to have one of the following scalar types: "
            f"Long, Int; but got {ids.type()} instead (while checking arguments for embedding)"
        )
    if look and ids.device.type == "cpu" and ids.numel() and is_eager():
        low, high = torch.aminmax(ids)
        if low.item() < 0 or high.item() >= num_rows:
            raise IndexError("index out of range in self")


def _check_out(out: Tensor, shape: tuple[int, ...], dtype: torch.dtype, storage: Tensor) -> None:
    if out.requires_grad or (torch.is_grad_enabled() and storage.requires_grad):
        raise RuntimeError(
            "lookup(): functions with out=... arguments don't support automatic differentiation, "
            "but one of the arguments requires grad."
        )
    if out.shape != shape or out.dtype != dtype or out.device != storage.device:
        raise ValueError(
            f"out must be {list(shape)}, {dtype}, on {storage.device}; "
            f"got {list(out.shape)}, {out.dtype}, on {out.device}"
        )
    if not out.is_contiguous():
        raise ValueError("out must be contiguous")


def lookup(
    ids: Tensor,
    storage: Tensor,
    chain: Tensor,
    row_start: Tensor,
    page_level: Tensor,
    *,
    sizes: Sequence[int],
    page: int,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    backend: str = "auto",
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    begin_step: Callable[[], Update] | None = None,
) -> Tensor:
    """Look up ragged rows and carry each to the largest size: ``y(x) = M_k e + c_k``.

    Args:
        ids: any shape, int32 or int64, in ``[0, len(row_start))``; duplicates allowed.
        storage: all rows, flat ``[capacity]``, fp32 / bf16 / fp16 / fp64; gradient flows (dense).
        chain: packed hops (see ``compose``), same dtype; gradient flows.
        row_start: first element of every row, int32 or int64 ``[N]``.
        page_level: level of every page of ``page`` elements, int8.
        sizes: increasing row sizes ``d_1 < ... < d_n``.
        page: elements per page; a row never crosses a page.
        padding_idx: this id has no gradient, neither for its row nor for the chain.
        scale_grad_by_freq: divide the gradient of every occurrence by the count of its id in
            ``ids``, for the rows and the chain alike.
        sparse: the gradient of ``storage`` is COO, one entry per element of a row looked up; torch
            calls on every backend, which wait for a GPU. Dense under ``torch.func``.
        backend: ``auto`` (Triton on a GPU, torch elsewhere), ``triton``, ``torch``, ``reference``.
        out_dtype: of the output, rounded once from the sum in fp32; default: that of ``storage``.
        out: contiguous memory for the output, where no gradient is wanted.
        begin_step: a fused optimizer's step (see ``optim``). Called in backward, which then steps
            the rows in place; ``storage`` has no gradient.

    Returns:
        ``[*ids.shape, d_n]`` in ``out_dtype``, accumulated in fp32 (fp64 for fp64 rows).

    Raises:
        IndexError: an id out of range (CPU; an asynchronous assertion on a GPU).
        RuntimeError: ids of another dtype; the Triton backend asked for where it cannot run;
            ``out`` where a gradient is wanted.
        ValueError: an unknown backend; ``out`` of another shape, dtype or device.

    Notes:
        Deterministic on every backend. Empty ``ids`` give an empty output and zero gradients. The
        gradient is computed from ``storage`` at backward time: changing rows in between raises.
        Differentiable any number of times; ``torch.func`` and ``torch.compile`` apply (``vmap``
        over anything but ids runs the elements in turn). Forward-mode derivatives raise.

    Example:
        >>> storage = torch.tensor([1.0, 2.0, 5.0, 6.0])  # two rows of size 1, one of size 2
        >>> chain = torch.tensor([10.0, 20.0, 0.5, 0.25])  # W = [[10], [20]], b = [0.5, 0.25]
        >>> lookup(torch.tensor([0, 2]), storage, chain,
        ...        torch.tensor([0, 1, 2]), torch.tensor([0, 1], dtype=torch.int8),
        ...        sizes=(1, 2), page=2)
        tensor([[10.5000, 20.2500],
                [ 5.0000,  6.0000]])
    """
    backend = resolve_backend(backend, storage.device)
    # The torch path finds ids out of range itself, in the same words.
    check_ids(ids, row_start.numel(), look=backend != "torch")
    sizes = tuple(sizes)
    shape = (*ids.shape, sizes[-1])
    dtype = storage.dtype if out_dtype is None else out_dtype
    if out is not None:
        _check_out(out, shape, dtype, storage)
    flat = ids if ids.dim() == 1 else ids.reshape(-1)
    weights = padding_idx, scale_grad_by_freq
    if backend == "reference":
        y = lookup_reference(ids, storage, chain, row_start, page_level, sizes, page).to(dtype)
        if y.requires_grad and weights != (None, False):
            y.register_hook(
                lambda g: _weigh(g.reshape(-1, sizes[-1]), flat, row_start.numel(), *weights).view(
                    shape
                )
            )
        return y if out is None else out.copy_(y)
    eager = is_eager()
    # torch.func hands over tensors that no kernel can read.
    readable = eager or torch.compiler.is_compiling()
    composed = compose(chain, sizes, backend=backend if readable else "torch")
    where = (row_start, page_level, sizes, page, backend, dtype)
    if out is not None:
        _lookup_fwd(flat, storage.detach(), composed, *where, out.view(-1, sizes[-1]))
        return out
    operands = (flat, storage, chain, composed, *where, *weights)
    if begin_step is not None and storage.requires_grad:
        return _fused(*operands, begin_step).view(shape)
    if eager and not storage.is_meta:
        return lookup_eager(ids, storage, chain, (composed, *where), (*weights, sparse))
    if sparse and torch.is_grad_enabled() and torch.compiler.is_dynamo_compiling():
        return _sparse(ids, storage, chain, (composed, *where), (*weights, True))
    return _Lookup.apply(*operands).view(shape)
