"""The streaming size search, step by step as published (ESAPN, SIGIR 2020), for any model.

For every batch of the stream:

1. *grow*: the policies sample keep or enlarge for every ID that can grow; rows grow,
   ``e' = W e + b``.
2. The batch is predicted and recorded, before anything is learnt from it.
3. *learn*: the policies learn. For them the batch is validation data, which the recommender has not
   yet learnt: REINFORCE with ``R = mean of the ID's last T losses - loss``.
4. The recommender learns: one optimizer step on the same losses.

    search = SizeSearch({"user": model.user, "item": model.item}, SearchConfig())
    for user, item, target in batches:
        search.grow({"user": user, "item": item})                     # 1
        loss = criterion(model(user, item), target)                   # 2, one loss an example
        loss.sum().backward()
        search.learn(loss)                                            # 3
        optimizer.step(), optimizer.zero_grad()                       # 4

The published alternation predicts twice, once for step 3 under sampled sizes and once for step 4.
One prediction serves both, because a promotion leaves ``y(x)`` as it is: the loss under the
would-be sizes *is* the loss under the present ones (a test holds that). The same fact means that
the reward does not depend on the action: see ``docs/deviations.md``.

Nothing here reads a value from the device inside a step; the histories live there. ``deciding`` is
the one place that looks: on a CPU, where looking is free, IDs that cannot grow are dropped, on a
GPU they are masked. Both give the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from esapn_kernels import ResizableEmbedding

from .config import SearchConfig
from .growth import promote_keeping
from .idstate import IdStatistics
from .policy import (
    LossHistory,
    Policy,
    RunningScale,
    entropy,
    policy_loss,
    reward,
    sample_actions,
)
from .rules import Rule, rule_of

__all__ = ["Counters", "Decision", "SizeSearch", "count_ids", "deciding"]


class Counters(NamedTuple):
    """What the search needs of the IDs of a batch beyond themselves; ``[B]`` each."""

    frequency: Tensor  # int, events of the ID so far, this one included
    last: Tensor  # bool, the ID's last event in the batch: it decides here
    keep: Tensor  # bool, among the last T of them: its ring slot is written here


def count_ids(ids: Tensor, seen: Tensor, history: int) -> Counters:
    """:class:`Counters` of a batch, from the events of every ID before it.

    Args:
        ids: int64 ``[B]``.
        seen: int ``[N]``, events before the batch; not changed.
        history: T.

    >>> counters = count_ids(torch.tensor([5, 2, 5]), torch.tensor([0, 0, 7, 0, 0, 1]), history=1)
    >>> counters.frequency.tolist(), counters.last.tolist()
    ([2, 8, 3], [False, True, True])
    """
    order = torch.argsort(ids, stable=True)
    ordered = ids[order]
    position = torch.arange(len(ids), device=ids.device)
    # Rank inside the run of equal IDs, and how many of it are still to come.
    first = torch.searchsorted(ordered, ordered)
    after = torch.searchsorted(ordered, ordered, right=True)
    rank, left = torch.empty_like(position), torch.empty_like(position)
    rank[order] = position - first
    left[order] = after - 1 - position
    return Counters(seen[ids] + rank + 1, left == 0, left < history)


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


class Field(nn.Module):
    """What the search keeps for one table: its policy or rule, and histories of its IDs."""

    seen: Tensor

    def __init__(self, name: str, embedding: ResizableEmbedding, config: SearchConfig) -> None:
        super().__init__()
        device = embedding.arena.storage.device
        rows, n_levels = embedding.num_embeddings, len(embedding.sizes)
        self.name = name
        # In a tuple: the table belongs to the model, not to the search.
        self._embedding = (embedding,)
        self.rule: Rule | None = rule_of(config, device)
        self.rich = config.state == "rich"
        self.register_buffer("seen", torch.zeros(rows, dtype=torch.int32, device=device))
        if self.rule is None:
            self.history = LossHistory(rows, config.history, device)
            self.policy = Policy(
                n_levels,
                max_frequency=config.max_frequency,
                frequency_dim=config.frequency_dim,
                hidden=config.policy_hidden,
                rich=self.rich,
                indifferent=config.acting == "argmax",
            ).to(device)
            self.scale = RunningScale().to(device)
            if self.rich:
                self.statistics = IdStatistics(rows).to(device)
                embedding.register_forward_hook(self._catch)
        # Of the batch in hand.
        self.examples = 0
        self.ids = self.event = torch.empty(0, dtype=torch.int64, device=device)
        self.counters = Counters(self.ids, self.ids, self.ids)
        self.choice: Choice | None = None
        self.caught: list[Tensor] = []

    @property
    def embedding(self) -> ResizableEmbedding:
        """The table."""
        return self._embedding[0]

    def _catch(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(self.caught.append)

    def gradient(self) -> Tensor:
        """dL/dy of every event of the batch ``[B, d_n]``, from the backward pass just done."""
        caught, self.caught = self.caught, []
        found = sum(g.reshape(-1, g.shape[-1]) for g in caught)
        if not isinstance(found, Tensor) or len(found) != len(self.ids):
            raise RuntimeError(
                f"the rich state of '{self.name}' needs one lookup of all ids given to grow, and "
                "backward, before learn"
            )
        return found


class SizeSearch(nn.Module):
    """Searches the row sizes of any number of tables of a model, on a stream.

    Args:
        tables: :class:`ResizableEmbedding` by name; every name has a policy of its own.
        config: ``method`` (``esapn`` or a rule), the settings of state, reward and policies, and
            the ``seed`` of the sampled actions.

    Raises:
        TypeError: a table that is no ResizableEmbedding.
        ValueError: no table at all, or a method without growth.

    Notes:
        Call :meth:`grow` before the forward pass and :meth:`learn` after backward, once a batch
        each. The policies have an Adam optimizer of their own. ``state_dict`` holds everything
        that the future depends on, sampler and Adam included.

    Example:
        >>> table = ResizableEmbedding(100, sizes=(2, 4))
        >>> search = SizeSearch({"word": table}, SearchConfig(sizes=(2, 4)))
        >>> ids = torch.tensor([3, 7, 3])
        >>> search.grow({"word": ids})
        >>> loss = table(ids).square().mean(1)
        >>> loss.sum().backward()
        >>> search.learn(loss)

    Source: Liu et al., SIGIR 2020, section 3.
    """

    def __init__(self, tables: Mapping[str, ResizableEmbedding], config: SearchConfig) -> None:
        super().__init__()
        if not tables:
            raise ValueError("SizeSearch needs at least one table")
        for name, table in tables.items():
            if not isinstance(table, ResizableEmbedding):
                raise TypeError(f"'{name}' is a {type(table).__name__}, not a ResizableEmbedding")
        if config.method != "esapn" and rule_of(config, torch.device("cpu")) is None:
            raise ValueError(f"method '{config.method}' does not grow rows")
        self.config = config
        self.fields = [Field(name, table, config) for name, table in tables.items()]
        # The same ones, as parts of this module.
        self.parts = nn.ModuleList(self.fields)
        self.step = 0
        device = self.fields[0].embedding.arena.storage.device
        self.generator = torch.Generator(device).manual_seed(config.seed)
        parameters = list(self.parameters())
        self.optimizer: torch.optim.Optimizer | None = None
        if parameters:
            self.optimizer = torch.optim.Adam(parameters, lr=config.policy_lr, fused=True)

    def grow(
        self, ids: Mapping[str, Tensor], counters: Mapping[str, Counters] | None = None
    ) -> None:
        """Step 1: sample an action for every ID that can grow, and grow its row.

        Args:
            ids: of every table, int64 ``[B]`` or ``[B, ...]``; each example's first index is its
                place in the loss.
            counters: of the flattened ids, where somebody has counted already; else the search
                counts.

        Raises:
            KeyError: ids of a table are missing, or belong to none.
        """
        names = [field.name for field in self.fields]
        if set(ids) != set(names):
            raise KeyError(f"grow takes ids of {names}, got {sorted(ids)}")
        for field in self.fields:
            self._grow(field, ids[field.name], None if counters is None else counters[field.name])

    def _grow(self, field: Field, ids: Tensor, counters: Counters | None) -> None:
        field.examples, each = len(ids), ids[:1].numel()
        field.event = torch.arange(len(ids), device=ids.device).repeat_interleave(each)
        field.ids = ids = ids.reshape(-1).long()
        if counters is None:
            counters = count_ids(ids, field.seen, self.config.history)
            field.seen.index_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))
        field.counters = counters
        field.choice = None
        field.caught.clear()
        level = field.embedding.arena.level(ids)
        allowed = counters.last
        if self.config.dwell:
            sizes = field.embedding.arena.row_size
            larger = sizes[(level + 1).clamp(max=len(sizes) - 1)]
            allowed = allowed & (counters.frequency >= self.config.dwell * larger.square())
        decision = deciding(level, allowed, len(field.embedding.sizes))
        # Drawn whether or not anybody decides: the same numbers on every path.
        uniform = torch.rand(len(ids), generator=self.generator, device=ids.device)
        if decision.none:
            return
        rows, mask = decision.rows, decision.mask
        frequency, level, uniform = counters.frequency[rows], level[rows], uniform[rows]
        if field.rule is not None:
            enlarge = field.rule(frequency, level, uniform)
        else:
            statistics = None
            if field.rich:
                statistics = field.statistics.features(ids[rows], frequency, self.step)
            logits = field.policy(frequency, level, mask, statistics)
            # Likelier by more than rounding: equal chances keep.
            even = torch.full_like(uniform, 0.5) if self.config.acting == "argmax" else uniform
            action = sample_actions(logits.detach(), even)
            field.choice = Choice(rows, mask, logits, action)
            enlarge = action.bool()
        self._promote(field, ids[rows], enlarge if mask is None else enlarge & mask)

    def _promote(self, field: Field, ids: Tensor, enlarge: Tensor) -> None:
        table = field.embedding
        fused = table.arena.fused_optimizer
        # Hops that nobody trains: Adagrad's sums can go along.
        padded = table.init == "padded" and not table.chain.requires_grad
        if padded and fused is not None and "sum" in fused.state_per_element:
            promote_keeping(table, ids, enlarge, "sum")
        else:
            table.promote(ids, enlarge)

    def learn(self, loss: Tensor) -> None:
        """Step 3: one policy step on the losses of the batch, which then join the histories.

        Args:
            loss: ``[B]``, of every example, from the forward pass since :meth:`grow`.

        Raises:
            ValueError: another number of losses than examples.
        """
        loss = loss.detach()
        for field in self.fields:
            if loss.shape != (field.examples,):
                raise ValueError(
                    f"learn takes one loss for each of the {field.examples} examples given to "
                    f"grow, got shape {list(loss.shape)}"
                )
        total = loss.new_zeros(())
        for field in self.fields:
            total = total + self._learn(field, loss[field.event])
        self.step += 1
        if self.optimizer is None:
            return
        # Zeros, not None: where nobody decides Adam steps all the same, as it does with a mask.
        self.optimizer.zero_grad(set_to_none=False)
        if total.requires_grad:
            total.backward()
        self.optimizer.step()

    def _learn(self, field: Field, loss: Tensor) -> Tensor:
        """The policy loss of a table; its histories take the batch in."""
        ids, (frequency, last, keep), choice = field.ids, field.counters, field.choice
        total = loss.new_zeros(())
        if field.rule is not None:
            return total
        if choice is not None:
            total = self._sampled(field, choice, loss[choice.rows])
            if self.config.entropy:
                total = total - self.config.entropy * entropy(choice.logits, choice.mask)
        field.history.record(ids, frequency, loss, keep)
        if field.rich:
            field.statistics.update(ids, loss, field.gradient().norm(dim=1), self.step, last)
        return total

    def _sampled(self, field: Field, choice: Choice, loss: Tensor) -> Tensor:
        """REINFORCE on the published reward, as it is or normalised."""
        baseline, seen = field.history.mean(field.ids[choice.rows])
        gain = reward(baseline, loss, seen)
        if self.config.advantage == "normalised":
            field.scale.update(gain, seen if choice.mask is None else seen & choice.mask)
            mean, spread = field.scale.moments()
            deviation = (spread.square() - mean.square()).clamp(min=1e-12).sqrt()
            gain = torch.where(seen, (gain - mean) / deviation, 0.0)
        return policy_loss(choice.logits, choice.action, gain, choice.mask)

    def get_extra_state(self) -> dict[str, Any]:
        """Sampler, step and the policies' Adam, so that a resumed search goes on bit for bit."""
        return {
            "step": self.step,
            "generator": self.generator.get_state(),
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Load what :meth:`get_extra_state` gave."""
        self.step = state["step"]
        self.generator.set_state(state["generator"].cpu())
        if self.optimizer is not None and state["optimizer"] is not None:
            self.optimizer.load_state_dict(state["optimizer"])
