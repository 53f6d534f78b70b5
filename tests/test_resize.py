"""resize.py: a promotion does not change the output, and touches nothing else."""

import pytest
import torch

from esapn_kernels.reference import lookup_reference, promote_reference
from esapn_kernels.resize import fill_rows, promote_rows
from esapn_kernels.testing import assert_matches, make_case

PAPER = (2, 4, 8, 16, 64, 128)
SIZES = [PAPER, (1, 3, 5, 33), (127, 130), (2, 512), (1, 2, 3)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def name(value):
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value).split(".")[-1]


def definition(module, ids, dtype):
    arena = module.arena
    operands = (arena.storage.detach().to(dtype), module.chain.detach().to(dtype))
    return lookup_reference(ids, *operands, *arena.locations, module.sizes, arena.page)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("sizes", SIZES, ids=name)
def test_the_output_stays(sizes, dtype, backend, device, nan_empty):
    case = make_case(sizes, 25, 18, dtype, device, backend=backend)
    module, ids = case.module, case.ids
    every = torch.arange(25, device=device)
    exact = definition(module, every, torch.float64)
    sizes_before = module.sizes_of()
    rows = [module.arena.read(i) for i in range(25)]
    levels = module.arena.level().tolist()
    chain = module.chain.detach()
    module.promote(ids)

    moved = torch.zeros(25, dtype=torch.bool, device=device)
    moved[ids] = sizes_before[ids] < sizes[-1]
    assert moved.any()
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
    case = make_case((2, 3, 8), 9, 0, device=device, backend=backend)
    module = case.module
    module.arena.promote(torch.arange(9, device=device), module.chain, backend=backend)
    before = module.sizes_of().tolist()
    assert 3 in before and 8 in before
    values = [module.arena.read(i) for i in range(9)]
    ids = torch.tensor([[0, 1, 2, 0], [3, 4, 4, 4]], device=device)
    mask = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1]], device=device).bool()
    module.promote(ids, mask)
    chosen = {0, 2, 4}
    for i in range(9):
        grown = i in chosen and before[i] == 3
        assert int(module.sizes_of()[i]) == (8 if grown else before[i])
        if not grown:
            assert torch.equal(module.arena.read(i), values[i])


@pytest.mark.parametrize("mask", [None, False], ids=["empty", "all-false"])
def test_nothing_to_do(mask, backend, device):
    case = make_case((2, 3, 8), 9, 0, device=device, backend=backend)
    ids = torch.arange(0 if mask is None else 9, device=device)
    chosen = None if mask is None else torch.zeros(9, dtype=torch.bool, device=device)
    before = {key: value.clone() for key, value in case.module.state_dict().items()}
    case.module.promote(ids, chosen)
    for key, value in case.module.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_the_order_of_ids_does_not_matter(backend, device):
    ids = torch.tensor([5, 1, 8, 0, 3], device=device)
    states = []
    for order in (ids, ids.flip(0), torch.cat([ids, ids])):
        module = make_case((2, 3, 8), 9, 0, device=device, backend=backend).module
        module.promote(order)
        states.append(module.state_dict())
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]) and torch.equal(value, states[2][key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
def test_promote_rows_writes_new_rows_only(dtype, backend, device, nan_empty):
    case = make_case((2, 3, 8), 12, 0, dtype, device)
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
    promote_rows(storage, chain, old, new, level, **case.layout, backend=backend)
    assert written.any() and storage[written].isfinite().all()
    assert torch.equal(storage[~written], before[~written])


@pytest.mark.parametrize("sizes", [(2, 4), (1, 3, 5, 33), (127, 130)], ids=name)
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
    fill_rows(targets, start, arena.level(ids), sizes=sizes, backend=backend)
    for (tensor, _), filled in zip(targets, expected, strict=True):
        assert torch.equal(tensor, filled) and not torch.equal(filled, storage.to(filled.dtype))


def test_a_written_storage_is_stale_for_autograd(backend, device):
    case = make_case((2, 3, 8), 9, 5, device=device, backend=backend)
    out = case.module(case.ids)
    case.module.promote(case.ids)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_other_backends_are_refused():
    case = make_case((2, 8), 3, 0)
    operands = (torch.zeros(1, dtype=torch.long),) * 3
    with pytest.raises(ValueError, match="backend"):
        promote_rows(
            case.module.arena.storage.detach(),
            case.module.chain.detach(),
            *operands,
            **case.layout,
            backend="cuda",
        )
