"""A number that is not finite reaches what it reaches in the definition, and nothing else."""

import math

import pytest
import torch

from esapn_kernels.gpu import launch
from esapn_kernels.ops.backend import NATIVE_ERROR
from esapn_kernels.ops.chain import chain_numel
from esapn_kernels.ops.compose import compose
from esapn_kernels.ops.lookup import lookup
from esapn_kernels.reference import split_chain
from esapn_kernels.testing import make_case
from tests.kernels.layouts import PAPER as SIZES

# NumPy, which interprets the kernels, says what becomes NaN.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


@pytest.fixture(params=["torch", "native", "small", "grouped"])
def path(request, monkeypatch) -> str:
    """Every way through a lookup of a few ids: the backend to ask for."""
    monkeypatch.setattr(launch, "groups_ids", lambda *_: request.param == "grouped")
    if request.param == "native" and NATIVE_ERROR is not None:
        pytest.skip(NATIVE_ERROR)
    return request.param if request.param in ("torch", "native") else "triton"


@pytest.fixture(autouse=True)
def fitting(path, device):
    if path != "triton" and device.type != "cpu":
        pytest.skip("the paths of a CPU are tested on a CPU")


def with_levels(levels, device):
    """Ids of rows of some of the levels only."""
    case = make_case(SIZES, 40, 0, device=device)
    level = case.module.arena.level()
    chosen = torch.isin(level, torch.tensor(levels, device=device)).nonzero()[:16, 0]
    grad_out = torch.randn(len(chosen), SIZES[-1]).to(device)
    return type(case)(case.module, chosen, grad_out)


def finite(results):
    return [t.detach().isfinite() for t in results]


@pytest.mark.parametrize("part, value", [("weight", math.inf), ("bias", math.nan)])
@pytest.mark.parametrize("hop", [0, 2, 4])
@pytest.mark.parametrize("levels", [(0, 1, 2, 3, 4, 5), (3, 5)], ids=str)
def test_a_hop(levels, hop, part, value, path, device):
    case = with_levels(list(levels), device)
    with torch.no_grad():
        weight, bias = split_chain(case.module.chain, SIZES)[hop]
        (weight[1, 0:1] if part == "weight" else bias[1:2]).fill_(value)
    out, grad_storage, grad_chain = finite(case.run(path))
    expected, expected_storage, expected_chain = finite(case.expected(torch.float32))
    assert torch.equal(out, expected)
    reached = bool((case.module.arena.level(case.ids) <= hop).any())
    assert bool(expected.all()) is not reached
    # A factor of zero hides what is not finite from a product that is skipped; never the reverse.
    assert (grad_storage | ~expected_storage).all()
    assert (grad_chain | ~expected_chain).all()


@pytest.mark.parametrize("value", [-math.inf, math.nan], ids=str)
@pytest.mark.parametrize("level", [0, 3, 5])
def test_a_row(level, value, path, device):
    case = with_levels(list(range(6)), device)
    row = case.ids[case.module.arena.level(case.ids) == level][0]
    start = int(case.module.arena.layout.row_start[row])
    with torch.no_grad():
        case.module.arena.storage[start] = value
    out, grad_storage, grad_chain = finite(case.run(path))
    expected, expected_storage, expected_chain = finite(case.expected(torch.float32))
    assert torch.equal(out, expected) and torch.equal(grad_storage, expected_storage)
    assert torch.equal(~out.all(1), case.ids == row)
    assert (grad_chain | ~expected_chain).all()


@pytest.mark.parametrize("hop", [0, 4])
def test_derivatives_of_derivatives(hop, path, device):
    """Of rows that never pass the hop they are finite."""
    case = with_levels([5] if hop == 4 else [1, 5], device)
    with torch.no_grad():
        split_chain(case.module.chain, SIZES)[hop][0][1, 0] = math.inf
    storage, chain = case.leaves()
    out = lookup(case.ids, storage, chain, case.layout, backend=path)
    grads = torch.autograd.grad(out.square().sum(), (storage, chain), create_graph=True)
    again = torch.autograd.grad(sum(g.square().sum() for g in grads), (storage, chain))
    assert all(g.isfinite().all() for g in (out, *grads, *again))


def test_a_promotion(path, device):
    """Only rows that pass the hop."""
    case = with_levels(list(range(6)), device)
    with torch.no_grad():
        split_chain(case.module.chain, SIZES)[1][0][1, 0] = math.inf
    arena = case.module.arena
    passes = arena.level(case.ids) == 1
    arena.promote(case.ids, case.module.chain, backend=path)
    rows = [arena.read(int(i)).isfinite().all() for i in case.ids]
    assert torch.equal(torch.stack(rows).to(device), ~passes)


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_the_composed_maps(part, path, device):
    """A bias that is not finite is no part of a matrix."""
    chain = torch.randn(chain_numel(SIZES), device=device)
    weight, bias = split_chain(chain, SIZES)[2]
    (weight[1, 0:1] if part == "weight" else bias[1:2]).fill_(math.inf)
    composed = compose(chain, SIZES, backend=path)
    expected = torch.ones_like(composed, dtype=torch.bool)
    first = 0
    for level, dim in enumerate(SIZES[:3]):
        # The map of level 2 sends its number 0 through the weight, lower maps all of theirs.
        below = [0] if level == 2 else range(dim + 1)
        bad = below if part == "weight" else [dim]
        expected[[first + i for i in bad]] = False
        first += dim + 1
    assert torch.equal(composed.isfinite(), expected)
