"""What only a GPU shows: races, graphs, no synchronisations, equal bits, 64-bit places.

The tests for races run interpreted too, in small, where they show that they find no fault in what
is right.
"""

import copy
import itertools
from collections.abc import Iterator

import pytest
import torch

from esapn_kernels import ResizableEmbedding, optim
from esapn_kernels.ops.backend import TRITON_ERROR
from esapn_kernels.testing import make_case

SIZES = (2, 4, 8, 16, 64, 128)
on_a_gpu = pytest.mark.cuda


def mixed(n_rows: int = 5000, device: str = "cuda") -> ResizableEmbedding:
    sizes = torch.tensor(SIZES)[torch.arange(n_rows) % len(SIZES)]
    return ResizableEmbedding(n_rows, initial_size=sizes, device=device, backend="triton")


def batches(n_ids: int, n_rows: int, device: str = "cuda") -> Iterator[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    while True:
        ids = torch.randint(n_rows, (n_ids,), generator=generator)
        grad = torch.randn(n_ids, SIZES[-1], generator=generator)
        grow = torch.randint(n_rows, (n_ids // 10,), generator=generator)
        yield ids.to(device), grad.to(device), grow.to(device)


@pytest.fixture
def raced(device) -> tuple[ResizableEmbedding, torch.Tensor, torch.Tensor, int]:
    """A table, every id once in random order, a large gradient, and how often to try."""
    if TRITON_ERROR is not None:
        pytest.skip(TRITON_ERROR)
    n_ids, repeats = (1 << 20, 50) if device.type == "cuda" else (150, 2)
    grad = 1e4 * torch.randn(n_ids, SIZES[-1], device=device)
    return mixed(n_ids, device.type), torch.randperm(n_ids, device=device), grad, repeats


def test_no_moment_of_adam_is_stale(raced):
    """All warps of a program read a row's last step before one of them writes it.

    Moments of 1e6 that were last stepped 5,000 steps ago must be gone. A warp that reads the step
    of now keeps them whole.
    """
    module, ids, grad, repeats = raced
    rows = optim.Adam(module, lr=0.0)
    state = rows.state[module.arena.storage]
    elements = int(module.sizes_of().sum())
    for _ in range(repeats):
        state["exp_avg"].fill_(1e6)
        state["exp_avg_sq"].zero_()
        state["last_step"].fill_(1)
        state["clock"].copy_(torch.tensor([5000.0, 0.0, 0.0], dtype=torch.float64))
        module(ids).backward(grad)
        moment = state["exp_avg"]
        assert int((moment.abs() < 5e5).sum()) == elements
        assert int((moment == 1e6).sum()) == moment.numel() - elements


def test_rowwise_adagrad_steps_alike_every_time(raced):
    """All warps of a program read a row's sum before one of them writes it.

    A warp that reads the sum of now adds the gradient's square to it a second time.
    """
    module, ids, grad, repeats = raced
    rows = optim.Adagrad(module, lr=1.0, eps=1.0, rowwise=True)
    state = rows.state[module.arena.storage]
    first = None
    for _ in range(repeats):
        module.arena.storage.data.zero_()
        state["sum"].zero_()
        module(ids).backward(grad)
        found = module.arena.storage.detach().clone(), state["sum"].clone()
        first = found if first is None else first
        assert bool(first[0].any()) and all(map(torch.equal, found, first))


def test_rowwise_adam_steps_alike_every_time(raced):
    """So it is with a row, its second moment and its last step, under every setting."""
    module, ids, grad, repeats = raced
    clips = {"clip_value": 1e4, "clip_row_norm": 1e4}
    rows = optim.Adam(module, lr=1.0, rowwise=True, weight_decay=0.5, **clips)
    state = rows.state[module.arena.storage]
    first = None
    for _ in range(repeats):
        module.arena.storage.data.fill_(1.0)
        for held in (state["exp_avg"], state["exp_avg_sq"]):
            held.fill_(1e3)
        state["last_step"].fill_(1)
        state["clock"].copy_(torch.tensor([3.0, 0.9**3, 0.999**3], dtype=torch.float64))
        module(ids).backward(grad)
        found = module.arena.storage.detach().clone(), *(held.clone() for held in state.values())
        first = found if first is None else first
        assert bool(first[0].any()) and all(map(torch.equal, found, first))


@on_a_gpu
@pytest.mark.parametrize("deferred", [False, True], ids=["immediate", "deferred"])
@pytest.mark.parametrize("n_ids", [500, 200_000], ids=["small", "grouped"])
def test_no_step_synchronises(n_ids, deferred, no_waiting):
    module = mixed()
    rows = optim.Adam(module, lr=0.01, deferred=deferred)
    # Drawn before: a batch from pageable memory is waited for.
    drawn = list(itertools.islice(batches(n_ids, 5000), 12))

    def step(ids, grad, grow):
        for part in (1, 2) if deferred else (1,):
            module(ids).backward(grad / part)
        rows.step()
        rows.zero_grad()
        module.promote(grow)

    for batch in drawn[:2]:  # kernels are compiled and the allocator is warm
        step(*batch)
    with no_waiting():
        for batch in drawn[2:]:
            step(*batch)
    assert module.arena.level().float().mean() > 2.5


@on_a_gpu
@pytest.mark.parametrize("n_ids", [500, 200_000], ids=["small", "grouped"])
def test_a_whole_step_in_a_graph(n_ids):
    """Forward, backward, update and promotion: captured once, replayed with other ids."""
    module = mixed()
    module.reserve(20 * (n_ids // 10))
    stream = batches(n_ids, 5000)
    ids, grad, grow = next(stream)
    rows = optim.Adam(module, lr=0.01)

    def step() -> torch.Tensor:
        module.chain.grad = None
        out = module(ids)
        out.backward(grad)
        moved = module.promote(grow)
        return out.detach(), moved, module.chain.grad

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    twin = copy.deepcopy(module)
    twin_rows = optim.Adam(twin, lr=0.01)
    twin_rows.load_state_dict(rows.state_dict())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for _ in range(4):
        for held, fresh in zip((ids, grad, grow), next(stream), strict=True):
            held.copy_(fresh)
        graph.replay()
        twin.chain.grad = None
        expected = twin(ids)
        expected.backward(grad)
        moved = twin.promote(grow)
        assert torch.equal(results[0], expected)
        assert torch.equal(results[1], moved)
        torch.testing.assert_close(results[2], twin.chain.grad, rtol=1e-4, atol=1e-4)
    assert torch.equal(module.sizes_of(), twin.sizes_of())


@on_a_gpu
@pytest.mark.parametrize("init", ["isometric", "tails"])
def test_no_demotion_synchronises(init, no_waiting):
    module = ResizableEmbedding(5000, initial_size=SIZES[-1], init=init, device="cuda")
    ids = torch.arange(5000, device="cuda")
    module.demote(ids[:9])  # kernels are compiled and the allocator is warm
    with no_waiting():
        for step in range(2, len(SIZES) + 1):
            module.demote(ids, ids % step == 0)
    assert module.sizes_of().unique().numel() == len(SIZES)


@on_a_gpu
def test_a_demotion_in_a_graph():
    """Captured once, replayed with other ids and another chain."""
    module = ResizableEmbedding(5000, initial_size=SIZES[-1], device="cuda")
    module.reserve(20_000)
    ids = torch.arange(1000, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        module.demote(ids)
    torch.cuda.current_stream().wait_stream(side)
    twin = copy.deepcopy(module)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        moved = module.demote(ids)
    for _ in range(4):
        ids.copy_(torch.randint(5000, (1000,), device="cuda"))
        for each in (module, twin):
            each.chain.data.mul_(1.1)
        graph.replay()
        assert torch.equal(moved, twin.demote(ids))
    every = torch.arange(5000, device="cuda")
    assert torch.equal(module.sizes_of(), twin.sizes_of())
    torch.testing.assert_close(module(every), twin(every))


@on_a_gpu
@pytest.mark.parametrize("traffic", ["uniform", "zipf"])
def test_equal_bits_over_20_runs(traffic):
    mix = (1, 10, 17, 29, 21, 51)
    case = make_case(SIZES, 138_493, 1 << 20, device="cuda", traffic=traffic, mix=mix)
    first = case.run("triton")
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(first, case.run("triton"), strict=True))


@on_a_gpu
@pytest.mark.large
def test_more_than_2_31_elements():
    n_rows = 2**31 // SIZES[-1] + 1000
    module = ResizableEmbedding(
        n_rows, initial_size=SIZES[-1], device="cuda", dtype=torch.float16, init_std=0.1
    )
    assert module.arena.storage.numel() > 2**31
    optim.SGD(module, lr=0.5)
    ids = torch.tensor([0, n_rows - 1, n_rows // 2, n_rows - 1], device="cuda")
    before = torch.stack([module.arena.read(int(i)) for i in ids])
    out = module(ids)
    assert torch.equal(out, before)
    out.backward(torch.ones_like(out))
    after = torch.stack([module.arena.read(int(i)) for i in ids])
    step = torch.tensor([0.5, 1.0, 0.5, 1.0], device="cuda")[:, None]
    torch.testing.assert_close(after, (before.float() - step).half())
    assert torch.equal(module.arena.read(1), module(ids.new_tensor([1]))[0])
