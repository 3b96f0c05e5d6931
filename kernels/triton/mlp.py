"""The gated activation of a SwiGLU block, ``silu(gate) * up``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from .check import FLOATS, check_tensor, checked_once, refuse_unless
from .cost import Cost
from .launch import cdiv, launch, multiprocessors


@triton.jit(do_not_specialize=["n_rows"])
def _silu_mul_kernel(
    gate_up_ptr,
    out_ptr,
    n_rows,
    n_columns,
    stride_gate_up_row,
    stride_out_row,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    candidate = (row < n_rows) & (columns < n_columns)
    gate_at = gate_up_ptr + row * stride_gate_up_row + columns
    gate = tl.load(gate_at, mask=candidate, other=0.0).to(tl.float32)
    up = tl.load(gate_at + n_columns, mask=candidate, other=0.0).to(tl.float32)
    product = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * stride_out_row + columns, product.to(out_ptr.dtype.element_ty), mask=candidate)


@dataclass(frozen=True)
class SiluMulConfig:
    BLOCK_M: int
    BLOCK_N: int
    num_warps: int


@lru_cache(1024)
def silu_mul_config(n_rows: int, n_columns: int, n_multiprocessors: int) -> SiluMulConfig:
    """Eight values per thread: in 16 bits, one load each of gate and up.

    Wide rows are cut into parts of 1,024 values, so that even one row spreads; short ones share a program of 2,048.
    Where there is one processor, programs are as large as is of use.
    """
    part, values = (1024, 2048) if n_multiprocessors > 1 else (65536, 65536)
    width = triton.next_power_of_2(n_columns)
    block = min(part, width)
    rows = max(1, min(values // width, triton.next_power_of_2(n_rows)))
    return SiluMulConfig(BLOCK_M=rows, BLOCK_N=block, num_warps=min(8, max(1, rows * block // 256)))


def silu_mul(
    gate_up: torch.Tensor, *, out: torch.Tensor | None = None, config: SiluMulConfig | None = None
) -> torch.Tensor:
    """``silu(gate) * up`` where ``gate, up = gate_up.chunk(2, -1)``, in float32 and cast once.

    Torch rounds ``silu(gate)`` to the dtype before it multiplies; here nothing is rounded in between, so results in 16
    bits are nearer to the truth and may differ from torch's in the last place.

    Args:
        gate_up: ``[..., 2 m]``, float32, float16 or bfloat16; gate first.
        out: ``[..., m]``, dense, shares no memory with ``gate_up``; allocated if None.

    NaN stays at its column. A gate of -inf gives NaN, as ``-inf * sigmoid(-inf)`` does.
    """
    _check(gate_up, out)
    width = gate_up.shape[-1]
    n_columns = width // 2
    if out is None:
        out = torch.empty((*gate_up.shape[:-1], n_columns), dtype=gate_up.dtype, device=gate_up.device)
    rows = gate_up.reshape(-1, width)
    n_rows = rows.shape[0]
    if n_rows == 0:
        return out
    config = config or silu_mul_config(n_rows, n_columns, multiprocessors(rows.device))
    launch(
        _silu_mul_kernel,
        (cdiv(n_rows, config.BLOCK_M), cdiv(n_columns, config.BLOCK_N)),
        gate_up_ptr=rows,
        out_ptr=out,
        n_rows=n_rows,
        n_columns=n_columns,
        stride_gate_up_row=rows.stride(0),
        stride_out_row=n_columns,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        num_warps=config.num_warps,
    )
    return out


@checked_once
def _check(gate_up, out) -> None:
    check_tensor("gate_up", gate_up, dtype=FLOATS, shape=[..., None])
    width = gate_up.shape[-1]
    refuse_unless(width > 0 and width % 2 == 0, f"gate_up has {width} columns, not a positive even number")
    if out is not None:
        shape = (*gate_up.shape[:-1], width // 2)
        check_tensor("out", out, dtype=gate_up.dtype, shape=shape, device=gate_up.device, dense=True)


def silu_mul_cost(n_rows: int, n_columns: int, itemsize: int) -> Cost:
    """Two values in and one out; ``n_columns`` are those of the result."""
    return Cost(bytes=3 * n_rows * n_columns * itemsize, flops=5 * n_rows * n_columns)
