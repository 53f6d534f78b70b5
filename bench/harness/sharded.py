"""What tables sharded by ``esapn_kernels.sharded`` take and send: bytes and time, computed.

The id of popularity rank r comes with a chance in proportion to r^-a, and an id that came f times
has the largest size d <= s sqrt(f); f is what is expected after so many events.

    asked     A = ids that a rank asks for in a step: distinct ones with dedup, else all lookups
    sent      what goes to other ranks of it: a part (W - 1) / W
    largest   S = the largest part of the asked ids that one rank owns; even: 1 / W

``harness.wire`` holds the bytes sent against those of real runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from esapn_kernels.ops.chain import chain_numel
from esapn_kernels.ops.layout import index_dtype, page_elements
from esapn_kernels.sharded.placement import Placement

from .roof import SIZES, STATE

COMMS = {"fp32": 4, "bf16": 2}
SINGLE = 4096
"""Ids of this many popularity ranks are classes of their own."""

CLASSES = 20_000
"""Further classes of ids that come about equally often."""

NOTED = 64
"""A table's lookups are noted one by one for so many steps at most; then they are merged."""


@dataclass(frozen=True)
class Traffic:
    """Ids of a table in classes that come equally often.

    Attributes:
        count: float64 ``[k]``, ids of every class; those of one id come first, in order of the id.
        chance: float64 ``[k]``, of one id of the class at one lookup; ``count . chance = 1``.
    """

    count: Tensor
    chance: Tensor

    @classmethod
    def zipf(cls, ids: int, exponent: float) -> Traffic:
        """Id ``r - 1`` comes in proportion to ``r^-exponent``, r = 1 .. ids."""
        single = torch.arange(1, min(ids, SINGLE) + 2, dtype=torch.float64)
        edge = single
        if ids > SINGLE:
            far = torch.linspace(
                math.log(SINGLE + 1), math.log(ids + 1), CLASSES + 1, dtype=torch.float64
            )
            edge = torch.cat([single, far.exp().round()[1:-1], single.new_tensor([ids + 1])])
            edge = edge.unique()
        count = edge.diff()
        # Of a class the integral of x^-exponent from half below its first rank to half above.
        low, high = edge[:-1] - 0.5, edge[1:] - 0.5
        power = 1 - exponent
        mass = (high / low).log() if power == 0 else (high**power - low**power) / power
        mass = torch.where(count == 1, edge[:-1] ** -exponent, mass)
        return cls(count, mass / mass.sum() / count)

    @classmethod
    def cubed(cls, ids: int) -> Traffic:
        """Id ``floor(ids u^3)``, u uniform: the first come far more often than others."""
        edge = (torch.arange(ids + 1, dtype=torch.float64) / ids) ** (1 / 3)
        return cls(torch.ones(ids, dtype=torch.float64), edge.diff())

    @property
    def ids(self) -> int:
        return round(float(self.count.sum()))

    def comes(self, lookups: float) -> Tensor:
        """``1 - (1 - P)^n``: the chance that an id of a class is among so many lookups."""
        return -torch.expm1(lookups * torch.log1p(-self.chance))


@dataclass(frozen=True)
class Job:
    """Tables on ``world`` ranks and their traffic.

    Attributes:
        traffic: of every table; the tables are alike.
        lookups: of a rank and step, over all tables.
        events: lookups of all ranks and tables so far.
        scale: a row has the largest of ``sizes`` up to ``scale sqrt(count)``.
        comm: of outputs and their gradients between ranks.
        optimizer: of ``harness.roof.STATE``.
        growth: rows grow by themselves, so that counts of ids travel and are kept.
        every: steps between moves of rows.
    """

    traffic: Traffic
    world: int
    lookups: int
    tables: int = 1
    events: float = 0.0
    sizes: tuple[int, ...] = SIZES
    scale: float = 1.0
    comm: str = "bf16"
    dedup: bool = True
    growth: bool = True
    optimizer: str = "rowwise_adagrad"
    every: int = 50

    @property
    def dim(self) -> int:
        return self.sizes[-1]

    @cached_property
    def row_size(self) -> Tensor:
        """Size of the rows of every class."""
        most = self.scale * (self.events / self.tables * self.traffic.chance).sqrt()
        sizes = torch.tensor(self.sizes, dtype=torch.float64)
        return sizes[(torch.bucketize(most, sizes, right=True) - 1).clamp(min=0)]

    def _asked(self, ranks: int) -> Tensor:
        """How often ``ranks`` together ask for an id of each class, expected; distinct ids once."""
        lookups = self.lookups / self.tables * ranks
        return self.traffic.comes(lookups) if self.dedup else lookups * self.traffic.chance

    @cached_property
    def asked(self) -> float:
        """A: ids that a rank asks for, of all tables."""
        return self.tables * float(self.traffic.count @ self._asked(1))

    @cached_property
    def asked_size(self) -> float:
        """Mean size of their rows."""
        asked = self.traffic.count * self._asked(1)
        return float(asked @ self.row_size / asked.sum())

    @cached_property
    def stepped(self) -> tuple[float, float]:
        """Rows that an owner steps, and their mean size: all ranks' distinct ids over the ranks."""
        distinct = self.traffic.count * self.traffic.comes(self.lookups / self.tables * self.world)
        rows = float(distinct.sum())
        return self.tables * rows / self.world, float(distinct @ self.row_size / rows)

    @cached_property
    def owned(self) -> tuple[float, float]:
        """Parts of the asked ids that the rank owns which owns least and most of them.

        Of classes of one id it counts where they lie, of the others that they lie evenly.
        """
        weight = self.traffic.count * self._asked(1)
        singles = int((self.traffic.count == 1).long().cumprod(0).sum())
        place = Placement(self.traffic.ids, self.world)
        owner = place.owner(place.position(torch.arange(singles)))
        part = torch.zeros(self.world, dtype=torch.float64)
        part.index_add_(0, owner, weight[:singles])
        part = (part + weight[singles:].sum() / self.world) / weight.sum()
        return float(part.min()), float(part.max())


def memory(job: Job) -> dict[str, float]:
    """Bytes of a rank, of all tables: what is held between steps.

    Returns:
        ``rows`` whole pages; ``starts``, ``levels`` where they lie; ``hops``; ``optimizer``;
        ``counts`` of growth; ``moving``, what a GPU needs to move rows; ``noted``, ids that came
        since rows last moved, at most; ``total``; ``fixed``, rows of the largest size and the same
        optimizer.
    """
    rows = math.ceil(job.traffic.ids / job.world)
    page = page_elements(job.sizes, rows)
    pages = 0
    for size in job.sizes:
        of_size = float(job.traffic.count[job.row_size == size].sum()) / job.world
        pages += math.ceil(of_size / (page // size))
    elements = pages * page
    per_element, per_row = STATE[job.optimizer]
    start = index_dtype(elements).itemsize
    found: dict[str, float] = {
        "rows": 4 * elements,
        "starts": start * (rows + 1),
        "levels": pages + 1,
        "hops": 4 * chain_numel(job.sizes),
        "optimizer": 4 * (per_element * elements + per_row * rows),
    }
    if job.growth:
        received = min(job.every, NOTED) * job.asked / job.tables
        found |= {
            "counts": 4 * rows,
            "moving": 4 * rows + 4 * pages,
            "noted": (16 if job.dedup else 8) * min(received, max(4 * rows, 1 << 16)),
        }
    found = {name: job.tables * nbytes for name, nbytes in found.items()}
    fixed = job.tables * rows * 4 * (job.dim * (1 + per_element) + per_row)
    return {**found, "total": sum(found.values()), "fixed": fixed}


def wire(job: Job) -> dict[str, float]:
    """Bytes that a rank sends to other ranks in a step, on average over the ranks.

    TorchRec sends of every table the number of its ids to every rank, and before that how long each
    tensor will be and the batch size; all int64. ``hops``: an all-reduce in a ring.
    """
    others = job.world - 1
    away = job.asked * others / job.world
    counts = job.growth and job.dedup
    found: dict[str, float] = {
        "splits": 8 * others * (4 if counts else 3),
        "lengths": 8 * others * job.tables,
        "ids": 8 * away,
    }
    if counts:
        found["counts"] = 4 * away
    found["outputs"] = found["gradients"] = job.dim * COMMS[job.comm] * away
    found["hops"] = job.tables * 4 * chain_numel(job.sizes) * 2 * others / job.world
    return found


def own_width(job: Job) -> float:
    """What ids, outputs and gradients would be if rows travelled at their own size; not built."""
    each = 8 + 1 + 2 * COMMS[job.comm] * job.asked_size
    return each * job.asked * (job.world - 1) / job.world


def memory_traffic(job: Job) -> dict[str, float]:
    """The fewest bytes that the memory of the busiest rank moves in a step.

    Returns:
        ``look up``: the owner reads ids, starts, levels and rows, and writes outputs of 128
        numbers. ``step``: it reads their gradients, writes and reads those of the rows, and reads
        and writes each row and its state once. ``spread``: the asker copies outputs to occurrences
        and sums their gradients. With bf16 each also converts.
    """
    busiest = job.owned[1] * job.world
    received = job.asked * busiest
    wide, narrow = 4 * job.dim, COMMS[job.comm] * job.dim
    # To convert is to read one and write the other.
    convert = wide + narrow if narrow < wide else 0
    rows, size = job.stepped
    per_element, per_row = STATE[job.optimizer]
    state = 4 * (size * (1 + per_element) + per_row)
    held = memory(job)["rows"] / 4 / job.tables
    start = index_dtype(int(held)).itemsize
    return {
        "look up": received * (8 + start + 1 + 4 * job.asked_size + wide + convert),
        "step": received * (wide + convert + 8 * job.asked_size) + rows * busiest * 2 * state,
        "spread": 2 * (job.asked * (wide + convert) + job.lookups * wide),
    }


@dataclass(frozen=True)
class Machine:
    """What is assumed of the machines.

    Attributes:
        nic: bytes a second of a GPU's network card.
        efficiency: the part of it that an all-to-all reaches.
        hbm: bytes a second of a GPU's memory.
        latency: seconds of a collective beside its bytes.
    """

    nic: float = 50e9
    efficiency: float = 0.8
    hbm: float = 3.3e12
    latency: float = 20e-6


def times(job: Job, machine: Machine) -> dict[str, float]:
    """Seconds of a step's parts, one after the other, of the rank that is last.

    The rank that owns the part S of the asked ids receives S W A of them; a card sends and
    receives at once. All ranks lie behind their cards, also those of one machine.

    Returns:
        The parts and ``sum``; ``ahead``: the sum without ``ids``, which a pipeline sends while the
        dense part of the step before computes.
    """
    sent = wire(job)
    others = job.world - 1
    least, most = job.owned
    worst = max(1 - least, others * most) * job.world / others if others else 0.0
    speed = machine.nic * machine.efficiency
    exchanged = ["splits", "lengths", "ids", *(["counts"] if "counts" in sent else [])]
    collectives = 1 if others else 0
    moved = memory_traffic(job)
    found = {
        "ids": worst * sum(sent[name] for name in exchanged) / speed
        + collectives * len(exchanged) * machine.latency,
        "look up": moved["look up"] / machine.hbm,
        "outputs": worst * sent["outputs"] / speed + collectives * machine.latency,
        "spread": moved["spread"] / machine.hbm,
        "gradients": worst * sent["gradients"] / speed + collectives * machine.latency,
        "step": moved["step"] / machine.hbm,
        "hops": sent["hops"] / speed + collectives * job.tables * machine.latency,
    }
    total = sum(found.values())
    return {**found, "sum": total, "ahead": total - found["ids"]}
