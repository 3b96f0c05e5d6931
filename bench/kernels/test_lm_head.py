"""From hidden states to tokens: kernel, eager torch, torch.compile; one shard of four; float8 weights."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from sfs_triton.kernels.lm_head import lm_head, lm_head_cost, lm_head_partials
from sfs_triton.kernels.partials import merge_partials, merge_partials_cost
from sfs_triton.models import ModelSpec
from sfs_triton.ops.torch import lm_head as twin
from sfs_triton.ops.torch.linear import quantize

from .case import Case, geometries, random
from .harness import benchmark_of

SHARDS = 4


def _build(
    device: torch.device,
    *,
    n_rows: int,
    n_columns: int,
    n_features: int,
    dtype: torch.dtype,
    noise: bool,
    float8: bool,
) -> dict:
    """Make one logit per row dominate, as in a trained model: else bfloat16 rounding decides which token wins."""
    draw = {}
    if noise:
        draw = {name: torch.arange(n_rows, device=device) for name in ("seed", "position", "step")}
        draw["temperature"] = torch.full((n_rows,), 0.7, device=device)
    weight = random(n_columns, n_features, device=device, dtype=dtype)
    winner = torch.linspace(0, n_columns - 1, n_rows, device=device).long()
    spread = random(n_rows, n_features, device=device, dtype=torch.float32)
    hidden = weight[winner].float() * (14 / n_features) + spread / n_features**0.5
    weights = {"weight": weight}
    if float8:
        weights = dict(zip(("weight", "scale"), _quantized(weight), strict=True))
    return {
        "hidden": hidden.to(dtype),
        **weights,
        "rows": torch.arange(n_rows, device=device, dtype=torch.int32),
        "count": torch.full((1,), n_rows, device=device, dtype=torch.int32),
        **draw,
    }


def _quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if weight.is_meta:
        return weight.to(torch.float8_e4m3fn), torch.empty(weight.shape[0], device=weight.device)
    return quantize(weight)


def _build_merge(device: torch.device, *, n_rows: int) -> dict:
    values = random(SHARDS, 4, n_rows, device=device, dtype=torch.float32).abs()
    winner = torch.arange(SHARDS * n_rows, device=device, dtype=torch.int32).view(SHARDS, n_rows)
    return {"values": values, "winner": winner}


def _case(
    name: str,
    geometry: ModelSpec,
    n_rows: int,
    dtype: torch.dtype,
    noise: bool = False,
    shards: int = 1,
    float8: bool = False,
) -> Case:
    sizes = {"n_rows": n_rows, "n_columns": geometry.vocab_size // shards, "n_features": geometry.d_model}
    return Case(
        name=f"{name}-{n_rows}{'-float8' * float8}{'-noise' * noise}{'-shard' * (shards > 1)}",
        kernel=lm_head if shards == 1 else lm_head_partials,
        twin=twin.lm_head if shards == 1 else twin.lm_head_partials,
        build=partial(_build, **sizes, dtype=dtype, noise=noise, float8=float8),
        cost=lm_head_cost(**sizes, itemsize=dtype.itemsize, float8=float8),
    )


def cases(toy: bool = False) -> list[Case]:
    dtype = torch.float32 if toy else torch.bfloat16
    sizes = [(4, False), (4, True)] if toy else [(16, False), (64, False), (128, False), (64, True)]
    found = [
        _case(name, geometry, n_rows, dtype, noise)
        for name, geometry in geometries(toy).items()
        for n_rows, noise in sizes
    ]
    name, geometry = next(iter(geometries(toy).items()))
    if not toy:  # the tiles that are left
        found += [_case(name, geometry, *at) for at in ((32, dtype, False), (16, dtype, True), (32, dtype, True))]
        found += [_case(f"{name}-float16", geometry, 128, torch.float16)]
        odd = replace(geometry, d_model=4100)  # no multiple of a block
        found += [_case(f"{name}-odd", odd, n, dtype, noise) for n, noise in ((16, True), (64, True), (128, False))]
    with_codes = sizes if toy else [*sizes, (32, False), (16, True), (32, True)]
    found += [_case(name, geometry, n_rows, dtype, noise, float8=True) for n_rows, noise in with_codes]
    n_rows = sizes[1][0]
    merge = Case(
        name=f"{name}-{n_rows}-merge",
        kernel=merge_partials,
        twin=twin.merge_partials,
        build=partial(_build_merge, n_rows=n_rows),
        cost=merge_partials_cost(SHARDS, n_rows),
    )
    return [*found, _case(name, geometry, n_rows, dtype, shards=SHARDS), merge]


test_lm_head = benchmark_of(cases)
