"""Cases that are measured and compiled ahead of time: every kernel at the shapes of the models it is made for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from bench.shapes.geometry import REAL
from sfs_triton.kernels.cost import Cost
from sfs_triton.models import ModelSpec

TOY_SIZES = {"d_model": 64, "n_heads": 4, "n_kv_heads": 2, "mlp": 96, "vocab_size": 500}
TOY = {"toy": replace(REAL["llada-8b"], **TOY_SIZES)}


def geometries(toy: bool) -> dict[str, ModelSpec]:
    """Return the models whose shapes kernels are measured in, by name."""
    return TOY if toy else REAL


@dataclass(frozen=True)
class Case:
    """One operation at one shape.

    ``build(device)`` makes the keyword arguments that ``kernel`` and ``twin`` take alike; the meta device will do for
    recording launches. ``libraries`` are other people's implementations, by name, with the same arguments.
    ``min_capability`` is the oldest GPU that has what the kernel needs: 90 stands for sm_90.
    """

    name: str
    kernel: Callable[..., Any]
    twin: Callable[..., Any]
    build: Callable[[torch.device], dict[str, Any]]
    cost: Cost
    libraries: dict[str, Callable[..., Any]] = field(default_factory=dict)
    min_capability: int = 80


def random(*shape: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Normal numbers: inputs of zeros hide errors and can run faster than real ones."""
    return torch.randn(shape, device=device, dtype=torch.float32).to(dtype)
