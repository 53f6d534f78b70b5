"""module.py, one size: ``weight`` is the Parameter, and all that clients do with it takes."""

import copy
import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune

from esapn_kernels import ResizableEmbedding, ResizableEmbeddingBag, ResizableEmbeddingCollection
from tests.kernels.beside import IDS, KINDS, D, N, backward, beside, outcome, same, seen, trained

ALL = ("table", "bag", "collection")


def adam(module):
    return torch.optim.Adam(module.parameters(), lr=0.1)


# What clients write: not what any module starts with.
TABLE = torch.arange(N * D, dtype=torch.float32).view(N, D).sub(9).div(4)


# ---- the Parameter and the state dict ------------------------------------------------------------


@beside(*ALL)
def test_weight_is_the_parameter(make):
    module = make()
    weight = module.weight
    assert module.weight is weight and type(weight) is nn.Parameter
    assert isinstance(module, make.torch_cls)
    return {
        "numbers": weight,
        "names": [name for name, _ in module.named_parameters()],
        "identity": [p is weight for p in module.parameters()],
        "buffers": list(module.buffers()),
        "children": list(module.children()),
        "state": list(module.state_dict()),
        "repr": repr(module).partition("(")[2],
    }


def test_there_is_no_chain():
    for module in (ResizableEmbedding(N, sizes=(D,)), ResizableEmbeddingBag(N, sizes=(D,))):
        assert module.chain is None


def test_a_bag_is_a_table_too():
    assert isinstance(ResizableEmbeddingBag(N, sizes=(D,)), ResizableEmbedding)


def test_the_collection_has_one_parameter():
    tables = ResizableEmbeddingCollection({"first": 3, "second": 4}, sizes=(D,))
    assert [name for name, _ in tables.named_parameters()] == ["rows.weight"]
    assert list(tables.state_dict()) == ["rows.weight"] and not list(tables.buffers())
    found = tables({"first": torch.tensor([2]), "second": torch.tensor([[0], [3]])})
    assert torch.equal(found["first"], tables.rows.weight[2:3])
    assert torch.equal(found["second"].view(2, D), tables.rows.weight[[3, 6]])


class Parent(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.head = nn.Linear(D, 2)
        self.tables = nn.ModuleDict({"a": make(), "b": make(5)})

    def forward(self, ids):
        return self.head(self.tables["a"](ids) + self.tables["b"](ids % 5))


@beside(*ALL)
def test_parameters_of_a_parent(make):
    """Names and order: optimizers and clients count parameters by their places."""
    parent = Parent(make)
    names = [name for name, _ in parent.named_parameters()]
    modules = [name for name, _ in parent.named_modules()]
    return names, modules, list(parent.state_dict()), list(parent.parameters())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("parent", [False, True])
@pytest.mark.parametrize("kind", ALL)
def test_state_dicts_load_both_ways(kind, parent, assign):
    for source, target in (KINDS[kind], KINDS[kind][::-1]):
        one, two = (Parent(make) if parent else make() for make in (source, target))
        state = one.state_dict()
        before = list(two.parameters())
        keys = two.load_state_dict(state, strict=True, assign=assign)
        assert not keys.missing_keys and not keys.unexpected_keys
        same(list(one.parameters()), list(two.parameters()))
        assert torch.equal(one(IDS), two(IDS))
        kept = all(a is b for a, b in zip(before, two.parameters(), strict=True))
        assert kept is not assign
        shared = [
            value.data_ptr() == state[key].data_ptr() for key, value in two.named_parameters()
        ]
        assert all(shared) if assign else not any(shared)


@beside(*ALL)
@pytest.mark.parametrize("strict", [False, True])
def test_state_dicts_that_do_not_fit(make, strict):
    module = make()
    before = seen(module.weight)

    def load(**tensors):
        result = module.load_state_dict(tensors, strict=strict)
        return result.missing_keys, result.unexpected_keys

    found = [
        outcome(load),
        outcome(load, weight=torch.ones(N + 1, D)),
        outcome(load, weight=torch.ones(N, D - 1)),
        outcome(load, weight=torch.ones(N * D)),
    ]
    assert torch.equal(module.weight, before)
    more = outcome(load, weight=torch.full((N, D), 2.0), other=torch.ones(1))
    return found, more, module.weight, outcome(load, weight=TABLE.double()), module.weight.dtype


@beside(*ALL)
def test_hooks_of_state_dicts(make):
    """What rewrites keys sees ``weight`` where torch's has it, and may."""
    parent, said = nn.Sequential(make()), []
    parent[0].register_load_state_dict_pre_hook(lambda m, state, prefix, *_: said.append(prefix))
    parent[0].register_state_dict_post_hook(lambda m, state, prefix, _: said.append(list(state)))
    parent.load_state_dict({"0.weight": TABLE})
    parent.state_dict()
    return said, parent[0].weight


# ---- reads and writes ----------------------------------------------------------------------------


def set_data(module):
    module.weight.data = TABLE.clone()


def write_rows(module):
    module.weight.data[2] = TABLE[2]
    module.weight.data[4:6] = TABLE[4:6]
    module.weight.data[:, 1].fill_(7.0)


@torch.no_grad()
def set_tensor(module):
    module.weight.set_(TABLE.clone())


@torch.no_grad()
def copy_in_place(module):
    module.weight.copy_(TABLE)
    module.weight[0] *= 3
    module.weight.mul_(2).add_(1)


def from_numpy(module):
    view = module.weight.detach().numpy()
    view[:] = TABLE.numpy()


def initialise(module):
    nn.init.xavier_uniform_(module.weight)
    nn.init.constant_(module.weight[1], 0.5)


WRITES = [set_data, write_rows, set_tensor, copy_in_place, from_numpy, initialise]


@beside(*ALL)
@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_is_looked_up(make, write):
    module = make()
    before, identity = module(IDS), module.weight
    write(module)
    assert module.weight is identity and not torch.equal(module(IDS), before)
    return [
        backward(module),
        module.weight,
        module.weight.grad,
        trained(module, torch.optim.SGD(module.parameters(), lr=0.1)),
    ]


@beside(*ALL)
def test_memory_is_shared(make):
    module = make()
    data, view, array = module.weight.data, module.weight[2], module.weight.detach().numpy()
    with torch.no_grad():
        module.weight.fill_(3.0)
    flat = module.weight.data.view(-1)
    weight = module.weight
    assert flat.data_ptr() == data.data_ptr()
    layout = weight.is_contiguous(), weight.storage_offset(), weight.is_leaf, weight._base is None
    held = weight.untyped_storage().nbytes()
    return data, view, float(array.sum()), layout, held


@beside(*ALL)
def test_gradients_can_be_read_and_set(make):
    module = make()
    found = [module.weight.grad, backward(module), seen(module.weight.grad)]
    module.weight.grad.mul_(0.5)
    backward(module)
    found.append(seen(module.weight.grad))
    module.weight.grad = TABLE.clone()
    torch.optim.SGD(module.parameters(), lr=0.5).step()
    module.zero_grad()
    out = module(IDS).sum()
    out.backward(retain_graph=True)
    out.backward()
    return [*found, module.weight, module.weight.grad, outcome(out.backward)]


@beside(*ALL)
def test_hooks_of_gradients(make):
    module, heard = make(), []
    module.weight.register_hook(lambda grad: heard.append(seen(grad)) or grad * 2)

    def step(weight):
        heard.append(seen(weight.grad))
        with torch.no_grad():
            weight.sub_(weight.grad)
        weight.grad = None

    handle = module.weight.register_post_accumulate_grad_hook(step)
    backward(module)
    assert module.weight.grad is None
    handle.remove()
    backward(module)
    assert len(heard) == 3
    return heard, module.weight, module.weight.grad


@beside(*ALL)
def test_freezing_and_thawing(make):
    module = make()
    module.weight.requires_grad = False
    found = [module(IDS), outcome(lambda: module(IDS).sum().backward())]
    module.weight.requires_grad = True
    found += [backward(module), seen(module.weight.grad)]
    module.requires_grad_(False)
    assert not module.weight.requires_grad
    module.weight.requires_grad_()
    return [*found, backward(module), module.weight.grad]


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "SparseAdam": lambda p: torch.optim.SparseAdam(p, lr=0.1),
}


@beside(*ALL)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_of_the_weight_alone(make, name):
    module = make(sparse=name == "SparseAdam")
    optimizer = OPTIMIZERS[name]([module.weight])
    found = trained(module, optimizer)
    assert set(optimizer.state) == {module.weight}
    return found, optimizer.state[module.weight], optimizer.state_dict()


@beside(*ALL)
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_an_optimizer_of_a_frozen_table(make, name):
    """Accepted, and idle until the table is thawed."""
    module = make()
    module.weight.requires_grad = False
    optimizer = OPTIMIZERS[name]([module.weight])
    start = seen(module.weight)
    optimizer.step()
    assert torch.equal(module.weight, start) and not optimizer.state
    module.weight.requires_grad = True
    return trained(module, optimizer), optimizer.state_dict()


class RowWise(torch.optim.Optimizer):
    """State made before the first step, one number a row."""

    def __init__(self, parameters, state):
        super().__init__(parameters, {})
        (weight,) = self.param_groups[0]["params"]
        self.state[weight]["sum"] = state

    def step(self):
        (weight,) = self.param_groups[0]["params"]
        total = self.state[weight]["sum"]
        total += weight.grad.square().view(len(total), -1).mean(1)
        weight.data -= 0.1 * weight.grad / total.sqrt().repeat_interleave(D).view(weight.shape)


@beside(*ALL)
@pytest.mark.parametrize("rows", [64, 256, 1000])
def test_state_of_an_optimizer_is_its_own(make, rows):
    module, state = make(rows), torch.ones(rows)
    optimizer = RowWise(module.parameters(), state)
    found = trained(module, optimizer)
    assert optimizer.state[module.weight]["sum"] is state
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return found, trained(module, optimizer), optimizer.state_dict()


@pytest.mark.parametrize("cls", [ResizableEmbedding, ResizableEmbeddingBag])
def test_memory_is_that_of_torch(cls):
    """No locations of rows: torch's lookup, gradients and optimizers need none."""
    module = cls(64, sizes=(D,))
    optimizer = adam(module)
    trained(module, optimizer)
    report = module.memory_report()
    assert (report.payload, report.slack, report.locations, report.chain) == (64 * D * 4, 0, 0, 0)
    assert report.optimizer >= 2 * report.payload


@beside(*ALL)
def test_initialised_once(make):
    """A mark on the Parameter stays with the table, as loaders rely on."""
    module = make()
    module.weight._is_hf_initialized = True
    module.load_state_dict({"weight": TABLE})
    module.weight.data.mul_(2)
    return getattr(module.weight, "_is_hf_initialized", False), vars(module.weight)


# ---- another weight ------------------------------------------------------------------------------


@beside(*ALL)
@pytest.mark.parametrize("shape", [(N, D), (N + 5, D), (N - 2, D), (N, D + 3), (N, 1)], ids=str)
def test_replaced_by_a_parameter(make, shape):
    module = make()
    fresh = nn.Parameter(torch.randn(shape))
    module.weight = fresh
    assert module.weight is fresh and list(module.parameters()) == [fresh]
    ids = torch.tensor([[0, 1], [shape[0] - 1, 1]])
    return [
        backward(module, ids),
        fresh.grad,
        outcome(module, torch.tensor([[shape[0]]])),
        outcome(module, torch.tensor([[-1]])),
        module.num_embeddings,
        module.embedding_dim,
        list(module.state_dict().values()),
        trained(module, adam(module)) if shape[0] >= N else None,
    ]


@beside(*ALL)
def test_not_replaced_by_a_tensor(make):
    module = make()
    identity = module.weight
    found = [
        outcome(setattr, module, "weight", TABLE.clone()),
        outcome(setattr, module, "weight", 3),
        outcome(setattr, module, "weight", nn.Linear(2, 2)),
    ]
    assert module.weight is identity and "weight" not in vars(module)
    return found, module(IDS)


@beside(*ALL)
def test_deleted(make):
    module, layer = make(), nn.Linear(2, 2)
    backward(layer, torch.ones(1, 2))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    del module.weight
    optimizer.step()  # of others, meanwhile
    found = [hasattr(module, "weight"), list(module.state_dict()), outcome(module, IDS)]
    found.append(repr(module).partition("(")[2])
    module.weight = nn.Parameter(TABLE.clone())
    found += [backward(module), list(module.state_dict())]
    module.weight = None
    optimizer.step()
    found += [list(module.state_dict()), list(module.parameters()), module.weight]
    return [*found, repr(module).partition("(")[2], outcome(copy.deepcopy(module), IDS)]


@beside("table", "collection")
@pytest.mark.parametrize("of", ["table", "head"])
def test_tied_with_a_linear_layer(make, of):
    module, head = make(), nn.Linear(D, N, bias=False)
    model = nn.Sequential(module, head)
    if of == "table":
        head.weight = module.weight
    else:
        module.weight = head.weight
    assert module.weight is head.weight and len(list(model.parameters())) == 1
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    found = []
    for _ in range(3):
        optimizer.zero_grad()
        model(IDS).logsumexp(-1).sum().backward()
        found.append(seen(module.weight.grad))
        optimizer.step()
    twin = copy.deepcopy(model)
    assert twin[0].weight is twin[1].weight and twin[0].weight is not module.weight
    return found, module.weight, list(model.state_dict()), model(IDS), twin(IDS)


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2

    def right_inverse(self, weight):
        return weight / 2


@beside(*ALL)
def test_parametrized(make):
    module = make()
    start = module(IDS)
    parametrize.register_parametrization(module, "weight", Doubled())
    assert torch.equal(module(IDS), start)
    found = trained(module, torch.optim.SGD(module.parameters(), lr=0.1))
    module.weight = TABLE
    found += [list(module.state_dict()), module.weight, module(IDS)]
    twin = copy.deepcopy(module)
    with parametrize.cached():
        found.append(twin(IDS))
    parametrize.remove_parametrizations(module, "weight")
    assert type(module) is make.cls and type(module.weight) is nn.Parameter
    return [*found, list(module.state_dict()), backward(module), module.weight.grad]


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, weight):
        self.calls += 1
        return weight * 1


@beside(*ALL)
def test_a_parametrization_is_computed_for_lookups_alone(make):
    """Once each: some change their own state whenever they are computed, as spectral norms do."""
    module, counted = make(), Counted()
    parametrize.register_parametrization(module, "weight", counted, unsafe=True)
    optimizer, found = adam(module), []
    calls = [
        lambda: backward(module),
        optimizer.step,
        lambda: repr(module),
        module.state_dict,
        module.double,
    ]
    for call in calls:
        counted.calls = 0
        call()
        found.append(counted.calls)
    return found


NORMS = {
    "spectral": parametrizations.spectral_norm,
    "weight": parametrizations.weight_norm,
    "spectral, old": nn.utils.spectral_norm,
}


@beside(*ALL)
@pytest.mark.parametrize("norm", NORMS)
def test_normed(make, norm):
    module = NORMS[norm](make())
    found = trained(module, torch.optim.SGD(module.parameters(), lr=0.1))
    return found, module.weight, module.state_dict(), module.eval()(IDS)


@beside(*ALL)
def test_pruned(make):
    module = make()
    prune.l1_unstructured(module, "weight", amount=0.5)
    found = trained(module, torch.optim.SGD(module.parameters(), lr=0.1))
    found += [list(module.state_dict()), module.weight, prune.is_pruned(module)]
    prune.remove(module, "weight")
    assert type(module.weight) is nn.Parameter
    return [*found, list(module.state_dict()), backward(module), module.weight.grad]


# ---- resized from outside ------------------------------------------------------------------------


def resize_token_embeddings(old, new):
    """As transformers does it: the old module takes the new one's rows and their number."""
    rows = min(old.num_embeddings, new.num_embeddings)
    new.weight.data[:rows, :] = old.weight.data[:rows, :]
    old.weight.data = new.weight.data
    old.num_embeddings = new.weight.data.shape[0]


@beside(*ALL)
@pytest.mark.parametrize("rows", [N + 5, N - 2])
def test_resized_from_outside(make, rows):
    old = make()
    first, identity = seen(old.weight[0]), old.weight
    resize_token_embeddings(old, make(rows))
    assert old.weight is identity and torch.equal(old.weight[0], first)
    ids = torch.tensor([[rows - 1, 0], [rows - 2, 1]])
    return [
        backward(old, ids),
        old.weight,
        old.weight.grad,
        outcome(old, torch.tensor([[rows]])),
        old.state_dict(),
        repr(old).partition("(")[2],
        outcome(copy.deepcopy(old), ids),
    ]


def test_ids_beyond_the_new_rows_are_refused():
    module = ResizableEmbedding(N, sizes=(D,))
    resize_token_embeddings(module, ResizableEmbedding(N + 5, sizes=(D,)))
    assert module(torch.tensor([N + 4])).shape == (1, D)
    with pytest.raises(IndexError):
        module(torch.tensor([N + 5]))
    assert module.sizes_of().tolist() == [D] * (N + 5)
    with pytest.raises(IndexError):
        module.sizes_of(torch.tensor([N + 5]))
    assert module.promote(torch.tensor([N + 4])).tolist() == [False]
    assert module.memory_report().payload == (N + 5) * D * 4


# ---- options -------------------------------------------------------------------------------------


@beside()
def test_ids_by_name(make):
    module, flat = make(), {"input": IDS.flatten(), "offsets": torch.tensor([0, 2])}
    # A table has no offsets.
    return module(input=IDS), outcome(module, **flat), outcome(module, ids=IDS)


@beside()
def test_from_pretrained_shares_memory(make):
    table = TABLE.clone()
    module = make.from_pretrained(table)
    table[3] = 5.0
    module.weight.data[0] = 7.0
    assert table[0, 0] == 7.0 and module.weight.data_ptr() == table.data_ptr()
    trains = make.from_pretrained(table, freeze=False)
    found = trained(trains, torch.optim.SGD(trains.parameters(), lr=0.1))
    return module(IDS), found, table, module.weight.requires_grad, trains.weight.requires_grad


@beside()
def test_from_pretrained_strided(make):
    """A transposed table and one with room between rows keep their strides."""
    wide = torch.randn(N, 2 * D)
    modules = [make.from_pretrained(t, freeze=False) for t in (torch.randn(D, N).t(), wide[:, :D])]
    found = [trained(m, adam(m)) for m in modules]
    return found, [m.weight.stride() for m in modules], wide


@beside()
def test_from_pretrained_from_a_parameter(make):
    """The Parameter itself: what trains there is looked up here."""
    source = nn.Parameter(TABLE.clone())
    module = make.from_pretrained(source, freeze=False)
    backward(module)
    with torch.no_grad():
        source.mul_(2)
    return module.weight is source, source.grad, module(IDS)


@beside("table")
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64], ids=str)
def test_from_pretrained_of_other_dtypes(make, dtype):
    table = TABLE.to(torch.int8 if dtype != torch.complex64 else dtype).to(dtype)
    return [
        outcome(lambda: make.from_pretrained(table)(IDS)),
        outcome(lambda: make.from_pretrained(table).weight.dtype),
        outcome(lambda: make.from_pretrained(table).state_dict()),
        outcome(lambda: make.from_pretrained(table, freeze=False)(IDS)),
        outcome(lambda: make(_weight=table)(IDS)),
    ]


@beside()
def test_given_rows(make):
    """``_weight`` is held, not copied, and its shape is checked."""
    table = TABLE.clone()
    module = make(_weight=table)
    table[3] = 5.0
    assert module.weight.data_ptr() == table.data_ptr()
    wrong = [outcome(make, _weight=torch.zeros(N + 1, D)), outcome(make, _weight=torch.zeros(N))]
    return backward(module), module.weight, module.weight.grad, wrong


OPTIONS = {
    "padding": {"padding_idx": 3},
    "padding from the end": {"padding_idx": -4},
    "norm": {"max_norm": 0.75},
    "another norm": {"max_norm": 0.75, "norm_type": 1.0},
    "sparse": {"sparse": True},
    "by frequency": {"scale_grad_by_freq": True},
    "sparse with padding": {"sparse": True, "padding_idx": 3},
    "norm with padding": {"max_norm": 0.75, "padding_idx": 3},
    "all but sparse": {"max_norm": 0.5, "padding_idx": 0, "scale_grad_by_freq": True},
    "sparse with norm": {"sparse": True, "max_norm": 0.5},
}


@beside()
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(make, options):
    module = make(**options)
    start, identity = seen(module.weight), module.weight
    found = [start, backward(module), module.weight.grad, seen(module.weight)]
    assert module.weight is identity and module.weight.grad.shape == (N, D)
    assert module.weight.grad.is_sparse == options.get("sparse", False)
    changed = bool((module.weight != start).any())
    assert changed == ("max_norm" in options)
    shown = repr(module).partition("(")[2]
    return [*found, trained(module, torch.optim.SGD(module.parameters(), lr=0.1)), shown]


@beside()
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_set_later(make, options):
    """Attributes are read at every lookup, and an ``embedding.padding_idx`` as it is given."""
    module = make()
    backward(module)
    module.zero_grad()
    for name, value in options.items():
        setattr(module, name, value)
    found = [backward(module), module.weight.grad, seen(module.weight)]
    for name in options:
        setattr(module, name, getattr(make(), name))
    module.zero_grad()
    return [*found, backward(module), module.weight.grad, seen(module.weight)]


STRIDES = {
    "rows": lambda: TABLE.clone(),
    "columns": lambda: TABLE.t().contiguous().t(),
    "part of wider rows": lambda: torch.cat([TABLE, TABLE], 1)[:, :D],
}


@beside("table", exact=False)
@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_of_every_backend(make, options, strides, backend, device):
    chosen = {"backend": backend} if make.is_ours else {}
    table, ids = STRIDES[strides](), IDS.to(device)
    module = make.from_pretrained(table, freeze=False, **options, **chosen).to(device)
    found = [backward(module, ids), module.weight]
    grad = module.weight.grad
    assert grad.shape == (N, D) and grad.is_sparse == options.get("sparse", False)
    return [*found, grad.coalesce() if grad.is_sparse else grad]


@beside("collection")
@pytest.mark.parametrize(
    "options", [v for v in OPTIONS.values() if "padding_idx" not in v], ids=str
)
def test_options_of_a_collection(make, options):
    module = make(**options)
    found = [backward(module), module.weight.grad, seen(module.weight)]
    return [*found, trained(module, torch.optim.SGD(module.parameters(), lr=0.1))]


@beside("bag")
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("last", [False, True])
def test_bags(make, mode, last):
    module = make(mode=mode, include_last_offset=last)
    ids, offsets = torch.tensor([1, 2, 2, 6, 0]), torch.tensor([0, 2, 2, 5][: 4 if last else 3])
    weights = torch.rand(5, requires_grad=True) if mode == "sum" else None
    out = module(ids, offsets, per_sample_weights=weights)
    out.square().sum().backward()
    module.mode = "sum"
    return out, module.weight.grad, None if weights is None else weights.grad, module(IDS)


@beside("table")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_ids(make, layout):
    lines = [torch.tensor([3, 3, 0]), torch.tensor([6]), torch.tensor([1, 3])]
    module = make()
    out = module(torch.nested.nested_tensor(lines, layout=layout))
    assert out.is_nested and out.layout == layout
    if layout == torch.jagged:  # torch has no derivative of the other
        sum(line.square().sum() for line in out.unbind()).backward()
    return out.detach(), module.weight.grad


@beside()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(make, dtype):
    module = make(dtype=dtype)
    return backward(module), module.weight, module.weight.grad


@beside()
@pytest.mark.parametrize(
    "ids", ["empty", "int32", "strided", "float", "list", "negative", "beyond"]
)
def test_ids(make, ids):
    given = {
        "empty": IDS[:0],
        "int32": IDS.int(),
        "strided": torch.stack([IDS, IDS], -1)[..., 0].t(),
        "float": IDS.float(),
        "list": IDS.tolist(),
        "negative": torch.tensor([[-1]]),
        "beyond": torch.tensor([[N]]),
    }[ids]
    module = make()
    found = outcome(module, given)
    return found, list(module.state_dict().values())


# ---- no rows, no columns -------------------------------------------------------------------------


@beside()
@pytest.mark.parametrize("shape", [(0, D), (N, 0), (0, 0)], ids=str)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op:UserWarning")
def test_without_rows_or_columns(make, shape):
    rows, dim = shape
    module = make(rows, dim)
    ids = IDS[:rows]
    out = module(ids)
    out.sum().backward()
    assert module.weight.grad.shape == shape
    module.load_state_dict(copy.deepcopy(module.state_dict()))
    more = trained(module, adam(module)) if rows else None
    return out, module.weight, module.weight.grad, list(module.state_dict()), more


@beside()
def test_any_id_of_no_rows_is_refused(make):
    return outcome(make(0), torch.tensor([[0]])), outcome(make(0), torch.tensor([[1, 0]]))


def test_a_collection_without_rows():
    tables = ResizableEmbeddingCollection({"first": 0, "second": 0}, sizes=(D,))
    none = torch.zeros(0, dtype=torch.int64)
    found = tables({"first": none, "second": none.view(0, 3)})
    assert found["first"].shape == (0, D) and found["second"].shape == (0, 3, D)
    assert tables.promote({"first": none})["first"].shape == (0,)
    assert tables.sizes_of()["second"].shape == (0,)
    assert tables.memory_report().payload == 0
    with pytest.raises(IndexError):
        tables({"first": torch.tensor([0])})


# ---- derivatives ---------------------------------------------------------------------------------


@beside()
def test_derivatives_are_those_of_differences(make):
    module = make(dtype=torch.float64)

    def lookup(weight):
        return functional_call(module, {"weight": weight}, (IDS,)).pow(3)

    weight = module.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(lookup, (weight,))
    if make.torch_cls is nn.Embedding:  # torch has no second derivative of a bag
        assert torch.autograd.gradgradcheck(lookup, (weight,))
    return torch.autograd.functional.jacobian(lookup, weight)


@beside("table")
def test_double_backward(make):
    module = make()
    out = module(IDS).pow(3).sum()
    (grad,) = torch.autograd.grad(out, module.weight, create_graph=True)
    grad.square().sum().backward()
    return grad, module.weight.grad


# ---- inputs that torch tests its own classes with ------------------------------------------------

MODULE_INPUTS = [
    ((4, 3), {}, torch.empty(2, 3, dtype=torch.long).random_(4)),
    ((4, 3), {}, torch.empty(1, 512, dtype=torch.long).random_(4).expand(7, 512)),
    ((4, 3), {"padding_idx": 1}, torch.tensor([[1, 0], [3, 1]])),
    ((1, 1), {}, torch.zeros(3, 5, dtype=torch.long)),
    ((20, 64), {"max_norm": 1.0, "norm_type": math.inf}, torch.randint(20, (2, 50))),
]


@beside()
@pytest.mark.parametrize("case", range(len(MODULE_INPUTS)))
def test_inputs_of_torch(make, case):
    (rows, dim), options, ids = MODULE_INPUTS[case]
    module = make(rows, dim, **options)
    return backward(module, ids), module.weight, module.weight.grad


@pytest.mark.parametrize(
    "compute",
    [
        lambda m: prune.random_unstructured(m, "weight", 0.5),
        lambda m: parametrize.register_parametrization(m, "weight", Doubled()),
    ],
    ids=["pruned", "parametrized"],
)
def test_reports_and_exports_of_a_computed_weight(compute):
    module = ResizableEmbedding(10, 4, sizes=(4,))
    compute(module)
    assert module.memory_report().fixed == 10 * 4 * 4 and module.memory_report().optimizer == 0
    plain = module.to_embedding()
    assert torch.equal(plain.weight, module.weight) and plain.weight.requires_grad
    tables = ResizableEmbeddingCollection({"a": 10}, sizes=(4,))
    compute(tables.rows)
    assert torch.equal(tables.to_embeddings()["a"].weight, tables.rows.weight)
    assert tables({}) == {}


def test_locations_of_traced_code_are_not_kept():
    """What a fake mode computes holds no numbers, and later lookups need some."""
    module = ResizableEmbedding(10, 4, sizes=(4,))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(module.arena.layout.row_start, FakeTensor)
    assert module.arena.layout.row_start.tolist() == list(range(0, 40, 4))
