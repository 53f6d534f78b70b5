"""ResizableEmbedding where nn.Embedding stands: the rows of docs/contract.md, asked of torch.

What can be is run on both classes and compared; nothing is copied from torch's documentation.
"""

import ast
import copy
import inspect
import io
import pickle
import re
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, vmap

from esapn_kernels import ResizableEmbedding, optim
from esapn_kernels.reference import split_chain

N, D = 12, 4
SIZES = (2, 3, D)
ONE = partial(ResizableEmbedding, sizes=(D,))
MIXED = torch.tensor([2, 3, 4] * (N // 3))
RAGGED = partial(ResizableEmbedding, sizes=SIZES, initial_size=MIXED)
CLASSES = {"torch": nn.Embedding, "one": ONE, "ragged": RAGGED}
IDS = torch.tensor([[3, 3, 0], [11, 3, 7]])
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

every_class = pytest.mark.parametrize("make", CLASSES.values(), ids=CLASSES.keys())
our_classes = pytest.mark.parametrize("make", [ONE, RAGGED], ids=["one", "ragged"])


def seeded(make, *args, seed=1, **options):
    torch.manual_seed(seed)
    return make(*args, **options)


def pair(**options):
    """nn.Embedding and ours of one size, from the same seed."""
    return seeded(nn.Embedding, N, D, **options), seeded(ONE, N, D, **options)


def rows_of(module):
    """The rows of a module of one size, ``[N, D]``."""
    return module.weight


def gradient_of(module):
    found = module.weight.grad
    return found.to_dense() if found.is_sparse else found


def state_of(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def assert_same_state(module, before):
    after = module.state_dict()
    assert after.keys() == before.keys()
    for key, value in after.items():
        assert torch.equal(value, before[key]), key


# ---- construction ----------------------------------------------------------------------------


def test_signature():
    theirs = list(inspect.signature(nn.Embedding.__init__).parameters.values())
    ours = list(inspect.signature(ResizableEmbedding.__init__).parameters.values())
    assert [p.name for p in ours[: len(theirs)]] == [p.name for p in theirs]
    for mine, torchs in zip(ours[3:], theirs[3:], strict=False):
        assert (mine.kind, mine.default) == (torchs.kind, torchs.default), mine.name
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])
    pretrained = list(inspect.signature(nn.Embedding.from_pretrained).parameters.values())
    mine = list(inspect.signature(ResizableEmbedding.from_pretrained).parameters.values())
    for a, b in zip(mine, pretrained, strict=False):
        assert (a.name, a.kind, a.default) == (b.name, b.kind, b.default)


@every_class
def test_arguments_by_name(make):
    expected = list(inspect.signature(nn.Embedding.forward).parameters)
    assert list(inspect.signature(ResizableEmbedding.forward).parameters) == expected
    module = make(N, D)
    assert torch.equal(module(input=IDS), module(IDS))
    exported = torch.export.export(module, (), {"input": IDS}).module()
    torch.testing.assert_close(exported(input=IDS), module(IDS))


@our_classes
@pytest.mark.parametrize(
    "options",
    [{}, {"padding_idx": -1}, {"padding_idx": 0}, {"scale_grad_by_freq": True}, {"sparse": True}],
    ids=str,
)
def test_attributes_and_repr(make, options):
    theirs, ours = nn.Embedding(N, D, **options), make(N, D, **options)
    for name in ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.scale_grad_by_freq == theirs.scale_grad_by_freq and ours.sparse == theirs.sparse
    assert ours.weight.shape == theirs.weight.shape and ours.weight.dtype == theirs.weight.dtype
    text = repr(theirs).replace("Embedding(", "ResizableEmbedding(")
    assert repr(ours) == (text if make is ONE else text[:-1] + f", sizes={SIZES})")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padding_idx", [None, 3, -2])
def test_initial_numbers(dtype, padding_idx):
    theirs, ours = pair(dtype=dtype, padding_idx=padding_idx)
    assert torch.equal(rows_of(ours), theirs.weight)
    torch.manual_seed(5)
    theirs.reset_parameters()
    torch.manual_seed(5)
    ours.reset_parameters()
    assert torch.equal(rows_of(ours), theirs.weight) and torch.equal(ours.weight, theirs.weight)


def test_initialisations():
    """linear: the hops of nn.Linear; isometric: outputs have one variance at every size."""
    sizes = (2, 8, 64)
    of_size = torch.tensor(sizes).repeat_interleave(4000)
    isometric = ResizableEmbedding(12_000, sizes=sizes, initial_size=of_size, init_std=0.1)
    for rows in isometric(torch.arange(12_000)).split(4000):
        assert abs(float(rows.detach().square().mean().sqrt()) / 0.1 - 1) < 0.03
    before = isometric(torch.arange(4000)).detach()
    isometric.promote(torch.arange(4000))
    torch.testing.assert_close(isometric(torch.arange(4000)).detach(), before)
    linear = ResizableEmbedding(
        12_000, sizes=sizes, initial_size=of_size, init_std=0.1, init="linear"
    )
    for size, (weight, bias) in zip(sizes, split_chain(linear.chain, sizes), strict=False):
        for values in (weight, bias):
            assert 0.8 * size**-0.5 < values.abs().max() <= size**-0.5
    with pytest.raises(ValueError, match="linear, isometric, padded or tails"):
        ResizableEmbedding(3, init="xavier")


@every_class
def test_given_rows(make):
    weight = torch.randn(N, D)
    module = make(N, D, _weight=weight, padding_idx=2)
    assert torch.equal(module(torch.arange(N)), weight)  # the padding row as well, as in torch
    frozen = make(N, D, _weight=weight, _freeze=True)
    assert not any(p.requires_grad for p in frozen.parameters())
    with pytest.raises(AssertionError, match="Shape of weight"):
        make(N, D, _weight=torch.randn(N, D + 1))
    half = make(N, D, _weight=weight.half())
    assert half(IDS).dtype == torch.float16


@pytest.mark.parametrize("freeze", [True, False])
def test_from_pretrained(freeze):
    weight = torch.randn(N, D)
    made = [c.from_pretrained(weight, freeze, 2) for c in (nn.Embedding, ResizableEmbedding)]
    for module in made:
        assert torch.equal(module(IDS), weight[IDS]) and module.padding_idx == 2
        assert all(p.requires_grad is not freeze for p in module.parameters() if p.numel())
        with pytest.raises(AssertionError, match="2-dimensional"):
            type(module).from_pretrained(torch.randn(3))
    ours = ResizableEmbedding.from_pretrained(weight, sizes=SIZES)
    assert torch.equal(ours(IDS), weight[IDS]) and set(ours.sizes_of().tolist()) == {D}


@pytest.mark.parametrize(
    "options",
    [{"padding_idx": 3}, {"max_norm": 0.5, "norm_type": 1.0}, {"sparse": True}],
    ids=str,
)
def test_there_and_back(options):
    theirs = nn.Embedding(N, D, dtype=torch.float64, **options)
    back = ResizableEmbedding.from_embedding(theirs).to_embedding()
    assert repr(back) == repr(theirs) and back.weight.requires_grad
    assert torch.equal(back(IDS), theirs(IDS)) and back.weight.dtype == torch.float64


# ---- forward ---------------------------------------------------------------------------------

INDICES = {
    "0-d": torch.tensor(3),
    "empty": torch.zeros(2, 0, 3, dtype=torch.long),
    "int32": IDS.int(),
    "4-d": IDS.view(1, 2, 3, 1),
    "transposed": IDS.t(),
    "expanded": torch.tensor([5]).expand(4),
    "strided": torch.arange(N)[::3],
    "first-and-last": torch.tensor([0, N - 1]),
}


@every_class
@pytest.mark.parametrize("ids", INDICES.values(), ids=INDICES.keys())
def test_indices(make, ids):
    module = make(N, D)
    out = module(ids)
    theirs = nn.Embedding(N, D)(ids)
    assert (out.shape, out.dtype, out.stride()) == (theirs.shape, theirs.dtype, theirs.stride())
    # Products of other batches round otherwise.
    same = (
        torch.testing.assert_close
        if make is RAGGED
        else partial(torch.testing.assert_close, rtol=0, atol=0)
    )
    same(out.detach(), module.weight.detach()[ids.long()])
    out.sum().backward()


NOTHING = torch.zeros(0, dtype=torch.long)


def gradients(module):
    found = list(module.parameters())
    assert all(p.grad is not None for p in found)
    return [p.grad for p in found]


RAGGED_SMALLEST = partial(ResizableEmbedding, sizes=SIZES)


@pytest.mark.parametrize("make", [nn.Embedding, ONE, RAGGED_SMALLEST], ids=CLASSES)
@pytest.mark.parametrize(
    "options",
    [{}, {"sparse": True}, {"scale_grad_by_freq": True}, {"max_norm": 1.0}, {"out_dtype": 1}],
    ids=str,
)
def test_no_rows(make, options):
    if "max_norm" in options and make is RAGGED_SMALLEST:
        options = {"backend": "reference"}
    if "out_dtype" in options:
        options = {} if make is nn.Embedding else {"out_dtype": torch.float64}
    module = make(0, D, **options)
    for ids in (NOTHING, NOTHING.int(), NOTHING.view(0, 3), NOTHING.view(2, 0)):
        out = module(ids)
        assert out.shape == (*ids.shape, D)
        out.sum().backward()
        # torch speaks of its index_select here, and raises what that does.
        with pytest.raises(IndexError if make is RAGGED_SMALLEST else (IndexError, RuntimeError)):
            module(torch.zeros(1, dtype=ids.dtype))
    assert gradients(module) and not any(g.to_dense().any() for g in gradients(module))
    assert module.weight.shape == (0, D) and "Embedding(0, 4" in repr(module)
    module.zero_grad()
    module.weight.sum().backward()
    for assign in (False, True):
        other = make(0, D, **options)
        other.load_state_dict(module.state_dict(), assign=assign)
        assert other(NOTHING).shape == copy.deepcopy(other)(NOTHING).shape == (0, D)
    empty = make(0, D, device="meta", **options).to_empty(device="cpu")
    empty.reset_parameters()
    assert empty(NOTHING).shape == (0, D)


@pytest.mark.parametrize("make", [ONE, RAGGED_SMALLEST], ids=["one", "ragged"])
def test_no_rows_of_ours(make):
    module = make(0, D)
    plain = module.to_embedding()
    assert plain.weight.shape == (0, D)
    assert ResizableEmbedding.from_embedding(plain)(NOTHING).shape == (0, D)
    assert ResizableEmbedding.from_pretrained(plain.weight).weight.shape == (0, D)
    for call in (
        lambda: module.promote(NOTHING),
        lambda: module.promote(NOTHING, NOTHING.bool()),
        lambda: module.resize(NOTHING, D),
        lambda: module.sizes_of(NOTHING),
        lambda: module.sizes_of(),
    ):
        assert call().shape == (0,)
    for call in (module.promote, module.sizes_of):
        with pytest.raises(IndexError):
            call(torch.tensor([0]))
    report = module.memory_report()
    assert report.payload == report.fixed == 0 and sum(report.rows_per_size.values()) == 0
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert compiled(NOTHING).shape == (0, D)
    assert torch.export.export(module, (NOTHING,)).module()(NOTHING).shape == (0, D)
    # Room for rows, and still none of them.
    module.reserve(5)
    assert module(NOTHING).shape == module.weight.shape == (0, D)
    module.compact()
    assert module(NOTHING).shape == module.weight.shape == (0, D)


@every_class
def test_no_ids_have_a_gradient_of_zeros(make):
    modules = [make(N, D)]
    if make is not nn.Embedding:
        modules.append(make(N, D, backend="reference"))
    for module in modules:
        module(NOTHING).sum().backward()
        assert not any(g.any() for g in gradients(module))


@every_class
def test_gradients_asked_for(make):
    module = make(N, D)
    before = state_of(module)
    loss = module(IDS).square().sum()
    found = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)
    assert any(g is not None and g.any() for g in found)
    assert all(p.grad is None for p in module.parameters())
    assert_same_state(module, before)


def test_gradients_asked_for_with_a_fused_optimizer():
    module = RAGGED(N, D)
    rows = optim.SGD(module, lr=0.1)
    for ask in (
        lambda loss: torch.autograd.grad(loss, [module.chain]),
        lambda loss: loss.backward(inputs=[module.chain]),
    ):
        before = state_of(module)
        ask(module(IDS).square().sum())
        assert not torch.equal(module.arena.storage, before["arena.storage"])
        assert torch.equal(module.chain, before["chain"])
    # What lies between the loss and the lookup is reached without a step.
    scale = torch.ones(D, requires_grad=True)
    before = state_of(module)
    torch.autograd.grad((module(IDS) * scale).sum(), [scale])
    assert_same_state(module, before)
    assert rows.param_groups[0]["lr"] == 0.1


@every_class
def test_jagged_indices(make):
    module = make(N, D)
    lines = [torch.tensor([1, 2]), torch.tensor([], dtype=torch.long), torch.tensor([3, 3, 1])]
    out = module(torch.nested.nested_tensor(lines, layout=torch.jagged))
    assert out.is_nested and out.layout == torch.jagged and len(out.unbind()) == 3
    for line, rows in zip(lines, out.unbind(), strict=True):
        torch.testing.assert_close(rows, module(line))
    out.values().sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ids", INDICES.values(), ids=INDICES.keys())
def test_one_size_gives_the_same_numbers(ids, dtype):
    theirs, ours = pair(dtype=dtype)
    assert torch.equal(ours(ids), theirs(ids))
    upstream = torch.randn(*ids.shape, D).to(dtype)
    for module in (theirs, ours):
        module(ids).backward(upstream)
    assert torch.equal(gradient_of(ours), gradient_of(theirs))


@every_class
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(make, dtype):
    module = make(N, D, dtype=dtype)
    out = module(IDS)
    out.sum().backward()
    assert out.dtype == dtype
    assert all(p.grad.dtype == dtype for p in module.parameters() if p.grad is not None)


@every_class
def test_autocast(make):
    module = make(N, D)
    plain = module(IDS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(IDS)
        out.square().sum().backward()
    assert out.dtype == torch.float32 and torch.equal(out, plain)
    cast = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    module.zero_grad()
    plain.square().sum().backward()
    for got, p in zip(cast, (p for p in module.parameters() if p.grad is not None), strict=True):
        assert torch.equal(got, p.grad)


@every_class
def test_no_gradient_wanted(make):
    module = make(N, D)
    with torch.no_grad():
        assert not module(IDS).requires_grad
    with torch.inference_mode():
        first = module(IDS)
    out = module(IDS)  # nothing of inference mode is left in what is saved for backward
    assert torch.equal(out, first)
    out.sum().backward()
    module.requires_grad_(False)
    assert not module(IDS).requires_grad


# ---- options ---------------------------------------------------------------------------------


@every_class
def test_padding_row(make):
    module = make(N, D, padding_idx=-5)
    pad = torch.tensor(N - 5)
    assert not module(pad).any()
    module(torch.tensor([N - 5, 3, N - 5])).sum().backward()
    others = [p.grad for p in module.parameters() if p.grad is not None]
    fresh = make(N, D)
    fresh.load_state_dict(module.state_dict())
    fresh(torch.tensor([3])).sum().backward()
    alone = [p.grad for p in fresh.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(others, alone, strict=True))
    for optimizer in (torch.optim.Adam, partial(torch.optim.Adagrad, lr=0.1)):
        optimizer(module.parameters()).step()
    assert not module(pad).any()
    with torch.no_grad():
        table = module.weight if make is not RAGGED else None
        if table is None:
            first = int(module.arena.row_start[N - 5])
            table = module.arena.storage[first : first + D].expand(N, D)
        table[N - 5].fill_(7.0) if make is not RAGGED else table[0].fill_(7.0)
    assert (module(pad) == 7).all()  # the present value, not zero


def test_padding_row_of_a_ragged_table():
    module = RAGGED(N, D, padding_idx=0)
    assert int(module.sizes_of(torch.tensor(0))) == D  # where no hop touches it
    with torch.no_grad():
        module.chain.add_(1.0)
    assert not module(torch.tensor([0, 0])).any()
    assert module.resize(torch.arange(3), D).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scale_grad_by_freq(dtype):
    upstream = torch.randn(2, 3, D, dtype=dtype)
    theirs, ours = pair(scale_grad_by_freq=True, padding_idx=7, dtype=dtype)
    for module in (theirs, ours):
        module(IDS).backward(upstream)
    assert torch.equal(gradient_of(ours), gradient_of(theirs))
    ragged = seeded(RAGGED, N, D, scale_grad_by_freq=True, dtype=dtype)
    plain = copy.deepcopy(ragged)
    plain.scale_grad_by_freq = False
    ragged(IDS).backward(upstream)
    count = torch.bincount(IDS.flatten(), minlength=N)[IDS]
    plain(IDS).backward(upstream / count[..., None])
    for a, b in zip(ragged.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.1),
    "SparseAdam": partial(torch.optim.SparseAdam, lr=0.1),
}


def train(module, optimizer, steps=5, padding=False):
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        ids = torch.randint(N, (7,), generator=generator)
        upstream = torch.randn(7, D, generator=generator)
        optimizer.zero_grad()
        module(ids).backward(upstream)
        optimizer.step()


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("padding_idx", [None, 3])
def test_sparse_gradients_train_alike(optimizer, padding_idx):
    theirs, ours = pair(sparse=True, padding_idx=padding_idx)
    train(theirs, optimizer([theirs.weight]))
    train(ours, optimizer([ours.weight]))
    assert torch.equal(rows_of(ours), theirs.weight)
    theirs.zero_grad()
    ours.zero_grad()
    for module in (theirs, ours):
        module(IDS).square().sum().backward()
    assert theirs.weight.grad.is_sparse and ours.weight.grad.is_sparse
    assert torch.equal(gradient_of(ours), gradient_of(theirs))
    # No entries but those of rows looked up, and none of the padding row.
    touched = {i for i in IDS.flatten().tolist() if i != padding_idx}
    for options in ({"sizes": (D,)}, {"sizes": SIZES, "initial_size": D}):
        module = ResizableEmbedding(N, D, sparse=True, padding_idx=padding_idx, **options)
        module(IDS).square().sum().backward()
        index = module.arena.parameter.grad.coalesce().indices()[0]
        if len(module.sizes) > 1:
            start = module.arena.row_start[:-1]
            index = torch.searchsorted(start.sort()[0], index, right=True) - 1
            index = start.argsort()[index]
        assert set(index.tolist()) == touched


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_sparse_gradients_of_ragged_rows(optimizer):
    """Equal to the dense gradient, through promotions between the steps."""
    sparse = seeded(RAGGED, N, D, sparse=True, padding_idx=5)
    dense = copy.deepcopy(sparse)
    dense.sparse = False
    sparse_one, dense_one = optimizer([sparse.arena.storage]), torch.optim.SGD([dense.chain], lr=0)
    for step in range(4):
        for module in (sparse, dense):
            module.zero_grad()
            module(IDS).square().sum().backward()
        assert sparse.arena.storage.grad.is_sparse
        torch.testing.assert_close(sparse.arena.storage.grad.to_dense(), dense.arena.storage.grad)
        assert torch.equal(sparse.chain.grad, dense.chain.grad)
        sparse_one.step()
        dense_one.step()
        with torch.no_grad():
            dense.arena.storage.copy_(sparse.arena.storage)
        if step == 1:
            moved = torch.tensor([3, 0])
            assert torch.equal(sparse.promote(moved), dense.promote(moved))
            assert sparse.arena.storage.grad.is_sparse
            torch.testing.assert_close(
                sparse.arena.storage.grad.to_dense(), dense.arena.storage.grad
            )


def test_a_held_sparse_gradient_grows_with_the_rows():
    module = seeded(RAGGED, N, D, sparse=True)
    module(IDS).sum().backward()
    held = module.arena.storage.grad.to_dense()
    module.reserve(100)
    grown = module.arena.storage.grad
    assert grown.is_sparse and grown.shape == module.arena.storage.shape != held.shape
    assert torch.equal(grown.to_dense()[: len(held)], held)
    module(IDS).sum().backward()
    torch.testing.assert_close(module.arena.storage.grad.to_dense()[: len(held)], 2 * held)


def test_max_norm():
    for norm_type in (1.0, 2.0, float("inf")):
        theirs, ours = pair(max_norm=0.7, norm_type=norm_type)
        assert torch.equal(ours(IDS), theirs(IDS))
        assert torch.equal(rows_of(ours), theirs.weight)  # in place, and only what was looked up
        for module in (theirs, ours):
            module(IDS).square().sum().backward()
        assert torch.equal(gradient_of(ours), gradient_of(theirs))
    with pytest.raises(NotImplementedError, match="one size"):
        RAGGED(N, D, max_norm=1.0)


@pytest.mark.parametrize("bad", [-1, N])
def test_max_norm_scales_no_row_of_a_refused_batch(bad):
    _, ours = pair(max_norm=0.01)
    before = ours.weight.detach().clone()
    with pytest.raises(IndexError, match="index out of range in self"):
        ours(torch.tensor([1, bad]))
    assert torch.equal(ours.weight, before)


@pytest.mark.parametrize(
    "optimizer",
    [torch.optim.Adam, torch.optim.AdamW, OPTIMIZERS["momentum"], OPTIMIZERS["Adagrad"]],
)
def test_dense_training_is_the_same(optimizer):
    theirs, ours = pair(padding_idx=1)
    train(theirs, optimizer(theirs.parameters()), steps=8)
    train(ours, optimizer(ours.parameters()), steps=8)
    assert torch.equal(rows_of(ours), theirs.weight)


# ---- weight ----------------------------------------------------------------------------------


def test_weight_of_one_size_can_be_written():
    theirs, ours = pair()
    for module in (theirs, ours):
        torch.manual_seed(3)
        nn.init.xavier_uniform_(module.weight)
        module.weight.data[2] = 5.0
    assert torch.equal(ours(IDS), theirs(IDS)) and torch.equal(ours.weight, theirs.weight)


def test_rows_of_one_size_do_not_move(backend, device):
    module = ONE(N, D, backend=backend, device=device)
    weight, before = module.weight, state_of(module)
    assert not module.promote(torch.arange(N, device=device)).any()
    module.reserve(5)
    module.compact()
    assert module.weight is weight
    assert weight.data_ptr() == module.arena.storage.data_ptr()
    assert_same_state(module, before)


def test_weight_of_ragged_rows_is_read():
    module = RAGGED(N, D, dtype=torch.float64)
    dense = module.to_embedding().weight
    weight = module.weight
    assert torch.equal(weight, dense) and weight.detach().numpy().shape == (N, D)
    scores = torch.randn(2, D, dtype=torch.float64) @ weight.t()
    assert type(scores) is torch.Tensor
    scores.square().sum().backward()
    assert module.arena.storage.grad.any() and module.chain.grad.any()


@every_class
def test_sharing(make):
    """Sharing the module shares the rows, and their gradient sums."""
    shared = make(N, D)
    model = nn.ModuleDict({"a": shared, "b": shared})
    assert len(list(model.parameters())) == len(list(shared.parameters()))
    (model["a"](IDS).sum() + model["b"](IDS).sum()).backward()
    twice = [p.grad.clone() for p in shared.parameters() if p.grad is not None]
    shared.zero_grad()
    shared(IDS).sum().backward()
    once = [p.grad for p in shared.parameters() if p.grad is not None]
    for a, b in zip(twice, once, strict=True):
        torch.testing.assert_close(a, 2 * b)


# ---- misuse ----------------------------------------------------------------------------------

MISUSES = {
    "above": lambda m: m(torch.tensor([N])),
    "negative": lambda m: m(torch.tensor([0, -1])),
    "float": lambda m: m(torch.tensor([1.0])),
    "bool": lambda m: m(torch.tensor([True])),
    "int8": lambda m: m(torch.tensor([1], dtype=torch.int8)),
    "empty-float": lambda m: m(torch.tensor([])),
    "list": lambda m: m([1, 2]),
    "none": lambda m: m(None),
    "no-ids": lambda m: m(),
    "adam-on-sparse": None,
    "load-rows": lambda m: (
        m.load_state_dict(type(m)(N + 1, D).state_dict())
        if isinstance(m, nn.Embedding)
        else m.load_state_dict(ResizableEmbedding(N + 1, D, sizes=m.sizes).state_dict())
    ),
    "load-missing": lambda m: m.load_state_dict({}),
    "load-unknown": lambda m: m.load_state_dict({**m.state_dict(), "other": torch.zeros(1)}),
}


@our_classes
@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse(make, misuse):
    """The same type of exception as torch's, one clear line where torch's own is one, no change."""
    raised = {}
    for name, kind in (("torch", nn.Embedding), ("ours", make)):
        module = kind(N, D, sparse=misuse == "adam-on-sparse")
        before = state_of(module)
        call = MISUSES[misuse]
        if call is None:

            def call(module):
                optimizer = torch.optim.Adam(module.parameters())
                module(IDS).sum().backward()
                optimizer.step()

        with pytest.raises(Exception) as caught:  # noqa: B017 - the types are compared below
            call(module)
        raised[name] = caught
        assert_same_state(module, before)
    assert raised["ours"].type is raised["torch"].type
    if misuse in ("above", "negative", "float", "int8", "empty-float", "adam-on-sparse"):
        assert str(raised["ours"].value) == str(raised["torch"].value)


BAD_CONSTRUCTIONS = {
    "padding-above": {"padding_idx": N},
    "padding-below": {"padding_idx": -N - 1},
    "rows-negative": {"num_embeddings": -1},
    "rows-float": {"num_embeddings": 2.5},
    "integer-dtype": {"dtype": torch.int64},
    "weight-shape": {"_weight": torch.zeros(N + 1, D)},
    "unknown": {"paddding_idx": 1},
}


@our_classes
@pytest.mark.parametrize("options", BAD_CONSTRUCTIONS.values(), ids=BAD_CONSTRUCTIONS.keys())
def test_bad_construction(make, options):
    raised = []
    for kind in (nn.Embedding, make):
        if "num_embeddings" in options and make is RAGGED and kind is make:
            kind = partial(ResizableEmbedding, sizes=SIZES)
        with pytest.raises(Exception) as caught:  # noqa: B017 - the types are compared below
            kind(**{"num_embeddings": N, "embedding_dim": D, **options})
        raised.append(caught.value)
    assert type(raised[0]) is type(raised[1])
    if options.keys() & {"padding_idx", "_weight"} or options == {"num_embeddings": -1}:
        assert str(raised[1]) == str(raised[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_script_is_refused():
    """TorchScript is deprecated; torch.export takes its place."""
    torch.jit.script(nn.Embedding(N, D))
    with pytest.raises(ValueError):
        torch.jit.script(RAGGED(N, D))


def test_refusals_of_our_own():
    """What is not supported says so at construction."""
    with pytest.raises(RuntimeError, match="scale_grad_by_freq not supported with sparse"):
        ONE(N, D, sparse=True, scale_grad_by_freq=True)
    theirs = nn.Embedding(N, D, sparse=True, scale_grad_by_freq=True)
    with pytest.raises(RuntimeError, match="scale_grad_by_freq not supported with sparse"):
        theirs(IDS).sum().backward()
    with pytest.raises(RuntimeError, match="dtype must be"):
        RAGGED(N, D, dtype=torch.complex64)
    with pytest.raises(ValueError, match="sparse"):
        ONE(N, D, sparse=True, backend="reference")


def test_options_set_later():
    """What is refused at construction is refused at the next lookup, before any row changes."""
    for name, value, error in (
        ("max_norm", 0.5, NotImplementedError),
        ("sparse", True, RuntimeError),
        ("padding_idx", N, AssertionError),
        ("backend", "cuda", ValueError),
    ):
        module = RAGGED(N, D, scale_grad_by_freq=name == "sparse")
        before = state_of(module)
        setattr(module, name, value)
        with pytest.raises(error):
            module(IDS)
        assert_same_state(module, before)
    module = RAGGED(N, D)
    module.init = "xavier"
    with pytest.raises(ValueError, match="linear, isometric, padded or tails"):
        module.reset_parameters()
    theirs, ours = nn.Embedding(N, D), RAGGED(N, D)
    for made in (theirs, ours):
        made.padding_idx = -1  # counted from the end here, too
        made(torch.tensor([N - 1, 3])).sum().backward()
    assert not theirs.weight.grad[N - 1].any()
    start = int(ours.arena.row_start[N - 1])
    assert not ours.arena.storage.grad[start : start + int(MIXED[N - 1])].any()


def test_rows_cannot_be_added_from_outside():
    """num_embeddings is what it was: ids beyond the rows stay out of range."""
    module = RAGGED(N, D)
    module.num_embeddings = N + 5
    for call in (module, module.promote, module.sizes_of):
        with pytest.raises(IndexError):
            call(torch.tensor([N]))
    assert module.weight.shape == (N, D) and len(module.sizes_of()) == N
    with pytest.raises(AttributeError):
        module.sizes = (2, 8)


@every_class
def test_traced_in_a_parent(make):
    parent = nn.Sequential(make(N, D), nn.Linear(D, 2))
    traced = torch.fx.symbolic_trace(parent)
    assert [node.op for node in traced.graph.nodes][1] == "call_module"
    assert torch.equal(traced(IDS), parent(IDS))
    if make is RAGGED:
        with pytest.raises(TypeError, match="trace a module that holds it"):
            torch.fx.symbolic_trace(parent[0])


# ---- derivatives and transforms -----------------------------------------------------------------


def as_function(module, ids=IDS):
    """The module as a function of its parameters that take part."""
    names = [name for name, p in module.named_parameters() if p.numel()]
    leaves = [p.detach().clone().requires_grad_() for p in module.parameters() if p.numel()]
    return lambda *p: functional_call(module, dict(zip(names, p, strict=True)), (ids,)), leaves


@every_class
def test_gradgradcheck(make):
    function, leaves = as_function(make(N, D, dtype=torch.float64))
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("options", [{"padding_idx": 3}, {"scale_grad_by_freq": True}], ids=str)
def test_second_derivatives_with_options(options):
    """A gradient penalty, by the second derivative, as nn.Embedding gives it."""
    grads = []
    theirs, ours = pair(dtype=torch.float64, **options)
    for module in (theirs, ours):
        (first,) = torch.autograd.grad(module(IDS).pow(3).sum(), module.weight, create_graph=True)
        first.square().sum().backward()
        grads.append(gradient_of(module))
    assert torch.equal(*grads)
    largest = ResizableEmbedding.from_embedding(theirs, sizes=SIZES)
    storage = largest.arena.storage
    (first,) = torch.autograd.grad(largest(IDS).pow(3).sum(), storage, create_graph=True)
    first.square().sum().backward()
    rows = [storage.grad[start : start + D] for start in largest.arena.row_start[:-1].tolist()]
    torch.testing.assert_close(torch.stack(rows), grads[0])
    ragged = seeded(RAGGED, N, D, dtype=torch.float64, **options)
    storage = ragged.arena.storage
    (first,) = torch.autograd.grad(ragged(IDS).pow(3).sum(), storage, create_graph=True)
    first.square().sum().backward()
    step, direction = 1e-6, torch.randn_like(storage)

    def penalty(at):
        (first,) = torch.autograd.grad(
            functional_call(ragged, {"arena.storage": at}, (IDS,)).pow(3).sum(), at
        )
        return first.square().sum()

    ends = [(storage.detach() + s * step * direction).requires_grad_() for s in (1, -1)]
    slope = (penalty(ends[0]) - penalty(ends[1])) / (2 * step)
    torch.testing.assert_close((storage.grad * direction).sum(), slope, rtol=1e-5, atol=1e-5)


def test_sparse_has_no_second_derivative():
    module = RAGGED(N, D, sparse=True)
    (first,) = torch.autograd.grad(module(IDS).sum(), module.chain, retain_graph=True)
    with pytest.raises(RuntimeError, match="sparse=False"):
        torch.autograd.grad(module(IDS).pow(2).sum(), module.arena.storage, create_graph=True)


@every_class
def test_torch_func(make):
    module = make(N, D, dtype=torch.float64)
    params = {k: p.detach() for k, p in module.named_parameters()}

    def loss(params, ids):
        return functional_call(module, params, (ids,)).pow(3).sum()

    module(IDS).pow(3).sum().backward()
    expected = {k: p.grad for k, p in module.named_parameters()}
    found = grad(loss)(params, IDS)
    singly = vmap(grad(loss), in_dims=(None, 0))(params, IDS.flatten()[:, None])
    for key, value in expected.items():
        if value is not None and value.numel():
            torch.testing.assert_close(found[key], value)
            torch.testing.assert_close(singly[key].sum(0), value)
    torch.testing.assert_close(vmap(module)(IDS), module(IDS))
    torch.testing.assert_close(vmap(module, in_dims=1)(IDS), module(IDS.t()))
    stacked = {k: torch.stack([p, 2 * p]) for k, p in params.items()}
    both = vmap(lambda p: functional_call(module, p, (IDS,)))(stacked)
    torch.testing.assert_close(both[0], module(IDS))
    hessian = jacrev(jacrev(lambda p: loss(p, IDS)))(params)
    name = next(k for k, p in params.items() if p.numel())
    assert hessian[name][name].shape == 2 * params[name].shape


def test_forward_mode():
    """One size does as torch; several raise, rather than give a tangent of zero."""
    for make in (nn.Embedding, ONE):
        module = make(N, D)
        name, p = next((k, p) for k, p in module.named_parameters() if p.numel())
        _, tangent = torch.func.jvp(
            lambda v, m=module, n=name: functional_call(m, {n: v}, (IDS,)),
            (p.detach(),),
            (torch.ones_like(p),),
        )
        assert torch.equal(tangent, torch.ones(2, 3, D))
    ragged = RAGGED(N, D)
    for name, p in ragged.named_parameters():
        with pytest.raises(NotImplementedError, match="jvp"):
            torch.func.jvp(
                lambda v, n=name: functional_call(ragged, {n: v}, (IDS,)),
                (p.detach(),),
                (torch.ones_like(p),),
            )
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
            functional_call(ragged, {name: forward_ad.make_dual(p.detach(), p.detach())}, (IDS,))


@every_class
def test_compile(make):
    torch._dynamo.reset()
    module = make(N, D, padding_idx=0)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (5, 9, 2):
        ids = torch.randint(N, (n, 2))
        grads = []
        for run in (compiled, module):
            module.zero_grad()
            out = run(ids)
            out.square().sum().backward()
            grads.append([out, *(p.grad for p in module.parameters() if p.grad is not None)])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


def test_compile_again_after_growth():
    torch._dynamo.reset()
    module = RAGGED(N, D)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(IDS), module(IDS))
        module.promote(torch.arange(N))


@every_class
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.filterwarnings("ignore:No complete tensor found in the group")
def test_export(make, strict):
    torch._dynamo.reset()
    module = make(N, D)
    dynamic = ({0: torch.export.Dim("batch", min=2, max=100)},)
    program = torch.export.export(module, (IDS[0],), dynamic_shapes=dynamic, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    ids = torch.arange(N - 1)
    torch.testing.assert_close(loaded(ids), module(ids))


# ---- life of a module ----------------------------------------------------------------------------


@every_class
def test_meta_device(make):
    with torch.device("meta"):
        lazy = make(N, D)
    assert all(t.is_meta for t in lazy.state_dict().values())
    assert lazy(torch.zeros(2, 3, dtype=torch.long, device="meta")).shape == (2, 3, D)
    assert make(N, D, device="meta")(IDS.to("meta")).is_meta
    lazy = lazy.to_empty(device="cpu")
    torch.manual_seed(1)
    lazy.reset_parameters()
    made = seeded(make, N, D)
    assert_same_state(lazy, state_of(made))
    assert torch.equal(lazy(IDS), made(IDS))
    lazy(IDS).sum().backward()
    if make is RAGGED:
        assert lazy.promote(torch.tensor([0])).all()


@every_class
def test_skip_init(make):
    kind, options = (make.func, make.keywords) if isinstance(make, partial) else (make, {})
    module = nn.utils.skip_init(kind, N, D, **options)
    assert module(IDS).shape == (2, 3, D) and not next(module.parameters()).is_meta


@every_class
def test_loading_into_a_meta_module(make):
    module = make(N, D)
    with torch.device("meta"):
        lazy = make(N, D)
    lazy.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(lazy(IDS), module(IDS))


@every_class
@pytest.mark.parametrize("through", ["deepcopy", "pickle"])
def test_copies(make, through):
    module = make(N, D, padding_idx=2)
    other = copy.deepcopy(module) if through == "deepcopy" else pickle.loads(pickle.dumps(module))
    assert torch.equal(other(IDS), module(IDS)) and repr(other) == repr(module)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    assert not torch.equal(other(IDS), module(IDS))


@every_class
@pytest.mark.parametrize("move", ["half", "bfloat16", "double", "to"])
def test_moving_keeps_the_parameters(make, move):
    module = make(N, D)
    parameters = list(module.parameters())
    moved = module.to(torch.float64) if move == "to" else getattr(module, move)()
    assert all(a is b for a, b in zip(parameters, moved.parameters(), strict=True))
    out = moved(IDS)
    assert out.dtype == parameters[0].dtype
    out.sum().backward()


@every_class
def test_shared_memory(make):
    module = make(N, D).share_memory()
    assert all(t.is_shared() for t in module.state_dict().values() if t.numel())
    torch.testing.assert_close(module(IDS), module.weight[IDS])


def test_what_is_written_behind_the_counters_is_seen():
    """``.data`` leaves version counters alone; the composed hops must not."""
    module = RAGGED(N, D)
    before = module(IDS).detach()
    module.chain.data.mul_(2.0)
    assert not torch.equal(module(IDS), before)
    torch.testing.assert_close(module(IDS), copy.deepcopy(module)(IDS))


# ---- state dicts --------------------------------------------------------------------------------


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_class
def test_state_dict_is_tensors(make):
    module = make(N, D)
    state = through_file(module.state_dict())
    assert all(type(t) is torch.Tensor for t in state.values())
    other = make(N, D)
    assert other.load_state_dict(state).missing_keys == []
    assert torch.equal(other(IDS), module(IDS))


def test_rows_of_other_sizes_load():
    saved = RAGGED(N, D)
    saved.promote(torch.arange(0, N, 2))
    fresh = ResizableEmbedding(N, D, sizes=SIZES)
    storage = fresh.arena.storage
    fresh.load_state_dict(through_file(saved.state_dict()))
    assert fresh.arena.storage is storage and torch.equal(fresh(IDS), saved(IDS))
    assert torch.equal(fresh.sizes_of(), saved.sizes_of())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("parent", [False, True])
def test_a_table_loads_into_several_sizes(parent, assign):
    """From nn.Embedding, or ours of one size: rows at the largest size; hops stay."""
    for make in (nn.Embedding, ONE):
        plain, ours = make(N, D), RAGGED(N, D, padding_idx=0)
        adam = torch.optim.Adam(ours.parameters())
        ours(IDS).sum().backward()
        adam.step()
        chain = ours.chain.detach().clone()
        assert ours.promote(torch.arange(5)).any()
        source, target = (nn.Sequential(m) if parent else m for m in (plain, ours))
        given = source.state_dict()
        keys = list(given)
        assert (
            str(target.load_state_dict(given, assign=assign)) == "<All keys matched successfully>"
        )
        assert list(given) == keys
        assert torch.equal(ours(torch.arange(N)), plain.weight)
        assert ours.sizes_of().tolist() == [D] * N and torch.equal(ours.chain, chain)
        back = nn.Embedding(N, D)
        back.load_state_dict(ours.to_embedding().state_dict())
        assert torch.equal(back.weight, plain.weight)
    limited = ResizableEmbedding(N, D, sizes=SIZES, max_elements=32)
    for module, weight, words in (
        (RAGGED(N, D), torch.zeros(N + 1, D), "size mismatch for weight"),
        (RAGGED(N, D), torch.zeros(N, D + 1), "size mismatch for weight"),
        (limited, torch.zeros(N, D), "max_elements=32 allows fewer"),
    ):
        before = state_of(module)
        for strict in (True, False):
            with pytest.raises(RuntimeError, match=words):
                module.load_state_dict({"weight": weight}, strict=strict)
            assert_same_state(module, before)


def without_the_numbers(text):
    return re.sub(r"\[[\d, ]*\]|size mismatch for \S+", "", text)


def test_a_mismatch_in_the_words_of_torch():
    texts = []
    for make in (nn.Embedding, ONE, partial(ResizableEmbedding, sizes=SIZES)):
        module, other = make(N, D), make(N + 1, D)
        before = state_of(module)
        with pytest.raises(RuntimeError, match="size mismatch for") as caught:
            module.load_state_dict(other.state_dict())
        assert_same_state(module, before)
        texts.append(without_the_numbers(str(caught.value).splitlines()[1]))
    assert texts[0] == texts[1] == texts[2]
    module, before = RAGGED(N, D), None
    before = state_of(module)
    with pytest.raises(RuntimeError, match="other sizes"):
        module.load_state_dict(ResizableEmbedding(N, D, sizes=(2, D)).state_dict())
    assert_same_state(module, before)
    partly = {k: v for k, v in RAGGED(N, D).state_dict().items() if k != "arena.row_start"}
    with pytest.raises(RuntimeError, match="arena.row_start"):
        module.load_state_dict(partly)
    module.load_state_dict(partly, strict=False)
    assert_same_state(module, before)  # half a table is none
    capped = ResizableEmbedding(N, D, sizes=SIZES, max_elements=32)
    with pytest.raises(RuntimeError, match="max_elements"):
        capped.load_state_dict(ResizableEmbedding(N, D, sizes=SIZES, initial_size=D).state_dict())


ADAMS = {
    "Adam": partial(torch.optim.Adam, lr=0.01),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.01),
    "momentum": partial(torch.optim.SGD, lr=0.001, momentum=0.9),
}


@pytest.mark.parametrize("make_optimizer", ADAMS.values(), ids=ADAMS.keys())
@pytest.mark.parametrize("compacts", [False, True])
def test_optimizer_state_reloads_across_promotions(make_optimizer, compacts):
    """Saved, loaded elsewhere, promoted alike before any step there: the same bits from then on."""
    module = seeded(RAGGED, N, D)
    optimizer = make_optimizer(module.parameters())
    train(module, optimizer)
    module.promote(torch.tensor([0, 1, 4]))
    train(module, optimizer)
    state = through_file(module.state_dict())
    optimizer_state = through_file(optimizer.state_dict())

    # An optimizer that has stepped is followed; one that was only loaded has never been seen.
    other = ResizableEmbedding(N, D, sizes=SIZES)
    other.load_state_dict(state)
    loaded = make_optimizer(other.parameters())
    loaded.load_state_dict(copy.deepcopy(optimizer_state))  # torch takes the tensors themselves
    for one in (module, other):
        one.promote(torch.arange(0, N, 3))
        if compacts:
            one.compact()
    train(module, optimizer)
    train(other, loaded)
    assert torch.equal(module(torch.arange(N)), other(torch.arange(N)))

    # And the same process goes back to what it saved.
    module.load_state_dict(state)
    optimizer.load_state_dict(optimizer_state)
    module.promote(torch.arange(0, N, 3))
    if compacts:
        module.compact()
    train(module, optimizer)
    assert torch.equal(module(torch.arange(N)), other(torch.arange(N)))


# ---- the table ----------------------------------------------------------------------------------


def test_every_row_of_the_table_has_its_test():
    here = Path(__file__).parent
    page = (here.parents[1] / "docs" / "contract.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and "---" not in line]
    rows = [row for row in rows if not row.startswith("| feature")]
    assert len(rows) > 30
    files = {path.stem: path for folder in (here.parent, here) for path in folder.glob("test_*.py")}

    @cache
    def tests_of(file):
        tree = ast.parse(files[file].read_text(encoding="utf-8"))
        return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}

    for row in rows:
        named = re.findall(r"`(test_\w+)\.py::(test_\w+)`", row)
        assert named, f"no test is named in: {row}"
        for file, test in named:
            assert test in tests_of(file), f"{file}.py has no {test}: {row}"
