"""Choices of listed rows put at their positions of the canvas, in plain torch without a read by the host."""

from __future__ import annotations

import torch


def scatter_choices(
    state,
    token: torch.Tensor,
    score: torch.Tensor,
    target: torch.Tensor,
    *,
    which: torch.Tensor | None = None,
    row: torch.Tensor | None = None,
    scores: torch.Tensor | None = None,
) -> None:
    """``state.token[row, position] = token`` and ``state.score[row, position] = score``, and nothing else.

    ``target`` int32 ``[b, T]`` is the position that each slot of a list predicts, -1 where none. Entry ``r`` of
    ``token`` int32 ``[R]`` and ``score`` float32 ``[R]`` belongs to slot ``r`` of the flattened list, or to
    ``which[r]``, int32 ``[R]``, -1 where to none. ``row [b]``: the canvas row of each batch row; None is ``0..b-1``.

    ``scores`` takes the scores instead of ``state.choice_score``. Entries that belong nowhere go to the spare place
    behind the canvas there and in ``state.choice_token``.
    """
    spare = state.choice_token.numel() - 1
    at = target.long()
    if row is not None or target.shape[0] > 1:
        row = torch.arange(target.shape[0], device=target.device) if row is None else row.long()
        at = row[:, None] * state.length + target
    at = torch.where(target >= 0, at, spare).flatten()
    if which is not None:
        at = torch.where(which >= 0, at[which.clamp(min=0)], spare)
    state.choice_token.index_copy_(0, at, token.long())
    (state.choice_score if scores is None else scores).index_copy_(0, at, score)
