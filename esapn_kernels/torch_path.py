"""The CPU path: the operators grouped by level and composed, a handful of large torch calls.

Every level that occurs is one gather, one ``addmm`` and one ``index_copy_`` to where its ids stand.
Works on any device; on a GPU the group sizes cost one synchronisation, which is why ``auto`` takes
the Triton kernels there.
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


def _by_level(level: Tensor, n_levels: int) -> Iterator[tuple[int, Tensor | None]]:
    """Every level (int8) that occurs, and where: positions in order, ``None`` for everywhere."""
    counts = torch.bincount(level, minlength=n_levels).tolist()
    if level.numel() in counts:
        yield counts.index(level.numel()), None
        return
    # Stable, and on bytes: a counting sort, cheaper than looking for every level in turn.
    order = torch.sort(level, stable=True).indices
    for k, where in enumerate(order.split(counts)):
        if counts[k]:
            yield k, where


def _select(x: Tensor, where: Tensor | None) -> Tensor:
    return x if where is None else x.index_select(0, where)


def _locate(
    ids: Tensor, row_start: Tensor, page_level: Tensor, page: int, n_levels: int
) -> tuple[Tensor, Iterator[tuple[int, Tensor | None]]]:
    """Row starts of the ids, and their positions by level."""
    start = row_start.index_select(0, ids)
    return start, _by_level(page_level.index_select(0, start // page), n_levels)


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
    start, levels = _locate(ids, row_start, page_level, page, len(sizes))
    maps = composed.split([d + 1 for d in sizes[:-1]])
    out = storage.new_empty(ids.numel(), sizes[-1])
    for k, where in levels:
        rows = gather_rows(storage, _select(start, where), sizes[k])
        if k < len(sizes) - 1:
            rows = torch.addmm(maps[k][-1], rows.to(composed.dtype), maps[k][:-1])
        if where is None:
            return rows.to(storage.dtype)
        out.index_copy_(0, where, rows.to(storage.dtype))
    return out


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
    start, levels = _locate(ids, row_start, page_level, page, len(sizes))
    maps = composed.split([d + 1 for d in sizes[:-1]])
    dtype = compute_dtype(storage.dtype)
    grad_storage = torch.zeros_like(storage, dtype=dtype)
    grad_composed = torch.zeros_like(composed)
    grad_maps = grad_composed.split([d + 1 for d in sizes[:-1]])
    for k, where in levels:
        grad = _select(grad_out, where).to(dtype)
        mine = _select(start, where)
        if k < len(sizes) - 1:
            rows = gather_rows(storage, mine, sizes[k]).to(dtype)
            torch.mm(rows.t(), grad, out=grad_maps[k][:-1])
            torch.sum(grad, 0, out=grad_maps[k][-1])
            grad = grad @ maps[k][:-1].t()
        add_rows(grad_storage, mine, grad, page)
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
    # Entries that stay count as rows of the last level, which nothing leaves.
    level = torch.where(new_start >= 0, level, len(sizes) - 1).to(torch.int8)
    dtype = compute_dtype(storage.dtype)
    hops = chain.split([(a + 1) * b for a, b in zip(sizes, sizes[1:], strict=False)])
    for k, where in _by_level(level, len(sizes)):
        if k == len(sizes) - 1:
            continue
        hop = hops[k].view(sizes[k] + 1, sizes[k + 1]).to(dtype)
        rows = gather_rows(storage, _select(old_start, where), sizes[k]).to(dtype)
        rows = torch.addmm(hop[-1], rows, hop[:-1]).to(storage.dtype)
        _write_rows(storage, _select(new_start, where), rows, page)


def fill_rows(
    targets: Sequence[tuple[Tensor, float]], start: Tensor, level: Tensor, sizes: Sequence[int]
) -> None:
    """Set the rows ``(start, level)`` with ``start >= 0`` of every tensor to its value."""
    dim = torch.tensor([*sizes, 0], device=start.device)[torch.where(start >= 0, level, -1)]
    before = dim.cumsum(0) - dim
    elements = torch.repeat_interleave(start - before, dim)
    elements += torch.arange(elements.numel(), device=start.device)
    for tensor, value in targets:
        tensor[elements] = value
