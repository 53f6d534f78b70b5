"""update.py: rows and state step as the definition says, row by row."""

import pytest
import torch

from esapn_kernels.cpu import native
from esapn_kernels.cpu.update import update_rows
from esapn_kernels.ops.backend import NATIVE_ERROR
from esapn_kernels.ops.layout import Layout
from esapn_kernels.ops.update import RULES, Update, is_shaped, rule_numbers
from esapn_kernels.reference import update_reference
from esapn_kernels.testing import assert_matches

N_ROWS, EPS, LR, BETAS = 9, 1e-3, 0.1, (0.8, 0.95)
every_rule = pytest.mark.parametrize("rule", RULES)
SETTINGS = [
    {"l2": 0.3},
    {"decay": 0.3},
    {"clip_value": 0.5},
    {"clip_row_norm": 0.7},
    {"l2": 0.3, "decay": 0.3, "clip_value": 0.5, "clip_row_norm": 0.7},
]
"""Those that change the gradient or the row beside the rule: each alone, and all."""


@pytest.fixture(params=["torch", "native"])
def run(request):
    """The implementations of a CPU."""
    if request.param == "native" and NATIVE_ERROR is not None:
        pytest.skip(NATIVE_ERROR)
    return request.param


class Table:
    """Rows of one size, with NaN between them and in every place of their state but their own."""

    def __init__(self, rule, dim, dtype, run="torch", seed=0, settings=None):
        self.settings = settings or {}
        self.generator = torch.Generator().manual_seed(seed)
        self.update = {"torch": self.by_torch, "native": self.by_native}[run]
        self.rule, self.dim = rule, dim
        self.state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        # Neither a multiple of dim nor in the order of the ids.
        self.start = 3 + (dim + 1) * torch.randperm(N_ROWS, generator=self.generator)
        self.ids = 2 * torch.arange(N_ROWS) + 1
        self.mask = torch.zeros((dim + 1) * N_ROWS + 5, dtype=torch.bool)
        self.mask[self.elements] = True
        self.storage = self.per_element(dtype)
        self.storage[self.elements] = torch.randn(N_ROWS, dim, generator=self.generator).to(dtype)
        count = {"adagrad": 1, "adam": 2, "rowwise_adam": 1}.get(rule, 0)
        self.state = tuple(self.per_element(self.state_dtype) for _ in range(count))
        for tensor in self.state:
            tensor[self.elements] = 0.0
        self.row_sums = self.last_step = self.clock = None
        if rule.startswith("rowwise"):
            self.row_sums = torch.full((2 * N_ROWS + 2,), float("nan"), dtype=self.state_dtype)
            self.row_sums[self.ids] = 0.0
        if rule.endswith("adam"):
            self.last_step = torch.zeros(2 * N_ROWS + 2, dtype=torch.int32)
            self.clock = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
        self.step = 0

    @property
    def elements(self):
        return self.start[:, None] + torch.arange(self.dim)

    def per_element(self, dtype):
        return torch.full(self.mask.shape, float("nan"), dtype=dtype)

    def run(self, rows, grad):
        """One step on the rows numbered ``rows``."""
        if self.clock is not None:
            t = torch.tensor(float(self.step), dtype=torch.float64)
            self.clock = torch.stack([t, BETAS[0] ** t, BETAS[1] ** t])
        self.step += 1
        numbers = rule_numbers(LR, EPS, BETAS, **self.settings)
        update = Update(
            self.rule,
            torch.tensor(numbers, dtype=torch.float64),
            self.state,
            self.row_sums,
            self.last_step,
            self.clock,
            is_shaped(numbers),
        )
        self.update(update, rows, grad)
        if self.clock is not None:
            assert float(self.clock[0]) == self.step

    def by_torch(self, update, rows, grad):
        update.tick()
        update_rows(update, self.storage, self.start[rows], self.ids[rows], grad)

    def by_native(self, update, rows, grad):
        """As the gradient of a lookup in a table of one size, which passes no hop."""
        row_start = torch.full((2 * N_ROWS + 2,), -1)
        row_start[self.ids] = self.start
        level = torch.zeros(1, dtype=torch.int8)
        layout = Layout(row_start, level, (self.dim,), self.storage.numel())
        composed = torch.empty(0, self.dim)
        native.lookup_bwd_update(grad, self.ids[rows], self.storage, composed, layout, update)


class Expected:
    """The same table as separate rows, stepped by the definition in ``dtype``."""

    def __init__(self, table, dtype, row_dtype):
        self.table, self.dtype, self.row_dtype, self.step = table, dtype, row_dtype, 0
        self.rows = table.storage[table.elements].to(dtype)
        one, each = torch.zeros((), dtype=dtype), torch.zeros(table.dim, dtype=dtype)
        fresh = {
            "sgd": (),
            "adagrad": (each,),
            "rowwise_adagrad": (one,),
            "adam": (each, each),
            "rowwise_adam": (each, one),
        }
        self.state = [fresh[table.rule]] * N_ROWS
        self.last = [0] * N_ROWS

    def run(self, rows, grad):
        self.step += 1
        for x, g in zip(rows.tolist(), grad.to(self.dtype), strict=True):
            stepped, self.state[x] = update_reference(
                self.table.rule,
                self.rows[x],
                g,
                self.state[x],
                lr=LR,
                eps=EPS,
                betas=BETAS,
                step=self.step,
                last_step=self.last[x],
                **self.table.settings,
            )
            self.rows[x] = stepped.to(self.row_dtype).to(self.dtype)
            self.last[x] = self.step


def pair(rule, dim, dtype, run, settings=None, n_steps=7):
    """A stepped table, and the definition's rows in fp64 and in the table's own precision."""
    table = Table(rule, dim, dtype, run, settings=settings)
    exact = Expected(table, torch.float64, torch.float64)
    eager = Expected(table, table.state_dtype, dtype)
    for _ in range(n_steps):
        count = int(torch.randint(0, N_ROWS, (1,), generator=table.generator))
        rows = torch.randperm(N_ROWS, generator=table.generator)[:count]
        grad = torch.randn(count, dim, generator=table.generator).to(table.state_dtype)
        given = grad.clone()
        for step in (table.run, exact.run, eager.run):
            step(rows, grad)
        assert torch.equal(grad, given)
    return table, exact, eager


@every_rule
@pytest.mark.parametrize("dim", [1, 3, 5, 33, 64])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_steps_are_the_definition(rule, dim, dtype, run):
    check_steps(*pair(rule, dim, dtype, run))


@every_rule
@pytest.mark.parametrize("settings", SETTINGS, ids="-".join)
# Blocks of the widest registers, and beyond.
@pytest.mark.parametrize("dim", [1, 5, 16, 300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_clipped_and_decayed_steps_are_the_definition(rule, settings, dim, dtype, run):
    check_steps(*pair(rule, dim, dtype, run, settings))


def check_steps(table, exact, eager):
    rule = table.rule
    actual = table.storage[table.elements]
    assert_matches(actual, exact.rows, eager.rows.to(actual.dtype), name=rule)
    assert table.storage[~table.mask].isnan().all()
    for i, state in enumerate(table.state):
        wanted, same = (torch.stack([s[i] for s in e.state]) for e in (exact, eager))
        assert_matches(state[table.elements], wanted, same, name=f"{rule} state {i}")
        assert state[~table.mask].isnan().all()
    if rule.startswith("rowwise"):
        wanted, same = (torch.stack([s[-1] for s in e.state]) for e in (exact, eager))
        assert_matches(table.row_sums[table.ids], wanted, same, name=rule)
        assert table.row_sums.isnan().sum() == len(table.row_sums) - N_ROWS
    if rule.endswith("adam"):
        assert table.last_step[table.ids].tolist() == exact.last
        others = torch.ones_like(table.last_step, dtype=torch.bool)
        others[table.ids] = False
        assert (table.last_step[others] == 0).all()


@every_rule
def test_a_long_absence(rule, run):
    """24 steps are skipped, and both moments still count."""
    table = Table(rule, 3, torch.float32, run)
    table.step = 4
    grad = torch.tensor([[1.0, -2.0, 0.5]])
    row = torch.tensor([4])
    table.run(row, grad)
    before = table.storage[table.elements[4]].double()
    state = [s[table.elements[4]].double() for s in table.state]
    if rule.startswith("rowwise"):
        state.append(table.row_sums[table.ids[4]].double())
    table.step = 29
    table.run(row, 1e-3 * grad)
    expected, _ = update_reference(
        rule,
        before,
        1e-3 * grad[0].double(),
        tuple(state),
        lr=LR,
        eps=EPS,
        betas=BETAS,
        step=30,
        last_step=5,
    )
    torch.testing.assert_close(
        table.storage[table.elements[4]].double(), expected, rtol=1e-6, atol=1e-6
    )


@every_rule
def test_nothing_to_step(rule, run):
    table = Table(rule, 3, torch.float32, run)
    before = table.storage.clone()
    table.run(torch.zeros(0, dtype=torch.long), torch.zeros(0, 3))
    torch.testing.assert_close(table.storage, before, rtol=0, atol=0, equal_nan=True)


def test_the_definition_by_hand():
    row, grad = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0])
    zero = torch.zeros(2)
    assert update_reference("sgd", row, grad, lr=0.5)[0].tolist() == [-0.5, 1.5]
    # sqrt(0 + 9) + 1 = 4 and sqrt(3 + 1) + 1 = 3; mean (9 + 1) / 2 = 5, 11 + 5 = 16.
    new, (total,) = update_reference(
        "adagrad", row, grad, (torch.tensor([0.0, 3.0]),), lr=1, eps=1.0
    )
    assert new.tolist() == pytest.approx([1 - 3 / 4, 2 - 1 / 3]) and total.tolist() == [9, 4]
    new, (total,) = update_reference("rowwise_adagrad", row, grad, (torch.tensor(11.0),), lr=2)
    assert new.tolist() == [1 - 2 * 3 / 4, 2 - 2 * 1 / 4] and float(total) == 16
    # First step: m_hat = g and v_hat = g^2, so the row moves by lr * sign(g).
    new, moments = update_reference("adam", row, grad, (zero, zero), lr=0.25, betas=(0.5, 0.75))
    assert new.tolist() == [0.75, 1.75]
    assert [m.tolist() for m in moments] == [[1.5, 0.5], [2.25, 0.25]]
    # Two steps later, one of them skipped: m = 0.25 * 1.5 + 0.5 * 1, v = 0.5625 * 2.25 + 0.25 * 1.
    new, (m, v) = update_reference(
        "adam",
        row[:1],
        torch.ones(1),
        (moments[0][:1], moments[1][:1]),
        lr=1.0,
        betas=(0.5, 0.75),
        step=3,
        last_step=1,
    )
    assert float(m) == 0.875 and float(v) == 1.515625
    quotient = (0.875 / (1 - 0.125)) / (1.515625 / (1 - 0.421875)) ** 0.5
    assert float(new) == pytest.approx(1 - quotient)
    # One second moment of both: 0.25 (9 + 1) / 2, corrected 5; m_hat = g.
    new, moments = update_reference(
        "rowwise_adam", row, grad, (zero, torch.tensor(0.0)), lr=1.0, betas=(0.5, 0.75)
    )
    assert new.tolist() == pytest.approx([1 - 3 / 5**0.5, 2 - 1 / 5**0.5])
    assert [m.tolist() for m in moments] == [[1.5, 0.5], 1.25]


def test_the_definition_of_clips_and_decay_by_hand():
    row, grad = torch.tensor([1.0, 2.0]), torch.tensor([8.0, -3.0])
    # g = (4, -3), then of norm 5 / 2.5, then + 0.5 e; e = 0.75 e, then -g.
    new, _ = update_reference(
        "sgd", row, grad, lr=1.0, l2=0.5, decay=0.25, clip_value=4.0, clip_row_norm=2.5
    )
    assert new.tolist() == pytest.approx([0.75 - 2 - 0.5, 1.5 + 1.5 - 1], rel=1e-6)
    # A norm below its bound changes nothing.
    new, _ = update_reference("sgd", row, grad, lr=1.0, clip_row_norm=9.0)
    assert new.tolist() == [-7.0, 5.0]


@pytest.mark.parametrize("name", ["clip_value", "clip_row_norm"])
def test_a_gradient_that_is_not_finite_under_a_clip(name, run):
    """As ``torch.clamp`` and ``clip_grad_norm_`` have it, and in no other row."""
    nan, inf = float("nan"), float("inf")
    table = Table("sgd", 3, torch.float32, run, settings={name: 2.0})
    before = table.storage[table.elements]
    grad = torch.tensor([[nan, 3.0, -1.0], [inf, 3.0, -inf], [5.0, 0.0, 0.0]])
    expected = grad.clone()
    if name == "clip_value":
        expected.clamp_(-2, 2)
    else:
        for each in expected:
            leaf = torch.nn.Parameter(torch.zeros(3))
            leaf.grad = each
            torch.nn.utils.clip_grad_norm_(leaf, 2.0, foreach=False)
    table.run(torch.tensor([0, 3, 5]), grad)
    moved = (before - table.storage[table.elements]) / LR
    torch.testing.assert_close(moved[[0, 3, 5]], expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert not moved[[1, 2, 4, 6, 7, 8]].any()


def test_an_unknown_rule_is_refused():
    row, numbers = torch.ones(2), torch.tensor(rule_numbers(lr=0.1))
    with pytest.raises(ValueError, match="rule must be one of"):
        update_rows(Update("lion", numbers), row, *torch.zeros(2, 1, dtype=int), torch.ones(1, 2))
    with pytest.raises(ValueError, match="unknown rule"):
        update_reference("lion", row, row, lr=0.1)
    assert row.tolist() == [1.0, 1.0]
