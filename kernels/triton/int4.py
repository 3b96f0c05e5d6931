"""Products with weights in 4 bits, which are decoded on their way to the tensor cores.

A row of ``[N, K / 2]`` bytes has groups of weights with a scale each. A byte of a group holds a weight of its first
half in the low bits, and the one half a group further in the high bits: so decoding moves nothing between threads, and
both halves are products with neighbouring columns of x.
"""

from __future__ import annotations

import triton
import triton.language as tl

ZERO = tl.constexpr(8.0)  # the code of zero, where groups have none of their own
# 2^23 in float32: a number in its last bits is added to it; converting integers is a slow instruction
_BASE = tl.constexpr(0x4B000000)
_BASE_VALUE = tl.constexpr(8388608.0)


@triton.jit
def decode(raw, scale, zero, DTYPE: tl.constexpr):
    """``(code - zero) * scale``, rounded once, of a tile of bytes ``[N, K]`` with a scale and a zero per row: for the
    codes in the low bits and for those in the high bits, which stay there, 16 times as large."""
    wide = raw.to(tl.int32)
    low = ((wide & 15) | _BASE).to(tl.float32, bitcast=True) - (zero + _BASE_VALUE)[:, None]
    high = ((wide & 240) | _BASE).to(tl.float32, bitcast=True) - (16.0 * zero + _BASE_VALUE)[:, None]
    return (low * scale[:, None]).to(DTYPE), (high * (scale * 0.0625)[:, None]).to(DTYPE)


@triton.jit
def dot_over_groups(
    x_ptr,
    weight_ptr,
    scale_ptr,
    zero_ptr,
    x_row,
    weight_row,
    n_in,
    stride_x_row,
    stride_scale_group,
    first_block,
    last_block,
    HAS_ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``weight[weight_row] @ x[x_row]^T`` over some blocks of K, each a group or a part of one: ``[BLOCK_N, BLOCK_M]``.

    Of x a block reads two runs of columns, which are half a group apart.
    """
    HALF: tl.constexpr = BLOCK_K // 2
    column = tl.arange(0, HALF)
    x_at = x_ptr + x_row.to(tl.int64)[:, None] * stride_x_row + column[None, :]
    weight_at = weight_ptr + weight_row.to(tl.int64)[:, None] * (n_in // 2) + column[None, :]
    dtype = x_ptr.dtype.element_ty
    acc = tl.full([BLOCK_N, BLOCK_M], 0.0, tl.float32)
    for block in range(first_block, last_block):
        start = block * BLOCK_K
        group = start // GROUP
        if BLOCK_K < GROUP:
            start = group * GROUP + start % GROUP // 2
        raw = tl.load(weight_at + block * HALF)
        low = tl.load(x_at + start)
        high = tl.load(x_at + start + GROUP // 2)
        at = group * stride_scale_group + weight_row
        scale = tl.load(scale_ptr + at)
        zero = tl.full([BLOCK_N], ZERO, tl.float32)
        if HAS_ZERO:
            zero = tl.load(zero_ptr + at).to(tl.float32)
        first, second = decode(raw, scale, zero, dtype)
        acc = tl.dot(first, tl.trans(low), acc, input_precision="ieee")
        acc = tl.dot(second, tl.trans(high), acc, input_precision="ieee")
    return acc
