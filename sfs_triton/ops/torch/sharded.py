"""Choice of tokens where each rank has logits of a part of the vocabulary: partial results, their exchange and merge.

Scores are those of :func:`~sfs_triton.ops.torch.confidence.confidence`, from a few numbers per row of each rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .confidence import Draw
from .lm_head import merge_partials
from .philox import gumbel_max


def measured(logits: torch.Tensor, draw: Draw, temperature: torch.Tensor | None = None) -> torch.Tensor:
    """Logits ``[R, v]`` as they are scored, float32."""
    logits = logits.float()
    return logits / temperature[:, None] if draw.tempered and draw.noise else logits


def partials(
    logits: torch.Tensor,
    draw: Draw,
    *,
    vocab_start: int,
    temperature: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    position: torch.Tensor | None = None,
    step: torch.Tensor | None = None,
) -> torch.Tensor:
    """Partial results of a part of the vocabulary, ids from ``vocab_start`` on, per row: float32 ``[6, R]``.

    ``logits [R, v]`` are as scored. Largest logit, ``sum(exp(logits - largest))``, the winner's key (its logit plus
    noise), its logit, its id (int32, bit by bit), and the second largest logit, -inf of a single id.
    """
    top, second = F.pad(logits, (0, 1), value=float("-inf")).topk(2, dim=-1).values.unbind(-1)
    total = (logits - top.nan_to_num(neginf=0.0)[:, None]).exp().sum(-1)
    if draw.noise:
        scale, keys = None if draw.tempered else temperature, {"seed": seed, "position": position, "step": step}
        key, winner = gumbel_max(logits, temperature=scale, vocab_start=vocab_start, skip_nan=True, **keys)
    else:
        key, winner = torch.where(logits.isnan(), float("-inf"), logits).max(-1)
    logit = logits.gather(-1, winner[:, None])[:, 0]
    return pack(torch.stack((top, total, key, logit)), (vocab_start + winner).int(), second[None])


def pack(values: torch.Tensor, winner: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
    """Values float32 ``[4, R]`` and ids int32 ``[R]`` as one float32 tensor, the ids bit by bit."""
    return torch.cat((values, winner.view(torch.float32)[None], *more))


def unpack(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values ``[S, 4, R]`` and ids ``[S, R]``, dense, of what all ranks have packed, ``[S, 5 or more, R]``."""
    return packed[:, :4].contiguous(), packed[:, 4].contiguous().view(torch.int32)


def merge(packed: torch.Tensor, metric: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token int32 ``[R]`` and score float32 ``[R]`` from the :func:`partials` of all ranks, ``[S, 6, R]``.

    For ``metric="entropy"`` the score is the softmax's denominator instead, as ``log(sum(exp(logits)))``.
    """
    values, winner = unpack(packed)
    token, score = merge_partials(values, winner)
    tops, totals = values[:, 0], values[:, 1]
    top = tops.max(0).values
    total = (totals * (tops - top).exp()).sum(0)
    if metric == "margin":
        first, second = torch.cat((tops, packed[:, 5])).topk(2, dim=0).values
        score = ((first - top).exp() - (second - top).exp()) / total
    if metric == "entropy":
        score = top + total.log()
    return token, score


def entropy(logits: torch.Tensor, log_total: torch.Tensor) -> torch.Tensor:
    """Return a rank's part of the negative entropy, ``[R]``, from ``log(sum(exp(logits)))`` of whole rows."""
    probabilities = (logits - log_total[:, None]).exp()
    return (probabilities * (probabilities + 1e-10).log()).sum(-1)
