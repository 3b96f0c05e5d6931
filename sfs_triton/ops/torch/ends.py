"""Tokens that end a text, or its thinking, in the choice of tokens: never drawn, less or more likely, or last."""

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


def raise_logits(logits: torch.Tensor, token: torch.Tensor, by: torch.Tensor, vocab_start: int = 0) -> torch.Tensor:
    """Add ``by [T]`` to the logits of ``token [T]`` in ``logits [T, v]``, whose ids start at ``vocab_start``; a token
    that they do not hold changes nothing. Return float32 ``[T, v]``; float32 logits are overwritten."""
    column = token - vocab_start
    here = (column >= 0) & (column < logits.shape[-1])
    at, by = torch.where(here, column, 0), torch.where(here, by, 0.0)
    return logits.float().scatter_add_(-1, at[:, None], by[:, None])


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
