"""The transformer's own operations in plain torch. Sizes: batch B, rows N, heads H, head width D, channels d."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rope_tables(length: int, head_dim: int, theta: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """``(cos, sin)`` in float32, each ``[length, head_dim]``, for the half-split rotary embedding."""
    inverse = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angle = torch.arange(length, dtype=torch.float32, device=device)[:, None] * inverse
    return torch.cat((angle.cos(), angle.cos()), -1), torch.cat((angle.sin(), angle.sin()), -1)


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate ``x [B, H, N, D]`` by tables that broadcast to it; in float32, cast once."""
    wide = x.float()
    low, high = wide.chunk(2, -1)
    return (wide * cos + torch.cat((-high, low), -1) * sin).to(x.dtype)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` for a fused ``[..., 2 mlp]`` projection."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Bidirectional attention of ``q [B, H, N, D]`` over ``k, v [B, Hkv, M, D]``; grouped-query where ``H > Hkv``."""
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
