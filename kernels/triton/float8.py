"""Products with matrices of float8 e4m3 codes, which are decoded on their way to the tensor cores."""

from __future__ import annotations

import triton
import triton.language as tl

UNDECODED = tl.constexpr(256.0)  # what values decoded without the GPU's own conversion still have to be multiplied by


@triton.jit
def decode(code, NATIVE_FP8: tl.constexpr, DTYPE: tl.constexpr):
    """The values of e4m3 codes (uint8), exact; over UNDECODED if not by the GPU's own conversion.

    Sign, exponent and mantissa moved to their places in float16 make that value, of subnormal numbers too.
    """
    if NATIVE_FP8:
        value = code.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        wide = code.to(tl.uint16)
        value = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)
    # by way of float32 also to bfloat16: the direct conversion is one of the slowest instructions there are
    return value.to(tl.float32).to(DTYPE)


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
    lane = tl.arange(0, BLOCK_K)
    x_at = x_ptr + x_row.to(tl.int64)[:, None] * stride_x_row + lane[None, :]
    weight_at = weight_ptr + weight_row.to(tl.int64)[:, None] * n_in + lane[None, :]
    dtype = x_ptr.dtype.element_ty
    acc = tl.full([BLOCK_N, BLOCK_M], 0.0, tl.float32)
    for block in range(first_block, last_block):
        start = block * BLOCK_K
        if EVEN_K:
            x = tl.load(x_at + start)
            code = tl.load(weight_at + start)
        else:
            inside = (start + lane < n_in)[None, :]
            x = tl.load(x_at + start, mask=inside, other=0.0)
            code = tl.load(weight_at + start, mask=inside, other=0.0)
        acc = tl.dot(decode(code, NATIVE_FP8, dtype), tl.trans(x), acc, input_precision="ieee")
    return acc
