"""budget=: texts of bytes, what a table takes at its cap, and which rows stay."""

import copy
import pickle
import subprocess
import sys
from collections import Counter
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from esapn_kernels import (
    ResizableEmbedding,
    ResizableEmbeddingBag,
    ResizableEmbeddingCollection,
    optim,
)
from esapn_kernels.averaging import AveragedModel
from esapn_kernels.budget import budget_bytes
from esapn_kernels.ops import layout
from esapn_kernels.reference import demote_reference, promote_reference
from esapn_kernels.share import share_budget
from esapn_kernels.storage import cap, locations
from esapn_kernels.storage import room as room_file
from esapn_kernels.storage.arena import Arena
from esapn_kernels.storage.cap import most_pages, pages_within, table_bytes
from tests.kernels.layouts import DTYPES, HOSTS, NEEDS_NATIVE, ODD, PAPER, SMALL, name

N = 40
BACKENDS = [*HOSTS, "triton"]


@pytest.fixture
def int64_starts(monkeypatch):
    for file in (layout, locations, room_file, cap):
        monkeypatch.setattr(file, "index_dtype", lambda numel: torch.int64)


def allocated(module):
    """Bytes that the allocator holds for what the cap is of."""
    memory = [tensor.untyped_storage() for tensor in (*module.parameters(), *module.buffers())]
    return sum(part.nbytes() for part in memory)


def refusal(call, *args, **options):
    """The one line of a mistake of the user."""
    with pytest.raises(ValueError) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def least(make=ResizableEmbedding, *args, **options):
    """The smallest budget, as the refusal of a smaller one names it."""
    said = refusal(make, *args, budget=1, **options)
    assert said.endswith(" bytes do")
    return int(said.removesuffix(" bytes do").split()[-1])


# ---- texts --------------------------------------------------------------------------------------

UNITS = {
    **{"": 1, "B": 1, "kB": 1000, "MB": 1000**2, "GB": 1000**3, "TB": 1000**4},
    **{"KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "TiB": 1024**4},
}


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("space", ["", " ", "  "])
def test_units(unit, space):
    for text, number in {"64": (64, 1), "1.5": (3, 2), "2.": (2, 1), "1.005": (1005, 1000)}.items():
        expected = number[0] * UNITS[unit] // number[1]
        for spelled in (unit, unit.lower(), unit.upper()):
            assert budget_bytes(f"{space}{text}{space}{spelled}{space}", 0) == expected


def test_shares_are_exact():
    assert budget_bytes("3%", 2000) == 60 and budget_bytes(" .5 % ", 2001) == 10
    assert budget_bytes("250%", 7) == 17 and budget_bytes("100%", 10**18 + 1) == 10**18 + 1
    # In floats 1.1 kB and 4.35 kB, and 29 % and 57 % of 100, may be a byte less.
    assert [budget_bytes(f"{n}%", 100) for n in range(1, 101)] == list(range(1, 101))
    assert budget_bytes("9" * 400, 0) == int("9" * 400)


@pytest.mark.parametrize(
    "budget",
    [
        *(1.5, 64.0, float("nan"), True, False, None, b"64", [64], torch.tensor(3)),
        *("", " ", "MB", "%", "-1", "-3%", "+3", "nan", "inf", "1e3", "64 M", "64 MB s", "3%%"),
        *("1_000", "1,000", "0x10", "6 4", "٣", "1.2.3", ".", "3 % B", "64X"),
    ],
    ids=repr,
)
def test_nonsense(budget):
    said = refusal(budget_bytes, budget, 1000)
    assert "budget must be bytes, a text as '64 MB'" in said


@pytest.mark.parametrize("budget", [0, -1, "0", "0%", "0.0 MB", "0.4 B", "0.01%"])
def test_nothing(budget):
    assert "at least a byte" in refusal(budget_bytes, budget, 1000)


def test_options_that_exclude_each_other():
    said = refusal(ResizableEmbedding, N, sizes=SMALL, budget="3%", max_elements=100)
    assert "budget or max_elements, not both" in said
    with pytest.raises(RuntimeError, match="negative dimension -1"):
        ResizableEmbedding(-1, sizes=SMALL, budget="3%")


# ---- bytes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [0, 1, 5, 1000, 100_000])
@pytest.mark.parametrize("sizes", [SMALL, ODD, PAPER, (127, 130), (2, 512)], ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("starts", [32, 64])
def test_bytes_are_those_of_the_tensors(num_rows, sizes, dtype, starts, request):
    if starts == 64:
        request.getfixturevalue("int64_starts")
    module = ResizableEmbedding(num_rows, sizes=sizes, dtype=dtype, budget="2 GB")
    arena, item = module.arena, dtype.itemsize
    pages = arena.page_level.numel() - 1
    table = num_rows, sizes, arena.page
    assert pages == min(
        most_pages(*table), pages_within(2 * 10**9 - module.chain.nbytes, *table, item)
    )
    assert arena.row_start.dtype == (torch.int64 if starts == 64 else torch.int32)
    assert table_bytes(*table, pages, item) + module.chain.nbytes == allocated(module)
    assert allocated(module) == module.memory_report().serving <= module.budget == 2 * 10**9


@pytest.mark.parametrize("sizes", [SMALL, ODD, PAPER], ids=name)
@pytest.mark.parametrize("num_rows", [1, 40, 1000])
def test_a_large_budget_refuses_nothing(sizes, num_rows):
    """One row remains in every page that ever was begun."""
    module = ResizableEmbedding(num_rows, sizes=sizes, budget="1 GB")
    storage = module.arena.storage.data_ptr()
    for _ in sizes[1:]:
        page = module.arena.row_start[:-1] // module.arena.page
        leave = {p: i for i, p in enumerate(page.tolist())}
        module.promote(torch.tensor(sorted(set(range(num_rows)) - set(leave.values())), dtype=int))
    for down in (False, True, False) * len(sizes):
        (module.demote if down else module.promote)(torch.arange(num_rows))
    assert (module.sizes_of() == sizes[-1]).all() or len(sizes) > 2
    assert module.refused == 0 and module.arena.storage.data_ptr() == storage


def kinds():
    """Tables, by what makes them other than the plain one."""
    initial = torch.tensor([SMALL[i % 3] for i in range(N)])
    yield "ragged", ResizableEmbedding, (N,), {"sizes": SMALL, "initial_size": initial}
    yield "largest", ResizableEmbedding, (N,), {"sizes": SMALL, "initial_size": 8}
    yield "padded", ResizableEmbedding, (N, 8, -1), {"sizes": SMALL}
    yield "weight", ResizableEmbedding, (N, 8), {"sizes": SMALL, "_weight": torch.rand(N, 8)}
    for init in ("tails", "linear"):
        yield init, ResizableEmbedding, (N,), {"sizes": PAPER, "init": init}
    for dtype in DTYPES:
        yield str(dtype), ResizableEmbedding, (N,), {"sizes": ODD, "dtype": dtype}
        yield f"one {dtype}", ResizableEmbedding, (N, 8), {"sizes": (8,), "dtype": dtype}
    yield "bag", ResizableEmbeddingBag, (N,), {"sizes": SMALL}
    yield "one, bag", ResizableEmbeddingBag, (N,), {"sizes": (8,)}
    yield "collection", ResizableEmbeddingCollection, ({"a": 3, "b": N},), {"sizes": SMALL}
    for rows in (0, 1, 100_000):
        yield f"{rows} rows", ResizableEmbedding, (rows,), {"sizes": PAPER}


@pytest.mark.parametrize("kind", list(kinds()), ids=lambda kind: kind[0])
def test_the_smallest_budget(kind):
    """The one that is named does; a byte less does not."""
    _, make, args, options = kind
    found = least(make, *args, **options)
    module = make(*args, budget=found, **options)
    assert allocated(module) == found == module.memory_report().budget
    assert f"{found} bytes do" in refusal(make, *args, budget=found - 1, **options)
    assert allocated(make(*args, **options)) == found


def test_a_refusal_touches_nothing_of_torch():
    state = torch.get_rng_state()
    least(num_embeddings=N, sizes=SMALL)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_share_is_of_the_plain_table():
    for make, args in ((ResizableEmbedding, (1000,)), (ResizableEmbeddingBag, (1000,))):
        module = make(*args, sizes=SMALL, dtype=torch.float16, budget="90%")
        assert module.budget == 1000 * 8 * 2 * 9 // 10
    tables = ResizableEmbeddingCollection({"a": 300, "b": 700}, sizes=SMALL, budget="90%")
    assert tables.rows.budget == 1000 * 8 * 4 * 9 // 10 >= allocated(tables)


def test_what_it_shows():
    module = ResizableEmbedding(1000, sizes=SMALL, budget="90%")
    assert "budget=28800" in repr(module)
    assert "budget=28800" in repr(ResizableEmbeddingBag(1000, sizes=SMALL, budget="90%"))
    report = module.memory_report()
    assert report.budget == 28800 and report.composed == 0
    assert f"serving / budget = {report.serving / 28800:.2%}" in str(report)
    plain = ResizableEmbedding(1000, sizes=SMALL)
    assert (
        plain.memory_report().budget is None and "budget" not in f"{plain}{plain.memory_report()}"
    )


@pytest.mark.parametrize("host", HOSTS)
def test_kept_maps_are_reported(host):
    module = ResizableEmbedding(100, sizes=SMALL, backend=host, budget="200%")
    module(torch.arange(5))
    composed = sum(d + 1 for d in SMALL[:-1]) * SMALL[-1] * 4
    before = module.memory_report()
    assert before.composed == composed + module.chain.nbytes
    module.promote(torch.tensor([3]))
    module.demote(torch.tensor([3]))
    kept = module.memory_report().composed - before.composed
    assert kept == module.chain.nbytes + 4 * SMALL[0] * (SMALL[1] + 1)
    assert module.memory_report().serving == before.serving == allocated(module)
    assert copy.deepcopy(module).memory_report().composed == 0


TOUCHED = """
import resource
from esapn_kernels import ResizableEmbedding

storage = ResizableEmbedding(1 << 15, sizes=(2, 512), budget="100%").arena.storage
page = resource.getpagesize()
first, pages = storage.data_ptr() // page, storage.nbytes // page
with open("/proc/self/pagemap", "rb") as entries:  # 8 bytes a page, the top bit: in memory
    entries.seek(8 * first)
    present = entries.read(8 * pages)[7::8]
assert len(present) == pages and not storage[1 << 16 :].any()
print(storage.nbytes, page * sum(byte >> 7 for byte in present))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="tells which pages are in memory")
def test_memory_is_touched_where_rows_are_written():
    """Of a table a hundred times as large as its rows, in a process that gave no memory back."""
    command = [sys.executable, "-c", TOUCHED]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    reserved, resident = map(int, said.split())
    assert reserved > 60 << 20 and resident < reserved // 4


# ---- which rows stay -----------------------------------------------------------------------------


def simulate(arena, ids, mask, enter, order):
    """Positions that move and the number of rows that stay, from where the rows lie alone.

    Args:
        enter: the level that a row of level ``k`` takes a place of, or None.
        order: of the levels.
    """
    start, levels = arena.row_start.tolist(), arena.page_level.tolist()
    used = Counter(s // arena.page for s in start if s >= 0)
    free, pages = [0] * len(arena.sizes), arena.max_elements // arena.page - len(levels) + 1
    for page, k in enumerate(levels[:-1]):
        if used[page]:
            free[k] += arena.page // arena.sizes[k] - used[page]
        else:
            pages += 1
    if 0 in order:  # no demotion, which alone takes these
        pages = max(pages - arena.kept_pages, 0)
    level = {i: levels[start[i] // arena.page] if start[i] >= 0 else -1 for i in ids}
    named = [i for i, ok in zip(ids, mask, strict=True) if ok and enter(level[i]) is not None]
    going, refused = set(), 0
    for k in order:
        for i in dict.fromkeys(i for i in named if level[i] == k):
            into = enter(k)
            if not free[into] and pages:
                pages -= 1
                free[into] += arena.page // arena.sizes[into]
            if free[into]:
                free[into] -= 1
                going.add(i)
            else:
                refused += 1
    moved = [ok and i in going for i, ok in zip(ids, mask, strict=True)]
    return moved, going, refused


def hops_of(arena, down):
    last = len(arena.sizes) - 1
    if down:
        return lambda k: k - 1 if k > 0 else None, range(last, 0, -1)
    return lambda k: k + 1 if k < last else None, range(last)


class Checked(ResizableEmbedding):
    """Compares every promotion and demotion with the simulation, and rows with the reference."""

    def _hop(self, ids, mask=None, *, down):
        arena = self.arena
        before = [arena.read(i).clone() for i in range(arena.num_rows)]
        levels, chain = arena.level().tolist(), self.chain.detach().clone()
        named = ids.flatten().tolist()
        mask_list = [True] * len(named) if mask is None else mask.flatten().tolist()
        moved, going, stay = simulate(arena, named, mask_list, *hops_of(arena, down))
        refused = self.refused
        found = super()._hop(ids, mask, down=down)
        assert found.flatten().tolist() == moved
        assert self.refused == refused + stay
        for i, row in enumerate(before):
            now = arena.read(i)
            if i not in going:
                assert torch.equal(now, row)
                continue
            make = demote_reference if down else promote_reference
            expected = make(row, levels[i], chain, self.sizes)
            torch.testing.assert_close(now, expected, rtol=1e-6, atol=1e-6)
        return found


class Machine(RuleBasedStateMachine):
    """A budget holds whatever happens to its table."""

    backend = "torch"
    shapes = (SMALL, ODD, (2, 4, 8, 16))
    copies = 0

    @initialize(data=st.data(), sizes=st.sampled_from((SMALL, ODD, (2, 4, 8, 16))))
    def build(self, data, sizes):
        self.options = {
            **{"sizes": sizes if sizes in self.shapes else SMALL, "dtype": torch.float64},
            **{"backend": self.backend, "init": "linear", "init_std": 1.0},
        }
        smallest = least(num_embeddings=N, **self.options)
        largest = allocated(ResizableEmbedding(N, budget="1 GB", **self.options))
        self.budget = data.draw(st.integers(smallest, largest + 50))
        self.emb = self.fresh()
        self.optimizer = None
        self.at = self.emb.arena.storage.data_ptr()

    def fresh(self, **options):
        return Checked(N, **{**self.options, "budget": self.budget, **options})

    def ids(self, data, **options):
        return torch.tensor(
            data.draw(st.lists(st.integers(0, N - 1), **options)), dtype=torch.int64
        )

    @rule(data=st.data(), down=st.booleans(), masked=st.booleans())
    def hop(self, data, down, masked):
        ids = self.ids(data)
        size = len(ids)
        mask = data.draw(st.lists(st.booleans(), min_size=size, max_size=size)) if masked else None
        mask = mask if mask is None else torch.tensor(mask, dtype=torch.bool)
        (self.emb.demote if down else self.emb.promote)(ids, mask)

    @rule(seed=st.integers(0, 9), down=st.booleans())
    def everything(self, seed, down):
        ids = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
        (self.emb.demote if down else self.emb.promote)(ids)

    @rule(data=st.data(), k=st.integers(0, 3))
    def resize(self, data, k):
        ids, size = self.ids(data), self.emb.sizes[min(k, len(self.emb.sizes) - 1)]
        done = self.emb.resize(ids, size)
        assert torch.equal(done, self.emb.sizes_of(ids) == size)

    @rule(pages=st.integers(0, 2))
    def keep(self, pages):
        """Pages for demotion alone, as long as nothing makes the table anew."""
        self.emb.arena.kept_pages = pages

    @rule(rows=st.one_of(st.none(), st.integers(1, 45)))
    def compact(self, rows):
        before, refused = self.rows(), self.emb.refused
        shape = self.emb.arena.storage.shape
        self.emb.compact(rows)
        assert self.emb.arena.storage.shape == shape and self.emb.refused == refused
        self.same_rows(before)

    @rule(rows=st.integers(0, 60))
    def reserve(self, rows):
        """Room for so many rows, or a refusal that changes nothing."""
        before, refused = self.rows(), self.emb.refused
        shape = self.emb.arena.storage.shape
        try:
            self.emb.reserve(rows)
        except RuntimeError as error:
            assert f"the budget of {self.budget} bytes allows" in str(error)
            assert self.emb.arena.storage.shape == shape
            self.same_rows(before)
        else:
            self.note_growth()
            self.emb.promote(torch.arange(min(rows, N)))
        assert self.emb.refused == refused

    @rule(
        through=st.sampled_from(["deepcopy", "pickle", "state_dict", "assign", "meta", "average"])
    )
    def copied(self, through):
        before, refused, emb = self.rows(), self.emb.refused, self.emb
        if through == "deepcopy":
            self.emb = copy.deepcopy(emb)
        elif through == "pickle":
            self.emb = pickle.loads(pickle.dumps(emb))
        elif through == "average":
            self.emb = AveragedModel(self.fresh(), avg_fn=lambda mine, theirs, _: theirs)
            self.emb.update_parameters(emb)
            self.emb = self.emb.module
            before = self.rows() if self.emb.sizes_of().equal(emb.sizes_of()) else None
        else:
            self.emb = self.fresh(device="meta" if through == "meta" else None)
            if through == "meta":
                self.emb.to_empty(device="cpu").reset_parameters()
                assert allocated(self.emb) <= self.budget
            state = copy.deepcopy(emb.state_dict()) if through == "assign" else emb.state_dict()
            self.emb.load_state_dict(state, assign=through == "assign")
        if through in ("deepcopy", "pickle"):
            assert self.emb.refused == refused
        self.same_rows(before)
        self.note_copy()

    @rule(data=st.data(), assign=st.booleans(), rounds=st.integers(0, 3))
    def loaded_from_one_without(self, data, assign, rounds):
        """What it grew to is loaded where the budget holds it, and nothing of it where not."""
        other = ResizableEmbedding(N, **self.options)
        for _ in range(rounds):
            other.promote(self.ids(data, max_size=20))
        before, refused = self.rows(), self.emb.refused
        fits = allocated(other) <= self.budget
        try:
            self.emb.load_state_dict(other.state_dict(), assign=assign)
        except RuntimeError as error:
            assert "budget" in str(error) and not fits
            self.same_rows(before)
        else:
            assert fits
            self.same_rows([other.arena.read(i) for i in range(N)])
            self.note_copy()
        assert self.emb.refused == refused

    @rule(kind=st.sampled_from(["torch", "fused", "deferred"]), data=st.data())
    def train(self, kind, data):
        if self.optimizer is None:
            if kind == "torch":
                self.optimizer = torch.optim.Adam(self.emb.parameters(), lr=1e-3)
            else:
                self.optimizer = optim.Adam(self.emb, lr=1e-3, deferred=kind == "deferred")
        ids = self.ids(data)
        self.emb(ids).pow(2).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @rule()
    def narrower(self):
        other = copy.deepcopy(self.emb)
        other.float()
        assert allocated(other) <= self.budget and other.double() is other

    def rows(self):
        return [self.emb.arena.read(i).clone() for i in range(N)]

    def same_rows(self, rows):
        assert rows is None or all(map(torch.equal, self.rows(), rows))

    def note_copy(self):
        self.optimizer = None
        self.note_growth()

    def note_growth(self):
        self.at = None

    @invariant()
    def within_the_budget(self):
        if not hasattr(self, "emb"):
            return
        arena = self.emb.arena
        assert allocated(self.emb) == self.emb.memory_report().serving <= self.budget
        assert arena.budget == self.budget == self.emb.budget
        if arena.storage.numel() == arena.max_elements:
            # At the cap nothing is ever copied again.
            assert self.at in (None, arena.storage.data_ptr())
            self.at = arena.storage.data_ptr()


class NativeMachine(Machine):
    backend = "native"


class KernelMachine(Machine):
    backend = "triton"
    shapes = (SMALL,)


class DeviceMachine(KernelMachine):
    """As on a GPU, whose counters the host does not read."""

    def __init__(self):
        super().__init__()
        self.patches = [
            mock.patch.object(room_file, "host_reads", return_value=False),
            mock.patch.object(room_file, "resolve_backend", return_value="triton"),
        ]
        for patch in self.patches:
            patch.start()

    def teardown(self):
        for patch in self.patches:
            patch.stop()


quick = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}
TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=25, stateful_step_count=15, **quick)
TestNativeMachine = NEEDS_NATIVE(NativeMachine.TestCase)
TestNativeMachine.settings = settings(max_examples=25, stateful_step_count=15, **quick)
TestKernelMachine = KernelMachine.TestCase
TestKernelMachine.settings = settings(max_examples=5, stateful_step_count=8, **quick)
TestDeviceMachine = DeviceMachine.TestCase
TestDeviceMachine.settings = settings(max_examples=5, stateful_step_count=8, **quick)


# ---- the order in which rows stay, by hand -------------------------------------------------------


def shortage(backend, device="cpu"):
    """Rows of all levels, and one free page only."""
    level = torch.tensor([0, 1, 2] * 8)
    options = {"initial_size": torch.tensor(SMALL)[level], "dtype": torch.float64}
    options |= {"sizes": SMALL, "backend": backend, "init": "linear", "device": device}
    module = Checked(24, budget=least(num_embeddings=24, **options) + 16 * 8 + 1, **options)
    arena = module.arena
    assert arena.page == 16 and arena.max_elements == arena.storage.numel()
    assert arena.page_level[:-1].eq(-1).sum() == 1
    return module


@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_order_in_which_rows_stay(backend, down, device):
    """By level, of a demotion from the last one on; then in the order of ids, each once."""
    module = shortage(backend, device)
    ids = torch.tensor([23, 23, *range(22, -1, -1), 23], device=device)
    call = module.demote if down else module.promote
    moved = call(ids)
    assert 0 < module.refused < 16 and moved[0] == moved[1] == moved[-1]
    refused = module.refused
    call(ids, torch.zeros_like(ids, dtype=torch.bool))
    assert module.refused == refused


@pytest.mark.parametrize("backend", BACKENDS)
def test_demotion_serves_the_last_level_first(backend, device):
    module = shortage(backend, device)
    small = [int(k) for k in module.arena.level().tolist()]
    # Places for rows of 3: 2 in the page begun (8 rows, 5 a page), 5 in the free one; of 2: none.
    down = torch.tensor([i for i in range(24) if small[i] > 0], device=device)
    moved = module.demote(down).tolist()
    gone = [i for i, ok in zip(down.tolist(), moved, strict=True) if ok]
    assert gone == [i for i in range(24) if small[i] == 2][:7]
    assert module.refused == 16 - 7


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_page_that_is_kept_is_for_demotion(backend, device):
    module = shortage(backend, device)
    arena, page = module.arena, module.arena.page_level[:-1]
    arena.kept_pages = 1
    up, down = ((arena.level() == k).nonzero()[:, 0] for k in (1, 2))
    # Rows of 8 fill their pages: without the free one there is no place for one more.
    assert not module.promote(up).any() and module.refused == 8
    assert page.eq(-1).sum() == 1
    # Two places in the page of rows of 3 that was begun, and five in the free one.
    assert module.demote(down[:7]).all() and module.refused == 8
    # Of the pages that these left the last one stays free.
    arena.compact()
    assert page.eq(-1).sum() == 3 and module.promote(up).sum() == 1 + 2 * 2
    arena.kept_pages = 9  # more than there are
    assert not module.promote(up).any()
    arena.kept_pages = 0
    assert module.promote(up).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_begin_without_room(backend, device):
    with mock.patch.object(locations, "page_elements", return_value=16):
        arena = Arena(30, SMALL, level=-1, budget=table_bytes(30, SMALL, 16, 3, 4), device=device)
    given = arena.insert(torch.arange(29, 19, -1, device=device), 2, backend=backend)
    assert given.tolist() == [True] * 6 + [False] * 4 and arena.refusals.total() == 4
    arena.free(torch.tensor([29, 28], device=device), backend=backend)
    given = arena.insert(torch.arange(4, device=device), 2, backend=backend)
    assert given.tolist() == [True] * 2 + [False] * 2 and arena.refusals.total() == 6


def test_a_gpu_gives_empty_pages_back_before_rows_stay(monkeypatch):
    """Though its host reads no counter, and few rows were given back."""
    monkeypatch.setattr(room_file, "host_reads", lambda tensor: False)
    level = torch.tensor([2, 2, *[0] * 8, *[1] * 5])
    options = {"sizes": SMALL, "initial_size": torch.tensor(SMALL)[level], "init": "linear"}
    options |= {"backend": "triton", "dtype": torch.float64}
    module = Checked(15, budget=least(num_embeddings=15, **options) + 16 * 8 + 1, **options)
    assert module.demote(torch.tensor([0, 1])).all()  # the free page is for them, theirs is free
    assert module.promote(torch.tensor([2])).all() and module.refused == 0


# ---- who may exceed it -------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [SMALL, (8,)], ids=name)
def test_wider_numbers(sizes):
    found = least(num_embeddings=100, sizes=sizes)
    module = ResizableEmbedding(100, sizes=sizes, budget=found)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(RuntimeError, match=rf"the budget of {found} bytes.*float64: \d+ bytes do$"):
        module.double()
    assert all(torch.equal(module.state_dict()[k], t) for k, t in before.items())
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert allocated(module.half()) < found and allocated(module.float()) == found
    wide = ResizableEmbedding(100, sizes=sizes, budget="600%").double()
    assert wide.memory_report().serving <= wide.budget
    tables = ResizableEmbeddingCollection({"a": 10, "b": 90}, sizes=sizes, budget=found)
    with pytest.raises(RuntimeError, match="the budget"):
        tables.double()


@pytest.mark.parametrize("what", ["wider", "int64", "slices"])
@pytest.mark.parametrize("sizes", [SMALL, (8,)], ids=name)
def test_tensors_that_hold_more(sizes, what):
    """Assigned they would be kept as they are; copied, they are numbers."""
    if what == "int64" and len(sizes) == 1:
        sizes = ODD
    found = least(num_embeddings=100, sizes=sizes)
    module = ResizableEmbedding(100, sizes=sizes, budget=found)
    state = copy.deepcopy(ResizableEmbedding(100, sizes=sizes).state_dict())
    for key, tensor in state.items():
        if what == "slices":
            state[key] = torch.cat([tensor, tensor])[: len(tensor)]
        elif what == "wider" and tensor.is_floating_point():
            state[key] = tensor.double()
        elif what == "int64" and key.endswith("row_start"):
            state[key] = tensor.long()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(RuntimeError, match=rf"hold \d+ bytes, the budget allows {found}$"):
        module.load_state_dict(dict(state), assign=True)
    assert all(torch.equal(module.state_dict()[k], t) for k, t in before.items())
    module.load_state_dict(state)
    assert allocated(module) == found


def test_a_plain_weight_is_loaded_where_it_fits():
    weight = torch.randn(100, 8)
    module = ResizableEmbedding(100, sizes=SMALL, budget="250%")
    module.load_state_dict({"weight": weight})
    assert torch.equal(module.weight.detach(), weight) and allocated(module) <= module.budget
    small = ResizableEmbedding(100, sizes=SMALL, budget="70%")
    with pytest.raises(RuntimeError, match=f"the budget of {small.budget} bytes allows fewer"):
        small.load_state_dict({"weight": weight})


def test_a_small_table_that_was_loaded_grows_to_the_cap_once():
    module = ResizableEmbedding(1000, sizes=SMALL, budget="200%")
    cap = module.arena.storage.numel()
    module.load_state_dict(ResizableEmbedding(1000, sizes=SMALL).state_dict())
    assert module.arena.storage.numel() < cap and allocated(module) <= module.budget
    for _ in range(2):
        assert module.promote(torch.arange(1000)).all()
        assert module.arena.storage.numel() == cap and allocated(module) <= module.budget
    assert module.refused == 0


def test_a_hook_on_the_node_does_not_hinder_compaction():
    module = ResizableEmbedding(100, sizes=SMALL, budget="200%")
    node = torch.autograd.graph.get_gradient_edge(module.arena.storage).node
    node.register_prehook(lambda grads: None)
    module.promote(torch.arange(100))
    assert module.compact() >= 0 and module.arena.storage.numel() == module.arena.max_elements


def test_modules_that_were_pickled_before_budgets():
    module = ResizableEmbedding(100, sizes=SMALL)
    old = copy.deepcopy(module)
    for part, key in ((old, "budget"), (old.arena, "budget"), (old.arena, "refusals")):
        part.__dict__.pop(key, None)
    old = pickle.loads(pickle.dumps(old))
    assert old.budget is None and old.refused == 0 and "budget" not in repr(old)
    assert old.promote(torch.arange(100)).all() and old.memory_report().budget is None
    assert copy.deepcopy(old).compact() >= 0


@pytest.mark.parametrize("make", [ResizableEmbeddingBag, ResizableEmbedding])
def test_modules_made_of_others(make):
    plain = (torch.nn.EmbeddingBag if make is ResizableEmbeddingBag else torch.nn.Embedding)(50, 8)
    module = make.from_embedding(plain, sizes=SMALL, budget="300%")
    assert module.budget == 3 * plain.weight.nbytes >= allocated(module)
    assert make.from_embedding(plain, budget="100%").refused == 0
    assert "bytes do" in refusal(make.from_embedding, plain, budget="99%")


def test_tables_that_share_a_budget_are_capped_together_or_not_at_all():
    tables = {name: ResizableEmbedding(900, sizes=(2, 4)) for name in "ab"}
    tables["b"].share_memory()
    for budget in ("90%", 10**6):
        with pytest.raises(RuntimeError, match="shared memory"):
            share_budget(tables, budget)
        assert tables["a"].budget is None and tables["a"].arena.budget is None


def test_a_large_budget_that_is_shared_refuses_nothing():
    table = ResizableEmbedding(900, sizes=(1, 2, 4))
    share_budget({"a": table, "b": ResizableEmbedding(50, 4)}, "1 MB")
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for part in torch.randperm(900, generator=generator).split(18):
            assert table.promote(part).all()
    assert table.refused == 0


def test_shares_of_tables_without_rows_under_two_names_and_of_any_budget():
    table = ResizableEmbedding(1000, sizes=(2, 4, 8))
    tables = {"a": table, "none": ResizableEmbedding(0, 4), "again": table}
    tables["nothing"] = ResizableEmbedding(0, sizes=(4,))
    least = table.least_budget + tables["none"].least_budget
    with pytest.raises(ValueError, match=f": {least} bytes do$"):
        share_budget(tables, least - 1)
    share_budget(tables, least)
    assert table.budget == table.least_budget and tables["nothing"].budget is None
    share_budget(tables, 10**400)
    assert table.promote(torch.arange(1000)).all()
