"""Output projection with token choice, from hidden states to tokens, without logits in memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from .check import FLOATS, INTEGERS, check_index, check_tensor, checked_once, refuse_unless
from .cost import Cost
from .dot import dot_over, row_scale
from .launch import H200_SHARED_MEMORY, cdiv, launch, multiprocessors, shared_memory
from .partials import SCALE, Partials, live_rows, merge, shares, store_partials
from .philox import gumbel, noise_arguments
from .softmax_partial import NO_TOKEN, finite_or_zero, largest, max_of, result_of, sum_of, value_of


@triton.jit
def _absorb(found, x, first_id, noise, HAS_NOISE: tl.constexpr):
    """Merge the partial results of rows with a tile of logits of higher ids."""
    top, total, key, logit, winner = found
    ids = first_id + tl.arange(0, x.shape[1])[None, :]
    keys = x
    if HAS_NOISE:
        temperature_at, seed_at, position_at, step_at, live = noise
        # volatile keeps the loads, and all that follows from them, here: hoisted it takes registers for good
        seed = tl.load(seed_at, mask=live, other=0, volatile=True)
        position = tl.load(position_at, mask=live, other=0, volatile=True)
        step = tl.load(step_at, mask=live, other=0, volatile=True)
        drawn = gumbel(seed, ids, position, step)
        keys = x + drawn * tl.load(temperature_at, mask=live, other=1.0, volatile=True)
    tile_key, tile_winner = largest(keys, ids)
    better = tile_key > key  # an equal key keeps the lower id
    key = tl.where(better, tile_key, key)
    winner = tl.where(better, tile_winner, winner)
    if HAS_NOISE:
        logit = tl.where(better, value_of(x, ids, tile_winner), logit)
        tile_top = max_of(x)
        new_top = tl.where(tile_top > top, tile_top, top)
    else:
        logit, new_top = key, key
    base = finite_or_zero(new_top)
    total = total * tl.exp2((top - base) * SCALE) + sum_of(tl.exp2((x - base) * SCALE))
    return new_top, total, key, logit, winner


@triton.jit
def _absorb_slices(found, x, first_id, noise, HAS_NOISE: tl.constexpr, BLOCK_S: tl.constexpr):
    """`_absorb`, BLOCK_S columns at a time: the intermediates of a whole tile would not fit into registers."""
    if x.shape[1] <= BLOCK_S:
        found = _absorb(found, x, first_id, noise, HAS_NOISE)
    else:
        half: tl.constexpr = x.shape[1] // 2
        low, high = tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, half]), [0, 2, 1]))
        found = _absorb_slices(found, low, first_id, noise, HAS_NOISE, BLOCK_S)
        found = _absorb_slices(found, high, first_id + half, noise, HAS_NOISE, BLOCK_S)
    return found


@triton.jit
def _dot(
    hidden_ptr,
    weight_ptr,
    source,
    column,
    end,
    n_features,
    stride_hidden_row,
    stride_weight_row,
    EVEN_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``hidden[source] @ weight[column]^T``, zero from column ``end`` on: ``[BLOCK_T, BLOCK_V]``."""
    k = tl.arange(0, BLOCK_K)[None, :]
    hidden_at = hidden_ptr + source * stride_hidden_row + k
    weight_at = weight_ptr + column[:, None].to(tl.int64) * stride_weight_row + k
    acc = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    for offset in tl.range(0, n_features, BLOCK_K):
        if EVEN_K:
            h = tl.load(hidden_at)
            w = tl.load(weight_at, mask=column[:, None] < end, other=0.0)
        else:
            h = tl.load(hidden_at, mask=k < n_features - offset, other=0.0)
            w = tl.load(weight_at, mask=(column[:, None] < end) & (k < n_features - offset), other=0.0)
        acc = tl.dot(h, w.T, acc, input_precision="ieee")
        hidden_at += BLOCK_K
        weight_at += BLOCK_K
    return acc


@triton.jit(do_not_specialize=["n_rows", "vocab_start"])
def _lm_head_kernel(
    hidden_ptr,
    weight_ptr,
    scale_ptr,
    row_ptr,
    count_ptr,
    temperature_ptr,
    seed_ptr,
    position_ptr,
    step_ptr,
    values_ptr,
    winner_ptr,
    n_rows,
    n_columns,
    n_features,
    vocab_start,
    stride_hidden_row,
    stride_weight_row,
    HAS_ROWS: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    n_live = live_rows(count_ptr, n_rows, HAS_COUNT)
    n_tiles, n_shares = shares(n_live, tl.num_programs(0), BLOCK_T)
    share = tl.program_id(0) // n_tiles
    if (n_live <= 0) | (share >= n_shares):
        return
    # neighbours take other rows of the same weights, which then come from L2
    row = (tl.program_id(0) % n_tiles) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    live = row < n_live
    if HAS_ROWS:
        source = tl.load(row_ptr + row, mask=live, other=0).to(tl.int64)
    else:
        source = tl.where(live, row, 0).to(tl.int64)
    span = tl.cdiv(tl.cdiv(n_columns, n_shares), 16) * 16
    begin = share * span
    end = tl.minimum(begin + span, n_columns)

    low = tl.full([BLOCK_T, 1], float("-inf"), tl.float32)
    first_id = tl.where(begin < n_columns, vocab_start + begin, NO_TOKEN)  # of a row of minus infinity, or of NaN
    found = (low, tl.zeros([BLOCK_T, 1], tl.float32), low, low, tl.zeros([BLOCK_T, 1], tl.int32) + first_id)
    noise = (live,)
    if HAS_NOISE:
        noise = (temperature_ptr + row, seed_ptr + row, position_ptr + row, step_ptr + row, live)
    for start in tl.range(begin, end, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        if HAS_SCALE:
            acc = dot_over(
                hidden_ptr,
                weight_ptr,
                tl.reshape(source, [BLOCK_T]),
                tl.minimum(column, end - 1),
                n_features,
                stride_hidden_row,
                0,
                tl.cdiv(n_features, BLOCK_K),
                "fp8",
                NATIVE_FP8,
                EVEN_K,
                BLOCK_T,
                BLOCK_V,
                BLOCK_K,
            )
            acc = tl.trans(acc * row_scale(scale_ptr, column, column < end, "fp8", NATIVE_FP8)[:, None])
        else:
            acc = _dot(
                hidden_ptr,
                weight_ptr,
                source,
                column,
                end,
                n_features,
                stride_hidden_row,
                stride_weight_row,
                EVEN_K,
                BLOCK_T,
                BLOCK_V,
                BLOCK_K,
            )
        # rounded as logits in memory would be, so that the same tokens win
        x = tl.where(column[None, :] < end, acc.to(hidden_ptr.dtype.element_ty).to(tl.float32), float("-inf"))
        found = _absorb_slices(found, x, vocab_start + start, noise, HAS_NOISE, BLOCK_S)
    width = n_tiles * BLOCK_T
    store_partials(values_ptr + (share * 4).to(tl.int64) * width + row, width, found, live)
    tl.store(winner_ptr + share.to(tl.int64) * width + row, found[4], mask=live)


_MARGIN = 8 * 1024  # of shared memory, for what the compiler needs beside tiles


@dataclass(frozen=True)
class LmHeadConfig:
    BLOCK_T: int
    BLOCK_V: int
    BLOCK_K: int
    BLOCK_S: int
    num_warps: int
    num_stages: int
    programs: int
    NATIVE_FP8: bool | None = None  # None: where the GPU converts e4m3 itself, sm_89 and later


@lru_cache(1024)
def lm_head_config(
    n_rows: int,
    n_columns: int,
    itemsize: int,
    noise: bool = False,
    multiprocessors: int = 132,
    *,
    float8: bool = False,
    even: bool = True,
    shared: int = H200_SHARED_MEMORY,
) -> LmHeadConfig:
    """As few row tiles as registers allow, so that weights are read once; and a grid that fills the GPU once.

    Up to 64 rows the weights' stream is the bound: two programs per multiprocessor, each with 48 KB of loads in flight
    (one needs about 30 KB), and one multiplies while the other reduces its tile. Programs share a row
    tile's columns evenly, to 16 columns, so none waits for the last. Above 64 rows L2 would be the bound: 128 x 128
    reads least of it. The noise's registers allow 64 x 64, a quarter at a time. float32 is there to be right, not fast.
    Four waves of programs where the row tiles do not divide one. One processor (the interpreter) takes all in one tile.

    Codes of float8 are half the bytes, so there are more stages, and 32 KB or more of codes under way. A K that is no
    multiple of 64, or with float8 128 (not ``even``), whose loads are narrow, gets the small tiles of float32.

    ``shared`` is what a block may have of shared memory: stages are as many as fit, and where two programs do not fit
    there is one per multiprocessor.
    """
    if multiprocessors == 1:
        block_t = min(256, max(16, triton.next_power_of_2(n_rows)))
        block_v = min(2048, max(16, triton.next_power_of_2(n_columns)))
        return LmHeadConfig(block_t, block_v, 128, block_v, 4, 1, max(1, cdiv(n_rows, block_t)))
    # BLOCK_T, BLOCK_V, BLOCK_K, BLOCK_S, num_warps, num_stages
    if itemsize == 4 or not even:
        tile = (16 if n_rows <= 16 else 32, 32, 32, 32, 4, 3)
    elif float8:
        tile = _float8_tile(n_rows, noise)
    elif n_rows <= 32:
        tile = (16 if n_rows <= 16 else 32, 128, 64, 32 if noise else 128, 4, 4)
    elif noise:
        tile = (64, 64, 64, 16, 4, 4)
    else:
        tile = (64, 128, 64, 32, 4, 4) if n_rows <= 64 else (128, 128, 64, 32, 8, 4)
    block_t, block_v, block_k, block_s, num_warps, num_stages = tile
    stage = (block_t * itemsize + block_v * (1 if float8 else itemsize)) * block_k
    if shared < 3 * stage:  # two stages under way, and room for a third that is written
        block_k, stage = block_k // 2, stage // 2
    num_stages = max(2, min(num_stages, 1 + (shared - _MARGIN) // stage))
    tile = block_t, block_v, block_k, block_s, num_warps, num_stages
    n_tiles = max(1, cdiv(n_rows, block_t))
    slots = max(1, min(8 // num_warps, shared // ((num_stages - 1) * stage + _MARGIN))) * multiprocessors
    wave = slots if slots % n_tiles == 0 else 4 * slots
    programs = max(n_tiles, min(wave, n_tiles * cdiv(n_columns, block_v)))
    return LmHeadConfig(*tile, programs)


def _float8_tile(n_rows: int, noise: bool) -> tuple[int, ...]:
    if noise:
        return (16 if n_rows <= 16 else 32, 64, 64, 16, 4, 9) if n_rows <= 32 else (64, 64, 64, 16, 4, 6)
    if n_rows <= 32:
        return (16 if n_rows <= 16 else 32, 128, 64, 128, 4, 6)
    return (64, 128, 64, 32, 4, 5) if n_rows <= 64 else (128, 128, 128, 32, 8, 4)


@checked_once
def _checked_rows(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    rows: torch.Tensor | None,
    count: torch.Tensor | None,
) -> int:
    """Check the operands; return the most rows to compute."""
    check_tensor("hidden", hidden, dtype=FLOATS, shape=[None, None])
    like = {"shape": [None, hidden.shape[1]], "device": hidden.device}
    if scale is None:
        check_tensor("weight", weight, dtype=hidden.dtype, **like)
    else:
        check_tensor("weight", weight, dtype=torch.float8_e4m3fn, dense=True, **like)
        check_tensor("scale", scale, dtype=torch.float32, shape=[weight.shape[0]], device=hidden.device)
    refuse_unless(weight.numel() > 0, f"weight has shape {list(weight.shape)}: there is nothing to choose from")
    if count is not None:
        check_tensor("count", count, dtype=torch.int32, shape=[1], device=hidden.device)
    if rows is None:
        return hidden.shape[0]
    check_tensor("rows", rows, dtype=INTEGERS, shape=[None], device=hidden.device)
    refuse_unless(rows.shape[0] == 0 or hidden.shape[0] > 0, "rows has entries, hidden has no rows")
    check_index("rows", rows, 0 if count is None else -1, hidden.shape[0])  # past the count lists are filled with -1
    return rows.shape[0]


def _project(
    hidden, weight, scale, rows, count, temperature, keys, vocab_start, config: LmHeadConfig | None
) -> Partials:
    n_rows = _checked_rows(hidden, weight, scale, rows, count)
    n_columns, n_features = weight.shape
    in_range = 0 <= vocab_start and vocab_start + n_columns <= 2**31 - 1
    refuse_unless(in_range, f"vocab_start={vocab_start}: {n_columns} ids from there are not all in [0, 2^31 - 1)")
    noise = noise_arguments(temperature, keys, n_rows, hidden.device)
    config = config or lm_head_config(
        n_rows,
        n_columns,
        hidden.element_size(),
        temperature is not None,
        multiprocessors(hidden.device),
        float8=scale is not None,
        even=n_features % (64 if scale is None else 128) == 0,
        shared=shared_memory(hidden.device),
    )
    n_tiles = cdiv(n_rows, config.BLOCK_T)
    refuse_unless(config.programs >= n_tiles, f"config has {config.programs} programs for {n_tiles} row tiles")
    slots = config.programs * config.BLOCK_T
    values = torch.empty(4 * slots, dtype=torch.float32, device=hidden.device)
    winner = torch.empty(slots, dtype=torch.int32, device=hidden.device)
    if n_rows > 0:
        launch(
            _lm_head_kernel,
            (config.programs,),
            hidden_ptr=hidden,
            weight_ptr=weight if scale is None else weight.view(torch.uint8),
            scale_ptr=scale,
            row_ptr=rows,
            count_ptr=count,
            **noise,
            values_ptr=values,
            winner_ptr=winner,
            n_rows=n_rows,
            n_columns=n_columns,
            n_features=n_features,
            vocab_start=vocab_start,
            stride_hidden_row=hidden.stride(0),
            stride_weight_row=weight.stride(0),
            HAS_ROWS=rows is not None,
            HAS_COUNT=count is not None,
            HAS_NOISE=temperature is not None,
            HAS_SCALE=scale is not None,
            NATIVE_FP8=config.NATIVE_FP8,
            EVEN_K=n_features % config.BLOCK_K == 0,
            BLOCK_T=config.BLOCK_T,
            BLOCK_V=config.BLOCK_V,
            BLOCK_K=config.BLOCK_K,
            BLOCK_S=config.BLOCK_S,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            # ptxas may spill a little to make room for more programs than the two a multiprocessor that are launched
            **({} if scale is None and temperature is None else {"maxnreg": 255}),
        )
    return Partials(values, winner, count, n_rows, config.programs, config.BLOCK_T)


def lm_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
    temperature: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    position: torch.Tensor | None = None,
    step: torch.Tensor | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    config: LmHeadConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``confidence(hidden[rows] @ weight.T, temperature=temperature, ...)``, with the logits nowhere in memory.

    With ``scale``, ``weight * scale[:, None]`` takes the place of ``weight``; codes are exact in every dtype. Logits
    are accumulated in float32 and rounded to the dtype of ``hidden``, as if they had been stored.

    Args:
        hidden: ``[N, d]``, float32, float16 or bfloat16, with any row stride.
        weight: ``[V, d]`` in the same dtype, with any row stride; with ``scale`` float8_e4m3fn and dense. Its two codes
            for NaN mean +-480 where the GPU is older than sm_89.
        scale: ``[V]``, float32.
        rows: int32 or int64 ``[R]``, the rows of ``hidden`` to use; all, in order, if None. Not checked (but see
            :func:`check_index`).
        count: int32 ``[1]``: number of leading rows to compute, none if negative, all if more than R.
        temperature: float32 ``[R]``, each above 0 (not checked). None: no noise.
        seed, position, step: int64 ``[R]``, the noise's keys beside the token id; needed with a temperature.
        out: token int32 ``[R]`` and score float32 ``[R]``, dense; allocated if None. From ``count`` on left alone.

    Ties go to the lowest token id. A row with a NaN or plus infinity among its logits, or with minus infinity alone,
    has a NaN score and some valid token; others are untouched. Two launches.
    """
    parts = _project(
        hidden, weight, scale, rows, count, temperature, {"seed": seed, "position": position, "step": step}, 0, config
    )
    return merge(parts, final=True, out=result_of(out, parts.n_rows, hidden.device))


def lm_head_partials(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    vocab_start: int = 0,
    rows: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
    temperature: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    position: torch.Tensor | None = None,
    step: torch.Tensor | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    config: LmHeadConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Partial results of one vocabulary shard, ids from ``vocab_start`` on, per row; for :func:`merge_partials`.

    Arguments as for :func:`lm_head`, with ``weight`` the shard. Returns values float32 ``[4, R]``: largest logit ``m``,
    ``sum(exp(logits - m))``, the winner's key (its logit plus noise) and its logit; and the winner's id, int32 ``[R]``.
    ``out`` is a pair of such tensors. Where all logits are NaN or minus infinity the winner is the shard's first id.
    """
    parts = _project(
        hidden,
        weight,
        scale,
        rows,
        count,
        temperature,
        {"seed": seed, "position": position, "step": step},
        vocab_start,
        config,
    )
    if out is None:
        values = torch.empty(4, parts.n_rows, dtype=torch.float32, device=hidden.device)
        out = values, torch.empty(parts.n_rows, dtype=torch.int32, device=hidden.device)
    check_tensor("out[0]", out[0], dtype=torch.float32, shape=[4, parts.n_rows], device=hidden.device, dense=True)
    check_tensor("out[1]", out[1], dtype=torch.int32, shape=[parts.n_rows], device=hidden.device, dense=True)
    return merge(parts, final=False, out=out)


def lm_head_cost(n_rows: int, n_columns: int, n_features: int, itemsize: int, float8: bool = False) -> Cost:
    """Weights (or codes and scales) and hidden states once, and a token and a score a row."""
    weights = n_columns * (n_features + 4 if float8 else n_features * itemsize)
    moved = weights + n_rows * n_features * itemsize + 8 * n_rows
    return Cost(bytes=moved, flops=2 * n_rows * n_columns * n_features)
