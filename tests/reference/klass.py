"""Oracle of KLASS: distributions of all positions at every step, as it was published.

Rules cited as "KLASS 1" are in the README of the recorded cases of newer samplers; see ``docs/samplers.md``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfs_triton.decoding.samplers import KLASS
from tests.reference.blocks import blocks_of, highest, take_step
from tests.reference.confidence import Ends
from tests.reference.parallel import note_ranks
from tests.reference.slowfast import Logits, Noise, ReferenceRun, Row, passes


class Watch:
    """Logits of a model, and how far the distribution of each position is from that of the step before (KLASS 1)."""

    def __init__(self, logits_fn: Logits, length: int, history: int, ends: Ends):
        self.logits_fn, self.ends, self.before = logits_fn, ends, None
        self.divergences = torch.zeros(length, history, dtype=torch.float64)

    def __call__(self, ids: list[int]) -> Tensor:
        logits = self.logits_fn(ids)
        seen = logits.double().clone()
        if self.ends.eos == "never":
            seen[:, list(self.ends.ids)] = float("-inf")
        seen[:, self.ends.ids[0]] -= self.ends.penalty
        now = seen.softmax(-1)
        before = torch.zeros_like(now) if self.before is None else self.before[: len(now)]
        divergence = (now * (torch.log(now + 1e-12) - torch.log(before + 1e-12))).sum(-1)
        self.divergences = torch.cat([self.divergences[: len(now), 1:], divergence[:, None]], 1)
        self.before = now
        return logits

    def least(self, position: int) -> float:
        return self.divergences[position, -1].item()

    def most(self, position: int) -> float:
        return self.divergences[position].max().item()


def decode(
    logits_fn: Logits,
    canvas: list[int],
    start: int,
    sampler: KLASS,
    mask_id: int,
    eos_id: int,
    noise: Noise | None = None,
) -> ReferenceRun:
    """Decode one sequence block by block; only looks of the present block count (KLASS 1)."""
    ends = Ends((eos_id,), sampler.eos, sampler.eos_penalty)
    watch = Watch(logits_fn, len(canvas), sampler.history, ends)
    row = Row(watch, canvas, start, mask_id, eos_id, sampler.eos_stop, noise, ends)
    draw = {"temperature": sampler.temperature, "top_k": sampler.top_k, "top_p": sampler.top_p}

    def choice(scores: dict[int, float], k: int) -> list[int]:
        row.margin = min([row.margin, *(abs(watch.most(p) - sampler.divergence) for p in scores)])
        row.note_margin(list(scores.values()), sampler.tau)
        calm = [p for p in scores if watch.most(p) < sampler.divergence and k >= sampler.history - 1]
        ready = {p: scores[p] for p in calm if passes(scores[p], sampler.tau, strict=False)}
        if not ready:
            note_ranks(row, scores, sampler.least)
            return highest(scores, sampler.least)
        if sampler.take == "confident":
            note_ranks(row, ready, 1)
            return highest(ready, 1)
        if sampler.take == "calm":
            found = {p: -watch.least(p) for p in ready}
            note_ranks(row, found, 1)
            return highest(found, 1)
        return list(ready)

    for block, (begin, end) in enumerate(blocks_of(row.start, len(row.canvas), sampler.block_length)):
        k = 0
        while row.masked(begin, end):
            take_step(row, block, k, end, begin, draw, choice)
            k += 1
    return row.run()
