"""group.py: the counting sort by level, and the grouped forward that works through it."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from esapn_kernels import ResizableEmbedding
from esapn_kernels.gpu import compose as compose_file
from esapn_kernels.gpu import group as group_file
from esapn_kernels.gpu import launch
from esapn_kernels.gpu import lookup_fwd as lookup_file
from esapn_kernels.gpu.compose import empty_composed, launch_compose
from esapn_kernels.gpu.group import group_by_level
from esapn_kernels.ops import backend as backend_file
from esapn_kernels.ops.chain import chain_numel
from esapn_kernels.ops.compose import compose
from esapn_kernels.ops.layout import Layout
from esapn_kernels.reference import lookup_reference
from esapn_kernels.testing import assert_matches, make_case, poison_unused
from tests.kernels.layouts import FILLED, LAYOUTS, ODD, PAPER, SMALL, name, tiled

OTHERS = [((7,), torch.float32), ((3,), torch.float64), ((9, 24, 40), torch.float32)]
# Of the paper's sizes: the first and the last, one, the last, all but the last.
MIXES = [(1, 0, 0, 0, 0, 1), (0, 1, 0, 0, 0, 0), (0, 0, 0, 0, 0, 1), (3, 1, 1, 2, 1, 0)]
LAUNCHERS = {"small": lookup_file.launch_small, "grouped": lookup_file.launch_grouped}


def launched(layouts):
    """``(sizes, dtype, launcher)``; what is always grouped needs no other kernel."""
    return [
        (sizes, dtype, run)
        for sizes, dtype in layouts
        for run in LAUNCHERS
        if run == "grouped" or not launch.groups_ids(1, sizes, dtype)
    ]


@pytest.fixture(params=LAUNCHERS)
def run(request):
    """Either forward, called without the choice between them; returns a new output."""

    def launched(ids, storage, composed, layout, out_dtype=None):
        dtype = out_dtype or storage.dtype
        out = torch.empty(ids.numel(), layout.dim, dtype=dtype, device=ids.device)
        LAUNCHERS[request.param](out, ids, storage, composed, layout)
        return out

    launched.grouped = request.param == "grouped"
    return launched


@pytest.fixture
def unasserted(monkeypatch):
    """Compiled kernels let ids out of range pass, as interpreted ones do."""
    for file in (group_file, lookup_file):
        monkeypatch.setattr(file, "assertions", lambda ids: {})


def looked_up(case, run, out_dtype=None):
    """Output of ``run`` for a case."""
    storage, chain = (t.detach() for t in case.leaves())
    composed = compose(chain, case.module.sizes)
    return run(case.ids, storage, composed, case.layout, out_dtype)


def reference(case, dtype):
    """The literal definition in ``dtype``."""
    with torch.no_grad():
        return lookup_reference(case.ids, *case.leaves(dtype), *case.layout.flat)


def with_ids(case, ids):
    """The same rows under other ids."""
    ids = torch.as_tensor(ids, device=case.ids.device)
    return type(case)(case.module, ids, case.grad_out)


@pytest.mark.parametrize(
    "n_levels, index",
    [
        *((n_levels, torch.int32) for n_levels in (2, 6, 20)),
        *((n_levels, torch.int64) for n_levels in (1, 6, 7)),
    ],
    ids=name,
)
@pytest.mark.parametrize("n_ids", [1, 511, 512, 1500])
def test_groups_are_a_stable_sort_by_level(n_ids, n_levels, index, device, unasserted):
    n_rows, page = 200, 8
    ids = torch.randint(-20, n_rows + 20, (n_ids,), dtype=index, device=device)
    ids[n_ids // 2] = torch.iinfo(index).max
    row_start = torch.randperm(n_rows, device=device).to(index) * page
    row_start[::9] = -1
    page_level = torch.randint(n_levels, (n_rows,), dtype=torch.int8, device=device)
    page_level[page_level == 1] = 0  # a level of which there is no row
    groups = group_by_level(ids, Layout(row_start, page_level, tuple(range(1, n_levels + 1)), page))

    known = ids.clamp(0, n_rows - 1)
    start = torch.where(known == ids, row_start[known.long()], -1)
    level = torch.where(start >= 0, page_level[(start // page).long()].long(), n_levels)
    order = torch.sort(level, stable=True).indices
    assert torch.equal(groups.order, order.int())
    assert torch.equal(groups.start, start[order])
    assert groups.level_begin.dtype == torch.int32
    below = [int((level < k).sum()) for k in range(n_levels + 1)]
    assert groups.level_begin.tolist() == [*below, n_ids]


@pytest.mark.parametrize("n_ids", [0, 700])
def test_groups_of_many_programs(n_ids, device, monkeypatch):
    """Stretches of several tiles, counts of several blocks; and no ids at all."""
    choice = launch.GroupConfig(6, 128, 8, block_rows=32, block_counts=4)
    monkeypatch.setattr(launch, "choose_group", lambda n_ids, n_levels: choice)
    level = torch.randint(5, (700,), device=device)[:n_ids]
    page_level = torch.arange(5, dtype=torch.int8, device=device)
    row_start = torch.arange(5, dtype=torch.int32, device=device) * 4
    groups = group_by_level(level, Layout(row_start, page_level, (1, 2, 3, 4, 5), 4))
    assert torch.equal(groups.order, torch.sort(level, stable=True).indices.int())
    assert groups.level_begin.tolist() == [int((level < k).sum()) for k in range(6)] + [n_ids]


@pytest.mark.parametrize("n_ids", [511, 512, 513])
def test_groups_stay_inside_their_memory(n_ids, device, monkeypatch):
    """Every allocation lies between margins, which stay as they are."""
    empty, buffers = torch.empty, []

    def allocated(*shape, **options):
        buffers.append(empty(torch.Size(shape).numel() + 64, **options).fill_(-7))
        return buffers[-1][32:-32].view(shape)

    def new_empty(tensor, size, **options):
        return allocated(size, **{"dtype": tensor.dtype, "device": tensor.device, **options})

    case = make_case(SMALL, 30, n_ids, device=device)
    layout = case.layout
    monkeypatch.setattr(torch, "empty", allocated)
    monkeypatch.setattr(torch, "empty_like", lambda tensor: new_empty(tensor, tensor.numel()))
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    groups = group_by_level(case.ids, layout)
    assert groups.level_begin[-1] == n_ids and len(buffers) >= 5
    for buffer in buffers:
        assert (buffer[:32] == -7).all() and (buffer[-32:] == -7).all()


@pytest.mark.parametrize(
    "sizes, dtype, run",
    launched([*LAYOUTS, *OTHERS]),
    indirect=["run"],
    ids=name,
)
def test_against_the_definition(sizes, dtype, run, device, nan_empty):
    case = make_case(sizes, 40, 100 if sizes[-1] <= 128 else 30, dtype, device)
    out = looked_up(case, run)
    assert_matches(out, reference(case, torch.float64), reference(case, dtype), name="output")
    assert torch.equal(out, looked_up(case, run))
    largest = case.module.sizes_of(case.ids) == sizes[-1]
    rows = [case.module.arena.read(i) for i in case.ids[largest].tolist()]
    assert torch.equal(out[largest], torch.stack(rows))


@pytest.mark.parametrize("sizes, dtype, run", launched(tiled()), indirect=["run"], ids=name)
def test_sizes_that_fill_a_block(sizes, dtype, run, device, nan_empty):
    case = make_case(sizes, 20, 40, dtype, device)
    out = looked_up(case, run)
    assert_matches(out, reference(case, torch.float64), reference(case, dtype), name="output")


@pytest.mark.parametrize("n_ids", [15, 16, 17, 32, 33])
def test_ids_that_fill_a_block(n_ids, run, device, nan_empty):
    """So many ids altogether, and so many of every level."""
    for dtype in (torch.float32, torch.float64) if run.grouped else (torch.float32,):
        case = make_case(FILLED[0], 4 * n_ids, 0, dtype, device)
        order = torch.randperm(4 * n_ids, device=device)
        for ids in (order[:n_ids], order):
            part = with_ids(case, ids)
            out = looked_up(part, run)
            exact, eager = reference(part, torch.float64), reference(part, dtype)
            assert_matches(out, exact, eager, name=f"output, {ids.numel()} ids")


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=name)
@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_unused_levels_and_index_widths(mix, index, run, device, nan_empty):
    case = make_case(PAPER, 30, 50, device=device, mix=mix)
    storage, chain = (t.detach() for t in case.leaves())
    composed = compose(chain, case.module.sizes)
    layout = replace(case.layout, row_start=case.layout.row_start.to(index))
    out = run(case.ids.to(index), storage, composed, layout)
    assert_matches(
        out, reference(case, torch.float64), reference(case, torch.float32), name="output"
    )


def test_more_tiles_than_programs(device, monkeypatch, nan_empty):
    """Programs go on across levels and miss no tile, whatever their number."""
    case = make_case(PAPER, 60, 500, device=device, mix=(5, 1, 0, 1, 0, 3))
    expected = looked_up(case, lookup_file.launch_fwd)
    for programs in (1, 2, 3, 7, 19, 64):
        choice = launch.GroupedConfig(16, 16, 32, 4, programs)
        monkeypatch.setattr(launch, "choose_fwd_grouped", lambda *_, choice=choice: choice)
        out = torch.full_like(expected, float("nan"))
        looked_up(case, lambda *a, out=out: lookup_file.launch_grouped(out, *a[:-1]))
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16], ids=name)
def test_output_of_another_dtype(out_dtype, run, device, nan_empty):
    case = make_case(PAPER, 40, 60, device=device)
    out = looked_up(case, run, out_dtype)
    eager = reference(case, torch.float32).to(out_dtype)
    assert_matches(out, reference(case, torch.float64), eager, name="output")


def test_output_into_given_memory(device):
    case = make_case(SMALL, 20, 30, device=device)
    storage, chain = (t.detach() for t in case.leaves())
    operands = (case.ids, storage, compose(chain, SMALL), case.layout)
    buffer = torch.full((32, 8), float("nan"), dtype=torch.float16, device=device)
    out = lookup_file.launch_fwd(*operands, out=buffer[1:-1])
    assert out.data_ptr() == buffer[1].data_ptr()
    assert buffer[0].isnan().all() and buffer[-1].isnan().all()
    expected = lookup_file.launch_fwd(*operands, out_dtype=torch.float16)
    assert expected.dtype == torch.float16 and torch.equal(out, expected)


def test_ids_that_do_not_exist_give_zeros(run, device, nan_empty, unasserted):
    case = make_case(SMALL, 12, 0, device=device)
    case.module.arena.free(torch.tensor([4], device=device))
    ids = torch.tensor([-1, 12, 3, 4, -(2**40), 2**40, 5, 13, 3], device=device)
    exists = (ids >= 0) & (ids < 12) & (ids != 4)
    out = looked_up(with_ids(case, ids), run)
    assert not out[~exists].any()
    assert torch.equal(out[exists], looked_up(with_ids(case, ids[exists]), run))
    assert out[exists].any(dim=1).all()


@pytest.mark.parametrize("sizes", [PAPER, ODD, (127, 130)], ids=name)
def test_nothing_is_read_beside_the_rows(sizes, run, device, nan_empty):
    case = with_ids(make_case(sizes, 40, 0, device=device), torch.arange(0, 40, 3).repeat(2))
    expected = looked_up(case, run)
    poison_unused(case.module, case.ids)
    out = looked_up(case, run)
    assert out.isfinite().all() and torch.equal(out, expected)


def test_only_launches_on_a_gpu_assert(device):
    options = group_file.assertions(torch.zeros(1, device=device))
    on_gpu = {"debug": True, "sanitize_overflow": False}
    assert options == (on_gpu if device.type == "cuda" else {})


@pytest.mark.cuda
@pytest.mark.parametrize("grouped", [False, True], ids=["small", "grouped"])
def test_ids_out_of_range_fail_an_assertion(grouped):
    """In a process of its own: a failed assertion leaves CUDA unusable."""
    script = f"""
import torch
from esapn_kernels.gpu import launch
from esapn_kernels.gpu.lookup_fwd import launch_fwd
from esapn_kernels.ops.layout import Layout
launch.groups_ids = lambda *_: {grouped}
row_start, page_level = torch.tensor([0, 2]).cuda(), torch.zeros(1, dtype=torch.int8).cuda()
layout = Layout(row_start, page_level, (2, 4), 4)
operands = torch.zeros(4, device="cuda"), torch.zeros(3, 4, device="cuda"), layout
launch_fwd(torch.tensor([0, 1], device="cuda"), *operands)
torch.cuda.synchronize()
print("in range", flush=True)
launch_fwd(torch.tensor([0, 2], device="cuda"), *operands)
torch.cuda.synchronize()
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "in range" in run.stdout and run.returncode != 0
    assert "index out of range in self" in run.stdout + run.stderr


def test_ids_with_a_stride(device):
    case = make_case(SMALL, 20, 30, device=device)
    strided = case.ids.repeat_interleave(2)[::2]
    assert not strided.is_contiguous()
    expected = looked_up(case, lookup_file.launch_fwd)
    assert torch.equal(looked_up(with_ids(case, strided), lookup_file.launch_fwd), expected)


def test_large_batches_group(backend, device, monkeypatch):
    """The public function through the choice, forward and backward."""
    calls = []

    def grouped(*args):
        calls.append(args)
        return LAUNCHERS["grouped"](*args)

    case = make_case(SMALL, 20, 50, device=device)
    expected = case.run(backend)
    monkeypatch.setattr(launch, "groups_ids", lambda *_: True)
    monkeypatch.setattr(lookup_file, "launch_grouped", grouped)
    actual = case.run(backend)
    assert len(calls) == (backend == "triton")
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)


def test_rows_beyond_two_billion_elements(run, device):
    """int64 row starts: the storage's tail lies past every 32-bit offset."""
    sizes, page, half = (3, 8), 8, 2**31
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 6 GiB of GPU memory")
    # On Linux only the pages that are touched take memory.
    storage = torch.empty(half + 2 * page, dtype=torch.float16, device=device)
    page_level = torch.zeros(storage.numel() // page, dtype=torch.int8, device=device)
    page_level[-1] = 1
    row_start = torch.tensor([half, half + 3, half + page, 0], device=device)
    storage[-2 * page :] = torch.arange(2 * page, dtype=torch.float16)
    storage[:page] = 1
    chain = torch.randn(chain_numel(sizes), device=device).half()
    composed = compose(chain, sizes)
    ids = torch.tensor([2, 0, 3, 1, 2], device=device)
    out = run(ids, storage, composed, Layout(row_start, page_level, sizes, page))
    rows = {0: storage[half : half + 3], 1: storage[half + 3 : half + 6], 3: storage[:3]}
    last = storage[half + page :]
    for i, y in zip(ids.tolist(), out, strict=True):
        if i == 2:
            assert torch.equal(y, last)
        else:
            expected = rows[i].float() @ composed[:-1] + composed[-1]
            torch.testing.assert_close(y.float(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("sizes", [(2, 4, 8, 16, 64, 128), (1, 3, 5, 33)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_hops_are_composed_by_the_launch_that_counts(sizes, dtype, device, nan_empty):
    case = make_case(sizes, 30, 700, dtype, device)
    chain = case.module.chain.detach()
    composed = empty_composed(chain, sizes)
    found = group_by_level(case.ids, case.layout, (chain, composed))
    assert torch.equal(composed, launch_compose(chain, sizes))
    plain = group_by_level(case.ids, case.layout)
    for part in ("order", "start", "level_begin"):
        assert torch.equal(getattr(found, part), getattr(plain, part))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("n_ids", [0, 40])
def test_a_grouped_lookup_composes_in_no_launch_of_its_own(n_ids, train, device, monkeypatch):
    case = make_case(SMALL, 9, n_ids, torch.float64, device, backend="triton")
    names, launched = [], backend_file.launch_kernel

    def note(kernel, *args, **known):
        names.append(kernel.__name__)
        launched(kernel, *args, **known)

    for file in (compose_file, group_file, lookup_file):
        monkeypatch.setattr(file, "launch_kernel", note)
    case.module.chain.requires_grad_(train)
    with torch.set_grad_enabled(train):
        out = case.module(case.ids)
    counts = ["_group_count_kernel", "_group_place_kernel", "_lookup_grouped_kernel"]
    assert names == (counts if n_ids else ["_compose_kernel"])
    assert_matches(out.detach(), case.expected()[0], case.expected()[0], name="output")


def test_a_table_without_pages(device):
    """Every row was given back, and the memory with them: outputs and gradients are zeros."""
    module = ResizableEmbedding(
        10, sizes=(2, 4), backend="triton", dtype=torch.float64, device=device
    )
    ids = torch.arange(10, device=device)
    module.arena.free(ids)
    module.arena.compact()
    assert module.arena.storage.numel() == 0 and module.arena.layout.page_level.numel() == 0
    out = module(ids)
    out.sum().backward()
    assert not out.any() and not module.chain.grad.any()
