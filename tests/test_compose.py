"""compose.py: the composed maps are the products of the hops, and so are their gradients."""

import pytest
import torch

from esapn_kernels.compose import (
    chain_numel,
    compose,
    compose_bwd,
    compute_dtype,
    operand_offsets,
)
from esapn_kernels.reference import split_chain

PAPER = (2, 4, 8, 16, 64, 128)
SIZES = [PAPER, (1, 3, 5, 33), (127, 130), (2, 512), (1, 2, 3)]


def name(sizes):
    return "-".join(map(str, sizes))


def random_chain(sizes, dtype=torch.float64):
    return (torch.randn(chain_numel(sizes), dtype=torch.float64) * 0.3).to(dtype)


@pytest.mark.parametrize("sizes", SIZES, ids=name)
def test_blocks_are_products_of_the_hops(sizes, device):
    chain = random_chain(sizes).to(device)
    composed = compose(chain, sizes)
    offsets = operand_offsets(sizes)
    assert composed.shape == (offsets[-1], sizes[-1])
    matrix = torch.eye(sizes[-1], dtype=torch.float64, device=device)
    bias = torch.zeros(sizes[-1], dtype=torch.float64, device=device)
    for k, (w, b) in reversed(list(enumerate(split_chain(chain, sizes)))):
        bias = matrix @ b + bias
        matrix = matrix @ w
        block = composed[offsets[k] : offsets[k + 1]]
        torch.testing.assert_close(block[:-1], matrix.t(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(block[-1], bias, rtol=1e-12, atol=1e-12)


def composed_by_autograd(chain, sizes):
    """The same blocks from plain differentiable products."""
    matrix = torch.eye(sizes[-1], dtype=chain.dtype, device=chain.device)
    bias = torch.zeros(sizes[-1], dtype=chain.dtype, device=chain.device)
    blocks = []
    for w, b in reversed(split_chain(chain, sizes)):
        matrix, bias = matrix @ w, matrix @ b + bias
        blocks += [torch.cat([matrix.t(), bias[None]])]
    return torch.cat(blocks[::-1])


@pytest.mark.parametrize("sizes", SIZES, ids=name)
def test_gradient_is_that_of_the_products(sizes, device):
    chain = random_chain(sizes).to(device).requires_grad_()
    expected = composed_by_autograd(chain, sizes)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    actual = compose_bwd(grad.clone(), chain, compose(chain, sizes), sizes)
    torch.testing.assert_close(actual, chain.grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_sixteen_bit_chains_compose_in_fp32(dtype, device):
    chain = random_chain(PAPER, dtype).to(device).requires_grad_()
    composed = compose(chain, PAPER)
    assert composed.dtype == compute_dtype(dtype) == torch.float32
    exact = compose(chain.detach().double(), PAPER)
    error = (composed.double() - exact).abs().max()
    assert error <= 1e-5 * exact.abs().max()
    assert compose_bwd(torch.ones_like(composed), chain, composed, PAPER).dtype == dtype


def test_one_size_has_no_hops(device):
    chain = torch.zeros(0, device=device, requires_grad=True)
    composed = compose(chain, (7,))
    assert composed.shape == (0, 7)
    assert chain_numel((7,)) == 0 and operand_offsets((7,)) == [0]


def test_counts_of_the_paper_sizes():
    # 3*4 + 5*8 + 9*16 + 17*64 + 65*128 numbers; 3 + 5 + 9 + 17 + 65 rows.
    assert chain_numel(PAPER) == 12 + 40 + 144 + 1088 + 8320
    assert operand_offsets(PAPER) == [0, 3, 8, 17, 34, 99]
