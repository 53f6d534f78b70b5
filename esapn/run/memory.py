"""Bytes that the tables of a run take: those of each side now, and over the events.

serving     payload + slack + locations + chain          what a server needs
training    serving + optimizer + the state of the search
fixed       IDs x D x 4                                  a plain table at the largest size
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from esapn_kernels import ResizableEmbedding

from ..models.recommender import TableBytes

__all__ = ["ServingBytes", "bytes_of", "describe", "sizes_by_frequency"]


def describe(
    tables: Mapping[str, TableBytes], ids: Mapping[str, int], largest: int
) -> dict[str, dict[str, Any]]:
    """The bytes of every side as JSON values.

    Args:
        tables: what a model's ``memory`` gives.
        ids: IDs of every side.
        largest: D, of ``fixed``.

    >>> side = describe({"user": TableBytes({"2": 3}, payload=24, slack=8)}, {"user": 3}, 4)["user"]
    >>> side["serving"], side["fixed"]
    (32, 48)
    """
    return {
        name: {**asdict(table), "serving": table.serving, "fixed": ids[name] * largest * 4}
        for name, table in tables.items()
    }


class ServingBytes:
    """Serving bytes over the events of a run: their peak and their mean.

    >>> serving = ServingBytes()
    >>> for size, events in ((100, 10), (400, 20)):
    ...     serving.add(size, events)
    >>> serving.peak, serving.mean(30)
    (400, 300.0)
    """

    def __init__(self) -> None:
        self.peak = 0
        self.total = 0.0  # bytes x events

    def add(self, serving: int, events: int) -> None:
        """``serving`` bytes were taken over the last ``events``."""
        self.peak = max(self.peak, serving)
        self.total += serving * events

    def mean(self, events: int) -> float:
        """Mean over all ``events`` of the run."""
        return self.total / max(events, 1)


def bytes_of(
    memory: Mapping[str, Mapping[str, Any]],
    over_time: ServingBytes,
    events: int,
    counters: int,
) -> dict[str, float]:
    """Both sides together: serving now, at its peak and on average; training; fixed; limits.

    Args:
        memory: of :func:`describe`.
        over_time: serving bytes up to now.
        events: of the run, so far.
        counters: bytes of what decides on sizes, which are part of ``training``.
    """
    total = {
        part: sum(side[part] for side in memory.values())
        for part in ("serving", "optimizer", "fixed")
    }
    return {
        "serving": total["serving"],
        "serving_peak": max(over_time.peak, total["serving"]),
        "serving_mean": over_time.mean(events),
        "training": total["serving"] + total["optimizer"] + counters,
        "fixed128": total["fixed"],
        **_limits(memory),
    }


def _limits(memory: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The budget of both sides and the rows refused, where there is a budget."""
    sides = [side for side in memory.values() if side["budget"] is not None]
    if not sides:
        return {}
    return {part: sum(side[part] for side in sides) for part in ("budget", "refused")}


def sizes_by_frequency(table: ResizableEmbedding, ids: Tensor) -> list[dict[str, Any]]:
    """Mean size of the IDs that ``ids`` holds [1, 2), [2, 4), [4, 8), ... times."""
    count = torch.bincount(ids, minlength=table.num_embeddings).cpu()
    sizes = table.sizes_of().double().cpu()
    bucket = torch.log2(count.clamp(min=1).double()).long()
    return [
        {
            "from": 2**b,
            "to": 2 ** (b + 1),
            "ids": int(mine.sum()),
            "mean_size": sizes[mine].mean().item(),
        }
        for b in range(int(bucket.max()) + 1)
        if (mine := (bucket == b) & (count > 0)).any()
    ]
