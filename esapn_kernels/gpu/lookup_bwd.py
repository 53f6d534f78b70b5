"""Gradient of the ragged lookup, or the optimizer's step in its place.

With ``g = sum G`` over the occurrences of a row, ``M_k, c_k`` from ``ops.compose``:

    d e   = M_k^T g                     written to the storage's gradient, or put into a rule of
                                        ``ops.update`` on the row and its state
    d M_k = sum_x g e^T,   d c_k = sum_x g        over the distinct rows x of level k, e before that

Distinct rows first (``segments``). Then three passes over tiles of runs of one level:

    sums     last level: g is d e, finished at once. Below: g of rows that occur more than once
    chain    rows below the last level: d M_k, d c_k, per program and then in order of the programs
    rows     the same rows: d e, finished

    sums [U, D]   g of the rows below the last level that occur more than once; a row that
                    occurs once has its g in the output's gradient

Chain and rows in one pass would read g once less. Compiled, that took 255 registers a thread, one
block a multiprocessor, spilled on sm_80 and issued more instructions for a row than both passes
(docs/design.md, "Backward", has the settings and figures).
There are no atomics and every sum has a fixed order, so equal inputs give equal bits. Bytes per
distinct row, fp32: 4 D (G) + 8 (key, place) + 8 d_k (row read and written), 16 d_k more with
Adam's state; below the last level 4 D + 4 d_k more for the chain, and 8 D for the sum of a row
that occurs more than once. Source of the operator: Liu et al., SIGIR 2020.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.backend import launch_kernel, tl, triton
from ..ops.layout import Layout
from ..ops.update import CollectedRows, Update
from . import launch
from .chain_grad import launch_chain_grad
from .launch import kernel_constants
from .segments import (
    Runs,
    find_runs,
    rows_of_runs,
    run_sums,
    share,
    sources,
    sum_hot,
    summed_grads,
)
from .update import (
    clip_grads,
    finish_rows,
    ids_of_runs,
    norm_columns,
    row_scale,
    row_squares,
    rule_state,
    step_rows,
)

__all__ = ["launch_bwd", "launch_bwd_rows", "launch_bwd_update"]


@triton.jit(do_not_specialize=["n_hot"])
def _sums_kernel(
    ids_ptr,
    order_ptr,
    run_begin_ptr,
    run_start_ptr,
    run_first_ptr,
    level_begin_ptr,
    grad_out_ptr,
    hot_ptr,
    sums_ptr,
    storage_ptr,
    target_ptr,
    moment_ptr,
    square_ptr,
    last_step_ptr,
    clock_ptr,
    numbers_ptr,
    n_hot,
    N_LEVELS: tl.constexpr,
    DIM: tl.constexpr,
    ALIGN: tl.constexpr,
    ACC: tl.constexpr,
    RULE: tl.constexpr,
    SHAPED: tl.constexpr,
    WALK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    batch = (run_begin_ptr, order_ptr, grad_out_ptr, hot_ptr, n_hot)
    rows = (storage_ptr, target_ptr)
    state = (moment_ptr, square_ptr, last_step_ptr, clock_ptr, numbers_ptr)
    pid = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_ROWS)
    lo, hi = share(level_begin_ptr, pid, tl.num_programs(0), N_LEVELS, BLOCK_ROWS)
    lo, hi = lo.to(tl.int32), hi.to(tl.int32)
    tile_base = 0
    # A loop and no copies: the sums of lower levels do not depend on their size.
    for k in range(0, N_LEVELS - 1):
        level_run = tl.load(level_begin_ptr + k)
        level_end = tl.load(level_begin_ptr + k + 1)
        n_tiles = tl.cdiv(level_end - level_run, BLOCK_ROWS)
        tile_lo = tl.maximum(lo - tile_base, 0)
        tile_hi = tl.minimum(hi - tile_base, n_tiles)
        for tile in range(tile_lo, tile_hi):
            first_run = level_run + tile * BLOCK_ROWS
            n_runs = level_end - first_run
            first = tl.load(run_first_ptr + first_run + lane, mask=lane < n_runs, other=0)
            many = first < 0
            if tl.max(many.to(tl.int32), axis=0) > 0:
                begin = tl.load(run_begin_ptr + first_run + lane, mask=many, other=0)
                end = tl.load(run_begin_ptr + first_run + lane + 1, mask=many, other=0)
                runs = (first_run, n_runs, tl.where(many, -1 - first, -1), begin, end)
                run = (first_run + lane).to(tl.int64)
                for n in range(0, DIM, BLOCK_DIM):
                    offs_dim = n + tl.arange(0, BLOCK_DIM)
                    total = run_sums(batch, runs, offs_dim, DIM, ACC, WALK, BLOCK_ROWS, BLOCK_DIM)
                    tl.store(
                        sums_ptr + run[:, None] * DIM + offs_dim[None, :],
                        total,
                        mask=many[:, None] & (offs_dim < DIM)[None, :],
                    )
        tile_base += n_tiles
    level_run = tl.load(level_begin_ptr + N_LEVELS - 1)
    level_end = tl.load(level_begin_ptr + N_LEVELS)
    tile_lo = tl.maximum(lo - tile_base, 0)
    tile_hi = tl.minimum(hi - tile_base, tl.cdiv(level_end - level_run, BLOCK_ROWS))
    for tile in range(tile_lo, tile_hi):
        first_run = level_run + tile * BLOCK_ROWS
        n_runs = level_end - first_run
        mask_run = lane < n_runs
        begin = tl.load(run_begin_ptr + first_run + lane, mask=mask_run, other=0)
        end = tl.load(run_begin_ptr + first_run + lane + 1, mask=mask_run, other=0)
        first = tl.load(run_first_ptr + first_run + lane, mask=mask_run, other=0)
        first = tl.where(mask_run, tl.where(first < 0, -1 - first, first), -1)
        runs = (first_run, n_runs, first, begin, end)
        if RULE == "collect":
            start = (first_run + lane).to(tl.int64) * DIM
        else:
            start = rows_of_runs(run_start_ptr, first_run, mask_run, ALIGN, BLOCK_ROWS)
        ids = ids_of_runs(ids_ptr, run_first_ptr, first_run, mask_run, RULE, BLOCK_ROWS)
        square = tl.zeros([BLOCK_ROWS], dtype=ACC)
        if DIM <= BLOCK_DIM:
            # One block: its sums are taken once, for the rule and for the rows.
            offs_d = tl.arange(0, BLOCK_DIM)
            total = run_sums(batch, runs, offs_d, DIM, ACC, WALK, BLOCK_ROWS, BLOCK_DIM)
            if SHAPED:
                clipped = clip_grads(state, total, ACC)
                scale = row_scale(state, tl.sum(clipped * clipped, axis=1), ACC)
                total = clipped * scale[:, None]
            if RULE == "rowwise_adagrad" or RULE == "rowwise_adam":
                square = row_squares(rows, state, start, mask_run, offs_d, total, DIM, SHAPED, ACC)
            kept = step_rows(state, ids, square, mask_run, DIM, RULE, ACC)
            finish_rows(rows, state, kept, start, mask_run, offs_d, total, DIM, RULE, SHAPED, ACC)
        else:
            if SHAPED:
                # Where no norm is bounded, the pass that it needs is none.
                for j in range(0, norm_columns(state, DIM), BLOCK_DIM):
                    offs_d = j + tl.arange(0, BLOCK_DIM)
                    total = run_sums(batch, runs, offs_d, DIM, ACC, WALK, BLOCK_ROWS, BLOCK_DIM)
                    total = clip_grads(state, total, ACC)
                    square += tl.sum(total * total, axis=1)
                scale = row_scale(state, square, ACC)
                square = tl.zeros_like(square)
            if RULE == "rowwise_adagrad" or RULE == "rowwise_adam":
                for j in range(0, DIM, BLOCK_DIM):
                    offs_d = j + tl.arange(0, BLOCK_DIM)
                    total = run_sums(batch, runs, offs_d, DIM, ACC, WALK, BLOCK_ROWS, BLOCK_DIM)
                    if SHAPED:
                        total = clip_grads(state, total, ACC) * scale[:, None]
                    square += row_squares(
                        rows, state, start, mask_run, offs_d, total, DIM, SHAPED, ACC
                    )
            kept = step_rows(state, ids, square, mask_run, DIM, RULE, ACC)
            for j in range(0, DIM, BLOCK_DIM):
                offs_d = j + tl.arange(0, BLOCK_DIM)
                total = run_sums(batch, runs, offs_d, DIM, ACC, WALK, BLOCK_ROWS, BLOCK_DIM)
                if SHAPED:
                    total = clip_grads(state, total, ACC) * scale[:, None]
                finish_rows(
                    rows, state, kept, start, mask_run, offs_d, total, DIM, RULE, SHAPED, ACC
                )


@triton.jit
def _row_grad(
    grads,
    a_ptr,
    offs_d,
    D: tl.constexpr,
    DIM: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Columns ``offs_d`` of ``d e = M_k^T g`` for a tile of runs.

    ``grads``: ``(grad_out_ptr, sums_ptr, alone, summed)``, see ``segments.sources``.
    """
    grad_out_ptr, sums_ptr, alone, summed = grads
    grad = tl.zeros([BLOCK_ROWS, BLOCK_D], dtype=ACC)
    for n in range(0, DIM, BLOCK_N):
        offs_dim = n + tl.arange(0, BLOCK_N)
        total = summed_grads(grad_out_ptr, sums_ptr, alone, summed, offs_dim, DIM, ACC)
        a = tl.load(
            a_ptr + offs_d[None, :] * DIM + offs_dim[:, None],
            mask=(offs_d < D)[None, :] & (offs_dim < DIM)[:, None],
            other=0.0,
        )  # [BLOCK_N, BLOCK_D]
        grad = tl.dot(total, a, grad, input_precision=PRECISION, out_dtype=ACC)
    return grad


@triton.jit
def _rows_level(
    batch,
    rows,
    state,
    a_ptr,
    first_run,
    n_runs,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    DIM: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    RULE: tl.constexpr,
    SHAPED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of rows of one level below the last.

    ``batch``: pointers ``(ids, run_start, run_first, grad_out, sums)``; ``rows``, ``state``: as in
    ``update.finish_rows``.
    """
    ids_ptr, run_start_ptr, run_first_ptr, grad_out_ptr, sums_ptr = batch
    lane = tl.arange(0, BLOCK_ROWS)
    mask_run = lane < n_runs
    if RULE == "collect":
        start = (first_run + lane).to(tl.int64) * DIM
    else:
        start = rows_of_runs(run_start_ptr, first_run, mask_run, ALIGN, BLOCK_ROWS)
    ids = ids_of_runs(ids_ptr, run_first_ptr, first_run, mask_run, RULE, BLOCK_ROWS)
    alone, summed = sources(run_first_ptr, first_run, mask_run, BLOCK_ROWS)
    grads = (grad_out_ptr, sums_ptr, alone, summed)
    square = tl.zeros([BLOCK_ROWS], dtype=ACC)
    if D <= BLOCK_D:
        # One block: its product is taken once, for the rule and for the rows.
        offs_d = tl.arange(0, BLOCK_D)
        grad = _row_grad(grads, a_ptr, offs_d, D, DIM, ACC, PRECISION, BLOCK_ROWS, BLOCK_D, BLOCK_N)
        if SHAPED:
            clipped = clip_grads(state, grad, ACC)
            scale = row_scale(state, tl.sum(clipped * clipped, axis=1), ACC)
            grad = clipped * scale[:, None]
        if RULE == "rowwise_adagrad" or RULE == "rowwise_adam":
            square = row_squares(rows, state, start, mask_run, offs_d, grad, D, SHAPED, ACC)
        kept = step_rows(state, ids, square, mask_run, D, RULE, ACC)
        finish_rows(rows, state, kept, start, mask_run, offs_d, grad, D, RULE, SHAPED, ACC)
    else:
        if SHAPED:
            # Where no norm is bounded, the pass that it needs is none.
            for j in range(0, norm_columns(state, D), BLOCK_D):
                offs_d = j + tl.arange(0, BLOCK_D)
                grad = _row_grad(
                    grads, a_ptr, offs_d, D, DIM, ACC, PRECISION, BLOCK_ROWS, BLOCK_D, BLOCK_N
                )
                grad = clip_grads(state, grad, ACC)
                square += tl.sum(grad * grad, axis=1)
            scale = row_scale(state, square, ACC)
            square = tl.zeros_like(square)
        if RULE == "rowwise_adagrad" or RULE == "rowwise_adam":
            for j in range(0, D, BLOCK_D):
                offs_d = j + tl.arange(0, BLOCK_D)
                grad = _row_grad(
                    grads, a_ptr, offs_d, D, DIM, ACC, PRECISION, BLOCK_ROWS, BLOCK_D, BLOCK_N
                )
                if SHAPED:
                    grad = clip_grads(state, grad, ACC) * scale[:, None]
                square += row_squares(rows, state, start, mask_run, offs_d, grad, D, SHAPED, ACC)
        kept = step_rows(state, ids, square, mask_run, D, RULE, ACC)
        for j in range(0, D, BLOCK_D):
            offs_d = j + tl.arange(0, BLOCK_D)
            grad = _row_grad(
                grads, a_ptr, offs_d, D, DIM, ACC, PRECISION, BLOCK_ROWS, BLOCK_D, BLOCK_N
            )
            if SHAPED:
                grad = clip_grads(state, grad, ACC) * scale[:, None]
            finish_rows(rows, state, kept, start, mask_run, offs_d, grad, D, RULE, SHAPED, ACC)


@triton.jit
def _rows_kernel(
    ids_ptr,
    run_start_ptr,
    run_first_ptr,
    level_begin_ptr,
    grad_out_ptr,
    sums_ptr,
    composed_ptr,
    storage_ptr,
    target_ptr,
    moment_ptr,
    square_ptr,
    last_step_ptr,
    clock_ptr,
    numbers_ptr,
    SIZES: tl.constexpr,
    ALIGN: tl.constexpr,
    PADS: tl.constexpr,
    DIM: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    RULE: tl.constexpr,
    SHAPED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    batch = (ids_ptr, run_start_ptr, run_first_ptr, grad_out_ptr, sums_ptr)
    rows = (storage_ptr, target_ptr)
    state = (moment_ptr, square_ptr, last_step_ptr, clock_ptr, numbers_ptr)
    pid = tl.program_id(0).to(tl.int64)
    lo, hi = share(level_begin_ptr, pid, tl.num_programs(0), len(SIZES) - 1, BLOCK_ROWS)
    tile_base = tl.zeros_like(pid)
    offset = 0
    for k in tl.static_range(len(SIZES) - 1):
        level_run = tl.load(level_begin_ptr + k)
        level_end = tl.load(level_begin_ptr + k + 1)
        n_tiles = tl.cdiv(level_end - level_run, BLOCK_ROWS)
        tile_lo = tl.maximum(lo - tile_base, 0).to(tl.int32)
        tile_hi = tl.minimum(hi - tile_base, n_tiles).to(tl.int32)
        for tile in range(tile_lo, tile_hi):
            first_run = level_run + tile * BLOCK_ROWS
            _rows_level(
                batch,
                rows,
                state,
                composed_ptr + offset * DIM,
                first_run,
                level_end - first_run,
                SIZES[k],
                ALIGN[k],
                DIM,
                ACC,
                PRECISION,
                RULE,
                SHAPED,
                BLOCK_ROWS,
                min(PADS[k], BLOCK_K),
                BLOCK_N,
            )
        tile_base += n_tiles
        offset += SIZES[k] + 1


def _launch(
    grad_out: Tensor,
    ids: Tensor,
    storage: Tensor,
    composed: Tensor,
    layout: Layout,
    *,
    target: Tensor,
    rule: str,
    update: Update | None = None,
    want_composed: bool,
) -> tuple[Runs | None, Tensor | None]:
    """The three passes; returns the runs, and the gradient of ``composed`` if wanted."""
    n_ids, sizes = ids.numel(), layout.sizes
    lower = len(sizes) > 1
    if not n_ids:
        if update is not None:
            update.tick()
        return None, torch.zeros_like(composed) if want_composed else None
    # Kernels count from the first number: of a strided view, that is not where the second lies.
    grad_out, ids = grad_out.contiguous(), ids.contiguous()
    state = [storage] * 5 if update is None else rule_state(update, storage)
    shaped = update is not None and update.shaped
    far = layout.row_start.dtype == torch.int64
    config = launch.choose_bwd(n_ids, sizes, storage.dtype, rule, far)
    tick = None
    if update is not None and update.clock is not None:
        tick = update.clock, update.numbers
    runs = find_runs(ids, layout, capacity=storage.numel(), tick=tick)
    hot, n_hot = sum_hot(runs, grad_out, len(sizes), config)
    sums = composed.new_empty(runs.run_start.numel() if lower else 0, layout.dim)
    constants = kernel_constants(sizes, storage.dtype)
    align = launch.alignments(sizes)
    shared = {name: constants[name] for name in ("DIM", "ACC")}
    where = (runs.run_start, runs.run_first, runs.level_begin, grad_out)
    launch_kernel(
        _sums_kernel,
        (config.sums.programs,),
        ids,
        runs.order,
        runs.run_begin,
        *where,
        hot,
        sums,
        storage,
        target,
        *state,
        n_hot,
        **shared,
        N_LEVELS=len(sizes),
        ALIGN=align[-1],
        RULE=rule,
        SHAPED=shaped,
        **config.sums.constants,
    )
    grad_composed = torch.empty_like(composed) if want_composed else None
    if not lower:
        return runs, grad_composed
    shared.update(
        SIZES=constants["SIZES"],
        ALIGN=align,
        PADS=launch.pads(sizes),
        PRECISION=constants["PRECISION"],
    )
    if grad_composed is not None:  # before the rows change
        launch_chain_grad(grad_composed, where, sums, storage, shared, config.chain)
    launch_kernel(
        _rows_kernel,
        (config.rows.programs,),
        ids,
        *where,
        sums,
        composed,
        storage,
        target,
        *state,
        **shared,
        RULE=rule,
        SHAPED=shaped,
        **config.rows.constants,
    )
    return runs, grad_composed


def launch_bwd(
    grad_out: Tensor,
    ids: Tensor,
    storage: Tensor,
    composed: Tensor,
    layout: Layout,
    want_composed: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the storage (dense, same shape and dtype) and, if wanted, of ``composed``."""
    target = torch.zeros_like(storage)
    operands = (grad_out, ids, storage, composed, layout)
    _, wanted = _launch(*operands, target=target, rule="gradient", want_composed=want_composed)
    return target, wanted


def launch_bwd_rows(
    grad_out: Tensor,
    ids: Tensor,
    storage: Tensor,
    composed: Tensor,
    layout: Layout,
    want_composed: bool = True,
) -> tuple[CollectedRows, Tensor | None]:
    """Gradients of the rows looked up, each once, and, if wanted, of ``composed``.

    The host does not learn how many rows there are: as many places as occurrences, of which the
    last have the id -1.
    """
    n_levels, dim = len(layout.sizes), layout.dim
    count = min(ids.numel(), layout.num_rows + 1)
    target = composed.new_zeros(count * dim)
    operands = (grad_out, ids, storage, composed, layout)
    runs, wanted = _launch(*operands, target=target, rule="collect", want_composed=want_composed)
    run = torch.arange(count, device=ids.device)
    if runs is None:
        return CollectedRows(run, run.to(torch.int8), run, target, True), wanted
    level = torch.searchsorted(runs.level_begin, run.to(torch.int32), right=True) - 1
    first = torch.where(runs.run_first < 0, -1 - runs.run_first, runs.run_first)
    found = ids.reshape(-1).long().index_select(0, first.clamp(0, ids.numel() - 1))
    none = level == n_levels
    level = level.masked_fill(none, 0).to(torch.int8)
    return CollectedRows(found.masked_fill(none, -1), level, run * dim, target, True), wanted


def launch_bwd_update(
    grad_out: Tensor,
    ids: Tensor,
    storage: Tensor,
    composed: Tensor,
    layout: Layout,
    update: Update,
    want_composed: bool = True,
) -> Tensor | None:
    """Apply ``update`` to the rows of ``ids``, in place, each once with its summed gradient.

    Ids that do not exist change nothing. Returns the gradient of ``composed`` from the rows as they
    were before, or ``None`` if it is not wanted.
    """
    operands = (grad_out, ids, storage, composed, layout)
    _, wanted = _launch(
        *operands, target=storage, rule=update.rule, update=update, want_composed=want_composed
    )
    # The kernels write through pointers; autograd must know that saved rows are stale.
    torch.autograd.graph.increment_version(storage)
    return wanted
