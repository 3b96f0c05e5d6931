"""Entropy-bounded parallel decoding, block by block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ...errors import check_choice, check_integer, check_number
from ...ops.dispatch import Draw, NearDecided
from .base import LARGEST, BlockSampler
from .threshold import METRICS, check_sigma


@dataclass(frozen=True, kw_only=True)
class EntropyBound(BlockSampler):
    """EB-Sampler (arXiv 2505.24857): the best positions whose summed entropy stays under a bound.

    A step goes down the block's undecided positions, best first, and commits as long as the entropies of those before
    sum to at most ``bound``. A bound of 0 commits the best position alone.

    Args:
        bound: of the sum, in nats.
        metric: order of positions: ``"confidence"``, ``"margin"`` or ``"entropy"``, lowest first.
        least: positions that a step commits in any case.
        sigma: prior of certainty, with ``metric="confidence"``, as of ``Threshold``.
    """

    bound: float = 0.1
    metric: str = "entropy"
    least: int = 1
    sigma: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("bound", self.bound)
        check_choice("metric", self.metric, METRICS)
        check_integer("least", self.least, most=LARGEST)
        check_sigma(self.sigma, self.metric)

    def draw(self) -> Draw:
        return replace(super().draw(), metric=self.metric, entropy=True)

    def blanked(self) -> EntropyBound:
        return replace(super().blanked(), bound=0.0)

    def sampling_values(self) -> dict[str, float]:
        return super().sampling_values() | {"bound": self.bound}

    def narrowing(self) -> NearDecided | None:
        return None if self.sigma is None else NearDecided(self.sigma, None)

    def selection(self) -> dict[str, Any]:
        return {"select": "bound", "least": self.least}
