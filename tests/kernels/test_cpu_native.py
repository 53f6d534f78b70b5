"""csrc/ and cpu/native.py: on every instruction set, with every dtype, on threads and past them."""

import copy
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, jacrev, vmap

from esapn_kernels import ResizableEmbedding, optim
from esapn_kernels.cpu import native as cpu
from esapn_kernels.ops.backend import NATIVE_ERROR, native, on_large_pages
from esapn_kernels.ops.chain import compute_dtype
from esapn_kernels.ops.compose import ComposedCache, compose
from esapn_kernels.ops.layout import Layout
from esapn_kernels.ops.lookup import Options, lookup
from esapn_kernels.ops.update import RULES, Update, rule_numbers
from esapn_kernels.reference import lookup_grad_reference, split_chain, update_reference
from esapn_kernels.testing import assert_matches, make_case, poison_unused, row_elements
from tests.kernels import native_worker as worker
from tests.kernels.layouts import DTYPES, ODD, PAPER, SMALL, name

pytestmark = pytest.mark.skipif(NATIVE_ERROR is not None, reason=str(NATIVE_ERROR))
SETS = [] if NATIVE_ERROR is not None else native.instruction_sets()
ROOT = Path(__file__).parents[2]
TEN = tuple(range(1, 11))
SIZES = [PAPER, ODD, (7,), (2, 512), TEN, (3, 65, 66), (500, 511, 513)]
PARTS = ("output", "storage gradient", "chain gradient")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name)


@pytest.fixture(autouse=True)
def on_a_cpu(device):
    if device.type != "cpu":
        pytest.skip("the kernels of a CPU")


@pytest.fixture(params=SETS)
def isa(request):
    """Every instruction set of this machine."""
    before = native.use(request.param)
    yield request.param
    native.use(before)


@pytest.fixture
def threads():
    """Sets the number of threads; the one before comes back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def with_ids(case, ids, grad_out=None):
    """The same rows under other ids."""
    if grad_out is None:
        grad_out = torch.randn(*ids.shape, case.module.embedding_dim).to(case.hops.dtype)
    return type(case)(case.module, ids, grad_out)


def operands(case):
    """``(ids, storage, composed, layout)``, as the kernels take them."""
    storage, chain = case.leaves()
    sizes = case.layout.sizes
    return case.ids, storage.detach(), compose(chain, sizes, backend="native"), case.layout


def same_bits(one, two):
    for part, a, b in zip(PARTS, one, two, strict=True):
        assert torch.equal(a, b), part


# Against the definition


def test_the_instruction_sets(isa):
    assert native.instruction_set() == isa
    with pytest.raises(ValueError, match="no such instruction set on this machine"):
        native.use("avx1024")
    with pytest.raises(TypeError):
        native.use(512)
    assert native.instruction_set() == isa


@pytest.mark.parametrize("sizes", SIZES, ids=name)
@pytest.mark.parametrize("init", ["linear", "tails"])
@every_dtype
def test_against_the_definition(sizes, dtype, init, isa, nan_empty):
    # Ids that occur once, a few times and often; tiles and blocks that are not full.
    case = make_case(sizes, 40, 70, dtype, traffic="zipf", init=init)
    exact, eager = case.expected(), case.expected(dtype)
    for part, a, x, e in zip(PARTS, case.run("native"), exact, eager, strict=True):
        assert_matches(a, x, e, name=part)


@pytest.mark.parametrize("sizes", [PAPER, ODD, (127, 130), TEN], ids=name)
@every_dtype
def test_nothing_is_read_beside_the_rows(sizes, dtype, isa, nan_empty):
    case = make_case(sizes, 40, 0, dtype)
    case = with_ids(case, torch.arange(0, 40, 3).repeat(2))
    expected = case.run("native")
    poison_unused(case.module, case.ids)
    found = case.run("native")
    same_bits(found, expected)
    assert all(part.isfinite().all() for part in found)
    assert not found[1][~row_elements(case.module, case.ids)].any()


@every_dtype
@pytest.mark.parametrize("sizes", [PAPER, ODD, TEN], ids=name)
def test_a_row_does_not_depend_on_its_neighbours(sizes, dtype, isa):
    case = make_case(sizes, 400, 900, dtype)
    ids, storage, composed, layout = operands(case)
    out = cpu.lookup_fwd(ids, storage, composed, layout)
    order = torch.randperm(len(ids))
    assert torch.equal(cpu.lookup_fwd(ids[order], storage, composed, layout), out[order])
    for count in (1, 2, 5, 6, 7, 300):
        some = cpu.lookup_fwd(ids[:count], storage, composed, layout)
        assert torch.equal(some, out[:count]), count
    # Nor does its gradient: of 300 rows in another order, and of each of some by itself.
    distinct = torch.randperm(400)[:300]
    grad_out = torch.randn(300, sizes[-1]).to(dtype)
    together, _ = cpu.lookup_bwd(grad_out, distinct, storage, composed, layout)
    backwards, _ = cpu.lookup_bwd(grad_out.flip(0), distinct.flip(0), storage, composed, layout)
    assert torch.equal(together, backwards)
    for i in range(0, 300, 37):
        at = slice(i, i + 1)
        alone, _ = cpu.lookup_bwd(grad_out[at], distinct[at], storage, composed, layout)
        its = row_elements(case.module, distinct[at])
        assert torch.equal(alone[its], together[its])


@pytest.mark.parametrize("out_dtype", DTYPES, ids=name)
@every_dtype
@pytest.mark.parametrize("sizes", [PAPER, ODD], ids=name)
def test_output_dtypes(sizes, dtype, out_dtype, isa):
    """Rounded once from the sums; the gradient is read as it arrives."""
    case = make_case(sizes, 40, 90, dtype)
    grad_out = torch.randn(90, sizes[-1]).to(out_dtype)
    found = []
    for asked in (compute_dtype(dtype), out_dtype):
        storage, chain = case.leaves()
        options = Options(out_dtype=asked)
        out = lookup(case.ids, storage, chain, case.layout, options, backend="native")
        out.backward(grad_out.to(asked))
        found.append((out.detach(), storage.grad, chain.grad))
    sums, asked = found
    assert torch.equal(sums[0].to(out_dtype), asked[0])
    assert torch.equal(sums[1], asked[1]) and torch.equal(sums[2], asked[2])


def floats() -> torch.Tensor:
    """fp32 about every number of 16 bits, about the middles between them, and any bits at all."""
    every = torch.arange(-(2**15), 2**15).short()
    near = torch.cat([every.view(dtype).float() for dtype in (torch.float16, torch.bfloat16)])
    bits = torch.cat([near.view(torch.int32), torch.randint(-(2**31), 2**31, (2**16,)).int()])
    half = torch.tensor([0, 1 << 12, 1 << 15], dtype=torch.int32)
    steps = torch.tensor([-1, 0, 1], dtype=torch.int32)
    return (bits[:, None, None] + half[:, None] + steps).view(torch.float32).flatten()


@pytest.mark.parametrize("width", [1, 64])
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=name)
def test_every_number_of_16_bits(half, width, isa):
    """Read and written as torch does, by vectors and one by one."""

    def copied(numbers, out_dtype):
        storage = numbers[: len(numbers) // width * width]
        ids = torch.arange(len(storage) // width)
        level = torch.zeros(1, dtype=torch.int8)
        layout = Layout(ids * width, level, (width,), len(storage))
        composed = torch.empty(0, width, dtype=compute_dtype(storage.dtype))
        return storage, cpu.lookup_fwd(ids, storage, composed, layout, out_dtype).flatten()

    for numbers, out_dtype in (
        (torch.arange(-(2**15), 2**15).short().view(half), torch.float32),
        (torch.arange(-(2**15), 2**15).short().view(half), torch.float64),
        (floats(), half),
        (floats().double() * 1.0000001, half),
    ):
        storage, found = copied(numbers, out_dtype)
        torch.testing.assert_close(found, storage.to(out_dtype), rtol=0, atol=0, equal_nan=True)


# The same numbers in another form


def forms(case):
    """The same lookup by other integers, strides and alignments."""
    ids, storage, composed, layout = operands(case)
    wide = Layout(layout.row_start.long(), *layout.flat[1:])
    narrow = Layout(layout.row_start.int(), *layout.flat[1:])
    spread_ids = torch.stack([ids, ids], 1)[:, 0]
    spread_grad = case.grad_out.t().contiguous().t()
    moved_grad = torch.cat([case.grad_out.new_zeros(1), case.grad_out.flatten()])[1:]
    moved = torch.cat([storage.new_zeros(1), storage])[1:]
    assert not spread_ids.is_contiguous() and not spread_grad.is_contiguous()
    return [
        (case.grad_out, ids, storage, composed, layout),
        (case.grad_out, ids.int(), storage, composed, wide),
        (spread_grad, spread_ids, moved, composed, narrow),
        (moved_grad.view_as(case.grad_out), ids, moved, composed, wide),
        (torch._neg_view(-case.grad_out), ids, storage, composed, layout),
    ]


@every_dtype
@pytest.mark.parametrize("sizes", [PAPER, ODD], ids=name)
def test_forms(sizes, dtype, isa):
    case = make_case(sizes, 60, 300, dtype)
    first = None
    for grad_out, *rest in forms(case):
        storage = rest[1]
        dense = cpu.lookup_bwd(grad_out, *rest)
        sparse, hops = cpu.lookup_bwd_sparse(grad_out, *rest)
        assert torch.equal(sparse.to_dense(), dense[0]) and torch.equal(hops, dense[1])
        update = Update("sgd", torch.tensor(rule_numbers(0.5), dtype=torch.float64))
        out, before = cpu.lookup_fwd(*rest), storage.clone()
        hops = cpu.lookup_bwd_update(grad_out, *rest, update)
        found = (out, *dense, hops, storage.clone())
        storage.copy_(before)
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))


def test_zeros_that_have_no_memory():
    case = make_case(SMALL, 30, 20)
    storage, chain = case.leaves()
    out = lookup(case.ids, storage, chain, case.layout, backend="native")
    out.backward(torch._efficientzerotensor(out.shape))
    assert not storage.grad.any() and not chain.grad.any()


@pytest.mark.parametrize("hops", [torch.float32, torch.float64, torch.bfloat16], ids=name)
@every_dtype
def test_hops_of_another_dtype(dtype, hops, isa):
    case = make_case(SMALL, 30, 60, dtype)
    storage, chain = case.leaves()
    chain = chain.detach().to(hops).requires_grad_()
    out = lookup(case.ids, storage, chain, case.layout, backend="native")
    out.backward(case.grad_out)
    assert out.dtype == storage.grad.dtype == dtype and chain.grad.dtype == hops

    def expected(dtype):
        leaves = storage.detach().to(dtype), chain.detach().to(dtype)
        grads = lookup_grad_reference(case.grad_out.to(dtype), case.ids, *leaves, *case.layout.flat)
        exact = lookup(case.ids, *leaves, case.layout, backend="reference")
        return exact, *grads

    kinds = dtype, dtype, hops
    found = out.detach(), storage.grad, chain.grad
    for part, kind, a, x, e in zip(
        PARTS, kinds, found, expected(torch.float64), expected(torch.float32), strict=True
    ):
        assert_matches(a.to(kind), x, e.to(kind), name=part)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=name)
def test_outputs_larger_than_the_caches(dtype, isa):
    """Written past them where they are aligned: the same bits, and nothing beside the output."""
    case = make_case(PAPER, 500, 0, dtype)
    count = (1 << 24) // (PAPER[-1] * compute_dtype(dtype).itemsize) + 300
    ids = torch.randint(500, (count,))
    _, storage, composed, layout = operands(case)
    rows = cpu.lookup_fwd(torch.arange(500), storage, composed, layout, compute_dtype(dtype))
    buffer = rows.new_full((count * PAPER[-1] + 64,), float("nan"))
    aligned = -buffer.data_ptr() // buffer.itemsize % (64 // buffer.itemsize)
    for begin in (aligned, aligned + 1, aligned + 4):
        buffer.fill_(float("nan"))
        out = buffer[begin : begin + count * PAPER[-1]].view(count, PAPER[-1])
        cpu.lookup_fwd(ids, storage, composed, layout, out=out)
        assert torch.equal(out, rows[ids])
        assert buffer[:begin].isnan().all() and buffer[begin + out.numel() :].isnan().all()


# Any sizes, rows, ids and rules


class Definition:
    """The rows of a module stepped one by one as the definition says, in ``dtype``."""

    def __init__(self, case, rule, dtype, fresh):
        self.case, self.rule, self.dtype = case, rule, dtype
        storage, chain = case.leaves(dtype)
        self.storage, self.chain = storage.detach(), chain.detach()
        rows, elements = case.layout.num_rows, storage.numel()
        lengths = {
            "sgd": (),
            "adagrad": (elements,),
            "rowwise_adagrad": (rows,),
            "adam": (elements, elements),
            "rowwise_adam": (elements, rows),
        }
        self.state = [torch.full((length,), fresh, dtype=dtype) for length in lengths[rule]]
        self.last, self.step = {}, 0

    def run(self, ids, grad_out, options):
        self.step += 1
        layout, grad_out = self.case.layout, grad_out.to(self.dtype)
        operands = (ids, self.storage, self.chain, *layout.flat)
        gradient, _ = lookup_grad_reference(grad_out, *operands)
        for i in ids.unique().tolist():
            start = int(layout.row_start[i])
            row = slice(start, start + int(self.case.module.sizes_of(torch.tensor([i]))))
            places = [row] * len(self.state)
            if self.rule.startswith("rowwise"):
                places[-1] = i
            held = tuple(state[at] for state, at in zip(self.state, places, strict=True))
            last = self.last.get(i, 0)
            self.storage[row], kept = update_reference(
                *(self.rule, self.storage[row], gradient[row], held),
                **{"lr": 0.1, **options, "step": self.step, "last_step": last},
            )
            for state, at, value in zip(self.state, places, kept, strict=True):
                state[at] = value
            self.last[i] = self.step


OPTIMIZERS = {
    "sgd": (optim.SGD, {}, {}),
    "adagrad": (optim.Adagrad, {"eps": 0.1}, {"initial_accumulator_value": 0.5}),
    "rowwise_adagrad": (
        optim.Adagrad,
        {"eps": 0.1},
        {"initial_accumulator_value": 0.5, "rowwise": True},
    ),
    "adam": (optim.Adam, {"eps": 0.1, "betas": (0.8, 0.95)}, {}),
    "rowwise_adam": (optim.Adam, {"eps": 0.1, "betas": (0.8, 0.95)}, {"rowwise": True}),
}
CLIPS = {"clip_value": 0.8, "clip_row_norm": 1.5}
sizes_of_any = st.sets(st.integers(1, 130), min_size=1, max_size=6).map(lambda s: tuple(sorted(s)))


@st.composite
def lookups(draw, dtypes=DTYPES):
    """A case whose ids are few or many, drawn from few rows or from all; and a padding index."""
    sizes, n_rows = draw(sizes_of_any), draw(st.integers(1, 60))
    kind = {"seed": draw(st.integers(0, 99)), "init": draw(st.sampled_from(["linear", "tails"]))}
    case = make_case(sizes, n_rows, 0, draw(st.sampled_from(dtypes)), **kind)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    pool = draw(st.integers(1, n_rows))
    ids = torch.randint(pool, (draw(st.one_of(st.integers(0, 20), st.integers(0, 600))),))
    grad_out = torch.randn(len(ids), sizes[-1], generator=generator).to(case.hops.dtype)
    case = with_ids(case, ids, grad_out)
    return case, draw(st.one_of(st.none(), st.integers(0, n_rows - 1)))


@settings(max_examples=60)
@given(lookups(), st.sampled_from(SETS), st.booleans())
def test_any_lookup(drawn, isa, sparse):
    case, padding_idx = drawn
    storage, chain = case.leaves()
    options = Options(padding_idx=padding_idx, sparse=sparse)
    before = native.use(isa)
    try:
        out = lookup(case.ids, storage, chain, case.layout, options, backend="native")
        out.backward(case.grad_out)
    finally:
        native.use(before)
    if padding_idx is not None:
        padding = case.ids == padding_idx
        case = with_ids(case, case.ids, case.grad_out.masked_fill(padding[:, None], 0))
    found = out.detach(), storage.grad, chain.grad
    if sparse:
        entries = storage.grad.coalesce().indices()[0]
        kept = case.ids[case.ids != padding_idx] if padding_idx is not None else case.ids
        assert torch.equal(entries, row_elements(case.module, kept).nonzero()[:, 0])
        found = out.detach(), storage.grad.to_dense(), chain.grad
    exact, eager = case.expected(), case.expected(case.hops.dtype)
    for part, a, x, e in zip(PARTS, found, exact, eager, strict=True):
        assert_matches(a, x, e, name=part)
    torch_out = lookup(case.ids, *case.leaves(), case.layout, backend="torch").detach()
    assert_matches(out.detach(), exact[0], torch_out, name="output beside torch's")


@settings(max_examples=60)
@given(
    lookups([torch.float32, torch.float64]),
    st.sampled_from(list(OPTIMIZERS)),
    st.sampled_from(SETS),
    st.integers(1, 4),
    st.booleans(),
)
def test_any_steps(drawn, rule, isa, steps, clips):
    case, padding_idx = drawn
    module = copy.deepcopy(case.module).requires_grad_()
    module.backend, module.padding_idx = "native", padding_idx
    kind, both, own = OPTIMIZERS[rule]
    both = {**both, **CLIPS} if clips else both
    rows = kind(module, lr=0.1, weight_decay=0.2 * clips, **both, **own)
    both = {**both, "l2": 0.2 * clips}
    fresh = own.get("initial_accumulator_value", 0.0)
    definition = Definition(case, rule, torch.float64, fresh)
    before = native.use(isa)
    try:
        for step in range(steps):
            # Rows stay away for some of the steps.
            ids, grad_out = case.ids[step:], case.grad_out[step:].clone()
            if step % 2:
                ids, grad_out = ids[: len(ids) // 2], grad_out[: len(ids) // 2]
            module(ids).backward(grad_out)
            if padding_idx is not None:
                grad_out[ids == padding_idx] = 0
            definition.run(ids, grad_out, both)
    finally:
        native.use(before)
    (parameter,) = rows.param_groups[0]["params"]
    found = [parameter.detach(), *rows.state[parameter].values()]
    if rule.endswith("adam"):
        last = [definition.last.get(i, 0) for i in range(module.num_embeddings)]
        *found, last_step, clock = found
        assert last_step.tolist() == last and clock[0] == steps
    # The yardstick knows no steps: they carry errors on, and fp64 has none better to compare with.
    tolerance = 1e-9 if parameter.dtype == torch.float64 else 1e-4
    used = row_elements(case.module, case.ids)
    for own, exact in zip(found, [definition.storage, *definition.state], strict=True):
        own = own.flatten().double()
        # What one state per row holds of rows that were not looked up is fresh on both sides.
        if exact is not definition.storage and len(exact) == len(used):
            own, exact = own[used], exact[used]
        torch.testing.assert_close(own, exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=str
)
def test_rows_that_changed_their_dtype_under_the_optimizer(rule, dtypes):
    """Its state did not: the torch path, which reads any dtype, goes on."""
    found = []
    for backend in ("torch", "native"):
        torch.manual_seed(0)
        module = ResizableEmbedding(60, sizes=ODD, dtype=dtypes[0], backend=backend)
        kind, both, own = OPTIMIZERS[rule]
        rows = kind(module, lr=0.1, **both, **own)
        for dtype in dtypes:
            module.to(dtype)
            for _ in range(2):
                module(torch.arange(60)).sin().sum().backward()
        assert module.arena.storage.dtype == dtypes[1]
        state = rows.state[module.arena.storage].values()
        found.append([module.arena.storage.detach(), *state])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# Equal bits


def run_worker(*arguments, **env) -> list[str]:
    """What a process of its own prints; it is ended where it hangs."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.native_worker", *arguments],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_equal_bits_whatever_the_threads(threads, monkeypatch):
    """7 runs on one, two and three threads each, and another process."""
    lines = []
    for count in (1, 2, 3) * 7:
        threads(count)
        lines.append(worker.results(torch.float32))
    assert all(line == lines[0] for line in lines)
    halves = []
    for count in (1, 3):
        threads(count)
        halves.append(worker.results(torch.bfloat16))
    assert halves[0] == halves[1] and halves[0] != lines[0]
    printed = run_worker("bits", "2")
    expected = [("torch.float32", lines[0]), ("torch.bfloat16", halves[0])]
    assert printed == [f"{d} {key} {bits}" for d, line in expected for key, bits in line.items()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name)
def test_threads_on_every_instruction_set(dtype, isa, threads):
    case = worker.large(dtype)
    found = []
    for count in (1, 3):
        threads(count)
        found.append(case.run("native"))
    same_bits(*found)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted by /proc")
def test_a_second_thread_runs():
    before, after = map(int, run_worker("second_thread"))
    assert after == before + 1


# Refusals


BAD = {"negative": -1, "above": 30, "far": 2**31 - 1, "farther": 2**40, "low": -(2**31)}


def state_of(rule, case):
    numbers = torch.tensor(rule_numbers(0.1, 1e-3, (0.8, 0.9)), dtype=torch.float64)
    capacity, n = case.module.arena.storage.numel(), case.layout.num_rows
    count = {"adagrad": 1, "adam": 2, "rowwise_adam": 1}.get(rule, 0)
    state = tuple(torch.rand(capacity) for _ in range(count))
    row_sums = torch.rand(n) if rule.startswith("rowwise") else None
    last_step = clock = None
    if rule.endswith("adam"):
        last_step = torch.ones(n, dtype=torch.int32)
        clock = torch.tensor([3.0, 0.5, 0.7], dtype=torch.float64)
    return Update(rule, numbers, state, row_sums, last_step, clock)


def held_by(update):
    per_row = (update.row_sums, update.last_step, update.clock)
    return [*update.state, *(t for t in per_row if t is not None)]


@pytest.mark.parametrize(
    "bad, index",
    [
        (bad, index)
        for bad in [*BAD, "no row", "freed page"]
        for index in (torch.int32, torch.int64)
        if (bad, index) != ("farther", torch.int32)
    ],
    ids=name,
)
@pytest.mark.parametrize("n_ids", [3, 700])
def test_bad_ids_change_nothing(n_ids, bad, index, isa):
    case = make_case(SMALL, 30, n_ids)
    ids, storage, composed, layout = operands(case)
    row_start, page_level = layout.row_start.clone(), layout.page_level.clone()
    layout = Layout(row_start, page_level, layout.sizes, layout.page)
    if bad in BAD:
        ids = ids.to(index)
        ids[-2] = BAD[bad]
    elif bad == "no row":
        row_start[ids[-2]] = -1
        ids = ids.to(index)
    else:
        page_level[row_start[ids[-2]] // layout.page] = -1
        ids = ids.to(index)
    out = torch.full((n_ids, 8), 7.0)
    before = storage.clone()
    given = (ids, storage, composed, layout)
    with pytest.raises(IndexError, match="^index out of range in self$"):
        cpu.lookup_fwd(*given, out=out)
    assert bad not in BAD or (out == 7).all()
    for run in (cpu.lookup_bwd, cpu.lookup_bwd_sparse):
        with pytest.raises(IndexError, match="^index out of range in self$"):
            run(case.grad_out, *given)
    for rule in RULES:
        update = state_of(rule, case)
        kept = copy.deepcopy(update)
        with pytest.raises(IndexError, match="^index out of range in self$"):
            cpu.lookup_bwd_update(case.grad_out, *given, update)
        both = zip(held_by(update), held_by(kept), strict=True)
        assert all(torch.equal(a, b) for a, b in both)
    assert torch.equal(storage, before)


@pytest.mark.parametrize("index", [torch.int16, torch.uint8, torch.bool, torch.float64], ids=name)
def test_ids_of_another_kind(index):
    """Read as integers of 32 or 64 bits they would be other ids, and lie beside their memory."""
    case = make_case(SMALL, 30, 20)
    ids, storage, composed, layout = operands(case)
    for run in (cpu.lookup_fwd, lambda *a: cpu.lookup_bwd_sparse(case.grad_out, *a)):
        with pytest.raises(RuntimeError, match="Long, Int; but got"):
            run(ids.to(index), storage, composed, layout)


@pytest.mark.parametrize("cut", [slice(0, 0), slice(10), slice(None, -1)], ids=str)
def test_hops_of_another_length(cut):
    case = make_case(SMALL, 30, 20)
    storage, chain = case.leaves()
    sizes = "\\(2, 3, 8\\), or 23 of tails"
    words = f"^the packed hops must be {chain.numel()} numbers for sizes {sizes}, got "
    for wrong in (chain[cut], torch.cat([chain, chain])):
        with pytest.raises(RuntimeError, match=words):
            lookup(case.ids, storage, wrong, case.layout, backend="native")
        cache = ComposedCache()
        cache(chain, SMALL, "native")
        with pytest.raises(RuntimeError, match=words):
            cache(wrong, SMALL, "native")


# Threads and processes


def together(*calls) -> list:
    """The results of calls that run at the same time, each on a thread of its own."""
    results, begin = [None] * len(calls), threading.Barrier(len(calls))

    def run(i, call):
        begin.wait()
        results[i] = call()

    running = [threading.Thread(target=run, args=pair) for pair in enumerate(calls)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return results


def test_several_threads_look_up_in_one_table(threads):
    threads(2)
    case = worker.large()
    module = case.module.requires_grad_(False)
    parts = [case.ids.roll(i) for i in range(4)]
    expected = [module(ids) for ids in parts]

    def look_up(ids):
        return [module(ids) for _ in range(10)]

    found = together(*(lambda ids=ids: look_up(ids) for ids in parts))
    for outputs, wanted in zip(found, expected, strict=True):
        assert all(torch.equal(out, wanted) for out in outputs)


@pytest.mark.parametrize("rule", worker.OPTIMIZERS)
def test_several_threads_step_tables_of_their_own(rule, threads):
    threads(2)
    case = worker.large()

    def train():
        module = copy.deepcopy(case.module)
        rows = worker.OPTIMIZERS[rule](module)
        for _ in range(3):
            module(case.ids).backward(case.grad_out)
        assert rows.rule == rule
        return module.arena.storage.detach(), module.chain.grad

    expected = train()
    for found in together(train, train, train):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("call", ["lookup_fwd", "lookup_bwd"])
def test_other_threads_run_meanwhile(call, monkeypatch):
    """While a kernel runs another thread counts, which takes the GIL."""
    case = make_case(PAPER, 500, 20000)
    given = operands(case)
    counted, stop, seen = [0], threading.Event(), []
    original = getattr(native, call)

    class Observed:
        def __getattr__(self, name):
            return getattr(native, name)

    def observed(*arguments):
        before = counted[0]
        original(*arguments)
        seen.append(counted[0] - before)

    setattr(Observed, call, staticmethod(observed))
    monkeypatch.setattr(cpu, "native", Observed())

    def count():
        while not stop.is_set():
            counted[0] += 1
            time.sleep(0)  # gives the GIL back

    interval = sys.getswitchinterval()
    other = threading.Thread(target=count)
    # No thread has to give the GIL away: only one that releases it does.
    sys.setswitchinterval(1000)
    try:
        other.start()
        for _ in range(200):
            if call == "lookup_fwd":
                cpu.lookup_fwd(*given)
            else:
                cpu.lookup_bwd(case.grad_out, *given)
            if seen[-1]:
                break
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        other.join()
    assert seen[-1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_fork_while_the_pool_runs():
    assert run_worker("fork") == ["0"] * 5


def test_spawn(threads):
    threads(2)
    case = worker.large()
    module = case.module.requires_grad_(False).share_memory()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [
        context.Process(target=worker.answer, args=(queue, module, case.ids)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    answers = [queue.get() for _ in processes]
    for process in processes:
        process.join()
    assert answers == [worker.digest(module(case.ids))] * 2


def test_a_chain_written_behind_its_version(threads):
    """Between two forwards, and between a forward and its backward; on two threads in turn."""
    found = []
    for backend in ("torch", "native"):
        module = make_case(SMALL, 30, 0, backend=backend).module
        ids, grad_out = torch.arange(30).repeat(2), torch.ones(60, 8) * torch.arange(8)
        turn = [threading.Semaphore(1), threading.Semaphore(0)]
        seen = []

        def work(me, module=module, ids=ids, grad_out=grad_out, turn=turn, seen=seen):
            def mine():
                turn[me].acquire()

            def yours():
                turn[1 - me].release()

            mine()
            out = module(ids)
            module.chain.data.mul_(1.5).add_(0.125)
            yours()
            mine()
            out.backward(grad_out)
            seen.append(
                (out.detach(), module.chain.grad.clone(), module.arena.storage.grad.clone())
            )
            module.zero_grad()
            module.chain.data.neg_()
            yours()
            mine()
            seen.append((module(ids).detach(),))
            yours()

        together(lambda: work(0), lambda: work(1))
        # What the last forwards saw is the chain as it is now.
        flat = module.arena.layout
        now = lookup(ids, module.arena.storage, module.chain, flat, backend="reference").detach()
        torch.testing.assert_close(seen[-1][0], now, rtol=1e-4, atol=1e-5)
        assert len(seen) == 4
        found.append(seen)
    for one, two in zip(*found, strict=True):
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# Storages past 2^31 elements


@pytest.fixture(scope="module")
def far():
    """16-bit rows at both ends of 4 GB, almost none of it touched; and the same rows, packed."""
    page, sizes = 4096, (3, 8, 40)
    pages = 2**31 // page + 3
    storage = torch.zeros(pages * page, dtype=torch.bfloat16)
    near = torch.randn(6 * page).bfloat16()
    level = torch.full((pages,), -1, dtype=torch.int8)
    # The pages of the packed table, and where they lie in the large one.
    place = torch.tensor([0, pages - 1, 2, pages - 2, pages - 3, 1])
    packed = torch.tensor([0, 1, 2, 0, 1, 2], dtype=torch.int8)
    level[place] = packed
    for i, at in enumerate(place.tolist()):
        storage[at * page : (at + 1) * page] = near[i * page : (i + 1) * page]
    start = torch.cat([i * page + torch.arange(50) * sizes[int(packed[i])] for i in range(6)])
    moved = place[start // page] * page + start % page
    assert int(moved.max()) > 2**31
    return (
        (storage, Layout(moved, level, sizes, page)),
        (near, Layout(start.int(), packed, sizes, page)),
        moved - start,
    )


def test_storage_past_2_31_elements(far, isa):
    (storage, layout), (packed, near), shift = far
    chain = make_case(near.sizes, 5, 0, torch.bfloat16).hops.detach()
    composed = compose(chain, near.sizes, backend="native")
    ids = torch.randint(300, (700,))
    grad_out = torch.randn(700, 40).bfloat16()
    out = cpu.lookup_fwd(ids, storage, composed, layout)
    assert torch.equal(out, cpu.lookup_fwd(ids, packed, composed, near))

    rows, hops = cpu.lookup_bwd_sparse(grad_out, ids, storage, composed, layout)
    packed_rows, packed_hops = cpu.lookup_bwd_sparse(grad_out, ids, packed, composed, near)
    assert torch.equal(hops, packed_hops)
    assert torch.equal(rows._values(), packed_rows._values())
    page = near.page
    to = shift.view(6, 50)[:, 0][packed_rows._indices()[0] // page]
    assert torch.equal(rows._indices()[0], packed_rows._indices()[0] + to)

    update = Update("sgd", torch.tensor(rule_numbers(0.5), dtype=torch.float64))
    stepped = packed.clone()
    hops = cpu.lookup_bwd_update(grad_out, ids, storage, composed, layout, update)
    assert torch.equal(hops, cpu.lookup_bwd_update(grad_out, ids, stepped, composed, near, update))
    assert not torch.equal(stepped, packed)
    for i in range(6):
        part = slice(i * page, (i + 1) * page)
        begin = i * page + int(shift[i * 50])
        assert torch.equal(storage[begin : begin + page], stepped[part])
        storage[begin : begin + page] = packed[part]


# Numbers that are not finite


@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize("sizes", [ODD, PAPER, (2, 5, 9)], ids=name)
@every_dtype
def test_what_is_not_finite_spreads_to_its_own_row(sizes, dtype, value, isa):
    case = with_ids(make_case(sizes, 60, 0, dtype), torch.arange(60))
    finite = case.run("native")
    levels = case.module.arena.level(case.ids)
    starts = case.layout.row_start
    for level in range(len(sizes)):
        bad = int((levels == level).nonzero()[1])
        grad_out = case.grad_out.clone()
        grad_out[bad, -1] = value
        out, rows, _ = with_ids(case, case.ids, grad_out).run("native")
        its = row_elements(case.module, torch.tensor([bad]))
        assert torch.equal(out, finite[0]) and not rows[its].isfinite().all()
        assert torch.equal(rows[~its], finite[1][~its])
        # A row that is not finite: its own output, and hops that it passes.
        storage = case.module.arena.storage.detach()
        kept = storage[starts[bad]].item()
        storage[starts[bad]] = value
        out, rows, chain = case.run("native")
        storage[starts[bad]] = kept
        others = torch.arange(60) != bad
        assert torch.equal(out[others], finite[0][others]) and not out[bad].isfinite().all()
        assert torch.equal(rows, finite[1])
        blocks = split_chain(chain, sizes)
        assert all(w.isfinite().all() and b.isfinite().all() for w, b in blocks[:level])
        if level == len(sizes) - 1:
            assert torch.equal(chain, finite[2])


@pytest.mark.parametrize("sizes", [ODD, (2, 5, 9), PAPER], ids=name)
def test_a_hop_that_is_not_finite(sizes, isa):
    """Rows of higher levels do not pass it, in padded columns neither."""
    case = with_ids(make_case(sizes, 60, 0), torch.arange(60))
    finite = case.run("native")
    levels = case.module.arena.level(case.ids)
    for hop in range(len(sizes) - 1):
        broken = copy.deepcopy(case.module)
        with torch.no_grad():
            split_chain(broken.chain, sizes)[hop][0][0, 0] = float("inf")
        out, rows, chain = type(case)(broken, case.ids, case.grad_out).run("native")
        above = levels > hop
        assert torch.equal(out[above], finite[0][above])
        assert not out[~above].isfinite().all(1).any()
        its = row_elements(case.module, case.ids[above])
        assert torch.equal(rows[its], finite[1][its])
        exact = type(case)(broken, case.ids, case.grad_out).expected(torch.float32)
        assert (chain.isfinite() | ~exact[2].isfinite()).all()


# Where torch transforms the code


def pair():
    """The same module on torch and on native kernels."""
    return [make_case(SMALL, 30, 0, backend=backend).module for backend in ("torch", "native")]


def close(one, two):
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


IDS = torch.tensor([[3, 1, 4], [1, 5, 29]])


@pytest.fixture
def forgotten():
    """Torch compiles a function for a limited number of kinds of arguments in a process."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_compile(forgotten):
    results = []
    for module in pair():
        step = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
        out = step(IDS)
        out.sin().sum().backward()
        results.append((out.detach(), module.arena.storage.grad, module.chain.grad))
        assert torch.equal(step(IDS.flatten()), module(IDS.flatten()))
    for a, b in zip(*results, strict=True):
        close(a, b)


def test_functional_transforms():
    results = []
    for module in pair():
        params = {key: value.detach() for key, value in module.named_parameters()}

        def loss(params, ids, module=module):
            return functional_call(module, params, (ids,)).pow(3).sum()

        results.append(
            [
                *grad(loss)(params, IDS).values(),
                *vmap(grad(loss), in_dims=(None, 0))(params, IDS).values(),
                *jacrev(lambda p, m=module: functional_call(m, p, (IDS,)))(params).values(),
                vmap(module)(IDS).detach(),
                vmap(module, in_dims=1)(IDS).detach(),
            ]
        )
    for a, b in zip(*results, strict=True):
        close(a, b)


def test_inference_mode():
    module = pair()[1]
    with torch.inference_mode():
        inside = module(IDS)
    assert inside.is_inference() and torch.equal(inside, module(IDS))
    module(IDS).sum().backward()
    assert module.chain.grad.any()


def test_autocast():
    module = pair()[1]
    plain = module(IDS)
    plain.sum().backward()
    expected = module.arena.storage.grad.clone()
    module.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(IDS)
        out.sum().backward()
    assert out.dtype == torch.float32 and torch.equal(out, plain)
    assert torch.equal(module.arena.storage.grad, expected)


def test_tensors_without_numbers():
    case = make_case(SMALL, 30, 20)
    storage, chain = case.leaves()
    flat = [t.to("meta") for t in (case.layout.row_start, case.layout.page_level)]
    layout = Layout(*flat, case.layout.sizes, case.layout.page)
    meta = [t.detach().to("meta").requires_grad_() for t in (storage, chain)]
    out = lookup(case.ids.to("meta"), *meta, layout, backend="native")
    out.sum().backward()
    assert out.is_meta and out.shape == (20, 8)
    assert meta[0].grad.shape == storage.shape and meta[1].grad.shape == chain.shape

    module = pair()[1]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(IDS)
        out = module(fake)
        out.sum().backward()
    assert out.shape == (2, 3, 8) and type(module.chain.grad) is type(out)


def test_with_another_default_device():
    case = make_case(SMALL, 30, 20)
    expected = case.run("native")
    storage, chain = case.leaves()
    with torch.device("meta"):
        out = lookup(case.ids, storage, chain, case.layout, Options(sparse=True), backend="native")
        out.backward(case.grad_out)
    same_bits((out, storage.grad.to_dense(), chain.grad), expected)


@pytest.mark.parametrize("grows", [False, True])
def test_an_exported_program_where_there_are_no_native_kernels(grows, tmp_path):
    module = make_case(SMALL, 30, 0, backend="native").module.requires_grad_(False)
    dynamic = ({0: torch.export.Dim("count", min=2)},) if grows else None
    program = torch.export.export(module, (IDS.flatten(),), dynamic_shapes=dynamic)
    assert "esapn_kernels.lookup_fwd" in program.graph_module.code
    torch.export.save(program, tmp_path / "program.pt2")
    code = (
        "import sys, torch\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'esapn_kernels._native':\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "import esapn_kernels\n"
        "from esapn_kernels.ops import backend\n"
        "assert 'not built' in backend.NATIVE_ERROR\n"
        f"program = torch.export.load({str(tmp_path / 'program.pt2')!r}).module()\n"
        f"torch.save(program(torch.tensor({IDS.flatten().tolist()})), {str(tmp_path / 'out')!r})\n"
    )
    environment = {**os.environ, "ESAPN_CPU_BACKEND": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    out = torch.load(tmp_path / "out")
    close(out, module(IDS.flatten()))
    close(program.module()(IDS.flatten()), out)


def test_a_storage_shorter_than_its_layout():
    case = make_case(PAPER, 30, 40)
    storage, chain = case.leaves()
    short = storage.detach()[:200].clone().requires_grad_()
    with pytest.raises(IndexError, match="index out of range in self"):
        lookup(case.ids, short, chain, case.layout, backend="native")
    composed = cpu.compose(chain, PAPER)
    for backward in (cpu.lookup_bwd, cpu.lookup_bwd_sparse):
        with pytest.raises(IndexError, match="index out of range in self"):
            backward(case.grad_out, case.ids, short.detach(), composed, case.layout)


def test_large_pages_change_no_number():
    numbers = torch.randn(6 << 20)
    before = numbers.clone()
    assert on_large_pages(numbers[5:]).data_ptr() == numbers.data_ptr() + 20
    assert torch.equal(numbers, before)
    empty, meta = torch.empty(0), torch.empty(8 << 20, device="meta")
    assert on_large_pages(empty) is empty and on_large_pages(meta) is meta
    with FakeTensorMode():
        fake = torch.empty(8 << 20)
        assert on_large_pages(fake) is fake


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_rows_that_are_not_stored_as_they_are(backend):
    """Every second number of a tensor, or numbers whose sign torch has yet to turn."""
    case = make_case(SMALL, 30, 40, backend=backend)
    storage, chain = (t.detach() for t in case.leaves())
    apart = torch.stack([storage, torch.zeros_like(storage)], 1)[:, 0]
    expected = lookup(case.ids, storage, chain, case.layout, backend=backend)
    assert torch.equal(lookup(case.ids, apart, chain, case.layout, backend=backend), expected)
    found = functional_call(case.module, {"arena.storage": apart}, (case.ids,))
    assert torch.equal(found, expected)
    negated = [torch._neg_view(-t) for t in (storage, chain)]
    assert torch.equal(lookup(case.ids, *negated, case.layout, backend=backend), expected)
    leaf = apart.clone().requires_grad_()
    twice = torch.stack([leaf, leaf], 1)[:, 0]
    lookup(case.ids, twice, chain, case.layout, backend=backend).backward(case.grad_out)
    whole = storage.clone().requires_grad_()
    lookup(case.ids, whole, chain, case.layout, backend=backend).backward(case.grad_out)
    assert torch.equal(leaf.grad, whole.grad)


def test_as_many_sizes_as_levels():
    sizes = tuple(range(1, 129))
    case = make_case(sizes, 300, 400)
    exact, eager = case.expected(), case.expected(torch.float32)
    for part, actual, x, e in zip("yeW", case.run("native"), exact, eager, strict=True):
        assert_matches(actual, x, e, name=part)
    assert case.module.promote(case.ids).any()


def test_tensors_without_numbers_are_refused():
    case = make_case(SMALL, 30, 40)
    storage, chain = (t.detach() for t in case.leaves())
    nothing = torch._efficientzerotensor(storage.shape)
    assert nothing.data_ptr() == 0
    with pytest.raises(RuntimeError, match="plain tensors"):
        lookup(case.ids, nothing, chain, case.layout, backend="native")


def test_other_locations_are_refused():
    case = make_case(SMALL, 30, 40)
    storage, chain = (t.detach() for t in case.leaves())
    row_start, page_level, *rest = case.layout.flat
    starts = torch.stack([row_start, row_start], 1)[:, 0], row_start.short()
    for layout in (
        *(Layout(start, page_level, *rest) for start in starts),
        Layout(row_start, page_level.long(), *rest),
    ):
        with pytest.raises(RuntimeError, match="row starts must be"):
            lookup(case.ids, storage, chain, layout, backend="native")


def test_rows_move_while_another_thread_looks_up():
    """What is read may be of before or after, or be refused: nothing else happens."""
    case = make_case(PAPER, 20_000, 8192, mix=(1, 1, 1, 1, 1, 0))
    stop, seen = threading.Event(), []

    def look_up():
        while not stop.is_set():
            try:
                with torch.no_grad():
                    seen.append(case.module(case.ids).shape == (8192, 128))
            except (IndexError, RuntimeError):
                seen.append(True)

    thread = threading.Thread(target=look_up)
    thread.start()
    for first in range(0, 20_000, 2_000):
        case.module.promote(torch.arange(first, first + 2_000))
    case.module.compact()
    stop.set()
    thread.join()
    assert seen and all(seen)
