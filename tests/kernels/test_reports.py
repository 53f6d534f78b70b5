"""Programs of users, of the kinds that public bug reports tell of: torch's class beside ours."""

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from esapn_kernels import ResizableEmbedding, ResizableEmbeddingBag, optim

N, SIZES = 12, (2, 4, 8)
IDS = torch.arange(N)


def ragged(cls=ResizableEmbedding):
    torch.manual_seed(0)
    module = cls(N, sizes=SIZES)
    module.promote(IDS[3:])
    module.promote(IDS[8:])
    return module


def one_size(cls=ResizableEmbedding):
    torch.manual_seed(0)
    return cls(N, 8, sizes=(8,))


def arguments(module):
    return (IDS, torch.tensor([0, 5])) if isinstance(module, nn.EmbeddingBag) else (IDS,)


def train(module, optimizer):
    optimizer.zero_grad()
    module(IDS).square().sum().backward()
    optimizer.step()


# ---- copies of a module and its optimizer -----------------------------------------------------

COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda pair: pickle.loads(pickle.dumps(pair))}
MOVES = {
    "growth": lambda m: m.resize(IDS, 8),
    "some grow": lambda m: m.promote(IDS[:5]),
    "compaction": lambda m: m.compact(),
    "growth, then compaction": lambda m: (m.resize(IDS[:2], 8), m.compact()),
}


def of_rows(module, optimizer, name):
    """The state ``name``, row by row, whatever free places hold."""
    state = optimizer.state[module.arena.storage][name]
    if not state.dim():
        return state
    starts, sizes = module.arena.row_start.tolist(), module.sizes_of().tolist()
    return torch.cat([state[a : a + d] for a, d in zip(starts, sizes, strict=False)])


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.Adagrad])
def test_rows_of_a_copied_pair_move_before_its_first_step(copied, move, kind):
    """The state of the copied optimizer goes with the copied rows, as that of the original does."""
    module = ragged()
    module.resize(IDS[4:6], 8)  # leaves holes
    optimizer = kind(module.parameters(), lr=0.1)
    train(module, optimizer)
    pairs = [(module, optimizer), COPIES[copied]((module, optimizer))]
    for m, o in pairs:
        MOVES[move](m)
        train(m, o)
        train(m, o)
    (module, optimizer), (other, its) = pairs
    assert torch.equal(module(IDS), other(IDS))
    for name in optimizer.state[module.arena.storage]:
        found, expected = (of_rows(m, o, name) for m, o in ((other, its), (module, optimizer)))
        assert torch.equal(found, expected)


# ---- several devices ----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_tensors_on_several_devices_are_refused(backend):
    """Numbers that are not there are not read: ids, or hops that no loader has brought."""
    module = ResizableEmbedding(N, sizes=SIZES, backend=backend)
    module(IDS)  # the hops are composed, and kept
    with pytest.raises(RuntimeError, match="on the same device, but got ids on meta"):
        module(IDS.to("meta"))
    chain = module.chain
    module.chain = nn.Parameter(chain.detach().to("meta"))
    for use in (lambda: module(IDS), lambda: module.weight, module.to_embedding):
        with pytest.raises(RuntimeError, match="on the same device.*chain on meta"):
            use()
    module.chain = chain
    assert torch.equal(module(IDS), module.weight)
    # As with torch's, a module without numbers takes any ids.
    for cls in (nn.Embedding, ResizableEmbedding):
        assert cls(N, 8, device="meta")(IDS).is_meta


# ---- what stands in the place of a Parameter ----------------------------------------------------


def replicate(network):
    """``torch.nn.parallel.replicate`` onto one device, the one that there is."""
    modules = list(network.modules())
    replicas = [module._replicate_for_data_parallel() for module in modules]
    for module, replica in zip(modules, replicas, strict=True):
        replica._former_parameters = OrderedDict()
        for name, child in module._modules.items():
            setattr(replica, name, replicas[modules.index(child)])
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, parameter.view_as(parameter))
        for name, buffer in module._buffers.items():
            setattr(replica, name, buffer.clone())
    return replicas[0]


@pytest.mark.parametrize("make", [ragged, one_size])
@pytest.mark.parametrize("cls", [ResizableEmbedding, ResizableEmbeddingBag])
def test_replicas_of_data_parallel(make, cls):
    model = nn.ModuleDict({"table": make(cls)})
    table, replica = model["table"], replicate(model)["table"]
    out = replica(*arguments(table))
    assert torch.equal(out, table(*arguments(table)))
    assert torch.equal(replica.weight, table.weight)
    out.square().sum().backward()
    found = [p.grad.clone() for p in table.parameters()]
    table.zero_grad()
    table(*arguments(table)).square().sum().backward()
    assert all(torch.equal(g, p.grad) for g, p in zip(found, table.parameters(), strict=True))


def test_rows_of_a_replica_do_not_move():
    table = ragged()
    replica = replicate(nn.ModuleDict({"table": table}))["table"]
    before, sizes = table(IDS), table.sizes_of()
    for move in (
        lambda: replica.promote(IDS),
        lambda: replica.resize(IDS, 8),
        lambda: replica.reserve(100),
        lambda: replica.compact(),
    ):
        with pytest.raises(RuntimeError, match="rows move only in a Parameter"):
            move()
    with pytest.raises(RuntimeError, match="is computed itself"):
        replica.weight.data.zero_()
    assert torch.equal(table(IDS), before) and torch.equal(table.sizes_of(), sizes)


@pytest.mark.parametrize("make", [ragged, one_size])
def test_replicas_of_a_fused_table_are_refused(make):
    table = make()
    optimizer = optim.SGD(table, lr=0.1)
    with pytest.raises(RuntimeError, match=r"use an optimizer of torch\.optim"):
        replicate(nn.ModuleDict({"table": table}))
    optimizer.detach()
    assert torch.equal(replicate(nn.ModuleDict({"table": table}))["table"](IDS), table(IDS))


class Doubled(nn.Module):
    def forward(self, tensor):
        return 2 * tensor


def test_parametrized_rows():
    table, doubled = ragged(), ragged()
    doubled.arena.storage.data.mul_(2)
    parametrize.register_parametrization(table.arena, "storage", Doubled())
    assert torch.equal(table(IDS), doubled(IDS))
    table(IDS).sum().backward()
    doubled(IDS).sum().backward()
    original = table.arena.parametrizations.storage.original
    assert torch.equal(original.grad, 2 * doubled.arena.storage.grad)
    with pytest.raises(RuntimeError, match="rows move only in a Parameter"):
        table.promote(IDS)
    for write in (
        lambda: table.weight.data.mul_(2),
        lambda: nn.functional.embedding(IDS, table.weight.detach(), max_norm=0.1),
    ):
        with pytest.raises(RuntimeError, match="is computed itself"):
            write()
    assert torch.equal(table(IDS), doubled(IDS))
    parametrize.remove_parametrizations(table.arena, "storage")
    assert table.promote(IDS[:3]).all()
    torch.testing.assert_close(table(IDS), doubled(IDS))


def test_parametrized_hops():
    table, doubled = ragged(), ragged()
    doubled.chain.data.mul_(2)
    parametrize.register_parametrization(table, "chain", Doubled())
    assert torch.equal(table(IDS), doubled(IDS))
    before = table(IDS)
    assert table.promote(IDS[:8]).all()
    torch.testing.assert_close(table(IDS), before)
    table.weight.data[9] = 1.0
    assert torch.equal(table(IDS[9]), torch.ones(8))


# ---- modes and memory ---------------------------------------------------------------------------

CALLS = {
    "promote": lambda m: m.promote(IDS),
    "reserve": lambda m: m.reserve(100),
    "compact": lambda m: m.compact(),
    "load": lambda m: m.load_state_dict(ragged().state_dict()),
    "load longer": lambda m: m.load_state_dict(grown().state_dict()),
    "write": lambda m: m.weight.data.mul_(2),
    "init": lambda m: nn.init.normal_(m.weight),
    "double": lambda m: m.double(),
}


def grown():
    module = ragged()
    module.resize(IDS, 8)
    return module


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("inside", [True, False])
def test_a_module_made_in_inference_mode(call, inside):
    """Beyond torch, whose parameters made there never train."""
    with torch.inference_mode():
        module = ResizableEmbedding(N, sizes=SIZES)
    with torch.inference_mode(inside):
        CALLS[call](module)
        assert module(IDS).isfinite().all()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    train(module, optimizer)
    assert module.resize(IDS, 8).all()


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_made_in_inference_mode(call, copied):
    """As of any module, its tensors are those of inference mode, where it does all that it does."""
    with torch.inference_mode():
        module = COPIES[copied](ragged())
        before = module(IDS)
        CALLS[call](module)
        after = module(IDS)
        assert after.isfinite().all()
        if call in ("promote", "reserve", "compact", "load"):
            torch.testing.assert_close(after, before)
        assert module.resize(IDS, 8).all()
        torch.testing.assert_close(module(IDS), after)


@pytest.mark.parametrize("make", [ragged, one_size])
def test_a_conversion_in_inference_mode(make):
    module = make()
    with torch.inference_mode():
        module.double()
    train(module, torch.optim.SGD(module.parameters(), lr=0.1))
    assert module(IDS).dtype == torch.float64


@pytest.mark.parametrize("make", [ragged, one_size])
@pytest.mark.parametrize("kind", [optim.SGD, optim.Adagrad, optim.Adam])
def test_a_fused_optimizer_made_in_inference_mode(make, kind):
    module, other = make(), make()
    expected = kind(other, lr=0.1)
    with torch.inference_mode():
        optimizer = kind(module, lr=0.1)
    for m in (module, other):
        m(IDS).square().sum().backward()
    assert torch.equal(module(IDS), other(IDS))
    assert optimizer.state_dict()["state"].keys() == expected.state_dict()["state"].keys()


@pytest.mark.parametrize("make", [ragged, one_size])
def test_to_empty_of_a_module_that_has_its_numbers(make):
    """Rows stay where they are: ``reset_parameters`` draws them, as of torch's class."""
    module = make()
    sizes = module.sizes_of()
    module.to_empty(device="cpu").reset_parameters()
    assert torch.equal(module.sizes_of(), sizes)
    assert 0.5 < module(IDS).detach().std() < 2
    assert module.promote(IDS[:3]).any() == (len(module.sizes) > 1)


# ---- traced by torch.jit ------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, ids):
        return nn.functional.linear(self.table(ids), self.table.weight)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_a_traced_module_looks_up_any_ids(tied, grad):
    """Nothing of the example is kept, and what grows or is written to later is seen."""
    table = ragged()
    module = Tied(table) if tied else table
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(module, (IDS[:3],))
    assert torch.equal(traced(IDS[5:8]), module(IDS[5:8]))
    table.resize(IDS, 8)
    table.weight.data.mul_(2)
    torch.testing.assert_close(traced(IDS[5:8]), module(IDS[5:8]))
    if grad:
        traced(IDS).square().sum().backward()
        found = table.arena.storage.grad.clone()
        table.zero_grad()
        module(IDS).square().sum().backward()
        torch.testing.assert_close(found, table.arena.storage.grad)


# ---- torch's way of loading by swaps ------------------------------------------------------------


@pytest.fixture
def swaps():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("swaps")
@pytest.mark.parametrize("source", [ragged, grown])
def test_tensors_swapped_while_loading(source):
    for make in (ragged, one_size, lambda: nn.Embedding(N, 8)):
        module = make()
        loaded = source() if make is ragged else make()
        train(module, torch.optim.SGD(module.parameters(), lr=0.1))
        held = list(module.parameters())
        module.double()
        module.load_state_dict(loaded.double().state_dict())
        assert torch.equal(module(IDS), loaded(IDS))
        assert all(a is b for a, b in zip(module.parameters(), held, strict=True))
    table = ragged()
    table.load_state_dict(source().state_dict())
    table.resize(IDS, 8)
    torch.testing.assert_close(table(IDS), source()(IDS))


# ---- averages of what a state dict holds --------------------------------------------------------

MOVED = {
    "promoted": lambda m: m.promote(IDS[2:3]),
    "grown": lambda m: m.resize(IDS, 8),
    "compacted": lambda m: (m.promote(IDS[2:3]), m.compact(), m.reserve(80)),
    "reclaimed": lambda m: (m.promote(IDS[:3]), m.arena.reclaim()),
    "freed, inserted": lambda m: (
        m.arena.free(IDS[2:3]),
        m.promote(IDS[3:4]),
        m.arena.insert(IDS[2:3], 1),
    ),
}


@pytest.mark.parametrize("moved", MOVED)
def test_an_average_whose_own_rows_moved_before_is_refused(moved):
    """Rows lay alike after the moves of both; then those of the source alone moved on."""
    source = ragged()
    source.reserve(80)
    average = copy.deepcopy(source)
    source.arena.forget_free_places()  # as those of a copy are
    for module in (source, average):
        MOVED[moved](module)
    assert torch.equal(source.arena.row_start, average.arena.row_start)

    def update():
        saved = source.state_dict()
        with torch.no_grad():
            for name, tensor in average.state_dict().items():
                if tensor.is_floating_point():
                    tensor.lerp_(saved[name], 0.5)
                else:
                    tensor.copy_(saved[name])

    expected = (source(IDS) + average(IDS)) / 2
    update()
    torch.testing.assert_close(average(IDS), expected)
    if moved == "grown":
        source.arena.free(IDS[:2])
        source.arena.insert(IDS[:2].flip(0), 0)
    else:
        source.promote(torch.tensor([0, 4]))
    update()
    with pytest.raises(RuntimeError, match="average by esapn_kernels.averaging"):
        average(IDS)
