"""LocalLeap: a lower threshold around confident positions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ...errors import check_integer, check_number
from .base import LARGEST, BlockSampler
from .fixed import check_counts


@dataclass(frozen=True, kw_only=True)
class LocalLeap(BlockSampler):
    """LocalLeap (arXiv 2510.07081): positions near a confident one need less confidence.

    Per step the block's best position, all that reach ``tau`` (the anchors), and all within ``radius`` of an anchor
    that reach ``tau_near``. With ``steps``, a step commits the count of an even schedule instead of all that reach
    ``tau``, and only those of them that reach ``tau`` are anchors, as in the package dlmserve.

    Args:
        tau: confidence of an anchor. Above 1 there is none.
        tau_near: confidence for committing a position near an anchor.
        radius: distance, in positions, up to which a position is near.
        steps: of the schedule, for the whole response; None commits by confidence alone.
    """

    tau: float = 0.9
    tau_near: float = 0.75
    radius: int = 4
    steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("tau", self.tau)
        check_number("tau_near", self.tau_near)
        check_integer("radius", self.radius, 0, LARGEST)
        if self.steps is not None:
            check_integer("steps", self.steps, most=LARGEST)

    def check_cache(self, policy) -> None:
        super().check_cache(policy)
        if self.steps is not None:
            check_counts(self, policy)

    def blanked(self) -> LocalLeap:
        steps = None if self.steps is None else 1
        return replace(super().blanked(), tau=1.0, tau_near=1.0, steps=steps)

    def sampling_values(self) -> dict[str, float]:
        return super().sampling_values() | {"tau": self.tau, "tau_low": self.tau_near}

    def selection(self) -> dict[str, Any]:
        return {"select": "leap", "radius": self.radius, "counted": self.steps is not None}

    def block_steps(self, length: int) -> int:
        """Return the steps of the schedule per block, rounded down, at least 1; 0 without a schedule."""
        return 0 if self.steps is None else self.share_of_steps(self.steps, length)
