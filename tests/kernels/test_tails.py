"""Tails: hops that keep a row's numbers and learn the appended ones, on every backend."""

import copy
import math
import pickle

import pytest
import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from esapn_kernels import (
    ResizableEmbedding,
    ResizableEmbeddingBag,
    ResizableEmbeddingCollection,
    optim,
)
from esapn_kernels.averaging import AveragedModel
from esapn_kernels.gpu import launch
from esapn_kernels.ops.chain import (
    chain_numel,
    expand_tails,
    full_chain,
    gather_tails,
    is_tails,
    operand_offsets,
    split_chain,
    tails_numel,
)
from esapn_kernels.ops.compose import ComposedCache, compose, compose_bwd
from esapn_kernels.ops.fit import level_maps
from esapn_kernels.ops.lookup import Options, lookup
from esapn_kernels.reference import lookup_reference, promote_reference
from esapn_kernels.reference import split_chain as split_reference
from esapn_kernels.testing import assert_matches, make_case
from tests.kernels.layouts import (
    DTYPES,
    HOSTS,
    NEEDS_NATIVE,
    ODD,
    PAPER,
    SMALL,
    TINY,
    compared,
    name,
)

LAYOUTS = [(SMALL, torch.float32), (TINY, torch.float64), (SMALL, torch.bfloat16)]
N = 24
IDS = torch.arange(N)


def mixed(sizes=SMALL, learnt=0.3, seed=0, **options):
    """A table of tails that are not zero, with rows of every size."""
    torch.manual_seed(seed)
    size = torch.tensor(sizes)[torch.arange(N) % len(sizes)]
    module = ResizableEmbedding(N, sizes=sizes, initial_size=size, init="tails", **options)
    with torch.no_grad():
        module.chain.normal_(std=learnt)
    return module


def rows_of(module):
    return [module.arena.read(i) for i in range(N)]


# The packed hops


@pytest.mark.parametrize("sizes", [PAPER, ODD, (3, 7), (1, 2, 9)], ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_they_expand_to_whole_hops(sizes, dtype):
    tails = torch.randn(tails_numel(sizes)).to(dtype)
    assert is_tails(tails, sizes) and tails_numel(sizes) < chain_numel(sizes)
    chain = expand_tails(tails, sizes)
    assert chain.shape == (chain_numel(sizes),) and chain.dtype == dtype
    assert not is_tails(chain, sizes) and full_chain(chain, sizes) is chain
    assert torch.equal(gather_tails(chain, sizes), tails)
    at = 0
    for (w, b), d, wide in zip(split_chain(tails, sizes), sizes, sizes[1:], strict=False):
        block = tails[at : at + (d + 1) * (wide - d)].view(d + 1, wide - d)
        at += block.numel()
        assert torch.equal(w[:d], torch.eye(d, dtype=dtype) * math.sqrt(wide / d))
        assert torch.equal(w[d:], block[:d].t()) and torch.equal(b[d:], block[d])
        assert not b[:d].any()
    for own, theirs in zip(split_chain(tails, sizes), split_reference(tails, sizes), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(own, theirs, strict=True))


def test_traced_code_expands_to_the_same_numbers():
    tails = torch.randn(tails_numel(ODD))
    expanded, weights = expand_tails(tails, ODD), torch.randn(chain_numel(ODD))
    whole, pull = torch.func.vjp(lambda t: expand_tails(t, ODD), tails)
    assert torch.equal(whole, expanded)
    assert torch.equal(pull(weights)[0], gather_tails(weights, ODD))
    gathered = torch.func.vmap(lambda c: gather_tails(c, ODD))(torch.stack([whole, weights]))
    assert torch.equal(gathered, torch.stack([tails, gather_tails(weights, ODD)]))


@pytest.mark.parametrize("init", ["linear", "isometric", "padded", "tails"])
def test_the_length_tells_the_kind(init):
    chain = ResizableEmbedding(3, sizes=SMALL, init=init).chain
    assert is_tails(chain, SMALL) == (init == "tails")
    assert chain.numel() == (tails_numel if init == "tails" else chain_numel)(SMALL)


@pytest.mark.parametrize("backend", HOSTS)
@pytest.mark.parametrize("numel", [tails_numel(SMALL) + 1, chain_numel(SMALL) - 1])
def test_another_length_is_refused(numel, backend):
    with pytest.raises(RuntimeError):
        compose(torch.zeros(numel), SMALL, backend=backend)


# Every backend against the definition


@pytest.mark.parametrize(
    "sizes, dtype, backend",
    compared([*LAYOUTS, (PAPER, torch.float32), (ODD, torch.float64)]),
    indirect=["backend"],
    ids=name,
)
def test_composition_against_the_definition(sizes, dtype, backend, device, nan_empty):
    tails = (torch.randn(tails_numel(sizes)) * 0.3).to(device, dtype)
    grad = torch.randn(operand_offsets(sizes)[-1], sizes[-1], device=device, dtype=torch.float64)
    composed = compose(tails, sizes, backend=backend)
    grad = grad.to(composed.dtype)
    found = compose_bwd(grad.clone(), tails, composed, sizes, backend=backend)

    def expected(wanted):
        # g as it is rounded: it is part of the hops.
        leaf = tails.clone().requires_grad_()
        blocks, hops = [], [(w.to(wanted), b.to(wanted)) for w, b in split_reference(leaf, sizes)]
        for k, d in enumerate(sizes[:-1]):
            rows = torch.eye(d + 1).to(device, wanted)[:, :d]
            for w, b in hops[k:]:
                one = rows.new_zeros(d + 1, 1)
                one[-1] = 1
                rows = rows @ w.t() + one * b
            blocks.append(rows)
        whole = torch.cat(blocks)
        (gradient,) = torch.autograd.grad(whole, leaf, grad.to(wanted))
        return whole.detach(), gradient

    exact, eager = expected(torch.float64), expected(composed.dtype)
    assert_matches(composed, exact[0], eager[0], name="composed")
    assert found.shape == tails.shape and found.dtype == dtype
    assert_matches(found, exact[1].double(), eager[1], name="gradient of the tails")


@pytest.mark.parametrize("sizes, dtype", LAYOUTS, ids=name)
@pytest.mark.parametrize("traffic", ["uniform", "zipf"])
def test_lookup_against_the_definition(sizes, dtype, traffic, backend, device, nan_empty):
    case = make_case(sizes, 30, 50, dtype, device, traffic=traffic, init="tails")
    assert is_tails(case.hops, sizes) and case.hops.any()
    found, exact, eager = case.run(backend), case.expected(), case.expected(dtype)
    for what, a, b, c in zip(("output", "rows", "tails"), found, exact, eager, strict=True):
        assert_matches(a, b, c, name=what)


def test_a_grouped_lookup_composes_tails(device, monkeypatch):
    """The Triton forward whose first launch composes the hops as well."""
    case = make_case(SMALL, 30, 50, device=device, init="tails")
    ungrouped = case.run("triton")
    monkeypatch.setattr("esapn_kernels.ops.lookup.groups_ids", lambda *args: True)
    monkeypatch.setattr("esapn_kernels.gpu.lookup_fwd.launch.groups_ids", lambda *args: True)
    assert launch.groups_ids(1, SMALL, torch.float32)
    grouped = case.run("triton")
    for a, b in zip(grouped, ungrouped, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=name)
def test_promotion_against_the_definition(dtype, backend, device):
    module = mixed(backend=backend, dtype=dtype, device=device)
    before, chain = rows_of(module), module.chain.detach()
    moved = module.promote(IDS.to(device))
    for i, row in enumerate(before):
        level, now = SMALL.index(len(row)), module.arena.read(i)
        assert moved[i] == (level < 2)
        if level == 2:
            assert torch.equal(now, row)
            continue
        exact = promote_reference(row.double(), level, chain.double(), SMALL)
        eager = promote_reference(row, level, chain, SMALL)
        assert_matches(now, exact, eager, name=f"row {i}")
        # The old numbers are multiplied, and nothing is added to them.
        if dtype != torch.bfloat16:  # which Triton's interpreter truncates
            gain = torch.ones((), dtype=dtype, device=device) * math.sqrt(len(now) / len(row))
            assert torch.equal(now[: len(row)], gain * row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name)
def test_growth_keeps_the_output(dtype, backend, device):
    """To twice the rounding of the definition, which rounds the grown row as well."""
    module = mixed(backend=backend, dtype=dtype, device=device)
    ids = IDS.to(device)

    def defined(wanted):
        leaves = (p.detach().to(wanted) for p in (module.arena.storage, module.chain))
        return lookup_reference(ids, *leaves, *module.arena.layout.flat)

    exact, eager = defined(torch.float64), defined(dtype)
    for _ in SMALL[1:]:
        module.promote(ids)
        assert_matches(module(ids).detach(), exact, eager, name="after growth")
    assert set(module.sizes_of().tolist()) == {SMALL[-1]}


# Zero tails are padded hops


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_zero_tails_are_padded_hops_bit_for_bit(dtype, backend, device):
    made = [mixed(learnt=0, dtype=dtype, device=device, backend=backend)]
    assert not made[0].chain.any()
    torch.manual_seed(0)
    size = torch.tensor(SMALL)[torch.arange(N) % len(SMALL)]
    options = {"sizes": SMALL, "initial_size": size, "dtype": dtype, "backend": backend}
    made.append(ResizableEmbedding(N, init="padded", device=device, **options))
    ids, grad = torch.randint(N, (40,)).to(device), torch.randn(40, SMALL[-1])
    found = []
    for module in made:
        y = module(ids)
        y.backward(grad.to(device, dtype))
        found.append([y.detach(), module.arena.storage.grad])
        module.arena.storage.grad = None
        module.promote(ids)
        found[-1].append(module(IDS.to(device)).detach())
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    expanded = full_chain(made[0].chain.detach(), SMALL)
    assert torch.equal(expanded, made[1].chain.detach())


def test_only_smaller_rows_teach_the_tails(backend, device):
    module = mixed(backend=backend, device=device)
    largest = IDS[2::3].to(device)
    assert set(module.sizes_of(largest).tolist()) == {SMALL[-1]}
    module(largest).sum().backward()
    assert not module.chain.grad.any() and module.arena.storage.grad.any()
    module.zero_grad()
    module(IDS[1::3].to(device)).sum().backward()
    first, second = (b.any() for b in _blocks(module.chain.grad))
    assert not first and second
    module(IDS[::3].to(device)).sum().backward()
    assert all(b.any() for b in _blocks(module.chain.grad))


def _blocks(tails):
    return tails.split([(a + 1) * (b - a) for a, b in zip(SMALL, SMALL[1:], strict=False)])


# Derivatives


def _function(backend, ids):
    case = make_case(TINY, 6, 1, torch.float64, init="tails")
    storage, chain = case.leaves()
    options = Options()

    def run(storage, chain):
        return lookup(ids, storage, chain, case.layout, options, backend=backend)

    return run, (storage, chain)


@pytest.mark.parametrize("backend", HOSTS)
def test_gradcheck_and_gradgradcheck(backend):
    run, leaves = _function(backend, torch.tensor([0, 3, 3, 5, 1]))
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("backend", HOSTS)
def test_functional_transforms(backend):
    ids = torch.tensor([0, 3, 3, 5, 1])
    run, (storage, chain) = _function(backend, ids)
    storage, chain = storage.detach(), chain.detach()

    def loss(chain):
        return run(storage, chain).sin().sum()

    leaf = chain.clone().requires_grad_()
    (plain,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(chain), plain)
    several = torch.stack([chain, 2 * chain])
    batched = torch.func.vmap(torch.func.grad(loss))(several)
    each = torch.stack([torch.func.grad(loss)(c) for c in several])
    torch.testing.assert_close(batched, each)
    hessian = torch.func.jacrev(torch.func.jacrev(loss))
    assert hessian(chain).shape == (chain.numel(),) * 2


@pytest.mark.parametrize("backend", HOSTS)
def test_compiled_code_and_exported_programs(backend):
    module = mixed(backend=backend)
    expected = module(IDS)
    expected.square().sum().backward()
    grads = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    torch._dynamo.reset()
    y = torch.compile(module, backend="aot_eager", fullgraph=True)(IDS)
    y.square().sum().backward()
    torch.testing.assert_close(y, expected)
    for parameter, grad in zip(module.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad)
    program = torch.export.export(module, (IDS,)).module()
    torch.testing.assert_close(program(IDS), expected)


# Optimizers, and the sums of Adagrad


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("kind", [optim.SGD, optim.Adagrad, optim.Adam])
def test_fused_optimizers_step_as_torch(kind, deferred, backend, device):
    """Rows by a fused optimizer, tails by torch's: as both by torch on the other definition."""
    options = {"dtype": torch.float64, "device": device}
    ours, theirs = mixed(TINY, backend=backend, **options), mixed(TINY, **options)
    theirs.backend = "reference"
    rows = kind(ours, lr=0.1, deferred=deferred)
    tails = torch.optim.Adam([ours.chain], lr=0.01)
    plain = getattr(torch.optim, kind.__name__)([theirs.arena.storage], lr=0.1)
    other = torch.optim.Adam([theirs.chain], lr=0.01)
    ids = torch.cat([IDS, IDS[:5]]).to(device)
    for step in range(3):
        grad = torch.randn(len(ids), TINY[-1], dtype=torch.float64).to(device)
        for module, optimizers in ((ours, (rows, tails)), (theirs, (plain, other))):
            (module(ids).sin() * grad).sum().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        torch.testing.assert_close(ours.chain, theirs.chain)
        for own, row in zip(rows_of(ours), rows_of(theirs), strict=True):
            torch.testing.assert_close(own, row)
        assert ours.chain.any(), step


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("host", HOSTS)
def test_sums_of_adagrad_go_along(trained, host):
    module = mixed(backend=host)
    module.chain.requires_grad_(trained)
    optimizer = optim.Adagrad(module, lr=0.1)
    module(IDS).square().sum().backward()

    def sums(i):
        start, size = int(module.arena.row_start[i]), int(module.sizes_of()[i])
        return optimizer.state[module.arena.storage]["sum"][start : start + size].clone()

    before = [sums(i) for i in range(N)]
    module.promote(IDS)
    for i, old in enumerate(before):
        new, d = sums(i), len(old)
        assert old.gt(0).all() and not new[d:].any()
        torch.testing.assert_close(new[:d], old * d / len(new))


@pytest.mark.parametrize("kind", [optim.Adam, torch.optim.Adam])
def test_other_state_starts_afresh(kind):
    module = mixed()
    fused = kind is optim.Adam
    optimizer = kind(module if fused else [module.arena.storage], lr=0.1)
    module(IDS).square().sum().backward()
    optimizer.step()
    held = optimizer.state[module.arena.storage]
    moments = [key for key, t in held.items() if t.shape == module.arena.storage.shape]
    assert len(moments) == 2
    module.promote(IDS[:1])
    start, size = int(module.arena.row_start[0]), int(module.sizes_of()[0])
    state = optimizer.state[module.arena.storage]
    assert not any(state[key][start : start + size].any() for key in moments)


# The module


def test_starting_again():
    module = mixed()
    assert module.chain.any() and module.memory_report().chain == 4 * tails_numel(SMALL)
    assert repr(module) == repr(ResizableEmbedding(N, sizes=SMALL))
    module.reset_parameters()
    assert not module.chain.any() and module.arena.storage.any()
    module.init = "padded"
    with pytest.raises(ValueError, match="not of the kind padded: build a module"):
        module.reset_parameters()
    whole = ResizableEmbedding(3, sizes=SMALL)
    whole.init = "tails"
    with pytest.raises(ValueError, match="not of the kind tails"):
        whole.reset_parameters()


def test_outputs_have_one_variance_until_tails_are_learnt():
    """As of padded hops: by g."""
    size = torch.tensor(SMALL).repeat_interleave(4000)
    module = ResizableEmbedding(
        len(size), sizes=SMALL, initial_size=size, init="tails", init_std=0.3
    )
    for y in module(torch.arange(len(size))).detach().split(4000):
        assert y.square().mean().sqrt().item() == pytest.approx(0.3, rel=0.05)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_hops_of_another_kind_do_not_load(strict, assign):
    tails, whole = mixed(), ResizableEmbedding(N, sizes=SMALL)
    for module, other, words in (
        (tails, whole, "chain was saved as whole hops, and the module has tails: build it with"),
        (whole, tails, "chain was saved as tails, and the module has whole hops: build it with"),
    ):
        before = {key: value.clone() for key, value in module.state_dict().items()}
        with pytest.raises(RuntimeError, match=words) as raised:
            module.load_state_dict(other.state_dict(), strict=strict, assign=assign)
        assert str(raised.value).count("chain") == 1
        after = module.state_dict()
        assert all(torch.equal(after[key], value) for key, value in before.items())


def test_checkpoints_of_the_same_kind_load():
    module = mixed()
    fresh = ResizableEmbedding(N, sizes=SMALL, init="tails")
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(IDS), module(IDS)) and torch.equal(fresh.chain, module.chain)
    table = torch.randn(N, SMALL[-1])
    fresh.load_state_dict({"weight": table})
    assert torch.equal(fresh(IDS), table) and torch.equal(fresh.chain, module.chain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
def test_weight_writes_the_nearest_row(dtype):
    module = mixed(dtype=dtype)
    size = module.sizes_of()
    table = torch.randn(N, SMALL[-1]).to(dtype)
    module.weight.data.copy_(table)
    assert torch.equal(module(IDS[2::3]), table[2::3])
    hops = [(w.double(), b.double()) for w, b in split_reference(module.chain.detach(), SMALL)]
    for k, d in enumerate(SMALL[:-1]):
        mine = (size == d).nonzero()[:, 0]
        matrix, offset = torch.eye(d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64)
        for w, b in hops[k:]:
            matrix, offset = w @ matrix, w @ offset + b
        solved = torch.linalg.lstsq(matrix, (table[mine].double() - offset).t()).solution.t()
        rows = torch.stack([module.arena.read(i) for i in mine.tolist()])
        torch.testing.assert_close(rows, solved.to(dtype))
        level = level_maps(module.chain, SMALL)[k]
        torch.testing.assert_close(level.matrix, matrix)
        torch.testing.assert_close(level.offset, offset)


def test_dense_forms_copies_and_other_dtypes():
    module = mixed()
    expected = module(IDS).detach()
    assert torch.equal(module.to_embedding()(IDS), expected)
    assert torch.equal(module.weight.detach(), expected)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(IDS), expected) and twin.promote(IDS).any()
        torch.testing.assert_close(twin(IDS).detach(), expected)
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.bfloat16, 0.1)):
        other = copy.deepcopy(module).to(dtype)
        y = other(IDS)
        assert y.dtype == dtype and other.chain.numel() == module.chain.numel()
        torch.testing.assert_close(y.detach().float(), expected, rtol=tolerance, atol=tolerance)
        assert other.promote(IDS).any()


def test_bags_and_collections():
    bag = ResizableEmbeddingBag(N, sizes=SMALL, init="tails", mode="sum")
    tables = ResizableEmbeddingCollection({"a": 10, "b": 14}, sizes=SMALL, init="tails")
    for module in (bag, tables.rows):
        with torch.no_grad():
            module.chain.normal_()
    lines = IDS[:8].view(2, 4)
    expected = ResizableEmbedding.forward(bag, lines).sum(1)
    torch.testing.assert_close(bag(lines), expected)
    found = tables({"a": IDS[:10], "b": IDS[:14]})
    assert torch.equal(torch.cat([found["a"], found["b"]]), tables.rows(IDS))
    bag(lines).sum().backward()
    assert bag.chain.grad.any()


@NEEDS_NATIVE
@pytest.mark.parametrize("sizes", [(3,), (1, 2), SMALL, ODD, PAPER], ids=name)
@pytest.mark.parametrize("packed", ["tails", "hops"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name)
def test_native_kernels_widen_16_bits_to_the_bits_of_whole_hops(dtype, packed, sizes):
    """Whose ``g`` is of 16 bits, too; gradients are rounded once."""
    numel = tails_numel(sizes) if packed == "tails" else chain_numel(sizes)
    chain = torch.randn(numel).to(dtype)
    whole = full_chain(chain, sizes).float()
    composed = compose(chain, sizes, backend="native")
    assert torch.equal(composed, compose(whole, sizes, backend="native"))
    sent = torch.randn_like(composed)
    found = compose_bwd(sent.clone(), chain, composed, sizes, backend="native")
    wanted = compose_bwd(sent.clone(), whole, composed, sizes, backend="native")
    assert found.dtype == dtype and found.shape == chain.shape
    wanted = wanted if whole.numel() == numel else gather_tails(wanted, sizes)
    assert torch.equal(found, wanted.to(dtype))


def test_unchanged_tails_are_composed_once(monkeypatch):
    module, calls = mixed(), []
    renew = ComposedCache._renew

    def counted(self, *args):
        calls.append(args)
        return renew(self, *args)

    monkeypatch.setattr(ComposedCache, "_renew", counted)
    first = module(IDS)
    assert torch.equal(module(IDS), first) and len(calls) == 1
    module.chain.data[0] += 1
    assert not torch.equal(module(IDS), first) and len(calls) == 2


def test_averages_carry_grown_rows_by_their_own_tails():
    module = mixed()
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(module)
    with torch.no_grad():
        average.module.chain.normal_(std=0.2)
    expected, row = average(IDS).detach(), average.module.arena.read(0)
    module.promote(IDS)
    own = average.module.chain.detach().clone()
    moved = copy.deepcopy(module)
    moved.load_state_dict(module.state_dict())
    average.module.arena.match(module.arena, average.module.chain)
    torch.testing.assert_close(average(IDS).detach(), expected)
    carried = promote_reference(row, 0, own, SMALL)
    torch.testing.assert_close(average.module.arena.read(0), carried)
    average.update_parameters(module)
    torch.testing.assert_close(average.module.chain, own.lerp(module.chain, 0.1))
    whole = ResizableEmbedding(N, sizes=SMALL)
    with pytest.raises(ValueError, match="tails"):
        average.update_parameters(whole)


def test_a_step_of_training_learns_the_tails():
    """Rows of a small size whose missing numbers follow from those they have."""
    torch.manual_seed(0)
    sizes, n = (2, 6), 200
    mix = torch.randn(4, 2)
    kept = torch.randn(n, 2)
    target = torch.cat([kept, kept @ mix.t() + 1], 1)
    module = ResizableEmbedding(n, sizes=sizes, init="tails", init_std=0.1)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        (module(torch.arange(n)) - target).square().mean().backward()
        optimizer.step()
    y = module(torch.arange(n)).detach()
    assert (y - target).square().mean() < 1e-3
    module.promote(torch.arange(n))
    rows = torch.stack([module.arena.read(i) for i in range(n)])
    torch.testing.assert_close(rows, y, rtol=1e-4, atol=1e-5)
