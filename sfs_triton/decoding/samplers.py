"""Samplers as frozen, validated records. Every threshold and every selection rule is set here and nowhere else."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch

from ..errors import check_choice, check_flag, check_integer, check_number, require
from ..kernels.rules import ROUNDINGS, SLOW_ENDS, BlockRules, CycleRules
from ..ops.dispatch import Draw

SPREADS = ("variance", "std", "unbiased")
LARGEST = 1_000_000  # of whole numbers: no canvas has so many positions
FIXED_METRICS = ("confidence", "maskgit_plus", "topk_margin", "entropy", "origin")


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Parameters that all samplers share.

    Args:
        temperature: 0 takes the most likely token; above, Gumbel noise keyed by seed, token, position and step.
        top_p, top_k: limits of the tokens that can be drawn.
        cfg_scale: classifier-free guidance, ``c + cfg_scale * (c - u)``, with the given positions masked in ``u``.
        eos_stop: stop at the leftmost committed end-of-text; later positions become end-of-text and are not computed.
    """

    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    cfg_scale: float = 0.0
    eos_stop: bool = False

    by_stage: ClassVar[bool] = False  # works in cycles of a slow and a fast stage, not block by block
    block_length = None

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature)
        require(
            self.temperature == 0 or self.temperature >= 1e-6,
            f"temperature={self.temperature!r} is neither 0 nor at least 1e-6",
        )
        check_number("cfg_scale", self.cfg_scale)
        check_flag("eos_stop", self.eos_stop)
        if self.top_p is not None:
            check_number("top_p", self.top_p)
            require(0 < self.top_p <= 1, f"top_p={self.top_p!r} is not in (0, 1]")
        if self.top_k is not None:
            check_integer("top_k", self.top_k, most=LARGEST)

    def replace(self, **changes: Any) -> Sampler:
        """Return a copy with some fields changed."""
        unknown = set(changes) - {f.name for f in fields(self)}
        require(not unknown, f"{type(self).__name__} has no setting {sorted(unknown)}")
        return replace(self, **changes)

    def draw(self) -> Draw:
        """Return the rules for drawing and scoring tokens."""
        return Draw(noise=self.temperature > 0, nucleus=self.has_nucleus, top_k=self.top_k)

    @property
    def has_nucleus(self) -> bool:
        """True if ``top_p`` is below 1."""
        return self.top_p is not None and self.top_p < 1

    def batch_key(self) -> Sampler:
        """Return this sampler with its per-sequence numbers (:meth:`sampling_values`) blanked.

        Sequences can share a batch if these are equal."""
        return replace(self, temperature=float(self.temperature > 0), top_p=1e-3 if self.has_nucleus else None)

    def sampling_values(self) -> dict[str, float]:
        """Return the per-sequence parameters, which may differ within a batch: those of ``SAMPLING`` that it uses."""
        return {"temperature": self.temperature or 1.0, "top_p": self.top_p if self.has_nucleus else math.inf}

    def block_steps(self, length: int) -> int:
        """Return the steps that a schedule gives to each block of ``length`` response positions; 0 without one."""
        return 0

    def schedule_sizes(self, longest: int) -> dict[str, int]:
        """Return the sizes of the tensors that hold a sequence's schedule, for responses of up to ``longest``."""
        return {}

    def schedule(self, length: int, seed: int) -> dict[str, list[float] | torch.Tensor]:
        """Return the values of those tensors for one sequence."""
        return {}

    def check_cache(self, policy) -> None:
        """Refuse a cache policy that does not work with this sampler."""

    @property
    def least_length(self) -> int:
        """Least response length; for infilling, where ``gen_length`` must be valid and is not used."""
        return self.block_length or 1

    def check_length(self, length: int) -> None:
        """Refuse a response length that is not a multiple of the block length."""
        block = self.block_length
        require(block is None or length % block == 0, f"gen_length={length} is not a multiple of block_length={block}")


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
    name: str = "paper"

    by_stage = True

    def __post_init__(self) -> None:
        Sampler.__post_init__(self)
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

    @classmethod
    def preset(cls, name: str = "paper", **changes: Any) -> SlowFast:
        """Return one of :data:`PRESETS`, with some fields changed."""
        check_choice("preset", name, PRESETS)
        return PRESETS[name].replace(**changes)

    def batch_key(self) -> SlowFast:
        return replace(super().batch_key(), tau_min=1.0, tau_high=1.0, tau_slow=None, name="")

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
    "fast": SlowFast(name="fast", tau_high=0.95, tau_slow=0.95, share_stable=True),
    "llada-reference": SlowFast(
        name="llada-reference",
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
        name="dream-reference",
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


@dataclass(frozen=True, kw_only=True)
class Threshold(Sampler):
    """Confidence-aware parallel decoding (Fast-dLLM), block by block: the best position and all that reach ``tau``.

    A ``tau`` above 1 is never reached: one position per step.
    ``steps`` sets a quota: at most ``gen_length / steps`` positions per step plus the unused quota of earlier steps, as
    Fast-dLLM's sampler for Dream has it.
    """

    tau: float = 0.9
    block_length: int | None = 32
    steps: int | None = None

    def __post_init__(self) -> None:
        Sampler.__post_init__(self)
        check_number("tau", self.tau)
        for name in ("block_length", "steps"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), most=LARGEST)

    def batch_key(self) -> Threshold:
        return replace(super().batch_key(), tau=1.0)

    def sampling_values(self) -> dict[str, float]:
        return super().sampling_values() | {"tau": self.tau}

    def rules(
        self, opening: str = "normal", *, look_ahead: int = 0, partial: bool = False, span_cap: int | None = None
    ) -> BlockRules:
        """The settings as the block machine takes them; arguments are the cache policy's.

        ``look_ahead`` and ``span_cap`` are for the cycle machine; blocks have neither.
        """
        return BlockRules(
            block_length=self.block_length,
            by_threshold=True,
            paced_steps=self.steps,
            opening=opening,
            eos_stop=self.eos_stop,
            partial=partial,
        )

    def step_cap(self, length: int) -> int:
        return 2 * length + (self.steps or 0) + 2


@dataclass(frozen=True, kw_only=True)
class FixedSteps(Sampler):
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
        Sampler.__post_init__(self)
        check_choice("metric", self.metric, FIXED_METRICS)
        check_number("eps", self.eps)
        require(0 < self.eps < 1, f"eps={self.eps!r} is not in (0, 1)")
        for name in ("block_length", "steps"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), most=LARGEST)

    def check_cache(self, policy) -> None:
        if policy.name == "region":
            block = self.block_length
            require(
                block is not None and 2 * block < policy.capacity,
                f"block_length={block} does not go with cache='region', capacity={policy.capacity}: FixedSteps counts "
                f"what a step commits over a whole block, so set block_length below {policy.capacity / 2:g}",
            )

    def batch_key(self) -> FixedSteps:
        """Blank the number of steps as well, unless steps follow a time schedule."""
        form = super().batch_key()
        return replace(form, steps=None, eps=FixedSteps.eps) if self.metric == "confidence" else form

    def draw(self) -> Draw:
        score = {"topk_margin": "margin", "entropy": "entropy"}.get(self.metric, "confidence")
        return Draw(
            metric=score,
            noise=self.temperature > 0,
            nucleus=self.has_nucleus,
            top_k=self.top_k,
            tempered=self.metric != "confidence",
        )

    def block_steps(self, length: int) -> int:
        """Return the steps per block for ``length`` response positions: part of ``steps``, rounded down, at least 1."""
        blocks = -(-length // (self.block_length or length))
        return max(1, (self.steps or length) // blocks)

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

    def rules(
        self, opening: str = "normal", *, look_ahead: int = 0, partial: bool = False, span_cap: int | None = None
    ) -> BlockRules:
        """The settings as the block machine takes them; arguments are the cache policy's.

        ``look_ahead`` and ``span_cap`` are for the cycle machine; blocks have neither.
        """
        return BlockRules(
            block_length=self.block_length,
            schedule="even" if self.metric == "confidence" else "timesteps",
            at_random=self.metric == "origin",
            opening=opening,
            eos_stop=self.eos_stop,
            partial=partial,
        )

    def step_cap(self, length: int) -> int:
        return (self.block_steps(length) + 2) * -(-length // (self.block_length or length)) + 2


# Names on the command line, in requests and in evaluations; ``vanilla`` is one token per step.
SAMPLERS: dict[str, type[Sampler]] = {
    "slowfast": SlowFast,
    "threshold": Threshold,
    "fixed": FixedSteps,
    "vanilla": FixedSteps,
}
