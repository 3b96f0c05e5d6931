"""Trace of each step of a generation, per sequence."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy

from ..decoding.caching import CachePolicy, RowView
from ..decoding.samplers import Sampler, SlowFast
from ..kernels.control import COLUMN, FAST
from ..runner import Report


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
    rows_forwarded: int
    committed: list[int]
    confidence: list[float | None]  # over the decoded part; None at positions that were no candidates


class Tracer:
    """Count positions per forward of a sequence. ``keep``: also keep its trace; the state must record events."""

    def __init__(self, sampler: Sampler, policy: CachePolicy, start: int, end: int, keep: bool):
        self._sampler, self._policy, self._start, self._end, self._keep = sampler, policy, start, end, keep
        self.forward_lengths: list[int] = []
        self.rows_forwarded = 0
        self.full_forwards = 0
        self.steps: list[StepTrace] = []

    def after(self, row: RowView, report: Report) -> None:
        """Record a decided step; ``row`` is the state before it."""
        covered = self._policy.covered(row, report.control[row.index][COLUMN["listed"]])
        recomputed = self._policy.recomputed(row, covered)
        self.forward_lengths.append(covered)
        self.rows_forwarded += recomputed
        self.full_forwards += recomputed >= row.limit
        if self._keep:
            self.steps.append(self._trace(report.letter, row, covered, recomputed))

    def _trace(self, letter: dict[str, numpy.ndarray], row: RowView, covered: int, recomputed: int) -> StepTrace:
        index, start, end = row.index, self._start, self._end
        event = {name: letter[f"event_{name}"][index].tolist() for name in ("control", "history", "spread")}
        control = event["control"]
        candidate, scores = (letter[f"event_{name}"][index, start:end].tolist() for name in ("candidate", "score"))
        commits = letter["commit_step"][index, start:end].tolist()
        return StepTrace(
            step=control[COLUMN["step"]],
            block=control[COLUMN["block"]],
            cycle=control[COLUMN["cycle"]],
            k=control[COLUMN["stage_step"]],
            forwarded=covered if self._policy.planned(row.step) else self._policy.span(row).stop - start,
            rows_forwarded=recomputed,
            committed=[p for p, step in enumerate(commits) if step == control[COLUMN["step"]]],
            confidence=[c if there else None for c, there in zip(scores, candidate, strict=True)],
            **self._stage(event),
        )

    def _stage(self, event: dict) -> dict:
        row, history, spread = event["control"], event["history"], event["spread"]
        if not isinstance(self._sampler, SlowFast):
            return {
                "phase": "block",
                "s": 0,
                "e_cand": None,
                "history": None,
                "spread": None,
                "determined": False,
                "e": row[COLUMN["block_end"]] - row[COLUMN["block_start"]],
            }
        begin = row[COLUMN["block_start"]]
        estimated = row[COLUMN["estimate"]] >= 0
        count, window = row[COLUMN["n_history"]], len(history)
        if not self._sampler.zero_history:
            oldest = count % window if count > window else 0
            history = (history[oldest:] + history[:oldest])[: min(count, window)]
        full = not math.isnan(spread)
        if self._sampler.spread == "std":
            spread = math.sqrt(spread)
        fast, determined = row[COLUMN["stage"]] == FAST, bool(row[COLUMN["determined"]])
        known = fast or determined or (estimated and full)
        return {
            "phase": "fast" if fast else "slow",
            "s": row[COLUMN["span_start"]] - begin,
            "e_cand": row[COLUMN["estimate"]] - begin if estimated else None,
            "history": history if estimated else None,
            "spread": spread if estimated and full else None,
            "determined": determined,
            "e": row[COLUMN["span_end"]] - begin if known else None,
        }
