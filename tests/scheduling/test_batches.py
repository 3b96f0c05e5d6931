"""Batch independence: a sequence's result depends on no other sequence, on no order, and on no foreign memory."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace

import pytest
import torch

from sfs_triton import Engine, NumericalFault, RegionCache, SlowFast
from sfs_triton.models import Transformer
from sfs_triton.models.cache import FeatureCache
from sfs_triton.runner import ModelRunner
from tests.conformance import MARGIN, METHODS, Setup, recorded_margin
from tests.support.combinations import (
    EXECUTIONS,
    RAGGED,
    SOME_PAIRS,
    Roomy,
    assert_same,
    engine_with,
    few_of,
    pairwise,
)
from tests.support.paths import GOLDEN

MOST, STEPS = 3, 90  # most sequences of a batch, and most steps that it may take here


def _recorded() -> list[tuple[str, Setup, dict]]:
    """Load stable single-sequence cases, with their models."""
    cases = []
    for path in sorted((GOLDEN / "cases").glob("*.jsonl")):
        for case in map(json.loads, path.read_text().splitlines()):
            close = recorded_margin(case) < MARGIN
            if case.get("stable") and "error" not in case and len(case["prompt"]) == 1 and not close:
                cases.append((path.name.split(".")[0], METHODS[case["method"]](case["settings"]), case))
    return cases


def _batches() -> list:
    """Pick, per method, the most uneven batch of cases: in response lengths, else in steps, and in prompts."""
    kinds, best = defaultdict(list), {}
    for model, setup, case in _recorded():
        if case["nfe"] <= STEPS:
            kinds[model, setup.system, setup.sampler, setup.cache].append((setup, case))
    for (model, system, _, cache), cases in kinds.items():
        cases = sorted(cases, key=lambda each: (each[0].gen_length, len(each[1]["prompt"][0])))
        cases = cases[:: max(1, len(cases) // MOST)][:MOST]
        lengths, steps = {setup.gen_length for setup, _ in cases}, {case["nfe"] for _, case in cases}
        uneven = (len(lengths), max(steps) - min(steps))
        method = system if isinstance(cache, str) else f"{system}-{cache.name}"
        if len(cases) >= 3 and uneven > best.get(method, ((0, -1),))[0]:
            best[method] = uneven, model, cases
    return [pytest.param(model, cases, id=f"{method}-{model}") for method, (_, model, cases) in sorted(best.items())]


BATCHES = _batches()


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("model", "cases", "execution"),
    [pytest.param(*batch.values, ("exact", "padded")[number % 2], id=batch.id) for number, batch in enumerate(BATCHES)],
)
def test_recorded_sequences_in_one_batch(engines, model, cases, execution):
    """In float32 each sequence gives the reference's result for it alone."""
    cases = cases if execution == "exact" else cases[::-1]
    setup = cases[0][0]
    options = {
        "prompts": [case["prompt"][0] for _, case in cases],
        "gen_length": [setup.gen_length for setup, _ in cases],
        "seed": [setup.seed for setup, _ in cases],
    }
    done = engine_with(engines[model], execution).generate(**options, sampler=setup.sampler, cache=setup.cache)
    for result, (_, case) in zip(done, cases, strict=True):
        assert result.response == case["out"][0] and result.nfe == case["nfe"], case["id"]


def test_batches_are_uneven():
    batches = [batch.values[1] for batch in BATCHES]
    assert len(batches) >= 14
    assert sum(len({setup.gen_length for setup, _ in cases}) > 1 for cases in batches) >= 4
    assert all(len({len(case["prompt"][0]) for _, case in cases}) > 1 for cases in batches)
    caches = {cache if isinstance(cache, str) else cache.name for cases in batches for cache in [cases[0][0].cache]}
    assert caches == {"none", "prefix", "dual", "delayed", "refresh"}


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("sampler", "policy", "execution"), pairwise(SOME_PAIRS, ["padded", "exact"]))
def test_sequences_do_not_depend_on_each_other(engines, sampler, policy, execution):
    """Results depend neither on the number of sequences, nor on their order, nor on their contents."""
    sampler = sampler.replace(temperature=0.5, eos_stop=True)
    options = {"sampler": sampler, "cache": policy, "trace": True}
    sequences = list(zip(RAGGED["prompts"], RAGGED["gen_length"], RAGGED["seed"], strict=True))

    def run(order):
        prompts, lengths, seeds = (list(column) for column in zip(*(sequences[i] for i in order), strict=True))
        engine = engine_with(engines["llada-gqa"], execution)
        return engine.generate(prompts, gen_length=lengths, seed=seeds, **options)

    alone = [run([index])[0] for index in range(3)]
    for order in ([2, 0, 1], [1, 1, 0]):
        assert_same(run(order), [alone[index] for index in order])


# -------------------------------------------------------------------------------------- positions that must not be read

UNREADABLE = 489  # a token that no test has in a canvas


def _poison_rest(state) -> None:
    """Fill positions beyond the sequences' ends with a token that the model cannot read."""
    beyond = state.position >= state.end[:, None]
    state.tokens.masked_fill_(beyond, UNREADABLE)


def _poison_caches(runner: ModelRunner, fresh: int | None = None) -> None:
    """Fill with NaN the entries that no sequence may use, and the whole slot of a new sequence."""
    state = runner.state
    beyond = state.position >= state.end[:, None]
    if fresh is not None:
        beyond[fresh] = True
    for cache in runner.caches:
        if isinstance(cache, FeatureCache):
            for tensor in cache.tensors:
                tensor[:, :, -1] = torch.nan
                tensor[:, :, :-1].masked_fill_(beyond[None, :, :, None], torch.nan)
        else:
            for tensor in (cache.k, cache.v):
                tensor.masked_fill_(beyond[None, :, None, :, None], torch.nan)


def _poison_buffers(runner: ModelRunner) -> None:
    """Poison buffers that each step fills before it reads them."""
    state = runner.state
    for tensor in (runner._lists, runner._count, runner._unused, runner._key_range):
        tensor.fill_(-0x55555556)
    state.choice_token.fill_(0x55555555)
    state.choice_score.fill_(torch.nan)
    for flags in (state.candidate, state.fill):
        flags.fill_(True)
    state.estimate.fill_(0x5555)
    state.listed.fill_(0x5555)


@pytest.fixture
def poisoned(monkeypatch):
    """Poison when a sequence joins, and again before each step, graphs included."""
    put, launch = ModelRunner.put, ModelRunner.launch

    def put_poisoned(runner, slot, *given, **named):
        progress = put(runner, slot, *given, **named)
        with torch.inference_mode():
            _poison_rest(runner.state)
            _poison_caches(runner, slot)
        return progress

    def launch_poisoned(runner, plan):
        with torch.inference_mode():
            _poison_caches(runner)
            _poison_buffers(runner)
        launch(runner, plan)

    monkeypatch.setattr(ModelRunner, "put", put_poisoned)
    monkeypatch.setattr(ModelRunner, "launch", launch_poisoned)


@pytest.fixture(scope="module")
def wary(engines) -> dict[str, Engine]:
    """Models whose logits are NaN wherever the unreadable token has an effect."""
    made = {}
    for name in ("llada-mha", "dream-gqa"):
        weights = engines[name].model.weights
        weights = replace(weights, embedding=weights.embedding.clone())
        weights.embedding[UNREADABLE] = torch.nan
        made[name] = Engine(Transformer(engines[name].spec, weights))
    return made


@pytest.mark.parametrize(
    ("sampler", "policy", "how"), few_of(SOME_PAIRS, ["llada-mha, exact", "dream-gqa, exact", "dream-gqa, graphs"])
)
def test_poison_has_no_effect(engines, wary, poisoned, monkeypatch, sampler, policy, how):
    model, execution = how.split(", ")
    options = {**RAGGED, "sampler": sampler.replace(cfg_scale=0.4), "cache": policy, "trace": True}
    done = engine_with(wary[model], Roomy(EXECUTIONS[execution](), 9)).generate(**options)
    monkeypatch.undo()
    assert_same(done, engine_with(engines[model]).generate(**options))


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("sampler", "policy", "execution"), pairwise(SOME_PAIRS, ["graphs", "exact"]))
def test_poison_has_no_effect_on_sequences_that_join_later(
    engines, wary, poisoned, monkeypatch, sampler, policy, execution
):
    """Leftovers of a slot's previous sequence have no effect either."""
    init, slots_made = ModelRunner.__init__, []

    def narrow(runner, model, key, slots, *given, **named):
        if slots > 1:
            raise torch.OutOfMemoryError("one at a time")
        slots_made.append(slots)
        init(runner, model, key, slots, *given, **named)

    options = {**RAGGED, "sampler": sampler.replace(cfg_scale=0.4), "cache": policy, "trace": True}
    monkeypatch.setattr(ModelRunner, "__init__", narrow)
    done = engine_with(wary["dream-gqa"], Roomy(EXECUTIONS[execution](), 9)).generate(**options)
    monkeypatch.undo()
    assert slots_made == [1], "the sequences did not share a slot"
    assert_same(done, engine_with(engines["dream-gqa"]).generate(**options))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda runner: runner.state.tokens.__setitem__((0, 0), UNREADABLE),
        lambda runner: runner.caches[0].k.__setitem__((0, 1, 0, 0), torch.nan),
        lambda runner: runner.caches[1].v.__setitem__((-1, 1, 0, 0), torch.nan),
    ],
    ids=["token", "keys", "values"],
)
def test_poison_within_the_sequences_is_noticed(wary, monkeypatch, spoil):
    launch = ModelRunner.launch

    def launch_spoiled(runner, plan):
        if (runner.state.step > 0).any():
            spoil(runner)
        launch(runner, plan)

    monkeypatch.setattr(ModelRunner, "launch", launch_spoiled)
    sampler, policy = SlowFast(cfg_scale=0.4), RegionCache(capacity=24, rotate=False, refresh_every=3)
    with pytest.raises(NumericalFault):
        engine_with(wary["llada-mha"], "padded").generate(**RAGGED, sampler=sampler, cache=policy)
