"""Weights in 4 bits: groups of a row with a scale each, two weights per byte.

A group's first half is in the low four bits of its bytes, the second half in the high ones: so both are a product with
neighbouring inputs, and decoding moves nothing between threads.
"""

from __future__ import annotations

import torch

from . import blocks

ZERO = 8  # the code of zero, where groups have no zero points of their own
_FACTORS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # of the scale that reaches a group's largest magnitude
_AT_ONCE = 2**20  # weights whose scales are searched: they stay in a CPU's cache, 2.5x as fast as 2**24


def pack(values: torch.Tensor, group: int) -> torch.Tensor:
    """Pack numbers from 0 to 15, uint8 ``[N, K]``, into codes ``[N, K / 2]``."""
    n_out, n_in = values.shape
    low, high = values.reshape(n_out, n_in // group, 2, group // 2).unbind(2)
    return (low | high << 4).view(n_out, n_in // 2)


def quantize(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes ``[N, K / 2]`` and float32 scales ``[K / group, N]`` of ``weight [N, K]``, without zero points.

    Of a few scales per group, the one with the least sum of squared errors is taken. The largest reaches the group's
    largest magnitude with -8, so it has the sign of that; smaller ones cut it off. A group with NaN or infinities gets
    a scale that is not finite; one whose magnitudes are all below 1e-37 becomes zeros.
    """
    n_out, n_in = weight.shape
    codes = torch.empty(n_out, n_in // 2, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(n_in // group, n_out, dtype=torch.float32, device=weight.device)
    for rows in blocks.blocks(n_out, n_in, _AT_ONCE):
        wide = weight[rows].float().reshape(-1, n_in // group, group)
        best = _best_scale(wide)
        values = (wide / best).round_().clamp_(-ZERO, 15 - ZERO).add_(ZERO)
        codes[rows] = pack(values.to(torch.uint8).flatten(1), group)
        scale[:, rows] = best[..., 0].t()
    return codes, scale


def _best_scale(wide: torch.Tensor) -> torch.Tensor:
    """Search the scales ``[N, G, 1]`` of groups ``[N, G, group]``."""
    low, high = wide.aminmax(dim=-1, keepdim=True)
    largest = torch.where(high > -low, high, low) / -ZERO
    largest = torch.where(largest.abs() < torch.finfo(torch.float32).tiny, 1.0, largest)
    best, least = largest, None
    for factor in _FACTORS:
        scale = largest * factor
        values = (wide / scale).round_().clamp_(-ZERO, 15 - ZERO)
        error = values.mul_(scale).sub_(wide).square_().sum(-1, keepdim=True)
        if least is not None:
            better = error < least
            best, error = torch.where(better, scale, best), torch.where(better, error, least)
        least = error
    return best


def dequantise(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """``(code - zero) * scale`` of every weight, ``[N, K]``, computed in float32 or wider and rounded once.

    ``codes`` as of :func:`pack`; ``scale`` and ``zero`` (uint8; None: 8) are ``[K / group, N]``.
    """
    (n_out, width), n_groups = codes.shape, len(scale)
    packed = codes.view(n_out, n_groups, width // n_groups)
    values = torch.empty(n_out, n_groups, 2, width // n_groups, dtype=dtype, device=codes.device)
    values[:, :, 0], values[:, :, 1] = packed & 15, packed >> 4
    # differences of codes are exact in 16 bits; the product with a float32 scale is computed in float32
    values.sub_(ZERO if zero is None else zero.t()[..., None, None]).mul_(scale.t()[..., None, None])
    return values.view(n_out, 2 * width)
