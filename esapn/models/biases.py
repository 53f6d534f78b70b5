"""The control without any embedding: running, shrunken means of users and items.

    mu = mean of y
    b_i = sum (y - mu) / (n_i + s_i),     b_u = sum (y - mu - b_i) / (n_u + s_u)
    p(u, i) = mu + b_u + b_i

over the events before the batch; ``y`` is the label, or its one-hot vector. Two numbers a class and
ID, no gradient. Residuals of users are taken against the item means of their time.

Source: the baseline predictors of Koren, "Factor in the Neighbors", TKDD 2010, as running sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .recommender import Recommender, TableBytes

__all__ = ["Biases"]

_LEAST = 1e-3


class Biases(Recommender):
    """Running shrunken means.

    Args:
        n_users, n_items: IDs.
        n_outputs: 1 (binary) or the number of classes.
        shrink_user, shrink_item: ``s_u``, ``s_i``, events.

    Example:
        >>> model = Biases(2, 2, n_outputs=1, shrink_user=0, shrink_item=0)
        >>> model.learn(torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([1.0, 0.0]))
        >>> torch.sigmoid(model(torch.tensor([0]), torch.tensor([0]))).item() > 0.99
        True
    """

    total: Tensor
    user: Tensor
    item: Tensor

    def __init__(
        self,
        n_users: int,
        n_items: int,
        *,
        n_outputs: int,
        shrink_user: float = 10.0,
        shrink_item: float = 10.0,
    ) -> None:
        super().__init__()
        self.n_outputs = n_outputs
        self.shrink_user = shrink_user
        self.shrink_item = shrink_item
        # Sums of every class, and the count.
        self.register_buffer("total", torch.zeros(n_outputs + 1))
        self.register_buffer("user", torch.zeros(n_users, n_outputs + 1))
        self.register_buffer("item", torch.zeros(n_items, n_outputs + 1))

    def _means(self, user: Tensor, item: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean = self.total[:-1] / self.total[-1].clamp(min=1)
        by_item, by_user = self.item[item], self.user[user]
        b_item = by_item[:, :-1] / (by_item[:, -1:] + self.shrink_item).clamp(min=1e-12)
        b_user = by_user[:, :-1] / (by_user[:, -1:] + self.shrink_user).clamp(min=1e-12)
        return mean, b_user, b_item

    @torch.no_grad()
    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        """Logits ``[B, n_outputs]``; their sigmoid or softmax is ``p``."""
        mean, b_user, b_item = self._means(user, item)
        p = (mean + b_user + b_item).clamp(_LEAST, 1 - _LEAST)
        return torch.logit(p) if self.n_outputs == 1 else torch.log(p)

    @torch.no_grad()
    def learn(self, user: Tensor, item: Tensor, target: Tensor, loss: Tensor | None = None) -> None:
        """Add the labels of a batch: float 0 or 1, or int64 classes; ``[B]``. No gradient."""
        if self.n_outputs == 1:
            y = target[:, None]
        else:
            y = nn.functional.one_hot(target, self.n_outputs).to(self.total.dtype)
        one = torch.ones_like(y[:, :1])
        self.total += torch.cat([y, one], dim=1).sum(0)
        mean, _, b_item = self._means(user, item)
        self.item.index_add_(0, item, torch.cat([y - mean, one], dim=1))
        self.user.index_add_(0, user, torch.cat([y - mean - b_item, one], dim=1))

    def memory(self, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, TableBytes]:
        """The sums and counts of each side."""
        return {
            "user": TableBytes({}, self.user.nbytes),
            "item": TableBytes({}, self.item.nbytes),
        }
