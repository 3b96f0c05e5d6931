"""Trace of each step of a generation, per sequence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy

from ..decoding.params import DecodingParams
from ..decoding.samplers import SlowFast
from ..decoding.step_plan import StepOutput
from ..kernels.control import FAST, Progress


@dataclass(frozen=True)
class StepTrace:
    """One step of one sequence. Positions and lengths count from the first decoded position; ``s``, ``e``, ``e_cand``
    and ``history`` from the start of the block; samplers without stages have phase ``"block"``."""

    step: int
    phase: str  # "slow", "fast" or "block"
    block: int
    cycle: int
    k: int  # step within the stage, or within the block
    s: int
    e_cand: int | None  # candidate horizon of this step; None when it was not estimated
    history: list[int] | None  # the window after this step, oldest first (a zero-initialised one in slot order)
    spread: float | None  # of the window; None until it is full
    determined: bool  # the span's end is final
    e: int | None  # the span's end; None in a slow stage whose window has not been full
    forwarded: int  # positions forwarded from the first decoded one on; for a list, its length
    positions_forwarded: int
    committed: list[int]
    confidence: list[float | None]  # over the decoded part; None at positions that were no candidates


def trace_step(
    params: DecodingParams, slot: int, end: int, before: Progress, recomputed: int, output: StepOutput
) -> StepTrace:
    """Return the trace of the step that a sequence took in ``slot``; the state must record events.

    Args:
        end: length of its canvas.
        before: its progress before the step.
        recomputed: positions that went through the layers.
    """
    policy, start = params.cache, before.start
    event = {name: output.published[f"event_{name}"][slot] for name in ("control", "candidate", "score")}
    decision = Progress(*event["control"].tolist())
    looked, scores = (event[name][start:end].tolist() for name in ("candidate", "score"))
    commits = output.published["commit_step"][slot, start:end].tolist()
    covered = output.progress[slot].listed if policy.lists(before.step) else policy.span(before)[1] - start
    return StepTrace(
        step=decision.step,
        block=decision.block,
        cycle=decision.cycle,
        k=decision.stage_step,
        forwarded=covered,
        positions_forwarded=recomputed,
        committed=[p for p, step in enumerate(commits) if step == decision.step],
        confidence=[c if there else None for c, there in zip(scores, looked, strict=True)],
        **_stage_fields(params.sampler, decision, slot, output.published),
    )


def _stage_fields(sampler, decision: Progress, slot: int, published: dict[str, numpy.ndarray]) -> dict[str, Any]:
    """Return the fields that samplers with stages have, relative to the start of the block."""
    origin = decision.block_start
    if not isinstance(sampler, SlowFast):
        return {
            **{"phase": "block", "s": 0, "e": decision.block_end - origin, "e_cand": None},
            **{"history": None, "spread": None, "determined": False},
        }
    history, spread = published["event_history"][slot].tolist(), published["event_spread"][slot].item()
    estimated = decision.estimate >= 0
    count, window = decision.n_history, len(history)
    if not sampler.zero_history:
        oldest = count % window if count > window else 0
        history = (history[oldest:] + history[:oldest])[: min(count, window)]
    full = not math.isnan(spread)
    if sampler.spread == "std":
        spread = math.sqrt(spread)
    fast, determined = decision.stage == FAST, bool(decision.determined)
    known = fast or determined or (estimated and full)
    return {
        "phase": "fast" if fast else "slow",
        "s": decision.span_start - origin,
        "e_cand": decision.estimate - origin if estimated else None,
        "history": history if estimated else None,
        "spread": spread if estimated and full else None,
        "determined": determined,
        "e": decision.span_end - origin if known else None,
    }
