"""Candidates of a step, in plain torch."""

from __future__ import annotations

import torch

from ...kernels.control import SLOW


def stage_range(state, by_stage: bool, span_cap: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the range of positions that each row decides on: first and one past the last, ``[B]`` each."""
    if not by_stage:
        return state.block_start, state.block_end
    capped = state.block_end if span_cap is None else torch.minimum(state.block_end, state.span_start + span_cap)
    return state.span_start, torch.where(state.stage == SLOW, capped, state.span_end)


def mark_candidates(state, *, by_stage: bool, span_cap: int | None = None) -> torch.Tensor:
    """Mark the candidates of the step, boolean ``[B, L]``, in ``state.candidate``.

    ``by_stage``: from the span's start to the block's end (at most ``span_cap`` positions) in the slow stage, to the
    span's end in the fast one; otherwise the block. Undecided positions of running rows only.
    """
    first, stop = stage_range(state, by_stage, span_cap)
    after = state.position >= torch.where(state.done == 0, first, state.length)[:, None]
    return torch.logical_and(state.masked & after, state.position < stop[:, None], out=state.candidate)
