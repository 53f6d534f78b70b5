"""The operators for CPUs in C++: calls of ``csrc/`` with the signatures of the torch path.

Every function mirrors a Triton kernel of ``gpu/``; the C++ says which. Tensors go there as
addresses: here they are made contiguous, and results are allocated.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.backend import native
from ..ops.chain import chain_numel, compute_dtype, full_chain, gather_tails, tails_numel
from ..ops.checks import check_ids
from ..ops.layout import Layout
from ..ops.update import CollectedRows, Update

__all__ = [
    "DTYPE",
    "address",
    "compose",
    "compose_bwd",
    "lookup_bwd",
    "lookup_bwd_rows",
    "lookup_bwd_sparse",
    "lookup_bwd_update",
    "lookup_fwd",
    "packed",
    "step_rows",
    "sum_rows",
    "takes_state",
]

DTYPE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
"""Numbers of the dtypes of rows, as ``csrc/table.h`` has them."""

_RULE = {
    "gradient": 0,
    "sparse": 1,
    "collect": 2,
    "sgd": 3,
    "adagrad": 4,
    "rowwise_adagrad": 5,
    "adam": 6,
    "rowwise_adam": 7,
}

_ID_BYTES = {torch.int32: 4, torch.int64: 8}

_PARALLEL = 1 << 17
"""Numbers of output from which threads are worth their start, and Python's lock is released."""


@functools.cache
def packed(sizes: tuple[int, ...]) -> bytes:
    """Sizes as the kernels take them."""
    return struct.pack(f"{len(sizes)}q", *sizes)


@functools.cache
def _lengths(sizes: tuple[int, ...]) -> tuple[int, int]:
    """Of packed hops, and of tails."""
    return chain_numel(sizes), tails_numel(sizes)


def _packed_hops(chain: Tensor, sizes: tuple[int, ...]) -> tuple[bytes, bool]:
    """The sizes, as the kernels of the chain take them, and whether it holds tails."""
    numel = chain.numel()
    full, tails = _lengths(sizes)
    if numel not in (full, tails):
        expected = f"{full} numbers for sizes {sizes}, or {tails} of tails"
        raise RuntimeError(f"the packed hops must be {expected}, got {numel}")
    return packed(sizes), numel != full


def _table(layout: Layout, ids: Tensor, elements: int) -> tuple[int | bytes, ...]:
    """Where the rows lie, and the ids, as every kernel takes them."""
    row_start, page_level = layout.row_start, layout.page_level
    start_bytes, id_bytes = _ID_BYTES.get(row_start.dtype, 0), _ID_BYTES.get(ids.dtype, 0)
    if not (
        start_bytes
        and page_level.dtype is torch.int8
        and row_start.is_contiguous()
        and page_level.is_contiguous()
    ):
        raise RuntimeError("row starts must be int32 or int64 and page levels int8, contiguous")
    if not id_bytes:
        check_ids(ids, row_start.numel(), read=False)
    return (
        row_start.data_ptr(),
        start_bytes,
        row_start.numel(),
        page_level.data_ptr(),
        layout.page,
        min(elements, layout.elements),
        packed(layout.sizes),
        ids.data_ptr(),
        id_bytes,
        ids.numel(),
    )


def _threads(ids: Tensor, layout: Layout) -> int:
    return torch.get_num_threads() if ids.numel() * layout.dim >= _PARALLEL else 1


def address(tensor: Tensor | None) -> int:
    """Where a tensor's numbers lie; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def lookup_fwd(
    ids: Tensor,
    storage: Tensor,
    composed: Tensor,
    layout: Layout,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``[len(ids), D]``: see :func:`esapn_kernels.ops.lookup.lookup`.

    ``out``: contiguous memory of that shape, in ``out_dtype``, for the result.

    Raises:
        IndexError: an id out of range, or without a row; ``out`` is as it was in the first case.
    """
    ids, composed = ids.contiguous(), _in_dtype_of_sums(composed, storage)
    dtype, count, dim = storage.dtype, ids.numel(), layout.sizes[-1]
    if out_dtype is not None and out_dtype not in DTYPE and out is None:
        return lookup_fwd(ids, storage, composed, layout).to(out_dtype)
    is_long = count * dim >= _PARALLEL
    if is_long:
        storage = storage.detach()  # holds the memory, should another thread let the arena grow
    if out is None:
        shape = (count, dim)
        same = out_dtype is None or out_dtype is dtype
        out = storage.new_empty(shape) if same else storage.new_empty(shape, dtype=out_dtype)
    native.lookup_fwd(
        *_table(layout, ids, storage.numel()),
        storage.data_ptr(),
        DTYPE[dtype],
        composed.data_ptr(),
        out.data_ptr(),
        DTYPE[out.dtype],
        torch.get_num_threads() if is_long else 1,
    )
    return out


def _in_dtype_of_sums(composed: Tensor, storage: Tensor) -> Tensor:
    """Hops may be of another dtype than the rows."""
    if composed.dtype is storage.dtype is torch.float32:
        return composed
    return composed.to(compute_dtype(storage.dtype))


def _in_memory(grad_out: Tensor) -> Tensor:
    """The numbers themselves, where torch has yet to turn their sign, or to write zeros."""
    grad_out = grad_out.contiguous()
    if grad_out.is_neg():
        grad_out = grad_out.resolve_neg()
    return grad_out if grad_out.data_ptr() else torch.zeros_like(grad_out)


class _Collecting:
    """Memory for the gradients of the rows of ``ids``, each once."""

    def __init__(self, ids: Tensor, layout: Layout, rows: Tensor) -> None:
        count, elements = ids.numel(), ids.numel() * layout.dim
        if elements >= _PARALLEL:
            # Counted: the system gives large memory anew at every call, by small pages.
            elements = native.count_elements(*_table(layout, ids, layout.elements), -1)
        dtype, device = compute_dtype(rows.dtype), rows.device
        self.ids, self.place = torch.empty((2, count), dtype=torch.int64, device=device).unbind()
        self.level = torch.empty(count, dtype=torch.int8, device=device)
        self.used = torch.zeros(2, dtype=torch.int64, device=device)
        self.values = torch.empty(elements, dtype=dtype, device=device)

    def rows(self) -> CollectedRows:
        """What the kernel found."""
        rows, elements = self.used.tolist()
        of_rows = self.ids[:rows], self.level[:rows], self.place[:rows]
        return CollectedRows(*of_rows, self.values[:elements], False)


def _update(
    rule: str,
    update: Update | None = None,
    target: Tensor | None = None,
    elements: Tensor | None = None,
    rows: _Collecting | None = None,
) -> tuple[list[Tensor], list[int]]:
    """What becomes of the rows' gradients, as kernels take it, and what holds the memory."""
    moment = square = row_sums = last_step = clock = numbers = None
    if update is not None:
        numbers, clock = update.numbers, update.clock
        row_sums, last_step = update.row_sums, update.last_step
        if update.state:
            moment, square = update.state[0].detach(), update.state[-1].detach()
    tensors = [target, elements, numbers, moment, square, row_sums, last_step, clock]
    if rows is None:
        tensors += [None] * 4
    else:
        tensors[0] = rows.values
        tensors += [rows.ids, rows.level, rows.place, rows.used]
    held = [tensor for tensor in tensors if tensor is not None]
    shaped = update is not None and update.shaped
    return held, [_RULE[rule], shaped, *map(address, tensors)]


def _backward(
    grad_out: Tensor,
    ids: Tensor,
    storage: Tensor,
    composed: Tensor,
    layout: Layout,
    want_composed: bool,
    padding_idx: int | None,
    rule: str,
    target: Tensor | None = None,
    elements: Tensor | None = None,
    update: Update | None = None,
    rows: _Collecting | None = None,
) -> Tensor | None:
    """What becomes of the rows is in ``rule``; returns the gradient of ``composed``."""
    ids, grad_out = ids.contiguous(), _in_memory(grad_out)
    if grad_out.dtype not in DTYPE:
        grad_out = grad_out.to(composed.dtype)
    operand = _in_dtype_of_sums(composed, storage)
    grad_composed = torch.empty_like(operand) if want_composed else None
    threads = _threads(ids, layout)
    # Aliases hold the memory, should another thread let the arena grow.
    storage = storage.detach()
    held, addresses = _update(rule, update, target, elements, rows)
    native.lookup_bwd(
        *_table(layout, ids, storage.numel()),
        storage.data_ptr(),
        DTYPE[storage.dtype],
        operand.data_ptr(),
        grad_out.data_ptr(),
        DTYPE[grad_out.dtype],
        address(grad_composed),
        -1 if padding_idx is None else padding_idx,
        threads,
        *addresses,
    )
    del held
    if grad_composed is None or grad_composed.dtype == composed.dtype:
        return grad_composed
    return grad_composed.to(composed.dtype)


def lookup_bwd(
    grad_out: Tensor,
    ids: Tensor,
    storage: Tensor,
    composed: Tensor,
    layout: Layout,
    want_composed: bool = True,
    padding_idx: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the storage (dense, same shape) and, if wanted, of ``composed``.

    ``padding_idx``: this id has no gradient, neither for its row nor for ``composed``.
    """
    grad_storage = torch.zeros_like(storage, requires_grad=False)
    operands = (grad_out, ids, storage, composed, layout, want_composed, padding_idx)
    return grad_storage, _backward(*operands, "gradient", grad_storage)


def lookup_bwd_sparse(
    grad_out: Tensor,
    ids: Tensor,
    storage: Tensor,
    composed: Tensor,
    layout: Layout,
    padding_idx: int | None = None,
    want_composed: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """:func:`lookup_bwd` whose gradient of the storage is COO, the elements of the rows looked up.

    The row of ``padding_idx`` has no entries. Rows in the order in which ids name them first.
    """
    ids = ids.contiguous()
    padding = -1 if padding_idx is None else padding_idx
    count = native.count_elements(*_table(layout, ids, storage.numel()), padding)
    elements = torch.empty(count, dtype=torch.int64, device=storage.device)
    values = storage.new_empty(count)
    operands = (grad_out, ids, storage, composed, layout, want_composed, padding_idx)
    grad_composed = _backward(*operands, "sparse", values, elements)
    grad_storage = torch.sparse_coo_tensor(
        elements[None], values, storage.shape, check_invariants=False, is_coalesced=False
    )
    return grad_storage, grad_composed


def lookup_bwd_rows(
    grad_out: Tensor,
    ids: Tensor,
    storage: Tensor,
    composed: Tensor,
    layout: Layout,
    want_composed: bool = True,
    padding_idx: int | None = None,
) -> tuple[CollectedRows, Tensor | None]:
    """:func:`lookup_bwd` whose gradient of the storage is that of the rows looked up, each once.

    Rows in the order in which ids name them first; that of ``padding_idx`` with zeros.
    """
    ids = ids.contiguous()
    rows = _Collecting(ids, layout, storage)
    operands = (grad_out, ids, storage, composed, layout, want_composed, padding_idx)
    grad_composed = _backward(*operands, "collect", rows=rows)
    return rows.rows(), grad_composed


def sum_rows(rows: CollectedRows, layout: Layout) -> CollectedRows:
    """The gradients of equal ids added up, in their order; places without gaps.

    Args:
        rows: of the sizes that rows have in ``layout``; no id is -1.
        layout: where the rows lie.
    """
    into = _Collecting(rows.ids, layout, rows.values)
    _step(rows, layout, layout.elements, rows.values, "collect", into=into)
    return into.rows()


def step_rows(rows: CollectedRows, storage: Tensor, layout: Layout, update: Update) -> None:
    """Step every row of ``rows`` once, by its summed gradient, and move ``update``'s clock on.

    Args:
        rows: of the sizes that rows have in ``layout``; no id is -1.
        storage: the rows, stepped in place.
        layout: where they lie.
        update: the rule and its state.
    """
    _step(rows, layout, storage.numel(), storage.detach(), update.rule, update)
    # Kernels write through addresses; autograd must know that saved rows are stale.
    torch.autograd.graph.increment_version(storage)


def _step(
    rows: CollectedRows,
    layout: Layout,
    elements: int,
    storage: Tensor,
    rule: str,
    update: Update | None = None,
    into: _Collecting | None = None,
) -> None:
    held, addresses = _update(rule, update, rows=into)
    native.step_rows(
        *_table(layout, rows.ids, elements),
        rows.level.data_ptr(),
        rows.place.data_ptr(),
        rows.values.data_ptr(),
        storage.data_ptr(),
        DTYPE[storage.dtype],
        _threads(rows.ids, layout),
        *addresses,
    )
    del held


def takes_state(update: Update, storage: Tensor) -> bool:
    """Whether the state is what :func:`lookup_bwd_update` reads: rows may have changed their dtype.

    Where it is not, the torch path steps the rows.
    """
    sums = compute_dtype(storage.dtype)
    last_step = update.last_step
    held = update.state if update.row_sums is None else (*update.state, update.row_sums)
    return all(each.dtype is sums and each.is_contiguous() for each in held) and (
        last_step is None or (last_step.dtype is torch.int32 and last_step.is_contiguous())
    )


def lookup_bwd_update(
    grad_out: Tensor,
    ids: Tensor,
    storage: Tensor,
    composed: Tensor,
    layout: Layout,
    update: Update,
    want_composed: bool = True,
    padding_idx: int | None = None,
) -> Tensor | None:
    """Step every row looked up once, by its summed gradient; there is no dense gradient.

    Moves ``update``'s clock on. Returns the gradient of ``composed`` from the rows as they were
    (``None`` if not wanted).
    """
    operands = (grad_out, ids, storage, composed, layout, want_composed, padding_idx)
    grad_composed = _backward(*operands, update.rule, update=update)
    # Kernels write through addresses; autograd must know that saved rows are stale.
    torch.autograd.graph.increment_version(storage)
    return grad_composed


def compose(chain: Tensor, sizes: Sequence[int]) -> Tensor:
    """``[K, D]``: see :func:`esapn_kernels.ops.compose.compose`."""
    chain = chain.detach().resolve_neg().contiguous()
    sizes_of_hops = _packed_hops(chain, tuple(sizes))
    shape = sum(sizes[:-1]) + len(sizes) - 1, sizes[-1]
    composed = chain.new_empty(shape, dtype=compute_dtype(chain.dtype))
    operands = (DTYPE[chain.dtype], chain.data_ptr(), composed.data_ptr())
    native.compose(*sizes_of_hops, *operands)
    return composed


def compose_bwd(
    grad_composed: Tensor, chain: Tensor, composed: Tensor, sizes: Sequence[int]
) -> Tensor:
    """Shape and dtype of ``chain``: see :func:`esapn_kernels.ops.compose.compose_bwd`."""
    hops = chain.detach().resolve_neg()
    if composed.dtype is not compute_dtype(hops.dtype):
        hops = full_chain(hops, sizes).to(composed.dtype)
    hops = hops.contiguous()
    grad_composed, grad_chain = grad_composed.contiguous(), torch.empty_like(hops)
    tensors = (grad_composed, hops, composed, grad_chain)
    addresses = [tensor.data_ptr() for tensor in tensors]
    native.compose_bwd(*_packed_hops(hops, tuple(sizes)), DTYPE[hops.dtype], *addresses)
    if grad_chain.numel() != chain.numel():
        grad_chain = gather_tails(grad_chain, sizes)
    return grad_chain.to(chain.dtype)
