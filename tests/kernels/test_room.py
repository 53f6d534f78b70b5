"""room.py: how few pages compaction leaves, and where rows go as they come, go and are loaded."""

import copy
import itertools
import pickle
import random

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch.utils._python_dispatch import TorchDispatchMode

from esapn_kernels import ResizableEmbedding, optim
from esapn_kernels.ops.chain import chain_numel
from esapn_kernels.ops.row_gradient import RowGradient
from esapn_kernels.reference import lookup_reference
from esapn_kernels.storage import locations
from esapn_kernels.storage import room as room_file
from esapn_kernels.storage.arena import Arena
from esapn_kernels.storage.free import FreeLists
from tests.kernels.layouts import HOSTS, NEEDS_NATIVE, SMALL
from tests.kernels.test_arena import (
    check_accounts,
    check_bytes,
    fewest_pages,
    pages_in_use,
    pages_of,
    with_page,
)

N = 120
quick = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


@pytest.fixture
def small_pages(monkeypatch):
    monkeypatch.setattr(locations, "page_elements", lambda *_: 16)


@pytest.fixture
def int64_starts(monkeypatch):
    for file in (locations, room_file):
        monkeypatch.setattr(file, "index_dtype", lambda numel: torch.int64)


def know_places(arena, host):
    """Free places are known as ``host`` takes them."""
    if host == "native":
        arena._bits()
    else:
        arena._stacks()


def with_holes(host, sizes=SMALL, seed=0, n_rows=N, **options):
    """A table with holes in pages of every level, some emptied, and ids without a row."""
    torch.manual_seed(seed)
    module = ResizableEmbedding(n_rows, sizes=sizes, backend=host, **options)
    arena, generator = module.arena, torch.Generator().manual_seed(seed)
    for _ in range(4):
        for call in (module.promote, module.demote):
            call(torch.randperm(n_rows, generator=generator)[: n_rows // 2])
    for k, ids in enumerate(torch.randperm(n_rows, generator=generator)[:40].split(10)):
        ids = ids[arena.level(ids) >= 0]
        arena.free(ids, backend=host)
        if k < 3:
            arena.insert(ids[:6], k % len(sizes), backend=host)
    with torch.no_grad():
        for i in (arena.level() >= 0).nonzero()[:, 0].tolist():
            start, size = int(arena.row_start[i]), sizes[int(arena.level()[i])]
            arena.storage[start : start + size] = torch.randn(size, generator=generator)
    return module


def held(module):
    return (module.arena.level() >= 0).nonzero()[:, 0]


def cut(arena, tensor):
    """The part of every row that exists, by id."""
    levels = enumerate(arena.level().tolist())
    starts = arena.row_start.tolist()
    return {i: tensor[starts[i] : starts[i] + arena.sizes[k]].clone() for i, k in levels if k >= 0}


def same(found, expected):
    return found.keys() == expected.keys() and all(
        torch.equal(row, expected[i]) for i, row in found.items()
    )


# ---- how few pages ------------------------------------------------------------------------------


@pytest.mark.parametrize("host", HOSTS)
@settings(max_examples=30, **quick)
@given(data=st.data())
def test_rows_looked_at_once_leave_a_page_with_holes_at_most(host, data):
    """In steps of any sizes, from anywhere on; the fewest pages then hold them."""
    sizes = data.draw(st.sampled_from([SMALL, (2, 8), (1, 3, 5, 33), (7,)]))
    levels = st.lists(st.integers(-1, len(sizes) - 1), min_size=60, max_size=60)
    arena = with_page(40, 60, sizes, level=torch.tensor(data.draw(levels)))
    for _ in range(data.draw(st.integers(1, 4))):
        ids = torch.tensor(data.draw(st.lists(st.integers(0, 59), min_size=1, unique=True)))
        empty = arena.level(ids) < 0
        arena.insert(ids[empty], data.draw(st.integers(0, len(sizes) - 1)), backend=host)
        arena.free(ids[~empty], backend=host)
    arena.storage.data.normal_()
    rows = cut(arena, arena.storage.detach())
    know_places(arena, host)
    arena.compact(data.draw(st.integers(0, 70)))
    left = 60
    while left > 0:
        step = data.draw(st.integers(1, 70))
        arena.compact(step)
        left -= step
    assert pages_in_use(arena) == fewest_pages(arena)
    per, level = arena.rows_per_page, arena.level()
    start = arena.row_start[:-1]
    for k in range(len(sizes)):
        pages = (start[level == k] // arena.page).bincount()
        assert int(((pages > 0) & (pages < per[k])).sum()) <= 1
    assert arena.compact(60) == 0
    assert same(cut(arena, arena.storage.detach()), rows)
    check_accounts(arena)
    arena.compact()
    assert pages_of(arena) == sum(fewest_pages(arena))
    assert same(cut(arena, arena.storage.detach()), rows)
    check_accounts(arena)
    check_bytes(arena)


@pytest.mark.parametrize("host", HOSTS)
def test_a_step_looks_at_as_many_rows_as_it_says(host, small_pages):
    """Past the last id it goes on from the first."""
    module = with_holes(host)
    know_places(module.arena, host)
    module.compact(N - 5)
    assert module.arena.cursor == N - 5
    module.arena.free(held(module)[::3], backend=host)
    module.compact(N)
    assert pages_in_use(module.arena) == fewest_pages(module.arena)
    assert module.arena.cursor == N - 5 and module.compact(7) == 0 and module.arena.cursor == 2
    assert module.compact(10 * N) == module.compact(0) == 0


def gradient_dense(module):
    module(held(module)).square().sum().backward()
    return lambda: {"grad": module.arena.storage.grad}


def gradient_sparse(module):
    gradient_dense(module)
    storage = module.arena.storage
    storage.grad = storage.grad.to_sparse()
    return lambda: {"grad": storage.grad.to_dense()}


def gradient_of_rows(module):
    module.deferred = optim.SGD(module, lr=0.1, deferred=True)
    gradient_dense(module)
    assert isinstance(module.arena.storage.grad, RowGradient)
    return lambda: {"grad": module.arena.storage.grad.to_dense()}


def torchs(kind):
    def make(module):
        grad = gradient_dense(module)
        optimizer = kind(module.parameters(), lr=0.1)
        optimizer.step()
        storage = module.arena.storage
        return lambda: (
            grad() | {key: value for key, value in optimizer.state[storage].items() if value.dim()}
        )

    return make


def fused(kind, deferred=False):
    def make(module):
        optimizer = kind(module, lr=0.1, deferred=deferred)
        module(held(module)).square().sum().backward()
        if deferred:
            optimizer.step()
            optimizer.zero_grad()
        state = optimizer.state[module.arena.storage]
        assert optimizer.state_per_element
        return lambda: {key: state[key] for key in optimizer.state_per_element}

    return make


FOLLOWING = {
    "dense gradient": gradient_dense,
    "sparse gradient": gradient_sparse,
    "gradient of rows": gradient_of_rows,
    "torch Adam": torchs(torch.optim.Adam),
    "torch Adagrad": torchs(torch.optim.Adagrad),
    "fused Adam": fused(optim.Adam),
    "fused Adagrad": fused(optim.Adagrad),
    "deferred Adam": fused(optim.Adam, deferred=True),
}


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("rows", [None, 17])
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("follow", FOLLOWING)
def test_what_follows_goes_along(follow, host, rows):
    module = with_holes(host)
    know_places(module.arena, host)
    following = FOLLOWING[follow](module)
    arena = module.arena
    before = {key: cut(arena, value) for key, value in following().items()}
    numbers, sizes = cut(arena, arena.storage.detach()), module.sizes_of()
    assert before and any(row.any() for part in before.values() for row in part.values())
    moved = sum(module.compact(rows) for _ in range(1 if rows is None else -(-N // rows)))
    assert moved > 0 and torch.equal(module.sizes_of(), sizes)
    assert pages_in_use(arena) == fewest_pages(arena)
    assert rows is not None or pages_of(arena) == sum(fewest_pages(arena))
    assert same(cut(arena, arena.storage.detach()), numbers)
    assert following().keys() == before.keys()
    for key, value in following().items():
        assert value.shape == arena.storage.shape and same(cut(arena, value), before[key]), key
    check_accounts(arena)
    check_bytes(arena)


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("rows", [None, 17])
@pytest.mark.parametrize("host", HOSTS)
def test_loaded_state_that_no_step_has_shown_is_found(host, rows):
    """It lies where the checkpoint had the rows."""
    source = with_holes(host)
    ids = held(source)
    optimizer = torch.optim.Adam(source.parameters(), lr=0.1)
    source(ids).square().sum().backward()
    optimizer.step()
    module = ResizableEmbedding(N, sizes=SMALL, backend=host)
    loaded = torch.optim.Adam(module.parameters(), lr=0.1)
    module.load_state_dict(source.state_dict())
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    know_places(module.arena, host)
    assert sum(module.compact(rows) for _ in range(1 if rows is None else -(-N // rows))) > 0
    for each, steps in ((source, optimizer), (module, loaded)):
        steps.zero_grad()
        each(ids).square().sum().backward()
        steps.step()
    assert same(
        cut(module.arena, module.arena.storage.detach()),
        cut(source.arena, source.arena.storage.detach()),
    )
    for key in ("exp_avg", "exp_avg_sq"):
        found, expected = (
            cut(each.arena, steps.state[each.arena.storage][key])
            for each, steps in ((module, loaded), (source, optimizer))
        )
        assert same(found, expected), key


@pytest.mark.usefixtures("small_pages", "int64_starts")
@pytest.mark.parametrize("rows", [None, 17])
@pytest.mark.parametrize("host", HOSTS)
def test_starts_in_int64(host, rows):
    module = with_holes(host)
    arena = module.arena
    assert arena.row_start.dtype == torch.int64
    know_places(arena, host)
    before = cut(arena, arena.storage.detach())
    assert sum(module.compact(rows) for _ in range(1 if rows is None else -(-N // rows))) > 0
    assert pages_in_use(arena) == fewest_pages(arena) and arena.row_start.dtype == torch.int64
    assert same(cut(arena, arena.storage.detach()), before)
    check_accounts(arena)


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("rows", [None, 17])
@pytest.mark.parametrize("host", HOSTS)
def test_a_padding_row_and_a_copy_of_inference_tensors(host, rows):
    module = with_holes(host, padding_idx=3)
    before = cut(module.arena, module.arena.storage.detach())
    with torch.inference_mode():
        copied = copy.deepcopy(module)
    for each in (module, copied):
        know_places(each.arena, host)
        assert sum(each.compact(rows) for _ in range(1 if rows is None else -(-N // rows))) > 0
        assert pages_in_use(each.arena) == fewest_pages(each.arena)
        assert same(cut(each.arena, each.arena.storage.detach()), before)
        assert each.padding_idx == 3
        check_accounts(each.arena)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("n_rows", [0, 5])
def test_tables_without_rows(host, n_rows):
    arena = Arena(n_rows, SMALL, level=-1)
    know_places(arena, host)
    assert arena.compact(3) == arena.compact() == arena.reclaim() == 0
    assert arena.storage.numel() == 0
    check_accounts(arena)


# ---- graphs and aliases -------------------------------------------------------------------------


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("host", HOSTS)
def test_a_step_is_a_write_where_it_moves_rows(host):
    module = with_holes(host)
    know_places(module.arena, host)
    ids = held(module)
    out = module(ids)
    assert module.compact(N) > 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    out, free = module(ids), module.arena._free
    assert module.compact(N) == 0
    out.sum().backward()
    assert module.arena.storage.grad.any() and module.arena._free is free


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("rows", [None, 17])
@pytest.mark.parametrize("host", HOSTS)
def test_aliases_show_a_whole_table(host, rows):
    module = with_holes(host)
    know_places(module.arena, host)
    ids, chain = held(module), module.chain.detach()
    state = module.arena.state_dict()

    def read():
        places = state["row_start"][:-1], state["page_level"][:-1], SMALL, module.arena.page
        return lookup_reference(ids, state["storage"], chain, *places)

    before, start = read(), state["row_start"].clone()
    assert sum(module.compact(rows) for _ in range(1 if rows is None else 3)) > 0
    assert not torch.equal(state["row_start"], start)
    assert torch.equal(read(), before)
    state = module.arena.state_dict()
    assert torch.equal(read(), before)


# ---- where rows go ------------------------------------------------------------------------------


def by_state_dict(arena):
    other = Arena(arena.num_rows, arena.sizes, level=0, dtype=arena.storage.dtype)
    other.load_state_dict(arena.state_dict())
    return other


COPIES = {
    "state_dict": by_state_dict,
    "deepcopy": copy.deepcopy,
    "pickle": lambda arena: pickle.loads(pickle.dumps(arena)),
}


@NEEDS_NATIVE
@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("through", COPIES)
def test_native_kernels_go_on_to_the_same_places(through):
    module = with_holes("native")
    one, chain = module.arena, module.chain.detach()
    generator = torch.Generator().manual_seed(5)
    for call in range(12):
        two = COPIES[through](one) if call % 4 == 0 else two  # noqa: F821 - of the first call
        assert two.free_places() == one.free_places() == []
        ids = torch.randperm(N, generator=generator)[:30]
        for arena in (one, two):
            present = arena.level(ids) >= 0
            arena.promote(ids[:20], chain, backend="native")
            arena.demote(ids[10:], chain, backend="native")
            arena.free(ids[present][:8], backend="native")
            arena.insert(ids[~present][:8], call % 3, backend="native")
            if call % 5 == 3:
                arena.reserve(20)
            if call == 7:
                arena.compact()
        for key, value in one.state_dict().items():
            assert key == "storage" or torch.equal(value, two.state_dict()[key]), key
        assert same(cut(one, one.storage.detach()), cut(two, two.storage.detach()))


@NEEDS_NATIVE
def test_native_kernels_take_the_lowest_place_of_the_lowest_page():
    arena = with_page(16, 24, (2, 4), level=0)  # 8 rows a page
    arena.free(torch.tensor([21, 9, 14, 3]), backend="native")
    arena.insert(torch.tensor([21, 9, 14]), 0, backend="native")
    assert arena.row_start[[21, 9, 14]].tolist() == [6, 18, 28]
    # A page whose last row leaves serves any level, before those behind it.
    arena._grow(2, at_once=True)
    arena.free(torch.tensor([9, 14, 8, 10, 11, 12, 13, 15]), backend="native")
    assert arena.page_level.tolist() == [0, -1, 0, -1, -1, -1]
    arena.insert(torch.tensor([12, 13]), 1, backend="native")
    arena.insert(torch.tensor([9, 10]), 0, backend="native")
    assert arena.row_start[[12, 13, 9, 10]].tolist() == [16, 20, 42, 48]
    check_accounts(arena)


@pytest.mark.parametrize("forget", [Arena.reclaim, Arena.forget_counters])
def test_growth_after_counters_were_forgotten(forget, backend, monkeypatch):
    monkeypatch.setattr(locations, "page_elements", lambda *_: 16)
    arena, chain = Arena(48, (2, 8)), torch.zeros(chain_numel((2, 8)))
    arena.promote(torch.arange(16), chain, backend=backend)
    forget(arena)
    for ids in torch.arange(16, 48).split(16):
        assert arena.promote(ids, chain, backend=backend).all()
        check_accounts(arena)
    assert pages_of(arena) >= 24


@pytest.mark.parametrize("freed", ["free", "demote"])
def test_pages_that_empty_serve_another_level(freed, backend, monkeypatch):
    """All that ``max_elements`` allows is in use; as many bytes come at another size."""
    monkeypatch.setattr(locations, "page_elements", lambda *_: 16)
    chain = torch.zeros(chain_numel((2, 8)))
    level = torch.tensor([1] * 8 + [0] * 8 + [-1] * 40)
    arena = Arena(56, (2, 8), level=level, max_elements=5 * 16 + 16 * (freed == "demote"))
    numel = arena.max_elements
    if freed == "demote":
        arena._grow(1, at_once=True)
    assert arena.storage.numel() == numel
    for _ in range(3):
        ids = torch.arange(8)
        if freed == "free":
            assert arena.free(ids, backend=backend).all()
            assert arena.insert(torch.arange(16, 48), 0, backend=backend).all()
            check_accounts(arena)
            assert arena.free(torch.arange(16, 48), backend=backend).all()
            assert arena.insert(ids, 1, backend=backend).all()
        else:
            assert arena.demote(ids, chain, backend=backend).all()
            assert arena.insert(torch.arange(16, 48), 0, backend=backend).all()
            check_accounts(arena)
            assert arena.free(torch.arange(16, 48), backend=backend).all()
            assert arena.promote(ids, chain, backend=backend).all()
        check_accounts(arena)
        assert arena.storage.numel() == numel


@settings(max_examples=60, **quick)
@given(data=st.data())
def test_release_by_a_plain_account(data):
    """Stacks of any order, with anything above their heights."""
    sizes, page = data.draw(st.sampled_from([((2, 4), 8), ((1, 3), 4), ((5,), 16), (SMALL, 8)]))
    pages = data.draw(st.integers(1, 12))
    level = data.draw(st.lists(st.integers(-1, len(sizes) - 1), min_size=pages, max_size=pages))
    places = [
        (p, p * page + i * sizes[k])
        for p, k in enumerate(level)
        if k >= 0
        for i in range(page // sizes[k])
    ]
    kept = data.draw(st.sets(st.sampled_from([p for p, _ in places]))) if places else set()
    starts = [s for p, s in places if p in kept and data.draw(st.booleans())]
    row_start = torch.tensor([*starts, -1], dtype=torch.int32)
    page_level = torch.tensor([*level, -1], dtype=torch.int8)
    free = FreeLists(row_start, page_level, sizes, page)
    free.reach([height + 3 for height in free.room])
    shuffle = random.Random(data.draw(st.integers(0, 99)))
    before = [stack.tolist() for stack in free.stacks()]
    for stack in before:
        shuffle.shuffle(stack)
    free.reorder([torch.tensor(stack) for stack in before])
    for segment, height in zip(free.rows[:-1].split(free.room), free.count.tolist(), strict=False):
        segment[height:] = data.draw(st.integers(0, pages * page - 1))  # of places that were taken
    free.given = 7

    used = {s // page for s in starts}
    empty = [p for p, k in enumerate(level) if k >= 0 and p not in used]
    free.release(page_level)
    *stacks, numbers = (stack.tolist() for stack in free.stacks())
    assert free.given == 0
    assert page_level.tolist() == [-1 if p in empty else k for p, k in enumerate(level)] + [-1]
    for found, stack in zip(stacks, before, strict=False):
        assert found == [s for s in stack if s // page not in empty]  # in the order that was
    assert numbers[: len(before[-1])] == before[-1]
    assert sorted(numbers[len(before[-1]) :]) == sorted(empty)
    assert free.count.tolist() == [*map(len, stacks), len(numbers)]


@pytest.mark.parametrize("host", HOSTS)
def test_rows_that_come_and_go_take_no_more_memory(host):
    """At the same numbers of rows of every size, pages do not grow after the first calls."""
    sizes, n_rows = (2, 8, 16), 3000
    arena = Arena(n_rows, sizes, level=torch.arange(n_rows) % 3)
    chain = torch.randn(chain_numel(sizes)) / 4
    draw = random.Random(3)
    by_level = [[i for i in range(n_rows) if i % 3 == k] for k in range(3)]
    allocated = []
    for _ in range(600):
        k = draw.randrange(2)
        up, down = draw.sample(by_level[k], 10), draw.sample(by_level[k + 1], 10)
        assert arena.promote(torch.tensor(up), chain, backend=host).all()
        assert arena.demote(torch.tensor(down), chain, backend=host).all()
        for leaving, coming, level in ((up, down, k), (down, up, k + 1)):
            gone = set(leaving)
            by_level[level] = [i for i in by_level[level] if i not in gone] + coming
        allocated.append(arena.storage.numel())
    assert [len(ids) for ids in by_level] == [1000] * 3
    assert max(allocated) == allocated[60]
    check_accounts(arena)


# ---- calls that fail in between -----------------------------------------------------------------


class FailingAt(TorchDispatchMode):
    """Memory runs out in the ``n``-th operator."""

    def __init__(self, n):
        super().__init__()
        self.left = n

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.left -= 1
        if not self.left:
            raise MemoryError("none is left")
        return operator(*args, **(kwargs or {}))


FAILING = {
    "compact": lambda module, ids: module.compact(),
    "a step": lambda module, ids: module.compact(70),
    "reserve": lambda module, ids: module.reserve(3 * N),
    "promote": lambda module, ids: module.promote(ids),
    "free": lambda module, ids: module.arena.free(ids, backend=module.backend),
}


@pytest.mark.parametrize("call", FAILING.values(), ids=list(FAILING))
@pytest.mark.parametrize("host", HOSTS)
def test_memory_that_runs_out_leaves_a_whole_table(host, call):
    """Wherever it does: no row is lost, and the table goes on."""
    module = with_holes(host, n_rows=60)
    rows, ids = optim.Adam(module), held(module)
    module(ids).square().sum().backward()
    for n in itertools.count(1, 3):
        tried, state = copy.deepcopy((module, rows))
        arena, follows = tried.arena, state.state[tried.arena.storage]
        arena.followers.add(state)
        know_places(arena, host)
        before, moments = cut(arena, arena.storage.detach()), cut(arena, follows["exp_avg"])
        level = arena.level()
        try:
            with FailingAt(n):
                call(tried, ids[::2])
        except MemoryError:
            done = False
        else:
            done = True
        stays = (arena.level() == level).nonzero()[:, 0].tolist()
        for was, tensor in ((before, arena.storage.detach()), (moments, follows["exp_avg"])):
            present = cut(arena, tensor)
            assert all(torch.equal(present[i], was[i]) for i in stays if i in was)
        tried.promote(held(tried)[::3])
        check_accounts(arena)
        tried.compact()
        check_accounts(arena)
        assert pages_in_use(arena) == fewest_pages(arena)
        if done:
            break
    assert n > 3
