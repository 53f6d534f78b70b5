"""The streaming size search, step by step as published (ESAPN, SIGIR 2020).

For every batch of the stream:

1. The policies sample keep or enlarge for every ID that can grow; rows grow, ``e' = W e + b``.
2. The batch is predicted and recorded, before anything is learnt from it.
3. *The policies learn.* For them the batch is validation data, which the recommender has not yet
   learnt: REINFORCE with ``R = mean of the ID's last T losses - loss``.
4. *The recommender learns*: one Adam step on the same losses.

The published alternation predicts twice, once for step 3 under sampled sizes and once for step 4.
One prediction serves both, because a promotion leaves ``y(x)`` as it is: the loss under the
would-be sizes *is* the loss under the present ones (a test holds that). The same fact means that
this reward does not depend on the action: see ``docs/deviations.md``.

Nothing here reads a value from the device inside a step; the stream, the histories and the measures
live there. ``deciding`` is the one place that looks: on a CPU, where looking is free, IDs that
cannot grow are dropped, on a GPU they are masked. Both give the same numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esapn_kernels import ResizableEmbedding

from .config import SearchConfig
from .data import NUM_CLASSES, Batch, Stream
from .metrics import Prequential
from .model import TwoTower, event_losses
from .policy import LossHistory, Policy, policy_loss, reward, sample_actions

__all__ = ["Search", "SearchResult", "build_model", "run_search"]


def build_model(config: SearchConfig, stream: Stream) -> TwoTower:
    """The recommender of a run; every row starts at the smallest size (FIXED: its only one)."""
    return TwoTower(
        stream.n_users,
        stream.n_items,
        sizes=config.row_sizes,
        n_outputs=1 if config.task == "binary" else NUM_CLASSES,
        hidden=config.hidden,
        init_std=config.init_std,
        plain=config.tower == "plain",
    )


@dataclass
class Decision:
    """The IDs of a batch that may grow, as rows of the batch (CPU) or as a mask over it (GPU)."""

    rows: Tensor | slice
    mask: Tensor | None

    @property
    def none(self) -> bool:
        """Known to be empty; on a GPU nobody looks."""
        return isinstance(self.rows, Tensor) and not len(self.rows)


def deciding(level: Tensor, last: Tensor, n_levels: int) -> Decision:
    """IDs below the last level, each at its last event in the batch: one decision per ID."""
    mask = last & (level < n_levels - 1)
    if level.device.type == "cpu":
        return Decision(mask.nonzero()[:, 0], None)
    return Decision(slice(None), mask)


class Choice(NamedTuple):
    """What a policy chose for the IDs ``rows`` (where ``mask``): its logits and the actions."""

    rows: Tensor | slice
    mask: Tensor | None
    logits: Tensor
    action: Tensor


@dataclass
class Side:
    """What the search keeps for users, and again for items."""

    name: str
    embedding: ResizableEmbedding
    policy: Policy
    history: LossHistory

    def of(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(ids, frequency, last, keep)`` of this side."""
        return tuple(getattr(batch, self.name + part) for part in ("", "_freq", "_last", "_keep"))


class Search:
    """The recommender, its two policies, and one method per step of the algorithm.

    Args:
        config: the run's settings.
        stream: events with their counters, on the device where the search runs.

    Example:
        >>> from esapn.data import build_stream, load_ratings
        >>> stream = build_stream(load_ratings("synthetic", events=2000), batch_size=100)
        >>> search = Search(SearchConfig(batch_size=100), stream)
        >>> losses = search.step(0).shape
        >>> losses
        torch.Size([100])
    """

    def __init__(self, config: SearchConfig, stream: Stream) -> None:
        self.config = config
        self.stream = stream
        device = stream.user.device
        torch.manual_seed(config.seed)
        self.model = build_model(config, stream).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.lr, fused=True)
        self.generator = torch.Generator(device).manual_seed(config.seed)
        self.measures = Prequential(len(stream.user), device)
        self.sides = []
        if config.method == "esapn":
            self.sides = [self._side("user", device), self._side("item", device)]
            parameters = [p for side in self.sides for p in side.policy.parameters()]
            self.policy_optimizer = torch.optim.Adam(parameters, lr=config.policy_lr, fused=True)

    def _side(self, name: str, device: torch.device) -> Side:
        embedding: ResizableEmbedding = getattr(self.model, name)
        policy = Policy(
            len(embedding.sizes),
            max_frequency=self.config.max_frequency,
            frequency_dim=self.config.frequency_dim,
            hidden=self.config.policy_hidden,
        ).to(device)
        history = LossHistory(embedding.num_embeddings, self.config.history, device)
        return Side(name, embedding, policy, history)

    def step(self, index: int) -> Tensor:
        """The four steps for batch ``index``; returns the loss of every event, before learning."""
        batch = self.stream.batch(index)
        choices = [self.grow(side, batch) for side in self.sides]
        logits = self.model(batch.user, batch.item)
        loss = event_losses(logits, batch.target)
        self.measures.record(logits.detach(), batch.target, loss.detach())
        if self.sides:
            self.update_policies(choices, batch, loss.detach())
        loss.sum().backward()
        self.optimizer.step()
        # Now rather than before backward: a row that grows in between has no gradient to reset.
        self.optimizer.zero_grad()
        return loss.detach()

    def grow(self, side: Side, batch: Batch) -> Choice | None:
        """Step 1: sample an action for every ID that can grow, and grow its row."""
        ids, frequency, last, _ = side.of(batch)
        level = side.embedding.arena.level(ids)
        decision = deciding(level, last, side.policy.n_levels)
        # Drawn whether or not anybody decides: the same numbers on every path.
        uniform = torch.rand(len(ids), generator=self.generator, device=ids.device)
        if decision.none:
            return None
        rows, mask = decision.rows, decision.mask
        logits = side.policy(frequency[rows], level[rows], mask)
        action = sample_actions(logits.detach(), uniform[rows])
        enlarge = action.bool() if mask is None else action.bool() & mask
        side.embedding.promote(ids[rows], enlarge)
        return Choice(rows, mask, logits, action)

    def update_policies(self, choices: Sequence[Choice | None], batch: Batch, loss: Tensor) -> None:
        """Step 3: one REINFORCE step, then the batch joins the loss history."""
        total = loss.new_zeros(())
        for side, choice in zip(self.sides, choices, strict=True):
            ids, frequency, _, keep = side.of(batch)
            if choice is not None:
                baseline, seen = side.history.mean(ids[choice.rows])
                gain = reward(baseline, loss[choice.rows], seen)
                total = total + policy_loss(choice.logits, choice.action, gain, choice.mask)
            side.history.record(ids, frequency, loss, keep)
        # Zeros, not None: where nobody decides Adam steps all the same, as it does with a mask.
        self.policy_optimizer.zero_grad(set_to_none=False)
        if total.requires_grad:
            total.backward()
        self.policy_optimizer.step()


@dataclass
class SearchResult:
    """What a run gives: measures of both parts, memory, the log and the times."""

    train: dict[str, float]
    test: dict[str, float]
    memory: dict[str, dict[str, Any]]
    log: list[dict[str, float]]
    cpu_seconds: float
    wall_seconds: float
    search: Search


def run_search(
    config: SearchConfig,
    stream: Stream,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> SearchResult:
    """Walk the whole stream once; the test part goes on learning, prequentially.

    Args:
        config: settings; ``method`` is ``esapn`` or ``fixed``.
        stream: from ``build_stream``; its device is where everything runs.
        progress: called every ``config.log_every`` batches with the number of batches done and the
            running loss, accuracy, mean sizes and serving bytes of the batches since the last call.
    """
    search = Search(config, stream)
    model = search.model
    log: list[dict[str, float]] = []
    logged = 0
    cpu, wall = time.process_time(), time.perf_counter()
    for index, (_, stop) in enumerate(stream.bounds):
        search.step(index)
        done = index + 1
        if done % config.log_every == 0 or done == len(stream.bounds):
            loss, accuracy = search.measures.window(stop - logged)
            logged = stop
            line = {"events": stop, "loss": loss, "accuracy": accuracy, **_sizes(model)}
            log.append(line)
            if progress is not None:
                progress(done, line)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    # What would be served: rows without the holes that growth leaves.
    model.user.compact()
    model.item.compact()
    end, cut = len(stream.user), stream.n_train
    return SearchResult(
        train=search.measures.summary(0, cut, stream.target[:cut]),
        test=search.measures.summary(cut, end, stream.target[cut:]),
        memory={name: _memory(getattr(model, name)) for name in ("user", "item")},
        log=log,
        cpu_seconds=cpu,
        wall_seconds=wall,
        search=search,
    )


def _sizes(model: TwoTower) -> dict[str, float]:
    line: dict[str, float] = {"serving_bytes": 0}
    for name in ("user", "item"):
        report = getattr(model, name).memory_report()
        rows = sum(report.rows_per_size.values())
        total = sum(size * count for size, count in report.rows_per_size.items())
        line[f"mean_{name}_size"] = total / rows
        line["serving_bytes"] += report.serving
    return line


def _memory(embedding: ResizableEmbedding) -> dict[str, Any]:
    report = embedding.memory_report()
    return {
        "rows_per_size": {str(size): n for size, n in report.rows_per_size.items()},
        "payload": report.payload,
        "slack": report.slack,
        "locations": report.locations,
        "chain": report.chain,
        "optimizer": report.optimizer,
        "serving": report.serving,
        "fixed": report.fixed,
    }
