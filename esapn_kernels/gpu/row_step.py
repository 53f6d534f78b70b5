"""Rows stepped by gradients that lookups collected: the rules of ``ops.update`` in one launch.

    for every listed row x, of size d:    g = values[place_x : place_x + d]
                                          e, state <- rule(e, state, g)

Bytes per row, fp32: 17 (id, level, place) and its location, 4 d (g), 8 d (row), 16 d more with
Adam's state. Tiles are of rows as they are listed; the sizes in a tile are worked through one after
the other, so that one size's loop has a fixed length. Ids are distinct: no two programs meet.
"""

from __future__ import annotations

from torch import Tensor

from ..ops.backend import launch_kernel, tl, triton
from ..ops.layout import Layout
from ..ops.update import CollectedRows, Update
from . import launch
from .group import page_levels
from .launch import kernel_constants
from .update import (
    clip_grads,
    finish_rows,
    norm_columns,
    row_scale,
    row_squares,
    rule_state,
    step_rows,
)

__all__ = ["launch_row_step"]


@triton.jit(do_not_specialize=["n_listed", "page_shift"])
def _row_step_kernel(
    ids_ptr,
    level_ptr,
    place_ptr,
    values_ptr,
    row_start_ptr,
    page_level_ptr,
    storage_ptr,
    moment_ptr,
    square_ptr,
    last_step_ptr,
    clock_ptr,
    numbers_ptr,
    n_listed,
    page_shift,
    SIZES: tl.constexpr,
    PADS: tl.constexpr,
    ACC: tl.constexpr,
    RULE: tl.constexpr,
    SHAPED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = (storage_ptr, storage_ptr)
    state = (moment_ptr, square_ptr, last_step_ptr, clock_ptr, numbers_ptr)
    listed = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = listed < n_listed
    ids = tl.load(ids_ptr + listed, mask=inside, other=-1)
    level = tl.load(level_ptr + listed, mask=inside, other=-1).to(tl.int32)
    place = tl.load(place_ptr + listed, mask=inside, other=0)
    start = tl.load(row_start_ptr + tl.maximum(ids, 0), mask=ids >= 0, other=0).to(tl.int64)
    # Rows that a graph has moved meanwhile have another level.
    listed_row = (ids >= 0) & (start >= 0)
    present = tl.load(page_level_ptr + (start >> page_shift), mask=listed_row, other=-1)
    level = tl.where(listed_row & (present == level), level, -1)
    for k in tl.static_range(len(SIZES)):
        mask_row = level == k
        if tl.max(mask_row.to(tl.int32), axis=0) > 0:
            _step_level(
                rows,
                state,
                values_ptr,
                tl.where(mask_row, ids, 0),
                place,
                start,
                mask_row,
                SIZES[k],
                ACC,
                RULE,
                SHAPED,
                BLOCK_ROWS,
                min(PADS[k], BLOCK_D),
            )


@triton.jit
def _load_grads(
    state,
    values_ptr,
    place,
    mask_row,
    offs_d,
    D: tl.constexpr,
    ACC: tl.constexpr,
    CLIP: tl.constexpr,
):
    mask = mask_row[:, None] & (offs_d < D)[None, :]
    grad = tl.load(values_ptr + place[:, None] + offs_d[None, :], mask=mask, other=0.0)
    if CLIP:
        grad = clip_grads(state, grad, ACC)
    return grad


@triton.jit
def _step_level(
    rows,
    state,
    values_ptr,
    ids,
    place,
    start,
    mask_row,
    D: tl.constexpr,
    ACC: tl.constexpr,
    RULE: tl.constexpr,
    SHAPED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The rows of a tile that have D numbers."""
    square = tl.zeros([BLOCK_ROWS], dtype=ACC)
    scale = square + 1.0
    if SHAPED:
        for j in range(0, norm_columns(state, D), BLOCK_D):
            offs_d = j + tl.arange(0, BLOCK_D)
            grad = _load_grads(state, values_ptr, place, mask_row, offs_d, D, ACC, True)
            square += tl.sum(grad * grad, axis=1)
        scale = row_scale(state, square, ACC)
        square = tl.zeros_like(square)
    if RULE == "rowwise_adagrad" or RULE == "rowwise_adam":
        for j in range(0, D, BLOCK_D):
            offs_d = j + tl.arange(0, BLOCK_D)
            grad = _load_grads(state, values_ptr, place, mask_row, offs_d, D, ACC, SHAPED)
            grad *= scale[:, None]
            square += row_squares(rows, state, start, mask_row, offs_d, grad, D, SHAPED, ACC)
    kept = step_rows(state, ids, square, mask_row, D, RULE, ACC)
    for j in range(0, D, BLOCK_D):
        offs_d = j + tl.arange(0, BLOCK_D)
        grad = _load_grads(state, values_ptr, place, mask_row, offs_d, D, ACC, SHAPED)
        grad *= scale[:, None]
        finish_rows(rows, state, kept, start, mask_row, offs_d, grad, D, RULE, SHAPED, ACC)


def launch_row_step(rows: CollectedRows, storage: Tensor, layout: Layout, update: Update) -> None:
    """Step every row of ``rows`` by its gradient and move ``update``'s clock on.

    Args:
        rows: distinct ids, but for -1, of the sizes that rows have in ``layout``.
        storage: the rows, stepped in place.
        layout: where they lie.
        update: the rule and its state.
    """
    update.tick()
    count = rows.ids.numel()
    if not count:
        return
    constants = kernel_constants(layout.sizes, storage.dtype)
    config = launch.choose_row_step(layout.sizes, storage.dtype)
    launch_kernel(
        _row_step_kernel,
        (launch.cdiv(count, config["BLOCK_ROWS"]),),
        rows.ids,
        rows.level,
        rows.place,
        rows.values,
        layout.row_start,
        page_levels(layout),
        storage,
        *rule_state(update, storage),
        count,
        layout.page_shift,
        SIZES=constants["SIZES"],
        PADS=launch.pads(layout.sizes),
        ACC=constants["ACC"],
        RULE=update.rule,
        SHAPED=update.shaped,
        **config,
    )
