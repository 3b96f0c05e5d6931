"""The operations by Triton kernels, under the names and with the arguments of :mod:`sfs_triton.ops.torch_backend`.

Most kernels take those arguments as they are. Those that take tensors of a :class:`DecodeState` one by one are given
them here.
"""

from __future__ import annotations

import torch

from ..kernels import linear as _linear
from ..kernels import list_positions as _list_positions
from ..kernels import mark_candidates as _mark_candidates
from ..kernels import position_ranges as _position_ranges
from ..kernels import scatter_choices as _scatter_choices
from ..kernels.attention import attention
from ..kernels.confidence import confidence
from ..kernels.cycle import decide_cycle
from ..kernels.dequantise import dequantise
from ..kernels.gather import compact, embedding
from ..kernels.linear import Normed
from ..kernels.lm_head import lm_head, lm_head_partials
from ..kernels.mlp import silu_mul
from ..kernels.norm import rms_norm
from ..kernels.partials import merge_partials
from ..kernels.publish import publish
from ..kernels.rope_cache import rope_cache
from ..kernels.select import decide_block
from .torch import linear as _by_torch
from .torch.fused_linear import Heads, product, rotated_heads
from .torch.linear import Matrix, Quantised

__all__ = [
    "attention",
    "compact",
    "confidence",
    "decide_block",
    "decide_cycle",
    "embedding",
    "linear",
    "linear_heads",
    "linear_normed",
    "linear_silu_mul",
    "list_positions",
    "lm_head",
    "lm_head_partials",
    "mark_candidates",
    "merge_partials",
    "position_ranges",
    "publish",
    "rms_norm",
    "rope_cache",
    "scatter_choices",
    "silu_mul",
]


# Rows up to which plain weights are multiplied by the kernel: those of one row tile, which reads the weights once.
# Their stream is then the bound: a weight of 16 bits is two bytes, and two operations per row, so 128 rows do 128
# operations per byte, where GPUs do 170 (RTX 4090: 165 TFLOP/s, 0.95 TB/s) to 270 (H100: 800, 3.0) in the same time.
# With more rows arithmetic is the bound, at which cuBLAS is better.
FEW_ROWS = 128


def _fused(x: torch.Tensor | Normed, matrix: Matrix) -> bool:
    """Decide whether a product and what is next to it are one launch. Many rows of weights in 4 bits are not: these
    are decoded for cuBLAS, since every tile of rows would decode them anew."""
    if isinstance(x, Normed) or isinstance(matrix, Quantised) and matrix.group is None:
        return True
    return x.shape[:-1].numel() <= FEW_ROWS


def _flat(x: torch.Tensor | Normed) -> torch.Tensor | Normed:
    if isinstance(x, Normed):
        return x._replace(values=x.values.flatten(0, -2))
    return x.reshape(-1, x.shape[-1])


def _parts(matrix: Matrix) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return weights as they are in memory, and their scales."""
    return (matrix.codes, matrix.scale) if isinstance(matrix, Quantised) else (matrix, None)


def _zero(matrix: Matrix) -> dict[str, torch.Tensor | None]:
    return {"zero": matrix.zero if isinstance(matrix, Quantised) else None}


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    if weight.dtype != torch.uint8 or len(x) <= FEW_ROWS:
        return _linear.linear(x, weight, scale, zero, residual=residual)
    return _by_torch.linear(x, weight, scale, zero, residual=residual, decode=_decode)


def _decode(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, zero: torch.Tensor | None) -> torch.Tensor:
    return dequantise(codes, scale, zero, dtype)


def linear_heads(
    x: torch.Tensor | Normed,
    matrix: Matrix,
    bias: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position: torch.Tensor | None,
    *,
    n_heads: int,
    n_kv_heads: int,
    counters: torch.Tensor | None = None,
    **store: torch.Tensor | None,
) -> Heads:
    if not _fused(x, matrix):
        out = product(x, matrix, bias, quantised=linear)
        return rotated_heads(out, rope_cache, cos, sin, position, n_heads, n_kv_heads, **store)
    batch, n = (x.values if isinstance(x, Normed) else x).shape[:2]
    counts = {"n_heads": n_heads, "n_kv_heads": n_kv_heads, "n_positions": n}
    counts |= {"counters": counters, **_zero(matrix)}
    out = _linear.linear_heads(_flat(x), *_parts(matrix), bias, cos, sin, position, **counts, **store)
    heads = None if out is None else out.view(batch, n, -1, cos.shape[1])
    if store:
        return heads, store["k_cache"], store["v_cache"]
    q, k, v = heads.split((n_heads, n_kv_heads, n_kv_heads), 2)
    return q if n_heads else None, *((k, v) if n_kv_heads else (None, None))


def linear_normed(
    x: torch.Tensor,
    matrix: Matrix,
    residual: torch.Tensor,
    gain: torch.Tensor,
    eps: float,
    *,
    to_product: bool = False,
    counters: torch.Tensor | None = None,
) -> torch.Tensor | Normed:
    if not _fused(x, matrix):
        return rms_norm(product(x, matrix, quantised=linear), gain, eps, residual=residual)
    place = residual.view(-1, residual.shape[-1])
    if to_product and x.dtype != torch.float16:  # whose range is too small for values that are not normalised yet
        how = {"residual": place, "counters": counters, **_zero(matrix)}
        normed = _linear.linear_normed(_flat(x), *_parts(matrix), gain, eps, **how)
        return normed._replace(values=normed.values.view(residual.shape))
    _linear.linear(_flat(x), *_parts(matrix), **_zero(matrix), residual=place, out=place, counters=counters)
    return rms_norm(residual, gain, eps)


def linear_silu_mul(x: torch.Tensor | Normed, matrix: Matrix, *, counters: torch.Tensor | None = None) -> torch.Tensor:
    if not _fused(x, matrix):
        return silu_mul(product(x, matrix, quantised=linear))
    shape = (x.values if isinstance(x, Normed) else x).shape[:-1]
    return _linear.linear_silu_mul(_flat(x), *_parts(matrix), **_zero(matrix), counters=counters).view(*shape, -1)


def mark_candidates(state, *, by_stage: bool, span_cap: int | None = None) -> torch.Tensor:
    _mark_candidates.mark_candidates(state.masked, state.control, state.candidate, by_stage=by_stage, span_cap=span_cap)
    return state.candidate


def list_positions(
    state,
    rows: torch.Tensor,
    target: torch.Tensor,
    count: torch.Tensor,
    *,
    by_stage: bool,
    span_cap: int | None = None,
    look_ahead: int = 0,
    shift: int = 0,
    stale: bool = True,
) -> None:
    _list_positions.list_positions(
        state.masked,
        state.control,
        state.dirty,
        state.forwarded,
        state.candidate,
        rows,
        target,
        count,
        by_stage=by_stage,
        span_cap=span_cap,
        look_ahead=look_ahead,
        shift=shift,
        stale=stale,
    )


def position_ranges(
    state,
    rows: torch.Tensor | None,
    count: torch.Tensor,
    key_range: torch.Tensor,
    *,
    to_span_end: bool,
    block: str | None,
) -> None:
    _position_ranges.position_ranges(state.control, rows, count, key_range, to_span_end=to_span_end, block=block)


def scatter_choices(
    state,
    token: torch.Tensor,
    score: torch.Tensor,
    target: torch.Tensor,
    *,
    which: torch.Tensor | None = None,
    row: torch.Tensor | None = None,
    scores: torch.Tensor | None = None,
) -> None:
    into = state.score if scores is None else scores[:-1].view(state.score.shape)
    _scatter_choices.scatter_choices(token, score, target, state.token, into, which=which, row=row)
