"""Batch independence: a sequence's result depends on no other sequence, on no order, and on no foreign memory."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace

import pytest
import torch

from sfs_triton import Engine, NumericalFault, OutOfDeviceMemory, RegionCache, SlowFast
from sfs_triton.models import Transformer
from sfs_triton.models.cache import FeatureCache
from sfs_triton.runner import Step
from sfs_triton.scheduling.lane import Lane
from tests.conformance import MARGIN, METHODS, Setup, recorded_margin
from tests.support.combinations import LOOPS, RAGGED, SOME_PAIRS, Roomy, assert_same, engine_with
from tests.support.paths import GOLDEN

ROWS, STEPS = 3, 90  # most rows of a batch, and most steps that it may take here


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
    for (model, system, _, cache), rows in kinds.items():
        rows = sorted(rows, key=lambda row: (row[0].gen_length, len(row[1]["prompt"][0])))
        rows = rows[:: max(1, len(rows) // ROWS)][:ROWS]
        lengths, steps = ({of(row) for row in rows} for of in (lambda r: r[0].gen_length, lambda r: r[1]["nfe"]))
        uneven = (len(lengths), max(steps) - min(steps))
        method = system if isinstance(cache, str) else f"{system}-refresh"
        if len(rows) >= 3 and uneven > best.get(method, ((0, -1),))[0]:
            best[method] = uneven, model, rows
    return [pytest.param(model, rows, id=f"{method}-{model}") for method, (_, model, rows) in sorted(best.items())]


def _check(done, rows) -> None:
    for row, (_, case) in zip(done, rows, strict=True):
        assert row.response == case["out"][0] and row.nfe == case["nfe"], case["id"]


BATCHES = _batches()


@pytest.mark.parametrize(("model", "rows"), BATCHES)
def test_recorded_rows_in_one_batch(engines, model, rows):
    """In float32 each sequence gives the reference's result for it alone."""
    setup = rows[0][0]
    options = {
        "prompts": [case["prompt"][0] for _, case in rows],
        "gen_length": [setup.gen_length for setup, _ in rows],
        "seed": [setup.seed for setup, _ in rows],
    }
    for loop, order in (("tight", slice(None)), ("fixed", slice(None, None, -1))):
        mine = {name: value[order] for name, value in options.items()}
        done = engine_with(engines[model], loop).generate(**mine, sampler=setup.sampler, cache=setup.cache)
        _check(done, rows[order])


def test_batches_are_uneven():
    batches = [batch.values[1] for batch in BATCHES]
    assert len(batches) >= 14
    assert sum(len({setup.gen_length for setup, _ in rows}) > 1 for rows in batches) >= 4
    assert all(len({len(case["prompt"][0]) for _, case in rows}) > 1 for rows in batches)
    caches = {cache if isinstance(cache, str) else cache.name for rows in batches for cache in [rows[0][0].cache]}
    assert caches == {"none", "prefix", "dual", "refresh"}


@pytest.mark.parametrize(("sampler", "policy"), SOME_PAIRS)
@pytest.mark.parametrize("loop", ["tight", "fixed"])
def test_rows_do_not_know_of_each_other(engines, sampler, policy, loop):
    """Results depend neither on the number of sequences, nor on their order, nor on their contents."""
    sampler = sampler.replace(temperature=0.5, eos_stop=True)
    options = {"sampler": sampler, "cache": policy, "trace": True}
    rows = list(zip(RAGGED["prompts"], RAGGED["gen_length"], RAGGED["seed"], strict=True))

    def run(order):
        prompts, lengths, seeds = (list(column) for column in zip(*(rows[i] for i in order), strict=True))
        engine = engine_with(engines["llada-gqa"], loop)
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


def _poison_caches(step: Step, fresh: int | None = None) -> None:
    """Fill with NaN the entries that no sequence may use, and the whole slot of a new sequence."""
    state = step.state
    beyond = state.position >= state.end[:, None]
    if fresh is not None:
        beyond[fresh] = True
    for cache in step.caches:
        if isinstance(cache, FeatureCache):
            for tensor in cache.tensors:
                tensor[:, :, -1] = torch.nan
                tensor[:, :, :-1].masked_fill_(beyond[None, :, :, None], torch.nan)
        else:
            for tensor in (cache.k, cache.v):
                tensor.masked_fill_(beyond[None, :, None, :, None], torch.nan)


def _poison_buffers(step: Step) -> None:
    """Poison buffers that each step fills before it reads them."""
    state = step.state
    for tensor in (step._lists, step._count, step._key_range):
        tensor.fill_(-0x55555556)
    state.choice_token.fill_(0x55555555)
    state.choice_score.fill_(torch.nan)
    for flags in (state.candidate, state.fill):
        flags.fill_(True)
    state.estimate.fill_(0x5555)
    state.listed.fill_(0x5555)


@pytest.fixture
def poisoned(monkeypatch):
    """Poison when a sequence joins, and again before each step."""
    join, run = Step.join, Step.run

    def join_poisoned(step, slot, *given, **named):
        join(step, slot, *given, **named)
        with torch.inference_mode():
            _poison_rest(step.state)
            _poison_caches(step, slot)

    def run_poisoned(step, shapes, **named):
        with torch.inference_mode():
            _poison_caches(step)
            _poison_buffers(step)
        run(step, shapes, **named)

    monkeypatch.setattr(Step, "join", join_poisoned)
    monkeypatch.setattr(Step, "run", run_poisoned)


@pytest.fixture(scope="module")
def wary(engines) -> dict[str, Engine]:
    """Models that say NaN wherever the unreadable token has an effect."""
    made = {}
    for name in ("llada-mha", "dream-gqa"):
        weights = engines[name].model.weights
        weights = replace(weights, embedding=weights.embedding.clone())
        weights.embedding[UNREADABLE] = torch.nan
        made[name] = Engine(Transformer(engines[name].spec, weights))
    return made


@pytest.mark.parametrize(("sampler", "policy"), SOME_PAIRS)
@pytest.mark.parametrize(("model", "loop"), [("llada-mha", "tight"), ("dream-gqa", "tight"), ("dream-gqa", "replay")])
def test_poison_has_no_effect(engines, wary, poisoned, monkeypatch, model, sampler, policy, loop):
    options = {**RAGGED, "sampler": sampler.replace(cfg_scale=0.4), "cache": policy, "trace": True}
    done = engine_with(wary[model], Roomy(LOOPS[loop](), 9)).generate(**options)
    monkeypatch.undo()
    assert_same(done, engine_with(engines[model]).generate(**options))


@pytest.mark.parametrize(("sampler", "policy"), SOME_PAIRS)
@pytest.mark.parametrize("loop", ["tight", "replay"])
def test_poison_has_no_effect_on_rows_that_join_later(engines, wary, poisoned, monkeypatch, sampler, policy, loop):
    """Leftovers of a slot's previous sequence have no effect either."""
    init = Lane.__init__

    def narrow(lane, model, kind, slots, *given):
        if slots > 1:
            raise OutOfDeviceMemory("one at a time")
        init(lane, model, kind, slots, *given)

    options = {**RAGGED, "sampler": sampler.replace(cfg_scale=0.4), "cache": policy, "trace": True}
    monkeypatch.setattr(Lane, "__init__", narrow)
    done = engine_with(wary["dream-gqa"], Roomy(LOOPS[loop](), 9)).generate(**options)
    monkeypatch.undo()
    assert_same(done, engine_with(engines["dream-gqa"]).generate(**options))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda step: step.state.tokens.__setitem__((0, 0), UNREADABLE),
        lambda step: step.caches[0].k.__setitem__((0, 1, 0, 0), torch.nan),
        lambda step: step.caches[1].v.__setitem__((-1, 1, 0, 0), torch.nan),
    ],
    ids=["token", "keys", "values"],
)
def test_poison_within_the_rows_is_noticed(wary, monkeypatch, spoil):
    run = Step.run

    def run_spoiled(step, shapes, **named):
        if (step.state.step > 0).any():
            spoil(step)
        run(step, shapes, **named)

    monkeypatch.setattr(Step, "run", run_spoiled)
    sampler, policy = SlowFast(cfg_scale=0.4), RegionCache(capacity=24, rotate=False, refresh_every=3)
    with pytest.raises(NumericalFault):
        engine_with(wary["llada-mha"], "fixed").generate(**RAGGED, sampler=sampler, cache=policy)
