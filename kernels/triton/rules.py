"""Rules of the cycle and the block machine: one record each for kernels, torch twins and samplers.

Thresholds are not among them: they are per sequence, in the columns of :data:`~sfs_triton.kernels.control.SAMPLING`.
Nothing here needs triton.
"""

from __future__ import annotations

from dataclasses import dataclass

SPREADS = ("variance", "unbiased")
SLOW_ENDS = ("stable", "fixed", "filled")
ROUNDINGS = ("floor", "even")
SELECTIONS = ("threshold", "leap", "bound", "runs", "open", "even", "shares", "random")
OPENINGS = ("normal", "repeat", "first")


@dataclass(frozen=True)
class CycleRules:
    """Rules of the slow/fast cycle machine, in which the paper and the reference implementations differ.

    Args:
        k_max: most slow steps per cycle.
        window: number of candidate horizons in the stability test.
        spread: ``"variance"`` or ``"unbiased"`` variance of the horizons. A standard deviation is compared as its
            variance with the squared limit.
        spread_limit, inclusive: horizons are stable if their spread is below the limit, or at it where inclusive.
        strict: confidences must exceed a threshold, not just reach it.
        slow_end: the slow stage ends at stability (``"stable"``), after ``k_max`` steps (``"fixed"``), or after
            ``k_max`` steps or with no mask left (``"filled"``).
        rounding: of the window's mean: ``"floor"``, or ``"even"`` for halves to the even neighbour.
        zero_history: the window starts as zeros and counts as full.
        min_parallel, min_parallel_slow: least number of positions over the threshold, in the fast and the slow stage,
            for committing all of them; below it the best position alone is committed.
        block_length: length of a semi-autoregressive block; None is one block.
        max_cycles: most cycles per block.
        eos_stop: the leftmost committed end-of-text ends the sequence.
        share_stable: the step that becomes stable also fills the span as the fast stage would.
        eos_horizon: end-of-text can end the candidate horizon.
        look_ahead: number of positions beyond the span, scored in fast steps, that start the next cycle's history.
        partial: a list may lack positions that a step would decide; a sequence whose list has none of them waits.
        span_cap: with ``partial``: most candidates of a slow step, as the position lists have it.
    """

    k_max: int
    window: int
    spread: str
    spread_limit: float
    inclusive: bool
    strict: bool
    slow_end: str
    rounding: str
    zero_history: bool
    min_parallel: int
    min_parallel_slow: int
    block_length: int | None
    max_cycles: int | None
    eos_stop: bool
    share_stable: bool = False
    eos_horizon: bool = True
    look_ahead: int = 0
    partial: bool = False
    span_cap: int | None = None

    def __post_init__(self) -> None:
        _check_choice("spread", self.spread, SPREADS)
        _check_choice("slow_end", self.slow_end, SLOW_ENDS)
        _check_choice("rounding", self.rounding, ROUNDINGS)
        for name in ("k_max", "window", "block_length", "span_cap"):
            _check_positive(name, getattr(self, name))
        _require(self.look_ahead >= 0, f"look_ahead={self.look_ahead} is negative")
        _require(
            not (self.look_ahead and self.zero_history), f"look_ahead={self.look_ahead} does not go with zero_history"
        )
        _require(
            not self.share_stable or self.slow_end == "stable",
            f"share_stable does not go with slow_end={self.slow_end!r}",
        )


@dataclass(frozen=True)
class BlockRules:
    """Rules of the block machine: which of the block's undecided positions a step commits.

    The number of steps per block of a schedule is per sequence (``state.block_steps``), since lengths differ.

    Args:
        select: beside the ``least`` best positions, ``"threshold"``: all that reach ``tau``; ``"leap"``: the same, and
            all within ``radius`` of a position that reaches ``tau`` and themselves reach ``tau_low``; ``"bound"``: in
            order of score, as long as the entropies before a position sum to at most ``bound``; ``"runs"``: all over
            ``tau``, and the best of each run of undecided positions if it is over ``tau_low``; ``"open"``: all that
            reach ``tau`` in the open blocks, and at least one of the leftmost block with masks. Or a schedule:
            ``"even"``: counts spread over the block's steps; ``"shares"``: shares of the positions left, the best of
            them; ``"random"``: the same shares, as probabilities (Dream's ``"origin"``).
        block_length: length of a block; None is one block.
        least: number of best positions that each step commits.
        strict: scores must exceed ``tau``, not just reach it.
        radius: with ``"leap"``: how far an anchor reaches.
        counted: with ``"leap"``: commit the counts of the even schedule instead of ``least`` and of all that reach
            ``tau``; only these can be anchors.
        open_masks: with ``"open"``: the next block opens once the last open one has at most so many masks.
        delay: with ``"open"``: a finished block waits so many steps, all of the whole canvas, before it is cached, and
            positions from the last cached block on are forwarded by the others. None: no block is cached.
        refresh_every: with ``delay``: every so many steps the whole canvas is forwarded.
        paced_steps: with a threshold: at most length / ``paced_steps`` positions per step, plus the unused quota of
            earlier steps.
        opening: ``"repeat"``: a block takes at least two forwards; ``"first"``: and the first of them commits only the
            block's first masked position, whose logits need the row before the block.
        eos_stop: the leftmost committed end-of-text ends the sequence.
        partial: a list may lack positions of the block; a sequence whose list has none of them waits.
    """

    select: str
    block_length: int | None
    least: int = 1
    strict: bool = False
    radius: int = 0
    counted: bool = False
    open_masks: int = 0
    delay: int | None = None
    refresh_every: int | None = None
    paced_steps: int | None = None
    opening: str = "normal"
    eos_stop: bool = False
    partial: bool = False

    def __post_init__(self) -> None:
        _check_choice("select", self.select, SELECTIONS)
        _check_choice("opening", self.opening, OPENINGS)
        for name in ("paced_steps", "block_length", "refresh_every"):
            _check_positive(name, getattr(self, name))
        _require(
            self.paced_steps is None or self.select == "threshold",
            f"paced_steps={self.paced_steps} does not go with select={self.select!r}",
        )
        _require(
            self.delay is None or self.select == "open", f"delay={self.delay} does not go with select={self.select!r}"
        )

    @property
    def scheduled(self) -> bool:
        """True if a schedule says how many steps a block takes."""
        return self.select in ("even", "shares", "random")

    @property
    def shared(self) -> bool:
        """True if steps commit the shares of a schedule."""
        return self.select in ("shares", "random")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, f"{name}={value!r} is not one of {allowed}")


def _check_positive(name: str, value: int | None) -> None:
    _require(value is None or value >= 1, f"{name}={value} is not positive")
