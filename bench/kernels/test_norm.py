"""RMSNorm, alone and fused with the residual addition: kernel, eager torch and torch.compile."""

from __future__ import annotations

from functools import partial

import torch

from sfs_triton.kernels.norm import rms_norm, rms_norm_cost
from sfs_triton.ops.torch import norm as twin

from .case import Case, geometries, random
from .harness import benchmark_of


def _build(device: torch.device, *, n_rows: int, n_columns: int, residual: bool, dtype: torch.dtype) -> dict:
    make = partial(random, device=device, dtype=dtype)
    plus = {"residual": make(n_rows, n_columns)} if residual else {}
    return {"x": make(n_rows, n_columns), "weight": make(n_columns), "eps": 1e-5, **plus}


def cases(toy: bool = False) -> list[Case]:
    rows = (4,) if toy else (1, 128, 2124)
    dtype = torch.float32 if toy else torch.bfloat16
    return [
        Case(
            name=f"{name}-{n_rows}{'-residual' if residual else ''}",
            kernel=rms_norm,
            twin=twin.rms_norm,
            build=partial(_build, n_rows=n_rows, n_columns=geometry.d_model, residual=residual, dtype=dtype),
            cost=rms_norm_cost(n_rows, geometry.d_model, dtype.itemsize, residual),
        )
        for name, geometry in geometries(toy).items()
        for n_rows in rows
        for residual in (False, True)
    ]


test_norm = benchmark_of(cases)
