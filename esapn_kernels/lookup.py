"""Ragged embedding lookup fused with the projection to the largest size.

    y(x) = M_k e + c_k        e in R^{d_k} the row of x, k its level, y in R^{d_n}

with ``(M_k, c_k)`` from :mod:`esapn_kernels.compose`. Gradients, ``G`` the output gradient:

    d e   = M_k^T sum_{occurrences of x} G        (summed per distinct ID first)
    d M_k = sum_{x at level k} G e^T,   d c_k = sum_{x at level k} G

Memory picture: ``ids -> row_start (int32, 4 B) -> page_level (int8, one per page, cached)`` gives
where a row begins and how long it is; rows lie in one flat ``storage``. A tile of rows becomes the
sparse operand X of shape ``[rows, K]`` (see ``compose``), so all levels are one matrix product

    Y = X composed  (+ the row itself at the last level)

and the products for the gradients are ``G composed^T`` and ``X^T G``. Blocks of K that no row of
the tile touches are skipped. The gradient needs no atomics: occurrences are sorted by row, the
first of a run owns it, and the sums over rows are taken per program and then in a fixed order, so
every result is the same in every run.

Bytes per id, fp32: 8 (id) + 4 (location) + 4 d_k (row) + 4 d_n (out). Source of the operator: Liu
et al., "Automated Embedding Size Search in Deep Recommender Systems", SIGIR 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import launch, torch_path
from .backend import resolve_backend, tl, triton
from .compose import compose, compose_bwd, compute_dtype, operand_offsets
from .reference import lookup_reference

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
def _locate(ids_ptr, row_start_ptr, page_level_ptr, offs_row, n_ids, n_rows, PAGE: tl.constexpr):
    """Row start (int64) and level (int32) of a tile of ids, -1 for ids that do not exist."""
    ids = tl.load(ids_ptr + offs_row, mask=offs_row < n_ids, other=-1).to(tl.int64)
    mask_id = (ids >= 0) & (ids < n_rows)
    start = tl.load(row_start_ptr + ids, mask=mask_id, other=-1).to(tl.int64)
    level = tl.load(page_level_ptr + start // PAGE, mask=start >= 0, other=-1).to(tl.int32)
    return start, level


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
    start, level = _locate(ids_ptr, row_start_ptr, page_level_ptr, offs_row, n_ids, n_rows, PAGE)
    base, dim = _operand_columns(level, SIZES)

    acc = tl.zeros([BLOCK_ROWS, BLOCK_DIM], dtype=ACC)
    for k in range(0, K, BLOCK_K):
        if _touches(base, dim, k, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            x = _operand(storage_ptr, start, base, dim, offs_k, ACC)  # [BLOCK_ROWS, BLOCK_K]
            mask_a = (offs_k < K)[:, None] & mask_dim[None, :]
            a = tl.load(
                composed_ptr + offs_k[:, None] * DIM + offs_dim[None, :], mask=mask_a, other=0.0
            )  # [BLOCK_K, BLOCK_DIM]
            acc = tl.dot(x, a, acc, input_precision=PRECISION, out_dtype=ACC)
    mask_copy = (level == len(SIZES) - 1)[:, None] & mask_dim[None, :]
    row = tl.load(storage_ptr + start[:, None] + offs_dim[None, :], mask=mask_copy, other=0.0)
    acc += row.to(ACC)
    tl.store(
        out_ptr + offs_row[:, None] * DIM + offs_dim[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=(offs_row < n_ids)[:, None] & mask_dim[None, :],
    )


@triton.jit
def _lookup_bwd_rows_kernel(
    sorted_start_ptr,
    order_ptr,
    grad_out_ptr,
    composed_ptr,
    page_level_ptr,
    grad_storage_ptr,
    n_ids,
    SIZES: tl.constexpr,
    PAGE: tl.constexpr,
    K: tl.constexpr,
    DIM: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    offs_pos = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    start = tl.load(sorted_start_ptr + offs_pos, mask=offs_pos < n_ids, other=-1).to(tl.int64)
    before = tl.load(
        sorted_start_ptr + offs_pos - 1, mask=(offs_pos > 0) & (offs_pos <= n_ids), other=-1
    ).to(tl.int64)
    is_first = (start >= 0) & (start != before)
    level = tl.load(page_level_ptr + start // PAGE, mask=is_first, other=-1).to(tl.int32)
    base, dim = _operand_columns(level, SIZES)
    out_type = grad_storage_ptr.dtype.element_ty

    for n in range(0, DIM, BLOCK_DIM):
        offs_dim = n + tl.arange(0, BLOCK_DIM)
        mask_dim = offs_dim < DIM
        grad = tl.zeros([BLOCK_ROWS, BLOCK_DIM], dtype=ACC)
        pos = offs_pos
        active = is_first
        while tl.max(active.to(tl.int32), axis=0) > 0:
            occurrence = tl.load(order_ptr + pos, mask=active, other=0).to(tl.int64)
            grad += tl.load(
                grad_out_ptr + occurrence[:, None] * DIM + offs_dim[None, :],
                mask=active[:, None] & mask_dim[None, :],
                other=0.0,
            ).to(ACC)
            pos += 1
            following = tl.load(sorted_start_ptr + pos, mask=active & (pos < n_ids), other=-1)
            active = active & (following.to(tl.int64) == start)

        mask_copy = (level == len(SIZES) - 1)[:, None] & mask_dim[None, :]
        tl.store(
            grad_storage_ptr + start[:, None] + offs_dim[None, :], grad.to(out_type), mask=mask_copy
        )
        for k in range(0, K, BLOCK_K):
            if _touches(base, dim, k, BLOCK_K):
                offs_k = k + tl.arange(0, BLOCK_K)
                mask_a = (offs_k < K)[None, :] & mask_dim[:, None]
                a = tl.load(
                    composed_ptr + offs_k[None, :] * DIM + offs_dim[:, None], mask=mask_a, other=0.0
                )  # [BLOCK_DIM, BLOCK_K]
                grad_x = tl.dot(grad, a, input_precision=PRECISION, out_dtype=ACC)
                column = offs_k[None, :] - base[:, None]  # [BLOCK_ROWS, BLOCK_K]
                mask_entry = (column >= 0) & (column < dim[:, None])
                entry_ptr = grad_storage_ptr + start[:, None] + column
                if DIM > BLOCK_DIM:
                    # Only this program touches these rows: no atomics, but its own earlier stores.
                    tl.debug_barrier()
                    grad_x += tl.load(entry_ptr, mask=mask_entry, other=0.0).to(ACC)
                tl.store(entry_ptr, grad_x.to(out_type), mask=mask_entry)


@triton.jit
def _lookup_bwd_chain_kernel(
    ids_ptr,
    storage_ptr,
    grad_out_ptr,
    row_start_ptr,
    page_level_ptr,
    partial_ptr,
    n_ids,
    n_rows,
    SIZES: tl.constexpr,
    PAGE: tl.constexpr,
    K: tl.constexpr,
    DIM: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    pid = tl.program_id(0)
    k = tl.program_id(1) * BLOCK_K
    offs_k = k + tl.arange(0, BLOCK_K)
    offs_dim = tl.program_id(2) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    mask_dim = offs_dim < DIM
    acc = tl.zeros([BLOCK_K, BLOCK_DIM], dtype=ACC)
    for tile in range(pid, tl.cdiv(n_ids, BLOCK_ROWS), tl.num_programs(0)):
        offs_row = tl.arange(0, BLOCK_ROWS).to(tl.int64) + tile * BLOCK_ROWS
        start, level = _locate(
            ids_ptr, row_start_ptr, page_level_ptr, offs_row, n_ids, n_rows, PAGE
        )
        base, dim = _operand_columns(level, SIZES)
        if _touches(base, dim, k, BLOCK_K):
            x = _operand(storage_ptr, start, base, dim, offs_k, ACC)  # [BLOCK_ROWS, BLOCK_K]
            grad = tl.load(
                grad_out_ptr + offs_row[:, None] * DIM + offs_dim[None, :],
                mask=(dim >= 0)[:, None] & mask_dim[None, :],
                other=0.0,
            ).to(ACC)  # [BLOCK_ROWS, BLOCK_DIM]
            acc = tl.dot(tl.trans(x), grad, acc, input_precision=PRECISION, out_dtype=ACC)
    tl.store(
        partial_ptr + (pid.to(tl.int64) * K + offs_k[:, None]) * DIM + offs_dim[None, :],
        acc,
        mask=(offs_k < K)[:, None] & mask_dim[None, :],
    )


def _precision(dtype: torch.dtype) -> str:
    """``tf32x3`` keeps fp32 accuracy; plain ``tf32`` only where torch itself is told to use it."""
    if dtype == torch.float64:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def kernel_constants(sizes: Sequence[int], page: int, dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time arguments that the kernels of this package share."""
    return {
        "SIZES": tuple(sizes),
        "PAGE": page,
        "K": operand_offsets(sizes)[-1],
        "DIM": sizes[-1],
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "PRECISION": _precision(dtype),
    }


def block_constants(config: launch.LaunchConfig) -> dict[str, Any]:
    """Tile sizes and launch options as keyword arguments of a launch.

    ``enable_fp_fusion`` is explicit because Triton's default is about to change.
    """
    return {
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_K": config.block_k,
        "BLOCK_DIM": config.block_dim,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,
    }


def _launch_fwd(
    ids: Tensor,
    storage: Tensor,
    composed: Tensor,
    row_start: Tensor,
    page_level: Tensor,
    sizes: Sequence[int],
    page: int,
) -> Tensor:
    out = storage.new_empty(ids.numel(), sizes[-1])
    config = launch.choose_fwd(ids.numel(), sizes[-1], storage.dtype)
    grid = (triton.cdiv(ids.numel(), config.block_rows), triton.cdiv(sizes[-1], config.block_dim))
    if ids.numel():
        _lookup_fwd_kernel[grid](
            ids,
            storage,
            composed,
            row_start,
            page_level,
            out,
            ids.numel(),
            row_start.numel(),
            **kernel_constants(sizes, page, storage.dtype),
            **block_constants(config),
        )
    return out


def _launch_bwd(
    grad_out: Tensor,
    ids: Tensor,
    storage: Tensor,
    composed: Tensor,
    row_start: Tensor,
    page_level: Tensor,
    sizes: Sequence[int],
    page: int,
) -> tuple[Tensor, Tensor]:
    n_ids = ids.numel()
    if not n_ids:
        return torch.zeros_like(storage), torch.zeros_like(composed)
    grad_out = grad_out.contiguous()
    constants = kernel_constants(sizes, page, storage.dtype)
    config = launch.choose_bwd_rows(n_ids, sizes[-1], storage.dtype)
    # Rows wider than a tile are summed in place, tile after tile: not in 16 bits.
    one_tile = sizes[-1] <= config.block_dim
    grad_storage = torch.zeros_like(
        storage, dtype=storage.dtype if one_tile else compute_dtype(storage.dtype)
    )
    # The check may be skipped (compiled code): the gradient of an id out of range goes nowhere.
    known = ids.clamp(0, row_start.numel() - 1)
    start = torch.where(known == ids, row_start.index_select(0, known), -1)
    sorted_start, order = torch.sort(start, stable=True)
    _lookup_bwd_rows_kernel[(triton.cdiv(n_ids, config.block_rows),)](
        sorted_start,
        order,
        grad_out,
        composed,
        page_level,
        grad_storage,
        n_ids,
        **constants,
        **block_constants(config),
    )
    grad_storage = grad_storage.to(storage.dtype)
    n_k = constants["K"]
    if not n_k:
        return grad_storage, torch.zeros_like(composed)
    config = launch.choose_bwd_chain(n_ids, sizes[-1], storage.dtype)
    partial = composed.new_empty(config.splits, n_k, sizes[-1])
    grid = (
        config.splits,
        triton.cdiv(n_k, config.block_k),
        triton.cdiv(sizes[-1], config.block_dim),
    )
    _lookup_bwd_chain_kernel[grid](
        ids,
        storage,
        grad_out,
        row_start,
        page_level,
        partial,
        n_ids,
        row_start.numel(),
        **constants,
        **block_constants(config),
    )
    return grad_storage, partial.sum(0)


def _lookup_fwd(
    ids: Tensor,
    storage: Tensor,
    composed: Tensor,
    row_start: Tensor,
    page_level: Tensor,
    sizes: Sequence[int],
    page: int,
    backend: str,
) -> Tensor:
    run = _launch_fwd if backend == "triton" else torch_path.lookup_fwd
    return run(ids, storage, composed, row_start, page_level, sizes, page)


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
) -> tuple[Tensor, Tensor]:
    run = _launch_bwd if backend == "triton" else torch_path.lookup_bwd
    return run(grad_out, ids, storage, composed, row_start, page_level, sizes, page)


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
) -> Tensor:
    """Forward as an opaque operator, for ``torch.compile``."""
    return _lookup_fwd(ids, storage, composed, row_start, page_level, sizes, page, backend)


@lookup_fwd_op.register_fake
def _(ids, storage, composed, row_start, page_level, sizes, page, backend):
    return storage.new_empty(ids.shape[0], sizes[-1])


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
    return _lookup_bwd(
        grad_out, ids, storage, composed, row_start, page_level, sizes, page, backend
    )


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
    ) -> Tensor:
        # Eager code goes straight to the implementation, without the operator boundary.
        run = lookup_fwd_op if torch.compiler.is_compiling() else _lookup_fwd
        return run(ids, storage, composed, row_start, page_level, sizes, page, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:6])
        ctx.layout = inputs[6:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        run = lookup_bwd_op if torch.compiler.is_compiling() else _lookup_bwd
        ids, storage, chain, composed, *where = ctx.saved_tensors
        grad_storage, grad_composed = run(grad_out, ids, storage, composed, *where, *ctx.layout)
        grad_chain = None
        if ctx.needs_input_grad[2]:
            grad_chain = compose_bwd(grad_composed, chain, composed, ctx.layout[0])
        return None, grad_storage, grad_chain, *[None] * 6


def check_ids(ids: Tensor, num_rows: int) -> None:
    """Refuse ids that are not int32 / int64 or, where a look costs nothing, out of range.

    Raises:
        TypeError: no tensor at all.
        RuntimeError: other dtypes, in torch's own words.
        IndexError: an id outside ``[0, num_rows)``, on a CPU. On a GPU an asynchronous device
            assertion fails instead; the kernels never read or write outside in either case.
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
    if torch.compiler.is_compiling():
        return
    if ids.device.type == "cpu":
        if ids.numel():
            low, high = torch.aminmax(ids)
            if low < 0 or high >= num_rows:
                raise IndexError("index out of range in self")
    elif ids.numel():
        torch._assert_async(((ids >= 0) & (ids < num_rows)).all())


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

    Returns:
        ``[*ids.shape, d_n]``, dtype of ``storage``, accumulated in fp32 (fp64 for fp64).

    Raises:
        IndexError: an id out of range (CPU; an asynchronous assertion on a GPU).
        RuntimeError: ids of another dtype; the Triton backend asked for where it cannot run.
        ValueError: an unknown backend.

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
    if backend == "reference":
        return lookup_reference(ids, storage, chain, row_start, page_level, sizes, page)
    composed = compose(chain, sizes)
    flat = ids.reshape(-1)
    out: Tensor = _Lookup.apply(
        flat, storage, chain, composed, row_start, page_level, sizes, page, backend
    )
    return out.view(*ids.shape, sizes[-1])
