"""Soft sizes: DARTS and AutoEmb, the published baselines that mix all sizes of every ID.

    y(x) = sum_k w_k(x) tanh(BN(L_k e_k(x)))         e_k: slice of size d_k of one row of sum(d)
    y(x) = sum_k w_k(x) L_k e_k(x)                   with plain towers

    DARTS      w(x) = softmax(a_x), a free vector per ID
    AutoEmb    w(x) = softmax of a controller of the ID's frequency and its previous w

Every ID keeps ``sum(d) = 222`` numbers and its weights: nothing is saved at serving. The weights
learn by an Adam of their own on the losses of the new batch, before the recommender has learnt it,
as the search's policies do. Lifts go straight to the largest size, as in the authors' code.

Sources: Liu, Simonyan, Yang, "DARTS", ICLR 2019; Zhao et al., "AutoEmb", ICDM 2021; both as
baselines in Liu et al., SIGIR 2020.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .recommender import TableBytes
from .tanh import Tanh, tanh

__all__ = ["SoftEmbedding"]


class SoftEmbedding(nn.Module):
    """All sizes of every row, mixed by weights of its own.

    Args:
        num_embeddings: IDs.
        sizes: candidate sizes.
        method: ``darts`` or ``autoemb``.
        init_std: rows start as N(0, init_std^2).
        plain: no BatchNorm and tanh on the lifted slices.
        frequency_dim, max_frequency, hidden: of AutoEmb's controller.

    Example:
        >>> table = SoftEmbedding(10, (2, 4), method="darts")
        >>> ids = torch.tensor([3, 3, 7])
        >>> table(ids, torch.tensor([1, 2, 1])).shape
        torch.Size([3, 4])
        >>> table.weights(ids, torch.tensor([1, 2, 1]))[0].tolist()
        [0.5, 0.5]
    """

    previous: Tensor

    def __init__(
        self,
        num_embeddings: int,
        sizes: Sequence[int],
        *,
        method: str,
        init_std: float = 1.0,
        plain: bool = False,
        frequency_dim: int = 32,
        max_frequency: int = 4096,
        hidden: int = 512,
    ) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.sizes = tuple(sizes)
        self.embedding_dim = self.sizes[-1]
        self.method = method
        self.max_frequency = max_frequency
        self.rows = nn.Embedding(num_embeddings, sum(sizes))
        nn.init.normal_(self.rows.weight, std=init_std)
        self.lifts = nn.ModuleList(nn.Linear(d, self.embedding_dim) for d in sizes)
        self.norm = None if plain else nn.BatchNorm1d(self.embedding_dim)
        n = len(self.sizes)
        if method == "darts":
            self.logits = nn.Parameter(torch.zeros(num_embeddings, n))
            return
        self.frequency = nn.Embedding(max_frequency + 1, frequency_dim)
        self.frequency_norm = nn.BatchNorm1d(frequency_dim)
        self.controller = nn.Sequential(
            nn.Linear(frequency_dim + n, hidden),
            nn.BatchNorm1d(hidden),
            Tanh(),
            nn.Linear(hidden, n),
        )
        # One more row takes the writes of events that are not an ID's last in the batch.
        start = torch.zeros(num_embeddings + 1, n)
        start[:, 0] = 1
        self.register_buffer("previous", start)

    def soft_parameters(self) -> list[nn.Parameter]:
        """The parameters of the weights; the optimizer of the recommender has all others."""
        if self.method == "darts":
            return [self.logits]
        parts = (self.frequency, self.frequency_norm, self.controller)
        return [p for part in parts for p in part.parameters()]

    def weights(self, ids: Tensor, frequency: Tensor) -> Tensor:
        """``w`` ``[B, n]`` of ids ``[B]`` with running counts ``[B]``."""
        if self.method == "darts":
            return torch.softmax(nn.functional.embedding(ids, self.logits), dim=1)
        seen = self.frequency(frequency.clamp(max=self.max_frequency))
        state = torch.cat([self.frequency_norm(seen), self.previous[ids]], dim=1)
        return torch.softmax(self.controller(state), dim=1)

    def forward(self, ids: Tensor, frequency: Tensor, last: Tensor | None = None) -> Tensor:
        """``y`` ``[B, D]``.

        Args:
            ids: int64 ``[B]``.
            frequency: int ``[B]``, events of each ID so far.
            last: bool ``[B]``, each ID's last event in the batch, whose weights are remembered;
                default: nothing is.
        """
        weights = self.weights(ids, frequency)
        if self.method == "autoemb" and last is not None:
            row = torch.where(last, ids, self.num_embeddings)
            self.previous[row] = weights.detach()
        total = torch.zeros((), device=ids.device)
        slices = self.rows(ids).split(self.sizes, dim=1)
        for k, (part, lift) in enumerate(zip(slices, self.lifts, strict=True)):
            h = lift(part)
            h = h if self.norm is None else tanh(self.norm(h))
            total = total + weights[:, k : k + 1] * h
        return total

    def memory(self, optimizers: Sequence[torch.optim.Optimizer]) -> TableBytes:
        """Every ID has all sizes and its weights; the lifts count as ``chain``."""
        weights = self.logits if self.method == "darts" else self.previous
        states = [optimizer.state.get(self.rows.weight, {}) for optimizer in optimizers]
        held = [v for state in states for v in state.values() if isinstance(v, Tensor)]
        return TableBytes(
            {str(sum(self.sizes)): self.num_embeddings},
            payload=self.rows.weight.nbytes + weights.nbytes,
            chain=sum(p.nbytes for p in self.lifts.parameters()),
            optimizer=sum(v.nbytes for v in held if v.dim()),
        )
