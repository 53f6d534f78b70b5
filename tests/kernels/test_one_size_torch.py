"""module.py, one size: what torch does with modules gives of ours what it gives of its own."""

import copy
import gc
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.func import functional_call
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from esapn_kernels import ResizableEmbedding, ResizableEmbeddingBag, ResizableEmbeddingCollection
from esapn_kernels import optim as fused
from tests.kernels import one_size_worker
from tests.kernels.beside import (
    IDS,
    KINDS,
    D,
    N,
    backward,
    beside,
    outcome,
    same,
    seen,
    trained,
)

ALL = ("table", "bag", "collection")
WORKER = Path(one_size_worker.__file__)


def adam(module):
    return torch.optim.Adam(module.parameters(), lr=0.1)


class Parent(nn.Module):
    """A table before a layer."""

    def __init__(self, make, **options):
        super().__init__()
        self.table = make(**options)
        self.head = nn.Linear(D, 2)

    def forward(self, ids):
        return self.head(self.table(ids).tanh())


# ---- whole parameter lists -----------------------------------------------------------------------


@beside(*ALL)
@pytest.mark.parametrize("norm", [float("inf"), 2.0, 1.0])
@pytest.mark.parametrize("foreach", [None, True])
def test_clipping(make, norm, foreach):
    parent = Parent(make)
    backward(parent)
    norms = nn.utils.clip_grad_norm_(parent.parameters(), 1.0, norm_type=norm, foreach=foreach)
    clipped = [seen(p.grad) for p in parent.parameters()]
    nn.utils.clip_grad_value_(parent.parameters(), 0.01)
    return norms, clipped, [p.grad for p in parent.parameters()]


@beside(*ALL)
def test_parameters_as_one_vector(make):
    parent = Parent(make)
    vector = nn.utils.parameters_to_vector(parent.parameters())
    nn.utils.vector_to_parameters(vector.detach() * 2, parent.parameters())
    assert torch.equal(parent.table.weight.flatten(), 2 * vector[: N * D])
    return vector, backward(parent), [p.grad for p in parent.parameters()]


@beside(*ALL)
def test_averaged_model(make):
    parent = Parent(make)
    averages = [
        AveragedModel(parent, use_buffers=buffers, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        for buffers in (False, True)
    ]
    optimizer, found = adam(parent), []
    for _ in range(2):
        found.append(trained(parent, optimizer, 1))
        for average in averages:
            average.update_parameters(parent)
    return found, [average.state_dict() for average in averages], averages[0](IDS)


# ---- several processes ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """By rank what every case gave."""
    folder = tmp_path_factory.mktemp("ranks")
    path = os.pathsep.join([str(WORKER.parents[2]), *os.environ.get("PYTHONPATH", "").split(":")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, str(WORKER), str(rank), "2", str(folder)] for rank in range(2)]
    running = [
        subprocess.Popen(
            c, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for c in commands
    ]
    try:
        said = [process.communicate()[0] for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert not any(process.returncode for process in running), "\n".join(said)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("kind", one_size_worker.CLASSES)
@pytest.mark.parametrize("case", [case.__name__ for case in one_size_worker.CASES])
@pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch was built without gloo",
)
def test_ranks(ranks, case, kind):
    """Three iterations, the second of which a Parameter without gradient ends: pytorch#43259."""
    first, second = ranks
    theirs, ours = first[case, kind, "theirs"], first[case, kind, "ours"]
    assert isinstance(theirs, dict), theirs
    assert isinstance(ours, dict), ours
    same(theirs, ours)
    same(ours, second[case, kind, "ours"])
    assert list(ours) == ["table.weight", "head.weight", "head.bias"]


@beside("table")
def test_shared_memory_of_processes(make):
    """Two processes read and write one table."""
    module, answers = make().share_memory(), torch.zeros(D).share_memory_()
    assert module.weight.is_shared()
    context = torch.multiprocessing.get_context("spawn")
    said = context.SimpleQueue()
    process = context.Process(
        target=one_size_worker.hogwild, args=(module, answers, torch.tensor([[6, 6]]), said)
    )
    process.start()
    process.join()
    assert process.exitcode == 0 and said.get()
    assert torch.equal(answers, module.weight[0])
    return module.weight, trained(module, adam(module)), module.weight.is_shared()


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed")
def test_distributed_checkpoint(kind, tmp_path):
    """Saved from either class and loaded into the other, with Adam's state."""
    for source, target in (KINDS[kind], KINDS[kind][::-1]):
        one, two = Parent(source), Parent(target)
        adams = [adam(one), adam(two)]
        trained(one, adams[0])
        path = tmp_path / source.cls.__name__
        names = "model", "optimizer"
        dcp.save(
            dict(zip(names, get_state_dict(one, adams[0]), strict=True)),
            checkpoint_id=path,
            no_dist=True,
        )
        state = dict(zip(names, get_state_dict(two, adams[1]), strict=True))
        dcp.load(state, checkpoint_id=path, no_dist=True)
        set_state_dict(
            two, adams[1], model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        same(trained(one, adams[0]), trained(two, adams[1]))
        same(adams[0].state_dict()["state"], adams[1].state_dict()["state"])


# ---- without numbers -----------------------------------------------------------------------------


@beside(*ALL)
def test_meta_device(make):
    with torch.device("meta"):
        module = make(padding_idx=0) if make.build is not KINDS["collection"][1].build else make()
        out = module(IDS)
    assert module.weight.is_meta and out.is_meta and not list(module.buffers())
    state = {"weight": torch.randn(N, D)}
    loaded = copy.deepcopy(module)
    loaded.load_state_dict(state, assign=True)
    assert loaded.weight.data_ptr() == state["weight"].data_ptr()
    empty = module.to_empty(device="cpu")
    identity = empty.weight
    torch.manual_seed(0)
    empty.reset_parameters()
    found = [out.shape, seen(empty.weight)[1:], trained(empty, adam(empty))[0][1:]]
    assert empty.weight is identity
    return [*found, backward(loaded)[1:], loaded.state_dict()]


@beside(*ALL)
def test_loading_part_of_a_model_from_meta(make):
    """As loaders do: tensors are assigned one by one, and nothing is left on the meta device."""
    with torch.device("meta"):
        parent = Parent(make)
    for name, like in list(parent.named_parameters()):
        owner, _, last = name.rpartition(".")
        fresh = nn.Parameter(torch.randn(like.shape))
        setattr(parent.get_submodule(owner), last, fresh)
    assert not any(t.is_meta for t in [*parent.parameters(), *parent.buffers()])
    parent.to("cpu")
    return trained(parent, adam(parent)), list(parent.state_dict())


def maintain(module, name):
    """One call of ours that torch's class lacks, which leaves the rows as they are."""
    calls = {
        "promote": lambda: module.promote(IDS),
        "resize": lambda: module.resize(IDS, D),
        "reserve": lambda: module.reserve(5),
        "compact": lambda: module.compact(),
        "sizes_of": lambda: (module.sizes_of(), module.sizes_of(IDS)),
        "memory_report": lambda: str(module.memory_report()),
        "to_embedding": lambda: module.to_embedding(),
    }
    return calls[name]()


OURS = ["promote", "resize", "reserve", "compact", "sizes_of", "memory_report", "to_embedding"]


@beside(*ALL)
@pytest.mark.parametrize("name", OURS)
def test_training_after_inference_mode(make, name):
    """What ran in inference mode leaves tensors that train: pytorch#95957."""
    module = make()
    optimizer = adam(module)
    found = trained(module, optimizer)
    with torch.inference_mode():
        if make.is_ours:
            maintain(module, name)
    assert not module.weight.is_inference() and module.weight.requires_grad
    return [*found, *trained(module, optimizer)]


@beside(*ALL)
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_torch_calls_in_inference_mode(make, max_norm):
    module = make(max_norm=max_norm)
    state = {"weight": torch.randn(N, D)}
    with torch.inference_mode():
        found = [module(IDS), module.load_state_dict(state), module(IDS)]
        assert found[0].is_inference()
    found += trained(module, adam(module))
    with torch.inference_mode():
        module.reset_parameters()
    assert not module.weight.is_inference()
    return [found[0].clone(), *found[2:], *trained(module, adam(module))]


@beside(*ALL)
def test_made_in_inference_mode(make):
    with torch.inference_mode():
        module = make()
        out = module(IDS)
    again = module(IDS)
    return out.clone(), again.clone(), module.weight.is_inference(), outcome(backward, module)


@pytest.mark.parametrize("cls", [ResizableEmbedding, ResizableEmbeddingBag])
@pytest.mark.parametrize("name", OURS)
def test_another_default_device(cls, name):
    """The rows' device counts, not the one that tensors are made on."""
    module = cls(N, sizes=(D,))
    expected = maintain(copy.deepcopy(module), name)
    before = seen(module.weight)
    torch.set_default_device("meta")
    try:
        found = maintain(module, name)
    finally:
        torch.set_default_device(None)
    if isinstance(found, nn.Module):
        found, expected = found.state_dict(), expected.state_dict()
    same(expected, found)
    assert torch.equal(module.weight, before) and module.weight.device.type == "cpu"
    module(IDS).sum().backward()


def test_a_collection_on_another_default_device():
    tables = ResizableEmbeddingCollection({"first": 3, "second": 4}, sizes=(D,))
    ids = {"first": torch.tensor([2]), "second": torch.tensor([[0], [3]])}

    def results():
        return [
            tables(ids),
            tables.promote(ids),
            tables.promote(ids, {"first": torch.tensor([True], device="cpu")}),
            tables.resize(ids, D),
            tables.sizes_of(ids),
            tables.sizes_of(),
            str(tables.memory_report()),
            {name: table.weight for name, table in tables.to_embeddings().items()},
        ]

    expected = results()
    with torch.device("meta"):
        found = results()
    same(expected, found)


# ---- copies --------------------------------------------------------------------------------------


def through_torch(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": through_torch,
}


@beside("table", "bag")
@pytest.mark.parametrize("way", COPIES)
def test_copies(make, way):
    module = make(padding_idx=2)
    backward(module)
    module.weight.requires_grad = False
    module.weight.mark = "kept"
    twin = COPIES[way](module)
    assert type(twin) is make.cls and twin.weight.data_ptr() != module.weight.data_ptr()
    kept = [seen(twin.weight), seen(twin.weight.grad), twin.weight.requires_grad]
    twin.weight.requires_grad = True
    mark = getattr(twin.weight, "mark", None)
    return kept, mark, trained(twin, adam(twin)), module.weight, repr(twin).partition("(")[2]


@beside("table")
@pytest.mark.parametrize("way", COPIES)
def test_copies_of_tied_weights(make, way):
    model = nn.Sequential(make(), nn.Linear(D, N, bias=False))
    model[1].weight = model[0].weight
    twin = COPIES[way](model)
    assert twin[0].weight is twin[1].weight and twin[0].weight is not model[0].weight
    return trained(twin, adam(twin)), model(IDS)


@beside(*ALL)
def test_a_shallow_copy_shares_the_weight(make):
    module = make()
    twin = copy.copy(module)
    assert twin.weight is module.weight
    found = trained(twin, adam(twin)), module(IDS)
    twin.weight = nn.Parameter(torch.randn(N, D))
    return found, twin(IDS), module(IDS), module.weight is twin.weight


# ---- conversions ---------------------------------------------------------------------------------

CONVERSIONS = {
    "to": lambda module: module.to(torch.float64),
    "half": lambda module: module.half(),
    "type": lambda module: module.type(torch.float64),
    "double and back": lambda module: module.double().float(),
    "to_empty": lambda module: module.to_empty(device="cpu"),
    "meta": lambda module: module.to("meta"),
}


@beside(*ALL)
@pytest.mark.parametrize("mode", ["data", "swap", "overwrite"])
@pytest.mark.parametrize("name", CONVERSIONS)
def test_conversions(make, name, mode):
    """In each of torch's three ways to convert Parameters."""
    parent = Parent(make)
    optimizer, before, data = adam(parent), list(parent.parameters()), parent.table.weight.data
    trained(parent, optimizer)
    parent.zero_grad()
    torch.__future__.set_swap_module_params_on_conversion(mode == "swap")
    torch.__future__.set_overwrite_module_params_on_conversion(mode == "overwrite")
    try:
        CONVERSIONS[name](parent)
        if name == "to_empty":
            parent.load_state_dict({k: torch.ones_like(v) for k, v in parent.state_dict().items()})
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    kept = [a is b for a, b in zip(before, parent.parameters(), strict=True)]
    found = [kept, parent.table.weight.dtype, parent.table.weight.device.type, list(data.shape)]
    if name == "meta":
        return [*found, parent.table(IDS.to("meta")).shape]
    return [*found, trained(parent, adam(parent)), list(parent.state_dict())]


@beside(*ALL)
def test_swapped_tensors(make):
    module = make()
    fresh, old = nn.Parameter(torch.randn(N + 3, D)), seen(module.weight)
    torch.utils.swap_tensors(module.weight, fresh)
    assert torch.equal(fresh, old)
    ids = torch.tensor([[N + 2, 0]])
    return backward(module, ids), module.weight.grad, fresh.grad


# ---- transforms ----------------------------------------------------------------------------------


@beside(*ALL)
def test_functional_call(make):
    parent = Parent(make)
    start = seen(parent.table.weight)
    given = {name: torch.randn_like(p) for name, p in parent.named_parameters()}
    wide = {**given, "table.weight": torch.randn(N + 3, D)}
    found = [
        functional_call(parent, given, (IDS,)),
        functional_call(parent, wide, (torch.tensor([[N + 2, 0]]),)),
        outcome(functional_call, parent, given, (torch.tensor([[N]]),)),
    ]
    assert torch.equal(parent.table.weight, start)
    return found, parent(IDS)


@beside(*ALL)
def test_torch_func(make):
    parent = Parent(make)

    def loss(parameters, ids):
        return functional_call(parent, parameters, (ids,)).square().sum()

    parameters = {name: p.detach() for name, p in parent.named_parameters()}
    lines = IDS.view(2, 1, 3)
    found = [
        torch.func.grad(loss)(parameters, IDS),
        torch.func.vjp(lambda p: loss(p, IDS), parameters)[1](torch.ones(())),
    ]
    if make.torch_cls is nn.EmbeddingBag:  # torch has no more of it
        return found
    ones = {name: torch.ones_like(p) for name, p in parameters.items()}
    return [
        *found,
        torch.func.jacrev(loss)(parameters, IDS),
        torch.vmap(parent)(lines),
        torch.vmap(torch.func.grad(loss), (None, 0))(parameters, lines),
        torch.func.jvp(lambda p: loss(p, lines), (parameters,), (ones,)),
    ]


@beside("table", "collection")
def test_an_ensemble(make):
    models = [Parent(make) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")

    def call(parameters, buffers):
        return functional_call(base, (parameters, buffers), (IDS,))

    out = torch.vmap(call)(parameters, buffers)
    torch.testing.assert_close(out, torch.stack([model(IDS) for model in models]))
    return out, list(parameters)


# ---- tracers -------------------------------------------------------------------------------------


@beside()
def test_symbolic_trace(make):
    """Of a parent; the table is a leaf, as torch's modules are."""
    parent = Parent(make)
    traced = torch.fx.symbolic_trace(parent)
    assert torch.equal(traced(IDS), parent(IDS))
    assert traced.table is parent.table
    nodes = [(node.op, str(node.target)) for node in traced.graph.nodes]
    assert ("call_module", "table") in nodes
    return nodes, trained(traced, adam(traced))


@beside(*ALL)
@pytest.mark.parametrize("options", [{}, {"scale_grad_by_freq": True}], ids=str)
def test_compile(make, options):
    torch._dynamo.reset()
    parent = Parent(make, **options)
    compiled = torch.compile(parent, fullgraph=True, backend="aot_eager")
    optimizer = adam(parent)
    found = trained(compiled, optimizer)
    parent.table.weight.data = torch.randn(N, D)
    return [*found, *trained(compiled, optimizer)]


@beside(*ALL)
@pytest.mark.parametrize("strict", [False, True])
def test_export(make, strict):
    torch._dynamo.reset()
    parent = Parent(make)
    program = torch.export.export(parent, (IDS,), strict=strict)
    # A program loads where the package is not installed.
    assert not [n for n in program.graph.nodes if "esapn" in str(n.target)]
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file).module()
    return again(IDS), list(program.state_dict), list(program.graph_signature.parameters)


@beside(*ALL)
def test_activation_checkpointing(make):
    parent = Parent(make)
    checkpoint(parent, IDS, use_reentrant=False).square().sum().backward()
    anchor = torch.zeros(1, requires_grad=True)
    checkpoint(lambda zero: parent(IDS) + zero, anchor, use_reentrant=True).sum().backward()
    return [p.grad for p in parent.parameters()], anchor.grad


# ---- fused optimizers ----------------------------------------------------------------------------

FUSED = {
    "SGD": (fused.SGD, torch.optim.SGD, {"lr": 0.1}),
    "Adagrad": (fused.Adagrad, torch.optim.Adagrad, {"lr": 0.1}),
    "Adam": (fused.Adam, torch.optim.Adam, {"lr": 0.1}),
    "row-wise Adagrad": (fused.Adagrad, None, {"lr": 0.1, "rowwise": True}),
}
OF_TORCH = [name for name, (_, cls, _) in FUSED.items() if cls]
# Every row in every batch, for Adam moves rows on by their momentum.
EVERY = torch.tensor([[0, 1, 2, 3, 3], [4, 5, 6, 3, 0]])
CLASSES = {"table": ResizableEmbedding, "bag": ResizableEmbeddingBag}


def fused_one(kind="table", name="Adam"):
    module = CLASSES[kind](N, sizes=(D,), dtype=torch.float64)
    cls, _, settings = FUSED[name]
    return module, cls(module, **settings)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("name", OF_TORCH)
def test_fused_steps_are_those_of_torch(kind, name):
    module, rows = fused_one(kind, name)
    plain = KINDS[kind][0](dtype=torch.float64)
    plain.load_state_dict(module.state_dict())
    _, cls, settings = FUSED[name]
    optimizer = cls(plain.parameters(), **settings)
    identity = module.weight
    for _ in range(4):
        before = seen(module.weight)
        optimizer.zero_grad()
        backward(plain, EVERY)
        optimizer.step()
        backward(module, EVERY)
        assert module.weight.grad is None and module.weight is identity
        assert not torch.equal(module.weight, before)
        torch.testing.assert_close(module.weight, plain.weight)
    assert list(module.state_dict()) == ["weight"]
    for key in ("sum", "exp_avg", "exp_avg_sq"):
        if key in (theirs := optimizer.state[plain.weight]):
            torch.testing.assert_close(
                rows.state[module.weight][key].view(N, D), theirs[key], check_dtype=False
            )


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_table_keeps_its_weight(name):
    module, rows = fused_one(name=name)
    backward(module, EVERY)
    identity, before = module.weight, module.state_dict()["weight"].clone()
    for value in (nn.Parameter(torch.randn(N, D).double()), nn.Parameter(torch.randn(N + 1, D))):
        with pytest.raises(RuntimeError, match="detach") as caught:
            module.weight = value
        assert "\n" not in str(caught.value)
    assert module.weight is identity and torch.equal(module.weight, before)
    backward(module, EVERY)
    assert module.weight.grad is None and not torch.equal(module.weight, before)
    rows.detach()
    fresh = nn.Parameter(torch.randn(N + 3, D))
    module.weight = fresh
    backward(module, torch.tensor([[N + 2]]))
    assert module.weight is fresh and fresh.grad[N + 2].any()


def test_a_fused_weight_is_not_taken_away():
    """Neither deleted, as parametrizations do, nor replaced by a tensor, as pruning does."""
    module, _ = fused_one()
    identity, before = module.weight, seen(module.weight)
    for take in (
        lambda: delattr(module, "weight"),
        lambda: setattr(module, "weight", None),
        lambda: prune.l1_unstructured(module, "weight", amount=0.5),
        lambda: parametrizations.weight_norm(module),
    ):
        with pytest.raises(RuntimeError, match="detach"):
            take()
        assert module.weight is identity and torch.equal(module.weight, before)
        assert list(module.parameters()) == [identity] and type(module) is ResizableEmbedding
    backward(module, EVERY)
    assert module.weight.grad is None and not torch.equal(module.weight, before)


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("strides", ["columns", "part of wider rows"])
def test_fused_steps_of_strided_rows(name, strides):
    """Refused: the kernels step rows that lie one behind the other."""
    base = torch.randn(D, N).t() if strides == "columns" else torch.randn(N, 2 * D)[:, :D]
    cls, _, settings = FUSED[name]
    with pytest.raises(ValueError, match="contiguous"):
        cls(ResizableEmbedding.from_pretrained(base, freeze=False), **settings)
    module, rows = fused_one(name=name)
    module.weight.data = base
    before = base.clone()
    with pytest.raises(RuntimeError, match="contiguous"):
        backward(module, EVERY)
    assert torch.equal(module.weight, before) and rows.state_dict()["param_groups"]


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_optimizer_outlives_its_module(name):
    """What is left of it stands in no other optimizer's way."""
    module, rows = fused_one(name=name)
    backward(module, EVERY)
    del module
    gc.collect()
    layer = nn.Linear(2, 2)
    before = seen(layer.weight)
    backward(layer, torch.ones(1, 2))
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    assert not torch.equal(layer.weight, before)
    rows.step()
    assert rows.state_dict()["param_groups"][0]["lr"] == 0.1


@pytest.mark.parametrize("name", FUSED)
def test_data_of_a_fused_table(name):
    """Other numbers of the same shape step on; rows of another shape have no state."""
    module, rows = fused_one(name=name)
    backward(module, EVERY)
    numbers = torch.randn(N, D, dtype=torch.float64)
    module.weight.data = numbers.clone()
    backward(module, EVERY)
    assert module.weight.grad is None and (module.weight != numbers).all()
    module.weight.data = torch.randn(N + 3, D, dtype=torch.float64)
    before, ids = seen(module.weight), torch.tensor([[N + 2, 0]])
    if name == "SGD":  # which has none to miss
        backward(module, ids)
        changed = (module.weight != before).all(1).nonzero().flatten().tolist()
        assert changed == [0, N + 2] and module.weight.grad is None
    else:
        with pytest.raises(RuntimeError, match="detach") as caught:
            backward(module, ids)
        assert "\n" not in str(caught.value) and torch.equal(module.weight, before)
    rows.detach()
    backward(module, ids)
    assert module.weight.grad[N + 2].any()


@pytest.mark.parametrize("name", FUSED)
def test_fused_state_reloads(name):
    module, rows = fused_one(name=name)
    for _ in range(3):
        backward(module, EVERY)
    other, others = fused_one(name=name)
    file = io.BytesIO()
    torch.save({"module": module.state_dict(), "rows": rows.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other.load_state_dict(saved["module"])
    others.load_state_dict(saved["rows"])
    same(rows.state_dict(), others.state_dict())
    same(backward(module, IDS), backward(other, IDS))
    same(module.weight, other.weight)
