"""The CPU path: the operators grouped by level and composed, a handful of large torch calls.

Ids are sorted by level once; every level is then one gather and one ``addmm`` into a contiguous
buffer, and a single gather puts the rows back in order. Works on any device; on a GPU the group
sizes cost one synchronisation, which is why ``auto`` takes the Triton kernels there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .compose import compute_dtype

__all__ = ["add_rows", "fill_rows", "gather_rows", "lookup_bwd", "lookup_fwd", "promote_rows"]


def gather_rows(storage: Tensor, start: Tensor, dim: int) -> Tensor:
    """``storage[start_i : start_i + dim]`` as ``[len(start), dim]``, for any alignment.

    The overlapping view (row ``s`` begins at element ``s``) is never materialised.
    """
    table = storage.as_strided((storage.numel() - dim + 1, dim), (1, 1))
    return table.index_select(0, start)


def _elements(start: Tensor, dim: int) -> Tensor:
    return (start.long()[:, None] + torch.arange(dim, device=start.device)).view(-1)


def add_rows(storage: Tensor, start: Tensor, rows: Tensor, page: int) -> None:
    """``storage[start_i : start_i + dim] += rows_i``, duplicates summed in order."""
    dim = rows.shape[1]
    if page % dim == 0:
        storage.view(-1, dim).index_add_(0, start // dim, rows)
    else:
        storage.index_add_(0, _elements(start, dim), rows.reshape(-1))


def _write_rows(storage: Tensor, start: Tensor, rows: Tensor, page: int) -> None:
    dim = rows.shape[1]
    if page % dim == 0:
        storage.view(-1, dim)[start // dim] = rows
    else:
        storage[_elements(start, dim)] = rows.reshape(-1)


def _by_level(level: Tensor, n_levels: int) -> tuple[Tensor | None, list[int]]:
    """Stable order that groups by level (``None`` if it is the identity) and the group sizes."""
    counts = torch.bincount(level, minlength=n_levels).tolist()
    if max(counts, default=0) == level.numel():
        return None, counts
    return torch.sort(level, stable=True).indices, counts


def _groups(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    begin = 0
    for k, count in enumerate(counts):
        if count:
            yield k, slice(begin, begin + count)
        begin += count


def _locate(
    ids: Tensor, row_start: Tensor, page_level: Tensor, page: int, n_levels: int
) -> tuple[Tensor, Tensor | None, list[int]]:
    """Row starts grouped by level, the grouping order and the group sizes."""
    start = row_start.index_select(0, ids)
    level = page_level.index_select(0, start // page)
    order, counts = _by_level(level, n_levels)
    return (start if order is None else start.index_select(0, order)), order, counts


def lookup_fwd(
    ids: Tensor,
    storage: Tensor,
    composed: Tensor,
    row_start: Tensor,
    page_level: Tensor,
    sizes: Sequence[int],
    page: int,
) -> Tensor:
    """``[len(ids), d_n]``: see :func:`esapn_kernels.lookup.lookup`; ids are in range."""
    start, order, counts = _locate(ids, row_start, page_level, page, len(sizes))
    maps = composed.split([d + 1 for d in sizes[:-1]])
    out = storage.new_empty(ids.numel(), sizes[-1])
    for k, group in _groups(counts):
        rows = gather_rows(storage, start[group], sizes[k])
        if k == len(sizes) - 1:
            out[group] = rows
        elif rows.dtype == composed.dtype:
            torch.addmm(maps[k][-1], rows, maps[k][:-1], out=out[group])
        else:
            out[group] = torch.addmm(maps[k][-1], rows.to(composed.dtype), maps[k][:-1])
    if order is None:
        return out
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return out.index_select(0, inverse)


def lookup_bwd(
    grad_out: Tensor,
    ids: Tensor,
    storage: Tensor,
    composed: Tensor,
    row_start: Tensor,
    page_level: Tensor,
    sizes: Sequence[int],
    page: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of the storage (dense, same shape) and of ``composed``."""
    start, order, counts = _locate(ids, row_start, page_level, page, len(sizes))
    maps = composed.split([d + 1 for d in sizes[:-1]])
    dtype = compute_dtype(storage.dtype)
    grad_storage = torch.zeros_like(storage, dtype=dtype)
    grad_composed = torch.zeros_like(composed)
    grad_maps = grad_composed.split([d + 1 for d in sizes[:-1]])
    grad_out = (grad_out if order is None else grad_out.index_select(0, order)).to(dtype)
    for k, group in _groups(counts):
        grad = grad_out[group]
        if k < len(sizes) - 1:
            rows = gather_rows(storage, start[group], sizes[k]).to(dtype)
            torch.mm(rows.t(), grad, out=grad_maps[k][:-1])
            torch.sum(grad, 0, out=grad_maps[k][-1])
            grad = grad @ maps[k][:-1].t()
        add_rows(grad_storage, start[group], grad, page)
    return grad_storage.to(storage.dtype), grad_composed


def promote_rows(
    storage: Tensor,
    chain: Tensor,
    old_start: Tensor,
    new_start: Tensor,
    level: Tensor,
    sizes: Sequence[int],
    page: int,
) -> None:
    """``storage[new] = W_k storage[old] + b_k`` for every entry with ``new_start >= 0``."""
    moved = (new_start >= 0).nonzero()[:, 0]
    if not moved.numel():
        return
    old_start, new_start, level = old_start[moved], new_start[moved], level[moved]
    dtype = compute_dtype(storage.dtype)
    offset = 0
    for k in range(len(sizes) - 1):
        numel = (sizes[k] + 1) * sizes[k + 1]
        hop = chain[offset : offset + numel].view(sizes[k] + 1, sizes[k + 1]).to(dtype)
        offset += numel
        mine = (level == k).nonzero()[:, 0]
        if mine.numel():
            rows = gather_rows(storage, old_start[mine], sizes[k]).to(dtype)
            rows = torch.addmm(hop[-1], rows, hop[:-1]).to(storage.dtype)
            _write_rows(storage, new_start[mine], rows, page)


def fill_rows(
    storage: Tensor, start: Tensor, level: Tensor, value: float, sizes: Sequence[int], page: int
) -> None:
    """Set every element of the rows ``(start, level)`` with ``start >= 0`` to ``value``."""
    for k, dim in enumerate(sizes):
        mine = start[(level == k) & (start >= 0)]
        if mine.numel():
            _write_rows(storage, mine, storage.new_full((1, 1), value).expand(len(mine), dim), page)
