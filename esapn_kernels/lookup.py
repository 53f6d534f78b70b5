"""Ragged embedding lookup fused with the projection to the largest size.

    y(x) = M_k e + c_k        e in R^{d_k} the row of x, k its level, y in R^{d_n}

with ``(M_k, c_k)`` from :mod:`esapn_kernels.compose`; the gradient is in ``lookup_bwd``.

Memory picture: ``ids -> row_start (int32, 4 B) -> page_level (int8, one per page, cached)`` gives
where a row begins and how long it is; rows lie in one flat ``storage``. In small batches a tile of
rows of mixed levels becomes the sparse operand X of shape ``[rows, K]`` (see ``compose``), so all
levels are one matrix product in one launch, without a sort,

    Y = X composed  (+ the row itself at the last level)

and blocks of K that no row of the tile touches are skipped. Large batches are grouped by level
first (see ``group``), and a tile meets the map of its own level alone.

Bytes per id, fp32: 8 (id) + 4 (location) + 4 d_k (row) + 4 d_n (out). Source of the operator: Liu
et al., "Automated Embedding Size Search in Deep Recommender Systems", SIGIR 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import launch, torch_path
from .backend import resolve_backend, tl, triton
from .compose import compose, compose_bwd
from .group import assertions, find_rows, group_by_level
from .launch import block_constants, kernel_constants
from .lookup_bwd import launch_bwd, launch_bwd_update
from .reference import lookup_reference
from .update import Update

__all__ = ["lookup"]


@triton.jit
def _operand_columns(level, SIZES: tl.constexpr):
    """Columns of X that a row fills: the first, and how many entries (-1 if none: last level)."""
    base = tl.zeros_like(level)
    dim = tl.zeros_like(level) - 1
    offset = 0
    for k in tl.static_range(len(SIZES) - 1):
        base = tl.where(level == k, offset, base)
        dim = tl.where(level == k, SIZES[k], dim)
        offset += SIZES[k] + 1
    return base, dim


@triton.jit
def _operand(storage_ptr, start, base, dim, offs_k, ACC: tl.constexpr):
    """Block of X: the row's entries, the 1 behind them, zeros elsewhere."""
    column = offs_k[None, :] - base[:, None]  # [BLOCK_ROWS, BLOCK_K]
    mask_entry = (column >= 0) & (column < dim[:, None])
    x = tl.load(storage_ptr + start[:, None] + column, mask=mask_entry, other=0.0).to(ACC)
    return tl.where(column == dim[:, None], 1.0, x).to(ACC)


@triton.jit
def _touches(base, dim, k, BLOCK_K: tl.constexpr):
    """Whether any row of the tile has columns in ``[k, k + BLOCK_K)``."""
    hit = (base < k + BLOCK_K) & (base + dim >= k)
    return tl.max(hit.to(tl.int32), axis=0) > 0


@triton.jit
def _lookup_fwd_kernel(
    ids_ptr,
    storage_ptr,
    composed_ptr,
    row_start_ptr,
    page_level_ptr,
    out_ptr,
    n_ids,
    n_rows,
    SIZES: tl.constexpr,
    ALIGN: tl.constexpr,
    PAGE: tl.constexpr,
    K: tl.constexpr,
    DIM: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    offs_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    offs_dim = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    mask_dim = offs_dim < DIM
    start = find_rows(ids_ptr, row_start_ptr, offs_row, n_ids, n_rows)
    level = tl.load(page_level_ptr + start // PAGE, mask=start >= 0, other=-1).to(tl.int32)
    base, dim = _operand_columns(level, SIZES)

    # Rows of the last level are copied: their part of X is empty, and nothing is added to them.
    is_copy = level == len(SIZES) - 1
    row = start // ALIGN[len(SIZES) - 1] * ALIGN[len(SIZES) - 1]  # itself, in vectors of 16 bytes
    acc = tl.load(
        storage_ptr + row[:, None] + offs_dim[None, :],
        mask=is_copy[:, None] & mask_dim[None, :],
        other=0.0,
    ).to(ACC)  # [BLOCK_ROWS, BLOCK_DIM]
    for k in range(0, K, BLOCK_K):
        if _touches(base, dim, k, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            x = _operand(storage_ptr, start, base, dim, offs_k, ACC)  # [BLOCK_ROWS, BLOCK_K]
            mask_a = (offs_k < K)[:, None] & mask_dim[None, :]
            a = tl.load(
                composed_ptr + offs_k[:, None] * DIM + offs_dim[None, :], mask=mask_a, other=0.0
            )  # [BLOCK_K, BLOCK_DIM]
            acc = tl.dot(x, a, acc, input_precision=PRECISION, out_dtype=ACC)
    tl.store(
        out_ptr + offs_row[:, None] * DIM + offs_dim[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=(offs_row < n_ids)[:, None] & mask_dim[None, :],
    )


@triton.jit
def _project(
    storage_ptr,
    map_ptr,
    start,
    mask_row,
    offs_dim,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    DIM: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Tile of ``M e + c`` for rows of one size D: by FMA where a dot's padding would cost more."""
    mask_dim = offs_dim < DIM
    map_ptr += offs_dim
    bias = tl.load(map_ptr + D * DIM, mask=mask_dim, other=0.0)
    y = tl.broadcast_to(bias[None, :], start.shape[0], offs_dim.shape[0])
    if D <= 8:
        for j in tl.static_range(D):
            x = tl.load(storage_ptr + start + j, mask=mask_row, other=0.0).to(ACC)
            a = tl.load(map_ptr + j * DIM, mask=mask_dim, other=0.0)
            y += x[:, None] * a[None, :]
    else:
        for j in range(0, D, PADDED):
            offs_k = j + tl.arange(0, PADDED)
            mask_k = offs_k < D
            x = tl.load(
                storage_ptr + start[:, None] + offs_k[None, :],
                mask=mask_row[:, None] & mask_k[None, :],
                other=0.0,
            ).to(ACC)  # [BLOCK_ROWS, PADDED]
            a = tl.load(
                map_ptr[None, :] + offs_k[:, None] * DIM,
                mask=mask_k[:, None] & mask_dim[None, :],
                other=0.0,
            )  # [PADDED, BLOCK_DIM]
            y = tl.dot(x, a, y, input_precision=PRECISION, out_dtype=ACC)
    return y


@triton.jit
def _lookup_grouped_kernel(
    order_ptr,
    start_ptr,
    level_begin_ptr,
    storage_ptr,
    composed_ptr,
    out_ptr,
    SIZES: tl.constexpr,
    ALIGN: tl.constexpr,
    PADDED: tl.constexpr,
    DIM: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    n_programs = tl.num_programs(0)
    # Tiles are numbered through all levels; this program takes every n_programs-th of them.
    first = tl.program_id(0)
    base = 0
    for k in tl.static_range(len(SIZES) + 1):
        begin = tl.load(level_begin_ptr + k)
        end = tl.load(level_begin_ptr + k + 1)
        tiles = tl.cdiv(end - begin, BLOCK_ROWS)
        for tile in range(first, tiles, n_programs):
            offs_row = begin + tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
            mask_row = offs_row < end
            position = tl.load(order_ptr + offs_row, mask=mask_row, other=0).to(tl.int64)
            start = tl.load(start_ptr + offs_row, mask=mask_row, other=0).to(tl.int64)
            if k < len(SIZES):
                # Rows then move in vectors of 16 bytes.
                start = tl.multiple_of(start, tl.constexpr(ALIGN[k]))
            for n in range(0, DIM, BLOCK_DIM):
                offs_dim = n + tl.arange(0, BLOCK_DIM)
                mask = mask_row[:, None] & (offs_dim < DIM)[None, :]
                if k == len(SIZES):  # ids that have no row
                    y = tl.zeros([BLOCK_ROWS, BLOCK_DIM], dtype=ACC)
                elif k == len(SIZES) - 1:
                    row_ptr = storage_ptr + start[:, None] + offs_dim[None, :]
                    y = tl.load(row_ptr, mask=mask, other=0.0)
                else:
                    y = _project(
                        storage_ptr,
                        composed_ptr + base * DIM,
                        start,
                        mask_row,
                        offs_dim,
                        SIZES[k],
                        PADDED[k],
                        DIM,
                        ACC,
                        PRECISION,
                    )  # [BLOCK_ROWS, BLOCK_DIM]
                tl.store(
                    out_ptr + position[:, None] * DIM + offs_dim[None, :],
                    y.to(out_ptr.dtype.element_ty),
                    mask=mask,
                )
        behind = tiles - first
        first = tl.cdiv(behind, n_programs) * n_programs - behind
        if k < len(SIZES):
            base += SIZES[k] + 1


def _launch_small(
    out: Tensor,
    ids: Tensor,
    storage: Tensor,
    composed: Tensor,
    row_start: Tensor,
    page_level: Tensor,
    sizes: Sequence[int],
    page: int,
) -> None:
    config = launch.choose_fwd(ids.numel(), sizes[-1], storage.dtype)
    grid = (triton.cdiv(ids.numel(), config.block_rows), triton.cdiv(sizes[-1], config.block_dim))
    _lookup_fwd_kernel[grid](
        ids,
        storage,
        composed,
        row_start,
        page_level,
        out,
        ids.numel(),
        row_start.numel(),
        ALIGN=launch.alignments(sizes, page),
        **kernel_constants(sizes, page, storage.dtype),
        **block_constants(config),
        **assertions(ids),
    )


def _launch_grouped(
    out: Tensor,
    ids: Tensor,
    storage: Tensor,
    composed: Tensor,
    row_start: Tensor,
    page_level: Tensor,
    sizes: Sequence[int],
    page: int,
) -> None:
    groups = group_by_level(ids, row_start, page_level, sizes, page)
    config = launch.choose_fwd_grouped(ids.numel(), sizes, storage.dtype)
    _lookup_grouped_kernel[(config.programs,)](
        groups.order,
        groups.start,
        groups.level_begin,
        storage,
        composed,
        out,
        **config.constants(sizes, page, storage.dtype),
    )


def _launch_fwd(
    ids: Tensor,
    storage: Tensor,
    composed: Tensor,
    row_start: Tensor,
    page_level: Tensor,
    sizes: Sequence[int],
    page: int,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``[B, d_n]`` in ``out_dtype`` (that of ``storage``), or into the contiguous ``out``."""
    if out is None:
        out = storage.new_empty(ids.numel(), sizes[-1], dtype=out_dtype)
    if ids.numel():
        grouped = launch.groups_ids(ids.numel(), sizes, storage.dtype)
        run = _launch_grouped if grouped else _launch_small
        # Kernels count from the first id: of a strided view, that is not where the second lies.
        run(out, ids.contiguous(), storage, composed, row_start, page_level, sizes, page)
    return out


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
        return _launch_fwd(*where, out_dtype, out)
    if out_dtype in (None, storage.dtype):
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


class _Lookup(torch.autograd.Function):
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
    ) -> Tensor:
        # Eager code goes straight to the implementation, without the operator boundary.
        run = lookup_fwd_op if torch.compiler.is_compiling() else _lookup_fwd
        return run(ids, storage, composed, row_start, page_level, sizes, page, backend, out_dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:6])
        ctx.layout = inputs[6:9]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        ids, storage, chain, composed, *where = ctx.saved_tensors
        operands = (grad_out, ids, storage, composed, *where, *ctx.layout)
        grad_composed: Tensor | None
        if torch.compiler.is_compiling():
            grad_storage, grad_composed = lookup_bwd_op(*operands)
        else:
            wanted = {"want_composed": ctx.needs_input_grad[2]}
            grad_storage, grad_composed = _lookup_bwd(*operands, **wanted)
        grad_chain = None
        if ctx.needs_input_grad[2] and grad_composed is not None:
            sizes, _, backend = ctx.layout
            grad_chain = compose_bwd(grad_composed, chain, composed, sizes, backend=backend)
        return None, grad_storage, grad_chain, *[None] * 7


class _FusedLookup(torch.autograd.Function):
    """:class:`_Lookup` whose backward steps the rows instead of returning their gradient."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return _lookup_fwd(*inputs[:2], *inputs[3:-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:6])
        ctx.layout, ctx.begin_step = inputs[6:9], inputs[-1]
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
        return None, None, grad_chain, *[None] * 8


@torch.compiler.disable
def _fused(*inputs: Any) -> Tensor:
    out: Tensor = _FusedLookup.apply(*inputs)
    return out


def check_ids(ids: Tensor, num_rows: int) -> None:
    """Refuse ids that are not int32 / int64 or, where a look costs nothing, out of range.

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
    if ids.device.type == "cpu" and not torch.compiler.is_compiling() and ids.numel():
        low, high = torch.aminmax(ids)
        if low < 0 or high >= num_rows:
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
    check_ids(ids, row_start.numel())
    sizes = tuple(sizes)
    shape = (*ids.shape, sizes[-1])
    dtype = storage.dtype if out_dtype is None else out_dtype
    if out is not None:
        _check_out(out, shape, dtype, storage)
    if backend == "reference":
        y = lookup_reference(ids, storage, chain, row_start, page_level, sizes, page).to(dtype)
        return y if out is None else out.copy_(y)
    composed = compose(chain, sizes, backend=backend)
    where = (row_start, page_level, sizes, page, backend, dtype)
    flat = ids.reshape(-1)
    if out is not None:
        _lookup_fwd(flat, storage.detach(), composed, *where, out.view(-1, sizes[-1]))
        return out
    if begin_step is not None and storage.requires_grad:
        return _fused(flat, storage, chain, composed, *where, begin_step).view(shape)
    y = _Lookup.apply(flat, storage, chain, composed, *where)
    return y.view(shape)
