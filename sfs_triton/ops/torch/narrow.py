"""Candidates narrowed to those that a step commits, by rules that the block machine does not have.

The machine then commits all that are left: its own threshold, ``tau``, is 0, and the sampler's is ``tau_low``. NaN
scores are kept, so that they end their sequence. ``earlier`` has what the sampler keeps of earlier steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .commit import candidate_scores, rank_by_score


@dataclass(frozen=True)
class NearBest:
    """Keep the candidates that reach ``tau_low``, the best one, and all within ``distance`` of its score."""

    distance: float

    def narrow(self, state, earlier) -> None:
        scores = candidate_scores(state)
        lowest = (scores.amax(1) - self.distance).minimum(state.tau_low)
        state.candidate.logical_and_((scores >= lowest[:, None]) | scores.isnan())


@dataclass(frozen=True)
class CalmOrBest:
    """Keep the candidates that reach ``tau_low`` and have diverged by less than ``bound`` in the last ``history`` looks
    at them, all of the same block; of these ``take`` all or one. Rows without any keep the ``least`` best ones."""

    history: int
    take: str
    least: int

    def narrow(self, state, earlier) -> None:
        scores, divergence, calm = candidate_scores(state), earlier.divergence, earlier.calm
        longer = torch.where(divergence < state.bound[:, None], calm + 1, 0)
        calm.copy_(torch.where(state.candidate, longer, calm))
        ready = (calm >= self.history) & (state.stage_step >= self.history - 1)[:, None]
        ready &= state.candidate & (scores >= state.tau_low[:, None])
        if self.take == "confident":
            ready &= state.position == scores.masked_fill(~ready, float("-inf")).argmax(1, keepdim=True)
        elif self.take == "calm":
            ready &= state.position == divergence.masked_fill(~ready, float("inf")).argmin(1, keepdim=True)
        best = rank_by_score(scores) < self.least
        chosen = torch.where(ready.any(1, keepdim=True), ready, best)
        state.candidate.logical_and_(chosen | scores.isnan())
