"""Rows that grow and shrink by themselves while a model trains, within a budget of bytes.

    growth = ByCounts(model, budget="25%")      before the training loop, which stays as it is

Lookups in training are noted as they happen; after the optimizer's step rows move. ``ByCounts``
gives an id the size

    d(x) = the largest size <= s sqrt(u(x))         u: how often x was looked up, decayed

with the largest ``s`` whose rows fit the budget. Each time O(ids looked up) work is done, whatever
the size of the table:

    count    u += 2^(t / half_life) for every lookup, t lookups so far: so no other count decays;
             a histogram of log2 u follows
    fit      now and then, s from the histogram
    shrink   of as many rows as were looked up, taken in turn from the whole table, those that
             would be too large even if their count were ``hysteresis`` times what it is
    grow     of the rows looked up, those that are too small; without room they stay, and
             ``refused`` counts them

Another rule is a subclass of :class:`Growth`.

Source: sizes by counts against other signals: docs/comparison.md. Decay by growing weights: Cormode
et al., "Forward Decay", ICDE 2009.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .budget import budget_bytes
from .module import ResizableEmbedding
from .ops.counts import DeviceCount
from .storage.arena import Arena

__all__ = ["ByCounts", "Growth", "GrowthReport", "TableGrowth"]

_CONDENSE = 64
"""Lookups that are noted one by one; more are merged."""


@dataclass(frozen=True)
class TableGrowth:
    """A table's ``rows`` of every size, what it takes to serve and may take, and rows moved."""

    rows: dict[int, int]
    serving: int
    budget: int
    promoted: int
    demoted: int
    refused: int


@dataclass(frozen=True)
class GrowthReport:
    """What became of the rows of every table."""

    tables: dict[str, TableGrowth]

    def __str__(self) -> str:
        lines = []
        for name, table in self.tables.items():
            sizes = "  ".join(f"{size}: {count:,}" for size, count in table.rows.items())
            share = table.serving / table.budget
            lines += [
                f"{name or 'table'}: {table.serving:,} of {table.budget:,} B ({share:.1%}), "
                f"{table.promoted:,} up, {table.demoted:,} down, {table.refused:,} refused",
                f"  rows by size  {sizes}",
            ]
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Draw the rows of every size, as shares of each table; needs matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 1.2 + 0.5 * len(self.tables)), layout="constrained")
        axes = figure.subplots()
        sizes = sorted({size for table in self.tables.values() for size in table.rows})
        left = [0.0] * len(self.tables)
        labels = [name or "table" for name in self.tables]
        for i, size in enumerate(sizes):
            shares = [
                table.rows.get(size, 0) / max(sum(table.rows.values()), 1)
                for table in self.tables.values()
            ]
            color = str(0.9 - 0.8 * i / max(len(sizes) - 1, 1))
            axes.barh(labels, shares, left=left, label=str(size), color=color)
            left = [a + b for a, b in zip(left, shares, strict=True)]
        axes.set_xlim(0, 1)
        axes.set_xlabel("share of the rows")
        figure.suptitle("Rows of every size")
        axes.legend(title="size", loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
        figure.savefig(path)


class Growth:
    """Notes lookups in training, and moves rows after the optimizer's step as a rule wants.

    A rule is a subclass with :meth:`wanted`.

    Args:
        model: holds the tables, also in bags and collections; those of several sizes take part.
        budget: for all tables of ``model`` together, as of :class:`~esapn_kernels.\
ResizableEmbedding`; ``"3%"`` is of all the plain tables. Each table may take what its rows take now
            and a part of the rest in proportion to what it lacks of its plain table. Default: the
            tables' own budgets.
        every: move rows after every so many steps of the optimizer.

    Raises:
        ValueError: no table of several sizes; no budget; one that does not hold the rows as they
            are, which names the smallest that does. Nothing is changed.

    Notes:
        Counted are lookups of modules in training mode, with gradients enabled; a forward that is
        computed again in backward (activation checkpointing) counts once, ids out of range and the
        padding row never. Rows move after the step of an optimizer that holds the rows, or of any
        optimizer of the model where a fused one steps them in backward. Of replicas (see
        ``distributed``) the ids of all ranks count. Where rows are looked up by other means than
        a module's call, or stepped by other means than an optimizer of torch's class: call
        :meth:`note` and :meth:`step`.

        A checkpoint of a run holds :meth:`state_dict` beside the model's and the optimizer's. A
        copy of the model does not grow by itself.
    """

    def __init__(
        self, model: nn.Module, budget: int | str | None = None, *, every: int = 50
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        found = {n: m for n, m in model.named_modules() if isinstance(m, ResizableEmbedding)}
        self.tables = {n: m for n, m in found.items() if isinstance(m.arena, Arena)}
        if not self.tables:
            raise ValueError("the model holds no ResizableEmbedding of several sizes")
        if budget is not None:
            _share(found, budget)
        for name, table in self.tables.items():
            if table.budget is None:
                raise ValueError(f"{name or 'the table'} has no budget: give one for all tables")
        self.every = every
        self._steps = 0
        self._noted: dict[str, list[Tensor]] = {name: [] for name in self.tables}
        self._seen: dict[str, Tensor] = {}
        # Where the next turn through every table begins.
        self._next = dict.fromkeys(self.tables, 0)
        self._promoted = {name: DeviceCount() for name in self.tables}
        self._demoted = {name: DeviceCount() for name in self.tables}
        self._model = weakref.ref(model)
        handles = [
            table.register_forward_pre_hook(_Noting(self, name), with_kwargs=True)
            for name, table in self.tables.items()
        ]
        growing = weakref.ref(self)

        def after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            growth = growing()
            if growth is not None and growth.follows(optimizer):
                growth.step()

        handles.append(register_optimizer_step_post_hook(after_step))
        self._handles = handles
        weakref.finalize(self, handles[-1].remove)

    def wanted(self, name: str, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Levels that the rows of ``ids`` should have: at least, and at most.

        Args:
            name: of the table.
            ids: int64 ``[n]``, distinct.

        Returns:
            Two int64 ``[n]``: rows below the first grow if they were looked up, rows above the
            second shrink.
        """
        raise NotImplementedError

    def count(self, name: str, ids: Tensor, counts: Tensor) -> None:
        """The rows ``ids``, distinct, were looked up ``counts`` times. For rules that count."""

    def fit(self, name: str) -> None:
        """Called before rows move. For rules that fit something to the budget."""

    def remove(self) -> None:
        """Rows move no longer."""
        for handle in self._handles:
            handle.remove()

    def note(self, name: str, ids: Tensor) -> None:
        """The rows of ``ids`` were looked up."""
        noted = self._noted[name]
        noted.append(ids.detach().reshape(-1))
        if len(noted) >= _CONDENSE and not torch.compiler.is_compiling():
            self._condense(name)

    @torch.no_grad()
    def _condense(self, name: str) -> Tensor:
        """Count what was noted; the distinct rows that were looked up since rows last moved."""
        table, noted = self.tables[name], self._noted[name]
        self._noted[name] = []
        device, padding_idx = table.arena.storage.device, table.padding_idx
        ids = torch.cat([torch.zeros(0, dtype=torch.int64, device=device), *noted])
        known = (ids >= 0) & (ids < table.arena.num_rows)
        if padding_idx is not None:
            known &= ids != padding_idx
        ids = ids[known]
        if table.agree is not None:
            ids = table.agree(ids)
        ids, counts = ids.unique(return_counts=True)
        if len(ids):
            self.count(name, ids, counts)
        seen = self._seen.get(name)
        self._seen[name] = ids if seen is None else torch.cat([seen, ids]).unique()
        return self._seen[name]

    def follows(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether rows may move after this optimizer's step."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        rows = {id(table.arena.parameter) for table in self.tables.values()}
        if held & rows:
            return True
        model = self._model()
        fused = any(
            (stepper := table.arena.fused_optimizer) is not None and not stepper.deferred
            for table in self.tables.values()
        )
        return fused and model is not None and any(id(p) in held for p in model.parameters())

    @torch.no_grad()
    def step(self) -> None:
        """An optimizer has stepped: at every ``every``-th call rows move."""
        if not any(self._noted.values()) and not self._seen:
            return
        self._steps += 1
        if self._steps % self.every:
            return
        for name, table in self.tables.items():
            ids = self._condense(name)
            del self._seen[name]
            if len(ids):
                self.fit(name)
                self._move(name, table, ids)

    def _move(self, name: str, table: ResizableEmbedding, ids: Tensor) -> None:
        """Rows that take their turn shrink; rows that were looked up grow."""
        arena: Any = table.arena
        first, rows = self._next[name], table.arena.num_rows
        turn = torch.arange(first, first + min(len(ids), rows), device=ids.device) % rows
        self._next[name] = (first + len(turn)) % rows
        shrinks = arena.level(turn) > self.wanted(name, turn)[1]
        if bool(shrinks.any()):
            self._demoted[name].prepare(ids.device).add_(table.demote(turn, shrinks).sum())
        least = self.wanted(name, ids)[0]
        for _ in table.sizes[1:]:
            grows = arena.level(ids) < least
            if not bool(grows.any()):
                break
            moved = table.promote(ids, grows)
            self._promoted[name].prepare(ids.device).add_(moved.sum())
            if not torch.equal(moved, grows):
                # Places of other sizes may lie between: pages that empty serve this one.
                table.compact(len(ids))
                break

    def report(self) -> GrowthReport:
        """Sizes, bytes, moves and refusals of every table."""
        tables = {}
        for name, table in self.tables.items():
            report = table.memory_report()
            assert table.budget is not None
            tables[name] = TableGrowth(
                rows=report.rows_per_size,
                serving=report.serving,
                budget=table.budget,
                promoted=self._promoted[name].total(),
                demoted=self._demoted[name].total(),
                refused=table.refused,
            )
        return GrowthReport(tables)

    def state_dict(self) -> dict[str, Any]:
        """What a run needs beside the model's state to go on as it would have."""
        noted = {name: [ids.clone() for ids in lists] for name, lists in self._noted.items()}
        seen = {name: ids.clone() for name, ids in self._seen.items()}
        moves = {
            name: [self._promoted[name].total(), self._demoted[name].total()]
            for name in self.tables
        }
        return {
            "steps": self._steps,
            "noted": noted,
            "seen": seen,
            "next": dict(self._next),
            "moves": moves,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what :meth:`state_dict` gave.

        Raises:
            ValueError: it is of other tables; nothing is changed.
        """
        if list(state["next"]) != list(self.tables):
            raise ValueError(
                f"the state is of the tables {list(state['next'])}, here are {list(self.tables)}"
            )
        self._steps, self._next = state["steps"], dict(state["next"])
        self._noted = {name: list(lists) for name, lists in state["noted"].items()}
        self._seen = dict(state["seen"])
        for name, (up, down) in state["moves"].items():
            self._promoted[name], self._demoted[name] = DeviceCount(up), DeviceCount(down)


class ByCounts(Growth):
    """Sizes by how often ids were looked up: ``d ~ sqrt(count)``, as the budget allows.

    Args:
        model, budget, every: as of :class:`Growth`.
        half_life: a lookup counts half after so many lookups of its table; default: for ever.
        hysteresis: a row shrinks only where a count so many times its own would be too small.
        reserve: the part of every table's pages that is left free, for rows on their way.
        refit: fit ``s`` anew at every so many times that rows move.

    Raises:
        ValueError: as of :class:`Growth`, or a setting out of range.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(ResizableEmbedding(1000, 16), nn.Linear(16, 1))
        >>> growth = ByCounts(model, budget="60%", every=1)
        >>> optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
        >>> ids = torch.arange(1, 31).repeat_interleave(torch.arange(1, 31))
        >>> for _ in range(3):
        ...     model(ids).square().mean().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> model[0].sizes_of(torch.tensor([0, 1, 30])).tolist()
        [2, 16, 16]
        >>> model[0].memory_report().serving <= model[0].budget
        True
    """

    def __init__(
        self,
        model: nn.Module,
        budget: int | str | None = None,
        *,
        every: int = 50,
        half_life: float = math.inf,
        hysteresis: float = 1.5,
        reserve: float = 0.02,
        refit: int = 2,
    ) -> None:
        for what, value, low, high in (
            ("half_life", half_life, 0.0, math.inf),
            ("hysteresis", hysteresis, 1.0, math.inf),
            ("reserve", reserve, 0.0, 0.5),
            ("refit", refit, 1, math.inf),
        ):
            if not low <= value <= high or (what == "half_life" and value == 0):
                raise ValueError(f"{what} must lie between {low} and {high}, got {value}")
        super().__init__(model, budget, every=every)
        self.half_life, self.reserve, self.refit = half_life, reserve, refit
        self._slack = round(_PER_OCTAVE * math.log2(hysteresis)) if hysteresis < math.inf else _BINS
        self._counts = {name: _Counts(table) for name, table in self.tables.items()}
        self._fits = dict.fromkeys(self.tables, 0)

    def count(self, name: str, ids: Tensor, counts: Tensor) -> None:
        """See :meth:`Growth.count`."""
        self._counts[name].add(ids, counts, self.half_life)

    def fit(self, name: str) -> None:
        """See :meth:`Growth.fit`."""
        if self._fits[name] % self.refit == 0:
            self._counts[name].fit(self.tables[name], self.reserve)
        self._fits[name] += 1

    def wanted(self, name: str, ids: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Growth.wanted`."""
        return self._counts[name].levels(ids, self._slack)

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`Growth.state_dict`; the counts are among it."""
        counts = {name: counts.state_dict() for name, counts in self._counts.items()}
        return {**super().state_dict(), "counts": counts, "fits": dict(self._fits)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Growth.load_state_dict`."""
        super().load_state_dict(state)
        for name, counts in state["counts"].items():
            self._counts[name].load_state_dict(counts)
        self._fits = dict(state["fits"])


_PER_OCTAVE = 8
_BINS = 2048
_ZERO = 0
"""The bin of what was never looked up."""


class _Counts:
    """Decayed counts of a table's ids, their histogram, and from which bin on rows have a size.

    ``u`` is a count times ``2^log_weight``, the weight of a lookup at present.
    """

    def __init__(self, table: ResizableEmbedding) -> None:
        device, rows = table.arena.storage.device, table.arena.num_rows
        self.u = torch.zeros(rows, dtype=torch.float32, device=device)
        self.log_weight = 0.0
        self.histogram = torch.zeros(_BINS, dtype=torch.int64, device=device)
        self.histogram[_ZERO] = rows
        # Of every level but the first; at first no row is large enough for any.
        self.from_bin = torch.full((len(table.sizes) - 1,), _BINS, device=device)

    def bins(self, u: Tensor) -> Tensor:
        """Eighths of octaves; counts of 2^-64 to 2^190."""
        bins = (_PER_OCTAVE * u.log2()).floor() + 513
        return torch.where(u > 0, bins.clamp(1, _BINS - 1), _ZERO).long()

    def add(self, ids: Tensor, counts: Tensor, half_life: float) -> None:
        before = self.u[ids]
        after = before + counts * 2.0**self.log_weight
        self.u[ids] = after
        one = torch.ones_like(ids)
        self.histogram.index_add_(0, self.bins(after), one)
        self.histogram.index_add_(0, self.bins(before), -one)
        self.log_weight += int(counts.sum()) / half_life
        if self.log_weight > 60:
            self._rescale()

    def _rescale(self) -> None:
        octaves = math.floor(self.log_weight)
        self.u *= 2.0**-octaves
        self.log_weight -= octaves
        self.from_bin -= _PER_OCTAVE * octaves
        self.histogram = torch.bincount(self.bins(self.u), minlength=_BINS)

    def fit(self, table: ResizableEmbedding, reserve: float) -> None:
        """The largest ``s``: the lowest bins from which on rows have a size, within the budget."""
        arena, sizes = table.arena, table.sizes
        assert isinstance(arena, Arena)
        pages = arena.page_level.numel() - 1
        room = int(pages * (1 - reserve)) - len(sizes)  # a page begun for every size
        # Ids from every bin on, beyond the last none.
        above = self.histogram.flip(0).cumsum(0).flip(0)
        above = torch.cat([above, above.new_zeros(1)])
        first = torch.arange(1, _BINS + 1, device=above.device)
        taken = torch.full_like(first, arena.num_rows).double() / arena.rows_per_page[0]
        steps = [round(2 * _PER_OCTAVE * math.log2(d / sizes[1])) for d in sizes[1:]]
        for k, step in enumerate(steps, start=1):
            more = 1 / arena.rows_per_page[k] - 1 / arena.rows_per_page[k - 1]
            taken += above[(first + step).clamp(max=_BINS)] * more
        fits = taken <= room
        lowest = torch.where(fits.any(), fits.int().argmax(), _BINS - 1) + 1
        self.from_bin = lowest + torch.tensor(steps, device=above.device)

    def levels(self, ids: Tensor, slack: int) -> tuple[Tensor, Tensor]:
        bins = self.bins(self.u[ids])[:, None]
        found = bins > _ZERO
        least = (found & (bins >= self.from_bin)).sum(1)
        return least, (found & (bins + slack >= self.from_bin)).sum(1)

    def state_dict(self) -> dict[str, Any]:
        return {
            "u": self.u.clone(),
            "log_weight": self.log_weight,
            "from_bin": self.from_bin.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.u.copy_(state["u"])
        self.log_weight = state["log_weight"]
        self.from_bin.copy_(state["from_bin"])
        self.histogram = torch.bincount(self.bins(self.u), minlength=_BINS)


class _Noting:
    """A hook: notes the ids of a training forward. Copies of a module note nothing."""

    def __init__(self, growth: Growth | None = None, name: str = "") -> None:
        self._growth, self._name = growth, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._growth is None or not module.training or not torch.is_grad_enabled():
            return
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return  # computed again, in backward
        ids = args[0] if args else kwargs.get("input")
        if isinstance(ids, Tensor):
            self._growth.note(self._name, ids.values() if ids.is_nested else ids)

    def __reduce__(self) -> tuple[type[_Noting], tuple[()]]:
        return _Noting, ()


def _share(tables: Mapping[str, ResizableEmbedding], budget: int | str) -> None:
    """Cap the tables of several sizes so that all together take ``budget``."""
    plain = {
        name: table.arena.num_rows * table.sizes[-1] * table.arena.storage.element_size()
        for name, table in tables.items()
    }
    least = {name: table.least_budget for name, table in tables.items()}
    total, needed = budget_bytes(budget, sum(plain.values())), sum(least.values())
    if total < needed:
        raise ValueError(
            f"a budget of {total} bytes does not hold the rows as they are: {needed} bytes do"
        )
    lacking = {name: max(plain[name] - least[name], 0) for name in tables}
    rest, everything = total - needed, max(sum(lacking.values()), 1)
    for name, table in tables.items():
        if isinstance(table.arena, Arena):
            table.set_budget(least[name] + rest * lacking[name] // everything)
