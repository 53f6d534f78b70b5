"""Runs small enough for tests of every method."""

from __future__ import annotations

import pytest

from esapn.config import CHOICES, MODES, SearchConfig
from esapn.data.stream import build_stream
from esapn.data.synthetic import synthetic_ratings
from esapn.run.loop import Run

METHODS = CHOICES["method"]
RULES = ("always", "never", "random", "thresholds", "power")
TINY = {
    "sizes": (1, 2, 4),
    "fixed_size": 4,
    "hidden": 6,
    "policy_hidden": 6,
    "frequency_dim": 3,
    "max_frequency": 16,
    "batch_size": 50,
    "log_every": 3,
    "threshold": 2.0,
    "history": 2,
    "move_every": 2,
}
USERS, ITEMS, EVENTS = 70, 50, 700


def tiny_stream(task="binary", events=EVENTS, history=2):
    ratings = synthetic_ratings(events, n_users=USERS, n_items=ITEMS)
    return build_stream(ratings, task=task, batch_size=50, history=history)


def tiny(mode="paper", stream=None, **settings) -> Run:
    room = {"budget": "300%"} if settings.get("method") == "counts" else {}
    config = SearchConfig.of_mode(mode, **{**TINY, **room, **settings})
    return Run(config, tiny_stream(config.task) if stream is None else stream)


every_method = pytest.mark.parametrize("method", METHODS)
both_modes = pytest.mark.parametrize("mode", MODES)
