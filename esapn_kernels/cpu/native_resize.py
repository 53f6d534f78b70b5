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
from ..ops.layout import Filled, Layout, TakenPlaces
from .native import DTYPE, address, packed
from .resize import Movers, fill_rows, shift_rows

__all__ = ["find_movers", "find_places", "free", "hop", "insert", "lower_rows"]

_CALL = {"promote": 0, "insert": 1, "free": 2, "demote": 3}


def find_movers(ids: Tensor, mask: Tensor | None, layout: Layout, call: str) -> Movers:
    """See :func:`esapn_kernels.ops.resize.find_movers`; they are found in the order of ``ids``.

    Raises:
        IndexError: an id out of range.
    """
    ids = ids.contiguous()
    if mask is not None:
        mask = mask.to(ids.device, torch.bool).expand_as(ids).contiguous()
    moved = torch.empty(ids.shape, dtype=torch.bool, device="cpu")
    # Their number by level, then ids, then where their rows lie.
    found = torch.empty(len(layout.sizes) + 2 * ids.numel(), dtype=torch.int64, device="cpu")
    per_level = native.find_movers(
        *_table(layout),
        ids.data_ptr(),
        ids.element_size(),
        ids.numel(),
        address(mask),
        _CALL[call],
        moved.data_ptr(),
        found.data_ptr(),
    )
    return Movers(moved, per_level, "native", (found,))


def hop(
    call: str,
    movers: Movers,
    storage: Tensor,
    chain: Tensor,
    places: TakenPlaces,
    states: Filled,
    per_id: Filled,
) -> None:
    """``promote`` or ``demote``, see :mod:`esapn_kernels.ops.resize`.

    Raises:
        RuntimeError: there is no room for all of them; nothing is changed.
    """
    hops = chain.to(compute_dtype(storage.dtype)).contiguous()
    _move(call, movers, places, storage, hops, states, per_id)


def insert(
    movers: Movers, level: int, storage: Tensor, places: TakenPlaces, states: Filled, per_id: Filled
) -> None:
    """See :func:`esapn_kernels.ops.resize.insert`. Raises as :func:`hop`."""
    _move("insert", movers, places, storage, None, states, per_id, level)


def free(movers: Movers, storage: Tensor, places: TakenPlaces) -> None:
    """See :func:`esapn_kernels.ops.resize.free`. Raises as :func:`hop`."""
    _move("free", movers, places, storage)


def find_places(places: TakenPlaces) -> None:
    """Derive all tensors of ``places`` from its layout; pages without a row become free.

    Raises:
        RuntimeError: rows lie in one place, or in free pages.
    """
    native.find_places(*_table(places.layout), *_bits(places))


def lower_rows(places: TakenPlaces, ids: range, tensors: Sequence[Tensor]) -> int:
    """Move the rows of ``ids`` to lower pages of their levels, where these have free places.

    One after the other; ``tensors``, in the layout of the storage, go with them. Returns how many
    moved.
    """
    layout = places.layout
    old, new = torch.empty(2, len(ids), dtype=torch.int64, device="cpu")
    plain = [t for t in tensors if _is_plain(t)]
    words = [word for t in plain for word in (t.data_ptr(), t.element_size())]
    moved: int = native.lower_rows(
        *_table(layout),
        *_bits(places),
        ids.start,
        ids.stop,
        struct.pack(f"{len(words)}Q", *words),
        old.data_ptr(),
        new.data_ptr(),
    )
    if not moved:
        return 0
    written = layout.row_start, *plain
    torch.autograd.graph.increment_version([t for t in written if not t.is_inference()])
    if len(plain) < len(tensors):
        other = [t for t in tensors if not _is_plain(t)]
        old, new = old[:moved], new[:moved]
        shift_rows(other, old, new, layout.page_level[new // layout.page].long(), layout.sizes)
    return moved


def _move(
    call: str,
    movers: Movers,
    places: TakenPlaces,
    storage: Tensor,
    chain: Tensor | None = None,
    states: Filled = (),
    per_id: Filled = (),
    level: int = 0,
) -> None:
    layout, (found,) = places.layout, movers.found
    fills, written, other = _fills(states)
    id_fills, ids_written, other_ids = _fills(per_id)
    native.move_rows(
        *_table(layout),
        _CALL[call],
        level,
        found.data_ptr(),
        *_bits(places),
        places.moves.data_ptr(),
        storage.data_ptr(),
        DTYPE[storage.dtype],
        address(chain),
        fills,
        id_fills,
    )
    # Written through addresses: autograd must know that saved rows are stale.
    tensors = layout.row_start, places.moves, storage, *written, *ids_written
    torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])
    if other or other_ids:
        n = len(layout.sizes)
        ids = found[n : n + sum(movers.per_level)]
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
        (layout.page_level.numel() - 1) * layout.page,
        packed(layout.sizes),
    )


def _bits(places: TakenPlaces) -> tuple[int, ...]:
    return (
        places.taken.data_ptr(),
        places.used.data_ptr(),
        places.vacant.data_ptr(),
        places.free_count.data_ptr(),
        places.lowest.data_ptr(),
        places.taken.shape[1],
    )


def _is_plain(tensor: Tensor) -> bool:
    """Whether kernels write it: not where numbers are a subclass's own affair, or lie apart."""
    plain = type(tensor) in (Tensor, nn.Parameter)
    return plain and tensor.is_contiguous() and tensor.element_size() <= 8


def _fills(targets: Filled) -> tuple[bytes, list[Tensor], Filled]:
    """What the kernels are told of ``targets``, whose tensors they write, and the other targets."""
    words: list[int] = []
    written: list[Tensor] = []
    other = []
    for tensor, fresh in targets:
        if _is_plain(tensor):
            words += (tensor.data_ptr(), tensor.element_size(), _pattern(tensor.dtype, fresh))
            written.append(tensor)
        else:
            other.append((tensor, fresh))
    return struct.pack(f"{len(words)}Q", *words), written, other


@functools.lru_cache(64)
def _pattern(dtype: torch.dtype, value: float) -> int:
    """Eight bytes of numbers of ``dtype``, each ``value``."""
    numbers = torch.full((8 // dtype.itemsize,), value, dtype=dtype, device="cpu")
    return int.from_bytes(bytes(numbers.view(torch.uint8).tolist()), sys.byteorder)
