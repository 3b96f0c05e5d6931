"""Random tiny models and calls, on which the properties of this folder are tested.

Weights are float32 and random, and confidences stay away from 1, so that two candidates are exactly equal with
probability zero: whatever makes two ways of computing one thing differ is a bug until it is understood.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st

from sfs_triton import (
    DualCache,
    Engine,
    FixedSteps,
    Generation,
    NoCache,
    PrefixCache,
    RefreshCache,
    RegionCache,
    Sampler,
    SlowFast,
    Threshold,
)
from sfs_triton.decoding.caching import CachePolicy
from sfs_triton.decoding.params import DecodingParams
from sfs_triton.decoding.samplers import PRESETS
from sfs_triton.decoding.samplers.fixed import FIXED_METRICS
from sfs_triton.decoding.samplers.slowfast import ROUNDINGS, SLOW_ENDS, SPREADS
from sfs_triton.errors import SequenceFault
from sfs_triton.models import Transformer
from sfs_triton.models.spec import ModelSpec
from sfs_triton.models.weights import LayerWeights, Weights
from sfs_triton.runner import CudaGraphs, Eager
from sfs_triton.scheduling.sequence import Sequence
from tests.support.combinations import Roomy, assert_same, goes_with, stand_in

ROOM = 96  # most positions of a model here
EXECUTIONS = {
    "exact": lambda: Eager(exact=True),
    "padded": lambda: Eager(exact=False),
    "graphs": lambda: CudaGraphs(capture=stand_in),
    "graphs ahead": lambda: CudaGraphs(ahead=3, capture=stand_in),
    "roomy": lambda: Roomy(Eager(exact=True), 7),
    "roomy padded": lambda: Roomy(Eager(exact=False), 19),
}
SHARPNESS = (0.5, 1.0, 1.7, 2.5, 3.0)  # standard deviation of the logits


@dataclass(frozen=True)
class Made:
    """A model as it is drawn: its spec, the seed and scale of its weights, and whether it may predict the mask."""

    spec: ModelSpec
    seed: int
    sharpness: float
    mask_out: bool

    def engine(self, backend: str = "torch", device: str = "cpu") -> Engine:
        return Engine(Transformer(self.spec, weights_of(self, device), backend))


@dataclass(frozen=True)
class Case:
    """One call of ``generate``, or of ``infill`` where ``lengths`` is None."""

    model: Made
    prompts: list[list[int]]
    lengths: list[int] | None
    sampler: Sampler
    policy: CachePolicy
    seeds: list[int]

    def canvas(self, index: int) -> tuple[list[int], int]:
        """Return a sequence's canvas, and the position from which it is decoded."""
        prompt = self.prompts[index]
        if self.lengths is None:
            return prompt, 0
        return prompt + [self.model.spec.mask_id] * self.lengths[index], len(prompt)

    def sequences(self) -> list[Sequence]:
        """Return the sequences of the call, with a trace."""
        found = []
        for index, seed in enumerate(self.seeds):
            canvas, start = self.canvas(index)
            # infilling has no response length: one that goes with the sampler
            length = self.sampler.block_length or 1 if self.lengths is None else self.lengths[index]
            params = DecodingParams(sampler=self.sampler, cache=self.policy, gen_length=length, seed=seed)
            found.append(Sequence(params, canvas, start, self.model.spec.mask_id, trace=True, infilled=start == 0))
        return found

    def run(self, engine: Engine, order: list[int] | None = None, **options: Any) -> list[Generation | str]:
        """Return the outcomes of the sequences in ``order`` (default: all), in one batch."""
        order = list(range(len(self.prompts))) if order is None else order
        prompts = [self.prompts[index] for index in order]
        common = {"sampler": self.sampler, "cache": self.policy, "seed": [self.seeds[index] for index in order]}
        common |= options
        if self.lengths is None:
            return outcomes(lambda: engine.infill(prompts, **common), len(order))
        lengths = [self.lengths[index] for index in order]
        return outcomes(lambda: engine.generate(prompts, gen_length=lengths, **common), len(order))


def outcomes(call: Callable[[], list[Generation]], count: int) -> list[Generation | str]:
    """Return the result of a call per sequence: its generation, or the kind of fault that ended it."""
    try:
        return call()
    except SequenceFault as fault:
        return [fault.finished.get(index, type(fault).__name__) for index in range(count)]


def assert_outcomes(mine: list[Generation | str], wanted: list[Generation | str]) -> None:
    assert [x for x in mine if isinstance(x, str)] == [x for x in wanted if isinstance(x, str)]
    for one, other in zip(mine, wanted, strict=True):
        assert isinstance(one, str) == isinstance(other, str)
        if not isinstance(one, str):
            assert_same(one, other)


# ------------------------------------------------------------------------------------------------------------- models


def weights_of(made: Made, device: str = "cpu") -> Weights:
    """Make weights with which every part of the transformer matters: projections keep the scale of their inputs.

    Where the mask is not to be predicted, the first hidden dimension is the same positive number for every token, no
    layer writes to it, and the mask's row of the head is a large negative multiple of it.
    """
    spec, generator = made.spec, torch.Generator().manual_seed(made.seed)
    d, kv, mlp = spec.d_model, spec.kv_width, spec.mlp

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device)

    def norm() -> torch.Tensor:
        return 1 + normal(d, scale=0.1)

    def layer() -> LayerWeights:
        bias = normal(d + 2 * kv, scale=0.5) if spec.qkv_bias else None
        out, down = normal(d, d, scale=d**-0.5), normal(d, mlp, scale=2 * mlp**-0.5)
        if made.mask_out:
            out[0] = down[0] = 0
        qkv, gate_up = normal(d + 2 * kv, d, scale=1.5 * d**-0.5), normal(2 * mlp, d, scale=d**-0.5)
        return LayerWeights(norm(), qkv, bias, out, norm(), gate_up, down)

    embedding, head_scale = normal(spec.vocab_size, d), made.sharpness * d**-0.5
    layers, final = tuple(layer() for _ in range(spec.n_layers)), norm()
    if spec.tied_head:
        embedding *= head_scale
        return Weights(embedding, layers, final, embedding)
    head = normal(spec.vocab_size, d, scale=head_scale)
    if made.mask_out:
        embedding[:, 0], head[:, 0], head[spec.mask_id] = 1.0, 0.0, 0.0
        head[spec.mask_id, 0] = -1e4
    return Weights(embedding, layers, final, head)


@st.composite
def models(draw: st.DrawFn, head_dims: tuple[int, ...] = (2, 4, 6, 8, 16), mask_out: bool | None = None) -> Made:
    """Models of every shape that a spec allows. With ``mask_out`` none that may predict the mask."""
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    vocab = draw(st.integers(20, 200))
    mask_id, eos_id = draw(st.lists(st.integers(0, vocab - 1), min_size=2, max_size=2, unique=True))
    hidden = draw(st.booleans()) if mask_out is None else mask_out
    spec = ModelSpec(
        family="llada",
        n_layers=draw(st.integers(1, 3)),
        d_model=kv_heads * group * draw(st.sampled_from(head_dims)),
        n_heads=kv_heads * group,
        n_kv_heads=kv_heads,
        mlp=draw(st.integers(1, 24)),
        vocab_size=vocab,
        max_length=ROOM,
        rope_theta=draw(st.sampled_from([10.0, 1e4, 5e5])),
        norm_eps=draw(st.sampled_from([1e-6, 1e-5])),
        mask_id=mask_id,
        eos_id=eos_id,
        pad_id=eos_id,
        qkv_bias=draw(st.booleans()),
        tied_head=False if hidden else draw(st.booleans()),
        shifted=draw(st.booleans()),
    )
    return Made(spec, draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from(SHARPNESS)), hidden)


# ------------------------------------------------------------------------------------------------ samplers and policies


def maybe(strategy: st.SearchStrategy) -> st.SearchStrategy:
    return st.none() | strategy


# Thresholds that no confidence of a random model equals, but for those that ask for all or for none.
BETWEEN = st.integers(1, 98).map(lambda n: n / 100 + 0.0014142)
SHARES = BETWEEN | st.sampled_from([0.0, 1.01])
BLOCKS = maybe(st.sampled_from([1, 2, 3, 4, 5, 8]))


@st.composite
def slowfast(draw: st.DrawFn) -> SlowFast:
    if draw(st.booleans()):
        return draw(st.sampled_from(sorted(PRESETS)).map(SlowFast.preset)).replace(block_length=draw(BLOCKS))
    slow_end = draw(st.sampled_from(SLOW_ENDS))
    return SlowFast(
        tau_min=draw(SHARES),
        tau_high=draw(SHARES),
        tau_slow=draw(maybe(SHARES)),
        k_max=draw(st.integers(1, 6)),
        window=draw(st.integers(1, 4)),
        spread=draw(st.sampled_from(SPREADS)),
        spread_limit=draw(st.sampled_from([0.0, 0.25, 1.0, 2.5, 30.0])),
        inclusive=draw(st.booleans()),
        strict=draw(st.booleans()),
        slow_end=slow_end,
        rounding=draw(st.sampled_from(ROUNDINGS)),
        zero_history=draw(st.booleans()),
        min_parallel=draw(st.integers(1, 3)),
        min_parallel_slow=draw(st.integers(1, 3)),
        block_length=draw(BLOCKS),
        max_cycles=draw(maybe(st.integers(1, 3))),
        share_stable=slow_end == "stable" and draw(st.booleans()),
        eos_horizon=draw(st.booleans()),
    )


@st.composite
def threshold(draw: st.DrawFn) -> Threshold:
    how = {"block_length": draw(BLOCKS), "sigma": draw(maybe(st.sampled_from([0.5, 3.0])))}
    if draw(st.booleans()):
        return Threshold(tau=draw(SHARES), steps=draw(maybe(st.integers(1, 6))), **how)
    return Threshold(factor=draw(st.sampled_from([0.3, 1.0, 4.0])), **how)


@st.composite
def fixed_steps(draw: st.DrawFn) -> FixedSteps:
    return FixedSteps(
        steps=draw(maybe(st.integers(1, 24))),
        metric=draw(st.sampled_from(FIXED_METRICS)),
        block_length=draw(BLOCKS),
        eps=draw(st.sampled_from([1e-3, 0.03, 0.5])),
    )


@st.composite
def samplers(draw: st.DrawFn) -> Sampler:
    """Any sampler with any of the settings that all share."""
    sampler = draw(st.sampled_from([slowfast, slowfast, slowfast, threshold, fixed_steps]).flatmap(lambda kind: kind()))
    changes: dict[str, Any] = {"eos_stop": draw(st.booleans())}
    if draw(st.booleans()):
        changes["temperature"] = draw(st.sampled_from([0.3, 0.8, 1.5]))
        changes["top_k"] = draw(maybe(st.integers(1, 30)))
        changes["top_p"] = draw(maybe(BETWEEN | st.just(1.0)))
    if draw(st.sampled_from([False, False, False, True])):
        changes["cfg_scale"] = draw(st.sampled_from([0.3, 1.0]))
    return sampler.replace(**changes)


@st.composite
def region(draw: st.DrawFn) -> RegionCache:
    return RegionCache(
        capacity=draw(st.integers(2, 40)),
        span_cap=draw(maybe(st.integers(1, 16))),
        look_ahead=draw(st.integers(0, 6)),
        refresh_every=draw(maybe(st.integers(1, 6))),
        rotate=draw(st.booleans()),
    )


# Which positions dLLM-Cache refreshes in between is decided by rounding, unless it is none or all of them.
REFRESH = st.builds(RefreshCache, st.integers(1, 5), st.integers(1, 5), st.sampled_from([0.0, 1.0]))
POLICIES = st.sampled_from([NoCache(), PrefixCache(), DualCache()]) | REFRESH | region()


# -------------------------------------------------------------------------------------------------------------- cases


@st.composite
def cases(
    draw: st.DrawFn,
    most: int = 3,
    longest: int = 16,
    policies: st.SearchStrategy = POLICIES,
    made: st.SearchStrategy | None = None,
    settled: bool = False,
) -> Case:
    """Draw calls of at most ``most`` sequences and ``longest`` decoded positions each.

    ``settled`` cases are those that the oracle accepts: it refuses quotas that do not come out even, and no model may
    predict the mask.
    """
    sampler = draw(samplers())
    drawn = (draw(policies) for _ in range(3))
    policy = next((policy for policy in drawn if goes_with(sampler, policy)), NoCache())
    if made is None:
        made = models(mask_out=True if settled else None)
    model, count = draw(made), draw(st.integers(1, most))
    spec, infill = model.spec, draw(st.sampled_from([False, False, False, True]))
    token = st.integers(0, spec.vocab_size - 1).filter(lambda t: t != spec.mask_id)
    prompts = draw(st.lists(st.lists(token, min_size=1, max_size=12), min_size=count, max_size=count))
    seeds = draw(st.lists(st.integers(0, 2**63 - 1), min_size=count, max_size=count))
    if infill:
        if isinstance(sampler, Threshold) and settled:
            sampler = sampler.replace(steps=None)
        keep = (
            isinstance(policy, RegionCache) and spec.shifted
        )  # such a model cannot predict the first position from a list
        canvases = [_punched(draw, prompt, spec.mask_id, keep, longest) for prompt in prompts]
        return Case(model, canvases, None, sampler, policy, seeds)
    unit = sampler.block_length or 1
    if settled and isinstance(sampler, Threshold) and sampler.steps is not None:
        sampler = sampler.replace(steps=draw(st.sampled_from([n for n in range(1, unit + 1) if unit % n == 0])))
    lengths = [unit * draw(st.integers(1, max(1, longest // unit))) for _ in range(count)]
    return Case(model, prompts, lengths, sampler, policy, seeds)


def _punched(draw: st.DrawFn, prompt: list[int], mask_id: int, keep_first: bool, longest: int) -> list[int]:
    """``prompt`` with masks among its tokens, one at least."""
    canvas = []
    for token in prompt:
        canvas += [token] + [mask_id] * draw(st.sampled_from([0, 0, 1, 3]))
    if not keep_first and draw(st.booleans()):
        canvas = [mask_id, *canvas]
    return [*canvas, mask_id][: longest + len(prompt)] if mask_id not in canvas else canvas[: longest + len(prompt)]


def with_predicted_eos(case: Case) -> Case:
    """Make the token that the first sequence commits first end-of-text: random models hardly ever predict it."""
    (done,) = case.run(case.model.engine(), [0])
    if isinstance(done, str):
        return case
    decided = [p for p, step in enumerate(done.commit_step) if step >= 0]
    first = min(decided, key=lambda p: (done.commit_step[p], p))
    eos_id, spec = done.canvas[first], case.model.spec
    if eos_id == spec.mask_id:
        return case
    return replace(case, model=replace(case.model, spec=replace(spec, eos_id=eos_id, pad_id=eos_id)))


def ended(strategy: st.SearchStrategy) -> st.SearchStrategy:
    """Give half of the cases an end-of-text token that the model predicts."""
    return st.tuples(strategy, st.booleans()).map(lambda drawn: with_predicted_eos(drawn[0]) if drawn[1] else drawn[0])
