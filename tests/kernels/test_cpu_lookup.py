"""cpu/lookup.py: blocks, scratch, given outputs and the fused update, against the definition."""

import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from esapn_kernels.cpu import lookup as cpu
from esapn_kernels.cpu import resize, scratch
from esapn_kernels.ops.compose import compose, compose_bwd
from esapn_kernels.ops.update import Update, rule_numbers
from esapn_kernels.reference import lookup_reference
from esapn_kernels.testing import assert_matches, make_case, row_elements

PAPER = (2, 4, 8, 16, 64, 128)
SIZES = [PAPER, (1, 3, 5, 33), (7,), (2, 512)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def name(value):
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value).split(".")[-1]


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks per level, and everything in scratch that nobody has used before."""
    monkeypatch.setattr(cpu, "TILE", 300)
    monkeypatch.setattr(scratch, "TILE", 300)
    monkeypatch.setattr(scratch, "_SMALL", 0)
    monkeypatch.setattr(cpu, "_FEW", 0)
    monkeypatch.setattr(scratch, "_idle", [])


def arguments(case):
    """Arguments of ``lookup_fwd``."""
    storage, chain = case.leaves()
    composed = compose(chain, case.module.sizes)
    return (case.ids, storage.detach(), composed, case.layout)


def assert_right(case, out):
    assert_matches(out, case.expected()[0], case.expected(case.hops.dtype)[0], name="output")


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("sizes", SIZES, ids=name)
def test_many_blocks(sizes, dtype, small_blocks, nan_empty):
    case = make_case(sizes, 30, 70, dtype)
    parts = zip(case.run("torch"), case.expected(), case.expected(case.hops.dtype), strict=True)
    for part, (actual, exact, eager) in enumerate(parts):
        assert_matches(actual, exact, eager, name=f"part {part}")


@pytest.mark.parametrize("level", [0, 1, 2], ids=["first", "middle", "last"])
def test_blocks_of_one_level(level, small_blocks, nan_empty):
    mix = [0, 0, 0]
    mix[level] = 1
    case = make_case((3, 5, 8), 20, 90, mix=mix)
    for actual, exact, eager in zip(
        case.run("torch"), case.expected(), case.expected(torch.float32), strict=True
    ):
        assert_matches(actual, exact, eager, name=f"level {level}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("sizes", [PAPER, (1, 3, 5, 33), (7,)], ids=name)
@pytest.mark.parametrize("offset", [64, 65], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("n_ids", [0, 70])
def test_output_given(sizes, dtype, offset, n_ids, small_blocks):
    case = make_case(sizes, 30, n_ids, dtype)
    buffer = torch.full((n_ids * sizes[-1] + 2 * offset,), float("nan"), dtype=dtype)
    given = buffer[offset:-offset].view(n_ids, sizes[-1])
    out = cpu.lookup_fwd(*arguments(case), out=given)
    assert out is given
    assert_right(case, out)
    assert buffer[:offset].isnan().all() and buffer[-offset:].isnan().all()


def test_results_are_not_scratch(small_blocks):
    case, other = (make_case(PAPER, 40, 60, seed=seed) for seed in range(2))
    results = [cpu.lookup_fwd(*arguments(case))]
    results += cpu.lookup_bwd(case.grad_out, *arguments(case))
    before = [x.clone() for x in results]
    cpu.lookup_fwd(*arguments(other))
    cpu.lookup_bwd(other.grad_out, *arguments(other))
    assert all(torch.equal(x, y) for x, y in zip(results, before, strict=True))
    (kept,) = scratch._idle
    kept = {buffer.data_ptr() for buffer in kept._buffers.values()}
    assert len(kept) >= 2 and not kept & {x.data_ptr() for x in results}


def test_scratch_is_used_again_and_bounded(small_blocks):
    for n_ids in (200, 20, 400):
        cpu.lookup_fwd(*arguments(make_case(PAPER, 40, n_ids)))
    (kept,) = scratch._idle
    assert set(kept._buffers) == {("rows", torch.float32), ("grouped", torch.float32)}
    assert all(buffer.numel() == scratch.TILE for buffer in kept._buffers.values())


def test_scratch_from_inference_mode(small_blocks):
    case = make_case(PAPER, 40, 60)
    with torch.inference_mode():
        out = cpu.lookup_fwd(*arguments(case))
        assert out.is_inference()
    assert scratch._idle
    # The same scratch: its tensors must not be inference tensors.
    assert torch.equal(cpu.lookup_fwd(*arguments(case)), out)


def test_threads_do_not_share_scratch(small_blocks):
    cases = [make_case(PAPER, 40, 90, seed=seed) for seed in range(6)]
    expected = [cpu.lookup_fwd(*arguments(case)) for case in cases]
    for case, out in zip(cases, expected, strict=True):
        assert_right(case, out)
    wrong = []
    barrier = threading.Barrier(len(cases))

    def work(args, out):
        barrier.wait()
        wrong.extend(1 for _ in range(30) if not torch.equal(cpu.lookup_fwd(*args), out))

    threads = [
        threading.Thread(target=work, args=(arguments(case), out))
        for case, out in zip(cases, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(scratch._idle) <= scratch._IDLE


def test_a_call_within_a_call(small_blocks):
    case, inner = (make_case(PAPER, 40, 90, seed=seed) for seed in range(2))
    outputs = []

    class Interrupt(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            # Between a block's product and its copy to the output.
            if func.overloadpacket is torch.ops.aten.addmm:
                outputs.append(cpu.lookup_fwd(*arguments(inner)))
            return result

    args = arguments(case)
    with Interrupt():
        out = cpu.lookup_fwd(*args)
    assert_right(case, out)
    assert outputs
    for output in outputs:
        assert_right(inner, output)


def test_an_error_leaves_no_scratch_behind(small_blocks):
    case = make_case(PAPER, 40, 90)
    with pytest.raises(IndexError):
        cpu.lookup_fwd(*arguments(case), out=torch.empty(1, 128))
    assert not scratch._idle
    assert_right(case, cpu.lookup_fwd(*arguments(case)))


def test_huge_pages_change_nothing(monkeypatch, nan_empty):
    monkeypatch.setattr(scratch, "_HUGE", 1 << 14)
    case = make_case(PAPER, 300, 1200)
    asked = []
    original = cpu.with_huge_pages
    monkeypatch.setattr(cpu, "with_huge_pages", lambda x: asked.append(x.nbytes) or original(x))
    for actual, exact, eager in zip(
        case.run("torch"), case.expected(), case.expected(torch.float32), strict=True
    ):
        assert_matches(actual, exact, eager, name="huge")
    assert len(asked) == 2 and min(asked) >= 1 << 14


def sgd(lr):
    return Update("sgd", torch.tensor(rule_numbers(lr), dtype=torch.float64))


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("sizes", SIZES, ids=name)
def test_update_against_the_definition(sizes, dtype, index, small_blocks, nan_empty):
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


def test_update_steps_every_row_once(small_blocks, monkeypatch):
    case = make_case((2, 3, 8), 30, 0)
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


def test_update_takes_the_rows_before_it(small_blocks):
    """A large step: the gradient of ``composed`` would show if it came from the rows after it."""
    case = make_case((2, 3, 8), 30, 90)
    ids, storage, composed, layout = arguments(case)
    _, expected = cpu.lookup_bwd(case.grad_out, ids, storage, composed, layout)
    given = case.grad_out.clone(), composed.clone()
    grad = cpu.lookup_bwd_update(case.grad_out, ids, storage, composed, layout, sgd(1e3))
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(case.grad_out, given[0]) and torch.equal(composed, given[1])


def test_update_without_the_gradient_of_composed(small_blocks):
    case = make_case((2, 3, 8), 30, 90)
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
    case = make_case((2, 3, 8), 30, 25)
    case = type(case)(case.module, case.ids, torch.ones(1, 1).expand(25, 8))
    ids, storage, composed, layout = arguments(case)
    expected = storage.double() - case.expected()[1]
    cpu.lookup_bwd_update(case.grad_out, ids, storage, composed, layout, sgd(1.0))
    torch.testing.assert_close(storage.double(), expected, rtol=1e-5, atol=1e-5)


def test_rows_promoted_in_any_alignment():
    """``promote_rows`` for rows that begin anywhere: the value of the chain's hop."""
    sizes = (2, 3)
    storage = torch.arange(32.0)
    chain = torch.randn(9)
    old, new = torch.tensor([1, 5]), torch.tensor([19, -1])
    before = storage.clone()
    weight, bias = chain[:6].view(2, 3), chain[6:]
    resize.promote_rows(storage, chain, old, new, torch.zeros(2, dtype=torch.int8), sizes)
    torch.testing.assert_close(storage[19:22], before[1:3] @ weight + bias)
    untouched = torch.ones(32, dtype=torch.bool)
    untouched[19:22] = False
    assert torch.equal(storage[untouched], before[untouched])


def test_output_equals_the_definition_at_once():
    """Large enough for scratch as it is shipped."""
    case = make_case(PAPER, 400, 3000)
    args = arguments(case)
    out = cpu.lookup_fwd(*args)
    storage, chain = case.leaves(torch.float64)
    expected = lookup_reference(case.ids, storage, chain, *case.layout.flat)
    torch.testing.assert_close(out.double(), expected.detach(), rtol=1e-5, atol=1e-5)


def test_hops_of_another_dtype():
    """Few ids as many: what a checkpoint assigns may be of two dtypes."""
    case = make_case((2, 4, 8), 30, 70, torch.float32)
    case.module.chain.data = case.module.chain.data.double()
    few, many = case.module(case.ids), case.module(case.ids.repeat(20))
    assert few.dtype == many.dtype == torch.float32
    assert torch.equal(few.repeat(20, 1), many)
