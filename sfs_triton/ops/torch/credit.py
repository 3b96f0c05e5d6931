"""Credit of tokens: earlier predictions of a position raise the logits of what they predicted (CreditDecoding).

A step predicts one token per position, so credit is a short list of tokens per position and no row of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class CreditRules:
    """``weight * ln(credit + 1)`` is added to a token's logit. Per step credit is multiplied by ``decay``, and the most
    likely token gains its probability to the power of ``power``."""

    weight: float
    decay: float
    power: float


class Credits(NamedTuple):
    """Tokens with credit, by place: ids int32 ``[P, K]``, -1 unused, and their credit float32 ``[P, K]``."""

    token: torch.Tensor
    amount: torch.Tensor

    def add(self, place: torch.Tensor, token: torch.Tensor, gain: torch.Tensor, decay: float) -> Credits:
        """Fade the credit at ``place [R]`` and add ``gain [R]`` to that of ``token [R]``; return it by row, ``[R, K]``.

        A token that is new there takes the first unused entry. ``K`` is at least the number of steps that look at a
        place, so there is one.
        """
        ids, amount = self.token[place], self.amount[place] * decay
        own = ids == token[:, None]
        unused = (ids < 0) & ~own.any(1, keepdim=True)
        own |= unused & (unused.cumsum(1) == 1)
        ids = torch.where(own, token[:, None], ids)
        amount = torch.where(own, amount + gain[:, None], amount)
        self.token.index_copy_(0, place, ids)
        self.amount.index_copy_(0, place, amount)
        return Credits(ids, amount)

    def raise_logits(self, logits: torch.Tensor, weight: float, vocab_start: int = 0) -> torch.Tensor:
        """Return float32 logits ``[R, v]``, of ids from ``vocab_start`` on, with the credit of the same rows added."""
        at = self.token - vocab_start
        here = (self.token >= 0) & (at >= 0) & (at < logits.shape[-1])
        more = torch.where(here, weight * (self.amount + 1).log(), 0.0)
        return logits.float().scatter_add(-1, torch.where(here, at, 0).long(), more)
