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


def compact(flag: torch.Tensor, *, capacity: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The first ``capacity`` indices of set flags in flattened order, then -1; and how many are kept, ``[1]``."""
    flags = flag.flatten() != 0
    capacity = flags.numel() if capacity is None else capacity
    slot = torch.where(flags, flags.cumsum(0) - 1, capacity).clamp(max=capacity)  # the spare one takes the rest
    rows = torch.full((capacity + 1,), -1, dtype=torch.int32, device=flag.device)
    rows.scatter_(0, slot, torch.arange(flags.numel(), dtype=torch.int32, device=flag.device))
    return rows[:capacity], flags.sum(0, keepdim=True).clamp(max=capacity).int()
