"""Output projection with token choice, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import blocks
from .confidence import confidence
from .linear import linear
from .philox import gumbel_max


def _listed(
    hidden: torch.Tensor, rows: torch.Tensor | None, count: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the listed rows of ``hidden``, and which of them count. Reads nothing on the host."""
    n_rows = hidden.shape[0] if rows is None else rows.shape[0]
    live = torch.ones(n_rows, dtype=torch.bool, device=hidden.device)
    if count is not None:
        live = torch.arange(n_rows, device=hidden.device) < count
    return (hidden if rows is None else hidden[torch.where(live, rows, 0)]), live


def _project(hidden: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    return F.linear(hidden, weight) if scale is None else linear(hidden, weight, scale)


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
    codes in 8 bits, as :func:`~sfs_triton.ops.torch.linear.linear` multiplies them. With ``count`` (int32
    ``[1]``) only that many leading rows are computed; the others have token 0 and score 0.
    """
    noise = {"temperature": temperature, "seed": seed, "position": position, "step": step}
    everything = rows is None and count is None
    if not everything:
        hidden, live = _listed(hidden, rows, count)

    def choose(at: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return confidence(_project(hidden[at], weight, scale), **blocks.rows_of(noise, at))

    token, score = blocks.by_rows(choose, hidden.shape[0], weight.shape[0], blocks.LOGITS)
    return (token, score) if everything else (torch.where(live, token, 0), torch.where(live, score, 0.0))


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
    noise = {"temperature": temperature, "seed": seed, "position": position, "step": step}
    hidden, live = _listed(hidden, rows, count)

    def summarise(at: slice) -> tuple[torch.Tensor, torch.Tensor]:
        logits = _project(hidden[at], weight, scale).float()
        top = logits.max(-1).values
        total = (logits - top.nan_to_num(neginf=0.0)[:, None]).exp_().sum(-1)
        if temperature is None:
            key, winner = torch.where(logits.isnan(), float("-inf"), logits).max(-1)
        else:
            key, winner = gumbel_max(logits, vocab_start=vocab_start, skip_nan=True, **blocks.rows_of(noise, at))
        logit = logits.gather(-1, winner[:, None])[:, 0]
        return torch.stack((top, total, key, logit)), vocab_start + winner

    values, winner = blocks.by_rows(summarise, hidden.shape[0], weight.shape[0], blocks.LOGITS)
    return torch.where(live, values, 0.0), torch.where(live, winner, 0).int()


def merge_partials(values: torch.Tensor, winner: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Token int32 ``[R]`` and score float32 ``[R]`` from the partials of all shards, ``[S, 4, R]`` and ``[S, R]``."""
    tops, totals, keys, logits = values.unbind(1)
    top = tops.max(0).values
    total = (totals * (tops - top).exp()).sum(0)
    best = keys == keys.max(0).values
    token = torch.where(best, winner, torch.iinfo(torch.int32).max).min(0).values
    logit = torch.where(best & (winner == token), logits, float("-inf")).max(0).values
    return token, (logit - top).exp() / total
