"""module.py: ResizableEmbedding beside nn.Embedding, its refusals, and its honest memory."""

import copy
import gc
import io
import pickle

import pytest
import torch
from torch import nn

from esapn_kernels import ResizableEmbedding
from esapn_kernels.reference import lookup_reference
from esapn_kernels.testing import assert_matches, make_case
from tests.kernels.layouts import ODD, PAPER, SMALL


def state_of(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def assert_same_state(module, before):
    after = module.state_dict()
    assert after.keys() == before.keys()
    for key, value in after.items():
        assert torch.equal(value, before[key]), key


def mixed(n_rows=20, sizes=SMALL, **options):
    return make_case(sizes, n_rows, 0, **options).module


# ---- beside nn.Embedding ---------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 8, 33])
def test_one_size_is_an_embedding_bit_for_bit(dim, backend, device):
    torch.manual_seed(3)
    plain = nn.Embedding(50, dim, device=device)
    torch.manual_seed(3)
    ours = ResizableEmbedding(50, sizes=(dim,), backend=backend, device=device)
    ids = torch.tensor([[3, 3, 0], [49, 3, 7]], device=device)
    adams = [torch.optim.Adam(m.parameters(), lr=0.1) for m in (plain, ours)]
    for step in range(5):
        grad_out = torch.randn(2, 3, dim).to(device)
        for module, adam in zip((plain, ours), adams, strict=True):
            adam.zero_grad()
            out = module(ids)
            out.backward(grad_out)
        assert torch.equal(plain(ids), ours(ids)), step
        assert torch.equal(plain.weight.grad, ours.weight.grad), step
        for adam in adams:
            adam.step()
        assert torch.equal(plain.weight, ours.weight), step


def test_embedding_dim_gives_the_sizes_below_it():
    assert ResizableEmbedding(3).sizes == PAPER
    assert ResizableEmbedding(3, 20).sizes == (2, 4, 8, 16, 20)
    assert ResizableEmbedding(3, 16).sizes == (2, 4, 8, 16)
    assert ResizableEmbedding(3, 1).sizes == (1,)
    assert ResizableEmbedding(3, 8, sizes=(3, 8)).embedding_dim == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_to_embedding_gives_the_same_outputs(dtype, backend, device):
    module = mixed(sizes=ODD, dtype=dtype, backend=backend, device=device)
    plain = module.to_embedding()
    ids = torch.arange(20, device=device).view(4, 5)
    assert plain.weight.shape == (20, 33) and plain.weight.dtype == dtype
    assert plain.weight.requires_grad
    assert torch.equal(plain(ids.flatten()), module(ids.flatten()))
    module.requires_grad_(False)
    assert not module.to_embedding().weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_to_another_dtype(dtype, backend, device):
    module = mixed(sizes=ODD, backend=backend, device=device)
    identity, ids = module.arena.storage, torch.arange(20, device=device)
    before = module(ids).detach()
    module = module.double() if dtype == torch.float64 else module.to(dtype)
    assert module.arena.storage is identity and module.chain.dtype == dtype
    assert module.arena.row_start.dtype == torch.int32
    out = module(ids)
    assert out.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float64 else 2e-2
    torch.testing.assert_close(out.double(), before.double(), rtol=tolerance, atol=tolerance)
    out.sum().backward()
    module.promote(ids)
    assert module.arena.storage.grad.dtype == dtype
    module(ids).sum().backward()


def test_backends_agree(device):
    ids = torch.tensor([[3, 19], [3, 0]], device=device)
    modules = [mixed(backend=b, device=device) for b in ("auto", "torch", "triton", "reference")]
    for _ in range(3):
        outputs = [m(ids).detach() for m in modules]
        for out in outputs[1:]:
            torch.testing.assert_close(out, outputs[0], rtol=1e-5, atol=1e-5)
        for module in modules:
            module.promote(ids)
    assert {tuple(m.sizes_of(ids).flatten().tolist()) for m in modules} == {(8, 8, 8, 8)}


# ---- sizes -----------------------------------------------------------------------------------


def test_initial_sizes(device):
    assert ResizableEmbedding(4, sizes=(2, 4), device=device).sizes_of().tolist() == [2] * 4
    whole = ResizableEmbedding(4, sizes=(2, 4), initial_size=4, device=device)
    assert whole.sizes_of().tolist() == [4] * 4
    for dtype in (torch.int32, torch.int64, torch.uint8):
        wanted = torch.tensor([4, 2, 2, 4], dtype=dtype)
        some = ResizableEmbedding(4, sizes=(2, 4), initial_size=wanted, device=device)
        assert some.sizes_of().tolist() == [4, 2, 2, 4]
    ids = torch.tensor([[0, 1]], device=device)
    assert some.sizes_of(ids).tolist() == [[4, 2]]


def test_initial_numbers():
    torch.manual_seed(0)
    module = ResizableEmbedding(20_000, sizes=(2, 64), init_std=0.5, init="linear")
    rows = module.arena.storage[: 20_000 * 2].detach()
    assert abs(float(rows.std()) - 0.5) < 0.01 and abs(float(rows.mean())) < 0.01
    assert module.chain.abs().max() <= 1 / 2**0.5
    assert module.chain.abs().max() > 0.6
    before = module.arena.storage.detach().clone()
    module.reset_parameters()
    assert not torch.equal(module.arena.storage, before)


def test_resize_goes_hop_by_hop(backend, device):
    module = mixed(sizes=ODD, backend=backend, device=device)
    if device.type == "cuda":
        # Else the arena grows by what the host has heard of it, which no two runs hear alike.
        module.reserve(200)
    other = copy.deepcopy(module)
    ids = torch.arange(0, 20, 2, device=device)
    ids = ids[module.sizes_of(ids) <= 3]
    before = module(ids).detach()
    module.resize(ids, 3)
    for _ in range(2):
        other.promote(ids, other.sizes_of(ids) < 3)
    assert module.sizes_of(ids).tolist() == [3] * len(ids)
    assert_same_state(module, state_of(other))
    torch.testing.assert_close(module(ids), before, rtol=1e-5, atol=1e-5)
    module.resize(ids, 3)
    assert_same_state(module, state_of(other))


def drawn(module, seed):
    """The rows as one draw for every size gives them, in the order of ids."""
    arena, start = module.arena, module.arena.row_start[:-1]
    torch.manual_seed(seed)
    rows = torch.zeros_like(arena.storage)
    for k, dim in enumerate(module.sizes):
        at = start[arena.level() == k].long()[:, None] + torch.arange(dim)
        rows[at] = torch.empty(len(at), dim, dtype=rows.dtype).normal_(0.0, module.init_std)
    if module.padding_idx is not None:
        first = int(start[module.padding_idx])
        rows[first : first + module.sizes[-1]] = 0
    return rows


@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [SMALL, ODD, (127, 130)], ids=str)
@pytest.mark.parametrize("n", [1, 17, 300_000])
def test_draws(n, sizes, dtype, padding_idx):
    """One for every size, whether rows lie side by side or not."""
    if n > 1000 and sizes[0] > 100:
        n = 1000
    padding_idx = None if n < 4 else padding_idx
    mixed = torch.tensor(sizes)[torch.arange(n) * 7 % 5 % len(sizes)]
    for size in (None, sizes[-1], mixed):
        torch.manual_seed(5)
        module = ResizableEmbedding(
            n, sizes=sizes, initial_size=size, dtype=dtype, padding_idx=padding_idx, init_std=0.3
        )
        assert torch.equal(module.arena.storage, drawn(module, 5))
    module.promote(torch.arange(0, n, 3))
    module.arena.free(torch.arange(1, n, 4))
    torch.manual_seed(6)
    module.reset_parameters()
    assert torch.equal(module.arena.storage, drawn(module, 6))


# ---- refusals --------------------------------------------------------------------------------

IDS = torch.tensor([1, 2])
MISUSES = {
    "forward-above": (lambda m: m(torch.tensor([20])), IndexError),
    "forward-negative": (lambda m: m(torch.tensor([0, -1])), IndexError),
    "forward-float": (lambda m: m(torch.tensor([1.0])), RuntimeError),
    "forward-list": (lambda m: m([1, 2]), TypeError),
    "promote-above": (lambda m: m.promote(torch.tensor([0, 20])), IndexError),
    "promote-negative": (lambda m: m.promote(torch.tensor([0, -1])), IndexError),
    "promote-float": (lambda m: m.promote(torch.tensor([1.0])), RuntimeError),
    "promote-list": (lambda m: m.promote([1]), TypeError),
    "mask-shape": (lambda m: m.promote(IDS, torch.tensor([True])), ValueError),
    "mask-dtype": (lambda m: m.promote(IDS, torch.tensor([1, 0])), ValueError),
    "mask-list": (lambda m: m.promote(IDS, [True, False]), TypeError),
    "resize-unknown": (lambda m: m.resize(IDS, 5), ValueError),
    "demote-above": (lambda m: m.demote(torch.tensor([0, 20])), IndexError),
    "demote-mask-shape": (lambda m: m.demote(IDS, torch.tensor([True])), ValueError),
    "resize-above": (lambda m: m.resize(torch.tensor([20]), 8), IndexError),
    "resize-list": (lambda m: m.resize([1], 8), TypeError),
    "sizes-of-above": (lambda m: m.sizes_of(torch.tensor([20])), IndexError),
    "sizes-of-negative": (lambda m: m.sizes_of(torch.tensor([-1])), IndexError),
}


@pytest.mark.parametrize("call, error", MISUSES.values(), ids=MISUSES.keys())
def test_misuse_raises_and_changes_nothing(call, error):
    module = mixed()
    before = state_of(module)
    with pytest.raises(error) as caught:
        call(module)
    assert str(caught.value) and "\n" not in str(caught.value)
    assert_same_state(module, before)


BAD_ARGUMENTS = {
    "not-increasing": {"sizes": (4, 2)},
    "twice": {"sizes": (2, 2)},
    "more-levels-than-int8-has": {"sizes": tuple(range(1, 130))},
    "zero": {"sizes": (0, 2)},
    "negative": {"sizes": (-1, 2)},
    "empty": {"sizes": ()},
    "bool": {"sizes": (True, 2)},
    "float": {"sizes": (1.5, 2)},
    "embedding-dim": {"sizes": (2, 4), "embedding_dim": 8},
    "embedding-dim-negative": {"embedding_dim": -1},
    "zero-of-several": {"sizes": (0, 2)},
    "backend": {"sizes": (2, 4), "backend": "cuda"},
    "initial-size": {"sizes": (2, 4), "initial_size": 3},
    "initial-sizes": {"sizes": (2, 4), "initial_size": torch.tensor([2, 4, 3])},
    "initial-sizes-above": {"sizes": (2, 4), "initial_size": torch.tensor([2, 4, 8])},
    "initial-sizes-short": {"sizes": (2, 4), "initial_size": torch.tensor([2, 4])},
}


@pytest.mark.parametrize("arguments", BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_bad_arguments(arguments):
    with pytest.raises(ValueError) as caught:
        ResizableEmbedding(**{"num_embeddings": 3, **arguments})
    assert str(caught.value) and "\n" not in str(caught.value)


# ---- memory ----------------------------------------------------------------------------------


def test_a_million_small_rows_take_a_twentieth():
    report = ResizableEmbedding(1_000_000).memory_report()
    assert report.payload == 1_000_000 * 2 * 4
    assert report.fixed == 1_000_000 * 128 * 4
    assert report.serving <= 0.05 * report.fixed
    assert report.ratio == report.serving / report.fixed
    assert report.rows_per_size == {2: 1_000_000, 4: 0, 8: 0, 16: 0, 64: 0, 128: 0}
    assert "1,000,000" in str(report) and f"{report.serving:,}" in str(report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stage", ["new", "promoted", "compacted"])
def test_serving_bytes_are_those_of_the_tensors(stage, dtype, device):
    module = mixed(5000, PAPER, dtype=dtype, device=device)
    if stage != "new":
        module.promote(torch.arange(0, 5000, 2, device=device))
    if stage == "compacted":
        module.compact()
    report = module.memory_report()
    tensors = [*module.parameters(), *module.buffers()]
    assert report.serving == sum(t.untyped_storage().nbytes() for t in tensors)
    assert report.serving == sum(t.numel() * t.element_size() for t in tensors)
    sizes = module.sizes_of()
    assert report.payload == int(sizes.sum()) * dtype.itemsize
    assert report.rows_per_size == {d: int((sizes == d).sum()) for d in PAPER}
    assert report.chain == 9604 * dtype.itemsize


def test_the_allocator_agrees():
    """What building the module leaves allocated, as torch's profiler counts it."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        module = ResizableEmbedding(10_000)
    events = profile.profiler.kineto_results.events()
    allocated = sum(e.nbytes() for e in events if e.name() == "[memory]")
    assert allocated == module.memory_report().serving


@pytest.mark.cuda
def test_the_cuda_allocator_agrees(device):
    gc.collect()  # what other tests left is not to go meanwhile
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    module = ResizableEmbedding(10_000, device=device)
    allocated = torch.cuda.memory_allocated() - before
    # The allocator rounds each of the ten tensors up to 512 bytes.
    tensors = [*module.parameters(), *module.buffers()]
    assert len(tensors) == 10 and all(t.device.type == "cuda" for t in tensors)
    assert 0 <= allocated - module.memory_report().serving <= len(tensors) * 512


# ---- copies and checkpoints --------------------------------------------------------------------


def through_deepcopy(module):
    return copy.deepcopy(module)


def through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def through_state_dict(module):
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh = ResizableEmbedding(20, sizes=module.sizes, initial_size=8)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


@pytest.mark.parametrize("through", [through_deepcopy, through_pickle, through_state_dict])
def test_copies_go_on_alone(through):
    module = mixed()
    ids = torch.arange(20)
    module.promote(ids[:7])
    other = through(module)
    assert_same_state(other, state_of(module))
    assert torch.equal(other(ids), module(ids))
    before, out = state_of(module), other(ids).detach()
    other.promote(ids)
    optimizer = torch.optim.Adam(other.parameters())
    torch.testing.assert_close(other(ids).detach(), out, rtol=1e-5, atol=1e-5)
    other(ids).sum().backward()
    optimizer.step()
    other.promote(ids)
    assert other.memory_report().optimizer > 0
    assert_same_state(module, before)
    assert module.memory_report().optimizer == 0


def test_loading_keeps_the_parameters_that_an_optimizer_holds():
    module, saved = mixed(), mixed(20, seed=1)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.arange(20)).sum().backward()
    optimizer.step()
    saved.promote(torch.arange(20))
    storage = module.arena.storage
    module.load_state_dict(saved.state_dict())
    assert module.arena.storage is storage
    module(torch.arange(20)).sum().backward()
    optimizer.step()
    assert not torch.equal(module(torch.arange(20)), saved(torch.arange(20)))


@pytest.mark.parametrize("n_rows", [0, 1])
def test_tiny_tables(n_rows, backend, device):
    module = ResizableEmbedding(n_rows, sizes=SMALL, backend=backend, device=device)
    ids = torch.arange(n_rows, device=device)
    module(ids).sum().backward()
    module.promote(ids)
    module.promote(ids)
    module.compact()
    assert module(ids).shape == (n_rows, 8)
    assert module.to_embedding().weight.shape == (n_rows, 8)
    report = module.memory_report()
    assert report.rows_per_size == {2: 0, 3: 0, 8: n_rows} and report.payload == 32 * n_rows
    assert report.ratio == (report.serving / 32 if n_rows else 0.0)


def test_ids_without_a_row_are_reported():
    module = mixed(6, (2, 4))
    module.arena.free(torch.tensor([0]))
    assert int(module.sizes_of()[0]) == 0
    assert sum(module.memory_report().rows_per_size.values()) == 5


def test_hundred_promotions_in_training_stay_exact(device):
    """A stream in the paper's manner: train a little, promote a little, compact now and then."""
    module = mixed(200, device=device)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    every = torch.arange(200, device=device)
    for step in range(40):
        ids = torch.randint(200, (16,), device=device)
        loss = module(ids).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        before = module(every).detach()
        module.promote(ids[:5])
        if step % 10 == 9:
            module.compact()
        torch.testing.assert_close(module(every).detach(), before, rtol=1e-5, atol=1e-5)
    arena = module.arena
    exact, eager = (
        lookup_reference(
            every,
            arena.storage.detach().to(dtype),
            module.chain.detach().to(dtype),
            *arena.layout.flat,
        )
        for dtype in (torch.float64, torch.float32)
    )
    assert_matches(module(every).detach(), exact, eager, name="after the stream")


@pytest.mark.large
@pytest.mark.cuda
def test_more_than_int32_elements(device):
    """Past 2^31 elements locations are int64 and nothing overflows."""
    n_rows = (1 << 31) // 128 + 64
    module = ResizableEmbedding(n_rows, sizes=(2, 128), initial_size=128, device=device)
    assert module.arena.row_start.dtype == torch.int64
    ids = torch.tensor([0, n_rows - 1, n_rows // 2, n_rows - 1], device=device)
    rows = torch.stack([module.arena.read(i) for i in ids.tolist()])
    out = module(ids)
    assert torch.equal(out, rows)
    out.sum().backward()
    start = int(module.arena.row_start[n_rows - 1])
    assert (module.arena.storage.grad[start : start + 128] == 2).all()
