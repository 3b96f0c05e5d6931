"""Slow, obvious samplers of one row: the oracle that the fast implementation is tested against.

Written from the descriptions alone and sharing no code with the operations they check. Nothing outside the tests
imports this package.
"""

from __future__ import annotations

from ..samplers import Sampler, SlowFast
from . import blocks, slowfast
from .confidence import Look, look
from .slowfast import Logits, Noise, ReferenceRun, Step

__all__ = ["Logits", "Look", "Noise", "ReferenceRun", "Step", "decode", "look"]


def decode(
    logits_fn: Logits,
    canvas: list[int],
    start: int,
    sampler: Sampler,
    mask_id: int,
    eos_id: int,
    noise: Noise | None = None,
    seed: int = 0,
) -> ReferenceRun:
    """Decode the masks of ``canvas`` from ``start`` on with any sampler.

    Args:
        logits_fn: logits ``[n, V]`` for the first ``n`` ids of the canvas: shifted for models whose row ``i`` is about
            position ``i + 1``, guided if the sampler's ``cfg_scale`` asks for it.
        noise: Gumbel noise ``[n, V]`` for a step and a number of positions; needed at temperatures above 0.
        seed: of the random positions of ``FixedSteps(metric="origin")``.
    """
    if isinstance(sampler, SlowFast):
        return slowfast.decode(logits_fn, canvas, start, sampler, mask_id, eos_id, noise)
    return blocks.decode(logits_fn, canvas, start, sampler, mask_id, eos_id, noise, seed)
