"""Boost of the end of thinking (iLLaDA): one logit per canvas is raised until its response holds a token sequence."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .state import DecodeState


class EndOfThink(NamedTuple):
    """Token sequence that ends the thinking, and how much its next token is raised; ``response [B, 2]`` is the first
    position and the length of each response, as long as it may become."""

    ids: torch.Tensor  # int64 [n]
    response: torch.Tensor  # int64 [B, 2]
    boost: float
    power: float


class Raised(NamedTuple):
    """Position ``[B]`` whose logit is raised, its token ``[B]`` (int64), and by how much ``[B]`` (float32)."""

    position: torch.Tensor
    token: torch.Tensor
    amount: torch.Tensor


def end_of_think(state: DecodeState, rule: EndOfThink) -> Raised:
    """Compute what the next step raises in each canvas: at the leftmost undecided position of its block, the token that
    continues the longest part of the sequence directly before it; by 0 once the response holds the whole sequence."""
    ids, n, length = rule.ids, len(rule.ids), state.tokens.shape[1]
    first, total = rule.response.unbind(1)
    here = (state.position >= first[:, None]) & (state.position < state.end[:, None])
    # column p + n is position p; -1, which is no token, stands outside the response
    tokens = F.pad(torch.where(here, state.tokens, -1), (n, 0), value=-1)
    whole = (tokens.unfold(1, n, 1) == ids).all(-1).any(-1)
    undecided = state.masked & (state.position >= state.block_start[:, None])
    position = torch.where(undecided, state.position, length).amin(1)
    count = torch.arange(n, device=ids.device)
    before = tokens.gather(1, position[:, None] + count)  # the n tokens directly before it
    at = count + count[:, None] - n  # [n, n]: their places in ``ids`` if the last 0, 1 .. n - 1 start the sequence
    found = ((before[:, None] == ids[at.clamp(min=0)]) | (at < 0)).all(-1)
    share = (position - first + 1).double() / total
    amount = torch.where(whole, 0.0, rule.boost * share**rule.power)
    return Raised(position, ids[torch.where(found, count, 0).amax(1)], amount.float())
