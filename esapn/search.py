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
this reward does not depend on the action: see ``docs/deviations.md``. ``reward="lookahead"`` is one
that does:

    A = L(y) - L(y'),     y' in the columns of M_{k+1}

``y'`` is the *shadow* of the event's IDs: where the output would be had each been enlarged when it
came to its present size. It begins at y and learns apart from it, by Adagrad on the gradient of
L(y'). So A is the loss of the rows as they were kept less that of the rows had they been enlarged
and taught, on an event that nobody has learnt from yet. Both are known, and the policy follows the
gradient of ``pi(enlarge) A`` itself rather than an estimate of it by samples. An ID's numbers are
paid once and used at each of its ``f`` events, hence ``A / rms(A) - price (d_{k+1} - d_k) / f``. It
takes one more prediction, by ``search.look_ahead`` between 2 and 3, and in training ``8 d_n`` bytes
an ID. With trained hops its basis is a singular value decomposition a step, for which a GPU is
waited for.

Nothing here reads a value from the device inside a step; the histories live there. ``deciding`` is
the one place that looks: on a CPU, where looking is free, IDs that cannot grow are dropped, on a
GPU they are masked. Both give the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from esapn_kernels import ResizableEmbedding
from esapn_kernels.ops.chain import operand_offsets
from esapn_kernels.ops.compose import compose

from .config import SearchConfig
from .idstate import IdStatistics
from .policy import (
    LossHistory,
    Policy,
    RunningScale,
    entropy,
    expected_loss,
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
    level: Tensor  # before the action


class Trial(NamedTuple):
    """A table's outputs had its rows been enlarged and taught."""

    values: Tensor  # [B, d_n], the shadows; a leaf
    grows: Tensor  # bool [B], below the last level: elsewhere the output was left as it is


class Field(nn.Module):
    """What the search keeps for one table: its policy or rule, and histories of its IDs."""

    seen: Tensor
    shadow: Tensor
    squares: Tensor
    shadow_level: Tensor

    def __init__(self, name: str, embedding: ResizableEmbedding, config: SearchConfig) -> None:
        super().__init__()
        device = embedding.arena.storage.device
        rows, n_levels = embedding.num_embeddings, len(embedding.sizes)
        self.name = name
        # In a tuple: the table belongs to the model, not to the search.
        self._embedding = (embedding,)
        self.rule: Rule | None = rule_of(config, device)
        self.rich = config.state == "rich"
        self.looks_ahead = config.reward == "lookahead"
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
            if self.looks_ahead:
                # One more row takes the writes of events that are not an ID's last.
                shape = rows + 1, embedding.embedding_dim
                self.register_buffer("shadow", torch.zeros(shape, device=device))
                self.register_buffer("squares", torch.zeros(shape, device=device))
                none = torch.full((rows + 1,), -1, dtype=torch.int8, device=device)
                self.register_buffer("shadow_level", none)
            if self.rich or self.looks_ahead:
                embedding.register_forward_hook(self._catch)
        # Of the batch in hand.
        self.examples = 0
        self.ids = self.event = self.level = torch.empty(0, dtype=torch.int64, device=device)
        self.counters = Counters(self.ids, self.ids, self.ids)
        self.choice: Choice | None = None
        self.gain: Tensor | None = None
        self.caught: list[Tensor] = []
        self.tries = False
        none = torch.empty(0, device=device)
        self.trial = Trial(none, none)

    @property
    def embedding(self) -> ResizableEmbedding:
        """The table."""
        return self._embedding[0]

    def _catch(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        if self.tries:
            flat = output.detach().reshape(-1, output.shape[-1])
            # A row that has another size than when its shadow began gets another shadow.
            begins = self.shadow_level[self.ids] != self.level
            values = torch.where(begins[:, None], flat, self.shadow[self.ids]).requires_grad_()
            grows = self.level < len(self.embedding.sizes) - 1
            self.trial = Trial(values, grows)
            return torch.where(grows[:, None], values, flat).view(output.shape)
        if self.rich and output.requires_grad:
            output.register_hook(self.caught.append)
        return None

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


def basis(embedding: ResizableEmbedding) -> Tensor:
    """Orthonormal ``[d_n, d_n]``, fp64; its first d_k columns span those of ``M_k``, all k."""
    sizes, offsets = embedding.sizes, operand_offsets(embedding.sizes)
    # In double precision: columns of hops as they start are nearly dependent.
    maps = compose(embedding.chain.double(), sizes)
    found = maps.new_zeros(sizes[-1], 0)
    for k, dim in enumerate(sizes):
        if k + 1 < len(sizes):
            block = maps[offsets[k] : offsets[k] + dim].T
        else:
            block = torch.eye(dim, device=maps.device, dtype=maps.dtype)
        rest = (block - found @ (found.T @ block))[:, found.shape[1] :]
        # The polar factor: singular vectors alone would turn at every step of the hops, most of all
        # at the last size, where all singular values are 1.
        left, _, right = torch.linalg.svd(rest, full_matrices=False)
        found = torch.cat([found, left @ right], dim=1)
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
        field.choice = field.gain = None
        field.caught.clear()
        field.level = level = field.embedding.arena.level(ids)
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
            field.choice = Choice(rows, mask, logits, action, level)
            enlarge = action.bool()
        field.embedding.promote(ids[rows], enlarge if mask is None else enlarge & mask)

    def look_ahead(self, loss: Tensor, again: Callable[[], Tensor]) -> None:
        """For ``reward="lookahead"``, after the forward pass: what larger rows would have lost.

        Before backward, in which a fused optimizer teaches the rows: both losses are of rows that
        know nothing of the batch.

        Args:
            loss: ``[B]``, of every example, from the forward pass since :meth:`grow`.
            again: that forward pass once more: gives the losses of the batch, with gradients
                enabled, the tables' outputs being changed under its hands.
        """
        fields = [field for field in self.fields if field.looks_ahead and field.rule is None]
        try:
            # All tables at once: what new numbers of a user are worth depends on whether the items
            # have some to meet them.
            for field in fields:
                field.tries = True
            with torch.enable_grad():
                other = again()
        finally:
            for field in fields:
                field.tries = False
        gain = loss.detach() - other.detach()
        trials = [field.trial for field in fields]
        gradients = torch.autograd.grad(other.sum(), [trial.values for trial in trials])
        for field, trial, gradient in zip(fields, trials, gradients, strict=True):
            self._teach(field, trial, gradient)
            field.gain = gain[field.event]

    def learn(self, loss: Tensor) -> None:
        """Step 3: one policy step on the losses of the batch, which then join the histories.

        Args:
            loss: ``[B]``, of every example, from the forward pass since :meth:`grow`.

        Raises:
            ValueError: another number of losses than examples, or a look-ahead reward without
                :meth:`look_ahead`.
        """
        loss = loss.detach()
        if any(f.looks_ahead and f.rule is None and f.gain is None for f in self.fields):
            raise ValueError("the look-ahead reward needs look_ahead(loss, again) before backward")
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
        if choice is not None and field.gain is not None:
            total = self._expected(field, choice, field.gain[choice.rows])
        elif choice is not None:
            total = self._sampled(field, choice, loss[choice.rows])
        if choice is not None and self.config.entropy:
            total = total - self.config.entropy * entropy(choice.logits, choice.mask)
        field.history.record(ids, frequency, loss, keep)
        if field.rich:
            field.statistics.update(ids, loss, field.gradient().norm(dim=1), self.step, last)
        return total

    def _teach(self, field: Field, trial: Trial, gradient: Tensor) -> None:
        """One Adagrad step of the shadows of IDs at their last event, in their d_{k+1} numbers.

        In the output, whose numbers are those of a row times sqrt(d_n / d_{k+1}).
        """
        table, level = field.embedding, field.level
        size = torch.cat([table.arena.row_size, table.arena.row_size[-1:]])[level + 1][:, None]
        turned = table.init != "padded"
        if turned:
            turn = basis(table).to(gradient.dtype)
            gradient = gradient @ turn
        inside = torch.arange(table.embedding_dim, device=level.device) < size
        gradient = torch.where(inside, gradient, 0.0)
        row = torch.where(field.counters.last & trial.grows, field.ids, len(field.shadow) - 1)
        squares = field.squares[row] + gradient.square()
        step = self.config.row_lr * (table.embedding_dim / size).sqrt()
        step = step * gradient / (squares.sqrt() + 1e-10)
        field.squares[row] = squares
        field.shadow[row] = trial.values.detach() - (step @ turn.T if turned else step)
        field.shadow_level[row] = level.to(torch.int8)

    def _expected(self, field: Field, choice: Choice, gain: Tensor) -> Tensor:
        """The policy follows its expected advantage, less the price of the numbers added."""
        ids = field.ids[choice.rows]
        sizes = field.embedding.arena.row_size
        known = field.history.count[ids] > 0
        field.scale.update(gain, known if choice.mask is None else known & choice.mask)
        added = sizes[(choice.level + 1).clamp(max=len(sizes) - 1)] - sizes[choice.level]
        price = self.config.byte_price * added / field.counters.frequency[choice.rows]
        advantage = torch.where(known, gain / field.scale.moments()[1] - price, 0.0)
        return expected_loss(choice.logits, advantage, choice.mask)

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
