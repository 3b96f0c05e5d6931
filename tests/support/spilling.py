"""Kernels that must not ship, for tests of the check that finds them: ``python tests/support/spilling.py 80 90``."""

from __future__ import annotations

import json
import sys

import torch
import triton
import triton.language as tl

from bench.kernels.case import Case
from bench.kernels.resources import compile_cases
from sfs_triton.kernels.cost import Cost
from sfs_triton.kernels.launch import launch


@triton.jit
def _scale_kernel(x_ptr, out_ptr, BLOCK_N: tl.constexpr):
    """All of ``x`` is needed after the sum, so it is held in registers, or would be."""
    columns = tl.arange(0, BLOCK_N)
    x = tl.load(x_ptr + columns)
    tl.store(out_ptr + columns, x * tl.sum(x, axis=0))


def _scale(x: torch.Tensor, maxnreg: int | None) -> None:
    options = {} if maxnreg is None else {"maxnreg": maxnreg}
    launch(_scale_kernel, (1,), x_ptr=x, out_ptr=torch.empty_like(x), BLOCK_N=x.numel(), num_warps=4, **options)


def _build(device: torch.device, *, maxnreg: int | None) -> dict:
    return {"x": torch.empty(8192, device=device), "maxnreg": maxnreg}


def cases() -> list[Case]:
    return [
        Case(name, _scale, _scale, lambda device, n=maxnreg: _build(device, maxnreg=n), Cost(0, 0))
        for name, maxnreg in (("spills", 32), ("fits", None))
    ]


if __name__ == "__main__":
    print(json.dumps({target: compile_cases("spilling", cases(), int(target)) for target in sys.argv[1:]}))
