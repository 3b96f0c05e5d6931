"""The operations by Triton kernels, under the names and with the arguments of :mod:`sfs_triton.ops.torch_backend`.

Most kernels take those arguments as they are. The step machines take every tensor of a :class:`DecodeState` and every
rule one by one, since kernels know neither of those classes; that is unpacked here.
"""

from __future__ import annotations

import torch

from ..kernels import cycle as _cycle
from ..kernels import list_positions as _list_positions
from ..kernels import mark_candidates as _mark_candidates
from ..kernels import position_ranges as _position_ranges
from ..kernels import scatter_choices as _scatter_choices
from ..kernels import select as _select
from ..kernels.attention import attention
from ..kernels.confidence import confidence
from ..kernels.gather import compact, embedding
from ..kernels.linear import linear
from ..kernels.lm_head import lm_head, lm_head_partials
from ..kernels.mlp import silu_mul
from ..kernels.norm import rms_norm
from ..kernels.partials import merge_partials
from ..kernels.publish import publish
from ..kernels.rope_cache import rope_cache

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
) -> None:
    _scatter_choices.scatter_choices(token, score, target, state.token, state.score, which=which, row=row)


def decide_cycle(state, rules, *, slow: bool = True) -> None:
    event = None if state.events is None else (state.control.clone(), state.history.clone())
    _cycle.decide(
        state.token,
        state.score,
        state.candidate,
        state.tokens,
        state.masked,
        state.commit_step,
        state.dirty,
        state.fill,
        state.history,
        state.spread,
        state.control,
        state.sampling,
        eos_id=state.eos_id,
        min_parallel_slow=rules.min_parallel_slow,
        min_parallel=rules.min_parallel,
        k_max=rules.k_max,
        window=rules.window,
        spread_kind=rules.spread,
        spread_limit=rules.spread_limit,
        inclusive=rules.inclusive,
        strict=rules.strict,
        slow_end=rules.slow_end,
        rounding=rules.rounding,
        zero_history=rules.zero_history,
        block_length=rules.block_length,
        max_cycles=rules.max_cycles,
        eos_stop=rules.eos_stop,
        share_stable=rules.share_stable,
        eos_horizon=rules.eos_horizon,
        look_ahead=rules.look_ahead,
        partial=rules.partial,
        span_cap=rules.span_cap,
        event=event,
    )
    if event is not None:
        state.record_event(*event)


def decide_block(state, rules, *, slow: bool = True) -> None:
    event = None if state.events is None else (state.control.clone(), state.history.clone())
    _select.decide(
        state.token,
        state.score,
        state.candidate,
        state.uniform,
        state.shares,
        state.tokens,
        state.masked,
        state.commit_step,
        state.dirty,
        state.fill,
        state.control,
        state.sampling,
        eos_id=state.eos_id,
        by_threshold=rules.by_threshold,
        paced_steps=rules.paced_steps,
        schedule=rules.schedule,
        at_random=rules.at_random,
        opening=rules.opening,
        block_length=rules.block_length,
        eos_stop=rules.eos_stop,
        partial=rules.partial,
    )
    if event is not None:
        state.record_event(*event)
