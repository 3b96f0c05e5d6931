"""Linear layer with float8 weights in plain torch, and the quantisation of such weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from . import blocks

_LARGEST = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True, slots=True)
class Quantised:
    """A matrix ``[N, K]`` in 8 bits an element: near ``codes * scale[:, None]``. Sliced by rows, without a copy."""

    codes: torch.Tensor  # [N, K], float8_e4m3fn
    scale: torch.Tensor  # [N], float32

    def __getitem__(self, rows: slice) -> Quantised:
        return Quantised(self.codes[rows], self.scale[rows])

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes


Matrix = torch.Tensor | Quantised


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float8 e4m3 codes and a float32 scale for each row of ``weight [N, K]``: it is near ``codes * scale[:, None]``.

    A row's largest magnitude becomes 448, the largest code; zeros only: scale 1. Rounding is to the nearest, ties to
    even, so an element is off by at most ``max(|w| / 16, scale / 1024)``. A row with NaN or infinities (in float32) has
    no such codes: its scale is not finite, and the caller checks that.

    Raises:
        ValueError: not a float matrix.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"weight is a {weight.dtype} tensor of shape {list(weight.shape)}, not a float matrix")
    wide = weight.float()
    largest = wide.abs().amax(1) if wide.shape[1] else wide.new_zeros(wide.shape[0])
    # rows close to zero: a scale that is not subnormal keeps the quotients finite
    scale = torch.where(largest == 0, 1.0, (largest / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny))
    return (wide / scale[:, None]).to(torch.float8_e4m3fn), scale


def linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, *, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """``x @ (weight * scale[:, None])^T``, plus ``residual`` if given. Weights are converted to ``x``'s dtype first."""
    n_out, n_in = weight.shape
    if n_out * n_in <= blocks.WEIGHTS:
        out = F.linear(x, dequantise(weight, scale, x.dtype))
    else:
        out = x.new_empty(*x.shape[:-1], n_out)
        for rows in blocks.blocks(n_out, n_in, blocks.WEIGHTS):
            out[..., rows] = F.linear(x, dequantise(weight[rows], scale[rows], x.dtype))
    return out if residual is None else out + residual


def dequantise(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``codes * scale[:, None]``, computed in float32 or wider and rounded to ``dtype`` once."""
    # every code is exact in 16 bits; the product with a float32 scale is computed in float32 wherever it is stored
    return codes.to(dtype).mul_(scale[:, None])
