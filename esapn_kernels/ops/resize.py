"""Rows that change their size: the operators that move them, on either backend.

    promote   e' = W_k e + b_k      the row leaves level k for level k + 1
    insert    e' = 0                an id without a row gets one
    free                            an id's row is given back

A promotion changes no output: ``M_k e + c_k = M_{k+1} (W_k e + b_k) + c_{k+1}``. All of them take
rows from the free lists of :class:`~esapn_kernels.ops.layout.Places` and give rows back to them;
the caller has made room (``storage.Arena``). Source: Liu et al., SIGIR 2020.
"""

from __future__ import annotations

from torch import Tensor

from ..cpu import resize as cpu
from ..gpu.resize import launch_free, launch_insert, launch_promote
from .layout import Filled, Layout, Places

__all__ = ["Movers", "find_movers", "free", "insert", "promote"]

Movers = tuple[Tensor, Tensor]
"""Distinct ids, ascending, and the levels that their rows leave, int64 ``[U]`` both."""


def promote(
    ids: Tensor,
    mask: Tensor | None,
    storage: Tensor,
    chain: Tensor,
    places: Places,
    states: Filled,
    per_id: Filled,
    *,
    backend: str,
    movers: Movers | None = None,
) -> Tensor:
    """Move the rows of ``ids`` (where ``mask``) one level up.

    Args:
        ids: int ``[R]``; an id twice moves once. Ids without a row and rows of the last level stay;
            the Triton backend passes over ids out of range as well.
        mask: bool ``[R]`` or ``None``.
        storage: flat ``[capacity]``; the new rows are written.
        chain: packed hops, dtype of ``storage``.
        places: locations and free lists; brought up to date. The Triton backend moves the rows that
            fit, by level and then in the order of ``ids``; the torch backend needs room for all.
        states, per_id: in the layout of ``storage``, and ``[N]``: fresh where rows moved.
        backend: ``triton`` | ``torch``.
        movers: what :func:`find_movers` gave, for the torch backend.

    Returns:
        Bool ``[R]``: True where the position named a row that moved.
    """
    if backend == "triton":
        return launch_promote(ids, mask, storage, chain, places, states, per_id)
    assert movers is not None
    return cpu.promote(ids, mask, storage, chain, places, states, per_id, movers)


def insert(
    ids: Tensor,
    level: int,
    storage: Tensor,
    places: Places,
    states: Filled,
    per_id: Filled,
    *,
    backend: str,
) -> Tensor:
    """Give ``ids`` without a row a zero row of ``level``; else as :func:`promote`."""
    if backend == "triton":
        return launch_insert(ids, level, storage, places, states, per_id)
    return cpu.insert(ids, level, storage, places, states, per_id)


def free(ids: Tensor, storage: Tensor, places: Places, *, backend: str) -> Tensor:
    """Give the rows of ``ids`` back; their ids have none afterwards. Else as :func:`promote`."""
    if backend == "triton":
        return launch_free(ids, storage, places)
    return cpu.free(ids, places)


def find_movers(ids: Tensor, mask: Tensor | None, layout: Layout) -> Movers:
    """The rows that :func:`promote` moves on the torch backend, whose room is made beforehand.

    Reads the device. ``layout`` ends with the sinks of :class:`~esapn_kernels.ops.layout.Places`.
    """
    return cpu.find_movers(ids, mask, layout)
