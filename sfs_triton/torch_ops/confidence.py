"""From logits to a chosen token and its score.

Scores are the softmax probability of the chosen token (``confidence``), the gap between the two largest probabilities
(``margin``) or the negative entropy (``entropy``). LLaDA measures on untempered logits; Dream's own samplers measure
after temperature, top-p and top-k (``tempered``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .philox import gumbel

METRICS = ("confidence", "margin", "entropy")


@dataclass(frozen=True)
class Draw:
    """How a token is drawn from its logits. Temperature 0 takes the largest; ties go to the lowest id."""

    metric: str = "confidence"
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    tempered: bool = False


def filter_logits(logits: torch.Tensor, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """Logits ``[T, V]`` with everything outside the ``top_p`` nucleus, then the ``top_k`` largest of it, at -inf."""
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        before = ordered.softmax(-1).cumsum(-1).roll(1, -1)
        before[:, 0] = 0
        drop = torch.zeros_like(before, dtype=torch.bool).scatter_(-1, order, before > top_p)
        logits = logits.masked_fill(drop, float("-inf"))
    if top_k is not None and top_k < logits.shape[-1]:
        floor = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < floor, float("-inf"))
    return logits


def _score(logits: torch.Tensor, token: torch.Tensor, metric: str) -> torch.Tensor:
    probabilities = logits.softmax(-1)
    if metric == "margin":
        top = probabilities.topk(2, dim=-1).values
        return top[:, 0] - top[:, 1]
    if metric == "entropy":
        return (probabilities * (probabilities + 1e-10).log()).sum(-1)
    return probabilities.gather(-1, token[:, None])[:, 0]


def confidence(
    logits: torch.Tensor,
    draw: Draw,
    seed: torch.Tensor | None = None,
    position: torch.Tensor | None = None,
    step: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ``[T]`` (int64) and score ``[T]`` (float32) for each row of ``logits [T, V]``, which may be overwritten.

    ``seed``, ``position`` and ``step`` (int64 ``[T]``) key the noise and are needed when the temperature is positive.
    A row with a NaN or +inf logit, or with nothing but -inf, has a NaN score.
    """
    logits = logits.float()
    filtered = draw.tempered and (draw.top_k is not None or draw.top_p is not None)
    if draw.temperature == 0 and draw.metric == "confidence" and not filtered:
        largest, token = logits.max(-1, keepdim=True)
        return token[:, 0], logits.sub_(largest).exp_().sum(-1).reciprocal_()
    drawn = logits
    if draw.tempered and draw.temperature > 0:
        drawn = logits / draw.temperature
    if draw.top_k is not None or draw.top_p is not None:
        drawn = filter_logits(drawn, draw.top_k, draw.top_p)
    if draw.temperature > 0:
        noise = gumbel(
            seed[:, None], torch.arange(logits.shape[-1], device=logits.device), position[:, None], step[:, None]
        )
        token = (drawn + noise * (1.0 if draw.tempered else draw.temperature)).argmax(-1)
    else:
        token = drawn.argmax(-1)
    return token, _score(drawn if draw.tempered else logits, token, draw.metric)
