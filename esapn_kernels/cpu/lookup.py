"""The lookup in torch calls: the rows of one size after the other, on any device.

The fallback where no kernel runs: short rather than fast. On a GPU it waits for the device, which
finds the rows of every size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.backend import own_precision
from ..ops.layout import Layout, gather_rows, row_table
from ..ops.update import CollectedRows, Update
from .update import update_rows

__all__ = [
    "by_level",
    "lookup_bwd",
    "lookup_bwd_rows",
    "lookup_bwd_sparse",
    "lookup_bwd_update",
    "lookup_fwd",
]


def by_level(level: Tensor, n_levels: int) -> Iterator[tuple[int, Tensor]]:
    """Every level that occurs, and the positions that hold it, ascending; -1 is no level.

    >>> [(k, at.tolist()) for k, at in by_level(torch.tensor([2, 0, -1, 2]), 3)]
    [(0, [1]), (2, [0, 3])]
    """
    for k in range(n_levels):
        at = (level == k).nonzero()[:, 0]
        if at.numel():
            yield k, at


def _locate(ids: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Where the rows begin, and their levels."""
    # index_select refuses negative indices: ids below 0, and the start -1 of an id without a row.
    start = layout.row_start.index_select(0, ids)
    return start, layout.page_level.index_select(0, start // layout.page)


def _maps(composed: Tensor, layout: Layout) -> Sequence[Tensor]:
    """Views ``[M_k | c_k]^T``, one for every level below the last."""
    return composed.split([d + 1 for d in layout.sizes[:-1]])


def lookup_fwd(
    ids: Tensor,
    storage: Tensor,
    composed: Tensor,
    layout: Layout,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``[len(ids), D]`` in ``out_dtype``: see :func:`esapn_kernels.ops.lookup.lookup`.

    ``out``: contiguous memory of that shape and dtype for the result. Ids that are out of range or
    have no row raise ``IndexError`` before anything is written.
    """
    storage, maps = storage.detach(), _maps(composed, layout)
    if out is None:
        out = storage.new_empty(ids.numel(), layout.dim, dtype=out_dtype or storage.dtype)
    start, level = _locate(ids, layout)
    with own_precision(storage):
        for k, at in by_level(level, len(layout.sizes)):
            rows = gather_rows(storage, start[at], layout.sizes[k])
            if k < len(maps):
                rows = torch.addmm(maps[k][-1], rows.to(composed.dtype), maps[k][:-1])
            out.index_copy_(0, at, rows.to(out.dtype))
    return out


def _row_grads(
    grad_out: Tensor,
    ids: Tensor,
    storage: Tensor,
    composed: Tensor,
    layout: Layout,
    want_composed: bool,
) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor | None]:
    """Gradients of the distinct rows, summed over their occurrences, and of ``composed``.

    The former by level: ids ``[U]`` and starts ``[U]``, int64, and gradients ``[U, d_k]``.
    """
    grad_out = grad_out.detach().to(composed.dtype).contiguous()
    grad_composed, found = torch.zeros_like(composed), []
    maps, grad_maps = _maps(composed, layout), _maps(grad_composed, layout)
    with own_precision(storage):
        for k, at in by_level(_locate(ids, layout)[1], len(layout.sizes)):
            # By id, then as they came: sums do not depend on where rows lie.
            key, order = ids[at].long().sort(stable=True)
            distinct, counts = key.unique_consecutive(return_counts=True)
            grad = F.embedding_bag(at[order], grad_out, counts.cumsum(0) - counts, mode="sum")
            start = layout.row_start[distinct].long()
            if k < len(maps):
                if want_composed:
                    rows = gather_rows(storage, start, layout.sizes[k]).to(grad.dtype)
                    torch.mm(rows.t(), grad, out=grad_maps[k][:-1])
                    torch.sum(grad, 0, out=grad_maps[k][-1])
                grad = grad @ maps[k][:-1].t()
            found.append((distinct, start, grad))
    return found, grad_composed if want_composed else None


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
    found, grad_composed = _row_grads(grad_out, ids, storage, composed, layout, want_composed)
    grad_storage = torch.zeros_like(storage)
    for _, start, grad in found:
        row_table(grad_storage, grad.shape[1]).index_copy_(0, start, grad.to(storage.dtype))
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
    found, grad_composed = _row_grads(grad_out, ids, storage, composed, layout, want_composed)
    elements, values = [ids.new_empty(0, dtype=torch.int64)], [storage.new_empty(0)]
    for distinct, start, grad in found:
        if padding_idx is not None:
            start, grad = start[distinct != padding_idx], grad[distinct != padding_idx]
        entries = start[:, None] + torch.arange(grad.shape[1], device=start.device)
        elements.append(entries.reshape(-1))
        values.append(grad.to(storage.dtype).reshape(-1))
    indices = torch.cat(elements)[None]
    grad_storage = torch.sparse_coo_tensor(
        indices, torch.cat(values), storage.shape, check_invariants=False, is_coalesced=False
    )
    return grad_storage, grad_composed


def lookup_bwd_rows(
    grad_out: Tensor,
    ids: Tensor,
    storage: Tensor,
    composed: Tensor,
    layout: Layout,
    want_composed: bool = True,
) -> tuple[CollectedRows, Tensor | None]:
    """:func:`lookup_bwd` whose gradient of the storage is that of the rows looked up, each once."""
    storage = storage.detach()
    found, grad_composed = _row_grads(grad_out, ids, storage, composed, layout, want_composed)
    distinct = torch.cat([ids.new_empty(0, dtype=torch.int64), *(each for each, _, _ in found)])
    values = composed.new_zeros(distinct.numel(), layout.dim)
    rows = 0
    for some, _, grad in found:
        values[rows : rows + len(some), : grad.shape[1]] = grad
        rows += len(some)
    place = torch.arange(rows, device=ids.device) * layout.dim
    level = _locate(distinct, layout)[1]
    return CollectedRows(distinct, level, place, values.view(-1), True), grad_composed


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
    found, grad_composed = _row_grads(grad_out, ids, storage, composed, layout, want_composed)
    update.tick()
    for distinct, start, grad in found:
        update_rows(update, storage, start, distinct, grad)
    return grad_composed
