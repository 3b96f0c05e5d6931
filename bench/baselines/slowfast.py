"""SlowFast Sampling (arXiv 2506.10848, LiangrunFlora/Slow-Fast-Sampling) without a feature cache.

A cycle is a slow stage, which fills cautiously and estimates how far positions are predictable, and a fast one, which
fills up to there in parallel. As the reference has it: a softmax over the logits of all forwarded positions, in the
logits' dtype; forwards cut at the span's end in the fast stage after its first; reads by the host where it branches.
The settings say which of its variants is run: the paper's, the repository's for LLaDA, or its for Dream.
"""

from __future__ import annotations

import statistics
from collections import deque

import torch

from sfs_triton import SlowFast

from .model import Decoded, Forwards, PlainModel, check_sampler


def look(forwards: Forwards, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward the first ``length`` positions; the confidence of each, -inf where it is decided, and its token."""
    logits = forwards(forwards.canvas[:length])
    token = logits.argmax(-1)
    confidence = logits.softmax(-1).gather(-1, token[:, None])[:, 0]
    return confidence.masked_fill(forwards.canvas[:length] != forwards.spec.mask_id, float("-inf")), token


def passes(confidence: torch.Tensor, tau: float, sampler: SlowFast) -> torch.Tensor:
    """Mark where the threshold is exceeded or, if not ``strict``, reached; compared in the confidence's dtype."""
    return confidence > tau if sampler.strict else confidence >= tau


def fill(
    span: torch.Tensor, confidence: torch.Tensor, token: torch.Tensor, tau: float | None, least: int, sampler: SlowFast
) -> None:
    """Fill ``span [n]`` of the canvas: all positions over ``tau`` if there are ``least``, else the most confident."""
    over = torch.zeros_like(span, dtype=torch.bool) if tau is None else passes(confidence, tau, sampler)
    if tau is None or int(over.sum()) < least:
        over = torch.zeros_like(over)
        over[confidence.argmax(0, keepdim=True)] = True  # without that, the host would read the index
    span.copy_(torch.where(over & (confidence > float("-inf")), token, span))


def mean_of(window: list[int], sampler: SlowFast) -> int:
    """The mean horizon: truncated, or rounded half to even and at least 1."""
    mean = statistics.mean(window)
    return max(1, round(mean)) if sampler.rounding == "even" else int(mean)


def is_stable(window: list[int], sampler: SlowFast) -> bool:
    """Compare the spread of a full window of horizons with its limit; a standard deviation by squares."""
    limit = sampler.spread_limit * sampler.spread_limit if sampler.spread == "std" else sampler.spread_limit
    if sampler.spread == "unbiased":
        spread = statistics.variance(window) if len(window) > 1 else 0
    else:
        spread = statistics.pvariance(window)
    return spread <= limit if sampler.inclusive else spread < limit


def slow_stage(forwards: Forwards, sampler: SlowFast, begin: int, s: int, end: int) -> int:
    """Run slow-stage steps over ``[s, end)`` of the block that starts at ``begin``; return the fast stage's end.

    A step's horizon is one past the last undecided position that is over ``tau_min``, from the block's start.
    """
    canvas = forwards.canvas
    window = deque([0] * sampler.window if sampler.zero_history else [], maxlen=sampler.window)
    stable, e = False, 0
    for _ in range(sampler.k_max):
        confidence, token = look(forwards, len(canvas))
        scope = slice(s, end)
        if not stable:
            able = passes(confidence[scope], sampler.tau_min, sampler).nonzero()
            window.append(s - begin + (int(able[-1]) + 1 if len(able) else 1))
            stable = len(window) == sampler.window and is_stable(list(window), sampler)
            e = window[-1] if stable else mean_of(list(window), sampler)
        fill(canvas[scope], confidence[scope], token[scope], sampler.tau_slow, sampler.min_parallel_slow, sampler)
        if stable and sampler.slow_end == "stable":
            break
        if sampler.slow_end != "fixed" and not forwards.masked(s, end):
            break
    return min(begin + e, end)


def fast_stage(forwards: Forwards, sampler: SlowFast, s: int, e: int) -> None:
    """Fill ``[s, e)`` in parallel; after the first step, forwards see nothing beyond ``e``."""
    length, scope = len(forwards.canvas), slice(s, e)
    while forwards.masked(s, e):
        confidence, token = look(forwards, length)
        span = forwards.canvas[scope]
        fill(span, confidence[scope], token[scope], sampler.tau_high, sampler.min_parallel, sampler)
        length = e


def run(forwards: Forwards, sampler: SlowFast) -> Decoded:
    """Decode the canvas of ``forwards``: per block, run cycles from its start until no position is masked."""
    start, length = forwards.start, len(forwards.canvas)
    block = sampler.block_length or length - start
    for begin in range(start, length, block):
        s, end, cycles = begin, begin + block, 0
        while forwards.masked(s, end) and cycles != sampler.max_cycles:
            e = slow_stage(forwards, sampler, begin, s, end)
            fast_stage(forwards, sampler, s, e)
            s, cycles = e, cycles + 1
    return forwards.decoded()


def check(sampler: SlowFast, gen_length: int) -> None:
    """Refuse options that neither the paper nor the references have."""
    check_sampler(sampler, (SlowFast,), gen_length, share_stable=False, eos_horizon=True)


@torch.inference_mode()
def decode(model: PlainModel, prompt: list[int], gen_length: int, sampler: SlowFast) -> Decoded:
    """Decode one sequence."""
    check(sampler, gen_length)
    return run(Forwards(model, prompt, gen_length, sampler), sampler)
