"""The engine compared with the oracle, on settings that no recording has."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import statistics
from fractions import Fraction
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sfs_triton
from bench.baselines import slowfast as baselines
from bench.common.testing import brisk_interpreter
from sfs_triton import EntropyBound, FixedSteps, Hierarchy, LocalLeap, MultiBlock, Sampler, SlowFast, Threshold
from sfs_triton.models import Transformer
from sfs_triton.ops.dispatch import operations
from sfs_triton.ops.torch.cycle import spread_of
from tests.conformance import MARGIN
from tests.reference import logits_of
from tests.reference.slowfast import is_stable
from tests.support.combinations import few_of
from tests.support.oracle import compare, reference
from tests.support.paths import GOLDEN

NAMES = ("llada-mha", "dream-gqa")
LENGTH = 32


# What an interpreter computes slowly and no sampler is in; tests/kernels and recorded cases have these kernels.
LAYERS = (
    "attention",
    "embedding",
    "linear",
    "linear_heads",
    "linear_normed",
    "linear_silu_mul",
    "rms_norm",
    "rope_cache",
)


@cache
def engine_of(name: str, eos_id: int | None = None, backend: str = "torch") -> sfs_triton.Engine:
    """A small trained model, on request with another id as its end-of-text, or with decisions by the kernels."""
    interpreted = backend == "triton" and not torch.cuda.is_available()
    device = "cuda" if backend == "triton" and not interpreted else "cpu"
    engine = sfs_triton.load(GOLDEN / "models" / name, device, "float32", "torch" if interpreted else backend)
    model = engine.model
    if eos_id is not None:
        model = Transformer(dataclasses.replace(engine.spec, eos_id=eos_id), model.weights, model.backend)
    if interpreted:
        model = Transformer(model.spec, model.weights.by_row())
        layers = {operation: getattr(model.ops, operation) for operation in LAYERS}
        model.backend, model.ops = "triton", dataclasses.replace(operations("triton", model.device), **layers)
    return engine if model is engine.model else sfs_triton.Engine(model)


def random_prompt(rng: random.Random, low: int = 4, high: int = 24) -> list[int]:
    return [rng.randrange(490) for _ in range(rng.randint(low, high))]


def check(
    engine: sfs_triton.Engine,
    prompt: list[int],
    length: int,
    sampler: Sampler,
    seed: int = 0,
    oracle: sfs_triton.Engine | None = None,
) -> None:
    done = engine.generate(prompt, gen_length=length, sampler=sampler, seed=seed, trace=True)
    wanted = reference(oracle or engine, prompt + [engine.spec.mask_id] * length, len(prompt), sampler, seed)
    wrong = compare(done, wanted)
    if wrong and wanted.margin < MARGIN:
        pytest.skip(f"a decision has a margin of {wanted.margin:.1e}")
    assert wrong is None, f"{sampler}\n{wrong}"


def random_slowfast(rng: random.Random) -> SlowFast:
    tau_slow = rng.choice([None, None, 0.3, 0.6, 0.8, 0.9])
    sampler = SlowFast(
        tau_min=rng.choice([0.02, 0.1, 0.2, 0.3, 0.5, 0.9]),
        tau_high=rng.choice([0.1, 0.3, 0.6, 0.85, 0.9, 1.01]),
        tau_slow=tau_slow,
        k_max=rng.randint(1, 8),
        window=rng.randint(1, 5),
        spread=rng.choice(["variance", "std", "unbiased"]),
        spread_limit=rng.choice([0.0, 0.25, 1.0, 2.5, 10.0, 50.0]),
        inclusive=rng.random() < 0.5,
        strict=rng.random() < 0.5,
        slow_end=rng.choice(["stable", "stable", "fixed", "filled"]),
        rounding=rng.choice(["floor", "even"]),
        zero_history=rng.random() < 0.3,
        min_parallel=rng.randint(1, 3),
        min_parallel_slow=rng.randint(1, 3),
        block_length=rng.choice([None, 8, 16]),
        max_cycles=rng.choice([None, None, None, 1, 3]),
    )
    share_stable = rng.random() < 0.5 and sampler.slow_end == "stable"
    return sampler.replace(share_stable=share_stable, eos_horizon=rng.random() < 0.6)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("preset", ["paper", "fast", "llada-reference", "dream-reference"])
def test_presets(preset: str, seed: int, name: str):
    check(engine_of(name), random_prompt(random.Random(seed)), 48, SlowFast.preset(preset))


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("seed", "name"), [(seed, NAMES[seed % 2]) for seed in range(60)])
def test_random_slowfast(seed: int, name: str):
    rng = random.Random(f"{name}/{seed}")
    check(engine_of(name), random_prompt(rng), LENGTH, random_slowfast(rng))


@cache
def common_token(name: str) -> int:
    """A token that responses of the model are full of, to serve as end-of-text."""
    rng = random.Random(name)
    tokens = [t for _ in range(8) for t in engine_of(name).generate(random_prompt(rng), gen_length=LENGTH).response]
    return max(set(tokens), key=tokens.count)


@pytest.mark.parametrize(("seed", "name"), [(seed, NAMES[seed // 4 % 2]) for seed in range(12)])  # four samplers
def test_end_of_text(seed: int, name: str):
    rng = random.Random(f"eos/{name}/{seed}")
    samplers = [random_slowfast(rng), random_slowfast(rng), random_threshold(rng), random_fixed(rng)]
    engine = engine_of(name, common_token(name))
    check(engine, random_prompt(rng), LENGTH, samplers[seed % 4].replace(eos_stop=True))


ENDS = [{"eos": "last"}, {"eos": "never"}, {"eos_penalty": 1.5}, {"eos": "last", "eos_penalty": 0.7}]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("seed", range(24))  # each sampler with each option
def test_control_of_the_end(seed: int):
    """Against the oracle, with the most frequent token of the plain response as end-of-text."""
    name = NAMES[seed % 2]
    rng = random.Random(f"ends/{seed}")
    make = [random_slowfast, random_threshold, random_fixed, *PARALLEL][seed % 7]
    sampler = make(rng).replace(**[{}, {"temperature": 0.7}, {"temperature": 0.7, "top_p": 0.8, "top_k": 9}][seed % 3])
    if getattr(sampler, "metric", None) == "origin":
        sampler = sampler.replace(metric="maskgit_plus")
    controlled = sampler.replace(**ENDS[seed % 4])
    prompt = random_prompt(rng)
    plain = engine_of(name).generate(prompt, gen_length=LENGTH, sampler=sampler, seed=seed).response
    engine = engine_of(name, max(plain, key=plain.count))
    check(engine, prompt, LENGTH, controlled, seed)
    if controlled.eos == "never":
        done = engine.generate(prompt, gen_length=LENGTH, sampler=controlled, seed=seed)
        assert engine.spec.eos_id not in done.response


def test_an_end_that_comes_last():
    """Every end is committed after all other tokens of its block, one per step."""
    name, sampler = NAMES[0], Threshold(tau=0.3, block_length=16)
    model, prompt, ends = engine_of(name).model, [3, 14, 15, 92], 0
    for eos_id in engine_of(name).generate(prompt, gen_length=LENGTH, sampler=sampler).response[::3]:
        engine = sfs_triton.Engine(Transformer(dataclasses.replace(model.spec, eos_id=eos_id), model.weights))
        done = engine.generate(prompt, gen_length=LENGTH, sampler=sampler.replace(eos="last"))
        for first in range(4, 4 + LENGTH, 16):
            block = list(zip(done.canvas, done.commit_step, strict=True))[first : first + 16]
            steps = [step for token, step in block if token == eos_id]
            assert steps == sorted(set(steps))
            assert min(steps, default=LENGTH) > max(step for token, step in block if token != eos_id)
            ends += len(steps)
    assert ends > 1


@pytest.mark.parametrize("seed", range(14))  # each sampler twice
def test_end_of_think(seed: int):
    """Against the oracle, until the sequence stands in the response; where a step decides all, little can change."""
    name = NAMES[seed % 2]
    rng = random.Random(f"think/{seed}")
    sampler = [random_slowfast, random_threshold, random_fixed, *PARALLEL][seed % 7](rng)
    sampler = sampler.replace(**[{}, {"temperature": 0.7, "top_k": 9}, {"cfg_scale": 0.5}][seed % 3])
    engine, prompt = engine_of(name), random_prompt(rng)
    plain = engine.generate(prompt, gen_length=LENGTH, sampler=sampler, seed=seed)
    tokens = [[3, 3], [4, 5, 4, 6], [7], [8, 9]][seed % 4]
    boost = {"end_think_logit_boost": rng.uniform(30, 80), "end_think_boost_power": rng.choice([0.3, 0.5, 1.0])}
    raised = sampler.replace(end_think_token_ids=tokens, **boost)
    done = engine.generate(prompt, gen_length=LENGTH, sampler=raised, seed=seed)
    assert done.response != plain.response or plain.nfe < 8
    check(engine, prompt, LENGTH, raised, seed)


OPTIONS = {
    "shared": {"share_stable": True},
    "shared, two or none": {"share_stable": True, "min_parallel": 2, "tau_slow": 0.9, "min_parallel_slow": 2},
    "no end as horizon": {"eos_horizon": False},
    "both": {"share_stable": True, "eos_horizon": False},
}


def token_at_the_horizon(engine: sfs_triton.Engine, canvas: list[int], start: int, sampler: SlowFast) -> int:
    """Return the model's token at the furthest candidate of the first step."""
    place = start + reference(engine, canvas, start, sampler).trace[0].estimate - 1
    return logits_of(engine.model, canvas)(canvas)[place].argmax().item()


OPTION_CASES = [
    *itertools.product(OPTIONS, (False, True), ["torch"], NAMES),
    *few_of(list(OPTIONS), [True], ["triton"], NAMES),
]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("option", "eos_stop", "backend", "name"), OPTION_CASES)
def test_options_of_the_cycle(option: str, eos_stop: bool, name: str, backend: str):
    """Against the oracle, and that the option changes something."""
    rng, changed, length = random.Random(f"options/{option}/{name}"), False, 16 if backend == "triton" else LENGTH
    sampler = SlowFast(tau_high=0.6, eos_stop=eos_stop).replace(**OPTIONS[option])
    without = sampler.replace(share_stable=False, eos_horizon=True)
    for _ in range(4):
        prompt = random_prompt(rng)
        canvas = prompt + [engine_of(name).spec.mask_id] * length
        eos_id = token_at_the_horizon(engine_of(name), canvas, len(prompt), without)
        oracle = engine_of(name, eos_id)
        with brisk_interpreter():
            check(engine_of(name, eos_id, backend), prompt, length, sampler, oracle=oracle)
        traces = [reference(oracle, canvas, len(prompt), which).trace for which in (sampler, without)]
        changed |= traces[0] != traces[1]
        if changed and backend == "triton":
            break  # an interpreter is slow
    assert changed


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cfg_scale", [0.5, 1.5])
def test_guidance(name: str, cfg_scale: float):
    rng = random.Random(f"cfg/{name}")
    for sampler in (SlowFast(), random_slowfast(rng), Threshold(block_length=16), FixedSteps(steps=12)):
        check(engine_of(name), random_prompt(rng), LENGTH, sampler.replace(cfg_scale=cfg_scale))


def random_threshold(rng: random.Random) -> Threshold:
    steps = rng.choice([None, None, 4, 8, 16, 32])
    return Threshold(
        tau=rng.choice([0.2, 0.5, 0.8, 0.9, 1.0]),
        metric=rng.choice(["confidence", "confidence", "margin", "entropy"]),
        least=rng.choice([1, 3]) if steps is None else 1,
        block_length=rng.choice([None, 8, 16, 32]),
        steps=steps,
    )


def random_bound(rng: random.Random) -> EntropyBound:
    return EntropyBound(
        bound=rng.choice([0.0, 0.1, 0.5, 2.0, 1e9]),
        metric=rng.choice(["confidence", "margin", "entropy"]),
        least=rng.choice([1, 1, 3]),
        block_length=rng.choice([None, 8, 16]),
    )


def random_hierarchy(rng: random.Random) -> Hierarchy:
    tau = rng.choice([0.3, 0.6, 0.9, 1.0])
    low = rng.choice([None, 0.0, 0.1, 0.3])
    return Hierarchy(tau=tau, tau_low=low, block_length=rng.choice([None, 8, 16]))


def random_leap(rng: random.Random) -> LocalLeap:
    tau = rng.choice([0.0, 0.3, 0.6, 0.9])
    return LocalLeap(
        tau=tau,
        tau_near=tau * rng.choice([0.0, 0.3, 0.8]),
        radius=rng.choice([0, 1, 4, 64]),
        steps=rng.choice([None, None, 8, 16, 32]),
        block_length=rng.choice([None, 8, 16]),
    )


def random_multi_block(rng: random.Random) -> MultiBlock:
    return MultiBlock(
        entropy=rng.choice([0.0, 0.3, 1.0, 2.5, 10.0]),
        open_at=rng.choice([0.0, 0.1, 0.5, 1.0]),
        strict=rng.random() < 0.5,
        keep_best=rng.random() < 0.5,
        block_length=rng.choice([4, 8, 16, 32]),
    )


PARALLEL = [random_bound, random_hierarchy, random_leap, random_multi_block]


def random_fixed(rng: random.Random) -> FixedSteps:
    metric = rng.choice(["confidence", "maskgit_plus", "topk_margin", "entropy", "origin"])
    return FixedSteps(
        metric=metric,
        steps=rng.choice([None, 4, 5, 7, 16, 21, 32, 40]),
        eps=rng.choice([1e-3, 1e-2, 0.1]),
        block_length=rng.choice([None, None, 8, 16]),
    )


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("seed", "name"), [(seed, NAMES[seed % 2]) for seed in range(12)])
@pytest.mark.parametrize("make", [random_threshold, random_fixed, *PARALLEL])
def test_random_block_samplers(make, seed: int, name: str):
    rng = random.Random(f"{make.__name__}/{name}/{seed}")
    check(engine_of(name), random_prompt(rng), LENGTH, make(rng), seed)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("changes", [{}, {"top_k": 5}, {"top_p": 0.7}], ids=["plain", "top_k", "top_p"])
def test_noise(changes: dict, name: str):
    """Drawn tokens: the same noise through both. It is keyed by the seed, token, position and step."""
    rng = random.Random(f"noise/{name}")
    samplers = [
        SlowFast(),
        random_slowfast(rng),
        Threshold(block_length=16),
        FixedSteps(steps=12),
        FixedSteps(steps=12, metric="entropy"),
        FixedSteps(steps=9, metric="topk_margin"),
        *(make(rng) for make in PARALLEL),
    ]
    for seed, sampler in enumerate(samplers):
        check(engine_of(name), random_prompt(rng), 16, sampler.replace(temperature=0.8, **changes), seed)


@pytest.mark.parametrize(
    ("make", "seed", "name"), few_of([random_slowfast, random_threshold, random_fixed, *PARALLEL], range(4), NAMES)
)
def test_kernels(make, seed: int, name: str):
    """Decide through the Triton kernels: with an early end, with noise, with guidance, with ends that come last."""
    rng = random.Random(f"kernels/{make.__name__}/{name}/{seed}")
    eos_id = None if seed in (1, 2) else common_token(name)
    changes = [{"eos_stop": True}, {"temperature": 0.8}, {"cfg_scale": 0.5}, {"eos": "last", "eos_penalty": 0.5}][seed]
    if seed == 2:
        changes |= {"end_think_token_ids": (common_token(name),) * 2, "end_think_logit_boost": 30.0}
    kernels, oracle = engine_of(name, eos_id, "triton"), engine_of(name, eos_id)
    with brisk_interpreter():
        sampler = make(rng)
        if (sampler.block_length or 0) > LENGTH // 2:
            sampler = sampler.replace(block_length=LENGTH // 2)
        if isinstance(sampler, Threshold) and sampler.steps == LENGTH:
            sampler = sampler.replace(steps=LENGTH // 2)
        if seed == 3 and getattr(sampler, "metric", None) == "origin":
            sampler = sampler.replace(metric="topk_margin")
        check(kernels, random_prompt(rng), LENGTH // 2, sampler.replace(**changes), seed, oracle)


@pytest.mark.parametrize("metric", ["maskgit_plus", "entropy"])
def test_nucleus_before_top_k(metric: str):
    """Dream's sampler takes the nucleus of the whole distribution, and the ``top_k`` largest of that."""
    sampler = FixedSteps(steps=12, metric=metric, temperature=1.2, top_p=0.6, top_k=4)
    for seed in range(3):
        check(engine_of("dream-gqa"), random_prompt(random.Random(seed)), 16, sampler, seed)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("seed", range(14))
@pytest.mark.parametrize("name", NAMES)
def test_infilling(seed: int, name: str):
    """Masks anywhere, the first position included."""
    rng = random.Random(f"infill/{name}/{seed}")
    engine = engine_of(name)
    canvas = [engine.spec.mask_id if rng.random() < 0.6 else token for token in random_prompt(rng, 30, 40)]
    makes = [random_slowfast, random_threshold, random_fixed, *PARALLEL]
    sampler = makes[seed % len(makes)](rng)
    if isinstance(sampler, (Threshold, LocalLeap)):
        sampler = sampler.replace(steps=None)
    done = engine.infill(canvas, sampler=sampler, trace=True)
    wanted = reference(engine, canvas, 0, sampler)
    wrong = compare(done, wanted)
    assert wrong is None or wanted.margin < MARGIN, f"{sampler}\n{wrong}"


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(10))
def test_sequences_of_a_batch_equal_those_alone(seed: int, name: str):
    """Different prompt and response lengths put sequences in different stages at any one step."""
    rng = random.Random(f"batch/{name}/{seed}")
    sampler = [random_slowfast, random_slowfast, random_threshold, random_fixed, random_slowfast][seed % 5](rng)
    if isinstance(sampler, Threshold):
        sampler = sampler.replace(steps=None, block_length=16)
    sampler = sampler.replace(eos_stop=seed % 2 == 1, temperature=0.5 if seed % 4 == 2 else 0.0)
    engine = engine_of(name, common_token(name))
    prompts = [random_prompt(rng) for _ in range(4)] + [[7]]
    lengths = [rng.choice([16, 32, 48]) for _ in prompts]
    batch = engine.generate(prompts, gen_length=lengths, sampler=sampler, seed=5, trace=True)
    for index, (done, prompt, length) in enumerate(zip(batch, prompts, lengths, strict=True)):
        canvas = prompt + [engine.spec.mask_id] * length
        wanted = reference(engine, canvas, len(prompt), sampler, 5 + index)
        wrong = compare(done, wanted)
        assert wrong is None or wanted.margin < MARGIN, f"sequence {index}, {sampler}\n{wrong}"


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 2**32), st.integers(1, 20), st.booleans())
def test_short_responses(seed: int, length: int, eos_stop: bool):
    """Odd and very short canvases, down to one position."""
    rng = random.Random(seed)
    engine = engine_of("llada-mha", common_token("llada-mha"))
    sampler = random_slowfast(rng).replace(block_length=None, eos_stop=eos_stop)
    prompt = random_prompt(rng, 1, 12)
    done = engine.generate(prompt, gen_length=length, sampler=sampler, trace=True)
    wanted = reference(engine, prompt + [engine.spec.mask_id] * length, len(prompt), sampler)
    wrong = compare(done, wanted)
    assert wrong is None or wanted.margin < MARGIN, f"{sampler}\n{wrong}"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 4096), min_size=1, max_size=8), st.integers(0, 7), st.booleans())
def test_spread(history: list[int], unused: int, full: bool):
    """Against exact fractions, rounded once; slots that are not in use hold zeros."""
    count = len(history)
    padded = torch.tensor([history + [0] * (0 if full else unused)])
    values = [Fraction(value) for value in history]
    wanted = {"variance": statistics.pvariance(values), "unbiased": statistics.variance(values) if count > 1 else 0}
    for kind, value in wanted.items():
        assert spread_of(padded, torch.tensor([count]), kind).item() == float(value), kind


@pytest.mark.parametrize("inclusive", [False, True])
def test_a_standard_deviation_meets_its_limit_exactly(inclusive: bool):
    """Horizons ``2 n`` apart deviate by ``n``: every limit that is an integer is met, not missed by rounding."""
    limits = torch.arange(1, 2001)
    history = torch.stack((torch.ones_like(limits), 2 * limits + 1), 1)
    found = spread_of(history, torch.full_like(limits, 2), "variance").tolist()
    for limit, variance in zip(limits.tolist(), found, strict=True):
        sampler = SlowFast(spread="std", spread_limit=limit, inclusive=inclusive)
        rules = sampler.rules()
        assert (rules.spread, rules.spread_limit) == ("variance", variance)
        assert is_stable([1, 2 * limit + 1], sampler) == baselines.is_stable([1, 2 * limit + 1], sampler) == inclusive


def test_a_traced_standard_deviation_is_that_of_the_history():
    sampler = SlowFast.preset("llada-reference", spread_limit=0.5)
    done = engine_of("llada-mha").generate([3, 14, 15], gen_length=LENGTH, sampler=sampler, trace=True)
    traced = [(step.history, step.spread) for step in done.trace if step.spread is not None]
    assert any(spread not in (0.0, 1.0) for _, spread in traced)
    assert all(spread == math.sqrt(statistics.pvariance(history)) for history, spread in traced)


@pytest.mark.parametrize(
    "sampler",
    [
        SlowFast(block_length=8),
        SlowFast.preset("llada-reference", block_length=8),
        Threshold(block_length=8),
        FixedSteps(block_length=8),
    ],
    ids=["paper", "llada-reference", "threshold", "fixed"],
)
@pytest.mark.parametrize("first", [0, 8, 24])
def test_a_block_without_masks_takes_no_step(first: int, sampler: Sampler):
    engine, rng = engine_of("llada-mha"), random.Random(first)
    canvas = [rng.randrange(490) if first <= i < first + 8 else engine.spec.mask_id for i in range(32)]
    done = engine.infill(canvas, sampler=sampler, trace=True)
    assert compare(done, reference(engine, canvas, 0, sampler)) is None


@pytest.mark.parametrize("steps", [5, 40])
def test_a_quota_that_does_not_come_out_even(steps: int):
    """Fast-dLLM asserts that it does: refuse it or finish, but do not run into the step cap."""
    engine = engine_of("dream-gqa")
    try:
        done = engine.generate([1, 2, 3], gen_length=LENGTH, sampler=Threshold(steps=steps, block_length=None))
    except sfs_triton.ArgumentError:
        return
    assert engine.spec.mask_id not in done.response
