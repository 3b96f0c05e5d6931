"""Parallel decoding by a confidence threshold, block by block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ...errors import check_choice, check_integer, check_number, require
from ...ops.dispatch import Draw, NearDecided, WithinFactor
from .base import LARGEST, BlockSampler

METRICS = ("confidence", "margin", "entropy")
WIDEST = 100  # of a prior: a step sums 16 products per unit of its width and position


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
        factor: Fast-dLLM's factor, in place of ``tau``: in order of confidence, all before the first position, the
            ``n``-th, for which ``(n + 1) * (1 - confidence)`` reaches it. If there is none, all but the last.
        sigma: prior of certainty (d2Cache): a confidence is multiplied by the share of decided positions around it,
            weighted by a bell curve of this width.
    """

    tau: float = 0.9
    metric: str = "confidence"
    least: int = 1
    steps: int | None = None
    factor: float | None = None
    sigma: float | None = None

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
        check_sigma(self.sigma, self.metric)
        if self.factor is not None:
            self._check_factor(self.factor)

    def _check_factor(self, factor: float) -> None:
        check_number("factor", factor)
        require(factor > 0, f"factor={factor!r} is not above 0")
        plain = {"metric": "confidence", "tau": Threshold.tau, "steps": None}
        for name, usual in plain.items():
            value = getattr(self, name)
            require(value == usual, f"factor={factor!r} does not go with {name}={value!r}")

    def draw(self) -> Draw:
        return replace(super().draw(), metric=self.metric)

    def blanked(self) -> Threshold:
        return replace(super().blanked(), **({"tau": 1.0} if self.factor is None else {"factor": 1.0}))

    def sampling_values(self) -> dict[str, float]:
        own = {"tau": -self.tau if self.metric == "entropy" else self.tau}
        if self.factor is not None:
            own = {"tau": 0.0, "bound": self.factor}
        return super().sampling_values() | own

    def narrowing(self) -> NearDecided | WithinFactor | None:
        rule = None if self.factor is None else WithinFactor(self.least)
        return rule if self.sigma is None else NearDecided(self.sigma, rule)

    def selection(self) -> dict[str, Any]:
        return {"select": "threshold", "least": self.least, "paced_steps": self.steps}

    def step_cap(self, length: int) -> int:
        return super().step_cap(length) + (self.steps or 0)


def check_sigma(sigma: float | None, metric: str) -> None:
    """Raise unless ``sigma`` is None, or the width of a prior on scores by ``metric``."""
    if sigma is not None:
        check_number("sigma", sigma, most=WIDEST)
        require(sigma > 0, f"sigma={sigma!r} is not above 0")
        require(metric == "confidence", f"sigma={sigma!r} does not go with metric={metric!r}")
