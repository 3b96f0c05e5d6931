"""Linear layers with weights in any format of :mod:`.dot`, and the operations around a product in the same launch.

One kernel has four endings: the plain one, which adds a residual; a sum that is prepared for the next layer's norm;
a gated activation; and heads that are rotated and stored in a cache. A layer of a transformer is five launches so:
heads, attention, sum, activation, sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .check import FLOATS, INTEGERS, check_index, check_tensor, checked_once, refuse_unless
from .cost import Cost
from .dequantise import check_groups
from .dot import dot_over, format_of, row_scale
from .int4 import dot_over_groups
from .launch import H200_SHARED_MEMORY, cdiv, launch, multiprocessors, shared_memory


@triton.jit
def _leave_part(acc, partial_ptr, counter_at, unit, n_splits, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Leave this unit's part of a tile; true for the program that leaves the last one.

    The counter is left at zero for the next launch.
    """
    at = partial_ptr + tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    tl.store(at + tl.cast(unit, tl.int64) * (BLOCK_M * BLOCK_N), acc)
    tl.debug_barrier()  # all threads' stores come before the one thread's release
    last = tl.atomic_add(counter_at, 1, sem="acq_rel") == n_splits - 1
    if last:
        tl.store(counter_at, 0)
    return last


@triton.jit
def _sum_parts(
    partial_ptr,
    unit,
    split,
    n_splits,
    m_tiles,
    index: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Sum a slice of a tile's parts, which are ``m_tiles`` units apart, in order."""
    row = index * BLOCK_S + tl.arange(0, BLOCK_S)[:, None]
    at = partial_ptr + row * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    total = tl.full([BLOCK_S, BLOCK_M], 0.0, tl.float32)
    for part in range(0, n_splits):
        from_unit = unit + (part - split) * m_tiles
        total += tl.load(at + tl.cast(from_unit, tl.int64) * (BLOCK_M * BLOCK_N), cache_modifier=".cg")
    return total


@triton.jit
def _slice(acc, index: tl.constexpr, BLOCK_S: tl.constexpr):
    """A slice of a tile's rows: what an ending needs for a wide tile does not fit into registers."""
    if acc.shape[0] > BLOCK_S:
        HALF: tl.constexpr = acc.shape[0] // 2
        low, high = tl.split(tl.permute(tl.reshape(acc, [2, HALF, acc.shape[1]]), [1, 2, 0]))
        if index < HALF // BLOCK_S:
            acc = _slice(low, index, BLOCK_S)
        else:
            acc = _slice(high, index - HALF // BLOCK_S, BLOCK_S)
    return acc


@triton.jit
def _halves(acc):
    """Both results of each pair in a tile of :func:`_weight_rows`, ``[BLOCK_M, BLOCK_N / 2]`` each.

    Rows 8 apart are in one thread's registers after a product by tensor cores, so nothing moves.
    """
    N: tl.constexpr = acc.shape[0]
    M: tl.constexpr = acc.shape[1]
    low, high = tl.split(tl.permute(tl.reshape(acc, [N // 16, 2, 8, M]), [0, 2, 3, 1]))
    return tl.trans(tl.reshape(low, [N // 2, M])), tl.trans(tl.reshape(high, [N // 2, M]))


@triton.jit
def _norm_factor(squares_ptr, row, rows, n_rows, n_parts, n_in, eps, BLOCK_P: tl.constexpr):
    """Compute the factor per row that finishes a norm."""
    part = tl.arange(0, BLOCK_P)[:, None]
    at = squares_ptr + part.to(tl.int64) * n_rows + row[None, :]
    squares = tl.load(at, mask=(part < n_parts) & (row < rows)[None, :], other=0.0)
    return tl.rsqrt(tl.sum(squares, axis=0) / n_in + eps)


@triton.jit
def _weight_rows(n_tile, n_out, ENDING: tl.constexpr, HALF: tl.constexpr, BLOCK_N: tl.constexpr):
    """The rows of the weights in a tile. Those whose results go together are 8 apart: the two channels of a rotation,
    HALF apart in memory, or gate and up."""
    lane = tl.arange(0, BLOCK_N)
    row = n_tile * BLOCK_N + lane
    pair = n_tile * (BLOCK_N // 2) + lane // 16 * 8 + lane % 8
    second = lane // 8 % 2
    if ENDING == "heads":
        row = pair // HALF * (2 * HALF) + pair % HALF + second * HALF
    if ENDING == "gated":
        row = tl.where(pair < n_out // 2, pair + second * (n_out // 2), n_out)
    return row


@triton.jit
def _store_sum(
    total,
    row,
    rows,
    n_tile,
    n_rows,
    n_out,
    stride_out_row,
    out_ptr,
    gain_ptr,
    scaled_ptr,
    out_squares_ptr,
    HAS_NORM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Store results ``[BLOCK_M, BLOCK_N]``; with HAS_NORM also their products with the gain, and sums of squares."""
    column = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < rows)[:, None] & (column < n_out)[None, :]
    row_at = row.to(tl.int64)[:, None]
    x = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row_at * stride_out_row + column[None, :], x, mask=inside)
    if HAS_NORM:
        wide = x.to(tl.float32)
        gain = tl.load(gain_ptr + column, mask=column < n_out, other=0.0).to(tl.float32)
        tl.store(scaled_ptr + row_at * n_out + column[None, :], (wide * gain[None, :]).to(x.dtype), mask=inside)
        squares = tl.sum(tl.where(inside, wide * wide, 0.0), axis=1)
        rows = tl.where(n_tile * BLOCK_N < n_out, rows, 0)  # the last tile may have slices past the end
        tl.store(out_squares_ptr + n_tile.to(tl.int64) * n_rows + row, squares, mask=row < rows)


@triton.jit
def _store_gated(gate, up, row, rows, n_tile, n_out, stride_out_row, out_ptr, BLOCK_N: tl.constexpr):
    """Store ``silu(gate) * up``."""
    column = n_tile * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    inside = (row < rows)[:, None] & (column < n_out // 2)[None, :]
    product = gate / (1.0 + tl.exp(-gate)) * up
    at = out_ptr + row.to(tl.int64)[:, None] * stride_out_row + column[None, :]
    tl.store(at, product.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _store_heads(
    low,
    high,
    row,
    rows,
    n_tile,
    n_out,
    cos_ptr,
    sin_ptr,
    position_ptr,
    cache_row_ptr,
    out_ptr,
    k_cache_ptr,
    v_cache_ptr,
    n_positions,
    n_heads,
    n_rotated,
    strides,
    HAS_POSITION: tl.constexpr,
    HAS_OUT: tl.constexpr,
    HAS_CACHE: tl.constexpr,
    HAS_CACHE_ROW: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Rotate queries and keys; store queries, and without caches keys and values too, to ``out``, else to the caches.

    ``n_heads`` are in ``out``, the first ``n_rotated`` of all are rotated.
    """
    out_row, position_batch, position_row, k_batch, k_row, k_head, v_batch, v_row, v_head = strides
    pair = n_tile * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    head = (pair // HALF)[None, :]
    channel = (pair % HALF)[None, :]
    live = (row < rows)[:, None] & (pair < n_out // 2)[None, :]
    batch = row // n_positions
    place = (row % n_positions).to(tl.int64)
    if HAS_POSITION:
        at = position_ptr + batch.to(tl.int64) * position_batch + place * position_row
        place = tl.load(at, mask=row < rows, other=-1).to(tl.int64)
    there = live & (place >= 0)[:, None]  # an idle row is neither rotated nor stored in a cache
    place = tl.maximum(place, 0)
    rotated = there & (head < n_rotated)
    angle = place[:, None] * (2 * HALF) + channel
    cos = tl.load(cos_ptr + angle, mask=rotated, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=rotated, other=0.0)
    turned = tl.where(rotated, low * cos - high * sin, low)
    high = tl.where(rotated, high * cos + low * sin, high)
    low = turned
    if HAS_OUT:
        dtype = out_ptr.dtype.element_ty
        at = out_ptr + row.to(tl.int64)[:, None] * out_row + head * (2 * HALF) + channel
        tl.store(at, low.to(dtype), mask=live & (head < n_heads))
        tl.store(at + HALF, high.to(dtype), mask=live & (head < n_heads))
    if HAS_CACHE:
        dtype = k_cache_ptr.dtype.element_ty
        cache_row = batch.to(tl.int64)
        if HAS_CACHE_ROW:
            cache_row = tl.load(cache_row_ptr + batch, mask=row < rows, other=0).to(tl.int64)
        head = head.to(tl.int64)
        key = there & (head >= n_heads) & (head < n_rotated)
        at = k_cache_ptr + (cache_row * k_batch + place * k_row)[:, None] + (head - n_heads) * k_head + channel
        tl.store(at, low.to(dtype), mask=key)
        tl.store(at + HALF, high.to(dtype), mask=key)
        value = there & (head >= n_rotated)
        at = v_cache_ptr + (cache_row * v_batch + place * v_row)[:, None] + (head - n_rotated) * v_head + channel
        tl.store(at, low.to(dtype), mask=value)
        tl.store(at + HALF, high.to(dtype), mask=value)


@triton.jit(
    do_not_specialize=[
        "n_rows",
        "n_splits",
        "n_parts",
        "eps",
        "n_positions",
        "n_heads",
        "n_rotated",
        "stride_position_batch",
        "stride_position_row",
    ],
    do_not_specialize_on_alignment=["position_ptr"],
)
def _linear_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    zero_ptr,
    squares_ptr,
    bias_ptr,
    residual_ptr,
    count_ptr,
    gain_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    cache_row_ptr,
    partial_ptr,
    counters_ptr,
    out_ptr,
    scaled_ptr,
    out_squares_ptr,
    k_cache_ptr,
    v_cache_ptr,
    n_rows,
    n_out,
    n_in,
    n_splits,
    n_parts,
    n_positions,
    n_heads,
    n_rotated,
    stride_x_row,
    stride_scale_group,
    stride_residual_row,
    stride_out_row,
    stride_position_batch,
    stride_position_row,
    stride_k_batch,
    stride_k_row,
    stride_k_head,
    stride_v_batch,
    stride_v_row,
    stride_v_head,
    eps,
    FORMAT: tl.constexpr,
    ENDING: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_SQUARES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    HAS_OUT: tl.constexpr,
    HAS_CACHE: tl.constexpr,
    HAS_CACHE_ROW: tl.constexpr,
    HAS_SPLITS: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    EVEN_K: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    rows = n_rows
    if HAS_COUNT:
        rows = tl.minimum(tl.maximum(tl.load(count_ptr), 0), n_rows)
    m_tiles = tl.cdiv(rows, BLOCK_M)
    n_blocks = tl.cdiv(n_in, BLOCK_K)
    n_units = m_tiles * tl.cdiv(n_out, BLOCK_N) * n_splits
    # row tiles innermost: programs that need the same weights run at the same time, and find them in L2
    for unit in range(tl.program_id(0), n_units, tl.num_programs(0)):
        m_tile = unit % m_tiles
        split = unit // m_tiles % n_splits
        n_tile = unit // (m_tiles * n_splits)
        row = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        weight_row = _weight_rows(n_tile, n_out, ENDING, HALF, BLOCK_N)
        x_row = tl.minimum(row, rows - 1)  # past the end the last row is repeated; its result is not stored
        weight_row = tl.minimum(weight_row, n_out - 1)
        first, last_block = split * n_blocks // n_splits, (split + 1) * n_blocks // n_splits
        if FORMAT == "int4":
            acc = dot_over_groups(
                x_ptr, weight_ptr, scale_ptr, zero_ptr, x_row, weight_row, n_in, stride_x_row, stride_scale_group,
                first, last_block, HAS_ZERO, GROUP, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            acc = dot_over(
                x_ptr, weight_ptr, x_row, weight_row, n_in, stride_x_row,
                first, last_block, FORMAT, NATIVE_FP8, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        last = True
        if HAS_SPLITS:
            counter_at = counters_ptr + n_tile * m_tiles + m_tile
            last = _leave_part(acc, partial_ptr, counter_at, unit, n_splits, BLOCK_M, BLOCK_N)
        if last:
            for index in tl.static_range(BLOCK_N // BLOCK_S):
                if index > 0:
                    tl.debug_barrier()  # keeps the compiler from taking slices at once, for which registers are few
                if HAS_SPLITS:
                    part = _sum_parts(
                        partial_ptr, unit, split, n_splits, m_tiles, index, BLOCK_M, BLOCK_N, BLOCK_S
                    )  # fmt: skip
                else:
                    part = _slice(acc, index, BLOCK_S)
                tile = n_tile * (BLOCK_N // BLOCK_S) + index
                column = _weight_rows(tile, n_out, ENDING, HALF, BLOCK_S)
                if FORMAT == "fp8":
                    part *= row_scale(scale_ptr, column, column < n_out, FORMAT, NATIVE_FP8)[:, None]
                if HAS_SQUARES:
                    part *= _norm_factor(squares_ptr, row, rows, n_rows, n_parts, n_in, eps, BLOCK_P)[None, :]
                if HAS_BIAS:
                    part += tl.load(bias_ptr + column, mask=column < n_out, other=0.0).to(tl.float32)[:, None]
                if ENDING == "heads":
                    low, high = _halves(part)
                    strides = (
                        stride_out_row, stride_position_batch, stride_position_row,
                        stride_k_batch, stride_k_row, stride_k_head, stride_v_batch, stride_v_row, stride_v_head,
                    )  # fmt: skip
                    _store_heads(
                        low, high, row, rows, tile, n_out, cos_ptr, sin_ptr, position_ptr, cache_row_ptr, out_ptr,
                        k_cache_ptr, v_cache_ptr, n_positions, n_heads, n_rotated, strides,
                        HAS_POSITION, HAS_OUT, HAS_CACHE, HAS_CACHE_ROW, HALF, BLOCK_S,
                    )  # fmt: skip
                elif ENDING == "gated":
                    gate, up = _halves(part)
                    _store_gated(gate, up, row, rows, tile, n_out, stride_out_row, out_ptr, BLOCK_S)
                else:
                    out = tl.trans(part)
                    if HAS_RESIDUAL:
                        at = residual_ptr + row.to(tl.int64)[:, None] * stride_residual_row + column[None, :]
                        inside = (row < rows)[:, None] & (column < n_out)[None, :]
                        out += tl.load(at, mask=inside, other=0.0).to(tl.float32)
                    _store_sum(
                        out, row, rows, tile, n_rows, n_out, stride_out_row, out_ptr, gain_ptr, scaled_ptr,
                        out_squares_ptr, ENDING == "norm", BLOCK_S,
                    )  # fmt: skip


@dataclass(frozen=True)
class LinearConfig:
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    n_splits: int
    num_stages: int
    num_warps: int
    NATIVE_FP8: bool | None = None  # None: where the GPU converts e4m3 itself, sm_89 and later


@lru_cache(1024)
def linear_config(
    n_rows: int,
    n_out: int,
    n_in: int,
    n_multiprocessors: int,
    *,
    itemsize: int = 2,
    weight_itemsize: float = 1,
    group: int | None = None,
    shared: int = H200_SHARED_MEMORY,
    wide: bool = True,
) -> LinearConfig:
    """Tiles of 128 or 256 weight rows, for two groups of four warps, by all rows of x up to 128.

    Every tile reads its rows of x anew, from L2. Narrower weight tiles would fill the GPU more evenly but multiply
    that: at 128 rows of x, tiles of 32 read eight bytes of x for each of fp8 weights, tiles of 128 two. So tiles stay
    wide and K is split instead, into as many parts as give the busiest program the fewest bytes: weights and x, the
    parts that are written and merged, and for each unit 32 KiB, which its share of memory bandwidth moves in the
    microsecond or so that its pipeline takes to fill and drain. A 4,096-wide output has 32 tiles of 128 and becomes 128
    units for 132 multiprocessors. 256 rows take half of all registers for sums, so they need weights that are not
    decoded, an ending that does with the rest (``wide``), and shared memory for three blocks of K. Other endings have
    shorter blocks of K at 128 rows.

    Stages fill 150 KiB, or what a block may have (``shared``) less 16, or come to six, or to seven of 32. Blocks of K
    are halved where two stages would be all. float32, whose products take no tensor core here, and a K that is no
    multiple of 128, whose loads may be as narrow as a byte, take more registers and get small tiles. On one processor
    (the interpreter) the work is in as few pieces as possible. A block of K is in one ``group`` of weights in 4 bits.
    """
    block_m = min(128, max(16, triton.next_power_of_2(n_rows)))
    if n_multiprocessors == 1:
        block_n, block_k = (min(1024, max(16, triton.next_power_of_2(size))) for size in (n_out, group or n_in))
        return LinearConfig(block_m, block_n, block_k, n_splits=1, num_stages=1, num_warps=8)
    if itemsize == 4 or n_in % 128:
        return LinearConfig(min(32, block_m), 64, 32, n_splits=1, num_stages=3, num_warps=4)
    room = min(150 * 1024, shared - 16 * 1024)

    def blocks(block_n: int) -> tuple[int, int]:
        """Return the size of a block of K, and the bytes of a stage."""
        row = block_n * weight_itemsize + block_m * itemsize
        narrow = block_n == 128 and (wide or block_m < 128)
        block_k = min(group or 128, 128 if narrow and room >= 2 * 128 * row else 64)
        if weight_itemsize <= 1 and block_m == 128 and not wide:  # one of 64 spills on sm_100
            block_k = 32
        return block_k, int(block_k * row)

    def busiest(choice: tuple[int, int]) -> int:
        block_n, n_splits = choice
        block_k, stage = blocks(block_n)
        tiles = cdiv(n_rows, block_m) * cdiv(n_out, block_n)
        streamed = stage * cdiv(cdiv(n_in, block_k), n_splits)
        merged = 2 * 4 * block_m * block_n if n_splits > 1 else 0
        return cdiv(tiles * n_splits, n_multiprocessors) * (streamed + merged + 32 * 1024)

    widths = [128, 256] if wide and weight_itemsize > 1 and block_m == 128 and room >= 3 * blocks(256)[1] else [128]
    splits = range(1, min(8, cdiv(n_in, 128)) + 1)
    block_n, n_splits = min(((width, n) for width in widths for n in splits), key=busiest)
    block_k, stage = blocks(block_n)
    most = 7 if block_k == 32 else 6
    return LinearConfig(block_m, block_n, block_k, n_splits, min(most, 1 + room // stage), num_warps=8)


class Normed(NamedTuple):
    """Rows that a norm's gain has been applied to and its factor per row has not: that one is applied to a product.

    The factor of row ``m`` is ``1 / sqrt(squares[:, m].sum() / K + eps)``.
    """

    values: torch.Tensor  # [M, K]
    squares: torch.Tensor  # [P, M], float32, dense
    eps: float


class _Work(NamedTuple):
    """Sizes and arguments that follow from the layouts of a launch's tensors."""

    programs: int  # 0: nothing to do
    tiles: int
    parts: tuple[int, ...] | None  # shape of the partial results
    n_slices: int  # along the columns of the result
    fixed: dict[str, Any]  # arguments


@checked_once
def _work(x, weight, scale, zero, squares, bias, count, ending, wide, half, config, machine) -> _Work:
    """Check the operands of a product; choose its tiles."""
    check_tensor("x", x, dtype=FLOATS, shape=[None, None])
    n_rows, n_in = x.shape
    form = format_of(weight)
    if form == "int4":
        dtype, width = torch.uint8, n_in // 2
    else:
        dtype, width = torch.float8_e4m3fn if form == "fp8" or scale is not None else x.dtype, n_in
    check_tensor("weight", weight, dtype=dtype, shape=[None, width], device=x.device, dense=True)
    n_out = weight.shape[0]
    refuse_unless(n_out > 0 and n_in > 0, f"weight has shape {list(weight.shape)}, and no elements")
    if form == "fp8":
        check_tensor("scale", scale, dtype=torch.float32, shape=[n_out], device=x.device)
    group = check_groups(n_in, weight, scale, zero) if form == "int4" else None
    refuse_unless(zero is None or group is not None, "zero is given, and weight is not in 4 bits")
    if squares is not None:
        check_tensor("squares", squares, dtype=torch.float32, shape=[None, n_rows], device=x.device, dense=True)
    if bias is not None:
        check_tensor("bias", bias, dtype=x.dtype, shape=[n_out], device=x.device)
    if count is not None:
        check_tensor("count", count, dtype=torch.int32, shape=[1], device=x.device)
    n_multiprocessors, shared = machine
    sizes = {"itemsize": x.element_size(), "weight_itemsize": weight.element_size(), "shared": shared, "wide": wide}
    if group is not None:
        sizes |= {"weight_itemsize": 0.5, "group": group}
    config = config or linear_config(max(1, n_rows), n_out, n_in, n_multiprocessors, **sizes)
    whole = group is None or group % config.BLOCK_K == 0
    refuse_unless(whole, f"config has BLOCK_K={config.BLOCK_K}, which does not divide groups of {group}")
    tiles = cdiv(n_rows, config.BLOCK_M) * cdiv(n_out, config.BLOCK_N)
    block_s = 32 if config.BLOCK_N == 256 else config.BLOCK_N  # slices of 64 spill on sm_100
    splits, n_parts = config.n_splits > 1, 0 if squares is None else squares.shape[0]
    fixed = {
        "n_rows": n_rows,
        "n_out": n_out,
        "n_in": n_in,
        "n_splits": config.n_splits,
        "n_parts": n_parts,
        "stride_x_row": x.stride(0),
        "stride_scale_group": 0 if group is None else scale.stride(0),
        "FORMAT": form,
        "ENDING": ending,
        "HAS_ZERO": zero is not None,
        "HAS_SQUARES": squares is not None,
        "HAS_BIAS": bias is not None,
        "HAS_COUNT": count is not None,
        "HAS_SPLITS": splits,
        "NATIVE_FP8": config.NATIVE_FP8,
        "EVEN_K": n_in % config.BLOCK_K == 0,
        "GROUP": group or 0,
        "HALF": half,
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_K": config.BLOCK_K,
        "BLOCK_P": triton.next_power_of_2(max(1, n_parts)),
        "BLOCK_S": block_s,
        "num_stages": config.num_stages,
        "num_warps": config.num_warps,
        # all there are: ptxas may spill a little to make room for a second program, but only one runs at a time
        "maxnreg": min(255, 2048 // config.num_warps),
    }
    units = tiles * config.n_splits
    parts = (units, config.BLOCK_N, config.BLOCK_M) if splits else None
    return _Work(min(units, n_multiprocessors), tiles, parts, cdiv(n_out, block_s), fixed)


_ABSENT = {
    **dict.fromkeys(("residual_ptr", "gain_ptr", "cos_ptr", "sin_ptr", "position_ptr", "cache_row_ptr")),
    **dict.fromkeys(("scaled_ptr", "out_squares_ptr", "k_cache_ptr", "v_cache_ptr")),
    **dict.fromkeys(("n_positions", "n_heads", "n_rotated", "stride_residual_row", "stride_out_row"), 0),
    **{f"stride_{name}": 0 for name in ("position_batch", "position_row", "k_batch", "k_row", "k_head")},
    **{f"stride_{name}": 0 for name in ("v_batch", "v_row", "v_head")},
    **dict.fromkeys(("HAS_RESIDUAL", "HAS_POSITION", "HAS_OUT", "HAS_CACHE", "HAS_CACHE_ROW"), False),
}


def _start(
    work: _Work,
    x: torch.Tensor | Normed,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    count: torch.Tensor | None,
    counters: torch.Tensor | None,
    **ending: Any,
) -> None:
    """Launch the kernel; ``ending`` are the arguments that are not those of every product."""
    values = x.values if isinstance(x, Normed) else x
    device, partial = values.device, None
    if counters is not None:
        check_tensor("counters", counters, dtype=torch.int32, shape=[None], device=device)
    if work.parts is not None:
        if counters is None or counters.numel() < work.tiles:
            counters = torch.zeros(work.tiles, dtype=torch.int32, device=device)
        partial = torch.empty(work.parts, dtype=torch.float32, device=device)
    launch(
        _linear_kernel,
        (work.programs,),
        x_ptr=values,
        weight_ptr=weight if scale is None else weight.view(torch.uint8),
        scale_ptr=scale,
        zero_ptr=zero,
        squares_ptr=x.squares if isinstance(x, Normed) else None,
        bias_ptr=bias,
        count_ptr=count,
        partial_ptr=partial,
        counters_ptr=None if partial is None else counters,
        eps=x.eps if isinstance(x, Normed) else 0.0,
        **(_ABSENT | work.fixed | ending),
    )


def _product(x, weight, scale, zero, bias, count, ending: str, config, *, wide: bool = True, half: int = 0) -> _Work:
    values, squares = (x.values, x.squares) if isinstance(x, Normed) else (x, None)
    machine = multiprocessors(values.device), shared_memory(values.device)
    return _work(values, weight, scale, zero, squares, bias, count, ending, wide, half, config, machine)


def linear(
    x: torch.Tensor | Normed,
    weight: torch.Tensor,
    scale: torch.Tensor | None = None,
    zero: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    config: LinearConfig | None = None,
) -> torch.Tensor:
    """``x @ W^T``, plus ``bias`` and ``residual`` if given; sums are in float32 and cast once.

    ``W`` is ``weight * scale[:, None]``; the codes of e4m3 are exact in every dtype of ``x``. In 4 bits it is
    ``(code - zero) * scale`` of each group, rounded to the dtype of ``x`` once. The sum over K is in a fixed order for
    a given config.

    Args:
        x: ``[M, K]``, float32, float16 or bfloat16; or :class:`Normed`, whose values these are.
        weight: ``[N, K]``, dense, in the dtype of ``x``; with ``scale`` float8_e4m3fn, whose two codes for NaN mean
            +-480 where the GPU is older than sm_89. Or ``[N, K / 2]``, uint8, dense: two codes per byte (:mod:`.int4`).
        scale: ``[N]``, float32; of 4 bits ``[groups, N]``, of 32, 64 or 128 weights each, with any stride of groups.
        zero: codes of zero, uint8, with the shape and strides of ``scale``; None: 8.
        bias: ``[N]`` in the dtype of ``x``.
        residual: ``[M, N]`` in the dtype of ``x``; only read.
        count: ``[1]``, int32; only the first ``count`` rows (at most M) are computed, the others of ``out`` stay as
            they are. None: all rows.
        counters: int32 zeros, one for each tile of the result, for configs that split K; left zero. They belong to one
            launch at a time. Allocated if None or too few. (Such configs allocate float32 scratch for the parts.)
        out: ``[M, N]`` in the dtype of ``x``; allocated if None. May be ``residual``, but not ``x``.

    NaN and infinities in ``x`` and ``residual`` go where the equation takes them, and stay in their row.
    """
    work = _product(x, weight, scale, zero, bias, count, "plain", config)
    values = x.values if isinstance(x, Normed) else x
    shape = values.shape[0], weight.shape[0]
    if out is None:
        out = torch.empty(shape, dtype=values.dtype, device=values.device)
    _check_results(values, shape, residual, out)
    if work.programs:
        _start(
            *(work, x, weight, scale, zero, bias, count, counters),
            residual_ptr=residual,
            out_ptr=out,
            stride_residual_row=0 if residual is None else residual.stride(0),
            stride_out_row=out.stride(0),
            HAS_RESIDUAL=residual is not None,
        )
    return out


def linear_normed(
    x: torch.Tensor | Normed,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    gain: torch.Tensor,
    eps: float,
    *,
    zero: torch.Tensor | None = None,
    residual: torch.Tensor,
    counters: torch.Tensor | None = None,
    config: LinearConfig | None = None,
) -> Normed:
    """``residual += x @ (weight * scale[:, None])^T``; return its RMS norm with ``gain [N]``, but for a factor per row.

    That factor needs whole rows, which no program has: the next product applies it. Squares are those of the sum as it
    is rounded to ``residual``'s dtype. In float16 values times gains may overflow where a norm would not.
    """
    work = _product(x, weight, scale, zero, None, None, "norm", config)
    values = x.values if isinstance(x, Normed) else x
    shape = values.shape[0], weight.shape[0]
    _check_results(values, shape, residual, residual)
    check_tensor("gain", gain, dtype=FLOATS, shape=[shape[1]], device=values.device)
    scaled = torch.empty(shape, dtype=values.dtype, device=values.device)
    squares = torch.empty((work.n_slices, shape[0]), dtype=torch.float32, device=values.device)
    if work.programs:
        _start(
            *(work, x, weight, scale, zero, None, None, counters),
            residual_ptr=residual,
            gain_ptr=gain,
            out_ptr=residual,
            scaled_ptr=scaled,
            out_squares_ptr=squares,
            stride_residual_row=residual.stride(0),
            stride_out_row=residual.stride(0),
            HAS_RESIDUAL=True,
        )
    return Normed(scaled, squares, eps)


@checked_once
def _check_results(x, shape, residual, out) -> None:
    for name, tensor in (("residual", residual), ("out", out)):
        if tensor is not None:
            check_tensor(name, tensor, dtype=x.dtype, shape=shape, device=x.device)


def linear_silu_mul(
    x: torch.Tensor | Normed,
    weight: torch.Tensor,
    scale: torch.Tensor | None = None,
    *,
    zero: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
    config: LinearConfig | None = None,
) -> torch.Tensor:
    """``silu(gate) * up`` for ``gate, up = linear(x, weight, scale).chunk(2, -1)``, in float32 and cast once.

    ``weight`` is ``[2 m, K]``, the rows of the gate first.
    """
    width = weight.shape[0] // 2
    refuse_unless(weight.shape[0] % 2 == 0, f"weight has {weight.shape[0]} rows, not an even number")
    work = _product(x, weight, scale, zero, None, None, "gated", config, wide=False)
    values = x.values if isinstance(x, Normed) else x
    out = torch.empty((values.shape[0], width), dtype=values.dtype, device=values.device)
    if work.programs:
        _start(*(work, x, weight, scale, zero, None, None, counters), out_ptr=out, stride_out_row=width)
    return out


def linear_heads(
    x: torch.Tensor | Normed,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position: torch.Tensor | None,
    *,
    zero: torch.Tensor | None = None,
    n_heads: int,
    n_kv_heads: int,
    n_positions: int,
    k_cache: torch.Tensor | None = None,
    v_cache: torch.Tensor | None = None,
    cache_row: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
    config: LinearConfig | None = None,
) -> torch.Tensor | None:
    """:func:`~sfs_triton.kernels.rope_cache.rope_cache` of ``linear(x, weight, scale, bias=bias)``.

    Args:
        x: ``[M, K]`` or :class:`Normed`: the rows of ``M / n_positions`` batch rows.
        weight, scale, zero, bias: of ``(n_heads + 2 n_kv_heads) D`` rows: queries, keys, values.
        cos, sin, position, k_cache, v_cache, cache_row: as for ``rope_cache``, with ``n = n_positions``.
        n_heads, n_kv_heads: either may be 0.

    Returns:
        ``[M, heads D]``: all heads, or with caches those of the queries; None if there are none.
    """
    values = x.values if isinstance(x, Normed) else x
    cached = k_cache is not None
    head_dim, n_stored = _check_heads(
        *(values, weight, cos, sin, position, n_heads, n_kv_heads, n_positions, k_cache, v_cache, cache_row)
    )
    work = _product(x, weight, scale, zero, bias, None, "heads", config, wide=False, half=head_dim // 2)
    out = None
    if n_stored:
        out = torch.empty((values.shape[0], n_stored * head_dim), dtype=values.dtype, device=values.device)
    if work.programs:
        k_strides, v_strides = (x.stride() if cached else (0, 0, 0) for x in (k_cache, v_cache))
        _start(
            *(work, x, weight, scale, zero, bias, None, counters),
            cos_ptr=cos,
            sin_ptr=sin,
            position_ptr=position,
            cache_row_ptr=cache_row,
            out_ptr=out,
            k_cache_ptr=k_cache,
            v_cache_ptr=v_cache,
            n_positions=n_positions,
            n_heads=n_stored,
            n_rotated=n_heads + n_kv_heads,
            stride_out_row=n_stored * head_dim,
            stride_position_batch=0 if position is None or position.dim() == 1 else position.stride(0),
            stride_position_row=0 if position is None else position.stride(-1),
            stride_k_batch=k_strides[0],
            stride_k_row=k_strides[1],
            stride_k_head=k_strides[2],
            stride_v_batch=v_strides[0],
            stride_v_row=v_strides[1],
            stride_v_head=v_strides[2],
            HAS_POSITION=position is not None,
            HAS_OUT=n_stored > 0,
            HAS_CACHE=cached,
            HAS_CACHE_ROW=cache_row is not None,
        )
    return out


@checked_once
def _check_heads(
    x, weight, cos, sin, position, n_heads, n_kv_heads, n_positions, k_cache, v_cache, cache_row
) -> tuple[int, int]:
    """Refuse what does not fit; return the width of a head, and how many are not stored in caches."""
    check_tensor("x", x, dtype=FLOATS, shape=[None, None])
    on = {"device": x.device}
    refuse_unless(n_positions > 0 and len(x) % n_positions == 0, f"n_positions={n_positions} for {len(x)} rows of x")
    n_all, batch = n_heads + 2 * n_kv_heads, len(x) // n_positions
    fits = n_all > 0 and len(weight) % (2 * n_all) == 0
    refuse_unless(fits, f"weight has {len(weight)} rows, which are not {n_all} heads of an even width")
    head_dim = len(weight) // n_all
    check_tensor("cos", cos, dtype=torch.float32, shape=[None, head_dim], dense=True, **on)
    check_tensor("sin", sin, dtype=torch.float32, shape=cos.shape, dense=True, **on)
    refuse_unless((k_cache is None) == (v_cache is None), "k_cache and v_cache go together: one is None")
    if position is None:
        refuse_unless(k_cache is None, "k_cache is given without position")
        refuse_unless(len(cos) >= n_positions, f"cos has {len(cos)} rows, fewer than {n_positions}")
        return head_dim, n_all
    check_tensor("position", position, dtype=INTEGERS, shape=[batch, n_positions][2 - position.dim() :], **on)
    length, rows = len(cos), batch
    if k_cache is not None:
        check_tensor("k_cache", k_cache, dtype=x.dtype, shape=[None, None, n_kv_heads, head_dim], **on)
        check_tensor("v_cache", v_cache, dtype=x.dtype, shape=k_cache.shape, **on)
        rows, length = k_cache.shape[0], min(length, k_cache.shape[1])
        refuse_unless(cache_row is not None or rows >= batch, f"k_cache has {rows} batch rows, fewer than {batch}")
    if cache_row is not None:
        check_tensor("cache_row", cache_row, dtype=INTEGERS, shape=[batch], **on)
        check_index("cache_row", cache_row, 0, rows)
    check_index("position", position, -1 if position.dim() == 2 else 0, length)
    return head_dim, n_all if k_cache is None else n_heads


_COLUMNS = {"product": (1, 1), "heads": (1, 1), "gated": (1, 2), "sum": (2, 1), "norm": (3, 1)}


def linear_cost(
    n_rows: int,
    n_out: int,
    n_in: int,
    itemsize: int,
    *,
    weight_itemsize: float = 1,
    group: int | None = None,
    ending: str = "product",
) -> Cost:
    """The weights (codes with their scales), the rows in, and the rows that the ending reads and writes."""
    times, over = _COLUMNS[ending]
    scales = n_in // (group or n_in) if weight_itemsize < itemsize else 0
    weights = int(n_out * (n_in * weight_itemsize + 4 * scales))
    moved = weights + n_rows * (n_in + times * n_out // over) * itemsize
    return Cost(bytes=moved, flops=2 * n_rows * n_out * n_in)
