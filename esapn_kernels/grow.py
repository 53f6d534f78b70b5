"""Rows that grow and shrink by themselves while a model trains, within a budget of bytes.

    growth = ByCounts(model, budget="25%")      before the training loop, which stays as it is

Lookups in training are noted as they happen; after the optimizer's step, at every so many and at
some of the first, rows move. ``ByCounts`` gives an id the size

    d(x) = the largest size <= s sqrt(u(x))         u: how often x was looked up, decayed

with the largest ``s`` up to ``scale`` whose rows fit the budget (``row_counts``). Work is done on
the ids looked up and on as many others, whatever the size of the table:

    count    the ids looked up since rows last moved
    fit      at every so many moves, s from a histogram of u
    shrink   of as many rows as were looked up, taken in turn from the whole table, those that
             are larger than d(x)
    grow     of the rows looked up, those that would be smaller than d(x) even if their count were
             divided by ``hysteresis``; without room more rows take their turn, then they stay, and
             ``refused`` counts them

The hysteresis keeps rows from going to and fro. It is on the side of growth, so that whatever sizes
rows keep fits the budget, and a row that becomes frequent finds room.

Another rule is a subclass of :class:`Growth`.

Source: sizes by counts against other signals: docs/comparison.md.
"""

from __future__ import annotations

import functools
import itertools
import math
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from .module import ResizableEmbedding
from .ops.counts import DeviceCount
from .row_counts import RowCounts
from .share import share_budget
from .storage.arena import Arena

__all__ = ["ByCounts", "Growth", "GrowthReport", "TableGrowth"]

_CONDENSE = 64
"""Calls whose ids are noted one by one; more are merged."""

_MANY = 1 << 16
"""Ids that are noted one by one, or four times the rows; more are merged."""

_TURNS = 8
"""How many times as many rows as were looked up may take their turn at a move, to find room."""


@dataclass(frozen=True)
class TableGrowth:
    """A table's ``rows`` of every size, bytes, lookups counted, steps, and rows moved.

    ``serving`` is what it takes, free room included, ``payload`` what its rows take of it;
    ``counters`` are beside, in training: what is noted and counted of its ids.
    """

    rows: dict[int, int]
    payload: int
    serving: int
    budget: int
    counters: int
    lookups: int
    steps: int
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
                f"{name or 'table'}: {table.serving:,} of {table.budget:,} B ({share:.1%}), rows "
                f"{table.payload:,} B; counters beside {table.counters:,} B",
                f"  {table.lookups:,} lookups, {table.steps:,} steps; {table.promoted:,} up, "
                f"{table.demoted:,} down, {table.refused:,} refused",
                f"  rows by size  {sizes}",
            ]
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Draw the rows of every size, as shares of each table.

        Raises:
            ModuleNotFoundError: matplotlib is not installed (``esapn-kernels[train]`` has it).
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 1.5 + 0.5 * len(self.tables)), layout="constrained")
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
        axes.invert_yaxis()  # the first table above, as in the text
        axes.set_xlabel("share of the rows")
        figure.suptitle("Rows of every size")
        figure.legend(title="size", loc="outside right upper", frameon=False)
        figure.savefig(path)


class Growth:
    """Notes lookups in training, and moves rows after the optimizer's step as a rule wants.

    A rule is a subclass with :meth:`wanted`.

    Args:
        model: holds the tables, also in bags and collections; those of several sizes take part.
        budget: for all tables of ``model`` together, as of :class:`~esapn_kernels.\
ResizableEmbedding`; ``"3%"`` is of all the plain tables. Each table may take what its rows take now
            and a part of the rest in proportion to the square root of its rows, as far as it needs
            it. Default: the tables' own budgets.
        every: move rows after every so many steps of the optimizer, and before the first of these
            after 1, 2, 4, 8, ... steps.

    Raises:
        TypeError: no module.
        ValueError: no table of several sizes; no budget, or one beside ``max_elements``; one that
            does not hold the rows as they are, which names the smallest that does. Nothing is
            changed.

    Notes:
        Noted are lookups by calls of modules in training mode, with gradients enabled, in compiled
        code too; a forward that is computed again in backward (activation checkpointing) counts
        once, ids out of range and the padding row never. A collection with ``on_bad_ids`` has the
        row that stands in looked up.

        Rows move after the step of the optimizer that holds them; where a fused one steps them in
        backward, after the next step of any optimizer of the model. Of replicas (see
        ``distributed``) the ids of all ranks count. Where rows are looked up by other means, as by
        replays of a CUDA graph, or stepped by what is no ``torch.optim.Optimizer``: call
        :meth:`note` and :meth:`step`.

        Build it once the model is on its device, and before compiled code has run. It lives as long
        as the model, whether or not a name holds it. A checkpoint of a run holds :meth:`state_dict`
        beside the model's and the optimizer's. A copy of the model does not grow by itself.
    """

    def __init__(
        self, model: nn.Module, budget: int | str | None = None, *, every: int = 50
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a number of steps, at least 1, got {every}")
        found = {n: m for n, m in model.named_modules() if isinstance(m, ResizableEmbedding)}
        self.tables = {n: m for n, m in found.items() if isinstance(m.arena, Arena)}
        if not self.tables:
            raise ValueError(
                "the model holds no ResizableEmbedding of several sizes: put one in the place of "
                "nn.Embedding"
            )
        for name, table in self.tables.items():
            which = f"table {name!r}" if name else "the table"
            if table in _growing:
                raise ValueError(f"{which} grows already: remove() the other first")
            if budget is None and table.budget is None:
                raise ValueError(f"{which} has no budget: give one for all, as budget='25%'")
        if budget is not None:
            share_budget(found, budget)
        self.every = every
        self._steps, self._lookups = dict.fromkeys(self.tables, 0), dict.fromkeys(self.tables, 0)
        self._noted: dict[str, list[tuple[Tensor, Tensor | None]]] = {n: [] for n in self.tables}
        # Of every table the ids noted since rows last moved, distinct, and how often.
        self._merged: dict[str, tuple[Tensor, Tensor]] = {}
        self._new: set[str] = set()
        # Where the next turn through every table begins.
        self._next = dict.fromkeys(self.tables, 0)
        self._promoted = {name: DeviceCount() for name in self.tables}
        self._demoted = {name: DeviceCount() for name in self.tables}
        # What a table refused before; negative: what it refused and is not ours.
        self._refused = {name: -table.refused for name, table in self.tables.items()}
        self._model = weakref.ref(model)
        _follow_optimizers()
        _growths.add(self)
        self._handles = []
        self._keep_pages(True)
        for name, table in self.tables.items():
            hook = _Noting(self, name)
            self._handles.append(table.register_forward_hook(hook, with_kwargs=True))
            _growing[table] = weakref.ref(hook)

    def wanted(self, name: str, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Levels that the rows of ``ids`` should have: at least, and at most.

        Args:
            name: of the table.
            ids: int64 ``[n]``, distinct.

        Returns:
            Two int64 ``[n]``: rows below the first grow if they were looked up, rows above the
            second shrink.
        """
        raise NotImplementedError(f"{type(self).__name__} needs a method wanted(name, ids)")

    def count(self, name: str, ids: Tensor, times: Tensor) -> None:
        """The rows ``ids``, distinct, were looked up so many ``times``, before they move."""

    def fit(self, name: str) -> None:
        """Called before rows move. For rules that fit something to the budget."""

    def remove(self) -> None:
        """From now on no lookup is noted and no row moves; a second call does nothing."""
        if not self._handles:
            return  # others may grow the tables by now
        _growths.discard(self)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._keep_pages(False)
        for table in self.tables.values():
            del _growing[table]

    def _keep_pages(self, kept: bool) -> None:
        """Leave a page for every smaller size to rows that shrink, or none."""
        for table in self.tables.values():
            arena: Any = table.arena
            arena.kept_pages = len(table.sizes) - 1 if kept else 0

    def note(self, name: str, ids: Tensor, times: Tensor | None = None) -> None:
        """The rows of ``ids`` were looked up, each so many ``times``; default: once."""
        noted = self._noted[name]
        # A loop may write its next batch to the same memory.
        noted.append((ids.clone(), None if times is None else times.clone()))
        self._new.add(name)
        many = max(4 * self.tables[name].arena.num_rows, _MANY)
        if len(noted) >= _CONDENSE or sum(part.numel() for part, _ in noted) > many:
            self._merge(name)

    @torch.no_grad()
    def _merge(self, name: str, *, on_all_ranks: bool = False) -> tuple[Tensor, Tensor]:
        """The distinct ids noted since rows last moved, and how often."""
        table, noted, device = self.tables[name], self._noted[name], self._device(name)
        self._noted[name] = []
        none = torch.zeros(0, dtype=torch.int64, device=device)
        once = [ids.to(device).reshape(-1) for ids, times in noted if times is None]
        ids = self._known(name, torch.cat([none, *once]))
        ids, times = _distinct(ids, table.arena.num_rows)
        counted = [(ids.to(device), n.to(device)) for ids, n in noted if n is not None]
        if (before := self._merged.get(name)) is not None:
            counted.append(before)
        if counted:
            every = torch.cat([ids, *(part for part, _ in counted)])
            ids, times = _summed(every, torch.cat([times, *(n for _, n in counted)]))
        if on_all_ranks and table.agree is not None:
            ids, times = _summed(table.agree(ids), table.agree(times))
        self._merged[name] = ids, times
        return ids, times

    def _known(self, name: str, ids: Tensor) -> Tensor:
        """Those of the ``ids`` that are in range and not the padding row's."""
        table = self.tables[name]
        known = (ids >= 0) & (ids < table.arena.num_rows)
        if table.padding_idx is not None:
            known &= ids != table.padding_idx
        return ids[known]

    def _device(self, name: str) -> torch.device:
        return self.tables[name].arena.storage.device

    def stepped_by(self, optimizer: torch.optim.Optimizer) -> list[str]:
        """The tables whose rows may move after this optimizer's step."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        names = []
        for name, table in self.tables.items():
            fused = table.arena.fused_optimizer
            if fused is None or fused.deferred:
                if id(table.arena.parameter) in held:
                    names.append(name)
            elif name in self._new and (fused is optimizer or self._holds_any(held)):
                # Stepped in backward: it is whichever optimizer steps first after a lookup.
                names.append(name)
        return names

    def _holds_any(self, held: set[int]) -> bool:
        model = self._model()
        return model is not None and any(id(p) in held for p in model.parameters())

    @torch.no_grad()
    def step(self, names: Iterable[str] | None = None) -> None:
        """The rows were stepped; after every ``every`` calls, and some of the first, they move.

        Args:
            names: of the tables; default: all.
        """
        for name in self.tables if names is None else names:
            awaits = self.tables[name].awaits_backward
            if awaits is not None and awaits():
                continue  # the step after that backward counts
            self._new.discard(name)
            self._steps[name] += 1
            if not self._is_due(self._steps[name]):
                continue
            ids, times = self._merge(name, on_all_ranks=True)
            del self._merged[name]
            if len(ids):
                self._lookups[name] += int(times.sum())
                self.count(name, ids, times)
                self.fit(name)
                self._move(name, ids)

    def _is_due(self, steps: int) -> bool:
        early = steps < self.every and steps & (steps - 1) == 0
        return early or steps % self.every == 0

    def _move(self, name: str, ids: Tensor) -> None:
        """Rows that take their turn shrink; rows that were looked up grow.

        Where these find no room, as many again take their turn, after a step of compaction.
        """
        table, rows = self.tables[name], self.tables[name].arena.num_rows
        turn = min(len(ids), rows)
        for tried in range(1, _TURNS + 1):
            before = table.refused
            full = self._shrink(name, turn)
            refused = self._grow(name, ids)
            closed = 0
            if full or refused:
                # Places of other sizes may lie between: pages that empty serve these.
                closed = table.compact(turn)
            all_turned = tried * turn >= rows and not closed
            if not refused or tried == _TURNS or all_turned:
                break
            self._refused[name] -= table.refused - before  # tried again

    def _shrink(self, name: str, count: int) -> bool:
        """Shrink those of the next ``count`` rows that are too large; whether one found no room."""
        table = self.tables[name]
        arena: Any = table.arena
        first, device = self._next[name], arena.storage.device
        turn = torch.arange(first, first + count, device=device) % arena.num_rows
        self._next[name] = (first + count) % arena.num_rows
        if table.padding_idx is not None:
            turn = turn[turn != table.padding_idx]
        most = self._levels(name, turn)[1]
        while bool((shrinks := arena.level(turn) > most).any()):
            moved = table.demote(turn, shrinks)
            self._demoted[name].prepare(device).add_(moved.sum())
            if not torch.equal(moved, shrinks):
                return True
        return False

    def _grow(self, name: str, ids: Tensor) -> bool:
        """Grow the rows of ``ids`` that are too small; whether one found no room.

        The largest first: on their way up rows take places of the sizes between.
        """
        table = self.tables[name]
        arena: Any = table.arena
        least = self._levels(name, ids)[0]
        refused = False
        for level in range(len(table.sizes) - 1, 0, -1):
            rows = ids[least == level]
            while len(rows) and bool((grows := arena.level(rows) < level).any()):
                moved = table.promote(rows, grows)
                self._promoted[name].prepare(ids.device).add_(moved.sum())
                if not torch.equal(moved, grows):
                    refused = True
                    break
        return refused

    def _levels(self, name: str, ids: Tensor) -> tuple[Tensor, Tensor]:
        """What :meth:`wanted` says.

        Raises:
            ValueError: it is not what :meth:`wanted` should give.
        """
        found = self.wanted(name, ids)
        last = len(self.tables[name].sizes) - 1
        if not isinstance(found, tuple) or len(found) != 2:
            raise ValueError("wanted must give two tensors: levels at least, and at most")
        for levels in found:
            if levels.shape != ids.shape or (
                len(ids) and not 0 <= levels.min() <= levels.max() <= last
            ):
                raise ValueError(f"wanted must give a level from 0 to {last} for each of the ids")
        return found

    def counter_bytes(self, name: str) -> int:
        """Bytes of what is noted and counted of a table's ids."""
        parts = [*self._noted[name], self._merged.get(name, ())]
        return sum(tensor.nbytes for part in parts for tensor in part if tensor is not None)

    def report(self) -> GrowthReport:
        """Sizes, bytes, moves and refusals of every table."""
        tables = {}
        for name, table in self.tables.items():
            report = table.memory_report()
            assert table.budget is not None
            tables[name] = TableGrowth(
                rows=report.rows_per_size,
                payload=report.payload,
                serving=report.serving,
                budget=table.budget,
                counters=self.counter_bytes(name),
                lookups=self._lookups[name],
                steps=self._steps[name],
                promoted=self._promoted[name].total(),
                demoted=self._demoted[name].total(),
                refused=self.refusals(name),
            )
        return GrowthReport(tables)

    def state_dict(self) -> dict[str, Any]:
        """What a run needs beside the model's state to go on as it would have.

        Of replicas, lookups since rows last moved are each rank's own.
        """
        noted = {name: [part.clone() for part in self._merge(name)] for name in self.tables}
        moves = {
            name: [self._promoted[name].total(), self._demoted[name].total(), self.refusals(name)]
            for name in self.tables
        }
        arenas: dict[str, Any] = {name: table.arena for name, table in self.tables.items()}
        return {
            "rows": {name: arena.num_rows for name, arena in arenas.items()},
            "budgets": {name: table.budget for name, table in self.tables.items()},
            "sizes": {name: table.arena.count_rows() for name, table in self.tables.items()},
            "steps": dict(self._steps),
            "lookups": dict(self._lookups),
            "noted": noted,
            "new": sorted(self._new),
            "next": dict(self._next),
            "moves": moves,
            # Rows move to other places, and find room at other times, where these differ.
            "free": {name: arena.free_places() for name, arena in arenas.items()},
            "cursors": {name: arena.cursor for name, arena in arenas.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what :meth:`state_dict` gave, once the model has its own.

        Raises:
            ValueError: it is of other tables or of another rule, which is found before anything
                changes; or the model has not loaded the state that belongs to it.
        """
        rows = {name: table.arena.num_rows for name, table in self.tables.items()}
        if state.get("rows") != rows:
            raise ValueError(f"the state is of the tables {state.get('rows')}, here are {rows}")
        if state.keys() != self.state_dict().keys():
            raise ValueError(f"the state is of another rule than {type(self).__name__}")
        sizes = {name: table.arena.count_rows() for name, table in self.tables.items()}
        if state["sizes"] != sizes:
            raise ValueError("the rows have other sizes than in the state: load the model's first")
        for name, table in self.tables.items():
            arena: Any = table.arena
            if state["budgets"][name] != table.budget:
                table.set_budget(state["budgets"][name])
            arena.order_free_places(state["free"][name])
            arena.cursor = state["cursors"][name]
            up, down, refused = state["moves"][name]
            self._promoted[name], self._demoted[name] = DeviceCount(up), DeviceCount(down)
            self._refused[name] = refused - table.refused
            ids, times = (part.to(self._device(name)) for part in state["noted"][name])
            self._merged[name], self._noted[name] = (ids, times), []
        self._steps, self._next = dict(state["steps"]), dict(state["next"])
        self._lookups = dict(state["lookups"])
        self._new = set(state["new"])

    def check_saved(self) -> None:
        """Refuse a rule that counts and does not say what :meth:`row_state` is of it.

        Raises:
            NotImplementedError: it is one.
        """
        own = type(self)
        if own.count is not Growth.count and own.row_state is Growth.row_state:
            raise NotImplementedError(
                f"{own.__name__} counts lookups, and a checkpoint of several ranks needs what it "
                "counts of each row: give it row_state and load_row_state"
            )

    def row_state(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What is counted of a table's rows, ``[rows]`` each, and numbers beside it.

        Unlike :meth:`state_dict` it can be cut and joined where rows are spread over other tables,
        as when a run goes on on another number of ranks.
        """
        ids, times = self._merge(name)
        noted = torch.zeros(self.tables[name].arena.num_rows, dtype=torch.int32, device=ids.device)
        noted[ids] = times.int()
        numbers = {
            "rule": type(self).__name__,
            "steps": self._steps[name],
            "lookups": self._lookups[name],
            "next": self._next[name],
            "moves": [self._promoted[name].total(), self._demoted[name].total()],
            "refused": self.refusals(name),
        }
        return {"noted": noted}, numbers

    def load_row_state(
        self, name: str, rows: Mapping[str, Tensor], numbers: Mapping[str, Any], *, same: bool
    ) -> None:
        """Take what :meth:`row_state` gave, once the table has its rows.

        Args:
            same: the numbers are of just these rows; else only the number of steps is taken.

        Raises:
            ValueError: they are of another rule; nothing is changed.
        """
        if numbers["rule"] != type(self).__name__:
            raise ValueError(
                f"the growth that was saved is a {numbers['rule']}, this is a {type(self).__name__}"
            )
        ids = rows["noted"].nonzero()[:, 0].to(self._device(name))
        times = rows["noted"].to(ids.device)[ids].long()
        self._merged[name], self._noted[name] = (ids, times), []
        self._new.discard(name)
        self._steps[name] = numbers["steps"]
        up, down = numbers["moves"] if same else (0, 0)
        self._promoted[name], self._demoted[name] = DeviceCount(up), DeviceCount(down)
        self._refused[name] = (numbers["refused"] if same else 0) - self.tables[name].refused
        self._lookups[name] = numbers["lookups"] if same else 0
        self._next[name] = numbers["next"] if same else 0

    def refusals(self, name: str) -> int:
        """Rows of a table that stayed for want of room, once a move."""
        return self._refused[name] + self.tables[name].refused


class ByCounts(Growth):
    """Sizes by how often ids were looked up: ``d ~ sqrt(count)``, as the budget allows.

    Args:
        model, budget, every: as of :class:`Growth`.
        half_life: a lookup counts half after so many lookups of its table, one at least; default:
            for ever.
        scale: the most that ``s`` may be: a row of size ``d`` was looked up ``(d / scale)^2`` times
            at least, whatever room there is.
        hysteresis: a row grows once its count is so many times what its next size takes, and
            shrinks once it is less than what its size takes.
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
        >>> model[0].sizes_of(torch.tensor([0, 8, 30])).tolist()
        [2, 8, 16]
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
        scale: float = 2.0,
        hysteresis: float = 1.25,
        reserve: float = 0.02,
        refit: int = 2,
    ) -> None:
        for what, value, low, high in (
            ("half_life", half_life, 1, math.inf),
            ("scale", scale, 1e-3, math.inf),
            ("hysteresis", hysteresis, 1.0, math.inf),
            ("reserve", reserve, 0.0, 0.5),
            ("refit", refit, 1, math.inf),
        ):
            if not low <= value <= high:
                raise ValueError(f"{what} must lie between {low} and {high}, got {value}")
        super().__init__(model, budget, every=every)
        self.hysteresis, self.reserve, self.refit = hysteresis, reserve, refit
        self.scale = scale
        self._counts = {}
        for name, table in self.tables.items():
            assert isinstance(table.arena, Arena)
            self._counts[name] = RowCounts(table.arena, half_life, table.padding_idx is not None)
        self._fits = dict.fromkeys(self.tables, 0)

    def count(self, name: str, ids: Tensor, times: Tensor) -> None:
        """See :meth:`Growth.count`."""
        self._counts[name].add(ids, times)

    def counter_bytes(self, name: str) -> int:
        """See :meth:`Growth.counter_bytes`."""
        return super().counter_bytes(name) + self._counts[name].nbytes

    def fit(self, name: str) -> None:
        """See :meth:`Growth.fit`."""
        if self._fits[name] % self.refit == 0:
            self._counts[name].fit(self.reserve, self.scale)
        self._fits[name] += 1

    def wanted(self, name: str, ids: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Growth.wanted`."""
        counts = self._counts[name]
        return counts.levels(ids, 1 / self.hysteresis), counts.levels(ids)

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

    def row_state(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """See :meth:`Growth.row_state`; the counts are among it."""
        rows, numbers = super().row_state(name)
        counts = self._counts[name]
        numbers["fits"], numbers["least"] = self._fits[name], counts.decayed_least()
        numbers["log_weight"] = counts.log_weight
        return {**rows, "counts": counts.decayed()}, numbers

    def load_row_state(
        self, name: str, rows: Mapping[str, Tensor], numbers: Mapping[str, Any], *, same: bool
    ) -> None:
        """See :meth:`Growth.load_row_state`."""
        super().load_row_state(name, rows, numbers, same=same)
        counts = self._counts[name]
        if same:
            counts.load_decayed(rows["counts"], numbers["least"], numbers["log_weight"])
            self._fits[name] = numbers["fits"]
        else:
            counts.load_decayed(rows["counts"], None)
            self._fits[name] = 0  # fitted before rows move


class _Noting:
    """A hook: notes the ids of a training forward. Copies of a module note nothing."""

    def __init__(self, growth: Growth | None = None, name: str = "") -> None:
        self._growth, self._name = growth, name
        # For compiled code.
        self._mark, self._key = torch.zeros(()), next(_keys)
        _notings[self._key] = self

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if self._growth is None or not module.training or not torch.is_grad_enabled():
            return
        ids = args[0] if args else kwargs.get("input")
        if not isinstance(ids, Tensor) or ids.is_meta:
            return
        if ids.is_cuda and torch.cuda.is_current_stream_capturing():
            return  # replays run no hook
        if ids.is_nested:
            jagged = ids.layout == torch.jagged
            ids = ids.values() if jagged else torch.cat([i.reshape(-1) for i in ids.unbind()])
        if torch.compiler.is_compiling():
            if not torch.compiler.is_exporting():
                _note_compiled(self._mark, ids, self._key)
        elif not (_is_recomputed() or isinstance(ids, FakeTensor)):
            while torch._C._functorch.is_batchedtensor(ids):
                ids = torch._C._functorch.get_unwrapped(ids)
            self._growth.note(self._name, ids)

    def note(self, ids: Tensor, times: Tensor | None = None) -> None:
        """Note ids that the hook did not see."""
        if self._growth is not None:
            self._growth.note(self._name, ids, times)

    def __reduce__(self) -> tuple[type[_Noting], tuple[()]]:
        return _Noting, ()


_growing: weakref.WeakKeyDictionary[ResizableEmbedding, weakref.ref[_Noting]]
_growing = weakref.WeakKeyDictionary()
"""Tables whose rows grow by themselves, and the hook that each of them holds."""


def is_growing(table: ResizableEmbedding) -> bool:
    """Whether the rows of ``table`` grow by themselves."""
    return table in _growing


def note_lookup(table: ResizableEmbedding, ids: Tensor, times: Tensor | None) -> None:
    """A lookup in training that no hook sees: by ``table.forward``, of ids known to be in range.

    Args:
        ids: ``[n]``.
        times: ``[n]``, how often each was looked up; default: once.
    """
    hook = _growing.get(table)
    if hook is not None and (noting := hook()) is not None:
        noting.note(ids, times)


_growths: weakref.WeakSet[Growth] = weakref.WeakSet()
"""Those whose rows move after steps of optimizers."""


@functools.cache
def _follow_optimizers() -> None:
    """Hook every optimizer, once and for all.

    A hook of each growth would be removed with it, at any moment, while torch walks through hooks.
    """

    def after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for growth in list(_growths):
            if names := growth.stepped_by(optimizer):
                growth.step(names)

    register_optimizer_step_post_hook(after_step)


_keys = itertools.count()
_notings: weakref.WeakValueDictionary[int, _Noting] = weakref.WeakValueDictionary()


@torch.library.custom_op("esapn_kernels::note_lookup", mutates_args=("mark",))
def _note_compiled(mark: Tensor, ids: Tensor, key: int) -> None:
    """Note a lookup of compiled code, once a call; what is written to no tensor is left out."""
    if (noting := _notings.get(key)) is not None:
        noting.note(ids)


@_note_compiled.register_fake
def _(mark: Tensor, ids: Tensor, key: int) -> None:
    return None


def _is_recomputed() -> bool:
    """Whether activation checkpointing computes a forward again whose first run was noted.

    With ``use_reentrant=True`` the first run has no gradients, so that the second is noted.
    """
    if torch._C._current_graph_task_id() == -1:
        return False
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _distinct(ids: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The distinct of the ``ids`` of so many rows, in ascending order, and how often."""
    if rows > 4 * len(ids):
        ordered: Any = ids.sort()[0].unique_consecutive(return_counts=True)
        return ordered[0], ordered[1]
    times = torch.bincount(ids, minlength=rows)
    ids = times.nonzero()[:, 0]
    return ids, times[ids]


def _summed(ids: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct ``ids``, in ascending order, and the sum of ``times`` of each."""
    ids, order = ids.sort(stable=True)
    ids, where = ids.unique_consecutive(return_inverse=True)
    return ids, torch.zeros_like(ids).index_add_(0, where, times[order])
