"""The bytes that the ranks of the tests send, counted as ``bench/scale.py --check`` counts them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

from harness import wire


def compare(bags: bool = False, **way: Any) -> dict[str, Any]:
    """Counted beside the model, on every rank."""
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, wire.count(bags=bags, **way))
    return wire.compare(len(ranks), ranks, **way)


def known_collectives() -> list[tuple[str, float]]:
    """What is counted of collectives whose bytes are known, by every way of calling them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    numbers = torch.zeros(8 * world, dtype=torch.float16)
    # To rank r go r + 1 numbers, from it come rank + 1.
    to, of = list(range(1, world + 1)), [rank + 1] * world
    uneven = torch.zeros(sum(to))
    with wire.Wire() as counted:
        dist.all_to_all_single(torch.empty_like(numbers), numbers)
        received = torch.empty(sum(of))
        dist.all_to_all_single(received, uneven, of, to, async_op=True).wait()
        functional.wait_tensor(functional.all_to_all_single(uneven, of, to, dist.group.WORLD))
        dist.all_reduce(torch.zeros(10))
        work = dist.all_reduce(torch.zeros(10, dtype=torch.float64), async_op=True)
        work.wait()
        functional.wait_tensor(functional.all_reduce(torch.zeros(10), "sum", dist.group.WORLD))
    return counted.sent


def unknown_collective() -> str:
    """What is said of a collective that the model does not have."""
    try:
        with wire.Wire():
            dist.broadcast(torch.zeros(1), src=0)
    except NotImplementedError as error:
        return str(error)
    return ""
