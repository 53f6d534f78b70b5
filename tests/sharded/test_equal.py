"""Tables over several ranks against one process on the same batches."""

from __future__ import annotations

import pytest

from tests.sharded.beside import OPTIMIZERS


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_every_optimizer(ranks, world, optimizer):
    ranks(world).run("equal", optimizer=optimizer)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("weighted, mean", [(False, False), (True, True), (True, False)])
def test_bags(ranks, world, weighted, mean):
    ranks(world).run("equal", weighted=weighted, mean=mean)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_ids_that_travel_as_often_as_they_come(ranks, world, weighted):
    ranks(world).run("equal", dedup=False, weighted=weighted)
