"""Bidirectional attention of some queries over cached keys and values, the keys split over programs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from .check import FLOATS, INTEGERS, check_index, check_tensor, checked_once, refuse_unless
from .cost import Cost
from .launch import H200_SHARED_MEMORY, cdiv, launch, multiprocessors, shared_memory

HEAD_DIMS = (16, 32, 64, 128)
MARGIN = 4 * 1024  # of shared memory, for what the compiler needs beside tiles


@triton.jit
def _key_ranges(key_range_ptr, n_keys):
    """The union of two ranges within ``[0, n_keys)`` as two disjoint ones: ``start_0, n_0, start_1, n_1``."""
    start_0 = tl.minimum(tl.maximum(tl.load(key_range_ptr), 0), n_keys)
    stop_0 = tl.minimum(tl.maximum(tl.load(key_range_ptr + 1), 0), n_keys)
    start_1 = tl.minimum(tl.maximum(tl.load(key_range_ptr + 2), 0), n_keys)
    stop_1 = tl.minimum(tl.maximum(tl.load(key_range_ptr + 3), 0), n_keys)
    n_0 = tl.maximum(stop_0 - start_0, 0)
    n_1 = tl.maximum(stop_1 - start_1, 0)
    overlap = (tl.maximum(start_0, start_1) < tl.minimum(stop_0, stop_1)) & (n_0 > 0) & (n_1 > 0)
    first = tl.minimum(start_0, start_1)
    n_0 = tl.where(overlap, tl.maximum(stop_0, stop_1) - first, n_0)
    start_0 = tl.where(overlap, first, start_0)
    n_1 = tl.where(overlap, 0, n_1)
    return start_0, n_0, start_1, n_1


@triton.jit
def _attend(
    q, k_ptr, v_ptr, begin, end, n_0, start_0, start_1, stride_k_row, stride_v_row, qk_scale, BLOCK_N: tl.constexpr
):
    """Unnormalised values of keys ``[begin, end)``, the rows' largest exponents (of two) and weights.

    Keys are numbered along both ranges: the first ``n_0`` start at position ``start_0``, the others at ``start_1``.
    ``qk_scale`` makes exponents of two of scores.
    """
    columns = tl.arange(0, q.shape[1])[None, :]
    top = tl.full([q.shape[0]], float("-inf"), tl.float32)
    weight = tl.full([q.shape[0]], 0.0, tl.float32)
    acc = tl.full([q.shape[0], q.shape[1]], 0.0, tl.float32)
    for first in range(begin, end, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        inside = key < end
        position = (key + tl.where(key < n_0, start_0, start_1 - n_0)).to(tl.int64)
        k = tl.load(k_ptr + (position * stride_k_row)[:, None] + columns, mask=inside[:, None], other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee")
        score = tl.where(inside[None, :], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, axis=1) * qk_scale)
        p = tl.exp2(score * qk_scale - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        weight = weight * shrink + tl.sum(p, axis=1)
        v = tl.load(v_ptr + (position * stride_v_row)[:, None] + columns, mask=inside[:, None], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    return acc, top, weight


@triton.jit
def _leave(partial_ptr, acc, top, weight):
    """A split's partial result: values, then the largest exponent and the weight of each row."""
    BLOCK_M: tl.constexpr = acc.shape[0]
    HEAD_DIM: tl.constexpr = acc.shape[1]
    rows = tl.arange(0, BLOCK_M)
    tl.store(partial_ptr + rows[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :], acc)
    tl.store(partial_ptr + BLOCK_M * HEAD_DIM + rows, top)
    tl.store(partial_ptr + BLOCK_M * (HEAD_DIM + 1) + rows, weight)


@triton.jit
def _merge(partial_ptr, n_used, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr):
    """Rescale values and weights of ``n_used`` splits to one exponent and add them in the order of the splits."""
    SIZE: tl.constexpr = BLOCK_M * (HEAD_DIM + 2)
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, HEAD_DIM)[None, :]
    top_ptr = partial_ptr + BLOCK_M * HEAD_DIM + rows
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for split in range(0, n_used):
        top = tl.maximum(top, tl.load(top_ptr + split * SIZE, cache_modifier=".cg"))
    acc = tl.full([BLOCK_M, HEAD_DIM], 0.0, tl.float32)
    weight = tl.full([BLOCK_M], 0.0, tl.float32)
    for split in range(0, n_used):
        part = tl.load(partial_ptr + split * SIZE + rows[:, None] * HEAD_DIM + columns, cache_modifier=".cg")
        factor = tl.exp2(tl.load(top_ptr + split * SIZE, cache_modifier=".cg") - top)
        weight += factor * tl.load(top_ptr + split * SIZE + BLOCK_M, cache_modifier=".cg")
        acc += factor[:, None] * part
    return acc, weight


@triton.jit
def _store(out, acc, weight, live):
    """Store ``acc / weight``, or zeros for a row without keys."""
    scaled = acc / tl.where(weight == 0, 1.0, weight)[:, None]
    tl.store(out, scaled.to(out.dtype.element_ty), mask=live[:, None])


@triton.jit(do_not_specialize=["n_queries", "n_keys", "n_tiles", "n_splits", "qk_scale"])
def _attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cache_row_ptr,
    key_range_ptr,
    count_ptr,
    out_ptr,
    partial_ptr,
    counters_ptr,
    n_queries,
    n_keys,
    n_tiles,
    n_splits,
    stride_q_batch,
    stride_q_row,
    stride_q_head,
    stride_k_batch,
    stride_k_row,
    stride_k_head,
    stride_v_batch,
    stride_v_row,
    stride_v_head,
    stride_out_batch,
    stride_out_row,
    stride_out_head,
    qk_scale,
    HAS_CACHE_ROW: tl.constexpr,
    HAS_KEY_RANGE: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # neighbouring programs read the same keys
    tile = tl.program_id(0) % n_tiles
    split = tl.program_id(0) // n_tiles
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    n_live = n_queries
    if HAS_COUNT:
        n_live = tl.minimum(tl.load(count_ptr + batch), n_queries)
    if tile * BLOCK_M >= n_live * GROUP:
        return

    start_0, n_0, start_1, total = 0, n_keys, 0, n_keys
    if HAS_KEY_RANGE:
        start_0, n_0, start_1, n_1 = _key_ranges(key_range_ptr + batch * 4, n_keys)
        total = n_0 + n_1
    # every program of this batch row finds the same number of splits in use; the others have nothing to do
    chunk = tl.maximum((total + n_splits - 1) // n_splits, BLOCK_N)
    begin = split * chunk
    end = tl.minimum(begin + chunk, total)
    if (begin >= total) & (split > 0):
        return

    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, HEAD_DIM)
    query = (tile * BLOCK_M + rows) // GROUP
    head = kv_head * GROUP + (tile * BLOCK_M + rows) % GROUP
    live = query < n_live
    query = query.to(tl.int64)
    at = q_ptr + batch * stride_q_batch + (query * stride_q_row + head * stride_q_head)[:, None] + columns[None, :]
    q = tl.load(at, mask=live[:, None], other=0.0)
    cache_row = batch
    if HAS_CACHE_ROW:
        cache_row = tl.load(cache_row_ptr + batch).to(tl.int64)
    k_ptr += cache_row * stride_k_batch + kv_head * stride_k_head
    v_ptr += cache_row * stride_v_batch + kv_head * stride_v_head

    acc, top, weight = _attend(
        q, k_ptr, v_ptr, begin, end, n_0, start_0, start_1, stride_k_row, stride_v_row, qk_scale, BLOCK_N
    )
    out = out_ptr + batch * stride_out_batch + (query * stride_out_row + head * stride_out_head)[:, None]
    out += columns[None, :]
    if not SPLIT:
        _store(out, acc, weight, live)
    else:
        n_used = (total + chunk - 1) // chunk
        if n_used <= 1:
            _store(out, acc, weight, live)
        else:
            place = (batch * tl.num_programs(1) + kv_head) * n_tiles + tile
            shared = partial_ptr + place * n_splits * (BLOCK_M * (HEAD_DIM + 2))
            _leave(shared + split * (BLOCK_M * (HEAD_DIM + 2)), acc, top, weight)
            tl.debug_barrier()  # all threads of this program store before one of them counts the part
            if tl.atomic_add(counters_ptr + place, 1, sem="acq_rel") == n_used - 1:
                acc, weight = _merge(shared, n_used, HEAD_DIM, BLOCK_M)
                _store(out, acc, weight, live)
                tl.store(counters_ptr + place, 0)


@dataclass(frozen=True)
class AttentionConfig:
    BLOCK_M: int
    BLOCK_N: int
    n_splits: int
    num_warps: int
    num_stages: int


@lru_cache(1024)
def attention_config(
    batch: int,
    n_queries: int,
    n_heads: int,
    n_kv_heads: int,
    n_keys: int,
    head_dim: int,
    itemsize: int,
    n_multiprocessors: int = 132,
    shared: int = H200_SHARED_MEMORY,
) -> AttentionConfig:
    """Choose tiles and splits from capacities; the actual numbers of queries and keys are not known here.

    Rows are a KV head's queries times its group's heads. The largest tile is taken that leaves a tile for one in five
    SMs: keys are then read once, or seldom more, while a handful of splits fills the GPU. A program of 64 or 128 rows
    has an SM for itself (two key and value tiles ahead are 64 KB in flight, and 128 rows hold 128 KB of shared memory
    and most registers); smaller ones, which wait for memory and not for arithmetic, share it in twos where ``shared``,
    the bytes of shared memory that a block may have, is enough for two. Stages are as many as fit it.

    The number of splits is the one with the shortest longest path, in bytes through an SM: the splits' share of keys
    and values and their partial results, times the waves of programs per SM, then all partial results of a tile for the
    program that merges them. On one processor (the interpreter) the work is in as few pieces as possible.
    """
    n_rows = n_queries * (n_heads // n_kv_heads)
    if n_multiprocessors == 1:
        block_m, block_n = (min(256, max(16, triton.next_power_of_2(size))) for size in (n_rows, n_keys))
        return AttentionConfig(block_m, block_n, n_splits=1, num_warps=8, num_stages=1)
    heads = batch * n_kv_heads
    most = 128 if itemsize == 2 else 32 if n_heads == n_kv_heads else 16
    largest = max(16, min(most, triton.next_power_of_2(n_rows)))
    blocks = [block for block in (128, 64, 32, 16) if block <= largest]
    fits = (block for block in blocks if 5 * heads * cdiv(n_rows, block) >= n_multiprocessors)
    block_m = next(fits, blocks[-1])
    block_n, num_stages = 64 if itemsize == 2 else 32, 3
    if block_m >= 64 and n_heads > n_kv_heads:  # a group's addresses take registers too; as many keys are in flight
        block_n, num_stages = 32, 5
    tile, stage = MARGIN + block_m * head_dim * itemsize, 2 * block_n * head_dim * itemsize
    num_stages = max(2, min(num_stages, 1 + (shared - tile) // stage))
    at_once = shared // (tile + (num_stages - 1) * stage)
    slots = n_multiprocessors * (1 if block_m >= 64 else max(1, min(2, at_once)))
    tiles = heads * cdiv(n_rows, block_m)
    stream, partial = n_keys * 2 * head_dim * itemsize, block_m * head_dim * 4

    def path(n_splits: int) -> float:
        if n_splits == 1:
            return cdiv(tiles, slots) * stream
        return cdiv(tiles * n_splits, slots) * (stream / n_splits + partial) + n_splits * partial

    n_splits = min(range(1, max(1, min(64, n_keys // block_n)) + 1), key=path)
    num_warps = 8 if block_m == 128 or itemsize == 4 else 4  # float32 products take no tensor cores, but registers
    return AttentionConfig(block_m, block_n, n_splits, num_warps, num_stages)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cache_row: torch.Tensor | None = None,
    key_range: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
    scale: float | None = None,
    out: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
    config: AttentionConfig | None = None,
) -> torch.Tensor:
    """``softmax(q k^T scale) v`` for every head, ``[b, n, H, D]``; without a causal mask, grouped-query if ``H > Hkv``.

    Scores, sums and partial results are float32; probabilities are cast to ``v``'s dtype for the second product. For
    given arguments and configuration the result is the same bits every time.

    Args:
        q: ``[b, n, H, D]``, float32, float16 or bfloat16, with any strides but a contiguous ``D`` of 16, 32, 64 or 128.
        k, v: ``[B, L, Hkv, D]`` in the same dtype, any strides but a contiguous ``D``; ``H`` is a multiple of ``Hkv``.
        cache_row: int32 or int64 index ``[b]`` of each batch row in ``k`` and ``v``; None is ``0..b-1``.
        key_range: int32 ``[b, 4]``, dense; a batch row's keys are the union of ``[r[0], r[1])`` and ``[r[2], r[3])``
            within ``[0, L)``. None: all. A query without any key gives zeros. Other keys and values are not read.
        count: int32 ``[b]``; only the first ``count[b]`` queries of a batch row are computed, and the other rows of
            ``out`` are not written.
        scale: above zero; ``D ** -0.5`` if None.
        out: like ``q``, dense; allocated if None.
        counters: int32, all zero, and left so; ``b * Hkv * ceil(n * H / Hkv / 16)`` of them always suffice. Allocated
            if None and needed. Launches that may overlap need counters of their own.
        config: replaces :func:`attention_config`'s choice.

    Raises:
        ValueError: an argument does not fit. Indices are checked with ``SFS_TRITON_DEBUG=1`` only.

    NaN in a query stays in that query; NaN in a key or value reaches every query that attends to it. Infinite inputs
    may give NaN.
    """
    refuse_unless(isinstance(q, torch.Tensor), f"q is a {type(q).__name__}, not a tensor")
    machine = multiprocessors(q.device), shared_memory(q.device)
    grid, places, partial_size, fixed = _plan(q, k, v, cache_row, key_range, count, scale, out, config, machine)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if grid is None:
        return out
    partial = None
    if partial_size:
        if counters is None:
            counters = torch.zeros(places, dtype=torch.int32, device=q.device)
        check_tensor("counters", counters, dtype=torch.int32, shape=[None], device=q.device)
        refuse_unless(counters.numel() >= places, f"counters holds {counters.numel()} values, fewer than {places}")
        partial = torch.empty(partial_size, dtype=torch.float32, device=q.device)
    launch(
        _attention_kernel,
        grid,
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        cache_row_ptr=cache_row,
        key_range_ptr=key_range,
        count_ptr=count,
        out_ptr=out,
        partial_ptr=partial,
        counters_ptr=None if partial is None else counters,
        **fixed,
    )
    return out


@checked_once
def _plan(
    q, k, v, cache_row, key_range, count, scale, out, config: AttentionConfig | None, machine: tuple[int, int]
) -> tuple[tuple[int, ...] | None, int, int, dict[str, Any]]:
    """The grid (None: nothing to do), the number of counters, of partial values, and what else follows from layouts."""
    scale = _check(q, k, v, cache_row, key_range, count, scale, out)
    batch, n_queries, n_heads, head_dim = q.shape
    n_keys, n_kv_heads = k.shape[1:3]
    if q.numel() == 0:
        return None, 0, 0, {}
    config = config or attention_config(
        batch, n_queries, n_heads, n_kv_heads, n_keys, head_dim, q.element_size(), *machine
    )
    group = n_heads // n_kv_heads
    n_tiles = cdiv(n_queries * group, config.BLOCK_M)
    places = batch * n_kv_heads * n_tiles
    splits = config.n_splits > 1
    out_strides = (n_queries * n_heads * head_dim, n_heads * head_dim, head_dim)
    strides = {"q": q.stride(), "k": k.stride(), "v": v.stride(), "out": out_strides}
    fixed = {
        "n_queries": n_queries,
        "n_keys": n_keys,
        "n_tiles": n_tiles,
        "n_splits": config.n_splits,
        **{
            f"stride_{name}_{axis}": steps[i]
            for name, steps in strides.items()
            for i, axis in enumerate(("batch", "row", "head"))
        },
        "qk_scale": scale * math.log2(math.e),
        "HAS_CACHE_ROW": cache_row is not None,
        "HAS_KEY_RANGE": key_range is not None,
        "HAS_COUNT": count is not None,
        "SPLIT": splits,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "maxnreg": min(255, 2048 // config.num_warps),  # else ptxas may spill a little for occupancy
    }
    partial_size = places * config.n_splits * config.BLOCK_M * (head_dim + 2) if splits else 0
    return (n_tiles * config.n_splits, n_kv_heads, batch), places, partial_size, fixed


def _check(q, k, v, cache_row, key_range, count, scale, out) -> float:
    """Refuse arguments that do not fit; return the scale."""
    check_tensor("q", q, dtype=FLOATS, shape=[None] * 4)
    batch, n_queries, n_heads, head_dim = q.shape
    refuse_unless(head_dim in HEAD_DIMS, f"q has head_dim {head_dim}, not one of {HEAD_DIMS}")
    refuse_unless(batch < 65536, f"q has {batch} batch rows, not up to 65535")
    check_tensor("k", k, dtype=q.dtype, shape=[None, None, None, head_dim], device=q.device)
    check_tensor("v", v, dtype=q.dtype, shape=k.shape, device=q.device)
    rows, _, n_kv_heads, _ = k.shape
    fits = n_kv_heads > 0 and n_heads % n_kv_heads == 0
    refuse_unless(fits, f"k has {n_kv_heads} heads, which do not divide q's {n_heads}")
    if cache_row is not None:
        check_tensor("cache_row", cache_row, dtype=INTEGERS, shape=[batch], device=q.device)
        check_index("cache_row", cache_row, 0, rows)
    else:
        refuse_unless(rows >= batch, f"k has {rows} batch rows, fewer than q's {batch}")
    if key_range is not None:
        check_tensor("key_range", key_range, dtype=torch.int32, shape=[batch, 4], device=q.device, dense=True)
    if count is not None:
        check_tensor("count", count, dtype=torch.int32, shape=[batch], device=q.device)
        check_index("count", count, 0, n_queries + 1)
    if out is not None:
        check_tensor("out", out, dtype=q.dtype, shape=q.shape, device=q.device, dense=True)
    scale = head_dim**-0.5 if scale is None else scale
    refuse_unless(0 < scale < math.inf, f"scale is {scale}, not above zero")
    return scale


def attention_cost(
    batch: int, n_queries: int, n_heads: int, n_kv_heads: int, n_keys: int, head_dim: int, itemsize: int
) -> Cost:
    """Queries and results once, and once the ``n_keys`` keys and values of each batch row that are in range."""
    values = batch * head_dim * (2 * n_queries * n_heads + 2 * n_keys * n_kv_heads)
    return Cost(bytes=values * itemsize, flops=4 * batch * n_queries * n_heads * n_keys * head_dim)
