"""Rules of the fused optimizers inside the kernels of the lookup's gradient."""

from __future__ import annotations

from torch import Tensor

from ..ops.backend import tl, triton
from ..ops.update import Update

__all__ = ["finish_rows", "ids_of_runs", "rule_state", "step_rows"]


@triton.jit
def ids_of_runs(
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

    Adam: the decay of either moment since the row's last step. Row-wise Adagrad: the sum, twice.
    Every warp reads the rows that it works on, one warp writes them all: the barriers keep a late
    warp from reading what the step has written. ``state``: as in :func:`finish_rows`.
    """
    moment_ptr, square_ptr, per_id_ptr, clock_ptr, numbers_ptr = state
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
    ACC: tl.constexpr,
):
    """Write the gradient of a block of rows, or what the rule makes of rows and state.

    ``rows``: pointers ``(storage, target)``; ``state``: pointers ``(moment, square, per_id, clock,
    numbers)``; ``kept``: what :func:`step_rows` gave.
    """
    storage_ptr, target_ptr = rows
    moment_ptr, square_ptr, per_id_ptr, clock_ptr, numbers_ptr = state
    decay, keep = kept
    element = start[:, None] + offs_d[None, :]  # [BLOCK_ROWS, len(offs_d)]
    mask = mask_run[:, None] & (offs_d < D)[None, :]
    if RULE == "gradient" or RULE == "collect":
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
