"""``weight`` of rows of several sizes: what clients of nn.Embedding do to it reaches the rows."""

import copy
import io
import math
import pickle
import re
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from esapn_kernels import (
    ResizableEmbedding,
    ResizableEmbeddingBag,
    ResizableEmbeddingCollection,
    optim,
)
from esapn_kernels.reference import split_chain
from esapn_kernels.weight import Weight

N, D = 12, 4
SIZES = (2, 3, D)
MIXED = torch.tensor(SIZES * (N // 3))
RAGGED = partial(ResizableEmbedding, sizes=SIZES, initial_size=MIXED, init="linear")
TOP = MIXED == D
IDS = torch.tensor([[3, 3, 0], [11, 3, 7]])
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def params(cases):
    return pytest.mark.parametrize("case", cases.values(), ids=cases.keys())


def rows_of(module):
    """Every row at its own size."""
    return [module.arena.read(x) for x in range(module.num_embeddings)]


def state_of(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def assert_same_state(module, before):
    after = module.state_dict()
    assert after.keys() == before.keys()
    for key, value in after.items():
        assert torch.equal(value, before[key]), key


def nearest_row(module, size, output):
    """By a dense solve in fp64 of the hops as they are: ``argmin |M e + c - output|``."""
    unit = torch.eye(size, dtype=torch.float64, device=output.device)
    bias = torch.zeros(size, dtype=torch.float64, device=output.device)
    for weight, shift in split_chain(module.chain.detach().double(), module.sizes):
        if weight.shape[1] >= size:
            unit, bias = unit @ weight.t(), weight @ bias + shift
    target = (output.double() - bias)[:, None].cpu()
    eps = torch.finfo(module.chain.dtype).eps
    solve = torch.linalg.lstsq(unit.t().cpu(), target, rcond=eps, driver="gelsd")
    return solve.solution[:, 0].to(output.device)


def assert_nearest(module, rows_before, dense_before, dense, **tolerance):
    """The rows hold what is nearest to ``dense``; where that did not change, the same bits."""
    rows = rows_of(module)
    for x, size in enumerate(module.sizes_of().tolist()):
        if torch.equal(dense[x], dense_before[x]):
            assert torch.equal(rows[x], rows_before[x]), x
        elif size == module.embedding_dim:
            assert torch.equal(rows[x], dense[x]), x
        else:
            expected = nearest_row(module, size, dense[x]).to(rows[x].dtype)
            torch.testing.assert_close(rows[x], expected, **tolerance)


# ---- values ----------------------------------------------------------------------------------


def table(*shape):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(*shape, generator=generator)


def scatter(w):
    w.scatter_(0, torch.tensor([[1, 4, 9, 0]], device=w.device), table(1, D).to(w))


def write_through_out(w):
    torch.add(w, table(N, D).to(w), out=w)


def set_data(w):
    w.data = table(N, D).to(w)


def set_all_the_rows(w):
    for row, vector in zip(w, table(N, D).to(w), strict=True):
        row.copy_(vector)


def swap_rows(w):
    w[[0, 5]] = w[[5, 0]]


VALUES = {
    "copy": lambda w: w.copy_(table(N, D)),
    "copy-some": lambda w: w[3:7].copy_(table(4, D)),
    "row": lambda w: w.__setitem__(4, table(D).to(w)),
    "number": lambda w: w.__setitem__((1, 2), 3.0),
    "rows": lambda w: w.__setitem__(torch.tensor([2, 0, 9]), table(3, D).to(w)),
    "list": lambda w: w.__setitem__(5, torch.tensor([1.0, -1.0, 2.0, 0.0])),
    "mask": lambda w: w.masked_fill_(w > 0, 0.0),
    "mask-set": lambda w: w.__setitem__(w < 0, -1.0),
    "column": lambda w: w[:, 1].zero_(),
    "transposed": lambda w: w.t()[2].mul_(3),
    "flat": lambda w: w.view(-1)[5:11].fill_(0.25),
    "split": lambda w: w.split(5)[1].mul_(2),
    "unbind": lambda w: w.unbind()[3].neg_(),
    "narrow": lambda w: w.narrow(0, 2, 3).add_(1),
    "select": lambda w: w.select(0, 3).zero_(),
    "each": set_all_the_rows,
    "swap": swap_rows,
    "mul": lambda w: w.mul_(0.5),
    "imul": lambda w: w.__imul__(2),
    "div-by-norm": lambda w: w.div_(w.norm(dim=1, keepdim=True)),
    "lerp": lambda w: w.lerp_(table(N, D).to(w), 0.25),
    "addcmul": lambda w: w.addcmul_(w, w, value=0.1),
    "index-copy": lambda w: w.index_copy_(0, torch.tensor([4, 0]), table(2, D).to(w)),
    "index-add": lambda w: w.index_add_(0, torch.tensor([4, 4]), table(2, D).to(w)),
    "scatter": scatter,
    "clamp": lambda w: w.clamp_(-0.5, 0.5),
    "renorm": lambda w: w.renorm_(2, 0, 0.5),
    "fill": lambda w: w.fill_(0.3),
    "zero": lambda w: w[6:8].zero_(),
    "out": write_through_out,
    "set-data": set_data,
    "eye": nn.init.eye_,
    "ones": nn.init.ones_,
    "constant": lambda w: nn.init.constant_(w, 0.3),
    "orthogonal": lambda w: nn.init.orthogonal_(w, gain=3, generator=torch.Generator()),
    "relu": lambda w: nn.functional.relu(w, inplace=True),
    "overload": lambda w: torch.ops.aten.mul_.Scalar(w, 2),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@params(VALUES)
def test_values_give_the_nearest_rows(case, dtype):
    """What the write makes of a plain table decides what the rows must come nearest to."""
    module = RAGGED(N, D, dtype=dtype)
    dense, rows, hops = module.weight.detach().clone(), rows_of(module), module.chain.clone()
    expected, held = dense.clone(), module.weight
    try:
        with torch.no_grad():
            case(expected)
    except (RuntimeError, NotImplementedError) as error:  # torch cannot, in this dtype
        with torch.no_grad(), pytest.raises(type(error), match=re.escape(str(error)[:40])):
            case(held)
        expected = dense
    else:
        with torch.no_grad():
            case(held)
    # Made by two calls: the rows round twice.
    tolerance = dict(atol=1e-5, rtol=1e-4) if case is VALUES["orthogonal"] else {}
    assert_nearest(module, rows, dense, expected, **tolerance)
    assert torch.equal(module.chain, hops)
    torch.testing.assert_close(held, module.weight)  # the held one reads as the outputs, too
    torch.testing.assert_close(held[IDS], module(IDS))


@pytest.mark.parametrize("sizes", [(2, 4, 8, 16, 64, 128), (1, 2), (7, 8, 33)], ids=str)
def test_random_tables_of_random_hops(sizes, device):
    torch.manual_seed(3)
    size = torch.tensor(sizes).repeat(5)
    module = ResizableEmbedding(len(size), sizes=sizes, initial_size=size, device=device)
    nn.init.normal_(module.chain, std=0.3)
    dense, rows = module.weight.detach().clone(), rows_of(module)
    vectors = torch.randn(len(size), sizes[-1], device=device)
    vectors[::4] = dense[::4]
    module.weight.data.copy_(vectors)
    assert_nearest(module, rows, dense, vectors)


def test_a_row_that_is_not_a_number_stays():
    module = RAGGED(N, D)
    with torch.no_grad():
        module.weight[4] = math.nan
    before = module.arena.storage.detach().clone()
    assert module.arena.read(4).isnan().all()
    with torch.no_grad():
        module.weight[5] = 1.0
    after = module.arena.storage.detach()
    assert torch.equal(after.isnan(), before.isnan())
    assert torch.equal(module.weight[5].detach(), torch.ones(D))


def test_another_output_dtype():
    module = RAGGED(N, D, dtype=torch.bfloat16, out_dtype=torch.float32)
    vectors = table(N, D)
    module.weight.data.copy_(vectors)
    assert module.weight.dtype == torch.float32
    assert torch.equal(module.weight[TOP].detach(), vectors[TOP].bfloat16().float())


# ---- draws -----------------------------------------------------------------------------------


def older_trunc_normal(w, mean=0.0, std=1.0, a=-2.0, b=2.0):
    """torch 2.11's, in the calls that it makes."""

    def cdf(x):
        return (1.0 + math.erf(x / math.sqrt(2.0))) / 2.0

    with torch.no_grad():
        low, high = cdf((a - mean) / std), cdf((b - mean) / std)
        w.uniform_(2 * low - 1, 2 * high - 1)
        w.erfinv_()
        w.mul_(std * math.sqrt(2.0))
        w.add_(mean)
        w.clamp_(min=a, max=b)


def divide_by_rows(w):
    w.data.uniform_(-1, 1).div_(torch.linspace(1, 2, len(w))[:, None])


DRAWS = {
    "uniform": nn.init.uniform_,
    "normal": nn.init.normal_,
    "normal-moved": partial(nn.init.normal_, mean=3.0, std=0.1),
    "normal-small": partial(nn.init.normal_, std=1e-4),
    "trunc-normal": nn.init.trunc_normal_,
    "trunc-normal-small": partial(nn.init.trunc_normal_, std=0.02),
    "trunc-normal-wide": partial(nn.init.trunc_normal_, std=5.0),
    "trunc-normal-tail": partial(nn.init.trunc_normal_, a=1.0, b=3.0),
    "older-trunc-normal": older_trunc_normal,
    "xavier-uniform": nn.init.xavier_uniform_,
    "xavier-normal": nn.init.xavier_normal_,
    "kaiming-uniform": nn.init.kaiming_uniform_,
    "kaiming-normal": nn.init.kaiming_normal_,
    "sparse": partial(nn.init.sparse_, sparsity=0.2),
    "normal_": lambda w: w.data.normal_(0, 0.1),
    "uniform_": lambda w: w.data.uniform_(-1.0 / N, 1.0 / N),
    "exponential_": lambda w: w.detach().exponential_(),
    "random_": lambda w: w.data.random_(10),
    "bernoulli_": lambda w: w.data.bernoulli_(0.3),
    "log_normal_": lambda w: w.data.log_normal_(std=0.5),
    "geometric_": lambda w: w.data.geometric_(0.5),
    "rescaled": lambda w: w.data.uniform_().sub_(0.5).mul_(2),
    "divided": divide_by_rows,
    "out": lambda w: torch.randn(*w.shape, out=w.detach()),
    "overload": lambda w: torch.ops.aten.normal_.default(w.data),
}


@pytest.mark.parametrize("init", ["linear", "isometric", "padded", "tails"])
@params(DRAWS)
def test_draws_have_their_spread_at_every_size(case, init):
    """And the numbers of torch at the largest size, from the same random stream."""
    sizes, each = (2, 4, 8, 32), 2000
    plain = nn.Embedding(each * len(sizes), sizes[-1])
    size = torch.tensor(sizes).repeat(each)
    module = ResizableEmbedding(len(size), sizes=sizes, initial_size=size, init=init)
    torch.manual_seed(5)
    case(plain.weight)
    following = torch.rand(1)
    torch.manual_seed(5)
    case(module.weight)
    assert torch.equal(torch.rand(1), following)
    theirs, ours = plain.weight.detach(), module.weight.detach()
    assert torch.equal(ours[size == sizes[-1]], theirs[size == sizes[-1]])
    for d in sizes[:-1]:
        expected, found = (t[size == d].var(0).mean().sqrt().item() for t in (theirs, ours))
        assert found == pytest.approx(expected, rel=0.06), d


def test_draws_have_the_mean_where_the_hops_reach_it():
    module = RAGGED(3000, D, initial_size=torch.tensor(SIZES * 1000))
    for hop, bias in split_chain(module.chain.detach(), SIZES):
        # Rows that sum to one carry (x, ..., x) to (x, ..., x).
        hop += (1 - hop.sum(1, keepdim=True)) / hop.shape[1]
        bias.fill_(0.25)
    nn.init.uniform_(module.weight, 2.0, 4.0)
    outputs = module.weight.detach()
    for k, dim in enumerate(SIZES):
        assert outputs[k::3].mean().item() == pytest.approx(3.0, abs=0.05), dim
        assert outputs[k::3].var(0).mean().sqrt().item() == pytest.approx(1 / 3**0.5, rel=0.05)


def test_some_rows_are_drawn_and_others_stay():
    module, plain = RAGGED(N, D), nn.Embedding(N, D)
    before = rows_of(module)
    for weight in (plain.weight, module.weight):
        torch.manual_seed(2)
        weight.data[5:9].uniform_()
        weight.data[-1].normal_()
    drawn = {5, 6, 7, 8, 11}
    for x, (row, old) in enumerate(zip(rows_of(module), before, strict=True)):
        assert torch.equal(row, old) == (x not in drawn)
        if x in drawn and TOP[x]:
            assert torch.equal(row, plain.weight[x].detach())


def test_a_drawn_object_reads_as_the_draft():
    module, plain = RAGGED(N, D), nn.Embedding(N, D)
    held = module.weight.data
    for weight in (plain.weight.data, held):
        torch.manual_seed(2)
        assert weight.normal_() is weight
    assert torch.equal(held, plain.weight)
    # A fresh one reads as the outputs, and so does this one once values were written to it.
    torch.testing.assert_close(module.weight[IDS], module(IDS))
    assert not torch.allclose(module.weight, plain.weight)
    held.copy_(table(N, D))
    torch.testing.assert_close(held, module.weight.detach())


def test_values_after_a_draw_are_values():
    module = RAGGED(N, D)
    before, dense = rows_of(module), module.weight.detach().clone()
    held = module.weight.data
    vectors = table(N, D)
    held.normal_()
    held.copy_(vectors)
    assert_nearest(module, before, dense, vectors)
    held.normal_()
    held.zero_()
    assert_nearest(module, before, dense, torch.zeros(N, D))
    draft = held.normal_().clone()
    held.add_(vectors)
    assert_nearest(module, before, dense, draft + vectors)


# ---- rules, as torch has them ----------------------------------------------------------------

WRITES = {
    "mul": lambda m: m.weight.mul_(2),
    "item": lambda m: m.weight.__setitem__(0, 1.0),
    "row": lambda m: m.weight[0].zero_(),
    "slice": lambda m: m.weight[2:4].normal_(),
    "out": lambda m: torch.add(torch.ones(N, D), 1, out=m.weight),
    "relu": lambda m: nn.functional.relu(m.weight, inplace=True),
}


@params(WRITES)
def test_a_leaf_is_not_written_to_while_gradients_are_recorded(case):
    module, plain = RAGGED(N, D), nn.Embedding(N, D)
    before = state_of(module)
    with pytest.raises(RuntimeError, match="requires grad") as theirs:
        case(plain)
    with pytest.raises(RuntimeError, match="requires grad") as ours:
        case(module)
    assert str(ours.value) == str(theirs.value)
    assert_same_state(module, before)
    with torch.no_grad():
        case(module)
    frozen = RAGGED(N, D, _freeze=True)
    frozen.load_state_dict(before)
    case(frozen)
    for changed in (module, frozen):
        assert not torch.equal(changed.arena.storage, before["arena.storage"])


def test_torch_nn_init_needs_no_mode():
    module = RAGGED(N, D)
    for function in (nn.init.normal_, nn.init.zeros_, nn.init.eye_, nn.init.trunc_normal_):
        before = module.arena.storage.detach().clone()
        assert function(module.weight).shape == (N, D)
        assert not torch.equal(module.arena.storage, before)
    nn.init.zeros_(module.weight[2])
    assert torch.equal(module.weight[2].detach(), torch.zeros(D))


def test_a_pending_backward_raises():
    for write in (lambda w: w.data.mul_(2), nn.init.normal_):
        module = RAGGED(N, D)
        loss = module(IDS).square().sum()
        write(module.weight)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        module(IDS).sum().backward()


def test_the_padding_row_is_written_like_any_other():
    module = RAGGED(N, D, padding_idx=3)
    nn.init.ones_(module.weight)
    assert torch.equal(module(torch.tensor([3])).detach(), torch.ones(1, D))
    module.weight.data[3].zero_()
    assert torch.equal(module(torch.tensor([3])).detach(), torch.zeros(1, D))


@pytest.mark.parametrize("fused", [False, True])
def test_state_of_optimizers_stays(fused):
    module = RAGGED(N, D)
    make = optim.Adam if fused else torch.optim.Adam
    optimizer = make(module if fused else module.parameters(), lr=0.1)
    module(IDS).square().sum().backward()
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    module.weight.data.copy_(table(N, D))
    nn.init.normal_(module.weight)
    after = optimizer.state_dict()
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    module(IDS).square().sum().backward()
    optimizer.step()


def test_freezing():
    module = RAGGED(N, D)
    assert module.weight.requires_grad and not module.weight.data.requires_grad
    weight = module.weight
    weight.requires_grad = False
    assert not weight.requires_grad and not any(p.requires_grad for p in module.parameters())
    assert not module(IDS).requires_grad
    assert module.weight.requires_grad_(True).requires_grad
    assert all(p.requires_grad for p in module.parameters())


# ---- a weight that is held -------------------------------------------------------------------

CHANGES = {
    "step": lambda m: torch.optim.SGD(m.parameters(), lr=0.5).step(),
    "promote": lambda m: (m.promote(torch.arange(N)), torch.optim.SGD(m.parameters(), lr=1).step()),
    "load": lambda m: m.load_state_dict(RAGGED(N, D).state_dict()),
    "other weight": lambda m: nn.init.normal_(m.weight),
    "hops": lambda m: m.chain.detach().mul_(0.5),
    "half": lambda m: m.half(),
    "compact": lambda m: (m.resize(torch.arange(6), D), m.compact(), nn.init.ones_(m.weight)),
}


@params(CHANGES)
def test_a_held_weight_reads_as_it_was_and_writes_to_what_is(case):
    module = RAGGED(N, D)
    module(IDS).square().sum().backward()
    held = module.weight
    draft = module.weight.data.normal_()
    held = module.weight
    was = held.detach().clone()
    case(module)
    assert torch.equal(held, was)
    now, rows = module.weight.detach().clone(), rows_of(module)
    assert not torch.equal(now, was)
    held.data[4].mul_(2)
    expected = now.clone()
    expected[4] *= 2
    assert_nearest(module, rows, now, expected)
    # The draft has been forgotten: these are values.
    now, rows = module.weight.detach().clone(), rows_of(module)
    draft.mul_(2)
    assert_nearest(module, rows, now, now * 2)


# ---- views -----------------------------------------------------------------------------------

VIEWS = {
    "data": lambda w: w.data,
    "detach": lambda w: w.detach(),
    "row": lambda w: w[1],
    "rows": lambda w: w[2:],
    "select": lambda w: w.select(1, 1),
    "narrow": lambda w: w.narrow(0, 1, 2),
    "transposed": lambda w: w.t(),
    "T": lambda w: w.T,
    "unbind": lambda w: w.unbind()[2],
    "split": lambda w: w.split(4)[1],
    "chunk": lambda w: w.chunk(3)[0],
    "iterated": lambda w: next(iter(w)),
    "flat": lambda w: w.view(-1),
    "flatten": lambda w: w.flatten(),
    "reshaped": lambda w: w.reshape(2, -1),
    "diagonal": lambda w: w.diagonal(),
    "contiguous": lambda w: w.contiguous(),
    "to": lambda w: w.to("cpu"),
    "float": lambda w: w.float(),
    "expanded": lambda w: w[None].expand(1, -1, -1),
    "integers": lambda w: w.data.view(torch.int32),
    "nested": lambda w: w.data[3:].t()[1][2:],
}
COPIES = {
    "clone": lambda w: w.clone(),
    "rows": lambda w: w[torch.tensor([1, 2])],
    "double": lambda w: w.double(),
    "sum": lambda w: w + 0,
    "transposed": lambda w: w.t().contiguous(),
    "cat": lambda w: torch.cat([w, w]),
    "sparse": lambda w: w.detach().to_sparse(),
    "looked-up": lambda w: nn.functional.embedding(IDS, w),
    "compared": lambda w: w > 0,
}


@params(VIEWS)
def test_views_write_through(case):
    module = RAGGED(N, D)
    view = case(module.weight)
    assert isinstance(view, Weight)
    dense, rows = module.weight.detach().clone(), rows_of(module)
    expected = dense.clone()
    with torch.no_grad():
        case(expected).zero_()
        view.zero_()
    assert not torch.equal(expected, dense)
    assert_nearest(module, rows, dense, expected)


@params(COPIES)
def test_copies_are_plain(case):
    module = RAGGED(N, D)
    found = case(module.weight)
    assert type(found) is torch.Tensor
    before = module.arena.storage.detach().clone()
    with torch.no_grad():
        found.zero_()
    assert torch.equal(module.arena.storage, before)


def test_operands_are_read():
    """Where another tensor is written to, a weight is an operand, with its gradient."""
    module = RAGGED(N, D)
    other = torch.zeros(N, D)
    other.copy_(module.weight)
    other.mul_(module.weight)
    other[2:4] = module.weight[2:4]
    other.sum().backward()
    assert module.arena.storage.grad.any() and module.chain.grad.any()
    module.zero_grad()
    layer = nn.Linear(D, N)
    layer.weight.data = module.weight.data
    layer.weight.data.zero_()  # torch lets this tensor lie in the memory of the table
    assert module.weight.any()


def test_writes_that_do_not_say_so():
    module, plain = RAGGED(N, D), nn.Embedding(N, D)
    plain.weight.data.copy_(module.weight)
    dense, rows = module.weight.detach().clone(), rows_of(module)
    for weight in (plain.weight, module.weight):
        nn.functional.embedding(IDS, weight.data, max_norm=0.3)
    assert_nearest(module, rows, dense, plain.weight.detach())
    assert module.weight[11].norm().item() == pytest.approx(0.3, abs=1e-4)
    held = module.weight.data
    nn.init.normal_(module.weight)
    before = state_of(module)
    with pytest.raises(RuntimeError, match="take it anew"):
        nn.functional.embedding(IDS, held, max_norm=0.1)
    assert_same_state(module, before)


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # torch's own, of plain tensors too
def test_numpy():
    module = RAGGED(N, D)
    arrays = [module.weight.detach().numpy(), module.weight.data.numpy()]
    arrays += [np.asarray(module.weight.detach()), module.weight.numpy(force=True)]
    for array in arrays:
        assert array.shape == (N, D) and not array.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    assert np.array(module.weight.detach()).flags.writeable  # a copy
    assert np.asarray(module.weight.detach(), dtype=np.float64).dtype == np.float64
    for function in (lambda w: w.numpy(), np.asarray):
        with pytest.raises(RuntimeError, match="Can't call numpy.* on Tensor that requires grad"):
            function(module.weight)
    before = module.arena.storage.detach().clone()
    torch.from_dlpack(module.weight.detach()).zero_()
    assert torch.equal(module.arena.storage, before)


def test_copies_pickles_and_files_are_plain():
    module = RAGGED(N, D)
    expected = module.weight.detach().clone()
    file = io.BytesIO()
    torch.save({"all": module.weight, "some": module.weight[2:]}, file)
    file.seek(0)
    saved = torch.load(file)
    found = [copy.deepcopy(module.weight), copy.copy(module.weight), saved["all"]]
    found += [pickle.loads(pickle.dumps(module.weight))]
    for tensor in found:
        assert type(tensor) is torch.Tensor and torch.equal(tensor, expected)
    assert type(saved["some"]) is torch.Tensor and torch.equal(saved["some"], expected[2:])
    assert repr(module.weight.data) == repr(expected)
    assert repr(module.weight).startswith("tensor([[") and "grad_fn" in repr(module.weight)


# ---- what cannot work ------------------------------------------------------------------------

SHAPE = "its shape, dtype and memory cannot be changed"
PARAMETER = re.escape("to tie a layer to it use F.linear(x, emb.weight)")
REFUSED = {
    "grad": (lambda m: m.weight.grad, "use arena.storage.grad and chain.grad"),
    "set-grad": (lambda m: setattr(m.weight, "grad", None), "use arena.storage.grad"),
    "retain-grad": (lambda m: m.weight.retain_grad(), "use arena.storage.grad"),
    "hook": (lambda m: m.weight.register_hook(print), "register them on arena.storage and chain"),
    "accumulate-hook": (
        lambda m: m.weight.register_post_accumulate_grad_hook(print),
        "register them on arena.storage and chain",
    ),
    "set": (lambda m: m.weight.set_(torch.zeros(N, D)), SHAPE),
    "resize": (lambda m: m.weight.data.resize_(N + 1, D), SHAPE),
    "resize-as": (lambda m: m.weight.data.resize_as_(torch.zeros(1)), SHAPE),
    "share-memory": (lambda m: m.weight.share_memory_(), SHAPE),
    "transpose": (lambda m: m.weight.data.t_(), SHAPE),
    "detach": (lambda m: m.weight.detach_(), SHAPE),
    "more-rows": (lambda m: setattr(m.weight, "data", torch.zeros(N + 1, D)), SHAPE),
    "other-dtype": (lambda m: setattr(m.weight, "data", torch.zeros(N, D).double()), SHAPE),
    "no-data": (lambda m: setattr(m.weight, "data", None), SHAPE),
    "foreach": (lambda m: torch._foreach_mul_([m.weight.data], 2), "write to it alone"),
    "Parameter": (lambda m: nn.Parameter(m.weight), PARAMETER),
    "Parameter-data": (lambda m: nn.Parameter(m.weight.data, requires_grad=False), PARAMETER),
    "view-grad": (lambda m: setattr(m.weight.data, "requires_grad", True), PARAMETER),
    "optimizer": (lambda m: torch.optim.Adam([m.weight]), "give the optimizer the module's"),
    "optimizer-data": (lambda m: torch.optim.SGD([m.weight.data]), "give the optimizer the"),
    "clip": (lambda m: nn.utils.clip_grad_norm_(m.weight, 1.0), "use arena.storage.grad"),
}


@pytest.mark.parametrize("frozen", [False, True])
@params(REFUSED)
def test_refusals(case, frozen):
    write, sentence = case
    module = RAGGED(N, D, _freeze=frozen)
    before = state_of(module)
    with torch.no_grad(), pytest.raises(RuntimeError, match=sentence) as caught:
        write(module)
    assert str(caught.value).startswith("weight of rows of several sizes is computed")
    assert_same_state(module, before)
    assert [p.requires_grad for p in module.parameters()] == [not frozen] * 2


def test_assigning_the_weight():
    module, other, layer = RAGGED(N, D), RAGGED(N, D), nn.Linear(D, N)
    before = state_of(module)
    for value in (nn.Parameter(torch.zeros(N, D)), torch.zeros(N, D), other.weight, None):
        with pytest.raises(AttributeError, match=r"use weight\.data\.copy_, or from_pretrained"):
            module.weight = value
    with pytest.raises(TypeError, match="cannot assign .* as parameter 'weight'"):
        layer.weight = module.weight
    assert_same_state(module, before)
    dense = module.weight.detach().clone()
    with torch.no_grad():
        module.weight *= 2  # which assigns what it has written
    assert torch.equal(module.weight[TOP], 2 * dense[TOP])


def test_hops_that_are_not_finite():
    module = RAGGED(N, D)
    module.chain.detach()[0] = math.nan
    before, held = module.arena.storage.detach().clone(), module.weight
    for write in (nn.init.normal_, lambda w: w.data.zero_()):
        with pytest.raises(RuntimeError, match=r"call reset_parameters\(\)"):
            write(held)
    assert torch.equal(module.arena.storage, before)


# ---- modes -----------------------------------------------------------------------------------


def test_compiled_traced_and_transformed_code_has_a_plain_tensor():
    module = RAGGED(N, D)
    seen = []

    def read(module):
        seen.append(type(module.weight))
        return module.weight * 2

    expected = module.weight * 2
    assert torch.equal(torch.compile(read, backend="eager", fullgraph=True)(module), expected)
    torch.func.vmap(lambda x: read(module)[0] * x)(torch.ones(2))
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        read(module)
    read(RAGGED(N, D, device="meta"))
    assert seen == [torch.Tensor] * len(seen) and len(seen) >= 3
    # What holds a weight can be compiled, too.
    scores = torch.compile(lambda x, w: x @ w.t(), backend="eager")
    x = torch.randn(2, D)
    weight = module.weight.detach()
    torch.testing.assert_close(scores(x, weight), x @ weight.t())
    with torch.no_grad():
        torch.testing.assert_close(scores(x, module.weight), x @ weight.t())
    assert nn.init.normal_(RAGGED(N, D, device="meta").weight).is_meta


def test_compiled_writes_to_what_it_is_given():
    module = RAGGED(N, D)
    write = torch.compile(lambda w: w.mul_(2), backend="eager")
    dense, rows = module.weight.detach().clone(), rows_of(module)
    write(module.weight.data)
    assert_nearest(module, rows, dense, 2 * dense)


def test_inference_mode():
    module = RAGGED(N, D)
    with torch.inference_mode():
        held = module.weight
        held.zero_()
        assert not module.weight[TOP].any()
        module.weight.data[2] = 1.0
        nn.init.normal_(module.weight)
        held.mul_(2)
        assert torch.equal(held[TOP], module.weight[TOP])
    dense, rows = module.weight.detach().clone(), rows_of(module)
    held.data.mul_(2)
    assert_nearest(module, rows, dense, 2 * dense)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(IDS).square().sum().backward()
    optimizer.step()


def test_another_default_device():
    module = RAGGED(N, D)
    vectors = table(N, D)
    torch.set_default_device("meta")
    try:
        module.weight.data.copy_(vectors)
        nn.init.trunc_normal_(module.weight)
        module.weight.data[1:3].normal_()
        module.weight.data[4] = 0.5
        module.weight.data.mul_(2)
    finally:
        torch.set_default_device(None)
    assert torch.equal(module.weight[5].detach() != 0, torch.ones(D, dtype=torch.bool))
    dense = module.weight.detach()
    assert torch.isfinite(dense).all() and (dense[TOP] != vectors[TOP]).all()


# ---- clients ---------------------------------------------------------------------------------


def normalize(m):
    m.weight.data = m.weight.data / m.weight.data.norm(dim=1, keepdim=True)


def first_row(m):
    with torch.no_grad():
        m.weight[0].fill_(0)


def augmented(m):
    m.weight.data *= 0.5


CLIENTS = {
    "deepctr": lambda m: nn.init.normal_(m.weight, mean=0, std=1e-4),
    "recbole": lambda m: nn.init.xavier_normal_(m.weight.data),
    "word2vec": lambda m: m.weight.data.uniform_(-1.0 / N, 1.0 / N),
    "padding": lambda m: m.weight.data[0].zero_(),
    "vectors": lambda m: m.weight.data.copy_(torch.from_numpy(np.ones((N, D)))),
    "vector": lambda m: m.weight.data.__setitem__(5, torch.arange(D)),
    "first-row": first_row,
    "normalize": normalize,
    "augmented": augmented,
}


@params(CLIENTS)
def test_clients(case):
    """With rows of the largest size alone it is nn.Embedding; others follow as they can."""
    plain = nn.Embedding(N, D)
    same = ResizableEmbedding.from_embedding(plain, sizes=SIZES)
    ragged = RAGGED(N, D)
    before = state_of(ragged)
    for module in (plain, same, ragged):
        torch.manual_seed(4)
        case(module)
    assert torch.equal(same.weight, plain.weight)
    assert not torch.equal(ragged.arena.storage, before["arena.storage"])
    ragged(IDS).sum().backward()


def test_bags_and_collections():
    bag = ResizableEmbeddingBag(N, D, sizes=SIZES, mode="sum")
    nn.init.normal_(bag.weight)
    bag.weight.data[3] = bag.weight.data[5]
    first, second = bag(torch.tensor([[3], [5]]))
    torch.testing.assert_close(first, second)
    tables = ResizableEmbeddingCollection({"a": 3, "b": 4}, sizes=SIZES)
    nn.init.xavier_uniform_(tables.rows.weight)
    tables.rows.weight.data[3:].zero_()
    looked_up = tables({"a": torch.arange(3), "b": torch.arange(4)})
    assert torch.equal(torch.cat([looked_up["a"], looked_up["b"]]), tables.rows.weight)


def test_tables_without_rows():
    module = ResizableEmbedding(0, D, sizes=SIZES)
    nn.init.normal_(module.weight)
    module.weight.data.zero_()
    assert module.weight.shape == (0, D)


@pytest.mark.parametrize("write", [nn.init.normal_, lambda w: w.copy_(table(N, D))])
def test_on_every_backend(write, backend, device):
    module = RAGGED(N, D, backend=backend, device=device)
    with torch.no_grad():
        weight = write(module.weight)
    top = torch.nonzero(TOP)[:, 0].to(device)
    assert torch.equal(module(top), weight[top])
    torch.testing.assert_close(module.weight[IDS.to(device)], module(IDS.to(device)))
