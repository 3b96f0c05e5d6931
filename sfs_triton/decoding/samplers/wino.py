"""WINO: commit many positions, and take back those that the others have made doubtful."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ...errors import check_number, require
from ...ops.dispatch import Draw, Revocable
from .base import BlockSampler


@dataclass(frozen=True, kw_only=True)
class WINO(BlockSampler):
    """WINO (arXiv 2507.18578): commits are wide, and can be taken back.

    Per step all positions of the block over ``tau`` are committed, at most 70% of the undecided ones and at most 20, or
    the best one. Where that is more than one, positions of the block that earlier steps committed become undecided
    again if their token's probability is below ``tau_back``, given all others but not the token itself. Fewer are taken
    back than the step before committed, so a block takes no more steps than it has positions.

    Args:
        tau: confidence above which a position is committed.
        tau_back: probability below which a token is taken back; 0 takes none.
    """

    tau: float = 0.6
    tau_back: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("tau", self.tau)
        check_number("tau_back", self.tau_back)
        require(not self.eos_stop, "eos_stop=True does not go with WINO, which may take an end-of-text back")
        require(self.cfg_scale == 0, f"cfg_scale={self.cfg_scale!r} does not go with WINO, which has no guidance")

    def check_cache(self, policy) -> None:
        require(
            policy.name in ("none", "region"),
            f"cache={policy.name!r} does not go with WINO, which takes positions back; use 'none' or 'region'",
        )

    def draw(self) -> Draw:
        return replace(super().draw(), verify=True)

    def blanked(self) -> WINO:
        return replace(super().blanked(), tau=1.0, tau_back=0.0)

    def sampling_values(self) -> dict[str, float]:
        return super().sampling_values() | {"tau": 0.0, "tau_low": self.tau, "bound": self.tau_back}

    def narrowing(self) -> Revocable:
        return Revocable()

    def selection(self) -> dict[str, Any]:
        return {"select": "threshold"}
