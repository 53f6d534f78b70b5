"""The CPU path: the operators grouped by level and composed, a handful of large torch calls.

Every level that occurs is one gather, one ``addmm`` and one ``index_copy_`` to where its ids stand.
A few hundred rows below the last level are one product of a sparse operand instead, as in the
Triton kernels, because there the number of calls is what costs. Works on any device; on a GPU the
group sizes cost one synchronisation, which is why ``auto`` takes the Triton kernels there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .compose import compute_dtype, operand_offsets

__all__ = ["add_rows", "fill_rows", "gather_rows", "lookup_bwd", "lookup_fwd", "promote_rows"]

_OPERAND_ROWS = 512
"""Up to so many rows below the last level go through the operand."""


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
    if level.numel() and level.numel() in counts:
        yield counts.index(level.numel()), None
        return
    # Stable, and on bytes: a counting sort, cheaper than looking for every level in turn.
    order = torch.sort(level, stable=True).indices
    for k, where in enumerate(order.split(counts)):
        if counts[k]:
            yield k, where


def _select(x: Tensor, where: Tensor | None) -> Tensor:
    return x if where is None else x.index_select(0, where)


@functools.lru_cache
def _columns(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Per level ``[n - 1, K]``: a column's place in the row, whether it has one, the 1 behind."""
    base = torch.tensor(operand_offsets(sizes), device=device)
    place = torch.arange(int(base[-1]), device=device) - base[:-1, None]
    dim = torch.tensor(sizes[:-1], device=device)[:, None]
    entry = (place >= 0) & (place < dim)
    return torch.where(entry, place, 0), entry, place == dim


def _operand(
    storage: Tensor, start: Tensor, level: Tensor, sizes: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Operand X of rows below the last level, see ``compose``.

    Returns X ``[R, K]``, which of its entries are rows' numbers, and their elements in storage.
    """
    columns = _columns(tuple(sizes), storage.device)
    level = level.int()
    place, entry, one = (table.index_select(0, level) for table in columns)
    element = place.add_(start.long()[:, None])
    x = torch.where(entry, storage.take(element), one.to(storage.dtype))
    return x.to(compute_dtype(storage.dtype)), entry, element


def _few(level: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor] | None:
    """Positions of the rows below the last level and of the others, if the first are few."""
    last = level == len(sizes) - 1
    few = len(last) - int(last.sum())
    if not 0 < few <= _OPERAND_ROWS:
        return None
    below, at = torch.sort(last, stable=True).indices.split([few, len(last) - few])
    return below, at


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
    start = row_start.index_select(0, ids)
    level = page_level.index_select(0, start // page)
    out = storage.new_empty(ids.numel(), sizes[-1])
    few = _few(level, sizes)
    if few is not None:
        below, at = few
        x, _, _ = _operand(storage, _select(start, below), _select(level, below), sizes)
        out.index_copy_(0, below, (x @ composed).to(storage.dtype))
        if len(at):
            out.index_copy_(0, at, gather_rows(storage, _select(start, at), sizes[-1]))
        return out
    maps = composed.split([d + 1 for d in sizes[:-1]])
    for k, where in _by_level(level, len(sizes)):
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
    start = row_start.index_select(0, ids)
    level = page_level.index_select(0, start // page)
    dtype = compute_dtype(storage.dtype)
    grad_storage = torch.zeros_like(storage, dtype=dtype)
    few = _few(level, sizes)
    if few is not None:
        below, at = few
        x, entry, element = _operand(storage, _select(start, below), _select(level, below), sizes)
        grad = _select(grad_out, below).to(dtype)
        grad_x = grad @ composed.t()
        grad_storage.index_add_(0, element[entry], grad_x[entry])
        if len(at):
            add_rows(grad_storage, _select(start, at), _select(grad_out, at).to(dtype), page)
        return grad_storage.to(storage.dtype), x.t() @ grad
    maps = composed.split([d + 1 for d in sizes[:-1]])
    grad_composed = torch.zeros_like(composed)
    grad_maps = grad_composed.split([d + 1 for d in sizes[:-1]])
    for k, where in _by_level(level, len(sizes)):
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
