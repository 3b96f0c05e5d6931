"""Sequences join and leave while others run: each gets its solo result, nothing is recaptured, none starves."""

from __future__ import annotations

import random
from dataclasses import fields, replace

import pytest
import torch

from sfs_triton import (
    KLASS,
    WINO,
    Credit,
    Engine,
    EntropyBound,
    FixedSteps,
    Hierarchy,
    LocalLeap,
    MultiBlock,
    NumericalFault,
    OutOfDeviceMemory,
    Sampler,
    SlowFast,
    Threshold,
)
from sfs_triton.decoding import samplers
from sfs_triton.decoding.caching import BatchBounds
from sfs_triton.decoding.params import DecodingParams
from sfs_triton.kernels.control import SAMPLING
from sfs_triton.models import Transformer
from sfs_triton.models.cache import KVCache
from sfs_triton.runner import CudaGraphs, Eager, ModelRunner
from sfs_triton.scheduling.persistent_batch import PersistentBatch
from sfs_triton.scheduling.scheduler import Scheduler, bounds_around, bounds_of
from sfs_triton.scheduling.sequence import Sequence, Status
from tests.support.combinations import (
    EXECUTIONS,
    POLICIES,
    SAMPLERS,
    SOME_PAIRS,
    assert_same,
    engine_with,
    pairwise,
    stand_in,
)
from tests.support.oracle import compare, reference
from tests.support.paths import ROOT

VANILLA = FixedSteps()
TEMPERED = FixedSteps(steps=8, metric="topk_margin", temperature=0.7, top_p=0.8)


def asked(rng: random.Random, number: int, mask_id: int, longest: int = 24) -> list[tuple[list[int], int, int]]:
    """Canvases with their starts and seeds; response lengths are multiples of 8."""
    found = []
    for index in range(number):
        prompt = [rng.randrange(3, 120) for _ in range(rng.randrange(3, 20))]
        found.append((prompt + [mask_id] * rng.randrange(8, longest + 1, 8), len(prompt), 100 + index))
    return found


def sequences_of(engine: Engine, given, sampler=None, cache="none", trace=False, frames=False) -> list[Sequence]:
    sampler = sampler or SlowFast()
    params = [
        DecodingParams.parse(sampler, cache, seed=seed, gen_length=len(canvas) - start) for canvas, start, seed in given
    ]
    pairs = zip(params, given, strict=True)
    return [Sequence(each, list(one[0]), one[1], engine.spec.mask_id, trace, frames) for each, one in pairs]


def alone(engine: Engine, sequence: Sequence):
    """Return the result of the sequence decoded alone."""
    copy = Sequence(
        sequence.params, sequence.canvas, sequence.start, engine.spec.mask_id, trace=sequence.batch_key.trace
    )
    with engine_with(engine)._run([copy]) as run:
        assert list(iter(run.advance, None))
        return run.results()[0]


def results(engine: Engine, sequences: list[Sequence]):
    return [sequence.result(engine.spec, None) for sequence in sequences]


def scheduler_of(engine: Engine, sequences: list[Sequence] | None = None, **limits) -> Scheduler:
    bounds = bounds_of(sequences) if sequences else None
    return Scheduler(engine.batches, lambda one: bounds or bounds_around(one, engine.spec.max_length), **limits)


def run_out(scheduler: Scheduler, most: int = 10_000) -> int:
    """Step until nothing is left; return the number of rounds."""
    for taken in range(most):
        if not scheduler.waiting + scheduler.running:
            return taken
        scheduler.step()
    raise AssertionError("it does not end")


# ------------------------------------------------------------------------------------------------------ sharing a batch


JOINING = [
    pytest.param(model, *pair.values, id=f"{model}-{pair.id}")
    for model in ("llada-mha", "dream-gqa")
    for pair in SOME_PAIRS
]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("model", "sampler", "policy", "execution"), pairwise(JOINING, EXECUTIONS))
def test_sequences_that_join_later_get_their_solo_results(engines, model, sampler, policy, execution):
    rng = random.Random(f"{model}{sampler}{execution}")
    engine = engine_with(engines[model], execution)
    sequences = sequences_of(engine, asked(rng, 5, engine.spec.mask_id), sampler, policy, trace=True)
    scheduler = scheduler_of(engine, sequences, slots=3)
    together = 0
    scheduler.submit(sequences[0])
    for one in sequences[1:]:
        scheduler.submit(one)
        for _ in range(rng.randrange(4)):
            together = max(together, len(scheduler.step()))
    run_out(scheduler)
    assert together > 1 and all(one.finished for one in sequences)
    assert_same(results(engine, sequences), [alone(engines[model], one) for one in sequences])


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["origin", "entropy", "dream-reference"])
@pytest.mark.parametrize("execution", ["exact", "graphs"])
def test_noise_and_schedules_are_per_sequence(engines, name, execution):
    rng = random.Random(5)
    engine = engine_with(engines["dream-gqa"], execution)
    sampler = SAMPLERS[name].replace(temperature=0.8, cfg_scale=0.3)
    sequences = sequences_of(engine, asked(rng, 5, engine.spec.mask_id), sampler)
    scheduler = scheduler_of(engine, sequences, slots=2)
    for one in sequences:
        scheduler.submit(one)
        scheduler.step()
    run_out(scheduler)
    assert_same(results(engine, sequences), [alone(engine, one) for one in sequences])


OWN: dict[str, tuple[Sampler, list[dict]]] = {  # parameters in which sequences of a batch may differ
    "slowfast": (SlowFast(), [{"tau_min": 0.4, "tau_high": 0.5}, {"tau_slow": 0.6}, {"tau_high": 0.99}]),
    "shared": (SlowFast.preset("fast"), [{"tau_high": 0.3}, {"tau_slow": None}, {"tau_min": 0.0, "tau_high": 0.0}]),
    "threshold": (Threshold(block_length=8), [{"tau": 0.2}, {"tau": 1.0}, {"tau": 0.0}]),
    "factor": (Threshold(block_length=8, factor=1.0), [{"factor": 0.2}, {"factor": 4.0}]),
    "bound": (EntropyBound(block_length=8), [{"bound": 0.0}, {"bound": 2.0}]),
    "leap": (LocalLeap(block_length=8), [{"tau": 0.2, "tau_near": 0.1}, {"tau_near": 0.0}]),
    "runs": (Hierarchy(block_length=8), [{"tau": 0.9, "tau_low": None}, {"tau_low": 0.1}]),
    "open": (MultiBlock(block_length=8), [{"entropy": 2.0}, {"entropy": 0.1}]),
    "credit": (Credit(block_length=8), [{"tau": 0.2}, {"tau": 1.0}]),
    "klass": (KLASS(block_length=8), [{"tau": 0.2, "divergence": 0.5}, {"divergence": 0.1}]),
    "wino": (WINO(block_length=8), [{"tau": 0.1}, {"tau": 0.05, "tau_back": 0.5}]),
    "fixed": (FixedSteps(steps=8), [{"steps": 3}, {"steps": None}, {"steps": 1, "eps": 0.5}]),
    "drawn": (SlowFast(temperature=0.8), [{"temperature": 0.3}, {"temperature": 2.0}, {"temperature": 1e-6}]),
    "nucleus": (Threshold(block_length=8, temperature=1.0, top_p=0.9), [{"top_p": 0.4}, {"temperature": 3.0}]),
    "tempered": (TEMPERED, [{"temperature": 1.5}, {"top_p": 0.3}]),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("name", "execution"), [(name, list(EXECUTIONS)[number % len(EXECUTIONS)]) for number, name in enumerate(OWN)]
)
def test_sequences_of_other_settings_share_a_batch(engines, name, execution):
    sampler, changes = OWN[name]
    rng, model = random.Random(name), "llada-gqa" if name == "wino" else "dream-gqa"
    engine = engine_with(engines[model], execution)
    samplers = [sampler, *(sampler.replace(**change) for change in changes)]
    sequences = [sequences_of(engine, asked(rng, 1, engine.spec.mask_id), each, trace=True)[0] for each in samplers * 2]
    scheduler = scheduler_of(engine, sequences, slots=3, most=1)
    together = 0
    for one in sequences:
        scheduler.submit(one)
        together = max(together, len(scheduler.step()))
    run_out(scheduler)
    assert together == 3
    found = results(engine, sequences)
    assert_same(found, [alone(engines[model], one) for one in sequences])
    for one, mine in zip(sequences, found, strict=True):
        wanted = reference(engine, one.canvas, one.start, one.params.sampler, one.params.seed)
        assert compare(mine, wanted) is None, one.params.sampler


APART: dict[str, tuple[Sampler, list[dict]]] = {
    "slowfast": (
        SlowFast(),
        [
            *({"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 5}, {"cfg_scale": 0.5}, {"eos_stop": True}),
            *({"k_max": 4}, {"window": 3}, {"spread": "std"}, {"spread_limit": 2.0}, {"inclusive": True}),
            *({"strict": False}, {"slow_end": "fixed"}, {"rounding": "even"}, {"zero_history": True}),
            *({"min_parallel": 2}, {"min_parallel_slow": 2}, {"block_length": 8}, {"max_cycles": 3}),
            *({"share_stable": True}, {"eos_horizon": False}, {"eos": "last"}, {"eos_penalty": 1.0}),
            {"end_think_token_ids": (3,), "end_think_logit_boost": 1.0},
            {"end_think_boost_power": 1.0},
        ],
    ),
    "threshold": (Threshold(), [{"block_length": 8}, {"steps": 4}, {"metric": "margin"}, {"least": 2}, {"sigma": 3.0}]),
    "factor": (Threshold(factor=1.0), [{"factor": None}, {"sigma": 3.0}]),
    "bound": (EntropyBound(), [{"block_length": 8}, {"metric": "confidence"}, {"least": 2}]),
    "leap": (LocalLeap(), [{"radius": 2}, {"steps": 8}]),
    "open": (MultiBlock(), [{"open_at": 0.5}, {"strict": True}, {"keep_best": False}]),
    "credit": (Credit(), [{"weight": 1.0}, {"decay": 0.5}, {"power": 1.0}]),
    "klass": (KLASS(), [{"history": 1}, {"take": "calm"}, {"least": 2}]),
    "fixed": (FixedSteps(steps=8), [{"block_length": 8}, {"metric": "entropy"}]),
    "entropy": (FixedSteps(steps=8, metric="entropy"), [{"steps": 4}, {"eps": 0.1}]),
}


def test_every_other_setting_is_part_of_the_batch_key():
    for sampler, changes in APART.values():
        for change in changes:
            assert sampler.replace(**change).blanked() != sampler.blanked(), change
    for sampler, changes in OWN.values():
        for change in changes:
            assert sampler.replace(**change).blanked() == sampler.blanked(), change
    told = {name for sampler, changes in (*OWN.values(), *APART.values()) for change in changes for name in change}
    assert SlowFast(grow=8).blanked() == SlowFast().blanked()
    assert told | {"grow"} == {field.name for kind in samplers.SAMPLERS.values() for field in fields(kind)}
    assert {name for kind in samplers.SAMPLERS.values() for name in kind().sampling_values()} == {*SAMPLING}
    assert Threshold(top_p=1.0).blanked() == Threshold().blanked(), "it leaves nothing out"


@pytest.mark.parametrize("policy", POLICIES)
def test_no_shape_is_captured_twice_while_sequences_come_and_go(engines, policy):
    captured = []

    def capture(runner, shape):
        captured.append(shape)
        return stand_in(runner, shape)

    engine = engine_with(engines["llada-gqa"], CudaGraphs(capture=capture))
    sampler = SAMPLERS["open" if policy == "delayed" else "threshold"]
    sequences = sequences_of(engine, asked(random.Random(1), 9, engine.spec.mask_id), sampler, POLICIES[policy])
    scheduler = scheduler_of(engine, sequences, slots=4)
    for one in sequences[:2]:
        scheduler.submit(one)
    scheduler.step()
    addresses = [cache.k.data_ptr() for cache in scheduler._open[0].runner.caches]
    for one in sequences[2:]:
        scheduler.submit(one)
        scheduler.step()
    run_out(scheduler)
    assert len(captured) == len(set(captured)) > 0
    assert addresses == [cache.k.data_ptr() for cache in scheduler._open[0].runner.caches]
    wanted = [alone(engine, one).canvas for one in sequences]
    assert [one.result(engine.spec, None).canvas for one in sequences] == wanted


def test_those_that_run_go_on_while_another_joins(engines):
    """A newcomer's first forward is a plan of its own, in a round in which all others step as well."""
    engine = engine_with(engines["llada-mha"], "padded")
    given = asked(random.Random(2), 3, engine.spec.mask_id, longest=24)
    sequences = sequences_of(
        engine, [(*one[:2], 0) for one in given], VANILLA.replace(block_length=8), POLICIES["region"]
    )
    scheduler = scheduler_of(engine, sequences, slots=3)
    scheduler.submit(sequences[0]), scheduler.submit(sequences[1])
    scheduler.step(), scheduler.step()
    scheduler.submit(sequences[2])
    assert {*scheduler.step()} == {*sequences} and [one.steps for one in sequences] == [3, 3, 1]
    scheduler.close()


def test_a_list_longer_than_the_memory_is_decoded_in_turn(engines, monkeypatch):
    engine = engine_with(engines["llada-mha"])
    prompts = [one[0][: one[1]] for one in asked(random.Random(3), 7, engine.spec.mask_id)]
    wanted = engine.generate(prompts, gen_length=16, cache="region")
    init, made = PersistentBatch.__init__, []

    def narrow(batch, model, key, slots, *given):
        if slots > 2:
            raise OutOfDeviceMemory(f"{slots} canvases are too many")
        made.append(slots)
        init(batch, model, key, slots, *given)

    monkeypatch.setattr(PersistentBatch, "__init__", narrow)
    frames = []
    mine = engine_with(engines["llada-mha"]).generate(prompts, gen_length=16, cache="region", on_step=frames.append)
    assert made == [1]  # half of half of seven
    assert_same(mine, wanted)
    assert [sum(frame.running) for frame in frames][:1] == [7] and not any(frames[-1].running)
    assert frames[0].tokens[6] == [*prompts[6], *[engine.spec.mask_id] * 16], "it has not begun"


# ------------------------------------------------------------------------------------------------------------ fairness


def test_slots_are_given_in_order_of_arrival(engines):
    engine, order = engine_with(engines["llada-mha"]), []
    sequences = sequences_of(engine, asked(random.Random(4), 8, engine.spec.mask_id))
    scheduler = scheduler_of(engine, sequences, slots=2, joined=order.append)
    for one in sequences:
        scheduler.submit(one)
    run_out(scheduler)
    assert order == sequences


def test_batches_step_in_rotation(engines):
    engine, rng = engine_with(engines["llada-mha"]), random.Random(5)
    kinds = [VANILLA, VANILLA.replace(temperature=0.5), VANILLA.replace(top_k=7)]
    sequences = [sequences_of(engine, asked(rng, 1, engine.spec.mask_id, 8), kind)[0] for kind in kinds]
    scheduler = scheduler_of(engine, slots=2, most=3)
    for one in sequences:
        scheduler.submit(one)
    stepped = [scheduler.step() for _ in range(9)]
    assert sorted(map(len, stepped)) == [1] * 9 and [one.steps for one in sequences] == [3, 3, 3]
    scheduler.close()


@pytest.mark.parametrize("most", [1, 2])
def test_no_kind_starves(engines, most):
    """Under a steady load of other batch keys, a sequence with a new one finishes after a bounded wait."""
    engine, rng = engine_with(engines["llada-mha"]), random.Random(6)
    crowd = [SlowFast(), SlowFast(k_max=7)][:most]
    scheduler = scheduler_of(engine, slots=2, most=most)

    def more() -> None:
        while scheduler.waiting < 3:
            for sampler in crowd:
                scheduler.submit(sequences_of(engine, asked(rng, 1, engine.spec.mask_id, 16), sampler)[0])

    for _ in range(10):
        more()
        scheduler.step()
    (rare,) = sequences_of(engine, asked(rng, 1, engine.spec.mask_id, 16), VANILLA)
    scheduler.submit(rare)
    longest = 16 * most  # steps of the sequences that are there, and then of its own beside another batch's
    for _ in range(3 * longest + 10):
        more()
        scheduler.step()
    assert rare.finished
    assert_same(rare.result(engine.spec, None), alone(engine, rare))
    keys = [sampler.blanked() for sampler in crowd]
    for _ in range(200):
        if any(batch.key.sampler in keys for batch in scheduler._open):
            break
        scheduler.step()
    else:
        raise AssertionError("the crowd never came back")
    scheduler.close()


def test_sequences_that_need_no_new_batch_continue_while_another_waits_for_one(engines):
    engine, rng = engine_with(engines["llada-mha"]), random.Random(7)
    scheduler = scheduler_of(engine, slots=2, most=2)
    one, two, three = VANILLA, VANILLA.replace(temperature=0.5), VANILLA.replace(top_k=7)
    first = sequences_of(engine, asked(rng, 2, engine.spec.mask_id, 24), one)
    (second,) = sequences_of(engine, asked(rng, 1, engine.spec.mask_id, 8), two)
    for one in (*first, second):
        scheduler.submit(one)
    scheduler.step(), scheduler.step()
    (late,) = sequences_of(engine, asked(rng, 1, engine.spec.mask_id, 8), three)
    scheduler.submit(late)
    scheduler.step()  # the batch with one sequence closes
    (other,) = sequences_of(engine, asked(rng, 1, engine.spec.mask_id, 8), two)
    scheduler.submit(other)
    while not late.finished:
        scheduler.step()
        assert other.steps == 0 or late.steps > 0, "it took the capacity that another waits for"
    run_out(scheduler)
    assert other.finished and all(one.finished for one in first)


# ----------------------------------------------------------------------------------------------------------- admission


def test_memory_bounds_slots_and_batches(engines):
    engine, rng = engine_with(engines["llada-mha"]), random.Random(8)
    given = [asked(rng, 5, engine.spec.mask_id, 8) for _ in range(2)]
    short, long = sequences_of(engine, given[0], cache="region"), given[1]
    bounds = bounds_around(short[0], engine.spec.max_length)
    each = engine.batches.bytes_needed(short[0].batch_key, 1, bounds)
    assert each > 2 * engine.spec.n_layers * engine.spec.kv_width * bounds.length * 4
    scheduler = scheduler_of(engine, slots=4, most=4, memory=int(3.5 * each))
    for one in short:
        scheduler.submit(one)
    scheduler.step()
    assert (scheduler.running, scheduler.waiting) == (2, 3), "four slots do not fit, two do"
    (other,) = sequences_of(engine, long[:1], SlowFast(k_max=7), "region")
    scheduler.submit(other)
    scheduler.step()
    assert scheduler.batches == 2 and scheduler.running == 3, "one more slot fits"
    run_out(scheduler)
    assert all(one.finished for one in (*short, other))


def test_idle_batches_are_kept_by_their_bytes(engines):
    """The longest unused are freed first; the newest is kept whatever it takes."""
    engine = engine_with(engines["llada-mha"], CudaGraphs(capture=stand_in))
    pool, lengths = engine.batches, (16, 64, 128, 192)
    for length in lengths:  # canvases of 64, 128, 192 and 256
        engine.generate([5, 6], gen_length=length, cache="region")
    each = [batch.bytes for batch in pool.spare]
    assert len(each) == 4 and each[1] == 2 * each[0] and each == sorted(each)
    kept = pool.spare[2:]
    pool._spare_bytes = each[2] + each[3]
    engine.generate([5, 6], gen_length=192, cache="region")
    assert pool.spare == kept, "the two longest unused are gone"
    engine.generate([5, 6], gen_length=128, cache="region")
    assert pool.spare == kept[::-1], "now the other is the longest unused"
    kept[0].runner.graph_bytes += 1  # graphs count
    engine.generate([5, 6], gen_length=128, cache="region")
    assert pool.spare == kept[:1]
    pool._spare_bytes = 0
    engine.generate([5, 6], gen_length=128, cache="region")
    assert pool.spare == kept[:1]
    engine.generate([5, 6], gen_length=16, cache="region")
    assert len(pool.spare) == 1 and pool.spare != kept[:1]


def test_idle_batches_make_room_for_one_that_finds_no_memory(engines, monkeypatch):
    engine, allocate = engine_with(engines["llada-mha"]), KVCache.__init__
    engine.generate([5, 6], gen_length=16, cache="region")

    def full(*given):
        if engine.batches.spare:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        allocate(*given)

    monkeypatch.setattr(KVCache, "__init__", full)
    done = engine.generate([5, 6], gen_length=32, cache="region")
    assert len(engine.batches.spare) == 1 and len(done.response) == 32


@pytest.mark.parametrize("count", [1, 3])
def test_idle_batches_make_room_for_a_step_that_finds_no_memory(engines, monkeypatch, caplog, count):
    """Its sequences restart, as many at a time as before."""
    engine, launch = engine_with(engines["llada-mha"]), ModelRunner.launch
    prompts = [[5, 6], [7, 8, 9], [4]][:count]
    wanted = engine.generate(prompts, gen_length=32)
    engine.generate([5, 6], gen_length=16, cache="region")

    def crowded(runner, plan):
        if engine.batches.spare and max(plan.steps.values()) == 2:
            raise torch.OutOfMemoryError("no room for activations")
        launch(runner, plan)

    monkeypatch.setattr(ModelRunner, "launch", crowded)
    assert_same(engine.generate(prompts, gen_length=32), wanted)
    assert len(engine.batches.spare) == 1 and engine.batches.spare[0].slots == count and not caplog.records


def test_fewer_slots_for_want_of_memory_are_for_a_while(engines, monkeypatch, caplog):
    """And for batches of that key and length alone."""
    engine, launch, room = engine_with(engines["llada-mha"]), ModelRunner.launch, [2]

    def crowded(runner, plan):
        if len(plan.steps) > room[0]:
            raise torch.OutOfMemoryError("no room for activations")
        launch(runner, plan)

    monkeypatch.setattr(ModelRunner, "launch", crowded)
    scheduler = scheduler_of(engine, slots=4, most=2)
    given = asked(random.Random(30), 4, engine.spec.mask_id, 8)

    def most(sampler: Sampler) -> int:
        """Run four sequences; return the most that ran together."""
        for one in sequences_of(engine, given, sampler):
            scheduler.submit(one)
        together = 0
        while scheduler.waiting + scheduler.running:
            scheduler.step()
            together = max(together, max((len(batch.sequences) for batch in scheduler._open), default=0))
        scheduler.step()
        return together

    assert most(VANILLA) == 2 and len(caplog.records) == 1
    room[0] = 4
    assert most(SlowFast()) == 4, "another batch key"
    found = []
    for _ in range(6):
        scheduler._reap(lambda batch: True)
        found.append(most(VANILLA))
    assert found[0] == 2 and found[-1] == 4, found
    assert scheduler.slots == 4 and len(caplog.records) == 1


def test_what_can_never_fit_is_refused_and_nothing_else(engines):
    engine, rng = engine_with(engines["llada-mha"]), random.Random(9)
    (one,) = sequences_of(engine, asked(rng, 1, engine.spec.mask_id), cache="region")
    scheduler = scheduler_of(engine, slots=4, memory=1000)
    scheduler.submit(one)
    with pytest.raises(OutOfDeviceMemory, match="1 canvases of 256 positions with cache='region'"):
        scheduler.step()
    assert scheduler.failed == [one] and scheduler.waiting == 0 and scheduler.step() == []


@pytest.mark.parametrize(
    ("length", "start", "policy", "bounds"),
    [
        (30, 6, "none", BatchBounds(256, 0, 256, 256, 256)),
        (257, 200, "region", BatchBounds(500, 0, 500, 500, 500)),
        (300, 200, "prefix", BatchBounds(500, 128, 500, 500, 500)),
        (300, 0, "refresh", BatchBounds(500, 0, 500, 500, 500)),
    ],
)
def test_bounds_of_a_batch_for_similar_sequences(engines, length, start, policy, bounds):
    canvas = [5] * start + [engines["llada-mha"].spec.mask_id] * (length - start)
    sampler = Threshold(block_length=4) if policy == "prefix" else SlowFast()
    (one,) = sequences_of(engines["llada-mha"], [(canvas, start, 0)], sampler, policy)
    assert bounds_around(one, 500) == bounds
    assert bounds.shortest_prompt <= one.start <= bounds.longest_prompt and len(one.canvas) <= bounds.length


def test_traced_sequences_share_a_batch_with_others(engines):
    """A batch publishes the data that one of its sequences needs; sequences that did not ask for it get no trace."""
    engine, rng = engine_with(engines["llada-mha"]), random.Random(16)
    given = asked(rng, 3, engine.spec.mask_id, 16)
    plain, other = sequences_of(engine, given[:2])
    (watched,) = sequences_of(engine, given[2:], trace=True, frames=True)
    assert watched.batch_key.serves(plain.batch_key) and not plain.batch_key.serves(watched.batch_key)
    scheduler = scheduler_of(engine, slots=3, most=2)
    for one in (watched, plain, other):
        scheduler.submit(one)
    scheduler.step()
    assert scheduler.batches == 1 and len(watched.trace) == 1 and plain.tokens is plain.canvas
    run_out(scheduler)
    assert_same(
        [one.result(engine.spec, None) for one in (watched, plain)], [alone(engine, r) for r in (watched, plain)]
    )


def test_a_longer_sequence_gets_a_longer_batch(engines):
    engine = engine_with(engines["llada-mha"])
    mask = engine.spec.mask_id
    short, long = [5] * 8 + [mask] * 8, [7] * 300 + [mask] * 8
    sequences = sequences_of(engine, [(short, 8, 1), (long, 300, 2), (short, 8, 3)])
    scheduler = scheduler_of(engine, slots=2, most=2)
    for one in sequences:
        scheduler.submit(one)
    scheduler.step()
    assert sorted(batch.length for batch in scheduler._open) == [256, 512]
    run_out(scheduler)
    assert_same(results(engine, sequences), [alone(engine, one) for one in sequences])


# ---------------------------------------------------------------------------------------- sequences that end otherwise


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_dropped_sequence_frees_its_slot(engines, execution):
    engine = engine_with(engines["llada-mha"], execution)
    sequences = sequences_of(engine, asked(random.Random(11), 4, engine.spec.mask_id), cache="region")
    scheduler = scheduler_of(engine, sequences, slots=2)
    for one in sequences:
        scheduler.submit(one)
    scheduler.step(), scheduler.step()
    scheduler.drop(sequences[0]), scheduler.drop(sequences[3]), scheduler.drop(sequences[0])
    assert sequences[3].finished and not sequences[3].running and scheduler.waiting == 1
    run_out(scheduler)
    assert sequences[0].finished and sequences[0].steps == 2 and sequences[3].steps == 0
    assert sequences[3].result(engine.spec, None).masks_left == sequences[3].masks
    assert_same(results(engine, sequences[1:3]), [alone(engine, one) for one in sequences[1:3]])


def test_a_faulty_sequence_leaves_its_slot_to_others(engines):
    model = Transformer(engines["llada-mha"].spec, engines["llada-mha"].model.weights)
    scatter = model.ops.scatter_choices

    def spoiled(state, *given, **named):
        scatter(state, *given, **named)
        if state.seed[0] == 100 and state.step[0] == 2:
            state.score[0] = torch.nan

    model.ops = replace(model.ops, scatter_choices=spoiled)
    engine = Engine(model)
    sequences = sequences_of(engine, asked(random.Random(12), 4, engine.spec.mask_id))
    scheduler = scheduler_of(engine, sequences, slots=2)
    for one in sequences:
        scheduler.submit(one)
    run_out(scheduler)
    assert [one.fault for one in sequences] == [3, 0, 0, 0]
    wanted = [alone(engines["llada-mha"], one) for one in sequences[1:]]
    assert_same(results(engine, sequences[1:]), wanted)


def test_a_list_with_a_faulty_sequence_still_gives_the_others(engines):
    model = Transformer(engines["llada-mha"].spec, engines["llada-mha"].model.weights)
    scatter = model.ops.scatter_choices

    def spoiled(state, *given, **named):
        scatter(state, *given, **named)
        state.score[1] = torch.nan

    model.ops = replace(model.ops, scatter_choices=spoiled)
    with pytest.raises(NumericalFault, match="sequence 1 at step 0") as caught:
        Engine(model).generate([[5, 6], [7, 8], [9, 10]], gen_length=8)
    assert sorted(caught.value.finished) == [0, 2]


def test_running_sequences_restart_if_the_execution_fails(engines):
    """Later sequences join the fall-back; none reports a step twice."""

    class Failing(Eager):
        def run(self, planner, runner):
            for number, output in enumerate(super().run(planner, runner)):
                if number == 5:
                    raise RuntimeError("CUDA error")
                yield output

    engine = engine_with(engines["llada-mha"], Failing(exact=True))
    sequences = sequences_of(engine, asked(random.Random(13), 5, engine.spec.mask_id), cache="region", trace=True)
    scheduler = scheduler_of(engine, sequences, slots=3)
    for one in sequences:
        scheduler.submit(one)
        scheduler.step()
    run_out(scheduler)
    assert engine.execution == "eager"
    assert_same(results(engine, sequences), [alone(engines["llada-mha"], one) for one in sequences])


def test_a_failed_batch_is_lost_with_its_sequences_and_no_other(engines, monkeypatch):
    engine, rng = engine_with(engines["llada-mha"]), random.Random(14)
    fine = sequences_of(engine, asked(rng, 2, engine.spec.mask_id))
    bad = sequences_of(engine, asked(rng, 2, engine.spec.mask_id), VANILLA)
    scheduler = scheduler_of(engine, slots=2, most=2)
    for one in (*fine, *bad):
        scheduler.submit(one)
    scheduler.step(), scheduler.step()
    run = ModelRunner.run

    def broken(runner, *given, **named):
        if isinstance(runner.sampler, FixedSteps):
            raise ZeroDivisionError("in this batch")
        run(runner, *given, **named)

    monkeypatch.setattr(ModelRunner, "run", broken)
    with pytest.raises(ZeroDivisionError):
        scheduler.step(), scheduler.step()
    assert set(scheduler.failed) == set(bad) and scheduler.running == 2
    run_out(scheduler)
    assert_same(results(engine, fine), [alone(engine, one) for one in fine])


def test_a_closed_batch_is_used_again(engines):
    engine = engine_with(engines["llada-mha"])
    given = asked(random.Random(15), 3, engine.spec.mask_id)
    for _ in range(2):
        sequences = sequences_of(engine, given, cache="region")
        scheduler = scheduler_of(engine, sequences, slots=2)
        for one in sequences:
            scheduler.submit(one)
        scheduler.step(), scheduler.step()
        scheduler.close()
    (batch,) = engine.batches.spare
    again = sequences_of(engine, given, cache="region")
    scheduler = scheduler_of(engine, again, slots=2)
    for one in again:
        scheduler.submit(one)
    scheduler.step()
    assert scheduler._open[0] is batch
    run_out(scheduler)
    assert_same(results(engine, again), [alone(engine, one) for one in again])


def test_status_of_a_sequence(engines):
    engine = engine_with(engines["llada-mha"])
    given = asked(random.Random(16), 3, engine.spec.mask_id)
    one, two, three = sequences_of(engine, given)
    empty = Sequence(one.params, [5, 6, 7], 3, engine.spec.mask_id)  # nothing to decide
    scheduler = scheduler_of(engine, [one, two, three], slots=2)
    for each in (one, two, three):
        scheduler.submit(each)
    assert {each.status for each in (one, two, three)} == {Status.WAITING}
    scheduler.step()
    assert [each.status for each in (one, two, three)] == [Status.RUNNING, Status.RUNNING, Status.WAITING]
    scheduler.drop(one)
    assert one.status is Status.DROPPED and not one.running and not one.finished
    run_out(scheduler)
    assert {each.status for each in (one, two, three)} == {Status.FINISHED}
    scheduler.submit(empty)
    assert scheduler.step() == [] and empty.finished and empty.result(engine.spec, None).nfe == 0


def test_only_the_scheduler_writes_a_status():
    writers = [path.name for path in (ROOT / "sfs_triton").rglob("*.py") if ".status = " in path.read_text()]
    initial = (ROOT / "sfs_triton" / "scheduling" / "sequence.py").read_text().count(".status = ")
    assert sorted(writers) == ["scheduler.py", "sequence.py"] and initial == 1


def test_a_sequence_that_cannot_join_is_evicted_and_frees_its_slot(engines, monkeypatch):
    engine = engine_with(engines["llada-mha"])
    bad, fine = sequences_of(engine, asked(random.Random(18), 2, engine.spec.mask_id))
    scheduler = scheduler_of(engine, [bad, fine], slots=1)
    scheduler.submit(bad), scheduler.submit(fine)
    put = ModelRunner.put

    def failing(runner, slot, canvas, *given, **named):
        if canvas is bad.canvas:
            raise RuntimeError("no pinned memory")
        return put(runner, slot, canvas, *given, **named)

    monkeypatch.setattr(ModelRunner, "put", failing)
    with pytest.raises(RuntimeError, match="pinned"):
        scheduler.step()
    assert scheduler.failed == [bad] and bad.status is Status.FAILED and scheduler.running == 0
    scheduler.drop(bad)
    run_out(scheduler)
    assert fine.finished and scheduler.failed == []
    assert_same(fine.result(engine.spec, None), alone(engines["llada-mha"], fine))


def test_closing_returns_every_batch_even_if_one_raises(engines, monkeypatch):
    engine, rng = engine_with(engines["llada-mha"]), random.Random(19)
    sequences = [
        sequences_of(engine, asked(rng, 1, engine.spec.mask_id), sampler)[0] for sampler in (SlowFast(), VANILLA)
    ]
    scheduler = scheduler_of(engine, slots=1, most=2)
    for one in sequences:
        scheduler.submit(one)
    scheduler.step(), scheduler.step()
    given = []

    def give(batch):
        given.append(batch)
        raise RuntimeError(f"batch {len(given)}")

    monkeypatch.setattr(engine.batches, "give", give)
    with pytest.raises(RuntimeError, match="batch"):
        scheduler.close()
    assert len(given) == 2 and scheduler.batches == 0
    assert {one.status for one in sequences} == {Status.DROPPED}
    scheduler.drop(sequences[0])


def test_the_schedule_of_a_sampler_counts_as_memory(engines):
    engine = engines["llada-mha"]
    given = asked(random.Random(20), 1, engine.spec.mask_id)
    plain, random_ = (sequences_of(engine, given, FixedSteps(metric=m))[0] for m in ("confidence", "origin"))
    bounds = bounds_around(plain, 512)
    small, large = (engine.batches.bytes_needed(one.batch_key, 1, bounds) for one in (plain, random_))
    assert large >= small + 4 * bounds.length**2
