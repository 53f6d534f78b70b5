"""locations.py: who holds an arena's tensors, or memory of theirs, never sees mixed rows."""

import copy
import itertools
import multiprocessing
import os
import sys
from unittest import mock

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from esapn_kernels import ResizableEmbedding, optim
from esapn_kernels.storage import room as room_file
from esapn_kernels.storage.arena import Arena
from tests.kernels.layouts import HOSTS
from tests.kernels.test_arena import check_accounts

SIZES = (2, 4, 8)
N = 90
IDS = torch.arange(N)


def mixed(**options):
    """Rows of every size, and free places of every size."""
    torch.manual_seed(0)
    module = ResizableEmbedding(N, sizes=SIZES, **options)
    module.promote(IDS[30:])
    module.promote(IDS[60:])
    return module


def change(module):
    """Other numbers in every row."""
    with torch.no_grad():
        module.arena.storage.mul_(1.5)


def outputs(module):
    return module(IDS).detach()


GROWING = {
    "promote": lambda m: [m.promote(IDS) for _ in SIZES],
    "reserve": lambda m: m.reserve(500),
    "compact": lambda m: m.compact(),
}


# ---- objects and aliases ------------------------------------------------------------------------


@pytest.mark.parametrize("call", GROWING.values(), ids=list(GROWING))
def test_objects_stay_and_their_memory_is_replaced_together(call):
    module = mixed()
    module.reserve(3)
    arena = module.arena
    held = [arena.storage, arena.row_start, arena.page_level]
    aliases = [t.detach() for t in held]  # so that no allocator gives the memory out again
    call(module)
    assert all(
        a is b
        for a, b in zip(held, (arena.storage, arena.row_start, arena.page_level), strict=True)
    )
    assert all(t.data_ptr() != a.data_ptr() for t, a in zip(held, aliases, strict=True))


def test_within_room_memory_stays():
    module = mixed()
    module.reserve(100)
    arena = module.arena
    before = [t.data_ptr() for t in (arena.storage, arena.row_start, arena.page_level)]
    module.promote(IDS[:50])
    assert before == [t.data_ptr() for t in (arena.storage, arena.row_start, arena.page_level)]


@pytest.mark.parametrize("host", HOSTS)
def test_starts_that_become_int64(host):
    module = mixed(backend=host)
    start, before = module.arena.row_start, outputs(module)
    state = module.state_dict()
    with mock.patch.object(room_file, "index_dtype", return_value=torch.int64):
        module.reserve(300)
    assert module.arena.row_start is start and start.dtype == torch.int64
    assert host == "native" or module.arena._free.rows.dtype == torch.int64
    module.promote(IDS)
    check_accounts(module.arena)
    torch.testing.assert_close(outputs(module), before)
    fresh = ResizableEmbedding(N, sizes=SIZES, backend=host)
    fresh.load_state_dict(state)
    assert torch.equal(outputs(fresh), before)


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("room", [0, 200], ids=["beyond", "within"])
def test_a_state_kept_by_reference_loads(room, assign):
    """Live while nothing grows, as of any module; from then on as it was (pytorch#34765)."""
    module = mixed()
    module.reserve(room)
    best, old = module.state_dict(), copy.deepcopy(module)
    for _ in SIZES:
        module.promote(IDS[::2])
        change(module)
    live = best["arena.storage"].data_ptr() == module.arena.storage.data_ptr()
    assert live is bool(room)
    expected = copy.deepcopy(module) if live else old
    for target in (ResizableEmbedding(N, sizes=SIZES), module):
        target.load_state_dict(best, assign=assign)
        assert torch.equal(outputs(target), outputs(expected))
        assert torch.equal(target.sizes_of(), expected.sizes_of())
    assert module.promote(IDS[1:30:2]).all()


def test_an_optimizer_goes_on_after_a_state_by_reference():
    module = mixed()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    best, held = module.state_dict(), module.arena.storage
    for _ in range(3):
        optimizer.zero_grad()
        module(IDS).square().sum().backward()
        optimizer.step()
        module.promote(IDS[::2])
    module.load_state_dict(best)
    assert module.arena.storage is held
    before = outputs(module)
    module(IDS).square().sum().backward()
    optimizer.step()
    assert not torch.equal(outputs(module), before)
    assert optimizer.state[held]["exp_avg"].shape == held.shape


@pytest.mark.parametrize("call", [*GROWING.values(), change], ids=[*GROWING, "train"])
@pytest.mark.parametrize("room", [0, 200], ids=["beyond", "within"])
def test_an_exported_program_gives_its_sources_outputs(room, call):
    module = mixed()
    module.reserve(room)
    program = torch.export.export(module, (IDS,))
    run = program.module()
    call(module)
    change(module)
    assert torch.equal(run(IDS), outputs(module))
    assert torch.equal(program.module()(IDS), outputs(module))


def grads_of(arena):
    """The gradient of every row, by id."""
    rows = zip(arena.row_start[:-1].tolist(), arena.row_size[arena.level()].tolist(), strict=True)
    return [arena.storage.grad[start : start + size].clone() for start, size in rows]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("call", ["reserve", "compact", "load_state_dict"])
def test_memory_that_runs_out_changes_nothing(call, host):
    """Everything is allocated before anything is replaced: no row is lost, nor its gradient."""
    module, larger = mixed(backend=host), mixed()
    larger.promote(IDS)
    module.arena.free(IDS[35:50], backend=host)
    module.arena.insert(IDS[35:50], 0, backend=host)
    module(IDS).sum().backward()
    arguments = {"reserve": 500, "load_state_dict": larger.arena.state_dict()}
    names = ("new_full", "new_zeros", "new_empty", "to", "clone")
    before, grads = copy.deepcopy(module), grads_of(module.arena)
    for fails_at in itertools.count():
        calls = itertools.count()

        def limited(real, calls=calls, fails_at=fails_at):
            def allocate(*args, **kwargs):
                if next(calls) == fails_at:
                    raise torch.OutOfMemoryError("no memory")
                return real(*args, **kwargs)

            return allocate

        with pytest.MonkeyPatch.context() as patch:
            for name in names:
                patch.setattr(torch.Tensor, name, limited(getattr(torch.Tensor, name)))
            try:
                arena = module.arena
                getattr(arena, call)(*([arguments[call]] if call in arguments else []))
                break
            except torch.OutOfMemoryError:
                pass
        assert torch.equal(outputs(module), outputs(before))
        # Pages may have come to stay, and rows have moved, with everything that goes with them.
        assert module.arena.storage.grad.shape == module.arena.storage.shape
        assert all(map(torch.equal, grads_of(module.arena), grads))
        check_accounts(module.arena)
    assert fails_at > 2
    assert module.promote(IDS).shape == (N,)


# ---- hooks --------------------------------------------------------------------------------------


def test_hooks_of_the_parameter_survive():
    module, calls = mixed(), []
    storage = module.arena.storage
    storage.register_hook(lambda grad: calls.append(tuple(grad.shape)))
    storage.register_post_accumulate_grad_hook(lambda p: calls.append(tuple(p.grad.shape)))
    shapes = []
    for call in (lambda: None, lambda: module.promote(IDS), module.compact):
        call()
        storage.grad = None
        module(IDS).sum().backward()
        shapes += 2 * [tuple(storage.shape)]
    assert calls == shapes and len(set(shapes)) == 3


@pytest.mark.parametrize("kind", ["register_hook", "register_prehook"])
def test_growth_under_a_hook_on_the_node_is_refused(kind):
    """A node holds the shape that it was made for: growth takes another, without the hook."""
    module, calls = mixed(), []
    storage = module.arena.storage
    node = storage.expand_as(storage).grad_fn.next_functions[0][0]
    handle = getattr(node, kind)(lambda *_: calls.append(1))
    before, grown = copy.deepcopy(module), copy.deepcopy(module)
    grown.promote(IDS)
    for call in (
        lambda: module.promote(IDS),
        lambda: module.reserve(500),
        lambda: module.compact(),
        lambda: module.load_state_dict({"weight": torch.randn(N, 8)}),
        lambda: module.load_state_dict(grown.state_dict()),
    ):
        with pytest.raises(RuntimeError, match=r"register the hook on arena\.storage itself"):
            call()
        assert torch.equal(outputs(module), outputs(before))
    module(IDS).sum().backward()
    assert calls == [1]
    handle.remove()
    assert module.promote(IDS[:60]).all()


def test_a_hook_on_the_node_survives_moves_within_room():
    module, calls = mixed(), []
    module.reserve(100)
    storage = module.arena.storage
    node = torch.autograd.graph.get_gradient_edge(storage).node
    node.register_hook(lambda *_: calls.append(1))
    assert module.promote(IDS[:40]).all()
    module.load_state_dict(copy.deepcopy(module.state_dict()))
    module(IDS).sum().backward()
    assert calls == [1]


def test_a_living_graph_does_not_hinder_growth():
    module = mixed()
    loss = module(IDS).sum()
    loss.backward()
    assert module.promote(IDS[:60]).all()
    module.arena.storage.grad = None
    module(IDS).sum().backward()
    assert module.arena.storage.grad.shape == module.arena.storage.shape
    assert loss.grad_fn is not None


# ---- averages -----------------------------------------------------------------------------------


def averaged(module, kind, **options):
    fn = {"swa": None, "ema": get_ema_multi_avg_fn(0.9)}[kind]
    return AveragedModel(module, multi_avg_fn=fn, **options)


@pytest.mark.parametrize("kind", ["swa", "ema"])
@pytest.mark.parametrize("buffers", [False, True])
def test_averages_of_rows_that_stay(kind, buffers):
    """Beside torch's own table, whose numbers are averaged alike."""
    module = mixed(init="padded")
    plain = module.to_embedding()
    ours, theirs = (averaged(m, kind, use_buffers=buffers) for m in (module, plain))
    for step in range(3):
        for m, average in ((module, ours), (plain, theirs)):
            with torch.no_grad():
                for p in m.parameters():
                    if p is not getattr(m, "chain", None):
                        p.mul_(0.5 + step)
            average.update_parameters(m)
        if buffers and kind == "ema" and step:
            # torch rounds the mean of two equal integers: rows would lie elsewhere.
            with pytest.raises(RuntimeError, match="its numbers mix rows"):
                ours(IDS)
        else:
            torch.testing.assert_close(ours(IDS), theirs(IDS))
    if not buffers:
        assert ours.module.promote(IDS[:60]).all()


@pytest.mark.parametrize("kind", ["swa", "ema"])
def test_an_average_of_rows_that_moved_is_refused(kind):
    module = mixed()
    module.reserve(200)
    average = averaged(module, kind)
    average.update_parameters(module)
    before = copy.deepcopy(average)
    module.promote(IDS[:7])
    average.update_parameters(module)
    table = average.module
    for use in (
        lambda: table(IDS),
        lambda: table.promote(IDS),
        lambda: table.resize(IDS[:3], 8),
        lambda: table.sizes_of(),
        lambda: table.compact(),
        lambda: table.reserve(4),
        lambda: average.state_dict(),
        lambda: copy.deepcopy(average),
        lambda: average.double(),
        lambda: table.to_embedding(),
    ):
        with pytest.raises(RuntimeError, match="average by esapn_kernels.averaging"):
            use()
    # The source is none the worse, and a whole state heals the average.
    module(IDS).sum().backward()
    assert module.promote(IDS[7:20]).all()
    table.load_state_dict(before.module.state_dict())
    assert torch.equal(table(IDS), before(IDS))
    average.update_parameters(module)
    with pytest.raises(RuntimeError, match="average by esapn_kernels.averaging"):
        table(IDS)
    weight = torch.randn(N, 8)
    table.load_state_dict({"weight": weight})
    assert torch.equal(table(IDS), weight[IDS])


def test_an_average_grows_with_its_source():
    """Both take the same rows to the same places."""
    module = mixed()
    average = averaged(module, "ema")
    for step in range(3):
        for m in (module, average.module):
            m.promote(IDS[step::4])
        change(module)
        average.update_parameters(module)
        assert torch.equal(average.module.sizes_of(), module.sizes_of())
        assert average(IDS).shape == (N, 8)
    with torch.no_grad():
        module.arena.storage.copy_(average.module.arena.storage)
        module.chain.copy_(average.module.chain)
    assert torch.equal(outputs(module), average(IDS))


def test_an_average_of_a_shape_that_changed():
    module = mixed()
    average = averaged(module, "ema")
    average.update_parameters(module)
    module.promote(IDS)
    with pytest.raises(RuntimeError, match="size|shape"):
        average.update_parameters(module)


@pytest.mark.parametrize("moves", [False, True])
def test_copying_what_a_state_dict_holds(moves):
    """In place and key by key, as other averages do; the count of moves is not among it."""
    module = mixed()
    module.reserve(200)
    copied = copy.deepcopy(module)
    if moves:
        module.promote(IDS[:7])
    with torch.no_grad():
        for own, other in zip(
            copied.state_dict().values(), module.state_dict().values(), strict=True
        ):
            own.copy_(own.lerp(other, 0.1) if own.is_floating_point() else other)
    if moves:
        with pytest.raises(RuntimeError, match="its numbers mix rows"):
            copied(IDS)
    else:
        torch.testing.assert_close(copied(IDS), module(IDS))
        assert copied.arena._held[4] == copied.arena.row_start._version


def test_bad_locations_written_in_place_are_refused():
    module = mixed()
    module.promote(IDS[:3])
    module.arena.row_start[4] = module.arena.row_start[5]
    with pytest.raises(RuntimeError, match="two rows of row_start lie in one place"):
        module(IDS)


def test_moves_that_a_graph_counts():
    """Replays count on the device; reserve reads the count."""
    arena = Arena(N, SIZES)
    with mock.patch.object(room_file, "resolve_backend", return_value="triton"):
        arena.reserve(50)
    chain = torch.zeros(54)
    with mock.patch.object(room_file, "is_capturing", return_value=True):
        arena.promote(IDS[:5], chain, backend="triton")
    arena.moves.data.add_(3)  # replays, which no version counter sees
    copied = copy.deepcopy(arena)
    arena.reserve(50)
    for each in (arena, copied):
        assert each._counted == int(each.moves) == 4
        each.row_start.copy_(each.row_start.clone())
        assert each.level().sum() == 5


def test_a_module_made_in_inference_mode_trains_and_grows():
    with torch.inference_mode():
        module = ResizableEmbedding(N, sizes=SIZES)
        start = module(IDS)
        moved = module.promote(IDS[:9])
        copied = copy.deepcopy(module)
    assert moved.all() and torch.allclose(module(IDS), start, atol=1e-6)
    module(IDS).sum().backward()
    assert module.arena.storage.grad.any() and module.promote(IDS).all()
    assert torch.allclose(module(IDS), start, atol=1e-5)
    # As of any module, a copy made there is of inference tensors; its rows move all the same.
    copied.promote(IDS)
    copied.compact()
    with torch.inference_mode():
        assert torch.allclose(copied(IDS), start, atol=1e-6)


# ---- shared memory ------------------------------------------------------------------------------

MOVING = {
    "promote": lambda m: m.promote(IDS[:3]),
    "resize": lambda m: m.resize(IDS[:3], 8),
    "insert": lambda m: m.arena.insert(IDS[-1:], 0),
    "free": lambda m: m.arena.free(IDS[:3]),
    "compact": lambda m: m.compact(),
    "reserve": lambda m: m.reserve(5000),
    "load": lambda m: m.load_state_dict(ResizableEmbedding(N, sizes=SIZES).state_dict()),
}


@pytest.mark.parametrize("call", MOVING.values(), ids=list(MOVING))
def test_shared_rows_do_not_move(call):
    module = mixed()
    module.arena.free(IDS[-1:])
    module.reserve(50)
    shared = copy.deepcopy(module).share_memory()
    before = copy.deepcopy(shared.state_dict())
    with pytest.raises(RuntimeError, match="before share_memory"):
        call(shared)
    for key, value in shared.state_dict().items():
        assert torch.equal(value, before[key]) and value.is_shared(), key
    # What does not move them is done; and so is all of it with a copy.
    shared.reserve(1)
    shared.load_state_dict(before)
    assert not shared.promote(IDS[60:-1]).any()
    other = copy.deepcopy(shared)
    assert not any(t.is_shared() for t in other.state_dict().values())
    call(other)
    call(module)


def promote_in_another_process(module, answers):
    try:
        module.promote(IDS[:5])
    except RuntimeError as error:
        answers.put(str(error))
    answers.put(module(IDS).detach().numpy())
    answers.put(module(IDS).detach().mul(2).numpy())


def test_two_processes_share_a_table(tmp_path):
    module = mixed().share_memory()
    expected = outputs(module)
    context = torch.multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        process = context.Process(target=promote_in_another_process, args=(module, answers))
        process.start()
    assert "before share_memory" in answers.get()
    for factor in (1, 2):
        assert torch.equal(torch.from_numpy(answers.get()), factor * expected)
    process.join()
    assert process.exitcode == 0 and not multiprocessing.active_children()
    assert torch.equal(outputs(module), expected)
    with pytest.raises(RuntimeError, match="before share_memory"):
        module.promote(IDS[:5])


# ---- inference mode, and other default devices --------------------------------------------------


def tensors_of(held, seen=None):
    """Every tensor that an object reaches."""
    seen = {} if seen is None else seen
    if id(held) in seen or isinstance(held, (str, bytes, int, float, type)):
        return
    seen[id(held)] = held
    if isinstance(held, torch.Tensor):
        yield held
        if held.is_leaf and held.grad is not None:
            yield held.grad
    elif isinstance(held, dict):
        for key, value in held.items():
            yield from tensors_of(key, seen)
            yield from tensors_of(value, seen)
    elif isinstance(held, (list, tuple, set)):
        for value in held:
            yield from tensors_of(value, seen)
    elif type(held).__module__.startswith(("esapn_kernels", "torch.optim")):
        yield from tensors_of(vars(held), seen)


CALLS = {
    "forward": lambda m: m(IDS.clone()[:-1]),
    "sizes": lambda m: m.sizes_of(IDS.clone()),
    "promote": lambda m: m.promote(IDS.clone()),
    "mask": lambda m: m.promote(IDS.clone(), IDS.clone() > 30),
    "resize": lambda m: m.resize(IDS.clone()[:10], 8),
    "reserve": lambda m: m.reserve(500),
    "compact": lambda m: m.compact(),
    "load": lambda m: m.load_state_dict({k: v.clone() for k, v in larger().state_dict().items()}),
    "assign": lambda m: m.arena.load_state_dict(
        {k: v.clone() for k, v in larger().arena.state_dict().items()}, assign=True
    ),
    "state": lambda m: m.state_dict(),
    "memory": lambda m: m.memory_report(),
    "insert": lambda m: m.arena.insert(IDS.clone()[-1:], 0),
    "free": lambda m: m.arena.free(IDS.clone()[:5]),
    "reclaim": lambda m: m.arena.reclaim(),
    "read": lambda m: m.arena.read(3),
    "reset": lambda m: (torch.manual_seed(5), m.reset_parameters()),
    "dense": lambda m: full(m).to_embedding().weight,
    "weight": lambda m: full(m).weight,
}


def full(module):
    """With a row for every id."""
    module.arena.insert(IDS.clone()[-1:], 0)
    return module


def larger():
    with torch.inference_mode(False), torch.device("cpu"):
        module = mixed()
        module.promote(IDS)
        return module


def fused(module):
    return optim.Adam(module)


def dense(module):
    return torch.optim.Adam(module.parameters())


@pytest.mark.parametrize("make", [dense, fused])
@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_inference_mode_leaves_no_trace(call, make):
    """As torch's own table: what is called inside trains outside (pytorch#95957)."""
    module = mixed()
    module.arena.free(IDS[-1:])
    optimizer = make(module)
    rows = IDS[:-1]
    if make is dense:
        module(rows).sum().backward()
        optimizer.step()
    with torch.inference_mode():
        call(module)
    if make is dense and call is CALLS["assign"]:
        optimizer = dense(module)
    elif call is CALLS["assign"]:
        optimizer.detach()
        optimizer = fused(module)
    rows = (module.arena.level() >= 0).nonzero()[:, 0]
    before = outputs(module.eval()) if len(rows) == N else None
    optimizer.zero_grad()
    module(rows).square().sum().backward()
    optimizer.step()
    assert before is None or not torch.equal(outputs(module), before)
    module.promote(rows)
    found = list(tensors_of([vars(module), vars(module.arena), optimizer]))
    assert len(found) > 12 and not any(t.is_inference() for t in found)


def test_ids_of_inference_mode():
    module, oracle = mixed(), mixed()
    with torch.inference_mode():
        ids = IDS.clone()
    assert ids.is_inference()
    assert torch.equal(module.promote(ids, ids > 40), oracle.promote(IDS, IDS > 40))
    module.arena.free(ids[:4])
    module.arena.insert(ids[:4], 0)
    assert torch.equal(module.sizes_of(ids), oracle.sizes_of(IDS))
    with torch.no_grad():
        assert torch.equal(module(ids)[4:], oracle(IDS)[4:])


def test_promotion_without_gradients_makes_none():
    """Leaving inference mode turns gradients on: not in what is stored."""
    module = mixed()
    with torch.inference_mode():
        module.promote(IDS)
        module(IDS)
    assert module.arena.storage.is_leaf and module.arena.storage.requires_grad
    assert not module._composed._kept[3].requires_grad


@pytest.mark.parametrize("how", ["context", "default"])
@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_another_default_device(call, how):
    module, oracle = mixed(), mixed()
    for each in (module, oracle):
        each.arena.free(IDS[-1:])
    expected = call(oracle)
    if how == "context":
        with torch.device("meta"):
            found = call(module)
    else:
        torch.set_default_device("meta")
        try:
            found = call(module)
        finally:
            torch.set_default_device(None)
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    for key, value in oracle.state_dict().items():
        assert torch.equal(module.state_dict()[key], value), key


def test_a_table_for_the_host_under_another_default_device():
    with torch.device("meta"):
        arena = Arena(N, SIZES, level=1, device="cpu")
        module = ResizableEmbedding(N, sizes=SIZES, device="cpu")
        assert module.promote(IDS).all()
    assert arena.level().tolist() == [1] * N and module.sizes_of().tolist() == [4] * N
