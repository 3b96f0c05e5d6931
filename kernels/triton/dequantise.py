"""Weights in 4 bits as a plain matrix, for products of many rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .check import FLOATS, check_tensor, checked_once, refuse_unless
from .cost import Cost
from .int4 import ZERO, decode
from .launch import cdiv, launch, multiprocessors


@triton.jit(do_not_specialize=["n_rows"])
def _dequantise_kernel(
    codes_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    n_rows,
    n_in,
    stride_scale_group,
    HAS_ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    HALF: tl.constexpr = GROUP // 2
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.program_id(1)
    column = tl.arange(0, HALF)[None, :]
    inside = row < n_rows
    at = row.to(tl.int64)[:, None]
    raw = tl.load(codes_ptr + at * (n_in // 2) + group * HALF + column, mask=inside[:, None], other=0)
    place = group * stride_scale_group + row
    scale = tl.load(scale_ptr + place, mask=inside, other=0.0)
    zero = tl.full([BLOCK_N], ZERO, tl.float32)
    if HAS_ZERO:
        zero = tl.load(zero_ptr + place, mask=inside, other=0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    out_at = out_ptr + at * n_in + group * GROUP + column
    first, second = decode(raw, scale, zero, dtype)
    tl.store(out_at, first, mask=inside[:, None])
    tl.store(out_at + HALF, second, mask=inside[:, None])


def check_groups(width: int, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> int:
    """Check the scales and zero points of codes whose rows are ``width`` weights; return the size of their groups."""
    check_tensor("scale", scale, dtype=torch.float32, shape=[None, codes.shape[0]], device=codes.device)
    group = width // max(1, scale.shape[0])
    fits = group in (32, 64, 128) and group * scale.shape[0] == width
    refuse_unless(fits, f"scale has shape {list(scale.shape)}: {width} weights are no such groups of 32, 64 or 128")
    if zero is not None:
        check_tensor("zero", zero, dtype=torch.uint8, shape=scale.shape, device=codes.device)
        same = zero.stride() == scale.stride()
        refuse_unless(same, f"zero has strides {zero.stride()}, and scale {scale.stride()}")
    return group


@checked_once
def _group(codes, scale, zero, dtype) -> int:
    check_tensor("codes", codes, dtype=torch.uint8, shape=[None, None], dense=True)
    refuse_unless(dtype in FLOATS, f"dtype is {dtype}, not one of {FLOATS}")
    return check_groups(2 * codes.shape[1], codes, scale, zero)


def dequantise(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """``(code - zero) * scale`` of every weight, ``[N, K]``, computed in float32 and rounded once.

    ``codes`` (uint8 ``[N, K / 2]``), ``scale`` and ``zero`` are as :func:`~sfs_triton.kernels.linear.linear` has them.
    """
    group = _group(codes, scale, zero, dtype)
    n_rows, n_in = codes.shape[0], 2 * codes.shape[1]
    out = torch.empty((n_rows, n_in), dtype=dtype, device=codes.device)
    # 16 bytes of codes per thread; on one processor (the interpreter) as few programs as is of use
    block_n = 2**15 // group if multiprocessors(codes.device) > 1 else triton.next_power_of_2(max(1, n_rows))
    if n_rows > 0:
        launch(
            _dequantise_kernel,
            (cdiv(n_rows, block_n), n_in // group),
            codes_ptr=codes,
            scale_ptr=scale,
            zero_ptr=zero,
            out_ptr=out,
            n_rows=n_rows,
            n_in=n_in,
            stride_scale_group=scale.stride(0),
            HAS_ZERO=zero is not None,
            GROUP=group,
            BLOCK_N=block_n,
            num_warps=8,
        )
    return out


def dequantise_cost(n_rows: int, n_in: int, group: int, itemsize: int) -> Cost:
    """Read codes and scales, write the matrix."""
    return Cost(bytes=int(n_rows * n_in * (0.5 + 4 / group + itemsize)), flops=0)
