"""Requests to an engine: canvases and their decoding parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..decoding.caching import CachePolicy
from ..decoding.params import SEEDS, check_pair
from ..decoding.samplers import Sampler
from ..errors import require


class Kind(NamedTuple):
    """Batch key: the settings that sequences of one batch share. ``sampler`` is a form, so its per-sequence parameters
    are not read. ``trace``, ``frames``: publish each step's decision inputs, and the canvases after it."""

    sampler: Sampler
    policy: CachePolicy
    trace: bool
    frames: bool

    def serves(self, other: Kind) -> bool:
        """Return whether sequences of another key can join this batch: at least as much is published."""
        alike = (self.sampler, self.policy) == (other.sampler, other.policy)
        return alike and self.trace >= other.trace and self.frames >= other.frames


@dataclass(frozen=True)
class Request:
    """Checked arguments of a generation: canvases of token ids, first decoded positions, decoding parameters."""

    canvases: list[list[int]]
    starts: list[int]
    sampler: Sampler
    policy: CachePolicy
    seeds: list[int]
    trace: bool = False
    frames: bool = False

    def __post_init__(self) -> None:
        check_pair(self.sampler, self.policy)
        for seed in self.seeds:
            require(0 <= seed < SEEDS, f"seed={seed} is not in [0, 2**63)")

    @property
    def kind(self) -> Kind:
        return Kind(self.sampler.form(), self.policy, self.trace, self.frames)
