"""Oracle of the head: a chosen token and its score from logits, as published.

``docs/architecture.md``, "Confidence": the score of a position is the softmax probability of the token chosen there,
from untempered logits; ties go to the lowest token id; noise is added as Gumbel-max. Dream's own samplers score
after temperature, top-k and top-p (``tempered``), and support as scores the gap between the two largest probabilities
(``margin``) and the negative entropy (``entropy``).

An end-of-text can be treated differently (LLaDA's options): its logit is minus infinity or has a penalty subtracted,
before anything else; or it scores lowest where it was chosen, and is left out of the logits that other scores are of.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LOWEST = {"confidence": 0.0, "margin": torch.finfo(torch.float32).min, "entropy": torch.finfo(torch.float32).min}


class Ends(NamedTuple):
    """End-of-text tokens, and what a sampler's ``eos`` and ``eos_penalty`` say of them."""

    ids: tuple[int, ...] = ()
    eos: str = "free"
    penalty: float = 0.0


FREE = Ends()


class Look(NamedTuple):
    """The token chosen at each position, and its score."""

    tokens: list[int]
    scores: list[float]


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Return ``logits [V]`` with values below the ``k``-th largest set to minus infinity."""
    smallest_kept = sorted(logits.tolist(), reverse=True)[:k][-1]
    return torch.where(logits >= smallest_kept, logits, float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Remove the tokens of ``logits [V]`` preceded, in order of probability, by more than ``p`` of the mass.

    The most likely token is always kept. Equal probabilities are ordered by token id.
    """
    probability = logits.softmax(-1).tolist()
    kept = torch.full_like(logits, float("-inf"))
    mass_before = 0.0
    for token in sorted(range(len(probability)), key=lambda token: (-probability[token], token)):
        if mass_before <= p:
            kept[token] = logits[token]
        mass_before += probability[token]
    return kept


def score(logits: Tensor, token: int, metric: str) -> float:
    """Return the score of ``token`` in ``logits [V]`` by the metric confidence, margin or entropy."""
    probability = logits.softmax(-1)
    if metric == "confidence":
        return probability[token].item()
    if metric == "margin":
        first, second = sorted(probability.tolist(), reverse=True)[:2]
        return first - second
    if metric == "entropy":  # Dream's sampler adds 1e-10 before the logarithm
        return (probability * torch.log(probability + 1e-10)).sum().item()
    raise ValueError(f"metric={metric!r}")


def look(
    logits: Tensor,
    metric: str = "confidence",
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    tempered: bool = False,
    noise: Tensor | None = None,
    ends: Ends = FREE,
    lowest: bool = True,
) -> Look:
    """Choose and score a token for each row of ``logits [n, V]``; ``noise [n, V]`` is standard Gumbel noise.

    Adding ``temperature`` times Gumbel noise to the logits and taking the largest draws from
    ``softmax(logits / temperature)``; so does adding it unscaled to logits that have been divided already. Without
    ``lowest`` ends to be put last are scored by the other logits.
    """
    chosen = Look([], [])
    out = torch.tensor([token in ends.ids for token in range(logits.shape[1])])
    for index, row in enumerate(logits.float().clone()):
        if ends.eos == "never":
            row[out] = float("-inf")
        elif ends.ids:
            row[ends.ids[0]] -= ends.penalty
        drawn = row / temperature if tempered and temperature > 0 else row
        if top_p is not None and top_p < 1:  # top-p first, as in Dream's sampler
            drawn = keep_top_p(drawn, top_p)
        if top_k is not None:
            drawn = keep_top_k(drawn, top_k)
        noisy = drawn
        if temperature > 0:
            noisy = drawn + noise[index] * (1.0 if tempered else temperature)
        token = int(noisy.argmax())
        chosen.tokens.append(token)
        measured = drawn if tempered else row
        if ends.eos == "last":
            measured = torch.where(out, float("-inf"), measured)
        last = lowest and ends.eos == "last" and out[token]
        chosen.scores.append(LOWEST[metric] if last else score(measured, token, metric))
    return chosen
