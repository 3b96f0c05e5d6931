"""RMSNorm in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis; reduced in float32 (or better), cast once.

    ``residual``, if given, becomes ``x + residual``, which is then normalised.
    """
    if residual is not None:
        x = residual.add_(x)
    if x.dtype == weight.dtype and x.dtype.itemsize >= 4:
        return F.rms_norm(x, weight.shape, weight, eps)
    wide = x if x.dtype == torch.float64 else x.float()
    return F.rms_norm(wide, weight.shape, weight.to(wide.dtype), eps).to(x.dtype)
