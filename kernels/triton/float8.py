"""Weights as float8 e4m3 codes."""

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
