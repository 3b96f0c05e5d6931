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
    """Of each row of ``flag [B, n]``, the first ``capacity`` indices of set flags, then -1; and how many are kept.

    Both are int32, ``[B, capacity]`` and ``[B]``; ``out`` if given, whose room is then the capacity if None.
    """
    flags = flag != 0
    batch, n = flags.shape
    if capacity is None:
        capacity = n if out is None else out[0].shape[1]
    if out is None:
        out = flag.new_empty((batch, capacity), dtype=torch.int32), flag.new_empty(batch, dtype=torch.int32)
    slot = torch.where(flags, flags.cumsum(1) - 1, capacity).clamp(max=capacity)  # the spare one takes the rest
    rows = torch.full((batch, capacity + 1), -1, dtype=torch.int32, device=flag.device)
    rows.scatter_(1, slot, torch.arange(n, dtype=torch.int32, device=flag.device).expand(batch, n))
    out[0].copy_(rows[:, :capacity])
    out[1].copy_(flags.sum(1).clamp(max=capacity))
    return out
