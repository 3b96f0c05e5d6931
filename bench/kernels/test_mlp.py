"""The gated activation: kernel, eager torch and torch.compile."""

from __future__ import annotations

from functools import partial

import torch

from sfs_triton.kernels.mlp import silu_mul, silu_mul_cost
from sfs_triton.ops.torch import mlp as twin

from .case import Case, geometries, random
from .harness import benchmark_of


def _build(device: torch.device, *, n_rows: int, n_columns: int, dtype: torch.dtype) -> dict:
    return {"gate_up": random(n_rows, 2 * n_columns, device=device, dtype=dtype)}


def cases(toy: bool = False) -> list[Case]:
    rows = (4,) if toy else (1, 128, 2124)
    dtype = torch.float32 if toy else torch.bfloat16
    return [
        Case(
            name=f"{name}-{n_rows}",
            kernel=silu_mul,
            twin=twin.silu_mul,
            build=partial(_build, n_rows=n_rows, n_columns=geometry.mlp, dtype=dtype),
            cost=silu_mul_cost(n_rows, geometry.mlp, dtype.itemsize),
        )
        for name, geometry in geometries(toy).items()
        for n_rows in rows
    ]


test_mlp = benchmark_of(cases)
