"""Products with weights in any format, which are decoded on their way to the tensor cores.

A format has a file with its ``decode`` (``float8.py``), a branch in the functions here, and a dtype in
:func:`format_of`. Formats are ``"plain"``, weights in the dtype of the input; ``"fp8"``, e4m3 codes with a scale
per row; and ``"int4"``, two codes per byte with scales of groups, whose loop over K is another (``int4.py``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from .float8 import UNDECODED
from .float8 import decode as decode_float8


@triton.jit
def decode(raw, FORMAT: tl.constexpr, NATIVE_FP8: tl.constexpr, DTYPE: tl.constexpr):
    """The values of a tile of weights as it is in memory, over what :func:`row_scale` returns."""
    if FORMAT == "fp8":
        raw = decode_float8(raw, cuda_capability_geq(8, 9) if NATIVE_FP8 is None else NATIVE_FP8, DTYPE)
    return raw


@triton.jit
def row_scale(scale_ptr, row, inside, FORMAT: tl.constexpr, NATIVE_FP8: tl.constexpr):
    """Load the factors that decoded weights of these rows still need; plain ones have none."""
    scale = tl.load(scale_ptr + row, mask=inside, other=0.0)
    if not (cuda_capability_geq(8, 9) if NATIVE_FP8 is None else NATIVE_FP8):
        scale *= UNDECODED
    return scale


@triton.jit
def dot_over(
    x_ptr,
    weight_ptr,
    x_row,
    weight_row,
    n_in,
    stride_x_row,
    first_block,
    last_block,
    FORMAT: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``weight[weight_row] @ x[x_row]^T`` over some blocks of K: ``[BLOCK_N, BLOCK_M]``.

    The weights are the left operand: that one may come from registers, where they are decoded, and its side of a
    tensor core's instruction is the long one, while there may be only 16 rows of x.
    """
    column = tl.arange(0, BLOCK_K)
    x_at = x_ptr + x_row.to(tl.int64)[:, None] * stride_x_row + column[None, :]
    weight_at = weight_ptr + weight_row.to(tl.int64)[:, None] * n_in + column[None, :]
    dtype = x_ptr.dtype.element_ty
    acc = tl.full([BLOCK_N, BLOCK_M], 0.0, tl.float32)
    for block in range(first_block, last_block):
        start = block * BLOCK_K
        if EVEN_K:
            x = tl.load(x_at + start)
            raw = tl.load(weight_at + start)
        else:
            inside = (start + column < n_in)[None, :]
            x = tl.load(x_at + start, mask=inside, other=0.0)
            raw = tl.load(weight_at + start, mask=inside, other=0.0)
        acc = tl.dot(decode(raw, FORMAT, NATIVE_FP8, dtype), tl.trans(x), acc, input_precision="ieee")
    return acc


def format_of(weight: torch.Tensor) -> str:
    """Return the format of a matrix of weights."""
    return {torch.float8_e4m3fn: "fp8", torch.uint8: "int4"}.get(weight.dtype, "plain")
