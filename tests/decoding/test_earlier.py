"""Samplers that keep numbers of earlier steps, against the oracle, and with every cache and execution."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import pytest

import sfs_triton
from bench.common.testing import brisk_interpreter
from sfs_triton import KLASS, WINO, ArgumentError, Credit, Sampler, Threshold
from sfs_triton.models import Transformer
from sfs_triton.runner import ModelRunner
from sfs_triton.scheduling.scheduler import bounds_of
from tests.conformance import MARGIN
from tests.support.combinations import (
    EXECUTIONS,
    LENGTHS,
    POLICIES,
    PROMPTS,
    RAGGED,
    assert_same,
    engine_with,
    goes_with,
)
from tests.support.oracle import compare, engine_of, reference

NAMES = ("llada-mha", "dream-gqa")
LENGTH = 32


def random_credit(rng: random.Random) -> Credit:
    return Credit(
        tau=rng.choice([0.0, 0.3, 0.6, 0.9, 1.01]),
        weight=rng.choice([0.3, 0.7, 2.0]),
        decay=rng.choice([0.0, 0.5, 0.8, 1.0]),
        power=rng.choice([0.0, 0.2, 1.0]),
        block_length=rng.choice([None, 8, 16]),
    )


def random_klass(rng: random.Random) -> KLASS:
    return KLASS(
        tau=rng.choice([0.0, 0.1, 0.3, 0.6]),
        divergence=rng.choice([0.1, 0.3, 1.0, 1e9]),
        history=rng.choice([1, 2, 2, 3]),
        take=rng.choice(["all", "all", "confident", "calm"]),
        least=rng.choice([1, 1, 3]),
        block_length=rng.choice([None, 8, 16]),
    )


def random_wino(rng: random.Random) -> WINO:
    return WINO(
        tau=rng.choice([0.05, 0.1, 0.2, 0.3, 0.6]),
        tau_back=rng.choice([0.3, 0.6, 0.9, 2.0]),
        block_length=rng.choice([None, 8, 16, 32]),
    )


MAKES: list[Callable[[random.Random], Sampler]] = [random_credit, random_klass, random_wino]
KINDS: list[Sampler] = [
    Credit(tau=0.5, weight=2.0, block_length=8),
    KLASS(tau=0.1, divergence=0.5, history=1, block_length=8),
    WINO(tau=0.05, tau_back=0.5, block_length=8),
]
CHANGES = [
    *({}, {"temperature": 0.7}, {"temperature": 0.7, "top_p": 0.8, "top_k": 9}, {"cfg_scale": 0.5}),
    *({"eos_stop": True}, {"eos": "never"}, {"eos": "last"}, {"eos_penalty": 1.5, "eos": "last"}),
]


def prompt_of(rng: random.Random) -> list[int]:
    return [rng.randrange(490) for _ in range(rng.randint(4, 24))]


def names_for(sampler: Sampler) -> tuple[str, ...]:
    """Models that the sampler goes with."""
    return NAMES[:1] if isinstance(sampler, WINO) else NAMES


@pytest.mark.sampled(3)
@pytest.mark.parametrize("seed", range(2 * len(CHANGES)))
@pytest.mark.parametrize("make", MAKES)
def test_steps_are_those_of_the_oracle(make, seed: int):
    rng = random.Random(f"{make.__name__}/{seed}")
    sampler, prompt, changes = make(rng), prompt_of(rng), CHANGES[seed // 2]
    name = names_for(sampler)[seed % len(names_for(sampler))]
    if isinstance(sampler, WINO) and changes.keys() & {"eos_stop", "cfg_scale"}:
        with pytest.raises(ArgumentError, match=f"{next(iter(changes))}=.* does not go with WINO"):
            sampler.replace(**changes)
        return
    plain = engine_of(name).generate(prompt, gen_length=LENGTH, sampler=sampler).response
    engine = engine_of(name, max(plain, key=plain.count))
    sampler = sampler.replace(**changes)
    done = engine.generate(prompt, gen_length=LENGTH, sampler=sampler, seed=seed, trace=True)
    wanted = reference(engine, prompt + [engine.spec.mask_id] * LENGTH, len(prompt), sampler, seed)
    wrong = compare(done, wanted)
    assert wrong is None or wanted.margin < MARGIN, f"{sampler}\n{wrong}"


@pytest.mark.sampled(2)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("make", MAKES)
def test_infilling(make, seed: int):
    """Masks anywhere: given tokens stay, and blocks without masks take no step."""
    rng = random.Random(f"infill/{make.__name__}/{seed}")
    sampler, engine = make(rng), engine_of(NAMES[0])
    canvas = [engine.spec.mask_id if rng.random() < 0.6 and not 8 <= i < 16 else rng.randrange(490) for i in range(40)]
    done = engine.infill(canvas, sampler=sampler, trace=True)
    wanted = reference(engine, canvas, 0, sampler)
    wrong = compare(done, wanted)
    assert wrong is None or wanted.margin < MARGIN, f"{sampler}\n{wrong}"


@pytest.mark.parametrize("sampler", KINDS, ids=lambda sampler: type(sampler).__name__)
def test_a_sequence_takes_nothing_from_the_one_before_it_in_its_slot(sampler):
    """Nor from others of its batch, whose steps fall at other times."""
    engine = engine_of(names_for(sampler)[-1])
    wanted = [
        reference(engine, prompt + [engine.spec.mask_id] * length, len(prompt), sampler)
        for prompt, length in zip(PROMPTS, LENGTHS, strict=True)
    ]
    for _ in range(2):
        done = engine.generate(PROMPTS, gen_length=LENGTHS, sampler=sampler, trace=True)
        assert [compare(mine, one) for mine, one in zip(done, wanted, strict=True)] == [None] * 3


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("number", "policy"), [*enumerate(POLICIES)])
@pytest.mark.parametrize("sampler", KINDS, ids=lambda sampler: type(sampler).__name__)
def test_sequences_of_a_batch_equal_those_alone(sampler, number: int, policy: str):
    names, how = names_for(sampler), {"sampler": sampler, "cache": POLICIES[policy], "trace": True}
    engine = engine_of(names[number % len(names)])
    if not goes_with(sampler, POLICIES[policy]):
        with pytest.raises(ArgumentError, match="does not go with"):
            engine.generate(**RAGGED, **how)
        return
    alone = [
        engine.generate(prompt, gen_length=length, seed=seed, **how)
        for prompt, length, seed in zip(*RAGGED.values(), strict=True)
    ]
    assert_same(engine.generate(**RAGGED, **how), alone)
    assert all(engine.spec.mask_id not in one.response for one in alone)


@pytest.mark.parametrize("sampler", KINDS, ids=lambda sampler: type(sampler).__name__)
def test_kernels(sampler):
    name, how = names_for(sampler)[-1], {"gen_length": 4, "cache": POLICIES["region-ahead"], "trace": True}
    how["sampler"] = sampler.replace(block_length=4)
    with brisk_interpreter():
        done = engine_of(name, backend="triton").generate(PROMPTS[-1:], **how)
    assert_same(done, engine_of(name).generate(PROMPTS[-1:], **how))


@pytest.mark.parametrize("sampler", KINDS, ids=lambda sampler: type(sampler).__name__)
def test_memory_is_counted(sampler):
    engine, plain = engine_of(NAMES[0]), Threshold(block_length=8)

    def tensors(sampler: Sampler) -> tuple[int, int]:
        sequences, _ = engine.sequences(PROMPTS, gen_length=LENGTHS, sampler=sampler)
        key, bounds = sequences[0].batch_key, bounds_of(sequences)
        runner = ModelRunner(engine.model, key, 3, bounds.length, bounds.response)
        caches = [tensor for cache in runner.caches for tensor in (cache.k, cache.v)]
        own = sum(tensor.nbytes for tensor in [*runner.earlier.tensors(), *caches])
        return own, ModelRunner.bytes_needed(engine.model, key, 3, bounds.length)

    own, needed = tensors(sampler)
    none, less = tensors(plain)
    assert none == 0 and 0 <= own - (needed - less) < own / 10  # the spare places are not counted


@pytest.mark.parametrize("policy", ["none", "region", "region-ahead"])
def test_wino_in_each_execution(policy: str):
    how = {"sampler": KINDS[-1], "cache": POLICIES[policy], "trace": True}
    wanted = engine_of(NAMES[0]).generate(**RAGGED, **how)
    for execution in EXECUTIONS:
        assert_same(engine_with(engine_of(NAMES[0]), execution).generate(**RAGGED, **how), wanted)


def test_what_is_settled_is_not_taken_back():
    """Positions are, and yet a stream never changes what it has reported as settled."""
    settled, taken = [0] * 3, 0
    before = [[]] * 3
    for frame in engine_of(NAMES[0]).stream(PROMPTS, gen_length=LENGTHS, sampler=KINDS[-1]):
        for index, (tokens, until) in enumerate(zip(frame.tokens, frame.settled, strict=True)):
            old, mask = before[index], engine_of(NAMES[0]).spec.mask_id
            taken += sum(was != mask and now == mask for was, now in zip(old, tokens, strict=False))
            assert until >= settled[index] and old[: settled[index]] == tokens[: settled[index] if old else 0]
            settled[index], before[index] = until, tokens
    assert taken > 3 and settled == [len(tokens) for tokens in before]


def test_models_with_shifted_logits_have_no_wino():
    with pytest.raises(ArgumentError, match="sampler='wino' does not go with models whose logits are shifted"):
        engine_of(NAMES[1]).generate(PROMPTS[0], gen_length=32, sampler="wino")


def test_calm_decides():
    """Positions that no longer change are committed together; without any, the best alone."""
    engine, sampler = engine_of(NAMES[0]), KLASS(tau=0.2, divergence=0.3, block_length=16)
    for prompt in PROMPTS:
        nfe, never = (
            engine.generate(prompt, gen_length=LENGTH, sampler=each).nfe
            for each in (sampler, sampler.replace(divergence=0.0))
        )
        assert nfe < never == LENGTH


def test_credit_decides():
    """Predictions that repeat themselves are committed earlier; a weight of 0 is a plain threshold."""
    engine, sampler = engine_of(NAMES[0]), Credit(tau=0.9, weight=3.0, decay=1.0, block_length=16)
    for prompt in PROMPTS:
        nfe, without, plain = (
            engine.generate(prompt, gen_length=LENGTH, sampler=each).nfe
            for each in (sampler, sampler.replace(weight=0), Threshold(tau=0.9, block_length=16))
        )
        assert nfe < without == plain


def test_ends_put_last_are_committed_one_by_one():
    engine, prompt, sampler, most = engine_of(NAMES[0]), PROMPTS[0], Credit(block_length=None), 0
    for end in engine.generate(prompt, gen_length=LENGTH, sampler=sampler).response[::3]:
        model = Transformer(dataclasses.replace(engine.spec, eos_id=end, other_ends=()), engine.model.weights)
        how = {"gen_length": LENGTH, "sampler": sampler.replace(eos="last"), "trace": True}
        done = sfs_triton.Engine(model).generate(prompt, **how)
        committed = list(zip(done.response, done.commit_step[done.prompt_length :], done.probabilities, strict=True))
        steps = [step for token, step, _ in committed if token == end]
        assert steps == sorted(set(steps))
        assert all((probability is None) == (token == end) for token, _, probability in committed)
        most = max(most, len(steps))
    assert most > 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tau": float("nan")}, "tau=nan"),
        ({"weight": -1}, "weight=-1 is not a number from 0 to 1000"),
        ({"decay": 1.5}, "decay=1.5 is not a number from 0 to 1"),
        ({"power": "0.2"}, "power='0.2'"),
        ({"block_length": 0}, "block_length=0"),
    ],
)
def test_bad_options_of_credit(options, said):
    with pytest.raises(ArgumentError, match=said):
        Credit(**options)


@pytest.mark.parametrize(("options", "said"), [({"tau": -1}, "tau=-1"), ({"tau_back": "1"}, "tau_back='1'")])
def test_bad_options_of_wino(options, said):
    with pytest.raises(ArgumentError, match=said):
        WINO(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tau": float("nan")}, "tau=nan"),
        ({"divergence": -0.1}, "divergence=-0.1"),
        ({"history": 0}, "history=0 is not an integer"),
        ({"take": "some"}, "take='some' is not one of"),
        ({"least": 1.5}, "least=1.5"),
    ],
)
def test_bad_options_of_klass(options, said):
    with pytest.raises(ArgumentError, match=said):
        KLASS(**options)
