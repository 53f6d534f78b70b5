"""Ids out of range: the row that stands in for them, and their count.

Ids are mapped before anything else sees them, so that kernels, gradients and rows that move know
ids in range only.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .inputs import look_up_nested
from .ops.checks import is_eager
from .ops.counts import DeviceCount

__all__ = ["BadIds", "row_standing_in", "stand_in"]


def row_standing_in(on_bad_ids: str | int, num_rows: int) -> int:
    """The row that stands in for ids out of range, counted from the front.

    Args:
        on_bad_ids: a row; negative counts from the end.
        num_rows: ``N``.

    Raises:
        ValueError: no such row.

    >>> row_standing_in(-1, 10)
    9
    """
    is_row = isinstance(on_bad_ids, int) and not isinstance(on_bad_ids, bool)
    if not is_row or not -num_rows <= on_bad_ids < num_rows:  # type: ignore[operator]
        raise ValueError(
            f"on_bad_ids must be 'raise' or a row in [{-num_rows}, {num_rows}), got {on_bad_ids!r}"
        )
    return int(on_bad_ids) % num_rows


class BadIds(DeviceCount):
    """How many ids of lookups were out of range.

    Replicas of ``nn.DataParallel`` share this object.
    """

    def __init__(self, count: int = 0) -> None:
        super().__init__(count)
        self._lock = threading.Lock()
        self._warned = False

    def prepare(self, device: torch.device) -> Tensor:
        """The number of ``device``, which is made where there is none.

        Done before the first lookup where it can be, for compiled code would be compiled again.

        Raises:
            RuntimeError: a CUDA graph is being captured, every replay of which would set it to 0.
        """
        eager = device.type == "cuda" and not torch.compiler.is_compiling()
        if eager and device not in self._on and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "on_bad_ids counts on the device: look up once before a graph is captured"
            )
        return super().prepare(device)

    def add(self, number: int, ids: Tensor, num_rows: int, row: int, table: str | None) -> None:
        """Count ``number`` of ``ids``, which the host knows, and warn of the first."""
        with self._lock:
            self.prepare(ids.device).add_(number)
            warned, self._warned = self._warned, True
        if not warned:
            of = "" if table is None else f" of table {table!r}"
            warnings.warn(
                f"{number} of {ids.numel()} ids{of} are out of range [0, {num_rows}): row {row} "
                "stands in for them; bad_ids counts them",
                stacklevel=_level_of_user() - 1,
            )

    def add_on_device(self, bad: Tensor) -> None:
        """Count where ``bad``, without waiting for a device."""
        # What is traced once is no lookup.
        traced = torch.compiler.is_exporting() or torch.jit.is_tracing()
        if not traced and not bad.is_meta and not isinstance(bad, FakeTensor):
            self.prepare(bad.device).add_(bad.sum())


def _level_of_user() -> int:
    """How many frames above this one the first lies that is neither ours nor torch's."""
    frame, level = inspect.currentframe(), 0
    while frame is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in ("torch", "esapn_kernels"):
            break
        frame, level = frame.f_back, level + 1
    return level + 1


def stand_in(
    ids: Tensor,
    num_rows: int,
    row: int,
    counter: BadIds | None = None,
    table: str | None = None,
) -> Tensor:
    """``ids`` with ``row`` in the place of those out of range.

    Args:
        ids: any shape, nested too. What is neither int32 nor int64 is returned as it is: lookups
            refuse it.
        num_rows: ``N``, larger than 0.
        row: in ``[0, N)``.
        counter: counts the ids out of range; default: they are not counted.
        table: that the warning names.

    Example:
        >>> stand_in(torch.tensor([3, -1, 10]), 10, 0).tolist()
        [3, 0, 0]
    """
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        return ids
    others = (num_rows, row, counter, table)
    if ids.is_nested:
        return look_up_nested(ids, lambda values: stand_in(values, *others))
    if torch._C._are_functorch_transforms_active():
        mapped: Tensor = _StandIn.apply(ids, *others)
        return mapped
    if ids.dtype == torch.int32 and num_rows > torch.iinfo(torch.int32).max:
        ids = ids.long()  # as which the bounds and the row exist
    on_host = ids.device.type == "cpu" and is_eager()
    if on_host:
        if not ids.numel():
            return ids
        low, high = torch.aminmax(ids)
        if low.item() >= 0 and high.item() < num_rows:
            return ids
    bad = ids.clamp(0, num_rows - 1) != ids
    if counter is not None and on_host:
        counter.add(int(bad.sum()), ids, num_rows, row, table)
    elif counter is not None:
        counter.add_on_device(bad)
    return ids.masked_fill(bad, row)


class _StandIn(torch.autograd.Function):
    """:func:`stand_in` under ``torch.func``, whose batches are counted whole."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return stand_in(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, ids: Tensor, *others: Any) -> tuple[Tensor, int | None]:
        return _StandIn.apply(ids, *others), in_dims[0]
