"""Who owns an id: a bijection that no number of ranks changes, cut into even stretches."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esapn_kernels.sharded.placement import Placement


@given(st.integers(1, 3000), st.integers(1, 9), st.text(max_size=5))
def test_positions_are_a_bijection_that_owners_cut_evenly(rows, world, name):
    place, ids = Placement(rows, world, name), torch.arange(rows)
    position = place.position(ids)
    assert torch.equal(position.sort()[0], ids)
    assert torch.equal(place.ids(position), ids)
    assert torch.equal(position, Placement(rows, 1, name).position(ids))
    counts = torch.bincount(place.owner(position), minlength=world).tolist()
    assert counts == [place.count(rank) for rank in range(world)]
    assert max(counts) - min(counts) <= 1
    for rank in range(world):
        mine = position[place.owner(position) == rank]
        assert len(mine) == 0 or int(mine.min()) == place.first(rank)


@given(st.integers(1, 3000), st.integers(1, 9))
def test_codes_go_by_owner(rows, world):
    place, ids = Placement(rows, world), torch.arange(rows)
    code = place.code(ids)
    assert torch.equal(code // place.block, place.owner(place.position(ids)))
    assert len(code.unique()) == rows


@pytest.mark.parametrize("rows", [3_000_000_000, 2_999_999_999])
def test_the_largest_tables_do_not_overflow(rows):
    place = Placement(rows, 64, "item")
    ids = torch.tensor([0, 1, rows // 2, rows - 2, rows - 1])
    expected = [(i * place.factor + place.offset) % rows for i in ids.tolist()]
    assert place.position(ids).tolist() == expected
    assert torch.equal(place.ids(place.position(ids)), ids)
    assert place.owner(torch.tensor([0, rows - 1])).tolist() == [0, 63]


def test_consecutive_ids_lie_on_all_ranks():
    """The first ids, which often are the most frequent, of any table."""
    for rows in (1000, 99_991, 10_000_000):
        for name in ("user", "item"):
            place = Placement(rows, 8, name)
            counts = torch.bincount(place.owner(place.position(torch.arange(400))), minlength=8)
            assert int(counts.min()) >= 35 and int(counts.max()) <= 65
    first = [int(Placement(1000, 64, f"t{i}").position(torch.tensor(0))) for i in range(20)]
    assert len(set(first)) > 15


@pytest.mark.parametrize("rows", [0, 3_000_000_001])
def test_other_numbers_of_rows_are_refused(rows):
    with pytest.raises(ValueError, match="1 to 3e9 rows"):
        Placement(rows, 2)


def test_without_torchrec_it_says_what_to_do():
    program = (
        "import sys; sys.modules['torchrec'] = None\n"
        "from esapn_kernels.sharded import read, update\n"
        "from esapn_kernels import sharded\n"
        "try:\n    sharded.RaggedSharder\n"
        "except ModuleNotFoundError as error:\n    print(error)\n"
        "print(hasattr(sharded, 'other'))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    needs, other = done.stdout.splitlines()
    assert needs.startswith("esapn_kernels.sharded.RaggedSharder needs TorchRec")
    assert other == "False"
