"""lookup.py: every backend against the fp64 definition, and the kernels beyond their inputs."""

import pytest
import torch
from torch.nn import functional as F

from esapn_kernels.gpu import lookup_fwd as lookup_file
from esapn_kernels.gpu.lookup_bwd import launch_bwd
from esapn_kernels.ops.compose import compose
from esapn_kernels.ops.lookup import lookup
from esapn_kernels.testing import (
    assert_matches,
    backward_bytes,
    lookup_bytes,
    make_case,
    poison_unused,
    row_elements,
)
from tests.kernels.layouts import FILLED, LAYOUTS, ODD, PAPER, SMALL, TINY, compared, name, tiled

KERNELS = [*LAYOUTS, ((1,), torch.float32), ((7,), torch.float32), ((3,), torch.float64)]
PARTS = ("output", "storage gradient", "chain gradient")


def check(case, backend):
    """Output and both gradients of ``backend`` against the definition; returns what it gave."""
    actual = case.run(backend)
    exact, eager = case.expected(), case.expected(case.hops.dtype)
    for part, a, x, e in zip(PARTS, actual, exact, eager, strict=True):
        assert_matches(a, x, e, name=f"{part} of {backend}")
    return actual


def with_ids(case, ids):
    """The same rows under other ids."""
    ids = torch.as_tensor(ids, device=case.ids.device)
    grad_out = torch.randn(*ids.shape, case.module.embedding_dim).to(case.grad_out)
    return type(case)(case.module, ids, grad_out)


@pytest.mark.parametrize("sizes, dtype, backend", compared(KERNELS), indirect=["backend"], ids=name)
def test_against_the_definition(sizes, dtype, backend, device, nan_empty):
    case = make_case(sizes, 30, 40 if sizes[-1] <= 128 else 20, dtype, device)
    out, grad_storage, grad_chain = check(case, backend)
    again = case.run(backend)
    assert torch.equal(out, again[0])
    assert torch.equal(grad_storage, again[1]) and torch.equal(grad_chain, again[2])
    unused = ~row_elements(case.module, case.ids)
    assert not grad_storage[unused].any()
    largest = case.module.sizes_of(case.ids) == sizes[-1]
    rows = torch.stack([case.module.arena.read(i) for i in case.ids[largest].tolist()])
    assert torch.equal(out[largest], rows)


@pytest.mark.parametrize(
    "sizes, dtype",
    # The last: one number more than whole blocks of the gradient.
    [*tiled(FILLED[:3]), ((33, 65), torch.float64)],
    ids=name,
)
def test_sizes_that_fill_a_block(sizes, dtype, device, nan_empty):
    check(make_case(sizes, 8, 9, dtype, device), "triton")


ID_CASES = {
    "one": [4],
    "same-100-times": [7] * 100,
    "first-and-last": [0, 29],
    "17-distinct": list(range(29, 12, -1)),
    "2-d": [[3, 1, 3], [0, 29, 3]],
    "0-d": 5,
}


@pytest.mark.parametrize("ids", ID_CASES.values(), ids=ID_CASES.keys())
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=name)
def test_ids(ids, index, backend, device, nan_empty):
    case = with_ids(make_case(SMALL, 30, 0, device=device), torch.tensor(ids, dtype=index))
    out, _, _ = check(case, backend)
    assert out.shape == (*case.ids.shape, 8)


def test_one_id_a_thousand_times(backend, device, nan_empty):
    case = with_ids(make_case(SMALL, 30, 0, device=device), [7] * 1000)
    check(case, backend)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)], ids=str)
def test_no_ids(shape, backend, device):
    case = with_ids(make_case(SMALL, 5, 0, device=device), torch.zeros(shape, dtype=torch.long))
    out, grad_storage, grad_chain = case.run(backend)
    assert out.shape == (*shape, 8)
    assert grad_storage.shape == case.module.arena.storage.shape and not grad_storage.any()
    assert grad_chain.shape == case.hops.shape and not grad_chain.any()


@pytest.mark.parametrize(
    "mix", [(1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 0, 0)], ids=["unused", "middle", "last", "first"]
)
def test_unused_levels(mix, backend, device, nan_empty):
    case = make_case(SMALL, 20, 33, device=device, mix=mix)
    _, _, grad_chain = check(case, backend)
    if mix == (0, 0, 1):
        assert not grad_chain.any()


def test_non_contiguous_ids_and_gradients(backend, device):
    case = make_case(SMALL, 30, 0, device=device)
    ids = torch.arange(24, device=device).view(4, 6).t()[::2]
    assert not ids.is_contiguous()
    grad_out = torch.randn(8, 4, 3, device=device).permute(2, 1, 0)
    assert not grad_out.is_contiguous()
    check(type(case)(case.module, ids, grad_out), backend)


def test_expanded_gradient(backend, device):
    case = make_case(SMALL, 30, 25, device=device)
    storage, chain = case.leaves()
    lookup(case.ids, storage, chain, case.layout, backend=backend).sum().backward()
    ones = type(case)(case.module, case.ids, torch.ones_like(case.grad_out))
    _, grad_storage, grad_chain = check(ones, backend)
    assert torch.equal(storage.grad, grad_storage) and torch.equal(chain.grad, grad_chain)


@pytest.mark.parametrize("frozen", ["storage", "chain"])
def test_frozen_parameters(frozen, backend, device):
    case = make_case(SMALL, 30, 25, device=device)
    storage, chain = case.leaves()
    (storage if frozen == "storage" else chain).requires_grad_(False)
    out = lookup(case.ids, storage, chain, case.layout, backend=backend)
    out.backward(case.grad_out)
    _, grad_storage, grad_chain = case.run(backend)
    if frozen == "storage":
        assert storage.grad is None and torch.equal(chain.grad, grad_chain)
    else:
        assert chain.grad is None and torch.equal(storage.grad, grad_storage)


def test_no_grad(backend, device):
    case = make_case(SMALL, 30, 25, device=device)
    with torch.no_grad():
        out = lookup(case.ids, *case.leaves(), case.layout, backend=backend)
    assert not out.requires_grad and torch.equal(out, case.run(backend)[0])


@pytest.mark.parametrize("sizes", [PAPER, ODD, (127, 130)], ids=name)
def test_nothing_is_read_beside_the_rows(sizes, backend, device, nan_empty):
    case = make_case(sizes, 40, 0, device=device)
    # Every third row: its neighbours in the arena are NaN, and so is the slack.
    case = with_ids(case, torch.arange(0, 40, 3).repeat(2))
    expected = case.run(backend)
    poison_unused(case.module, case.ids)
    actual = case.run(backend)
    for part, a, e in zip(PARTS, actual, expected, strict=True):
        assert torch.equal(a, e), part
        assert a.isfinite().all(), part


def guarded(tensor, margin=64):
    """A copy of ``tensor`` between NaN margins, and the buffer that holds both."""
    buffer = tensor.new_full((tensor.numel() + 2 * margin,), float("nan"))
    inner = buffer[margin:-margin].view(tensor.shape)
    inner.copy_(tensor)
    return inner, buffer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
def test_kernels_ignore_ids_out_of_range(dtype, device, nan_empty, monkeypatch):
    # On a GPU an assertion would end the process first.
    monkeypatch.setattr(lookup_file, "assertions", lambda ids: {})
    case = make_case(ODD, 12, 0, dtype, device)
    ids = torch.tensor([-1, 12, 3, -(2**40), 2**40, 5, 13, 3], device=device)
    valid = (ids >= 0) & (ids < 12)
    case = with_ids(case, ids)
    storage, chain = case.leaves()
    storage, _ = guarded(storage.detach())
    composed = compose(chain.detach(), case.module.sizes)
    out = lookup_file.launch_fwd(ids, storage, composed, case.layout)
    grads = launch_bwd(case.grad_out, ids, storage, composed, case.layout)

    only = type(case)(case.module, ids[valid], case.grad_out[valid])
    expected_out, grad_storage, _ = only.run("triton")
    assert not out[~valid].any()
    assert torch.equal(out[valid], expected_out)
    # The gradient of ids that do not exist goes to no row at all.
    assert torch.equal(grads[0], grad_storage)
    expected = launch_bwd(only.grad_out, only.ids, storage, composed, case.layout)[1]
    torch.testing.assert_close(grads[1], expected, rtol=1e-5, atol=1e-5)


def test_kernels_give_zero_for_ids_without_a_row(device, nan_empty):
    case = make_case(SMALL, 6, 0, device=device)
    case.module.arena.free(torch.tensor([2], device=device))
    case = with_ids(case, [2, 3])
    out, grad_storage, _ = case.run("triton")
    assert not out[0].any() and out[1].any()
    alone = type(case)(case.module, case.ids[1:].clone(), case.grad_out[1:].clone())
    assert torch.equal(grad_storage, alone.run("triton")[1])


def test_outputs_stay_inside_their_memory(device, monkeypatch):
    """The launchers' allocations lie between NaN margins; the margins stay NaN."""
    buffers = []
    original, original_like = torch.Tensor.new_empty, torch.empty_like

    def allocated(tensor, shape, dtype):
        inner, buffer = guarded(torch.zeros(*shape, dtype=dtype, device=tensor.device))
        buffers.append(buffer)
        return inner

    def new_empty(self, *shape, **kwargs):
        dtype = kwargs.get("dtype") or self.dtype
        if set(kwargs) - {"dtype"} or not dtype.is_floating_point or not all(shape):
            return original(self, *shape, **kwargs)
        return allocated(self, shape, dtype)

    def empty_like(tensor, **kwargs):
        if kwargs or not tensor.is_floating_point() or not tensor.numel():
            return original_like(tensor, **kwargs)
        return allocated(tensor, tensor.shape, tensor.dtype)

    case = make_case(ODD, 12, 21, device=device)
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty_like", empty_like)
    check_out = case.run("triton")[0]
    # The output, sums of runs, partial sums of the chain, gradients of both its forms.
    assert check_out.isfinite().all() and len(buffers) >= 6
    for buffer in buffers:
        assert buffer[:64].isnan().all() and buffer[-64:].isnan().all()


@pytest.mark.parametrize("sizes", [TINY, (2, 5), (3,)], ids=name)
def test_gradcheck(sizes, backend, device):
    case = make_case(sizes, 6, 0, torch.float64, device)
    case = with_ids(case, [0, 1, 2, 3, 4, 5, 2, 2])
    storage, chain = case.leaves()
    elements = row_elements(case.module, case.ids).nonzero()[:, 0]

    def run(rows, chain):
        arena = storage.detach().index_put((elements,), rows)
        return lookup(case.ids, arena, chain, case.layout, backend=backend)

    rows = storage.detach()[elements].requires_grad_()
    assert torch.autograd.gradcheck(run, (rows, chain))


@pytest.mark.parametrize("n_ids", [0, 9], ids=["empty", "nine"])
def test_opcheck(n_ids, backend, device):
    case = make_case(SMALL, 12, n_ids, device=device)
    storage, chain = case.leaves()
    composed = compose(chain, case.module.sizes).detach()
    inputs = (case.ids, storage.detach(), composed, *case.layout.flat, backend)
    torch.library.opcheck(torch.ops.esapn_kernels.lookup_fwd.default, inputs)
    torch.library.opcheck(torch.ops.esapn_kernels.lookup_bwd.default, (case.grad_out, *inputs))


def test_compile(backend, device):
    case = make_case(SMALL, 12, 9, device=device, backend=backend)
    module = case.module
    step = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected, grad_storage, grad_chain = case.run(backend)
    out = step(case.ids)
    out.backward(case.grad_out)
    assert torch.equal(out, expected)
    assert torch.equal(module.arena.storage.grad, grad_storage)
    torch.testing.assert_close(module.chain.grad, grad_chain, rtol=1e-6, atol=1e-6)
    before = step(case.ids).detach()
    module.promote(case.ids[:4])
    torch.testing.assert_close(step(case.ids), before, rtol=1e-5, atol=1e-5)
    assert torch.equal(step(case.ids), module(case.ids))


def test_second_derivatives(backend, device):
    """A gradient's gradient, by the definition that autograd differentiates itself."""
    case = make_case(TINY, 9, 6, torch.float64, device=device)
    found = []
    for one in (backend, "reference"):
        storage, chain = case.leaves()
        out = lookup(case.ids, storage, chain, case.layout, backend=one)
        grads = torch.autograd.grad(out.pow(3).sum(), (storage, chain), create_graph=True)
        sum(g.square().sum() for g in grads).backward()
        found.append((storage.grad, chain.grad))
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize(
    "ids, error, words",
    [
        ([5], IndexError, "index out of range in self"),
        ([0, -1], IndexError, "index out of range in self"),
        ([1.0], RuntimeError, "Long, Int"),
        ([True], RuntimeError, "Long, Int"),
    ],
    ids=["above", "negative", "float", "bool"],
)
def test_refused_ids(ids, error, words, backend, device):
    if error is IndexError and device.type == "cuda":
        # The host does not read them there: an assertion fails, see test_group.py.
        if backend == "triton":
            pytest.skip("a GPU asserts, and CUDA is unusable after that")
        device = "cpu"
    module = make_case((2, 8), 5, 0, device=device, backend=backend).module
    ids = torch.tensor(ids, device=device)
    with pytest.raises(error, match=words) as caught:
        module(ids)
    assert "\n" not in str(caught.value)


def test_refusals_use_the_words_of_torch():
    weight = torch.zeros(5, 8)
    module = make_case((2, 8), 5, 0).module
    for ids in (torch.tensor([5]), torch.tensor([1.0])):
        with pytest.raises((IndexError, RuntimeError)) as theirs:
            F.embedding(ids, weight)
        with pytest.raises(theirs.type) as ours:
            module(ids)
        assert str(ours.value).split(";")[0] == str(theirs.value).split(";")[0]


def test_bytes_counted_by_hand():
    sizes = PAPER
    one = [[int(i == k) for i in range(6)] for k in range(6)]
    # 8 B id + 4 B location + 4 d_k + 4 * 128.
    assert [lookup_bytes(sizes, c, 4) for c in one] == [532, 540, 556, 588, 780, 1036]
    # 4 * 128 + 8 B index + 2 * 4 d_k.
    assert [backward_bytes(sizes, c, 4) for c in one] == [536, 552, 584, 648, 1032, 1544]
    assert lookup_bytes(sizes, (3, 0, 0, 0, 0, 1), 4) == 3 * 532 + 1036
    # bf16 rows and output, int32 ids: 4 + 4 + 2 * 2 + 2 * 128.
    assert lookup_bytes(sizes, one[0], 2, id_bytes=4) == 268
    assert lookup_bytes(sizes, one[0], 4, out_itemsize=2) == 8 + 4 + 8 + 256
    assert backward_bytes(sizes, one[0], 4, grad_itemsize=2) == 256 + 8 + 16
