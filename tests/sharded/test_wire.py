"""Bytes between ranks: what was counted of real runs is what the model of bench/scale.py says."""

from __future__ import annotations

import pytest

worlds = pytest.mark.parametrize("world", [2, 4])


@worlds
@pytest.mark.parametrize("growth", [True, False])
@pytest.mark.parametrize("comm", ["fp32", "bf16"])
@pytest.mark.parametrize("dedup", [True, False])
def test_counted_is_the_model(ranks, world, dedup, comm, growth):
    every = ranks(world).run("wire_cases:compare", dedup=dedup, comm=comm, growth=growth)
    assert all(row == every[0] for row in every)
    check(every[0], world)
    assert ("counts" in every[0]["parts"]) == (dedup and growth)


@worlds
@pytest.mark.parametrize("dedup", [True, False])
def test_bags_send_what_single_ids_do(ranks, world, dedup):
    way = {"dedup": dedup, "comm": "bf16", "growth": True}
    check(ranks(world).run("wire_cases:compare", bags=True, **way)[0], world)


def check(row, world):
    for part, (model, counted, ratio) in row["parts"].items():
        assert model > 0 and ratio == counted / model
        assert ratio == pytest.approx(1, abs=0.02), part
    assert row["counted"] / row["model"] == pytest.approx(1, abs=0.02)
    assert 1 <= row["uneven"] <= 1.3
    if row["written"] is not None:
        # Also headers, of some 30 messages.
        assert row["written"] == pytest.approx(row["ratio"], abs=0.02)


@worlds
def test_parts_that_no_id_changes_are_exact(ranks, world):
    way = {"dedup": True, "comm": "fp32", "growth": True}
    parts = ranks(world).run("wire_cases:compare", **way)[0]["parts"]
    for part in ("splits", "lengths", "hops"):
        assert parts[part][0] == parts[part][1]


@worlds
def test_collectives_of_known_bytes(ranks, world):
    part = 2 * (world - 1) / world
    for rank, found in enumerate(ranks(world).run("wire_cases:known_collectives")):
        uneven = 4 * (sum(range(1, world + 1)) - (rank + 1))
        assert [kind for kind, _ in found] == ["all-to-all"] * 3 + ["all-reduce"] * 3
        assert [nbytes for _, nbytes in found] == pytest.approx(
            [16 * (world - 1), uneven, uneven, 40 * part, 80 * part, 40 * part]
        )


def test_a_collective_that_the_model_lacks_is_not_passed_over(ranks):
    assert set(ranks(2).run("wire_cases:unknown_collective")) == {"the model knows no broadcast_"}
