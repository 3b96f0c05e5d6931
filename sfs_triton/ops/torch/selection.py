"""Selection rules of the block machine: which candidates a step commits beside the best ones.

Each takes a state, its candidates' scores ``[B, L]`` (-inf elsewhere) and the rules, and returns a mask ``[B, L]``.
"""

from __future__ import annotations

import torch

from ...kernels.rules import BlockRules


def over(scores: torch.Tensor, tau: torch.Tensor, rules: BlockRules) -> torch.Tensor:
    """Mark the positions that reach ``tau [B]``, or exceed it where the rules are strict."""
    return scores > tau[:, None] if rules.strict else scores >= tau[:, None]


def near_anchors(state, scores: torch.Tensor, lowest: torch.Tensor, rules: BlockRules) -> torch.Tensor:
    """Mark the positions that reach ``tau_low`` within ``radius`` of an anchor.

    An anchor is a candidate that reaches ``tau`` and ``lowest [B]``.
    """
    anchor = state.candidate & (scores >= state.tau[:, None]) & (scores >= lowest[:, None])
    before = torch.nn.functional.pad(anchor.cumsum(1), (1, 0))  # [B, L + 1]: anchors below each position
    place, length = state.position, scores.shape[1]
    stop = (place + rules.radius + 1).clamp(max=length)
    start = (place - rules.radius).clamp(min=0)
    return (before[:, stop] > before[:, start]) & (scores >= state.tau_low[:, None])


def within_bound(state, scores: torch.Tensor) -> torch.Tensor:
    """Mark the best positions as long as the entropies before them sum to at most ``bound``."""
    entropy = torch.where(state.candidate, state.entropy, 0.0).double()  # sums that hardly depend on their order
    order = scores.argsort(dim=1, descending=True, stable=True)
    ordered = entropy.gather(1, order)
    before = ordered.cumsum(1) - ordered
    return torch.zeros_like(state.candidate).scatter_(1, order, before <= state.bound[:, None].double())


def best_of_runs(state, scores: torch.Tensor) -> torch.Tensor:
    """Mark the best position of each run of undecided positions, the lowest of equals, if it is over ``tau_low``."""
    run = (~state.masked).cumsum(1)  # equal along a run; the decided position before it is no candidate
    size = scores.shape[1] + 1
    top = scores.new_full((len(scores), size), float("-inf")).scatter_reduce(1, run, scores, "amax")
    is_top = state.candidate & (scores == top.gather(1, run))
    lowest = torch.where(is_top, state.position, state.length)
    first = run.new_full((len(scores), size), state.length).scatter_reduce(1, run, lowest, "amin")
    return is_top & (state.position == first.gather(1, run)) & (scores > state.tau_low[:, None])


def best_of_first_block(state, scores: torch.Tensor, filled: torch.Tensor, rules: BlockRules) -> torch.Tensor:
    """Mark the best position of the leftmost block with candidates, if ``filled`` has none of them."""
    candidate = state.candidate
    first = torch.where(candidate, state.position, state.length).amin(1)
    block = (first - state.start) // rules.block_length
    own = candidate & ((state.position - state.start[:, None]) // rules.block_length == block[:, None])
    best = scores.masked_fill(~own, float("-inf")).argmax(1, keepdim=True)
    return own & (state.position == best) & ~(filled & own).any(1, keepdim=True)
