"""Running statistics of IDs against a dictionary, and by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from esapn.idstate import NUM_BUCKETS, IdStatistics, num_features

HALF_LIFE = 500
LOGARITHMS = ("log frequency", "decayed", "age", "norm")  # an eighth of them
NAMES = ("log frequency", "decayed", "age", "loss", "spread", "norm")


def update(statistics, ids, loss, norm, step, keep=None):
    statistics.update(
        torch.tensor(ids),
        torch.tensor(loss),
        torch.tensor(norm),
        step,
        None if keep is None else torch.tensor(keep),
    )


def numbers(statistics, index: int, frequency: int, step: int) -> dict[str, float]:
    row = statistics.features(torch.tensor([index]), torch.tensor([frequency]), step)
    assert row.shape == (1, num_features())
    found = dict(zip(NAMES, row[0, NUM_BUCKETS:].tolist(), strict=True))
    return {name: x * (8 if name in LOGARITHMS else 1) for name, x in found.items()}


@pytest.mark.parametrize(
    ("frequency", "bucket"),
    [(1, 0), (2, 1), (3, 1), (4, 2), (7, 2), (8, 3), (2**15 - 1, 14), (2**15, 15), (2**29, 15)],
)
def test_bucket_of_the_frequency(frequency, bucket):
    row = IdStatistics(1).features(torch.tensor([0]), torch.tensor([frequency]), 0)[0]
    assert row[:NUM_BUCKETS].tolist() == [float(k == bucket) for k in range(NUM_BUCKETS)]
    assert row[NUM_BUCKETS].item() == pytest.approx(math.log2(frequency) / 8)


def test_an_id_never_seen():
    found = numbers(IdStatistics(3), 1, 1, step=900)
    expected = {**dict.fromkeys(NAMES, 0.0), "norm": math.log2(1e-4)}
    assert found == pytest.approx(expected)


def test_the_first_event_sets_the_averages():
    statistics = IdStatistics(3)
    update(statistics, [2], [0.5], [4.0], step=7)
    found = numbers(statistics, 2, 2, step=7)
    expected = {"log frequency": 1.0, "decayed": 1.0, "age": 0.0, "loss": 0.5, "spread": 0.0}
    assert found == pytest.approx({**expected, "norm": math.log2(4 + 1e-4)})


def test_averages_by_hand():
    statistics = IdStatistics(3)
    for step, (loss, norm) in enumerate([(1.0, 2.0), (2.0, 4.0), (0.0, 0.0)]):
        update(statistics, [1], [loss], [norm], step)
    # 1 -> 1.1 -> 0.99;  1 -> 1.3 -> 1.17;  2 -> 2.2 -> 1.98
    found = numbers(statistics, 1, 4, step=3)
    assert found["loss"] == pytest.approx(0.99)
    assert found["spread"] == pytest.approx(math.sqrt(1.17 - 0.99**2))
    assert found["norm"] == pytest.approx(math.log2(1.98 + 1e-4))
    assert found["age"] == pytest.approx(2.0)  # log2(1 + 3)


def test_frequency_decays_by_half_over_the_half_life():
    statistics = IdStatistics(2)
    update(statistics, [0], [0.0], [0.0], step=10)
    found = numbers(statistics, 0, 2, step=10 + HALF_LIFE)
    assert found["decayed"] == pytest.approx(math.log2(1 + 0.5))
    update(statistics, [0], [0.0], [0.0], step=10 + HALF_LIFE)  # 0.5 + 1
    assert statistics.decayed[0].item() == pytest.approx(1.5)
    found = numbers(statistics, 0, 3, step=10 + 3 * HALF_LIFE)
    assert found["decayed"] == pytest.approx(math.log2(1 + 1.5 / 4))
    assert found["age"] == pytest.approx(math.log2(1 + 3 * HALF_LIFE))


def test_looking_changes_nothing():
    statistics = IdStatistics(4)
    update(statistics, [0, 2], [0.5, 0.1], [1.0, 2.0], step=3)
    before = {name: value.clone() for name, value in statistics.state_dict().items()}
    statistics.features(torch.arange(4), torch.arange(1, 5), 80)
    assert all(torch.equal(before[name], v) for name, v in statistics.state_dict().items())


def test_of_an_id_that_comes_twice_the_kept_event_counts():
    twice, once = IdStatistics(4), IdStatistics(4)
    for step in (0, 5):
        update(
            twice,
            [1, 3, 1, 1],
            [9.0, 0.2, 8.0, 0.4 + step],
            [9.0, 0.1, 8.0, 0.3 + step],
            step,
            keep=[False, True, False, True],
        )
        update(once, [3, 1], [0.2, 0.4 + step], [0.1, 0.3 + step], step)
    for name, value in once.state_dict().items():
        assert torch.equal(getattr(twice, name)[:4], value[:4])


def test_the_event_that_is_kept_counts_wherever_it_stands():
    first, alone = IdStatistics(2), IdStatistics(2)
    for step in (0, 5):
        update(first, [1, 1], [0.2 + step, 9.0], [0.1 + step, 9.0], step, keep=[True, False])
        update(alone, [1], [0.2 + step], [0.1 + step], step)
    for name, value in alone.state_dict().items():
        assert torch.equal(getattr(first, name)[:2], value[:2])


def test_nothing_of_the_sink_is_ever_seen():
    statistics = IdStatistics(4)
    update(statistics, [0, 1], [0.5, 0.5], [1.0, 1.0], step=1)
    for value in statistics.buffers():
        value[-1] = float("nan") if value.is_floating_point() else -7
    before = [value[:4].clone() for value in statistics.buffers()]
    nan = float("nan")
    update(statistics, [2, 2, 3], [nan] * 3, [nan] * 3, step=2, keep=[False] * 3)
    for old, value in zip(before, statistics.buffers(), strict=True):
        assert torch.equal(value[:4], old)
    assert statistics.features(torch.arange(4), torch.ones(4).int(), 3).isfinite().all()


@dataclass
class Slow:
    first: int
    latest: int
    decayed: float
    loss: float
    square: float
    norm: float


def test_against_a_dictionary():
    generator = torch.Generator().manual_seed(1)
    statistics, known = IdStatistics(12), {}
    for step in range(0, 1200, 30):
        ids = torch.randperm(12, generator=generator)[:5]
        loss, norm = torch.rand(2, 5, generator=generator)
        statistics.update(ids, loss, norm, step)
        for i, value, length in zip(ids.tolist(), loss.tolist(), norm.tolist(), strict=True):
            if i not in known:
                known[i] = Slow(step, step, 1.0, value, value**2, length)
                continue
            held = known[i]
            held.decayed = held.decayed * 0.5 ** ((step - held.latest) / HALF_LIFE) + 1
            held.latest = step
            held.loss = 0.9 * held.loss + 0.1 * value
            held.square = 0.9 * held.square + 0.1 * value**2
            held.norm = 0.9 * held.norm + 0.1 * length
        for i, held in known.items():
            now = step + 1
            faded = held.decayed * 0.5 ** ((now - held.latest) / HALF_LIFE)
            expected = {
                "log frequency": math.log2(5),
                "decayed": math.log2(1 + faded),
                "age": math.log2(1 + now - held.first),
                "loss": held.loss,
                "spread": math.sqrt(max(held.square - held.loss**2, 0)),
                "norm": math.log2(held.norm + 1e-4),
            }
            assert numbers(statistics, i, 5, now) == pytest.approx(expected, rel=1e-4, abs=2e-3)
