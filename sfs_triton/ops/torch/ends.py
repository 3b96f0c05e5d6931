"""Tokens that end a text, in the choice of tokens: never drawn, less likely, or committed last."""

from __future__ import annotations

import torch

from .confidence import Draw

# Scores below all others. A confidence is a probability, and front ends return it as one.
LAST = {"confidence": 0.0, "margin": torch.finfo(torch.float32).min, "entropy": torch.finfo(torch.float32).min}


def _columns(ids: torch.Tensor, logits: torch.Tensor, vocab_start: int) -> torch.Tensor:
    """Mark the columns ``[v]`` of ``logits [T, v]``, whose ids start at ``vocab_start``, that hold ``ids [n]``."""
    here = torch.arange(vocab_start, vocab_start + logits.shape[-1], device=logits.device)
    return (here[:, None] == ids).any(-1)


def without_ends(logits: torch.Tensor, ends: torch.Tensor, vocab_start: int = 0) -> torch.Tensor:
    """Return a copy of ``logits [T, v]`` at -inf for the tokens ``ends [n]``."""
    return logits.masked_fill(_columns(ends, logits, vocab_start), float("-inf"))


def discourage(
    logits: torch.Tensor, draw: Draw, ends: torch.Tensor | None = None, vocab_start: int = 0
) -> torch.Tensor:
    """Return logits ``[T, v]`` without ``ends [n]``, with the penalty on the first of these, or as they are."""
    if draw.eos == "never":
        return without_ends(logits, ends, vocab_start)
    if draw.eos_penalty:
        return logits.float() - draw.eos_penalty * _columns(ends[:1], logits, vocab_start).float()
    return logits


def put_last(
    token: torch.Tensor, score: torch.Tensor, without: torch.Tensor, ends: torch.Tensor, metric: str
) -> torch.Tensor:
    """Return scores measured ``without`` the tokens ``ends [n]``, lowest for these; NaN where ``score`` is NaN."""
    found = torch.where((token[:, None] == ends).any(-1), LAST[metric], without)
    return torch.where(score.isnan(), score, found)
