"""Rotary embedding fused with the cache's update: kernel, eager torch and torch.compile."""

from __future__ import annotations

from functools import partial

import torch

from sfs_triton.kernels.rope_cache import rope_cache, rope_cache_cost
from sfs_triton.models import ModelSpec
from sfs_triton.ops.torch.rope_cache import rope_cache as twin
from sfs_triton.ops.torch.rope_cache import rope_tables

from .case import Case, geometries, random
from .harness import benchmark_of


def _build(device: torch.device, *, geometry: ModelSpec, n_rows: int, dtype: torch.dtype) -> dict:
    """Views of one fused projection, a store with heads outside positions, scattered positions."""
    g, length = geometry, max(2124, n_rows)
    qkv = random(1, n_rows, g.q_width + 2 * g.kv_width, device=device, dtype=dtype).unflatten(-1, (-1, g.head_dim))
    q, k, v = qkv.split((g.n_heads, g.n_kv_heads, g.n_kv_heads), 2)
    cache = torch.zeros(2, 1, g.n_kv_heads, length, g.head_dim, device=device, dtype=dtype).transpose(2, 3)
    cos, sin = rope_tables(length, g.head_dim, 500000.0, torch.device("cpu"))
    position = torch.randperm(length)[:n_rows].sort().values[None]
    return {
        **{"q": q, "k": k, "v": v, "cos": cos.to(device), "sin": sin.to(device), "position": position.to(device)},
        **{"k_cache": cache[0], "v_cache": cache[1], "cache_row": torch.zeros(1, dtype=torch.int32, device=device)},
    }


def cases(toy: bool = False) -> list[Case]:
    rows = (4,) if toy else (1, 128, 2124)
    dtype = torch.float32 if toy else torch.bfloat16
    return [
        Case(
            name=f"{name}-{n_rows}",
            kernel=rope_cache,
            twin=twin,
            build=partial(_build, geometry=geometry, n_rows=n_rows, dtype=dtype),
            cost=rope_cache_cost(n_rows, geometry.n_heads, geometry.n_kv_heads, geometry.head_dim, dtype.itemsize),
        )
        for name, geometry in geometries(toy).items()
        for n_rows in rows
    ]


test_rope_cache = benchmark_of(cases)
