"""The block machine of the other samplers: thresholds, quotas, fixed counts, random positions."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from sfs_triton import EntropyBound, FixedSteps, Hierarchy, LocalLeap, MultiBlock, Threshold
from sfs_triton.kernels.select import decide_block_cost
from sfs_triton.ops import torch_backend as torch_impl
from sfs_triton.ops import triton_backend as triton_impl

from .case import Case
from .harness import benchmark_of
from .states import decode_state

SAMPLERS = {  # settings, and what a cache policy adds to them
    "threshold": (Threshold(block_length=32, eos_stop=True), {}),
    "threshold-ends": (Threshold(block_length=32, eos_stop=True), {}),
    "threshold-dual": (Threshold(block_length=32), {"opening": "repeat"}),
    "threshold-region": (Threshold(block_length=32), {"partial": True}),
    "threshold-least": (Threshold(block_length=32, least=2), {}),
    "leap-region": (LocalLeap(), {"partial": True}),
    "leap-counts": (LocalLeap(steps=64), {}),
    "bound": (EntropyBound(), {}),
    "runs": (Hierarchy(), {}),
    "open-region": (MultiBlock(eos_stop=True), {"partial": True}),
    "open-strict": (MultiBlock.preset("d3llm-dream"), {}),
    "open-delayed": (MultiBlock(eos_stop=True), {"delay": 2}),
    "paced": (Threshold(block_length=None, steps=64), {}),
    "even": (FixedSteps(block_length=32), {}),
    "even-first": (FixedSteps(block_length=32), {"opening": "first"}),
    "timesteps": (FixedSteps(steps=64, metric="entropy"), {}),
    "random": (FixedSteps(steps=64, metric="origin"), {}),
}


OTHER_ENDS = (3, 4)  # besides the end-of-text


def _build(device: torch.device, *, sampler, options: dict, **state: Any) -> dict:
    return {"state": decode_state(sampler, device=device, **state), "rules": sampler.rules(**options)}


def cases(toy: bool = False) -> list[Case]:
    prefix = "toy-" if toy else ""
    sizes = [(2, 8, 32)] if toy else [(1, 1100, 1024), (256, 1100, 1024)]
    return [
        Case(
            name=f"{prefix}{name}-{batch}x{prompt + response}",
            kernel=triton_impl.decide_block,
            twin=torch_impl.decide_block,
            build=partial(
                _build,
                sampler=sampler,
                options=options,
                batch=batch,
                prompt=prompt,
                response=response,
                other_ends=OTHER_ENDS if name == "threshold-ends" else (),
            ),  # fmt: skip
            cost=decide_block_cost(batch, prompt + response),
        )
        for name, (sampler, options) in SAMPLERS.items()
        for batch, prompt, response in sizes
    ]


test_select = benchmark_of(cases)
