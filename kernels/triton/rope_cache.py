"""Rotary embedding of queries and keys in place, fused with storing keys and values at their positions in a cache."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from .check import FLOATS, INTEGERS, check_index, check_tensor, checked_once, refuse_unless
from .cost import Cost
from .launch import cdiv, launch, multiprocessors


@triton.jit
def _rotate(source, target, cos_ptr, sin_ptr, live, stored, HALF: tl.constexpr):
    """Turn pairs ``(source, source + HALF)`` by their angles; all pointers are ``[items, columns]``."""
    low = tl.load(source, mask=live, other=0.0)
    high = tl.load(source + HALF, mask=live, other=0.0)
    cos = tl.load(cos_ptr, mask=live, other=0.0)
    sin = tl.load(sin_ptr, mask=live, other=0.0)
    wide_low, wide_high = low.to(tl.float32), high.to(tl.float32)
    tl.store(target, (wide_low * cos - wide_high * sin).to(low.dtype), mask=stored)
    tl.store(target + HALF, (wide_high * cos + wide_low * sin).to(low.dtype), mask=stored)


@triton.jit(
    do_not_specialize=[
        "n_rows",
        "n_heads",
        "n_kv_heads",
        "n_q_tiles",
        "n_qk_tiles",
        "stride_position_batch",
        "stride_position_row",
    ],
    do_not_specialize_on_alignment=["position_ptr"],
)
def _rope_cache_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    cache_row_ptr,
    k_cache_ptr,
    v_cache_ptr,
    n_rows,
    n_heads,
    n_kv_heads,
    n_q_tiles,
    n_qk_tiles,
    stride_q_batch,
    stride_q_row,
    stride_q_head,
    stride_k_batch,
    stride_k_row,
    stride_k_head,
    stride_v_batch,
    stride_v_row,
    stride_v_head,
    stride_position_batch,
    stride_position_row,
    stride_k_cache_batch,
    stride_k_cache_row,
    stride_k_cache_head,
    stride_v_cache_batch,
    stride_v_cache_row,
    stride_v_cache_head,
    HAS_Q: tl.constexpr,
    HAS_K: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    HAS_CACHE: tl.constexpr,
    HAS_CACHE_ROW: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    tile = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    # tiles of queries come first, then those of keys, then those of values
    heads = tl.where(tile < n_q_tiles, n_heads, n_kv_heads)
    first = tl.where(tile < n_q_tiles, 0, tl.where(tile < n_qk_tiles, n_q_tiles, n_qk_tiles))
    item = (tile - first) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    there = item < n_rows * heads
    row = (item // heads).to(tl.int64)
    head = (item % heads).to(tl.int64)
    columns = tl.arange(0, BLOCK_HALF)[None, :]
    live = there & (columns < HALF)
    position = row
    if HAS_POSITION:
        position_ptr += batch * stride_position_batch
        position = tl.load(position_ptr + row * stride_position_row, mask=there, other=-1).to(tl.int64)
    # an idle row is read like any other and only not stored: reading does not wait for the position
    stored = live & (position >= 0)
    position = tl.maximum(position, 0)
    angle = position * (2 * HALF) + columns
    if HAS_CACHE:
        cache_row = batch
        if HAS_CACHE_ROW:
            cache_row = tl.load(cache_row_ptr + batch).to(tl.int64)

    if HAS_Q:
        if tile < n_q_tiles:
            at = q_ptr + batch * stride_q_batch + row * stride_q_row + head * stride_q_head + columns
            _rotate(at, at, cos_ptr + angle, sin_ptr + angle, live, stored, HALF)
    if HAS_K:
        if tile >= n_q_tiles:
            if tile < n_qk_tiles:
                at = k_ptr + batch * stride_k_batch + row * stride_k_row + head * stride_k_head + columns
                to = at
                if HAS_CACHE:
                    to = k_cache_ptr + cache_row * stride_k_cache_batch + position * stride_k_cache_row
                    to = to + head * stride_k_cache_head + columns
                _rotate(at, to, cos_ptr + angle, sin_ptr + angle, live, stored, HALF)
            else:
                if HAS_CACHE:
                    at = v_ptr + batch * stride_v_batch + row * stride_v_row + head * stride_v_head + columns
                    to = v_cache_ptr + cache_row * stride_v_cache_batch + position * stride_v_cache_row
                    to = to + head * stride_v_cache_head + columns
                    low = tl.load(at, mask=live, other=0.0)
                    high = tl.load(at + HALF, mask=live, other=0.0)
                    tl.store(to, low, mask=stored)
                    tl.store(to + HALF, high, mask=stored)


@dataclass(frozen=True)
class RopeCacheConfig:
    BLOCK_M: int
    num_warps: int


@lru_cache(1024)
def rope_cache_config(n_rows: int, n_heads: int, head_dim: int, n_multiprocessors: int) -> RopeCacheConfig:
    """Heads of 1,024 values per program, 16 per thread: two vectors of 16 bytes in flight in 16-bit dtypes.

    At D = 128 that is 8 heads, of one row or of neighbours; the 25 programs whose registers fit an SM keep 50 KB in
    flight. Where there is one processor, programs are as large as is of use.
    """
    width = triton.next_power_of_2(head_dim)
    values = 1024 if n_multiprocessors > 1 else 65536
    block = max(1, min(values // width, triton.next_power_of_2(n_rows * n_heads)))
    return RopeCacheConfig(BLOCK_M=block, num_warps=min(4, max(1, block * width // 512)))


def rope_cache(
    q: torch.Tensor | None,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position: torch.Tensor | None,
    *,
    k_cache: torch.Tensor | None = None,
    v_cache: torch.Tensor | None = None,
    cache_row: torch.Tensor | None = None,
    config: RopeCacheConfig | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """``x * cos[position] + cat(-x[D/2:], x[:D/2]) * sin[position]`` for ``q`` and ``k``; ``k`` and ``v`` to the cache.

    Computed in float32 and cast once. ``D`` is even and at most 256.

    Args:
        q: queries ``[b, n, H, D]`` or None, float32, float16 or bfloat16; rotated in place.
        k, v: keys and values ``[b, n, Hkv, D]``, or both None. Without caches ``k`` is rotated in place and ``v`` left
            alone; with caches neither is written.
        cos, sin: dense float32 tables ``[P, D]`` whose two halves are equal (the first is read).
        position: canvas positions, int32 or int64 ``[b, n]``, or ``[n]`` for all batch rows alike, below ``P`` and
            ``L``. In ``[b, n]`` a row at -1 is idle: neither rotated nor stored. No two rows of a batch row have the
            same position unless they are idle: which one would be kept in the cache is not defined. None: row ``i``
            has the tables' row ``i``, and there are no caches.
        k_cache, v_cache: ``[B, L, Hkv, D]`` with any strides but a contiguous ``D``; keys and values are stored at
            ``[cache_row, position]``.
        cache_row: int32 or int64 index ``[b]`` of each batch row in the caches, all different; None is ``0..b-1``.
        config: replaces :func:`rope_cache_config`'s choice.

    Returns:
        ``q``, keys and values; the last two are the caches if those are given. What is None stays None.

    Raises:
        ValueError: an argument does not fit. Indices are checked with ``SFS_TRITON_DEBUG=1`` only.

    NaN and infinities stay in their pair of values.
    """
    results = (q, k, v) if k_cache is None else (q, k_cache, v_cache)
    n_processors = multiprocessors(cos.device)
    grid, fixed = _plan(q, k, v, cos, sin, position, k_cache, v_cache, cache_row, config, n_processors)
    if grid is None:
        return results
    launch(
        _rope_cache_kernel,
        grid,
        q_ptr=q,
        k_ptr=k,
        v_ptr=None if k_cache is None else v,
        cos_ptr=cos,
        sin_ptr=sin,
        position_ptr=position,
        cache_row_ptr=cache_row,
        k_cache_ptr=k_cache,
        v_cache_ptr=v_cache,
        **fixed,
    )
    return results


@checked_once
def _plan(
    q, k, v, cos, sin, position, k_cache, v_cache, cache_row, config: RopeCacheConfig | None, n_processors: int
) -> tuple[tuple[int, int] | None, dict[str, Any]]:
    """The grid (None: nothing to do) and the arguments that follow from layouts."""
    _check(q, k, v, cos, sin, position, k_cache, v_cache, cache_row)
    some = k if q is None else q
    cached = k_cache is not None
    if some is None or some.numel() == 0:
        return None, {}
    batch, n_rows, _, head_dim = some.shape
    n_heads, n_kv_heads = (0 if x is None else x.shape[2] for x in (q, k))
    config = config or rope_cache_config(n_rows, max(n_heads, n_kv_heads), head_dim, n_processors)
    q_tiles, kv_tiles = (cdiv(n_rows * heads, config.BLOCK_M) for heads in (n_heads, n_kv_heads))
    fixed = {
        "n_rows": n_rows,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "n_q_tiles": q_tiles,
        "n_qk_tiles": q_tiles + kv_tiles,
        **_strides("q", q, ("batch", "row", "head")),
        **_strides("k", k, ("batch", "row", "head")),
        **_strides("v", v, ("batch", "row", "head")),
        "stride_position_batch": 0 if position is None or position.dim() == 1 else position.stride(0),
        "stride_position_row": 0 if position is None else position.stride(-1),
        **_strides("k_cache", k_cache, ("batch", "row", "head")),
        **_strides("v_cache", v_cache, ("batch", "row", "head")),
        "HAS_Q": q is not None,
        "HAS_K": k is not None,
        "HAS_POSITION": position is not None,
        "HAS_CACHE": cached,
        "HAS_CACHE_ROW": cache_row is not None,
        "HALF": head_dim // 2,
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_HALF": triton.next_power_of_2(head_dim // 2),
        "num_warps": config.num_warps,
    }
    return (q_tiles + kv_tiles * (1 + cached), batch), fixed


def _strides(name: str, x: torch.Tensor | None, axes: tuple[str, ...]) -> dict[str, int]:
    """Return stride arguments of the leading axes; zeros for an absent tensor."""
    return {f"stride_{name}_{axis}": 0 if x is None else x.stride(i) for i, axis in enumerate(axes)}


def _check(q, k, v, cos, sin, position, k_cache, v_cache, cache_row) -> None:
    refuse_unless((k is None) == (v is None), "k and v go together: one is None")
    refuse_unless((k_cache is None) == (v_cache is None), "k_cache and v_cache go together: one is None")
    refuse_unless(k_cache is None or k is not None, "k_cache is given without k")
    refuse_unless(cache_row is None or k_cache is not None, "cache_row is given without k_cache")
    some, name = (k, "k") if q is None else (q, "q")
    if some is None:
        return
    check_tensor(name, some, dtype=FLOATS, shape=[None] * 4)
    batch, n_rows, _, head_dim = some.shape
    fits = head_dim % 2 == 0 and 0 < head_dim <= 256
    refuse_unless(fits, f"{name} has head_dim {head_dim}, not an even number up to 256")
    refuse_unless(batch < 65536, f"{name} has {batch} batch rows, not up to 65535")
    on = {"device": some.device}
    if k is not None:
        check_tensor("k", k, dtype=some.dtype, shape=[batch, n_rows, None, head_dim], **on)
        check_tensor("v", v, dtype=some.dtype, shape=k.shape, **on)
    most = n_rows * max(x.shape[2] for x in (q, k) if x is not None)
    refuse_unless(most < 2**30, f"{name} has {n_rows} rows with {most} heads in all, not fewer than 2**30")
    check_tensor("cos", cos, dtype=torch.float32, shape=[None, head_dim], dense=True, **on)
    check_tensor("sin", sin, dtype=torch.float32, shape=cos.shape, dense=True, **on)
    refuse_unless(some.numel() == 0 or len(cos) > 0, "cos has no rows")
    if position is None:
        refuse_unless(k_cache is None, "k_cache is given without position")
        refuse_unless(len(cos) >= n_rows, f"cos has {len(cos)} rows, fewer than {name}'s {n_rows}")
        return
    check_tensor("position", position, dtype=INTEGERS, shape=[batch, n_rows][2 - position.dim() :], **on)
    length = len(cos)
    if k_cache is not None:
        check_tensor("k_cache", k_cache, dtype=k.dtype, shape=[None, None, *k.shape[2:]], **on)
        check_tensor("v_cache", v_cache, dtype=k.dtype, shape=k_cache.shape, **on)
        rows, length = k_cache.shape[0], min(length, k_cache.shape[1])
        refuse_unless(cache_row is not None or rows >= batch, f"k_cache has {rows} batch rows, fewer than k's {batch}")
        refuse_unless(some.numel() == 0 or k_cache.numel() > 0, "k_cache holds nothing")
    if cache_row is not None:
        check_tensor("cache_row", cache_row, dtype=INTEGERS, shape=[batch], **on)
        check_index("cache_row", cache_row, 0, rows)
    check_index("position", position, -1 if position.dim() == 2 else 0, length)


def rope_cache_cost(
    n_rows: int, n_heads: int, n_kv_heads: int, head_dim: int, itemsize: int, cached: bool = True
) -> Cost:
    """Queries, keys and, with a cache, values in and out once; half of two tables' rows in and one int64 position."""
    moved = n_heads + n_kv_heads * (1 + cached)
    turned = n_rows * (n_heads + n_kv_heads) * head_dim
    return Cost(bytes=n_rows * (2 * moved * head_dim * itemsize + head_dim * 4 + 8), flops=3 * turned)
