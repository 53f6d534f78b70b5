"""Rows that move one level up or down, rows that begin, rows that go; and that start afresh.

    promote:  e' = W_k e + b_k      e in R^{d_k} at its old place, e' in R^{d_{k+1}} at its new one
    demote:   e' = D_k [e; 1]       e in R^{d_{k+1}}, e' in R^{d_k}: the same by down hops
    insert:   e' = 0                an id without a row gets one
    free:                           an id's row is given back

A promotion changes no output: M_k e + c_k = M_{k+1} (W_k e + b_k) + c_{k+1}.

Three launches for any number of ids, R positions in ``ids``, nothing read by the host:

    claim   owner[id] = first position that names the id, an atomic minimum             [N]
            group = the level that it leaves (insert: enters), -1: nothing to do       [R]
    scan    one program ranks the owners of every group in the order of their positions and hands
            out rows: free rows of the level's stack from its top, then rows of fresh pages; the
            rest of the last page goes on the stack. It settles every counter, and counts the call
            and the rows that find no room.
    move    rows, state and locations are written, old rows put on their level's stack

The first owners of a group move as far as rows, pages and room on the old level's stack reach; the
others stay, lower levels first, of a demotion higher ones. Old rows go on the stacks one launch
after new ones were taken from them, so no row is read and handed on at once, and new rows were free
before, hence disjoint from all old ones.

Source: Liu et al., SIGIR 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.backend import launch_kernel, tl, triton
from ..ops.layout import UNCLAIMED, Filled, Places
from . import launch
from .launch import block_constants, kernel_constants

__all__ = ["launch_demote", "launch_fill", "launch_free", "launch_insert", "launch_promote"]

CLAIM_IDS = 256
"""Positions that a program of the first launch looks at."""

MOVE_REGISTERS = 168
"""Registers a thread of the last launch; left to itself the assembler spills to save some."""

_STATES = 4


@triton.jit(do_not_specialize=["n_ids", "n_rows", "page_shift", "target"])
def _claim_kernel(
    ids_ptr,
    mask_ptr,
    row_start_ptr,
    page_level_ptr,
    owner_ptr,
    group_ptr,
    old_start_ptr,
    n_ids,
    n_rows,
    page_shift,
    target,
    N_LEVELS: tl.constexpr,
    TAKE: tl.constexpr,
    GIVE: tl.constexpr,
    HOP: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_IDS: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK_IDS + tl.arange(0, BLOCK_IDS)
    inside = offs < n_ids
    ids = tl.load(ids_ptr + offs, mask=inside, other=-1).to(tl.int64)
    mask_id = (ids >= 0) & (ids < n_rows)
    if MASKED:
        mask_id = mask_id & (tl.load(mask_ptr + offs, mask=inside, other=0) != 0)
    start = tl.load(row_start_ptr + ids, mask=mask_id, other=-1).to(tl.int64)
    level = tl.load(page_level_ptr + (start >> page_shift), mask=start >= 0, other=-1).to(tl.int32)
    group = level
    if TAKE:
        if HOP > 0:
            group = tl.where(level < N_LEVELS - 1, level, -1)
        elif HOP < 0:
            group = tl.where(level > 0, level, -1)
        else:
            group = tl.where(mask_id & (level < 0), target, -1)
    tl.store(group_ptr + offs, group.to(group_ptr.dtype.element_ty), mask=inside)
    tl.store(old_start_ptr + offs, start.to(old_start_ptr.dtype.element_ty), mask=inside)
    # The first position in ids, not the first program in time: the same in every run.
    tl.atomic_min(owner_ptr + ids, offs.to(tl.int32), mask=group >= 0, sem="relaxed")


@triton.jit(do_not_specialize=["n_ids", "page_shift", "kept"])
def _scan_kernel(
    ids_ptr,
    owner_ptr,
    group_ptr,
    first_ptr,
    rank_ptr,
    plan_ptr,
    new_start_ptr,
    free_rows_ptr,
    free_pages_ptr,
    free_count_ptr,
    free_base_ptr,
    moves_ptr,
    refused_ptr,
    n_ids,
    page_shift,
    kept,
    SIZES: tl.constexpr,
    TAKE: tl.constexpr,
    GIVE: tl.constexpr,
    HOP: tl.constexpr,
    UNCLAIMED: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK_IDS: tl.constexpr,
):
    levels = tl.arange(0, LEVELS)
    index = new_start_ptr.dtype.element_ty
    calls = tl.load(moves_ptr)
    refused = tl.load(refused_ptr)

    # Rank of every owner in its group, and how many rows every group needs.
    need = tl.zeros([LEVELS], dtype=tl.int32)
    for begin in range(0, n_ids, BLOCK_IDS):
        offs = begin + tl.arange(0, BLOCK_IDS)
        group = tl.load(group_ptr + offs, mask=offs < n_ids, other=-1).to(tl.int32)
        ids = tl.load(ids_ptr + offs, mask=group >= 0, other=0).to(tl.int64)
        first = tl.load(owner_ptr + ids, mask=group >= 0, other=UNCLAIMED)
        rank = tl.zeros_like(group) - 1
        for g in tl.static_range(len(SIZES)):
            owned = ((group == g) & (first == offs)).to(tl.int32)
            before = tl.sum(tl.where(levels == g, need, 0), axis=0)
            rank = tl.where(owned != 0, before + tl.cumsum(owned, axis=0) - 1, rank)
            need += tl.where(levels == g, tl.sum(owned, axis=0), 0)
        tl.store(first_ptr + offs, first.to(index), mask=offs < n_ids)
        tl.store(rank_ptr + offs, rank.to(index), mask=offs < n_ids)

    # How many of them it gets, and from where: what ``_move_kernel`` reads as ``plan``.
    moves = tl.zeros([LEVELS], dtype=tl.int64)
    held = tl.zeros([LEVELS], dtype=tl.int64)
    top = tl.zeros([LEVELS], dtype=tl.int64)
    give_at = tl.zeros([LEVELS], dtype=tl.int64)
    height_after = tl.zeros([LEVELS], dtype=tl.int64)
    pages = tl.load(free_count_ptr + len(SIZES))
    # Those that stay free are at the bottom of the stack.
    least = tl.minimum(pages, kept)
    # A group takes from the stack of the one that follows: down hops go from the last level on.
    FIRST: tl.constexpr = len(SIZES) - 1 if HOP < 0 else 0
    END: tl.constexpr = -1 if HOP < 0 else len(SIZES)
    STEP: tl.constexpr = -1 if HOP < 0 else 1
    height = tl.load(free_count_ptr + FIRST)
    for g in tl.static_range(FIRST, END, STEP):
        count = tl.sum(tl.where(levels == g, need, 0), axis=0).to(tl.int64)
        if GIVE:
            if not TAKE:
                height = tl.load(free_count_ptr + g)
            base = tl.load(free_base_ptr + g)
            count = tl.minimum(count, tl.load(free_base_ptr + g + 1) - base - height)
            give_at = tl.where(levels == g, base + height, give_at)
        next_height = height
        if TAKE and g + HOP < len(SIZES) and g + HOP >= 0:
            free = tl.load(free_count_ptr + g + HOP)
            per = (1 << page_shift) // SIZES[g + HOP]
            count = tl.minimum(count, free + (pages - least) * per)
            fresh = (tl.maximum(count - free, 0) + per - 1) // per
            held = tl.where(levels == g, free, held)
            top = tl.where(levels == g, pages, top)
            pages -= fresh
            next_height = free + fresh * per - count
        if GIVE:
            height_after = tl.where(levels == g, height + count, height_after)
        else:
            height_after = tl.where(levels == g, next_height, height_after)
        height = next_height
        moves = tl.where(levels == g, count, moves)
    tl.store(plan_ptr + levels, moves)
    tl.store(plan_ptr + LEVELS + levels, held)
    tl.store(plan_ptr + 2 * LEVELS + levels, top)
    tl.store(plan_ptr + 3 * LEVELS + levels, give_at)
    # What other threads stored, ranks and plan, is read now.
    tl.debug_barrier()

    if TAKE:
        for begin in range(0, n_ids, BLOCK_IDS):
            offs = begin + tl.arange(0, BLOCK_IDS)
            group = tl.load(group_ptr + offs, mask=offs < n_ids, other=-1).to(tl.int32)
            rank = tl.load(rank_ptr + offs, mask=offs < n_ids, other=-1).to(tl.int64)
            owned = rank >= 0
            limit = tl.load(plan_ptr + group, mask=owned, other=0)
            below = tl.load(plan_ptr + LEVELS + group, mask=owned, other=0) - rank
            bottom = tl.load(free_base_ptr + group + HOP, mask=owned, other=0)
            stacked = owned & (rank < limit) & (below > 0)
            start = tl.load(free_rows_ptr + bottom + below - 1, mask=stacked, other=-1)
            tl.store(new_start_ptr + offs, start.to(index), mask=offs < n_ids)
    # The stacks' entries and the counters have been read: they may change.
    tl.debug_barrier()

    if TAKE:
        BEGIN: tl.constexpr = 1 if HOP < 0 else 0
        STOP: tl.constexpr = len(SIZES) - 1 if HOP > 0 else len(SIZES)
        for g in tl.static_range(BEGIN, STOP):
            free = tl.sum(tl.where(levels == g, held, 0), axis=0)
            base = tl.load(free_base_ptr + g + HOP)
            per = (1 << page_shift) // SIZES[g + HOP]
            count = tl.sum(tl.where(levels == g, moves, 0), axis=0)
            if count > free:
                fresh = (count - free + per - 1) // per
                rest = free + fresh * per - count
                above = tl.sum(tl.where(levels == g, top, 0), axis=0)
                last = tl.load(free_pages_ptr + above - fresh).to(tl.int64)
                for j in range(0, rest, BLOCK_IDS):
                    offs = j + tl.arange(0, BLOCK_IDS)
                    start = (last << page_shift) + (per - 1 - offs) * SIZES[g + HOP]
                    start = start.to(free_rows_ptr.dtype.element_ty)
                    tl.store(free_rows_ptr + base + offs, start, mask=offs < rest)
        tl.store(free_count_ptr + len(SIZES), pages)
    tl.store(free_count_ptr + levels, height_after, mask=levels < len(SIZES))
    tl.store(moves_ptr, calls + 1)
    tl.store(refused_ptr, refused + tl.sum(need.to(tl.int64) - moves, axis=0))


@triton.jit
def _fill(
    target_ptr,
    start,
    dim,
    VALUE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Set the ``dim`` elements from ``start`` on of every row of a tile."""
    element: tl.constexpr = target_ptr.dtype.element_ty
    for n in range(0, DIM, BLOCK_DIM):
        offs_dim = n + tl.arange(0, BLOCK_DIM)
        if element == tl.float64:
            block = tl.full([BLOCK_ROWS, BLOCK_DIM], VALUE, tl.float64)
        else:
            block = tl.full([BLOCK_ROWS, BLOCK_DIM], VALUE, tl.float32)
        tl.store(
            target_ptr + start[:, None] + offs_dim[None, :],
            block.to(element),
            mask=offs_dim[None, :] < dim[:, None],
        )


@triton.jit(do_not_specialize=["n_ids", "n_rows", "page_shift"])
def _move_kernel(
    storage_ptr,
    chain_ptr,
    ids_ptr,
    group_ptr,
    first_ptr,
    rank_ptr,
    plan_ptr,
    old_start_ptr,
    new_start_ptr,
    moved_ptr,
    owner_ptr,
    row_start_ptr,
    page_level_ptr,
    free_rows_ptr,
    free_pages_ptr,
    state0_ptr,
    state1_ptr,
    state2_ptr,
    state3_ptr,
    per_id_ptr,
    n_ids,
    n_rows,
    page_shift,
    SIZES: tl.constexpr,
    DIM: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    TAKE: tl.constexpr,
    GIVE: tl.constexpr,
    HOP: tl.constexpr,
    UNCLAIMED: tl.constexpr,
    LEVELS: tl.constexpr,
    FRESH: tl.constexpr,
    FRESH_ID: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    offs_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = offs_row < n_ids
    ids = tl.load(ids_ptr + offs_row, mask=inside, other=-1).to(tl.int64)
    mask_id = (ids >= 0) & (ids < n_rows)
    unclaimed = tl.zeros([BLOCK_ROWS], dtype=tl.int32) + UNCLAIMED
    tl.store(owner_ptr + ids, unclaimed, mask=mask_id)

    group = tl.load(group_ptr + offs_row, mask=inside, other=-1).to(tl.int32)
    names = group >= 0
    limit = tl.load(plan_ptr + group, mask=names, other=0)
    rank = tl.load(rank_ptr + offs_row, mask=names, other=-1).to(tl.int64)
    mask_go = (rank >= 0) & (rank < limit)
    # An occurrence that is not the first says what became of the first.
    first = tl.load(first_ptr + offs_row, mask=names, other=0).to(tl.int64)
    moved = tl.load(rank_ptr + first, mask=names, other=0).to(tl.int64) < limit
    tl.store(moved_ptr + offs_row, moved.to(tl.uint8), mask=inside)

    old_start = tl.load(old_start_ptr + offs_row, mask=mask_go, other=-1).to(tl.int64)
    if GIVE:
        slot = tl.load(plan_ptr + 3 * LEVELS + group, mask=mask_go, other=0) + rank
        old_index = old_start.to(free_rows_ptr.dtype.element_ty)
        tl.store(free_rows_ptr + slot, old_index, mask=mask_go)
    new_start = tl.zeros_like(old_start) - 1
    if TAKE:
        target = group + HOP
        dim = tl.zeros_like(group)
        per = tl.zeros_like(group) + 1
        for k in tl.static_range(len(SIZES)):
            dim = tl.where((target == k) & mask_go, SIZES[k], dim)
            per = tl.where(target == k, (1 << page_shift) // SIZES[k], per)
        beyond = rank - tl.load(plan_ptr + LEVELS + group, mask=mask_go, other=0)
        mask_fresh = mask_go & (beyond >= 0)
        beyond = tl.where(mask_fresh, beyond, 0).to(tl.int32)
        top = tl.load(plan_ptr + 2 * LEVELS + group, mask=mask_fresh, other=0)
        page = tl.load(free_pages_ptr + top - 1 - beyond // per, mask=mask_fresh, other=0)
        page = page.to(tl.int64)
        tl.store(page_level_ptr + page, target.to(tl.int8), mask=mask_fresh)
        new_start = tl.load(new_start_ptr + offs_row, mask=mask_go, other=-1).to(tl.int64)
        new_start = tl.where(mask_fresh, (page << page_shift) + (beyond % per) * dim, new_start)
        if tl.max(dim, axis=0) > 0:
            if not GIVE:
                _fill(storage_ptr, new_start, dim, 0.0, DIM, BLOCK_ROWS, BLOCK_DIM)
            if len(FRESH) > 0:
                _fill(state0_ptr, new_start, dim, FRESH[0], DIM, BLOCK_ROWS, BLOCK_DIM)
            if len(FRESH) > 1:
                _fill(state1_ptr, new_start, dim, FRESH[1], DIM, BLOCK_ROWS, BLOCK_DIM)
            if len(FRESH) > 2:
                _fill(state2_ptr, new_start, dim, FRESH[2], DIM, BLOCK_ROWS, BLOCK_DIM)
            if len(FRESH) > 3:
                _fill(state3_ptr, new_start, dim, FRESH[3], DIM, BLOCK_ROWS, BLOCK_DIM)
            if len(FRESH_ID) > 0:
                one = tl.zeros_like(dim) + mask_go.to(tl.int32)
                _fill(per_id_ptr, ids, one, FRESH_ID[0], 1, BLOCK_ROWS, 1)
    tl.store(row_start_ptr + ids, new_start.to(row_start_ptr.dtype.element_ty), mask=mask_go)

    if TAKE and GIVE:
        # Hops lie in the order in which a row passes them.
        FIRST: tl.constexpr = 0 if HOP > 0 else len(SIZES) - 1
        END: tl.constexpr = len(SIZES) - 1 if HOP > 0 else 0
        hop = 0
        for k in tl.static_range(FIRST, END, HOP):
            mask_level = (group == k) & mask_go
            if tl.max(mask_level.to(tl.int32), axis=0) > 0:
                for n in range(0, SIZES[k + HOP], BLOCK_DIM):
                    offs_dim = n + tl.arange(0, BLOCK_DIM)
                    mask_dim = offs_dim < SIZES[k + HOP]
                    bias_ptr = chain_ptr + hop + SIZES[k] * SIZES[k + HOP]
                    bias = tl.load(bias_ptr + offs_dim, mask=mask_dim, other=0.0).to(ACC)
                    acc = tl.zeros([BLOCK_ROWS, BLOCK_DIM], dtype=ACC) + bias[None, :]
                    for j in range(0, SIZES[k], BLOCK_K):
                        offs_k = j + tl.arange(0, BLOCK_K)
                        mask_k = offs_k < SIZES[k]
                        e = tl.load(
                            storage_ptr + old_start[:, None] + offs_k[None, :],
                            mask=mask_level[:, None] & mask_k[None, :],
                            other=0.0,
                        ).to(ACC)  # [BLOCK_ROWS, BLOCK_K]
                        w = tl.load(
                            chain_ptr + hop + offs_k[:, None] * SIZES[k + HOP] + offs_dim[None, :],
                            mask=mask_k[:, None] & mask_dim[None, :],
                            other=0.0,
                        ).to(ACC)  # [BLOCK_K, BLOCK_DIM]
                        acc = tl.dot(e, w, acc, input_precision=PRECISION, out_dtype=ACC)
                    tl.store(
                        storage_ptr + new_start[:, None] + offs_dim[None, :],
                        acc.to(storage_ptr.dtype.element_ty),
                        mask=mask_level[:, None] & mask_dim[None, :],
                    )
            hop += (SIZES[k] + 1) * SIZES[k + HOP]


@triton.jit(do_not_specialize=["n_rows"])
def _fill_rows_kernel(
    target_ptr,
    start_ptr,
    level_ptr,
    n_rows,
    SIZES: tl.constexpr,
    DIM: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    offs_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask_row = offs_row < n_rows
    start = tl.load(start_ptr + offs_row, mask=mask_row, other=-1).to(tl.int64)
    level = tl.load(level_ptr + offs_row, mask=mask_row, other=-1).to(tl.int32)
    dim = tl.zeros_like(level)
    for k in tl.static_range(len(SIZES)):
        dim = tl.where((level == k) & (start >= 0), SIZES[k], dim)
    _fill(target_ptr, start, dim, VALUE, DIM, BLOCK_ROWS, BLOCK_DIM)


def launch_promote(
    ids: Tensor,
    mask: Tensor | None,
    storage: Tensor,
    chain: Tensor,
    places: Places,
    states: Filled,
    per_id: Filled,
) -> Tensor:
    """Move rows one level up, as far as there is room; see ``ops.resize.promote``.

    Up to four ``states`` and one of ``per_id`` cost no further launch.
    """
    return _launch(ids, mask, storage, chain, places, states, per_id, (True, True), hop=1)


def launch_demote(
    ids: Tensor,
    mask: Tensor | None,
    storage: Tensor,
    down: Tensor,
    places: Places,
    states: Filled,
    per_id: Filled,
) -> Tensor:
    """Move rows one level down by the hops of ``fit.down_hops``; else :func:`launch_promote`."""
    return _launch(ids, mask, storage, down, places, states, per_id, (True, True), hop=-1)


def launch_insert(
    ids: Tensor,
    level: int,
    storage: Tensor,
    places: Places,
    states: Filled,
    per_id: Filled,
) -> Tensor:
    """Give ``ids`` without a row a zero row of ``level``; as :func:`launch_promote` otherwise."""
    return _launch(ids, None, storage, None, places, states, per_id, (True, False), level)


def launch_free(ids: Tensor, storage: Tensor, places: Places) -> Tensor:
    """Give the rows of ``ids`` back; as :func:`launch_promote` otherwise."""
    return _launch(ids, None, storage, None, places, (), (), (False, True))


def _launch(
    ids: Tensor,
    mask: Tensor | None,
    storage: Tensor,
    chain: Tensor | None,
    places: Places,
    states: Filled,
    per_id: Filled,
    action: tuple[bool, bool],
    target: int = 0,
    hop: int = 0,
) -> Tensor:
    layout, owner, moves = places.layout, places.owner, places.moves
    assert owner is not None
    sizes, n_ids, n_rows = layout.sizes, ids.numel(), owner.numel()
    take, give = action
    moved = torch.empty(n_ids, dtype=torch.bool, device=ids.device)
    if not n_ids or not n_rows or len(sizes) == abs(hop):
        moves.add_(1)
        return moved.fill_(False)
    ids = ids.contiguous()
    # Rows of a multiple of 16: the kernels know how their pointers are aligned.
    padded = -(-n_ids // 16) * 16
    work = torch.empty(5, padded, dtype=layout.row_start.dtype, device=ids.device)
    group, old_start, first, rank, new_start = work.unbind(0)
    flags: dict[str, Any] = {"TAKE": take, "GIVE": give, "HOP": hop}
    launch_kernel(
        _claim_kernel,
        (launch.cdiv(n_ids, CLAIM_IDS),),
        ids,
        ids if mask is None else mask.contiguous().view(torch.uint8),
        layout.row_start,
        layout.page_level,
        owner,
        group,
        old_start,
        n_ids,
        n_rows,
        layout.page_shift,
        target,
        N_LEVELS=len(sizes),
        **flags,
        MASKED=mask is not None,
        BLOCK_IDS=CLAIM_IDS,
        num_warps=4,
        enable_fp_fusion=True,
    )
    scan = launch.choose_scan(len(sizes))
    plan = torch.empty(4, scan["LEVELS"], dtype=torch.int64, device=ids.device)
    flags["UNCLAIMED"] = UNCLAIMED
    launch_kernel(
        _scan_kernel,
        (1,),
        ids,
        owner,
        group,
        first,
        rank,
        plan,
        new_start,
        places.free_rows,
        places.free_pages,
        places.free_count,
        places.free_base,
        moves,
        places.refused,
        n_ids,
        layout.page_shift,
        0 if hop < 0 else places.kept,
        SIZES=sizes,
        **flags,
        **scan,
        enable_fp_fusion=True,
    )
    config = launch.choose_promote(sizes[-1], storage.dtype, hop < 0)
    kept, kept_ids = states[:_STATES], per_id[:1]
    tensors = [tensor for tensor, _ in kept] + [storage] * (_STATES - len(kept))
    launch_kernel(
        _move_kernel,
        (launch.cdiv(n_ids, config.block_rows),),
        storage,
        storage if chain is None else chain,
        ids,
        group,
        first,
        rank,
        plan,
        old_start,
        new_start,
        moved.view(torch.uint8),
        owner,
        layout.row_start,
        layout.page_level,
        places.free_rows,
        places.free_pages,
        *tensors,
        kept_ids[0][0] if kept_ids else storage,
        n_ids,
        n_rows,
        layout.page_shift,
        **kernel_constants(sizes, storage.dtype),
        **flags,
        FRESH=tuple(float(value) for _, value in kept),
        FRESH_ID=tuple(float(value) for _, value in kept_ids),
        LEVELS=scan["LEVELS"],
        **block_constants(config),
        maxnreg=MOVE_REGISTERS,
    )
    if take:
        # The kernels write through pointers; autograd must know that saved rows are stale.
        for tensor in (storage, *(tensor for tensor, _ in kept)):
            torch.autograd.graph.increment_version(tensor)
        if states[_STATES:] or per_id[1:]:
            # More state than the kernel has arguments for: a launch each.
            known = torch.where(moved, ids.long(), 0)
            start = torch.where(moved, layout.row_start[known], -1)
            launch_fill(states[_STATES:], start, group[:n_ids] + hop, sizes)
            only = torch.where(moved, known, -1)
            launch_fill(per_id[1:], only, torch.zeros_like(only), (1,))
    return moved


def launch_fill(targets: Filled, start: Tensor, level: Tensor, sizes: Sequence[int]) -> None:
    """Set the rows ``(start, level)`` with ``start >= 0`` of every tensor to its value."""
    n_rows = level.numel()
    if not n_rows:
        return
    for tensor, value in targets:
        config = launch.choose_promote(sizes[-1], tensor.dtype)
        launch_kernel(
            _fill_rows_kernel,
            (launch.cdiv(n_rows, config.block_rows),),
            tensor,
            start,
            level,
            n_rows,
            SIZES=tuple(sizes),
            DIM=sizes[-1],
            VALUE=float(value),
            BLOCK_ROWS=config.block_rows,
            BLOCK_DIM=config.block_dim,
            num_warps=config.num_warps,
            enable_fp_fusion=True,
        )
        torch.autograd.graph.increment_version(tensor)
