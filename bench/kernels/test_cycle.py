"""The slow/fast cycle machine: one launch per step for all sequences of a batch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from sfs_triton import SlowFast
from sfs_triton.kernels.cycle import decide_cycle_cost
from sfs_triton.ops import torch_backend as torch_impl
from sfs_triton.ops import triton_backend as triton_impl

from .case import Case
from .harness import benchmark_of
from .states import decode_state

SHARED = SlowFast(share_stable=True, eos_horizon=False, eos_stop=True)
SAMPLERS = {  # settings, and what a cache policy adds to them
    "paper": (SlowFast(), {}),
    "paper-eos": (SlowFast(eos_stop=True), {}),
    "paper-ends": (SlowFast(eos_stop=True), {}),
    "llada-blocks": (SlowFast.preset("llada-reference", block_length=32, max_cycles=256), {}),
    "dream": (SlowFast.preset("dream-reference", eos_stop=True), {}),
    "shared": (SHARED, {}),
    "region": (SHARED, {"look_ahead": 32, "partial": True, "span_cap": 64}),
}


OTHER_ENDS = (3, 4)  # besides the end-of-text


def _build(device: torch.device, *, sampler: SlowFast, options: dict, **state: Any) -> dict:
    return {"state": decode_state(sampler, device=device, **state), "rules": sampler.rules(**options)}


def cases(toy: bool = False) -> list[Case]:
    prefix = "toy-" if toy else ""
    sizes = [(2, 8, 24)] if toy else [(1, 1100, 1024), (256, 1100, 1024), (16, 4096, 4096)]
    return [
        Case(
            name=f"{prefix}{name}-{batch}x{prompt + response}{'-trace' if trace else ''}",
            kernel=triton_impl.decide_cycle,
            twin=torch_impl.decide_cycle,
            build=partial(
                _build,
                sampler=sampler,
                options=options,
                trace=trace,
                batch=batch,
                prompt=prompt,
                response=response,
                other_ends=OTHER_ENDS if name == "paper-ends" else (),
            ),  # fmt: skip
            cost=decide_cycle_cost(batch, prompt + response),
        )
        for name, (sampler, options) in SAMPLERS.items()
        for batch, prompt, response in sizes
        for trace in ((False, True) if name == "paper" and batch == 1 else (False,))
    ]


test_cycle = benchmark_of(cases)
