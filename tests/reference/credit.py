"""Oracle of CreditDecoding: a row of the vocabulary per position, as it was published.

Rules cited as "dInfer 3" are in the README of the recorded cases of newer samplers; see ``docs/samplers.md``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfs_triton.decoding.samplers import Credit
from tests.reference.blocks import blocks_of, take_step
from tests.reference.confidence import Ends
from tests.reference.slowfast import Logits, Noise, ReferenceRun, Row, passes, ranked

NEAR = 1e-5  # dInfer 2


class Ledger:
    """Credit of every token at every position of a block (dInfer 3)."""

    def __init__(self, sampler: Credit, ends: Ends):
        self.sampler, self.ends, self.credit = sampler, ends, {}

    def __call__(self, logits: Tensor, positions: list[int]) -> Tensor:
        """Count the most likely tokens of ``logits [n, V]``; return logits raised by all credit."""
        raised = logits.float().clone()
        for row, position in zip(raised, positions, strict=True):
            if self.ends.eos == "never":
                row[list(self.ends.ids)] = float("-inf")
            row[self.ends.ids[0]] -= self.ends.penalty
            credit = self.credit.setdefault(position, torch.zeros_like(row))
            probability = row.softmax(-1)
            token = int(probability.argmax())
            credit *= self.sampler.decay
            credit[token] += probability[token] ** self.sampler.power
            row += self.sampler.weight * torch.log(credit + 1)
        return raised


def decode(
    logits_fn: Logits,
    canvas: list[int],
    start: int,
    sampler: Credit,
    mask_id: int,
    eos_id: int,
    noise: Noise | None = None,
) -> ReferenceRun:
    """Decode one sequence: per step all positions that reach ``tau``, or all within 1e-5 of the best (dInfer 2)."""
    ends = Ends((eos_id,), sampler.eos, sampler.eos_penalty)
    row = Row(logits_fn, canvas, start, mask_id, eos_id, sampler.eos_stop, noise, ends._replace(penalty=0.0))
    draw = {"temperature": sampler.temperature, "top_k": sampler.top_k, "top_p": sampler.top_p}

    def choice(scores: dict[int, float], _: int) -> list[int]:
        top = max(scores.values())
        row.note_margin(list(scores.values()), sampler.tau)
        row.margin = min([row.margin, *(abs(top - NEAR - score) for score in ranked(scores.values()) if score < top)])
        near = (torch.tensor(top) - NEAR).item()
        best = next(p for p, score in scores.items() if score == top)
        fine = {p for p, score in scores.items() if score >= near or passes(score, sampler.tau, strict=False)}
        return [p for p in scores if p == best or p in fine and scores[p] > 0]  # 0: put last by eos="last"

    for block, (begin, end) in enumerate(blocks_of(row.start, len(row.canvas), sampler.block_length)):
        draw["change"], k = Ledger(sampler, ends), 0
        while row.masked(begin, end):
            take_step(row, block, k, end, begin, draw, choice)
            k += 1
    return row.run()
