"""Matrices in 4 bits multiplied out, for products of many rows: kernel, eager torch and torch.compile."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from sfs_triton.kernels.dequantise import dequantise, dequantise_cost
from sfs_triton.ops.torch import int4 as twin

from .case import Case, geometries
from .harness import benchmark_of


def _build(
    device: torch.device, *, n_out: int, n_in: int, group: int, zeros: bool, dtype: torch.dtype
) -> dict[str, Any]:
    codes = torch.randint(0, 256, (n_out, n_in // 2), device=device, dtype=torch.uint8)
    scale = 1 + torch.rand(n_in // group, n_out, device=device)
    zero = torch.full_like(scale, 7, dtype=torch.uint8) if zeros else None
    return {"codes": codes, "scale": scale, "zero": zero, "dtype": dtype}


def cases(toy: bool = False) -> list[Case]:
    dtype, group = (torch.float32, 32) if toy else (torch.bfloat16, 128)
    return [
        Case(
            name=f"{name}-gate-up{'-zeros' * zeros}",
            kernel=dequantise,
            twin=twin.dequantise,
            build=partial(_build, n_out=2 * geometry.mlp, n_in=geometry.d_model, group=group, zeros=zeros, dtype=dtype),
            cost=dequantise_cost(2 * geometry.mlp, geometry.d_model, group, dtype.itemsize),
        )
        for name, geometry in geometries(toy).items()
        for zeros in (False, True)
    ]


test_dequantise = benchmark_of(cases)
