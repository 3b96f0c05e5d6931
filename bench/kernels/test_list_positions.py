"""List of positions that a step forwards."""

from __future__ import annotations

from functools import partial

import torch

from sfs_triton import SlowFast
from sfs_triton.kernels.list_positions import list_positions_cost
from sfs_triton.ops import torch_backend as torch_impl
from sfs_triton.ops import triton_backend as triton_impl

from .case import Case
from .harness import benchmark_of
from .states import decode_state


def _build(device: torch.device, *, capacity: int, shift: int, **sizes: int) -> dict:
    state = decode_state(SlowFast(), device=device, **sizes)
    lists = {
        name: torch.zeros((sizes["batch"], capacity), dtype=torch.int32, device=device) for name in ("rows", "target")
    }
    count = torch.zeros(sizes["batch"], dtype=torch.int32, device=device)
    how = {"by_stage": True, "span_cap": 64, "look_ahead": 16, "shift": shift}
    return {"state": state, **lists, "count": count, **how}


def cases(toy: bool = False) -> list[Case]:
    prefix = "toy-" if toy else ""
    sizes = [(2, 8, 24, 16)] if toy else [(1, 1100, 1024, 128), (16, 4096, 4096, 128)]
    return [
        Case(
            name=f"{prefix}{batch}x{prompt + response}-{capacity}{'-shift' if shift else ''}",
            kernel=triton_impl.list_positions,
            twin=torch_impl.list_positions,
            build=partial(_build, capacity=capacity, shift=shift, batch=batch, prompt=prompt, response=response),
            cost=list_positions_cost(batch, prompt + response, capacity),
        )
        for batch, prompt, response, capacity in sizes
        for shift in (0, 1)
    ]


test_list_positions = benchmark_of(cases)
