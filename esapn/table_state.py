"""What the search keeps of each table: its policy or rule, and the counts and histories of its IDs.

Everything lies on the table's device, and no function here copies a value to the host.
:func:`deciding` is the one place where the device matters: on a CPU the IDs that cannot grow are
dropped, on a GPU, where the host does not know their number, they are masked. Both give the same
numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from esapn_kernels import ResizableEmbedding

from .config import SearchConfig
from .idstate import IdStatistics
from .policy import LossHistory, Policy, RunningScale
from .rules import Rule, rule_of

__all__ = ["Choice", "Counters", "Decision", "Field", "count_ids", "deciding"]


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
    # Rank among the events of the same ID, and how many of them are still to come.
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
        """Whether the host knows that no ID decides; of a mask it knows nothing."""
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
    """The state of one table: its policy or rule, the histories of its IDs, the batch in hand."""

    seen: Tensor

    def __init__(self, name: str, embedding: ResizableEmbedding, config: SearchConfig) -> None:
        super().__init__()
        device = embedding.arena.parameter.device
        rows, n_levels = embedding.num_embeddings, len(embedding.sizes)
        self.name = name
        # In a tuple: the table belongs to the model, not to the search.
        self._embedding = (embedding,)
        self.rule: Rule | None = rule_of(config, device)
        self.rich = config.state == "rich" and self.rule is None
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
        self.ids = torch.empty(0, dtype=torch.int64, device=device)
        self.event: Tensor | slice = slice(None)
        self.counters = Counters(self.ids, self.ids, self.ids)
        self.choice: Choice | None = None
        self.caught: list[Tensor] = []

    @property
    def embedding(self) -> ResizableEmbedding:
        """The table."""
        return self._embedding[0]

    def begin(self, ids: Tensor, counters: Counters | None, history: int) -> None:
        """Take the batch in hand: its ids, the example of each, and their counters."""
        self.examples, each = len(ids), ids[:1].numel()
        self.event = slice(None)
        if each != 1:
            self.event = torch.arange(len(ids), device=ids.device).repeat_interleave(each)
        self.ids = ids = ids.reshape(-1).long()
        if counters is None:
            counters = count_ids(ids, self.seen, history)
            self.seen.index_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))
        self.counters = counters
        self.choice = None
        self.caught.clear()

    def record(self, loss: Tensor, step: int) -> None:
        """The losses ``[B]`` of the batch in hand join the histories of its IDs."""
        frequency, last, keep = self.counters
        self.history.record(self.ids, frequency, loss, keep)
        if self.rich:
            self.statistics.update(self.ids, loss, self._gradient().norm(dim=1), step, last)

    def _catch(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        """A forward hook: the backward pass leaves dL/dy of this lookup in ``caught``."""
        if output.requires_grad:
            output.register_hook(self.caught.append)

    def _gradient(self) -> Tensor:
        """dL/dy of every event of the batch ``[B, D]``, from the backward pass just done."""
        caught, self.caught = self.caught, []
        found = sum(g.reshape(-1, g.shape[-1]) for g in caught)
        if not isinstance(found, Tensor) or len(found) != len(self.ids):
            raise RuntimeError(
                f"the rich state of '{self.name}' needs one lookup of all ids given to grow, and "
                "backward, before learn"
            )
        return found
