"""List of positions that a step forwards, and its candidates: one launch per step for a whole batch.

The list is that of a region cache: at most ``C`` positions of each canvas row, in this order of claim: dirty ones
(committed since they were last forwarded), those that the step decides, a look-ahead beyond them, and stale ones, those
not forwarded for longest first. Within a class positions ascend.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .check import check_tensor, refuse_unless
from .commit import (
    DONE,
    LIMIT,
    MAX_LENGTH,
    N_CONTROL,
    STEP,
    ScanConfig,
    check_canvas,
    scan_config,
)
from .cost import Cost
from .launch import launch
from .mark_candidates import stage_range


@triton.jit
def _claims(masked_ptr, dirty_ptr, place, first, stop, ahead, limit, SHIFT: tl.constexpr):
    """Class of each position: 0 dirty, 1 decides, 2 look-ahead, 3 stale, 4 none; and whether a step decides (or looks
    ahead) with what this row of the model says, which is about the position ``SHIFT`` further on."""
    there = place < limit
    masked = (tl.load(masked_ptr + place, mask=there, other=0) != 0) & (place >= first)
    target = place + SHIFT
    about = target < limit
    shown = masked
    if SHIFT:
        shown = (tl.load(masked_ptr + target, mask=about, other=0) != 0) & (target >= first)
    decides = shown & (target < stop)
    seen = shown & (target < ahead)
    kind = tl.where((masked & (place < stop)) | decides, 1, tl.where((masked & (place < ahead)) | seen, 2, 3))
    dirty = tl.load(dirty_ptr + place, mask=there, other=0) != 0
    return tl.where(there, tl.where(dirty, 0, kind), 4), decides, seen


@triton.jit
def _stale_before(
    masked_ptr,
    dirty_ptr,
    forwarded_ptr,
    length,
    first,
    stop,
    ahead,
    limit,
    step,
    SHIFT: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Count the stale positions that were last forwarded before ``step``."""
    total = tl.zeros([BLOCK_L], tl.int32)
    for begin in range(0, length, BLOCK_L):
        place = begin + tl.arange(0, BLOCK_L)
        kind, _decides, _seen = _claims(masked_ptr, dirty_ptr, place, first, stop, ahead, limit, SHIFT)
        forwarded = tl.load(forwarded_ptr + place, mask=place < length, other=0)
        total += ((kind == 3) & (forwarded < step)).to(tl.int32)
    return tl.sum(total, axis=0)


@triton.jit(
    do_not_specialize=["length", "capacity", "span_cap", "look_ahead"],
    do_not_specialize_on_alignment=["rows_ptr", "target_ptr"],  # lists start anywhere in one buffer
)
def _list_positions_kernel(
    masked_ptr,
    control_ptr,
    dirty_ptr,
    forwarded_ptr,
    candidate_ptr,
    rows_ptr,
    target_ptr,
    count_ptr,
    length,
    capacity,
    span_cap,
    look_ahead,
    BY_STAGE: tl.constexpr,
    HAS_SPAN_CAP: tl.constexpr,
    SHIFT: tl.constexpr,
    STALE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    control_ptr += row * N_CONTROL
    masked_ptr += row * length
    dirty_ptr += row * length
    forwarded_ptr += row * length
    candidate_ptr += row * length
    rows_ptr += row * capacity
    target_ptr += row * capacity
    first, stop = stage_range(control_ptr, span_cap, BY_STAGE, HAS_SPAN_CAP)
    step = tl.load(control_ptr + STEP).to(tl.int32)
    limit = tl.where(
        tl.load(control_ptr + DONE) != 0, 0, tl.load(control_ptr + LIMIT).to(tl.int32)
    )  # a row that is done has none
    stop = tl.minimum(stop, limit)
    ahead = tl.minimum(stop + look_ahead, limit)

    n_dirty = tl.zeros([BLOCK_L], tl.int32)
    n_decides = tl.zeros([BLOCK_L], tl.int32)
    n_ahead = tl.zeros([BLOCK_L], tl.int32)
    for begin in range(0, length, BLOCK_L):
        place = begin + tl.arange(0, BLOCK_L)
        kind, _decides, _seen = _claims(masked_ptr, dirty_ptr, place, first, stop, ahead, limit, SHIFT)
        n_dirty += (kind == 0).to(tl.int32)
        n_decides += (kind == 1).to(tl.int32)
        n_ahead += (kind == 2).to(tl.int32)
        tl.store(candidate_ptr + place, tl.zeros([BLOCK_L], tl.int1), mask=place < length)
    for begin in range(0, capacity, BLOCK_C):
        entry = begin + tl.arange(0, BLOCK_C)
        tl.store(rows_ptr + entry, tl.full([BLOCK_C], -1, tl.int32), mask=entry < capacity)
        tl.store(target_ptr + entry, tl.full([BLOCK_C], -1, tl.int32), mask=entry < capacity)
    next_dirty = 0
    next_decides = tl.sum(n_dirty, axis=0)
    next_ahead = next_decides + tl.sum(n_decides, axis=0)
    next_stale = next_ahead + tl.sum(n_ahead, axis=0)

    # the stale positions that still fit: all older than a step, and of those forwarded at that step the lowest
    need = tl.maximum(capacity - next_stale, 0) if STALE else 0
    low = step * 0
    high = step + 1
    while low < high:  # the smallest step before which there are enough
        middle = (low + high) // 2
        count = _stale_before(
            masked_ptr, dirty_ptr, forwarded_ptr, length, first, stop, ahead, limit, middle, SHIFT, BLOCK_L
        )
        high = tl.where(count >= need, middle, high)
        low = tl.where(count >= need, low, middle + 1)
    oldest = low - 1
    older = _stale_before(
        masked_ptr, dirty_ptr, forwarded_ptr, length, first, stop, ahead, limit, oldest, SHIFT, BLOCK_L
    )
    ties = need - older
    tl.debug_barrier()  # the list's blanks and the flags are stored before what overwrites them

    for begin in range(0, length, BLOCK_L):
        place = begin + tl.arange(0, BLOCK_L)
        kind, decides, seen = _claims(masked_ptr, dirty_ptr, place, first, stop, ahead, limit, SHIFT)
        forwarded = tl.load(forwarded_ptr + place, mask=place < length, other=0)
        tie = (kind == 3) & (forwarded == oldest)
        tie_rank = tl.cumsum(tie.to(tl.int32), axis=0) - 1
        stale = (kind == 3) & ((forwarded < oldest) | (tie & (tie_rank < ties)))
        ties -= tl.sum(tie.to(tl.int32), axis=0)
        slot = tl.full([BLOCK_L], 0, tl.int32) + capacity
        slot = tl.where(kind == 0, next_dirty + tl.cumsum((kind == 0).to(tl.int32), axis=0) - 1, slot)
        slot = tl.where(kind == 1, next_decides + tl.cumsum((kind == 1).to(tl.int32), axis=0) - 1, slot)
        slot = tl.where(kind == 2, next_ahead + tl.cumsum((kind == 2).to(tl.int32), axis=0) - 1, slot)
        slot = tl.where(stale, next_stale + tl.cumsum(stale.to(tl.int32), axis=0) - 1, slot)
        next_dirty += tl.sum((kind == 0).to(tl.int32), axis=0)
        next_decides += tl.sum((kind == 1).to(tl.int32), axis=0)
        next_ahead += tl.sum((kind == 2).to(tl.int32), axis=0)
        next_stale += tl.sum(stale.to(tl.int32), axis=0)
        listed = slot < capacity
        tl.debug_barrier()  # another thread may still load what this one stores
        tl.store(rows_ptr + slot, place, mask=listed)
        tl.store(target_ptr + slot, tl.where(seen, place + SHIFT, -1), mask=listed)
        tl.store(candidate_ptr + place + SHIFT, decides, mask=listed & decides)
        tl.store(dirty_ptr + place, tl.zeros([BLOCK_L], tl.int1), mask=listed)
        tl.store(forwarded_ptr + place, tl.zeros([BLOCK_L], tl.int64) + step, mask=listed)
    tl.store(count_ptr + row, tl.minimum(next_stale, capacity))


def list_positions(
    masked: torch.Tensor,
    control: torch.Tensor,
    dirty: torch.Tensor,
    forwarded: torch.Tensor,
    candidate: torch.Tensor,
    rows: torch.Tensor,
    target: torch.Tensor,
    count: torch.Tensor,
    *,
    by_stage: bool,
    span_cap: int | None = None,
    look_ahead: int = 0,
    shift: int = 0,
    stale: bool = True,
    config: ScanConfig | None = None,
) -> None:
    """List the positions of a step for ``B`` canvases, and mark its candidates. Rows that are done list nothing.

    Args:
        masked, control, by_stage, span_cap: as for :func:`~sfs_triton.kernels.mark_candidates.mark_candidates`.
        dirty: bool ``[B, L]``; cleared at listed positions.
        forwarded: int64 ``[B, L]``, step at which a position was last listed; set to this step at listed ones.
        candidate: bool ``[B, L]``, overwritten: the positions that the step decides, if the row they need is listed.
        rows: int32 ``[B, C]``, overwritten: the listed positions, then -1.
        target: int32 ``[B, C]``, overwritten: the position whose token a listed row of the model predicts, where that
            is one to decide or to look ahead at; else -1.
        count: int32 ``[B]``, overwritten: how many are listed.
        look_ahead: how many positions beyond those that are decided are listed and predicted as well.
        shift: 1 for models whose row ``i`` predicts position ``i + 1``; that row is then listed with the position.
            Nothing predicts position 0 in such a list.
        stale: use the room that is left for stale positions.

    Positions from the row's limit on are never listed.
    """
    canvas = {"masked": (masked, torch.bool), "dirty": (dirty, torch.bool), "candidate": (candidate, torch.bool)}
    batch, length = check_canvas(control, **canvas, forwarded=(forwarded, torch.int64))
    check_tensor("rows", rows, dtype=torch.int32, shape=[batch, None], device=control.device, dense=True)
    check_tensor("target", target, dtype=torch.int32, shape=rows.shape, device=control.device, dense=True)
    check_tensor("count", count, dtype=torch.int32, shape=[batch], device=control.device, dense=True)
    refuse_unless(span_cap is None or span_cap >= 1, f"span_cap={span_cap} is not positive")
    refuse_unless(look_ahead >= 0, f"look_ahead={look_ahead} is negative")
    refuse_unless(shift in (0, 1), f"shift={shift} is neither 0 nor 1")
    refuse_unless(rows.shape[1] > 0, "rows has no room for a position")
    if batch == 0 or length == 0:
        return
    config = config or scan_config(length)
    launch(
        _list_positions_kernel,
        (batch,),
        masked_ptr=masked,
        control_ptr=control,
        dirty_ptr=dirty,
        forwarded_ptr=forwarded,
        candidate_ptr=candidate,
        rows_ptr=rows,
        target_ptr=target,
        count_ptr=count,
        length=length,
        capacity=rows.shape[1],
        span_cap=min(span_cap or 0, MAX_LENGTH),  # positions are added up in 32 bits
        look_ahead=min(look_ahead, MAX_LENGTH),
        BY_STAGE=by_stage,
        HAS_SPAN_CAP=span_cap is not None,
        SHIFT=shift,
        STALE=stale,
        BLOCK_C=256,
        BLOCK_L=config.BLOCK_L,
        num_warps=config.num_warps,
        maxnreg=255,
    )


def list_positions_cost(batch: int, length: int, capacity: int) -> Cost:
    """Flags and ages of every position once, the flag of candidates written, and the list."""
    return Cost(bytes=batch * (length * (1 + 1 + 8 + 1) + capacity * (4 + 4 + 1 + 8)), flops=8 * batch * length)
