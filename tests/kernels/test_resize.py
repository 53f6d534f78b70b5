"""resize.py: a promotion does not change the output, and touches nothing else."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from esapn_kernels import ResizableEmbedding
from esapn_kernels.cpu.resize import carry_rows, fill_rows
from esapn_kernels.gpu import launch, resize
from esapn_kernels.gpu.resize import launch_fill
from esapn_kernels.ops import backend as backends
from esapn_kernels.ops import resize as operators
from esapn_kernels.ops.chain import chain_numel
from esapn_kernels.ops.layout import Layout
from esapn_kernels.reference import lookup_reference, promote_reference
from esapn_kernels.storage import locations
from esapn_kernels.storage.arena import Arena
from esapn_kernels.storage.free import FreeLists
from esapn_kernels.testing import assert_matches, make_case, row_elements
from tests.kernels.layouts import (
    DTYPES,
    LAYOUTS,
    NEEDS_NATIVE,
    ODD,
    SMALL,
    TINY,
    compared,
    name,
    tiled,
)
from tests.kernels.test_arena import check_accounts


def definition(module, ids, dtype):
    arena = module.arena
    operands = (arena.storage.detach().to(dtype), module.chain.detach().to(dtype))
    return lookup_reference(ids, *operands, *arena.layout.flat)


COMPARED = compared([*LAYOUTS, *tiled()])
COMPARED += [(*case[:2], "native") for case in COMPARED if case[2] == "torch"]


@pytest.mark.parametrize("sizes, dtype, backend", COMPARED, indirect=["backend"], ids=name)
def test_the_output_stays(sizes, dtype, backend, device, nan_empty):
    case = make_case(sizes, 25, 18, dtype, device, backend=backend)
    module, ids = case.module, case.ids
    every = torch.arange(25, device=device)
    exact = definition(module, every, torch.float64)
    sizes_before = module.sizes_of()
    rows = [module.arena.read(i) for i in range(25)]
    levels = module.arena.level().tolist()
    chain = module.chain.detach()
    said = module.promote(ids)

    moved = torch.zeros(25, dtype=torch.bool, device=device)
    moved[ids] = sizes_before[ids] < sizes[-1]
    assert moved.any() and torch.equal(said, moved[ids])
    sizes_now = module.sizes_of()
    assert torch.equal(sizes_now != sizes_before, moved)
    for i in moved.nonzero()[:, 0].tolist():
        assert int(sizes_now[i]) == sizes[levels[i] + 1]
        expected = promote_reference(rows[i].double(), levels[i], chain.double(), sizes)
        eager = promote_reference(rows[i], levels[i], chain, sizes)
        assert_matches(module.arena.read(i), expected, eager, name=f"row {i}")
    for i in (~moved).nonzero()[:, 0].tolist():
        assert torch.equal(module.arena.read(i), rows[i])

    # Rounding the new row to its dtype is the price; the definition pays it as well.
    after = module(every).detach()
    eager = torch.stack([carry(module, rows[i], levels[i], moved[i]) for i in range(25)])
    assert_matches(after, exact, eager, name="output after promotion")


def carry(module, row, level, moved):
    """The output of one row by the hops in its own dtype, after a promotion where ``moved``."""
    if moved:
        row, level = promote_reference(row, level, module.chain.detach(), module.sizes), level + 1
    for k in range(level, len(module.sizes) - 1):
        row = promote_reference(row, k, module.chain.detach(), module.sizes)
    return row


def test_duplicates_masks_and_full_rows(backend, device):
    case = make_case(SMALL, 9, 0, device=device, backend=backend)
    module = case.module
    module.arena.promote(torch.arange(9, device=device), module.chain, backend=backend)
    before = module.sizes_of().tolist()
    assert 3 in before and 8 in before
    values = [module.arena.read(i) for i in range(9)]
    ids = torch.tensor([[0, 1, 2, 0], [3, 4, 4, 4]], device=device)
    mask = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1]], device=device).bool()
    moved = module.promote(ids, mask)
    chosen = {0, 2, 4}
    assert moved.shape == ids.shape
    for position, i in enumerate(ids.view(-1).tolist()):
        asked = bool(mask.view(-1)[position])
        assert bool(moved.view(-1)[position]) == (asked and before[i] == 3)
    for i in range(9):
        grown = i in chosen and before[i] == 3
        assert int(module.sizes_of()[i]) == (8 if grown else before[i])
        if not grown:
            assert torch.equal(module.arena.read(i), values[i])


@pytest.mark.parametrize("mask", [None, False], ids=["empty", "all-false"])
def test_nothing_to_do(mask, backend, device):
    case = make_case(SMALL, 9, 0, device=device, backend=backend)
    ids = torch.arange(0 if mask is None else 9, device=device)
    chosen = None if mask is None else torch.zeros(9, dtype=torch.bool, device=device)
    # A device makes room for all ids before it knows how many move.
    case.module.reserve(9)
    before = {key: value.clone() for key, value in case.module.state_dict().items()}
    moved = case.module.promote(ids, chosen)
    assert moved.dtype == torch.bool and moved.shape == ids.shape and not moved.any()
    for key, value in case.module.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_the_order_of_ids_does_not_matter(backend, device):
    """The torch path gives the same bits; kernels hand rows out in the order of positions."""
    ids = torch.tensor([5, 1, 8, 0, 3], device=device)
    states, rows = [], []
    for order in (ids, ids.flip(0), torch.cat([ids, ids])):
        module = make_case(SMALL, 9, 0, device=device, backend=backend).module
        module.promote(order)
        states.append(module.state_dict())
        rows.append([module.arena.read(i) for i in range(9)])
    for other in rows[1:]:
        assert all(torch.equal(a, b) for a, b in zip(rows[0], other, strict=True))
    if backend == "torch":
        for key, value in states[0].items():
            assert torch.equal(value, states[1][key]) and torch.equal(value, states[2][key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
def test_the_cpu_path_writes_new_rows_only(dtype, device, nan_empty):
    case = make_case(SMALL, 12, 0, dtype, device)
    arena = case.module.arena
    ids = torch.tensor([0, 1, 2, 3, 4, 5], device=device)
    level = arena.level(ids)
    old = arena.row_start[ids].long()
    # Fresh pages behind those in use, one for each row, the new row at its second place.
    old_end, dims = arena.storage.numel(), torch.tensor([3, 8, 0], device=device)
    new = torch.where(level < 2, old_end + ids * 2 * arena.page + dims[level], -1)
    level = level.clamp(max=1)
    storage = arena.storage.detach()
    storage = torch.cat([storage, storage.new_zeros(12 * arena.page)])
    written = torch.zeros_like(storage, dtype=torch.bool)
    for start, k in zip(new.tolist(), level.tolist(), strict=True):
        if start >= 0:
            written[start : start + (3, 8)[k]] = True
    storage[written] = float("nan")
    before = storage.clone()
    chain = case.module.chain.detach()
    carry_rows(storage, chain, old, new, level, case.module.sizes)
    assert written.any() and storage[written].isfinite().all()
    assert torch.equal(storage[~written], before[~written])


@pytest.mark.parametrize("backend", ["torch", "triton"], indirect=True)
@pytest.mark.parametrize("sizes", [SMALL, ODD, (127, 130)], ids=name)
def test_fill_rows(sizes, backend, device):
    case = make_case(sizes, 10, 0, device=device)
    arena = case.module.arena
    ids = torch.tensor([1, 4, 7], device=device)
    start = arena.row_start[ids].long()
    start[1] = -1
    storage = arena.storage.detach()
    # The rows and two states of theirs, one of them in another dtype.
    targets = [(storage.clone(), 0.25), (storage.clone(), 0.0), (storage.bfloat16(), -2.0)]
    expected = [tensor.clone() for tensor, _ in targets]
    for i in (1, 7):
        begin, size = int(arena.row_start[i]), int(case.module.sizes_of()[i])
        for tensor, (_, value) in zip(expected, targets, strict=True):
            tensor[begin : begin + size] = value
    fill = {"torch": fill_rows, "triton": launch_fill}[backend]
    fill(targets, start, arena.level(ids), sizes)
    for (tensor, _), filled in zip(targets, expected, strict=True):
        assert torch.equal(tensor, filled) and not torch.equal(filled, storage.to(filled.dtype))


def test_a_written_storage_is_stale_for_autograd(backend, device):
    case = make_case(SMALL, 9, 5, device=device, backend=backend)
    out = case.module(case.ids)
    case.module.promote(case.ids)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_other_backends_are_refused():
    module = make_case((2, 8), 3, 0).module
    for call in (
        lambda: module.arena.promote(torch.arange(3), module.chain, backend="cuda"),
        lambda: module.arena.insert(torch.arange(3), 0, backend="cuda"),
        lambda: module.arena.free(torch.arange(3), backend="cuda"),
    ):
        with pytest.raises(ValueError, match="backend"):
            call()


# ---- the three kernels --------------------------------------------------------------------------


@pytest.fixture
def small_steps(monkeypatch):
    """Many steps of the scan for few ids."""
    choose = launch.choose_scan

    def choose_scan(n_levels):
        return {**choose(n_levels), "BLOCK_IDS": 64, "num_warps": 4}

    monkeypatch.setattr(launch, "choose_scan", choose_scan)


@pytest.fixture
def wide_tiles(device, monkeypatch):
    """Few programs for many ids: interpreted, the number of programs is what costs."""
    if device.type != "cpu":
        return
    config = launch.LaunchConfig(512, 16, 16, 4)
    monkeypatch.setattr(launch, "choose_promote", lambda *_: config)
    monkeypatch.setattr(resize, "CLAIM_IDS", 512)


def fill(arena, generator=None):
    """Standard normal numbers; drawn by the host, whose generators a GPU does not take."""
    drawn = torch.randn(arena.storage.shape, generator=generator, dtype=arena.storage.dtype)
    arena.storage.data.copy_(drawn)


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels launched, in order."""
    found = []

    class Watched:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            found.append(self.name)
            return self.kernel[grid]

    for kernel in ("_claim_kernel", "_scan_kernel", "_move_kernel", "_fill_rows_kernel"):
        monkeypatch.setattr(resize, kernel, Watched(kernel, getattr(resize, kernel)))
    return found


class Free:
    """Free rows and pages of an arena, and where rows go, told one by one."""

    def __init__(self, arena):
        self.arena = arena
        free = arena._stacks()
        *self.rows, self.pages = free.count.tolist()
        base = free.base.tolist()
        self.room = [b - a for a, b in zip(base, base[1:], strict=False)]

    def take(self, level):
        if not self.rows[level]:
            if not self.pages:
                return False
            self.pages -= 1
            self.rows[level] = self.arena.rows_per_page[level]
        self.rows[level] -= 1
        return True

    def promote(self, ids, mask):
        """Ids that move: by level, then in the order of their first positions."""
        level = self.arena.level().tolist()
        first = dict.fromkeys(
            i for i, m in zip(ids, mask, strict=True) if m and 0 <= i < len(level)
        )
        moved = set()
        for k in range(len(self.arena.sizes) - 1):
            # Rows are given back after all have been taken.
            given = 0
            for i in first:
                if level[i] != k or self.rows[k] + given >= self.room[k]:
                    continue
                if not self.take(k + 1):
                    break
                moved.add(i)
                given += 1
            self.rows[k] += given
        return moved


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32], ids=name)
@pytest.mark.parametrize(
    "spare_pages, room",
    [(0, True), (0, False), (1, True), (3, False), (40, False), (None, True)],
    ids=["no-page", "nothing", "a-page", "pages", "pages-only", "growth"],
)
def test_rows_that_fit_move_and_the_others_stay(
    spare_pages, room, ids_dtype, small_steps, device, monkeypatch, nan_empty
):
    sizes, n_rows, n_ids = ODD, 300, 333
    generator = torch.Generator().manual_seed(1)
    level = torch.randint(-1, 4, (n_rows,), generator=generator)
    monkeypatch.setattr(locations, "page_elements", lambda *_: 128)
    arena = Arena(n_rows, sizes, level=level, dtype=torch.float64, device=device)
    if spare_pages is not None:
        # Exactly so many pages, and no growth.
        arena._grow(spare_pages, at_once=True)
        monkeypatch.setattr(Arena, "_make_room", lambda arena, rows, **_: None)
    if room:
        arena._grow_stacks([1000] * 4)
    fill(arena, generator)
    arena.storage.grad = torch.ones_like(arena.storage)
    chain = torch.randn(chain_numel(sizes), generator=generator, dtype=torch.float64).to(device)
    for _ in range(3):
        rows = [arena.read(i) if k >= 0 else None for i, k in enumerate(arena.level().tolist())]
        levels = arena.level().tolist()
        ids = torch.randint(-20, n_rows + 20, (n_ids,), generator=generator).to(device, ids_dtype)
        mask = (torch.rand(n_ids, generator=generator) < 0.7).to(device)
        arena._begin_unread(n_ids)
        expected = Free(arena).promote(ids.tolist(), mask.tolist())
        arena.storage.grad[:] = 1.0
        moved = arena.promote(ids, chain, mask, backend="triton")

        check_accounts(arena)
        assert moved.tolist() == [
            m and i in expected for i, m in zip(ids.tolist(), mask.tolist(), strict=True)
        ]
        for i, k in enumerate(arena.level().tolist()):
            if i in expected:
                assert k == levels[i] + 1
                row = promote_reference(rows[i], levels[i], chain, sizes)
                torch.testing.assert_close(arena.read(i), row, rtol=1e-12, atol=1e-12)
            else:
                assert k == levels[i]
                assert k < 0 or torch.equal(arena.read(i), rows[i])
            if k >= 0:
                begin = int(arena.row_start[i])
                grad = arena.storage.grad[begin : begin + sizes[k]]
                assert (grad == (0.0 if i in expected else 1.0)).all()
    stayed = {i for i, m in zip(ids.tolist(), mask.tolist(), strict=True) if m} - expected
    could = [i for i in stayed if 0 <= i < n_rows and 0 <= levels[i] < 3]
    assert bool(could) == (spare_pages is not None)


def test_many_ids_at_once(small_steps, wide_tiles, device):
    """3,000 positions over 47 steps of the scan, every level at once, against the CPU path."""
    sizes, n_rows = ODD, 2000
    generator = torch.Generator().manual_seed(2)
    level = torch.randint(0, 4, (n_rows,), generator=generator)
    ids = torch.randint(0, n_rows, (3000,), generator=generator).to(device)
    arenas, moved = [], []
    for backend in (
        "torch",
        "triton",
        "triton",
        *["native"] * (device.type == "cpu" and not backends.NATIVE_ERROR),
    ):
        arena = Arena(n_rows, sizes, level=level, device=device)
        fill(arena, torch.Generator().manual_seed(3))
        chain = torch.randn(chain_numel(sizes), generator=torch.Generator().manual_seed(4))
        moved.append(arena.promote(ids, chain.to(device), backend=backend))
        arenas.append(arena)
    assert torch.equal(moved[0], level.to(device)[ids] < 3)
    for arena, said in zip(arenas[1:], moved[1:], strict=True):
        check_accounts(arena)
        assert torch.equal(moved[0], said) and torch.equal(arenas[0].level(), arena.level())
        if isinstance(arena._free, FreeLists):
            assert torch.equal(arenas[0]._free.count[:-1], arena._free.count[:-1])
        for i in range(0, n_rows, 7):
            torch.testing.assert_close(arenas[0].read(i), arena.read(i), rtol=1e-5, atol=1e-5)
    # Two equal runs agree in every bit.
    for key, value in arenas[1].state_dict().items():
        assert torch.equal(value, arenas[2].state_dict()[key]), key


@pytest.mark.parametrize("level", range(4))
def test_insert_and_free_round_trip(level, small_steps, device, nan_empty):
    sizes = ODD
    arena = Arena(200, sizes, level=torch.arange(200) % 5 - 1, device=device)
    fill(arena)
    arena.storage.grad = torch.ones_like(arena.storage)
    empty = (arena.level() < 0).nonzero()[:, 0]
    before = [arena.read(i) if i % 5 else None for i in range(200)]
    ids = torch.cat([empty, empty.flip(0), torch.arange(30, device=device)])
    for _ in range(3):
        capacity = arena.storage.numel()
        assert torch.equal(arena.insert(ids, level, backend="triton"), ids % 5 == 0)
        check_accounts(arena)
        assert (arena.level(empty) == level).all()
        for i in range(200):
            if i % 5:
                assert torch.equal(arena.read(i), before[i])
            else:
                assert not arena.read(i).any()
                start = int(arena.row_start[i])
                assert not arena.storage.grad[start : start + sizes[level]].any()
                arena.storage.data[start : start + sizes[level]] = 7.0
        assert arena.free(ids[: 2 * len(empty)], backend="triton").all()
        check_accounts(arena)
        assert (arena.level(empty) == -1).all()
    # Freed rows serve again: no growth after the first round.
    assert arena.storage.numel() == capacity


@pytest.mark.parametrize("n_ids", [15, 16, 17, 64, 65, 256, 257])
def test_ids_behind_the_last_take_no_part(n_ids, small_steps, device, nan_empty):
    """So many ids of a longer tensor, at whole blocks and one beside them."""
    module = make_case(ODD, n_ids + 8, 0, device=device, backend="triton", mix=(1, 1, 1, 0)).module
    arena, before = module.arena, module.sizes_of()
    ids = torch.randperm(n_ids + 8, device=device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    assert module.promote(ids[:n_ids], mask[:n_ids]).all()
    check_accounts(arena)
    behind = ids[n_ids:]
    assert torch.equal(module.sizes_of(behind), before[behind])
    assert arena.free(ids[:n_ids], backend="triton").all()
    check_accounts(arena)
    assert torch.equal(module.sizes_of(behind), before[behind])
    assert arena.insert(ids[:n_ids], 0, backend="triton").all()
    check_accounts(arena)


@pytest.mark.parametrize("n_rows", [5, 16])
def test_ids_that_do_not_exist_get_no_row(n_rows, device):
    arena = Arena(n_rows, ODD, level=torch.full((n_rows,), -1), device=device)
    ids = torch.tensor([-1, n_rows, 0, n_rows - 1, n_rows + 1], device=device)
    exists = [False, False, True, True, False]
    assert arena.insert(ids, 0, backend="triton").tolist() == exists
    check_accounts(arena)
    assert arena.free(ids, backend="triton").tolist() == exists
    check_accounts(arena)
    assert (arena.level() == -1).all()


@pytest.mark.parametrize("beside", [-1, 0, 1])
def test_pages_that_are_full(beside, wide_tiles, device):
    """As many rows as a page holds, two pages, and what is left: no row is lost."""
    sizes = (64, 96)
    per = Arena(1, sizes).rows_per_page[1]
    arena = Arena(4 * per, sizes, level=torch.full((4 * per,), -1), device=device)
    ids, used = torch.arange(4 * per, device=device), 0
    for count in (per + beside, 2 * per, per - beside):
        assert arena.insert(ids[used : used + count], 1, backend="triton").all()
        used += count
        check_accounts(arena)
        assert int((arena.level() == 1).sum()) == used
        assert int(arena._free.count[1]) == -used % per
        assert int((arena.page_level == 1).sum()) == -(-used // per)


class PerId(torch.optim.Adam):
    """Adam that also holds numbers per id, as the fused optimizers do."""

    state_per_id = {"touched": 5.0, "sum": 0.25}


@pytest.mark.parametrize("optimizers", [1, 2])
def test_state_of_moved_rows_is_fresh(optimizers, backend, launches, device):
    """One Adam fits in the three launches; of two, what is left over takes its own."""
    module = ResizableEmbedding(40, sizes=SMALL, backend=backend, device=device)
    arena, ids = module.arena, torch.tensor([1, 5, 5, 39, 20], device=device)
    every = torch.arange(40, device=device)
    held = [PerId(module.parameters(), amsgrad=k > 0) for k in range(optimizers)]
    for optimizer in held:
        module(every).square().sum().backward()
        optimizer.step()
        state = optimizer.state[arena.storage]
        state["touched"] = torch.full((40,), 2, dtype=torch.int32, device=device)
        state["sum"] = torch.full((40,), 3.0, device=device)
    names = [[k for k, v in o.state[arena.storage].items() if v.dim()] for o in held]
    before = [{k: v.clone() for k, v in o.state[arena.storage].items() if v.dim()} for o in held]
    others = torch.ones_like(every, dtype=torch.bool).index_fill_(0, ids, False).nonzero()[:, 0]
    kept = row_elements(module, others)
    launches.clear()
    assert module.promote(ids).all()
    if backend == "triton":
        # Gradient and moments; the second number per id; of the second Adam all but one.
        assert launches == ["_claim_kernel", "_scan_kernel", "_move_kernel"] + [
            "_fill_rows_kernel"
        ] * (1 if optimizers == 1 else 2 + 3)
    fresh = row_elements(module, ids)
    assert not arena.storage.grad[fresh].any()
    assert arena.storage.grad[row_elements(module, others)].any()
    for optimizer, keys, old in zip(held, names, before, strict=True):
        state = optimizer.state[arena.storage]
        assert {"touched", "sum", "exp_avg", "exp_avg_sq"} <= set(keys)
        for key in keys:
            if key in PerId.state_per_id:
                assert (state[key][ids] == PerId.state_per_id[key]).all()
                assert torch.equal(state[key][others], old[key][others])
            else:
                assert not state[key][fresh].any()
                assert torch.equal(state[key][row_elements(module, others)], old[key][kept])


def test_three_launches_for_ten_thousand_ids(launches, wide_tiles, device):
    """10,240 ids with Adam's moments and a gradient."""
    module = ResizableEmbedding(10_240, sizes=SMALL, backend="torch", device=device)
    optimizer = torch.optim.Adam(module.parameters())
    every = torch.arange(10_240, device=device)
    module(every).sum().backward()
    optimizer.step()
    before = module(every).detach()
    module.backend = "triton"
    assert module.promote(every.flip(0)).all()
    assert launches == ["_claim_kernel", "_scan_kernel", "_move_kernel"]
    module.backend = "torch"
    torch.testing.assert_close(module(every).detach(), before, rtol=1e-4, atol=1e-4)
    for state in ("exp_avg", "exp_avg_sq"):
        moments = optimizer.state[module.arena.storage][state]
        assert not moments[row_elements(module, every)].any()
    check_accounts(module.arena)


def test_fresh_values_are_exact_in_fp64(backend, device):
    """A fresh value that fp32 does not hold."""
    options = {"dtype": torch.float64, "backend": backend, "device": device}
    module, ids = ResizableEmbedding(10, sizes=TINY, **options), torch.arange(10, device=device)
    optimizer = torch.optim.Adagrad(module.parameters(), initial_accumulator_value=0.1)
    module(ids).sum().backward()
    optimizer.step()
    module.promote(ids[:4])
    state = optimizer.state[module.arena.storage]["sum"]
    assert (state[row_elements(module, ids[:4])] == 0.1).all()


@pytest.mark.parametrize("backend", ["native", "triton"], indirect=True)
def test_rows_past_two_to_the_31(backend, device, monkeypatch):
    """Starts in int64: on a CPU, a storage whose pages nobody touches costs no memory."""
    if backend == "native" and device.type != "cpu":
        pytest.skip("native kernels run on CPUs")
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 6 GiB of GPU memory")
    sizes = (2, 4)
    monkeypatch.setattr(locations, "page_elements", lambda *_: 4096)
    arena = Arena(4, sizes, dtype=torch.float16, device=device)
    page, pages = arena.page, 2**31 // 4096 + 2
    rows = torch.randn(4, 2).half().to(device)
    chain = torch.randn(chain_numel(sizes)).half().to(device)
    arena.storage.data = torch.empty(pages * page, dtype=torch.float16, device=device)
    # The rows in the last page but one, the last page free.
    begin = (pages - 2) * page
    assert begin + 4 > 2**31 - 1
    arena.row_start = arena.row_start.long()
    arena.row_start[:4] = torch.arange(4) * 2 + begin
    arena.storage.data[begin : begin + 8] = rows.view(-1)
    arena.page_level = torch.full((pages + 1,), -1, dtype=torch.int8, device=device)
    arena.page_level[-3] = 0
    assert arena.level().tolist() == [0] * 4  # the tensors are looked at, and accepted
    # Free are only the last page and, of the stacks, nothing else: no other is to be touched.
    if backend == "native":
        free = arena._bits()
        free.vacant[: pages - 2] = -2
    else:
        free = arena._stacks()
        free.pages = torch.tensor([pages - 1, 0], dtype=torch.int32, device=device)
    free.count[:] = torch.tensor([0, 0, 1])
    monkeypatch.setattr(Arena, "_make_room", lambda arena, rows, **_: None)
    ids = torch.tensor([2, 0, 2], device=device)
    assert arena.promote(ids, chain, backend=backend).all()
    assert arena.level().tolist() == [1, 0, 1, 0]
    for i in range(4):
        expected = promote_reference(rows[i], 0, chain, sizes) if i in (0, 2) else rows[i]
        torch.testing.assert_close(arena.read(i), expected, rtol=1e-2, atol=1e-2)
    assert arena.row_start[[2, 0]].tolist() == [begin + page, begin + page + 4]
    if backend == "native":
        assert int(free.taken[pages - 2, 0]) == 0b1010 and int(free.count[0]) == 2
    else:
        assert sorted(free.rows[: int(free.count[0])].tolist()) == [begin, begin + 4]


# ---- the native kernels -------------------------------------------------------------------------


@pytest.fixture(params=["avx512", "avx2", "baseline"])
def instructions(request):
    """Every instruction set that this machine runs."""
    if backends.NATIVE_ERROR is not None:
        pytest.skip(backends.NATIVE_ERROR)
    if request.param not in backends.native.instruction_sets():
        pytest.skip(f"needs {request.param}")
    before = backends.native.use(request.param)
    yield request.param
    backends.native.use(before)


OTHER_SIZES = [(1,), (1, 2), (3, 16, 17), (5, 6, 7, 64), (2, 4, 8, 16, 64, 128), (40, 513)]
quick = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


class Twins:
    """Two arenas of equal rows, gradients and numbers per id, one for each backend of CPUs."""

    def __init__(self, sizes, dtype, wide, n_rows=60):
        generator = torch.Generator().manual_seed(7)
        level = torch.randint(-1, len(sizes), (n_rows,), generator=generator)
        rows = torch.randn(n_rows, sizes[-1], generator=generator).to(dtype)
        self.chain = (0.3 * torch.randn(chain_numel(sizes), generator=generator)).to(dtype)
        self.arenas, self.per_id = {}, {}
        for backend in ("torch", "native"):
            arena = Arena(n_rows, sizes, level=level, dtype=dtype)
            for i in range(n_rows):
                start, dim = int(arena.row_start[i]), sizes[level[i]]
                if start >= 0:
                    arena.storage.data[start : start + dim] = rows[i, :dim]
            arena.storage.grad = torch.ones_like(arena.storage)
            optimizer = torch.optim.SGD([arena.storage], lr=0.1)
            optimizer.state_per_element = {"small": -2.0, "large": 0.1, "bytes": 3.0}
            optimizer.state_per_id = {"step": 4.0, "sum": 0.1}
            optimizer.state[arena.storage] = {
                "small": torch.ones(arena.storage.shape, dtype=torch.bfloat16),
                "large": torch.ones(arena.storage.shape, dtype=torch.float64),
                "bytes": torch.ones(arena.storage.shape, dtype=torch.uint8),
                "step": torch.ones(n_rows, dtype=torch.int32),
                "sum": torch.ones(n_rows, dtype=torch.float64),
            }
            arena.followers.add(optimizer)
            if wide:
                arena.row_start = arena.row_start.long()
            self.arenas[backend] = arena, optimizer

    def call(self, what, *args, **kwargs):
        said = [
            getattr(arena, what)(*args, **kwargs, backend=backend)
            for backend, (arena, _) in self.arenas.items()
        ]
        assert torch.equal(*said)
        self.check()
        return said[0]

    def check(self):
        (one, _), (two, _) = self.arenas.values()
        assert torch.equal(one.level(), two.level()) and one.bytes().payload == two.bytes().payload
        check_accounts(one)
        check_accounts(two)
        tolerance = {torch.float64: 1e-13, torch.float32: 1e-5}.get(one.storage.dtype, 2e-2)
        elements = []
        for i, k in enumerate(one.level().tolist()):
            if k >= 0:
                expected, found = one.read(i), two.read(i)
                torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
                elements.append([(int(a.row_start[i]), one.sizes[k]) for a in (one, two)])
        for mine, other in zip(*map(self.states, self.arenas.values()), strict=True):
            if mine.shape != one.storage.shape:
                assert torch.equal(mine, other)
                continue
            for (here, dim), (there, _) in elements:
                assert torch.equal(mine[here : here + dim], other[there : there + dim])

    @staticmethod
    def states(held):
        arena, optimizer = held
        return [arena.storage.grad, *optimizer.state[arena.storage].values()]


@NEEDS_NATIVE
@settings(max_examples=60, **quick)
@given(data=st.data())
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_native_kernels_do_what_the_torch_path_does(dtype, data):
    sizes = data.draw(st.sampled_from([*OTHER_SIZES, SMALL, ODD]))
    twins = Twins(sizes, dtype, wide=data.draw(st.booleans()))
    index = data.draw(st.sampled_from([torch.int32, torch.int64]))
    known = st.integers(0, 59)
    for _ in range(data.draw(st.integers(1, 5))):
        what = data.draw(st.sampled_from(["promote", "promote", "demote", "insert", "free"]))
        hops = what in ("promote", "demote")
        ids = data.draw(st.lists(known, max_size=90, unique=not hops))
        level = twins.arenas["torch"][0].level().tolist()
        if hops:
            size = len(ids)
            mask = data.draw(st.none() | st.lists(st.booleans(), min_size=size, max_size=size))
            mask = None if mask is None else torch.tensor(mask, dtype=torch.bool)
            twins.call(what, torch.tensor(ids, dtype=index), twins.chain, mask)
            continue
        ids = [i for i in ids if (level[i] < 0) == (what == "insert")]
        target = [data.draw(st.integers(0, len(sizes) - 1))] if what == "insert" else []
        assert twins.call(what, torch.tensor(ids, dtype=index), *target).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("sizes", [*OTHER_SIZES, SMALL, ODD], ids=name)
def test_every_instruction_set(sizes, dtype, instructions):
    twins = Twins(sizes, dtype, wide=False)
    every = torch.arange(60).flip(0).repeat(2)
    for _ in sizes:
        twins.call("promote", every, twins.chain)
    last = twins.arenas["native"][0].level() == len(sizes) - 1
    twins.call("demote", every[:50], twins.chain)
    twins.call("promote", every[:50], twins.chain)
    assert twins.call("free", last.nonzero()[:, 0]).all()
    assert twins.call("insert", last.nonzero()[:, 0], 0).all()


def everything(arena):
    free = arena._bits()
    known = free.taken, free.used, free.vacant, free.count, free.lowest
    tensors = [*arena.parameters(), *arena.buffers(), *known]
    return [tensor.detach().clone() for tensor in tensors]


@NEEDS_NATIVE
@pytest.mark.parametrize("bad", [-1, 20, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32], ids=name)
def test_an_id_out_of_range_changes_nothing(bad, ids_dtype):
    arena = Arena(20, SMALL, level=torch.arange(20) % 4 - 1)
    fill(arena)
    chain, before = torch.randn(chain_numel(SMALL)), everything(arena)
    ids = torch.tensor([1, 5, bad, 2], dtype=ids_dtype)
    masked = torch.tensor([True, True, False, True])
    for call in (
        lambda: arena.promote(ids, chain, backend="native"),
        lambda: arena.promote(ids, chain, masked, backend="native"),
        lambda: arena.insert(ids, 0, backend="native"),
        lambda: arena.free(ids, backend="native"),
        lambda: arena.insert(torch.tensor([0]), 3, backend="native"),
    ):
        with pytest.raises(IndexError, match="index out of range in self"):
            call()
        assert all(map(torch.equal, everything(arena), before))
        arena.layout  # noqa: B018  (raises what the next call would)


@NEEDS_NATIVE
@pytest.mark.parametrize("pages", [0, 19])
@pytest.mark.parametrize("call", ["promote", "demote", "insert"])
def test_rows_without_room_change_nothing(call, pages, monkeypatch):
    """The kernel looks itself: it writes where the bits say."""
    monkeypatch.setattr(locations, "page_elements", lambda *_: 8)
    level = torch.arange(80) // 40  # 40 rows of level 1 or 2, for which it takes 20 pages
    arena = Arena(
        80, SMALL, level=torch.where(level == 0, {"promote": 0, "demote": 2}.get(call, -1), 1)
    )
    fill(arena)
    arena._grow(pages, at_once=True)
    monkeypatch.setattr(Arena, "_grow_for", lambda *_, **__: None)
    chain, before = torch.randn(chain_numel(SMALL)), everything(arena)
    ids = torch.arange(40)
    with pytest.raises(RuntimeError, match="no room for the rows"):
        if call == "insert":
            arena.insert(ids, 1, backend="native")
        else:
            getattr(arena, call)(ids, chain, backend="native")
    assert all(map(torch.equal, everything(arena), before))
    check_accounts(arena)


@NEEDS_NATIVE
def test_a_mask_that_repeats_itself_and_one_of_another_shape():
    arena, chain = Arena(9, SMALL), torch.randn(chain_numel(SMALL))
    ids = torch.arange(9)
    moved = arena.promote(ids, chain, (ids % 2 == 0)[None].expand(3, 9)[1], backend="native")
    assert moved.tolist() == [True, False] * 4 + [True]
    assert arena.level().tolist() == moved.long().tolist()
    with pytest.raises(RuntimeError, match="expand"):
        arena.promote(ids, chain, torch.ones(4, dtype=torch.bool), backend="native")


class Opaque(torch.Tensor):
    """Numbers that are a subclass's own affair."""


@NEEDS_NATIVE
def test_state_that_no_kernel_can_write():
    arena = Arena(12, SMALL)
    chain, n = torch.randn(chain_numel(SMALL)), arena.storage.numel()
    arena._grow(40)
    n = arena.storage.numel()
    optimizer = torch.optim.SGD([arena.storage], lr=0.1)
    optimizer.state_per_element = {"apart": 5.0, "opaque": 6.0, "plain": 7.0}
    optimizer.state_per_id = {"ids": 8.0}
    state = {
        "apart": torch.ones(2 * n)[::2],
        "opaque": torch.ones(n).as_subclass(Opaque),
        "plain": torch.ones(n),
        "ids": torch.ones(24)[::2],
    }
    optimizer.state[arena.storage] = state
    arena.followers.add(optimizer)
    ids = torch.tensor([3, 7, 3])
    assert arena.promote(ids, chain, backend="native").all()
    new = torch.zeros(n, dtype=torch.bool)
    for i in (3, 7):
        start = int(arena.row_start[i])
        new[start : start + 3] = True
    for key, value in (("apart", 5.0), ("opaque", 6.0), ("plain", 7.0)):
        assert torch.equal(torch.Tensor(state[key]), torch.where(new, value, 1.0)), key
    assert state["ids"].tolist() == [8.0 if i in (3, 7) else 1.0 for i in range(12)]


@NEEDS_NATIVE
def test_ids_and_masks_that_lie_apart():
    one, two = (make_case(SMALL, 30, 0, backend="native").module for _ in range(2))
    ids, mask = torch.arange(60)[::2] // 2, torch.arange(60) % 3 == 0
    assert torch.equal(
        one.promote(ids, mask[::2]), two.promote(ids.contiguous(), mask[::2].contiguous())
    )
    for key, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[key]), key


@NEEDS_NATIVE
def test_movers_are_found_by_level_and_in_order():
    """What makes room: distinct rows by the level that they leave."""
    arena = Arena(10, SMALL, level=torch.tensor([0, 1, 2, -1, 0, 1, 2, 0, 0, 1]))
    layout = Layout(arena.row_start, arena.page_level, arena.sizes, arena.page)
    ids = torch.tensor([9, 3, 8, 9, 2, 0, 8, 5])
    for backend in ("torch", "native"):
        movers = find(ids, layout, "promote", backend)
        assert movers.per_level == [2, 2, 0] and movers.backend == backend
        assert movers.moved.tolist() == [True, False, True, True, False, True, True, True]
    (found,) = movers.found
    assert found[3:7].tolist() == [8, 0, 9, 5]
    assert torch.equal(found[7:11], arena.row_start[found[3:7]].long())
    assert find(ids, layout, "free", "native").per_level == [2, 2, 1]
    assert find(ids, layout, "insert", "native").per_level == [1, 0, 0]


def find(ids, layout, call, backend):
    return operators.find_movers(ids, None, layout, call, backend=backend)
