"""Partial results of vocabulary parts per row, and their merge into a token and its confidence."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .check import check_tensor, refuse_unless
from .cost import Cost
from .launch import cdiv, launch, multiprocessors
from .softmax_partial import LOG2E, NO_TOKEN, finite_or_zero, largest, max_of, result_of, sum_of, value_of

SCALE = tl.constexpr(LOG2E)


@triton.jit
def live_rows(count_ptr, n_rows, HAS_COUNT: tl.constexpr):
    """Return the number of rows to compute; not positive if none."""
    if HAS_COUNT:
        n_rows = tl.minimum(tl.load(count_ptr), n_rows)
    return n_rows


@triton.jit
def shares(n_live, n_programs, tile_rows):
    """Row tiles that are in use, at least one, and among how many programs the vocabulary of each is shared."""
    n_tiles = tl.maximum(tl.cdiv(n_live, tile_rows), 1)
    return n_tiles, n_programs // n_tiles


@triton.jit
def store_partials(at, stride, found, live):
    for field in tl.static_range(4):
        tl.store(at + field * stride, found[field], mask=live)


@triton.jit(do_not_specialize=["n_rows", "n_programs", "tile_rows"])
def _merge_kernel(
    values_ptr,
    winner_ptr,
    count_ptr,
    first_out_ptr,
    second_out_ptr,
    n_rows,
    n_programs,
    tile_rows,
    HAS_COUNT: tl.constexpr,
    FINAL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    n_live = live_rows(count_ptr, n_rows, HAS_COUNT)
    if tl.program_id(0) * BLOCK_T >= n_live:
        return
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    live = row < n_live
    n_tiles, n_shares = shares(n_live, n_programs, tile_rows)
    width = n_tiles * tile_rows
    share = tl.arange(0, BLOCK_P)
    there = live & (share < n_shares)
    at = values_ptr + (share * 4).to(tl.int64) * width + row
    tops = tl.load(at, mask=there, other=float("-inf"))
    totals = tl.load(at + width, mask=there, other=0.0)
    keys = tl.load(at + 2 * width, mask=there, other=float("-inf"))
    logits = tl.load(at + 3 * width, mask=there, other=float("-inf"))
    winners = tl.load(winner_ptr + share.to(tl.int64) * width + row, mask=there, other=NO_TOKEN)
    top = max_of(tops)
    base = finite_or_zero(top)
    total = sum_of(totals * tl.exp2((tops - base) * SCALE))
    key, winner = largest(keys, winners)
    logit = value_of(logits, winners, winner)
    if FINAL:
        tl.store(first_out_ptr + row, winner, mask=live)
        tl.store(second_out_ptr + row, tl.exp2((logit - base) * SCALE) / total, mask=live)
    else:
        store_partials(first_out_ptr + row, n_rows, (top, total, key, logit), live)
        tl.store(second_out_ptr + row, winner, mask=live)


class Partials(NamedTuple):
    """Partials of rows in several shares of the vocabulary, and the layout of their memory."""

    values_ptr: torch.Tensor
    winner_ptr: torch.Tensor
    count_ptr: torch.Tensor | None
    n_rows: int
    n_programs: int
    tile_rows: int


def merge(parts: Partials, *, final: bool, out: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Into token and score if ``final``, else into one partial.

    One program per row, with all its loads in flight; on one processor, one program for all rows.
    """
    if parts.n_rows > 0:
        block = triton.next_power_of_2(parts.n_programs)
        alone = multiprocessors(out[0].device) == 1
        rows = min(triton.next_power_of_2(parts.n_rows), max(1, 2**16 // block)) if alone else 1
        launch(
            _merge_kernel,
            (cdiv(parts.n_rows, rows),),
            values_ptr=parts.values_ptr,
            winner_ptr=parts.winner_ptr,
            count_ptr=parts.count_ptr,
            first_out_ptr=out[0],
            second_out_ptr=out[1],
            n_rows=parts.n_rows,
            n_programs=parts.n_programs,
            tile_rows=parts.tile_rows,
            HAS_COUNT=parts.count_ptr is not None,
            FINAL=final,
            BLOCK_T=rows,
            BLOCK_P=block,
            num_warps=min(4, max(1, block // 128)),
        )
    return out


def merge_partials(
    values: torch.Tensor, winner: torch.Tensor, *, out: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token and score, as :func:`lm_head` has them, from the partials of all shards, in any order.

    Args:
        values: float32 ``[S, 4, R]``, dense.
        winner: int32 ``[S, R]``, dense.
        out: token int32 ``[R]`` and score float32 ``[R]``, dense; allocated if None.
    """
    check_tensor("values", values, dtype=torch.float32, shape=[None, 4, None], dense=True)
    n_shards, _, n_rows = values.shape
    refuse_unless(0 < n_shards <= 4096, f"values has {n_shards} shards, not 1 to 4096")
    check_tensor("winner", winner, dtype=torch.int32, shape=[n_shards, n_rows], device=values.device, dense=True)
    out = result_of(out, n_rows, values.device)
    return merge(Partials(values, winner, None, n_rows, n_shards, n_rows), final=True, out=out)


def merge_partials_cost(n_shards: int, n_rows: int) -> Cost:
    """Four values and an id a shard and row in, a token and a score a row out."""
    return Cost(bytes=4 * n_rows * (5 * n_shards + 2), flops=4 * n_shards * n_rows)
