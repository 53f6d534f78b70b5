"""Rows that move, in C++: calls of ``csrc/resize`` with the signatures of the torch path.

Tensors go there as addresses, as in ``native``.
"""

from __future__ import annotations

import functools
import struct
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops.backend import native
from ..ops.chain import compute_dtype
from ..ops.layout import Filled, Layout, Places
from .resize import Movers, fill_rows

__all__ = ["find_movers", "free", "insert", "promote"]

_DTYPE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_CALL = {"promote": 0, "insert": 1, "free": 2}


def find_movers(ids: Tensor, mask: Tensor | None, layout: Layout, call: str) -> Movers:
    """See :func:`esapn_kernels.ops.resize.find_movers`; they are found in the order of ``ids``.

    Raises:
        IndexError: an id out of range.
    """
    ids = ids.contiguous()
    if mask is not None:
        mask = mask.bool().expand_as(ids).contiguous()
    moved = torch.empty(ids.shape, dtype=torch.bool)
    # Rows by level, then ids, then where their rows lie.
    found = torch.empty(len(layout.sizes) + 2 * ids.numel(), dtype=torch.int64)
    count = native.find_movers(
        *_table(layout),
        ids.data_ptr(),
        ids.element_size(),
        ids.numel(),
        0 if mask is None else mask.data_ptr(),
        _CALL[call],
        moved.data_ptr(),
        found.data_ptr(),
    )
    return Movers(moved, count, "native", (found,))


def promote(
    movers: Movers,
    storage: Tensor,
    chain: Tensor,
    places: Places,
    states: Filled,
    per_id: Filled,
) -> None:
    """See :func:`esapn_kernels.ops.resize.promote`.

    Raises:
        RuntimeError: there is no room for all of them; nothing is changed.
    """
    hops = chain.to(compute_dtype(storage.dtype)).contiguous()
    _move("promote", movers, places, storage, hops, states, per_id)


def insert(
    movers: Movers, level: int, storage: Tensor, places: Places, states: Filled, per_id: Filled
) -> None:
    """See :func:`esapn_kernels.ops.resize.insert`. Raises as :func:`promote`."""
    _move("insert", movers, places, storage, None, states, per_id, level)


def free(movers: Movers, storage: Tensor, places: Places) -> None:
    """See :func:`esapn_kernels.ops.resize.free`. Raises as :func:`promote`."""
    _move("free", movers, places, storage)


def _move(
    call: str,
    movers: Movers,
    places: Places,
    storage: Tensor,
    chain: Tensor | None = None,
    states: Filled = (),
    per_id: Filled = (),
    level: int = 0,
) -> None:
    layout, (found,) = places.layout, movers.found
    plain, other = _split(states)
    plain_ids, other_ids = _split(per_id)
    native.move_rows(
        *_table(layout),
        _CALL[call],
        level,
        found.data_ptr(),
        places.free_rows.data_ptr(),
        places.free_pages.data_ptr(),
        places.free_count.data_ptr(),
        places.free_base.data_ptr(),
        storage.data_ptr(),
        _DTYPE[storage.dtype],
        0 if chain is None else chain.data_ptr(),
        _fills(plain),
        _fills(plain_ids),
    )
    # Written through addresses: autograd must know that saved rows are stale.
    written = [layout.row_start, storage, *(t for t, _ in plain), *(t for t, _ in plain_ids)]
    torch.autograd.graph.increment_version([t for t in written if not t.is_inference()])
    if other or other_ids:
        n = len(layout.sizes)
        ids = found[n : n + sum(movers.count)]
        start = layout.row_start[ids]
        fill_rows(other, start, layout.page_level[start // layout.page].long(), layout.sizes)
        for tensor, fresh in other_ids:
            tensor.index_fill_(0, ids, fresh)


def _table(layout: Layout) -> tuple[int | bytes, ...]:
    """Where the rows lie, as the kernels take it; the sinks are left out."""
    row_start = layout.row_start
    return (
        row_start.data_ptr(),
        row_start.element_size(),
        row_start.numel() - 1,
        layout.page_level.data_ptr(),
        layout.page,
        _packed(layout.sizes),
    )


@functools.cache
def _packed(sizes: tuple[int, ...]) -> bytes:
    return struct.pack(f"{len(sizes)}q", *sizes)


def _split(targets: Filled) -> tuple[Filled, Filled]:
    """Those whose memory a kernel can write, and the others."""
    plain = [
        type(tensor) in (Tensor, nn.Parameter) and tensor.is_contiguous() for tensor, _ in targets
    ]
    if all(plain):
        return targets, ()
    return (
        [target for target, is_plain in zip(targets, plain, strict=True) if is_plain],
        [target for target, is_plain in zip(targets, plain, strict=True) if not is_plain],
    )


def _fills(targets: Filled) -> bytes:
    words: list[int] = []
    for tensor, fresh in targets:
        words += (tensor.data_ptr(), tensor.element_size(), _pattern(tensor.dtype, fresh))
    return struct.pack(f"{len(words)}Q", *words)


@functools.cache
def _pattern(dtype: torch.dtype, value: float) -> int:
    """Eight bytes of numbers of ``dtype``, each ``value``."""
    numbers = torch.full((8 // dtype.itemsize,), value, dtype=dtype)
    return int.from_bytes(bytes(numbers.view(torch.uint8).tolist()), sys.byteorder)
