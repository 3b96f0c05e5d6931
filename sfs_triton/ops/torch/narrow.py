"""Candidates narrowed to those that a step commits, by rules that the block machine does not have.

The machine then commits all that are left: its own threshold, ``tau``, is 0, and the sampler's is ``tau_low``. A rule
may also change the scores by which the machine decides. NaN scores are kept, so that they end their sequence.
``earlier`` has what the sampler keeps of earlier steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .commit import candidate_scores, rank_by_score
from .density import density


@dataclass(frozen=True)
class NearBest:
    """Keep the candidates that reach ``tau_low``, the best one, and all within ``distance`` of its score.

    A score of 0 is no probability: it is that of a position which is to be committed last, so alone."""

    distance: float

    def narrow(self, state, earlier) -> None:
        scores = candidate_scores(state)
        lowest = (scores.amax(1) - self.distance).minimum(state.tau_low)
        near = (scores >= lowest[:, None]) & (scores > 0) | (rank_by_score(scores) == 0)
        state.candidate.logical_and_(near | scores.isnan())


@dataclass(frozen=True)
class WithinFactor:
    """Keep the best candidates before the first, the ``n``-th, for which ``(n + 1) * (1 - score)`` reaches ``bound``;
    all but one of them if there is none. At least the ``least`` best are kept."""

    least: int

    def narrow(self, state, earlier) -> None:
        scores = candidate_scores(state)
        ordered = scores.sort(dim=1, descending=True).values.double()  # so that products are exact, or nearly
        below = (state.position + 2) * (1 - ordered) < state.bound[:, None]
        count = torch.minimum(below.cumprod(1).sum(1), state.candidate.sum(1) - 1).clamp(min=self.least)
        state.candidate.logical_and_((rank_by_score(scores) < count[:, None]) | scores.isnan())


@dataclass(frozen=True)
class NearDecided:
    """Multiply scores by the density of decided positions around, then narrow by ``rule`` if there is one."""

    sigma: float
    rule: WithinFactor | None

    def narrow(self, state, earlier) -> None:
        weighted = (state.score * density(state, self.sigma)).float()
        torch.where(state.candidate, weighted, state.score, out=state.score)
        if self.rule is not None:
            self.rule.narrow(state, earlier)


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


@dataclass(frozen=True)
class Revocable:
    """Keep the candidates over ``tau_low``, at most ``share`` of all and at most ``most``, or else the best one.

    Where these are two or more, positions of the block that earlier steps committed and whose token ``earlier`` finds
    less probable than ``bound`` become undecided again: fewer than the row's last step committed, the least probable
    ones (``most_back`` before a block's second step). ``state.quota`` carries that count.
    """

    share: float = 0.7
    least: int = 5  # limit of the share, from below
    most: int = 20
    most_back: int = 30

    def narrow(self, state, earlier) -> None:
        scores = candidate_scores(state)
        bad, rank = scores.isnan(), rank_by_score(scores)
        limit = (state.candidate.sum(1).double() * self.share).long().clamp(self.least, self.most)
        kept = state.candidate & ((rank == 0) | (scores > state.tau_low[:, None]) & (rank < limit[:, None]))
        count = kept.sum(1)
        first, stop = state.block_start[:, None], state.block_end[:, None]
        decided = (state.commit_step >= 0) & (state.position >= first) & (state.position < stop)
        back = decided & (earlier.probability < state.bound[:, None]) & ((count > 1) & ~bad.any(1))[:, None]
        fewest = torch.where(state.stage_step == 0, self.most_back, state.quota) - 1
        order = rank_by_score((-earlier.probability).masked_fill(~back, float("-inf")))
        back &= order < fewest[:, None]
        state.tokens.masked_fill_(back, state.mask_id)
        state.commit_step.masked_fill_(back, -1)
        state.masked.logical_or_(back)
        state.dirty.logical_or_(back)
        state.quota.copy_(torch.where(count > 0, count, state.quota))
        state.candidate.logical_and_(kept | bad)
