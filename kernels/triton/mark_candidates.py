"""Candidates of a step: one launch per step for a whole batch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .check import refuse_unless
from .commit import (
    BLOCK_END,
    BLOCK_START,
    DONE,
    MAX_LENGTH,
    N_CONTROL,
    SPAN_END,
    SPAN_START,
    STAGE,
    ScanConfig,
    check_canvas,
    scan_config,
)
from .cost import Cost
from .launch import launch


@triton.jit
def stage_range(control_ptr, span_cap, BY_STAGE: tl.constexpr, HAS_SPAN_CAP: tl.constexpr):
    """Return the range in which a running row decides: the block, or the window of its stage in the block."""
    first = tl.load(control_ptr + (SPAN_START if BY_STAGE else BLOCK_START)).to(tl.int32)
    stop = tl.load(control_ptr + BLOCK_END).to(tl.int32)
    if BY_STAGE:
        if HAS_SPAN_CAP:
            stop = tl.minimum(stop, first + span_cap)
        stop = tl.where(tl.load(control_ptr + STAGE) == 0, stop, tl.load(control_ptr + SPAN_END).to(tl.int32))
    return first, stop


@triton.jit(do_not_specialize=["length", "span_cap"])
def _mark_candidates_kernel(
    masked_ptr,
    control_ptr,
    candidate_ptr,
    length,
    span_cap,
    BY_STAGE: tl.constexpr,
    HAS_SPAN_CAP: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    control_ptr += row * N_CONTROL
    first, stop = stage_range(control_ptr, span_cap, BY_STAGE, HAS_SPAN_CAP)
    stop = tl.where(tl.load(control_ptr + DONE) != 0, 0, stop)
    place = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    masked = tl.load(masked_ptr + row * length + place, mask=place < length, other=0) != 0
    tl.store(candidate_ptr + row * length + place, masked & (place >= first) & (place < stop), mask=place < length)


def mark_candidates(
    masked: torch.Tensor,
    control: torch.Tensor,
    candidate: torch.Tensor,
    *,
    by_stage: bool,
    span_cap: int | None = None,
    config: ScanConfig | None = None,
) -> None:
    """Mark in ``candidate`` the candidates of the step of each running row.

    Args:
        masked, candidate: bool ``[B, L]``; ``candidate`` is overwritten.
        control: int64 ``[B, n]``, the columns of :data:`~sfs_triton.kernels.control.CONTROL`.
        by_stage: for the cycle machine: candidates lie from the span's start to the block's end in the slow stage, to
            the span's end in the fast one. For other samplers they lie in the block.
        span_cap: most candidates of the slow stage, counted from the span's start.
    """
    batch, length = check_canvas(control, masked=(masked, torch.bool), candidate=(candidate, torch.bool))
    refuse_unless(span_cap is None or span_cap >= 1, f"span_cap={span_cap} is not positive")
    if batch == 0 or length == 0:
        return
    config = config or scan_config(length)
    launch(
        _mark_candidates_kernel,
        (batch, triton.cdiv(length, config.BLOCK_L)),
        masked_ptr=masked,
        control_ptr=control,
        candidate_ptr=candidate,
        length=length,
        span_cap=min(span_cap or 0, MAX_LENGTH),  # positions are added up in 32 bits
        BY_STAGE=by_stage,
        HAS_SPAN_CAP=span_cap is not None,
        BLOCK_L=config.BLOCK_L,
        num_warps=config.num_warps,
    )


def mark_candidates_cost(batch: int, length: int) -> Cost:
    """The flag of every undecided position read, and that of every candidate written."""
    return Cost(bytes=batch * length * (1 + 1), flops=4 * batch * length)
