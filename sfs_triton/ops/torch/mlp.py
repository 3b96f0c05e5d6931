"""The gated activation of a SwiGLU block in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` for a fused ``[..., 2 m]`` projection, gate first."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)
