"""Linear layer with weights in 8 bits in plain torch, and the quantisation of such weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from . import blocks
from .int8 import LARGEST, int8_linear

FORMATS = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}  # of codes; the kernels have fp8 only


@dataclass(frozen=True, slots=True)
class Quantised:
    """A matrix ``[N, K]`` in 8 bits an element: near ``codes * scale[:, None]``. Sliced by rows, without a copy."""

    codes: torch.Tensor  # [N, K], float8_e4m3fn or, on a CPU, int8
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


def quantize(weight: torch.Tensor, form: str = "fp8") -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and a float32 scale for each row of ``weight [N, K]``: it is near ``codes * scale[:, None]``.

    A row's largest magnitude becomes the largest code, 448 in float8 (e4m3) and 127 in int8; zeros only: scale 1.
    Rounding is to the nearest, ties to even, so an element is off by at most ``max(|w| / 16, scale / 1024)`` in float8
    and by ``scale / 2`` in int8. A row with NaN or infinities (in float32) has no such codes: its scale is not finite,
    and the caller checks that.

    Raises:
        ValueError: not a float matrix.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"weight is a {weight.dtype} tensor of shape {list(weight.shape)}, not a float matrix")
    wide = weight.float()
    largest = wide.abs().amax(1) if wide.shape[1] else wide.new_zeros(wide.shape[0])
    # rows close to zero: a scale that is not subnormal keeps the quotients finite
    most = LARGEST if form == "int8" else torch.finfo(FORMATS[form]).max
    scale = torch.where(largest == 0, 1.0, (largest / most).clamp(min=torch.finfo(torch.float32).tiny))
    codes = wide / scale[:, None]
    return (codes.round_() if form == "int8" else codes).to(FORMATS[form]), scale


def linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, *, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """``x @ (weight * scale[:, None])^T``, plus ``residual`` if given. Weights are converted to ``x``'s dtype first;
    of int8 weights the codes are multiplied, with ``x`` rounded to int8."""
    n_out, n_in = weight.shape
    if weight.dtype == torch.int8:
        out = int8_linear(x, weight, scale)
    elif n_out * n_in <= blocks.WEIGHTS:
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
