"""Density of decided positions, by which a prior of certainty weighs scores."""

from __future__ import annotations

import math

import torch

REACH = 8  # of the bell curve, in units of its width: what lies beyond is near the rounding of float64


def density(state, sigma: float) -> torch.Tensor:
    """Return the part of a bell curve of width ``sigma`` around each position that lies over decided ones.

    float64 ``[B, L]``, so that hardly any order of summation changes a score after it is rounded to float32. Positions
    before the canvas count as decided, and all after a sequence's end if its last position is.
    """
    reach = math.ceil(REACH * sigma)
    decided = ~state.masked
    last = decided.gather(1, (state.end - 1).clamp(min=0)[:, None])  # a free slot has no end
    decided = torch.where(state.position < state.end[:, None], decided, last)
    around = torch.cat((torch.ones_like(last).expand(-1, reach), decided, last.expand(-1, reach)), 1).double()
    distance = torch.arange(-reach, reach + 1, device=around.device, dtype=torch.float64)
    weight = (-0.5 * (distance / sigma).square()).exp()
    return torch.nn.functional.conv1d(around[:, None], (weight / weight.sum())[None, None])[:, 0]
