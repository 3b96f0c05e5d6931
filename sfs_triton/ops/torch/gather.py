"""Embedding rows for a scope, and the row list of set flags, in plain torch without a read by the host."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def embedding(table: torch.Tensor, tokens: torch.Tensor, position: torch.Tensor | None = None) -> torch.Tensor:
    """``table[tokens]`` for ``tokens [B, L]``, or of the tokens at ``position [B, n]``; zeros where that is -1."""
    if position is None:
        return F.embedding(tokens, table)
    idle = position < 0
    x = F.embedding(tokens.gather(1, position.clamp(min=0).long()), table)
    return x.masked_fill_(idle[..., None], 0)


def compact(
    flag: torch.Tensor, *, capacity: int | None = None, out: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """List the first ``capacity`` indices of set flags per row of ``flag [B, n]``, then -1; and count them.

    Both are int32, ``[B, capacity]`` and ``[B]``; ``out`` if given, whose room is then the capacity if None.
    """
    batch, n = flag.shape
    if capacity is None:
        capacity = n if out is None else out[0].shape[1]
    flags = flag if flag.dtype == torch.bool else flag != 0
    number = flags.cumsum(1)  # of each set flag, from 1 on
    slot = torch.where(flags, number, capacity + 1).clamp_(max=capacity + 1)  # a spare one takes the rest
    rows = torch.full((batch, capacity + 2), -1, dtype=torch.int32, device=flag.device)
    rows.scatter_(1, slot, torch.arange(n, dtype=torch.int32, device=flag.device).expand(batch, n))
    count = flags.sum(1, dtype=torch.int32).clamp_(max=capacity)
    if out is None:
        return rows[:, 1:-1].contiguous(), count
    out[0].copy_(rows[:, 1:-1])
    out[1].copy_(count)
    return out
