"""Choices of listed rows put at their positions of the canvas, in one launch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .check import INTEGERS, check_index, check_tensor, refuse_unless
from .cost import Cost
from .launch import cdiv, launch

_MAX_SLOTS = 2**30  # slots are numbered in 32 bits


@triton.jit(
    do_not_specialize=["n_entries", "n_slots_row", "length"],
    do_not_specialize_on_alignment=["target_ptr", "which_ptr"],
)
def _scatter_choices_kernel(
    token_ptr,
    score_ptr,
    target_ptr,
    which_ptr,
    row_ptr,
    canvas_token_ptr,
    canvas_score_ptr,
    n_entries,
    n_slots_row,
    length,
    HAS_WHICH: tl.constexpr,
    HAS_ROW: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    entry = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = entry < n_entries
    slot = entry
    if HAS_WHICH:
        slot = tl.load(which_ptr + entry, mask=live, other=-1)
        live = slot >= 0
    position = tl.load(target_ptr + slot, mask=live, other=-1)
    live = position >= 0
    row = slot // n_slots_row
    if HAS_ROW:
        row = tl.load(row_ptr + row, mask=live, other=0)
    at = row.to(tl.int64) * length + position
    token = tl.load(token_ptr + entry, mask=live, other=0)
    score = tl.load(score_ptr + entry, mask=live, other=0.0)
    tl.store(canvas_token_ptr + at, token.to(tl.int64), mask=live)
    tl.store(canvas_score_ptr + at, score, mask=live)


@dataclass(frozen=True)
class ScatterChoicesConfig:
    BLOCK_R: int
    num_warps: int


def scatter_choices_config(n_entries: int) -> ScatterChoicesConfig:
    """Choose entries and warps per program: two entries per thread, with three dependent loads each."""
    block = min(512, max(32, triton.next_power_of_2(n_entries)))
    return ScatterChoicesConfig(BLOCK_R=block, num_warps=max(1, block // 64))


def scatter_choices(
    token: torch.Tensor,
    score: torch.Tensor,
    target: torch.Tensor,
    canvas_token: torch.Tensor,
    canvas_score: torch.Tensor,
    *,
    which: torch.Tensor | None = None,
    row: torch.Tensor | None = None,
    config: ScatterChoicesConfig | None = None,
) -> None:
    """``canvas_token[row, position] = token`` and ``canvas_score[row, position] = score`` for all entries of a list.

    Args:
        token, score: int32 and float32 ``[R]``: the choice of each entry.
        target: int32 ``[b, T]``: the position that each slot of the list predicts, -1 where none.
        canvas_token, canvas_score: int64 and float32 ``[B, L]``, dense; changed at the entries' positions only.
        which: int32 ``[R]``: the slot of the flattened list that each entry belongs to, -1 where to none, and no slot
            twice. None: entry ``r`` belongs to slot ``r``, and ``R`` is ``b T``.
        row: int32 or int64 ``[b]``: the canvas row of each batch row; None is ``0..b-1``.

    No two live slots of a canvas row may have the same position: which of them it keeps is not defined.
    """
    check_tensor("target", target, dtype=torch.int32, shape=[None, None], dense=True)
    (batch, n_slots_row), device = target.shape, target.device
    n_slots = batch * n_slots_row
    refuse_unless(n_slots <= _MAX_SLOTS, f"target has {n_slots} slots, more than {_MAX_SLOTS}")
    check_tensor("token", token, dtype=torch.int32, shape=[n_slots if which is None else None], device=device)
    (n_entries,) = token.shape
    check_tensor("score", score, dtype=torch.float32, shape=[n_entries], device=device)
    check_tensor("canvas_token", canvas_token, dtype=torch.int64, shape=[None, None], device=device, dense=True)
    n_rows, length = canvas_token.shape
    check_tensor("canvas_score", canvas_score, dtype=torch.float32, shape=[n_rows, length], device=device, dense=True)
    if which is not None:
        refuse_unless(n_entries <= n_slots, f"token has {n_entries} entries for {n_slots} slots")
        check_tensor("which", which, dtype=torch.int32, shape=[n_entries], device=device)
        check_index("which", which, -1, n_slots)
    if row is None:
        refuse_unless(batch <= n_rows, f"target has {batch} rows, the canvas {n_rows}")
    else:
        check_tensor("row", row, dtype=INTEGERS, shape=[batch], device=device)
        check_index("row", row, 0, n_rows)
    check_index("target", target, -1, length)
    if n_entries == 0:
        return
    config = config or scatter_choices_config(n_entries)
    launch(
        _scatter_choices_kernel,
        (cdiv(n_entries, config.BLOCK_R),),
        token_ptr=token,
        score_ptr=score,
        target_ptr=target,
        which_ptr=which,
        row_ptr=row,
        canvas_token_ptr=canvas_token,
        canvas_score_ptr=canvas_score,
        n_entries=n_entries,
        n_slots_row=n_slots_row,
        length=length,
        HAS_WHICH=which is not None,
        HAS_ROW=row is not None,
        BLOCK_R=config.BLOCK_R,
        num_warps=config.num_warps,
    )


def scatter_choices_cost(n_entries: int) -> Cost:
    """Choice, slot and position of every entry read, and its place on the canvas written."""
    return Cost(bytes=n_entries * (4 + 4 + 4 + 4 + 8 + 4), flops=0)
