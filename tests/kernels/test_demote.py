"""Rows one level down: the nearest output by a dense solve, places, state, and who else follows."""

import copy
import itertools
import pickle
import random

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import precondition, rule
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from esapn_kernels import (
    ResizableEmbedding,
    ResizableEmbeddingBag,
    ResizableEmbeddingCollection,
    optim,
)
from esapn_kernels.averaging import match_rows
from esapn_kernels.cpu.resize import carry_rows
from esapn_kernels.ops import fit
from esapn_kernels.ops.chain import chain_numel, expand_tails, tails_numel
from esapn_kernels.ops.fit import DownHops, down_hops
from esapn_kernels.reference import demote_reference, lookup_reference, split_chain
from esapn_kernels.storage import locations
from esapn_kernels.storage.arena import Arena
from esapn_kernels.testing import assert_matches, make_case, row_elements
from tests.kernels.layouts import DTYPES, HOSTS, NEEDS_NATIVE, ODD, PAPER, SMALL, TINY, name
from tests.kernels.test_arena import History, check_accounts, check_bytes
from tests.kernels.test_resize import Free, fill, small_steps  # noqa: F401

INITS = ["padded", "isometric", "linear", "tails"]
QUARTERS = (2, 8, 32)
"""Sizes whose ``g`` is 2."""


def rows_of(module):
    return [module.arena.read(i) for i in range(module.arena.num_rows)]


def outputs(module):
    """By the definition, in fp64."""
    arena = module.arena
    operands = arena.storage.detach().double(), module.chain.detach().double()
    return lookup_reference(torch.arange(arena.num_rows), *operands, *arena.layout.flat)


def state_of(optimizer, module, index, key):
    start, size = int(module.arena.row_start[index]), int(module.sizes_of()[index])
    return optimizer.state[module.arena.storage][key][start : start + size].clone()


# ---- the numbers --------------------------------------------------------------------------------

SOLVED = [
    *itertools.product([PAPER, ODD, SMALL, (127, 130)], DTYPES, INITS, ["torch", "native"]),
    *itertools.product([SMALL], [torch.float32, torch.bfloat16], ["linear", "tails"], ["triton"]),
    (TINY, torch.float64, "linear", "triton"),
]


@pytest.mark.parametrize("sizes, dtype, init, backend", SOLVED, indirect=["backend"], ids=name)
def test_the_nearest_output(sizes, dtype, init, backend, device, nan_empty):
    module = make_case(sizes, 14, 0, dtype, device, backend=backend, init=init).module
    levels, rows, chain = module.arena.level().tolist(), rows_of(module), module.chain.detach()
    moved = module.demote(torch.arange(14, device=device))
    assert moved.tolist() == [k > 0 for k in levels] and moved.any() and not moved.all()
    assert module.arena.level().tolist() == [max(k - 1, 0) for k in levels]
    for i, k in enumerate(levels):
        found = module.arena.read(i)
        if not k:
            assert torch.equal(found, rows[i])
            continue
        expected = demote_reference(rows[i].double(), k, chain.double(), sizes)
        if dtype == torch.float64:  # two solves differ by their condition
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
        else:
            eager = demote_reference(rows[i], k, chain, sizes)
            assert_matches(found, expected, eager, name=f"row {i}")


@pytest.mark.parametrize("init", INITS)
def test_several_demotions_are_as_near_as_one_solve(init):
    module = make_case(SMALL, 6, 0, torch.float64, init=init, mix=(0, 0, 1)).module
    wanted, ids = outputs(module), torch.arange(6)
    assert module.demote(ids).all() and module.demote(ids).all()
    found = outputs(module)
    # At a minimum nothing of the rest lies in the columns of the map.
    weights = [weight for weight, _ in split_chain(module.chain.detach(), SMALL)]
    rest = (wanted - found) @ (weights[1] @ weights[0])
    torch.testing.assert_close(rest, torch.zeros(6, 2, dtype=torch.float64), atol=1e-12, rtol=0)
    assert (wanted - found).abs().max() > 0.1


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("init", INITS)
def test_demotion_undoes_promotion(init, dtype, backend, device):
    module = make_case(SMALL, 9, 0, dtype, device, backend=backend, init=init).module
    ids = (module.arena.level() < 2).nonzero()[:, 0]
    rows, sizes = rows_of(module), module.sizes_of()
    assert module.promote(ids).all() and module.demote(ids).all()
    assert torch.equal(module.sizes_of(), sizes)
    for before, after in zip(rows, rows_of(module), strict=True):
        eps = 40 * torch.finfo(dtype).eps
        torch.testing.assert_close(after, before, rtol=eps, atol=eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("init", ["padded", "tails"])
@pytest.mark.parametrize("host", HOSTS)
def test_a_row_that_was_padded_comes_back_to_the_bit(host, init, dtype):
    """Where ``g`` is a power of two: otherwise the promotion itself has rounded."""
    module = ResizableEmbedding(30, sizes=QUARTERS, init=init, dtype=dtype, backend=host)
    ids, rows = torch.arange(30), rows_of(module)
    for call in (module.promote, module.promote, module.demote, module.demote):
        assert call(ids).all()
    assert all(map(torch.equal, rows_of(module), rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name)
@pytest.mark.parametrize("init", ["padded", "tails"])
@pytest.mark.parametrize("host", HOSTS)
def test_padding_hops_truncate(host, init, dtype):
    """Whatever the appended numbers are: the others over ``g``, and exact zeros in between."""
    options = {"dtype": dtype, "backend": host, "initial_size": 8}
    module = ResizableEmbedding(30, sizes=SMALL, init=init, **options)
    module.arena.storage.data[::3] *= 1e6
    rows, gain = rows_of(module), split_chain(module.chain.detach(), SMALL)[1][0][0, 0]
    assert module.demote(torch.arange(30)).all()
    for before, after in zip(rows, rows_of(module), strict=True):
        assert torch.equal(after, before[:3] * (1 / gain.double()).to(dtype))


@pytest.mark.parametrize("sizes", [(1,), (1, 2), SMALL, ODD], ids=name)
def test_down_hops_are_packed_from_the_last_level_on(sizes):
    chain = torch.randn(chain_numel(sizes))
    assert down_hops(chain, sizes).shape == (chain_numel(sizes[::-1]),)
    assert down_hops(chain.bfloat16(), sizes).dtype == torch.float32


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e-20, 1e20])
def test_hops_without_full_rank(scale):
    """Maps that let little or nothing through: a finite row, and still the nearest output."""
    weight = scale * torch.tensor([[1.0, 2.0], [2.0, 4.0], [-1.0, -2.0]]).double()
    chain = torch.cat([weight.t().reshape(-1), torch.tensor([1.0, 0.0, 3.0]).double()])
    row = torch.tensor([3.0, -1.0, 2.0]).double()
    down = down_hops(chain, (2, 3)).view(4, 2)
    found = row @ down[:-1] + down[-1]
    nearest = demote_reference(row, 1, chain, (2, 3))
    assert found.isfinite().all()
    torch.testing.assert_close(weight @ found, weight @ nearest, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name)
@pytest.mark.parametrize("small", [1e-3, 1e-5])
def test_16_bit_hops_that_are_nearly_without_full_rank(small, dtype):
    """The row of the exact solve is so long that its rounding, or overflow, is the output."""
    module = ResizableEmbedding(100, sizes=(2, 3), initial_size=3, dtype=dtype)
    with torch.no_grad():
        module.chain.copy_(torch.tensor([1, 1, 0, 1, 1, small, 0, 0, 0]))
    wanted, ids = outputs(module), torch.arange(100)
    assert module.demote(ids).all()
    rest = (outputs(module) - wanted).norm(dim=1)
    assert (rest <= wanted.norm(dim=1) * (1 + 4 * torch.finfo(dtype).eps)).all()


def test_the_host_reads_nothing_of_the_hops():
    """A tensor without numbers raises where they are asked for."""
    with FakeTensorMode():
        down = down_hops(torch.empty(chain_numel(PAPER)), PAPER)
        with pytest.raises(DataDependentOutputException):
            bool(down.any())
    assert down.shape == (chain_numel(PAPER[::-1]),)


def test_tails_are_their_whole_hops():
    tails = torch.randn(tails_numel(SMALL)).double()
    assert torch.equal(down_hops(tails, SMALL), down_hops(expand_tails(tails, SMALL), SMALL))


@pytest.fixture
def solves(monkeypatch):
    """The sizes of the maps that are solved for from now on."""
    found, solved = [], fit._solved

    def counted(rows, *args):
        found.append(len(rows))
        return solved(rows, *args)

    monkeypatch.setattr(fit, "_solved", counted)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("init", ["linear", "tails"])
def test_maps_solved_one_by_one_have_the_same_bits(init, dtype, solves):
    chain = make_case(PAPER, 3, 0, dtype, init=init).module.chain.detach()
    wanted = down_hops(chain, PAPER)
    assert solves == list(PAPER[:-1])
    down, shapes = (
        DownHops(),
        [(a + 1) * b for a, b in zip(PAPER[:0:-1], PAPER[-2::-1], strict=True)],
    )
    solves.clear()
    for levels in ([2], [0, 2, 4]):
        found = down(chain, PAPER, levels).split(shapes)
        for k, part, whole in zip(range(4, -1, -1), found, wanted.split(shapes), strict=True):
            assert torch.equal(part, whole if k in levels else torch.zeros_like(part))
    assert down(chain, PAPER, [1, 3]).equal(wanted) and solves == [8, 2, 64, 4, 16]


@pytest.mark.parametrize("host", HOSTS)
def test_maps_are_solved_for_where_rows_need_them(host, solves):
    """Again after the hops were written to, by whatever way; a copy solves for itself."""
    module = make_case(SMALL, 12, 0, backend=host, mix=(0, 0, 1)).module

    def demote(ids, module=module):
        rows, levels, chain = rows_of(module), module.arena.level(), module.chain.detach()
        assert module.demote(torch.tensor(ids)).all()
        for i in ids:
            expected = demote_reference(rows[i].double(), int(levels[i]), chain.double(), SMALL)
            torch.testing.assert_close(module.arena.read(i), expected.float())
        said = list(solves)
        solves.clear()
        return said

    assert not module.demote(torch.tensor([], dtype=torch.int64)).any() and not solves
    assert demote([0, 1]) == [3] and demote([2, 3]) == []
    assert demote([0, 4]) == [2] and demote([1, 5]) == []
    twin = copy.deepcopy(module)
    module.chain.data.mul_(0.9)  # no version counter says so
    assert demote([6, 2]) == [2, 3] and demote([3, 7]) == []
    assert demote([6], twin) == [3]
    module.load_state_dict(twin.state_dict())
    assert demote([8]) == [3] and demote([9]) == []
    pickled = pickle.loads(pickle.dumps(module))
    assert demote([10], pickled) == [3]


def test_the_torch_path_writes_new_rows_only(nan_empty):
    case = make_case(SMALL, 12, 0)
    arena = case.module.arena
    level, old = arena.level(), arena.row_start[:-1].long()
    new = torch.where(level > 0, arena.storage.numel() + torch.arange(12) * 8, -1)
    storage = torch.cat([arena.storage.detach(), torch.full((100,), float("nan"))])
    before, down = storage.clone(), down_hops(case.module.chain, SMALL)
    carry_rows(storage, down, old, new, level, SMALL, -1)
    written = torch.zeros_like(storage, dtype=torch.bool)
    for start, k in zip(new.tolist(), level.tolist(), strict=True):
        if k:
            written[start : start + SMALL[k - 1]] = True
    assert storage[written].isfinite().all()
    kept = torch.isnan(before) | (storage == before)
    assert written.any() and kept[~written].all() and storage[~written].isnan().any()


# ---- which rows ---------------------------------------------------------------------------------


def test_duplicates_masks_and_small_rows(backend, device):
    module = make_case(SMALL, 9, 0, device=device, backend=backend).module
    before, values = module.sizes_of().tolist(), rows_of(module)
    ids = torch.tensor([[0, 1, 2, 0], [3, 4, 4, 4]], dtype=torch.int32, device=device)
    mask = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1]], device=device).bool()
    moved = module.demote(ids, mask)
    chosen = {0, 2, 4}
    assert moved.shape == ids.shape and len({before[i] for i in chosen}) > 1
    for i, admitted, said in zip(*(t.view(-1).tolist() for t in (ids, mask, moved)), strict=True):
        assert said == (admitted and before[i] > 2)
    for i, size in enumerate(before):
        shrunk = i in chosen and size > 2
        assert int(module.sizes_of()[i]) == ({8: 3, 3: 2}[size] if shrunk else size)
        assert shrunk or torch.equal(module.arena.read(i), values[i])


@pytest.mark.parametrize("mask", [None, False], ids=["empty", "all-false"])
def test_nothing_to_do(mask, backend, device):
    module = make_case(SMALL, 9, 0, device=device, backend=backend).module
    ids = torch.arange(0 if mask is None else 9, device=device)
    chosen = None if mask is None else torch.zeros(9, dtype=torch.bool, device=device)
    module.reserve(9)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    moved = module.demote(ids, chosen)
    assert moved.dtype == torch.bool and moved.shape == ids.shape and not moved.any()
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("host", HOSTS)
def test_bad_arguments_change_nothing(host):
    module = make_case(SMALL, 9, 0, backend=host).module
    before = copy.deepcopy(module.state_dict())
    ids = torch.arange(3)
    for error, call in (
        (IndexError, lambda: module.demote(torch.tensor([1, 9]))),
        (IndexError, lambda: module.demote(torch.tensor([-1]))),
        (RuntimeError, lambda: module.demote(ids.float())),
        (ValueError, lambda: module.demote(ids, torch.ones(2).bool())),
        (ValueError, lambda: module.demote(ids, ids)),
        (ValueError, lambda: module.resize(ids, 4)),
        (ValueError, lambda: module.arena.demote(ids, module.chain, backend="cuda")),
    ):
        with pytest.raises(error):
            call()
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_kernels_pass_over_ids_out_of_range(device):
    module = make_case(SMALL, 6, 0, device=device, mix=(0, 0, 1)).module
    ids = torch.tensor([-1, 6, 0, 5, 7], device=device)
    moved = module.arena.demote(ids, module.chain, backend="triton")
    assert moved.tolist() == [False, False, True, True, False]
    assert module.sizes_of().tolist() == [3, 8, 8, 8, 8, 3]
    check_accounts(module.arena)


@pytest.mark.parametrize("kind", [ResizableEmbedding, ResizableEmbeddingBag])
def test_the_padding_row_stays(kind, backend, device):
    module = kind(6, sizes=SMALL, padding_idx=-2, initial_size=8, backend=backend, device=device)
    ids = torch.arange(6, device=device)
    others = [True] * 4 + [False, True]
    assert module.demote(ids).tolist() == others
    assert module.demote(ids, ids > 2).tolist() == [False] * 3 + [True, False, True]
    assert module.resize(ids, 2).tolist() == others
    assert module.sizes_of().tolist() == [2, 2, 2, 2, 8, 2]


def test_a_padding_row_that_is_set_later():
    module = ResizableEmbedding(6, sizes=SMALL, initial_size=8)
    module.padding_idx = -2  # counts from the end, as for lookups
    assert module.demote(torch.arange(6)).tolist() == [True] * 4 + [False, True]


def test_rows_that_stand_in():
    module = ResizableEmbedding(6, sizes=SMALL, initial_size=8, on_bad_ids=-1)
    assert module.demote(torch.tensor([77, 0, -3])).all()
    assert module.sizes_of().tolist() == [3, 8, 8, 8, 8, 3]


def test_rows_of_one_size_stay():
    module = ResizableEmbedding(6, 4)
    assert module.demote(torch.arange(6)).tolist() == [False] * 6
    assert module.resize(torch.arange(6), 4).all()


def test_resize_up_and_down(backend, device):
    module = make_case(SMALL, 9, 0, device=device, backend=backend).module
    ids = torch.tensor([[8, 0, 3], [1, 1, 7]], device=device)
    for size in (3, 8, 2, 2, 3):
        assert module.resize(ids, size).all()
        assert module.sizes_of(ids).unique().tolist() == [size]
        check_accounts(module.arena)


def test_a_written_storage_is_stale_for_autograd(backend, device):
    case = make_case(SMALL, 9, 5, device=device, backend=backend)
    out = case.module(case.ids)
    assert case.module.demote(case.ids).any()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_two_runs_agree_in_every_bit(backend, device):
    states = []
    for _ in range(2):
        module = make_case(SMALL, 40, 0, device=device, backend=backend).module
        ids = torch.tensor([3, 30, 3, 12, 25, 39, 7, 8, 9], device=device)
        module.demote(ids)
        module.promote(ids[:5])
        module.demote(ids[2:])
        states.append(module.state_dict())
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


CONTEXTS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode,
    "no-grad": torch.no_grad,
    "another-device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS.keys())
def test_where_it_is_called_is_of_no_consequence(context, host):
    one, two = (make_case(SMALL, 9, 0, backend=host).module for _ in range(2))
    ids = torch.arange(9)
    with context():
        assert one.demote(ids).any()
    two.demote(ids)
    for key, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[key]), key
    one(ids).sum().backward()
    assert one.arena.storage.grad.any()


# ---- places -------------------------------------------------------------------------------------


class Falling(Free):
    def demote(self, ids, mask):
        """Ids that move: by level from the last, then in the order of their first positions."""
        level = self.arena.level().tolist()
        first = dict.fromkeys(
            i for i, m in zip(ids, mask, strict=True) if m and 0 <= i < len(level)
        )
        moved = set()
        for k in range(len(self.arena.sizes) - 1, 0, -1):
            given = 0
            for i in first:
                if level[i] != k or self.rows[k] + given >= self.room[k]:
                    continue
                if not self.take(k - 1):
                    break
                moved.add(i)
                given += 1
            self.rows[k] += given
        return moved


@pytest.mark.usefixtures("small_steps", "nan_empty")
@pytest.mark.parametrize("spare_pages, room", [(0, True), (0, False), (1, True), (3, False)])
def test_rows_that_fit_move_and_the_others_stay(spare_pages, room, device, monkeypatch):
    n_rows, n_ids = 150, 150
    generator = torch.Generator().manual_seed(1)
    level = torch.randint(-1, 4, (n_rows,), generator=generator)
    monkeypatch.setattr(locations, "page_elements", lambda *_: 128)
    arena = Arena(n_rows, ODD, level=level, dtype=torch.float64, device=device)
    arena._grow(spare_pages, at_once=True)
    monkeypatch.setattr(Arena, "_make_room", lambda arena, rows, **_: None)
    if room:
        arena._grow_stacks([1000] * 4)
    fill(arena, generator)
    chain = torch.randn(chain_numel(ODD), generator=generator, dtype=torch.float64).to(device)
    stayed = 0
    for _ in range(2):
        levels = arena.level().tolist()
        rows = [arena.read(i) if k >= 0 else None for i, k in enumerate(levels)]
        ids = torch.randint(-20, n_rows + 20, (n_ids,), generator=generator).to(device)
        mask = (torch.rand(n_ids, generator=generator) < 0.7).to(device)
        expected = Falling(arena).demote(ids.tolist(), mask.tolist())
        moved = arena.demote(ids, chain, mask, backend="triton")
        check_accounts(arena)
        admitted = list(zip(ids.tolist(), mask.tolist(), strict=True))
        assert moved.tolist() == [m and i in expected for i, m in admitted]
        for i, k in enumerate(arena.level().tolist()):
            assert k == levels[i] - (i in expected)
            if i in expected:
                row = demote_reference(rows[i], levels[i], chain, ODD)
                torch.testing.assert_close(arena.read(i), row, rtol=1e-10, atol=1e-10)
            else:
                assert k < 0 or torch.equal(arena.read(i), rows[i])
        wanted = {i for i, m in admitted if m and 0 <= i < n_rows and levels[i] > 0}
        stayed += len(wanted - expected)
    assert stayed


@pytest.mark.parametrize("host", HOSTS)
def test_small_rows_take_the_bytes_of_a_table_that_began_small(host):
    module = ResizableEmbedding(3000, sizes=SMALL, initial_size=8, backend=host)
    small = ResizableEmbedding(3000, sizes=SMALL, backend=host)
    assert module.resize(torch.arange(3000), 2).all()
    module.compact()
    assert module.memory_report().payload == small.memory_report().payload
    assert module.arena.storage.shape == small.arena.storage.shape
    check_accounts(module.arena)
    check_bytes(module.arena)


@pytest.mark.parametrize("host", HOSTS)
def test_demotion_gives_room_and_needs_some(host, monkeypatch):
    monkeypatch.setattr(locations, "page_elements", lambda *_: 8)
    options = {"sizes": (2, 8), "backend": host, "max_elements": 48}
    level = torch.tensor([8, 8, 8, 8, 2, 2, 2, 2])
    module = ResizableEmbedding(8, initial_size=level, **options)  # five of six pages
    assert module.promote(torch.tensor([4])).all()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(RuntimeError, match="the arena is full"):
        module.promote(torch.tensor([5]))
    with pytest.raises(RuntimeError, match="the arena is full"):
        module.demote(torch.tensor([0, 1]))  # one place at the small size, and two rows
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert module.demote(torch.tensor([0])).all()
    assert module.promote(torch.tensor([5])).all()
    assert module.sizes_of().tolist() == [2, 8, 8, 8, 8, 8, 2, 2]
    assert module.arena.storage.numel() == 48
    check_accounts(module.arena)


class Both(History):
    """Every operation on an arena beside a dict of its rows, with rows that go down as well."""

    dtypes = DTYPES

    @rule(data=st.data(), masked=st.booleans())
    @precondition(lambda self: self.rows)
    def demote(self, data, masked):
        ids = self.some(data, sorted(self.rows), unique=False)
        n = len(ids)
        mask = data.draw(st.lists(st.booleans(), min_size=n, max_size=n)) if masked else [True] * n
        moved = self.arena.demote(self.ids(ids), self.hops(), self.ids(mask), backend=self.backend)
        first = self.sizes[0]
        expected = [ok and len(self.rows[i]) > first for i, ok in zip(ids, mask, strict=True)]
        assert moved.tolist() == expected
        for i in set(itertools.compress(ids, expected)):
            level = self.sizes.index(len(self.rows[i]))
            found = self.arena.read(i).cpu()
            assert len(found) == self.sizes[level - 1] and found.isfinite().all()
            if self.dtype == torch.float64:
                row = demote_reference(self.rows[i], level, self.chain, self.sizes)
                # Two solves differ by their condition, and by the size of what was solved for.
                scale = float(self.rows[i].abs().max()) + float(row.abs().max()) + 1
                torch.testing.assert_close(found, row, rtol=1e-8, atol=1e-8 * scale)
            self.resized(i, found)

    @rule()
    @precondition(lambda self: self.rows)
    def demote_everything(self):
        ids = sorted(self.rows)
        self.arena.demote(self.ids(ids), self.hops(), backend=self.backend)
        for i in ids:
            level = self.sizes.index(len(self.rows[i]))
            if level:
                self.resized(i, self.arena.read(i).cpu())
                assert len(self.rows[i]) == self.sizes[level - 1]


class BothOnEither(Both):
    """The backends of CPUs take turns."""

    def __init__(self):
        super().__init__()
        self.turns = random.Random(0)

    @property
    def backend(self):
        return self.turns.choice(["native", "torch"])


class BothByKernels(Both):
    backend = "triton"


@pytest.fixture(autouse=True)
def kernels_on(device, monkeypatch):
    monkeypatch.setattr(BothByKernels, "device", device)


quick = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}
TestBoth = Both.TestCase
TestBoth.settings = settings(max_examples=24, stateful_step_count=15, **quick)
TestBothOnEither = NEEDS_NATIVE(BothOnEither.TestCase)
TestBothOnEither.settings = settings(max_examples=24, stateful_step_count=15, **quick)
TestBothByKernels = BothByKernels.TestCase
TestBothByKernels.settings = settings(max_examples=4, stateful_step_count=8, **quick)


# ---- what goes with rows ------------------------------------------------------------------------

OPTIMIZERS = {
    "Adam": lambda m, **o: optim.Adam(m, lr=0.1, **o),
    "Adagrad": lambda m, **o: optim.Adagrad(m, lr=0.1, initial_accumulator_value=0.25, **o),
}


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_fused_optimizers(kind, deferred, backend, device):
    module = make_case(SMALL, 9, 0, device=device, backend=backend).module
    optimizer = OPTIMIZERS[kind](module, deferred=deferred)
    ids, gone = torch.arange(9, device=device), torch.tensor([0, 4, 8], device=device)

    def step():
        module(ids).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    keys = list(optimizer.state_per_element)
    before = {(i, key): state_of(optimizer, module, i, key) for i in range(9) for key in keys}
    moved = module.demote(gone)
    shrunk = gone[moved].tolist()
    assert shrunk and keys
    for (i, key), old in before.items():
        new = state_of(optimizer, module, i, key)
        fresh = optimizer.state_per_element[key]
        assert torch.equal(new, torch.full_like(new, fresh) if i in shrunk else old)
    rows = rows_of(module)
    step()
    for old, new in zip(rows, rows_of(module), strict=True):
        assert new.isfinite().all() and not torch.equal(old, new)


def test_pending_gradients_of_demoted_rows_are_dropped(backend, device):
    module = make_case(SMALL, 9, 0, device=device, backend=backend, mix=(0, 0, 1)).module
    optimizer = optim.SGD(module, lr=0.1, deferred=True)
    module(torch.arange(6, device=device)).square().sum().backward()
    assert module.demote(torch.tensor([1, 2], device=device)).all()
    rows = rows_of(module)
    optimizer.step()
    same = [torch.equal(a, b) for a, b in zip(rows, rows_of(module), strict=True)]
    assert same == [False, True, True, False, False, False, True, True, True]


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.Adagrad])
def test_torchs_optimizers(make):
    module = make_case(SMALL, 9, 0).module
    optimizer = make(module.parameters(), lr=0.1)
    module(torch.arange(9)).square().sum().backward()
    optimizer.step()
    keys = [k for k, v in optimizer.state[module.arena.storage].items() if v.dim()]
    before = {(i, k): state_of(optimizer, module, i, k) for i in range(9) for k in keys}
    ids = torch.arange(5)
    shrunk = ids[module.demote(ids)].tolist()
    assert shrunk and keys
    for (i, key), old in before.items():
        new = state_of(optimizer, module, i, key)
        assert torch.equal(new, torch.zeros_like(new) if i in shrunk else old)
    assert not module.arena.storage.grad[row_elements(module, torch.tensor(shrunk))].any()
    optimizer.step()
    assert all(row.isfinite().all() for row in rows_of(module))


def test_a_loaded_row_that_comes_back_to_its_size_starts_afresh():
    """Before the first step of a loaded optimizer, which shows its state."""
    ids = torch.arange(6)
    modules = [ResizableEmbedding(6, sizes=SMALL, initial_size=3) for _ in range(2)]
    optimizers = [torch.optim.Adam(module.parameters(), lr=0.1) for module in modules]
    modules[0](ids).square().sum().backward()
    optimizers[0].step()
    for own, saved in (modules, optimizers):
        saved.load_state_dict(copy.deepcopy(own.state_dict()))
    for module, optimizer in zip(modules, optimizers, strict=True):
        module.promote(ids[:2])
        module.demote(torch.tensor([1, 1, 4]), torch.tensor([True, False, True]))
        module.promote(ids[4:5])
        module.arena.free(ids[5:])
        module.arena.insert(ids[5:], 1)
        optimizer.zero_grad()
        module(ids).square().sum().backward()
        optimizer.step()
    for index in range(6):
        expected, found = (
            state_of(optimizer, module, index, "exp_avg_sq")
            for module, optimizer in zip(modules, optimizers, strict=True)
        )
        assert torch.equal(found, expected), index


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("init", ["padded", "tails"])
@pytest.mark.parametrize("beginning", [0.0, 0.5])
def test_sums_go_along_where_hops_keep_numbers(init, beginning, host):
    """``s_j = g^2 s'_j``: what a promotion scaled comes back."""
    module = ResizableEmbedding(12, sizes=SMALL, init=init, initial_size=3, backend=host)
    module.chain.requires_grad_(init == "tails")
    optimizer = optim.Adagrad(module, lr=0.1, initial_accumulator_value=beginning)
    (module(torch.arange(12)) * torch.randn(12, 8)).sum().backward()
    before = [state_of(optimizer, module, i, "sum") for i in range(12)]
    ids = torch.tensor([7, 2, 7, 11])
    assert module.promote(ids).all() and module.demote(ids).all()
    for i, old in enumerate(before):
        torch.testing.assert_close(state_of(optimizer, module, i, "sum"), old)
    assert module.demote(ids, torch.tensor([1, 1, 0, 0]).bool()).sum() == 2
    for i, old in enumerate(before):
        expected = old[:2] * 1.5 if i in (2, 7) else old
        torch.testing.assert_close(state_of(optimizer, module, i, "sum"), expected)


def test_sums_start_afresh_under_other_hops():
    module = ResizableEmbedding(3, sizes=(2, 4), initial_size=4)
    optimizer = optim.Adagrad(module, lr=0.1)
    module(torch.arange(3)).sum().backward()
    module.demote(torch.tensor([1]))
    assert not state_of(optimizer, module, 1, "sum").any()
    assert state_of(optimizer, module, 2, "sum").all()


def test_averages_take_the_models_shorter_rows():
    module = make_case(SMALL, 9, 0, mix=(0, 0, 1)).module
    average = copy.deepcopy(module).requires_grad_(False)
    average.arena.storage.data.mul_(3.0)
    long = rows_of(average)
    assert module.demote(torch.arange(4)).all()
    match_rows(average, module)
    assert torch.equal(average.sizes_of(), module.sizes_of())
    for i, row in enumerate(rows_of(average)):
        assert torch.equal(row, module.arena.read(i) if i < 4 else long[i])


def test_a_bag():
    bag = ResizableEmbeddingBag(9, sizes=SMALL, initial_size=8, init="padded", mode="sum")
    ids = torch.tensor([[1, 2], [2, 5]])
    before = bag(ids)
    assert bag.demote(ids[:1]).all() and bag.sizes_of(ids).tolist() == [[3, 3], [3, 8]]
    # What the small size holds stays, the rest is zero.
    torch.testing.assert_close(bag(ids)[:, :3], before[:, :3])
    assert not bag(ids)[0, 3:].any() and bag(ids)[1, 3:].all()


def test_a_collection():
    tables = ResizableEmbeddingCollection({"a": 5, "b": 4}, sizes=SMALL, initial_size=8)
    ids = {"a": torch.tensor([0, 4]), "b": torch.tensor([[3], [0]])}
    moved = tables.demote(ids, {"a": torch.tensor([True, False])})
    assert {k: v.tolist() for k, v in moved.items()} == {
        "a": [True, False],
        "b": [[True], [True]],
    }
    sizes = {k: v.tolist() for k, v in tables.sizes_of().items()}
    assert sizes == {"a": [3, 8, 8, 8, 8], "b": [3, 8, 8, 3]}
    assert tables.demote({"a": torch.tensor([0])})["a"].all()
    assert all(v.all() for v in tables.resize(ids, 3).values())
    with pytest.raises(KeyError, match="without ids"):
        tables.demote({"a": ids["a"]}, {"b": torch.ones(2, 1).bool()})


def test_a_state_dict_of_shrunk_rows(backend, device):
    module = make_case(SMALL, 20, 0, device=device, backend=backend, mix=(0, 0, 1)).module
    ids = torch.arange(20, device=device)
    module.demote(ids, ids > 4)
    module.demote(ids, ids > 9)
    other = ResizableEmbedding(20, sizes=SMALL, backend=backend, device=device)
    other.load_state_dict(module.state_dict())
    assert other.sizes_of().tolist() == [8] * 5 + [3] * 5 + [2] * 10
    assert torch.equal(other(ids), module(ids))
    assert torch.equal(other.demote(ids), module.demote(ids))
    assert all(map(torch.equal, rows_of(other), rows_of(module)))
