"""Linear layer with float8 weights: kernel, eager torch, torch.compile, and cuBLAS with the weights in 16 bits."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from sfs_triton.kernels.linear import linear, linear_cost
from sfs_triton.models import ModelSpec
from sfs_triton.ops.torch import linear as twin

from .case import Case, geometries, random
from .harness import benchmark_of


def _build(
    device: torch.device, *, n_rows: int, n_out: int, n_in: int, residual: bool, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    weight = random(n_out, n_in, device=device, dtype=torch.float8_e4m3fn)
    scale = (1 + torch.rand(n_out, device=device)) / n_in**0.5
    plus = {"residual": random(n_rows, n_out, device=device, dtype=dtype)} if residual else {}
    return {
        "x": random(n_rows, n_in, device=device, dtype=dtype),
        "weight": weight,
        "scale": scale,
        "dense": (weight.float() * scale[:, None]).to(dtype),
        **plus,
    }


def _linear(*, dense: torch.Tensor, **arguments: torch.Tensor) -> torch.Tensor:
    return linear(**arguments)


def _twin(*, dense: torch.Tensor, **arguments: torch.Tensor) -> torch.Tensor:
    return twin.linear(**arguments)


def _cublas(*, x: torch.Tensor, dense: torch.Tensor, residual: torch.Tensor | None = None, **_) -> torch.Tensor:
    """Weights of twice the bytes."""
    return F.linear(x, dense) if residual is None else torch.addmm(residual, x, dense.T)


def _projections(geometry: ModelSpec) -> dict[str, tuple[int, int, bool]]:
    """Columns out, columns in, and whether it ends in a residual addition."""
    return {
        "qkv": (geometry.q_width + 2 * geometry.kv_width, geometry.d_model, False),
        "attn_out": (geometry.d_model, geometry.n_heads * geometry.head_dim, True),
        "gate_up": (2 * geometry.mlp, geometry.d_model, False),
        "down": (geometry.d_model, geometry.mlp, True),
    }


def cases(toy: bool = False) -> list[Case]:
    dtype = torch.float32 if toy else torch.bfloat16
    return [
        Case(
            name=f"{name}-{projection}-{n_rows}",
            kernel=_linear,
            twin=_twin,
            build=partial(_build, n_rows=n_rows, n_out=n_out, n_in=n_in, residual=residual, dtype=dtype),
            cost=linear_cost(n_rows, n_out, n_in, dtype.itemsize, residual),
            libraries={"cublas": _cublas},
        )
        for name, geometry in geometries(toy).items()
        for projection, (n_out, n_in, residual) in _projections(geometry).items()
        for n_rows in ((4,) if toy else (16, 128))
    ]


test_linear = benchmark_of(cases)
