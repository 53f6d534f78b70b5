"""fit.py: rows of a smaller size whose outputs are nearest, or spread as their draft is."""

import pytest
import torch

from esapn_kernels.ops.chain import chain_numel
from esapn_kernels.ops.fit import LevelMap, drawn, level_maps, nearest
from esapn_kernels.reference import split_chain

PAPER = (2, 4, 8, 16, 64, 128)
SIZES = [PAPER, (2, 3, 4), (1, 2), (7, 33), (1, 3, 5)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

every_sizes = pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "-".join(map(str, sizes)))


def random_chain(sizes, dtype=torch.float64, device="cpu"):
    return torch.randn(chain_numel(sizes), dtype=torch.float64).to(device, dtype)


def carried(rows, level, chain, sizes):
    """The outputs of rows of a level, hop by hop."""
    for weight, bias in split_chain(chain.double(), sizes)[level:]:
        rows = rows @ weight.t() + bias
    return rows


@every_sizes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_maps_are_the_hops(sizes, dtype, device):
    chain = random_chain(sizes, dtype, device)
    maps = level_maps(chain, sizes)
    assert len(maps) == len(sizes) - 1
    for k, level in enumerate(maps):
        rows = torch.randn(5, sizes[k], dtype=torch.float64, device=device)
        outputs = rows @ level.matrix.t() + level.offset
        torch.testing.assert_close(outputs, carried(rows, k, chain, sizes))


@every_sizes
def test_nearest_solves_least_squares(sizes, device):
    chain = random_chain(sizes, device=device)
    outputs = torch.randn(9, sizes[-1], dtype=torch.float64, device=device)
    for k, level in enumerate(level_maps(chain, sizes)):
        rows = nearest(outputs, level)
        # By itself: one row at a time, the matrix made by carrying the unit rows.
        unit = torch.eye(sizes[k], dtype=torch.float64, device=device)
        bias = carried(torch.zeros_like(unit[:1]), k, chain, sizes)
        matrix = (carried(unit, k, chain, sizes) - bias).t()
        for row, output in zip(rows, outputs, strict=True):
            expected = torch.linalg.lstsq(matrix, (output - bias[0])[:, None]).solution[:, 0]
            torch.testing.assert_close(row, expected)


@every_sizes
def test_outputs_of_rows_give_the_rows_back(sizes):
    chain = random_chain(sizes)
    for k, level in enumerate(level_maps(chain, sizes)):
        rows = torch.randn(6, sizes[k], dtype=torch.float64)
        torch.testing.assert_close(nearest(carried(rows, k, chain, sizes), level), rows)


def test_rank_deficient_hops_give_the_shortest_row():
    sizes = (3, 4)
    chain = torch.zeros(chain_numel(sizes), dtype=torch.float64)
    ((weight, bias),) = split_chain(chain, sizes)
    weight.copy_(torch.outer(torch.randn(4).double(), torch.randn(3).double()))
    bias.copy_(torch.randn(4))
    outputs = torch.randn(5, 4, dtype=torch.float64)
    found = nearest(outputs, *level_maps(chain, sizes))
    solve = torch.linalg.lstsq(weight, (outputs - bias).t(), driver="gelsd")
    assert solve.rank == 1
    torch.testing.assert_close(found, solve.solution.t())


def test_directions_below_the_precision_of_the_rows_are_left_out():
    """A singular value of 1e-3 would need numbers that bf16 rounds by more than it brings."""
    matrix = torch.diag(torch.tensor([1.0, 1e-3], dtype=torch.float64))
    matrix = torch.cat([matrix, torch.zeros(1, 2).double()])
    outputs = torch.ones(1, 3)
    for dtype, expected in {torch.bfloat16: [1.0, 0.0], torch.float32: [1.0, 1e3]}.items():
        level = LevelMap(matrix, torch.zeros(3).double(), torch.finfo(dtype).eps)
        torch.testing.assert_close(nearest(outputs, level)[0].tolist(), expected)


@every_sizes
def test_the_variance_of_outputs_is_that_of_the_draft(sizes):
    """Exactly: the draft of unit vectors is the matrix that carries any draft to its outputs."""
    dim = sizes[-1]
    for level in level_maps(random_chain(sizes), sizes):
        zero = drawn(torch.zeros(1, dim), level)
        carry = (drawn(torch.eye(dim), level) - zero) @ level.matrix.t()
        variance = carry.square().sum(0)  # of every column, for draws of variance 1
        torch.testing.assert_close(variance.mean(), torch.tensor(1.0).double())


@every_sizes
def test_a_draft_of_one_number_is_a_value(sizes):
    values = torch.tensor([[0.0], [2.5], [-1e-3]])
    for level in level_maps(random_chain(sizes), sizes):
        draft = values.expand(3, sizes[-1])
        torch.testing.assert_close(drawn(draft, level), nearest(draft, level))


def test_hops_that_let_nothing_through():
    (level,) = level_maps(torch.zeros(chain_numel((2, 3))), (2, 3))
    for rows in (drawn(torch.randn(4, 3), level), nearest(torch.randn(4, 3), level)):
        assert torch.equal(rows, torch.zeros(4, 2).double())
