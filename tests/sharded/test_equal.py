"""Tables over several ranks against one process on the same batches."""

from __future__ import annotations

import pytest
import torch

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


@pytest.mark.parametrize("world", [2, 4])
def test_every_kind_of_hops(ranks, world):
    """Less near than with isometric hops: what shrinks is solved for with worse conditions."""
    for init in ("tails", "padded", "linear"):
        ranks(world).run("equal", init=init, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("world", [2, 4])
def test_bf16_between_ranks(ranks, world):
    """Outputs of about one, rounded to eight bits once: and so their gradients."""
    worst = ranks(world).run("within", bound=0.05, comm=torch.bfloat16)
    assert 1e-4 < max(worst) < 0.05


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("fully", [False, True])
def test_without_distributed_model_parallel(ranks, world, fully):
    ranks(world).run("without_model_parallel", fully=fully)


@pytest.mark.parametrize("world", [2, 4])
def test_frequent_ids_spread_over_the_ranks(ranks, world):
    asked = torch.tensor(ranks(world).run("rows_of_ranks")).sum(0)
    assert asked.max() < 1.05 * asked.float().mean()
