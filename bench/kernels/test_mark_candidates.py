"""Candidate positions of a step."""

from __future__ import annotations

from functools import partial

from sfs_triton import SlowFast
from sfs_triton.kernels.mark_candidates import mark_candidates_cost
from sfs_triton.ops import torch_backend as torch_impl
from sfs_triton.ops import triton_backend as triton_impl

from .case import Case
from .harness import benchmark_of
from .states import decode_state


def cases(toy: bool = False) -> list[Case]:
    batch, prompt, response = (2, 8, 24) if toy else (1, 1100, 1024)
    state = partial(decode_state, SlowFast(), batch=batch, prompt=prompt, response=response)
    return [
        Case(
            name=f"{'toy-' if toy else ''}{batch}x{prompt + response}{'' if by_stage else '-block'}",
            kernel=triton_impl.mark_candidates,
            twin=torch_impl.mark_candidates,
            build=lambda device, by_stage=by_stage: {"state": state(device=device), "by_stage": by_stage},
            cost=mark_candidates_cost(batch, prompt + response),
        )
        for by_stage in (True, False)
    ]


test_mark_candidates = benchmark_of(cases)
