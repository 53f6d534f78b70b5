"""compose.py: the composed maps are the products of the hops, and so are their gradients."""

import copy

import pytest
import torch

from esapn_kernels.gpu import compose as compose_file
from esapn_kernels.ops.backend import TRITON_ERROR
from esapn_kernels.ops.chain import chain_numel, compute_dtype, operand_offsets
from esapn_kernels.ops.compose import compose, compose_bwd
from esapn_kernels.reference import lookup_reference, split_chain
from esapn_kernels.testing import assert_matches, make_case
from tests.kernels.layouts import LAYOUTS, PAPER, SMALL, compared, name, tiled

KERNELS = [
    *LAYOUTS,
    *tiled([(511, 512)]),
    ((7, 128, 512), torch.float32),
    ((1, 1, 1), torch.float32),
    ((4, 5), torch.float64),
]


def random_chain(sizes, dtype, device):
    return (torch.randn(chain_numel(sizes), dtype=torch.float64) * 0.3).to(device, dtype)


def chained(chain, sizes):
    """The blocks by hand: ones carried through the literal hops, with and without the biases."""
    hops = split_chain(chain, sizes)
    blocks = []
    for k in range(len(hops)):
        rows, bias = torch.eye(sizes[k]).to(chain), torch.zeros(sizes[k]).to(chain)
        for w, b in hops[k:]:
            rows, bias = rows @ w.t(), w @ bias + b
        blocks += [rows, bias[None]]
    return torch.cat(blocks) if blocks else chain.new_empty(0, sizes[-1])


def with_gradient(chain, grad, sizes, dtype):
    """The definition and, by autograd, its gradient, in ``dtype``."""
    leaf = chain.detach().to(dtype).requires_grad_()
    composed = chained(leaf, sizes)
    composed.backward(grad.to(dtype))
    return composed.detach(), leaf.grad


def check(sizes, dtype, backend, device):
    """Both directions against the definition."""
    chain = random_chain(sizes, dtype, device)
    grad = torch.randn(operand_offsets(sizes)[-1], sizes[-1], device=device)
    accumulated = compute_dtype(dtype)
    grad = grad.to(accumulated)
    composed = compose(chain, sizes, backend=backend)
    grad_chain = compose_bwd(grad.clone(), chain, composed, sizes, backend=backend)
    exact = with_gradient(chain, grad, sizes, torch.float64)
    eager = with_gradient(chain, grad, sizes, accumulated)
    assert composed.dtype == accumulated and grad_chain.dtype == dtype
    assert_matches(composed, exact[0], eager[0], name="composed")
    assert_matches(grad_chain, exact[1], eager[1].to(dtype), name="gradient of the chain")
    # The last block is the last hop itself, and its gradient arrives unchanged but for the sums.
    last = (sizes[-2] + 1) * sizes[-1]
    assert torch.equal(composed[-sizes[-2] - 1 :].reshape(-1), chain[-last:].to(accumulated))


@pytest.mark.parametrize("sizes, dtype, backend", compared(KERNELS), indirect=["backend"], ids=name)
def test_against_the_definition(sizes, dtype, backend, device, nan_empty):
    check(sizes, dtype, backend, device)


@pytest.mark.parametrize("sizes, dtype", tiled(), ids=name)
def test_sizes_that_fill_a_block(sizes, dtype, backend, device, nan_empty):
    check(sizes, dtype, backend, device)


def test_gradient_is_the_same_every_time(backend, device):
    chain = random_chain(PAPER, torch.float32, device)
    composed = compose(chain, PAPER, backend=backend)
    grad = torch.randn_like(composed)
    first, second = (
        compose_bwd(grad.clone(), chain, composed, PAPER, backend=backend) for _ in range(2)
    )
    assert torch.equal(first, second)


def test_no_gradient_is_recorded(backend, device):
    chain = random_chain(SMALL, torch.float32, device).requires_grad_()
    composed = compose(chain, SMALL, backend=backend)
    assert not composed.requires_grad
    grad = compose_bwd(torch.ones_like(composed), chain, composed, SMALL, backend=backend)
    assert not grad.requires_grad


def test_one_size_has_no_hops(backend, device):
    chain = torch.zeros(0, device=device, requires_grad=True)
    composed = compose(chain, (7,), backend=backend)
    assert composed.shape == (0, 7)
    assert compose_bwd(composed.clone(), chain, composed, (7,), backend=backend).shape == (0,)
    assert chain_numel((7,)) == 0 and operand_offsets((7,)) == [0]


def test_a_chain_that_is_not_contiguous(backend, device):
    both = random_chain(SMALL, torch.float32, device).repeat_interleave(2)
    every_second = both[::2]
    assert not every_second.is_contiguous()
    expected = compose(every_second.clone(), SMALL, backend=backend)
    assert torch.equal(compose(every_second, SMALL, backend=backend), expected)


def test_one_launch_each(device, monkeypatch):
    """Every hop in one launch: at small batches launches are what a lookup costs."""
    launches = []

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            launches.append(grid)
            return self.kernel[grid]

    for kernel in ("_compose_kernel", "_compose_bwd_kernel"):
        monkeypatch.setattr(compose_file, kernel, Counted(getattr(compose_file, kernel)))
    chain = random_chain(PAPER, torch.float32, device)
    composed = compose(chain, PAPER, backend="triton")
    compose_bwd(torch.ones_like(composed), chain, composed, PAPER, backend="triton")
    assert len(launches) == 2


def test_counts_of_the_paper_sizes():
    # 3*4 + 5*8 + 9*16 + 17*64 + 65*128 numbers; 3 + 5 + 9 + 17 + 65 rows.
    assert chain_numel(PAPER) == 12 + 40 + 144 + 1088 + 8320
    assert operand_offsets(PAPER) == [0, 3, 8, 17, 34, 99]


def test_opcheck(backend, device):
    sizes = SMALL
    chain = random_chain(sizes, torch.float32, device)
    composed = compose(chain, sizes)
    torch.library.opcheck(torch.ops.esapn_kernels.compose.default, (chain, sizes, backend))
    if backend == "torch":
        return  # its gradient's memory is scratch, and no operator stands for it
    inputs = (torch.randn_like(composed), chain, composed, sizes, backend)
    torch.library.opcheck(torch.ops.esapn_kernels.compose_bwd.default, inputs)


@pytest.mark.skipif(TRITON_ERROR is not None, reason=str(TRITON_ERROR))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name)
def test_averages_of_hops_that_do_not_train_are_seen(dtype, device):
    """A mean teacher: its copy needs no gradient and is written to behind version counters."""
    case = make_case(SMALL, 9, 20, dtype, device, backend="triton")
    teacher = copy.deepcopy(case.module).requires_grad_(False)
    for _ in range(3):
        with torch.no_grad():
            out = teacher(case.ids)
        flat = teacher.arena.layout.flat
        expected = lookup_reference(case.ids, teacher.arena.storage, teacher.chain, *flat)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        teacher.chain.data.mul_(0.5).add_(case.module.chain.data, alpha=0.5)
