"""Bytes of both sides, over the events and at the end."""

from __future__ import annotations

import pytest
import torch

from esapn.models.recommender import TableBytes
from esapn.run.memory import ServingBytes, bytes_of, describe, sizes_by_frequency
from esapn_kernels import ResizableEmbedding
from tests.esapn.tiny import tiny

TABLES = {
    "user": TableBytes({"2": 3, "4": 1}, 40, slack=8, locations=16, chain=80, optimizer=100),
    "item": TableBytes({"4": 2}, 32),
}


def test_bytes_by_hand():
    memory = describe(TABLES, {"user": 4, "item": 2}, largest=4)
    assert memory["user"] == {
        **{"rows_per_size": {"2": 3, "4": 1}, "payload": 40, "slack": 8, "locations": 16},
        **{"chain": 80, "optimizer": 100, "serving": 144, "fixed": 64},
        **{"budget": None, "refused": 0},
    }
    assert (memory["item"]["serving"], memory["item"]["fixed"]) == (32, 32)
    over_time = ServingBytes()
    over_time.add(500, 30)
    over_time.add(100, 10)
    assert bytes_of(memory, over_time, 40, counters=88) == {
        **{"serving": 176, "serving_peak": 500, "serving_mean": 400.0},
        **{"training": 276 + 88, "fixed128": 96},
    }
    found = bytes_of(memory, ServingBytes(), 0, counters=0)
    assert (found["serving_peak"], found["serving_mean"], found["training"]) == (176, 0.0, 276)


def test_sizes_by_frequency_by_hand():
    table = ResizableEmbedding(6, sizes=(1, 2, 4))
    table.promote(torch.tensor([0, 1]))
    table.promote(torch.tensor([1]))
    events = torch.tensor([0, 1, 1, 1, 2, 4, 4, 4, 4, 4])  # IDs 3 and 5 never come
    found = sizes_by_frequency(table, events)
    assert [(b["from"], b["to"], b["ids"], b["mean_size"]) for b in found] == [
        (1, 2, 2, 1.5),
        (2, 4, 1, 4.0),
        (4, 8, 1, 1.0),
    ]


@pytest.mark.parametrize("row_optimizer", ["adam", "adagrad"])
@pytest.mark.parametrize("method", ["esapn", "fixed", "darts"])
def test_state_of_the_row_optimizer_counts_for_training_only(method, row_optimizer):
    run = tiny(method=method, row_optimizer=row_optimizer, row_lr=0.02)
    run.step()
    states = 2 if row_optimizer == "adam" else 1
    for (name, side), rows in zip(run.memory().items(), run.model.rows(), strict=True):
        assert side["optimizer"] == states * rows.nbytes, name
        parts = ("payload", "slack", "locations", "chain")
        assert side["serving"] == sum(side[part] for part in parts)
