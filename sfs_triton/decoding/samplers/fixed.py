"""Schedules: a fixed number of steps, each of which commits a number of positions known beforehand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ...errors import check_choice, check_integer, check_number, require
from ...ops.dispatch import Draw
from .base import LARGEST, BlockSampler

FIXED_METRICS = ("confidence", "maskgit_plus", "topk_margin", "entropy", "origin")


def check_counts(sampler: BlockSampler, policy) -> None:
    """Refuse a cache that may list only a part of a block, of which a schedule counts all positions."""
    if policy.by_list:
        block = sampler.block_length
        require(
            block is not None and 2 * block < policy.most,
            f"block_length={block} does not go with cache={policy.name!r}, capacity={policy.most}: a fixed schedule "
            "(samplers 'fixed' and 'vanilla', or steps) counts what a step commits over a whole block, so set "
            f"block_length below {policy.most / 2:g}",
        )


@dataclass(frozen=True, kw_only=True)
class FixedSteps(BlockSampler):
    """A fixed number of steps, each committing a scheduled count of positions: LLaDA's and Dream's own samplers.

    ``metric="confidence"`` is LLaDA's low-confidence remasking (counts spread evenly over the steps of each block;
    one position per step where ``steps`` is None). Dream's are ``maskgit_plus``, ``topk_margin``, ``entropy`` and
    ``origin`` (positions at random): counts follow its time schedule with ``eps``, and tokens and scores are taken
    after temperature, top-p and top-k.
    """

    steps: int | None = None
    metric: str = "confidence"
    block_length: int | None = None
    eps: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("metric", self.metric, FIXED_METRICS)
        require(
            self.metric != "origin" or self.eos != "last",
            "eos='last' does not go with metric='origin', which commits positions at random",
        )
        check_number("eps", self.eps)
        require(0 < self.eps < 1, f"eps={self.eps!r} is not in (0, 1)")
        if self.steps is not None:
            check_integer("steps", self.steps, most=LARGEST)

    def check_cache(self, policy) -> None:
        super().check_cache(policy)
        check_counts(self, policy)

    def blanked(self) -> FixedSteps:
        """Blank the number of steps as well, unless steps follow a time schedule."""
        form = super().blanked()
        return replace(form, steps=None, eps=FixedSteps.eps) if self.metric == "confidence" else form

    def draw(self) -> Draw:
        score = {"topk_margin": "margin", "entropy": "entropy"}.get(self.metric, "confidence")
        return replace(super().draw(), metric=score, tempered=self.metric != "confidence")

    def block_steps(self, length: int) -> int:
        """Return the steps per block for ``length`` response positions: part of ``steps``, rounded down, at least 1."""
        return self.share_of_steps(self.steps or length, length)

    def shares(self, length: int) -> list[float]:
        """Return the share of undecided positions that Dream's time schedule commits per step of a block (float32)."""
        times = torch.linspace(1, self.eps, self.block_steps(length) + 1, dtype=torch.float32)
        return (1 - times[1:] / times[:-1]).tolist()

    def schedule_sizes(self, longest: int) -> dict[str, int]:
        if self.metric == "confidence":
            return {}
        steps = [(length, self.block_steps(length)) for length in range(1, longest + 1)]
        sizes = {"shares": max(count for _, count in steps)}
        if self.metric == "origin":
            sizes["uniform"] = max(length * count for length, count in steps)
        return sizes

    def schedule(self, length: int, seed: int) -> dict[str, list[float] | torch.Tensor]:
        if self.metric == "confidence":
            return {}
        values = {"shares": self.shares(length)}
        if self.metric == "origin":  # positions at random
            source = torch.Generator().manual_seed(seed)
            count = len(values["shares"]) * length
            values["uniform"] = torch.rand(count, generator=source, dtype=torch.float32)
        return values

    def selection(self) -> dict[str, Any]:
        return {"select": {"confidence": "even", "origin": "random"}.get(self.metric, "shares")}

    def step_cap(self, length: int) -> int:
        return (self.block_steps(length) + 2) * -(-length // (self.block_length or length)) + 2
