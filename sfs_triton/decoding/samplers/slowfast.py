"""SlowFast Sampling: cycles of a slow and a fast stage."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ...errors import check_choice, check_flag, check_integer, check_number, require
from ...kernels.rules import ROUNDINGS, SLOW_ENDS, CycleRules
from .base import LARGEST, Sampler

SPREADS = ("variance", "std", "unbiased")


@dataclass(frozen=True, kw_only=True)
class SlowFast(Sampler):
    """SlowFast Sampling (arXiv 2506.10848). Defaults are the paper's; :meth:`preset` has the references' own.

    Each cycle starts with at most ``k_max`` cautious steps, each of which also estimates how far positions are
    predictable; once the last ``window`` estimates agree, everything up to there is filled in parallel.

    Args:
        tau_min: confidence of a candidate for the horizon.
        tau_high: confidence for parallel unmasking in the fast stage.
        tau_slow: the same in the slow stage; None unmasks only the best position there. No confidence exceeds 1, so
            a threshold above it is never reached: without candidates the horizon is ``s + 1``, and without positions
            over ``tau_high`` a step fills the best one.
        k_max, window: most slow steps per cycle; number of horizons in the stability test.
        spread, spread_limit, inclusive: the stability test, ``spread < limit`` (or ``<=``).
        strict: whether thresholds must be exceeded or reached.
        slow_end: the slow stage ends at stability, after exactly ``k_max`` steps, or after ``k_max`` or when full.
        rounding: of the mean horizon that is used where stability is not reached.
        zero_history: the window starts filled with zeros.
        min_parallel, min_parallel_slow: least number of positions over the threshold for taking them all.
        block_length, max_cycles: semi-autoregressive blocks, and the most cycles spent on one.
        share_stable: the step that becomes stable, the last of its slow stage, also commits what the fast stage would
            take from the same logits: of the positions undecided before the step in ``[s, e)`` all over ``tau_high``,
            if they are ``min_parallel``. A span that is full after it needs no fast stage. Only with
            ``slow_end="stable"``.
        eos_horizon: whether a position whose chosen token is end-of-text can be a candidate for the horizon. It can be
            filled either way.
    """

    tau_min: float = 0.1
    tau_high: float = 0.85
    tau_slow: float | None = None
    k_max: int = 8
    window: int = 2
    spread: str = "variance"
    spread_limit: float = 1.0
    inclusive: bool = False
    strict: bool = True
    slow_end: str = "stable"
    rounding: str = "floor"
    zero_history: bool = False
    min_parallel: int = 1
    min_parallel_slow: int = 1
    block_length: int | None = None
    max_cycles: int | None = None
    share_stable: bool = False
    eos_horizon: bool = True

    by_stage = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tau_min", "tau_high", "spread_limit"):
            check_number(name, getattr(self, name))
        if self.tau_slow is not None:
            check_number("tau_slow", self.tau_slow)
        for name in ("k_max", "window", "min_parallel", "min_parallel_slow"):
            check_integer(name, getattr(self, name), most=LARGEST)
        for name in ("block_length", "max_cycles"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), most=LARGEST)
        check_choice("spread", self.spread, SPREADS)
        check_choice("slow_end", self.slow_end, SLOW_ENDS)
        check_choice("rounding", self.rounding, ROUNDINGS)
        for name in ("inclusive", "strict", "zero_history", "share_stable", "eos_horizon"):
            check_flag(name, getattr(self, name))
        require(
            not self.share_stable or self.slow_end == "stable",
            f"share_stable=True does not go with slow_end={self.slow_end!r}: only slow_end='stable' ends the slow "
            "stage with the step that becomes stable",
        )

    def blanked(self) -> SlowFast:
        return replace(super().blanked(), tau_min=1.0, tau_high=1.0, tau_slow=None)

    def sampling_values(self) -> dict[str, float]:
        never = math.inf if self.tau_slow is None else self.tau_slow
        return super().sampling_values() | {"tau_min": self.tau_min, "tau_slow": never, "tau": self.tau_high}

    def check_cache(self, policy) -> None:
        require(
            not policy.by_block,
            f"cache={policy.name!r} works by block and does not go with SlowFast; use 'none', 'region' or 'refresh'",
        )

    def rules(
        self, opening: str = "normal", *, look_ahead: int = 0, partial: bool = False, span_cap: int | None = None
    ) -> CycleRules:
        """Return the rules of the cycle machine; arguments come from the cache policy.

        Args:
            opening: for the block machine; not used here.
            look_ahead: how many positions beyond the span fast steps score, to start the next cycle's history.
            partial: row lists may leave out positions that a step would decide.
            span_cap: with ``partial``: most candidates of a slow step.
        """
        check_integer("look_ahead", look_ahead, 0, most=LARGEST)
        require(
            not (look_ahead and self.zero_history),
            f"look_ahead={look_ahead} does not go with zero_history=True: there is no empty history to start",
        )
        if span_cap is not None:
            check_integer("span_cap", span_cap, most=LARGEST)
            require(
                not self.zero_history,
                f"span_cap={span_cap} does not go with zero_history=True: a mean over zeros may move a cycle's begin "
                "back, and then so short a window may hold nothing to decide",
            )
        deviation = self.spread == "std"  # compared as a variance, because square roots differ between devices
        return CycleRules(
            k_max=self.k_max,
            window=self.window,
            spread="variance" if deviation else self.spread,
            spread_limit=self.spread_limit * self.spread_limit if deviation else self.spread_limit,
            inclusive=self.inclusive,
            strict=self.strict,
            slow_end=self.slow_end,
            rounding=self.rounding,
            zero_history=self.zero_history,
            min_parallel=self.min_parallel,
            min_parallel_slow=self.min_parallel_slow,
            block_length=self.block_length,
            max_cycles=self.max_cycles,
            eos_stop=self.eos_stop,
            share_stable=self.share_stable,
            eos_horizon=self.eos_horizon,
            look_ahead=look_ahead,
            partial=partial,
            span_cap=span_cap,
        )

    def step_cap(self, length: int) -> int:
        """Return a step limit for ``length`` positions: each cycle commits at least one of them."""
        return length * (self.k_max + 1) + self.k_max


PRESETS = {
    "paper": SlowFast(),
    # not a reference's preset: chosen by measurement, docs/settings.md
    "fast": SlowFast(tau_high=0.95, tau_slow=0.95, share_stable=True),
    "llada-reference": SlowFast(
        tau_min=0.3,
        tau_high=0.9,
        tau_slow=0.9,
        k_max=6,
        window=2,
        spread="std",
        strict=False,
        slow_end="fixed",
        min_parallel=2,
        min_parallel_slow=2,
    ),
    "dream-reference": SlowFast(
        tau_min=0.1,
        tau_high=0.9,
        tau_slow=0.8,
        k_max=6,
        window=2,
        spread="unbiased",
        inclusive=True,
        strict=False,
        slow_end="filled",
        rounding="even",
        zero_history=True,
        min_parallel=2,
        min_parallel_slow=2,
    ),
}
SlowFast.presets = PRESETS
