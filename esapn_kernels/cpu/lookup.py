"""The CPU path: the operators grouped by level and composed, a handful of large torch calls.

Forward, a tile of ids at a time: per level a gather and an ``addmm``, then one gather back to the
order of the ids. Backward: occurrences sorted by level and id, so that one ``embedding_bag`` per
level sums them per distinct row and the products are taken once per row.

What lies between the calls is scratch that later calls reuse (``cpu/scratch.py``). Works on any
device; on a GPU the group sizes cost a synchronisation, so ``auto`` takes the Triton kernels there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.backend import own_precision
from ..ops.chain import operand_offsets
from ..ops.layout import Layout, row_table
from ..ops.update import Update
from .scratch import TILE, Scratch, borrow_scratch, with_huge_pages
from .update import update_rows

__all__ = [
    "group_levels",
    "lookup_bwd",
    "lookup_bwd_sparse",
    "lookup_bwd_update",
    "lookup_fwd",
    "spans",
]

_FEW = 1 << 10
"""Up to so many ids, NumPy takes less time than torch."""

_NUMPY = (torch.float32, torch.float64)


def group_levels(level: Tensor, n_levels: int) -> tuple[Tensor | None, list[int]]:
    """Positions by level (int8), in order within one, and their number in each.

    ``None`` for the positions if there is one level only.
    """
    counts = torch.bincount(level, minlength=n_levels).tolist()
    if max(counts) == level.numel():
        return None, counts
    # Stable, and on bytes: a counting sort, cheaper than looking for every level in turn.
    return torch.sort(level, stable=True).indices, counts


def spans(counts: Sequence[int], limit: int) -> Iterator[tuple[int, slice]]:
    """Level and place of every group, in parts of at most ``limit``."""
    end, limit = 0, max(limit, 1)
    for k, count in enumerate(counts):
        begin, end = end, end + count
        for first in range(begin, end, limit):
            yield k, slice(first, min(first + limit, end))


def _block(k: int, sizes: Sequence[int]) -> tuple[slice, int]:
    """Rows of ``composed`` that hold ``M_k^T``, and the row ``c_k`` behind them."""
    first = operand_offsets(sizes)[k]
    return slice(first, first + sizes[k]), first + sizes[k]


def _select(scratch: Scratch, table: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """``table[index]`` in ``dtype``, in scratch."""
    shape = index.numel(), table.shape[1]
    rows = scratch("rows", *shape, table.dtype, table.device)
    torch.index_select(table, 0, index, out=rows)
    return rows if rows.dtype == dtype else scratch("rows", *shape, dtype, rows.device).copy_(rows)


def lookup_fwd(
    ids: Tensor,
    storage: Tensor,
    composed: Tensor,
    layout: Layout,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``[len(ids), D]``: see :func:`esapn_kernels.ops.lookup.lookup`; ids are in range.

    ``out``: contiguous memory of that shape, in the dtype of ``storage``, for the result.
    """
    if out_dtype not in (None, storage.dtype):
        wide = lookup_fwd(ids, storage, composed, layout)
        return wide.to(out_dtype) if out is None else out.copy_(wide)
    few = 0 < ids.numel() <= _FEW and storage.device.type == "cpu" and storage.dtype in _NUMPY
    few = few and composed.dtype == storage.dtype  # hops may be of another dtype than the rows
    if out is None:
        out = storage.new_empty(ids.numel(), layout.dim)
        if not few:
            with_huge_pages(out)
    if few:
        with np.errstate(all="ignore"):  # torch does not warn of an overflow either
            _lookup_few(ids, storage.detach(), composed, layout, out)
        return out
    with own_precision(storage), borrow_scratch() as scratch:
        for _, span in spans([ids.numel()], TILE // layout.dim):
            start = layout.row_start.index_select(0, ids[span])
            level = layout.page_level.index_select(0, start // layout.page)
            tile = start, level, storage.detach(), composed, layout.sizes
            _lookup_tile(*tile, out[span], scratch)
    return out


def _lookup_few(
    ids: Tensor,
    storage: Tensor,
    composed: Tensor,
    layout: Layout,
    out: Tensor,
) -> None:
    """:func:`lookup_fwd` of few ids, where calls cost more than work: NumPy's are the shortest."""
    sizes = layout.sizes
    start = layout.row_start.index_select(0, ids).numpy()
    if np.minimum.reduce(start) < 0:
        raise IndexError("index out of range in self")
    level = layout.page_level.numpy().take(start // layout.page)
    order = level.argsort(kind="stable")
    counts = np.bincount(level, minlength=len(sizes)).tolist()
    # All rows with their 1, one behind the other by level, in one gather. What lies behind the
    # storage's last row is never used.
    widths, steps = _widths(sizes)
    width = widths.take(level[order])
    end = width.cumsum()
    elements = (start[order] - end + width).repeat(width)
    elements += steps[: elements.size]
    entries = storage.numpy().take(elements, mode="clip")
    entries[end - 1] = 1
    maps, grouped = composed.numpy(), np.empty(out.shape, entries.dtype)
    row = entry = base = 0
    for count, dim in zip(counts, sizes, strict=True):
        if count:
            x = entries[entry : entry + count * (dim + 1)].reshape(count, dim + 1)
            if dim < sizes[-1]:
                np.dot(x, maps[base : base + dim + 1], out=grouped[row : row + count])
            else:
                grouped[row:] = x[:, :-1]
            row += count
            entry += count * (dim + 1)
        base += dim + 1
    out.numpy()[order] = grouped


@functools.cache
def _widths(sizes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Columns of the operand that a row of every level takes, its 1 included; and 0, 1, 2, ..."""
    return np.array(sizes) + 1, np.arange(_FEW * (sizes[-1] + 1))


def _lookup_tile(
    start: Tensor,
    level: Tensor,
    storage: Tensor,
    composed: Tensor,
    sizes: Sequence[int],
    out: Tensor,
    scratch: Scratch,
) -> None:
    order, counts = group_levels(level, len(sizes))
    grouped = out
    if order is not None:
        start = start.index_select(0, order)
        grouped = scratch("grouped", out.shape[0], out.shape[1], out.dtype, out.device)
    for k, span in spans(counts, out.shape[0]):
        table, y = row_table(storage, sizes[k]), grouped[span]
        if k == len(sizes) - 1:
            torch.index_select(table, 0, start[span], out=y)
            continue
        x = _select(scratch, table, start[span], composed.dtype)
        matrix, bias = _block(k, sizes)
        if y.dtype == composed.dtype:
            torch.addmm(composed[bias], x, composed[matrix], out=y)
        else:
            product = scratch("product", y.shape[0], y.shape[1], composed.dtype, y.device)
            y.copy_(torch.addmm(composed[bias], x, composed[matrix], out=product))
    if order is not None:
        # Reading at random and writing in order is faster than the reverse.
        place = torch.empty_like(order, dtype=torch.int32)
        place.scatter_(0, order, torch.arange(place.numel(), dtype=torch.int32, device=out.device))
        torch.index_select(grouped, 0, place, out=out)


def _row_grads(
    grad_out: Tensor,
    ids: Tensor,
    storage: Tensor,
    composed: Tensor,
    layout: Layout,
    grad_composed: Tensor | None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Gradients of the distinct rows, summed over their occurrences, in blocks of one size.

    Yields where in ``ids`` each row first stands and where it begins (int64 ``[U]``), and its
    gradient ``[U, d_k]``, in scratch. What is due to ``grad_composed`` of a block is added before.
    """
    dtype, sizes = composed.dtype, layout.sizes
    grad_out = grad_out.detach().to(dtype).contiguous()
    # By level, then by id, then as they came: sums do not depend on where rows lie. An id is less
    # than the number of elements, so it fits into what a start fits into.
    key, order = torch.sort(ids.to(layout.row_start.dtype), stable=True)
    page = layout.row_start.index_select(0, key) // layout.page
    by_level, _ = group_levels(layout.page_level.index_select(0, page), len(sizes))
    if by_level is not None:
        key, order = key.index_select(0, by_level), order.index_select(0, by_level)
    is_first = torch.ones_like(key, dtype=torch.bool)
    torch.ne(key[1:], key[:-1], out=is_first[1:])
    first = is_first.nonzero()[:, 0]
    start = layout.row_start.index_select(0, key.index_select(0, first)).long()
    level = layout.page_level.index_select(0, start // layout.page)
    counts = torch.bincount(level, minlength=len(sizes)).tolist()
    with borrow_scratch() as scratch:
        for k, span in spans(counts, TILE // layout.dim):
            bags = first[span]
            last = int(first[span.stop]) if span.stop < first.numel() else order.numel()
            begin = int(bags[0])
            grad = F.embedding_bag(order[begin:last], grad_out, bags - begin, mode="sum")
            if k < len(sizes) - 1:
                matrix, bias = _block(k, sizes)
                if grad_composed is not None:
                    x = _select(scratch, row_table(storage, sizes[k]), start[span], dtype)
                    grad_composed[matrix].addmm_(x.t(), grad)
                    grad_composed[bias].add_(grad.sum(0))
                x = scratch("rows", grad.shape[0], sizes[k], dtype, grad.device)
                grad = torch.mm(grad, composed[matrix].t(), out=x)
            yield order.index_select(0, bags), start[span], grad


def lookup_bwd(
    grad_out: Tensor,
    ids: Tensor,
    storage: Tensor,
    composed: Tensor,
    layout: Layout,
    want_composed: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the storage (dense, same shape) and, if wanted, of ``composed``."""
    storage = storage.detach()
    grad_storage = with_huge_pages(torch.empty_like(storage)).zero_()
    grad_composed = torch.zeros_like(composed) if want_composed else None
    for _, start, grad in _row_grads(grad_out, ids, storage, composed, layout, grad_composed):
        table = row_table(grad_storage, grad.shape[1])
        table.index_copy_(0, start, grad.to(storage.dtype))
    return grad_storage, grad_composed


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

    The row of ``padding_idx`` has no entries. Not coalesced: levels come one after the other.
    """
    storage = storage.detach()
    grad_composed = torch.zeros_like(composed) if want_composed else None
    elements = [ids.new_empty(0, dtype=torch.int64)]
    values = [storage.new_empty(0)]
    for at, start, grad in _row_grads(grad_out, ids, storage, composed, layout, grad_composed):
        if padding_idx is not None:
            kept = ids.index_select(0, at) != padding_idx
            start, grad = start[kept], grad[kept]
        elements.append(_elements(start, grad.shape[1]))
        values.append(grad.to(storage.dtype, copy=True).reshape(-1))
    grad_storage = torch.sparse_coo_tensor(
        torch.cat(elements)[None],
        torch.cat(values),
        storage.shape,
        check_invariants=False,
        is_coalesced=False,
    )
    return grad_storage, grad_composed


def _elements(start: Tensor, dim: int) -> Tensor:
    """Elements of the rows of one size that begin at ``start``, int64 ``[len(start) * dim]``."""
    return (start[:, None] + torch.arange(dim, device=start.device)).reshape(-1)


def lookup_bwd_update(
    grad_out: Tensor,
    ids: Tensor,
    storage: Tensor,
    composed: Tensor,
    layout: Layout,
    update: Update,
    want_composed: bool = True,
) -> Tensor | None:
    """Step every row looked up once, by its summed gradient; there is no dense gradient.

    Returns the gradient of ``composed`` from the rows as they were (``None`` if not wanted).
    """
    storage = storage.detach()
    grad_composed = torch.zeros_like(composed) if want_composed else None
    update.tick()
    for at, start, grad in _row_grads(grad_out, ids, storage, composed, layout, grad_composed):
        update_rows(update, storage, start, ids.index_select(0, at).long(), grad)
    return grad_composed
