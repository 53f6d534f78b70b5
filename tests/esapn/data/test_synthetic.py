"""The synthetic ratings: arrays, traffic, and what wide rows can learn from popular IDs."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from esapn.data.load import load_ratings
from esapn.data.ratings import Ratings
from esapn.data.synthetic import synthetic_ratings
from tests.helpers import refusal


def same(a: Ratings, b: Ratings) -> bool:
    pairs = [(a.user, b.user), (a.item, b.item), (a.rating, b.rating), (a.timestamp, b.timestamp)]
    return all(np.array_equal(x, y) for x, y in pairs)


def test_synthetic_follows_the_seed():
    one = load_ratings("synthetic", events=5_000, seed=1)
    assert same(one, synthetic_ratings(5_000, seed=1))
    assert one.checksum == synthetic_ratings(5_000, seed=1).checksum
    other = synthetic_ratings(5_000, seed=2)
    assert one.checksum != other.checksum
    for field in ("user", "item", "rating", "timestamp"):
        assert not np.array_equal(getattr(one, field), getattr(other, field))


@pytest.mark.parametrize("events", [1, 1_000, 300_000])
def test_synthetic_arrays(events):
    ratings = synthetic_ratings(events)  # the last length takes more than one chunk
    assert ratings.name == "synthetic" and len(ratings.checksum) == 64
    for array, dtype in zip(
        (ratings.user, ratings.item, ratings.timestamp), (np.int32, np.int32, np.int64), strict=True
    ):
        assert array.shape == (events,) and array.dtype == dtype
    pairs = set(zip(ratings.user.tolist(), ratings.item.tolist(), strict=True))
    duplicates = events - len(pairs)
    counts = {"rows": events, "duplicates": duplicates, "unsorted": 0, "skipped": 0}
    assert ratings.counts == counts
    assert ratings.n_users == max(50, events // 20) and ratings.user.max() < ratings.n_users
    assert ratings.n_items == max(50, events // 40) and ratings.item.max() < ratings.n_items
    assert ratings.rating.dtype == np.float32
    assert set(ratings.rating.tolist()) <= set(np.arange(1, 11) / 2)
    assert (np.diff(ratings.timestamp) > 0).all()


@pytest.mark.parametrize("seed", range(4))
def test_synthetic_share_of_positives(seed):
    assert 0.48 < (synthetic_ratings(100_000, seed=seed).rating > 3.5).mean() < 0.62


@pytest.mark.parametrize(("side", "exponent"), [("user", 0.8), ("item", 1.05)])
def test_synthetic_traffic_is_zipf(side, exponent):
    ratings = synthetic_ratings(200_000)
    n = getattr(ratings, f"n_{side}s")
    counts = np.bincount(getattr(ratings, side), minlength=n)
    share = np.sort(counts)[::-1] / len(ratings.user)
    zipf = np.arange(1, n + 1) ** -exponent
    zipf /= zipf.sum()
    head = n // 20
    assert share[0] == pytest.approx(zipf[0], rel=0.05)
    assert share[:head].sum() == pytest.approx(zipf[:head].sum(), rel=0.02)
    # The ID says nothing about its traffic: no rank correlation beyond chance.
    ranks = np.argsort(np.argsort(counts))
    assert abs(np.corrcoef(ranks, np.arange(n))[0, 1]) < 4 / np.sqrt(n)


def test_the_checksum_is_that_of_64_bit_arrays():
    # The codes were once stored so, and what names a run's data should not change with that.
    ratings = synthetic_ratings(300_000)
    arrays = (ratings.user.astype(np.int64), ratings.item.astype(np.int64))
    arrays += (ratings.rating, ratings.timestamp)
    wanted = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
    assert ratings.checksum == wanted


def test_synthetic_refuses():
    for options in ({"events": 0}, {"n_users": 0}, {"n_items": 0}, {"seed": -1}):
        assert next(iter(options)) in refusal(synthetic_ratings, **options)


def interaction_spectrum(ratings: Ratings, users: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Eigenvalues of the users' interaction covariance over `items`, largest first.

    Each user's events are halved at random. Noise is independent between the halves, so the mean
    over users of (residual of item i, half A) * (residual of item j, half B) has none of it, and
    centring rows and columns of that matrix takes the users' biases out.
    """
    n = len(items)
    column = np.full(ratings.n_items, -1)
    column[items] = np.arange(n)
    row = np.full(ratings.n_users, -1)
    row[users] = np.arange(len(users))
    chosen = (column[ratings.item] >= 0) & (row[ratings.user] >= 0)
    r, c, y = row[ratings.user[chosen]], column[ratings.item[chosen]], ratings.rating[chosen]
    y = y - (np.bincount(c, y) / np.bincount(c))[c]
    half = np.random.default_rng(0).integers(0, 2, len(y))
    means, seen = [], []
    for side in (0, 1):
        cell = (r * n + c)[half == side]
        count = np.bincount(cell, minlength=len(users) * n)
        total = np.bincount(cell, y[half == side], minlength=len(users) * n)
        means.append((total / np.maximum(count, 1)).reshape(-1, n))
        seen.append((count > 0).astype(float).reshape(-1, n))
    covariance = (means[0].T @ means[1]) / (seen[0].T @ seen[1])
    centre = np.eye(n) - 1 / n
    covariance = centre @ (covariance + covariance.T) / 2 @ centre
    return np.sort(np.linalg.eigvalsh(covariance))[::-1]


@pytest.mark.parametrize("seed", range(3))
def test_popular_ids_carry_variance_beyond_rank_two_and_tail_ids_do_not(seed):
    # All items are popular here (rank 12 at least), so the users' own ranks are what is seen.
    ratings = synthetic_ratings(1_000_000, n_users=10_000, n_items=60, seed=seed)
    traffic = np.bincount(ratings.user, minlength=10_000)
    by_traffic = np.argsort(-traffic)
    items = np.argsort(-np.bincount(ratings.item))[:12]
    head, tail = by_traffic[:100], by_traffic[4_000:]
    assert traffic[head].min() > 24**2 and traffic[tail].max() < 100

    share = {}
    for name, users in (("head", head), ("tail", tail)):
        values = interaction_spectrum(ratings, users, items)
        assert values.sum() > 0.5  # 12 items: there is an interaction to begin with
        share[name] = values[2:].sum() / values.sum()
    assert share["head"] > 0.25
    assert share["tail"] < 0.15


def test_interactions_beat_biases():
    """Rank 0 (biases), 2 and 16 fitted to one half of a head block, scored on the other half."""
    ratings = synthetic_ratings(400_000)
    users = np.argsort(-np.bincount(ratings.user))[:100]
    items = np.argsort(-np.bincount(ratings.item))[:100]
    row, column = np.full(ratings.n_users, -1), np.full(ratings.n_items, -1)
    row[users], column[items] = np.arange(100), np.arange(100)
    chosen = (row[ratings.user] >= 0) & (column[ratings.item] >= 0)
    cell = (row[ratings.user] * 100 + column[ratings.item])[chosen]
    y = ratings.rating[chosen].astype(float)
    fit = np.random.default_rng(0).random(len(y)) < 0.5
    count = np.bincount(cell[fit], minlength=10_000)
    mean = (np.bincount(cell[fit], y[fit], 10_000) / np.maximum(count, 1)).reshape(100, 100)
    mean = np.where(count.reshape(100, 100) > 0, mean, y[fit].mean())
    biases = mean.mean(0) + mean.mean(1, keepdims=True) - mean.mean()
    u, s, v = np.linalg.svd(mean - biases)
    accuracy = {}
    for rank in (0, 2, 16):
        guess = (biases + (u[:, :rank] * s[:rank]) @ v[:rank]).ravel()[cell[~fit]]
        accuracy[rank] = ((guess > 3.75) == (y[~fit] > 3.5)).mean()
    assert accuracy[2] > accuracy[0] + 0.03
    assert accuracy[16] > accuracy[2] + 0.03
