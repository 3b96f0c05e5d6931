"""CreditDecoding: earlier predictions of a position count for its token."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ...errors import check_number
from ...ops.dispatch import CreditRules, Draw, NearBest
from .base import BlockSampler

NEAR = 1e-5  # positions whose confidences differ from the best one's by less are committed with it, as in dInfer


@dataclass(frozen=True, kw_only=True)
class Credit(BlockSampler):
    """CreditDecoding (arXiv 2510.06133): a token that keeps being predicted at a position becomes more likely there.

    Per step each undecided position's most likely token gains credit, and all credit fades. Credit raises logits, from
    which token and confidence are taken. The block's best position and all that reach ``tau`` are committed.

    Args:
        tau: confidence to reach; above 1 it is never reached.
        weight: of credit: ``weight * ln(credit + 1)`` is added to a logit. 0 is none.
        decay: of credit, per step; 0 forgets it at once.
        power: a prediction gains its probability to this power; 0 makes all predictions count alike.
    """

    tau: float = 0.9
    weight: float = 0.7
    decay: float = 0.8
    power: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("tau", self.tau)
        check_number("weight", self.weight, most=1000)
        check_number("decay", self.decay, most=1)
        check_number("power", self.power, most=1000)

    def draw(self) -> Draw:
        return replace(super().draw(), credit=CreditRules(self.weight, self.decay, self.power))

    def blanked(self) -> Credit:
        return replace(super().blanked(), tau=1.0)

    def sampling_values(self) -> dict[str, float]:
        return super().sampling_values() | {"tau": 0.0, "tau_low": self.tau}

    def narrowing(self) -> NearBest:
        return NearBest(NEAR)

    def selection(self) -> dict[str, Any]:
        return {"select": "threshold"}
