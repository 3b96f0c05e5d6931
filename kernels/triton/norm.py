"""RMSNorm, alone and with the residual addition before it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from .check import FLOATS, check_tensor, checked_once, refuse_unless
from .cost import Cost
from .launch import cdiv, launch, multiprocessors


@triton.jit(do_not_specialize=["n_rows", "eps"])
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    n_rows,
    n_columns,
    stride_x_row,
    stride_residual_row,
    stride_out_row,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    columns = tl.arange(0, BLOCK_N)[None, :]
    live = row < n_rows
    candidate = live & (columns < n_columns)
    x = tl.load(x_ptr + row * stride_x_row + columns, mask=candidate, other=0.0)
    if HAS_RESIDUAL:
        at = residual_ptr + row * stride_residual_row + columns
        # the sum is rounded to the residual's dtype before it is normalised, as an unfused addition would be
        x = (x.to(tl.float32) + tl.load(at, mask=candidate, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(at, x, mask=candidate)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=1, keep_dims=True) / n_columns + eps)
    weight = tl.load(weight_ptr + columns, mask=columns < n_columns, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * stride_out_row + columns, (wide * scale * weight).to(x.dtype), mask=candidate)


@dataclass(frozen=True)
class NormConfig:
    BLOCK_M: int
    BLOCK_N: int
    num_warps: int


@lru_cache(1024)
def norm_config(n_rows: int, n_columns: int, n_multiprocessors: int) -> NormConfig:
    """Rows are held in registers, 16 values per thread up to 8,192 columns; short ones share a program of 2,048.

    Where there is one processor, programs are as large as Triton has them.
    """
    block = triton.next_power_of_2(n_columns)
    values = 2048 if n_multiprocessors > 1 else 2**20
    rows = max(1, min(values // block, triton.next_power_of_2(n_rows)))
    return NormConfig(BLOCK_M=rows, BLOCK_N=block, num_warps=min(16, max(1, rows * block // 512)))


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    config: NormConfig | None = None,
) -> torch.Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis, reduced in float32 and cast once.

    Args:
        x: ``[..., d]``, float32, float16 or bfloat16.
        weight: ``[d]`` in a float dtype.
        residual: like ``x``; becomes ``x + residual`` (in its dtype), and that sum is normalised.
        out: like ``x``, dense; allocated if None. May be ``x``.

    NaN and infinities go where the equation takes them, and stay in their row.
    """
    _check(x, weight, residual, out)
    n_columns = x.shape[-1]
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = x if x.dim() == 2 else x.reshape(-1, n_columns)
    n_rows = rows.shape[0]
    if n_rows == 0:
        return out
    config = config or norm_config(n_rows, n_columns, multiprocessors(x.device))
    launch(
        _rms_norm_kernel,
        (cdiv(n_rows, config.BLOCK_M),),
        x_ptr=rows,
        residual_ptr=residual,
        weight_ptr=weight,
        out_ptr=out,
        n_rows=n_rows,
        n_columns=n_columns,
        stride_x_row=rows.stride(0),
        stride_residual_row=n_columns,
        stride_out_row=n_columns,
        eps=eps,
        HAS_RESIDUAL=residual is not None,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        num_warps=config.num_warps,
    )
    return out


@checked_once
def _check(x, weight, residual, out) -> None:
    check_tensor("x", x, dtype=FLOATS, shape=[..., None])
    n_columns = x.shape[-1]
    refuse_unless(0 < n_columns <= 65536, f"x has {n_columns} columns, not 1 to 65536")
    check_tensor("weight", weight, dtype=FLOATS, shape=[n_columns], device=x.device)
    for name, like in (("out", out), ("residual", residual)):
        if like is not None:
            check_tensor(name, like, dtype=x.dtype, shape=x.shape, device=x.device, dense=True)


def rms_norm_cost(n_rows: int, n_columns: int, itemsize: int, residual: bool = False) -> Cost:
    """Rows in and out once, the weight once; the residual is read and written as well."""
    return Cost(bytes=((4 if residual else 2) * n_rows + 1) * n_columns * itemsize, flops=4 * n_rows * n_columns)
