"""optim.py, deferred=True: gradients are collected by row, and step() steps the rows."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from esapn_kernels import (
    ResizableEmbedding,
    ResizableEmbeddingBag,
    ResizableEmbeddingCollection,
    optim,
)
from esapn_kernels.ops.row_gradient import RowGradient

SIZES, N_ROWS, DIM = (2, 3, 8, 17), 60, 17
RULES = {
    "sgd": (optim.SGD, {"lr": 0.1}),
    "adagrad": (optim.Adagrad, {"lr": 0.1, "eps": 1e-3}),
    "rowwise_adagrad": (optim.Adagrad, {"lr": 0.1, "eps": 1e-3, "rowwise": True}),
    "adam": (optim.Adam, {"lr": 0.1, "eps": 1e-3}),
    "rowwise_adam": (optim.Adam, {"lr": 0.1, "eps": 1e-3, "rowwise": True, "weight_decay": 0.1}),
    "adamw": (optim.AdamW, {"lr": 0.1, "eps": 1e-3, "clip_value": 0.5, "clip_row_norm": 0.7}),
}
every_rule = pytest.mark.parametrize("rule", RULES)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def make(sizes=SIZES, dtype=torch.float64, seed=0, n_rows=N_ROWS, **options):
    torch.manual_seed(seed)
    options.setdefault("initial_size", torch.tensor(sizes)[torch.arange(n_rows) % len(sizes)])
    if len(sizes) == 1:
        del options["initial_size"]
    return ResizableEmbedding(n_rows, sizes=sizes, dtype=dtype, **options)


def build(rule, module, deferred=True, **changes):
    kind, options = RULES[rule]
    return kind(module, deferred=deferred, **{**options, **changes})


def batches(steps, n_ids=24, n_rows=N_ROWS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(n_rows, (n_ids,), generator=generator)
        yield ids, torch.randn(n_ids, DIM, generator=generator, dtype=torch.float64)


def loss_of(module, ids, weight):
    out = module(ids)
    return (torch.sin(out) * weight.to(out.dtype)).sum()


def rows_grad(module):
    return module.arena.parameter.grad


def table_of(module):
    return module.weight.detach().clone()


@pytest.mark.parametrize("sizes", [SIZES, (DIM,)], ids=["ragged", "one size"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_rule
def test_a_step_after_every_backward_is_the_immediate_one(rule, dtype, sizes, backend):
    """One lookup a step, rows that grow: the same numbers as rows stepped in backward."""
    tables = []
    for deferred in (False, True):
        module = make(sizes, dtype, backend=backend)
        rows = build(rule, module, deferred)
        # Interpreted kernels take their time.
        for step, (ids, weight) in enumerate(batches(2 if backend == "triton" else 6)):
            loss_of(module, ids, weight).backward()
            assert isinstance(rows_grad(module), RowGradient) == deferred
            rows.step()
            rows.zero_grad()
            assert rows_grad(module) is None
            module.promote(ids[step::7])
        state = rows.state_dict()["state"]
        tables.append((table_of(module), state))
    (immediate, state), (collected, own) = tables
    # Triton sums the squares of a row in other blocks.
    exact = {} if backend == "triton" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(collected, immediate, **exact)
    for name, value in state.get(0, {}).items():
        torch.testing.assert_close(own[0][name], value, **exact)


@every_rule
def test_four_passes_are_one_large_batch(rule, backend):
    """Gradients of several backward passes add up; the clock counts one step."""
    apart, together = make(backend=backend), make(backend=backend)
    optimizers = build(rule, apart), build(rule, together)
    for _ in range(3):
        parts = list(batches(4, n_ids=20))
        for ids, weight in parts:
            loss_of(apart, ids, weight).backward()
        whole = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
        loss_of(together, *whole).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(table_of(apart), table_of(together), rtol=1e-12, atol=1e-12)
    if "adam" in rule:
        clock = optimizers[0].state[apart.arena.storage]["clock"]
        assert float(clock[0]) == 3
        assert torch.equal(clock, optimizers[1].state[together.arena.storage]["clock"])


def test_several_lookups_before_one_backward(backend):
    """A table may be looked up as often as a step needs."""
    apart, together = make(backend=backend), make(backend=backend)
    optimizers = build("adam", apart), build("adam", together)
    for (ids, weight), (others, other_weight) in zip(batches(3), batches(3, seed=2), strict=True):
        (loss_of(apart, ids, weight) + loss_of(apart, others, other_weight)).backward()
        both = torch.cat([ids, others]), torch.cat([weight, other_weight])
        loss_of(together, *both).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(table_of(apart), table_of(together), rtol=1e-12, atol=1e-12)


def plain_table(module):
    return nn.Embedding.from_pretrained(table_of(module), freeze=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.5, float("inf")])
def test_clipping_by_global_norm_is_that_of_a_plain_table(dtype, norm_type, backend):
    """``clip_grad_norm_`` over the rows and the rest of the model, accumulated passes too."""
    module = make((DIM,), dtype, backend=backend)
    plain = plain_table(module)
    top = nn.Linear(DIM, 1, dtype=dtype)
    tops = top, copy.deepcopy(top)
    rows = build("sgd", module)
    dense = torch.optim.SGD([*plain.parameters(), *tops[0].parameters()], lr=0.1)
    rest = torch.optim.SGD(tops[1].parameters(), lr=0.1)
    close = {"rtol": 5e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    for (ids, _), (others, _) in zip(batches(3), batches(3, seed=2), strict=True):
        norms = []
        for table, head in zip((plain, module), tops, strict=True):
            for some in (ids, others):
                head(table(some)).square().sum().backward()
            parameters = [*table.parameters(), *head.parameters()]
            norms.append(nn.utils.clip_grad_norm_(parameters, 0.5, norm_type))
        torch.testing.assert_close(norms[1], norms[0], **close, check_dtype=False)
        ours = rows_grad(module)
        assert isinstance(ours, RowGradient)
        torch.testing.assert_close(ours.to_dense(), plain.weight.grad, **close)
        for optimizer in (dense, rows, rest):
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(module.weight, plain.weight, **close)


def test_clipping_ragged_rows_is_that_of_their_dense_gradient(backend):
    """Norm, values and what is left of both are those of the gradient that torch.optim takes."""
    ours, other = make(backend=backend), make(backend=backend)
    _rows = build("sgd", ours)
    for ids, weight in batches(4):
        for module in (ours, other):
            loss_of(module, ids, weight).backward()
    for clip in (
        lambda m: nn.utils.clip_grad_norm_(m.parameters(), 3.0),
        lambda m: nn.utils.get_total_norm([p.grad for p in m.parameters()]),
        lambda m: nn.utils.clip_grad_value_(m.parameters(), 0.05),
        lambda m: m.arena.storage.grad.norm(),
        lambda m: m.arena.storage.grad.data.norm(1),
    ):
        results = clip(ours), clip(other)
        if results[0] is not None:
            torch.testing.assert_close(*results)
        torch.testing.assert_close(rows_grad(ours).to_dense(), rows_grad(other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # the interpreter's, of the inf
def test_grad_scaler(dtype, backend):
    """Scaled losses step as others; a step with an inf changes no row, no state and no clock."""
    scaled, other = make(dtype=dtype, backend=backend), make(dtype=dtype, backend=backend)
    optimizers = build("adam", scaled), build("adam", other)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    storage = scaled.arena.storage
    for step, (ids, weight) in enumerate(batches(6)):
        held = storage.detach().clone(), copy.deepcopy(optimizers[0].state_dict())
        if step == 2:
            weight[5] = float("inf")
        scaler.scale(loss_of(scaled, ids, weight).float()).backward()
        if step % 2:
            scaler.unscale_(optimizers[0])
            nn.utils.clip_grad_norm_(scaled.parameters(), 1e9)
        scaler.step(optimizers[0])
        scaler.update()
        optimizers[0].zero_grad()
        scaled.zero_grad()
        if step == 2:
            assert scaler.get_scale() == 2.0**9
            assert torch.equal(storage, held[0])
            for name, value in held[1]["state"][0].items():
                assert torch.equal(optimizers[0].state[storage][name], value)
            continue
        loss_of(other, ids, weight).float().backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        assert scaled.arena.storage.isfinite().all()
    assert torch.equal(table_of(scaled), table_of(other))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # the interpreter's, of the inf
def test_grad_scaler_with_another_optimizer(bad, backend):
    """Where one of them has no finite gradient, neither steps, as the docstring of optim has it."""
    module, top = make(dtype=torch.float32, backend=backend), nn.Linear(DIM, 1)
    parameters = [module.chain, *top.parameters()]
    rows, dense = build("adam", module), torch.optim.Adam(parameters, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    every = [module.arena.storage, *parameters]
    for step, (ids, _) in enumerate(batches(3)):
        before = [parameter.detach().clone() for parameter in every]
        hook = module.arena.storage.register_hook(lambda g, s=step: g * (bad if s == 1 else 1.0))
        scaler.scale(top(module(ids)).square().sum()).backward()
        hook.remove()
        for optimizer in (rows, dense):
            scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(every, 1.0)
        for optimizer in (rows, dense):
            if norm.isfinite():
                scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
        for parameter, old in zip(every, before, strict=True):
            assert torch.equal(parameter, old) == (step == 1)
    assert scaler.get_scale() == 2.0**9


@every_rule
def test_closures_zero_grad_and_schedules(rule, backend):
    """As any optimizer: a gradient that is kept steps again, one that is zeroed is none."""
    module, other = make(backend=backend), make(backend=backend)
    rows, dense = build(rule, module), build(rule, other)
    schedule, plain = (
        torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5) for optimizer in (rows, dense)
    )
    for ids, weight in batches(3):

        def closure(ids=ids, weight=weight):
            rows.zero_grad()
            loss = loss_of(module, ids, weight)
            loss.backward()
            return loss

        loss = rows.step(closure)
        assert torch.equal(loss.detach(), loss_of(other, ids, weight).detach())
        loss_of(other, ids, weight).backward()
        dense.step()
        dense.zero_grad(set_to_none=False)
        assert rows_grad(other).norm() == 0
        schedule.step()
        plain.step()
    assert torch.equal(table_of(module), table_of(other))
    # Another step with the gradient that is still there: of SGD as large as the one before.
    if rule == "sgd":
        before = table_of(module)
        rows.step()
        assert not torch.equal(table_of(module), before)
    dense.step()  # zeroed: lists no row
    assert len(rows_grad(other).summed().ids) == 0


@pytest.mark.parametrize("accumulated", [False, True])
def test_rows_that_move_before_the_step(accumulated, backend):
    """A resized row has no gradient, as it has no state; every other row keeps its own."""
    module = make(backend=backend, n_rows=200)
    rows = build("sgd", module)
    ids = torch.arange(0, 200, 2)
    weight = torch.randn(len(ids), DIM, dtype=torch.float64)
    loss_of(module, ids, weight).backward()
    if accumulated:
        loss_of(module, ids, weight).backward()
    expected = rows_grad(module).to_dense()
    start, row_size = module.arena.layout.row_start.long(), module.sizes_of()
    grads = {i: expected[start[i] : start[i] + row_size[i]].clone() for i in ids.tolist()}
    grown = module.promote(ids[::3])
    assert grown.any()
    resized = set(ids[::3][grown].tolist())
    module.reserve(500)
    module.compact()
    assert rows_grad(module).shape == module.arena.storage.shape
    before = {i: module.arena.read(i) for i in range(200)}
    norm = sum(float(g.square().sum()) for i, g in grads.items() if i not in resized) ** 0.5
    assert float(rows_grad(module).norm()) == pytest.approx(norm, rel=1e-12)
    rows.step()
    for i, row in before.items():
        step = 0.1 * grads[i] if i in grads and i not in resized else torch.zeros_like(row)
        torch.testing.assert_close(module.arena.read(i), row - step)
    rows.zero_grad()
    loss_of(module, ids, weight).backward()
    rows.step()


def test_a_checkpoint_loaded_before_the_step(backend):
    """Rows that have another size by then have no gradient; nothing reads beyond a row."""
    module, small = make(backend=backend), make(backend=backend, initial_size=2)
    rows = build("sgd", module)
    for ids, weight in batches(2):
        loss_of(module, ids, weight).backward()
    module.load_state_dict(small.state_dict())
    before = {i: module.arena.read(i) for i in range(N_ROWS)}
    rows.step()
    moved = {i for i, row in before.items() if not torch.equal(module.arena.read(i), row)}
    assert moved and all(i % len(SIZES) == 0 for i in moved)


@pytest.mark.parametrize("grows", [False, True])
def test_a_checkpoint_of_another_length_between_two_passes(grows, backend):
    """The gradient goes along with the rows, and the next pass adds to it."""
    small, large = make(backend=backend, initial_size=2), make(backend=backend)
    module, saved = (small, large) if grows else (large, small)
    module.chain.data.copy_(saved.chain)
    rows = build("sgd", module)
    ids, size = torch.arange(N_ROWS), module.sizes_of()
    module(ids).sum().backward()
    module.load_state_dict(saved.state_dict())
    assert rows_grad(module).shape == module.arena.storage.shape
    module(ids).sum().backward()
    saved(ids).sum().backward()
    passes = 1 + (module.sizes_of() == size).double()
    before = [module.arena.read(i) for i in ids]
    nn.utils.clip_grad_norm_(module.parameters(), 1e9)
    rows.step()
    starts = module.arena.layout.row_start.tolist()
    for row, start, count, i in zip(before, starts, passes, ids, strict=True):
        grad = rows_grad(saved)[start : start + len(row)]
        torch.testing.assert_close(module.arena.read(i), row - 0.1 * count * grad)


def test_a_dense_gradient_beside_rows_that_move(backend):
    """Rows that were resized are taken out of it, too."""
    module = make(backend=backend)
    rows = build("sgd", module)
    ids = torch.arange(0, N_ROWS, 2)
    module(ids).sum().backward()
    (3 * module.arena.storage.sum()).backward()
    grown = module.promote(ids[:9])
    module(ids[9:]).sum().backward()
    before = [module.arena.read(i) for i in range(N_ROWS)]
    rows.step()
    for i, row in enumerate(before):
        assert torch.equal(module.arena.read(i), row) == (i in ids[:9][grown].tolist())


@pytest.mark.parametrize("rule", ["sgd", "adagrad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_a_module_that_changes_its_dtype(dtype, rule, backend):
    """The gradient that was collected before steps the rows as they are now."""
    module, other = make(dtype=torch.float32, backend=backend), make(dtype=torch.float32)
    rows = build(rule, module)
    for ids, weight in batches(2):
        loss_of(module, ids, weight).backward()
        loss_of(other, ids, weight).backward()
    module.to(dtype)
    plain = torch.optim.SGD if rule == "sgd" else torch.optim.Adagrad
    dense = plain([other.arena.storage], lr=0.1, **({"eps": 1e-3} if rule == "adagrad" else {}))
    for optimizer in (rows, dense):
        optimizer.step()
    close = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.float16 else {}
    expected = other.arena.storage.to(dtype)
    torch.testing.assert_close(module.arena.storage, expected, check_dtype=True, **close)


def test_memory_that_is_shared(backend):
    """``share_memory`` between backward and step."""
    module, other = make(backend=backend), make(backend=backend)
    optimizers = build("sgd", module), build("sgd", other)
    for ids, weight in batches(2):
        loss_of(module, ids, weight).backward()
        loss_of(other, ids, weight).backward()
    module.share_memory()
    assert isinstance(rows_grad(module), RowGradient)
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(module.arena.storage, other.arena.storage)


@every_rule
def test_equal_bits_over_20_runs(rule, backend):
    """Accumulated, clipped, with rows that grow."""

    def run():
        module = make(dtype=torch.float32, backend=backend)
        rows = build(rule, module)
        for (ids, weight), (others, more) in zip(batches(3), batches(3, seed=3), strict=True):
            loss_of(module, ids, weight).backward()
            loss_of(module, others, more).backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            rows.step()
            rows.zero_grad()
            module.promote(ids[:5])
        return module.arena.storage.detach().clone()

    first = run()
    assert all(torch.equal(run(), first) for _ in range(19 if backend != "triton" else 4))


def test_the_gradient_holds_the_rows_of_the_batch_alone(backend):
    module = make(backend=backend, n_rows=5_000)
    _rows = build("sgd", module)
    ids = torch.tensor([7, 4_999, 7, 12, 30])
    for passes in (1, 2):
        loss_of(module, ids, torch.ones(5, DIM, dtype=torch.float64)).backward()
        listed = rows_grad(module).summed()
        assert sorted(i for i in listed.ids.tolist() if i >= 0) == [7, 12, 30, 4_999]
        assert listed.values.numel() <= passes * len(ids) * DIM


def test_what_a_gradient_is_asked(backend):
    """Reading gives what the dense gradient gives; writing what cannot be kept raises."""
    ours, other = make(backend=backend), make(backend=backend)
    _rows = build("sgd", ours)
    for module in (ours, other):
        for ids, weight in batches(2):
            loss_of(module, ids, weight).backward()
    grad, dense = rows_grad(ours), rows_grad(other)
    for read in (
        lambda g: g.to_dense(),
        lambda g: g * 2,
        lambda g: 3 * g,
        lambda g: -g / 4,
        lambda g: g + g,
        lambda g: g + torch.ones_like(dense),
        lambda g: torch.ones_like(dense) + g,
        lambda g: g.clamp(-0.1, 0.1),
        lambda g: g.clamp(0.1, 0.2),
        lambda g: g.isfinite(),
        lambda g: g.norm(0),
        lambda g: torch.linalg.vector_norm(g, -float("inf")),
        lambda g: g.abs().max(),
        lambda g: g.sum(),
        lambda g: g.view(-1, 2)[3],
        lambda g: g.clone().mul_(0.5),
        lambda g: g.to(torch.float32),
        lambda g: torch.zeros_like(dense).copy_(g),
        lambda g: copy.deepcopy(g),
    ):
        result, expected = read(grad), read(dense)
        if isinstance(result, RowGradient):
            assert result.dtype == expected.dtype
            result = result.to_dense()
        torch.testing.assert_close(result, expected)
    assert "rows=" in repr(grad)
    zero = grad.clone().zero_()
    for total in (zero + grad, grad + zero, zero.add_(grad)):
        total.mul_(3.0)
        torch.testing.assert_close(total.to_dense(), 3 * dense)
        torch.testing.assert_close(grad.to_dense(), dense)
    held, expected = grad.detach(), dense.clone()
    held.mul_(2.0)
    torch.testing.assert_close(grad.to_dense(), 2 * expected)
    before = grad.to_dense()
    for write in (
        lambda g: g.add_(torch.ones((), dtype=g.dtype)),
        lambda g: g.copy_(torch.ones_like(dense)),
        lambda g: g.clamp_(min=0.1),
        lambda g: g.mul_(torch.ones_like(dense)),
        lambda g: g.fill_(1.0),
        lambda g: g.__setitem__(0, 1.0),
        lambda g: torch.nan_to_num(g, out=g),
    ):
        with pytest.raises(RuntimeError, match="the rows of the batch alone"):
            write(grad)
        torch.testing.assert_close(grad.to_dense(), before)


def test_gradients_that_were_added_up_stay_apart(backend):
    """What is written to one of them is not in a sum of it, nor the other way round."""
    module = make(backend=backend)
    _rows = build("sgd", module)
    for ids, weight in batches(1):
        loss_of(module, ids, weight).backward()
    one = rows_grad(module)
    none = (one * 1).zero_()
    total, same, held = one + one, one + none, none.clone().add_(one)
    expected = one.to_dense()
    one.mul_(3.0)
    nn.utils.clip_grads_with_norm_([module.arena.storage], 1.0, one.norm())
    torch.testing.assert_close(total.to_dense(), 2 * expected)
    same.mul_(5.0)
    torch.testing.assert_close(held.to_dense(), expected)
    torch.testing.assert_close(same.to_dense(), 5 * expected)
    torch.testing.assert_close(one.norm(), torch.ones_like(one.norm()))


def test_a_norm_is_read_of_the_listed_rows(backend, monkeypatch):
    """Nothing as long as the arena is made for what training loops call."""
    module = make(backend=backend)
    _rows = build("sgd", module)
    for ids, weight in batches(2):
        loss_of(module, ids, weight).backward()
    grad = rows_grad(module)
    expected = grad.to_dense()
    monkeypatch.setattr(RowGradient, "to_dense", None)
    for order in (1, 2, 3.5, float("inf")):
        torch.testing.assert_close(grad.norm(order), expected.norm(order))
    norm = nn.utils.clip_grad_norm_([module.arena.storage], 1.0)
    torch.testing.assert_close(norm, expected.norm())
    torch.testing.assert_close(nn.utils.get_total_norm([grad]), torch.ones_like(norm))
    nn.utils.clip_grad_value_([module.arena.storage], 0.01)
    assert float(grad.norm(float("inf"))) == 0.01


def test_hooks(backend):
    """Hooks of the rows' Parameter see the gradient, and may replace it."""
    module, other = make(backend=backend), make(backend=backend)
    _rows = build("sgd", module)
    seen = []
    module.arena.storage.register_hook(lambda g: g * 0.5)
    module.arena.storage.register_post_accumulate_grad_hook(lambda p: seen.append(type(p.grad)))
    for ids, weight in batches(2):
        loss_of(module, ids, weight).backward()
        loss_of(other, ids, weight).backward()
    assert seen == [RowGradient, RowGradient]
    torch.testing.assert_close(2 * rows_grad(module).to_dense(), rows_grad(other))


def test_gradients_that_are_no_row_gradients(backend):
    """Dense ones, sparse ones and second derivatives step every row that they are of."""
    module, other = make(backend=backend), make(backend=backend)
    optimizers = build("sgd", module), build("sgd", other)
    (ids, weight), (others, more) = batches(2)
    for _ in range(2):
        loss_of(module, ids, weight).backward()
        loss_of(other, ids, weight).backward()
        module.arena.storage.grad = rows_grad(module).to_dense()
        loss_of(module, others, more).backward()
        loss_of(other, others, more).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(table_of(module), table_of(other))
    for table, optimizer in zip((module, other), optimizers, strict=True):
        (grad,) = torch.autograd.grad(
            loss_of(table, ids, weight), table.arena.storage, create_graph=True
        )
        penalty = grad.square().sum()
        penalty.backward()
        optimizer.step()
    torch.testing.assert_close(table_of(module), table_of(other))


def test_autograd_grad_changes_nothing(backend):
    module = make(backend=backend)
    _rows = build("adam", module)
    before = module.arena.storage.detach().clone()
    ids, weight = next(batches(1))
    wanted = module.arena.storage, module.chain
    rows, hops = torch.autograd.grad(loss_of(module, ids, weight), wanted)
    assert isinstance(rows, RowGradient) and not isinstance(hops, RowGradient)
    assert rows_grad(module) is None and torch.equal(module.arena.storage, before)


def test_tied_with_a_linear_layer(backend):
    """The Parameter's other use gives a dense gradient: every row steps."""
    module = make((DIM,), backend=backend)
    plain = plain_table(module)
    rows, dense = build("sgd", module), torch.optim.SGD(plain.parameters(), lr=0.1)
    for ids, weight in batches(3):
        for table in (module, plain):
            out = F.linear(table(ids), table.weight)
            (out.tanh() * weight.sum(1, keepdim=True)).mean().backward()
        for optimizer in (rows, dense):
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(module.weight, plain.weight)


@pytest.mark.parametrize("options", [{"padding_idx": 3}, {"scale_grad_by_freq": True}])
def test_options_of_the_module(options, backend):
    ours, other = make(backend=backend, **options), make(backend=backend, **options)
    _rows = build("adagrad", ours)
    for ids, weight in batches(2):
        ids[::4] = 3
        for module in (ours, other):
            loss_of(module, ids, weight).backward()
    torch.testing.assert_close(rows_grad(ours).to_dense(), rows_grad(other))
    torch.testing.assert_close(ours.chain.grad, other.chain.grad)


def test_no_ids(backend):
    module = make(backend=backend)
    rows = build("adam", module)
    before = table_of(module)
    none = torch.empty(0, dtype=torch.int64)
    for _ in range(2):
        module(none).sum().backward()
    for order in (1, 2, float("inf")):
        assert float(rows_grad(module).norm(order)) == 0
        assert nn.utils.get_total_norm([rows_grad(module)], order) == 0
    rows.step()
    assert torch.equal(table_of(module), before)
    ids, weight = next(batches(1))
    loss_of(module, ids, weight).backward()
    rows.step()
    assert not torch.equal(table_of(module), before)


def test_bags_and_collections():
    torch.manual_seed(0)
    bag = ResizableEmbeddingBag(50, sizes=(2, 4), mode="sum")
    tables = ResizableEmbeddingCollection({"user": 30, "item": 20}, sizes=(2, 4))
    rows = optim.Adam([bag, tables.rows], lr=0.1, deferred=True)
    before = bag.weight.detach().clone(), tables.rows.weight.detach().clone()
    for _ in range(2):
        bag(torch.tensor([[1, 2], [3, 3]])).sum().backward()
        tables({"user": torch.tensor([4]), "item": torch.tensor([4, 5])})["item"].sum().backward()
    rows.step()
    changed = [
        (new.weight.detach() != old).any(1).nonzero()[:, 0].tolist()
        for new, old in zip((bag, tables.rows), before, strict=True)
    ]
    # A user's row has a zero gradient: its moments are zero, and it stays.
    assert changed == [[1, 2, 3], [34, 35]]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled(backend):
    """A graph break, as with other gradients that hold rows; the same numbers."""
    torch.compiler.reset()
    module, other = make(backend=backend), make(backend=backend)
    optimizers = build("sgd", module), build("sgd", other)
    compiled = torch.compile(lambda ids, weight: loss_of(module, ids, weight), backend="eager")
    for ids, weight in batches(2):
        compiled(ids, weight).backward()
        loss_of(other, ids, weight).backward()
        assert isinstance(rows_grad(module), RowGradient)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(table_of(module), table_of(other))


def test_a_checkpoint_goes_on(backend):
    module = make(backend=backend)
    rows = build("adam", module)
    steps = list(batches(6))

    def train(table, optimizer, some):
        for ids, weight in some:
            loss_of(table, ids, weight).backward()
            optimizer.step()
            optimizer.zero_grad()

    train(module, rows, steps[:3])
    copied = make(backend=backend, seed=5)
    copied.load_state_dict(module.state_dict())
    again = build("adam", copied)
    again.load_state_dict(rows.state_dict())
    train(module, rows, steps[3:])
    train(copied, again, steps[3:])
    assert torch.equal(table_of(module), table_of(copied))


@pytest.mark.parametrize("sizes", [SIZES, (DIM,)], ids=["ragged", "one size"])
def test_another_optimizer_of_the_rows_is_refused(sizes, backend):
    """It would step the rows a second time; nothing is changed."""
    module = make(sizes, backend=backend)
    rows, dense = build("sgd", module), torch.optim.SGD(module.parameters(), lr=0.1)
    ids, weight = next(batches(1))
    loss_of(module, ids, weight).backward()
    before = table_of(module)
    with pytest.raises(RuntimeError, match="a deferred SGD steps: build it on the parameters"):
        dense.step()
    assert torch.equal(table_of(module), before)
    rows.step()
    rows.zero_grad()
    dense.step()  # the hops; the rows have no gradient any more


def test_an_immediate_optimizer_leaves_dense_gradients_to_others(backend):
    """Those of a tied layer, which it does not step."""
    module = make((DIM,), backend=backend)
    _rows, dense = build("sgd", module, deferred=False), torch.optim.SGD([module.weight], lr=0.1)
    ids = torch.tensor([3, 5])
    F.linear(module(ids), module.weight).sum().backward()
    before = table_of(module)
    dense.step()
    assert (table_of(module) != before).any(1).all()


def test_detached(backend):
    """Left by its optimizer, a module has dense gradients again."""
    module = make(backend=backend)
    rows = build("sgd", module)
    rows.detach()
    ids, weight = next(batches(1))
    loss_of(module, ids, weight).backward()
    assert type(rows_grad(module)) is torch.Tensor
    before = table_of(module)
    rows.step()
    assert torch.equal(table_of(module), before)


def test_backend_changed_between_passes():
    """Gradients collected by different backends add up."""
    module, other = make(backend="torch"), make(backend="torch")
    optimizers = build("adam", module), build("adam", other)
    for backend, (ids, weight) in zip(("torch", "native", "auto"), batches(3), strict=True):
        module.backend = backend
        loss_of(module, ids, weight).backward()
        loss_of(other, ids, weight).backward()
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(table_of(module), table_of(other))
