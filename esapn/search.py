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

A step copies no value from the device to the host; histories and counts lie beside the tables
(``table_state``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from esapn_kernels import ResizableEmbedding
from esapn_kernels.share import share_budget

from .config import SearchConfig
from .policy import entropy, policy_loss, reward, sample_actions
from .rules import rule_of
from .table_state import Choice, Counters, Field, deciding

__all__ = ["SizeSearch"]


class SizeSearch(nn.Module):
    """Searches the row sizes of any number of tables of a model, on a stream.

    Args:
        tables: :class:`ResizableEmbedding` by name; every name has a policy of its own.
        config: ``method`` (``esapn`` or a rule), the settings of state, reward and policies, and
            the ``seed`` of the sampled actions.
        budget: bytes that all tables together take to serve, ``"64 MB"``, or ``"3%"`` of the plain
            tables; a row without room stays, as if it had been decided so. Default:
            ``config.budget``; without one, or where tables have budgets, these stay as they are.

    Raises:
        TypeError: a table that is no ResizableEmbedding.
        ValueError: no table at all, a method without a search, or a budget that does not hold the
            rows as they are, which names the smallest that does. Nothing is changed.

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

    def __init__(
        self,
        tables: Mapping[str, ResizableEmbedding],
        config: SearchConfig,
        budget: int | str | None = None,
    ) -> None:
        super().__init__()
        if not tables:
            raise ValueError("SizeSearch needs at least one table")
        for name, table in tables.items():
            if not isinstance(table, ResizableEmbedding):
                raise TypeError(f"'{name}' is a {type(table).__name__}, not a ResizableEmbedding")
        if config.method != "esapn" and rule_of(config, torch.device("cpu")) is None:
            raise ValueError(f"method '{config.method}' is not one of a search")
        if budget is None and config.budget and all(t.budget is None for t in tables.values()):
            budget = config.budget
        if budget is not None:
            share_budget(tables, budget)
        self.config = config
        # Policies start on the host, whatever torch's default device is, and move to their table.
        with torch.device("cpu"):
            self.fields = [Field(name, table, config) for name, table in tables.items()]
        # The same ones, as parts of this module.
        self.parts = nn.ModuleList(self.fields)
        self.step = 0
        device = self.fields[0].embedding.arena.parameter.device
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
            counters: of the flattened ids, if they were counted beforehand, as a ``Stream`` does;
                by default the search counts.

        Raises:
            KeyError: ids of a table are missing, or belong to none.
        """
        names = [field.name for field in self.fields]
        if set(ids) != set(names):
            raise KeyError(f"grow takes ids of {names}, got {sorted(ids)}")
        for field in self.fields:
            counted = None if counters is None else counters[field.name]
            field.begin(ids[field.name], counted, self.config.history)
            self._grow(field)

    def _grow(self, field: Field) -> None:
        """``a ~ pi(a | s)``, or what the rule says, for every ID that decides."""
        ids, (frequency, last, _) = field.ids, field.counters
        level = field.embedding.arena.level(ids)
        if self.config.dwell:
            sizes = field.embedding.arena.row_size
            larger = sizes[(level + 1).clamp(max=len(sizes) - 1)]
            last = last & (frequency >= self.config.dwell * larger.square())
        decision = deciding(level, last, len(field.embedding.sizes))
        # Drawn even if no ID decides: the same numbers on every path.
        uniform = torch.rand(len(ids), generator=self.generator, device=ids.device)
        if decision.none:
            return
        rows, mask = decision.rows, decision.mask
        ids, frequency, level, uniform = ids[rows], frequency[rows], level[rows], uniform[rows]
        if field.rule is not None:
            enlarge = field.rule(frequency, level, uniform)
        else:
            statistics = None
            if field.rich:
                statistics = field.statistics.features(ids, frequency, self.step)
            logits = field.policy(frequency, level, mask, statistics)
            # Likelier by more than rounding: equal chances keep.
            even = torch.full_like(uniform, 0.5) if self.config.acting == "argmax" else uniform
            action = sample_actions(logits.detach(), even)
            field.choice = Choice(rows, mask, logits, action)
            enlarge = action.bool()
        field.embedding.promote(ids, enlarge if mask is None else enlarge & mask)

    def learn(self, loss: Tensor) -> None:
        """Step 3: one policy step on the losses of the batch, which then join the histories.

        Args:
            loss: ``[B]``, of every example, from the forward pass since :meth:`grow`.

        Raises:
            ValueError: another number of losses than examples.
            RuntimeError: with a rich state, no backward pass since :meth:`grow`.
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
            if field.rule is None:
                each = loss[field.event]
                total = total + self._policy_loss(field, each)
                field.record(each, self.step)
        self.step += 1
        if self.optimizer is None:
            return
        self.optimizer.zero_grad()
        if total.requires_grad:
            total.backward()
        for parameter in self.optimizer.state:
            if parameter.grad is None:
                # Where no ID decides Adam steps all the same, as it does with a mask.
                parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()

    def _policy_loss(self, field: Field, loss: Tensor) -> Tensor:
        """``-sum_x R_x log pi(a_x | s_x)``, less the policy's entropy by its weight."""
        choice = field.choice
        if choice is None:
            return loss.new_zeros(())
        baseline, seen = field.history.mean(field.ids[choice.rows])
        gain = reward(baseline, loss[choice.rows], seen)
        if self.config.advantage == "normalised":
            gain = field.scale.normalise(gain, seen, choice.mask)
        total = policy_loss(choice.logits, choice.action, gain, choice.mask)
        if self.config.entropy:
            total = total - self.config.entropy * entropy(choice.logits, choice.mask)
        return total

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
