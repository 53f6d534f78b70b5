"""cpu/lookup.py: outputs, dtypes, the order of sums and fused updates, against the definition."""

import pytest
import torch

from esapn_kernels.cpu import lookup as cpu
from esapn_kernels.cpu import resize
from esapn_kernels.ops.compose import compose, compose_bwd
from esapn_kernels.ops.layout import Layout
from esapn_kernels.ops.lookup import Options, lookup
from esapn_kernels.ops.update import Update, rule_numbers
from esapn_kernels.testing import assert_matches, make_case, row_elements
from tests.kernels.layouts import DTYPES, ODD, PAPER, SMALL, name

HALVES = [torch.bfloat16, torch.float16]


def arguments(case):
    """Arguments of ``lookup_fwd``."""
    storage, chain = case.leaves()
    composed = compose(chain, case.module.sizes)
    return (case.ids, storage.detach(), composed, case.layout)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("sizes", [PAPER, ODD, (7,)], ids=name)
@pytest.mark.parametrize("offset", [64, 65], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("n_ids", [0, 70])
def test_output_given(sizes, out_dtype, offset, n_ids):
    case = make_case(sizes, 30, n_ids)
    buffer = torch.full((n_ids * sizes[-1] + 2 * offset,), float("nan"), dtype=out_dtype)
    given = buffer[offset:-offset].view(n_ids, sizes[-1])
    out = cpu.lookup_fwd(*arguments(case), out=given)
    assert out is given
    eager = case.expected(torch.float32)[0].to(out_dtype)
    assert_matches(out, case.expected()[0], eager, name="output")
    assert buffer[:offset].isnan().all() and buffer[-offset:].isnan().all()


@pytest.mark.parametrize("given", [False, True], ids=["new", "given"])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float64], ids=name)
@pytest.mark.parametrize("dtype", HALVES, ids=name)
def test_the_output_of_16_bit_rows_is_rounded_once(dtype, out_dtype, given, backend, device):
    case = make_case(PAPER, 30, 40, dtype, device)
    storage, chain = (t.detach() for t in case.leaves())
    out = case.grad_out.new_full((40, 128), float("nan"), dtype=out_dtype) if given else None
    options = Options(out_dtype=out_dtype)
    y = lookup(case.ids, storage, chain, case.layout, options, backend=backend, out=out)
    assert y.dtype == out_dtype and (y is out) == given
    # The sums are of fp32: a rounding to 16 bits would show a thousand times over.
    torch.testing.assert_close(y.double(), case.expected()[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [30, -1, 12], ids=["beyond", "negative", "no-row"])
def test_ids_that_do_not_exist_change_nothing(bad):
    case = make_case(SMALL, 30, 40)
    case.module.arena.free(torch.tensor([12]))
    ids, storage, composed, layout = arguments(case)
    ids = torch.where(ids == 12, 0, ids).index_fill(0, torch.tensor([39]), bad)
    operands = ids, storage, composed, layout
    before, out = storage.clone(), torch.full((40, 8), 7.0)
    clock = torch.tensor([4.0, 0.5, 0.5], dtype=torch.float64)
    step = Update("sgd", torch.tensor(rule_numbers(0.1), dtype=torch.float64), clock=clock)
    for call in (
        lambda: cpu.lookup_fwd(*operands, out=out),
        lambda: cpu.lookup_bwd(case.grad_out, *operands),
        lambda: cpu.lookup_bwd_sparse(case.grad_out, *operands),
        lambda: cpu.lookup_bwd_update(case.grad_out, *operands, step),
    ):
        with pytest.raises(IndexError, match="^index out of range in self$"):
            call()
    assert torch.equal(storage, before) and (out == 7).all() and clock.tolist() == [4.0, 0.5, 0.5]


def test_in_inference_mode():
    case = make_case(PAPER, 40, 60)
    with torch.inference_mode():
        out = cpu.lookup_fwd(*arguments(case))
        assert out.is_inference()
    assert torch.equal(cpu.lookup_fwd(*arguments(case)), out)


def elsewhere(case):
    """The same rows with their pages in another order: storage, layout, and elements of rows."""
    old, storage = case.layout, case.module.arena.storage.detach()
    pages = old.page_level.numel()
    order = torch.randperm(pages)
    assert not torch.equal(order, torch.arange(pages))
    place = order.argsort()
    start = old.row_start.long()
    moved = place[start // old.page] * old.page + start % old.page
    layout = Layout(moved.to(old.row_start.dtype), old.page_level[order], old.sizes, old.page)
    return storage.view(pages, old.page)[order].view(-1), layout, order


def test_sums_do_not_depend_on_where_rows_lie():
    case = make_case(PAPER, 300, 3000, traffic="zipf")
    ids, storage, composed, layout = arguments(case)
    moved, other, order = elsewhere(case)
    out = cpu.lookup_fwd(ids, storage, composed, layout)
    assert torch.equal(cpu.lookup_fwd(ids, moved, composed, other), out)
    rows, hops = cpu.lookup_bwd(case.grad_out, ids, storage, composed, layout)
    moved_rows, moved_hops = cpu.lookup_bwd(case.grad_out, ids, moved, composed, other)
    assert torch.equal(moved_hops, hops)
    assert rows.any() and torch.equal(moved_rows, rows.view(-1, layout.page)[order].view(-1))


def test_autocast_changes_nothing():
    case = make_case(PAPER, 40, 60)

    def everything():
        ids, storage, composed, layout = arguments(case)
        operands = case.grad_out, ids, storage, composed, layout
        rows, hops = cpu.lookup_bwd_sparse(*operands)
        results = [cpu.lookup_fwd(*operands[1:]), rows.coalesce().values(), hops]
        results += cpu.lookup_bwd(*operands)
        results += [cpu.lookup_bwd_update(*operands, sgd(0.5)), storage]
        module = make_case(PAPER, 40, 0).module
        module.promote(torch.arange(40))
        return [*results, compose(case.hops, PAPER), module.arena.storage.detach()]

    plain = everything()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = everything()
    for i, (x, y) in enumerate(zip(plain, cast, strict=True)):
        assert torch.equal(x, y), i


def test_sparse_gradients_are_the_dense_ones():
    case = make_case(SMALL, 30, 90)
    operands = (case.grad_out, *arguments(case))
    dense, hops = cpu.lookup_bwd(*operands)
    sparse, sparse_hops = cpu.lookup_bwd_sparse(*operands)
    assert torch.equal(sparse.to_dense(), dense) and torch.equal(sparse_hops, hops)
    assert sparse._nnz() == int(row_elements(case.module, case.ids).sum())
    padding = int(case.ids[0])
    padded, _ = cpu.lookup_bwd_sparse(*operands, padding_idx=padding)
    its = row_elements(case.module, case.ids[:1])
    assert torch.equal(padded.to_dense(), dense.masked_fill(its, 0))
    assert padded._nnz() == sparse._nnz() - int(its.sum())


def sgd(lr):
    return Update("sgd", torch.tensor(rule_numbers(lr), dtype=torch.float64))


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("sizes", [PAPER, ODD, (7,), (2, 512)], ids=name)
def test_update_against_the_definition(sizes, dtype, index, nan_empty):
    case = make_case(sizes, 30, 70, dtype)  # ids occur several times
    ids, storage, composed, layout = arguments(case)
    before = storage.clone()
    grad_composed = cpu.lookup_bwd_update(
        case.grad_out, ids.to(index), storage, composed, layout, sgd(0.5)
    )
    exact, eager = case.expected(), case.expected(dtype)
    rows = row_elements(case.module, ids)
    assert torch.equal(storage[~rows], before[~rows])
    assert_matches(
        storage[rows],
        (before.double() - 0.5 * exact[1])[rows],
        (before - 0.5 * eager[1])[rows],
        name="rows",
    )
    grad_chain = compose_bwd(grad_composed, case.hops, composed, sizes)
    assert_matches(grad_chain, exact[2], eager[2], name="gradient of the chain")


def test_update_steps_every_row_once(monkeypatch):
    case = make_case(SMALL, 30, 0)
    ids = torch.tensor([7, 3, 7, 29, 0, 7, 3])
    grad_out = torch.randn(7, 8)
    case = type(case)(case.module, ids, grad_out)
    _, storage, composed, layout = arguments(case)
    calls = []

    def update_rows(update, rows, start, ids, grad):
        assert update is given and rows.data_ptr() == storage.data_ptr()
        assert start.dtype == ids.dtype == torch.int64 and grad.dtype == torch.float32
        calls.append((start.clone(), ids.clone(), grad.clone()))

    monkeypatch.setattr(cpu, "update_rows", update_rows)
    given = Update("sgd", torch.tensor(rule_numbers(lr=0.1), dtype=torch.float64))
    cpu.lookup_bwd_update(grad_out, ids, storage, composed, layout, given)
    stepped = torch.cat([mine for _, mine, _ in calls])
    assert sorted(stepped.tolist()) == [0, 3, 7, 29]
    exact = case.expected()[1]
    dims = case.module.sizes_of(stepped).tolist()
    for start, mine, grad in calls:
        assert torch.equal(start, layout.row_start[mine].long())
        assert set(case.module.sizes_of(mine).tolist()) == {grad.shape[1]}
        wanted = torch.stack([exact[s : s + grad.shape[1]] for s in start.tolist()])
        torch.testing.assert_close(grad.double(), wanted, rtol=1e-5, atol=1e-5)
    assert len(dims) == 4


def test_update_takes_the_rows_before_it():
    """A large step: the gradient of ``composed`` would show if it came from the rows after it."""
    case = make_case(SMALL, 30, 90)
    ids, storage, composed, layout = arguments(case)
    _, expected = cpu.lookup_bwd(case.grad_out, ids, storage, composed, layout)
    given = case.grad_out.clone(), composed.clone()
    grad = cpu.lookup_bwd_update(case.grad_out, ids, storage, composed, layout, sgd(1e3))
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(case.grad_out, given[0]) and torch.equal(composed, given[1])


def test_update_without_the_gradient_of_composed():
    case = make_case(SMALL, 30, 90)
    stepped = []
    for want in (True, False):
        ids, storage, composed, layout = arguments(case)
        grad = cpu.lookup_bwd_update(
            case.grad_out, ids, storage, composed, layout, sgd(0.5), want_composed=want
        )
        assert (grad is not None) == want
        stepped.append(storage)
    assert torch.equal(*stepped)


def test_update_of_no_rows():
    case = make_case((2, 8), 5, 0)
    ids, storage, composed, layout = arguments(case)
    before = storage.clone()
    grad = cpu.lookup_bwd_update(case.grad_out, ids, storage, composed, layout, sgd(1.0))
    assert torch.equal(storage, before)
    assert grad.shape == composed.shape and not grad.any()


def test_update_is_deterministic():
    case = make_case(PAPER, 50, 3000, traffic="zipf")
    results = []
    for _ in range(2):
        ids, storage, composed, layout = arguments(case)
        grad = cpu.lookup_bwd_update(case.grad_out, ids, storage, composed, layout, sgd(0.5))
        results.append((storage, grad))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_update_takes_expanded_gradients():
    case = make_case(SMALL, 30, 25)
    case = type(case)(case.module, case.ids, torch.ones(1, 1).expand(25, 8))
    ids, storage, composed, layout = arguments(case)
    expected = storage.double() - case.expected()[1]
    cpu.lookup_bwd_update(case.grad_out, ids, storage, composed, layout, sgd(1.0))
    torch.testing.assert_close(storage.double(), expected, rtol=1e-5, atol=1e-5)


def test_rows_promoted_in_any_alignment():
    """``carry_rows`` for rows that begin anywhere: the value of the chain's hop."""
    sizes = (2, 3)
    storage = torch.arange(32.0)
    chain = torch.randn(9)
    old, new = torch.tensor([1, 5]), torch.tensor([19, -1])
    before = storage.clone()
    weight, bias = chain[:6].view(2, 3), chain[6:]
    resize.carry_rows(storage, chain, old, new, torch.zeros(2, dtype=torch.int8), sizes)
    torch.testing.assert_close(storage[19:22], before[1:3] @ weight + bias)
    untouched = torch.ones(32, dtype=torch.bool)
    untouched[19:22] = False
    assert torch.equal(storage[untouched], before[untouched])


def test_hops_of_another_dtype():
    """What a checkpoint assigns may be of two dtypes."""
    case = make_case((2, 4, 8), 30, 70)
    expected, eager = case.expected()[0], case.expected(torch.float32)[0]
    case.module.chain.data = case.module.chain.data.double()
    out = case.module(case.ids)
    assert out.dtype == torch.float32
    assert_matches(out.detach(), expected, eager, name="output")
