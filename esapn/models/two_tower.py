"""The recommender: two towers over resizable rows, and an inference layer (ESAPN, SIGIR 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esapn_kernels import ResizableEmbedding, optim

from .recommender import Events, Recommender, TableBytes
from .soft import SoftEmbedding
from .tanh import Tanh

__all__ = ["SoftTwoTower", "TwoTower", "event_losses", "inference_layer", "predictions"]


class TwoTower(Recommender):
    """Score of a (user, item) pair.

        v_side = tanh(BN(y_side(x)))           y: the row carried to D (``ResizableEmbedding``)
        v_side = y_side(x)                     with plain towers
        logits = W_2 tanh(BN(W_1 BN([v_user; v_item]) + b_1)) + b_2
        logits = W_2 relu(W_1 [v_user; v_item] + b_1) + b_2            with a plain head

    BatchNorm sees the selected rows only: each event's row at its own size.

    Args:
        n_users, n_items: rows of the two embeddings.
        sizes: candidate sizes; one size makes it the FIXED baseline.
        n_outputs: 1 (binary) or the number of classes.
        hidden: width of the inference layer.
        init_std: rows start as N(0, init_std^2), at the smallest size.
        plain: no BatchNorm and tanh on the towers.
        plain_head: no BatchNorm in the inference layer, and ReLU in place of tanh.
        hops: ``linear``: trained, as published; ``padded``: fixed, a grown row appends zeros;
            ``tails``: it appends ``B e + b``, which are trained.

    Example:
        >>> model = TwoTower(10, 20, sizes=(2, 4), n_outputs=1, hidden=8)
        >>> model(torch.tensor([0, 1, 1]), torch.tensor([5, 5, 19])).shape
        torch.Size([3, 1])
    """

    def __init__(
        self,
        n_users: int,
        n_items: int,
        *,
        sizes: Sequence[int],
        n_outputs: int,
        hidden: int = 512,
        init_std: float = 1.0,
        plain: bool = False,
        plain_head: bool = False,
        hops: str = "linear",
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"sizes": sizes, "init_std": init_std, "init": hops}
        self.user = ResizableEmbedding(n_users, **options)
        self.item = ResizableEmbedding(n_items, **options)
        for table in (self.user, self.item):
            if hops == "padded" and table.chain is not None:
                table.chain.requires_grad_(False)
        dim = self.user.embedding_dim
        self.user_norm = _tower(dim, plain)
        self.item_norm = _tower(dim, plain)
        self.inference = inference_layer(dim, hidden, n_outputs, plain_head)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        """Logits ``[B, n_outputs]`` of ids ``[B]``."""
        towers = [self.user_norm(self.user(user)), self.item_norm(self.item(item))]
        logits: Tensor = self.inference(torch.cat(towers, dim=1))
        return logits

    def tables(self) -> dict[str, ResizableEmbedding]:
        """Both tables."""
        return {"user": self.user, "item": self.item}

    def rows(self) -> list[Tensor]:
        """What holds the rows of both tables."""
        return [table.arena.parameter for table in self.tables().values()]

    def tails(self) -> list[nn.Parameter]:
        """Those of both tables, with ``hops="tails"`` and several sizes."""
        tables = (t for t in self.tables().values() if t.init == "tails")
        return [table.chain for table in tables if table.chain is not None]

    def row_optimizer(self, name: str, lr: float, start: float) -> torch.optim.Optimizer:
        """Adam over all rows, or an Adagrad that steps in the backward pass of the lookup."""
        if name == "adam":
            return torch.optim.Adam(self.rows(), lr=lr, fused=True)
        return optim.Adagrad([self.user, self.item], lr=lr, initial_accumulator_value=start)

    def memory(self, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, TableBytes]:
        """As allocated; a table of one size counts as a plain one, without locations."""
        found = {}
        for name, table in self.tables().items():
            report = table.memory_report()
            counts = {str(size): n for size, n in report.rows_per_size.items()}
            parts = ("slack", "locations", "chain") if len(table.sizes) > 1 else ()
            more = {part: getattr(report, part) for part in (*parts, "optimizer", "budget")}
            found[name] = TableBytes(counts, report.payload, refused=table.refused, **more)
        return found


class SoftTwoTower(Recommender):
    """The same recommender over soft sizes: see ``soft``.

    Args:
        user, item: tables of equal width.
        n_outputs, hidden, plain_head: as for :class:`TwoTower`.
    """

    def __init__(
        self,
        user: SoftEmbedding,
        item: SoftEmbedding,
        *,
        n_outputs: int,
        hidden: int = 512,
        plain_head: bool = False,
    ) -> None:
        super().__init__()
        self.user = user
        self.item = item
        self.inference = inference_layer(user.embedding_dim, hidden, n_outputs, plain_head)

    def forward(self, user: Events, item: Events) -> Tensor:
        """Logits ``[B, n_outputs]`` of the events of both sides."""
        logits: Tensor = self.inference(torch.cat([self.user(*user), self.item(*item)], dim=1))
        return logits

    def predict(self, user: Events, item: Events) -> Tensor:
        """Logits ``[B, n_outputs]``, by the forward pass."""
        logits: Tensor = self(user, item)
        return logits

    def rows(self) -> list[Tensor]:
        """The rows of both tables."""
        return [self.user.rows.weight, self.item.rows.weight]

    def soft_parameters(self) -> list[nn.Parameter]:
        """Those of both tables."""
        return [*self.user.soft_parameters(), *self.item.soft_parameters()]

    def row_optimizer(self, name: str, lr: float, start: float) -> torch.optim.Optimizer:
        """Torch's Adam or Adagrad over both tables."""
        # Fused: gradients are dense, and a temporary of every table at every step costs more.
        if name == "adam":
            return torch.optim.Adam(self.rows(), lr=lr, fused=True)
        return torch.optim.Adagrad(self.rows(), lr=lr, initial_accumulator_value=start, fused=True)

    def memory(self, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, TableBytes]:
        """See :meth:`SoftEmbedding.memory`."""
        return {"user": self.user.memory(optimizers), "item": self.item.memory(optimizers)}


def inference_layer(dim: int, hidden: int, n_outputs: int, plain: bool) -> nn.Sequential:
    """From both towers ``[B, 2 dim]`` to logits ``[B, n_outputs]``."""
    if plain:
        return nn.Sequential(nn.Linear(2 * dim, hidden), nn.ReLU(), nn.Linear(hidden, n_outputs))
    return nn.Sequential(
        nn.BatchNorm1d(2 * dim),
        nn.Linear(2 * dim, hidden),
        nn.BatchNorm1d(hidden),
        Tanh(),
        nn.Linear(hidden, n_outputs),
    )


def _tower(dim: int, plain: bool) -> nn.Module:
    return nn.Identity() if plain else nn.Sequential(nn.BatchNorm1d(dim), Tanh())


def event_losses(logits: Tensor, target: Tensor) -> Tensor:
    """Loss of every event ``[B]``: ``(sigmoid(z) - y)^2`` for one output, else cross-entropy.

    >>> event_losses(torch.tensor([[0.0]]), torch.tensor([1.0]))
    tensor([0.2500])
    """
    if logits.shape[1] == 1:
        return F.mse_loss(torch.sigmoid(logits[:, 0]), target, reduction="none")
    return F.cross_entropy(logits, target, reduction="none")


def predictions(logits: Tensor) -> Tensor:
    """Predicted label ``[B]``: ``sigmoid(z) > 0.5`` for one output, else the likeliest class."""
    if logits.shape[1] == 1:
        return (logits[:, 0] > 0).to(logits.dtype)
    return logits.argmax(1)
