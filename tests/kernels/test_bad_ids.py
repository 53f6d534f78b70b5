"""bad_ids.py: a row stands in for ids out of range; beside lookups of the ids that it makes."""

import copy
import io
import os
import pickle
import threading
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from esapn_kernels import (
    ResizableEmbedding,
    ResizableEmbeddingBag,
    ResizableEmbeddingCollection,
    distributed,
    optim,
)
from esapn_kernels.bad_ids import stand_in
from tests.kernels.test_reports import replicate

N, D = 12, 4
SIZES = (2, 3, D)
MIXED = torch.tensor([2, 3, 4] * (N // 3))
ONE = {"sizes": (D,)}
RAGGED = {"sizes": SIZES, "initial_size": MIXED}
ROW = 2
LEAST, MOST = -(2**63), 2**63 - 1
IDS = torch.tensor([3, -1, N, 5, LEAST, MOST, ROW, 3])
MAPPED = torch.tensor([3, ROW, ROW, 5, ROW, ROW, ROW, 3])
BAD = 4

pytestmark = pytest.mark.filterwarnings(r"ignore:\d+ of \d+ ids:UserWarning")
tables = pytest.mark.parametrize("sizes", [ONE, RAGGED], ids=["one", "ragged"])


def pair(cls=ResizableEmbedding, row=ROW, **options):
    """The same table twice: with a row that stands in, and one that raises."""
    made = []
    for extra in ({"on_bad_ids": row}, {}):
        torch.manual_seed(1)
        made.append(cls(N, D, **options, **extra))
    return made


def state_of(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def assert_same_state(module, before):
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in after.items())


def assert_alike(module, plain, given=(IDS,), mapped=(MAPPED,)):
    """Outputs and gradients of both have equal bits."""
    out, expected = module(*given), plain(*mapped)
    assert torch.equal(out, expected)
    upstream = torch.randn(expected.shape, dtype=expected.dtype).to(expected.device)
    out.backward(upstream)
    expected.backward(upstream)
    for mine, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None and torch.equal(mine.grad.to_dense(), theirs.grad.to_dense())


# ---- lookups ----------------------------------------------------------------------------------


def a_million(rows, dtype):
    ids = torch.randint(rows, (1000, 1000))
    bad = torch.rand(ids.shape) < 0.01
    most = torch.iinfo(dtype).max
    ends = torch.tensor([-1, rows, -rows, 2 * rows, most, -most - 1])
    bad_ids = ends[torch.randint(len(ends), ids.shape)]
    return torch.where(bad, bad_ids, ids).to(dtype), bad


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("ragged", [False, True])
def test_a_million_ids(ragged, dtype):
    rows = 1000
    options = {"sizes": (2, 4), "initial_size": torch.tensor([2, 4] * 500)} if ragged else ONE
    ids, bad = a_million(rows, dtype)
    made = []
    for extra in ({"on_bad_ids": 7}, {}):
        torch.manual_seed(1)
        made.append(ResizableEmbedding(rows, D, **options, **extra))
    module, plain = made
    before = state_of(plain)
    assert_same_state(module, before)
    given = ids.clone()
    assert_alike(module, plain, (ids,), (ids.masked_fill(bad, 7),))
    assert module.bad_ids == int(bad.sum()) > 9000 and torch.equal(ids, given)
    assert_same_state(module, before)
    for call in (plain, plain.promote, plain.sizes_of):
        with pytest.raises(IndexError, match="index out of range in self"):
            call(ids)
    assert_same_state(plain, before)
    assert plain.bad_ids == 0


@tables
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_backends(backend, device, sizes, dtype):
    ids = torch.randint(-N, 2 * N, (10, 20), device=device).to(dtype)
    bad = (ids < 0) | (ids >= N)
    module, plain = pair(**sizes, backend=backend, device=device)
    assert_alike(module, plain, (ids,), (ids.masked_fill(bad, ROW),))
    assert module.bad_ids == int(bad.sum())


@tables
@pytest.mark.parametrize(
    "options",
    [
        {"padding_idx": 3},
        {"padding_idx": ROW},
        {"scale_grad_by_freq": True},
        {"sparse": True},
        {"sparse": True, "padding_idx": ROW},
        {"out_dtype": torch.float64},
        {"backend": "reference"},
        {"max_norm": 0.1},
        {"max_norm": 0.1, "backend": "reference"},
    ],
    ids=str,
)
def test_options(sizes, options):
    if "max_norm" in options and sizes is RAGGED:
        sizes = {"sizes": (D,), "out_dtype": torch.float64}
    module, plain = pair(**sizes, **options)
    assert_alike(module, plain)
    assert_same_state(module, state_of(plain))  # max_norm scales the same rows
    assert module.bad_ids == BAD


@tables
def test_ids_of_any_shape(sizes):
    module, plain = pair(**sizes)
    for ids in (
        torch.tensor(-1),
        torch.zeros(2, 0, dtype=torch.long),
        IDS.view(2, 4).t(),
        IDS[::3],
        torch.tensor([N]).expand(5),
    ):
        mapped = ids.masked_fill((ids < 0) | (ids >= N), ROW)
        assert torch.equal(module(ids), plain(mapped))
    expected = 1 + 0 + BAD + 0 + 5
    assert module.bad_ids == expected
    for refused in (torch.tensor([1.0]), torch.tensor([1], dtype=torch.int8), [1], None):
        raised = []
        for one in (module, plain):
            with pytest.raises((TypeError, RuntimeError)) as caught:
                one(refused)
            raised.append((caught.type, str(caught.value)))
        assert raised[0] == raised[1]
    assert module.bad_ids == expected


@tables
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_ids(sizes, layout):
    module, plain = pair(**sizes)
    lines, mapped = IDS.split([3, 1, 4]), MAPPED.split([3, 1, 4])
    out = module(torch.nested.nested_tensor(list(lines), layout=layout))
    assert out.is_nested and out.layout == layout and module.bad_ids == BAD
    expected = plain(torch.nested.nested_tensor(list(mapped), layout=layout))
    for mine, theirs in zip(out.unbind(), expected.unbind(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_bag_of_nested_ids():
    module, plain = pair(ResizableEmbeddingBag, **ONE)
    given, mapped = (
        torch.nested.nested_tensor(list(ids.split([3, 1, 4])), layout=torch.jagged)
        for ids in (IDS, MAPPED)
    )
    assert_alike(module, plain, (given,), (mapped,))
    assert module.bad_ids == BAD


def test_int32_ids_of_a_table_that_int32_does_not_count():
    rows, far = 2**31 + 10, 2**31 + 5
    ids = torch.tensor([-1, 5, 2**31 - 1, -(2**31)], dtype=torch.int32)
    assert stand_in(ids, rows, far).tolist() == [far, 5, 2**31 - 1, far]
    assert stand_in(ids, 2**31, 0).tolist() == [0, 5, 2**31 - 1, 0]
    assert stand_in(ids, 2**31 - 1, 0).tolist() == [0, 5, 0, 0]
    assert stand_in(torch.tensor([LEAST, MOST, far]), rows, far).tolist() == [far] * 3
    table = torch.ones(1, 1).expand(rows, 1)
    module = ResizableEmbedding.from_pretrained(table, on_bad_ids=far)
    assert module.sizes_of(ids).tolist() == [1] * 4
    assert module(ids).tolist() == [[1.0]] * 4 and module.bad_ids == 2


@tables
def test_fused_optimizers_step_the_row(sizes):
    module, plain = pair(**sizes)
    for one, ids in ((module, IDS), (plain, MAPPED)):
        optim.Adagrad(one, lr=0.1)
        one(ids).square().sum().backward()
    assert_same_state(module, state_of(plain))
    assert module.bad_ids == BAD


# ---- rows that move -----------------------------------------------------------------------------


@tables
def test_rows_that_move(sizes):
    module, plain = pair(row=0, **sizes)
    mapped = MAPPED.masked_fill(MAPPED == ROW, 0)
    ids = IDS.masked_fill(IDS == ROW, -7)
    mask = torch.arange(len(ids)) != 2
    for call in (
        lambda m, x: m.sizes_of(x),
        lambda m, x: m.promote(x, mask),
        lambda m, x: m.promote(x),
        lambda m, x: m.sizes_of(x),
        lambda m, x: m.resize(x, D),
    ):
        assert torch.equal(call(module, ids), call(plain, mapped))
        assert_same_state(module, state_of(plain))
    assert module.bad_ids == 0  # of lookups only


def test_replicated_tables_move_the_row():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        module, plain = pair(row=0, **RAGGED)
        distributed.replicate(module)
        mapped = IDS.masked_fill((IDS < 0) | (IDS >= N), 0)
        assert torch.equal(module.promote(IDS), plain.promote(mapped))
        assert_same_state(module, state_of(plain))
        wrapped = DistributedDataParallel(nn.ModuleList([module, nn.Linear(1, 1)]))
        assert wrapped.module[0](IDS).shape == (len(IDS), D)
        assert module.bad_ids == BAD
    finally:
        dist.destroy_process_group()


# ---- bags, collections --------------------------------------------------------------------------


@tables
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding_idx", [None, 3, ROW, ROW - N])
@pytest.mark.parametrize("bags", ["2-d", "offsets", "weights"])
def test_bags(sizes, mode, padding_idx, bags):
    module, plain = pair(ResizableEmbeddingBag, mode=mode, padding_idx=padding_idx, **sizes)
    others = {"2-d": (), "offsets": (torch.tensor([0, 1, 1, 5]),)}.get(bags)
    ids, mapped = (IDS, MAPPED) if bags == "offsets" else (IDS.view(2, 4), MAPPED.view(2, 4))
    if others is None:
        if mode != "sum":
            with pytest.raises(NotImplementedError):
                module(ids, None, torch.ones(2, 4))
            return
        others = (None, torch.randn(2, 4))
    assert_alike(module, plain, (ids, *others), (mapped, *others))
    assert module.bad_ids == BAD and "on_bad_ids=2" in repr(module)


@tables
def test_a_bag_of_bad_ids_only_is_empty_where_they_are_padding(sizes):
    module, _ = pair(ResizableEmbeddingBag, mode="mean", padding_idx=ROW, **sizes)
    out = module(torch.tensor([[-1, N], [3, -1]]))
    assert not out[0].any() and torch.equal(out[1], module(torch.tensor([[3]]))[0])
    assert module.bad_ids == 3


@tables
def test_bags_refuse_in_the_same_words(sizes):
    module, plain = pair(ResizableEmbeddingBag, **sizes)
    for arguments in ((IDS,), (IDS.double(), torch.tensor([0])), ([1], torch.tensor([0]))):
        raised = []
        for one in (module, plain):
            with pytest.raises(Exception) as caught:  # noqa: B017 - the types are compared below
                one(*arguments)
            raised.append((caught.type, str(caught.value)))
        assert raised[0] == raised[1]


class Batch:
    def keys(self):
        return ["item", "user"]

    def values(self):
        return torch.tensor([4, 5, -1, 7])

    def lengths(self):
        return torch.tensor([1, 1, 0, 2])


@pytest.mark.parametrize("sizes", [(D,), SIZES], ids=["one", "ragged"])
def test_collections(sizes):
    made = []
    for extra in ({"on_bad_ids": -1}, {}):
        torch.manual_seed(1)
        options = {"features": {"user": "user", "friend": "user", "item": "item"}}
        made.append(
            ResizableEmbeddingCollection({"user": 7, "item": 5}, sizes=sizes, **options, **extra)
        )
    module, plain = made
    ids = {
        "user": torch.tensor([[-1, 6], [7, 0]]),
        "item": torch.tensor([5, 4, LEAST], dtype=torch.int64),
        "friend": torch.tensor([11], dtype=torch.int32),  # a row of the arena, of another table
    }
    mapped = {
        "user": torch.tensor([[6, 6], [6, 0]]),
        "item": torch.tensor([4, 4, 4]),
        "friend": torch.tensor([6]),
    }
    found, expected = module(ids), plain(mapped)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert module.bad_ids == {"user": 3, "item": 2} and plain.bad_ids == {"user": 0, "item": 0}
    masks = {"user": torch.tensor([[False, False], [True, True]])}
    for call in (
        lambda m, x: m.promote(x, masks),
        lambda m, x: m.sizes_of(x),
        lambda m, x: m.resize(x, D),
    ):
        for a, b in zip(call(module, ids).values(), call(plain, mapped).values(), strict=True):
            assert torch.equal(a, b)
    assert_same_state(module, state_of(plain))
    assert module.bad_ids == {"user": 3, "item": 2}
    jagged = module(Batch())
    assert torch.equal(jagged["item"].values, plain({"item": torch.tensor([4, 4])})["item"])
    assert torch.equal(jagged["user"].values, plain({"user": torch.tensor([6, 6])})["user"])
    assert module.bad_ids == {"user": 5, "item": 3}
    assert "on_bad_ids=-1" in repr(module) and "on_bad_ids" not in repr(plain)
    with pytest.raises(KeyError, match="nothing"):
        module({"user": ids["user"], "nothing": ids["item"]})
    with pytest.raises(RuntimeError, match="Long, Int"):
        module({"user": ids["user"], "item": torch.tensor([1.0])})
    assert module.bad_ids == {"user": 5, "item": 3}
    other = pickle.loads(pickle.dumps(module))
    other(ids)
    assert other.bad_ids == {"user": 8, "item": 5} and module.bad_ids == {"user": 5, "item": 3}
    module.on_bad_ids = "raise"
    with pytest.raises(IndexError):
        module(ids)
    module.on_bad_ids = 5
    with pytest.raises(ValueError, match=r"a row in \[-5, 5\), got 5"):
        module(ids)


@pytest.mark.parametrize("sizes", [(D,), SIZES], ids=["one", "ragged"])
def test_the_tables_of_a_collection_warn_by_name(sizes):
    module = ResizableEmbeddingCollection({"user": 7, "item": 5}, sizes=sizes, on_bad_ids=0)
    ids = {"user": torch.tensor([7]), "item": torch.tensor([0, 9])}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            module(ids)
    assert [str(warning.message) for warning in said] == [
        f"{said_of} are out of range [0, {rows}): row 0 stands in for them; bad_ids counts them"
        for said_of, rows in (("1 of 1 ids of table 'user'", 7), ("1 of 2 ids of table 'item'", 5))
    ]
    assert {warning.filename for warning in said} == {__file__}


# ---- the argument -------------------------------------------------------------------------------


@tables
@pytest.mark.parametrize("value", ["clamp", "", None, N, -N - 1, 1.0, True, LEAST, "0"], ids=repr)
def test_wrong_values(sizes, value):
    words = r"on_bad_ids must be 'raise' or a row in \[-12, 12\), got "
    for make in (
        partial(ResizableEmbedding, N, D, **sizes),
        partial(ResizableEmbeddingBag, N, D, **sizes),
        partial(ResizableEmbeddingCollection, {"a": N, "b": 20}, sizes=sizes["sizes"]),
        partial(ResizableEmbedding.from_pretrained, torch.zeros(N, D)),
        partial(ResizableEmbedding.from_embedding, nn.Embedding(N, D)),
    ):
        with pytest.raises(ValueError, match=words):
            make(on_bad_ids=value)
    for cls in (ResizableEmbedding, ResizableEmbeddingBag):
        module, _ = pair(cls, **sizes)
        before = state_of(module)
        module.on_bad_ids = value
        calls = [lambda m: m.promote(IDS), lambda m: m.resize(IDS, D), lambda m: m.sizes_of(IDS)]
        for call in (*calls, lambda m: m(IDS.view(2, 4))):
            with pytest.raises(ValueError, match=words):
                call(module)
        assert_same_state(module, before)
        assert module.bad_ids == 0


@tables
def test_no_rows(sizes):
    sizes = sizes["sizes"]
    for row in (0, -1):
        with pytest.raises(ValueError, match=r"a row in \[0, 0\)"):
            ResizableEmbedding(0, D, sizes=sizes, on_bad_ids=row)
        with pytest.raises(ValueError, match=r"a row in \[0, 0\)"):
            ResizableEmbeddingCollection({"a": 3, "b": 0}, sizes=sizes, on_bad_ids=row)
    with pytest.raises((IndexError, RuntimeError)):  # of one size what torch raises
        ResizableEmbedding(0, D, sizes=sizes)(torch.tensor([0]))


@tables
def test_given_and_set(sizes):
    module, plain = pair(row=-1, **sizes)
    assert module.on_bad_ids == N - 1 and plain.on_bad_ids == "raise"
    assert "on_bad_ids=11" in repr(module) and "on_bad_ids" not in repr(plain)
    last = MAPPED.masked_fill((IDS < 0) | (IDS >= N), N - 1)
    assert torch.equal(module(IDS), plain(last))
    with pytest.raises(AttributeError):
        module.bad_ids = 0
    plain.on_bad_ids = -1
    assert torch.equal(module(IDS), plain(IDS)) and plain.bad_ids == BAD
    module.on_bad_ids = "raise"
    with pytest.raises(IndexError):
        module(IDS)
    assert module.bad_ids == 2 * BAD
    table = nn.Embedding(N, D)
    for options in ({}, {"sizes": SIZES}):
        made = ResizableEmbedding.from_embedding(table, on_bad_ids=ROW, **options)
        assert torch.equal(made(IDS), table(MAPPED)) and made.bad_ids == BAD
    with pytest.raises(IndexError):
        made.to_embedding()(IDS)


def test_a_table_resized_from_outside():
    module, _ = pair(**ONE)
    module.weight.data = torch.randn(N + 5, D)
    assert torch.equal(module(torch.tensor([N, N + 5])), module.weight[[N, ROW]])
    assert module.bad_ids == 1
    module.weight.data = torch.randn(ROW, D)
    with pytest.raises(ValueError, match=r"\[-2, 2\)"):
        module(IDS)


@tables
def test_nothing_is_registered(sizes):
    module, plain = pair(**sizes)
    module(IDS)
    names = [[name for name, _ in m.named_parameters()] for m in (module, plain)]
    buffers = [[name for name, _ in m.named_buffers()] for m in (module, plain)]
    assert names[0] == names[1] and buffers[0] == buffers[1]
    assert module.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(module.state_dict())
    module.load_state_dict(plain.state_dict())
    assert (module.bad_ids, plain.bad_ids) == (BAD, 0)


# ---- the warning --------------------------------------------------------------------------------


@tables
@pytest.mark.parametrize("training", [True, False])
def test_the_first_bad_ids_warn(sizes, training):
    for module in (
        pair(**sizes)[0].train(training),
        nn.Sequential(pair(**sizes)[0]),
        pair(ResizableEmbeddingBag, **sizes)[0],
    ):
        ids = IDS.view(2, 4)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            module(torch.tensor([[3]]))
            for _ in range(3):
                module(ids)
        assert [str(warning.message) for warning in said] == [
            "4 of 8 ids are out of range [0, 12): row 2 stands in for them; bad_ids counts them"
        ]
        assert said[0].category is UserWarning and said[0].filename == __file__
        table = module[0] if isinstance(module, nn.Sequential) else module
        assert table.bad_ids == 3 * BAD


def test_a_warning_that_is_an_error_loses_no_count():
    module, _ = pair(**ONE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="stands in"):
            module(IDS)
        module(IDS)
    assert module.bad_ids == 2 * BAD


# ---- transforms ---------------------------------------------------------------------------------


@tables
def test_torch_func(sizes):
    module, plain = pair(dtype=torch.float64, **sizes)
    ids, mapped = IDS.view(2, 4), MAPPED.view(2, 4)
    params = {name: p.detach() for name, p in module.named_parameters()}

    def loss(params, ids, m):
        return functional_call(m, params, (ids,)).pow(3).sum()

    def calls(m, ids):
        yield vmap(m)(ids)
        yield vmap(m, in_dims=1, out_dims=1)(ids)
        yield vmap(vmap(m))(ids[None])
        yield functional_call(m, params, (ids,))
        yield from grad(loss)(params, ids, m).values()
        yield from vmap(grad(loss), in_dims=(None, 0, None))(params, ids, m).values()
        yield torch.func.jvp(lambda x: m(ids) * x, (torch.ones(D),), (torch.ones(D),))[0]

    for mine, theirs in zip(calls(module, ids), calls(plain, mapped), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert module.bad_ids == 7 * BAD
    vmap(module)(mapped)
    assert module.bad_ids == 7 * BAD


@tables
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("bag", [False, True])
def test_compile(sizes, copied, bag):
    """Counts, without a break in the graph, and compiled once, whatever the count."""
    torch._dynamo.reset()
    cls = ResizableEmbeddingBag if bag else ResizableEmbedding
    module, plain = pair(cls, padding_idx=3, **sizes)
    if copied:
        module(IDS.view(2, 4))
        module = copy.deepcopy(module)
    before = module.bad_ids
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for turn in range(4):
        module.zero_grad()
        plain.zero_grad()
        ids, mapped = IDS.roll(turn).view(2, 4), MAPPED.roll(turn).view(2, 4)
        out, expected = compiled(ids), plain(mapped)
        torch.testing.assert_close(out, expected)
        out.square().sum().backward()
        expected.square().sum().backward()
        for mine, theirs in zip(module.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad)
    assert module.bad_ids == before + 4 * BAD and len(graphs) == 1


def test_compile_through_autograd():
    torch._dynamo.reset()
    for sizes in (ONE, RAGGED):
        module, plain = pair(**sizes)
        compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
        for n in (8, 5, 3):
            torch.testing.assert_close(compiled(IDS[:n]), plain(MAPPED[:n]))
        bad = sum(int(((IDS[:n] < 0) | (IDS[:n] >= N)).sum()) for n in (8, 5, 3))
        assert module.bad_ids == bad


def test_a_compiled_collection():
    torch._dynamo.reset()
    module = ResizableEmbeddingCollection({"a": N, "b": 3}, sizes=SIZES, on_bad_ids=1)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    ids = {"a": IDS, "b": torch.tensor([3, 2])}
    for _ in range(3):
        found = compiled(ids)
    torch.testing.assert_close(found["b"], module({"b": torch.tensor([1, 2])})["b"])
    assert module.bad_ids == {"a": 3 * BAD, "b": 3}


@tables
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.filterwarnings("ignore:No complete tensor found in the group")
def test_exported_programs_map_and_do_not_count(sizes, strict):
    torch._dynamo.reset()
    module, plain = pair(**sizes)
    dynamic = ({0: torch.export.Dim("batch", min=2, max=100)},)
    program = torch.export.export(module, (IDS,), dynamic_shapes=dynamic, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    torch.testing.assert_close(loaded(IDS[:6]), plain(MAPPED[:6]))
    assert module.bad_ids == 0


@tables
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_programs(sizes):
    """torch.jit.trace maps and does not count; torch.fx calls the module, which counts."""
    module, plain = pair(**sizes)
    traced = torch.jit.trace(module, (IDS,), check_trace=False)
    torch.testing.assert_close(traced(IDS[:5]), plain(MAPPED[:5]))
    assert module.bad_ids == 0
    graph = torch.fx.symbolic_trace(nn.Sequential(module, nn.Identity()))
    assert torch.equal(graph(IDS), plain(MAPPED)) and module.bad_ids == BAD


@tables
def test_tensors_without_numbers(sizes):
    from torch._subclasses.fake_tensor import FakeTensorMode

    module, plain = pair(**sizes)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert module(mode.from_tensor(IDS)).shape == (len(IDS), D)
    options = {**sizes, "on_bad_ids": ROW}
    lazy = ResizableEmbedding(N, D, device="meta", **options)
    assert lazy(IDS.to("meta")).is_meta and lazy.bad_ids == module.bad_ids == 0
    lazy.to_empty(device="cpu").load_state_dict(plain.state_dict())
    assert torch.equal(lazy(IDS), plain(MAPPED)) and lazy.bad_ids == BAD


@tables
def test_inference_mode(sizes):
    with torch.inference_mode():
        module, plain = pair(**sizes)
        module(IDS)
    module(IDS)
    for one in pair(**sizes):
        with torch.inference_mode():
            one(MAPPED)
    assert module.bad_ids == 2 * BAD
    module, _ = pair(**sizes)
    with torch.inference_mode():
        module(IDS)
    module(IDS).sum().backward()
    assert module.bad_ids == 2 * BAD


# ---- copies, replicas, processes ----------------------------------------------------------------


@tables
@pytest.mark.parametrize("through", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_go_on_by_themselves(sizes, through):
    module, plain = pair(**sizes)
    module(IDS)
    other = through(module)
    assert other.bad_ids == BAD and repr(other) == repr(module)
    assert torch.equal(other(IDS), plain(MAPPED))
    assert (other.bad_ids, module.bad_ids) == (2 * BAD, BAD)
    module.double()(IDS)
    assert module.half().bad_ids == 2 * BAD


@tables
def test_modules_pickled_without_the_attribute(sizes):
    """They raise, and count once they are told a row."""
    _, plain = pair(**sizes)
    collection = ResizableEmbeddingCollection({"a": N}, sizes=(D,))
    for module in (plain, collection):
        del module.__dict__["on_bad_ids"], module.__dict__["_bad_ids"]
    other, both = pickle.loads(pickle.dumps(plain)), pickle.loads(pickle.dumps(collection))
    assert other.on_bad_ids == both.on_bad_ids == "raise"
    assert other.bad_ids == 0 and both.bad_ids == {"a": 0}
    for call in (partial(other, IDS), partial(both, {"a": IDS})):
        with pytest.raises(IndexError):
            call()
    assert "on_bad_ids" not in repr(other) + repr(both)
    other.on_bad_ids = both.on_bad_ids = ROW
    assert torch.equal(other(IDS), other(MAPPED)) and other.bad_ids == BAD
    assert both({"a": IDS})["a"].shape == (len(IDS), D) and both.bad_ids == {"a": BAD}


@tables
def test_replicas_of_data_parallel_count_for_the_module(sizes):
    module, plain = pair(**sizes)
    collection = ResizableEmbeddingCollection({"a": N}, sizes=sizes["sizes"], on_bad_ids=ROW)
    model = nn.ModuleDict({"table": module, "collection": collection})
    for _ in range(2):
        replica = replicate(model)
        torch.testing.assert_close(replica["table"](IDS), plain(MAPPED))
        replica["collection"]({"a": IDS})
    assert module.bad_ids == 2 * BAD and collection.bad_ids == {"a": 2 * BAD}


def test_threads_lose_no_count():
    module, _ = pair(**ONE)
    threads = [threading.Thread(target=lambda: [module(IDS) for _ in range(300)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert module.bad_ids == 4 * 300 * BAD


class Rows(Dataset):
    def __init__(self, module):
        self.module = module

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return self.module(IDS).detach(), self.module.bad_ids


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the workers are forked")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@tables
def test_workers_count_for_themselves(sizes):
    module, plain = pair(**sizes)
    module(IDS)
    loader = DataLoader(Rows(module), num_workers=1, multiprocessing_context="fork")
    found = [(rows[0], int(count)) for rows, count in loader]
    assert [count for _, count in found] == [2 * BAD, 3 * BAD] and module.bad_ids == BAD
    torch.testing.assert_close(found[0][0], plain(MAPPED).detach())


# ---- on a GPU -----------------------------------------------------------------------------------


@pytest.mark.cuda
@tables
def test_lookups_do_not_wait_and_graphs_count(sizes, no_waiting):
    module, plain = (m.cuda() for m in pair(**sizes))
    ids, mapped = IDS.cuda(), MAPPED.cuda()
    expected = plain(mapped)
    with no_waiting(), warnings.catch_warnings():
        warnings.simplefilter("error")  # there is none, for the host does not know
        out = module(ids)
    assert torch.equal(out, expected) and module.bad_ids == BAD
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = module(ids)
    before = module.bad_ids
    for _ in range(3):
        graph.replay()
    assert torch.equal(out, expected) and module.bad_ids == before + 3 * BAD


@pytest.mark.cuda
def test_a_graph_needs_the_count_before_it():
    module = pair(**ONE)[1].cuda()
    module(MAPPED.cuda())
    module.on_bad_ids, ids = ROW, IDS.cuda()
    with (
        pytest.raises(RuntimeError, match="look up once before"),
        torch.no_grad(),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        module(ids)
