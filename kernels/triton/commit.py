"""Code shared by both decide kernels: the control columns of a row, and the commit of a step.

Scalars are loaded by all threads of a program and stored by one, and Triton orders neither. So a kernel loads all
scalars, has a barrier, and stores them once at its end; a store and a load by different threads have a barrier between.
Numbers are loaded as 32 bits, which hold all of them, since 64-bit division is a function call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .check import check_tensor, refuse_unless
from .control import COLUMN, CONTROL, SAMPLING, SAMPLING_COLUMN

MAX_LENGTH = 2**20
MAX_REGISTERS = 128  # without a limit ptxas spills for an occupancy that one program per row cannot use

START: tl.constexpr = tl.constexpr(COLUMN["start"])
END: tl.constexpr = tl.constexpr(COLUMN["end"])
LIMIT: tl.constexpr = tl.constexpr(COLUMN["limit"])
BLOCK: tl.constexpr = tl.constexpr(COLUMN["block"])
BLOCK_START: tl.constexpr = tl.constexpr(COLUMN["block_start"])
BLOCK_END: tl.constexpr = tl.constexpr(COLUMN["block_end"])
SPAN_START: tl.constexpr = tl.constexpr(COLUMN["span_start"])
SPAN_END: tl.constexpr = tl.constexpr(COLUMN["span_end"])
STAGE: tl.constexpr = tl.constexpr(COLUMN["stage"])
STAGE_STEP: tl.constexpr = tl.constexpr(COLUMN["stage_step"])
CYCLE: tl.constexpr = tl.constexpr(COLUMN["cycle"])
DETERMINED: tl.constexpr = tl.constexpr(COLUMN["determined"])
N_HISTORY: tl.constexpr = tl.constexpr(COLUMN["n_history"])
ESTIMATE: tl.constexpr = tl.constexpr(COLUMN["estimate"])
BLOCK_STEPS: tl.constexpr = tl.constexpr(COLUMN["block_steps"])
QUOTA: tl.constexpr = tl.constexpr(COLUMN["quota"])
STEP: tl.constexpr = tl.constexpr(COLUMN["step"])
CAP: tl.constexpr = tl.constexpr(COLUMN["cap"])
MASKS_LEFT: tl.constexpr = tl.constexpr(COLUMN["masks_left"])
DONE: tl.constexpr = tl.constexpr(COLUMN["done"])
FAULT: tl.constexpr = tl.constexpr(COLUMN["fault"])
N_CONTROL: tl.constexpr = tl.constexpr(len(CONTROL))

TAU_MIN: tl.constexpr = tl.constexpr(SAMPLING_COLUMN["tau_min"])
TAU_SLOW: tl.constexpr = tl.constexpr(SAMPLING_COLUMN["tau_slow"])
TAU: tl.constexpr = tl.constexpr(SAMPLING_COLUMN["tau"])
TAU_LOW: tl.constexpr = tl.constexpr(SAMPLING_COLUMN["tau_low"])
BOUND: tl.constexpr = tl.constexpr(SAMPLING_COLUMN["bound"])
N_SAMPLING: tl.constexpr = tl.constexpr(len(SAMPLING))


@triton.jit
def row_waits(candidate_ptr, masked_ptr, length, first, stop, BLOCK_L: tl.constexpr):
    """Return whether the row's list has no undecided position of its stage's range ``[first, stop)``."""
    listed = tl.zeros([BLOCK_L], tl.int32)
    undecided = tl.zeros([BLOCK_L], tl.int32)
    for begin in range(0, length, BLOCK_L):
        place = begin + tl.arange(0, BLOCK_L)
        there = place < length
        listed |= (tl.load(candidate_ptr + place, mask=there, other=0) != 0).to(tl.int32)
        masked = tl.load(masked_ptr + place, mask=there, other=0) != 0
        undecided |= (masked & (place >= first) & (place < stop)).to(tl.int32)
    return (tl.max(undecided, axis=0) != 0) & (tl.max(listed, axis=0) == 0)


@triton.jit
def commit_row(
    tokens_ptr,
    masked_ptr,
    commit_step_ptr,
    dirty_ptr,
    token_ptr,
    fill_ptr,
    ends_ptr,
    length,
    limit,
    step,
    eos_id,
    from_a,
    from_b,
    EOS_STOP: tl.constexpr,
    N_ENDS: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Commit a row's chosen tokens where ``fill`` says. Pointers are the row's own.

    With EOS_STOP the leftmost end-of-text that was ever committed, ``eos_id`` or one of the N_ENDS others, is the row's
    limit: everything after it becomes ``eos_id``, whether it was decided or not, and leaves the masks; given positions
    stay.

    Returns the limit, the number of masks left, and the lowest undecided positions at or after ``from_a`` and
    ``from_b`` (``length`` where there is none).
    """
    if EOS_STOP:
        ended = tl.zeros([BLOCK_L], tl.int32) + length
        for begin in range(0, length, BLOCK_L):
            place = begin + tl.arange(0, BLOCK_L)
            fill = tl.load(fill_ptr + place, mask=place < length, other=0) != 0
            token = tl.load(token_ptr + place, mask=fill, other=-1)
            ends = token == eos_id
            for other in tl.static_range(N_ENDS):
                ends = ends | (token == tl.load(ends_ptr + other))
            ended = tl.minimum(ended, tl.where(fill & ends, place, length))
        limit = tl.minimum(limit, tl.min(ended, axis=0) + 1)
    left = tl.zeros([BLOCK_L], tl.int32)
    first_a = tl.zeros([BLOCK_L], tl.int32) + length
    first_b = tl.zeros([BLOCK_L], tl.int32) + length
    for begin in range(0, length, BLOCK_L):
        place = begin + tl.arange(0, BLOCK_L)
        there = place < length
        fill = tl.load(fill_ptr + place, mask=there, other=0) != 0
        masked = (tl.load(masked_ptr + place, mask=there, other=0) != 0) & (fill == 0)
        token = tl.load(token_ptr + place, mask=fill, other=0)
        written = fill
        if EOS_STOP:
            committed = tl.load(commit_step_ptr + place, mask=there, other=-1) >= 0
            beyond = (masked | fill | committed) & (place >= limit)
            token = tl.where(beyond, eos_id, token)
            written = fill | beyond
            masked = masked & (beyond == 0)
        tl.debug_barrier()  # another thread may load what this one stores
        tl.store(tokens_ptr + place, token, mask=written)
        tl.store(masked_ptr + place, masked, mask=there)
        tl.store(commit_step_ptr + place, (tl.zeros([BLOCK_L], tl.int64) + step), mask=fill)
        tl.store(dirty_ptr + place, fill, mask=fill)
        left += masked.to(tl.int32)
        first_a = tl.minimum(first_a, tl.where(masked & (place >= from_a), place, length))
        first_b = tl.minimum(first_b, tl.where(masked & (place >= from_b), place, length))
    return limit, tl.sum(left, axis=0), tl.min(first_a, axis=0), tl.min(first_b, axis=0)


@triton.jit
def block_at(start, end, following, block_length):
    """Return index, start and end of the block that holds position ``following``."""
    index = (following - start) // block_length
    begin = start + index * block_length
    return index, begin, tl.minimum(begin + block_length, end)


def check_canvas(control: torch.Tensor, **tensors: tuple[torch.Tensor, torch.dtype]) -> tuple[int, int]:
    """Batch and length of canvas tensors ``[B, L]``, given with their dtypes; all must agree with ``control``."""
    check_tensor("control", control, dtype=torch.int64, shape=[None, len(CONTROL)], dense=True)
    length = None
    for name, (tensor, dtype) in tensors.items():
        check_tensor(name, tensor, dtype=dtype, shape=[len(control), length], device=control.device, dense=True)
        length = tensor.shape[1]
    refuse_unless(length <= MAX_LENGTH, f"the canvas has {length} positions, more than {MAX_LENGTH}")
    return len(control), length


_CANVAS = {
    "token": torch.int64,
    "score": torch.float32,
    "candidate": torch.bool,
    "tokens": torch.int64,
    "masked": torch.bool,
    "commit_step": torch.int64,
    "dirty": torch.bool,
    "fill": torch.bool,
}


def check_state(state) -> tuple[int, int]:
    """Batch and length of a decode state; its tensors that both decide kernels take must have their form.

    These are, by their names in the state:

    * ``token``, ``score``, ``candidate``, ``[B, L]`` int64, float32, bool: chosen tokens, their scores, the candidates;
    * ``tokens``, ``masked``, ``commit_step``, ``[B, L]`` int64, bool, int64: canvas, undecided positions, step of the
      commit;
    * ``dirty``, bool ``[B, L]``; set where a token is committed;
    * ``fill``, bool ``[B, L]``, scratch; holds the positions that this step committed;
    * ``control``, int64 ``[B, n]``, the columns of :data:`~sfs_triton.kernels.control.CONTROL`;
    * ``sampling``, float32 ``[B, n]``, the columns of :data:`~sfs_triton.kernels.control.SAMPLING`.
    """
    canvas = {name: (getattr(state, name), dtype) for name, dtype in _CANVAS.items()}
    batch, length = check_canvas(state.control, **canvas)
    shape, device = [batch, len(SAMPLING)], state.control.device
    check_tensor("sampling", state.sampling, dtype=torch.float32, shape=shape, device=device, dense=True)
    return batch, length


def state_pointers(state) -> dict[str, torch.Tensor]:
    """The tensors of :func:`check_state`, as arguments of a decide kernel."""
    return {f"{name}_ptr": getattr(state, name) for name in (*_CANVAS, "control", "sampling")}


def other_ends(state, eos_stop: bool) -> dict[str, Any]:
    """The end-of-text tokens besides ``eos_id``, int64 ``[n]``, as arguments of a decide kernel."""
    ends = state.other_ends
    check_tensor("other_ends", ends, dtype=torch.int64, shape=[None], device=state.control.device, dense=True)
    count = len(ends) if eos_stop else 0
    return {"ends_ptr": ends if count else None, "N_ENDS": count}


@dataclass(frozen=True)
class ScanConfig:
    BLOCK_L: int
    num_warps: int


def scan_config(length: int) -> ScanConfig:
    """Choose positions per iteration of a scan, and warps: four values per thread, so several int64 fit registers."""
    block = min(1024, max(16, triton.next_power_of_2(length)))
    return ScanConfig(BLOCK_L=block, num_warps=max(1, min(8, block // 128)))
