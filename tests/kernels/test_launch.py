"""launch.py: tiles that Triton accepts, chosen from shapes alone."""

import inspect

import pytest
import torch

from esapn_kernels.gpu import launch

DIMS = (1, 2, 7, 16, 33, 128, 130, 512, 4096)
N_IDS = (1, 15, 16, 17, 500, 4096, 4097, 1 << 20, 1 << 31)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_tiles_are_legal(dtype):
    for dim in DIMS:
        config = launch.choose_promote(dim, dtype)
        for block in (config.block_rows, config.block_k, config.block_dim):
            # tl.arange takes powers of two, tl.dot at least 16 on every side.
            assert block >= 16 and block & (block - 1) == 0, (dim, config)
        assert config.num_warps in (1, 2, 4, 8, 16) and config.num_stages >= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_tile_holds_the_default_width(dtype):
    assert launch.choose_fwd(128, dtype).block_dim == 128
    assert launch.choose_fwd(33, dtype).block_dim == 64
    assert launch.choose_bwd(500, (2, 128), dtype).sums.blocks["BLOCK_DIM"] == 128
    assert launch.choose_bwd(500, (2, 33), dtype).sums.blocks["BLOCK_DIM"] == 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_passes_of_the_gradient(dtype):
    for dim in DIMS:
        for n_ids in N_IDS:
            config = launch.choose_bwd(n_ids, (1, dim + 1), dtype)
            for each in (config.sums, config.chain, config.rows):
                # At most a tile of 16 runs for every 16 ids, and a partly filled one per level.
                assert 1 <= each.programs <= -(-n_ids // 16) + 2
                for name, block in each.blocks.items():
                    if name not in ("WALK", "WHOLE"):
                        assert block >= 16 and block & (block - 1) == 0, (dim, n_ids, each)
            walk, unroll, hot, stretch = config.walk
            assert walk % unroll == 0 and hot % stretch == 0 and hot >= walk
    # Partial sums of the chain's gradient: 33 KB a program in the default sizes.
    assert launch.choose_bwd(1 << 20, (64, 128), dtype).chain.programs <= 512


def test_nothing_looks_at_a_device():
    source = inspect.getsource(launch)
    assert "torch.cuda" not in source and "device(" not in source


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_forward_and_compose_tiles_are_legal(dtype):
    for dim in DIMS:
        for n_ids in N_IDS:
            grouped = launch.choose_fwd_grouped(n_ids, (1, dim + 1), dtype)
            small = launch.choose_fwd(dim + 1, dtype)
            compose = launch.choose_compose(dim, dtype)
            for config in (grouped, small, compose):
                for block in (config.block_rows, config.block_k, config.block_dim):
                    assert block >= 16 and block & (block - 1) == 0, (dim, n_ids, config)
            for config in (grouped, small):
                padded = config.constants((1, dim + 1), dtype)["PADDED"]
                assert all(16 <= p <= config.block_k and p & (p - 1) == 0 for p in padded)
            # No program without a tile, and a last tile for every level.
            assert 1 <= grouped.programs <= -(-n_ids // grouped.block_rows) + 2


@pytest.mark.parametrize("n_levels", [1, 6, 7, 30, 127])
def test_every_id_is_grouped_once(n_levels):
    for n_ids in N_IDS:
        config = launch.choose_group(n_ids, n_levels)
        assert config.levels >= n_levels + 2 and config.levels & (config.levels - 1) == 0
        assert config.stretch % config.block_rows == 0
        assert (config.programs - 1) * config.stretch < n_ids <= config.programs * config.stretch
        assert config.programs <= 512 and config.block_rows >= 16
        assert config.block_rows * config.levels <= 4096


def test_row_starts_are_as_aligned_as_said():
    for sizes, page in (((2, 4, 8, 16, 64, 128), 4096), ((1, 3, 5, 33), 4096), ((6, 20), 64)):
        for size, align in zip(sizes, launch.alignments(sizes), strict=True):
            starts = [p * page + i * size for p in range(8) for i in range(page // size)]
            assert all(start % align == 0 for start in starts)
            assert any(start % (2 * align) for start in starts)


def test_only_large_batches_group_and_never_one_size():
    sizes = (2, 4, 8, 16, 64, 128)
    assert launch.groups_ids(1 << 20, sizes, torch.float32)
    assert launch.groups_ids(1 << 20, sizes, torch.bfloat16)
    assert not launch.groups_ids(8192, sizes, torch.float32)
    assert not launch.groups_ids(1 << 20, (128,), torch.float32)
    # The ungrouped kernel does not compile for fp64 on every target.
    assert launch.groups_ids(1, sizes, torch.float64)


def test_constants_are_shared_but_for_the_precision_that_is_allowed():
    sizes, dtype = (2, 4, 8, 16, 64, 128), torch.float32
    forward = launch.choose_fwd(128, dtype)

    def constants():
        return launch.kernel_constants(sizes, dtype), forward.constants(sizes, dtype)

    before, again = constants(), constants()
    assert all(a is b for a, b in zip(before, again, strict=True))
    torch.backends.cuda.matmul.allow_tf32 = True  # put back by the fixture `seeded`
    for old, new in zip(before, constants(), strict=True):
        assert old["PRECISION"] == "tf32x3" and new["PRECISION"] == "tf32"
        assert {**old, "PRECISION": "tf32"} == new


def test_the_scan_pads_levels():
    for n_levels, padded in ((1, 2), (2, 2), (3, 4), (6, 8), (9, 16)):
        choice = launch.choose_scan(n_levels)
        assert choice["LEVELS"] == padded
        # All threads of the one program share the registers of a multiprocessor.
        assert choice["num_warps"] * 32 * choice["maxnreg"] <= 65536
        assert choice["BLOCK_IDS"] == choice["num_warps"] * 32 * 4
