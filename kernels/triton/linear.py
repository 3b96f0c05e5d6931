"""Linear layer with weights of 8 bits: float8 e4m3 codes and a scale for each output row."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from .check import FLOATS, check_tensor, refuse_unless
from .cost import Cost
from .float8 import UNDECODED, dot_over
from .launch import H200_SHARED_MEMORY, cdiv, launch, multiprocessors, shared_memory


@triton.jit
def _merge_parts(
    acc, partial_ptr, counter_at, unit, split, n_splits, m_tiles, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Leave this unit's part of a tile; the program that leaves the last one sums them, in order. ``(sum, is last)``.

    A tile's parts are ``m_tiles`` units apart. The counter is left at zero for the next launch.
    """
    size = BLOCK_M * BLOCK_N
    at = partial_ptr + tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    tl.store(at + tl.cast(unit, tl.int64) * size, acc)
    tl.debug_barrier()  # all threads' stores come before the one thread's release
    last = tl.atomic_add(counter_at, 1, sem="acq_rel") == n_splits - 1
    total = tl.full([BLOCK_N, BLOCK_M], 0.0, tl.float32)
    for part in range(0, tl.where(last, n_splits, 0)):
        from_unit = unit + (part - split) * m_tiles
        total += tl.load(at + tl.cast(from_unit, tl.int64) * size, cache_modifier=".cg")
    if last:
        tl.store(counter_at, 0)
    return total, last


@triton.jit(do_not_specialize=["n_rows", "n_splits"])
def _linear_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    residual_ptr,
    count_ptr,
    partial_ptr,
    counters_ptr,
    out_ptr,
    n_rows,
    n_out,
    n_in,
    n_splits,
    stride_x_row,
    stride_residual_row,
    stride_out_row,
    HAS_RESIDUAL: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    HAS_SPLITS: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = n_rows
    if HAS_COUNT:
        rows = tl.minimum(tl.maximum(tl.load(count_ptr), 0), n_rows)
    m_tiles = tl.cdiv(rows, BLOCK_M)
    n_blocks = tl.cdiv(n_in, BLOCK_K)
    n_units = m_tiles * tl.cdiv(n_out, BLOCK_N) * n_splits
    native: tl.constexpr = cuda_capability_geq(8, 9) if NATIVE_FP8 is None else NATIVE_FP8
    # row tiles innermost: programs that need the same weights run at the same time, and find them in L2
    for unit in range(tl.program_id(0), n_units, tl.num_programs(0)):
        m_tile = unit % m_tiles
        split = unit // m_tiles % n_splits
        n_tile = unit // (m_tiles * n_splits)
        row = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        column = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = dot_over(
            x_ptr,
            weight_ptr,
            tl.minimum(row, rows - 1),  # past the end the last row is repeated; its result is not stored
            tl.minimum(column, n_out - 1),
            n_in,
            stride_x_row,
            split * n_blocks // n_splits,
            (split + 1) * n_blocks // n_splits,
            native,
            EVEN_K,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
        last = True
        if HAS_SPLITS:
            counter_at = counters_ptr + n_tile * m_tiles + m_tile
            acc, last = _merge_parts(acc, partial_ptr, counter_at, unit, split, n_splits, m_tiles, BLOCK_M, BLOCK_N)
        if last:
            scale = tl.load(scale_ptr + column, mask=column < n_out, other=0.0)
            if not native:
                scale *= UNDECODED
            out = tl.trans(acc * scale[:, None])
            row_at = row.to(tl.int64)[:, None]
            inside = (row_at < rows) & (column < n_out)[None, :]
            if HAS_RESIDUAL:
                at = residual_ptr + row_at * stride_residual_row + column[None, :]
                out += tl.load(at, mask=inside, other=0.0).to(tl.float32)
            tl.store(out_ptr + row_at * stride_out_row + column[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


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
    shared: int = H200_SHARED_MEMORY,
) -> LinearConfig:
    """Tiles of 128 weight rows, two groups of four warps with 64 each, by all rows of x up to 128.

    Every tile reads its rows of x anew, from L2. Narrower weight tiles would fill the GPU more evenly but multiply
    that: at 128 rows of x, tiles of 32 read eight bytes of x for each of weights. So tiles stay wide and K is split
    instead, into as many parts as give the busiest program the fewest bytes: weights and x, the parts that are written
    and merged, and for each unit 32 KiB, which its share of memory bandwidth moves in the microsecond or so
    that its pipeline takes to fill and drain. A 4,096-wide output has 32 tiles and becomes 128 units for 132
    multiprocessors.

    Stages fill 150 KiB, or what a block may have (``shared``) less 16, or come to six: two to three tiles of weights,
    32 to 48 KiB, are under way at 128 rows, and more below. Blocks of K are halved where two stages would be all.
    float32, whose products take no tensor core here, and a K that is no multiple of 128, whose loads may be as narrow
    as a byte, take more registers and get small tiles.
    """
    block_m = min(128, max(16, triton.next_power_of_2(n_rows)))
    block_n = block_k = 128
    if itemsize == 4 or n_in % block_k:
        return LinearConfig(min(32, block_m), 64, 32, n_splits=1, num_stages=3, num_warps=4)
    room = min(150 * 1024, shared - 16 * 1024)
    if room < 2 * (block_n + itemsize * block_m) * block_k:
        block_k = 64
    n_blocks = cdiv(n_in, block_k)
    tiles = cdiv(n_rows, block_m) * cdiv(n_out, block_n)
    stage = (block_n + itemsize * block_m) * block_k

    def busiest(n_splits: int) -> int:
        streamed = stage * cdiv(n_blocks, n_splits)
        merged = 2 * 4 * block_m * block_n if n_splits > 1 else 0
        return cdiv(tiles * n_splits, n_multiprocessors) * (streamed + merged + 32 * 1024)

    return LinearConfig(
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        n_splits=min(range(1, min(8, n_blocks) + 1), key=busiest),
        num_stages=min(6, 1 + room // stage),
        num_warps=8,
    )


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    config: LinearConfig | None = None,
) -> torch.Tensor:
    """``x @ (weight * scale[:, None])^T``, plus ``residual`` if given; all of it in float32 and cast once.

    The codes of e4m3 are exact in every dtype of ``x``. The sum over K is in a fixed order for a given config.

    Args:
        x: ``[M, K]``, float32, float16 or bfloat16.
        weight: ``[N, K]``, float8_e4m3fn, dense. Its two codes for NaN mean +-480 where the GPU is older than sm_89.
        scale: ``[N]``, float32.
        residual: ``[M, N]`` in the dtype of ``x``; only read.
        count: ``[1]``, int32; only the first ``count`` rows (at most M) are computed, the others of ``out`` stay as
            they are. None: all rows.
        counters: int32 zeros, at least one for each tile of the result, for configs that split K; left zero. They
            belong to one launch at a time. Allocated if None. (Such configs allocate float32 scratch for the parts.)
        out: ``[M, N]`` in the dtype of ``x``; allocated if None. May be ``residual``, but not ``x``.

    NaN and infinities in ``x`` and ``residual`` go where the equation takes them, and stay in their row.
    """
    check_tensor("x", x, dtype=FLOATS, shape=[None, None])
    n_rows, n_in = x.shape
    check_tensor("weight", weight, dtype=torch.float8_e4m3fn, shape=[None, n_in], device=x.device, dense=True)
    n_out = weight.shape[0]
    refuse_unless(n_out > 0 and n_in > 0, f"weight has shape {list(weight.shape)}, and no elements")
    check_tensor("scale", scale, dtype=torch.float32, shape=[n_out], device=x.device)
    if residual is not None:
        check_tensor("residual", residual, dtype=x.dtype, shape=[n_rows, n_out], device=x.device)
    if count is not None:
        check_tensor("count", count, dtype=torch.int32, shape=[1], device=x.device)
    if out is None:
        out = torch.empty(n_rows, n_out, dtype=x.dtype, device=x.device)
    check_tensor("out", out, dtype=x.dtype, shape=[n_rows, n_out], device=x.device)
    if n_rows == 0:
        return out
    programs = multiprocessors(x.device)
    sizes = {"itemsize": x.dtype.itemsize, "shared": shared_memory(x.device)}
    config = config or linear_config(n_rows, n_out, n_in, programs, **sizes)
    tiles = cdiv(n_rows, config.BLOCK_M) * cdiv(n_out, config.BLOCK_N)
    units = tiles * config.n_splits
    splits = config.n_splits > 1
    if counters is None and splits:
        counters = torch.zeros(tiles, dtype=torch.int32, device=x.device)
    if counters is not None:
        check_tensor("counters", counters, dtype=torch.int32, shape=[None], device=x.device)
        refuse_unless(counters.numel() >= tiles, f"counters has {counters.numel()} elements, fewer than {tiles} tiles")
    partial_shape = units, config.BLOCK_N, config.BLOCK_M
    launch(
        _linear_kernel,
        (min(units, programs),),
        x_ptr=x,
        weight_ptr=weight.view(torch.uint8),
        scale_ptr=scale,
        residual_ptr=residual,
        count_ptr=count,
        partial_ptr=torch.empty(partial_shape, dtype=torch.float32, device=x.device) if splits else None,
        counters_ptr=counters if splits else None,
        out_ptr=out,
        n_rows=n_rows,
        n_out=n_out,
        n_in=n_in,
        n_splits=config.n_splits,
        stride_x_row=x.stride(0),
        stride_residual_row=0 if residual is None else residual.stride(0),
        stride_out_row=out.stride(0),
        HAS_RESIDUAL=residual is not None,
        HAS_COUNT=count is not None,
        HAS_SPLITS=splits,
        NATIVE_FP8=config.NATIVE_FP8,
        EVEN_K=n_in % config.BLOCK_K == 0,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        num_stages=config.num_stages,
        num_warps=config.num_warps,
        # all there are: ptxas may spill a little to make room for a second program, but only one runs at a time
        maxnreg=min(255, 2048 // config.num_warps),
    )
    return out


def linear_cost(n_rows: int, n_out: int, n_in: int, itemsize: int, residual: bool = False) -> Cost:
    """The weights' codes and scales, rows in and out, and the residual if there is one."""
    columns = n_in + (2 if residual else 1) * n_out
    return Cost(bytes=n_out * (n_in + 4) + n_rows * columns * itemsize, flops=2 * n_rows * n_out * n_in)
