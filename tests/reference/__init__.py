"""Oracle: slow, simple samplers of one sequence, against which the fast implementation is tested.

They follow the published descriptions and share no code with the operations they check. Only tests import this
package.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfs_triton.decoding.samplers import KLASS, Credit, FixedSteps, Sampler, SlowFast, Threshold
from tests.reference import blocks, credit, klass, parallel, slowfast
from tests.reference.confidence import Look, look
from tests.reference.slowfast import Logits, Noise, ReferenceRun, Step

__all__ = ["Logits", "Look", "Noise", "ReferenceRun", "Step", "decode", "logits_of", "look"]


def logits_of(model: Any, canvas: list[int], cfg_scale: float = 0.0) -> Logits:
    """Return a model's ``logits_fn`` for :func:`decode`: ``model.logits`` of the ids ``[1, n]``, shifted and guided.

    Shifted models predict the next position, so position ``i`` takes row ``i - 1``, and row 0 is used twice (Dream 6).
    Guidance adds ``cfg_scale * (c - u)``, where for ``u`` the given tokens of ``canvas`` are masked (LLaDA 9).
    """
    mask_id = model.spec.mask_id

    def shifted(ids: list[int]) -> Tensor:
        logits = model.logits(torch.tensor([ids]))[0].float()
        return torch.cat([logits[:1], logits[:-1]]) if model.spec.shifted else logits

    def logits_fn(ids: list[int]) -> Tensor:
        conditional = shifted(ids)
        if not cfg_scale:
            return conditional
        blank = [token if canvas[i] == mask_id else mask_id for i, token in enumerate(ids)]
        return conditional + cfg_scale * (conditional - shifted(blank))

    return logits_fn


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
    """Decode the undecided positions of ``canvas`` from ``start`` on with any sampler.

    Args:
        logits_fn: logits ``[n, V]`` for the first ``n`` ids of the canvas, see :func:`logits_of`.
        noise: Gumbel noise ``[n, V]`` for a step and a number of positions; needed at temperatures above 0.
        seed: seed of the random positions of ``FixedSteps(metric="origin")``.
    """
    if isinstance(sampler, SlowFast):
        return slowfast.decode(logits_fn, canvas, start, sampler, mask_id, eos_id, noise)
    if isinstance(sampler, (FixedSteps, Threshold)):
        return blocks.decode(logits_fn, canvas, start, sampler, mask_id, eos_id, noise, seed)
    if isinstance(sampler, Credit):
        return credit.decode(logits_fn, canvas, start, sampler, mask_id, eos_id, noise)
    if isinstance(sampler, KLASS):
        return klass.decode(logits_fn, canvas, start, sampler, mask_id, eos_id, noise)
    return parallel.decode(logits_fn, canvas, start, sampler, mask_id, eos_id, noise)
