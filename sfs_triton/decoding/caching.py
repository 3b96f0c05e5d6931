"""Cache policies: the positions of the canvas that a step forwards, and the tensors it keeps for later steps.

A policy is a frozen description; it never launches anything. On the device, ``position_ranges`` or ``list_positions``
(:mod:`sfs_triton.ops`) compute the positions of every canvas from its state. On the host, :meth:`CachePolicy.exact` and
:meth:`CachePolicy.padded` give the shape of the forward that holds them: exact, from the progress as last read, or one
of a few padded shapes for which graphs are captured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

from ..errors import check_flag, check_integer, check_number, make_plain
from ..kernels.control import FAST, Progress
from ..models.cache import FeatureCache, Features, KVCache
from .samplers import Sampler
from .samplers.base import LARGEST
from .step_plan import Forward, Positions

_CAPACITY = 128  # positions that a GPU forwards in the time that it reads the weights of an 8B model
_COARSE = 64  # prompt lengths are rounded for padded shapes, so that more prompts share them


class BatchBounds(NamedTuple):
    """Bounds of the sequences that a persistent batch accepts."""

    length: int  # positions of a canvas
    shortest_prompt: int
    longest_prompt: int
    masks: int  # most undecided positions of a sequence
    response: int  # most positions of a sequence from the end of its prompt on


@dataclass(frozen=True)
class CachePolicy:
    """Base of all policies. ``to_span_end`` and ``block`` are arguments of ``position_ranges``."""

    name: ClassVar[str]
    by_block: ClassVar[bool] = False
    by_prompt: ClassVar[bool] = False  # padded shapes depend on prompt lengths
    by_list: ClassVar[bool] = False  # most steps forward a list of positions, which may be a part of those they decide
    store: ClassVar[type | None] = None
    to_span_end: ClassVar[bool] = False
    block: ClassVar[str | None] = None
    static_schedule: ClassVar[bool] = True  # the step number alone gives the padded shape
    period: ClassVar[int] = 1  # of the padded shapes, in steps

    span_cap: ClassVar[int | None] = None
    look_ahead: ClassVar[int] = 0
    rotate: ClassVar[bool] = False

    @property
    def rules(self) -> dict[str, Any]:
        """Keyword arguments of ``Sampler.rules`` that depend on the policy."""
        return {}

    def on_cpu(self, sampler: Sampler, response: int) -> CachePolicy:
        """Return this policy with what it leaves open, for ``response`` positions decoded on a CPU."""
        return self

    def opening(self, shifted: bool) -> str:
        """Return the kind of block start, for the block machine (``BlockRules.opening``)."""
        return "normal"

    def extra_steps(self, length: int) -> int:
        """Return the most steps that decide nothing while ``length`` positions are decoded."""
        return 0

    def span(self, progress: Progress) -> tuple[int, int, int]:
        """Return the range ``first, stop`` that a step forwards, and one past its last key.

        The host's twin of ``position_ranges``.
        """
        limit = progress.limit
        if self.block is not None and progress.stage_step > 0:
            return progress.block_start, limit if self.block == "rest" else min(progress.block_end, limit), limit
        later_fast = progress.stage == FAST and progress.stage_step > 0
        needed = min(progress.span_end, limit) if self.to_span_end and later_fast else limit
        return 0, needed, needed

    def candidates(self, progress: Progress, sampler: Sampler) -> int:
        """Return an upper bound of the number of positions that a step can decide, or needs the scores of."""
        first, stop = progress.block_start, progress.block_end
        if sampler.by_stage:
            first = progress.span_start
            slow_stop = min(stop, first + (self.span_cap or stop))
            stop = progress.span_end if progress.stage == FAST else slow_stop
        return min(max(stop - first, 0), progress.masks_left)

    def lists(self, step: int) -> bool:
        """Return whether a step forwards a list of positions that the device fills by priority."""
        return False

    def covered(self, progress: Progress, listed: int) -> int:
        """Count the positions that a step's forward covers; ``listed`` is the count of its list."""
        first, stop, _ = self.span(progress)
        return listed if self.lists(progress.step) else stop - first

    def recomputed(self, progress: Progress, covered: int) -> int:
        """Count the positions, of those covered, that go through the layers."""
        return covered

    def together(self, batch: Mapping[int, Progress]) -> list[list[int]]:
        """Group the slots whose sequences can take a step of exact shapes together."""
        return [list(batch)]

    def exact(self, batch: Mapping[int, Progress], sampler: Sampler) -> list[tuple[Forward, list[int]]]:
        """Return the forwards of a step of exact shapes with their slots: one per distinct range of positions."""
        groups: dict[Forward, list[int]] = {}
        for slot, at in batch.items():
            first, stop, keys = self.span(at)
            features = self._features(at.step, at.start, at.start)
            shape = Forward(Positions.RANGE, first, stop - first, keys, 0, features=features)
            groups.setdefault(shape, []).append(slot)
        return [
            (shape._replace(targets=self._most_candidates(batch, slots, sampler), canvases=len(slots)), slots)
            for shape, slots in groups.items()
        ]

    def _most_candidates(self, batch: Mapping[int, Progress], slots: Iterable[int], sampler: Sampler) -> int:
        return max(1, *(self.candidates(batch[slot], sampler) for slot in slots))

    def padded(self, bounds: BatchBounds, sampler: Sampler, step: int, opening: bool) -> Forward:
        """Return the padded shape that holds step number ``step`` of any sequence within ``bounds``.

        ``opening``: the step is the first of its block; it makes no difference with a static schedule.
        """
        # prompt lengths are bounds here: the shortest rounded down and the longest up, so that every sequence fits and
        # batches of similar prompts share their graphs
        longest = min(bounds.length, _coarse(bounds.longest_prompt + _COARSE - 1))
        features = self._features(step, _coarse(bounds.shortest_prompt), longest)
        window = self._window(bounds, sampler)
        return Forward(Positions.PREFIX, 0, bounds.length, bounds.length, window, ragged=True, features=features)

    def shapes(self, bounds: BatchBounds, sampler: Sampler) -> list[Forward]:
        """Return every shape that :meth:`padded` can return."""
        every = ((step, opening) for step in range(self.period) for opening in (True, False))
        return list(dict.fromkeys(self.padded(bounds, sampler, *each) for each in every))

    def _window(self, bounds: BatchBounds, sampler: Sampler) -> int:
        """Return the most candidates that a step of any sequence within ``bounds`` can have."""
        limits = (bounds.masks, sampler.most_candidates, self.span_cap if sampler.by_stage else None, bounds.length)
        return max(1, min(n for n in limits if n is not None))

    def _features(self, step: int, shortest: int, longest: int) -> Features | None:
        return None


@dataclass(frozen=True)
class NoCache(CachePolicy):
    """Recompute everything. After its first step, SlowFast's fast stage forwards nothing beyond the span's end."""

    name = "none"
    to_span_end = True


@dataclass(frozen=True)
class PrefixCache(CachePolicy):
    """Fast-dLLM's prefix cache: one full forward starts a block; its other steps forward the block and all after it."""

    name = "prefix"
    by_block = True
    by_prompt = True
    store = KVCache
    block = "rest"
    static_schedule = False

    def opening(self, shifted: bool) -> str:
        return "first" if shifted else "repeat"

    def padded(self, bounds: BatchBounds, sampler: Sampler, step: int, opening: bool) -> Forward:
        size = bounds.length if opening else self._most(bounds, sampler)
        return Forward(Positions.BLOCK, 0, size, bounds.length, self._window(bounds, sampler), ragged=True)

    def _most(self, bounds: BatchBounds, sampler: Sampler) -> int:
        """Return the most positions that a step after a block's first forwards."""
        return bounds.length - _coarse(bounds.shortest_prompt)


@dataclass(frozen=True)
class DualCache(PrefixCache):
    """Fast-dLLM's dual cache: as :class:`PrefixCache`, but positions after the block are cached as well."""

    name = "dual"
    by_prompt = False  # but without a block length
    block = "own"

    def _most(self, bounds: BatchBounds, sampler: Sampler) -> int:
        return min(bounds.length, sampler.block_length or super()._most(bounds, sampler))


@dataclass(frozen=True, kw_only=True)
class DelayedCache(PrefixCache):
    """d3LLM's delayed block cache, for several open blocks: forward all positions after the blocks that are cached.

    A finished block is cached once it has waited, and so has the prompt at the start. Until then, every step forwards
    the whole canvas: keys and values of all blocks are computed anew beside tokens that have just been committed.

    Args:
        delay: steps for which a finished block waits; 0 and 1 cache the prompt by the first step.
        refresh_every: interval, in steps, of other forwards of the whole canvas; None: there are none.
    """

    delay: int = 1
    refresh_every: int | None = None

    name = "delayed"

    def __post_init__(self) -> None:
        make_plain(self)
        check_integer("delay", self.delay, 0, LARGEST)
        if self.refresh_every is not None:
            check_integer("refresh_every", self.refresh_every, most=LARGEST)

    @property
    def rules(self) -> dict[str, Any]:
        return {"delay": self.delay, "refresh_every": self.refresh_every}

    def opening(self, shifted: bool) -> str:
        return "normal"


@dataclass(frozen=True)
class RefreshCache(CachePolicy):
    """dLLM-Cache: recompute the prompt every ``prompt_interval`` steps, the response every ``response_interval`` steps.

    Steps between recompute the share ``ratio`` of response positions whose value vectors changed most.
    """

    prompt_interval: int = 25
    response_interval: int = 5
    ratio: float = 0.25

    name = "refresh"
    by_prompt = True
    store = FeatureCache
    to_span_end = True

    def __post_init__(self) -> None:
        make_plain(self)
        for name in ("prompt_interval", "response_interval"):
            check_integer(name, getattr(self, name))
        check_number("ratio", self.ratio, most=1)

    @property
    def period(self) -> int:
        return math.lcm(self.prompt_interval, self.response_interval)

    def _features(self, step: int, shortest: int, longest: int) -> Features:
        due = (step % self.prompt_interval == 0, step % self.response_interval == 0)
        return Features(*due, self.ratio, shortest, longest)

    def recomputed(self, progress: Progress, covered: int) -> int:
        start, (_, stop, _) = progress.start, self.span(progress)
        due = self._features(progress.step, start, start)
        return start * due.prompt + (stop - start if due.response else due.moved(stop))


@dataclass(frozen=True, kw_only=True)
class RegionCache(CachePolicy):
    """Region cache: forward at most ``capacity`` positions per canvas against cached keys and values of all others.

    The list of positions is filled in this order: dirty positions; those that the step decides; ``look_ahead`` more
    beyond the span; and with ``rotate``, in the remaining capacity, the positions forwarded longest ago.

    Args:
        capacity: most positions per canvas and step; None: 128, and on a CPU as many more as a step may decide.
        span_cap: most candidates of a slow step of SlowFast, counted from the start of the cycle.
        look_ahead: positions beyond the span whose confidences seed the next cycle's horizon.
        refresh_every: interval, in steps, of forwards of the whole canvas; None: only the first step is one.
        rotate: use the remaining capacity for the positions forwarded longest ago.
    """

    capacity: int | None = None
    span_cap: int | None = None
    look_ahead: int = 0
    refresh_every: int | None = None
    rotate: bool = True

    name = "region"
    by_list = True
    store = KVCache

    def __post_init__(self) -> None:
        make_plain(self)
        for name, least in (("capacity", 2), ("span_cap", 1), ("refresh_every", 1)):
            if getattr(self, name) is not None:  # a shifted model decides a position by the row before it: two at least
                check_integer(name, getattr(self, name), least)
        check_integer("look_ahead", self.look_ahead, least=0)
        check_flag("rotate", self.rotate)

    @property
    def most(self) -> int:
        """Return the capacity, where none is given the usual one."""
        return _CAPACITY if self.capacity is None else self.capacity

    def on_cpu(self, sampler: Sampler, response: int) -> RegionCache:
        # arithmetic is the bound on a CPU: a list that cuts a window up saves nothing, and costs steps
        cap = self.span_cap if sampler.by_stage else None
        window = min([response, *(2 * n for n in (sampler.block_length, cap) if n is not None)])
        if self.capacity is not None or window <= _CAPACITY:
            return self
        return replace(self, capacity=-(-(window + 1) // 32) * 32)  # rounded up, so that more lengths share a batch

    @property
    def rules(self) -> dict[str, Any]:
        return {"look_ahead": self.look_ahead, "partial": True, "span_cap": self.span_cap}

    def extra_steps(self, length: int) -> int:
        return -(-length // self.most) + 1  # steps whose list is full of dirty positions

    def lists(self, step: int) -> bool:
        return step > 0 and (self.refresh_every is None or step % self.refresh_every > 0)

    def together(self, batch: Mapping[int, Progress]) -> list[list[int]]:
        groups = [[slot for slot, at in batch.items() if self.lists(at.step) == listed] for listed in (False, True)]
        return [group for group in groups if group]

    def exact(self, batch: Mapping[int, Progress], sampler: Sampler) -> list[tuple[Forward, list[int]]]:
        if not all(self.lists(at.step) for at in batch.values()):
            return super().exact(batch, sampler)
        limits = {at.limit for at in batch.values()}
        size = min(self.most, max(limits))
        targets = min(size, self._most_candidates(batch, batch, sampler) + self.look_ahead)
        shape = Forward(Positions.LIST, 0, size, max(limits), targets, ragged=len(limits) > 1, canvases=len(batch))
        return [(shape, list(batch))]

    @property
    def period(self) -> int:
        return self.refresh_every or 2

    def padded(self, bounds: BatchBounds, sampler: Sampler, step: int, opening: bool) -> Forward:
        if not self.lists(step):
            return super().padded(bounds, sampler, step, opening)
        size = min(self.most, bounds.length)
        targets = min(size, self._window(bounds, sampler) + self.look_ahead)
        return Forward(Positions.LIST, 0, size, bounds.length, targets, ragged=True)


def _coarse(length: int) -> int:
    return length // _COARSE * _COARSE


_EVERY = (NoCache, RegionCache, PrefixCache, DualCache, DelayedCache, RefreshCache)
POLICIES: dict[str, type[CachePolicy]] = {policy.name: policy for policy in _EVERY}
