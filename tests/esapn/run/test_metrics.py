"""Prequential measures against loops over the events."""

from __future__ import annotations

import math

import pytest
import torch

from esapn.models.two_tower import event_losses
from esapn.run.metrics import Prequential

N = 60


def recorded(
    logits: torch.Tensor, target: torch.Tensor, n_train: int = 0, batch: int = 7
) -> Prequential:
    """All events; no batch crosses ``n_train``."""
    measures = Prequential(n_train, len(target))
    for start, stop in ((0, n_train), (n_train, len(target))):
        for begin in range(start, stop, batch):
            part = slice(begin, min(begin + batch, stop))
            z, y = logits[part], target[part]
            measures.record(z, y, event_losses(z, y), torch.ones(2, len(y), dtype=torch.int32))
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


def binary_measures(z: list[float], y: list[float]) -> dict[str, float]:
    p = [1 / (1 + math.exp(-v)) for v in z]
    n = len(z)
    pairs = list(zip(p, y, strict=True))
    return {
        "events": n,
        "accuracy": sum((q > 0.5) == (label == 1) for q, label in pairs) / n,
        "loss": sum((q - label) ** 2 for q, label in pairs) / n,
        "log_loss": -sum(math.log(q if label else 1 - q) for q, label in pairs) / n,
    }


@pytest.mark.parametrize("n_train", [0, 7, 13, 41])
def test_binary_summary(binary, n_train):
    logits, target = binary
    measures = recorded(logits, target, n_train)
    z, y = logits[:, 0].double().tolist(), target.tolist()
    assert len(set(z)) < N  # there are ties
    expected = binary_measures(z[n_train:], y[n_train:])
    assert measures.summary("test") == pytest.approx(expected, rel=1e-5)
    expected["auc"] = auc_of_pairs(z[n_train:], y[n_train:])
    assert measures.summary("test", target[n_train:]) == pytest.approx(expected, rel=1e-5)
    if n_train:
        expected = binary_measures(z[:n_train], y[:n_train])
        assert measures.summary("train") == pytest.approx(expected, rel=1e-5)


def test_parts_without_events():
    measures = Prequential(4, 8)
    nothing = {"events": 0, "accuracy": 0.0, "loss": 0.0, "log_loss": 0.0}
    assert measures.summary("train") == measures.summary("test") == nothing
    assert measures.window() == (0.0, 0.0)
    assert measures.by_frequency() == {"user": [], "item": []}


def test_multiclass_summary(classes):
    logits, target = classes
    summary = recorded(logits, target, 10).summary("test", target[10:])
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
    summary = recorded(logits, target).summary("test", target)
    assert summary["accuracy"] == 0.5 and summary["loss"] == 0.5 and summary["auc"] == 0.5
    assert summary["log_loss"] == pytest.approx(100.0)


def test_auc_of_a_perfect_and_a_reversed_ranking():
    target = torch.tensor([0.0, 0.0, 1.0, 1.0])
    logits = torch.tensor([[-3.0], [-2.0], [-1.0], [-0.5]])
    assert recorded(logits, target).summary("test", target)["auc"] == 1.0
    assert recorded(-logits, target).summary("test", target)["auc"] == 0.0


@pytest.mark.parametrize("n_train", [0, 20, N - 1])
def test_window_is_the_mean_of_the_events_since_the_last_one(classes, n_train):
    logits, target = classes
    measures = Prequential(n_train, N)
    right = (logits.argmax(1) == target).double()
    read = 0
    for begin in range(0, N, 5):
        part = slice(begin, begin + 5)
        loss = event_losses(logits[part], target[part])
        measures.record(logits[part], target[part], loss, torch.ones(2, 5, dtype=torch.int32))
        if begin % 3 == 0 or begin == N - 5:
            since = slice(read, begin + 5)
            loss, accuracy = measures.window()
            assert loss == pytest.approx(event_losses(logits[since], target[since]).mean().item())
            assert accuracy == pytest.approx(right[since].mean().item())
            read = begin + 5
    assert measures.window() == (0.0, 0.0)


def test_frequencies_of_test_events_fall_into_powers_of_two():
    frequency = torch.tensor([[1, 2, 3, 4, 7, 2**30], [5, 5, 5, 8, 8, 1]], dtype=torch.int32)
    loss = torch.arange(6.0)
    target = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    logits = torch.ones(6, 1)  # all say 1: right, wrong, right, right, wrong, wrong
    measures = Prequential(6, 12)
    measures.record(logits, target, loss + 100, frequency)  # trains: in no bucket
    assert measures.by_frequency() == {"user": [], "item": []}
    measures.record(logits, target, loss, frequency)
    assert measures.by_frequency() == {
        "user": [
            {"from": 1, "to": 2, "events": 1, "loss": 0.0, "accuracy": 1.0},
            {"from": 2, "to": 4, "events": 2, "loss": 1.5, "accuracy": 0.5},
            {"from": 4, "to": 8, "events": 2, "loss": 3.5, "accuracy": 0.5},
            {"from": 2**30, "to": 2**31, "events": 1, "loss": 5.0, "accuracy": 0.0},
        ],
        "item": [
            {"from": 1, "to": 2, "events": 1, "loss": 5.0, "accuracy": 0.0},
            {"from": 4, "to": 8, "events": 3, "loss": 1.0, "accuracy": 2 / 3},
            {"from": 8, "to": 16, "events": 2, "loss": 3.5, "accuracy": 0.5},
        ],
    }


def test_sums_are_in_double_precision():
    """Of 2^25 events, a sum in fp32 would lose what one batch more adds."""
    measures = Prequential(2**26, 2**26 + 1)
    measures.sums[0, :2] = float(2**25)
    one = torch.ones(1)
    measures.record(torch.ones(1, 1), one, one, torch.ones(2, 1, dtype=torch.int32))
    assert measures.sums[0, :2].tolist() == [2**25 + 1, 2**25 + 1]


def test_measures_go_on_where_they_were_saved(binary):
    logits, target = binary
    whole, first, second = recorded(logits, target, 14), Prequential(14, N), Prequential(14, N)

    def record(measures, begin, end):
        for at in range(begin, end, 7):
            part = slice(at, min(at + 7, end))
            z, y = logits[part], target[part]
            measures.record(z, y, event_losses(z, y), torch.ones(2, len(y), dtype=torch.int32))

    record(first, 0, 21)
    second.load_state_dict(first.state_dict())
    assert second.seen == 21
    record(second, 21, N)
    assert second.summary("test", target[14:]) == whole.summary("test", target[14:])
    assert second.window() == whole.window() and second.by_frequency() == whole.by_frequency()
