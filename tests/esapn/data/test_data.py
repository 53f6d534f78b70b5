"""Streams: order, split and every counter against a loop; the synthetic ratings."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import esapn.data.load
from esapn.data.load import Batch, Bounds, Ratings, build_stream, load_ratings, synthetic_ratings
from tests.helpers import refusal

REAL = Path(__file__).resolve().parents[4] / "shared" / "data"


pytestmark = pytest.mark.usefixtures("own_cache")


def make(user, item=None, rating=None, timestamp=None) -> Ratings:
    user = np.asarray(user, np.int64)
    item = user if item is None else np.asarray(item, np.int64)
    rating = np.full(len(user), 4.0) if rating is None else np.asarray(rating)
    timestamp = None if timestamp is None else np.asarray(timestamp, np.int64)
    n_users, n_items = int(user.max()) + 1, int(item.max()) + 1
    return Ratings(user, item, rating.astype(np.float32), timestamp, n_users, n_items, "made", "")


def in_order(user, item=None, rating=None, **options):
    """Build a stream that keeps the order given."""
    ratings = make(user, item, rating, np.arange(len(user)))
    return build_stream(ratings, order="time", **options)


# Counters


def test_counters_by_hand():
    #         batch 0           batch 1
    user = [7, 7, 2, 7, 7] + [7, 2, 2, 7, 1]
    stream = in_order(user, [0] * 10, batch_size=5, history=2)
    assert stream.user_freq.tolist() == [1, 2, 1, 3, 4, 5, 2, 3, 6, 1]
    assert stream.user_last.int().tolist() == [0, 0, 1, 0, 1, 0, 0, 1, 1, 1]
    assert stream.user_keep.int().tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 1, 1]
    assert stream.item_freq.tolist() == list(range(1, 11))
    assert stream.item_last.int().tolist() == [0, 0, 0, 0, 1] * 2
    assert stream.item_keep.int().tolist() == [0, 0, 0, 1, 1] * 2


@settings(max_examples=150, deadline=None)
@given(
    ids=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 2)), min_size=4, max_size=60),
    batch_size=st.integers(2, 12),
    history=st.integers(1, 6),
    order=st.sampled_from(["shuffle", "time"]),
    fraction=st.floats(0.01, 0.99),
)
def test_counters_against_a_loop(ids, batch_size, history, order, fraction):
    batch_size = min(batch_size, len(ids) // 2)
    users, items = [u for u, _ in ids], [i for _, i in ids]
    ratings = make(users, items, np.arange(len(ids)) % 10 / 2 + 0.5, np.arange(len(ids)) // 3)
    stream = build_stream(
        ratings,
        order=order,
        seed=3,
        batch_size=batch_size,
        history=history,
        train_fraction=fraction,
    )
    assert sorted(zip(stream.user.tolist(), stream.item.tolist(), strict=True)) == sorted(ids)
    for side in ("user", "item"):
        codes = getattr(stream, side).tolist()
        freq = [codes[: t + 1].count(code) for t, code in enumerate(codes)]
        left = []
        for start, end in stream.bounds:
            left += [codes[t + 1 : end].count(codes[t]) for t in range(start, end)]
        assert getattr(stream, f"{side}_freq").tolist() == freq
        assert getattr(stream, f"{side}_last").tolist() == [n == 0 for n in left]
        assert getattr(stream, f"{side}_keep").tolist() == [n < history for n in left]
        for index in range(len(stream.bounds)):
            batch = stream.batch(index)._asdict()
            keep = batch[f"{side}_keep"]
            slots = (batch[f"{side}_freq"][keep] - 1) % history
            written = list(zip(batch[side][keep].tolist(), slots.tolist(), strict=True))
            assert len(set(written)) == len(written)
            assert batch[f"{side}_last"].sum() == batch[side].unique().numel()

    starts, ends = zip(*stream.bounds, strict=True)
    sizes = [end - start for start, end in stream.bounds]
    assert starts[0] == 0 and ends[-1] == len(ids) and starts[1:] == ends[:-1]
    assert set(sizes[:-1]) == {batch_size} and 2 <= sizes[-1] <= batch_size + 1
    assert stream.n_train in starts[1:]


def test_chunks_leave_no_trace(monkeypatch):
    rng = np.random.default_rng(0)
    ratings = make(rng.integers(0, 7, 400), rng.integers(0, 90, 400), rng.integers(1, 6, 400))
    wanted = build_stream(ratings, batch_size=30, history=3)
    for chunk in (1, 3, 64, 399, 400):
        monkeypatch.setattr(esapn.data.load, "_CHUNK", chunk)
        stream = build_stream(ratings, batch_size=30, history=3)
        for field in Batch._fields:
            assert torch.equal(getattr(stream, field), getattr(wanted, field)), (field, chunk)


def test_history_longer_than_the_stream():
    stream = in_order([0, 0, 1, 0, 0, 0], batch_size=3, history=100)
    assert stream.user_keep.all()
    assert stream.user_last.int().tolist() == [0, 1, 1, 0, 0, 1]


STORED = dict.fromkeys(Batch._fields, torch.bool)
STORED |= {"user": torch.int32, "item": torch.int32, "target": torch.uint8}
STORED |= {"user_freq": torch.int32, "item_freq": torch.int32}


@pytest.mark.parametrize(
    ("task", "target"), [("binary", torch.float32), ("multiclass", torch.int64)]
)
def test_stored_compactly_and_batched_in_the_dtypes_of_models(task, target):
    stream = in_order([0, 1, 0, 1, 2], rating=[1, 5, 3, 2, 4], batch_size=2, task=task)
    batched = STORED | {"user": torch.int64, "item": torch.int64, "target": target}
    for field, dtype in STORED.items():
        whole, part = getattr(stream, field), getattr(stream.batch(1), field)
        assert whole.dtype == dtype and whole.shape == (5,)
        assert part.dtype == batched[field] and part.tolist() == whole[2:].tolist()
    assert stream.batch(1).user_last.data_ptr() == stream.user_last[2:].data_ptr()
    assert (stream.task, stream.n_users, stream.n_items) == (task, 3, 3)
    assert sum(getattr(stream, f).element_size() for f in Batch._fields) == 21  # bytes an event
    labels = stream.labels(1, 4)
    assert labels.dtype == target
    assert labels.tolist() == ([1, 0, 0] if task == "binary" else [4, 2, 1])


def test_a_replaced_target_is_taken_as_it_is():
    stream = in_order([0, 1, 0, 1], batch_size=2)
    stream = replace(stream, target=stream.target.double() / 3)
    assert stream.batch(0).target.tolist() == [1 / 3, 1 / 3]
    assert stream.batch(0).target.dtype == torch.float64


@pytest.mark.cuda
def test_batches_on_a_gpu_need_no_sync(device, no_waiting):
    stream = in_order([0, 1, 0, 1, 2], batch_size=2, device=device)
    with no_waiting():
        batch = stream.batch(1)
    assert batch.user.device.type == "cuda" and batch.user.tolist() == [0, 1, 2]


def test_bounds_are_a_sequence():
    bounds = Bounds(n_events=11, batch_size=4)
    assert list(bounds) == [(0, 4), (4, 8), (8, 11)] and len(bounds) == 3
    assert bounds[-1] == (8, 11) and bounds[-3] == bounds[0] == (0, 4)
    assert bounds[1:] == [(4, 8), (8, 11)] and bounds[::-1][0] == (8, 11)
    assert (4, 8) in bounds and (4, 9) not in bounds and bounds.index((8, 11)) == 2
    for outside in (3, -4):
        with pytest.raises(IndexError):
            bounds[outside]
    huge = Bounds(n_events=10**12 + 1, batch_size=10)
    assert len(huge) == 10**11 and huge[-1] == (10**12 - 10, 10**12 + 1)


# Targets, order, split

SCALE = [0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0]


def test_targets():
    binary = in_order([0] * 10, rating=SCALE, batch_size=5)
    assert binary.target.tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 1, 1]
    classes = in_order([0] * 10, rating=SCALE, batch_size=5, task="multiclass")
    assert classes.target.dtype == torch.uint8
    assert classes.target.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_time_order_is_stable():
    stream = build_stream(make(range(6), timestamp=[5, 1, 5, 1, 0, 5]), order="time", batch_size=2)
    assert stream.user.tolist() == [4, 1, 3, 0, 2, 5]


def test_shuffle_follows_the_seed_and_moves_rows_whole():
    ratings = make(range(100), 99 - np.arange(100), np.where(np.arange(100) < 30, 5, 1))
    one, same, other = (build_stream(ratings, seed=s, batch_size=10) for s in (1, 1, 2))
    assert one.user.tolist() == np.random.RandomState(1).permutation(100).tolist()
    assert torch.equal(one.user, same.user) and not torch.equal(one.user, other.user)
    assert torch.equal(one.item, 99 - one.user)
    assert torch.equal(one.target, (one.user < 30).byte())


@pytest.mark.parametrize(
    ("events", "fraction", "bounds", "n_train"),
    [
        (12, 0.75, [(0, 4), (4, 8), (8, 12)], 8),
        (11, 0.75, [(0, 4), (4, 8), (8, 11)], 8),
        (13, 0.75, [(0, 4), (4, 8), (8, 13)], 8),  # a single event left over
        (13, 0.95, [(0, 4), (4, 8), (8, 13)], 8),  # 12 would cut the merged batch
        (12, 0.01, [(0, 4), (4, 8), (8, 12)], 4),
        (12, 0.99, [(0, 4), (4, 8), (8, 12)], 8),
        (9, 0.75, [(0, 4), (4, 9)], 4),
        (8, 0.75, [(0, 4), (4, 8)], 4),
    ],
)
def test_bounds_and_split(events, fraction, bounds, n_train):
    stream = in_order(range(events), batch_size=4, train_fraction=fraction)
    assert list(stream.bounds) == bounds
    assert stream.n_train == n_train


def test_split_does_not_lose_a_batch_to_rounding():
    assert 0.29 * 100 < 29
    assert in_order(range(100), batch_size=29, train_fraction=0.29).n_train == 29


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": "ranking"}, "task"),
        ({"order": "random"}, "order"),
        ({"order": "time"}, "order=shuffle works"),
        ({"batch_size": 1}, "batch_size"),
        ({"batch_size": 6}, "fewer than two batches"),
        ({"train_fraction": 0.0}, "train_fraction"),
        ({"train_fraction": 1.0}, "train_fraction"),
        ({"train_fraction": float("nan")}, "train_fraction"),
        ({"history": 0}, "history"),
        ({"seed": -1}, "seed"),
    ],
)
def test_stream_refuses(options, words):
    assert words in refusal(build_stream, make(range(10)), **{"batch_size": 5, **options})


# Synthetic stream


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
    assert set(ratings.rating.tolist()) <= set(SCALE)
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


# Real data


@pytest.mark.parametrize(
    ("name", "events", "users", "items", "order"),
    [
        ("ml-1m", 1_000_209, 6_040, 3_706, "shuffle"),
        ("ml-100k", 100_000, 943, 1_682, "time"),
    ],
)
def test_real_data(name, events, users, items, order):
    if not (REAL / name).is_dir():
        pytest.skip(f"MovieLens may not be redistributed and {name} is not beside this checkout")
    pytest.importorskip("polars")
    ratings = load_ratings(REAL / name)
    pairs = set(zip(ratings.user.tolist(), ratings.item.tolist(), strict=True))
    assert len(pairs) == events and ratings.counts["duplicates"] == ratings.counts["skipped"] == 0
    assert (len(ratings.user), ratings.n_users, ratings.n_items) == (events, users, items)
    stream = build_stream(ratings, order=order)
    assert stream.n_train == int(0.75 * events) // 500 * 500
    assert stream.bounds[-1][1] == events
    for codes, freq in ((stream.user, stream.user_freq), (stream.item, stream.item_freq)):
        last_freq = torch.zeros(int(codes.max()) + 1, dtype=torch.int32)
        last_freq.scatter_reduce_(0, codes.long(), freq, "amax")
        assert torch.equal(last_freq.long(), codes.bincount())
    if order == "time":
        permutation = np.argsort(ratings.timestamp, kind="stable")
        assert stream.user.tolist() == ratings.user[permutation].tolist()
