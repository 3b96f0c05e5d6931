"""The operations by Triton kernels, under the names and with the arguments of :mod:`sfs_triton.ops.torch_backend`.

Most kernels take those arguments as they are. Those that take tensors of a :class:`DecodeState` one by one are given
them here.
"""

from __future__ import annotations

import torch

from ..kernels import list_positions as _list_positions
from ..kernels import mark_candidates as _mark_candidates
from ..kernels import position_ranges as _position_ranges
from ..kernels import scatter_choices as _scatter_choices
from ..kernels.attention import attention
from ..kernels.confidence import confidence
from ..kernels.cycle import decide_cycle
from ..kernels.gather import compact, embedding
from ..kernels.linear import linear
from ..kernels.lm_head import lm_head, lm_head_partials
from ..kernels.mlp import silu_mul
from ..kernels.norm import rms_norm
from ..kernels.partials import merge_partials
from ..kernels.publish import publish
from ..kernels.rope_cache import rope_cache
from ..kernels.select import decide_block

__all__ = [
    "attention",
    "compact",
    "confidence",
    "decide_block",
    "decide_cycle",
    "embedding",
    "linear",
    "list_positions",
    "lm_head",
    "lm_head_partials",
    "mark_candidates",
    "merge_partials",
    "position_ranges",
    "publish",
    "rms_norm",
    "rope_cache",
    "scatter_choices",
    "silu_mul",
]


def mark_candidates(state, *, by_stage: bool, span_cap: int | None = None) -> torch.Tensor:
    _mark_candidates.mark_candidates(state.masked, state.control, state.candidate, by_stage=by_stage, span_cap=span_cap)
    return state.candidate


def list_positions(
    state,
    rows: torch.Tensor,
    target: torch.Tensor,
    count: torch.Tensor,
    *,
    by_stage: bool,
    span_cap: int | None = None,
    look_ahead: int = 0,
    shift: int = 0,
    stale: bool = True,
) -> None:
    _list_positions.list_positions(
        state.masked,
        state.control,
        state.dirty,
        state.forwarded,
        state.candidate,
        rows,
        target,
        count,
        by_stage=by_stage,
        span_cap=span_cap,
        look_ahead=look_ahead,
        shift=shift,
        stale=stale,
    )


def position_ranges(
    state,
    rows: torch.Tensor | None,
    count: torch.Tensor,
    key_range: torch.Tensor,
    *,
    to_span_end: bool,
    block: str | None,
) -> None:
    _position_ranges.position_ranges(state.control, rows, count, key_range, to_span_end=to_span_end, block=block)


def scatter_choices(
    state,
    token: torch.Tensor,
    score: torch.Tensor,
    target: torch.Tensor,
    *,
    which: torch.Tensor | None = None,
    row: torch.Tensor | None = None,
    scores: torch.Tensor | None = None,
) -> None:
    into = state.score if scores is None else scores[:-1].view(state.score.shape)
    _scatter_choices.scatter_choices(token, score, target, state.token, into, which=which, row=row)
