"""Output projection with token choice, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .confidence import confidence
from .linear import dequantise
from .philox import gumbel


def _logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    rows: torch.Tensor | None,
    count: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of every listed row, in the dtype of ``hidden``, and which rows count. Reads nothing on the host."""
    n_rows = hidden.shape[0] if rows is None else rows.shape[0]
    live = torch.ones(n_rows, dtype=torch.bool, device=hidden.device)
    if count is not None:
        live = torch.arange(n_rows, device=hidden.device) < count
    if rows is not None:
        hidden = hidden[torch.where(live, rows, 0)]
    return _project(hidden, weight, scale), live


def _project(hidden: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    return F.linear(hidden, weight if scale is None else dequantise(weight, scale, hidden.dtype))


def lm_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
    temperature: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    position: torch.Tensor | None = None,
    step: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``confidence(hidden[rows] @ weight.T, ...)``: token int32 ``[R]`` and score float32 ``[R]``.

    ``hidden [N, d]``, ``weight [V, d]``, ``rows`` ``[R]`` (all if None). With ``scale`` (float32 ``[V]``) ``weight`` is
    float8 codes, and ``weight * scale[:, None]`` in the dtype of ``hidden`` takes its place. With ``count`` (int32
    ``[1]``) only that many leading rows are computed; the others have token 0 and score 0.
    """
    noise = {"temperature": temperature, "seed": seed, "position": position, "step": step}
    if rows is None and count is None:
        return confidence(_project(hidden, weight, scale), **noise)
    logits, live = _logits(hidden, weight, scale, rows, count)
    token, score = confidence(logits, **noise)
    return torch.where(live, token, 0), torch.where(live, score, 0.0)


def lm_head_partials(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    vocab_start: int = 0,
    rows: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
    temperature: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    position: torch.Tensor | None = None,
    step: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Partial results of one vocabulary shard, ids from ``vocab_start`` on, per row; for :func:`merge_partials`.

    Values float32 ``[4, R]``: largest logit ``m``, ``sum(exp(logits - m))``, the winner's key (its logit plus noise)
    and its logit; and the winner's id, int32 ``[R]``. Rows from ``count`` on hold zeros.
    """
    logits, live = _logits(hidden, weight, scale, rows, count)
    logits = logits.float()
    keys = logits
    if temperature is not None:
        ids = vocab_start + torch.arange(logits.shape[-1], device=logits.device)
        keys = logits + gumbel(seed[:, None], ids, position[:, None], step[:, None]) * temperature[:, None]
    top = logits.max(-1).values
    total = (logits - top.nan_to_num(neginf=0.0)[:, None]).exp().sum(-1)
    key, winner = torch.where(keys.isnan(), float("-inf"), keys).max(-1)
    logit = logits.gather(-1, winner[:, None])[:, 0]
    values = torch.stack((top, total, key, logit))
    return torch.where(live, values, 0.0), torch.where(live, vocab_start + winner, 0).int()


def merge_partials(values: torch.Tensor, winner: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Token int32 ``[R]`` and score float32 ``[R]`` from the partials of all shards, ``[S, 4, R]`` and ``[S, R]``."""
    tops, totals, keys, logits = values.unbind(1)
    top = tops.max(0).values
    total = (totals * (tops - top).exp()).sum(0)
    best = keys == keys.max(0).values
    token = torch.where(best, winner, torch.iinfo(torch.int32).max).min(0).values
    logit = torch.where(best & (winner == token), logits, float("-inf")).max(0).values
    return token, (logit - top).exp() / total
