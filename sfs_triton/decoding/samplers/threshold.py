"""Parallel decoding by a confidence threshold, block by block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ...errors import check_choice, check_integer, check_number, require
from ...ops.dispatch import Draw
from .base import LARGEST, BlockSampler

METRICS = ("confidence", "margin", "entropy")


@dataclass(frozen=True, kw_only=True)
class Threshold(BlockSampler):
    """Confidence-aware parallel decoding (Fast-dLLM), block by block: the best position and all that reach ``tau``.

    Args:
        tau: confidence to reach, or margin; above 1 it is never reached. With ``metric="entropy"`` the highest entropy,
            in nats (dParallel's threshold).
        metric: ``"confidence"``, ``"margin"`` or ``"entropy"``.
        least: positions that a step commits in any case.
        steps: sets a quota: at most ``gen_length / steps`` positions per step plus the unused quota of earlier steps,
            as Fast-dLLM's sampler for Dream has it.
    """

    tau: float = 0.9
    metric: str = "confidence"
    least: int = 1
    steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("tau", self.tau)
        check_choice("metric", self.metric, METRICS)
        check_integer("least", self.least, most=LARGEST)
        require(
            self.steps is None or self.least == 1,
            f"least={self.least} does not go with steps={self.steps}: the quota of a step may be smaller",
        )
        if self.steps is not None:
            check_integer("steps", self.steps, most=LARGEST)

    def draw(self) -> Draw:
        return replace(super().draw(), metric=self.metric)

    def blanked(self) -> Threshold:
        return replace(super().blanked(), tau=1.0)

    def sampling_values(self) -> dict[str, float]:
        return super().sampling_values() | {"tau": -self.tau if self.metric == "entropy" else self.tau}

    def selection(self) -> dict[str, Any]:
        return {"select": "threshold", "least": self.least, "paced_steps": self.steps}

    def step_cap(self, length: int) -> int:
        return super().step_cap(length) + (self.steps or 0)
