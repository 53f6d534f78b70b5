"""The policy of one side, and the pure functions of REINFORCE (ESAPN, SIGIR 2020)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .idstate import num_features

__all__ = [
    "LossHistory",
    "Policy",
    "RunningScale",
    "entropy",
    "policy_loss",
    "reward",
    "sample_actions",
]

KEEP, ENLARGE = 0, 1


class MaskedBatchNorm(nn.Module):
    """BatchNorm whose statistics are those of the rows that ``mask`` selects.

        z = (x - mean_m) / sqrt(var_m + eps) * weight + bias

    The other rows are normalised with the same statistics and mean nothing. One row gives ``bias``.
    """

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.eps = eps

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None and len(x) > 1:
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
        weight = x.new_ones(len(x)) if mask is None else mask.to(x.dtype)
        share = (weight / weight.sum().clamp(min=1))[None]
        centred = x - share @ x
        var = (share @ centred.square())[0]
        return centred * (torch.rsqrt(var + self.eps) * self.weight) + self.bias


class Policy(nn.Module):
    """Keep or enlarge, from how often an ID was seen and the size that it has.

        s = [BN(E_f); onehot(level)],   pi(a | s) = softmax(W_2 tanh(BN(W_1 s + b_1)) + b_2)

    With statistics ``z`` of the IDs (``idstate``), ``s = [z; onehot(level)]`` and a LayerNorm in
    place of the second BN: what one ID does then depends on no other ID of the batch.

    Args:
        n_levels: number of candidate sizes.
        rich: the state is made of statistics rather than of an embedding of the frequency.
        indifferent: both actions start equally likely in every state.
        max_frequency: frequencies from here on share the last row of ``E``.
        frequency_dim, hidden: widths.

    Example:
        >>> policy = Policy(6)
        >>> policy(torch.tensor([1, 700]), torch.tensor([0, 3])).shape
        torch.Size([2, 2])
    """

    def __init__(
        self,
        n_levels: int,
        *,
        max_frequency: int = 4096,
        frequency_dim: int = 32,
        hidden: int = 512,
        rich: bool = False,
        indifferent: bool = False,
    ) -> None:
        super().__init__()
        self.n_levels = n_levels
        self.max_frequency = max_frequency
        self.rich = rich
        width = num_features() if rich else frequency_dim
        if not rich:
            self.frequency = nn.Embedding(max_frequency + 1, frequency_dim)
            self.frequency_norm = MaskedBatchNorm(width)
        self.linear1 = nn.Linear(width + n_levels, hidden)
        self.norm = nn.LayerNorm(hidden) if rich else MaskedBatchNorm(hidden)
        self.linear2 = nn.Linear(hidden, 2)
        if indifferent:
            nn.init.zeros_(self.linear2.weight)
            nn.init.zeros_(self.linear2.bias)

    def forward(
        self,
        frequency: Tensor,
        level: Tensor,
        mask: Tensor | None = None,
        statistics: Tensor | None = None,
    ) -> Tensor:
        """Logits ``[B, 2]`` of keep and enlarge.

        Args:
            frequency: int ``[B]``, events of the ID so far, at least 1.
            level: int ``[B]``, index of its size.
            mask: bool ``[B]``, the IDs that decide; ``None``: all of them.
            statistics: ``[B, num_features()]``, of a rich state.
        """
        if statistics is None:
            seen = self.frequency(frequency.clamp(max=self.max_frequency))
            seen = self.frequency_norm(seen, mask)
        else:
            seen = statistics
        size = F.one_hot(level.long(), self.n_levels).to(seen.dtype)
        hidden = self.linear1(torch.cat([seen, size], dim=1))
        hidden = self.norm(hidden) if self.rich else self.norm(hidden, mask)
        logits: Tensor = self.linear2(torch.tanh(hidden))
        return logits


def sample_actions(logits: Tensor, uniform: Tensor) -> Tensor:
    """``a ~ pi``: ENLARGE (1) where ``uniform < pi(enlarge)``, else KEEP (0); int64 ``[B]``.

    >>> sample_actions(torch.zeros(2, 2), torch.tensor([0.4, 0.6]))
    tensor([1, 0])
    """
    return (uniform < torch.softmax(logits, dim=1)[:, ENLARGE]).long()


def reward(baseline: Tensor, loss: Tensor, seen: Tensor) -> Tensor:
    """``R = (1/T) sum of the ID's last T losses - L``; 0 for an ID without a history.

    >>> reward(torch.tensor([0.5, 0.0]), torch.tensor([0.2, 0.3]), torch.tensor([True, False]))
    tensor([0.3000, 0.0000])
    """
    return torch.where(seen, baseline - loss, 0.0)


def policy_loss(logits: Tensor, action: Tensor, reward: Tensor, mask: Tensor | None) -> Tensor:
    """REINFORCE with one sample: ``-sum_x R_x log pi(a_x | s_x)`` over the IDs that decide."""
    weighted = F.cross_entropy(logits, action, reduction="none") * reward
    return weighted.sum() if mask is None else torch.where(mask, weighted, 0.0).sum()


def entropy(logits: Tensor, mask: Tensor | None) -> Tensor:
    """``-sum_x sum_a pi(a | s_x) log pi(a | s_x)`` over the IDs that decide.

    >>> round(entropy(torch.zeros(1, 2), None).item(), 4)
    0.6931
    """
    log_pi = torch.log_softmax(logits, dim=1)
    each = -(log_pi.exp() * log_pi).sum(1)
    return each.sum() if mask is None else torch.where(mask, each, 0.0).sum()


class RunningScale(nn.Module):
    """Running mean and root mean square of rewards, for ``--advantage normalised``.

        m <- b m + (1 - b) mean(x),   q <- b q + (1 - b) mean(x^2),   b = 0.99, bias-corrected

    Example:
        >>> scale = RunningScale()
        >>> scale.update(torch.tensor([1.0, 3.0]), None)
        >>> mean, spread = scale.moments()
        >>> mean.item(), round(spread.item(), 4)
        (2.0, 2.2361)
    """

    sums: Tensor

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("sums", torch.zeros(3))

    @torch.no_grad()
    def update(self, x: Tensor, mask: Tensor | None) -> None:
        """Take in the rewards ``x`` (where ``mask``); none at all change nothing."""
        weight = torch.ones_like(x) if mask is None else mask.to(x.dtype)
        n = weight.sum()
        x = torch.where(weight > 0, x, 0.0)
        batch = torch.stack([x.sum(), x.square().sum(), n]) / n.clamp(min=1)
        new = self.decay * self.sums + (1 - self.decay) * batch
        self.sums.copy_(torch.where(n > 0, new, self.sums))

    def normalise(self, x: Tensor, known: Tensor, mask: Tensor | None) -> Tensor:
        """Take in ``x`` where ``known`` and ``mask``: ``(x - m) / sqrt(q - m^2)``, else 0."""
        self.update(x, known if mask is None else known & mask)
        mean, spread = self.moments()
        deviation = (spread.square() - mean.square()).clamp(min=1e-12).sqrt()
        return torch.where(known, (x - mean) / deviation, 0.0)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and root mean square so far; 0 and 1 before there is any."""
        mean, square, weight = self.sums
        known = weight > 0
        mean = torch.where(known, mean / weight.clamp(min=1e-12), 0.0)
        square = torch.where(known, square / weight.clamp(min=1e-12), 1.0)
        return mean, square.sqrt().clamp(min=1e-12)


class LossHistory(nn.Module):
    """The last ``T`` losses of every ID of one side, as a ring per ID.

    An event with running frequency ``f`` (1-based) writes slot ``(f - 1) mod T``, so the ring needs
    no counters of its own and a batch is one scatter.

    Example:
        >>> history = LossHistory(num_rows=3, length=2)
        >>> ids, first = torch.tensor([1]), torch.tensor([True])
        >>> for f, loss in enumerate([0.5, 0.3, 0.1], start=1):
        ...     history.record(ids, torch.tensor([f]), torch.tensor([loss]), first)
        >>> mean, seen = history.mean(ids)
        >>> round(mean.item(), 6), seen.item()
        (0.2, True)
    """

    losses: Tensor
    count: Tensor

    def __init__(
        self, num_rows: int, length: int, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.num_rows = num_rows
        self.length = length
        # One more row takes the writes of events that are not kept.
        self.register_buffer("losses", torch.zeros(num_rows + 1, length, device=device))
        count = torch.zeros(num_rows + 1, dtype=torch.int32, device=device)
        self.register_buffer("count", count)

    def mean(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of the losses kept for each ID ``[B]``, and whether there are any."""
        count = self.count[ids].clamp(max=self.length)
        return self.losses[ids].sum(1) / count.clamp(min=1), count > 0

    def record(self, ids: Tensor, frequency: Tensor, loss: Tensor, keep: Tensor) -> None:
        """Write the losses of a batch; ``keep``: among the last T events of its ID in the batch."""
        row = torch.where(keep, ids, self.num_rows)
        self.losses[row, (frequency - 1) % self.length] = loss
        self.count.scatter_reduce_(0, ids, frequency.to(self.count.dtype), "amax")
