"""Candidates narrowed to those that a step commits, by rules that the block machine does not have.

The machine then commits all that are left: its own threshold, ``tau``, is 0, and the sampler's is ``tau_low``. NaN
scores are kept, so that they end their sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

from .commit import candidate_scores


@dataclass(frozen=True)
class NearBest:
    """Keep the candidates that reach ``tau_low``, the best one, and all within ``distance`` of its score."""

    distance: float

    def narrow(self, state) -> None:
        scores = candidate_scores(state)
        lowest = (scores.amax(1) - self.distance).minimum(state.tau_low)
        state.candidate.logical_and_((scores >= lowest[:, None]) | scores.isnan())
