"""launch.py: tiles that Triton accepts, chosen from shapes alone."""

import inspect

import pytest
import torch

from esapn_kernels import launch

CHOOSERS = (
    launch.choose_fwd,
    launch.choose_bwd_rows,
    launch.choose_bwd_chain,
    launch.choose_promote,
)
DIMS = (1, 2, 7, 16, 33, 128, 130, 512, 4096)
N_IDS = (1, 15, 16, 17, 500, 4096, 4097, 1 << 20, 1 << 31)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("choose", CHOOSERS, ids=lambda choose: choose.__name__)
def test_tiles_are_legal(choose, dtype):
    for dim in DIMS:
        for n_ids in N_IDS:
            config = choose(n_ids, dim, dtype)
            for block in (config.block_rows, config.block_k, config.block_dim):
                # tl.arange takes powers of two, tl.dot at least 16 on every side.
                assert block >= 16 and block & (block - 1) == 0, (dim, n_ids, config)
            assert config.num_warps in (1, 2, 4, 8, 16) and config.num_stages >= 1
            assert config == choose(n_ids, dim, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_tile_holds_the_default_width(dtype):
    for choose in (launch.choose_fwd, launch.choose_bwd_rows, launch.choose_bwd_chain):
        assert choose(500, 128, dtype).block_dim == 128
        assert choose(500, 33, dtype).block_dim == 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_splits_never_outnumber_the_tiles(dtype):
    for n_ids in N_IDS:
        config = launch.choose_bwd_chain(n_ids, 128, dtype)
        tiles = -(-n_ids // config.block_rows)
        assert 1 <= config.splits <= min(tiles, 128)
    assert launch.choose_bwd_chain(1 << 20, 128, dtype).splits == 128


def test_small_batches_get_more_programs():
    small, large = (launch.choose_fwd(n, 128, torch.float32) for n in (500, 1 << 20))
    assert small.block_rows < large.block_rows
    # The larger tile spills with fewer warps.
    assert large.num_warps == 8


def test_nothing_looks_at_a_device():
    source = inspect.getsource(launch)
    assert "cuda" not in source and "device(" not in source
