"""Chosen token and its score from logits.

Scores are the softmax probability of the chosen token (``confidence``), the gap between the two largest probabilities
(``margin``) or the negative entropy (``entropy``). LLaDA measures on untempered logits; Dream's own samplers measure
after temperature, top-p and top-k (``tempered``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import host
from .credit import CreditRules
from .philox import gumbel_max

METRICS = ("confidence", "margin", "entropy")


@dataclass(frozen=True)
class Draw:
    """Rules for drawing a token from its logits and scoring it. The numbers are per sequence: its temperature, with
    ``noise``, and its share of the probability, with ``nucleus``. Without noise the largest wins; ties go to the lowest
    id. ``entropy``: the entropy is wanted beside the score. ``eos``, ``eos_penalty``: those of a sampler. ``credit``:
    earlier predictions raise logits. ``divergence``: that from the position's last distribution is wanted.
    ``verify``: so are the probabilities of the tokens that the block has."""

    metric: str = "confidence"
    noise: bool = False
    nucleus: bool = False
    top_k: int | None = None
    tempered: bool = False
    entropy: bool = False
    eos: str = "free"
    eos_penalty: float = 0.0
    credit: CreditRules | None = None
    divergence: bool = False
    verify: bool = False

    @property
    def by_head(self) -> bool:
        """True if the head alone gives tokens and scores, without logits in memory."""
        plain = self.metric == "confidence" and not self.tempered and not self.entropy
        return plain and self.credit is None and not (self.divergence or self.at_ends or self.filtered)

    @property
    def filtered(self) -> bool:
        """True if tokens outside the nucleus or the ``top_k`` largest are left out."""
        return self.nucleus or self.top_k is not None

    @property
    def at_ends(self) -> bool:
        """True if tokens that end a text are treated differently from others."""
        return self.eos != "free" or self.eos_penalty > 0


class Choice(NamedTuple):
    """Token ``[T]`` (int32) and score ``[T]`` (float32) per row; the entropy ``[T]`` in nats if it was asked for."""

    token: torch.Tensor
    score: torch.Tensor
    entropy: torch.Tensor | None = None


def filter_logits(logits: torch.Tensor, top_k: int | None, top_p: torch.Tensor | None) -> torch.Tensor:
    """Logits ``[T, V]`` at -inf outside the nucleus of ``top_p [T]``, and outside the ``top_k`` largest of that."""
    if top_p is not None:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        before = ordered.softmax(-1).cumsum(-1).roll(1, -1)
        before[:, 0] = 0
        drop = torch.zeros_like(before, dtype=torch.bool).scatter_(-1, order, before > top_p[:, None])
        logits = logits.masked_fill(drop, float("-inf"))
    if top_k is not None and top_k < logits.shape[-1]:
        floor = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < floor, float("-inf"))
    return logits


def confidence(
    logits: torch.Tensor,
    *,
    metric: str = "confidence",
    temperature: torch.Tensor | None = None,
    tempered: bool = False,
    seed: torch.Tensor | None = None,
    position: torch.Tensor | None = None,
    step: torch.Tensor | None = None,
    sequence_length: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ``[T]`` (int32) and score ``[T]`` (float32) for each row of ``logits [T, V]``.

    ``argmax(logits + temperature * gumbel)``, scored by ``softmax(logits)``, or ``softmax(logits / temperature)`` if
    ``tempered``, with ``temperature`` float32 ``[T]``, each above 0, or None, which is no noise and no tempering.
    ``seed``, ``position`` and ``step`` (int64 ``[T]``) key the noise and are needed with a temperature. With
    ``sequence_length`` rows are sequences of that many, and each row looks at the logits of the row before it; the
    first of a sequence at its own.

    Ties go to the lowest token id. A row with a NaN or +inf logit, or with nothing but -inf, has a NaN score.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if sequence_length is not None:
        row = torch.arange(logits.shape[0], device=logits.device)
        logits = logits[torch.where(row % sequence_length == 0, row, row - 1)]
    measured = logits if temperature is None or not tempered else logits / temperature[:, None]
    if temperature is None:
        token = _argmax(measured)
    else:
        scale = None if tempered else temperature
        _, token = gumbel_max(measured, temperature=scale, seed=seed, position=position, step=step)
    return token.int(), score_of(measured, token, metric).float()


def _argmax(logits: torch.Tensor) -> torch.Tensor:
    """Return the index ``[T]`` of the largest logit of each row, the lowest of equals; of the first NaN, if any."""
    if not host.reads_are_free(logits):
        return logits.max(-1).indices
    return torch.from_numpy(logits.detach().numpy().argmax(-1))  # vector code; torch takes seven times as long


def score_of(logits: torch.Tensor, token: torch.Tensor, metric: str) -> torch.Tensor:
    """Return the score ``[T]`` of ``token [T]`` in ``logits [T, V]``."""
    probabilities = logits.softmax(-1)
    if metric == "margin":
        top = F.pad(probabilities, (0, 1)).topk(2, dim=-1).values  # a vocabulary of one token has no second
        return top[:, 0] - top[:, 1]
    if metric == "entropy":
        return (probabilities * (probabilities + 1e-10).log()).sum(-1)
    return probabilities.gather(-1, token[:, None])[:, 0]
