"""Multi-block decoding: several blocks open at once, with a threshold on the entropy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ...errors import check_flag, check_number, require
from ...ops.dispatch import Draw
from .base import BlockSampler


@dataclass(frozen=True, kw_only=True)
class MultiBlock(BlockSampler):
    """Multi-block decoding of d3LLM (arXiv 2601.07568): a block opens before the one ahead of it is full.

    Per step all positions of the open blocks whose entropy is at most ``entropy``, the one with the lowest, and at
    least one of the leftmost block with masks. Then the next block opens if the last open one is decoded to a share of
    ``open_at``; 0 opens one block per step.

    Args:
        entropy: of the distribution at a position, in nats.
        open_at: share of the last open block, from 0 to 1.
        strict: an entropy must be below the limit, not at it.
        keep_best: commit the position with the lowest entropy in any case; without it only the leftmost block is sure
            to get one.
    """

    entropy: float = 0.5
    open_at: float = 0.1
    strict: bool = False
    keep_best: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("entropy", self.entropy)
        check_number("open_at", self.open_at, most=1)
        check_flag("strict", self.strict)
        check_flag("keep_best", self.keep_best)
        require(self.block_length is not None, "block_length=None leaves MultiBlock no second block")

    def check_cache(self, policy) -> None:
        require(
            not policy.by_block or policy.name == "delayed",
            f"cache={policy.name!r} works by block and does not go with MultiBlock; use 'none', 'region', 'refresh' or "
            "'delayed'",
        )

    def draw(self) -> Draw:
        return replace(super().draw(), metric="entropy")

    def blanked(self) -> MultiBlock:
        return replace(super().blanked(), entropy=0.0)

    def sampling_values(self) -> dict[str, float]:
        return super().sampling_values() | {"tau": -self.entropy}  # scores are negative entropies

    @property
    def most_candidates(self) -> None:
        return None

    @property
    def open_blocks(self) -> int:
        return 1 if self.open_at else 2  # the first step already sees the block that it opens

    def selection(self) -> dict[str, Any]:
        size = self.block_length
        fits = (masks for masks in range(size, -1, -1) if 1 - masks / size >= self.open_at)
        least = int(self.keep_best)
        return {"select": "open", "least": least, "strict": self.strict, "open_masks": next(fits)}


MultiBlock.presets = {  # of published checkpoints
    "d3llm-llada": MultiBlock(),
    "d3llm-dream": MultiBlock(strict=True, keep_best=False),
}
