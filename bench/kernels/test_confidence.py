"""Token and score from logits: kernel, eager torch and torch.compile."""

from __future__ import annotations

from functools import partial

import torch

from sfs_triton.kernels.confidence import confidence, confidence_cost
from sfs_triton.ops.torch import confidence as twin

from .case import Case, geometries, random
from .harness import benchmark_of

VARIANTS = {
    "noise": {"noise": True},
    "tempered": {"noise": True, "tempered": True},
    "margin": {"metric": "margin"},
    "entropy": {"metric": "entropy"},
}


def _build(device: torch.device, *, n_rows: int, n_columns: int, dtype: torch.dtype, settings: dict) -> dict:
    settings = dict(settings)
    if settings.pop("noise", False):
        settings |= {name: torch.arange(n_rows, device=device) for name in ("seed", "position", "step")}
        settings["temperature"] = torch.full((n_rows,), 0.7, device=device)
    return {"logits": random(n_rows, n_columns, device=device, dtype=dtype), **settings}


def _twin(logits: torch.Tensor, **settings) -> tuple[torch.Tensor, torch.Tensor]:
    """The twin may overwrite float32 logits."""
    return twin.confidence(logits.clone() if logits.dtype == torch.float32 else logits, **settings)


def cases(toy: bool = False) -> list[Case]:
    rows = (4,) if toy else (1, 32, 512)
    dtype = torch.float32 if toy else torch.bfloat16
    shapes = [(n_rows, "", {}) for n_rows in rows]
    shapes += [(rows[-1] if toy else 32, f"-{name}", settings) for name, settings in VARIANTS.items()]
    return [
        Case(
            name=f"{name}-{n_rows}{suffix}",
            kernel=confidence,
            twin=_twin,
            build=partial(_build, n_rows=n_rows, n_columns=geometry.vocab_size, dtype=dtype, settings=settings),
            cost=confidence_cost(n_rows, geometry.vocab_size, dtype.itemsize),
        )
        for name, geometry in geometries(toy).items()
        for n_rows, suffix, settings in shapes
    ]


test_confidence = benchmark_of(cases)
