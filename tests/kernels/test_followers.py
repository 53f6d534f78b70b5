"""followers.py: optimizer state follows its rows; a training run equals one without an arena."""

import copy
import gc
import math

import pytest
import torch

from esapn_kernels import ResizableEmbedding
from esapn_kernels.reference import promote_reference, split_chain
from esapn_kernels.testing import row_elements
from tests.kernels.layouts import TINY as SIZES

N_ROWS = 9000  # several pages of each size: promotions make the arena grow
CASES = {
    "adam": (torch.optim.Adam, {"lr": 0.05}),
    "adam-amsgrad": (torch.optim.Adam, {"lr": 0.05, "amsgrad": True}),
    "adamw": (torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.1}),
    "sgd-momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1, "initial_accumulator_value": 0.5}),
}
every_optimizer = pytest.mark.parametrize(
    "kind, options", CASES.values(), ids=[key.replace("_", "-") for key in CASES]
)


class Plain:
    """A dict of separate rows, the chain, and each optimizer's published update, in fp64."""

    def __init__(self, module, ids, kind, options):
        self.kind, self.options, self.sizes = kind, options, module.sizes
        self.ids, self.steps, self.state = ids, 0, {}
        self.values = {i: module.arena.read(i) for i in ids}
        self.values["chain"] = module.chain.detach().clone()
        self.grads = {}
        for key in self.values:
            self.reset(key)

    def reset(self, key):
        zero = torch.zeros_like(self.values[key])
        start = self.options.get("initial_accumulator_value", 0.0)
        self.grads[key] = zero
        self.state[key] = {"m": zero, "v": zero, "vmax": zero, "sum": zero + start}

    def backward(self, ids, grad_out):
        leaves = {k: v.clone().requires_grad_() for k, v in self.values.items()}
        hops = split_chain(leaves["chain"], self.sizes)
        loss = 0.0
        for i, g in zip(ids, grad_out, strict=True):
            e = leaves[i]
            for w, b in hops[self.sizes.index(len(e)) :]:
                e = w @ e + b
            loss = loss + (torch.sin(e) * g).sum()
        grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        self.grads = dict(zip(leaves, grads, strict=True))
        return float(loss.detach())

    def step(self):
        self.steps += 1
        for key in self.values:
            self.values[key] = self.update(self.values[key], self.grads[key], self.state[key])

    def update(self, p, g, state):
        lr = self.options["lr"]
        if self.kind is torch.optim.SGD:
            state["m"] = 0.9 * state["m"] + g
            return p - lr * state["m"]
        if self.kind is torch.optim.Adagrad:
            state["sum"] = state["sum"] + g * g
            return p - lr * g / (state["sum"].sqrt() + 1e-10)
        if self.kind is torch.optim.AdamW:
            p = p * (1 - lr * 0.1)
        state["m"] = 0.9 * state["m"] + 0.1 * g
        state["v"] = 0.999 * state["v"] + 0.001 * g * g
        state["vmax"] = torch.maximum(state["vmax"], state["v"])
        v = state["vmax" if self.options.get("amsgrad") else "v"]
        correction = 1 - 0.9**self.steps, 1 - 0.999**self.steps
        denominator = v.sqrt() / math.sqrt(correction[1]) + 1e-8
        return p - lr / correction[0] * state["m"] / denominator

    def promote(self, ids):
        for i in set(ids) & set(self.ids):
            level = self.sizes.index(len(self.values[i]))
            if level + 1 < len(self.sizes):
                chain = self.values["chain"]
                self.values[i] = promote_reference(self.values[i], level, chain, self.sizes)
                self.reset(i)


def make(**options):
    torch.manual_seed(1)
    levels = torch.arange(N_ROWS) % 2
    sizes = torch.tensor(SIZES)[levels]
    return ResizableEmbedding(
        N_ROWS, sizes=SIZES, initial_size=sizes, dtype=torch.float64, **options
    )


def states(optimizer, module):
    """The state tensors of the storage's shape, by name."""
    storage = module.arena.storage
    found = {}
    for name, value in optimizer.state[storage].items():
        if isinstance(value, torch.Tensor) and value.shape == storage.shape:
            found[name] = value
    assert found
    return found


def train(module, optimizer, ids):
    optimizer.zero_grad()
    out = module(ids)
    (torch.sin(out)).sum().backward()
    optimizer.step()


@every_optimizer
def test_a_run_equals_one_without_an_arena(kind, options):
    module = make()
    watched = list(range(0, N_ROWS, N_ROWS // 11))
    plain = Plain(module, watched, kind, options)
    optimizer = kind(module.parameters(), **options)
    storage, capacities = module.arena.storage, set()
    generator = torch.Generator().manual_seed(2)
    for step in range(8):
        choice = torch.randint(len(watched), (10,), generator=generator)
        ids = torch.tensor(watched)[choice]
        grad_out = torch.randn(10, SIZES[-1], generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        loss = (torch.sin(module(ids)) * grad_out).sum()
        loss.backward()
        expected = plain.backward(ids.tolist(), grad_out)
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-9, abs=1e-9)
        if step in (2, 5):  # gradients are there: those of moved rows are gone, others stay
            moving = ids[:4]
            module.promote(moving)
            plain.promote(moving.tolist())
        optimizer.step()
        plain.step()
        if step in (1, 3):  # almost everything moves: the arena grows
            moving = torch.cat([torch.tensor(watched[::2]), torch.arange(3000)])
            module.promote(moving)
            plain.promote(moving.tolist())
        if step in (4, 6):
            module.compact()
        capacities.add(storage.numel())
        for i in watched:
            torch.testing.assert_close(
                module.arena.read(i), plain.values[i], rtol=1e-9, atol=1e-9, msg=f"{step}, {i}"
            )
    assert module.arena.storage is storage and len(capacities) >= 3
    torch.testing.assert_close(module.chain.detach(), plain.values["chain"], rtol=1e-9, atol=1e-9)


@every_optimizer
def test_moved_rows_start_afresh_and_others_keep_every_bit(kind, options):
    module = make()
    optimizer = kind(module.parameters(), **options)
    everything = torch.arange(N_ROWS)
    for _ in range(3):
        train(module, optimizer, everything)
    moving, staying = everything[: N_ROWS // 2], everything[N_ROWS // 2 :]
    before = {key: value.clone() for key, value in states(optimizer, module).items()}
    mask, capacity = row_elements(module, staying), module.arena.storage.numel()
    fresh = {key: 0.0 for key in before}
    if kind is torch.optim.Adagrad:
        fresh["sum"] = 0.5

    module.promote(moving)
    assert module.arena.storage.numel() > capacity
    after = states(optimizer, module)
    assert after.keys() == before.keys()
    for key, value in after.items():
        assert torch.equal(value[row_elements(module, staying)], before[key][mask]), key
        assert (value[row_elements(module, moving)] == fresh[key]).all(), key
        assert (before[key][mask] != fresh[key]).any(), key

    order = [int(s) for s in module.arena.layout.row_start]
    module.compact()
    assert [int(s) for s in module.arena.layout.row_start] != order
    for key, value in states(optimizer, module).items():
        for i in staying[::500].tolist():
            start, dim = int(module.arena.row_start[i]), int(module.sizes_of()[i])
            expected = before[key][order[i] : order[i] + dim]
            assert torch.equal(value[start : start + dim], expected), (key, i)
        assert (value[row_elements(module, moving)] == fresh[key]).all(), key
    train(module, optimizer, everything)


def test_state_bytes_are_reported():
    module = make()
    optimizer = torch.optim.Adam(module.parameters())
    assert module.memory_report().optimizer == 0
    train(module, optimizer, torch.arange(5))
    assert module.memory_report().optimizer == 2 * 8 * module.arena.storage.numel()
    module.promote(torch.arange(N_ROWS))
    assert module.memory_report().optimizer == 2 * 8 * module.arena.storage.numel()
    other = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    train(module, other, torch.arange(5))
    assert module.memory_report().optimizer == 3 * 8 * module.arena.storage.numel()


def test_two_optimizers_of_one_arena():
    module = make()
    adam = torch.optim.Adam(module.parameters())
    sgd = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    ids = torch.arange(N_ROWS)
    for optimizer in (adam, sgd):
        train(module, optimizer, ids)
    module.promote(ids[:4000])
    for optimizer in (adam, sgd):
        for value in states(optimizer, module).values():
            assert not value[row_elements(module, ids[:4000])].any()
            assert value[row_elements(module, ids[4000:])].any()
        train(module, optimizer, ids)


def test_an_optimizer_of_other_parameters_is_left_alone():
    module, other = make(), torch.nn.Linear(4, 4)
    chain_only = torch.optim.Adam([module.chain])
    elsewhere = torch.optim.Adam(other.parameters())
    train(module, chain_only, torch.arange(20))
    other(torch.ones(4)).sum().backward()
    elsewhere.step()
    before = copy.deepcopy((chain_only.state_dict(), elsewhere.state_dict()))
    module.promote(torch.arange(N_ROWS))
    module.compact()
    for optimizer, saved in zip((chain_only, elsewhere), before, strict=True):
        for key, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                assert torch.equal(value, saved["state"][key][name]), name
    assert module.memory_report().optimizer == 0


def test_arenas_of_one_optimizer_do_not_mix():
    first, second = make(), make()
    optimizer = torch.optim.Adam([*first.parameters(), *second.parameters()])
    ids = torch.arange(N_ROWS)
    (first(ids) + second(ids)).sum().backward()
    optimizer.step()
    before = {key: value.clone() for key, value in states(optimizer, second).items()}
    first.promote(ids)
    for key, value in states(optimizer, second).items():
        assert torch.equal(value, before[key])
    assert first.memory_report().optimizer > second.memory_report().optimizer


def test_the_last_loss_may_be_alive_when_the_arena_grows():
    """An old graph keeps its node for the storage, which knows the old shape."""
    module = make()
    calls = []
    module.arena.storage.register_post_accumulate_grad_hook(lambda p: calls.append(p.shape))
    module.arena.storage.register_hook(lambda g: calls.append(g.shape))
    losses = []
    for _ in range(2):
        losses.append(module(torch.arange(3)).sum())
        losses[-1].backward()
        module.zero_grad()
        module.promote(torch.arange(N_ROWS))
        losses.append(module(torch.arange(3)).sum())
        losses[-1].backward()
        module.zero_grad()
        module.compact()
    assert len(calls) == 8 and len(set(calls)) > 1


@pytest.mark.parametrize("move", ["promote", "promote-and-grow", "compact"])
def test_rows_that_move_before_backward_raise(move, backend, device):
    module = make(backend=backend, device=device)
    if move == "compact":  # a hole, so that a row moves
        module.arena.free(torch.arange(100, 101, device=device), backend=backend)
    out = module(torch.arange(3, device=device))
    if move == "compact":
        assert module.compact() > 0
    else:
        # Backend torch for the many: interpreted launches take long.
        module.backend = "torch"
        moving = N_ROWS if move == "promote-and-grow" else 1
        module.promote(torch.arange(moving, device=device))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_adagrad_that_never_stepped_follows_growth():
    """Adagrad makes its state when it is built, before any step tells of it."""
    module = make()
    optimizer = torch.optim.Adagrad(module.parameters(), initial_accumulator_value=0.5)
    module.promote(torch.arange(N_ROWS))
    train(module, optimizer, torch.arange(3))
    state = states(optimizer, module)["sum"]
    used = row_elements(module, torch.arange(3))
    assert (state[~used] == 0.5).all() and (state[used] > 0.5).all()


def test_loaded_state_follows_growth():
    module = make()
    optimizer = torch.optim.Adam(module.parameters())
    train(module, optimizer, torch.arange(N_ROWS))
    resumed = make()
    resumed.load_state_dict(module.state_dict())
    again = torch.optim.Adam(resumed.parameters())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((module, optimizer), (resumed, again)):
        m.promote(torch.arange(4000))
        train(m, o, torch.arange(N_ROWS))
    for i in range(0, N_ROWS, 97):
        assert torch.equal(module.arena.read(i), resumed.arena.read(i)), i


def test_loaded_state_of_rows_that_are_all_gone():
    module = make()
    optimizer = torch.optim.Adam(module.parameters())
    train(module, optimizer, torch.arange(3))
    resumed = make()
    resumed.load_state_dict(module.state_dict())
    again = torch.optim.Adam(resumed.parameters())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed.arena.free(torch.arange(N_ROWS))
    resumed.compact()
    again.step()
    assert again.state[resumed.arena.storage]["exp_avg"].shape == (0,)


def test_a_deleted_module_and_optimizer_are_forgotten():
    module = make()
    optimizer = torch.optim.Adam(module.parameters())
    train(module, optimizer, torch.arange(3))
    followers = module.arena.followers
    held = {id(module.arena.storage)}
    assert followers.holds_any(held) and len(list(followers.per_element())) == 3
    del optimizer
    gc.collect()
    assert [f.name for f in followers.per_element()] == ["grad"]
    del module
    gc.collect()
    assert not followers.holds_any(held)


def test_rprop_steps_of_a_moved_row_begin_at_the_learning_rate():
    """A step size of zero would keep the row where it is for ever."""
    module = make()
    optimizer = torch.optim.Rprop(module.parameters(), lr=0.01)
    everything = torch.arange(N_ROWS)
    for _ in range(3):
        train(module, optimizer, everything)
    moving = everything[: N_ROWS // 2]
    module.promote(moving)
    state = states(optimizer, module)
    rows = row_elements(module, moving)
    assert (state["step_size"][rows] == 0.01).all() and not state["prev"][rows].any()
    before = module.arena.storage.detach()[rows].clone()
    train(module, optimizer, everything)
    assert (module.arena.storage.detach()[rows] != before).all()
