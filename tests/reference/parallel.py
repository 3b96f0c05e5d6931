"""Oracle of the samplers that commit several positions per step by other rules than one threshold.

Rules cited as "d3LLM 2" are in the README of the recorded cases of these samplers; see ``docs/samplers.md``.
"""

from __future__ import annotations

from itertools import pairwise

from sfs_triton.decoding.samplers import EntropyBound, Hierarchy, LocalLeap, MultiBlock
from tests.reference.blocks import blocks_of, even_counts, highest, take_step, weighted
from tests.reference.confidence import Ends
from tests.reference.end_of_think import EndOfThink
from tests.reference.slowfast import Logits, Noise, ReferenceRun, Row, passes, ranked

Parallel = EntropyBound | Hierarchy | LocalLeap | MultiBlock


def note_ranks(row: Row, scores: dict[int, float], count: int) -> None:
    """Note the gaps between the scores of the ``count`` best positions and the next."""
    ordered = ranked(scores.values())[: count + 1]
    row.margin = min([row.margin, *(a - b for a, b in pairwise(ordered))])


def bounded(row: Row, scores: dict[int, float], entropies: dict[int, float], sampler: EntropyBound) -> list[int]:
    """Go down the positions, best first, while the entropies of those before sum to at most the bound (d2Cache 4)."""
    chosen, total = [], 0.0
    for position in highest(scores, len(scores)):
        row.margin = min(row.margin, abs(total - sampler.bound))
        if total > sampler.bound and len(chosen) >= sampler.least:
            break
        chosen.append(position)
        total += entropies[position]
    note_ranks(row, scores, len(chosen))
    return chosen


def runs_of(positions: list[int]) -> list[list[int]]:
    """Cut ascending positions into runs of neighbours."""
    runs = [[p] for p in positions[:1]]
    for before, position in pairwise(positions):
        if position == before + 1:
            runs[-1].append(position)
        else:
            runs.append([position])
    return runs


def hierarchical(row: Row, scores: dict[int, float], sampler: Hierarchy) -> list[int]:
    """Take the best position, all over ``tau``, and each run's best if it is over ``tau_low`` (dInfer 4)."""
    tops = []
    for run in runs_of(sorted(scores)):
        own = {p: scores[p] for p in run}
        row.note_margin(list(own.values()), sampler.tau, sampler.tau_low or 0.0)
        tops += highest(own, 1)
    chosen = {p for p in tops if sampler.tau_low is None or passes(scores[p], sampler.tau_low, strict=True)}
    chosen |= {p for p in scores if passes(scores[p], sampler.tau, strict=True)}
    return sorted(chosen | set(highest(scores, 1)))


def leaping(row: Row, scores: dict[int, float], sampler: LocalLeap, count: int | None) -> list[int]:
    """Take anchors, and confident positions near them. With ``count`` so many best ones are taken, and only these can
    be anchors (LocalLeap); otherwise the best one and all that reach ``tau``."""
    row.note_margin(list(scores.values()), sampler.tau, sampler.tau_near)
    note_ranks(row, scores, count or 1)
    over = {p for p, score in scores.items() if passes(score, sampler.tau, strict=False)}
    first = set(highest(scores, 1 if count is None else count))
    anchors = over if count is None else over & first
    near = {p for p in scores if any(abs(p - anchor) <= sampler.radius for anchor in anchors)}
    lower = {p for p in near if passes(scores[p], sampler.tau_near, strict=False)}
    return sorted(first | lower | (anchors if count is None else set()))


def decode_blocks(row: Row, sampler: EntropyBound | Hierarchy | LocalLeap) -> None:
    """Decode block by block."""
    draw = {"temperature": sampler.temperature, "top_k": sampler.top_k, "top_p": sampler.top_p}
    draw["metric"] = getattr(sampler, "metric", "confidence")
    parts = blocks_of(row.start, len(row.canvas), sampler.block_length)
    for block, (begin, end) in enumerate(parts):
        counts = None
        if getattr(sampler, "steps", None) is not None:
            counts = even_counts(len(row.masked(begin, end)), max(1, sampler.steps // len(parts)))

        def choice(scores: dict[int, float], k: int, counts: list[int] | None = counts) -> list[int]:
            if isinstance(sampler, Hierarchy):
                return hierarchical(row, scores, sampler)
            if isinstance(sampler, LocalLeap):
                return leaping(row, scores, sampler, None if counts is None else counts[k])
            seen = row.look(row.limit, list(scores), metric="entropy", lowest=False)
            scores = weighted(row, scores, sampler.sigma)
            return bounded(row, scores, {p: -score for p, (_, score) in seen.items()}, sampler)

        k = 0
        while row.masked(begin, end):
            take_step(row, block, k, end, begin, draw, choice)
            k += 1


def decode_multi_block(row: Row, sampler: MultiBlock) -> None:
    """Decode with several open blocks (d3LLM 2 and 3); the threshold of activation does not matter without a cache."""
    parts = blocks_of(row.start, len(row.canvas), sampler.block_length)
    draw = {"temperature": sampler.temperature, "top_k": sampler.top_k, "top_p": sampler.top_p, "metric": "entropy"}
    first = next((index for index, part in enumerate(parts) if row.masked(*part)), len(parts))
    opened, k = first + 1, 0

    def choice(scores: dict[int, float], _: int) -> list[int]:
        row.note_margin(list(scores.values()), -sampler.entropy)
        chosen = {p for p, score in scores.items() if passes(score, -sampler.entropy, strict=sampler.strict)}
        if sampler.keep_best:
            chosen |= set(highest(scores, 1))
        leftmost = next(part for part in parts if row.masked(*part))
        own = {p: score for p, score in scores.items() if leftmost[0] <= p < leftmost[1]}
        row.note_margin(list(own.values()))
        return sorted(chosen if chosen & set(own) else chosen | set(highest(own, 1)))

    while row.masked(row.start, len(row.canvas)):
        begin, end = parts[opened - 1]
        left, size = len(row.masked(begin, end)), sampler.block_length
        if opened < len(parts) and (k or not sampler.open_at) and (1 - left / size >= sampler.open_at or not left):
            opened += 1
        take_step(row, first, k, parts[opened - 1][1], parts[first][0], draw, choice)
        k += 1


def decode(
    logits_fn: Logits,
    canvas: list[int],
    start: int,
    sampler: Parallel,
    mask_id: int,
    eos_id: int,
    noise: Noise | None = None,
) -> ReferenceRun:
    """Decode one sequence."""
    ends = Ends((eos_id,), sampler.eos, sampler.eos_penalty)
    row = Row(logits_fn, canvas, start, mask_id, eos_id, sampler.eos_stop, noise, ends, EndOfThink.of(sampler))
    if isinstance(sampler, MultiBlock):
        decode_multi_block(row, sampler)
    else:
        decode_blocks(row, sampler)
    return row.run()
