"""What a policy may know of an ID beyond its count and its size, kept on the device.

The published future work asks for "other information" in the policy's state. Per ID, updated at its
last event of every batch:

    decayed frequency   c <- c 2^(-dt / h) + 1        dt: steps since the ID came, h = half_life
    loss                mean and variance, exponential averages over its events
    gradient norm       exponential average of |dL/dy|
    age                 steps since it first came

Training memory, 28 bytes an ID; none of it is served.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["NUM_BUCKETS", "IdStatistics", "num_features"]

NUM_BUCKETS = 16
_DECAY = 0.9
_HALF_LIFE = 500.0


def num_features() -> int:
    """Width of :meth:`IdStatistics.features`."""
    return NUM_BUCKETS + 6


class IdStatistics(nn.Module):
    """Running statistics of every ID of one table.

    Args:
        num_rows: IDs.

    Example:
        >>> statistics = IdStatistics(10)
        >>> ids = torch.tensor([3, 7])
        >>> statistics.update(ids, torch.tensor([0.2, 0.4]), torch.tensor([1.0, 2.0]), step=0)
        >>> statistics.features(ids, torch.tensor([1, 1]), step=1).shape
        torch.Size([2, 22])
    """

    decayed: Tensor
    first: Tensor
    latest: Tensor
    loss: Tensor
    square: Tensor
    norm: Tensor
    seen: Tensor

    def __init__(self, num_rows: int) -> None:
        super().__init__()
        # One more row takes the writes of events that are not an ID's last.
        for name in ("decayed", "loss", "square", "norm", "seen"):
            self.register_buffer(name, torch.zeros(num_rows + 1))
        for name in ("first", "latest"):
            self.register_buffer(name, torch.zeros(num_rows + 1, dtype=torch.int32))

    def features(self, ids: Tensor, frequency: Tensor, step: int) -> Tensor:
        """``[B, num_features()]``: one-hot bucket of log2 f, then six logarithms and means.

        Args:
            ids: int64 ``[B]``.
            frequency: int ``[B]``, events so far, this one included.
            step: batches before this one.
        """
        log_frequency = torch.log2(frequency.clamp(min=1).float())
        bucket = log_frequency.long().clamp(max=NUM_BUCKETS - 1)
        known = self.seen[ids] > 0
        age = torch.where(known, step - self.first[ids], 0).float()
        idle = torch.where(known, step - self.latest[ids], 0).float()
        decayed = self.decayed[ids] * torch.exp2(-idle / _HALF_LIFE)
        variance = (self.square[ids] - self.loss[ids].square()).clamp(min=0)
        # Of the order of 1, whatever the rest of the batch.
        numbers = [
            log_frequency / 8,
            torch.log2(1 + decayed) / 8,
            torch.log2(1 + age) / 8,
            self.loss[ids],
            variance.sqrt(),
            torch.log2(self.norm[ids] + 1e-4) / 8,
        ]
        onehot = nn.functional.one_hot(bucket, NUM_BUCKETS).float()
        return torch.cat([onehot, torch.stack(numbers, dim=1)], dim=1)

    @torch.no_grad()
    def update(
        self, ids: Tensor, loss: Tensor, norm: Tensor, step: int, keep: Tensor | None = None
    ) -> None:
        """Take in one event of every ID; ids distinct where ``keep``.

        Args:
            ids: int64 ``[B]``.
            loss, norm: ``[B]``, of the events: loss and length of dL/dy.
            step: batches before this one.
            keep: bool ``[B]``; default: all.
        """
        row = ids if keep is None else torch.where(keep, ids, len(self.seen) - 1)
        new = self.seen[row] == 0
        self.first[row] = torch.where(new, torch.full_like(self.first[row], step), self.first[row])
        idle = torch.where(new, 0, step - self.latest[row]).float()
        self.decayed[row] = self.decayed[row] * torch.exp2(-idle / _HALF_LIFE) + 1
        self.latest[row] = torch.full_like(self.latest[row], step)
        for name, value in (("loss", loss), ("square", loss.square()), ("norm", norm)):
            held = getattr(self, name)
            held[row] = torch.where(new, value, _DECAY * held[row] + (1 - _DECAY) * value)
        self.seen[row] = 1.0
