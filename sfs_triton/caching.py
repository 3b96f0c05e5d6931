"""Cache policies: which rows of the canvas a step forwards, and what of them is kept for later steps.

A policy is a frozen description. From what the host knows of a row it names the row's next :class:`Scope`; it never
launches anything. ``region``, the package's own policy, is not part of this release.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from .errors import ArgumentError, require
from .models.cache import FeatureCache, KVCache, Scope


class RowView(NamedTuple):
    """Where one row of a generation stands, as the host reads it."""

    start: int
    limit: int  # one past the last position that is still computed
    block_start: int
    block_end: int
    e: int
    fast: bool
    k: int  # steps done in this stage or block
    step: int


def _needed(row: RowView) -> int:
    """One past the last position a forward needs: in SlowFast's fast stage, after its first step, the span's end."""
    return min(row.e, row.limit) if row.fast and row.k > 0 else row.limit


@dataclass(frozen=True)
class NoCache:
    """Recompute everything. SlowFast's fast stage, after its first step, forwards nothing beyond the span's end."""

    name = "none"
    by_block = False
    cache_class = None

    def opening(self, shifted: bool) -> str:
        """How a block begins, for the block machine (``BlockRules.opening``)."""
        return "normal"

    def scope(self, row: RowView) -> Scope:
        return Scope(0, _needed(row), _needed(row))


@dataclass(frozen=True)
class PrefixCache:
    """Fast-dLLM's prefix cache: one full forward opens a block, then the block and what follows it are forwarded."""

    name = "prefix"
    by_block = True
    cache_class = KVCache

    def opening(self, shifted: bool) -> str:
        return "first" if shifted else "repeat"

    def _stop(self, row: RowView) -> int:
        return row.limit

    def scope(self, row: RowView) -> Scope:
        if row.k == 0:
            return Scope(0, row.limit, row.limit, store=True)
        return Scope(row.block_start, self._stop(row), row.limit, store=True)


@dataclass(frozen=True)
class DualCache(PrefixCache):
    """Fast-dLLM's dual cache: as :class:`PrefixCache`, but what follows the block is cached as well."""

    name = "dual"

    def _stop(self, row: RowView) -> int:
        return min(row.block_end, row.limit)


@dataclass(frozen=True)
class RefreshCache:
    """dLLM-Cache: prompt and response are recomputed every ``prompt_interval`` and ``response_interval`` steps.

    Between them, the share ``ratio`` of response positions whose value vectors moved most is recomputed.
    """

    prompt_interval: int = 25
    response_interval: int = 5
    ratio: float = 0.25

    name = "refresh"
    by_block = False
    cache_class = FeatureCache

    def __post_init__(self) -> None:
        for name in ("prompt_interval", "response_interval"):
            value = getattr(self, name)
            require(
                isinstance(value, int) and not isinstance(value, bool) and value >= 1,
                f"{name}={value!r} is not an integer of at least 1",
            )
        require(isinstance(self.ratio, (int, float)) and 0 <= self.ratio <= 1, f"ratio={self.ratio!r} is not in [0, 1]")

    def opening(self, shifted: bool) -> str:
        """How a block begins, for the block machine (``BlockRules.opening``)."""
        return "normal"

    def scope(self, row: RowView) -> Scope:
        due = (row.step % self.prompt_interval == 0, row.step % self.response_interval == 0)
        return Scope(0, _needed(row), _needed(row), features=due)


CachePolicy = NoCache | PrefixCache | DualCache | RefreshCache
POLICIES = {"none": NoCache, "prefix": PrefixCache, "dual": DualCache, "refresh": RefreshCache}


def cache_policy(cache: str | CachePolicy, **options: Any) -> CachePolicy:
    """A policy by name, or the policy given."""
    if isinstance(cache, str):
        require(cache in POLICIES, f"cache={cache!r} is not one of {tuple(POLICIES)}")
        try:
            return POLICIES[cache](**options)
        except TypeError:
            raise ArgumentError(f"cache={cache!r} takes no options {sorted(options)}") from None
    require(isinstance(cache, tuple(POLICIES.values())), f"cache={cache!r} is not a policy or its name")
    return cache
