"""Ranges of contiguous positions that a step forwards, and of the keys they attend to."""

from __future__ import annotations

from functools import partial

import torch

from sfs_triton import SlowFast
from sfs_triton.kernels.control import COLUMN, FAST
from sfs_triton.kernels.position_ranges import position_ranges_cost
from sfs_triton.ops import torch_backend as torch_impl
from sfs_triton.ops import triton_backend as triton_impl

from .case import Case
from .harness import benchmark_of
from .states import decode_state


def _build(device: torch.device, *, capacity: int | None, to_span_end: bool, block: str | None, **sizes: int) -> dict:
    """Put all sequences in the second step of a fast stage whose span is half of the response."""
    state = decode_state(SlowFast(), device=device, **sizes)
    for name, value in {"stage": FAST, "stage_step": 1, "span_end": sizes["prompt"] + sizes["response"] // 2}.items():
        state.control[:, COLUMN[name]] = value
    batch = sizes["batch"]
    return {
        "state": state,
        "rows": None if capacity is None else torch.zeros((batch, capacity), dtype=torch.int32, device=device),
        "count": torch.zeros(batch, dtype=torch.int32, device=device),
        "key_range": torch.zeros((batch, 4), dtype=torch.int32, device=device),
        "to_span_end": to_span_end,
        "block": block,
    }


def cases(toy: bool = False) -> list[Case]:
    sizes = [(2, 8, 24)] if toy else [(1, 1100, 1024), (16, 4096, 4096)]
    return [
        Case(
            name=f"{'toy-' if toy else ''}{batch}x{prompt + response}-{name}",
            kernel=triton_impl.position_ranges,
            twin=torch_impl.position_ranges,
            build=partial(
                _build,
                capacity=capacity,
                to_span_end=block is None,
                block=block,
                batch=batch,
                prompt=prompt,
                response=response,
            ),
            cost=position_ranges_cost(batch, capacity or 0),
        )
        for batch, prompt, response in sizes
        for name, capacity, block in (("span", None, None), ("rest", response, "rest"), ("own", response // 8, "own"))
    ]


test_position_ranges = benchmark_of(cases)
