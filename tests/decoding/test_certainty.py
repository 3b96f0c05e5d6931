"""A factor in place of a threshold, and a prior of certainty: against the oracle, by hand, and bad options."""

from __future__ import annotations

import random
from contextlib import closing

import pytest
import torch

import sfs_triton
from bench.common.testing import brisk_interpreter
from sfs_triton import ArgumentError, EntropyBound, Sampler, Threshold
from sfs_triton.ops.dispatch import NearDecided, WithinFactor
from sfs_triton.ops.torch.density import density
from sfs_triton.runner.state import DecodeState
from sfs_triton.scheduling.scheduler import Scheduler, bounds_of
from tests.conformance import MARGIN
from tests.reference import decode
from tests.support.combinations import EXECUTIONS, POLICIES, PROMPTS, RAGGED, assert_same, engine_with
from tests.support.oracle import compare, engine_of, reference

NAMES = ("llada-mha", "dream-gqa")
LENGTH = 32
MASK, EOS = 9, 8  # of what is done by hand
CHANGES = [
    *({}, {"temperature": 0.7, "top_p": 0.8}, {"cfg_scale": 0.5}),
    *({"eos_stop": True}, {"eos": "last"}, {"eos_penalty": 1.5, "eos": "never"}),
]


def random_factor(rng: random.Random) -> Threshold:
    return Threshold(
        factor=rng.choice([0.1, 0.5, 1.0, 2.0, 5.0, 100.0]),
        sigma=rng.choice([None, None, 2.0]),
        least=rng.choice([1, 1, 3]),
        block_length=rng.choice([None, 8, 16]),
    )


def random_prior(rng: random.Random) -> Sampler:
    how = {"sigma": rng.choice([0.3, 1, 4.0, 10.0, 100.0]), "block_length": rng.choice([None, 8, 16])}
    how["least"] = rng.choice([1, 1, 3])
    if rng.random() < 0.5:
        return EntropyBound(bound=rng.choice([0.0, 0.5, 2.0]), metric="confidence", **how)
    return Threshold(tau=rng.choice([0.1, 0.3, 0.5, 0.9]), **how)


def check(done: sfs_triton.Generation, engine: sfs_triton.Engine, canvas: list[int], start: int, sampler, seed=0):
    wanted = reference(engine, canvas, start, sampler, seed)
    wrong = compare(done, wanted)
    assert wrong is None or wanted.margin < MARGIN, f"{sampler}\n{wrong}"


@pytest.mark.parametrize("seed", range(2 * len(CHANGES)))
@pytest.mark.parametrize("make", [random_factor, random_prior])
def test_steps_are_those_of_the_oracle(make, seed: int):
    rng = random.Random(f"{make.__name__}/{seed}")
    sampler, prompt, name = make(rng), [rng.randrange(490) for _ in range(rng.randint(4, 24))], NAMES[seed % 2]
    plain = engine_of(name).generate(prompt, gen_length=LENGTH, sampler=sampler).response
    engine, sampler = engine_of(name, max(plain, key=plain.count)), sampler.replace(**CHANGES[seed // 2])
    done = engine.generate(prompt, gen_length=LENGTH, sampler=sampler, seed=seed, trace=True)
    check(done, engine, prompt + [engine.spec.mask_id] * LENGTH, len(prompt), sampler, seed)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("make", [random_factor, random_prior])
def test_infilling(make, seed: int):
    rng, engine = random.Random(f"infill/{make.__name__}/{seed}"), engine_of(NAMES[0])
    canvas = [engine.spec.mask_id if rng.random() < 0.6 else rng.randrange(490) for _ in range(40)]
    sampler = make(rng)
    check(engine.infill(canvas, sampler=sampler, trace=True), engine, canvas, 0, sampler)


@pytest.mark.parametrize(("number", "policy"), [*enumerate(name for name in POLICIES if name != "delayed")])
def test_a_prior_in_each_policy_and_execution(number: int, policy: str):
    """Threshold is in the tests of every pair; here the bound, whose machine decides by the scores themselves."""
    sampler, engine = EntropyBound(bound=1.0, metric="confidence", sigma=3.0, block_length=8), engine_of(NAMES[1])
    how = {"sampler": sampler, "cache": POLICIES[policy], "trace": True}
    alone = [
        engine.generate(prompt, gen_length=length, seed=seed, **how)
        for prompt, length, seed in zip(*RAGGED.values(), strict=True)
    ]
    execution = list(EXECUTIONS)[number % len(EXECUTIONS)]
    assert_same(engine_with(engine, execution).generate(**RAGGED, **how), alone)


@pytest.mark.parametrize(
    "sampler",
    [Threshold(factor=2.0, sigma=3.0, block_length=4), EntropyBound(metric="confidence", sigma=3.0, block_length=4)],
    ids=["factor", "bound"],
)
def test_kernels(sampler):
    how = {"gen_length": 8, "cache": POLICIES["region-ahead"], "sampler": sampler, "trace": True}
    with brisk_interpreter():
        done = engine_of(NAMES[1], backend="triton").generate(PROMPTS[-1:], **how)
    assert_same(done, engine_of(NAMES[1]).generate(PROMPTS[-1:], **how))


def state_of(scores: list[float], sampling: dict, canvas: list[int] | None = None) -> DecodeState:
    """A state whose canvas has masks, all of them candidates with these scores."""
    canvas = [MASK] * len(scores) if canvas is None else canvas
    how = {"mask_id": MASK, "eos_id": EOS, "window": 1, "block_length": None, "seeds": [0], "caps": [99]}
    state = DecodeState.allocate([canvas], [0], **how, sampling=sampling, device=torch.device("cpu"), trace=False)
    state.candidate.copy_(state.masked)
    state.score.copy_(torch.tensor([scores]))
    return state


@pytest.mark.parametrize(
    ("scores", "factor", "least", "kept"),
    [
        ([0.99, 0.5, 0.95, 0.9], 0.5, 1, [0, 2, 3]),  # 0.02, 0.15, 0.4, 2.5
        ([0.99, 0.5, 0.95, 0.9], 0.3, 1, [0, 2]),
        ([0.99, 0.5, 0.95, 0.9], 0.01, 1, [0]),
        ([0.99, 0.5, 0.95, 0.9], 0.01, 2, [0, 2]),
        ([0.99, 0.5, 0.95, 0.9], 100.0, 1, [0, 2, 3]),  # all but one
        ([0.9], 100.0, 1, [0]),
        ([0.9, 0.9], 1.0, 3, [0, 1]),
        ([0.9, float("nan"), 0.9], 1.0, 1, [1]),  # it ends its sequence
    ],
)
def test_a_factor_by_hand(scores, factor, least, kept):
    state = state_of(scores, {"bound": factor})
    WithinFactor(least).narrow(state, None)
    assert state.candidate[0].nonzero().flatten().tolist() == kept


def test_a_density_by_hand():
    """A width of 1: weights of ``e ** (-d * d / 2)`` at a distance ``d``, which sum to 2.5066."""
    a, b, c, d = 0.60653, 0.13534, 0.01111, 0.00034
    state = state_of([0.5] * 4, {}, [MASK, 3, MASK, MASK])
    found = (density(state, 1.0)[0] * 2.50663).tolist()
    assert found[0] == pytest.approx(a + a + b + c + d, abs=1e-4)
    assert found[2:] == pytest.approx([a + c + d, b + d], abs=1e-4)
    state.masked[0, 3] = False  # the last one: all behind it count as decided
    after = (density(state, 1.0)[0] * 2.50663).tolist()
    assert after[2] == pytest.approx(found[2] + a + b + c + d, abs=1e-4)
    NearDecided(1.0, None).narrow(state, None)
    assert state.score[0, 2].item() == pytest.approx(0.5 * after[2] / 2.50663, abs=1e-4)


def test_a_free_slot():
    """The second of two slots never held a sequence; the first is decoded as it is alone."""
    engine = engine_of(NAMES[0])
    (one,), _ = engine.sequences(PROMPTS[:1], gen_length=16, sampler=Threshold(factor=1.0, sigma=3.0, block_length=8))
    scheduler = Scheduler(engine.batches, lambda sequence: bounds_of([one]), slots=2)
    with closing(scheduler):
        scheduler.submit(one)
        while not one.finished:
            scheduler.step()
    wanted = engine.generate(PROMPTS[0], gen_length=16, sampler=one.params.sampler)
    assert one.result(engine.spec, None).canvas == wanted.canvas


def test_the_oracle_by_hand():
    """Position 4 is the most confident; 1 and then 2 have more decided positions around."""
    table = torch.full((5, 10), 0.5 / 9)
    table[:, 3], table[4] = 0.5, 0.4 / 9
    table[4, 3] = 0.6
    canvas = [3, MASK, MASK, 3, MASK]
    for sigma, filled in ((None, [[4], [1], [2]]), (1.0, [[1], [2], [4]])):
        run = decode(lambda ids: table.log(), canvas, 0, Threshold(sigma=sigma), MASK, EOS)
        assert [step.filled for step in run.trace] == filled
    run = decode(lambda ids: table.log(), canvas, 0, Threshold(factor=1.3), MASK, EOS)  # 0.8, 1.5; 1.0; 1.0
    assert [step.filled for step in run.trace] == [[4], [1], [2]]
    run = decode(lambda ids: table.log(), canvas, 0, Threshold(factor=1.6), MASK, EOS)  # 0.8, 1.5, 2.0
    assert [step.filled for step in run.trace] == [[1, 4], [2]]


def test_a_trace_has_confidences():
    """Those of the model, as ``probabilities`` of the result, and not what the prior made of them."""
    engine = engine_of(NAMES[0])
    done, plain = (
        engine.generate(PROMPTS[0], gen_length=LENGTH, sampler=Threshold(sigma=sigma), trace=True).trace[0].confidence
        for sigma in (4.0, None)
    )
    assert done == plain


def test_a_prior_prefers_what_is_near_decided_positions():
    """Gaps close from their sides."""
    engine, sampler = engine_of(NAMES[0]), Threshold(tau=1.01, block_length=None)
    far = []
    for each in (sampler, sampler.replace(sigma=2.0)):
        done = engine.generate(PROMPTS[0], gen_length=LENGTH, sampler=each, trace=True)
        far.append(sum(step.committed[0] - index for index, step in enumerate(done.trace) if step.committed[0] > index))
    assert far[1] < far[0]


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (Threshold, {"factor": 0}, "factor=0 is not above 0"),
        (Threshold, {"factor": -1.0}, "factor=-1.0 is not a number"),
        (Threshold, {"factor": float("nan")}, "factor=nan is not a number"),
        (Threshold, {"factor": "1"}, "factor='1' is not a number"),
        (Threshold, {"factor": 1.0, "metric": "margin"}, "factor=1.0 does not go with metric='margin'"),
        (Threshold, {"factor": 1.0, "tau": 0.5}, "factor=1.0 does not go with tau=0.5"),
        (Threshold, {"factor": 1.0, "steps": 4}, "factor=1.0 does not go with steps=4"),
        (Threshold, {"sigma": 0.0}, "sigma=0.0 is not above 0"),
        (Threshold, {"sigma": float("nan")}, "sigma=nan is not a number from 0 to 100"),
        (Threshold, {"sigma": 101}, "sigma=101 is not a number from 0 to 100"),
        (Threshold, {"sigma": True}, "sigma=True is not a number"),
        (Threshold, {"sigma": 1.0, "metric": "entropy"}, "sigma=1.0 does not go with metric='entropy'"),
        (EntropyBound, {"sigma": 1.0}, "sigma=1.0 does not go with metric='entropy'"),
        (EntropyBound, {"sigma": -1, "metric": "confidence"}, "sigma=-1 is not a number"),
    ],
)
def test_bad_options(make, options, said):
    with pytest.raises(ArgumentError, match=said):
        make(**options)
