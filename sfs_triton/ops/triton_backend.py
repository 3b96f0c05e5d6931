"""The operations by Triton kernels, under the names and with the arguments of :mod:`sfs_triton.ops.torch_backend`.

Most kernels take those arguments as they are. The step machines take every tensor of a :class:`DecodeState` and every
rule one by one, since kernels know neither of those classes; that is unpacked here.
"""

from __future__ import annotations

import torch

from ..kernels import cycle as _cycle
from ..kernels import place as _place
from ..kernels import plan as _plan
from ..kernels import reach as _reach
from ..kernels import select as _select
from ..kernels.attention import attention
from ..kernels.confidence import confidence
from ..kernels.gather import compact, embedding
from ..kernels.linear import linear
from ..kernels.lm_head import lm_head, lm_head_partials
from ..kernels.mlp import silu_mul
from ..kernels.norm import rms_norm
from ..kernels.partials import merge_partials
from ..kernels.post import post
from ..kernels.rope_cache import rope_cache

__all__ = [
    "attention",
    "compact",
    "confidence",
    "decide_block",
    "decide_cycle",
    "embedding",
    "linear",
    "lm_head",
    "lm_head_partials",
    "look",
    "merge_partials",
    "place",
    "plan",
    "post",
    "reach",
    "rms_norm",
    "rope_cache",
    "silu_mul",
]


def look(state, *, by_stage: bool, span_cap: int | None = None) -> torch.Tensor:
    _plan.look(state.masked, state.control, state.inside, by_stage=by_stage, span_cap=span_cap)
    return state.inside


def plan(
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
    _plan.plan(
        state.masked,
        state.control,
        state.dirty,
        state.forwarded,
        state.inside,
        rows,
        target,
        count,
        by_stage=by_stage,
        span_cap=span_cap,
        look_ahead=look_ahead,
        shift=shift,
        stale=stale,
    )


def reach(
    state,
    rows: torch.Tensor | None,
    count: torch.Tensor,
    key_range: torch.Tensor,
    *,
    to_span_end: bool,
    block: str | None,
) -> None:
    _reach.reach(state.control, rows, count, key_range, to_span_end=to_span_end, block=block)


def place(
    state,
    token: torch.Tensor,
    score: torch.Tensor,
    target: torch.Tensor,
    *,
    which: torch.Tensor | None = None,
    row: torch.Tensor | None = None,
) -> None:
    _place.place(token, score, target, state.token, state.score, which=which, row=row)


def decide_cycle(state, rules, *, slow: bool = True) -> None:
    event = None if state.events is None else (state.control.clone(), state.history.clone())
    _cycle.decide(
        state.token,
        state.score,
        state.inside,
        state.tokens,
        state.masked,
        state.commit_step,
        state.dirty,
        state.fill,
        state.history,
        state.spread,
        state.control,
        state.dials,
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
        state.inside,
        state.uniform,
        state.shares,
        state.tokens,
        state.masked,
        state.commit_step,
        state.dirty,
        state.fill,
        state.control,
        state.dials,
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
