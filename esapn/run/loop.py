"""One run: a method walks a stream once, predicting every batch before it learns it.

All methods share the stream, the inference layer, the optimizers and the initialisation; what
differs is what carries the rows and what decides on their sizes:

    esapn, always, never, random, thresholds, power      ResizableEmbedding + SizeSearch
    counts                                               ResizableEmbedding + ByCounts
    fixed                                                ResizableEmbedding of one size
    darts, autoemb                                       SoftEmbedding
    biases                                               no embedding
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from esapn_kernels import ResizableEmbedding
from esapn_kernels.budget import budget_bytes
from esapn_kernels.grow import ByCounts
from esapn_kernels.ops.backend import resolve_backend
from esapn_kernels.share import share_budget
from esapn_kernels.storage.arena import Arena

from ..config import ConfigError, SearchConfig
from ..data.ratings import SIDES, Ratings
from ..data.stream import NUM_CLASSES, Batch, Stream, build_stream
from ..models.biases import Biases
from ..models.recommender import Events, Recommender
from ..models.soft import SoftEmbedding
from ..models.two_tower import SoftTwoTower, TwoTower, event_losses
from ..search import SizeSearch
from ..table_state import Counters
from .memory import ServingBytes, bytes_of, describe, sizes_by_frequency
from .metrics import Prequential

__all__ = ["Run", "RunResult", "build_model", "check_budget", "device_of", "stream_of"]


def device_of(name: str) -> str:
    """``auto`` is a GPU where there is one.

    Raises:
        ConfigError: ``cuda``, and there is none; or the kernels named for it cannot run.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: no CUDA device was found")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolve_backend("auto", torch.device(name))
    except (RuntimeError, ValueError) as error:
        raise ConfigError(str(error)) from None
    return name


def stream_of(config: SearchConfig, ratings: Ratings) -> Stream:
    """The stream that a run of ``config`` walks, on its device."""
    return build_stream(
        ratings,
        task=config.task,
        positive_above=config.positive_above,
        order=config.order,
        seed=config.order_seed,
        batch_size=config.batch_size,
        train_fraction=config.train_fraction,
        history=config.history,
        device=device_of(config.device),
    )


def build_model(config: SearchConfig, stream: Stream) -> Recommender:
    """The recommender of a run; resizable rows start at the smallest size (FIXED: its only one).

    Raises:
        ConfigError: the budget does not hold the rows.
    """
    n_outputs = 1 if config.task == "binary" else NUM_CLASSES
    rows = stream.n_users, stream.n_items
    if config.method == "biases":
        return Biases(*rows, n_outputs=n_outputs)
    plain, plain_head = config.tower == "plain", config.head == "plain"
    if config.method in ("darts", "autoemb"):
        tables = [
            SoftEmbedding(
                n,
                config.sizes,
                method=config.method,
                init_std=config.init_std,
                plain=plain,
                frequency_dim=config.frequency_dim,
                max_frequency=config.max_frequency,
                hidden=config.policy_hidden,
            )
            for n in rows
        ]
        return SoftTwoTower(
            *tables, n_outputs=n_outputs, hidden=config.hidden, plain_head=plain_head
        )
    check_budget(config, stream)
    model = TwoTower(
        *rows,
        sizes=config.row_sizes,
        n_outputs=n_outputs,
        hidden=config.hidden,
        init_std=config.init_std,
        plain=plain,
        plain_head=plain_head,
        hops=config.hops,
    )
    if config.budget:
        share_budget(model.tables(), _budget(config, stream))
    return model


def _budget(config: SearchConfig, stream: Stream) -> int:
    """Bytes of both tables; a share is of the plain tables at the last of ``--sizes``."""
    plain = (stream.n_users + stream.n_items) * config.sizes[-1] * 4
    return budget_bytes(config.budget, plain)


def check_budget(config: SearchConfig, stream: Stream) -> None:
    """Refuse a budget that does not hold the rows, before anything is learnt.

    Raises:
        ConfigError: it does not.
    """
    if not config.budget:
        return
    with torch.device("meta"):
        tables = [
            ResizableEmbedding(n, sizes=config.row_sizes, init=config.hops)
            for n in (stream.n_users, stream.n_items)
        ]
    least = sum(t.nbytes for table in tables for t in (*table.parameters(), *table.buffers()))
    if _budget(config, stream) < least:
        raise ConfigError(
            f"--budget {config.budget} does not hold the rows at their first size: {least} bytes do"
        )


def _optimizers(config: SearchConfig, model: Recommender) -> list[torch.optim.Optimizer]:
    """Of soft sizes, of rows if their settings differ, of tails, and one of all the rest."""
    built: list[torch.optim.Optimizer] = []
    rows, soft = model.rows(), model.soft_parameters()
    apart = {id(p) for p in soft}
    if soft:
        built.append(torch.optim.Adam(soft, lr=config.policy_lr, fused=True))
    if rows and (config.row_optimizer, config.row_lr) != ("adam", config.lr):
        name, start = config.row_optimizer, config.row_accumulator
        built.append(model.row_optimizer(name, config.row_lr, start))
        apart |= {id(p) for p in rows}
    if tails := model.tails():
        built.append(torch.optim.Adam(tails, lr=config.tail_lr, fused=True))
        apart |= {id(p) for p in tails}
    rest = [p for p in model.parameters() if id(p) not in apart and p.requires_grad]
    if rest:
        built.append(torch.optim.Adam(rest, lr=config.lr, fused=True))
    return built


class Run:
    """A recommender, its optimizers, the search if there is one, and the measures.

    Args:
        config: the run's settings.
        stream: events with their counters, on the device where everything runs.

    Example:
        >>> from esapn.data.load import load_ratings
        >>> stream = build_stream(load_ratings("synthetic", events=2000), batch_size=100)
        >>> run = Run(SearchConfig(batch_size=100), stream)
        >>> run.step().shape, run.index
        (torch.Size([100]), 1)
    """

    def __init__(self, config: SearchConfig, stream: Stream) -> None:
        self.config = config
        self.stream = stream
        self.index = 0
        device = stream.user.device
        torch.manual_seed(config.seed)
        self.model = build_model(config, stream).to(device)
        self.optimizers = _optimizers(config, self.model)
        self.search: SizeSearch | None = None
        self.growth: ByCounts | None = None
        tables = self.model.tables()
        if config.method == "counts":
            half_life = config.half_life or math.inf
            self.growth = ByCounts(
                self.model,
                every=config.move_every,
                half_life=half_life,
                scale=config.count_scale,
            )
        elif tables and config.method != "fixed":
            self.search = SizeSearch(tables, config)
        self.measures = Prequential(stream.n_train, len(stream.user), device)
        self.log: list[dict[str, Any]] = []
        self.seconds = {"cpu": 0.0, "wall": 0.0}
        self.serving = ServingBytes()
        # By side the rows that stayed for want of room, before the run was resumed.
        self.refused: dict[str, int] = {}
        self.best = {"loss": math.inf, "line": -1}

    @property
    def done(self) -> bool:
        """Whether the stream has ended, or the loss stopped falling (``patience``)."""
        stalled = len(self.log) - 1 - self.best["line"]
        gives_up = 0 < self.config.patience <= stalled
        return gives_up or self.index == len(self.stream.bounds)

    def step(self) -> Tensor:
        """The next batch: grow, predict and record, learn; its losses ``[B]`` before learning."""
        batch = self.stream.batch(self.index)
        self.index += 1
        counters = {name: _counters(batch, name) for name in SIDES}
        if self.search is not None:
            self.search.grow({"user": batch.user, "item": batch.item}, counters)
        user, item = (Events(getattr(batch, name), *counters[name][:2]) for name in SIDES)
        logits = self.model.predict(user, item)
        loss = event_losses(logits, batch.target)
        frequency = torch.stack([batch.user_freq, batch.item_freq])
        self.measures.record(logits.detach(), batch.target, loss.detach(), frequency)
        self.model.learn(batch.user, batch.item, batch.target, loss)
        if self.search is not None:
            self.search.learn(loss)
        for optimizer in self.optimizers:
            optimizer.step()
            # Now rather than before backward: a row that grows in between has no gradient to reset.
            optimizer.zero_grad()
        return loss.detach()

    def walk(
        self,
        progress: Callable[[int, dict[str, Any]], None] | None = None,
        pause: Callable[[Run], None] | None = None,
    ) -> RunResult:
        """Walk the rest of the stream; the test part goes on learning, prequentially.

        Args:
            progress: called every ``log_every`` batches with the number of batches done and the
                loss, accuracy, mean sizes and serving bytes of the batches since the last call.
            pause: called after it with this run; may save a checkpoint, or raise.
        """
        last = len(self.stream.bounds)
        while not self.done:
            cpu, wall = time.process_time(), time.perf_counter()
            self.step()
            logs = self.index % self.config.log_every == 0 or self.index == last
            if logs:
                self._log()
            self.seconds["cpu"] += time.process_time() - cpu
            self.seconds["wall"] += time.perf_counter() - wall
            if logs:
                if progress is not None:
                    progress(self.index, self.log[-1])
                if pause is not None:
                    pause(self)
        return self.result()

    def _log(self) -> None:
        loss, accuracy = self.measures.window()
        before = self.log[-1]["events"] if self.log else 0
        memory = self.memory()
        line: dict[str, Any] = {
            "events": self.measures.seen,
            "loss": loss,
            "accuracy": accuracy,
            "serving_bytes": sum(side["serving"] for side in memory.values()),
        }
        for name, side in memory.items():
            counts = side["rows_per_size"]
            total = sum(int(size) * n for size, n in counts.items())
            line[f"mean_{name}_size"] = total / max(sum(counts.values()), 1)
            line[f"{name}_rows"] = list(counts.values())
        self.serving.add(line["serving_bytes"], line["events"] - before)
        self.log.append(line)
        if loss < self.best["loss"]:
            self.best = {"loss": loss, "line": len(self.log) - 1}

    def memory(self) -> dict[str, dict[str, Any]]:
        """Bytes of both sides, really allocated; of one size, those of a plain table."""
        ids = {"user": self.stream.n_users, "item": self.stream.n_items}
        found = describe(self.model.memory(self.optimizers), ids, self.config.sizes[-1])
        for name, before in self.refused.items():
            found[name]["refused"] += before
        if self.growth is not None:
            # A table counts every try, and those before a checkpoint not.
            for name in found:
                found[name]["refused"] = self.growth.refusals(name)
        return found

    def result(self) -> RunResult:
        """Measures so far; resizable tables are compacted, as they would be served."""
        tables = self.model.tables()
        for table in tables.values():
            # Rows without the holes that growth leaves.
            table.compact()
        seen, cut = self.measures.seen, self.stream.n_train
        memory = self.memory()
        return RunResult(
            train=self.measures.summary("train"),
            test=self.measures.summary("test", self.stream.labels(cut, max(seen, cut))),
            memory=memory,
            bytes=bytes_of(memory, self.serving, seen, self._counters()),
            log=self.log,
            by_frequency=self.measures.by_frequency(),
            sizes_by_frequency={
                name: sizes_by_frequency(table, getattr(self.stream, name)[:seen])
                for name, table in tables.items()
            },
            cpu_seconds=self.seconds["cpu"],
            wall_seconds=self.seconds["wall"],
            stopped_early=self.index < len(self.stream.bounds),
            run=self,
        )

    def _counters(self) -> int:
        """Bytes of what decides on sizes: the search's policies and histories, or counts."""
        if self.growth is not None:
            return sum(table.counters for table in self.growth.report().tables.values())
        if self.search is not None:
            held = (*self.search.parameters(), *self.search.buffers())
            return sum(tensor.nbytes for tensor in held)
        return 0

    def _arenas(self) -> Iterator[tuple[str, Arena]]:
        """Where rows of several sizes lie, by side."""
        for name, table in self.model.tables().items():
            if isinstance(table.arena, Arena):
                yield name, table.arena

    def state_dict(self) -> dict[str, Any]:
        """Everything that the run's future depends on; tensors, numbers, strings and lists."""
        return {
            "index": self.index,
            "model": self.model.state_dict(),
            "free": {name: arena.free_places() for name, arena in self._arenas()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "search": None if self.search is None else self.search.state_dict(),
            "growth": None if self.growth is None else self.growth.state_dict(),
            "measures": self.measures.state_dict(),
            "log": self.log,
            "seconds": self.seconds,
            "bytes": [self.serving.peak, self.serving.total],
            "refused": {name: side["refused"] for name, side in self.memory().items()},
            "best": self.best,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the run that gave ``state`` stood; on a CPU bit for bit."""
        if self.config.budget and "growth" not in state:
            # Of a run when a table's part of the budget was that of its IDs.
            ids = {"user": self.stream.n_users, "item": self.stream.n_items}
            whole = _budget(self.config, self.stream)
            for name, table in self.model.tables().items():
                table.set_budget(max(whole * ids[name] // sum(ids.values()), 1))
        self.model.load_state_dict(state["model"])
        for name, arena in self._arenas():
            arena.order_free_places(state["free"][name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            # Without gradients this moves nothing: it only makes the arenas follow the optimizer,
            # whose state then stays with the rows from the first promotion on.
            optimizer.step()
            optimizer.load_state_dict(saved)
        if self.search is not None:
            self.search.load_state_dict(state["search"])
        if self.growth is not None:
            self.growth.load_state_dict(state["growth"])
        self.measures.load_state_dict(state["measures"])
        self.index, self.log, self.seconds = state["index"], state["log"], state["seconds"]
        self.serving.peak, self.serving.total = state["bytes"]
        self.refused = dict(state.get("refused", {}))
        self.best = state["best"]


@dataclass
class RunResult:
    """What a run gives: measures of both parts, memory, the log and the times."""

    train: dict[str, float]
    test: dict[str, float]
    memory: dict[str, dict[str, Any]]
    bytes: dict[str, float]
    log: list[dict[str, Any]]
    by_frequency: dict[str, list[dict[str, Any]]]
    sizes_by_frequency: dict[str, list[dict[str, Any]]]
    cpu_seconds: float
    wall_seconds: float
    stopped_early: bool
    run: Run = field(repr=False)


def _counters(batch: Batch, name: str) -> Counters:
    return Counters(*(getattr(batch, name + part) for part in ("_freq", "_last", "_keep")))
