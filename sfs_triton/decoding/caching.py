"""Cache policies: which rows of the canvas a step forwards, and what of them is kept for later steps.

A policy is a frozen description; it never launches anything. Two things follow from it. On the device, ``reach`` or
``plan`` (:mod:`sfs_triton.ops`) find every canvas' rows from its state. On the host, :meth:`CachePolicy.tight` and
:meth:`CachePolicy.fixed` say how large a step has to be to hold them: as small as the host's last look at the state
allows, or one of a few sizes that a graph is captured for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from ..errors import ArgumentError, require
from ..models.cache import FeatureCache, Features, KVCache

_COARSE = 64  # prompt lengths are rounded for fixed shapes, so that more prompts share them


class RowView(NamedTuple):
    """Progress of one sequence, as the host last read it."""

    index: int
    start: int
    limit: int  # one past the last position that is still computed
    block_start: int
    block_end: int
    e: int
    fast: bool
    k: int  # steps done in this stage or block
    step: int
    wanted: int  # at most so many positions are looked at


class Span(NamedTuple):
    """The rows ``[first, stop)`` that a canvas forwards, and the keys ``[0, keys)`` that they see."""

    first: int
    stop: int
    keys: int


class Canvas(NamedTuple):
    """Bounds of the sequences that a batch must accept: canvas length, and extremes over the sequences."""

    length: int
    shortest_prompt: int
    longest_prompt: int
    window: int  # most positions that a step looks at in a row
    block_length: int | None


class Shape(NamedTuple):
    """Size of a step: all that the host must know to launch it, and the key of a captured graph.

    ``kind`` says where the rows come from: ``"same"``, ``[first, first + size)`` of every canvas, with all keys before
    ``keys``; ``"prefix"``, the canvas' first ``size``, of which each uses as many as the device says; ``"list"``, a
    list of ``size`` with one contiguous stretch; ``"plan"``, a list of ``size`` that is planned. ``targets`` is the
    room for rows whose tokens are wanted, ``ragged`` whether canvases differ in their keys. ``members`` are the slots
    whose canvases go along: these, or the first so many of those that the step is aimed at, or (None) all of them.
    ``aimed`` says that only canvases that the step is aimed at take it; all others are left as they are.
    """

    kind: str
    first: int
    size: int
    keys: int
    targets: int
    ragged: bool = False
    features: Features | None = None
    members: tuple[int, ...] | int | None = None
    aimed: bool = False


@dataclass(frozen=True)
class CachePolicy:
    """Base of all policies. ``to_span_end`` and ``block`` are the arguments of ``reach``."""

    name: ClassVar[str]
    by_block: ClassVar[bool] = False
    by_prompt: ClassVar[bool] = False  # whether fixed shapes depend on the prompts' lengths
    store: ClassVar[type | None] = None
    to_span_end: ClassVar[bool] = False
    block: ClassVar[str | None] = None
    foreseen: ClassVar[bool] = True  # whether a step's fixed shape follows from its number alone
    period: ClassVar[int] = 1  # of the fixed shapes, in steps

    span_cap: ClassVar[int | None] = None
    look_ahead: ClassVar[int] = 0
    rotate: ClassVar[bool] = False

    @property
    def rules(self) -> dict[str, Any]:
        """Keyword arguments of ``Sampler.rules`` that depend on the policy."""
        return {}

    def opening(self, shifted: bool) -> str:
        """Return how a block starts, for the block machine (``BlockRules.opening``)."""
        return "normal"

    def extra_steps(self, length: int) -> int:
        """Most steps of decoding ``length`` positions that cannot decide anything."""
        return 0

    def span(self, row: RowView) -> Span:
        """The host's twin of ``reach``."""
        if self.block is not None and row.k > 0:
            return Span(
                row.block_start, row.limit if self.block == "rest" else min(row.block_end, row.limit), row.limit
            )
        needed = min(row.e, row.limit) if self.to_span_end and row.fast and row.k > 0 else row.limit
        return Span(0, needed, needed)

    def planned(self, step: int) -> bool:
        """Return whether a step forwards a planned list of positions."""
        return False

    def covered(self, row: RowView, listed: int) -> int:
        """Count the positions that a step's forward covers; ``listed`` is the count of its planned list."""
        span = self.span(row)
        return listed if self.planned(row.step) else span.stop - span.first

    def recomputed(self, row: RowView, covered: int) -> int:
        """Count those that go through the layers."""
        return covered

    def together(self, rows: Sequence[RowView]) -> list[list[RowView]]:
        """The rows, in groups that can take a step of tight shapes together."""
        return [list(rows)]

    def tight(self, rows: Sequence[RowView], canvas: Canvas) -> list[Shape]:
        """Shapes that hold just what these rows need: one for all rows whose spans are equal."""
        groups: dict[Shape, list[RowView]] = {}
        for row in rows:
            first, stop, keys = self.span(row)
            shape = Shape("same", first, stop - first, keys, 0, features=self._features(row.step, row.start, row.start))
            groups.setdefault(shape, []).append(row)
        return [
            shape._replace(targets=max(1, *(r.wanted for r in group)), members=tuple(r.index for r in group))
            for shape, group in groups.items()
        ]

    def fixed(self, canvas: Canvas, step: int, opening: bool) -> Shape:
        """The size for capture that holds what any row may need at its step of this number. ``opening``: it is at the
        begin of its block, which is not asked where the shape is ``foreseen``."""
        shape = Shape("prefix", 0, canvas.length, canvas.length, canvas.window, ragged=True)
        longest = min(canvas.length, _coarse(canvas.longest_prompt + _COARSE - 1))
        return shape._replace(features=self._features(step, _coarse(canvas.shortest_prompt), longest))

    def shapes(self, canvas: Canvas) -> list[Shape]:
        """Every shape that :meth:`fixed` can give."""
        every = (self.fixed(canvas, step, opening) for step in range(self.period) for opening in (True, False))
        return list(dict.fromkeys(every))

    def _features(self, step: int, shortest: int, longest: int) -> Features | None:
        return None


@dataclass(frozen=True)
class NoCache(CachePolicy):
    """Recompute everything. SlowFast's fast stage, after its first step, forwards nothing beyond the span's end."""

    name = "none"
    to_span_end = True


@dataclass(frozen=True)
class PrefixCache(CachePolicy):
    """Fast-dLLM's prefix cache: one full forward opens a block, then the block and what follows it are forwarded."""

    name = "prefix"
    by_block = True
    by_prompt = True
    store = KVCache
    block = "rest"
    foreseen = False

    def opening(self, shifted: bool) -> str:
        return "first" if shifted else "repeat"

    def fixed(self, canvas: Canvas, step: int, opening: bool) -> Shape:
        size = canvas.length if opening else self._most(canvas)
        return Shape("list", 0, size, canvas.length, canvas.window, ragged=True)

    def _most(self, canvas: Canvas) -> int:
        return canvas.length - _coarse(canvas.shortest_prompt)


@dataclass(frozen=True)
class DualCache(PrefixCache):
    """Fast-dLLM's dual cache: as :class:`PrefixCache`, but what follows the block is cached as well."""

    name = "dual"
    by_prompt = False  # but without a block length
    block = "own"

    def _most(self, canvas: Canvas) -> int:
        return min(canvas.length, canvas.block_length or super()._most(canvas))


@dataclass(frozen=True)
class RefreshCache(CachePolicy):
    """dLLM-Cache: prompt and response are recomputed every ``prompt_interval`` and ``response_interval`` steps.

    Between them, the share ``ratio`` of response positions whose value vectors moved most is recomputed.
    """

    prompt_interval: int = 25
    response_interval: int = 5
    ratio: float = 0.25

    name = "refresh"
    by_prompt = True
    store = FeatureCache
    to_span_end = True

    def __post_init__(self) -> None:
        for name in ("prompt_interval", "response_interval"):
            _check_count(name, getattr(self, name))
        require(isinstance(self.ratio, (int, float)) and 0 <= self.ratio <= 1, f"ratio={self.ratio!r} is not in [0, 1]")

    @property
    def period(self) -> int:
        return math.lcm(self.prompt_interval, self.response_interval)

    def _features(self, step: int, shortest: int, longest: int) -> Features:
        due = (step % self.prompt_interval == 0, step % self.response_interval == 0)
        return Features(*due, self.ratio, shortest, longest)

    def recomputed(self, row: RowView, covered: int) -> int:
        due, stop = self._features(row.step, row.start, row.start), self.span(row).stop
        return row.start * due.prompt + (stop - row.start if due.response else due.moved(stop))


@dataclass(frozen=True, kw_only=True)
class RegionCache(CachePolicy):
    """A step forwards a list of at most ``capacity`` rows of each canvas against cached keys and values of all others.

    The list holds, in this order of claim: positions that were committed since they were last forwarded; those that the
    step decides; ``look_ahead`` more beyond the span; and with ``rotate``, in what room is left, those that were not
    forwarded for longest.

    Args:
        capacity: rows of a step.
        span_cap: in its slow stage, SlowFast looks at no more than so many positions beyond the cycle's begin.
        look_ahead: positions beyond the span whose confidences seed the next cycle's horizon.
        refresh_every: forward the whole canvas every so many steps; None: only in the first.
        rotate: use what room is left for the positions that were not forwarded for longest.
    """

    capacity: int = 128
    span_cap: int | None = None
    look_ahead: int = 0
    refresh_every: int | None = None
    rotate: bool = True

    name = "region"
    store = KVCache

    def __post_init__(self) -> None:
        _check_count("capacity", self.capacity, least=2)  # a shifted model decides a position by the row before it
        for name in ("span_cap", "refresh_every"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name))
        _check_count("look_ahead", self.look_ahead, least=0)
        require(isinstance(self.rotate, bool), f"rotate={self.rotate!r} is neither True nor False")

    @property
    def rules(self) -> dict[str, Any]:
        return {"look_ahead": self.look_ahead, "partial": True, "span_cap": self.span_cap}

    def extra_steps(self, length: int) -> int:
        return -(-length // self.capacity) + 1  # steps whose list is full of positions that were just committed

    def planned(self, step: int) -> bool:
        return step > 0 and (self.refresh_every is None or step % self.refresh_every > 0)

    def together(self, rows: Sequence[RowView]) -> list[list[RowView]]:
        groups = [[row for row in rows if self.planned(row.step) == planned] for planned in (False, True)]
        return [group for group in groups if group]

    def tight(self, rows: Sequence[RowView], canvas: Canvas) -> list[Shape]:
        if not self.planned(rows[0].step):
            return super().tight(rows, canvas)
        limits = {row.limit for row in rows}
        size = min(self.capacity, max(limits))
        targets = min(size, max(1, *(row.wanted + self.look_ahead for row in rows)))
        members = tuple(row.index for row in rows)
        return [Shape("plan", 0, size, max(limits), targets, ragged=len(limits) > 1, members=members)]

    @property
    def period(self) -> int:
        return self.refresh_every or 2

    def fixed(self, canvas: Canvas, step: int, opening: bool) -> Shape:
        if not self.planned(step):
            return super().fixed(canvas, step, opening)
        size = min(self.capacity, canvas.length)
        return Shape("plan", 0, size, canvas.length, min(size, canvas.window + self.look_ahead), ragged=True)


def _coarse(length: int) -> int:
    return length // _COARSE * _COARSE


def _check_count(name: str, value: Any, least: int = 1) -> None:
    fine = isinstance(value, int) and not isinstance(value, bool) and value >= least
    require(fine, f"{name}={value!r} is not an integer of at least {least}")


POLICIES = {policy.name: policy for policy in (NoCache, RegionCache, PrefixCache, DualCache, RefreshCache)}


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
