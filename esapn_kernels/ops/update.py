"""What a fused optimizer does with the gradient of a row: the rules, and what they need."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .backend import tl, triton

__all__ = ["RULES", "Update", "row_table", "rule_numbers", "rule_state", "update_rows"]

RULES = ("sgd", "adagrad", "rowwise_adagrad", "adam")


@dataclass(frozen=True)
class Update:
    """One step of a fused optimizer on one arena, as the operators take it.

    Attributes:
        rule: one of ``RULES``.
        numbers: fp64 ``[7]``, on the storage's device, what :func:`rule_numbers` gives: kernels
            read the present values, so that a schedule compiles nothing anew and a captured graph
            follows it.
        state: tensors in the arena's layout ``[capacity]``, fp32 (fp64 for fp64 rows):
            ``adagrad`` (sum,), ``adam`` (exp_avg, exp_avg_sq), else empty.
        per_id: ``[N]``: ``rowwise_adagrad`` the sum (fp32 / fp64), ``adam`` the step that last
            touched the row (int32), else ``None``.
        clock: fp64 ``[3]``: ``t`` (this step, counted from 1), ``beta1^t``, ``beta2^t``; Adam only.
    """

    rule: str
    numbers: Tensor
    state: tuple[Tensor, ...] = ()
    per_id: Tensor | None = None
    clock: Tensor | None = None


def rule_numbers(
    lr: float, eps: float = 0.0, betas: tuple[float, float] = (0.0, 0.0)
) -> tuple[float, ...]:
    """What a rule is set to: ``(1, beta1, beta2, log2 beta1, log2 beta2, lr, eps)``.

    The first three are what a step multiplies Adam's clock by.

    >>> rule_numbers(0.1, betas=(0.5, 0.25))
    (1.0, 0.5, 0.25, -1.0, -2.0, 0.1, 0.0)
    """
    # exp2 of any multiple of the last is 0, as a power of 0 is.
    logs = [math.log2(beta) if beta > 0 else -1e30 for beta in betas]
    return (1.0, *betas, *logs, lr, eps)


def update_rows(update: Update, storage: Tensor, start: Tensor, ids: Tensor, grad: Tensor) -> None:
    """Step distinct rows of one size by ``update``'s rule, rows and state in place.

        sgd              e -= lr g
        adagrad          s += g^2              e -= lr g / (sqrt(s) + eps)
        rowwise_adagrad  s_x += mean(g^2)      e -= lr g / (sqrt(s_x) + eps)
        adam             m = beta1^a m + (1 - beta1) g,   v = beta2^a v + (1 - beta2) g^2
                         e -= lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    with ``a = t - last_step[x]``, the steps since the row was last touched, this one included; then
    ``last_step[x] = t``.

    Args:
        update: the rule and its state; the clock stands at this step already.
        storage: all rows, flat ``[capacity]``; the rows are rounded to its dtype when stored.
        start: int64 ``[U]``, first elements of the rows, in any alignment.
        ids: int64 ``[U]``, whose rows they are; distinct.
        grad: ``[U, d]``, each row's gradient summed over its occurrences, in the compute dtype
            (fp32; fp64 for fp64 rows); left as it is.

    Example:
        >>> rows = torch.tensor([1.0, 2.0, 3.0, 4.0])
        >>> step = Update("sgd", torch.tensor(rule_numbers(lr=0.5), dtype=torch.float64))
        >>> update_rows(step, rows, torch.tensor([1]), torch.tensor([0]), torch.ones(1, 2))
        >>> rows
        tensor([1.0000, 1.5000, 2.5000, 4.0000])
    """
    storage, dim = storage.detach(), grad.shape[1]
    *_, lr, eps = update.numbers.tolist()
    if update.rule == "sgd":
        direction = grad
    elif update.rule == "adagrad":
        table = row_table(update.state[0], dim)
        total = table.index_select(0, start).addcmul_(grad, grad)
        table.index_copy_(0, start, total)
        direction = grad / total.sqrt_().add_(eps)
    elif update.rule == "rowwise_adagrad":
        assert update.per_id is not None
        total = update.per_id.index_select(0, ids) + grad.square().mean(1)
        update.per_id.index_copy_(0, ids, total)
        direction = grad / total.sqrt_().add_(eps)[:, None]
    elif update.rule == "adam":
        direction = _adam_direction(update, start, ids, grad)
    else:
        raise ValueError(f"rule must be one of {RULES}, got {update.rule!r}")
    table = row_table(storage, dim)
    row = table.index_select(0, start).to(grad.dtype).sub_(direction * lr)
    table.index_copy_(0, start, row.to(storage.dtype))


def _adam_direction(update: Update, start: Tensor, ids: Tensor, g: Tensor) -> Tensor:
    """Decayed moments take the gradient and are stored; returns their corrected quotient."""
    assert update.clock is not None and update.per_id is not None
    _, *betas, _, _, _, eps = update.numbers.tolist()
    t = update.clock[0]
    age = t - update.per_id.index_select(0, ids)
    update.per_id[ids] = t.to(update.per_id.dtype)
    moments = []
    for state, beta, new in zip(update.state, betas, (g, g * g), strict=True):
        table = row_table(state, g.shape[1])
        # In fp64, and one number per row: the error of beta^age grows with age.
        decay = torch.pow(beta, age).to(g.dtype)[:, None]
        moment = table.index_select(0, start).mul_(decay).add_(new, alpha=1 - beta)
        table.index_copy_(0, start, moment)
        moments.append(moment)
    first, second = 1 - update.clock[1:]
    m, v = moments
    return m.div_(first).div_(v.div_(second).sqrt_().add_(eps))


def row_table(flat: Tensor, dim: int) -> Tensor:
    """The row that begins at every element, ``[len - dim + 1, dim]``: a view that overlaps itself.

    Rows in use do not overlap, so they are read and written through it, whatever their alignment.
    """
    return flat.as_strided((flat.numel() - dim + 1, dim), (1, 1))


@triton.jit
def _ids_of_runs(
    ids_ptr, run_first_ptr, first_run, mask_run, RULE: tl.constexpr, BLOCK_ROWS: tl.constexpr
):
    """The ids of a tile's runs, for rules that keep something per id."""
    lane = tl.arange(0, BLOCK_ROWS)
    if RULE == "adam" or RULE == "rowwise_adagrad":
        first = tl.load(run_first_ptr + first_run + lane, mask=mask_run, other=0)
        occurrence = tl.where(first < 0, -1 - first, first)
        ids = tl.load(ids_ptr + occurrence, mask=mask_run, other=0).to(tl.int64)
    else:
        ids = lane.to(tl.int64)
    return ids


@triton.jit
def _step_rows(
    per_id_ptr,
    clock_ptr,
    numbers_ptr,
    ids,
    square,
    mask_run,
    D: tl.constexpr,
    RULE: tl.constexpr,
    ACC: tl.constexpr,
):
    """What a rule keeps per row, brought to this step: two numbers for every run.

    Adam: the decay of either moment since the row's last step. Row-wise Adagrad: the sum, twice.
    Every warp reads the rows that it works on, one warp writes them all: the barriers keep a late
    warp from reading what the step has written.
    """
    decay = tl.zeros_like(square)
    keep = decay
    if RULE == "adam":
        step = tl.load(clock_ptr)
        since = step - tl.load(per_id_ptr + ids, mask=mask_run, other=0).to(tl.float64)
        decay = tl.exp2((since * tl.load(numbers_ptr + 3)).to(ACC))
        keep = tl.exp2((since * tl.load(numbers_ptr + 4)).to(ACC))
        tl.debug_barrier()
        tl.store(per_id_ptr + ids, tl.zeros_like(ids).to(tl.int32) + step.to(tl.int32), mask_run)
    if RULE == "rowwise_adagrad":
        decay = tl.load(per_id_ptr + ids, mask=mask_run, other=1.0).to(ACC) + square / D
        keep = decay
        tl.debug_barrier()
        tl.store(per_id_ptr + ids, decay, mask_run)
    return decay, keep


@triton.jit
def _finish(
    storage_ptr,
    target_ptr,
    moment_ptr,
    square_ptr,
    clock_ptr,
    numbers_ptr,
    start,
    mask_run,
    offs_d,
    grad,
    decay,
    keep,
    D: tl.constexpr,
    RULE: tl.constexpr,
    ACC: tl.constexpr,
):
    """Write the gradient of a block of rows, or what the rule makes of rows and state."""
    element = start[:, None] + offs_d[None, :]  # [BLOCK_ROWS, len(offs_d)]
    mask = mask_run[:, None] & (offs_d < D)[None, :]
    if RULE == "gradient":
        tl.store(target_ptr + element, grad.to(target_ptr.dtype.element_ty), mask=mask)
    else:
        lr = tl.load(numbers_ptr + 5).to(ACC)
        eps = tl.load(numbers_ptr + 6).to(ACC)
        row = tl.load(storage_ptr + element, mask=mask, other=0.0).to(ACC)
        if RULE == "sgd":
            row -= lr * grad
        if RULE == "adagrad":
            total = tl.load(square_ptr + element, mask=mask, other=1.0) + grad * grad
            tl.store(square_ptr + element, total, mask=mask)
            row -= lr * grad / (tl.sqrt(total) + eps)
        if RULE == "rowwise_adagrad":
            row -= lr * grad / (tl.sqrt(decay) + eps)[:, None]
        if RULE == "adam":
            correct1 = (1.0 - tl.load(clock_ptr + 1)).to(ACC)
            correct2 = (1.0 - tl.load(clock_ptr + 2)).to(ACC)
            moment = tl.load(moment_ptr + element, mask=mask, other=0.0) * decay[:, None]
            moment += (1.0 - tl.load(numbers_ptr + 1)).to(ACC) * grad
            total = tl.load(square_ptr + element, mask=mask, other=1.0) * keep[:, None]
            total += (1.0 - tl.load(numbers_ptr + 2)).to(ACC) * grad * grad
            tl.store(moment_ptr + element, moment, mask=mask)
            tl.store(square_ptr + element, total, mask=mask)
            row -= lr * (moment / correct1) / (tl.sqrt(total / correct2) + eps)
        tl.store(storage_ptr + element, row.to(storage_ptr.dtype.element_ty), mask=mask)


def rule_state(update: Update, storage: Tensor) -> list[Tensor]:
    """``[moment, square, per_id, clock, numbers]``; nothing is read of what a rule lacks."""
    moments = [*update.state[:1], *update.state[-1:]] or [storage, storage]
    others = [storage if t is None else t for t in (update.per_id, update.clock)]
    return [*moments, *others, update.numbers]
