"""Rows that change their size: the operators that move them, on any backend.

    promote   e' = W_k e + b_k      the row leaves level k for level k + 1
    demote    e' = D_k [e; 1]       it leaves level k + 1 for level k, D_k of ``fit.down_hops``
    insert    e' = 0                an id without a row gets one
    free                            an id's row is given back

A promotion changes no output: ``M_k e + c_k = M_{k+1} (W_k e + b_k) + c_{k+1}``. A demotion takes
the nearest output that the smaller size has, and is the same move by another matrix. All of them
take free places and give places back: native kernels by the bits of
:class:`~esapn_kernels.ops.layout.TakenPlaces`, the others by the stacks of
:class:`~esapn_kernels.ops.layout.Places`. The caller has made room (``storage.Arena``). Where the
host can read which rows move, it finds them before, and makes room for just these. Source: Liu et
al., SIGIR 2020.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from ..cpu import native_resize as native
from ..cpu import resize as cpu
from ..cpu.native_resize import find_places, lower_rows
from ..cpu.resize import Movers, shift_rows
from ..gpu.resize import launch_demote, launch_free, launch_insert, launch_promote
from .backend import runs_native
from .chain import full_chain
from .checks import check_ids, is_eager, is_opaque
from .fit import DownHops, down_hops
from .layout import Filled, FreePlaces, Layout, Places

__all__ = [
    "Movers",
    "demote",
    "find_movers",
    "find_places",
    "free",
    "insert",
    "is_native",
    "lower_rows",
    "promote",
    "shift_rows",
]

_KERNELS: Any = {"native": native, "torch": cpu}


def is_native(backend: str, row_start: Tensor) -> bool:
    """Whether native kernels move rows that lie at ``row_start``, should ``backend`` say so."""
    return runs_native(backend) and row_start.is_cpu and not is_opaque(row_start)


def find_movers(
    ids: Tensor, mask: Tensor | None, layout: Layout, call: str, *, backend: str
) -> Movers:
    """The rows that a call moves on a backend other than Triton. Reads the device.

    Args:
        ids: int ``[R]``, in range.
        mask: bool ``[R]`` or ``None``.
        layout: with the sinks of :class:`~esapn_kernels.ops.layout.Places`.
        call: ``promote``: rows below the last level; ``demote``: rows above the first; ``insert``:
            ids without a row; ``free``: rows.
        backend: ``native`` | ``torch``.
    """
    if is_native(backend, layout.row_start):
        check_ids(ids, layout.num_rows, read=False)
        return native.find_movers(ids, mask, layout, call)
    return cpu.find_movers(ids, mask, layout, call)


def promote(
    ids: Tensor,
    mask: Tensor | None,
    storage: Tensor,
    chain: Tensor,
    places: FreePlaces,
    states: Filled,
    per_id: Filled,
    movers: Movers | None = None,
) -> Tensor:
    """Move the rows of ``ids`` (where ``mask``) one level up.

    Args:
        ids: int ``[R]``; an id twice moves once. Ids without a row and rows of the last level stay;
            the Triton backend passes over ids out of range as well.
        mask: bool ``[R]`` or ``None``.
        storage: flat ``[capacity]``; the new rows are written.
        chain: packed hops or tails, dtype of ``storage``.
        places: locations and free places; brought up to date. The Triton backend moves the rows
            that fit, by level and then in the order of ``ids``; the others need room for all.
        states, per_id: in the layout of ``storage``, and ``[N]``: fresh where rows moved.
        movers: what :func:`find_movers` gave; ``None``: the Triton backend.

    Returns:
        Bool ``[R]``: True where the position named a row that moved.
    """
    chain = full_chain(chain, places.layout.sizes)
    if movers is None:
        return launch_promote(ids, mask, storage, chain, cast(Places, places), states, per_id)
    _KERNELS[movers.backend].hop("promote", movers, storage, chain, places, states, per_id)
    return movers.moved


def demote(
    ids: Tensor,
    mask: Tensor | None,
    storage: Tensor,
    chain: Tensor,
    places: FreePlaces,
    states: Filled,
    per_id: Filled,
    movers: Movers | None = None,
    kept: DownHops | None = None,
) -> Tensor:
    """Move the rows of ``ids`` (where ``mask``) one level down; else as :func:`promote`.

    Rows of the first level stay. ``kept``: the solution of earlier calls for the same arena.
    """
    sizes = places.layout.sizes
    if movers is not None and kept is not None and chain.is_cpu and is_eager():
        down = kept(chain, sizes, [k for k, rows in enumerate(movers.per_level[1:]) if rows])
    else:
        down = down_hops(chain, sizes)
    if movers is None:
        return launch_demote(ids, mask, storage, down, cast(Places, places), states, per_id)
    _KERNELS[movers.backend].hop("demote", movers, storage, down, places, states, per_id)
    return movers.moved


def insert(
    ids: Tensor,
    level: int,
    storage: Tensor,
    places: FreePlaces,
    states: Filled,
    per_id: Filled,
    movers: Movers | None = None,
) -> Tensor:
    """Give ``ids`` without a row a zero row of ``level``; else as :func:`promote`."""
    if movers is None:
        return launch_insert(ids, level, storage, cast(Places, places), states, per_id)
    _KERNELS[movers.backend].insert(movers, level, storage, places, states, per_id)
    return movers.moved


def free(ids: Tensor, storage: Tensor, places: FreePlaces, movers: Movers | None = None) -> Tensor:
    """Give the rows of ``ids`` back; their ids have none afterwards. Else as :func:`promote`."""
    if movers is None:
        return launch_free(ids, storage, cast(Places, places))
    _KERNELS[movers.backend].free(movers, storage, places)
    return movers.moved
