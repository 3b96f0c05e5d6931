"""Embedding rows for a scope, and row lists of set flags. Row lists and counts stay on the device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from .check import FLOATS, INTEGERS, check_index, check_tensor, refuse_unless
from .cost import Cost
from .launch import cdiv, launch, multiprocessors

_FLAGS = (torch.bool, torch.uint8)
_MAX_FLAGS = 2**28  # in a row: indices and the ends of chunks are int32, and a grid has few places for chunks
_COUNTS_AT_ONCE = tl.constexpr(512)


@triton.jit(
    do_not_specialize=["n_rows", "n_positions", "stride_tokens_row", "stride_position_row"],
    do_not_specialize_on_alignment=["tokens_ptr", "position_ptr"],  # parts of a canvas, and lists, start anywhere
)
def _embedding_kernel(
    table_ptr,
    tokens_ptr,
    position_ptr,
    out_ptr,
    n_rows,
    n_positions,
    n_columns,
    stride_table_row,
    stride_tokens_row,
    stride_position_row,
    stride_out_row,
    HAS_POSITION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    live = row < n_rows
    batch = row // n_positions
    position = row % n_positions
    if HAS_POSITION:
        at = position_ptr + batch * stride_position_row + position
        position = tl.load(at, mask=live, other=-1).to(tl.int64)
    # an idle row looks up the first token, and then loads none of its columns
    at = tokens_ptr + batch * stride_tokens_row + tl.maximum(position, 0)
    token = tl.load(at, mask=live, other=0).to(tl.int64)
    columns = tl.arange(0, BLOCK_N)[None, :]
    inside = live & (columns < n_columns)
    x = tl.load(table_ptr + token * stride_table_row + columns, mask=inside & (position >= 0), other=0.0)
    tl.store(out_ptr + row * stride_out_row + columns, x, mask=inside)


@triton.jit
def _load_flags(flag_ptr, n, start, BLOCK_N: tl.constexpr):
    at = start + tl.arange(0, BLOCK_N)
    return (tl.load(flag_ptr + at, mask=at < n, other=0) != 0).to(tl.int32)


@triton.jit(do_not_specialize=["n"])
def _count_flags_kernel(flag_ptr, counts_ptr, n, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    flags = _load_flags(flag_ptr + row * n, n, chunk * BLOCK_N, BLOCK_N)
    tl.store(counts_ptr + row * tl.num_programs(1) + chunk, tl.sum(flags, axis=0))


@triton.jit(do_not_specialize=["n", "capacity"], do_not_specialize_on_alignment=["rows_ptr"])
def _compact_kernel(
    flag_ptr, counts_ptr, rows_ptr, count_ptr, n, capacity, HAS_COUNTS: tl.constexpr, BLOCK_N: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    n_chunks = tl.num_programs(1)
    start = chunk * BLOCK_N
    flags = _load_flags(flag_ptr + row * n, n, start, BLOCK_N)
    lane = tl.arange(0, BLOCK_N)
    if HAS_COUNTS:
        sums = tl.zeros([_COUNTS_AT_ONCE], tl.int32)
        sums_before = tl.zeros([_COUNTS_AT_ONCE], tl.int32)
        for first in range(0, n_chunks, _COUNTS_AT_ONCE):
            other = first + tl.arange(0, _COUNTS_AT_ONCE)
            counts = tl.load(counts_ptr + row * n_chunks + other, mask=other < n_chunks, other=0)
            sums += counts
            sums_before += tl.where(other < chunk, counts, 0)
        total = tl.sum(sums, axis=0)
        before = tl.sum(sums_before, axis=0)
    else:
        total = tl.sum(flags, axis=0)
        before = 0
    slot = before + tl.cumsum(flags, axis=0) - 1
    rows_ptr += row * capacity
    tl.store(rows_ptr + slot, start + lane, mask=(flags != 0) & (slot < capacity))
    count = tl.minimum(total, capacity)
    # the rest of the capacity, in blocks assigned to the row's programs round-robin
    for first in range(start, capacity, n_chunks * BLOCK_N):
        tl.store(rows_ptr + first + lane, -1, mask=(first + lane >= count) & (first + lane < capacity))
    if chunk == 0:
        tl.store(count_ptr + row, count)


@dataclass(frozen=True)
class EmbeddingConfig:
    BLOCK_M: int
    BLOCK_N: int
    num_warps: int


@lru_cache(1024)
def embedding_config(n_rows: int, n_columns: int, n_multiprocessors: int) -> EmbeddingConfig:
    """One row per program, or short rows of 2,048 values in all: two loads of 16 bytes per thread at 16 bits.

    Where there is one processor, programs are as large as is of use.
    """
    block = triton.next_power_of_2(n_columns)
    values = 2048 if n_multiprocessors > 1 else 65536
    rows = max(1, min(values // block, triton.next_power_of_2(n_rows)))
    return EmbeddingConfig(BLOCK_M=rows, BLOCK_N=block, num_warps=min(16, max(1, rows * block // 512)))


def embedding(
    table: torch.Tensor,
    tokens: torch.Tensor,
    position: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    config: EmbeddingConfig | None = None,
) -> torch.Tensor:
    """``out[b, j] = table[tokens[b, position[b, j]]]``, or ``table[tokens]`` without positions. Rows are copied.

    Args:
        table: ``[V, d]``, float32, float16 or bfloat16.
        tokens: ``[B, L]``, int32 or int64, in ``[0, V)``.
        position: ``[B, n]``, int32 or int64, in ``[-1, L)``; -1 is an idle row, which becomes zeros.
        out: ``[B, n, d]`` (``n = L`` without positions), dense; allocated if None.
    """
    check_tensor("table", table, dtype=FLOATS, shape=[None, None])
    n_tokens, n_columns = table.shape
    refuse_unless(n_tokens > 0, "table has 0 rows")
    refuse_unless(0 < n_columns <= 65536, f"table has {n_columns} columns, not 1 to 65536")
    check_tensor("tokens", tokens, dtype=INTEGERS, shape=[None, None], device=table.device)
    batch, n_positions = tokens.shape
    check_index("tokens", tokens, 0, n_tokens)
    if position is not None:
        check_tensor("position", position, dtype=INTEGERS, shape=[batch, None], device=table.device)
        refuse_unless(n_positions > 0, "tokens has 0 columns, and positions")
        check_index("position", position, -1, n_positions)
        n_positions = position.shape[1]
    shape = (batch, n_positions, n_columns)
    if out is None:
        out = torch.empty(shape, dtype=table.dtype, device=table.device)
    check_tensor("out", out, dtype=table.dtype, shape=shape, device=table.device, dense=True)
    n_rows = batch * n_positions
    if n_rows == 0:
        return out
    config = config or embedding_config(n_rows, n_columns, multiprocessors(table.device))
    launch(
        _embedding_kernel,
        (cdiv(n_rows, config.BLOCK_M),),
        table_ptr=table,
        tokens_ptr=tokens,
        position_ptr=position,
        out_ptr=out,
        n_rows=n_rows,
        n_positions=n_positions,
        n_columns=n_columns,
        stride_table_row=table.stride(0),
        stride_tokens_row=tokens.stride(0),
        stride_position_row=0 if position is None else position.stride(0),
        stride_out_row=n_columns,
        HAS_POSITION=position is not None,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        num_warps=config.num_warps,
    )
    return out


def embedding_cost(n_rows: int, n_columns: int, itemsize: int) -> Cost:
    """Each row read and written once; the table's other rows are not touched."""
    return Cost(bytes=2 * n_rows * n_columns * itemsize, flops=0)


@dataclass(frozen=True)
class CompactConfig:
    BLOCK_N: int
    num_warps: int


def compact_config(n: int) -> CompactConfig:
    """One launch and one program per row while a block of 8,192 flags, the longest canvas, holds a row; chunks of that
    size for longer rows.

    Two million flags in a row are then 256 chunks, about two per multiprocessor, and their counts one load per program.
    """
    return CompactConfig(BLOCK_N=1024, num_warps=4) if n <= 1024 else CompactConfig(BLOCK_N=8192, num_warps=16)


def compact(
    flag: torch.Tensor,
    *,
    capacity: int | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    config: CompactConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """List the set flags of each row, ascending, and count them: ``flag[b].nonzero()`` without a host read.

    Args:
        flag: ``[B, n]``, bool or uint8 (set where not 0), dense. ``flag.view(1, -1)`` makes one list of all.
        capacity: number of indices to keep, the lowest; None: the number of flags in a row, or the size of ``out``.
        out: ``(rows, count)``, int32 of ``[B, capacity]`` and ``[B]``, dense; allocated if None.

    Returns:
        ``rows``, with -1 from ``count`` on, and ``count``, at most ``capacity``. Both are always written.
    """
    check_tensor("flag", flag, dtype=_FLAGS, shape=[None, None], dense=True)
    batch, n = flag.shape
    refuse_unless(n <= _MAX_FLAGS, f"flag has {n} columns, more than {_MAX_FLAGS}")
    if capacity is None:
        capacity = n if out is None else out[0].shape[-1]
    refuse_unless(0 <= capacity <= _MAX_FLAGS, f"capacity is {capacity}, not 0 to {_MAX_FLAGS}")
    if out is None:
        shapes = ((batch, capacity), (batch,))
        out = tuple(torch.empty(shape, dtype=torch.int32, device=flag.device) for shape in shapes)
    rows, count = out
    check_tensor("out[0]", rows, dtype=torch.int32, shape=[batch, capacity], device=flag.device, dense=True)
    check_tensor("out[1]", count, dtype=torch.int32, shape=[batch], device=flag.device, dense=True)
    if batch == 0:
        return out
    config = config or compact_config(n)
    n_chunks = max(1, cdiv(n, config.BLOCK_N))  # no flags at all still have a count
    shared = {"n": n, "BLOCK_N": config.BLOCK_N, "num_warps": config.num_warps}
    bytes_ = flag.view(torch.uint8)
    counts = None
    if n_chunks > 1:
        counts = torch.empty((batch, n_chunks), dtype=torch.int32, device=flag.device)
        launch(_count_flags_kernel, (batch, n_chunks), flag_ptr=bytes_, counts_ptr=counts, **shared)
    launch(
        _compact_kernel,
        (batch, n_chunks),
        flag_ptr=bytes_,
        counts_ptr=counts,
        rows_ptr=rows,
        count_ptr=count,
        capacity=capacity,
        HAS_COUNTS=counts is not None,
        **shared,
    )
    return out


def compact_cost(batch: int, n: int, capacity: int) -> Cost:
    """The flags read and the row lists written once."""
    return Cost(bytes=batch * (n + 4 * capacity + 4), flops=batch * n)
