"""Running shrunken means against dictionaries."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch

from esapn.models.biases import Biases
from esapn.models.two_tower import event_losses, predictions


class Slow:
    """The same over Python numbers, one class or one-hot at a time."""

    def __init__(self, n_outputs: int, shrink_user: float, shrink_item: float) -> None:
        self.n = n_outputs
        self.shrink = {"user": shrink_user, "item": shrink_item}
        self.total, self.events = [0.0] * n_outputs, 0
        self.residuals = {name: defaultdict(lambda: [0.0] * n_outputs) for name in self.shrink}
        self.counts = {name: defaultdict(int) for name in self.shrink}

    def bias(self, name: str, index: int) -> list[float]:
        weight = self.counts[name][index] + self.shrink[name]
        return [r / weight if weight else 0.0 for r in self.residuals[name][index]]

    def mean(self) -> list[float]:
        return [t / max(self.events, 1) for t in self.total]

    def predict(self, user: int, item: int) -> list[float]:
        parts = self.mean(), self.bias("user", user), self.bias("item", item)
        return [min(max(sum(p), 1e-3), 1 - 1e-3) for p in zip(*parts, strict=True)]

    def learn(self, users: list[int], items: list[int], labels: list[float]) -> None:
        ys = [[y] if self.n == 1 else [float(k == y) for k in range(self.n)] for y in labels]
        for y in ys:
            self.total = [t + v for t, v in zip(self.total, y, strict=True)]
        self.events += len(ys)
        mean = self.mean()
        of_item = {i: self.bias("item", i) for i in items}  # before this batch
        for user, item, y in zip(users, items, ys, strict=True):
            for name, index, known in (
                ("item", item, [0.0] * self.n),
                ("user", user, of_item[item]),
            ):
                held = self.residuals[name][index]
                for k in range(self.n):
                    held[k] += y[k] - mean[k] - known[k]
                self.counts[name][index] += 1


@pytest.mark.parametrize("n_outputs", [1, 5])
@pytest.mark.parametrize("shrink", [(10.0, 10.0), (0.5, 25.0), (0.0, 0.0)])
def test_against_dictionaries(n_outputs, shrink):
    generator = torch.Generator().manual_seed(1)
    torch.set_default_dtype(torch.float64)
    try:
        model = Biases(12, 7, n_outputs=n_outputs, shrink_user=shrink[0], shrink_item=shrink[1])
    finally:
        torch.set_default_dtype(torch.float32)
    slow = Slow(n_outputs, *shrink)
    for _ in range(30):
        user = torch.randint(12, (10,), generator=generator)
        item = torch.randint(7, (10,), generator=generator)
        label = torch.randint(2 if n_outputs == 1 else 5, (10,), generator=generator)
        target = label.double() if n_outputs == 1 else label
        p = torch.tensor(
            [slow.predict(u, i) for u, i in zip(user.tolist(), item.tolist(), strict=True)],
            dtype=torch.float64,
        )
        logits = model(user, item)
        assert logits.shape == (10, n_outputs)
        if n_outputs == 1:
            torch.testing.assert_close(torch.sigmoid(logits), p)
            torch.testing.assert_close(event_losses(logits, target), (p[:, 0] - target) ** 2)
        else:
            q = p / p.sum(1, keepdim=True)
            torch.testing.assert_close(torch.softmax(logits, 1), q)
            assert torch.equal(predictions(logits), p.argmax(1))
        model.learn(user, item, target)
        slow.learn(user.tolist(), item.tolist(), label.tolist())


def test_by_hand():
    model = Biases(2, 2, n_outputs=1, shrink_user=1.0, shrink_item=3.0)
    zero, one = torch.tensor([0]), torch.tensor([1])
    assert torch.sigmoid(model(zero, zero)).item() == pytest.approx(1e-3)  # nothing is known
    model.learn(
        torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 1]), torch.tensor([1.0, 1, 0, 0])
    )
    # mu = 1/2; item 0: (1/2 + 1/2 - 1/2) / 6, item 1: -1/2 / 4; user 0: 1 / 3, user 1: -1 / 3
    for user, item, expected in (
        (zero, zero, 1 / 2 + 1 / 3 + 1 / 12),
        (zero, one, 1 / 2 + 1 / 3 - 1 / 8),
        (one, zero, 1 / 2 - 1 / 3 + 1 / 12),
        (one, one, 1 / 2 - 1 / 3 - 1 / 8),
    ):
        assert torch.sigmoid(model(user, item)).item() == pytest.approx(expected)


def test_probabilities_stay_inside():
    model = Biases(1, 1, n_outputs=1, shrink_user=0, shrink_item=0)
    zero = torch.tensor([0])
    for _ in range(5):
        model.learn(zero, zero, torch.ones(1))
    assert torch.sigmoid(model(zero, zero)).item() == pytest.approx(0.999)
    assert model(zero, zero).item() == pytest.approx(math.log(999), rel=1e-4)


def test_nothing_learns_by_gradient():
    model = Biases(3, 4, n_outputs=5)
    assert not list(model.parameters())
    assert not model(torch.tensor([0, 2]), torch.tensor([3, 3])).requires_grad
