"""Promotion: rows of mixed sizes one size up, Adam's state with them.

ours    ``ResizableEmbedding.promote``
eager   per size: gather the rows, ``addmm``, scatter them into the next size's table, and clear
        their moments; tables and moments have room already, rows left behind are not used again
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esapn_kernels import optim

from .gate import GateError, largest_error, relative_error, rows64
from .providers import Eager, Ours, TableSpec
from .roof import SIZES, promotion_bytes
from .table import Row
from .timing import Entry, Timer

PROMOTED = 10_240
MODE = "promote adam"
_OTHERS = 512  # rows not promoted whose outputs must not change


@dataclass
class Ready:
    """A copy of ours with Adam's moments all 1 and room for the rows to be promoted."""

    ours: Ours
    optimizer: optim.Adam

    @classmethod
    def copy_of(cls, ours: Ours, rows: int) -> Ready:
        ours = copy.deepcopy(ours)
        ours.module.reserve(rows)
        ready = cls(ours, optim.Adam(ours.module))
        for moment in ready.moments:
            moment.fill_(1.0)
        return ready

    @property
    def moments(self) -> list[Tensor]:
        """Adam's two moments of every element of the storage."""
        state = self.optimizer.state[self.ours.storage]
        return [state[name] for name in ("exp_avg", "exp_avg_sq")]

    def promote(self, ids: Tensor) -> Tensor:
        return self.ours.module.promote(ids)


class EagerPromotion:
    """A table, two moments and spare rows per size; :meth:`reset` before every promotion."""

    def __init__(self, ours: Ours, rows: int) -> None:
        eager = Eager(ours)
        self.hops = [(weight.detach(), bias.detach()) for weight, bias in eager.hops]
        self.tables, self.moments = [], []
        for table in eager.tables:
            spare = table.detach().new_empty(rows, table.shape[1])
            self.tables.append(torch.cat([table.detach(), spare]))
            self.moments.append([torch.ones_like(self.tables[-1]) for _ in range(2)])
        self._before = (eager.level, eager.slot, [len(table) for table in eager.tables])
        self.reset()

    def reset(self) -> None:
        level, slot, used = self._before
        self.level, self.slot, self.used = level.clone(), slot.clone(), list(used)

    @torch.no_grad()
    def promote(self, ids: Tensor) -> None:
        level = self.level[ids]
        for k, (weight, bias) in enumerate(self.hops):
            mine = ids[level == k]
            begin, end = self.used[k + 1], self.used[k + 1] + len(mine)
            rows = torch.addmm(bias, self.tables[k][self.slot[mine]], weight.t())
            place = torch.arange(begin, end, dtype=torch.int32, device=ids.device)
            self.tables[k + 1][place] = rows
            for moment in self.moments[k + 1]:
                moment[place] = 0
            self.slot[mine], self.level[mine], self.used[k + 1] = place, k + 1, end


def draw_batches(
    table: TableSpec, device: torch.device, generator: torch.Generator
) -> list[Tensor]:
    """Four batches of distinct ids below the largest size, in the table's own mix of sizes."""
    small = (table.sizes < SIZES[-1]).nonzero()[:, 0]
    count = min(PROMOTED, len(small))
    draws = (torch.randperm(len(small), generator=generator)[:count] for _ in range(4))
    return [small[draw].to(device) for draw in draws]


def check_promotion(ours: Ours, ids: Tensor) -> dict[str, float]:
    """Rows, sizes and state of both providers after one promotion of ``ids``.

    Returns:
        The relative error of the new rows against float64, by provider.

    Raises:
        GateError: it is above the tolerance, or sizes, state or another row are wrong.
    """
    ready, eager = Ready.copy_of(ours, len(ids)), EagerPromotion(ours, len(ids))
    others = torch.arange(len(eager.level), device=ids.device)[_rest(ids, len(eager.level))]
    others = others[torch.randperm(len(others), device=ids.device)[:_OTHERS]]
    before = ready.ours(others).detach()
    old = rows64(ours, ids.sort().values)
    if not bool(ready.promote(ids).all()):
        raise GateError("ours, promotion: rows were left where they are")
    eager.promote(ids)
    if not torch.equal(ready.ours(others).detach(), before):
        raise GateError("ours, promotion: other rows changed")
    errors: dict[str, dict[str, float]] = {"ours": {}, "eager": {}}
    for k, mine, rows in old.groups[:-1]:
        if not len(mine):
            continue
        weight, bias = old.hops[k]
        expected = (rows @ weight.t() + bias).detach()
        name, dim = f"rows promoted from size {SIZES[k]}", SIZES[k + 1]
        place = ready.ours.places(mine, dim)
        errors["ours"][name] = relative_error(ready.ours.storage.detach()[place], expected)
        slot = eager.slot[mine].long()
        errors["eager"][name] = relative_error(eager.tables[k + 1][slot], expected)
        sizes = ready.ours.module.sizes_of(mine)
        if not bool((sizes == dim).all() and (eager.level[mine] == k + 1).all()):
            raise GateError(f"promotion from size {SIZES[k]}: sizes are wrong")
        fresh = [moment[place] for moment in ready.moments]
        fresh += [moment[slot] for moment in eager.moments[k + 1]]
        if any(bool(moment.any()) for moment in fresh):
            raise GateError(f"promotion from size {SIZES[k]}: moments are not those of a fresh row")
    return {name: largest_error(f"{name}, promotion", found) for name, found in errors.items()}


def _rest(ids: Tensor, rows: int) -> Tensor:
    mask = torch.ones(rows, dtype=torch.bool, device=ids.device)
    mask[ids] = False
    return mask


def measure_promotion(
    table: TableSpec,
    ours: Ours,
    timer: Timer,
    repeats: int | None,
    generator: torch.Generator,
) -> tuple[list[Row], dict[str, Any]]:
    """Rows of both providers, and on a GPU what :func:`count_launches` finds.

    Every turn promotes on a fresh copy of the table, made outside the timing.
    """
    batches = draw_batches(table, timer.device, generator)
    errors = check_promotion(ours, batches[0])
    eager = EagerPromotion(ours, len(batches[0]))
    counts = [int((table.sizes[batches[0].cpu()] == size).sum()) for size in SIZES]
    moved = promotion_bytes(counts)

    def batch(turn: int) -> Tensor:
        return batches[turn % len(batches)]

    def row(name: str, memory: int) -> Row:
        ids = len(batches[0])
        more: dict[str, Any] = {"bytes": moved, "cold_bytes": moved, "gate_error": errors[name]}
        return Row(table.name, len(table), "promotion", ids, ids, MODE, name, memory, **more)

    report = Ready.copy_of(ours, len(batches[0])).ours.module.memory_report()
    held = [*eager.tables, *(m for pair in eager.moments for m in pair), eager.level, eager.slot]
    entries = [
        Entry(
            row("ours", report.serving + report.optimizer),
            lambda turn, ready: ready.promote(batch(turn)),
            lambda _: Ready.copy_of(ours, len(batches[0])),
        ),
        Entry(
            row("eager", sum(t.nbytes for t in held)),
            lambda turn, _: eager.promote(batch(turn)),
            lambda _: eager.reset(),
        ),
    ]
    facts = count_launches(ours, batches) if timer.cuda else {}
    return timer.measure(entries, repeats), facts


def launches(on_gpu: list[str]) -> list[str]:
    """Without the asynchronous copy to the host of how much room is left.

    >>> launches(["_claim_kernel", "Memcpy DtoH (Device -> Pinned)"])
    ['_claim_kernel']
    """
    return [name for name in on_gpu if not name.startswith("Memcpy DtoH")]


def count_launches(ours: Ours, batches: list[Tensor]) -> dict[str, Any]:
    """What the GPU runs for one promotion, and whether the host waits for it."""
    ready = Ready.copy_of(ours, 2 * len(batches[0]))
    ready.promote(batches[0])
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        waited = ""
        try:
            ready.promote(batches[1])
        except RuntimeError as error:
            waited = str(error).splitlines()[0]
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        torch.cuda.synchronize()
    # The profiler lists annotations of ranges beside the kernels, copies and fills.
    on_gpu = [
        event.name
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    return {
        "ids": len(batches[0]),
        "launches": len(launches(on_gpu)),
        "on_gpu": on_gpu,
        "synchronisations": int(bool(waited)),
        "waited": waited,
    }
