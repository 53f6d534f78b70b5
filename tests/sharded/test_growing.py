"""Rows that their owners grow and shrink, with and without a pipeline."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("dedup", [True, False])
def test_owners_grow_rows_as_one_process_does(ranks, world, dedup):
    ranks(world).run("grow_alike", dedup=dedup)


@pytest.mark.parametrize("world", [2, 4])
def test_no_step_exceeds_the_bytes_of_a_rank(ranks, world):
    ranks(world).run("shrink_within_a_budget")


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_pipeline_changes_nothing(ranks, world):
    ranks(world).run("pipelined")


def test_a_pipeline_that_looks_ahead_is_refused(ranks):
    for said in ranks(2).run("look_ahead"):
        assert "use TrainPipelineSparseDist" in said
