"""Ragged embedding lookup fused with the projection to the largest size.

    y(x) = M_k e + c_k        e in R^{d_k} the row of x, k its level, y in R^D, D = d_{n-1}

with ``(M_k, c_k)`` from :mod:`esapn_kernels.ops.compose`. The kernels are in ``gpu/lookup_fwd`` and
``gpu/lookup_bwd``, for CPUs in ``csrc/`` behind ``cpu/native``, and as torch calls in
``cpu/lookup``; here they become operators with gradients, and :func:`lookup` chooses which of them
runs. Source of the operator: Liu et al., "Automated Embedding Size Search in Deep Recommender
Systems", SIGIR 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..cpu import lookup as cpu
from ..cpu import native
from ..gpu.compose import empty_composed
from ..gpu.launch import groups_ids
from ..gpu.lookup_bwd import launch_bwd, launch_bwd_rows, launch_bwd_update
from ..gpu.lookup_fwd import launch_fwd
from ..reference import lookup_reference
from .backend import own_precision, resolve_backend, runs_native
from .chain import compute_dtype, full_chain, split_chain
from .checks import check_out, is_eager, is_opaque
from .compose import ComposedCache, compose, compose_bwd
from .layout import Layout
from .row_gradient import RowGradient
from .update import CollectedRows, Update

__all__ = ["Options", "lookup"]


class Options(NamedTuple):
    """What ``nn.Embedding`` can be told of a lookup, and the dtype of the output.

    Attributes:
        padding_idx: this id has no gradient, neither for its row nor for the chain.
        scale_grad_by_freq: divide the gradient of every occurrence by the count of its id in
            ``ids``, for the rows and the chain alike.
        sparse: the gradient of ``storage`` is COO, one entry per element of a row looked up; by
            the native kernels where they run, else by torch calls, which wait for a GPU. Dense
            under ``torch.func``.
        out_dtype: of the output, rounded once from the sum in fp32; default: that of ``storage``.
        by_row: the gradient of ``storage`` is a :class:`RowGradient`. Dense under ``torch.func``
            and where it is differentiated again.
    """

    padding_idx: int | None = None
    scale_grad_by_freq: bool = False
    sparse: bool = False
    out_dtype: torch.dtype | None = None
    by_row: bool = False


def _in_place(storage: Tensor) -> Tensor:
    """Rows as kernels read them: one behind the other, and with their signs."""
    if storage.is_contiguous() and not storage.is_neg():
        return storage
    return storage.contiguous().resolve_neg()


def _lookup_fwd(
    ids: Tensor,
    storage: Tensor,
    composed: Tensor,
    layout: Layout,
    backend: str,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    hops: Tensor | None = None,
) -> Tensor:
    """With ``hops`` ``composed`` is written as well: see :func:`lookup`."""
    storage = _in_place(storage)
    if backend == "triton":
        return launch_fwd(ids, storage, composed, layout, out_dtype, out, hops)
    run = native.lookup_fwd if runs_native(backend) else cpu.lookup_fwd
    return run(ids, storage, composed, layout, out_dtype, out)


def _lookup_bwd(
    grad_out: Tensor,
    ids: Tensor,
    storage: Tensor,
    composed: Tensor,
    layout: Layout,
    backend: str,
    want_composed: bool = True,
    padding_idx: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``padding_idx``: native kernels leave it out themselves, others get weighed gradients."""
    storage = _in_place(storage)
    if runs_native(backend):
        operands = (grad_out, ids, storage, composed, layout, want_composed)
        return native.lookup_bwd(*operands, padding_idx)
    run = launch_bwd if backend == "triton" else cpu.lookup_bwd
    with own_precision(storage):
        return run(grad_out, ids, storage, composed, layout, want_composed)


def _lookup_bwd_rows(
    grad_out: Tensor,
    ids: Tensor,
    storage: Tensor,
    composed: Tensor,
    layout: Layout,
    backend: str,
    want_composed: bool,
    padding_idx: int | None,
) -> tuple[CollectedRows, Tensor | None]:
    """:func:`_lookup_bwd` that lists the rows looked up."""
    storage = _in_place(storage)
    operands = (grad_out, ids, storage, composed, layout, want_composed)
    if runs_native(backend):
        return native.lookup_bwd_rows(*operands, padding_idx)
    run = launch_bwd_rows if backend == "triton" else cpu.lookup_bwd_rows
    with own_precision(storage):
        return run(*operands)


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
    layout = Layout(row_start, page_level, tuple(sizes), page)
    return _lookup_fwd(ids, storage, composed, layout, backend, out_dtype)


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
    layout = Layout(row_start, page_level, tuple(sizes), page)
    grad_storage, grad_composed = _lookup_bwd(grad_out, ids, storage, composed, layout, backend)
    assert grad_composed is not None
    return grad_storage, grad_composed


@lookup_bwd_op.register_fake
def _(grad_out, ids, storage, composed, row_start, page_level, sizes, page, backend):
    return torch.empty_like(storage), torch.empty_like(composed)


def _formula(ids: Tensor, storage: Tensor, chain: Tensor, layout: Layout) -> Tensor:
    """The lookup hop by hop for all ids at once, in operators that torch differentiates itself."""
    chain = full_chain(chain, layout.sizes).to(compute_dtype(chain.dtype))
    storage = storage.to(compute_dtype(storage.dtype))
    start = layout.row_start[ids].long()
    level = layout.page_level[start // layout.page]
    y = storage.new_zeros(*ids.shape, layout.sizes[0])
    for k, dim in enumerate(layout.sizes):
        if k > 0:
            weight, bias = split_chain(chain, layout.sizes)[k - 1]
            # Only rows of lower levels pass this hop, forward and in the derivatives.
            y = torch.where((level < k)[:, None], y, 0) @ weight.t() + bias
        # Of a longer row only the first entries, of a shorter one also what lies behind it: both
        # are replaced or masked, and the last row's end is not passed.
        entries = start[:, None] + torch.arange(dim, device=ids.device)
        row = storage[entries.clamp(max=storage.numel() - 1)]
        y = torch.where((level == k)[:, None], row, y)
    return y


class _DivideByCount(torch.autograd.Function):
    """``grad_out / count``, whose own derivative is not divided, as that of ``nn.Embedding``.

    A second derivative passes back through the lookup again and is divided there.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(grad_out: Tensor, count: Tensor) -> Tensor:
        return grad_out / count

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


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
        grad_out = _DivideByCount.apply(grad_out, count[ids][:, None])
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
        layout = Layout(row_start, page_level, sizes, page)
        grad_storage, grad_composed = _lookup_bwd(grad_out, ids, storage, composed, layout, backend)
        assert grad_composed is not None
        return grad_storage, compose_bwd(grad_composed, chain, composed, sizes, backend=backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        grad_out, ids, storage, chain, _, row_start, page_level, sizes, page, _ = inputs
        ctx.save_for_backward(grad_out, ids, storage, chain, row_start, page_level)
        ctx.sizes, ctx.page = sizes, page

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_out, ids, storage, chain, row_start, page_level = ctx.saved_tensors
        layout = Layout(row_start, page_level, ctx.sizes, ctx.page)

        def vjp(g: Tensor, rows: Tensor, hops: Tensor) -> tuple[Tensor, Tensor]:
            def formula(rows: Tensor, hops: Tensor) -> Tensor:
                return _formula(ids, rows, hops, layout).to(g.dtype)

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
        # The operator's boundary costs as much as a small lookup: only where code is traced.
        if is_opaque(storage):
            flat = (row_start, page_level, sizes, page)
            return lookup_fwd_op(ids, storage, composed, *flat, backend, out_dtype)
        layout = Layout(row_start, page_level, sizes, page)
        return _lookup_fwd(ids, storage, composed, layout, backend, out_dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, sizes, page, backend, _, padding_idx, scale_grad_by_freq = inputs
        ctx.save_for_backward(*tensors)
        ctx.flat, ctx.weights = (sizes, page, backend), (padding_idx, scale_grad_by_freq)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        ids, storage, chain, composed, row_start, page_level = ctx.saved_tensors
        grad_out = _weigh(grad_out, ids, row_start.numel(), *ctx.weights)
        flat = (row_start, page_level, *ctx.flat)
        if is_opaque(storage):
            grad_storage, grad_composed = lookup_bwd_op(grad_out, ids, storage, composed, *flat)
            sizes, _, backend = ctx.flat
            grad_chain = compose_bwd(grad_composed, chain, composed, sizes, backend=backend)
        else:
            operands = (grad_out, ids, storage, chain, composed)
            grad_storage, grad_chain = _LookupBwd.apply(*operands, *flat)
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
    """:class:`_Lookup` in plain eager code: less overhead, and no gradient that is not needed.

    With ``sparse`` the gradient of the storage is a COO tensor, with ``by_row`` a ``RowGradient``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        storage: Tensor,
        chain: Tensor,
        how: tuple[Tensor, Layout, Options, str, Tensor | None],
    ) -> Tensor:
        # Locations need no guard against writing: rows that move write to the storage too.
        ctx.save_for_backward(ids, storage, chain)
        ctx.how = how
        composed, layout, options, backend, hops = how
        return _lookup_fwd(ids, storage, composed, layout, backend, options.out_dtype, None, hops)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        ids, storage, chain = ctx.saved_tensors
        composed, layout, options, backend, _ = ctx.how
        padding_idx, scale_grad_by_freq, sparse, _, by_row = options
        passes = runs_native(backend) and not torch.is_grad_enabled()
        weights = None if passes else padding_idx, scale_grad_by_freq
        grad_out = _weigh(grad_out, ids, layout.num_rows, *weights)
        if torch.is_grad_enabled():
            if sparse and not by_row:
                raise RuntimeError("a sparse gradient has no derivative: use sparse=False")
            operands = (grad_out, ids, storage, chain, composed)
            grads = _LookupBwd.apply(*operands, *layout.flat, backend)
            return None, *grads, None
        needs_chain = ctx.needs_input_grad[2]
        operands = (grad_out, ids, storage, composed, layout)
        grad_storage: Tensor
        if by_row:
            how = (backend, needs_chain, padding_idx)
            rows, grad_composed = _lookup_bwd_rows(*operands, *how)
            grad_storage = RowGradient([rows], layout, storage)
        elif sparse:
            run = native.lookup_bwd_sparse if passes else cpu.lookup_bwd_sparse
            operands = (grad_out, ids, _in_place(storage), composed, layout)
            with own_precision(storage):
                grad_storage, grad_composed = run(*operands, padding_idx, needs_chain)
        else:
            how = (backend, needs_chain, padding_idx)
            grad_storage, grad_composed = _lookup_bwd(*operands, *how)
        grad_chain = None
        if grad_composed is not None:
            grad_chain = compose_bwd(grad_composed, chain, composed, layout.sizes, backend=backend)
        return None, grad_storage, grad_chain, None


class _FusedLookup(torch.autograd.Function):
    """:class:`_Lookup` whose backward steps the rows instead of returning their gradient.

    Under ``torch.func`` too, as long as the derivative is not one of rows or hops.
    """

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        ids, storage, _, composed, layout, options, backend, hops, _ = inputs
        return _lookup_fwd(ids, storage, composed, layout, backend, options.out_dtype, None, hops)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ids, storage, chain, composed, layout, options, backend, _, begin_step = inputs
        ctx.save_for_backward(ids, storage, chain, composed, layout.row_start, layout.page_level)
        ctx.layout, ctx.options, ctx.backend = layout, options, backend
        ctx.begin_step, ctx.storage, ctx.version = begin_step, storage, storage._version

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.storage._version != ctx.version:
            raise RuntimeError(
                "the rows changed between this lookup and its backward: a fused optimizer steps "
                "them in backward, so look up all ids of a step in one call, or build it with "
                "deferred=True, and resize between steps"
            )
        ids, storage, chain, composed, _, _ = ctx.saved_tensors
        layout, backend = ctx.layout, ctx.backend
        padding_idx, scale_grad_by_freq, *_ = ctx.options
        update = ctx.begin_step()
        operands = (ids, storage, composed, layout, update, ctx.needs_input_grad[2])
        if runs_native(backend) and native.takes_state(update, storage):
            grad_out = _weigh(grad_out, ids, layout.num_rows, None, scale_grad_by_freq)
            grad_composed = native.lookup_bwd_update(grad_out, *operands, padding_idx)
        else:
            grad_out = _weigh(grad_out, ids, layout.num_rows, padding_idx, scale_grad_by_freq)
            run = launch_bwd_update if backend == "triton" else cpu.lookup_bwd_update
            grad_composed = run(grad_out, *operands)
        grad_chain = None
        if grad_composed is not None:
            grad_chain = compose_bwd(grad_composed, chain, composed, layout.sizes, backend=backend)
        return None, None, grad_chain, *[None] * 6


class _EagerFusedLookup(torch.autograd.Function):
    """:class:`_FusedLookup` in plain eager code.

    Of a function with ``setup_context`` torch looks up the signature of ``forward`` at every call.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _FusedLookup.forward(*inputs)
        _FusedLookup.setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _FusedLookup.backward(ctx, *grads)


# Both are graph breaks under torch.compile.
@torch.compiler.disable
def _fused(*inputs: Any) -> Tensor:
    out: Tensor = _FusedLookup.apply(*inputs)
    return out


def _eager(
    ids: Tensor,
    storage: Tensor,
    chain: Tensor,
    composed: Tensor,
    layout: Layout,
    options: Options,
    backend: str,
    hops: Tensor | None = None,
) -> Tensor:
    if torch.is_grad_enabled() and (storage.requires_grad or chain.requires_grad):
        # Past what Function.apply does for torch.func, which costs as much as the rest of a small
        # lookup: plain eager code has no use for it.
        how = (composed, layout, options, backend, hops)
        y: Tensor = super(torch.autograd.Function, _EagerLookup).apply(ids, storage, chain, how)
        return y
    return _lookup_fwd(ids, storage, composed, layout, backend, options.out_dtype, None, hops)


# Gradients that hold rows looked up are a graph break under torch.compile.
_by_row = torch.compiler.disable(_eager)


def _groups(ids: Tensor, storage: Tensor, layout: Layout) -> bool:
    """Whether there are ids, and the forward groups them by level."""
    return ids.numel() > 0 and groups_ids(ids.numel(), layout.sizes, storage.dtype)


def _look_up_reference(
    ids: Tensor, storage: Tensor, chain: Tensor, layout: Layout, options: Options
) -> Tensor:
    y = lookup_reference(ids, storage, chain, *layout.flat).to(options.out_dtype or storage.dtype)
    weights = options.padding_idx, options.scale_grad_by_freq
    if y.requires_grad and weights != (None, False):
        flat, dim = ids.reshape(-1), layout.dim
        y.register_hook(
            lambda g: _weigh(g.reshape(-1, dim), flat, layout.num_rows, *weights).view(g.shape)
        )
    return y


def lookup(
    ids: Tensor,
    storage: Tensor,
    chain: Tensor,
    layout: Layout,
    options: Options = Options(),  # noqa: B008 - immutable
    *,
    backend: str = "auto",
    out: Tensor | None = None,
    begin_step: Callable[[], Update] | None = None,
    cache: ComposedCache | None = None,
) -> Tensor:
    """Look up ragged rows and carry each to the largest size: ``y(x) = M_k e + c_k``.

    Args:
        ids: any shape, int32 or int64, in ``[0, N)``; duplicates allowed. Not checked here: see
            ``checks.check_ids``, which the modules call. Ids out of range raise ``IndexError`` on
            the native and the torch backend; they fail an assertion on a GPU, and interpreted
            kernels give zeros.
        storage: all rows, flat ``[capacity]``, fp32 / bf16 / fp16 / fp64; gradient flows (dense).
        chain: packed hops or tails (see ``chain``), same dtype; gradient flows.
        layout: where the rows lie.
        options: see :class:`Options`.
        backend: ``auto`` (Triton on a GPU, native kernels on a CPU where they are built, torch
            elsewhere), ``triton``, ``native``, ``torch``, ``reference``.
        out: contiguous memory for the output, where no gradient is recorded.
        begin_step: a fused optimizer's step (see ``optim``). Called in backward, which then steps
            the rows in place; ``storage`` has no gradient.
        cache: keeps the composed hops between calls on a CPU.

    Returns:
        ``[*ids.shape, D]`` in ``out_dtype``, accumulated in fp32 (fp64 for fp64 rows).

    Raises:
        RuntimeError: a backend where it cannot run; ``out`` where a gradient is recorded;
            tensors on several devices.
        ValueError: an unknown backend; ``out`` of another shape, dtype or device.

    Notes:
        Deterministic on every backend; between them results differ by rounding. Empty ``ids`` give
        an empty output and zero gradients. The gradient is computed from ``storage`` at backward
        time: changing rows in between raises.
        Differentiable any number of times; ``torch.func`` and ``torch.compile`` apply (``vmap``
        over anything but ids runs the elements in turn). Forward-mode derivatives raise.

    Example:
        >>> storage = torch.tensor([1.0, 2.0, 5.0, 6.0])  # two rows of size 1, one of size 2
        >>> chain = torch.tensor([10.0, 20.0, 0.5, 0.25])  # W = [[10], [20]], b = [0.5, 0.25]
        >>> page_level = torch.tensor([0, 1], dtype=torch.int8)
        >>> layout = Layout(torch.tensor([0, 1, 2]), page_level, sizes=(1, 2), page=2)
        >>> lookup(torch.tensor([0, 2]), storage, chain, layout)
        tensor([[10.5000, 20.2500],
                [ 5.0000,  6.0000]])
    """
    fuses = begin_step is not None and storage.requires_grad
    device = storage.device
    backend = resolve_backend(backend, device)
    # Kernels would read what lies at such addresses.
    together = storage.is_cpu and ids.is_cpu and chain.is_cpu
    if not together and not ids.device == chain.device == device and not storage.is_meta:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but got "
            f"ids on {ids.device}, rows on {device} and chain on {chain.device}"
        )
    if out is not None:
        check_out(out, (*ids.shape, layout.dim), options.out_dtype or storage.dtype, storage)
    if backend == "reference":
        y = _look_up_reference(ids, storage, chain, layout, options)
        return y if out is None else out.copy_(y)
    flat = ids if ids.dim() == 1 else ids.reshape(-1)
    eager = is_eager()
    hops = None
    if eager and backend == "triton" and _groups(flat, storage, layout):
        # The launch that counts the levels of the ids composes the hops as well.
        hops = full_chain(chain.detach(), layout.sizes).contiguous()
        composed = empty_composed(hops, layout.sizes)
    elif cache is not None and eager and backend != "triton" and device.type == "cpu":
        composed = cache(chain, layout.sizes, backend)
    else:
        # torch.func hands over tensors that no kernel can read, nor an operator.
        readable = eager or torch.compiler.is_compiling() or torch.jit.is_tracing()
        composed = compose(chain, layout.sizes, backend=backend if readable else "torch")
    if out is not None:
        where = (out.view(-1, layout.dim), hops)
        rows = storage.detach()
        _lookup_fwd(flat, rows, composed, layout, backend, options.out_dtype, *where)
        return out
    operands = (flat, storage, chain, composed)
    if fuses:
        run = _EagerFusedLookup.apply if eager else _fused
        y = run(*operands, layout, options, backend, hops, begin_step)
    elif eager and not storage.is_meta:
        y = _eager(*operands, layout, options, backend, hops)
    elif (
        (options.sparse or options.by_row)
        and torch.is_grad_enabled()
        and torch.compiler.is_dynamo_compiling()
    ):
        y = _by_row(*operands, layout, options, backend)
    else:
        y = _Lookup.apply(
            *operands,
            *(*layout.flat, backend),
            *(options.out_dtype, options.padding_idx, options.scale_grad_by_freq),
        )
    return y if flat is ids else y.view(*ids.shape, layout.dim)
