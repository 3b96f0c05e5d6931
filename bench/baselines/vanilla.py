"""LLaDA's own sampler: low-confidence remasking in a fixed number of steps (arXiv 2502.09992, ML-GSAI/LLaDA).

As its ``generate`` has it: every step forwards the whole canvas, takes the softmax over the logits of all positions in
the logits' dtype (its first versions took float64), and fills the most confident masked positions of the block.
"""

from __future__ import annotations

import torch

from sfs_triton import FixedSteps

from .model import Decoded, Forwards, PlainModel, check_sampler


def step(model: PlainModel | Forwards, canvas: torch.Tensor, first: int, last: int, count: int) -> None:
    """Run one forward of ``canvas [L]`` and fill its ``count`` most confident masked positions in ``[first, last)``.

    Reads nothing back to the host.
    """
    logits = model(canvas)
    token = logits.argmax(-1)
    confidence = logits.softmax(-1).gather(-1, token[:, None])[:, 0]
    undecided = canvas == model.spec.mask_id
    confidence = confidence.masked_fill(~undecided, float("-inf"))
    best = first + confidence[first:last].topk(count).indices
    canvas[best] = torch.where(undecided[best], token[best], canvas[best])


def even_counts(masked: int, steps: int) -> list[int]:
    """Divide ``masked`` positions evenly among the steps; the first steps take the remainder."""
    base, extra = divmod(masked, steps)
    return [base + (index < extra) for index in range(steps)]


def run(forwards: Forwards, sampler: FixedSteps) -> Decoded:
    """Decode the canvas of ``forwards``, block by block."""
    canvas, start = forwards.canvas, forwards.start
    length = len(canvas) - start
    block = sampler.block_length or length
    for first in range(start, len(canvas), block):
        masked = int((canvas[first : first + block] == forwards.spec.mask_id).sum())
        for count in even_counts(masked, sampler.block_steps(length)):
            step(forwards, canvas, first, first + block, count)
    return forwards.decoded()


def check(sampler: FixedSteps, gen_length: int) -> None:
    """Refuse options other than LLaDA's: Dream's metrics and its time schedule are not written out here."""
    check_sampler(sampler, (FixedSteps,), gen_length, metric="confidence")


@torch.inference_mode()
def decode(model: PlainModel, prompt: list[int], gen_length: int, sampler: FixedSteps) -> Decoded:
    """Decode one sequence."""
    check(sampler, gen_length)
    return run(Forwards(model, prompt, gen_length, sampler), sampler)
