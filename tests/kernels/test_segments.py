"""runs.py: the sorted batch against a dictionary of positions, and sums over hot runs."""

import pytest
import torch

from esapn_kernels.gpu import launch, segments
from esapn_kernels.gpu.segments import find_runs, pack_keys, sum_hot
from esapn_kernels.ops.backend import TRITON_ERROR
from esapn_kernels.testing import make_case
from tests.kernels.layouts import ODD, PAPER, SMALL

pytestmark = pytest.mark.skipif(TRITON_ERROR is not None, reason=str(TRITON_ERROR))
SIZES = [PAPER, ODD, (4,), (127, 130)]


def positions(case):
    """``{(level, row start): positions in order}`` of the ids that have a row."""
    arena, found = case.module.arena, {}
    for at, i in enumerate(case.ids.tolist()):
        if 0 <= i < arena.num_rows and (start := int(arena.layout.row_start[i])) >= 0:
            found.setdefault(
                (int(arena.layout.page_level[start // arena.layout.page]), start), []
            ).append(at)
    return found


def runs_of(case):
    arena = case.module.arena
    return find_runs(case.ids, case.layout, capacity=arena.storage.numel())


def check(case):
    runs, expected = runs_of(case), positions(case)
    n_levels = len(case.module.sizes)
    begin, level_begin = runs.run_begin.tolist(), runs.level_begin.tolist()
    n_runs = level_begin[n_levels]
    assert n_runs == len(expected)
    assert begin[n_runs] == sum(map(len, expected.values()))
    keys = sorted(expected)  # by level, then by row
    for run, (level, start) in enumerate(keys):
        mine = runs.order[begin[run] : begin[run + 1]].tolist()
        assert mine == expected[level, start]
        assert int(runs.run_start[run]) == start
        assert int(runs.run_first[run]) == (mine[0] if len(mine) == 1 else -1 - mine[0])
    for k in range(n_levels + 1):
        assert level_begin[k] == sum(level < k for level, _ in keys)


@pytest.mark.parametrize(
    "sizes, index",
    [(PAPER, torch.int32), *((sizes, torch.int64) for sizes in SIZES)],
    ids=str,
)
def test_runs(sizes, index, batches, device):
    case = make_case(sizes, 60, 100, device=device)
    check(type(case)(case.module, case.ids.to(index), case.grad_out))


@pytest.mark.parametrize("n_ids", [1023, 1024, 2047, 2048])
def test_the_most_ids_of_a_program(n_ids, device):
    check(make_case(SMALL, 700, n_ids, device=device, traffic="zipf"))


def test_few_ids_take_one_launch(device, monkeypatch):
    launched = []
    monkeypatch.setattr(segments, "launch_kernel", lambda kernel, *_, **__: launched.append(kernel))
    for n_ids, launches in ((1023, 1), (2047, 1), (2048, 3)):
        runs_of(make_case(SMALL, 10, n_ids, device=device))
        assert len(launched) == launches
        launched.clear()


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("n_ids", [1, 15, 16, 17, 63, 64, 300])
def test_runs_across_blocks(n_ids, block, device, monkeypatch):
    monkeypatch.setattr(launch, "choose_few_runs", lambda n_ids: None)
    monkeypatch.setitem(launch.SCAN, "BLOCK", block)
    check(make_case(SMALL, 25, n_ids, device=device, traffic="zipf"))


@pytest.mark.parametrize(
    "ids",
    [[-1], [12, 13], [3, -1, 3, 12, 2**40, -(2**40), 5], [7] * 70, [-1] * 70 + [4]],
    ids=["one-missing", "all-missing", "some", "one-hot", "missing-hot"],
)
def test_ids_that_do_not_exist_are_in_no_run(ids, batches, device):
    case = make_case(SMALL, 12, 0, device=device)
    case.module.arena.free(torch.tensor([9], device=device))
    check(type(case)(case.module, torch.tensor([*ids, 9], device=device), case.grad_out))


@pytest.mark.parametrize("n_ids", [1, 15, 16, 17])
def test_no_key_is_read_beside_the_sorted_ones(n_ids, device, monkeypatch):
    """The first key stands before itself and the last one behind: read, they would end no run."""
    sort = torch.sort

    def guarded(keys, stable):
        keys, order = sort(keys, stable=stable)
        return torch.cat([keys[:1], keys, keys[-1:]])[1:-1], order

    monkeypatch.setattr(launch, "choose_few_runs", lambda n_ids: None)
    monkeypatch.setattr(torch, "sort", guarded)
    monkeypatch.setitem(launch.SCAN, "BLOCK", 16)
    check(make_case(SMALL, 25, n_ids, device=device, traffic="zipf"))


@pytest.mark.parametrize("n_ids", [15, 16, 17])
def test_runs_stay_inside_their_memory(n_ids, batches, device, monkeypatch):
    """Ids that all differ fill it: the allocations lie between margins, which stay as they are."""
    new_empty, buffers = torch.Tensor.new_empty, []

    def guarded(self, size, **options):
        buffers.append(new_empty(self, size + 32, **options).fill_(-7))
        return buffers[-1][16:-16]

    case = make_case(SMALL, 25, 0, device=device)
    case = type(case)(case.module, torch.randperm(25, device=device)[:n_ids], case.grad_out)
    monkeypatch.setattr(torch.Tensor, "new_empty", guarded)
    monkeypatch.setitem(launch.SCAN, "BLOCK", 16)
    check(case)
    for buffer in buffers:
        assert (buffer[:16] == -7).all() and (buffer[-16:] == -7).all()
    assert len(buffers) >= 6


def test_keys_of_32_and_64_bits(device, monkeypatch):
    # 30 bits of place and 2 of level fit, 31 and 2 do not.
    assert pack_keys(1 << 30, (1, 2, 3)) == (1, 30, 1 << 31)
    assert pack_keys((1 << 30) + 1, (1, 2, 3)) == (1, 61, 0)
    # What divides every start is not stored: 8 elements a unit.
    assert pack_keys(1 << 33, (8, 16)) == (8, 30, 1 << 31)
    # The packing of a small arena is that of a large one.
    assert pack_keys(0, (8, 16)) == pack_keys(1 << 33, (8, 16))
    monkeypatch.setattr(launch, "choose_few_runs", lambda n_ids: None)
    for capacity in (1 << 29, 1 << 34):
        case = make_case((8, 16), 30, 50, device=device)
        found = find_runs(case.ids, case.layout, capacity=capacity)
        plain = runs_of(case)
        assert found.key.dtype == (torch.int32 if capacity == 1 << 29 else torch.int64)
        assert torch.equal(found.order, plain.order)
        n_runs = int(plain.level_begin[-1])
        assert torch.equal(found.run_start[:n_runs], plain.run_start[:n_runs])


@pytest.mark.parametrize(
    "dtype, dim",
    [
        *((dtype, 8) for dtype in (torch.float32, torch.bfloat16, torch.float64)),
        # The last column falls into a block of its own.
        (torch.float32, 129),
        (torch.float64, 65),
    ],
    ids=str,
)
def test_hot_stretches(dtype, dim, device, nan_empty):
    case = make_case(SMALL, 6, 0, device=device)
    # Positions after sorting: 40 of row 0, 1,000 of one hot row, the rest of another.
    ids = torch.cat([torch.zeros(40), torch.full((1000,), 1), torch.full((60,), 2)]).long()
    ids = ids[torch.randperm(1100)].to(device)
    case = type(case)(case.module, ids, case.grad_out)
    runs = runs_of(case)
    config = launch.choose_bwd(1100, (2, 3, dim), dtype)
    hot, rows = config.walk[2], torch.randn(1100, dim, device=device).to(dtype)
    sums, n_hot = sum_hot(runs, rows, 3, config)
    assert n_hot == 1100 // hot
    assert sum_hot(runs, rows[:1000], 3, config)[1] == 0
    order, key = runs.order, runs.key
    whole = 0
    for chunk in range(n_hot):
        inside = slice(chunk * hot, (chunk + 1) * hot)
        if key[inside].unique().numel() == 1:
            whole += 1
            expected = rows[order[inside]].double().sum(0)
            tolerance = {"rtol": 1e-5, "atol": 1e-4}
            torch.testing.assert_close(sums[chunk].double(), expected, **tolerance)
        else:
            assert sums[chunk].isnan().all()
    assert whole >= 1
