"""Oracle of SlowFast Sampling for one sequence, written for readability.

Sources of the rules: the paper (arXiv 2506.10848) and ``docs/samplers.md`` for the paper's preset; for the two
reference presets, the numbered rules in the README of the recorded cases ("LLaDA 3" is the third rule of its
section "SlowFast, LLaDA"). Positions called ``s``, ``e`` and the estimates count from the start of the block, which
is the start of the response if there are no blocks; all others from the start of the canvas.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from sfs_triton.decoding.samplers import SlowFast
from tests.reference.confidence import FREE, LOWEST, Ends, Look, look
from tests.reference.end_of_think import EndOfThink

Logits = Callable[[list[int]], Tensor]  # token ids of the (shortened) canvas -> logits [n, V], shifted if necessary
Noise = Callable[[int, int], Tensor]  # step, positions to cover -> Gumbel noise [n, V]
Change = Callable[[Tensor, list[int]], Tensor]  # logits [n, V] at n positions -> those that are looked at


class Step(NamedTuple):
    """Step output, with the fields in the order of the recorded traces."""

    phase: str  # "S" slow, "F" fast, "B" for samplers with blocks only
    block: int
    cycle: int
    k: int
    forwarded: int  # response positions forwarded
    s: int
    estimate: int | None
    history: list[int] | None
    spread: float | None
    determined: bool
    e: int | None
    filled: list[int]  # positions from the start of the response


class ReferenceRun(NamedTuple):
    """A decoded sequence. ``margin``: smallest distance of any decision from its alternative; below about 1e-5,
    another order of summation in the model may decide differently."""

    tokens: list[int]
    nfe: int
    trace: list[Step]
    margin: float


@dataclass
class Row:
    """A sequence: its canvas, trace, and the operations common to all samplers."""

    logits_fn: Logits
    canvas: list[int]
    start: int
    mask_id: int
    eos_id: int
    eos_stop: bool
    noise: Noise | None = None
    ends: Ends = FREE
    think: EndOfThink = EndOfThink()
    trace: list[Step] = field(default_factory=list)
    margin: float = float("inf")

    def __post_init__(self) -> None:
        self.canvas = list(self.canvas)
        self.given = {p for p, token in enumerate(self.canvas) if token != self.mask_id}
        self.limit = len(self.canvas)  # one past the last position to decode

    @property
    def nfe(self) -> int:
        return len(self.trace)

    def masked(self, first: int, last: int) -> list[int]:
        """Return the undecided positions in ``[first, last)``."""
        return [p for p in range(first, min(last, self.limit)) if self.canvas[p] == self.mask_id]

    def look(
        self, length: int, positions: list[int], change: Change = lambda logits, _: logits, **draw
    ) -> dict[int, tuple[int, float]]:
        """Run the model on the first ``length`` positions; return token and score at each of ``positions``."""
        logits = self.logits_fn(self.canvas[:length])[positions]
        if positions:  # the leftmost is that of the block: no sampler passes one over
            token, amount = self.think.raised(self.canvas[self.start :], positions[0] - self.start)
            logits[0, token] += amount
        noise = None if self.noise is None or not positions else self.noise(self.nfe, length)[positions]
        how = {"ends": self.ends, "noise": noise, **draw}
        found: Look = look(change(logits, positions), **how) if positions else Look([], [])
        return dict(zip(positions, zip(found.tokens, found.scores, strict=True), strict=True))

    def fill(self, chosen: dict[int, int]) -> None:
        """Commit tokens. With ``eos_stop``, positions after the leftmost committed end-of-text become end-of-text.

        Given tokens, which only an infilling canvas has there, are kept.
        """
        for position, token in chosen.items():
            self.canvas[position] = token
        ends = [position for position, token in chosen.items() if token == self.eos_id]
        if self.eos_stop and ends and min(ends) < self.limit:
            self.limit = min(ends) + 1
            for position in set(range(self.limit, len(self.canvas))) - self.given:
                self.canvas[position] = self.eos_id

    def note_margin(self, scores: list[float], *thresholds: float) -> None:
        gaps = [abs(score - tau) for score in scores for tau in thresholds]
        ordered = ranked(scores)
        gaps += [a - b for a, b in zip(ordered[:1], ordered[1:2], strict=False)]
        self.margin = min([self.margin, *gaps])

    def run(self) -> ReferenceRun:
        return ReferenceRun(self.canvas[self.start :], self.nfe, self.trace, self.margin)


def ranked(scores: Iterable[float]) -> list[float]:
    """Return the scores in descending order, but those of ends put last, whose order no rounding can change."""
    return sorted((score for score in scores if score not in LOWEST.values()), reverse=True)


def passes(score: float, tau: float, strict: bool) -> bool:
    """Compare a score with a threshold rounded to float32, as the score is: above it (``strict``) or at least equal."""
    rounded = torch.tensor(tau, dtype=torch.float32).item()
    return score > rounded if strict else score >= rounded


def best(scores: dict[int, float]) -> list[int]:
    """Return the position with the highest score, the leftmost of equals; [] without scores."""
    return [min(scores, key=lambda position: (-scores[position], position))] if scores else []


def all_over(scores: dict[int, float], tau: float | None, at_least: int, strict: bool) -> list[int]:
    """Return the positions over the threshold if there are at least ``at_least``, else []."""
    over = [p for p, score in scores.items() if tau is not None and passes(score, tau, strict)]
    return over if len(over) >= at_least else []


def choose(scores: dict[int, float], tau: float | None, at_least: int, strict: bool) -> list[int]:
    """Return the positions over the threshold if there are ``at_least``, else the best (LLaDA 4 and 5, Dream 5).

    Without a threshold, return the best only: the paper's slow stage.
    """
    return all_over(scores, tau, at_least, strict) or best(scores)


def spread_of(history: list[int], kind: str) -> float:
    """Return population variance or standard deviation, or unbiased variance, 0 for one value (Dream 3)."""
    if kind == "unbiased":
        return float(statistics.variance(history)) if len(history) > 1 else 0.0
    variance = float(statistics.pvariance(history))
    return math.sqrt(variance) if kind == "std" else variance


def is_stable(history: list[int], sampler: SlowFast) -> bool:
    """Compare the spread with its limit; a standard deviation by squares, so that no rounding of a root decides."""
    deviation, limit = sampler.spread == "std", sampler.spread_limit
    spread = spread_of(history, "variance" if deviation else sampler.spread)
    if deviation:
        limit *= limit
    return spread <= limit if sampler.inclusive else spread < limit


def mean_of(history: list[int], rounding: str) -> int:
    """Return the mean horizon: truncated (LLaDA 3, paper), or rounded half to even and at least 1 (Dream 3)."""
    mean = statistics.mean(history)
    return max(1, round(mean)) if rounding == "even" else int(mean)


class Horizon:
    """Candidate horizons of one slow stage, their spread, and the span's end."""

    def __init__(self, sampler: SlowFast):
        self.sampler = sampler
        self.history = [0] * sampler.window if sampler.zero_history else []
        self.seen = 0
        self.spread: float | None = None
        self.e: int | None = None
        self.determined = False

    def add(self, estimate: int) -> None:
        """Add a horizon. LLaDA 3: sliding window, tested once full. Dream 3: ring of zeros, tested from step one."""
        window = self.sampler.window
        if self.sampler.zero_history:
            self.history[self.seen % window] = estimate
        else:
            self.history = [*self.history, estimate][-window:]
        self.seen += 1
        if len(self.history) < window:
            return
        self.spread = spread_of(self.history, self.sampler.spread)
        self.determined = is_stable(self.history, self.sampler)
        self.e = estimate if self.determined else mean_of(self.history, self.sampler.rounding)

    def final(self) -> int:
        """Return the span's end; the mean of the horizons so far if the window was never full (LLaDA 3)."""
        return mean_of(self.history, self.sampler.rounding) if self.e is None else self.e


def slow_stage(row: Row, sampler: SlowFast, block: int, cycle: int, begin: int, end: int, s: int) -> Horizon:
    """Run exploratory steps over ``[s, end of block)``, and estimate the candidate horizon."""
    horizon = Horizon(sampler)
    for k in range(sampler.k_max):
        masked = row.masked(begin + s, end)
        if not masked and sampler.slow_end != "fixed":  # LLaDA 1 continues; Dream 4 and the paper stop
            break
        if sampler.eos_stop and not row.masked(begin + s, row.limit):  # nothing is left to decode
            break
        length = row.limit
        seen = row.look(length, masked, **draw_of(sampler))
        scores = {p: score for p, (_, score) in seen.items()}
        estimate, became_stable = None, False
        if not horizon.determined:  # LLaDA 2: the furthest masked position that passes, before this fill
            able = [p for p in masked if sampler.eos_horizon or seen[p][0] != row.eos_id]  # ours: never end-of-text
            sure = [p + 1 - begin for p in able if passes(scores[p], sampler.tau_min, sampler.strict)]
            estimate = max(sure, default=s + 1)
            horizon.add(estimate)
            became_stable = horizon.determined
            if k == sampler.k_max - 1 and horizon.e is not None:
                horizon.determined = True  # LLaDA 3: on the last step the mean is final
            row.note_margin(list(scores.values()), sampler.tau_min)
        row.note_margin(list(scores.values()), *([] if sampler.tau_slow is None else [sampler.tau_slow]))
        chosen = choose(scores, sampler.tau_slow, sampler.min_parallel_slow, sampler.strict)
        if became_stable and sampler.share_stable:  # ours: the first fast fill, from the same logits
            span = {p: score for p, score in scores.items() if p < begin + horizon.e}
            row.note_margin(list(span.values()), sampler.tau_high)
            chosen = sorted({*chosen, *all_over(span, sampler.tau_high, sampler.min_parallel, sampler.strict)})
        row.fill({p: seen[p][0] for p in chosen})
        looking = estimate is not None
        row.trace.append(
            Step(
                "S",
                block,
                cycle,
                k,
                length - row.start,
                s,
                estimate,
                list(horizon.history) if looking else None,
                horizon.spread if looking else None,
                horizon.determined,
                horizon.e,
                [p - row.start for p in chosen],
            )
        )
        if horizon.determined and sampler.slow_end == "stable":
            break
    return horizon


def fast_stage(row: Row, sampler: SlowFast, block: int, cycle: int, begin: int, s: int, e: int) -> None:
    """Fill ``[s, e)`` in parallel. The first step forwards the whole canvas, later ones end at ``e`` (LLaDA 5)."""
    k = 0
    while masked := row.masked(begin + s, begin + e):
        length = row.limit if k == 0 else min(row.limit, begin + e)
        seen = row.look(length, masked, **draw_of(sampler))
        scores = {p: score for p, (_, score) in seen.items()}
        row.note_margin(list(scores.values()), sampler.tau_high)
        chosen = choose(scores, sampler.tau_high, sampler.min_parallel, sampler.strict)
        row.fill({p: seen[p][0] for p in chosen})
        row.trace.append(
            Step(
                "F", block, cycle, k, length - row.start, s, None, None, None, True, e, [p - row.start for p in chosen]
            )
        )
        if row.nfe > sampler.step_cap(len(row.canvas)):
            raise RuntimeError("the model keeps predicting the mask itself")  # LLaDA 11: the reference does not return
        k += 1


def draw_of(sampler: SlowFast) -> dict:
    """Return the arguments of token choice; scores are untempered (``docs/architecture.md``, "Confidence")."""
    return {"temperature": sampler.temperature, "top_k": sampler.top_k, "top_p": sampler.top_p}


def decode(
    logits_fn: Logits,
    canvas: list[int],
    start: int,
    sampler: SlowFast,
    mask_id: int,
    eos_id: int,
    noise: Noise | None = None,
) -> ReferenceRun:
    """Decode one sequence: per block, cycles of a slow and a fast stage until nothing is masked."""
    ends = Ends((eos_id,), sampler.eos, sampler.eos_penalty)
    row = Row(logits_fn, canvas, start, mask_id, eos_id, sampler.eos_stop, noise, ends, EndOfThink.of(sampler))
    block_length = sampler.block_length or len(canvas) - start
    for block, begin in enumerate(range(start, len(canvas), block_length)):
        end = min(begin + block_length, len(canvas))
        s, cycle = 0, 0
        while row.masked(begin + s, end) and cycle != sampler.max_cycles:  # LLaDA 11: may leave masks behind
            horizon = slow_stage(row, sampler, block, cycle, begin, end, s)
            e = min(horizon.final(), end - begin)
            fast_stage(row, sampler, block, cycle, begin, s, e)
            s = e  # LLaDA 6
            cycle += 1
    return row.run()
