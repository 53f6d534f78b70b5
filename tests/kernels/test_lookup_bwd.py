"""lookup_bwd.py: the passes over distinct rows, hot rows, and rules applied in place."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from esapn_kernels import ResizableEmbedding, optim
from esapn_kernels.cpu import lookup as cpu
from esapn_kernels.cpu import native
from esapn_kernels.gpu import launch
from esapn_kernels.gpu.lookup_bwd import launch_bwd, launch_bwd_update
from esapn_kernels.ops.backend import TRITON_ERROR
from esapn_kernels.ops.compose import compose
from esapn_kernels.ops.layout import Layout
from esapn_kernels.ops.lookup import Options, lookup
from esapn_kernels.ops.update import RULES, Update, rule_numbers
from esapn_kernels.reference import lookup_grad_reference, update_reference
from esapn_kernels.testing import assert_matches, make_case, poison_unused, row_elements
from tests.kernels.layouts import DTYPES, ODD, PAPER, SMALL, compared, name

pytestmark = pytest.mark.skipif(TRITON_ERROR is not None, reason=str(TRITON_ERROR))
LR, EPS, BETAS, STEP = 0.1, 1e-3, (0.8, 0.95), 5


def with_ids(case, ids):
    ids = torch.as_tensor(ids, device=case.ids.device)
    grad_out = torch.randn(*ids.shape, case.module.embedding_dim).to(case.grad_out)
    return type(case)(case.module, ids, grad_out)


def operands(case, dtype=None):
    storage, chain = case.leaves(dtype)
    composed = compose(chain.detach(), case.module.sizes)
    return storage.detach(), composed, case.layout


@pytest.mark.parametrize("traffic", ["uniform", "zipf"])
def test_hot_rows(traffic, batches, device, nan_empty):
    """Runs of every kind: alone, a few, longer than a walk, over whole stretches."""
    case = make_case(SMALL, 30, 0, device=device)
    counts = [1, 1, 2, 3, 31, 32, 33, 40, 300, 600]
    ids = torch.repeat_interleave(torch.arange(10), torch.tensor(counts))
    if traffic == "zipf":
        ids = 29 - ids
    case = with_ids(case, ids[torch.randperm(len(ids))])
    actual = launch_bwd(case.grad_out, case.ids, *operands(case))
    out, grad_storage, grad_chain = case.expected()
    eager = case.expected(torch.float32)
    assert_matches(actual[0], grad_storage, eager[1], name="storage gradient")
    assert_matches(case.run("triton")[2], grad_chain, eager[2], name="chain gradient")
    for a, b in zip(actual, launch_bwd(case.grad_out, case.ids, *operands(case)), strict=True):
        assert torch.equal(a, b)


def test_hot_rows_at_the_edges_of_stretches(device, nan_empty):
    """Runs that begin, end or leave their first occurrences behind where a stretch begins."""
    case = make_case(SMALL, 10, 0, device=device, mix=(1, 0, 0))
    rows = case.module.arena.layout.row_start[:10].argsort()[:5]
    # Positions 0, 224, 768, 1025 and 1279 of 1280, whole stretches of 256.
    ids = rows.repeat_interleave(torch.tensor([224, 544, 257, 254, 1], device=device))
    case = with_ids(case, ids[torch.randperm(1280, device=device)])
    exact, eager = case.expected(), case.expected(torch.float32)
    for part, a, x, e in zip("yeW", case.run("triton"), exact, eager, strict=True):
        assert_matches(a, x, e, name=part)


@pytest.mark.parametrize("n_rows", [15, 16, 17, 32])
def test_rows_that_fill_a_block(n_rows, batches, device, nan_empty):
    """So many distinct rows of every level, every third of them more than once."""
    case = make_case(SMALL, 3 * n_rows, 0, device=device)
    every = torch.arange(3 * n_rows, device=device)
    case = with_ids(case, torch.cat([every, every[::3]]))
    exact, eager = case.expected(), case.expected(torch.float32)
    for part, a, x, e in zip("yeW", case.run("triton"), exact, eager, strict=True):
        assert_matches(a, x, e, name=part)


def test_more_programs_than_are_added_at_once(device, nan_empty):
    """A level of 33 tiles, which as many programs share."""
    case = make_case(SMALL, 33 * 16, 0, device=device, mix=(1, 0, 0))
    case = with_ids(case, torch.randperm(33 * 16, device=device))
    exact, eager = case.expected(), case.expected(torch.float32)
    for part, a, x, e in zip("yeW", case.run("triton"), exact, eager, strict=True):
        assert_matches(a, x, e, name=part)


@pytest.mark.parametrize("programs", [1, 3])
def test_programs_share_the_tiles(programs, device, monkeypatch, nan_empty):
    """Few programs cross levels, many leave some idle: the sums are the same to rounding."""
    case = make_case(SMALL, 120, 200, device=device)
    exact, eager = case.expected(), case.expected(torch.float32)
    original = launch.choose_bwd

    def choose(*args):
        config = original(*args)
        blocks = {**config.chain.blocks, "WHOLE": False}
        return replace(
            config,
            sums=replace(config.sums, programs=programs),
            chain=replace(config.chain, programs=programs, blocks=blocks),
            rows=replace(config.rows, programs=programs),
        )

    monkeypatch.setattr(launch, "choose_bwd", choose)
    actual = case.run("triton")
    for part, a, x, e in zip("yeW", actual, exact, eager, strict=True):
        assert_matches(a, x, e, name=part)


# Every setting beside a rule's own; the bounds meet some numbers, and most rows.
SHAPED = {"l2": 0.3, "decay": 0.2, "clip_value": 2.0, "clip_row_norm": 3.0}


def make_update(rule, case, dtype, settings=None):
    """An update whose state was random before, and the state by itself."""
    module = case.module
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    device = module.arena.storage.device
    generator = torch.Generator().manual_seed(1)

    def positive(*shape):
        return (torch.rand(*shape, generator=generator) + 0.1).to(device, compute)

    capacity = module.arena.storage.numel()
    count = {"adagrad": 1, "adam": 2, "rowwise_adam": 1}.get(rule, 0)
    state = tuple(positive(capacity) for _ in range(count))
    row_sums = last_step = clock = None
    if rule.startswith("rowwise"):
        row_sums = positive(module.num_embeddings)
    if rule.endswith("adam"):
        last_step = torch.randint(0, STEP, (module.num_embeddings,), generator=generator)
        last_step = last_step.int().to(device)
        done = STEP - 1
        clock = torch.tensor([done, BETAS[0] ** done, BETAS[1] ** done], dtype=torch.float64)
        clock = clock.to(device)
    betas = BETAS if rule.endswith("adam") else (0.0, 0.0)
    numbers = rule_numbers(LR, EPS, betas, **(settings or {}))
    numbers = torch.tensor(numbers, dtype=torch.float64, device=device)
    return Update(rule, numbers, state, row_sums, last_step, clock, bool(settings))


def held_by(update):
    """All that an update changes but rows and clock."""
    return [*update.state, *(t for t in (update.row_sums, update.last_step) if t is not None)]


def expected_update(case, update, dtype, settings=None):
    """Rows, state and sums of rows after the step, row by row by the definition in ``dtype``."""
    arena = case.module.arena
    storage, chain = case.leaves(dtype)
    storage = storage.detach().clone()
    page, sizes = arena.layout.page, case.module.sizes
    grad, _ = lookup_grad_reference(
        case.grad_out.to(dtype), case.ids, storage, chain.detach(), *case.layout.flat
    )
    compute = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    state = [t.to(compute).clone() for t in update.state]
    row_sums = None if update.row_sums is None else update.row_sums.to(compute, copy=True)
    for i in case.ids.unique().tolist():
        if not 0 <= i < arena.num_rows:
            continue
        start = int(arena.layout.row_start[i])
        row = slice(start, start + sizes[int(arena.layout.page_level[start // page])])
        held = tuple(t[row] for t in state)
        if row_sums is not None:
            held = (*held, row_sums[i])
        new, kept = update_reference(
            update.rule,
            storage[row].to(compute),
            grad[row].to(compute),
            held,
            lr=LR,
            eps=EPS,
            betas=BETAS,
            step=STEP,
            last_step=0 if update.last_step is None else int(update.last_step[i]),
            **(settings or {}),
        )
        storage[row] = new.to(dtype)
        if row_sums is not None:
            *kept, row_sums[i] = kept
        for tensor, value in zip(state, kept, strict=True):
            tensor[row] = value
    return storage, state, row_sums


RUN_UPDATE = {
    "torch": cpu.lookup_bwd_update,
    "native": native.lookup_bwd_update,
    "triton": launch_bwd_update,
}
LAYOUTS = [
    *((sizes, torch.float32) for sizes in (PAPER, (7,), (127, 130))),
    *((ODD, dtype) for dtype in DTYPES),
    ((127, 130), torch.float64),
    # One number more than whole blocks.
    ((33, 65), torch.float64),
]


@pytest.mark.parametrize("sizes, dtype, backend", compared(LAYOUTS), indirect=["backend"], ids=name)
@pytest.mark.parametrize("rule", RULES)
def test_rules_in_place(rule, sizes, dtype, backend, device, nan_empty):
    check_in_place(rule, sizes, dtype, backend, device)


# One block of columns and more, none of them full, in either pass over rows.
SHAPED_LAYOUTS = [(ODD, torch.float32), ((70, 130), torch.float32), (ODD, torch.bfloat16)]


@pytest.mark.parametrize(
    "sizes, dtype, backend", compared(SHAPED_LAYOUTS), indirect=["backend"], ids=name
)
@pytest.mark.parametrize("rule", RULES)
def test_clipped_and_decayed_in_place(rule, sizes, dtype, backend, device, nan_empty):
    check_in_place(rule, sizes, dtype, backend, device, SHAPED)


@pytest.mark.parametrize("setting", SHAPED)
@pytest.mark.parametrize("rule", ["sgd", "rowwise_adam"])
def test_each_setting_alone(rule, setting, backend, device, nan_empty):
    """In wide rows a pass is left out where no norm is bounded."""
    only = {setting: SHAPED[setting]}
    check_in_place(rule, (70, 130), torch.float64, backend, device, only)


def check_in_place(rule, sizes, dtype, backend, device, settings=None):
    case = make_case(sizes, 24, 30, dtype, device)
    # Kernels on a GPU pass over ids that do not exist.
    odd = torch.tensor([24, -1] if backend == "triton" else [], dtype=torch.int64, device=device)
    ids = torch.cat([case.ids, odd, case.ids[:4]])
    case = with_ids(case, ids)
    valid = (ids >= 0) & (ids < 24)
    known = type(case)(case.module, ids[valid], case.grad_out[valid])
    update = make_update(rule, case, dtype, settings)
    exact = expected_update(known, update, torch.float64, settings)
    eager = expected_update(known, update, dtype, settings)
    last_step = None if update.last_step is None else update.last_step.clone()
    storage, composed, layout = operands(case)
    before = storage.clone()
    old_composed = cpu.lookup_bwd(known.grad_out, known.ids, storage, composed, layout)[1]
    touched = row_elements(case.module, known.ids)

    run = RUN_UPDATE[backend]
    grad_composed = run(case.grad_out, case.ids, storage, composed, layout, update=update)
    assert_matches(storage, exact[0], eager[0], name="rows")
    assert torch.equal(storage[~touched], before[~touched])
    for own, x, e in zip(update.state, exact[1], eager[1], strict=True):
        assert_matches(own[touched], x[touched], e[touched], name="state")
    if last_step is not None:
        last_step[known.ids] = STEP
        assert torch.equal(update.last_step, last_step)
    if update.row_sums is not None:
        assert_matches(update.row_sums, exact[2].double(), eager[2], name="sums of rows")
    # From the rows as they were; ids that do not exist add nothing to the chain either.
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    scale = float(old_composed.abs().max()) if len(composed) else 1.0
    torch.testing.assert_close(grad_composed, old_composed, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("rule", RULES)
def test_an_update_reads_and_writes_nothing_beside_its_rows(rule, backend, device, nan_empty):
    case = with_ids(make_case(ODD, 40, 0, device=device), list(range(0, 40, 3)) * 2)
    update = make_update(rule, case, torch.float32)
    used = row_elements(case.module, case.ids)
    for tensor in update.state:
        tensor[~used] = float("nan")
    poison_unused(case.module, case.ids)
    storage, composed, layout = operands(case)
    run = RUN_UPDATE[backend]
    grad = run(case.grad_out, case.ids, storage, composed, layout, update=update)
    assert grad.isfinite().all() and storage[used].isfinite().all()
    assert storage[~used].isnan().all()
    for tensor in update.state:
        assert tensor[used].isfinite().all() and tensor[~used].isnan().all()


@pytest.mark.parametrize("rule", RULES)
def test_ids_that_do_not_exist_change_no_row(rule, device):
    case = with_ids(make_case(ODD, 12, 0, device=device), [-1, 12, -(2**40), 2**40])
    update = make_update(rule, case, torch.float32)
    held = [t.clone() for t in held_by(update)]
    storage, composed, layout = operands(case)
    before = storage.clone()
    grad = launch_bwd_update(case.grad_out, case.ids, storage, composed, layout, update=update)
    assert torch.equal(storage, before) and not grad.any()
    assert all(torch.equal(a, b) for a, b in zip(held, held_by(update), strict=True))


def test_rows_past_2_31_elements(device):
    """fp16 rows at the far end of a storage whose memory is never touched in between."""
    if device.type != "cpu":
        pytest.skip("untouched virtual memory is a CPU's; test_native.py has this for a GPU")
    page, far = 16, 2**31 + 64
    storage = torch.empty(far + page, dtype=torch.float16)
    storage[far : far + page] = torch.arange(page)
    row_start = torch.tensor([far, far + 4])
    levels = torch.zeros(storage.numel() // page, dtype=torch.int8)
    levels[far // page] = 0
    composed = torch.tensor([[2.0] * 8] * 4 + [[1.0] * 8])
    ids = torch.tensor([1, 0, 1])
    grad_out = torch.ones(3, 8, dtype=torch.float16)
    update = Update("sgd", torch.tensor(rule_numbers(lr=0.25), dtype=torch.float64))
    layout = Layout(row_start, levels, (4, 8), page)
    grad = launch_bwd_update(grad_out, ids, storage, composed, layout, update)
    # d e = M^T g, g = 1 or 2 in each of 8 columns: 16 and 32; e -= lr d e.
    assert storage[far : far + 8].tolist() == [i - (4 if i < 4 else 8) for i in range(8)]
    assert storage[far + 8 :].tolist() == list(range(8, page))
    # d M = sum g e^T with e before: rows 0..3 once and 4..7 twice.
    assert grad[:, 0].tolist() == [8.0, 11.0, 14.0, 17.0, 3.0]


@pytest.mark.parametrize("make", [optim.SGD, optim.Adagrad, optim.Adam, optim.AdamW])
@pytest.mark.parametrize("backend", ["native", "triton"], indirect=True)
def test_backends_train_alike(make, backend, device):
    results = []
    for each in ("torch", backend):
        torch.manual_seed(0)
        module = ResizableEmbedding(40, sizes=ODD, backend=each, device=device)
        module.promote(torch.arange(0, 40, 3, device=device))
        rows = make(module, lr=0.1)
        dense = torch.optim.SGD(module.parameters(), lr=0.1)
        for step in range(4):
            ids = torch.randint(40, (30,), generator=torch.Generator().manual_seed(step)).to(device)
            dense.zero_grad()
            module(ids).square().mean().backward()
            assert module.arena.storage.grad is None
            dense.step()
            rows.step()
        # Outputs: where a row lies is the backend's own affair.
        results.append((module(torch.arange(40, device=device)).detach(), module.chain.detach()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_two_lookups_of_one_step_are_refused(backend, device):
    module = ResizableEmbedding(10, sizes=ODD, backend=backend, device=device)
    rows = optim.SGD(module, lr=0.1)
    ids = torch.tensor([1, 2], device=device)
    loss = module(ids).sum() + module(ids).sum()
    before = module.arena.storage.detach().clone()
    with pytest.raises(RuntimeError, match="look up all ids of a step in one call"):
        loss.backward()
    # The first of the two was stepped once; nothing else.
    changed = (module.arena.storage != before).nonzero().numel()
    assert 0 < changed <= 2 and rows.param_groups


def test_frozen_rows_or_chain(backend, device):
    for frozen in ("rows", "chain"):
        module = ResizableEmbedding(10, sizes=ODD, backend=backend, device=device)
        rows = optim.SGD(module, lr=0.1)
        parameter = module.arena.storage if frozen == "rows" else module.chain
        parameter.requires_grad_(False)
        before = module.arena.storage.detach().clone()
        module(torch.tensor([1, 2], device=device)).sum().backward()
        assert torch.equal(module.arena.storage, before) == (frozen == "rows")
        assert (module.chain.grad is None) == (frozen == "chain")
        assert rows.rule == "sgd"


def test_strided_ids_and_gradients(device):
    case = make_case(SMALL, 30, 40, device=device)
    ids, grad_out = case.ids[::2], case.grad_out[::2]
    plain = launch_bwd(grad_out.contiguous(), ids.contiguous(), *operands(case))
    strided = launch_bwd(grad_out, ids, *operands(case))
    assert all(torch.equal(a, b) for a, b in zip(plain, strided, strict=True))


def test_bf16_output_of_fp32_rows(backend, device):
    case = make_case(PAPER, 30, 40, device=device)
    storage, chain = case.leaves()
    options = Options(out_dtype=torch.bfloat16)
    out = lookup(case.ids, storage, chain, case.layout, options, backend=backend)
    assert out.dtype == torch.bfloat16
    grad_out = case.grad_out.bfloat16()
    out.backward(grad_out)
    rounded = type(case)(case.module, case.ids, grad_out.float())
    exact, eager = rounded.expected(), rounded.expected(torch.float32)
    assert_matches(out.detach(), exact[0], eager[0].bfloat16(), name="output")
    assert_matches(storage.grad, exact[1], eager[1], name="storage gradient")
    assert_matches(chain.grad, exact[2], eager[2], name="chain gradient")


def test_out(backend, device):
    case = make_case(SMALL, 30, 40, device=device)
    look_up = partial(lookup, case.ids, *case.leaves(), case.layout, backend=backend)
    with torch.no_grad():
        expected = look_up()
        out = torch.full_like(expected, float("nan"))
        assert look_up(out=out) is out
        assert torch.equal(out, expected)
        for wrong in (out[:-1], out.double(), out.t().contiguous().t()):
            with pytest.raises(ValueError, match="^out must be"):
                look_up(out=wrong)
    with pytest.raises(RuntimeError, match="don't support automatic differentiation"):
        look_up(out=out)


def test_the_chain_is_left_out_where_it_is_frozen(backend, device):
    case = make_case(SMALL, 30, 40, device=device)
    run = {"torch": cpu.lookup_bwd, "native": native.lookup_bwd, "triton": launch_bwd}[backend]
    rows, chain = run(case.grad_out, case.ids, *operands(case))
    alone, nothing = run(case.grad_out, case.ids, *operands(case), want_composed=False)
    assert nothing is None and chain.any()
    assert torch.equal(alone, rows)
