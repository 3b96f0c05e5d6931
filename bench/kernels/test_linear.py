"""Linear layers of few rows, each with what is next to it: kernel, eager torch, torch.compile, and cuBLAS alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from sfs_triton.kernels.linear import Normed, linear, linear_cost, linear_heads, linear_normed, linear_silu_mul
from sfs_triton.models import ModelSpec
from sfs_triton.ops.torch import fused_linear as twin
from sfs_triton.ops.torch.linear import Matrix, Quantised
from sfs_triton.ops.torch.rope_cache import rope_tables

from .case import Case, geometries, random
from .harness import benchmark_of

EPS = 1e-5


def _weights(n_out: int, n_in: int, form: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    if form == "plain":
        return {"weight": random(n_out, n_in, device=device, dtype=dtype) / n_in**0.5, "scale": None}
    scale = (1 + torch.rand(n_out, device=device)) / n_in**0.5
    if form == "int4":
        codes = torch.randint(0, 256, (n_out, n_in // 2), device=device, dtype=torch.uint8)
        return {"weight": codes, "scale": (scale / 4).repeat(n_in // _group(n_in), 1)}
    return {"weight": random(n_out, n_in, device=device, dtype=torch.float8_e4m3fn), "scale": scale}


def _group(n_in: int) -> int:
    return 128 if n_in % 128 == 0 else 32


def _matrix(weight: torch.Tensor, scale: torch.Tensor | None, zero: torch.Tensor | None = None) -> Matrix:
    return weight if scale is None else Quantised(weight, scale, zero)


def _input(n_rows: int, n_in: int, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Rows of a norm that is to be finished."""
    squares = (1 + torch.rand(32, n_rows, device=device)) * n_in / 32
    return {"x": random(n_rows, n_in, device=device, dtype=dtype), "squares": squares}


def _finished(x: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(squares.to(wide.dtype).sum(0) / x.shape[1] + EPS)[:, None]).to(x.dtype)


def _build_heads(
    device: torch.device, *, g: ModelSpec, n_rows: int, form: str, dtype: torch.dtype, length: int = 2176
) -> dict[str, Any]:
    n_out = g.q_width + 2 * g.kv_width
    cos, sin = rope_tables(length, g.head_dim, 500000.0, torch.device("cpu"))
    position = torch.randperm(length)[:n_rows].sort().values[None].int()
    cache = torch.zeros(2, 1, g.n_kv_heads, length, g.head_dim, device=device, dtype=dtype).transpose(2, 3)
    return {
        **_input(n_rows, g.d_model, device, dtype),
        **_weights(n_out, g.d_model, form, device, dtype),
        "bias": random(n_out, device=device, dtype=dtype) if g.qkv_bias else None,
        **{"cos": cos.to(device), "sin": sin.to(device), "position": position.to(device)},
        **{"k_cache": cache[0], "v_cache": cache[1]},
        **{"n_heads": g.n_heads, "n_kv_heads": g.n_kv_heads},
    }


def _heads(*, x, squares, weight, scale, bias, cos, sin, position, **options) -> torch.Tensor:
    x, n = Normed(x, squares, EPS), x.shape[0]
    return linear_heads(x, weight, scale, bias, cos, sin, position, n_positions=n, **options)


def _heads_twin(*, x, squares, weight, scale, bias, cos, sin, position, **options) -> torch.Tensor:
    x = _finished(x, squares)[None]
    return twin.linear_heads(x, _matrix(weight, scale), bias, cos, sin, position, **options)[0][0].flatten(1)


def _build_sum(
    device: torch.device, *, n_out: int, n_in: int, n_rows: int, form: str, dtype: torch.dtype, gain: bool = True
) -> dict[str, Any]:
    return {
        "x": random(n_rows, n_in, device=device, dtype=dtype),
        **_weights(n_out, n_in, form, device, dtype),
        **({"gain": random(n_out, device=device, dtype=dtype)} if gain else {}),
        "residual": random(n_rows, n_out, device=device, dtype=dtype),
    }


def _sum(*, x, weight, scale, residual, gain=None) -> tuple[torch.Tensor, ...]:
    if gain is None:
        return (linear(x, weight, scale, residual=residual, out=residual),)
    normed = linear_normed(x, weight, scale, gain, EPS, residual=residual)
    return residual, normed.values, normed.squares.sum(0)


def _sum_twin(*, x, weight, scale, residual, gain=None) -> tuple[torch.Tensor, ...]:
    residual += twin.product(x, _matrix(weight, scale))
    wide = residual if residual.dtype == torch.float64 else residual.float()
    return (residual,) if gain is None else (residual, residual * gain, wide.square().sum(1))


def _build_gated(device: torch.device, *, g: ModelSpec, n_rows: int, form: str, dtype: torch.dtype) -> dict[str, Any]:
    return {
        **_input(n_rows, g.d_model, device, dtype),
        **_weights(2 * g.mlp, g.d_model, form, device, dtype),
    }


def _gated(*, x, squares, weight, scale) -> torch.Tensor:
    return linear_silu_mul(Normed(x, squares, EPS), weight, scale)


def _gated_twin(*, x, squares, weight, scale) -> torch.Tensor:
    return twin.linear_silu_mul(_finished(x, squares), _matrix(weight, scale))


def _build_product(
    device: torch.device, *, n_out: int, n_in: int, n_rows: int, form: str, dtype: torch.dtype
) -> dict[str, Any]:
    weights = _weights(n_out, n_in, form, device, dtype)
    if form == "int4":
        weights["zero"] = torch.full_like(weights["scale"], 7, dtype=torch.uint8)
    return {"x": random(n_rows, n_in, device=device, dtype=dtype), **weights}


def _product_twin(*, x, **weights) -> torch.Tensor:
    return twin.product(x, _matrix(**weights))


def _cublas(*, x: torch.Tensor, weight: torch.Tensor, **_: Any) -> torch.Tensor:
    """The product alone."""
    return F.linear(x, weight)


def cases(toy: bool = False) -> list[Case]:
    dtype = torch.float32 if toy else torch.bfloat16
    found = []

    def add(name: str, kernel: Callable, other: Callable, build: Callable, n_rows: int, form: str, sizes: dict) -> None:
        n_out, n_in = sizes["n_out"], sizes["n_in"]
        width = {"fp8": 1, "int4": 0.5}.get(form, dtype.itemsize)
        group = _group(n_in) if form == "int4" else None
        ending = name.split("-")[-1]
        cost = linear_cost(n_rows, n_out, n_in, dtype.itemsize, weight_itemsize=width, group=group, ending=ending)
        build = partial(build, n_rows=n_rows, form=form, dtype=dtype)
        found.append(Case(f"{name}-{n_rows}-{form}", kernel, other, build, cost))

    for form in ("plain", "fp8", "int4"):
        for n_rows in (4,) if toy else (16, 128):
            for name, g in geometries(toy).items():
                wide, d, mlp = g.q_width + 2 * g.kv_width, g.d_model, g.mlp
                qkv, out = {"n_out": wide, "n_in": d}, {"n_out": d, "n_in": g.q_width}
                gate_up, down = {"n_out": 2 * mlp, "n_in": d}, {"n_out": d, "n_in": mlp}
                row = n_rows, form
                add(f"{name}-heads", _heads, _heads_twin, partial(_build_heads, g=g), *row, qkv)
                add(f"{name}-out-norm", _sum, _sum_twin, partial(_build_sum, **out), *row, out)
                add(f"{name}-gated", _gated, _gated_twin, partial(_build_gated, g=g), *row, gate_up)
                add(f"{name}-down-norm", _sum, _sum_twin, partial(_build_sum, **down), *row, down)
                add(f"{name}-down-sum", _sum, _sum_twin, partial(_build_sum, **down, gain=False), *row, down)
                if form != "plain":
                    build = partial(_build_product, **qkv)
                    add(f"{name}-qkv-product", linear, _product_twin, build, *row, qkv)
    return found


test_linear = benchmark_of(cases)
