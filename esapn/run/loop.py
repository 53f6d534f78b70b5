"""One run: a method walks a stream once, predicting every batch before it learns it.

All methods share the stream, the inference layer, the optimizers and the initialisation; what
differs is what carries the rows and who decides on their sizes:

    esapn, always, never, random, thresholds, power      ResizableEmbedding + SizeSearch
    fixed                                                ResizableEmbedding of one size
    darts, autoemb                                       SoftEmbedding
    biases                                               no embedding
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from esapn_kernels import ResizableEmbedding, optim

from ..config import ConfigError, SearchConfig
from ..data.ratings import Ratings
from ..data.stream import NUM_CLASSES, Batch, Stream, build_stream
from ..models.biases import Biases
from ..models.soft import SoftEmbedding
from ..models.two_tower import SoftTwoTower, TwoTower, event_losses
from ..search import Counters, SizeSearch
from .metrics import Prequential

__all__ = ["Run", "RunResult", "build_model", "device_of", "stream_of"]

SIDES = ("user", "item")


def device_of(name: str) -> str:
    """``auto`` is a GPU where there is one.

    Raises:
        ConfigError: ``cuda``, and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: no CUDA device was found")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def stream_of(config: SearchConfig, ratings: Ratings) -> Stream:
    """The stream that a run of ``config`` walks, on its device."""
    return build_stream(
        ratings,
        task=config.task,
        order=config.order,
        seed=config.order_seed,
        batch_size=config.batch_size,
        train_fraction=config.train_fraction,
        history=config.history,
        device=device_of(config.device),
    )


def build_model(config: SearchConfig, stream: Stream) -> TwoTower | SoftTwoTower | Biases:
    """The recommender of a run; resizable rows start at the smallest size (FIXED: its only one)."""
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
    return TwoTower(
        *rows,
        sizes=config.row_sizes,
        n_outputs=n_outputs,
        hidden=config.hidden,
        init_std=config.init_std,
        plain=plain,
        plain_head=plain_head,
        hops=config.hops,
    )


class Run:
    """A recommender, its optimizers, the search if there is one, and the measures.

    Args:
        config: the run's settings.
        stream: events with their counters, on the device where everything runs.

    Example:
        >>> from esapn.data.load import load_ratings
        >>> from esapn.data.stream import build_stream
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
        self.optimizers = self._optimizers()
        self.search: SizeSearch | None = None
        if isinstance(self.model, TwoTower) and config.method != "fixed":
            tables = {name: getattr(self.model, name) for name in SIDES}
            self.search = SizeSearch(tables, config)
        self.measures = Prequential(stream.n_train, len(stream.user), device)
        self.log: list[dict[str, Any]] = []
        self.seconds = {"cpu": 0.0, "wall": 0.0}
        # Of the serving bytes over the events.
        self.peak_bytes = 0
        self.byte_events = 0.0
        self.best = {"loss": math.inf, "line": -1}

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """Rows, soft weights, and the rest: as the configuration says."""
        config, model = self.config, self.model
        if isinstance(model, Biases):
            return []
        rows, soft = [], []
        built: list[torch.optim.Optimizer] = []
        if isinstance(model, SoftTwoTower):
            for table in (model.user, model.item):
                rows.append(table.rows.weight)
                soft += table.soft_parameters()
            built.append(torch.optim.Adam(soft, lr=config.policy_lr, fused=True))
        else:
            rows = [model.user.arena.storage, model.item.arena.storage]
        apart = {id(p) for p in [*rows, *soft]}
        if config.row_optimizer == "adam" and config.row_lr == config.lr:
            apart -= {id(p) for p in rows}
        elif isinstance(model, SoftTwoTower):
            kind = torch.optim.Adam if config.row_optimizer == "adam" else torch.optim.Adagrad
            built.append(kind(rows, lr=config.row_lr))
        elif config.row_optimizer == "adam":
            built.append(torch.optim.Adam(rows, lr=config.row_lr, fused=True))
        else:
            built.append(optim.Adagrad([model.user, model.item], lr=config.row_lr))
        rest = [p for p in model.parameters() if id(p) not in apart and p.requires_grad]
        return [*built, torch.optim.Adam(rest, lr=config.lr, fused=True)]

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
        if self.search is not None:
            counters = {name: _counters(batch, name) for name in SIDES}
            self.search.grow({"user": batch.user, "item": batch.item}, counters)
        logits = self._predict(batch)
        loss = event_losses(logits, batch.target)
        frequency = torch.stack([batch.user_freq, batch.item_freq])
        self.measures.record(logits.detach(), batch.target, loss.detach(), frequency)
        if isinstance(self.model, Biases):
            self.model.learn(batch.user, batch.item, batch.target)
            return loss
        loss.sum().backward()
        if self.search is not None:
            self.search.learn(loss)
        for optimizer in self.optimizers:
            optimizer.step()
            # Now rather than before backward: a row that grows in between has no gradient to reset.
            optimizer.zero_grad()
        return loss.detach()

    def _predict(self, batch: Batch) -> Tensor:
        if isinstance(self.model, SoftTwoTower):
            user = batch.user, batch.user_freq, batch.user_last
            item = batch.item, batch.item_freq, batch.item_last
            return self.model(user, item)
        logits: Tensor = self.model(batch.user, batch.item)
        return logits

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
        line: dict[str, Any] = {
            "events": self.measures.seen,
            "loss": loss,
            "accuracy": accuracy,
        }
        memory = self.memory()
        line["serving_bytes"] = sum(side["serving"] for side in memory.values())
        for name, side in memory.items():
            counts = side["rows_per_size"]
            total = sum(int(size) * n for size, n in counts.items())
            line[f"mean_{name}_size"] = total / max(sum(counts.values()), 1)
            line[f"{name}_rows"] = list(counts.values())
        self.peak_bytes = max(self.peak_bytes, line["serving_bytes"])
        self.byte_events += line["serving_bytes"] * (line["events"] - before)
        self.log.append(line)
        if loss < self.best["loss"]:
            self.best = {"loss": loss, "line": len(self.log) - 1}

    def memory(self) -> dict[str, dict[str, Any]]:
        """Bytes of both sides, really allocated; of one size, those of a plain table."""
        config, found = self.config, {}
        for name, rows in zip(SIDES, (self.stream.n_users, self.stream.n_items), strict=True):
            fixed = rows * config.sizes[-1] * 4
            if isinstance(self.model, Biases):
                numbers = getattr(self.model, name)
                found[name] = _plain_memory({}, numbers.nbytes, 0, fixed)
            elif isinstance(self.model, SoftTwoTower):
                found[name] = self._soft_memory(getattr(self.model, name), fixed)
            else:
                table: ResizableEmbedding = getattr(self.model, name)
                report = table.memory_report()
                counts = {str(size): n for size, n in report.rows_per_size.items()}
                if len(table.sizes) == 1:
                    found[name] = _plain_memory(counts, report.payload, report.optimizer, fixed)
                    continue
                found[name] = {
                    "rows_per_size": counts,
                    "payload": report.payload,
                    "slack": report.slack,
                    "locations": report.locations,
                    "chain": report.chain,
                    "optimizer": report.optimizer,
                    "serving": report.serving,
                    "fixed": fixed,
                }
        return found

    def _soft_memory(self, table: SoftEmbedding, fixed: int) -> dict[str, Any]:
        weights = table.logits if table.method == "darts" else table.previous
        payload = table.rows.weight.nbytes + weights.nbytes
        lifts = sum(p.nbytes for p in table.lifts.parameters())
        states = [o.state.get(table.rows.weight, {}) for o in self.optimizers]
        held = [v for state in states for v in state.values() if isinstance(v, Tensor)]
        optimizer = sum(v.nbytes for v in held if v.dim())
        counts = {str(sum(table.sizes)): table.num_embeddings}
        return _plain_memory(counts, payload, optimizer, fixed, lifts)

    def result(self) -> RunResult:
        """Measures so far; resizable tables are compacted, as they would be served."""
        if isinstance(self.model, TwoTower):
            # Rows without the holes that growth leaves.
            self.model.user.compact()
            self.model.item.compact()
        seen, cut = self.measures.seen, self.stream.n_train
        memory = self.memory()
        serving = sum(side["serving"] for side in memory.values())
        training = sum(side["optimizer"] + side["serving"] for side in memory.values())
        if self.search is not None:
            training += _nbytes(self.search)
        return RunResult(
            train=self.measures.summary("train"),
            test=self.measures.summary("test", self.stream.labels(cut, max(seen, cut))),
            memory=memory,
            bytes={
                "serving": serving,
                "serving_peak": max(self.peak_bytes, serving),
                "serving_mean": self.byte_events / max(seen, 1),
                "training": training,
                "fixed128": sum(side["fixed"] for side in memory.values()),
            },
            log=self.log,
            by_frequency=self.measures.by_frequency(),
            sizes_by_frequency=self._sizes_by_frequency(),
            cpu_seconds=self.seconds["cpu"],
            wall_seconds=self.seconds["wall"],
            stopped_early=self.index < len(self.stream.bounds),
            run=self,
        )

    def _sizes_by_frequency(self) -> dict[str, list[dict[str, Any]]]:
        """Mean final size of the IDs seen [1, 2), [2, 4), [4, 8), ... times, per side."""
        if not isinstance(self.model, TwoTower):
            return {}
        found: dict[str, list[dict[str, Any]]] = {}
        for name in SIDES:
            table: ResizableEmbedding = getattr(self.model, name)
            ids = getattr(self.stream, name)[: self.measures.seen]
            count = torch.bincount(ids, minlength=table.num_embeddings).cpu()
            sizes = table.sizes_of().double().cpu()
            bucket = torch.log2(count.clamp(min=1).double()).long()
            found[name] = [
                {
                    "from": 2**b,
                    "to": 2 ** (b + 1),
                    "ids": int(mine.sum()),
                    "mean_size": sizes[mine].mean().item(),
                }
                for b in range(int(bucket.max()) + 1)
                if (mine := (bucket == b) & (count > 0)).any()
            ]
        return found

    def state_dict(self) -> dict[str, Any]:
        """Everything that the run's future depends on; tensors, numbers, strings and lists."""
        return {
            "index": self.index,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "search": None if self.search is None else self.search.state_dict(),
            "measures": self.measures.state_dict(),
            "log": self.log,
            "seconds": self.seconds,
            "bytes": [self.peak_bytes, self.byte_events],
            "best": self.best,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the run that gave ``state`` stood; on a CPU bit for bit."""
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            # Without gradients this moves nothing: it only makes the arenas follow the optimizer,
            # whose state then stays with the rows from the first promotion on.
            optimizer.step()
            optimizer.load_state_dict(saved)
        if self.search is not None:
            self.search.load_state_dict(state["search"])
        self.measures.load_state_dict(state["measures"])
        self.index, self.log, self.seconds = state["index"], state["log"], state["seconds"]
        self.peak_bytes, self.byte_events = state["bytes"]
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


def _nbytes(module: nn.Module) -> int:
    return sum(t.nbytes for t in [*module.parameters(), *module.buffers()])


def _plain_memory(
    counts: dict[str, int], payload: int, optimizer: int, fixed: int, chain: int = 0
) -> dict[str, Any]:
    return {
        "rows_per_size": counts,
        "payload": payload,
        "slack": 0,
        "locations": 0,
        "chain": chain,
        "optimizer": optimizer,
        "serving": payload + chain,
        "fixed": fixed,
    }
