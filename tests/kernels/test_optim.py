"""optim.py: fused training equals torch.optim, and the definition of each rule."""

import copy
import gc
import io
import pickle

import pytest
import torch

from esapn_kernels import ResizableEmbedding, optim
from esapn_kernels.reference import promote_reference, split_chain, update_reference
from esapn_kernels.testing import row_elements
from tests.kernels.layouts import TINY as SIZES

BETAS, EPS = (0.8, 0.95), 1e-3
KINDS = {
    "sgd": (optim.SGD, {"lr": 0.1}),
    "adagrad": (optim.Adagrad, {"lr": 0.1, "eps": EPS, "initial_accumulator_value": 0.5}),
    "rowwise_adagrad": (
        optim.Adagrad,
        {"lr": 0.1, "eps": EPS, "initial_accumulator_value": 0.5, "rowwise": True},
    ),
    "adam": (optim.Adam, {"lr": 0.1, "betas": BETAS, "eps": EPS}),
    "rowwise_adam": (
        optim.AdamW,
        {"lr": 0.1, "betas": BETAS, "eps": EPS, "rowwise": True, "weight_decay": 0.3},
    ),
}
every_kind = pytest.mark.parametrize("rule", KINDS)
# Those with state: the others have nothing to move.
stateful = pytest.mark.parametrize("rule", list(KINDS)[1:])


def make(n_rows=40, sizes=SIZES, dtype=torch.float64, seed=1, **options):
    torch.manual_seed(seed)
    initial = torch.tensor(sizes)[torch.arange(n_rows) % max(len(sizes) - 1, 1)]
    return ResizableEmbedding(n_rows, sizes=sizes, initial_size=initial, dtype=dtype, **options)


def build(rule, module, **changes):
    kind, options = KINDS[rule]
    return kind(module, **{**options, **changes})


def batch(module, n_ids, generator, n_rows=None):
    """Ids with duplicates, and an upstream gradient."""
    n_rows = n_rows or module.num_embeddings
    ids = torch.randint(n_rows, (n_ids,), generator=generator)
    grad = torch.randn(n_ids, module.embedding_dim, generator=generator, dtype=torch.float64)
    return ids, grad.to(module.chain.dtype)


def backward(module, ids, grad_out):
    """A loss that is not linear in the rows."""
    out = module(ids)
    loss = (torch.sin(out) * grad_out).sum()
    loss.backward()
    return float(loss.detach())


def own_state(optimizer, module):
    return optimizer.state[module.arena.storage]


class Plain:
    """A dict of separate rows with the rules' definition; its chain is stepped by plain SGD.

    On the host, wherever the module is.
    """

    def __init__(self, module, rule, ids):
        self.rule, self.sizes, self.step = rule, module.sizes, 0
        self.rows = {i: module.arena.read(i).cpu() for i in ids}
        self.chain = module.chain.detach().cpu().clone()
        self.state, self.last = {}, dict.fromkeys(ids, 0)
        for i in ids:
            self.reset(i)

    def reset(self, i):
        zero = torch.zeros_like(self.rows[i])
        fresh = {
            "sgd": (),
            "adagrad": (zero + 0.5,),
            "rowwise_adagrad": (torch.tensor(0.5, dtype=zero.dtype),),
            "adam": (zero, zero),
            "rowwise_adam": (zero, torch.zeros((), dtype=zero.dtype)),
        }
        self.state[i] = fresh[self.rule]

    def train(self, ids, grad_out, lr=0.1):
        self.step += 1
        leaves = {i: row.clone().requires_grad_() for i, row in self.rows.items()}
        chain = self.chain.clone().requires_grad_()
        hops = split_chain(chain, self.sizes)
        loss = 0.0
        for i, g in zip(ids, grad_out, strict=True):
            e = leaves[i]
            for w, b in hops[self.sizes.index(len(e)) :]:
                e = w @ e + b
            loss = loss + (torch.sin(e) * g).sum()
        loss.backward()
        self.chain = self.chain - 0.01 * chain.grad
        for i in set(ids):
            self.rows[i], self.state[i] = update_reference(
                self.rule,
                self.rows[i],
                leaves[i].grad,
                self.state[i],
                lr=lr,
                eps=EPS,
                betas=BETAS,
                step=self.step,
                last_step=self.last[i],
                decay=0.3 if self.rule == "rowwise_adam" else 0.0,
            )
            self.last[i] = self.step
        return float(loss.detach())

    def promote(self, ids):
        for i in set(ids) & set(self.rows):
            level = self.sizes.index(len(self.rows[i]))
            if level + 1 < len(self.sizes):
                self.rows[i] = promote_reference(self.rows[i], level, self.chain, self.sizes)
                self.reset(i)


@pytest.mark.parametrize("deferred", [False, True], ids=["immediate", "deferred"])
@every_kind
def test_a_run_equals_the_definition(rule, deferred, backend, device):
    """Rows that come and go, that are resized, an arena that grows and is compacted."""
    n_rows = 400
    module = make(n_rows, backend=backend, device=device)
    rows = build(rule, module, deferred=deferred)
    dense = torch.optim.SGD([module.chain], lr=0.01)
    watched = list(range(0, n_rows, n_rows // 9))
    plain = Plain(module, rule, watched)
    generator = torch.Generator().manual_seed(2)
    storage, capacities = module.arena.storage, set()
    for step in range(8):
        choice, grad_out = batch(module, 8, generator, n_rows=len(watched))
        ids = torch.tensor(watched)[choice]
        dense.zero_grad()
        loss = backward(module, ids.to(device), grad_out.to(device))
        assert (storage.grad is not None) == deferred
        assert loss == pytest.approx(plain.train(ids.tolist(), grad_out), rel=1e-9, abs=1e-9)
        dense.step()
        rows.step()
        rows.zero_grad()
        if step in (1, 3, 4):
            moving = torch.cat([torch.tensor(watched[step::2]), torch.arange(150)])
            module.promote(moving.to(device))
            plain.promote(moving.tolist())
        if step in (2, 4):
            module.compact()
        capacities.add(storage.numel())
        for i in watched:
            row = module.arena.read(i).cpu()
            torch.testing.assert_close(row, plain.rows[i], rtol=1e-9, atol=1e-9, msg=f"{step}, {i}")
    assert module.arena.storage is storage and len(capacities) >= 3
    torch.testing.assert_close(module.chain.detach().cpu(), plain.chain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "fused, dense, options, every_row",
    [
        (optim.SGD, torch.optim.SGD, {"lr": 0.1}, False),
        (optim.Adagrad, torch.optim.Adagrad, {"lr": 0.1}, False),
        (optim.Adagrad, torch.optim.Adagrad, {"initial_accumulator_value": 0.2}, False),
        (optim.Adam, torch.optim.Adam, {"lr": 0.1}, True),
        (optim.Adam, torch.optim.Adam, {"betas": (0.5, 0.7), "eps": 1e-3}, True),
        (optim.SGD, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.3}, True),
        (optim.Adagrad, torch.optim.Adagrad, {"lr": 0.1, "weight_decay": 0.3}, True),
        (optim.Adam, torch.optim.Adam, {"lr": 0.1, "weight_decay": 0.3}, True),
        (optim.AdamW, torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.3}, True),
        (optim.AdamW, torch.optim.AdamW, {}, True),
    ],
    ids=[
        "sgd",
        "adagrad",
        "adagrad-start",
        "adam",
        "adam-options",
        "sgd-decay",
        "adagrad-decay",
        "adam-decay",
        "adamw",
        "adamw-default",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_same_steps_as_torch_optim(fused, dense, options, every_row, dtype):
    module, twin = make(dtype=dtype), make(dtype=dtype)
    rows = fused(module, **options)
    chain = dense([module.chain], **options)
    whole = dense(twin.parameters(), **options)
    generator = torch.Generator().manual_seed(3)
    for _ in range(6):
        ids, _ = batch(module, 15, generator)
        if every_row:
            ids = torch.cat([torch.arange(module.num_embeddings), ids])
        grad_out = torch.randn(len(ids), SIZES[-1], generator=generator).to(dtype)
        for m, optimizers in ((module, (rows, chain)), (twin, (whole,))):
            backward(m, ids, grad_out)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    tight = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {}
    used = row_elements(module, torch.arange(module.num_embeddings))
    for a, b in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, **tight)
    for name in {"sum", "exp_avg", "exp_avg_sq"} & own_state(whole, twin).keys():
        mine, theirs = own_state(rows, module)[name], own_state(whole, twin)[name]
        torch.testing.assert_close(mine[used], theirs[used], **tight)


def test_adam_moments_of_skipped_rows_are_those_of_dense_adam():
    """The gradient must not depend on the rows, which differ: a linear loss, a chain that stays."""
    module, twin = make(), make()
    rows = optim.Adam(module, betas=BETAS)
    whole = torch.optim.Adam([twin.arena.storage], betas=BETAS)
    generator = torch.Generator().manual_seed(4)
    for _ in range(12):
        ids, grad_out = batch(module, 6, generator, n_rows=30)  # ten rows never come
        for m in (module, twin):
            m(ids).backward(grad_out)
        whole.step()
        whole.zero_grad()
    state = own_state(rows, module)
    age = float(state["clock"][0]) - state["last_step"].double()
    assert state["clock"].tolist() == pytest.approx([12, 0.8**12, 0.95**12], rel=1e-12)
    assert age.unique().numel() > 3
    for name, beta in zip(("exp_avg", "exp_avg_sq"), BETAS, strict=True):
        expected = own_state(whole, twin)[name]
        for i in range(module.num_embeddings):
            mine = row_elements(module, torch.tensor([i]))
            now = state[name][mine] * beta ** age[i]
            torch.testing.assert_close(now, expected[mine], rtol=1e-12, atol=1e-15)
            assert (expected[mine] != 0).all() == (i < 30 and state["last_step"][i] > 0)
    # Where a row did not come, it is where it was, to the last bit.
    never = row_elements(module, torch.arange(30, 40))
    assert torch.equal(module.arena.storage[never], make().arena.storage[never])


@every_kind
def test_rows_that_were_not_looked_up_keep_every_bit(rule, backend, device):
    module = make(backend=backend, device=device)
    optimizer = build(rule, module)
    before = module.arena.storage.detach().clone()
    state = {k: v.clone() for k, v in optimizer.state.get(module.arena.storage, {}).items()}
    # Adam's kernels read numbers per id: by ids of 32 bits too.
    index = torch.int32 if rule.endswith("adam") else torch.int64
    ids = torch.tensor([[3, 7, 3]], dtype=index, device=device)
    backward(module, ids, torch.ones(1, 3, SIZES[-1], dtype=torch.float64, device=device))
    touched = row_elements(module, ids)
    assert torch.equal(module.arena.storage[~touched], before[~touched])
    assert (module.arena.storage[touched] != before[touched]).all()
    for name, fresh in state.items():
        now = own_state(optimizer, module)[name]
        if name in optimizer.state_per_element:
            assert torch.equal(now[~touched], fresh[~touched]) and (now != fresh)[touched].all()
        elif name in optimizer.state_per_id:
            assert (now != fresh).nonzero()[:, 0].tolist() == [3, 7]


@stateful
def test_state_of_moved_rows_starts_afresh_and_others_keep_every_bit(rule, backend, device):
    n_rows = 300
    module = make(n_rows, backend="torch", device=device)
    optimizer = build(rule, module)
    everything = torch.arange(n_rows, device=device)
    grad_out = torch.ones(n_rows, SIZES[-1], dtype=torch.float64, device=device)
    for _ in range(2):
        backward(module, everything, grad_out)
    moving, staying = everything[: n_rows // 2], everything[n_rows // 2 :]
    before = {key: value.clone() for key, value in own_state(optimizer, module).items()}
    mask, capacity = row_elements(module, staying), module.arena.storage.numel()
    order = module.arena.row_start[:-1].tolist()
    fresh = 0.5 if "adagrad" in rule else 0.0

    def check(unmoved):
        for name in optimizer.state_per_element:
            value = own_state(optimizer, module)[name]
            assert value.shape == module.arena.storage.shape
            assert (value[row_elements(module, moving)] == fresh).all(), name
            assert (before[name][mask] != fresh).all(), name
            for i in staying[::17].tolist():
                start, dim = int(module.arena.row_start[i]), int(module.sizes_of()[i])
                expected = before[name][order[i] : order[i] + dim]
                assert torch.equal(value[start : start + dim], expected), (name, i)
        starts = module.arena.row_start[staying].tolist()
        assert (starts == order[n_rows // 2 :]) == unmoved
        for name in optimizer.state_per_id:
            value = own_state(optimizer, module)[name]
            assert value.shape == (n_rows,) and (value[moving] == fresh).all(), name
            assert torch.equal(value[staying], before[name][staying]), name
            assert (before[name] != fresh).all(), name

    module.backend = backend
    module.promote(moving)
    assert module.arena.storage.numel() > capacity
    check(unmoved=True)
    module.compact()
    check(unmoved=False)
    if rule.endswith("adam"):
        assert torch.equal(own_state(optimizer, module)["clock"], before["clock"])


def test_a_row_that_is_freed_and_inserted_starts_afresh():
    module = make()
    optimizer = build("rowwise_adagrad", module)
    backward(module, torch.arange(40), torch.ones(40, SIZES[-1], dtype=torch.float64))
    sums = own_state(optimizer, module)["sum"].clone()
    module.arena.free(torch.tensor([3, 5]))
    module.arena.insert(torch.tensor([5]), 1)
    now = own_state(optimizer, module)["sum"]
    assert now[5] == 0.5 and sums[5] != 0.5
    assert torch.equal(now[torch.arange(40) != 5], sums[torch.arange(40) != 5])


@pytest.mark.parametrize("sizes, n_rows", [((1,), 3), ((3,), 1), ((1, 2), 2)])
def test_state_is_not_taken_for_what_has_its_length(sizes, n_rows):
    """Tables so small that the clock, or one number per id, is as long as the arena."""
    for rule in ("rowwise_adagrad", "adam", "rowwise_adam"):
        module = make(n_rows, sizes)
        optimizer = build(rule, module)
        grad_out = torch.ones(n_rows, sizes[-1], dtype=torch.float64)
        backward(module, torch.arange(n_rows), grad_out)
        before = {key: value.clone() for key, value in own_state(optimizer, module).items()}
        optimizer.step()
        module.compact()
        for _ in sizes[1:]:
            module.promote(torch.zeros(0, dtype=torch.long))
        found = [id(c.tensor) for c in module.arena.followers.per_element()]
        for name, value in own_state(optimizer, module).items():
            assert torch.equal(value, before[name]), (rule, name)
            assert (id(value) in found) == (name in optimizer.state_per_element)


@every_kind
def test_state_of_16_bit_rows_is_fp32(rule):
    module = make(dtype=torch.bfloat16)
    optimizer = build(rule, module)
    for name, value in optimizer.state.get(module.arena.storage, {}).items():
        expected = {"last_step": torch.int32, "clock": torch.float64}.get(name, torch.float32)
        assert value.dtype == expected and value.device == module.arena.storage.device
    capacity, n_rows = module.arena.storage.numel(), module.num_embeddings
    per_rule = {
        "sgd": 0,
        "adagrad": 4 * capacity,
        "rowwise_adagrad": 4 * n_rows,
        "adam": 8 * capacity + 4 * n_rows,
        "rowwise_adam": 4 * capacity + 8 * n_rows,
    }
    assert module.memory_report().optimizer == per_rule[rule]
    module.promote(torch.arange(n_rows))
    backward(module, torch.arange(n_rows), torch.ones(n_rows, SIZES[-1], dtype=torch.bfloat16))
    assert module.arena.storage.isfinite().all()


@every_kind
@pytest.mark.parametrize("steps", [True, False], ids=["step", "no-step"])
def test_schedules(rule, steps):
    """A scheduler sets ``lr``; backward takes it whether or not ``step`` was called."""
    module = make()
    optimizer = build(rule, module)
    plain = Plain(module, rule, range(module.num_embeddings))
    dense = torch.optim.SGD([module.chain], lr=0.01)
    if steps:
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    generator = torch.Generator().manual_seed(5)
    for step in range(5):
        ids, grad_out = batch(module, 9, generator)
        dense.zero_grad()
        backward(module, ids, grad_out)
        plain.train(ids.tolist(), grad_out, lr=0.1 * 0.5 ** (step // 2))
        dense.step()
        if steps:
            optimizer.step()
            scheduler.step()
        elif step % 2:
            optimizer.param_groups[0]["lr"] *= 0.5
    for i, row in plain.rows.items():
        torch.testing.assert_close(module.arena.read(i), row, rtol=1e-9, atol=1e-9)


@every_kind
def test_step_brings_lr_and_touches_nothing(rule):
    module = make()
    optimizer = build(rule, module)
    backward(module, torch.arange(5), torch.ones(5, SIZES[-1], dtype=torch.float64))
    before = copy.deepcopy([module.state_dict(), optimizer.state_dict()["state"]])
    numbers = optimizer.begin_step(module.arena.storage).numbers
    optimizer.param_groups[0]["lr"] = 0.025
    assert optimizer.step(lambda: torch.is_grad_enabled()) is True
    optimizer.zero_grad()
    assert numbers.dtype == torch.float64 and float(numbers[5]) == 0.025
    after = [module.state_dict(), optimizer.state_dict()["state"]]
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@every_kind
def test_two_modules(rule):
    first, second = make(seed=1), make(seed=2)
    optimizer = build(rule, [first, second])
    alone, other = make(seed=1), make(seed=2)
    separate = build(rule, alone), build(rule, other)
    generator = torch.Generator().manual_seed(6)
    for step in range(4):
        for a, b in ((first, alone), (second, other))[: 1 + step % 2]:
            ids, grad_out = batch(a, 9, generator)
            backward(a, ids, grad_out)
            backward(b, ids, grad_out)
    for a, b, single in ((first, alone, separate[0]), (second, other, separate[1])):
        assert torch.equal(a.arena.storage, b.arena.storage)
        assert a.arena.fused_optimizer is optimizer and b.arena.fused_optimizer is single
        for name, value in optimizer.state.get(a.arena.storage, {}).items():
            assert torch.equal(value, own_state(single, b)[name])


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_goes_on_bit_for_bit(rule, dtype):
    n_rows = 300
    module = make(n_rows, dtype=dtype)
    optimizer = build(rule, module)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.3)
    generator = torch.Generator().manual_seed(7)

    def train(m, o, s, steps):
        for ids, grad_out in steps:
            backward(m, ids, grad_out)
            o.step()
            s.step()

    steps = [batch(module, 50, generator) for _ in range(6)]
    train(module, optimizer, scheduler, steps[:3])
    module.promote(torch.arange(n_rows // 2))  # the arena grows
    train(module, optimizer, scheduler, steps[3:4])
    file = io.BytesIO()
    torch.save([x.state_dict() for x in (module, optimizer, scheduler)], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    resumed = make(n_rows, dtype=dtype, seed=9)
    # Other arguments: the checkpoint's are taken.
    changes = {"lr": 0.7, "weight_decay": 0.9, "clip_row_norm": 0.1}
    changes |= {} if rule == "sgd" else {"eps": 0.1}
    again = build(rule, resumed, **changes)
    follow = torch.optim.lr_scheduler.StepLR(again, 2, gamma=0.3)
    own = dict(again.state.get(resumed.arena.storage, {}))
    for x, state in zip((resumed, again, follow), saved, strict=True):
        x.load_state_dict(state)
    assert own.keys() == again.state.get(resumed.arena.storage, {}).keys()
    for name, value in own_state(again, resumed).items():
        theirs = own_state(optimizer, module)[name]
        assert value.dtype == theirs.dtype and torch.equal(value, theirs), name
        # A captured graph reads the tensors it saw; only growth replaces them.
        assert value is own[name] or name in again.state_per_element
    train(module, optimizer, scheduler, steps[4:])
    train(resumed, again, follow, steps[4:])
    assert torch.equal(resumed.arena.storage, module.arena.storage)
    for name, value in own_state(again, resumed).items():
        assert torch.equal(value, own_state(optimizer, module)[name]), name


def test_state_that_does_not_fit_is_refused():
    module, grown = make(300), make(300)
    optimizer, saved = build("adam", module), build("adam", grown, lr=0.3)
    grown.promote(torch.arange(300))
    backward(grown, torch.arange(300), torch.ones(300, SIZES[-1], dtype=torch.float64))
    before = copy.deepcopy(optimizer.state_dict())
    for state in (
        saved.state_dict(),
        build("adagrad", make(300)).state_dict(),
        {**saved.state_dict(), "state": {}},
    ):
        with pytest.raises(ValueError, match=r"does not fit Adam's .*load the module first$"):
            optimizer.load_state_dict(state)
        assert optimizer.state_dict()["param_groups"] == before["param_groups"]
        torch.testing.assert_close(optimizer.state_dict()["state"], before["state"])
    two = build("adam", [make(300), make(300)]).state_dict()
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        optimizer.load_state_dict(two)
    torch.testing.assert_close(optimizer.state_dict()["state"], before["state"])
    module.load_state_dict(grown.state_dict())
    optimizer.load_state_dict(saved.state_dict())
    torch.testing.assert_close(optimizer.state_dict()["state"], saved.state_dict()["state"])


@every_kind
def test_copies_are_attached_to_nothing(rule):
    module = make()
    optimizer = build(rule, module)
    ids, grad_out = torch.arange(5), torch.ones(5, SIZES[-1], dtype=torch.float64)
    backward(module, ids, grad_out)
    before = module.arena.storage.detach().clone()
    both = copy.deepcopy((module, optimizer))
    for duplicate, other in (
        both,
        (copy.deepcopy(module), copy.deepcopy(optimizer)),
        (pickle.loads(pickle.dumps(module)), pickle.loads(pickle.dumps(optimizer))),
    ):
        assert duplicate.arena.fused_optimizer is None and other.rule == rule
        backward(duplicate, ids, grad_out)
        other.step()
        other.detach()
        assert duplicate.arena.storage.grad is not None
        assert torch.equal(duplicate.arena.storage, before)
        duplicate.promote(torch.arange(40))
        renewed = build(rule, duplicate)
        assert duplicate.arena.fused_optimizer is renewed
    assert module.arena.fused_optimizer is optimizer
    assert torch.equal(module.arena.storage, before)


def test_one_at_a_time():
    module = make()
    ids, grad_out = torch.arange(5), torch.ones(5, SIZES[-1], dtype=torch.float64)
    first = optim.SGD(module, lr=0.1)
    with pytest.raises(ValueError, match=r"already has a fused optimizer, SGD: .* detach\(\)"):
        optim.Adam([make(), module])
    assert module.arena.fused_optimizer is first
    first.detach()
    first.detach()
    assert module.arena.fused_optimizer is None
    backward(module, ids, grad_out)
    assert module.arena.storage.grad is not None
    module.zero_grad()
    second = optim.Adam(module)
    first.detach()  # not its own any more
    assert module.arena.fused_optimizer is second
    scheduler = torch.optim.lr_scheduler.StepLR(second, 1)
    del second, scheduler
    gc.collect()
    assert module.arena.fused_optimizer is None and not list(module.arena.followers.per_element())
    third = build("adam", module)
    out = module(ids)
    third.detach()
    third.step()  # does not follow the rows again
    assert not list(module.arena.followers.per_element())
    with pytest.raises(RuntimeError, match="detached between forward and backward"):
        out.backward(grad_out)


@every_kind
def test_rows_that_moved_under_a_lookup_are_noticed(rule):
    module = make()
    optimizer = build(rule, module)
    first, second = module(torch.arange(3)), module(torch.arange(2, 5))
    second.sum().backward()
    before = copy.deepcopy([module.state_dict(), optimizer.state_dict()])
    with pytest.raises(RuntimeError, match="look up all ids of a step in one call"):
        first.sum().backward()
    torch.testing.assert_close([module.state_dict(), optimizer.state_dict()], before)


def test_derivatives_of_other_weights_by_torch_func():
    module, ids = make(), torch.arange(3)
    weight = torch.randn(SIZES[-1], dtype=torch.float64)

    def loss(weight):
        return (module(ids) @ weight).sum()

    expected = module(ids).sum(0).detach()
    before = copy.deepcopy(module.state_dict())
    optimizer = optim.SGD(module, lr=0.1)
    assert torch.equal(torch.func.grad(loss)(weight), expected)
    tangent = torch.func.jvp(loss, (weight,), (weight,))[1]
    torch.testing.assert_close(tangent, expected @ weight)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    assert module.arena.fused_optimizer is optimizer


def test_a_storage_that_was_replaced_is_noticed():
    module = make()
    optimizer = optim.SGD(module, lr=0.1)
    module.arena.storage = torch.nn.Parameter(module.arena.storage.detach().clone())
    with pytest.raises(RuntimeError, match="build the optimizer last"):
        backward(module, torch.arange(2), torch.ones(2, SIZES[-1], dtype=torch.float64))
    assert optimizer.param_groups


@pytest.mark.parametrize(
    "kind, options, error, match",
    [
        (optim.SGD, {"lr": -0.1}, ValueError, "Invalid learning rate: -0.1"),
        (optim.SGD, {"lr": float("nan")}, ValueError, "Invalid learning rate: nan"),
        (optim.SGD, {"lr": "1"}, TypeError, "not supported between"),
        (optim.Adagrad, {"lr": -1}, ValueError, "Invalid learning rate: -1"),
        (optim.Adagrad, {"eps": -1}, ValueError, "Invalid epsilon value: -1"),
        (
            optim.Adagrad,
            {"initial_accumulator_value": -1},
            ValueError,
            "Invalid initial_accumulator_value value: -1",
        ),
        (optim.Adam, {"lr": -1}, ValueError, "Invalid learning rate: -1"),
        (optim.Adam, {"eps": -1}, ValueError, "Invalid epsilon value: -1"),
        (optim.Adam, {"betas": (1.0, 0.9)}, ValueError, "beta parameter at index 0: 1.0"),
        (optim.Adam, {"betas": (0.9, -0.1)}, ValueError, "beta parameter at index 1: -0.1"),
    ],
)
def test_bad_arguments(kind, options, error, match):
    module = make()
    with pytest.raises(error, match=match):
        kind(module, **options)
    assert module.arena.fused_optimizer is None and not list(module.arena.followers.per_element())


@pytest.mark.parametrize(
    "others, error, match",
    [
        (lambda m: [m, torch.nn.Embedding(3, 2)], TypeError, "ResizableEmbedding, got Embedding"),
        (lambda m: [m, m.arena.storage], TypeError, "ResizableEmbedding, got Parameter"),
        (lambda m: [m, ResizableEmbedding(0)], ValueError, "without rows"),
        (lambda m: [m, m], ValueError, "the same ResizableEmbedding twice"),
        (lambda m: [], ValueError, "empty module list"),
        (lambda m: m.arena, TypeError, "iterable of them, but got Arena"),
    ],
)
def test_bad_modules(others, error, match):
    module = make()
    with pytest.raises(error, match=match):
        optim.Adam(others(module))
    assert module.arena.fused_optimizer is None and not list(module.arena.followers.per_element())


def test_one_parameter_group():
    module = make()
    optimizer = optim.SGD(module, lr=0.1)
    with pytest.raises(TypeError, match="one parameter group"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})
    assert len(optimizer.param_groups) == 1


@every_kind
@pytest.mark.parametrize("bad", [-1, 40])
def test_ids_out_of_range_change_nothing(rule, bad):
    module = make()
    optimizer = build(rule, module)
    before = copy.deepcopy([module.state_dict(), optimizer.state_dict()])
    with pytest.raises(IndexError, match="index out of range in self"):
        module(torch.tensor([1, bad])).sum().backward()
    torch.testing.assert_close([module.state_dict(), optimizer.state_dict()], before)


@every_kind
def test_a_batch_of_nothing_is_a_step(rule, backend, device):
    module = make(backend=backend, device=device)
    optimizer = build(rule, module)
    before = module.arena.storage.detach().clone()
    module(torch.zeros(0, dtype=torch.long, device=device)).sum().backward()
    assert torch.equal(module.arena.storage, before)
    if rule.endswith("adam"):
        assert own_state(optimizer, module)["clock"].tolist() == [1.0, *BETAS]
