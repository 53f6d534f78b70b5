"""A walk: the part to train on alone, in quarters."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from esapn.config import SearchConfig
from esapn.data.ratings import Ratings
from esapn.data.stream import build_stream, training_part
from esapn.data.synthetic import synthetic_ratings
from esapn.run.loop import Run
from esapn.tune import walk as walks
from esapn.tune.walk import Job, Part, config_of, walk

pytestmark = pytest.mark.usefixtures("threads")
COMMON = {
    "data": "synthetic",
    "positive_above": 3.5,
    "order": "shuffle",
    "order_seed": 3,
    "events": 1200,
    "train_fraction": 0.75,
    "batch_size": 50,
    "sizes": (1, 2, 4),
    "device": "cpu",
    "task": "binary",
}
METHODS = ("fixed-4", "counts-200%", "counts-200%,hops=tails", "esapn", "darts", "power-1")


def part(**settings) -> Part:
    return Part(tuple({**COMMON, **settings}.items()), ())


@pytest.fixture(autouse=True)
def nothing_kept():
    """Parts and streams are kept by what names them, not by what they hold."""
    yield
    walks._part.cache_clear()
    walks._stream.cache_clear()


def poisoned(ratings: Ratings, order: str, seed: int) -> Ratings:
    """The test part's ratings are NaN, its users and items are none."""
    stream = build_stream(ratings, order=order, seed=seed, batch_size=50)
    rows = np.arange(len(ratings.user))
    rows = np.argsort(ratings.timestamp, kind="stable") if order == "time" else rows
    if order == "shuffle":
        rows = np.random.RandomState(seed).permutation(len(rows))
    test = rows[stream.n_train :]
    assert len(test) == 300
    changed = {n: getattr(ratings, n).copy() for n in ("user", "item", "rating")}
    changed["rating"][test] = np.nan
    changed["user"][test] = changed["item"][test] = -1
    return replace(ratings, **changed)


@pytest.mark.parametrize("order", ["shuffle", "time"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", ["binary", "multiclass"])
def test_the_test_part_is_never_touched(method, order, task, monkeypatch):
    ratings = synthetic_ratings(1200)
    if ratings.timestamp is None:
        ratings = replace(ratings, timestamp=np.arange(1200)[::-1].copy())
    job = Job(method, "1", 7, (("row_lr", 0.3),))
    found = {}
    for name, held in (("clean", ratings), ("poisoned", poisoned(ratings, order, 3))):
        walks._part.cache_clear()
        walks._stream.cache_clear()
        monkeypatch.setattr(walks, "load_ratings", lambda *a, held=held, **k: held)
        found[name] = walk(job, part(order=order, task=task))
    clean, other = (replace(w, seconds=0.0) for w in (found["clean"], found["poisoned"]))
    assert clean == other and not clean.stopped
    # And the poison is one: the whole stream of it cannot be walked to the same losses.
    stream = build_stream(ratings, order=order, seed=3, batch_size=50, task=task)
    held = training_part(ratings, order=order, seed=3, batch_size=50)
    assert len(held.rating) == stream.n_train == 900
    assert held.user.tolist() == stream.user[:900].tolist()
    assert held.n_users == ratings.n_users


def test_a_walk_is_a_run_on_the_shuffled_part_in_quarters():
    job = Job("power-1", "2", 5, (("row_lr", 0.3), ("row_accumulator", 0.1), ("init_std", 0.02)))
    found = walk(job, part())
    held = training_part(synthetic_ratings(1200, seed=3), seed=3, batch_size=50)
    stream = build_stream(held, seed=5, batch_size=50)
    config = config_of(part(), "power-1", dict(job.settings), 5)
    assert (config.seed, config.order_seed, config.mode) == (5, 5, "tuned")
    assert (config.row_lr, config.row_accumulator, config.init_std) == (0.3, 0.1, 0.02)
    run = Run(config, stream)
    losses = torch.cat([run.step() for _ in stream.bounds]).double()
    assert stream.n_train == 650  # 900 * 3 / 4 in batches of 50
    assert found.losses == pytest.approx(
        [x.mean().item() for x in losses.tensor_split([200, 400, 650])], rel=1e-6
    )
    assert found.losses[-1] == pytest.approx(run.measures.summary("test")["loss"], rel=1e-6)
    assert found.accuracy == pytest.approx(run.measures.summary("test")["accuracy"])
    assert found.serving == sum(side["serving"] for side in run.memory().values())


def test_orders_and_settings_differ_and_equal_ones_are_equal():
    def loss(order, **settings):
        return walk(Job("fixed-2", "0", order, tuple(settings.items())), part()).loss

    assert loss(0, row_lr=0.3) == loss(0, row_lr=0.3)
    assert len({loss(0, row_lr=0.3), loss(1, row_lr=0.3), loss(0, row_lr=0.1)}) == 3


@pytest.mark.parametrize("quarter", range(4))
def test_a_walk_stops_at_a_quarter_above_its_limit(quarter):
    limits = tuple(0.0 if k == quarter else math.inf for k in range(4))
    free = walk(Job("fixed-2", "0", 0, ()), part())
    found = walk(Job("fixed-2", "0", 0, (), limits), part())
    assert found.losses == free.losses[: quarter + 1]
    assert found.stopped == (quarter < 3)


def test_a_walk_that_diverges_stops():
    found = walk(Job("fixed-2", "0", 0, (("init_std", 3e38),)), part(task="multiclass"))
    assert found.stopped and not math.isfinite(found.losses[-1])


def test_a_method_keeps_what_its_name_gives():
    config = config_of(part(), "fixed-4,row_lr=0.7", {"row_lr": 0.1, "init_std": 0.5}, 0)
    assert (config.row_lr, config.init_std, config.fixed_size) == (0.7, 0.5, 4)
    assert isinstance(config, SearchConfig)
