"""What a run needs of every model: predictions, its rows, what it learns by, the bytes it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from esapn_kernels import ResizableEmbedding

__all__ = ["Events", "Recommender", "TableBytes"]


class Events(NamedTuple):
    """One side of a batch, ``[B]`` each."""

    ids: Tensor  # int64
    frequency: Tensor  # int32, events of the ID so far, this one included
    last: Tensor  # bool, the ID's last event in the batch


@dataclass(frozen=True)
class TableBytes:
    """Bytes of one table, really allocated; ``optimizer`` only in training.

    With a ``budget`` ``serving`` never exceeds it; ``refused`` counts the rows that stayed, once at
    every attempt, for want of room.
    """

    rows_per_size: dict[str, int]
    payload: int
    slack: int = 0
    locations: int = 0
    chain: int = 0
    optimizer: int = 0
    budget: int | None = None
    refused: int = 0

    @property
    def serving(self) -> int:
        """``payload + slack + locations + chain``."""
        return self.payload + self.slack + self.locations + self.chain


class Recommender(nn.Module):
    """A model of users and items. Its defaults are those of a model without embedding rows."""

    def predict(self, user: Events, item: Events) -> Tensor:
        """Logits ``[B, n_outputs]``, by the forward pass."""
        logits: Tensor = self(user.ids, item.ids)
        return logits

    def learn(self, user: Tensor, item: Tensor, target: Tensor, loss: Tensor) -> None:
        """Gradients of the events' losses ``[B]``, for the optimizers to follow."""
        loss.sum().backward()

    def tables(self) -> dict[str, ResizableEmbedding]:
        """The resizable tables by side; none by default."""
        return {}

    def rows(self) -> list[Tensor]:
        """The parameters that hold embedding rows."""
        return []

    def tails(self) -> list[nn.Parameter]:
        """The parameters of hops that learn the appended numbers of a row alone."""
        return []

    def soft_parameters(self) -> list[nn.Parameter]:
        """The parameters that set soft sizes."""
        return []

    def row_optimizer(self, name: str, lr: float, start: float) -> torch.optim.Optimizer:
        """``adam`` or ``adagrad`` over :meth:`rows`; Adagrad's sums begin at ``start``."""
        raise NotImplementedError

    def memory(self, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, TableBytes]:
        """What each side takes, with the state that ``optimizers`` hold of its rows."""
        raise NotImplementedError
