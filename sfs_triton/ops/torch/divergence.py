"""Kullback-Leibler divergence between what a position predicts now and what it predicted before."""

from __future__ import annotations

import torch

SMALL = 1e-12  # added within both logarithms, as in KLASS


def divergence(logits: torch.Tensor, before: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Return ``KL(softmax(logits) || softmax(before))`` per row of ``[T, V]``, in nats, float32, at least 0.

    Where a row is not ``known [T]`` before, its probabilities were 0: the divergence is then about 27 at most. Sums are
    in float64, since thresholds may be as low as the rounding of float32.
    """
    now, then = logits.double().softmax(-1), before.double().softmax(-1) * known[:, None]
    return (now * ((now + SMALL).log() - (then + SMALL).log())).sum(-1).clamp(min=0).float()
