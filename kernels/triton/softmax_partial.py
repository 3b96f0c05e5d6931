"""Partial results of a row of logits, which merge into the softmax of a chosen token.

Of a row ``[columns]`` results are scalars, of a tile ``[rows, columns]`` they are ``[rows, 1]``. Exponents are taken
to base 2 (``scale`` is log2(e), over the temperature if there is one): ``tl.exp`` of the same costs twice the
instructions, for the care it takes of tiny results. NaN loses every comparison, so it reaches sums alone: the score
becomes NaN and the token stays a valid id.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .check import check_tensor

LOG2E = 1.4426950408889634
NO_TOKEN = tl.constexpr(2147483647)  # loses every tie


@triton.jit
def max_of(x):
    return tl.max(x, axis=len(x.shape) - 1, keep_dims=len(x.shape) == 2)


@triton.jit
def sum_of(x):
    return tl.sum(x, axis=len(x.shape) - 1, keep_dims=len(x.shape) == 2)


@triton.jit
def largest(key, ids):
    """The largest key and the lowest id that has it; where all keys are NaN, ``NO_TOKEN``."""
    top = max_of(key)
    return top, tl.min(tl.where(key == top, ids, NO_TOKEN), axis=len(key.shape) - 1, keep_dims=len(key.shape) == 2)


@triton.jit
def runner_up(x, top, second):
    """The second largest, which may equal ``top``, the largest. ``second``: the second largest of each part ``x``."""
    equals = sum_of((x == top).to(tl.int32))
    return tl.where(equals > 1, top, max_of(tl.where(x == top, second, x)))


@triton.jit
def finite_or_zero(top):
    """Return the number to subtract from logits whose largest is ``top``: minus infinity less itself would be NaN."""
    return tl.where(top > float("-inf"), top, 0.0)


@triton.jit
def value_of(x, ids, winner):
    """``x`` at the id ``winner``; minus infinity where it is not among ``ids``."""
    return max_of(tl.where(ids == winner, x, float("-inf")))


def result_of(
    out: tuple[torch.Tensor, torch.Tensor] | None, n_rows: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """``out`` if it is a token int32 ``[n_rows]`` and a score float32 ``[n_rows]``, both dense; new ones if None."""
    if out is None:
        out = (torch.empty(n_rows, dtype=dtype, device=device) for dtype in (torch.int32, torch.float32))
    token, score = out
    check_tensor("out[0]", token, dtype=torch.int32, shape=[n_rows], device=device, dense=True)
    check_tensor("out[1]", score, dtype=torch.float32, shape=[n_rows], device=device, dense=True)
    return token, score
