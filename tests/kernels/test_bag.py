"""bag.py: ResizableEmbeddingBag beside nn.EmbeddingBag, asked of torch at run time."""

import copy
import inspect
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from esapn_kernels import ResizableEmbeddingBag
from esapn_kernels.reference import lookup_reference

N, D = 12, 4
SIZES = (2, 3, D)
MIXED = torch.tensor([2, 3, 4] * (N // 3))
ONE = partial(ResizableEmbeddingBag, sizes=(D,))
RAGGED = partial(ResizableEmbeddingBag, sizes=SIZES, initial_size=MIXED)
our_classes = pytest.mark.parametrize("make", [ONE, RAGGED], ids=["one", "ragged"])

IDS = torch.tensor([3, 3, 0, 11, 3, 7, 5])
INPUTS = {
    "2-d": (IDS[:6].view(2, 3), None),
    "offsets": (IDS, torch.tensor([0, 3, 4])),
    "empty-bags": (IDS, torch.tensor([0, 0, 4, 7, 7])),
    "int32": (IDS.int(), torch.tensor([0, 3], dtype=torch.int32)),
    "no-ids": (IDS[:0], torch.tensor([0, 0])),
    "no-bags": (torch.zeros(0, 3, dtype=torch.long), None),
}


def seeded(make, **options):
    torch.manual_seed(1)
    return make(N, D, **options)


def plain_of(module):
    """nn.EmbeddingBag with the same table: of one size its twin, else of the dense outputs."""
    return module.to_embedding().requires_grad_()


def leaf_gradient(module):
    if isinstance(module, nn.EmbeddingBag):
        return module.weight.grad
    return module.weight.grad


@our_classes
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding_idx", [None, 3, -1])
@pytest.mark.parametrize("bags", INPUTS.values(), ids=INPUTS.keys())
def test_bags(make, mode, padding_idx, bags):
    ours = seeded(make, mode=mode, padding_idx=padding_idx, dtype=torch.float64)
    theirs = plain_of(ours)
    out, expected = ours(*bags), theirs(*bags)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(expected)
    out.backward(upstream)
    expected.backward(upstream)
    if make is ONE:
        torch.testing.assert_close(leaf_gradient(ours), theirs.weight.grad)
        return
    # The gradient of the dense table, carried on through the definition of the lookup.
    arena = ours.arena
    storage, chain = (p.detach().clone().requires_grad_() for p in (arena.storage, ours.chain))
    rows = lookup_reference(torch.arange(N), storage, chain, *arena.layout.flat)
    rows.backward(theirs.weight.grad)
    torch.testing.assert_close(arena.storage.grad, storage.grad)
    torch.testing.assert_close(ours.chain.grad, chain.grad)


@pytest.mark.parametrize("make", [nn.EmbeddingBag, ONE, RAGGED], ids=["torch", "one", "ragged"])
def test_arguments_by_name(make):
    for name in ("forward", "__init__", "from_pretrained"):
        theirs = list(inspect.signature(getattr(nn.EmbeddingBag, name)).parameters)
        ours = list(inspect.signature(getattr(ResizableEmbeddingBag, name)).parameters)
        assert ours[: len(theirs)] == theirs
    module = make(N, D, mode="sum")
    offsets, weights = torch.tensor([0, 3]), torch.arange(7.0)
    out = module(offsets=offsets, per_sample_weights=weights, input=IDS)
    assert torch.equal(out, module(IDS, offsets, weights))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("sizes", [(D,), SIZES], ids=["one", "ragged"])
def test_no_rows(mode, sizes):
    nothing = IDS[:0]
    ours = ResizableEmbeddingBag(0, D, sizes=sizes, mode=mode)
    theirs = nn.EmbeddingBag(0, D, mode=mode)
    for bags in (
        (nothing, nothing),
        (nothing, torch.tensor([0])),
        (nothing, torch.tensor([0, 0])),
        (nothing.view(0, 3), None),
    ):
        out = ours(*bags)
        assert torch.equal(out, theirs(*bags))
        out.sum().backward()
    for bags in ((torch.tensor([0]), ZERO), (torch.tensor([[0, 1]]), None)):
        for module in (ours, theirs):
            with pytest.raises(RuntimeError):
                module(*bags)
    assert ours.weight.shape == ours.to_embedding().weight.shape == (0, D)
    again = ResizableEmbeddingBag.from_embedding(theirs)
    assert torch.equal(again(nothing, ZERO), theirs(nothing, ZERO))
    again.load_state_dict(ResizableEmbeddingBag.from_embedding(theirs).state_dict())
    assert repr(again) == repr(theirs).replace("EmbeddingBag(", "ResizableEmbeddingBag(")
    assert ours.promote(nothing).shape == (0,) and ours.memory_report().payload == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_one_size_sums_the_same_bits(dtype):
    ours = seeded(ONE, mode="sum", dtype=dtype)
    theirs = seeded(nn.EmbeddingBag, mode="sum", dtype=dtype)
    assert torch.equal(ours.weight, theirs.weight)
    bags = INPUTS["offsets"]
    if dtype == torch.bfloat16:  # torch sums rounded rows here as there, in another order
        torch.testing.assert_close(ours(*bags), theirs(*bags))
    else:
        assert torch.equal(ours(*bags), theirs(*bags))


@our_classes
@pytest.mark.parametrize("include_last_offset", [False, True])
def test_weights_of_samples(make, include_last_offset):
    options = {"include_last_offset": include_last_offset, "padding_idx": 0}
    ours = seeded(make, mode="sum", dtype=torch.float64, **options)
    theirs = plain_of(ours)
    offsets = torch.tensor([0, 3, 4, 7] if include_last_offset else [0, 3, 4])
    grads = []
    for module in (ours, theirs):
        weights = torch.linspace(-1, 1, 7, dtype=torch.float64, requires_grad=True)
        out = module(IDS, offsets, weights)
        out.square().sum().backward()
        grads.append((out, weights.grad))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("options", [{"scale_grad_by_freq": True}, {"sparse": True}], ids=str)
def test_options(mode, options):
    ids, offsets = INPUTS["offsets"]
    grads = []
    for make in (ONE, nn.EmbeddingBag):
        module = seeded(make, mode=mode, **options)
        module(ids, offsets).square().sum().backward()
        assert module.weight.grad.is_sparse == ("sparse" in options)
        grads.append(module.weight.grad.to_dense())
    assert torch.equal(*grads)
    # Rows of several sizes weigh an occurrence as nn.Embedding does; all of the largest here.
    ragged = ResizableEmbeddingBag.from_pretrained(module.weight, False, mode=mode, sizes=SIZES)
    plain = nn.Embedding.from_pretrained(module.weight.detach().clone(), False)
    for name, value in options.items():
        setattr(ragged, name, value)
        setattr(plain, name, value)
    ragged(ids, offsets).square().sum().backward()
    pooled = F.embedding_bag(torch.arange(7), plain(ids), offsets, mode=mode)
    pooled.square().sum().backward()
    rows = [int(start) for start in ragged.arena.layout.row_start]
    found = ragged.arena.storage.grad.to_dense()
    found = torch.stack([found[start : start + D] for start in rows])
    torch.testing.assert_close(found, plain.weight.grad.to_dense())


def test_max_norm():
    ours, theirs = seeded(ONE, max_norm=0.5), seeded(nn.EmbeddingBag, max_norm=0.5)
    torch.testing.assert_close(ours(*INPUTS["2-d"]), theirs(*INPUTS["2-d"]))
    torch.testing.assert_close(ours.weight, theirs.weight)


def test_growing_and_saving():
    module = seeded(RAGGED, mode="mean")
    before = module(*INPUTS["offsets"]).detach()
    assert module.promote(torch.tensor([3, 0])).all()
    torch.testing.assert_close(module(*INPUTS["offsets"]).detach(), before, atol=1e-6, rtol=1e-5)
    fresh = ResizableEmbeddingBag(N, D, sizes=SIZES)
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(*INPUTS["offsets"]), module(*INPUTS["offsets"]))
    assert torch.equal(copy.deepcopy(module)(*INPUTS["2-d"]), module(*INPUTS["2-d"]))


def test_from_and_to():
    theirs = nn.EmbeddingBag(N, D, mode="sum", padding_idx=2, include_last_offset=True)
    ours = ResizableEmbeddingBag.from_embedding(theirs)
    assert repr(ours) == repr(theirs).replace("EmbeddingBag(", "ResizableEmbeddingBag(")
    assert repr(ours.to_embedding()) == repr(theirs) and ours.weight.requires_grad
    offsets = torch.tensor([0, 2, 7])
    assert torch.equal(ours(IDS, offsets), theirs(IDS, offsets))
    assert torch.equal(ours.to_embedding()(IDS, offsets), theirs(IDS, offsets))
    with pytest.raises(AssertionError, match="2-dimensional"):
        ResizableEmbeddingBag.from_pretrained(torch.zeros(3))
    assert not any(
        p.requires_grad for p in ResizableEmbeddingBag.from_pretrained(theirs.weight).parameters()
    )


ZERO = torch.tensor([0])
MISUSES = {
    "above": ("mean", lambda m: m(torch.tensor([1, N]), ZERO)),
    "negative": ("mean", lambda m: m(torch.tensor([[1, -1]]))),
    "no-offsets": ("mean", lambda m: m(IDS)),
    "first-offset": ("mean", lambda m: m(IDS, torch.tensor([1]))),
    "last-offset": ("mean", lambda m: m(IDS, torch.tensor([0, 9]))),
    "2-d-offsets": ("mean", lambda m: m(IDS[:6].view(2, 3), ZERO)),
    "offsets-2-d": ("mean", lambda m: m(IDS, torch.tensor([[0]]))),
    "0-d": ("mean", lambda m: m(torch.tensor(1))),
    "float": ("mean", lambda m: m(torch.tensor([1.0]), ZERO)),
    "list": ("mean", lambda m: m([1], ZERO)),
    "weights-of-mean": ("mean", lambda m: m(IDS, ZERO, torch.ones(7))),
    "both": ("mean", lambda m: m(torch.tensor([N]))),
    "above-and-first-offset": ("sum", lambda m: m(torch.tensor([N]), torch.tensor([1]))),
    "above-max": ("max", lambda m: m(torch.tensor([1, N]), ZERO)),
    "negative-max": ("max", lambda m: m(torch.tensor([[1, -1]]))),
    "float-max": ("max", lambda m: m(torch.tensor([[1.0]]))),
    "float-offsets": ("sum", lambda m: m(IDS, torch.tensor([0.0]))),
    "float-empty": ("sum", lambda m: m(torch.zeros(0), ZERO)),
    "3-d": ("mean", lambda m: m(IDS[:6].view(1, 2, 3))),
    "nothing": ("mean", lambda m: m(None, ZERO)),
    "weights-short": ("sum", lambda m: m(IDS, ZERO, torch.ones(1))),
    "weights-dtype": ("sum", lambda m: m(IDS, ZERO, torch.ones(7, dtype=torch.float64))),
}


@our_classes
@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse(make, misuse):
    mode, call = MISUSES[misuse]
    raised = []
    for kind in (nn.EmbeddingBag, make):
        module = seeded(kind, mode=mode)
        before = {key: value.clone() for key, value in module.state_dict().items()}
        with pytest.raises(Exception) as caught:  # noqa: B017 - the types are compared below
            call(module)
        raised.append(caught.value)
        assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert type(raised[1]) is type(raised[0])
    assert str(raised[1]) == str(raised[0])


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "avg"},
        {"mode": None},
        {"mode": "max", "sparse": True},
        {"mode": "max", "scale_grad_by_freq": True},
        {"mode": "max", "scale_grad_by_freq": True, "sparse": True},
        {"padding_idx": N},
        {"padding_idx": -N - 1},
        {"_weight": torch.zeros(N + 1, D)},
        {"num_embeddings": -1},
    ],
    ids=str,
)
def test_refused_at_construction(options):
    """In torch's words, which says some of them in forward only."""
    arguments = {"num_embeddings": N, "embedding_dim": D, **options}
    with pytest.raises(Exception) as theirs:  # noqa: B017 - compared below
        nn.EmbeddingBag(**arguments)(IDS, ZERO)
    with pytest.raises(Exception) as ours:  # noqa: B017
        ONE(**arguments)
    assert type(ours.value) is type(theirs.value) and str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("make", [ONE, partial(ResizableEmbeddingBag, sizes=SIZES)])
def test_compile(make):
    module = make(N, D, mode="sum")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*INPUTS["offsets"]), module(*INPUTS["offsets"]))
