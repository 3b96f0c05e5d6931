"""Step outputs published for the host. The rings are on the device here: this times the launches, not the bus."""

from __future__ import annotations

from functools import partial

import torch

from sfs_triton.kernels.control import CONTROL
from sfs_triton.kernels.publish import publish, publish_cost
from sfs_triton.ops.torch import publish as twin

from .case import Case
from .harness import benchmark_of

Shapes = list[tuple[tuple[int, ...], torch.dtype]]


def _build(device: torch.device, *, shapes: Shapes, depth: int) -> dict:
    return {
        "sources": [torch.randint(2, shape, device=device).to(dtype) for shape, dtype in shapes],
        "rings": [torch.zeros((depth, *shape), dtype=dtype, device=device) for shape, dtype in shapes],
        "counter": torch.full((1,), 5, device=device),
        "published": torch.zeros(1, dtype=torch.int64, device=device),
    }


def _shapes(batch: int, length: int) -> dict[str, Shapes]:
    """Sizes of the output that paces the host, of the output that draws a canvas, and of a full trace."""
    control = ((batch, len(CONTROL)), torch.int64)
    canvas, flags, scores = (((batch, length), dtype) for dtype in (torch.int64, torch.bool, torch.float32))
    return {
        "control": [control],
        "canvas": [control, canvas],
        "trace": [control, canvas, flags, scores, ((batch,), torch.float64)],
    }


def cases(toy: bool = False) -> list[Case]:
    sizes = [(2, 32)] if toy else [(1, 2124), (16, 8192)]
    return [
        Case(
            name=f"{'toy-' if toy else ''}{batch}x{length}-{name}",
            kernel=publish,
            twin=twin.publish,
            build=partial(_build, shapes=shapes, depth=8),
            cost=publish_cost(sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes)),
        )
        for batch, length in sizes
        for name, shapes in _shapes(batch, length).items()
    ]


test_publish = benchmark_of(cases)
