"""What each step of a generation did, row by row."""

from __future__ import annotations

from dataclasses import dataclass

from .kernels.control import COLUMN, FAST
from .loops import StepReport
from .samplers import Sampler, SlowFast
from .state import DecodeState


@dataclass(frozen=True)
class StepTrace:
    """One step of one row. Positions and lengths count from the first decoded position, ``s``, ``e``, ``e_cand`` and
    ``history`` from the block's start; samplers without stages have phase ``"block"``."""

    step: int
    phase: str  # "slow", "fast" or "block"
    block: int
    cycle: int
    k: int  # step within the stage, or within the block
    s: int
    e_cand: int | None  # candidate horizon of this step; None when it was not estimated
    history: list[int] | None  # the window after this step, oldest first (a zero-initialised one in slot order)
    spread: float | None  # of the window; None until it is full
    determined: bool  # whether the span's end is final
    e: int | None  # the span's end; None in a slow stage whose window has not been full
    forwarded: int  # length of the forward, without what precedes the first decoded position
    rows_forwarded: int
    committed: list[int]
    confidence: list[float | None]  # over the decoded part; None where nothing was looked at or decided already


class Tracer:
    """Collects forward lengths of all rows, and traces if the state records events."""

    def __init__(self, state: DecodeState, sampler: Sampler):
        self._state, self._sampler = state, sampler
        self._starts = state.start.tolist()
        batch = len(self._starts)
        self.forward_lengths: list[list[int]] = [[] for _ in range(batch)]
        self.rows_forwarded = [0] * batch
        self.rows: list[list[StepTrace]] = [[] for _ in range(batch)]

    def after(self, report: StepReport) -> None:
        """Note a step that has just been decided."""
        for index, scope in report.scopes.items():
            self.forward_lengths[index].append(scope.rows)
            self.rows_forwarded[index] += report.recomputed[index]
        if self._state.events is None:
            return
        event = self._state.events.pop()
        control, commits = event["control"].tolist(), self._state.commit_step.tolist()
        ends = self._state.end.tolist()
        for index, scope in report.scopes.items():
            row, start = control[index], self._starts[index]
            here = [p - start for p, step in enumerate(commits[index]) if step == row[COLUMN["step"]]]
            looked = event["inside"][index, start : ends[index]].tolist()
            scores = event["score"][index, start : ends[index]].tolist()
            confidence = [c if there else None for c, there in zip(scores, looked, strict=True)]
            self.rows[index].append(
                StepTrace(
                    step=row[COLUMN["step"]],
                    block=row[COLUMN["block"]],
                    cycle=row[COLUMN["cycle"]],
                    k=row[COLUMN["k"]],
                    forwarded=scope.stop - start,
                    rows_forwarded=report.recomputed[index],
                    committed=here,
                    confidence=confidence,
                    **self._stage(row, event, index),
                )
            )

    def _stage(self, row: list[int], event: dict, index: int) -> dict:
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
        history = event["history"][index].tolist()
        count, window = row[COLUMN["n_history"]], len(history)
        if not self._sampler.zero_history:
            oldest = count % window if count > window else 0
            history = (history[oldest:] + history[:oldest])[: min(count, window)]
        spread = event["spread"][index].item()
        fast, determined = row[COLUMN["phase"]] == FAST, bool(row[COLUMN["determined"]])
        known = fast or determined or (estimated and spread == spread)
        return {
            "phase": "fast" if fast else "slow",
            "s": row[COLUMN["s"]] - begin,
            "e_cand": row[COLUMN["estimate"]] - begin if estimated else None,
            "history": history if estimated else None,
            "spread": spread if estimated and spread == spread else None,
            "determined": determined,
            "e": row[COLUMN["e"]] - begin if known else None,
        }
