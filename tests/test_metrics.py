"""Prequential measures against loops over the events."""

from __future__ import annotations

import math

import pytest
import torch

from esapn.metrics import Prequential
from esapn.model import event_losses

N = 60


def recorded(logits: torch.Tensor, target: torch.Tensor, batch: int = 7) -> Prequential:
    measures = Prequential(len(target))
    for z, y in zip(logits.split(batch), target.split(batch), strict=True):
        measures.record(z, y, event_losses(z, y))
    assert measures.seen == len(target)
    return measures


@pytest.fixture
def binary() -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.randn(N, 1).mul(4).round() / 4  # rounded: ties
    return logits, (torch.rand(N) < torch.sigmoid(logits[:, 0])).float()


@pytest.fixture
def classes() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(N, 5), torch.randint(5, (N,))


def auc_of_pairs(score: list[float], label: list[float]) -> float:
    positive = [s for s, y in zip(score, label, strict=True) if y == 1]
    negative = [s for s, y in zip(score, label, strict=True) if y == 0]
    wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    return wins / (len(positive) * len(negative))


@pytest.mark.parametrize(("start", "stop"), [(0, N), (0, 41), (41, N), (13, 40)])
def test_binary_summary(binary, start, stop):
    logits, target = binary
    summary = recorded(logits, target).summary(start, stop, target[start:stop])
    z, y = logits[start:stop, 0].double().tolist(), target[start:stop].tolist()
    p = [1 / (1 + math.exp(-v)) for v in z]
    n = stop - start
    pairs = list(zip(p, y, strict=True))
    expected = {
        "events": n,
        "accuracy": sum((q > 0.5) == (label == 1) for q, label in pairs) / n,
        "loss": sum((q - label) ** 2 for q, label in pairs) / n,
        "log_loss": -sum(math.log(q if label else 1 - q) for q, label in pairs) / n,
        "auc": auc_of_pairs(z, y),
    }
    assert len(set(z)) < n  # there are ties
    assert summary == pytest.approx(expected, rel=1e-5)


def test_multiclass_summary(classes):
    logits, target = classes
    summary = recorded(logits, target).summary(10, N, target[10:])
    correct, loss = 0, 0.0
    for row, label in zip(logits[10:].double().tolist(), target[10:].tolist(), strict=True):
        correct += row.index(max(row)) == label
        loss += math.log(sum(map(math.exp, row))) - row[label]
    mean = loss / (N - 10)
    expected = {"events": N - 10, "accuracy": correct / (N - 10), "loss": mean, "log_loss": mean}
    assert summary == pytest.approx(expected, rel=1e-5)


def test_extreme_logits_stay_finite():
    target = torch.tensor([1.0, 0.0, 1.0, 0.0])
    logits = torch.tensor([[200.0], [-200.0], [-200.0], [200.0]])
    summary = recorded(logits, target).summary(0, 4, target)
    assert summary["accuracy"] == 0.5 and summary["loss"] == 0.5 and summary["auc"] == 0.5
    assert summary["log_loss"] == pytest.approx(100.0)


def test_auc_of_a_perfect_and_a_reversed_ranking():
    target = torch.tensor([0.0, 0.0, 1.0, 1.0])
    logits = torch.tensor([[-3.0], [-2.0], [-1.0], [-0.5]])
    assert recorded(logits, target).summary(0, 4, target)["auc"] == 1.0
    assert recorded(-logits, target).summary(0, 4, target)["auc"] == 0.0


@pytest.mark.parametrize("n_events", [1, 9, N, 10 * N])
def test_window_is_the_mean_of_the_last_events(classes, n_events):
    logits, target = classes
    measures = recorded(logits, target)
    loss, accuracy = measures.window(n_events)
    assert loss == pytest.approx(event_losses(logits, target)[-n_events:].mean().item())
    correct = (logits.argmax(1) == target)[-n_events:]
    assert accuracy == pytest.approx(correct.double().mean().item())


def test_window_looks_at_recorded_events_only(binary):
    logits, target = binary
    measures = Prequential(N)
    measures.record(logits[:5], target[:5], torch.full((5,), 2.0))
    assert measures.window(3)[0] == 2.0
    measures.record(logits[5:7], target[5:7], torch.tensor([5.0, 6.0]))
    assert measures.window(3)[0] == pytest.approx((2 + 5 + 6) / 3)
    assert measures.loss[7:].eq(0).all()
