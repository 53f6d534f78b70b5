"""Rules of the fused optimizers inside the kernels of the lookup's gradient."""

from __future__ import annotations

from torch import Tensor

from ..ops.backend import tl, triton
from ..ops.update import Update

__all__ = [
    "clip_grads",
    "finish_rows",
    "ids_of_runs",
    "norm_columns",
    "row_scale",
    "row_squares",
    "rule_state",
    "step_rows",
]


@triton.jit
def ids_of_runs(
    ids_ptr, run_first_ptr, first_run, mask_run, RULE: tl.constexpr, BLOCK_ROWS: tl.constexpr
):
    """The ids of a tile's runs, for rules that keep something per id."""
    lane = tl.arange(0, BLOCK_ROWS)
    if (RULE == "adam" or RULE == "rowwise_adagrad") or RULE == "rowwise_adam":
        first = tl.load(run_first_ptr + first_run + lane, mask=mask_run, other=0)
        occurrence = tl.where(first < 0, -1 - first, first)
        ids = tl.load(ids_ptr + occurrence, mask=mask_run, other=0).to(tl.int64)
    else:
        ids = lane.to(tl.int64)
    return ids


@triton.jit
def clip_grads(state, grad, ACC: tl.constexpr):
    """Every number of the gradient within ``clip_value``; a NaN stays."""
    limit = tl.load(state[4] + 9).to(ACC)
    grad = tl.where(grad > limit, limit, grad)
    return tl.where(grad < -limit, -limit, grad)


@triton.jit
def norm_columns(state, D: tl.constexpr):
    """How many columns' squares :func:`row_scale` needs: none where no norm is bounded."""
    return tl.where(tl.load(state[4] + 10) == float("inf"), 0, D)


@triton.jit
def row_scale(state, square, ACC: tl.constexpr):
    """What brings every row's gradient, of the sum of squares ``square``, to ``clip_row_norm``."""
    limit = tl.load(state[4] + 10).to(ACC)
    scale = limit / (tl.sqrt(square) + 1e-6)
    scale = tl.where(scale > 1.0, 1.0, scale)  # a NaN stays
    return tl.where(limit == float("inf"), 1.0, scale)


@triton.jit
def row_squares(
    rows,
    state,
    start,
    mask_run,
    offs_d,
    grad,
    D: tl.constexpr,
    SHAPED: tl.constexpr,
    ACC: tl.constexpr,
):
    """Squares of a block of the gradient, with its L2 penalty where SHAPED, summed by row.

    ``rows``, ``state``: as in :func:`finish_rows`.
    """
    if SHAPED:
        element = start[:, None] + offs_d[None, :]
        mask = mask_run[:, None] & (offs_d < D)[None, :]
        row = tl.load(rows[0] + element, mask=mask, other=0.0).to(ACC)
        grad += tl.load(state[4] + 7).to(ACC) * row
    return tl.sum(grad * grad, axis=1)


@triton.jit
def step_rows(
    state,
    ids,
    square,
    mask_run,
    D: tl.constexpr,
    RULE: tl.constexpr,
    ACC: tl.constexpr,
):
    """What a rule keeps per row, brought to this step: two numbers for every run.

    Adam: the decay of either moment since the row's last step. Row-wise Adam: that of the first,
    and the second moment. Row-wise Adagrad: the sum, twice. Every warp reads the rows that it works
    on, one warp writes them all: the barriers keep a late warp from reading what the step has
    written. ``square``: what :func:`row_squares` gave; ``state``: as in :func:`finish_rows`.
    """
    moment_ptr, square_ptr, last_step_ptr, clock_ptr, numbers_ptr = state
    decay = tl.zeros_like(square)
    keep = decay
    if RULE == "adam" or RULE == "rowwise_adam":
        step = tl.load(clock_ptr)
        since = step - tl.load(last_step_ptr + ids, mask=mask_run, other=0).to(tl.float64)
        decay = tl.exp2((since * tl.load(numbers_ptr + 3)).to(ACC))
        keep = tl.exp2((since * tl.load(numbers_ptr + 4)).to(ACC))
        if RULE == "rowwise_adam":
            keep *= tl.load(square_ptr + ids, mask=mask_run, other=1.0).to(ACC)
            keep += (1.0 - tl.load(numbers_ptr + 2)).to(ACC) * (square / D)
        tl.debug_barrier()
        tl.store(last_step_ptr + ids, tl.zeros_like(ids).to(tl.int32) + step.to(tl.int32), mask_run)
        if RULE == "rowwise_adam":
            tl.store(square_ptr + ids, keep, mask_run)
    if RULE == "rowwise_adagrad":
        decay = tl.load(square_ptr + ids, mask=mask_run, other=1.0).to(ACC) + square / D
        keep = decay
        tl.debug_barrier()
        tl.store(square_ptr + ids, decay, mask_run)
    return decay, keep


@triton.jit
def finish_rows(
    rows,
    state,
    kept,
    start,
    mask_run,
    offs_d,
    grad,
    D: tl.constexpr,
    RULE: tl.constexpr,
    SHAPED: tl.constexpr,
    ACC: tl.constexpr,
):
    """Write the gradient of a block of rows, or what the rule makes of rows and state.

    ``rows``: pointers ``(storage, target)``; ``state``: what :func:`rule_state` gave, as pointers;
    ``kept``: what :func:`step_rows` gave. SHAPED: the gradient is clipped, its L2 penalty is
    added here, and the row decays.
    """
    storage_ptr, target_ptr = rows
    moment_ptr, square_ptr, last_step_ptr, clock_ptr, numbers_ptr = state
    decay, keep = kept
    element = start[:, None] + offs_d[None, :]  # [BLOCK_ROWS, len(offs_d)]
    mask = mask_run[:, None] & (offs_d < D)[None, :]
    if RULE == "gradient" or RULE == "collect":
        tl.store(target_ptr + element, grad.to(target_ptr.dtype.element_ty), mask=mask)
    else:
        lr = tl.load(numbers_ptr + 5).to(ACC)
        eps = tl.load(numbers_ptr + 6).to(ACC)
        row = tl.load(storage_ptr + element, mask=mask, other=0.0).to(ACC)
        if SHAPED:
            grad += tl.load(numbers_ptr + 7).to(ACC) * row
            row *= tl.load(numbers_ptr + 8).to(ACC)
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
        if RULE == "rowwise_adam":
            correct1 = (1.0 - tl.load(clock_ptr + 1)).to(ACC)
            correct2 = (1.0 - tl.load(clock_ptr + 2)).to(ACC)
            moment = tl.load(moment_ptr + element, mask=mask, other=0.0) * decay[:, None]
            moment += (1.0 - tl.load(numbers_ptr + 1)).to(ACC) * grad
            tl.store(moment_ptr + element, moment, mask=mask)
            row -= lr * (moment / correct1) / (tl.sqrt(keep / correct2) + eps)[:, None]
        tl.store(storage_ptr + element, row.to(storage_ptr.dtype.element_ty), mask=mask)


def rule_state(update: Update, storage: Tensor) -> list[Tensor]:
    """``[moment, square, last_step, clock, numbers]``; nothing is read of what a rule lacks.

    ``square``: per element, of row-wise rules ``row_sums``.
    """
    moment, square = (update.state[0], update.state[-1]) if update.state else (storage, storage)
    if update.row_sums is not None:
        square = update.row_sums
    others = [storage if t is None else t for t in (update.last_step, update.clock)]
    return [moment, square, *others, update.numbers]
