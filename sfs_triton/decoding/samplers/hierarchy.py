"""Hierarchical decoding: the best position of each gap, block by block."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from ...errors import check_number, require
from .base import BlockSampler


@dataclass(frozen=True, kw_only=True)
class Hierarchy(BlockSampler):
    """Hierarchical decoding (dInfer, arXiv 2510.08666): commit in the middle of every gap at once.

    Per step the block's best position, all over ``tau``, and the best of each run of undecided positions if it is over
    ``tau_low``.

    Args:
        tau: confidence above which a position is committed.
        tau_low: confidence above which the best of a run is committed; None: always.
    """

    tau: float = 0.92
    tau_low: float | None = 0.62

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("tau", self.tau)
        if self.tau_low is not None:
            check_number("tau_low", self.tau_low)
            require(self.tau_low <= self.tau, f"tau_low={self.tau_low!r} is above tau={self.tau!r}")

    def blanked(self) -> Hierarchy:
        return replace(super().blanked(), tau=1.0, tau_low=None)

    def sampling_values(self) -> dict[str, float]:
        low = -math.inf if self.tau_low is None else self.tau_low
        return super().sampling_values() | {"tau": self.tau, "tau_low": low}

    def selection(self) -> dict[str, Any]:
        return {"select": "runs", "strict": True}
