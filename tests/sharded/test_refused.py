"""What one rank refuses all do, in one line, and go on."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    "what, own, others",
    [
        ("ids", "IndexError: id 10000 is out of range", "rank 1 refuses its batch"),
        ("lengths", "RuntimeError", "rank 1 refuses its batch"),
        ("key", "features ['f'] are missing", "rank 1 refuses its batch"),
        ("dtype", "must be int32 or int64, got torch.float32", "rank 1 refuses its batch"),
        ("promote", "IndexError: index out of range in self", "another rank raised"),
        ("size", "ValueError", "another rank raised"),
        ("save", "TypeError: Object of type set is not JSON serializable", "rank 1: Object of"),
    ],
)
@pytest.mark.parametrize("grows", [False, True])
def test_all_ranks_refuse(ranks, world, what, own, others, grows):
    for rank, said in enumerate(ranks(world).run("refuse", what=what, grows=grows)):
        assert (own if rank == 1 else others) in said
        assert "\n" not in said


def test_a_budget_that_one_rank_refuses_no_rank_grows_by(ranks):
    said = ranks(2).run("grow_within", budget=2_000)
    assert "a budget of 2000 bytes does not hold the rows" in said[1][0]
    assert said[0][0].startswith("RuntimeError: rank 1: a budget of 2000 bytes")
    assert not any(grows for _, grows in said)


def test_rows_that_await_their_backward_do_not_move(ranks):
    for said in ranks(2).run("move_before_backward", grows=False):
        assert "await" in said or "another rank raised" in said
    assert ranks(2).run("move_before_backward", grows=True) == ["moved", "moved"]


def test_a_state_dict_of_what_is_around_is_not_loaded_in_part(ranks, tmp_path):
    for said in ranks(2).run("loaded_around", folder=str(tmp_path)):
        assert "esapn_kernels.sharded.load" in said
