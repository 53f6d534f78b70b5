"""locations.py: tensors that come from outside are an arena, or are refused in one sentence."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from esapn_kernels import ResizableEmbedding, optim
from esapn_kernels.storage.arena import Arena
from esapn_kernels.storage.checks import digest, fault_of
from tests.kernels.layouts import HOSTS
from tests.kernels.test_arena import check_accounts

SIZES = (2, 4, 8)
N = 90
IDS = torch.arange(N)
KEYS = ["storage", "row_start", "page_level", "row_size"]


def mixed(**options):
    """Rows of every size, and free places of every size."""
    torch.manual_seed(0)
    module = ResizableEmbedding(N, sizes=SIZES, **options)
    module.promote(IDS[30:])
    module.promote(IDS[60:])
    return module


def arena_state(module):
    return {key: module.arena.state_dict()[key].clone() for key in KEYS}


def on_meta(**options):
    with torch.device("meta"):
        return ResizableEmbedding(N, sizes=SIZES, **options)


def free_places(arena):
    """Free starts by level, and free pages, told one by one."""
    starts, found = set(arena.row_start[:-1].tolist()), [[] for _ in arena.sizes]
    for page, level in enumerate(arena.page_level[:-1].tolist()):
        if level >= 0:
            places = [
                page * arena.page + i * arena.sizes[level]
                for i in range(arena.rows_per_page[level])
            ]
            found[level] += [start for start in places if start not in starts]
    return found, [p for p, level in enumerate(arena.page_level[:-1].tolist()) if level < 0]


def works(module, oracle):
    """Equal outputs now, and equal up to rounding after everything has moved."""
    assert torch.equal(module(IDS), oracle(IDS))
    assert torch.equal(module.sizes_of(), oracle.sizes_of())
    assert torch.equal(module.promote(IDS[:70]), oracle.sizes_of(IDS[:70]) < SIZES[-1])
    assert torch.allclose(module(IDS), oracle(IDS), atol=1e-5)
    module.compact()
    assert torch.allclose(module(IDS), oracle(IDS), atol=1e-5)


# ---- what a checkpoint holds --------------------------------------------------------------------


def test_what_follows_from_the_locations_is_in_no_checkpoint():
    arena = mixed().arena
    assert list(arena.state_dict()) == KEYS
    assert {name for name, _ in arena.named_buffers()} == {*KEYS[1:], "moves"}


@pytest.mark.parametrize("host", HOSTS)
def test_free_places_are_derived_lowest_first(host):
    module = mixed()
    module.arena._grow(3)
    module.arena.free(IDS[::7])
    for other in (module, copy.deepcopy(module)):
        rows, pages = free_places(other.arena)
        if other is not module:
            assert other.arena._free is None
        free = other.arena._stacks()
        base, counts = free.base.tolist(), free.count.tolist()
        stacks = [free.rows[b : b + c].tolist() for b, c in zip(base, counts, strict=False)]
        stacks[-1] = free.pages[: counts[-1]].tolist()
        assert [sorted(stack) for stack in stacks] == [*rows, pages]
        if other is not module:
            assert stacks == [sorted(places, reverse=True) for places in (*rows, pages)]
    # So the lowest place of a level is taken first.
    copied = copy.deepcopy(module)
    lowest = free_places(copied.arena)[0][1][0]
    copied.arena.insert(torch.tensor([0]), 1, backend=host)
    assert int(copied.arena.row_start[0]) == lowest


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(
    "move, anew",
    [
        (lambda m: m.to(torch.float64), True),
        (lambda m: m.load_state_dict(copy.deepcopy(m.state_dict())), True),
        (lambda m: setattr(m.arena, "row_start", m.arena.row_start.clone()), True),
        (lambda m: m.arena.reclaim(), False),
        (lambda m: m.compact(7), False),
        (lambda m: m.compact(), True),
    ],
    ids=["to", "load", "replace", "reclaim", "compact-step", "compact"],
)
def test_what_was_derived_is_kept_or_derived_anew(move, anew, host):
    module = mixed(backend=host)
    module.arena.reclaim()
    module.arena.free(IDS[60:], backend=host)
    first = module.arena._free
    move(module)
    module.arena.layout  # noqa: B018 - looks at the tensors
    assert (module.arena._free is not first) == anew
    known = module.arena._bits() if host == "native" else module.arena._stacks()
    rows, pages = free_places(module.arena)
    assert known.count.tolist() == [*map(len, rows), len(pages)]
    check_accounts(module.arena)


@pytest.mark.parametrize("host", HOSTS)
def test_a_resumed_run_has_the_same_bits(host):
    """Sums are in the order of ids, so they do not depend on where rows lie."""
    module = mixed(init_std=0.1, backend=host)
    module.reserve(300)
    ids = torch.randperm(N, generator=torch.Generator().manual_seed(1))[:40]
    module.arena.free(ids, backend=host)
    module.arena.insert(ids[20:], 1, backend=host)
    module.arena.insert(ids[:20], 0, backend=host)
    module.arena.free(ids[5:15], backend=host)
    module.arena.insert(ids[5:15], 2, backend=host)
    resumed = mixed(backend=host)
    resumed.load_state_dict(module.state_dict())
    outcome = []
    for run in (module, resumed):
        generator = torch.Generator().manual_seed(3)
        optimizer = torch.optim.SGD(run.parameters(), lr=0.05)
        for step in range(6):
            ids = torch.randint(N, (400,), generator=generator)
            optimizer.zero_grad()
            (run(ids) - torch.randn(400, 8, generator=generator)).square().mean().backward()
            optimizer.step()
            run.promote(ids[: 10 * step])
        rows = [run.arena.read(i) for i in range(N)]
        outcome.append((rows, run.chain.detach(), run.arena.row_start))
    (rows, chain, start), (others, other_chain, other_start) = outcome
    # Native kernels take the lowest places, of a loaded table as well; stacks have an order.
    assert torch.equal(start, other_start) == (host == "native")
    assert torch.equal(chain, other_chain)
    assert all(torch.equal(a, b) for a, b in zip(rows, others, strict=True))


# ---- tensors that are no arena ------------------------------------------------------------------


def swap(state, key, change):
    state[key] = change(state[key].clone())


def put(index, value):
    def change(tensor):
        tensor[index] = value
        return tensor

    return change


def two_in_one_place(start):
    start[1] = start[0]
    return start


BAD = {
    "start-dtype": ("row_start", lambda t: t.to(torch.int16), "row_start must be int32 or int64"),
    "start-float": ("row_start", torch.Tensor.float, "row_start must be int32 or int64"),
    "level-dtype": ("page_level", torch.Tensor.long, "page_level must be int8"),
    "size-dtype": ("row_size", torch.Tensor.int, "row_size must be int64"),
    "storage-dtype": ("storage", torch.Tensor.long, "storage must be floating-point"),
    "storage-rank": ("storage", lambda t: t[:, None], "does not consist of the pages"),
    "start-sink": ("row_start", put(-1, 0), "must end with -1"),
    "level-sink": ("page_level", put(-1, 0), "must end with -1"),
    "level-high": ("page_level", put(0, 3), "page_level must lie between -1 and 2"),
    "level-low": ("page_level", put(0, -2), "page_level must lie between -1 and 2"),
    "start-high": ("row_start", put(5, 1 << 20), "row_start must lie between -1 and"),
    "start-low": ("row_start", put(5, -2), "row_start must lie between -1 and"),
    "free-page": ("page_level", lambda t: t.fill_(-1), "page_level says is free"),
    "between": ("row_start", lambda t: put(0, int(t[0]) + 1)(t), "between two places"),
    "twice": ("row_start", two_in_one_place, "two rows of row_start lie in one place"),
}
every_fault = pytest.mark.parametrize("key, change, words", BAD.values(), ids=list(BAD))


@every_fault
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_a_bad_state_is_refused_before_anything_changes(key, change, words, strict, assign):
    module, source = mixed(), mixed()
    source.promote(IDS)
    state = {k: v.clone() for k, v in source.state_dict().items()}
    swap(state, "arena." + key, change)
    before = copy.deepcopy(module.state_dict())
    objects = [*module.parameters(), *module.buffers()]
    with pytest.raises(RuntimeError, match=words) as caught:
        module.load_state_dict(state, strict=strict, assign=assign)
    assert str(caught.value).count("\n") == 1, "more than one sentence"
    assert all(
        a is b for a, b in zip(objects, [*module.parameters(), *module.buffers()], strict=True)
    )
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


@every_fault
def test_bad_tensors_in_place_are_refused_at_first_use(key, change, words):
    """As loaders have it that write to ``_parameters`` and ``_buffers``."""
    module, oracle = mixed(), mixed()
    bad = change(arena_state(module)[key])
    if key == "storage":
        module.arena._parameters[key] = (
            nn.Parameter(bad) if bad.is_floating_point() else nn.Parameter(bad, False)
        )
    else:
        module.arena._buffers[key] = bad
    if key == "row_size":
        # Looked at with the locations, which kernels read.
        module.arena._buffers["row_start"] = module.arena.row_start.clone()
    for use in (
        lambda: module(IDS),
        lambda: module.promote(IDS),
        lambda: module.sizes_of(),
        lambda: module.arena.read(0),
        lambda: module.compact(),
        lambda: module.reserve(5),
    ):
        with pytest.raises(RuntimeError, match=words):
            use()
    module.arena._parameters["storage"] = oracle.arena.storage
    for name in KEYS[1:]:
        module.arena._buffers[name] = getattr(oracle.arena, name)
    works(module, mixed())


MANY = (1 << 18) + 1000
"""More rows than are looked at together."""
LATE = {
    "none": ([], [], ""),
    "twice, far apart": ([3], [MANY - 5], "two rows of row_start lie in one place"),
    "twice, at the end": ([MANY - 9], [MANY - 5], "two rows of row_start lie in one place"),
    "outside": ([MANY - 5], 1 << 30, "row_start must lie between -1 and"),
    "below": ([MANY - 5], -2, "row_start must lie between -1 and"),
    "between": ([MANY - 5], 1, "begins or ends between two places"),
    "no rows": ([3, MANY - 5], -1, ""),
}


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("ids, value, words", LATE.values(), ids=list(LATE))
def test_faults_among_many_rows(ids, value, words, index):
    arena = Arena(MANY, (2, 4, 8), level=torch.arange(MANY) % 3)
    state = arena.state_dict()
    start = state["row_start"] = state["row_start"].to(index)
    start[ids] = start[value] if isinstance(value, list) else value
    found = fault_of(state, MANY, arena.sizes, arena.page)
    assert words in found and bool(words) == bool(found)


def test_a_digest_of_many_rows():
    """All at once, in Python's integers; another start, or two that change places, changes it."""
    start = Arena(MANY, (2, 4, 8), level=torch.arange(MANY) % 3).row_start
    total = sum((2 * i + 1) * x for i, x in enumerate(start.tolist()))
    assert digest(start) == (total + (1 << 63)) % (1 << 64) - (1 << 63)
    for place in (0, MANY - 1):
        other = start.clone()
        other[place] += 2
        assert digest(other) != digest(start)
    other = start.clone()
    other[0], other[MANY - 1] = start[MANY - 1], start[0]
    assert digest(other) != digest(start)


def test_a_state_of_another_shape_takes_fresh_state_along():
    """The rows are those that were saved; what an optimizer holds of them is fresh."""
    module, source = mixed(), mixed()
    rows = optim.Adagrad(module, initial_accumulator_value=0.5)
    module(IDS).sum().backward()
    source.promote(IDS)
    source.reserve(500)
    module.load_state_dict(source.state_dict())
    state = rows.state[module.arena.storage]["sum"]
    assert state.shape == module.arena.storage.shape and (state == 0.5).all()
    works(module, source)


def test_a_row_that_ends_behind_its_page_is_refused():
    """Pages whose length no size divides."""
    arena = Arena(40, (127, 130), level=1)
    state = arena.state_dict()
    assert arena.page % 130
    state["row_start"] = state["row_start"].clone()
    state["row_start"][0] = arena.page - arena.page % 130
    with pytest.raises(RuntimeError, match="between two places"):
        arena.load_state_dict(state)


def test_a_state_cast_as_a_whole_is_refused():
    module = mixed()
    state = {key: value.bfloat16() for key, value in module.state_dict().items()}
    with pytest.raises(RuntimeError, match="row_size must be int64|row_start must be int32"):
        mixed().load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rows_of_another_dtype_load_with_a_cast(dtype):
    """As torch's own: cast where they are copied, taken as they are where they are assigned."""
    source, plain = mixed(), nn.Embedding(N, 8)
    state, weights = source.state_dict(), plain.state_dict()
    for key in ("arena.storage", "chain"):
        state[key] = state[key].to(dtype)
    weights["weight"] = weights["weight"].to(dtype)
    for assign in (False, True):
        module, other = ResizableEmbedding(N, sizes=SIZES), nn.Embedding(N, 8)
        module.load_state_dict(state, assign=assign)
        other.load_state_dict(weights, assign=assign)
        assert module.arena.storage.dtype == other.weight.dtype
        for i in range(0, N, 7):
            row = module.arena.read(i)
            assert torch.equal(row, source.arena.read(i).to(dtype).to(row.dtype))
        assert module.promote(IDS[:5]).all()


def test_starts_of_either_dtype_load():
    source = mixed()
    state = source.state_dict()
    state["arena.row_start"] = state["arena.row_start"].long()
    module = ResizableEmbedding(N, sizes=SIZES)
    module.load_state_dict(state)
    assert module.arena.row_start.dtype == torch.int32
    works(module, source)
    module.load_state_dict(state, assign=True)
    assert module.arena.row_start.dtype == torch.int64
    works(module, source)


def test_free_lists_of_old_checkpoints_are_unexpected():
    source, module = mixed(), ResizableEmbedding(N, sizes=SIZES)
    state = {**source.state_dict(), "arena.free_rows": torch.zeros(3, dtype=torch.int32)}
    found = module.load_state_dict(state, strict=False)
    assert found.unexpected_keys == ["arena.free_rows"] and not found.missing_keys
    works(module, source)


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("left_out", KEYS)
def test_a_part_does_not_load_into_a_table(left_out, assign):
    module, source = mixed(), mixed()
    source.promote(IDS)
    state = source.state_dict()
    del state["arena." + left_out]
    before = copy.deepcopy(module)
    found = module.load_state_dict(state, strict=False, assign=assign)
    assert found.missing_keys == ["arena." + left_out]
    works(module, before)
    with pytest.raises(RuntimeError, match=f'Missing key.*"arena.{left_out}"'):
        module.load_state_dict(state, assign=assign)


def test_a_state_without_numbers_is_refused():
    module, before = mixed(), mixed()
    with pytest.raises(RuntimeError, match="without numbers"):
        module.load_state_dict(on_meta().state_dict(), assign=True)
    works(module, before)


def test_a_state_longer_than_allowed_is_refused():
    small = ResizableEmbedding(N, sizes=SIZES, max_elements=4 * N)
    before = copy.deepcopy(small)
    large = mixed()
    large.promote(IDS)
    with pytest.raises(RuntimeError, match="max_elements"):
        small.load_state_dict(large.state_dict())
    assert torch.equal(small(IDS), before(IDS))


# ---- modules on the meta device -----------------------------------------------------------------


@pytest.mark.parametrize("order", [KEYS, KEYS[::-1]], ids=["storage-first", "storage-last"])
def test_loading_key_by_key(order):
    """``module.load_state_dict({key: tensor}, strict=False, assign=True)`` on every submodule."""
    source, lazy = mixed(), on_meta()
    assert lazy.arena.storage.shape != source.arena.storage.shape
    for key in order:
        tensor = source.arena.state_dict()[key].clone()
        lazy.arena.load_state_dict({key: tensor}, strict=False, assign=True)
        assert getattr(lazy.arena, key).data_ptr() == tensor.data_ptr()
        if key not in (order[-1], "row_size"):
            with pytest.raises(RuntimeError, match="has not been loaded"):
                lazy.sizes_of()
    lazy.load_state_dict({"chain": source.chain.detach().clone()}, strict=False, assign=True)
    lazy = lazy.to("cpu")
    works(lazy, source)
    lazy(IDS).sum().backward()
    assert isinstance(lazy.arena.storage, nn.Parameter) and lazy.arena.storage.requires_grad


@pytest.mark.parametrize("garbage", [0, 94_283_742_911, None])
def test_tensors_put_into_a_module(garbage):
    """Past ``load_state_dict``; what is in no checkpoint is left on meta, or filled with bits."""
    source, lazy = mixed(), on_meta(initial_size=4)
    for name in KEYS:
        tensor = source.arena.state_dict()[name].clone()
        if name == "storage":
            lazy.arena._parameters[name] = nn.Parameter(tensor)
        else:
            lazy.arena._buffers[name] = tensor
    if garbage is not None:
        lazy.arena._buffers["moves"] = torch.tensor(garbage)
    lazy._parameters["chain"] = nn.Parameter(source.chain.detach().clone())
    works(copy.deepcopy(lazy), source)
    works(lazy.to("cpu"), source)


def test_to_empty_makes_the_initial_layout():
    lazy = on_meta(initial_size=4).to_empty(device="cpu")
    lazy.reset_parameters()
    assert lazy.sizes_of().tolist() == [4] * N
    assert lazy.promote(IDS).all() and lazy.sizes_of().tolist() == [8] * N
    # A table has none to go back to.
    module = mixed()
    with torch.no_grad():
        module.to_empty(device="cpu")
        module.arena.row_start.fill_(7)
    with pytest.raises(RuntimeError, match="do not fit together"):
        module(IDS)


def test_functional_call_keeps_what_is_known():
    """Another storage for one call is no other table."""
    module = mixed()
    free = module.arena._stacks()
    doubled = {"arena.storage": 2 * module.arena.storage}
    out = torch.func.functional_call(module, doubled, (IDS[60:],))
    assert torch.equal(out, 2 * module(IDS[60:])) and module.arena._free is free
    short = {"arena.storage": module.arena.storage[:-2]}
    with pytest.raises(RuntimeError, match="does not consist of the pages"):
        torch.func.functional_call(module, short, (IDS,))
    assert module(IDS).shape == (N, 8)


def test_hops_that_are_computed():
    """Pruned or parametrized hops are looked up, trained and promoted through."""
    for compute in (
        lambda m: prune.random_unstructured(m, "chain", 0.5),
        lambda m: parametrize.register_parametrization(m, "chain", nn.Tanh()),
    ):
        module, plain = mixed(), mixed()
        compute(module)
        with torch.no_grad():
            plain.chain.copy_(module.chain)
        out = module(IDS)
        assert torch.equal(out, plain(IDS))
        out.square().sum().backward()
        assert torch.equal(module.arena.storage.grad, plain_gradient(plain))
        assert module.promote(IDS[:30]).all() and torch.allclose(module(IDS), out, atol=1e-6)


def plain_gradient(module):
    return torch.autograd.grad(module(IDS).square().sum(), module.arena.storage)[0]


def test_a_storage_that_is_computed_is_looked_up_and_does_not_move():
    module, plain = mixed(), mixed()
    parametrize.register_parametrization(module.arena, "storage", nn.Identity())
    assert torch.equal(module(IDS), plain(IDS))
    for move in (lambda: module.promote(IDS[:3]), module.compact):
        with pytest.raises(RuntimeError, match="rows move only in a Parameter"):
            move()
    assert torch.equal(module(IDS), plain(IDS))


def test_a_replica_of_data_parallel():
    """Its Parameters are tensors that a device got a copy of, which gradients flow through."""
    module = mixed()
    replica, arena = (m._replicate_for_data_parallel() for m in (module, module.arena))
    replica._modules["arena"] = arena
    replica.chain, arena.storage = module.chain * 1, module.arena.storage * 1
    for name, buffer in module.arena.named_buffers():
        arena._buffers[name] = buffer.clone()
    assert torch.equal(replica(IDS), module(IDS))
    replica(IDS).square().sum().backward()
    assert torch.equal(module.arena.storage.grad, plain_gradient(module))


# ---- integers stay integers ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.type(torch.float64),
        lambda m: m.to(torch.float16),
        lambda m: m.double(),
        lambda m: m._apply(lambda t: t.to(torch.bfloat16)),
        lambda m: m._apply(lambda t: t.clone().half()),
        lambda m: m.share_memory(),
        lambda m: m.to("cpu", torch.float64),
    ],
    ids=["type", "to", "double", "apply", "clone", "share", "device"],
)
def test_locations_keep_their_dtypes(move):
    module = mixed()
    oracle = copy.deepcopy(module)
    moved = move(module)
    dtypes = [moved.arena.get_buffer(n).dtype for n in ("row_start", "page_level", "row_size")]
    assert dtypes == [torch.int32, torch.int8, torch.int64]
    assert moved.arena.moves.dtype == torch.int64
    oracle = oracle.to(moved.chain.dtype)
    assert torch.equal(moved(IDS), oracle(IDS)) and torch.equal(moved.sizes_of(), oracle.sizes_of())


def test_saving_to_a_file_and_back():
    module, file = mixed(), io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    works(torch.load(file, weights_only=False), module)


# ---- laying rows out anew -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["storage", "row_start", "page_level"])
def test_a_tensor_that_could_not_be_copied(name, monkeypatch):
    """Memory that runs out as a table is loaded: no lookup follows starts that are no numbers."""
    module, other = mixed(), mixed()
    other.promote(torch.arange(N))
    other.promote(torch.arange(N))
    state = other.state_dict()
    assert len(state["arena.storage"]) != len(module.arena.storage)
    copied, tensor = torch.Tensor.copy_, getattr(module.arena, name)

    def copy_(into, *args, **kwargs):
        if into is tensor:
            into.data.view(-1)[0] = 77  # what the memory held before
            raise MemoryError("none is left")
        return copied(into, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "copy_", copy_)
        with pytest.raises(RuntimeError, match="none is left"):
            module.load_state_dict(state)
    if name != "storage":
        with pytest.raises(RuntimeError, match="do not fit together"):
            module(torch.arange(N))
    module.load_state_dict(state)
    assert torch.equal(module(torch.arange(N)), other(torch.arange(N)))


def test_a_signal_before_a_loaded_table_is_copied(monkeypatch):
    """Its memory holds no numbers yet, which no lookup takes for places."""
    module, other = mixed(), mixed()
    other.promote(torch.arange(N))
    state = other.state_dict()
    original = module.arena._replace

    def replace(storage, row_start, page_level, grown):
        row_start.fill_(1 << 20)
        original(storage, row_start, page_level, grown)
        raise KeyboardInterrupt

    monkeypatch.setattr(module.arena, "_replace", replace)
    with pytest.raises(KeyboardInterrupt):
        module.load_state_dict(state)
    with pytest.raises(RuntimeError, match="do not fit together"):
        module(torch.arange(N))
