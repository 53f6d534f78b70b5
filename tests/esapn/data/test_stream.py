"""Streams: order, split and every counter against a loop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import esapn.data.stream
from esapn.data.load import load_ratings
from esapn.data.ratings import Ratings
from esapn.data.stream import Batch, Bounds, build_stream
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
        monkeypatch.setattr(esapn.data.stream, "CHUNK", chunk)
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
    for above in (0.5, 4.4, 7.5, -1):
        binary = in_order([0] * 10, rating=SCALE, batch_size=5, positive_above=above)
        assert binary.target.tolist() == [int(rating > above) for rating in SCALE]
    wide = in_order([0] * 4, rating=[-2, 7.5, 8, 100], batch_size=2, positive_above=7.5)
    assert wide.target.tolist() == [0, 0, 1, 1]
    classes = in_order([0] * 10, rating=SCALE, batch_size=5, task="multiclass", positive_above=1.0)
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
