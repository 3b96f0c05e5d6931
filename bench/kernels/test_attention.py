"""Attention of a step's positions over a cache: kernel, torch's SDPA and, where installed, FlashInfer."""

from __future__ import annotations

import importlib.util
from functools import partial

import torch

from sfs_triton.kernels.attention import attention, attention_cost
from sfs_triton.models import ModelSpec
from sfs_triton.ops.torch import attention as twin

from .case import Case, geometries, random
from .harness import benchmark_of


def _build(
    device: torch.device, *, geometry: ModelSpec, batch: int, n_queries: int, n_keys: int, dtype: torch.dtype
) -> dict:
    """All of a cache's keys, lengths and rows by pointer, as a step calls it."""
    g = geometry
    qkv = random(batch, n_queries, g.q_width + 2 * g.kv_width, device=device, dtype=dtype).unflatten(
        -1, (-1, g.head_dim)
    )
    cache = random(2, batch, g.n_kv_heads, n_keys, g.head_dim, device=device, dtype=dtype).transpose(2, 3)
    whole = torch.tensor([[0, n_keys, 0, 0]], dtype=torch.int32).expand(batch, 4).contiguous()
    return {
        "q": qkv[:, :, : g.n_heads],
        "k": cache[0],
        "v": cache[1],
        "cache_row": torch.arange(batch, dtype=torch.int32).to(device),
        "key_range": whole.to(device),
        "count": torch.full((batch,), n_queries, dtype=torch.int32, device=device),
    }


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: torch.Tensor) -> torch.Tensor:
    """Torch without ranges, which needs no mask: its fastest."""
    return twin.attention(q, k, v)


def _flashinfer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: torch.Tensor) -> torch.Tensor:
    from flashinfer import single_prefill_with_kv_cache

    each = [single_prefill_with_kv_cache(q[i], k[i], v[i], causal=False) for i in range(len(q))]
    return torch.stack(each) if len(each) > 1 else each[0][None]


LIBRARIES = {"sdpa": _sdpa}
if importlib.util.find_spec("flashinfer"):
    LIBRARIES["flashinfer"] = _flashinfer


def cases(toy: bool = False) -> list[Case]:
    shapes = ((2, 5, 70),) if toy else ((1, 128, 2124), (1, 16, 2124), (4, 128, 2124), (1, 256, 8192))
    dtype = torch.float32 if toy else torch.bfloat16
    rows = [(name, *shape, dtype) for name in geometries(toy) for shape in shapes]
    if not toy:  # tiles and dtypes that are left
        rows += [(name, 1, n, 2124, dtype) for name in geometries(toy) for n in (32, 64)]
        rows += [("llada-8b", 1, 128, 2124, torch.float16)]
        rows += [(name, 1, n, 2124, torch.float32) for name in ("llada-8b", "illada-8b") for n in (16, 128)]
    return [
        Case(
            name=f"{name}-{batch}x{n_queries}-{n_keys}{'' if kind == dtype else f'-{kind}'.replace('torch.', '')}",
            kernel=attention,
            twin=twin.attention,
            build=partial(_build, geometry=geometry, batch=batch, n_queries=n_queries, n_keys=n_keys, dtype=kind),
            cost=attention_cost(
                batch, n_queries, geometry.n_heads, geometry.n_kv_heads, n_keys, geometry.head_dim, kind.itemsize
            ),
            libraries=LIBRARIES,
        )
        for name, batch, n_queries, n_keys, kind in rows
        for geometry in (geometries(toy)[name],)
    ]


test_attention = benchmark_of(cases)
