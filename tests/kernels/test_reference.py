"""reference.py against numbers worked out by hand, and against autograd."""

import pytest
import torch

from esapn_kernels.reference import (
    lookup_grad_reference,
    lookup_reference,
    promote_reference,
    split_chain,
)
from esapn_kernels.testing import make_case

# Sizes (1, 2, 3). Hop 0: W = [[2], [3]], b = [10, 20]. Hop 1: W = [[1, 0], [0, 1], [1, 1]],
# b = [1, 2, 3]. Stored transposed with the bias as last row.
SIZES = (1, 2, 3)
CHAIN = torch.tensor(
    [2.0, 3.0, 10.0, 20.0] + [1.0, 0.0, 1.0, 0.0, 1.0, 1.0] + [1.0, 2.0, 3.0], dtype=torch.float64
)
# Pages of 6 elements: level 0 (only the row [5]), level 1 ([7, 8] second), level 2 ([1, 2, 4]).
STORAGE = torch.zeros(18, dtype=torch.float64)
STORAGE[0] = 5.0
STORAGE[8:10] = torch.tensor([7.0, 8.0])
STORAGE[12:15] = torch.tensor([1.0, 2.0, 4.0])
WHERE = (torch.tensor([0, 8, 12]), torch.tensor([0, 1, 2], dtype=torch.int8))


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def test_split_chain_is_the_hops():
    (w0, b0), (w1, b1) = split_chain(CHAIN, SIZES)
    assert w0.tolist() == [[2], [3]] and b0.tolist() == [10, 20]
    assert w1.tolist() == [[1, 0], [0, 1], [1, 1]] and b1.tolist() == [1, 2, 3]


def test_lookup_by_hand():
    out = lookup_reference(torch.tensor([0, 1, 2, 0]), STORAGE, CHAIN, *WHERE, SIZES, 6)
    # Row 0: [2*5+10, 3*5+20] = [20, 35], then [20+1, 35+2, 55+3].
    expected = [[21.0, 37.0, 58.0], [8.0, 10.0, 18.0], [1.0, 2.0, 4.0], [21.0, 37.0, 58.0]]
    assert out.tolist() == expected


def test_lookup_of_nothing_and_of_one_id():
    empty = lookup_reference(torch.zeros(2, 0, dtype=torch.long), STORAGE, CHAIN, *WHERE, SIZES, 6)
    assert empty.shape == (2, 0, 3)
    one = lookup_reference(torch.tensor(1), STORAGE, CHAIN, *WHERE, SIZES, 6)
    assert one.tolist() == [8.0, 10.0, 18.0]


def test_gradients_by_hand():
    grad_out = tensor([[1.0, 10.0, 100.0], [1.0, 0.0, 0.0], [4.0, 5.0, 6.0]])
    ids = torch.tensor([0, 1, 2])
    grad_storage, grad_chain = lookup_grad_reference(
        grad_out, ids, STORAGE, CHAIN, *WHERE, SIZES, 6
    )
    expected = torch.zeros_like(STORAGE)
    # Row 0: g at level 1 is W1^T g = [1 + 100, 10 + 100]; at level 0 2 * 101 + 3 * 110.
    expected[0] = 532.0
    expected[8:10] = tensor([1.0, 0.0])
    expected[12:15] = tensor([4.0, 5.0, 6.0])
    assert torch.equal(grad_storage, expected)
    (w0, b0), (w1, b1) = split_chain(grad_chain, SIZES)
    assert w0.tolist() == [[101 * 5], [110 * 5]] and b0.tolist() == [101, 110]
    # g e^T of row 0 (e = [20, 35] at level 1) and of row 1 (e = [7, 8]).
    assert w1.tolist() == [[20 + 7, 35 + 8], [200, 350], [2000, 3500]]
    assert b1.tolist() == [2, 10, 100]


def test_promote_by_hand():
    assert promote_reference(tensor([5.0]), 0, CHAIN, SIZES).tolist() == [20, 35]
    assert promote_reference(tensor([7.0, 8.0]), 1, CHAIN, SIZES).tolist() == [8, 10, 18]


@pytest.mark.parametrize(
    "sizes", [(1, 3, 5, 33), (7,), (127, 130)], ids=lambda sizes: "-".join(map(str, sizes))
)
def test_gradients_are_those_of_autograd(sizes):
    case = make_case(sizes, 20, 30, torch.float64)
    leaves = case.leaves()
    out = lookup_reference(case.ids, *leaves, *case.layout.flat)
    expected = torch.autograd.grad(
        out, leaves, case.grad_out, allow_unused=True, materialize_grads=True
    )
    actual = lookup_grad_reference(
        case.grad_out, case.ids, *(t.detach() for t in leaves), *case.layout.flat
    )
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        assert theirs.numel() == 0 or theirs.abs().max() > 0
