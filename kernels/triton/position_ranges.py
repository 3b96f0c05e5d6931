"""Contiguous ranges of positions that a step forwards, and of their keys: one launch per step for a whole batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .check import check_tensor, refuse_unless
from .commit import BLOCK_END, BLOCK_START, DONE, LIMIT, MAX_LENGTH, N_CONTROL, SPAN_END, STAGE, STAGE_STEP
from .control import CONTROL
from .cost import Cost
from .launch import cdiv, launch

BLOCKS = (None, "rest", "own")


@triton.jit(do_not_specialize=["capacity"], do_not_specialize_on_alignment=["rows_ptr"])
def _position_ranges_kernel(
    control_ptr,
    rows_ptr,
    count_ptr,
    key_range_ptr,
    capacity,
    HAS_ROWS: tl.constexpr,
    TO_SPAN_END: tl.constexpr,
    BY_BLOCK: tl.constexpr,
    OWN_BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    control_ptr += row * N_CONTROL
    running = tl.load(control_ptr + DONE) == 0
    limit = tl.where(running, tl.load(control_ptr + LIMIT).to(tl.int32), 0)  # a row that is done has none
    first = limit * 0
    stop = limit
    keys = limit
    if TO_SPAN_END:
        fast = (tl.load(control_ptr + STAGE) != 0) & (tl.load(control_ptr + STAGE_STEP) > 0)
        keys = tl.where(running & fast, tl.minimum(tl.load(control_ptr + SPAN_END).to(tl.int32), limit), limit)
        stop = keys
    if BY_BLOCK:
        later = tl.load(control_ptr + STAGE_STEP) > 0
        first = tl.where(later, tl.load(control_ptr + BLOCK_START).to(tl.int32), first)
        if OWN_BLOCK:
            stop = tl.where(later, tl.minimum(tl.load(control_ptr + BLOCK_END).to(tl.int32), limit), stop)
    count = tl.maximum(stop - first, 0)
    if HAS_ROWS:
        count = tl.minimum(count, capacity)
        slot = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        tl.store(rows_ptr + row * capacity + slot, tl.where(slot < count, first + slot, -1), mask=slot < capacity)
    if tl.program_id(1) == 0:
        bound = tl.arange(0, 4)
        tl.store(key_range_ptr + row * 4 + bound, tl.where(bound == 1, keys, 0))
        tl.store(count_ptr + row, count)


@dataclass(frozen=True)
class PositionRangesConfig:
    BLOCK_C: int
    num_warps: int


def position_ranges_config(capacity: int) -> PositionRangesConfig:
    """Choose list entries per program, and warps: a store of 16 bytes per thread where there are that many."""
    block = min(1024, max(16, triton.next_power_of_2(capacity)))
    return PositionRangesConfig(BLOCK_C=block, num_warps=max(1, block // 128))


def position_ranges(
    control: torch.Tensor,
    rows: torch.Tensor | None,
    count: torch.Tensor,
    key_range: torch.Tensor,
    *,
    to_span_end: bool,
    block: str | None,
    config: PositionRangesConfig | None = None,
) -> None:
    """The positions ``[first, stop)`` that each of ``B`` canvas rows forwards and the keys ``[0, keys)`` they see.

    ``stop`` and ``keys`` are the row's limit and ``first`` is 0, but in all steps after the first of a stage (or block)
    as the two options say. A row that is done has no positions and no keys.

    Args:
        control: int64 ``[B, n]``, the columns of :data:`~sfs_triton.kernels.control.CONTROL`.
        rows: int32 ``[B, C]``, overwritten: the first ``C`` of the positions, then -1. None: no list.
        count: int32 ``[B]``, overwritten: ``stop - first``, at least 0 and, where there is a list, at most ``C``.
        key_range: int32 ``[B, 4]``, overwritten: ``(0, keys, 0, 0)``.
        to_span_end: in the fast stage, positions and keys end with the span, if that is before the limit.
        block: with ``"rest"`` positions start with the block, with ``"own"`` they end with it, too. Keys do not.
    """
    check_tensor("control", control, dtype=torch.int64, shape=[None, len(CONTROL)], dense=True)
    batch, device = len(control), control.device
    if rows is not None:
        check_tensor("rows", rows, dtype=torch.int32, shape=[batch, None], device=device, dense=True)
        refuse_unless(0 < rows.shape[1] <= MAX_LENGTH, f"rows has room for {rows.shape[1]}, not 1 to {MAX_LENGTH}")
    check_tensor("count", count, dtype=torch.int32, shape=[batch], device=device, dense=True)
    check_tensor("key_range", key_range, dtype=torch.int32, shape=[batch, 4], device=device, dense=True)
    refuse_unless(block in BLOCKS, f"block={block!r} is not one of {BLOCKS}")
    if batch == 0:
        return
    capacity = 0 if rows is None else rows.shape[1]
    config = config or position_ranges_config(capacity)
    launch(
        _position_ranges_kernel,
        (batch, max(1, cdiv(capacity, config.BLOCK_C))),
        control_ptr=control,
        rows_ptr=rows,
        count_ptr=count,
        key_range_ptr=key_range,
        capacity=capacity,
        HAS_ROWS=rows is not None,
        TO_SPAN_END=to_span_end,
        BY_BLOCK=block is not None,
        OWN_BLOCK=block == "own",
        BLOCK_C=config.BLOCK_C,
        num_warps=config.num_warps,
    )


def position_ranges_cost(batch: int, capacity: int) -> Cost:
    """Seven numbers of each row read; the list, its count and the key range written."""
    return Cost(bytes=batch * (7 * 8 + 4 * capacity + 4 + 16), flops=batch * capacity)
