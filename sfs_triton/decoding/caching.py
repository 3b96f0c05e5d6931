"""Cache policies: the positions of the canvas that a step forwards, and the tensors it keeps for later steps.

A policy is a frozen description; it never launches anything. On the device, ``position_ranges`` or ``list_positions``
(:mod:`sfs_triton.ops`) compute the positions of every canvas from its state. On the host, :meth:`CachePolicy.tight` and
:meth:`CachePolicy.fixed` give the size of the step that holds them: exact, from the state as last read, or one of a few
padded sizes for which graphs are captured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from ..errors import require
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
    wanted: int  # upper bound of the number of candidates


class Span(NamedTuple):
    """Positions ``[first, stop)`` that a canvas forwards, and the keys ``[0, keys)`` that they attend to."""

    first: int
    stop: int
    keys: int


class Canvas(NamedTuple):
    """Bounds of the sequences that a batch must accept: canvas length, and min/max over the sequences."""

    length: int
    shortest_prompt: int
    longest_prompt: int
    window: int  # most candidates of a step per sequence
    block_length: int | None


class Shape(NamedTuple):
    """Shape of a step: all that the host must know to launch it, and the key of a captured graph.

    ``kind`` is the source of the positions: ``"same"``, ``[first, first + size)`` of every canvas, with all keys before
    ``keys``; ``"prefix"``, the first ``size`` of each canvas, of which the device sets the number in use; ``"list"``, a
    list of ``size`` that holds one contiguous range; ``"plan"``, a planned list of ``size``. ``targets`` is the room
    for positions to decide; ``ragged``: canvases differ in their keys. ``members`` are the slots to forward: a tuple of
    them, the number of leading ones in the order that ``Step.aim`` sets, or None for all. With ``aimed`` only the
    canvases that ``Step.aim`` selects take the step; all others keep their state.
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
    """Base of all policies. ``to_span_end`` and ``block`` are the arguments of ``position_ranges``."""

    name: ClassVar[str]
    by_block: ClassVar[bool] = False
    by_prompt: ClassVar[bool] = False  # fixed shapes depend on prompt lengths
    store: ClassVar[type | None] = None
    to_span_end: ClassVar[bool] = False
    block: ClassVar[str | None] = None
    foreseen: ClassVar[bool] = True  # the step number alone gives the fixed shape
    period: ClassVar[int] = 1  # of the fixed shapes, in steps

    span_cap: ClassVar[int | None] = None
    look_ahead: ClassVar[int] = 0
    rotate: ClassVar[bool] = False

    @property
    def rules(self) -> dict[str, Any]:
        """Keyword arguments of ``Sampler.rules`` that depend on the policy."""
        return {}

    def opening(self, shifted: bool) -> str:
        """Return the kind of block start, for the block machine (``BlockRules.opening``)."""
        return "normal"

    def extra_steps(self, length: int) -> int:
        """Return the most steps that decide nothing while ``length`` positions are decoded."""
        return 0

    def span(self, row: RowView) -> Span:
        """Return the range that a step forwards; the host's twin of ``position_ranges``."""
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
        """Count the positions, of those covered, that go through the layers."""
        return covered

    def together(self, rows: Sequence[RowView]) -> list[list[RowView]]:
        """Group the sequences that can take a step of exact shapes together."""
        return [list(rows)]

    def tight(self, rows: Sequence[RowView], canvas: Canvas) -> list[Shape]:
        """Return exact shapes for these sequences: one per distinct span."""
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
        """Return the padded shape that holds step number ``step`` of any sequence within the bounds ``canvas``.

        ``opening``: the step is the first of its block; it makes no difference where the shape is ``foreseen``.
        """
        # prompt lengths are bounds here: the shortest rounded down and the longest up, so that every sequence fits and
        # batches of similar prompts share their graphs
        shape = Shape("prefix", 0, canvas.length, canvas.length, canvas.window, ragged=True)
        longest = min(canvas.length, _coarse(canvas.longest_prompt + _COARSE - 1))
        return shape._replace(features=self._features(step, _coarse(canvas.shortest_prompt), longest))

    def shapes(self, canvas: Canvas) -> list[Shape]:
        """Return every shape that :meth:`fixed` can return."""
        every = (self.fixed(canvas, step, opening) for step in range(self.period) for opening in (True, False))
        return list(dict.fromkeys(every))

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
    """Fast-dLLM's dual cache: as :class:`PrefixCache`, but positions after the block are cached as well."""

    name = "dual"
    by_prompt = False  # but without a block length
    block = "own"

    def _most(self, canvas: Canvas) -> int:
        return min(canvas.length, canvas.block_length or super()._most(canvas))


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
    """Region cache: forward at most ``capacity`` positions per canvas against cached keys and values of all others.

    The list of positions is filled in this order: dirty positions; those that the step decides; ``look_ahead`` more
    beyond the span; and with ``rotate``, in the remaining capacity, the positions forwarded longest ago.

    Args:
        capacity: most positions per canvas and step.
        span_cap: most candidates of a slow step of SlowFast, counted from the start of the cycle.
        look_ahead: positions beyond the span whose confidences seed the next cycle's horizon.
        refresh_every: interval, in steps, of forwards of the whole canvas; None: only the first step is one.
        rotate: use the remaining capacity for the positions forwarded longest ago.
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
        return -(-length // self.capacity) + 1  # steps whose list is full of dirty positions

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
