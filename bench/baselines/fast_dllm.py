"""Fast-dLLM's samplers for LLaDA (arXiv 2505.22618, NVlabs/Fast-dLLM): without a cache, with its prefix or dual cache.

As in the repository at the commit of the recorded cases: a float64 softmax over the logits of all forwarded
positions; with a cache, a block takes a forward of the whole canvas, which fills positions too, and then at least one
more, of the block and all that follows it (prefix) or of the block alone (dual).
"""

from __future__ import annotations

import torch

from sfs_triton import FixedSteps, Threshold

from .model import Decoded, Forwards, PlainModel, check_sampler
from .vanilla import even_counts

CACHES = ("none", "prefix", "dual")


def fill(ids: torch.Tensor, logits: torch.Tensor, end: int, mask_id: int, count: int | None, tau: float) -> None:
    """Fill masked positions of ``ids [n]`` before ``end`` from ``logits [n, V]``.

    ``count`` says how many, the most confident; if it is None, the most confident one and all that reach ``tau`` are.
    """
    token = logits.argmax(-1)
    confidence = logits.double().softmax(-1).gather(-1, token[:, None])[:, 0]
    undecided = ids == mask_id
    undecided[end:] = False
    confidence = confidence.masked_fill(~undecided, float("-inf"))
    chosen = confidence >= tau if count is None else torch.zeros_like(undecided)
    chosen[confidence.topk(1 if count is None else count).indices] = True
    ids.copy_(torch.where(chosen & undecided, token, ids))


def run(forwards: Forwards, sampler: Threshold | FixedSteps, cache: str) -> Decoded:
    """Decode the canvas of ``forwards``, block by block."""
    canvas, start, mask_id = forwards.canvas, forwards.start, forwards.spec.mask_id
    length, tau = len(canvas), getattr(sampler, "tau", 1.0)
    block = sampler.block_length or length - start
    store = None if cache == "none" else forwards.model.store(length)
    for first in range(start, length, block):
        last = min(first + block, length)
        counts: list[int] | None = None
        if isinstance(sampler, FixedSteps):
            masked = int((canvas[first:last] == mask_id).sum())
            counts = even_counts(masked, sampler.block_steps(length - start))
        k, least = 0, 1 if store is None else 2
        while k < least or forwards.masked(first, last):
            rows = slice(0, length)
            if store is not None and k > 0:
                rows = slice(first, length if cache == "prefix" else last)
            logits = forwards(canvas[rows], rows.start, store)
            fill(canvas[rows], logits, last - rows.start, mask_id, None if counts is None else counts[k], tau)
            k += 1
    return forwards.decoded()


def check(model: PlainModel, sampler: Threshold | FixedSteps, gen_length: int, cache: str) -> None:
    """Refuse options that the repository's samplers for LLaDA lack."""
    if cache not in CACHES:
        raise ValueError(f"cache={cache!r} is not one of {CACHES}")
    if cache != "none" and model.spec.shifted:
        raise ValueError(f"cache={cache!r} is written out for LLaDA, whose logits are not shifted")
    if isinstance(sampler, FixedSteps):
        check_sampler(sampler, (FixedSteps,), gen_length, metric="confidence")
        if cache != "none" and sampler.block_steps(gen_length) < 2:
            raise ValueError(f"steps={sampler.steps!r}: with cache={cache!r} a block takes at least two steps")
    else:
        check_sampler(sampler, (Threshold, FixedSteps), gen_length, steps=None)


@torch.inference_mode()
def decode(
    model: PlainModel, prompt: list[int], gen_length: int, sampler: Threshold | FixedSteps, cache: str = "none"
) -> Decoded:
    """Decode one sequence."""
    check(model, sampler, gen_length, cache)
    return run(Forwards(model, prompt, gen_length, sampler), sampler, cache)
