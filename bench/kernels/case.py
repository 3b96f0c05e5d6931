"""Cases that are measured and compiled ahead of time: every kernel at the shapes of the models it is made for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from sfs_triton.kernels.cost import Cost


@dataclass(frozen=True)
class Geometry:
    """Sizes of a model, as its checkpoint's configuration has them."""

    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    mlp: int
    vocab: int

    @property
    def qkv(self) -> int:
        return (self.n_heads + 2 * self.n_kv_heads) * self.head_dim


GEOMETRIES = {
    "llada-8b": Geometry(d_model=4096, n_heads=32, n_kv_heads=32, head_dim=128, mlp=12288, vocab=126464),
    "illada-8b": Geometry(d_model=4096, n_heads=32, n_kv_heads=8, head_dim=128, mlp=14336, vocab=155136),
    "dream-7b": Geometry(d_model=3584, n_heads=28, n_kv_heads=4, head_dim=128, mlp=18944, vocab=152064),
}
TOY = {"toy": Geometry(d_model=64, n_heads=4, n_kv_heads=2, head_dim=16, mlp=96, vocab=500)}


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
