"""Scatter of the choices of listed positions into the canvas."""

from __future__ import annotations

from functools import partial

import torch

from sfs_triton import SlowFast
from sfs_triton.kernels.scatter_choices import scatter_choices_cost
from sfs_triton.ops import torch_backend as torch_impl
from sfs_triton.ops import triton_backend as triton_impl

from .case import Case
from .harness import benchmark_of
from .states import decode_state


def _build(device: torch.device, *, listed: int, some: bool, batch: int, prompt: int, response: int) -> dict:
    """No entry is idle: the twin would leave those behind the canvas, where the kernel writes nothing."""
    length, n_slots = prompt + response, batch * listed
    target = torch.rand((batch, length), device=device).argsort(1)[:, :listed].int().contiguous()
    n_entries = n_slots // 2 if some else n_slots
    chosen = {}
    if some:
        which = torch.rand(n_slots, device=device).argsort()[:n_entries].int()
        chosen = {"which": which, "row": torch.arange(batch - 1, -1, -1, device=device)}
    return {
        "state": decode_state(SlowFast(), device=device, batch=batch, prompt=prompt, response=response),
        "token": torch.randint(1000, (n_entries,), device=device, dtype=torch.int32),
        "score": torch.rand(n_entries, device=device),
        "target": target,
        **chosen,
    }


def cases(toy: bool = False) -> list[Case]:
    sizes = [(2, 8, 24, 16)] if toy else [(1, 1100, 1024, 128), (16, 4096, 4096, 128), (16, 1100, 1024, 2124)]
    return [
        Case(
            name=f"{'toy-' if toy else ''}{batch}x{prompt + response}-{listed}{'-some' if some else ''}",
            kernel=triton_impl.scatter_choices,
            twin=torch_impl.scatter_choices,
            build=partial(_build, listed=listed, some=some, batch=batch, prompt=prompt, response=response),
            cost=scatter_choices_cost(batch * listed // (2 if some else 1)),
        )
        for batch, prompt, response, listed in sizes
        for some in (False, True)
    ]


test_scatter_choices = benchmark_of(cases)
