"""replacing.py: numbers move to larger memory; whoever else holds the old one keeps it whole."""

import copy
import sys
import threading

import pytest
import torch
from torch import nn

from esapn_kernels import ResizableEmbedding, optim
from esapn_kernels.ops.backend import manages_memory
from esapn_kernels.storage import replacing
from esapn_kernels.storage.replacing import is_alone, move_into

COUNT = (5 << 20) + 7  # numbers: 20 MiB and a part of a page
N = 1 << 20
ONLY_LINUX = pytest.mark.skipif(
    sys.platform != "linux" or not manages_memory(),
    reason="native functions of Linux give memory back",
)


@pytest.fixture(autouse=True)
def much(monkeypatch):
    """What counts as much memory is what a test has at hand."""
    monkeypatch.setattr(replacing, "_LEAST", 1 << 20)


@pytest.fixture
def moved(monkeypatch):
    """For every tensor that was to be given back, whether it was."""
    found, original = [], replacing._move

    def move(new, old, data):
        found.append(original(new, old, data))
        return found[-1]

    monkeypatch.setattr(replacing, "_move", move)
    return found


def numbers():
    return torch.arange(1, COUNT + 1, dtype=torch.float32)


@ONLY_LINUX
@pytest.mark.parametrize("offset", [0, 1])
def test_memory_is_given_back(offset):
    """All but its edges, which may share large pages with other memory."""
    old, new = numbers(), torch.full((COUNT + 9,), -1.0)
    aligned = new[offset:]
    move_into(aligned, old, alone=is_alone(old))
    assert torch.equal(aligned[:COUNT], numbers()) and (aligned[COUNT:] == -1).all()
    assert int((old == 0).sum()) * 4 >= 16 << 20
    kept = old != 0
    assert torch.equal(old[kept], numbers()[kept])


@ONLY_LINUX
def test_a_parameter_takes_the_new_memory():
    old, new = nn.Parameter(numbers()), torch.zeros(COUNT + 5)
    move_into(new, old, torch.empty(0, dtype=torch.float64), new, alone=is_alone(old))
    assert old.data_ptr() == new.data_ptr() and torch.equal(old[:COUNT], numbers())


def saved_for_backward(tensor):
    factor = torch.ones(COUNT, requires_grad=True)
    return tensor.detach() * factor


ALIASES = {
    "data": lambda t: t.data,
    "detach": lambda t: t.detach(),
    "view": lambda t: t.detach().view(1, -1),
    "slice": lambda t: t.detach()[5:9],
    "numpy": lambda t: t.detach().numpy(),
    "numpy of a slice": lambda t: t.detach()[7:].numpy()[3:],
    "untyped storage": lambda t: t.untyped_storage(),
    "typed storage": lambda t: t.storage(),
    "state dict": lambda t: nn.ParameterDict({"rows": t}).state_dict(),
    "capsule": lambda t: torch.utils.dlpack.to_dlpack(t.detach()),
    "graph": saved_for_backward,
    "set_": lambda t: torch.empty(0).set_(t.untyped_storage()),
}


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
@pytest.mark.parametrize("alias", ALIASES.values(), ids=list(ALIASES))
def test_an_alias_keeps_the_memory_whole(alias):
    old, new = nn.Parameter(numbers()), torch.zeros(COUNT)
    before = replacing._holders(old)
    held = alias(old)
    assert not is_alone(old) and replacing._holders(old) != before
    move_into(new, old, alone=is_alone(old))
    assert torch.equal(new, numbers()) and torch.equal(old, numbers())
    del held
    assert is_alone(old)


def test_copies_are_no_aliases():
    old = nn.Parameter(numbers())
    held = [copy.deepcopy(old), old.detach().clone(), old.detach().double(), old.detach().tolist()]
    assert is_alone(old) and len(held) == 4


def test_views_that_are_known():
    old = numbers()
    held = [old[:-1], old[3:]]
    assert is_alone(old, 2) and not is_alone(old, 1) and not is_alone(old) and len(held) == 2


def mapped(tmp_path):
    torch.save({"rows": numbers()}, tmp_path / "rows.pt")
    return torch.load(tmp_path / "rows.pt", mmap=True)["rows"]


FOREIGN = {
    "array": lambda path: torch.from_numpy(numbers().numpy().copy()),
    "buffer": lambda path: torch.frombuffer(bytearray(numbers().numpy()), dtype=torch.float32),
    "capsule": lambda path: torch.from_dlpack(numbers().numpy().copy()),
    "file": mapped,
}


@pytest.mark.parametrize("make", FOREIGN.values(), ids=list(FOREIGN))
def test_memory_of_others_is_copied(make, tmp_path, moved):
    """torch counts its own references alone."""
    old, new = make(tmp_path), torch.zeros(COUNT)
    move_into(new, old, alone=is_alone(old))
    assert torch.equal(new, numbers()) and torch.equal(old, numbers()) and not moved


def test_an_array_of_the_tensor_itself(moved):
    """It holds the tensor, which torch does not count as one more holder of the memory."""
    old, new = numbers(), torch.zeros(COUNT)
    held = old.numpy()
    move_into(new, old, alone=is_alone(old))
    assert not moved and held[-1] == COUNT and held[COUNT // 2] == COUNT // 2 + 1


def test_a_torch_that_does_not_count(monkeypatch, moved):
    monkeypatch.setattr(replacing, "_count_holders", None)
    module = ResizableEmbedding(N, sizes=(2, 4))
    before = module.arena.storage.detach().clone()
    module.reserve(N)
    assert torch.equal(module.arena.storage[: len(before)], before) and not moved
    assert not is_alone(module.arena.storage)


# ---- arenas -------------------------------------------------------------------------------------


def table(**options):
    torch.manual_seed(0)
    return ResizableEmbedding(N, sizes=(2, 4), **options)


def check_grown(module, before, rows):
    storage = module.arena.storage.detach()
    assert len(storage) > len(before) and torch.equal(storage[: len(before)], before)
    assert not storage[len(before) :].any()
    assert torch.equal(module.arena.row_start[:-1], torch.arange(0, 2 * N, 2, dtype=torch.int32))
    assert torch.equal(module(torch.arange(100)), rows)


@pytest.mark.parametrize("rule", ["Adagrad", "Adam"])
def test_growth_without_aliases(rule, moved):
    module = table()
    rows = getattr(optim, rule)(module)
    module(torch.arange(N)).square().sum().backward()
    storage = module.arena.storage
    before, out = storage.detach().clone(), module(torch.arange(100))
    state = {k: rows.state[storage][k].clone() for k in rows.state_per_element}
    module.reserve(N)
    check_grown(module, before, out)
    for name, value in state.items():
        grown = rows.state[storage][name]
        assert torch.equal(grown[: len(value)], value) and grown.shape == storage.shape
        assert (grown[len(value) :] == rows.state_per_element[name]).all()
    if manages_memory() and sys.platform == "linux":
        assert moved == [True] * (1 + len(state))
    module(torch.arange(100)).sum().backward()  # the node takes the new shape


@pytest.mark.parametrize("rule", ["Adagrad", "Adam"])
@pytest.mark.parametrize("holds", ["state_dict", "tensor", "data", "slice"])
def test_aliases_of_a_grown_arena_keep_the_old_one(holds, rule, moved):
    module = table()
    rows = getattr(optim, rule)(module)
    module(torch.arange(N)).square().sum().backward()
    storage = module.arena.storage
    tensors = [storage, module.arena.row_start]
    tensors += [rows.state[storage][k] for k in rows.state_per_element]
    copies = [t.detach().clone() for t in tensors]
    if holds == "state_dict":
        held = [*list(module.state_dict().values())[-4:-2], *rows.state_dict()["state"][0].values()]
        held = [t for t in held if t.numel() > N]
    elif holds == "tensor":
        held = [storage.detach(), module.arena.row_start.detach(), *tensors[2:]]
    elif holds == "data":
        held = [t.data for t in tensors]
    else:
        held, copies = [t.detach()[3:] for t in tensors], [t[3:] for t in copies]
    del tensors
    out = module(torch.arange(100))
    before = storage.detach().clone()
    module.reserve(N)
    check_grown(module, before, out)
    assert len(held) == len(copies) and not any(moved)
    assert all(torch.equal(a, b) for a, b in zip(held, copies, strict=True))
    module.promote(torch.arange(0, N, 2))
    assert all(torch.equal(a, b) for a, b in zip(held, copies, strict=True))


def test_state_that_was_made_in_inference_mode():
    module = table()
    rows = torch.optim.Adam([module.arena.storage])
    module(torch.arange(N)).square().sum().backward()
    with torch.inference_mode():
        rows.step()
        before = rows.state[module.arena.storage]["exp_avg"].clone()
    module.reserve(N)
    grown = rows.state[module.arena.storage]["exp_avg"]
    assert torch.equal(grown[: len(before)], before) and not grown[len(before) :].any()
    with torch.inference_mode():
        rows.step()


def test_row_starts_stay_where_they_are_unless_held():
    module = table()
    address = module.arena.row_start.data_ptr()
    module.reserve(N)
    assert module.arena.row_start.data_ptr() == address
    held = module.arena.row_start.detach()
    module.reserve(4 * N)
    assert module.arena.row_start.data_ptr() != address == held.data_ptr()


@ONLY_LINUX
@pytest.mark.parametrize("long", [False, True], ids=["few ids", "many ids"])
def test_lookups_of_other_threads_meanwhile(long, moved):
    """They read what is there, before or after; a call may raise, too."""
    module = table().requires_grad_(False)
    few, many = torch.arange(0, N, N // 50), torch.arange(0, N, 3)
    wanted = {ids: module(ids) for ids in (few, many)}
    stop, faults, good = threading.Event(), [], [0]

    def look_up(ids):
        while not stop.is_set():
            try:
                found = module(ids)
            except (IndexError, RuntimeError):
                continue
            good[0] += 1
            if not torch.equal(found, wanted[ids]):
                faults.append(ids)

    threads = [threading.Thread(target=look_up, args=(ids,)) for ids in (few, few, many)]
    threads = threads[: 3 if long else 2]
    for thread in threads:
        thread.start()
    try:
        for i in range(1, 12):
            module.reserve(i * N // 2)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert good[0] and not faults
    assert long or any(moved)  # of many ids a lookup holds the memory that it reads


# ---- signals ------------------------------------------------------------------------------------

WHERE = ["before", "after"]


def interrupted(call, which, where):
    """``call``, that of ``which`` number with Ctrl-C before it or as it ends."""
    calls = [0]

    def calling(*args):
        calls[0] += 1
        if calls[0] == which and where == "before":
            raise KeyboardInterrupt
        result = call(*args)
        if calls[0] == which and where == "after":
            raise KeyboardInterrupt
        return result

    return calling


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("which", [1, 2, 3])
@pytest.mark.parametrize("name", ["_move", "_gives_back"])
@pytest.mark.parametrize("held", [False, True], ids=["alone", "held"])
def test_a_signal_as_an_arena_grows(name, which, where, held, monkeypatch):
    """A handler runs when a copy ends, which is what growth takes most of its time for."""
    module = table()
    rows = optim.Adam(module)
    module(torch.arange(N)).square().sum().backward()
    storage = module.arena.storage
    before, out = storage.detach().clone(), module(torch.arange(100))
    state = {k: rows.state[storage][k].clone() for k in rows.state_per_element}
    aliases = [rows.state[storage]["exp_avg"]] if held else []
    copies = [t.clone() for t in aliases]
    with monkeypatch.context() as patched:
        patched.setattr(replacing, name, interrupted(getattr(replacing, name), which, where))
        try:
            module.reserve(N)
        except KeyboardInterrupt:
            assert module.arena.layout is not None
    check_grown(module, before, out)
    for key, value in state.items():
        grown = rows.state[storage][key]
        assert torch.equal(grown[: len(value)], value) and grown.shape == storage.shape
    assert all(torch.equal(a, b) for a, b in zip(aliases, copies, strict=True))
    module(torch.arange(100)).sum().backward()
    assert module.promote(torch.arange(0, N, 2)).all()


def test_what_is_raised_again_and_again_is_raised():
    calls = []

    def fails():
        calls.append(1)
        raise MemoryError("none is left")

    with pytest.raises(MemoryError, match="none is left"):
        replacing.run_all([fails])
    assert len(calls) == 9


def test_what_a_handler_raised_is_raised_in_the_end():
    done = []
    steps = [lambda: done.append(2), interrupted(lambda: done.append(1), 1, "before")]
    with pytest.raises(KeyboardInterrupt):
        replacing.run_all(steps)
    assert done == [1, 2]
