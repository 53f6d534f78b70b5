"""arena.py: rows keep their values through any history, and every element is accounted for."""

import copy
import io
import itertools
import pickle
import random
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from esapn_kernels.ops import layout as layout_file
from esapn_kernels.ops.chain import chain_numel
from esapn_kernels.ops.layout import (
    UNCLAIMED,
    chunks,
    count_levels,
    index_dtype,
    page_elements,
    place_densely,
)
from esapn_kernels.reference import promote_reference
from esapn_kernels.storage import locations
from esapn_kernels.storage import room as room_file
from esapn_kernels.storage.arena import Arena
from esapn_kernels.storage.free import FreeLists
from esapn_kernels.storage.ledger import Snapshot
from esapn_kernels.storage.taken import TakenBits
from tests.kernels.layouts import HOSTS, NEEDS_NATIVE, ODD, PAPER, SMALL, TINY, name

SIZES = [ODD, (2, 4, 8), (7,), (5, 6), (2, 64), TINY, PAPER]


def pages_of(arena):
    return arena.page_level.numel() - 1


def stack(arena, k):
    return arena._stacks().stacks()[k].tolist()


def check_accounts(arena):
    """Rows in use, free rows, free pages and page tails cover each page exactly once.

    By what is known of free places, or what would be derived.
    """
    page_level = arena.page_level.tolist()
    assert page_level.pop() == -1 and int(arena.row_start[-1]) == -1
    assert arena.storage.shape == (len(page_level) * arena.page,)
    held = [[] for _ in page_level]
    for start in arena.row_start[:-1].tolist():
        if start >= 0:
            held[start // arena.page].append(start)
    free = arena._free
    if isinstance(free, TakenBits):
        check_bits(arena, free, page_level, held)
        return
    if free is None:
        free = FreeLists(arena.row_start, arena.page_level, arena.sizes, arena.page)
    *stacks, free_pages = (stack.tolist() for stack in free.stacks())
    assert len(free_pages) < free.pages.numel()
    assert sorted(free_pages) == [p for p, k in enumerate(page_level) if k == -1]
    base = free.base.tolist()
    assert [b - a for a, b in itertools.pairwise(base)] == free.room
    assert base[-1] == free.rows.numel() - 1
    for k, places in enumerate(stacks):
        assert 0 <= int(free.count[k]) <= free.room[k]
        for start in places:
            assert page_level[start // arena.page] == k
            held[start // arena.page].append(start)
    if free.owner is not None:
        assert (free.owner == UNCLAIMED).all()
    for page, (k, starts) in enumerate(zip(page_level, held, strict=True)):
        assert sorted(starts) == (places_of(arena, page, k) if k >= 0 else [])


def places_of(arena, page, level):
    step = arena.sizes[level]
    return [page * arena.page + i * step for i in range(arena.rows_per_page[level])]


def check_bits(arena, free, page_level, held):
    """A set bit for every row; pages that hold some have a level, and the counts agree."""
    n, word = len(arena.sizes), 1 << 64
    count = [0] * (n + 1)
    words = free.taken.tolist()
    assert len(words) == free.used.numel() == free.vacant.numel() == len(page_level)
    for page, (k, starts) in enumerate(zip(page_level, held, strict=True)):
        assert len(starts) == int(free.used[page])
        taken = 0
        if k < 0:
            assert not starts and int(free.vacant[page]) == -1
            count[n] += 1
        else:
            places = places_of(arena, page, k)
            assert starts and len(set(starts)) == len(starts)
            taken = sum(1 << places.index(start) for start in starts)
            count[k] += len(places) - len(starts)
            assert int(free.vacant[page]) == (k if len(starts) < len(places) else -2)
        assert sum(w % word << 64 * i for i, w in enumerate(words[page])) == taken
    assert free.count.tolist() == count
    vacant = free.vacant.tolist()
    for kind, first in zip([*range(n), -1], free.lowest.tolist(), strict=True):
        assert 0 <= first <= len(vacant) and kind not in vacant[:first]


def scratch_bytes(arena):
    """What only moving rows takes: bits and counts, or stacks, and what kernels claim ids by."""
    if (free := arena._free) is None:
        return 0
    n = len(arena.sizes)
    if isinstance(free, TakenBits):
        words = -(-arena.rows_per_page[0] // 64)
        return pages_of(arena) * (8 * words + 4 + 1) + 8 * ((n + 1) + (n + 1))
    rows = free.rows.numel() * free.rows.element_size()
    lists = rows + 4 * free.pages.numel() + 8 * ((n + 1) + (n + 1) + n + n)
    return lists + (0 if free.owner is None else 4 * arena.num_rows)


def check_bytes(arena):
    tensors = [*arena.parameters(recurse=False), *arena.buffers(recurse=False)]
    level = arena.level()
    payload = sum(arena.sizes[k] for k in level.tolist() if k >= 0)
    found = arena.bytes()
    assert found.payload == payload * arena.storage.element_size()
    assert found.total == sum(t.untyped_storage().nbytes() for t in tensors)
    assert found.slack >= 0
    assert found.scratch == scratch_bytes(arena)


def arriving(chance):
    """Copies of the counters are there when ``chance`` says so; the host waits for those."""

    def arrived(snapshot):
        there = chance()
        if there and snapshot.event is not None:
            snapshot.event.synchronize()
        return there

    return mock.patch.object(Snapshot, "arrived", arrived)


def with_page(page, *args, **kwargs):
    """An arena with pages of at least ``page`` elements: small ones come and go."""
    power = 1 << (page - 1).bit_length()
    with mock.patch.object(locations, "page_elements", return_value=power):
        return Arena(*args, **kwargs)


def fewest_pages(arena):
    """Pages of every level that its rows need."""
    level = arena.level()
    counts = torch.bincount(level[level >= 0], minlength=len(arena.sizes)).tolist()
    return [-(-count // per) for count, per in zip(counts, arena.rows_per_page, strict=True)]


def pages_in_use(arena):
    """Pages of every level that hold a row."""
    start = arena.row_start[:-1]
    level = arena.page_level[(start[start >= 0] // arena.page).unique()].long()
    return torch.bincount(level, minlength=len(arena.sizes)).tolist()


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Of rows that went up, relative to the largest number of the row before."""

FRESH = {"grad": 0.0, "moment": 0.5}
"""What goes with rows in a history, and what it holds for a fresh one."""


class History(RuleBasedStateMachine):
    """Every operation on an arena beside plain dicts of its rows and of what goes with them."""

    n_rows = 40
    backend = "torch"
    device = torch.device("cpu")
    dtypes = (torch.float64,)

    @initialize(
        sizes=st.sampled_from(SIZES),
        level=st.one_of(st.integers(-1, 6), st.lists(st.integers(-1, 6), min_size=40, max_size=40)),
        spare=st.one_of(st.integers(0, 100), st.just(4096)),
        data=st.data(),
    )
    def build(self, sizes, level, spare, data):
        self.dtype = data.draw(st.sampled_from(self.dtypes))
        self.sizes, last = sizes, len(sizes) - 1
        if isinstance(level, list):
            level = torch.tensor([min(k, last) for k in level])
        else:
            level = min(level, last)
        self.page = sizes[-1] + spare
        self.arena = self.fresh(level)
        generator = torch.Generator().manual_seed(0)
        chain = torch.randn(chain_numel(sizes), generator=generator, dtype=torch.float64) * 0.5
        self.chain = chain.to(self.dtype).double()
        self.identity = self.arena.storage
        self.fill_rows(self.held())

    def fresh(self, level):
        options = {"level": level, "dtype": self.dtype, "device": self.device}
        return with_page(self.page, self.n_rows, self.sizes, **options)

    def follow(self, grad, state):
        """A gradient and an optimizer for the arena, which holds numbers per element and per id."""
        storage = self.arena.storage
        storage.grad = grad
        self.optimizer = torch.optim.SGD([storage], lr=0.1)
        self.optimizer.state_per_element = {"moment": FRESH["moment"]}
        self.optimizer.state_per_id = {"step": 4.0}
        self.optimizer.state[storage] = state
        self.arena.followers.add(self.optimizer)

    def following(self):
        """What goes with rows, by its name."""
        storage = self.arena.storage
        return {"grad": storage.grad, "moment": self.optimizer.state[storage]["moment"]}

    def know_places(self):
        """Free places are known as the backend takes them."""
        if self.backend == "native":
            self.arena._bits()
        else:
            self.arena._stacks()

    def ids(self, ids):
        return torch.tensor(ids, device=self.device)

    def move(self, ids, mask=None):
        """Promote; the model's own numbers stay on the host."""
        return self.arena.promote(self.ids(ids), self.hops(), mask, backend=self.backend)

    def hops(self):
        return self.chain.to(self.device, self.dtype)

    def held(self):
        return [i for i, k in enumerate(self.arena.level().tolist()) if k >= 0]

    def fill_rows(self, ids):
        """Random rows and gradients, in the arena and in the model."""
        arena, generator = self.arena, torch.Generator().manual_seed(1)
        state = {
            "moment": torch.zeros_like(arena.storage.detach()),
            "step": torch.zeros(self.n_rows, device=self.device),
        }
        self.follow(torch.zeros_like(arena.storage), state)
        self.rows, self.states = {}, {key: {} for key in FRESH}
        self.steps = [0.0] * self.n_rows
        for i in ids:
            start, dim = int(arena.row_start[i]), self.sizes[int(arena.level()[i])]
            for model, tensor in (
                (self.rows, arena.storage),
                *((self.states[key], tensor) for key, tensor in self.following().items()),
            ):
                model[i] = torch.randn(dim, generator=generator, dtype=torch.float64).to(self.dtype)
                tensor.data[start : start + dim] = model[i]

    def resized(self, i, row):
        """Take ``row`` for that of ``i``, whose state is fresh."""
        self.rows[i], self.steps[i] = row, 4.0
        for key, fresh in FRESH.items():
            self.states[key][i] = torch.full_like(row, fresh)

    def grow(self, ids):
        for i in set(ids) & set(self.rows):
            level = self.sizes.index(len(self.rows[i]))
            if level + 1 < len(self.sizes):
                row = promote_reference(self.rows[i].double(), level, self.chain, self.sizes)
                found = self.arena.read(i).cpu()
                tolerance = TOLERANCE[self.dtype]
                scale = 1 + float(self.rows[i].double().abs().max())
                torch.testing.assert_close(
                    found.double(), row, rtol=tolerance, atol=tolerance * scale
                )
                self.resized(i, found)

    def some(self, data, ids, *, unique=True):
        return data.draw(st.lists(st.sampled_from(ids), min_size=1, unique=unique))

    @rule(data=st.data(), level=st.integers(0, 6))
    @precondition(lambda self: len(self.rows) < self.n_rows)
    def insert(self, data, level):
        level = min(level, len(self.sizes) - 1)
        ids = self.some(data, sorted(set(range(self.n_rows)) - set(self.rows)))
        given = self.arena.insert(self.ids(ids), level, backend=self.backend)
        assert given.all() and given.shape == (len(ids),)
        for i in ids:
            self.resized(i, torch.zeros(self.sizes[level], dtype=self.dtype))

    @rule(data=st.data(), masked=st.booleans())
    @precondition(lambda self: self.rows)
    def promote(self, data, masked):
        ids = self.some(data, sorted(self.rows), unique=False)
        size = len(ids)
        mask = data.draw(st.lists(st.booleans(), min_size=size, max_size=size)) if masked else None
        moved = self.move(ids, self.ids(mask) if masked else None)
        admitted = mask if masked else [True] * size
        last = self.sizes[-1]
        expected = [ok and len(self.rows[i]) < last for i, ok in zip(ids, admitted, strict=True)]
        assert moved.tolist() == expected
        self.grow(itertools.compress(ids, mask) if masked else ids)

    @rule(data=st.data(), hops=st.integers(1, 5))
    @precondition(lambda self: self.rows)
    def resize_by_hops(self, data, hops):
        ids = self.some(data, sorted(self.rows))
        for _ in range(hops):
            self.move(ids)
            self.grow(ids)
            self.rows_survive()

    @rule()
    @precondition(lambda self: self.rows)
    def promote_everything(self):
        self.move(sorted(self.rows))
        self.grow(list(self.rows))

    @rule(data=st.data())
    @precondition(lambda self: self.rows)
    def free(self, data):
        ids = self.some(data, sorted(self.rows))
        assert self.arena.free(self.ids(ids), backend=self.backend).all()
        for i in ids:
            del self.rows[i]
            for state in self.states.values():
                del state[i]

    @rule()
    def compact(self):
        self.know_places()
        self.arena.compact()
        assert pages_of(self.arena) == sum(fewest_pages(self.arena))

    @rule(rows=st.integers(1, 45))
    def compact_in_steps(self, rows):
        self.know_places()
        start, shape = self.arena.row_start.clone(), self.arena.storage.shape
        moved = self.arena.compact(rows)
        assert moved == int((self.arena.row_start != start).sum()) <= min(rows, self.n_rows)
        assert (self.arena.row_start <= start).all() and self.arena.storage.shape == shape

    @rule(rows=st.integers(1, 45))
    def look_at_all(self, rows):
        """In steps, without other moves: one page of a level has holes, at most."""
        self.know_places()
        for _ in range(-(-self.n_rows // rows)):
            self.arena.compact(rows)
        assert pages_in_use(self.arena) == fewest_pages(self.arena)
        assert self.arena.compact(self.n_rows) == 0

    @rule(rows=st.integers(0, 60))
    def reserve(self, rows):
        """Room for so many rows: those that exist take it without growth."""
        self.know_places()
        self.arena.reserve(rows)
        shape = self.arena.storage.shape
        if ids := sorted(self.rows)[:rows]:
            self.move(ids)
            self.grow(ids)
        assert self.arena.storage.shape == shape

    @rule()
    def reclaim(self):
        self.know_places()
        in_use = {s // self.arena.page for s in self.arena.row_start[:-1].tolist() if s >= 0}
        self.arena.reclaim()
        assert int(self.arena._free.count[-1]) == pages_of(self.arena) - len(in_use)
        assert self.arena.reclaim() == 0

    @rule(through=st.sampled_from(["deepcopy", "pickle", "state_dict"]))
    def copy(self, through):
        grad, state = self.arena.storage.grad, self.optimizer.state[self.arena.storage]
        if through == "state_dict":
            fresh = self.fresh(0)
            fresh.load_state_dict(self.arena.state_dict())
            self.arena = fresh
        elif through == "pickle":
            self.arena = pickle.loads(pickle.dumps(self.arena))
        else:
            self.arena = copy.deepcopy(self.arena)
        self.follow(grad, state)
        self.identity = self.arena.storage

    @invariant()
    def accounts_balance(self):
        if hasattr(self, "arena"):
            check_accounts(self.arena)
            check_bytes(self.arena)

    @invariant()
    def rows_survive(self):
        if not hasattr(self, "arena"):
            return
        arena, following = self.arena, self.following()
        assert arena.storage is self.identity
        assert all(tensor.shape == arena.storage.shape for tensor in following.values())
        assert self.held() == sorted(self.rows)
        assert self.optimizer.state[arena.storage]["step"].tolist() == self.steps
        free = torch.ones_like(arena.storage, dtype=torch.bool)
        for i, row in self.rows.items():
            assert torch.equal(arena.read(i).cpu(), row)
            start = int(arena.row_start[i])
            free[start : start + len(row)] = False
            for key, tensor in following.items():
                found = tensor[start : start + len(row)].cpu()
                assert torch.equal(found, self.states[key][i]), key
        # Nothing of what lies between the rows may ever reach one.
        for tensor in (arena.storage.data, *following.values()):
            tensor[free] = float("nan")


class NativeHistory(History):
    backend = "native"


class EitherHistory(History):
    """The backends of CPUs take turns."""

    def __init__(self):
        super().__init__()
        self.turns = random.Random(0)

    @property
    def backend(self):
        return self.turns.choice(["native", "torch"])


class KernelHistory(History):
    backend = "triton"


class DeviceHistory(KernelHistory):
    """As on a GPU: the host sees the counters only when a copy of them happens to arrive."""

    def __init__(self):
        super().__init__()
        arrives = random.Random(0)
        self.patches = [
            mock.patch.object(room_file, "host_reads", return_value=False),
            mock.patch.object(room_file, "resolve_backend", return_value="triton"),
            arriving(lambda: arrives.random() < 0.3),
        ]
        for patch in self.patches:
            patch.start()

    def teardown(self):
        for patch in self.patches:
            patch.stop()


@pytest.fixture(autouse=True)
def kernels_on(device, monkeypatch):
    """The histories of the kernels run on the device; hypothesis' machines take no fixture."""
    monkeypatch.setattr(KernelHistory, "device", device)


quick = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}
TestHistory = History.TestCase
TestHistory.settings = settings(max_examples=30, stateful_step_count=20, **quick)
TestNativeHistory = NEEDS_NATIVE(NativeHistory.TestCase)
TestNativeHistory.settings = settings(max_examples=30, stateful_step_count=20, **quick)
TestEitherHistory = NEEDS_NATIVE(EitherHistory.TestCase)
TestEitherHistory.settings = settings(max_examples=15, stateful_step_count=20, **quick)
TestDeviceHistory = DeviceHistory.TestCase
TestDeviceHistory.settings = settings(max_examples=5, stateful_step_count=12, **quick)
TestKernelHistory = KernelHistory.TestCase
TestKernelHistory.settings = settings(max_examples=5, stateful_step_count=8, **quick)


@pytest.mark.parametrize("sizes", [*SIZES, (127, 130), (2, 512), (127, 4097)], ids=name)
@pytest.mark.parametrize("num_rows", [0, 1, 1000, 1_000_000])
def test_page_elements(sizes, num_rows):
    page = page_elements(sizes, num_rows)
    assert page & (page - 1) == 0
    assert max(sizes) <= page < max(2 * 4096, 16 * max(sizes))
    assert all(page // d * d >= 7 * page / 8 for d in sizes)
    assert num_rows < 1_000_000 or page >= 4096


def test_a_small_table_has_small_pages():
    # A page begun for every level costs a small table at most as much as its rows.
    for num_rows in (1000, 10_000):
        sizes = (2, 4, 8, 16, 64, 128)
        assert page_elements(sizes, num_rows) * len(sizes) <= num_rows * sizes[0]


@pytest.mark.parametrize("sizes", [(2, 4), (127, 130), (1, 3, 5, 33)], ids=name)
def test_emptied_pages_serve_other_levels(sizes):
    arena = with_page(4 * sizes[-1], 200, sizes, dtype=torch.float64)
    chain = torch.randn(chain_numel(sizes), dtype=torch.float64)
    ids = torch.arange(200)
    pages = []
    for _ in sizes[1:]:
        arena.promote(ids, chain)
        pages.append(pages_of(arena))
    for _ in range(6):
        # Everything goes and comes back at another size: no page more than the worst round.
        for k in range(len(sizes)):
            arena.free(ids)
            arena.insert(ids, k)
            check_accounts(arena)
    worst = -(-200 // arena.rows_per_page[-1])
    assert pages_of(arena) <= 2 * max(*pages, worst) + worst // 4
    used = {int(s) // arena.page for s in arena.row_start[:-1]}
    assert len(used) == worst


def test_growth_is_geometric_and_keeps_the_parameter(device):
    arena = Arena(20_000, (2, 64), device=device)
    storage = arena.storage
    chain = torch.zeros(chain_numel((2, 64)), device=device)
    shapes = set()
    for ids in torch.arange(20_000, device=device).split(500):
        arena.promote(ids, chain)
        shapes.add(tuple(arena.storage.shape))
    assert arena.storage is storage
    assert len(shapes) < 40  # fewer growths than promotions
    needed = -(-20_000 // arena.rows_per_page[1])
    assert pages_of(arena) <= needed * 9 / 8 + 12
    check_accounts(arena)


def test_compact_shrinks_to_the_minimum(device):
    arena = Arena(5000, (2, 8, 64), device=device)
    arena.promote(torch.arange(5000, device=device), torch.ones(chain_numel((2, 8, 64))).to(device))
    arena.free(torch.arange(1, 5000, device=device))
    row = arena.read(0)
    arena.compact()
    assert arena.storage.numel() == arena.page and torch.equal(arena.read(0), row)
    check_accounts(arena)
    check_bytes(arena)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("spare_pages", [0, 4000])
@pytest.mark.parametrize("sizes", [(1, 2, 3), (2, 17)], ids=name)
def test_many_small_promotions(sizes, spare_pages, host):
    """What the host knows of pages and stacks is never wrong."""
    n_rows, last = 1500, len(sizes) - 1
    arena = with_page(18, n_rows, sizes, dtype=torch.float64)
    arena.storage.data.normal_()
    arena._grow(spare_pages)
    chain = torch.randn(chain_numel(sizes), dtype=torch.float64)
    rows = [arena.read(i) for i in range(n_rows)]
    levels = [0] * n_rows
    for ids in torch.randperm(n_rows).repeat(last).split(30):
        assert arena.promote(ids, chain, backend=host).all()
        for i in ids.tolist():
            rows[i] = promote_reference(rows[i], levels[i], chain, sizes)
            levels[i] += 1
        check_accounts(arena)
    assert levels == [last] * n_rows == arena.level().tolist()
    for i, row in enumerate(rows):
        torch.testing.assert_close(arena.read(i), row, rtol=1e-12, atol=1e-12)


@pytest.fixture
def on_a_device(monkeypatch):
    """Where looking costs: the host's part of a call may read no tensor but a snapshot."""
    monkeypatch.setattr(room_file, "host_reads", lambda tensor: False)
    monkeypatch.setattr(room_file, "resolve_backend", lambda *_: "triton")

    def unread(run):
        def wrapper(arena, *args, **kwargs):
            snapshot = arena._stacks().ledger.snapshot  # deriving them looks once
            allowed = [] if snapshot is None else [snapshot.values]

            def watched(read):
                def wrapped(tensor, *args, **kwargs):
                    assert any(tensor is a for a in allowed), "the host waits for the device"
                    return read(tensor, *args, **kwargs)

                return wrapped

            with pytest.MonkeyPatch.context() as patch:
                for method in ("tolist", "item", "__int__", "__bool__", "nonzero", "__index__"):
                    patch.setattr(torch.Tensor, method, watched(getattr(torch.Tensor, method)))
                return run(arena, *args, **kwargs)

        return wrapper

    for part in ("_begin_unread", "_end"):
        monkeypatch.setattr(Arena, part, unread(getattr(Arena, part)))


def fill(arena, generator=None):
    """Standard normal numbers; drawn by the host, whose generators a GPU does not take."""
    drawn = torch.randn(arena.storage.shape, generator=generator, dtype=arena.storage.dtype)
    arena.storage.data.copy_(drawn)


def promote_all(arrives, device, batch=40, n_rows=300):
    """Three rounds of promotion in batches; returns the arena, and what it should hold."""
    sizes = (2, 3, 5, 16)
    arena = with_page(32, n_rows, sizes, dtype=torch.float64, device=device)
    generator = torch.Generator().manual_seed(0)
    fill(arena, generator)
    arena.storage.grad = torch.ones_like(arena.storage)
    chain = torch.randn(chain_numel(sizes), generator=generator, dtype=torch.float64).to(device)
    rows = [arena.read(i) for i in range(n_rows)]
    with arriving(arrives):
        for level in range(3):
            for ids in torch.randperm(n_rows, generator=generator).to(device).split(batch):
                assert arena.promote(ids, chain, backend="triton").all()
            rows = [promote_reference(row, level, chain, sizes) for row in rows]
    check_accounts(arena)
    assert (arena.level() == 3).all()
    for i, row in enumerate(rows):
        torch.testing.assert_close(arena.read(i), row, rtol=1e-12, atol=1e-12)
        start = int(arena.row_start[i])
        assert not arena.storage.grad[start : start + 16].any()
    return arena


def test_growth_without_looking(on_a_device, device):
    """Every row finds room whenever the counters arrive; how much is kept in reserve depends."""
    chance = random.Random(1)
    capacity = {}
    for when, arrives in (
        ("at once", lambda: True),
        ("at times", lambda: chance.random() < 0.2),
        ("never", lambda: False),
    ):
        capacity[when] = promote_all(arrives, device).storage.numel()
    # Rows of the three sizes before are never reclaimed here; a batch or two lie in reserve.
    assert capacity["at once"] <= 300 * (2 + 3 + 5 + 16) * 1.5 + 32 * (2 * 20 + 12)
    assert max(capacity["at once"], capacity["at times"]) <= capacity["never"]
    # Even never seen, every row promised takes one row of the largest size at most.
    assert capacity["never"] <= 300 * 2 + (3 * 300 * 16) * 9 / 8 + 32 * 12


def test_rows_do_not_depend_on_when_counters_arrive(on_a_device, device):
    first, second = (promote_all(lambda there=there: there, device) for there in (True, False))
    assert torch.equal(first.level(), second.level())
    for i in range(300):
        assert torch.equal(first.read(i), second.read(i))


@pytest.mark.parametrize("captured", [True, False], ids=["captured", "before"])
def test_reserved_room_does(captured, on_a_device, device, monkeypatch):
    """As many rows as were reserved move without growth, in calls of any size."""
    sizes = SMALL
    arena = with_page(36, 200, sizes, device=device)
    chain = torch.randn(chain_numel(sizes), device=device)
    arena.reserve(300)
    shape, base = arena.storage.shape, arena._free.base
    if captured:
        monkeypatch.setattr(room_file, "is_capturing", lambda tensor: True)
        with pytest.raises(RuntimeError, match="before capturing"):
            arena.reserve(1)
    order = torch.cat([torch.arange(150), torch.arange(150).flip(0)])
    for ids in order.to(device).split([1, 2, 97, 50, 60, 90]):
        assert arena.promote(ids, chain, backend="triton").all()
        check_accounts(arena)
    assert arena.storage.shape == shape and arena._free.base is base
    assert arena.level().tolist() == [2] * 150 + [0] * 50


def test_nothing_grows_while_captured_nor_after(on_a_device, device):
    sizes = (2, 17)
    arena = with_page(36, 100, sizes, device=device)
    fill(arena)
    rows = [arena.read(i) for i in range(100)]
    chain = torch.randn(chain_numel(sizes), device=device)
    arena.reserve(20)
    shape, ids = arena.storage.shape, torch.arange(100, device=device)
    capturing = mock.patch.object(room_file, "is_capturing", return_value=True)
    with capturing:
        moved = arena.promote(ids, chain, backend="triton")
        assert arena._free.ledger.snapshot is None
    # Room for 20, and for what else the pages for them hold; the first positions take it.
    count = int(moved.sum())
    assert 20 <= count < 60 and moved[:count].all()
    assert not arena.promote(ids, chain, backend="triton").any()
    assert arena.storage.shape == shape
    check_accounts(arena)
    assert arena.level().tolist() == moved.long().tolist()
    for i in range(count, 100):
        assert torch.equal(arena.read(i), rows[i])
    # The counters are read anew: replays were not counted.
    arena.reserve(100)
    assert torch.equal(arena.promote(ids, chain, backend="triton"), ~moved)
    check_accounts(arena)


def test_free_places_are_found_before_a_capture(device):
    arena = Arena(10, (2, 8), device=device)
    chain, ids = torch.zeros(chain_numel((2, 8)), device=device), torch.arange(3, device=device)
    capturing = mock.patch.object(room_file, "is_capturing", return_value=True)
    with capturing, pytest.raises(RuntimeError, match="call reserve before capturing"):
        arena.promote(ids, chain, backend="triton")
    assert not arena.level().any()
    with mock.patch.object(room_file, "resolve_backend", return_value="triton"):
        arena.reserve(3)
    with capturing:
        assert arena.promote(ids, chain, backend="triton").all()


@pytest.mark.parametrize("host", HOSTS)
def test_the_host_finds_room_after_a_capture(host, device):
    if host == "native" and device.type != "cpu":
        pytest.skip("native kernels run on CPUs")
    arena = with_page(36, 100, (2, 17), device=device)
    fill(arena)
    rows = [arena.read(i) for i in range(100)]
    chain = torch.randn(chain_numel((2, 17)), device=device)
    ids = torch.arange(100, device=device)
    with mock.patch.object(room_file, "resolve_backend", return_value="triton"):
        arena.reserve(1)
    with mock.patch.object(room_file, "is_capturing", return_value=True):
        arena.promote(ids[:1], chain, backend="triton")
    assert arena.promote(ids[1:50], chain, backend=host).all()
    arena.free(ids[1:50], backend=host)
    arena.insert(ids[1:50], 0, backend=host)
    check_accounts(arena)
    for i in range(50, 100):
        assert torch.equal(arena.read(i), rows[i])


@pytest.mark.parametrize("host", HOSTS)
def test_a_cap_on_the_host_raises_before_anything_moves(host):
    arena = with_page(32, 64, (2, 8), max_elements=320)
    arena.storage.data.normal_()
    rows, levels = [arena.read(i) for i in range(64)], arena.level()
    chain = torch.randn(chain_numel((2, 8)))
    for call in (
        lambda: arena.promote(torch.arange(64), chain, backend=host),
        lambda: arena.reserve(64),
    ):
        with pytest.raises(RuntimeError, match="arena is full.*max_elements=320 allows 6"):
            call()
        assert torch.equal(arena.level(), levels)
        for i in range(64):
            assert torch.equal(arena.read(i), rows[i])
        check_accounts(arena)
    # Six more pages of 4 rows; and a page of small rows that is emptied comes back.
    assert arena.promote(torch.arange(24), chain, backend=host).all()
    assert arena.promote(torch.arange(24, 28), chain, backend=host).all()
    assert arena.storage.numel() == 320
    check_accounts(arena)
    with pytest.raises(ValueError, match="max_elements=100"):
        Arena(1000, (2, 8), max_elements=100)


@pytest.mark.parametrize("looks", [True, False], ids=["cpu", "as-on-a-gpu"])
def test_a_cap_on_a_device_leaves_rows(looks, device, monkeypatch):
    monkeypatch.setattr(room_file, "host_reads", lambda tensor: looks)
    arena = with_page(32, 64, (2, 8), max_elements=330, device=device)
    fill(arena)
    rows = [arena.read(i) for i in range(64)]
    chain, ids = torch.randn(chain_numel((2, 8)), device=device), torch.arange(64, device=device)
    moved = arena.promote(ids, chain, backend="triton")
    assert moved.tolist() == [True] * 24 + [False] * 40
    assert arena.storage.numel() == 320
    # The first 16 rows left a page, which takes four of the larger size.
    moved = arena.promote(ids, chain, backend="triton")
    assert moved.nonzero()[:, 0].tolist() == [24, 25, 26, 27]
    assert not arena.promote(ids, chain, backend="triton").any()
    assert arena.storage.numel() == 320
    check_accounts(arena)
    for i in range(64):
        row = rows[i] if i >= 28 else promote_reference(rows[i], 0, chain, (2, 8))
        torch.testing.assert_close(arena.read(i), row)
    assert arena.free(ids[:4], backend="triton").all()
    assert arena.promote(ids, chain, backend="triton").sum() == 4
    check_accounts(arena)


def test_growth_keeps_what_the_stacks_hold(on_a_device, device):
    """Segments are copied whole, fresh pages go below those that were free."""
    arena = with_page(32, 60, (2, 8), level=torch.arange(60) % 2, device=device)
    arena.free(torch.arange(0, 60, 3, device=device), backend="triton")
    arena.reclaim()
    arena._grow(3)
    before = [stack(arena, 0), stack(arena, 1)]
    height = int(arena._stacks().count[-1])
    pages = arena._free.pages[:height].tolist()
    arena._grow_stacks([1000, 10])
    assert [stack(arena, 0), stack(arena, 1)] == before
    arena._grow(5)
    assert arena._free.pages[: height + 5].tolist()[5:] == pages
    check_accounts(arena)


def test_misuse_on_a_device_is_passed_over(device):
    arena = Arena(6, (2, 8), level=torch.tensor([0, 1, 0, -1, -1, -1]), device=device)
    ids = torch.tensor([3, 0, 3, 9, -1, 4], device=device)
    given = arena.insert(ids, 1, backend="triton")
    assert given.tolist() == [True, False, True, False, False, True]
    assert arena.level().tolist() == [0, 1, 0, 1, 1, -1]
    assert not arena.read(3).any() and not arena.read(4).any()
    ids = torch.tensor([5, 1, 7, 1, -3], device=device)
    assert arena.free(ids, backend="triton").tolist() == [False, True, False, True, False]
    assert arena.level().tolist() == [0, -1, 0, 1, 1, -1]
    check_accounts(arena)


def test_a_copy_has_its_own_scratch(device):
    arena = Arena(20, (2, 8), device=device)
    chain, ids = torch.randn(chain_numel((2, 8)), device=device), torch.arange(8, device=device)
    arena.promote(ids[:3], chain, backend="triton")
    assert arena._free.owner.numel() == 20 and arena.bytes().scratch == scratch_bytes(arena)
    for other in (copy.deepcopy(arena), pickle.loads(pickle.dumps(arena))):
        assert other.bytes().scratch == 0
        assert other.promote(ids[3:], chain, backend="triton").all()
        check_accounts(other)


@pytest.mark.cuda
def test_promote_does_not_synchronise(device, no_waiting):
    """Growth included: the host waits for nothing."""
    sizes = (2, 4, 8)
    arena = Arena(100_000, sizes, device=device)
    chain = torch.randn(chain_numel(sizes), device=device)
    ids = torch.arange(100_000, device=device).split(640)
    arena.promote(ids[0], chain)
    shape = arena.storage.shape
    with no_waiting():
        for part in ids[1:40]:
            arena.promote(part, chain)
        arena.free(ids[50])
        arena.insert(ids[50], 2)
        arena.reserve(1000)
    assert arena.storage.shape != shape
    assert (arena.level()[: 40 * 640] == 1).all() and (
        arena.level()[40 * 640 : 50 * 640] == 0
    ).all()
    check_accounts(arena.cpu())


@pytest.mark.cuda
def test_promote_in_a_graph(device):
    sizes = (2, 4, 8)
    arena = Arena(10_000, sizes, device=device)
    arena.storage.data.normal_()
    chain = torch.randn(chain_numel(sizes), device=device)
    ids = torch.zeros(500, dtype=torch.long, device=device)
    # Kernels are loaded before: the very ones, whose number of ids may be compiled in.
    arena.promote(ids, chain)
    rows = [arena.read(i) for i in range(1, 2000, 7)]
    arena.reserve(6000)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        moved = arena.promote(ids, chain)
    for begin in range(1, 2001, 500):
        for _ in range(2):
            ids.copy_(torch.arange(begin, begin + 500))
            graph.replay()
            assert moved.all()
    assert (arena.level()[1:2001] == 2).all() and (arena.level()[2001:] == 0).all()
    chain = chain.cpu()
    for i, row in zip(range(1, 2000, 7), rows, strict=True):
        for level in range(2):
            row = promote_reference(row.cpu(), level, chain, sizes)
        torch.testing.assert_close(arena.read(i).cpu(), row, rtol=1e-3, atol=1e-3)
    check_accounts(arena.cpu())


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(
    "call, words",
    [
        (lambda a, host: a.insert(torch.tensor([3, 3]), 0, backend=host), "distinct"),
        (lambda a, host: a.insert(torch.tensor([0]), 0, backend=host), "no row"),
        (lambda a, host: a.free(torch.tensor([0, 0]), backend=host), "distinct"),
        (lambda a, host: a.free(torch.tensor([3]), backend=host), "have a row"),
    ],
    ids=["insert-twice", "insert-held", "free-twice", "free-nothing"],
)
def test_misuse_changes_nothing(call, words, host):
    arena = Arena(4, (2, 4), level=torch.tensor([0, 1, 0, -1]))
    before = {key: value.clone() for key, value in arena.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        call(arena, host)
    for key, value in arena.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("other", [(1, 6), (2, 4, 8)], ids=name)
def test_a_state_of_other_sizes_is_refused(other):
    arena = Arena(5, (2, 4))
    before = {key: value.clone() for key, value in arena.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"other sizes than \[2, 4\]"):
        arena.load_state_dict(Arena(5, other).state_dict())
    for key, value in arena.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_state_survives_torch_save():
    arena = Arena(50, (2, 4, 8))
    arena.storage.data.normal_()
    arena.promote(torch.arange(20), torch.randn(chain_numel((2, 4, 8))))
    file = io.BytesIO()
    torch.save(arena.state_dict(), file)
    file.seek(0)
    fresh = Arena(50, (2, 4, 8), level=2)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    for i in range(50):
        assert torch.equal(fresh.read(i), arena.read(i))
    check_accounts(fresh)
    check_bytes(fresh)


# ---- many rows: chunk by chunk ------------------------------------------------------------------


MANY = (1 << 18) + 1000
"""More than a chunk of ids."""


def placed(level, sizes, page):
    """``place_densely`` all at once."""
    starts = torch.full((len(level),), -1, dtype=torch.int64)
    page_level = []
    for k, dim in enumerate(sizes):
        mine, per = (level == k).nonzero()[:, 0], page // dim
        slots = torch.arange(len(mine))
        starts[mine] = (len(page_level) + slots // per) * page + slots % per * dim
        page_level += [k] * -(-len(mine) // per)
    sink = torch.tensor([-1])
    starts = torch.cat([starts, sink]).to(index_dtype(len(page_level) * page))
    return starts, torch.tensor([*page_level, -1], dtype=torch.int8)


def same(given, expected):
    return all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(given, expected, strict=True)
    )


def mixed_levels(n, sizes):
    """Of every level, of none, and ids without a row."""
    generator = torch.Generator().manual_seed(len(sizes))
    return torch.randint(-1, len(sizes), (n,), generator=generator, dtype=torch.int8)


@pytest.mark.parametrize("n", [0, 1, 1000, MANY])
@pytest.mark.parametrize("sizes", [ODD, (7,), (5, 6), (127, 130), PAPER], ids=name)
def test_places(sizes, n):
    page = page_elements(sizes, n)
    level = mixed_levels(n, sizes)
    assert same(place_densely(level, n, sizes, page), placed(level, sizes, page))
    for k in (-1, 0, len(sizes) - 1):
        expected = placed(torch.full((n,), k), sizes, page)
        assert same(place_densely(k, n, sizes, page), expected)
        assert same(place_densely(torch.full((n,), k), n, sizes, page), expected)


@pytest.mark.parametrize("level", [1, torch.tensor([0, 1, 1, -1, 0])], ids=["one", "each"])
def test_places_in_int64(level, monkeypatch):
    narrow, pages = place_densely(level, 5, (3, 5), 8)
    monkeypatch.setattr(layout_file, "_INT32_LIMIT", 7)
    wide, same_pages = place_densely(level, 5, (3, 5), 8)
    assert narrow.dtype == torch.int32 and wide.dtype == torch.int64
    assert torch.equal(narrow, wide) and torch.equal(pages, same_pages)


def test_places_on_the_meta_device():
    start, pages = place_densely(1, MANY, (3, 5), 8, "meta")
    expected = place_densely(1, MANY, (3, 5), 8)
    assert start.is_meta and pages.is_meta
    assert (start.shape, pages.shape) == tuple(t.shape for t in expected)
    assert start.dtype == expected[0].dtype


def test_chunks_cover_everything_once():
    parts = list(chunks(MANY))
    assert len(parts) == 2 and [i for part in parts for i in range(MANY)[part]] == list(range(MANY))
    assert not list(chunks(0))


def test_levels_are_counted():
    level = mixed_levels(MANY, PAPER)
    before = level.clone()
    expected = [int((level == k).sum()) for k in range(len(PAPER))]
    for given in (level, level.long(), torch.cat([level.int(), torch.tensor([-5, 77])])):
        assert count_levels(given, len(PAPER)).tolist() == expected
    assert torch.equal(level, before)
    highest = torch.tensor([127, -1, 0], dtype=torch.int8)
    assert count_levels(highest, 128).tolist() == [1, *[0] * 126, 1]
    arena = Arena(MANY, PAPER, level=level)
    assert torch.equal(arena.level(), level.long()) and arena.level().dtype == torch.int64
    assert arena.count_rows() == expected
    assert arena.bytes().payload == 4 * sum(c * d for c, d in zip(expected, PAPER, strict=True))


@pytest.mark.parametrize("sizes", [ODD, PAPER], ids=name)
def test_free_lists_of_many_rows(sizes):
    """The free starts of every level, and the free pages, falling."""
    arena = Arena(MANY, sizes, level=mixed_levels(MANY, sizes))
    arena.free((arena.level() >= 0).nonzero()[:, 0][::3])
    stacks = FreeLists(arena.row_start, arena.page_level, arena.sizes, arena.page).stacks()
    used = set(arena.row_start.tolist())
    pages = list(enumerate(arena.page_level[:-1].tolist()))
    for k, dim in enumerate(sizes):
        places = [
            p * arena.page + i * dim
            for p, level in pages
            if level == k
            for i in range(arena.page // dim)
        ]
        assert stacks[k].tolist() == sorted(set(places) - used, reverse=True)
        assert stacks[k].dtype == arena.row_start.dtype
    assert stacks[-1].tolist() == [p for p, level in reversed(pages) if level < 0]
