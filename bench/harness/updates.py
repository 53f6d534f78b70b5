"""Update modes: forward, backward and optimizer as one region.

    ours           rows stepped inside backward by ``esapn_kernels.optim``; no gradient of the table
    ours deferred  backward collects the gradients of the batch's rows, ``step()`` applies them
    ours 128       as ours, with every row of the largest size: what raggedness itself costs
    ours dense     the same rows with a dense gradient and ``torch.optim``
    fixed          ``nn.Embedding(N, 128)``, dense gradient and ``torch.optim``
    sparse         ``nn.Embedding(N, 128, sparse=True)`` and ``torch.optim.SparseAdam``

Hops are stepped by ``torch.optim``, fused where torch has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from esapn_kernels import optim

from .gate import GateError, Rows64, draw_checked, largest_error, relative_error, rows64
from .providers import Fixed, Ours, TableSpec, Workload
from .roof import DIM, Looked, dense_step_bytes, sparse_backward_bytes, sparse_step_bytes
from .table import Row
from .timing import Entry, Timer

RULES = ("sgd", "adagrad", "rowwise_adagrad", "adam")
EPS = 1e-3
"""Large, so that the gate compares steps and not the signs of gradients near zero."""

ROW_LR = 0.1
# Their gradients are sums over the batch, and so are the errors of these.
_HOP_LR = {"sgd": 1e-4}
_HOP_EPS = 1.0
TIMED_LR = 1e-6  # values hardly move however many steps are timed


def fused_optimizer(rule: str, module: Any, optimizers: Any = optim, **options: Any) -> Any:
    """Of ``esapn_kernels.optim``, or of what stands in for it, attached to ``module``."""
    if rule == "sgd":
        return optimizers.SGD(module, lr=ROW_LR, **options)
    if rule == "adam":
        return optimizers.Adam(module, lr=ROW_LR, eps=EPS, **options)
    rowwise = rule == "rowwise_adagrad"
    return optimizers.Adagrad(module, lr=ROW_LR, eps=EPS, rowwise=rowwise, **options)


def torch_optimizer(rule: str, rows: Sequence[Tensor], hops: Sequence[Tensor]) -> Any:
    """The fastest of ``torch.optim``; row-wise Adagrad, which it lacks, for hops only."""
    groups = _groups(rule, rows, hops)
    if rule == "sgd":
        return torch.optim.SGD(groups, fused=True)
    if rule == "adam":
        return torch.optim.Adam(groups, fused=True)
    fused = not groups[0]["params"][0].is_cuda
    return torch.optim.Adagrad(groups, fused=fused, foreach=not fused)


def _groups(rule: str, rows: Sequence[Tensor], hops: Sequence[Tensor]) -> list[dict[str, Any]]:
    """Parameter groups with what rows and hops are stepped by."""
    groups: list[dict[str, Any]] = [
        {"params": list(rows), "lr": ROW_LR, "eps": EPS},
        {"params": list(hops), "lr": _HOP_LR.get(rule, 1e-2), "eps": _HOP_EPS},
    ]
    if rule == "sgd":
        for group in groups:
            del group["eps"]
    return [group for group in groups if group["params"]]


class Step:
    """One training step on a table, as a provider of the update modes.

    Attributes:
        name: for the report.
        holder: whose rows are looked up and stepped.
        optimizers: called after backward; ``rows`` steps inside it.
        moved: fewest bytes of a step, of what is looked up.
    """

    def __init__(
        self,
        name: str,
        holder: Ours | Fixed,
        optimizers: Sequence[Any],
        moved: Callable[[Looked], int],
        rows: Any = None,
    ) -> None:
        self.name, self.holder, self.optimizers = name, holder, list(optimizers)
        self.moved, self.rows = moved, rows

    def __call__(self, ids: Tensor, grad: Tensor) -> Tensor:
        out = self.holder(ids)
        self.backward(out, grad)
        return out.detach()

    def backward(self, out: Tensor, grad: Tensor) -> None:
        """Backward and the optimizers."""
        out.backward(grad)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def settle(self) -> None:
        """From now on steps are too small to change anything that is timed."""
        for optimizer in [*self.optimizers, *([self.rows] if self.rows is not None else [])]:
            for group in optimizer.param_groups:
                group["lr"] = TIMED_LR

    @property
    def bytes(self) -> int:
        """Allocated for rows, locations, hops and optimizer state."""
        held = [] if self.rows is None else [self.rows]
        states = [s for o in [*self.optimizers, *held] for s in o.state.values()]
        tensors = [v for state in states for v in state.values() if isinstance(v, Tensor)]
        return self.holder.table_bytes + sum(t.nbytes for t in tensors)


def fused_step(ours: Ours, rule: str, name: str = "ours", optimizers: Any = optim) -> Step:
    """Rows of ``ours`` stepped inside backward."""
    rows = fused_optimizer(rule, ours.module, optimizers)
    hops = torch_optimizer(rule, [], [ours.module.chain])
    return Step(name, ours, [hops], partial(sparse_step_bytes, rule=rule), rows)


def deferred_step(ours: Ours, rule: str) -> Step:
    """Rows of ``ours`` stepped by ``step()``, by the gradients that backward collected."""
    rows = fused_optimizer(rule, ours.module, deferred=True)
    hops = torch_optimizer(rule, [], [ours.module.chain])
    return Step("ours deferred", ours, [rows, hops], partial(sparse_step_bytes, rule=rule))


def dense_step(holder: Ours | Fixed, rule: str, name: str) -> Step:
    """A dense gradient, and ``torch.optim`` on all rows."""
    optimizer = torch_optimizer(rule, holder.parameters[:1], holder.parameters[1:])
    moved = partial(dense_step_bytes, rule=rule, grad_elements=holder.grad_elements)
    return Step(name, holder, [optimizer], moved)


def all_largest(table: TableSpec) -> TableSpec:
    """The same ids, every row of the largest size."""
    return TableSpec(table.name, torch.full_like(table.sizes, DIM), table.popular)


def make_steps(table: TableSpec, device: torch.device, rule: str) -> Iterator[Step]:
    """Every provider that has ``rule``."""
    yield fused_step(Ours(table, device), rule)
    yield deferred_step(Ours(table, device), rule)
    yield fused_step(Ours(all_largest(table), device), rule, "ours 128")
    if rule == "rowwise_adagrad":
        return
    yield dense_step(Ours(table, device), rule, "ours dense")
    yield dense_step(Fixed(table, device), rule, "fixed")
    if rule == "adam":
        holder = Fixed(table, device, sparse=True)
        optimizer = torch.optim.SparseAdam(holder.parameters, lr=ROW_LR, eps=EPS)
        yield Step("sparse", holder, [optimizer], partial(sparse_step_bytes, rule=rule))


def advance(
    rows: Rows64, inverse: Tensor, grads: Sequence[Tensor], rule: str, *, late_eps: bool = False
) -> list[tuple[str, Tensor]]:
    """Steps the float64 leaves of ``rows`` by ``torch.optim``; gives what each moved by.

    Row-wise Adagrad, which torch lacks, is written out. Every row is in every step, so a lazy rule
    and a dense one are the same. ``late_eps``: Adam as ``SparseAdam`` has it, which adds eps before
    it corrects the second moment.
    """
    row_leaves = [leaf for _, _, leaf in rows.groups]
    hop_leaves = [leaf for hop in rows.hops for leaf in hop]
    before = [leaf.detach().clone() for leaf in rows.leaves]
    rowwise = rule == "rowwise_adagrad"
    params = _groups(rule, [] if rowwise else row_leaves, hop_leaves)
    kinds: dict[str, Any] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
    kind = kinds.get(rule, torch.optim.Adagrad)
    optimizer = kind(params) if params else None  # of row-wise Adagrad without hops nothing is left
    sums = [leaf.new_zeros(len(leaf), 1) for leaf in row_leaves]
    for t, grad in enumerate(grads, 1):
        for leaf in rows.leaves:
            leaf.grad = None
        if late_eps and optimizer is not None:
            for group in optimizer.param_groups:
                group["eps"] = EPS / math.sqrt(1 - group["betas"][1] ** t)
        rows.look_up()[inverse].backward(grad.double())
        if optimizer is not None:
            optimizer.step()
        if rowwise:
            for leaf, total in zip(row_leaves, sums, strict=True):
                assert leaf.grad is not None
                total += leaf.grad.square().mean(1, keepdim=True)
                leaf.data -= ROW_LR * leaf.grad / (total.sqrt() + EPS)
    names = [f"rows of level {k}" for k, _, _ in rows.groups]
    names += [f"{n} of hop {j}" for j in range(len(rows.hops)) for n in ("weight", "bias")]
    return [
        (name, leaf.detach() - old)
        for name, leaf, old in zip(names, rows.leaves, before, strict=True)
    ]


def check_step(step: Step, ids: Tensor, rule: str) -> float:
    """Two steps on ``ids`` against float64; the second one meets the state of the first.

    Returns:
        The largest relative error of what rows (by size) and hops moved by.

    Raises:
        GateError: the error is above the tolerance, or another row has moved.
    """
    positions, first = draw_checked(ids)
    second = torch.zeros_like(first)
    second[positions] = torch.randn_like(first[positions])
    distinct, inverse = torch.unique(ids[positions], return_inverse=True)
    rows = rows64(step.holder, distinct)
    table = step.holder.parameters[0]
    old, old_table = [leaf.detach().clone() for leaf in rows.leaves], table.detach().clone()
    for grad in (first, second):
        step(ids, grad)
    sent = [first[positions], second[positions]]
    expected = advance(rows, inverse, sent, rule, late_eps=step.name == "sparse")
    new = [leaf.detach() for leaf in rows64(step.holder, distinct).leaves]
    errors = {
        name: _step_error(leaf - before, moved, leaf)
        for (name, moved), leaf, before in zip(expected, new, old, strict=True)
        if moved.numel()
    }
    worst = largest_error(f"{step.name}, {rule}", errors)
    if int((table != old_table).sum()) > sum(leaf.numel() for _, _, leaf in rows.groups):
        raise GateError(f"{step.name}, {rule}: rows moved that were not looked up")
    return worst


def _step_error(got: Tensor, moved: Tensor, value: Tensor) -> float:
    """Relative error of two steps, less what rounding ``value`` to float32 twice can cost."""
    rounding = 2 * 2.0**-24 * float(value.norm() / moved.norm().clamp(min=1e-30))
    return max(relative_error(got, moved) - rounding, 0.0)


def measure_steps(
    workload: Workload, rules: Sequence[str], timer: Timer, repeats: int | None
) -> list[Row]:
    """Check and time every provider of every rule; with SGD also ours in backward alone.

    Raises:
        GateError: a provider is wrong; its rule has not been timed.
    """
    rows = []
    for rule in rules:
        entries = []
        for step in make_steps(workload.table, timer.device, rule):
            entries += step_entries(workload, step, rule)
        rows += timer.measure(entries, repeats)
        # Rows of one mode stand together.
        rows.sort(key=lambda row: row.mode.startswith("backward"))
    return rows


def measure_cold_backward(workload: Workload, timer: Timer, repeats: int | None) -> list[Row]:
    """Backward with SGD alone: on a large table no dense gradient hides it."""
    step = fused_step(Ours(workload.table, timer.device), "sgd")
    entries = step_entries(workload, step, "sgd")
    return timer.measure([e for e in entries if e.row.mode == "backward sgd"], repeats)


def step_entries(workload: Workload, step: Step, rule: str) -> list[Entry]:
    """Check ``step``; what to time of it: all of it, and with SGD ours in backward alone.

    Raises:
        GateError: as :func:`check_step`.
    """
    error = check_step(step, workload.batches[0], rule)
    step.settle()
    ragged = step.holder.ragged
    sizes = all_largest(workload.table).sizes if step.name == "ours 128" else None
    looked = workload.looked(sizes, ragged=ragged)
    common: dict[str, Any] = {"memory": step.bytes, "gate_error": error}
    row = workload.row(f"step {rule}", step.name, looked, step.moved, **common)
    entries = [Entry(row, lambda turn, _: step(workload.batch(turn), workload.grad))]
    if rule == "sgd" and step.rows is not None:
        moved = partial(sparse_backward_bytes, rule=rule)
        entries.append(
            Entry(
                workload.row("backward sgd", step.name, looked, moved, **common),
                lambda _, out: step.backward(out, workload.grad),
                lambda turn: step.holder(workload.batch(turn)),
            )
        )
    return entries
