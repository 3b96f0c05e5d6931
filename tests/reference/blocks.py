"""Oracle of samplers that decode block by block, without caches: Fast-dLLM's threshold and fixed schedules.

Rules cited as "Fast-dLLM 1" are in the README of the recorded cases; the schedules are LLaDA's ``generate`` and
Dream's ``_sample``; see ``docs/samplers.md``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from sfs_triton.decoding.samplers import FixedSteps, Threshold
from tests.reference.confidence import Ends
from tests.reference.end_of_think import EndOfThink
from tests.reference.slowfast import Logits, Noise, ReferenceRun, Row, Step, best, passes, ranked

SCORES = {"topk_margin": "margin", "entropy": "entropy"}  # all other metrics score by confidence
Choice = Callable[[dict[int, float], int], list[int]]  # scores by position, step of the block -> positions


def blocks_of(start: int, stop: int, block_length: int | None) -> list[tuple[int, int]]:
    """Cut ``[start, stop)`` into blocks; one block if ``block_length`` is None."""
    size = block_length or stop - start
    return [(begin, min(begin + size, stop)) for begin in range(start, stop, size)]


def take_step(row: Row, block: int, k: int, end: int, begin: int, draw: dict, choice: Choice) -> int:
    """Forward the whole canvas and commit positions of one block. Return the number of committed positions."""
    masked = row.masked(begin, end)
    length = row.limit
    seen = row.look(length, masked, **draw)
    chosen = choice({p: score for p, (_, score) in seen.items()}, k)
    row.fill({p: seen[p][0] for p in chosen})
    filled = sorted(p - row.start for p in chosen)
    row.trace.append(Step("B", block, 0, k, length - row.start, 0, None, None, None, False, end - begin, filled))
    return len(chosen)


def highest(scores: dict[int, float], count: int) -> list[int]:
    """Return the ``count`` positions with the highest scores; of equal scores the leftmost first."""
    rest, found = dict(scores), []
    for _ in range(min(count, len(scores))):
        found += best(rest)
        del rest[found[-1]]
    return found


def density_at(row: Row, position: int, sigma: float) -> float:
    """Return the part of a bell curve around ``position`` that lies over decided positions (d2Cache 5).

    All positions before the response count as decided, and all after it if its last one is.
    """

    def is_decided(p: int) -> bool:
        return p < row.start or row.canvas[min(p, len(row.canvas) - 1)] != row.mask_id

    reach = int(10 * sigma) + 1
    weights = {d: math.exp(-d * d / (2 * sigma * sigma)) for d in range(-reach, reach + 1)}
    return sum(w for d, w in weights.items() if is_decided(position + d)) / sum(weights.values())


def weighted(row: Row, scores: dict[int, float], sigma: float | None) -> dict[int, float]:
    """Return the scores by which a sampler with a prior of certainty decides, rounded to float32 (d2Cache 5)."""
    if sigma is None:
        return scores
    return {p: torch.tensor(score * density_at(row, p, sigma)).item() for p, score in scores.items()}


def within_factor(row: Row, scores: dict[int, float], factor: float, least: int) -> list[int]:
    """Take the ``n - 1`` best positions for the first ``n`` with ``(n + 1) (1 - c_n) >= factor`` (d2Cache 3).

    Without any that is all but one of them. At least ``least`` are taken.
    """
    ordered, factor = sorted(scores.values(), reverse=True), torch.tensor(factor).item()  # in float32
    sizes = [(n + 1) * (1 - c) for n, c in enumerate(ordered, 1)]
    first = next((n for n, size in enumerate(sizes, 1) if size >= factor), len(sizes))
    count = max(first - 1, least)
    row.margin = min([row.margin, *(abs(size - factor) for size in sizes)])
    row.margin = min([row.margin, *(a - b for a, b in zip(ordered[:count], ordered[1:], strict=False))])
    return highest(scores, count)


def decode_threshold(row: Row, sampler: Threshold) -> None:
    """Decode by threshold (Fast-dLLM 1): per step the block's best position, and all that reach the threshold.

    Other metrics are d2Cache's (1 and 2) and d3LLM's (6): for the entropy ``tau`` is a highest one. With ``least`` so
    many of the best are taken in any case. A factor takes the threshold's place (d2Cache 3). With ``steps``, at most
    ``gen_length / steps`` positions per step plus the unused allowance (Fast-dLLM 5).
    """
    response = len(row.canvas) - row.start
    if sampler.steps is not None and response % sampler.steps:
        raise ValueError(f"steps={sampler.steps} does not divide the {response} positions")  # the reference asserts it
    allowance = response if sampler.steps is None else response // sampler.steps
    draw = {
        "temperature": sampler.temperature,
        "top_k": sampler.top_k,
        "top_p": sampler.top_p,
        "metric": sampler.metric,
    }
    tau = -sampler.tau if sampler.metric == "entropy" else sampler.tau
    filled = 0

    def choice(scores: dict[int, float], _: int) -> list[int]:
        scores = weighted(row, scores, sampler.sigma)
        if sampler.factor is not None:
            return within_factor(row, scores, sampler.factor, sampler.least)
        row.note_margin(list(scores.values()), tau)
        allowed = allowance * (row.nfe + 1) - filled
        ranked = highest(scores, allowed)
        sure = ranked[: sampler.least]
        return sure + [p for p in ranked[sampler.least :] if passes(scores[p], tau, strict=False)]

    for block, (begin, end) in enumerate(blocks_of(row.start, len(row.canvas), sampler.block_length)):
        k = 0
        while row.masked(begin, end):
            filled += take_step(row, block, k, end, begin, draw, choice)
            k += 1


def even_counts(masked: int, steps: int) -> list[int]:
    """Return LLaDA's counts: equal numbers of positions per step, the first steps taking one of the remainder each."""
    return [masked // steps + (1 if step < masked % steps else 0) for step in range(steps)]


def time_shares(steps: int, eps: float) -> list[float]:
    """Return Dream's share of undecided positions per step: ``1 - next / now``, linear times 1 to ``eps``, float32."""
    times = torch.linspace(1, eps, steps + 1)
    return [(1 - times[step + 1] / times[step]).item() for step in range(steps)]


def decode_fixed(row: Row, sampler: FixedSteps, seed: int) -> None:
    """Commit a scheduled count per step. ``steps`` are divided among the blocks; None: one position per step.

    A block that has masks runs all its steps, even if there are more steps than masks, as LLaDA's and Dream's own
    loops do; only ``eos_stop`` ends it early.

    Dream's ``origin`` commits each position with the step's share as its probability, from one uniform number per
    masked position and step.
    """
    parts = blocks_of(row.start, len(row.canvas), sampler.block_length)
    steps = max(1, (sampler.steps or len(row.canvas) - row.start) // len(parts))
    uniform = torch.Generator().manual_seed(seed)
    draw = {
        "metric": SCORES.get(sampler.metric, "confidence"),
        "temperature": sampler.temperature,
        "top_k": sampler.top_k,
        "top_p": sampler.top_p,
        "tempered": sampler.metric != "confidence",
    }
    shares = torch.tensor(time_shares(steps, sampler.eps))
    for block, (begin, end) in enumerate(parts):
        counts = even_counts(len(row.masked(begin, end)), steps)

        def choice(scores: dict[int, float], k: int, counts: list[int] = counts) -> list[int]:
            last = k == steps - 1
            if sampler.metric == "origin":
                draws = torch.rand(len(scores), generator=uniform)
                return [p for p, u in zip(scores, draws, strict=True) if last or u < shares[k]]
            count = counts[k]
            if sampler.metric != "confidence":
                count = len(scores) if last else int(len(scores) * shares[k])
            ordered = ranked(scores.values())
            row.margin = min([row.margin, *(a - b for a, b in zip(ordered[:count], ordered[1:], strict=False))])
            return highest(scores, count)

        for k in range(steps if row.masked(begin, end) else 0):
            if sampler.eos_stop and not row.masked(begin, end):
                break
            take_step(row, block, k, end, begin, draw, choice)


def decode(
    logits_fn: Logits,
    canvas: list[int],
    start: int,
    sampler: Threshold | FixedSteps,
    mask_id: int,
    eos_id: int,
    noise: Noise | None = None,
    seed: int = 0,
) -> ReferenceRun:
    """Decode one sequence block by block; ``seed`` is for the random positions of ``metric="origin"``."""
    ends = Ends((eos_id,), sampler.eos, sampler.eos_penalty)
    row = Row(logits_fn, canvas, start, mask_id, eos_id, sampler.eos_stop, noise, ends, EndOfThink.of(sampler))
    if isinstance(sampler, Threshold):
        decode_threshold(row, sampler)
    else:
        decode_fixed(row, sampler, seed)
    return row.run()
