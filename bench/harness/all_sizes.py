"""The search step as it is usually written, the baseline of ``bench/search.py``.

A full table for every candidate size; every size looked up and carried to the largest for every
row, BatchNorm and tanh of all of them, a one-hot sum that selects; a prediction under sampled sizes
for the policies, which see every event, and a second one for the recommender; dense Adam on all
tables; torch's own tanh. Source: Liu et al., "Automated Embedding Size Search in Deep Recommender
Systems", SIGIR 2020. ``lean`` grants it what the ragged search does beyond storage: one prediction
for both steps, selection before BatchNorm and tanh, and the faster tanh.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from esapn.config import SearchConfig
from esapn.data.stream import NUM_CLASSES, Batch, Stream
from esapn.models.tanh import Tanh, tanh
from esapn.models.two_tower import event_losses
from esapn.policy import LossHistory, Policy, policy_loss, reward, sample_actions
from esapn.run.metrics import Prequential


class AllSizesSide(nn.Module):
    """A full table per size, the hops between them, and the size index of every ID.

    Attributes:
        level: index of the size of every ID, int64 ``[n]``.
    """

    level: Tensor

    def __init__(self, n: int, config: SearchConfig, lean: bool) -> None:
        super().__init__()
        sizes = config.sizes
        self.tables = nn.ModuleList(nn.Embedding(n, d) for d in sizes)
        self.hops = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        self.norm = nn.BatchNorm1d(sizes[-1])
        self.register_buffer("level", torch.zeros(n, dtype=torch.int64))
        self.lean = lean
        for parameter in self.tables.parameters():
            nn.init.normal_(parameter, 0.0, config.init_std)

    def forward(self, ids: Tensor, level: Tensor) -> Tensor:
        """Features ``[B, D]`` of ``ids`` at the sizes ``level``, both int64 ``[B]``."""
        chosen = nn.functional.one_hot(level, len(self.tables)).float()
        total = torch.zeros(())
        for k, table in enumerate(self.tables):
            h = table(ids)
            for hop in self.hops[k:]:
                h = hop(h)
            h = h if self.lean else torch.tanh(self.norm(h))
            total = total + chosen[:, k : k + 1] * h
        return tanh(self.norm(total)) if self.lean else total

    @torch.no_grad()
    def write_promoted(self, ids: Tensor) -> None:
        """Write the next size's row of ``ids``; their levels stay."""
        level = self.level[ids]
        for k, hop in enumerate(self.hops):
            mine = ids[level == k]
            self.tables[k + 1].get_parameter("weight")[mine] = hop(self.tables[k](mine))


class AllSizesModel(nn.Module):
    """The two-tower recommender of ``esapn.models.two_tower`` on all-sizes sides."""

    def __init__(self, stream: Stream, config: SearchConfig, lean: bool) -> None:
        super().__init__()
        self.user = AllSizesSide(stream.n_users, config, lean)
        self.item = AllSizesSide(stream.n_items, config, lean)
        dim = config.sizes[-1]
        self.inference = nn.Sequential(
            nn.BatchNorm1d(2 * dim),
            nn.Linear(2 * dim, config.hidden),
            nn.BatchNorm1d(config.hidden),
            Tanh() if lean else nn.Tanh(),
            nn.Linear(config.hidden, 1 if config.task == "binary" else NUM_CLASSES),
        )

    def forward(self, batch: Batch, levels: Sequence[Tensor]) -> Tensor:
        """Logits ``[B, outputs]`` with users and items at the sizes ``levels``."""
        towers = [self.user(batch.user, levels[0]), self.item(batch.item, levels[1])]
        logits: Tensor = self.inference(torch.cat(towers, dim=1))
        return logits


class Side(NamedTuple):
    """Users or items: their tables, the policy of their sizes and its reward's baseline."""

    name: str
    tables: AllSizesSide
    policy: Policy
    optimizer: torch.optim.Optimizer
    history: LossHistory


class Choice(NamedTuple):
    """What a side's policy chose for a batch.

    Attributes:
        logits: of the policy, ``[B, 2]``.
        action: sampled, 1 to grow, ``[B]``.
        decides: events whose action counts: an ID's last in the batch, below the largest size.
        grow: those of them that grow.
        level: sizes before, ``[B]``.
    """

    logits: Tensor
    action: Tensor
    decides: Tensor
    grow: Tensor
    level: Tensor


class AllSizesSearch:
    """The algorithm of ``esapn.search``, every size computed for every row."""

    def __init__(self, config: SearchConfig, stream: Stream, lean: bool) -> None:
        torch.manual_seed(config.seed)
        self.stream = stream
        self.lean = lean
        self.n_levels = len(config.sizes)
        self.model = AllSizesModel(stream, config, lean)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.lr, fused=True)
        self.measures = Prequential(stream.n_train, len(stream.user))
        self.index = 0
        self.sides = []
        for name, n in (("user", stream.n_users), ("item", stream.n_items)):
            policy = Policy(self.n_levels, max_frequency=config.max_frequency)
            optimizer = torch.optim.Adam(policy.parameters(), lr=config.policy_lr, fused=True)
            history = LossHistory(n, config.history)
            self.sides.append(Side(name, getattr(self.model, name), policy, optimizer, history))

    def step(self) -> None:
        """The next batch: policies, growth, prediction, recommender."""
        batch = self.stream.batch(self.index)
        self.index += 1
        if not self.lean:
            choices = self._choose(batch)
            with torch.no_grad():
                levels = [choice.level + choice.grow.long() for choice in choices]
                loss = event_losses(self.model(batch, levels), batch.target)
            self._update_policies(batch, choices, loss)
        choices = self._choose(batch)
        logits = self.model(batch, self._grow(batch, choices))
        loss = event_losses(logits, batch.target)
        frequency = torch.stack([batch.user_freq, batch.item_freq])
        self.measures.record(logits.detach(), batch.target, loss.detach(), frequency)
        if self.lean:
            self._update_policies(batch, choices, loss.detach())
        for side in self.sides:
            ids, keep = getattr(batch, side.name), getattr(batch, f"{side.name}_keep")
            side.history.record(ids, getattr(batch, f"{side.name}_freq"), loss.detach(), keep)
        loss.sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _choose(self, batch: Batch) -> list[Choice]:
        """Sample every side's actions, and write the rows that they promote."""
        choices = []
        for side in self.sides:
            ids, last = getattr(batch, side.name), getattr(batch, f"{side.name}_last")
            level = side.tables.level[ids]
            decides = last & (level < self.n_levels - 1)
            logits = side.policy(getattr(batch, f"{side.name}_freq"), level)
            action = sample_actions(logits.detach(), torch.rand(len(ids)))
            grow = decides & action.bool()
            side.tables.write_promoted(ids[grow])
            choices.append(Choice(logits, action, decides, grow, level))
        return choices

    def _grow(self, batch: Batch, choices: Sequence[Choice]) -> list[Tensor]:
        """Raise the levels of the IDs that grow; the levels of the batch, ``[B]`` per side."""
        levels = []
        for side, choice in zip(self.sides, choices, strict=True):
            ids = getattr(batch, side.name)
            side.tables.level[ids[choice.grow]] += 1
            levels.append(side.tables.level[ids])
        return levels

    def _update_policies(self, batch: Batch, choices: Sequence[Choice], loss: Tensor) -> None:
        for side, choice in zip(self.sides, choices, strict=True):
            baseline, seen = side.history.mean(getattr(batch, side.name))
            side.optimizer.zero_grad()
            gain = reward(baseline, loss, seen)
            policy_loss(choice.logits, choice.action, gain, choice.decides).backward()
            side.optimizer.step()
