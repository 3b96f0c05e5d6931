"""KLASS: positions whose prediction is confident and has come to rest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ...errors import check_choice, check_integer, check_number
from ...ops.dispatch import CalmOrBest, Draw
from .base import LARGEST, BlockSampler

TAKEN = ("all", "confident", "calm")


@dataclass(frozen=True, kw_only=True)
class KLASS(BlockSampler):
    """KLASS (arXiv 2511.05664): commit what is confident and no longer changes from step to step.

    Per step all positions of the block that reach ``tau`` and whose distribution diverged from that of the step before
    by less than ``divergence``, in each of the last ``history`` steps; where there is none, the best position.

    Args:
        tau: confidence to reach.
        divergence: Kullback-Leibler divergence, in nats, to stay below. A first look diverges by about 27.
        history: steps of the block in which it must have done so.
        take: of those positions, ``"all"``, the most ``"confident"`` one, or the ``"calm"`` one, of least divergence.
        least: best positions that a step commits where there are none of those.
    """

    tau: float = 0.9
    divergence: float = 0.01
    history: int = 2
    take: str = "all"
    least: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("tau", self.tau)
        check_number("divergence", self.divergence)
        check_integer("history", self.history, most=LARGEST)
        check_choice("take", self.take, TAKEN)
        check_integer("least", self.least, most=LARGEST)

    def draw(self) -> Draw:
        return replace(super().draw(), divergence=True)

    def blanked(self) -> KLASS:
        return replace(super().blanked(), tau=1.0, divergence=0.0)

    def sampling_values(self) -> dict[str, float]:
        return super().sampling_values() | {"tau": 0.0, "tau_low": self.tau, "bound": self.divergence}

    def narrowing(self) -> CalmOrBest:
        return CalmOrBest(self.history, self.take, self.least)

    def selection(self) -> dict[str, Any]:
        return {"select": "threshold"}
