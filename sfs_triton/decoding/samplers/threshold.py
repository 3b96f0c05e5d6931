"""Parallel decoding by a confidence threshold, block by block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ...errors import check_integer, check_number
from .base import LARGEST, BlockSampler


@dataclass(frozen=True, kw_only=True)
class Threshold(BlockSampler):
    """Confidence-aware parallel decoding (Fast-dLLM), block by block: the best position and all that reach ``tau``.

    A ``tau`` above 1 is never reached: one position per step.
    ``steps`` sets a quota: at most ``gen_length / steps`` positions per step plus the unused quota of earlier steps, as
    Fast-dLLM's sampler for Dream has it.
    """

    tau: float = 0.9
    steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("tau", self.tau)
        if self.steps is not None:
            check_integer("steps", self.steps, most=LARGEST)

    def batch_key(self) -> Threshold:
        return replace(super().batch_key(), tau=1.0)

    def sampling_values(self) -> dict[str, float]:
        return super().sampling_values() | {"tau": self.tau}

    def selection(self) -> dict[str, Any]:
        return {"select": "threshold", "paced_steps": self.steps}

    def step_cap(self, length: int) -> int:
        return 2 * length + (self.steps or 0) + 2
