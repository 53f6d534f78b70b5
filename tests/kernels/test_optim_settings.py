"""optim.py: weight decay and clips with every rule, as in the definition and in torch.optim."""

import pytest
import torch

from esapn_kernels import ResizableEmbedding, optim
from esapn_kernels.ops.backend import INTERPRETED, NATIVE_ERROR, TRITON_ERROR
from esapn_kernels.reference import promote_reference, split_chain, update_reference
from esapn_kernels.testing import assert_matches
from tests.kernels.layouts import DTYPES, TINY, name

BETAS, EPS, LR = (0.8, 0.95), 1e-2, 0.05
SIZES, N_ROWS = (2, 3, 5), 8
KINDS = {
    "sgd": (optim.SGD, {}),
    "adagrad": (optim.Adagrad, {"eps": EPS}),
    "rowwise_adagrad": (optim.Adagrad, {"eps": EPS, "rowwise": True}),
    "adam": (optim.Adam, {"eps": EPS, "betas": BETAS, "weight_decay": 0.0}),
    "rowwise_adam": (optim.Adam, {"eps": EPS, "betas": BETAS, "rowwise": True}),
}
every_rule = pytest.mark.parametrize("rule", KINDS)
CLIPS = {"clip_value": 1.0, "clip_row_norm": 1.5}
L2, DECAY = {"weight_decay": 0.4}, {"weight_decay": 0.4, "decoupled": True}


def build(rule, module, decoupled=False, **settings):
    kind, options = KINDS[rule]
    kind = optim.AdamW if decoupled else kind
    rows = kind(module, lr=LR, **{**options, **settings})
    assert rows.rule == rule
    return rows


def rounded(row, dtype, backend):
    """As a store to ``dtype`` rounds; Triton's interpreter cuts bf16 off."""
    if backend == "triton" and dtype == torch.bfloat16 and INTERPRETED:
        return (row.view(torch.int32) & ~0xFFFF).view(torch.float32)
    return row.to(dtype).to(row.dtype)


class Rows:
    """Rows apart from each other, computed in ``dtype`` and kept in ``kept``."""

    def __init__(self, module, rule, dtype, kept, decoupled=False, **settings):
        self.rule, self.dtype, self.kept, self.step = rule, dtype, kept, 0
        self.backend = module.backend
        self.chain = module.chain.detach().to(dtype)
        self.rows = [module.arena.read(i).to(dtype) for i in range(N_ROWS)]
        decay = settings.pop("weight_decay", 0.0)
        self.settings = {**settings, "decay" if decoupled else "l2": decay}
        self.state, self.last = [self.fresh(row) for row in self.rows], [0] * N_ROWS

    def fresh(self, row):
        each, one = torch.zeros_like(row), torch.zeros((), dtype=self.dtype)
        return {
            "sgd": (),
            "adagrad": (each,),
            "rowwise_adagrad": (one,),
            "adam": (each, each),
            "rowwise_adam": (each, one),
        }[self.rule]

    def train(self, ids, grad_out):
        self.step += 1
        hops, grad_out = split_chain(self.chain, SIZES), grad_out.to(self.dtype)
        for i in set(ids.tolist()):
            grad = grad_out[ids == i].sum(0)
            for weight, _ in reversed(hops[SIZES.index(len(self.rows[i])) :]):
                grad = weight.t() @ grad
            row, self.state[i] = update_reference(
                self.rule,
                self.rows[i],
                grad,
                self.state[i],
                lr=LR,
                eps=EPS,
                betas=BETAS,
                step=self.step,
                last_step=self.last[i],
                **self.settings,
            )
            self.rows[i], self.last[i] = rounded(row, self.kept, self.backend), self.step

    def promote(self, ids):
        for i in ids.tolist():
            level = SIZES.index(len(self.rows[i]))
            row = promote_reference(self.rows[i], level, self.chain, SIZES)
            self.rows[i] = rounded(row, self.kept, self.backend)
            self.state[i], self.last[i] = self.fresh(row), 0


def check_fifty_steps(rule, settings, dtype, backends):
    """Rows that come and go and grow; hops stay, so that gradients depend on no row."""
    modules = []
    for backend in backends:
        torch.manual_seed(0)
        modules.append(ResizableEmbedding(N_ROWS, sizes=SIZES, dtype=dtype, backend=backend))
        modules[-1].chain.requires_grad_(False)
    optimizers = [build(rule, module, **settings) for module in modules]
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    exact = Rows(modules[0], rule, torch.float64, torch.float64, **settings)
    eager = Rows(modules[0], rule, compute, dtype, **settings)
    generator = torch.Generator().manual_seed(1)
    for step in range(50):
        ids = torch.randint(N_ROWS, (5,), generator=generator)
        grad_out = torch.randn(5, SIZES[-1], generator=generator).to(dtype)
        for each in (exact, eager):
            each.train(ids, grad_out)
        for module in modules:
            module(ids).backward(grad_out)
        if step in (9, 29):
            moving = torch.arange(step % 4, N_ROWS, 2)
            for each in (*modules, exact, eager):
                each.promote(moving)
    assert {len(row) for row in exact.rows} == {2, 5} and len(optimizers) == len(backends)
    for module, backend in zip(modules, backends, strict=True):
        rows = torch.cat([module.arena.read(i) for i in range(N_ROWS)])
        assert_matches(rows, torch.cat(exact.rows), torch.cat(eager.rows).to(dtype), name=backend)


HOSTS = ["torch"] if NATIVE_ERROR is not None else ["torch", "native"]


@every_rule
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_fifty_steps_with_everything(rule, dtype):
    settings = DECAY if rule.endswith("adam") else L2
    check_fifty_steps(rule, {**settings, **CLIPS}, dtype, HOSTS)


@every_rule
@pytest.mark.parametrize(
    "settings",
    [{}, L2, {"clip_value": 1.0}, {"clip_row_norm": 1.5}],
    ids=["plain", "l2", "clip_value", "clip_row_norm"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name)
def test_fifty_steps_with_one_setting(rule, settings, dtype):
    check_fifty_steps(rule, settings, dtype, HOSTS)


@pytest.mark.parametrize("rule", ["adam", "rowwise_adam"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
def test_fifty_steps_with_decoupled_decay(rule, dtype):
    check_fifty_steps(rule, DECAY, dtype, HOSTS)


@pytest.mark.skipif(TRITON_ERROR is not None, reason=str(TRITON_ERROR))
@pytest.mark.parametrize(
    "rule, settings, dtype",
    [
        ("sgd", L2, torch.float16),
        ("adagrad", L2, torch.bfloat16),
        ("rowwise_adagrad", L2, torch.float64),
        ("adam", DECAY, torch.float32),
        ("rowwise_adam", DECAY, torch.float32),
    ],
    ids=["sgd-fp16", "adagrad-bf16", "rowwise_adagrad-fp64", "adam-fp32", "rowwise_adam-fp32"],
)
def test_fifty_steps_of_interpreted_kernels(rule, settings, dtype):
    check_fifty_steps(rule, {**settings, **CLIPS}, dtype, ["triton"])


@pytest.mark.parametrize("rule", ["adagrad", "rowwise_adam"])
def test_twenty_runs_are_equal(rule, backend, device):
    settings = DECAY if rule.endswith("adam") else L2
    found = []
    for _ in range(20):
        torch.manual_seed(0)
        module = ResizableEmbedding(40, sizes=SIZES, backend=backend, device=device)
        rows = build(rule, module, **settings, **CLIPS)
        ids = torch.randint(30, (60,)).to(device)
        for _ in range(2):
            module(ids).sin().sum().backward()
        state = rows.state.get(module.arena.storage, {})
        found.append([module.arena.storage.detach(), module.chain.grad, *state.values()])
    for each in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(each, found[0], strict=True))


def test_rows_decay_in_the_steps_that_meet_them_and_in_no_other(backend, device):
    module = ResizableEmbedding(4, sizes=(1, 3), backend=backend, device=device)
    rows = optim.AdamW(module, lr=0.5, weight_decay=0.5)
    before = [module.arena.read(i) for i in range(4)]
    for ids in ([1, 3], [3, 3]):
        out = module(torch.tensor(ids, device=device))
        out.backward(torch.zeros_like(out))
    for i, factor in enumerate([1, 0.75, 1, 0.75**2]):
        torch.testing.assert_close(module.arena.read(i), factor * before[i])
    assert rows.param_groups[0]["weight_decay"] == 0.5


@pytest.mark.parametrize(
    "fused, dense, options",
    [
        (optim.SGD, torch.optim.SGD, {"lr": 0.1}),
        (optim.Adam, torch.optim.Adam, {"lr": 0.1}),
        (optim.AdamW, torch.optim.AdamW, {"lr": 0.1}),
    ],
    ids=["sgd", "adam", "adamw"],
)
def test_the_row_of_padding_idx_decays_as_with_torch(fused, dense, options, backend, device):
    """It has no gradient, and every row is in the batch."""
    table = torch.randn(6, 3, dtype=torch.float64, device=device)
    settings = {"padding_idx": 2, "freeze": False}
    twin = torch.nn.Embedding.from_pretrained(table.clone(), **settings)
    module = ResizableEmbedding.from_pretrained(table.clone(), **settings)
    module.backend = backend
    rows = fused(module, weight_decay=0.3, **options)
    whole = dense(twin.parameters(), weight_decay=0.3, **options)
    ids = torch.arange(8, device=device) % 6
    for step in range(3):
        for each in (module, twin):
            (each(ids).sin() * (step + 1)).sum().backward()
        whole.step()
        whole.zero_grad()
    torch.testing.assert_close(module.weight, twin.weight, rtol=1e-12, atol=1e-12)
    assert (module.weight[2].abs() < table[2].abs()).all() and rows.param_groups


@pytest.mark.parametrize("clips", [{"clip_value": 1.0}, {"clip_row_norm": 1.0}], ids=str)
def test_a_nan_stays_in_its_row(clips, backend, device):
    """Clamped it would be lost; in the norm it takes its row with it, as in ``clip_grad_norm_``."""
    module = ResizableEmbedding(3, sizes=(4,), backend=backend, device=device)
    rows = optim.SGD(module, lr=1.0, **clips)
    before = module.weight.detach().clone()
    out = module(torch.tensor([0, 1], device=device))
    grad_out = torch.full_like(out, 3.0)
    grad_out[1, 2] = float("nan")
    out.backward(grad_out)
    moved = before - module.weight.detach()
    bound = 1.0 if "clip_value" in clips else 0.5
    torch.testing.assert_close(moved[0], torch.full_like(moved[0], bound))
    whole = "clip_row_norm" in clips
    assert moved[1].isnan().tolist() == [whole, whole, True, whole]
    assert torch.equal(moved[2], torch.zeros_like(moved[2])) and rows.rule == "sgd"


def test_settings_change_from_step_to_step(backend, device):
    module = ResizableEmbedding(2, sizes=(2,), backend=backend, device=device)
    rows = optim.SGD(module, lr=1.0)
    group, ids = rows.param_groups[0], torch.tensor([1], device=device)

    def step(**settings):
        group.update(settings)
        before = module.weight.detach()[1].clone()
        module(ids).backward(torch.tensor([[3.0, -4.0]], device=device))
        return before, module.weight.detach()[1] - before

    for settings, moves in (
        ({}, [-3.0, 4.0]),
        ({"clip_value": 3.5}, [-3.0, 3.5]),
        ({"clip_value": None, "clip_row_norm": 2.5}, [-1.5, 2.0]),
        ({"clip_row_norm": 6}, [-3.0, 4.0]),
        ({"clip_row_norm": None}, [-3.0, 4.0]),
    ):
        expected = torch.tensor(moves, device=device)
        torch.testing.assert_close(step(**settings)[1], expected, rtol=1e-5, atol=1e-5)
    before, moved = step(weight_decay=0.25)
    expected = torch.tensor([-3.0, 4.0], device=device) - 0.25 * before
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_from_before_a_setting():
    """What it does not say stays as it was built."""
    module = ResizableEmbedding(5, sizes=TINY)
    rows = optim.Adam(module, lr=0.1, clip_row_norm=2.0)
    saved = rows.state_dict()
    for missing in ("weight_decay", "clip_value", "clip_row_norm", "rowwise"):
        del saved["param_groups"][0][missing]
    saved["param_groups"][0]["lr"] = 0.7
    rows.load_state_dict(saved)
    group = rows.param_groups[0]
    assert (group["lr"], group["clip_row_norm"], group["weight_decay"]) == (0.7, 2.0, 0.0)
    module(torch.arange(5)).sum().backward()
    assert rows.rule == "adam" and rows.state[module.arena.storage]["clock"][0] == 1


@every_rule
@pytest.mark.parametrize(
    "setting, bad",
    [
        ("weight_decay", -0.1),
        ("clip_value", 0.0),
        ("clip_row_norm", -1),
        ("clip_value", float("nan")),
    ],
)
def test_bad_settings(rule, setting, bad):
    module = ResizableEmbedding(5, sizes=TINY)
    with pytest.raises(ValueError, match=rf"^Invalid {setting}( value)?: {bad}$"):
        build(rule, module, **{setting: bad})
    assert module.arena.fused_optimizer is None


def test_the_default_decay_of_adamw_is_that_of_torch():
    module = ResizableEmbedding(5, sizes=TINY)
    rows, dense = optim.AdamW(module), torch.optim.AdamW([torch.zeros(1)])
    shared = ("lr", "betas", "eps", "weight_decay")
    assert [rows.defaults[key] for key in shared] == [dense.defaults[key] for key in shared]
