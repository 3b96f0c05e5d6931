"""Sequences join and leave while others run: each gets its solo result, nothing is recaptured, none starves."""

from __future__ import annotations

import random
from dataclasses import fields, replace

import pytest
import torch

from sfs_triton import Engine, FixedSteps, NumericalFault, OutOfDeviceMemory, Sampler, SlowFast, Threshold
from sfs_triton.decoding.params import parse_cache
from sfs_triton.decoding.samplers import SamplingValues
from sfs_triton.kernels.control import SAMPLING
from sfs_triton.models import Transformer
from sfs_triton.runner import EagerLoop, ReplayLoop, Step
from sfs_triton.scheduling.lane import Lane
from sfs_triton.scheduling.request import Request
from sfs_triton.scheduling.scheduler import Room, Scheduler, room_around, room_for
from sfs_triton.scheduling.sequence import Row
from tests.support.combinations import LOOPS, POLICIES, SAMPLERS, SOME_PAIRS, assert_same, engine_with, stand_in
from tests.support.oracle import compare, reference

VANILLA = FixedSteps()
TEMPERED = FixedSteps(steps=8, metric="topk_margin", temperature=0.7, top_p=0.8)


def asked(rng: random.Random, number: int, mask_id: int, longest: int = 24) -> list[tuple[list[int], int, int]]:
    """Canvases with their starts and seeds; response lengths are multiples of 8."""
    rows = []
    for index in range(number):
        prompt = [rng.randrange(3, 120) for _ in range(rng.randrange(3, 20))]
        rows.append((prompt + [mask_id] * rng.randrange(8, longest + 1, 8), len(prompt), 100 + index))
    return rows


def rows_of(engine: Engine, given, sampler=None, policy="none", trace=False, frames=False) -> list[Row]:
    canvases, starts, seeds = (list(part) for part in zip(*given, strict=True))
    request = Request(canvases, starts, sampler or SlowFast(), parse_cache(policy), seeds, trace, frames)
    return Row.of(request, engine.spec.mask_id)


def alone(engine: Engine, row: Row):
    """Return the result of the sequence decoded alone."""
    kind = row.kind
    request = Request([row.canvas], [row.start], row.sampler, kind.policy, [row.seed], kind.trace)
    with engine_with(engine)._run(request) as run:
        assert list(iter(run.advance, None))
        return run.results()[0]


def scheduler_of(engine: Engine, rows: list[Row] | None = None, **limits) -> Scheduler:
    room = room_for(rows) if rows else None
    return Scheduler(engine.lanes, lambda row: room or room_around(row, engine.spec.max_length), **limits)


def run_out(scheduler: Scheduler, most: int = 10_000) -> int:
    """Step until nothing is left; how many rounds it took."""
    for taken in range(most):
        if not scheduler.waiting + scheduler.running:
            return taken
        scheduler.step()
    raise AssertionError("it does not end")


# ------------------------------------------------------------------------------------------------------ sharing a batch


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(("sampler", "policy"), SOME_PAIRS)
@pytest.mark.parametrize("model", ["llada-mha", "dream-gqa"])
def test_rows_that_join_later_get_what_they_get_alone(engines, model, sampler, policy, loop):
    rng = random.Random(f"{model}{sampler}{loop}")
    engine = engine_with(engines[model], loop)
    rows = rows_of(engine, asked(rng, 5, engine.spec.mask_id), sampler, policy, trace=True)
    scheduler = scheduler_of(engine, rows, slots=3)
    together = 0
    scheduler.submit(rows[0])
    for row in rows[1:]:
        scheduler.submit(row)
        for _ in range(rng.randrange(4)):
            together = max(together, len(scheduler.step()))
    run_out(scheduler)
    assert together > 1 and all(row.over for row in rows)
    assert_same([row.result(engine.spec, None) for row in rows], [alone(engines[model], row) for row in rows])


@pytest.mark.parametrize("name", ["origin", "entropy", "dream-reference"])
@pytest.mark.parametrize("loop", ["tight", "replay"])
def test_noise_and_schedules_are_a_rows_own(engines, name, loop):
    rng = random.Random(5)
    engine = engine_with(engines["dream-gqa"], loop)
    sampler = SAMPLERS[name].replace(temperature=0.8, cfg_scale=0.3)
    rows = rows_of(engine, asked(rng, 5, engine.spec.mask_id), sampler)
    scheduler = scheduler_of(engine, rows, slots=2)
    for row in rows:
        scheduler.submit(row)
        scheduler.step()
    run_out(scheduler)
    assert_same([row.result(engine.spec, None) for row in rows], [alone(engine, row) for row in rows])


OWN: dict[str, tuple[Sampler, list[dict]]] = {  # parameters in which sequences of a batch may differ
    "slowfast": (SlowFast(), [{"tau_min": 0.4, "tau_high": 0.5}, {"tau_slow": 0.6, "name": "my"}, {"tau_high": 0.99}]),
    "shared": (SlowFast.preset("fast"), [{"tau_high": 0.3}, {"tau_slow": None}, {"tau_min": 0.0, "tau_high": 0.0}]),
    "threshold": (Threshold(block_length=8), [{"tau": 0.2}, {"tau": 1.0}, {"tau": 0.0}]),
    "fixed": (FixedSteps(steps=8), [{"steps": 3}, {"steps": None}, {"steps": 1, "eps": 0.5}]),
    "drawn": (SlowFast(temperature=0.8), [{"temperature": 0.3}, {"temperature": 2.0}, {"temperature": 1e-6}]),
    "nucleus": (Threshold(block_length=8, temperature=1.0, top_p=0.9), [{"top_p": 0.4}, {"temperature": 3.0}]),
    "tempered": (TEMPERED, [{"temperature": 1.5}, {"top_p": 0.3}]),
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", OWN)
def test_rows_of_other_settings_share_a_lane(engines, name, loop):
    sampler, changes = OWN[name]
    rng = random.Random(name)
    engine = engine_with(engines["dream-gqa"], loop)
    samplers = [sampler, *(sampler.replace(**change) for change in changes)]
    rows = [rows_of(engine, asked(rng, 1, engine.spec.mask_id), each, trace=True)[0] for each in samplers * 2]
    scheduler = scheduler_of(engine, rows, slots=3, most=1)
    together = 0
    for row in rows:
        scheduler.submit(row)
        together = max(together, len(scheduler.step()))
    run_out(scheduler)
    assert together == 3
    found = [row.result(engine.spec, None) for row in rows]
    assert_same(found, [alone(engines["dream-gqa"], row) for row in rows])
    for row, mine in zip(rows, found, strict=True):
        assert compare(mine, reference(engine, row.canvas, row.start, row.sampler, row.seed)) is None, row.sampler


APART: dict[str, tuple[Sampler, list[dict]]] = {
    "slowfast": (
        SlowFast(),
        [
            *({"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 5}, {"cfg_scale": 0.5}, {"eos_stop": True}),
            *({"k_max": 4}, {"window": 3}, {"spread": "std"}, {"spread_limit": 2.0}, {"inclusive": True}),
            *({"strict": False}, {"slow_end": "fixed"}, {"rounding": "even"}, {"zero_history": True}),
            *({"min_parallel": 2}, {"min_parallel_slow": 2}, {"block_length": 8}, {"max_cycles": 3}),
            *({"share_stable": True}, {"eos_horizon": False}),
        ],
    ),
    "threshold": (Threshold(), [{"block_length": 8}, {"steps": 4}]),
    "fixed": (FixedSteps(steps=8), [{"block_length": 8}, {"metric": "entropy"}]),
    "entropy": (FixedSteps(steps=8, metric="entropy"), [{"steps": 4}, {"eps": 0.1}]),
}


def test_every_other_setting_keeps_rows_apart():
    for sampler, changes in APART.values():
        for change in changes:
            assert sampler.replace(**change).form() != sampler.form(), change
    for sampler, changes in OWN.values():
        for change in changes:
            assert sampler.replace(**change).form() == sampler.form(), change
    told = {name for sampler, changes in (*OWN.values(), *APART.values()) for change in changes for name in change}
    assert told == {field.name for kind in (SlowFast, Threshold, FixedSteps) for field in fields(kind)}
    assert SamplingValues._fields == SAMPLING
    assert Threshold(top_p=1.0).form() == Threshold().form(), "it leaves nothing out"


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_is_captured_while_rows_come_and_go(engines, policy):
    captured = []

    def capture(step, shape):
        captured.append(shape)
        return stand_in(step, shape)

    engine = engine_with(engines["llada-gqa"], ReplayLoop(capture=capture))
    sampler = Threshold(block_length=8)
    rows = rows_of(engine, asked(random.Random(1), 9, engine.spec.mask_id), sampler, POLICIES[policy])
    scheduler = scheduler_of(engine, rows, slots=4)
    for row in rows[:2]:
        scheduler.submit(row)
    scheduler.step()
    before = len(captured)
    addresses = [cache.k.data_ptr() for cache in scheduler._open[0].lane.step.caches]
    for row in rows[2:]:
        scheduler.submit(row)
        scheduler.step()
    run_out(scheduler)
    assert before == len(captured) == len(set(captured)) > 0
    assert addresses == [cache.k.data_ptr() for cache in scheduler._open[0].lane.step.caches]
    wanted = [alone(engine, row).canvas for row in rows]
    assert [row.result(engine.spec, None).canvas for row in rows] == wanted


def test_those_that_run_go_on_while_another_joins(engines):
    """A newcomer's first forward is a plan of its own, in a round in which all others step as well."""
    engine = engine_with(engines["llada-mha"], "fixed")
    given = asked(random.Random(2), 3, engine.spec.mask_id, longest=24)
    rows = rows_of(engine, [(*row[:2], 0) for row in given], VANILLA.replace(block_length=8), POLICIES["region"])
    scheduler = scheduler_of(engine, rows, slots=3)
    scheduler.submit(rows[0]), scheduler.submit(rows[1])
    scheduler.step(), scheduler.step()
    scheduler.submit(rows[2])
    assert {*scheduler.step()} == {*rows} and [row.steps for row in rows] == [3, 3, 1]
    scheduler.close()


def test_a_list_longer_than_the_memory_is_decoded_in_turn(engines, monkeypatch):
    engine = engine_with(engines["llada-mha"])
    prompts = [row[0][: row[1]] for row in asked(random.Random(3), 7, engine.spec.mask_id)]
    wanted = engine.generate(prompts, gen_length=16, cache="region")
    init, made = Lane.__init__, []

    def narrow(lane, model, kind, slots, *given):
        if slots > 2:
            raise OutOfDeviceMemory(f"{slots} canvases are too many")
        made.append(slots)
        init(lane, model, kind, slots, *given)

    monkeypatch.setattr(Lane, "__init__", narrow)
    frames = []
    mine = engine_with(engines["llada-mha"]).generate(prompts, gen_length=16, cache="region", on_step=frames.append)
    assert made == [1]  # half of half of seven
    assert_same(mine, wanted)
    assert [sum(frame.running) for frame in frames][:1] == [7] and not any(frames[-1].running)
    assert frames[0].tokens[6] == [*prompts[6], *[engine.spec.mask_id] * 16], "it has not begun"


# ------------------------------------------------------------------------------------------------------------ fairness


def test_rows_of_a_kind_get_slots_in_order(engines):
    engine, order = engine_with(engines["llada-mha"]), []
    rows = rows_of(engine, asked(random.Random(4), 8, engine.spec.mask_id))
    scheduler = scheduler_of(engine, rows, slots=2, joined=order.append)
    for row in rows:
        scheduler.submit(row)
    run_out(scheduler)
    assert order == rows


def test_lanes_take_turns(engines):
    engine, rng = engine_with(engines["llada-mha"]), random.Random(5)
    kinds = [VANILLA, VANILLA.replace(temperature=0.5), VANILLA.replace(top_k=7)]
    rows = [rows_of(engine, asked(rng, 1, engine.spec.mask_id, 8), kind)[0] for kind in kinds]
    scheduler = scheduler_of(engine, slots=2, most=3)
    for row in rows:
        scheduler.submit(row)
    stepped = [scheduler.step() for _ in range(9)]
    assert sorted(map(len, stepped)) == [1] * 9 and [row.steps for row in rows] == [3, 3, 3]
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
                scheduler.submit(rows_of(engine, asked(rng, 1, engine.spec.mask_id, 16), sampler)[0])

    for _ in range(10):
        more()
        scheduler.step()
    (rare,) = rows_of(engine, asked(rng, 1, engine.spec.mask_id, 16), VANILLA)
    scheduler.submit(rare)
    longest = 16 * most  # steps of the rows that are there, and then of its own beside another lane's
    for _ in range(3 * longest + 10):
        more()
        scheduler.step()
    assert rare.over
    assert_same(rare.result(engine.spec, None), alone(engine, rare))
    forms = [sampler.form() for sampler in crowd]
    for _ in range(200):
        if any(each.lane.kind.sampler in forms for each in scheduler._open):
            break
        scheduler.step()
    else:
        raise AssertionError("the crowd never came back")
    scheduler.close()


def test_what_needs_no_new_lane_goes_on_while_another_waits_for_one(engines):
    engine, rng = engine_with(engines["llada-mha"]), random.Random(7)
    scheduler = scheduler_of(engine, slots=2, most=2)
    one, two, three = VANILLA, VANILLA.replace(temperature=0.5), VANILLA.replace(top_k=7)
    first = rows_of(engine, asked(rng, 2, engine.spec.mask_id, 24), one)
    (second,) = rows_of(engine, asked(rng, 1, engine.spec.mask_id, 8), two)
    for row in (*first, second):
        scheduler.submit(row)
    scheduler.step(), scheduler.step()
    (late,) = rows_of(engine, asked(rng, 1, engine.spec.mask_id, 8), three)
    scheduler.submit(late)
    scheduler.step()  # the batch with one sequence closes
    (other,) = rows_of(engine, asked(rng, 1, engine.spec.mask_id, 8), two)
    scheduler.submit(other)
    while not late.over:
        scheduler.step()
        assert other.steps == 0 or late.steps > 0, "it took the lane that another waits for"
    run_out(scheduler)
    assert other.over and all(row.over for row in first)


# ----------------------------------------------------------------------------------------------------------- admission


def test_memory_bounds_slots_and_lanes(engines):
    engine, rng = engine_with(engines["llada-mha"]), random.Random(8)
    short, long = (rows_of(engine, asked(rng, 5, engine.spec.mask_id, 8), policy="region") for _ in range(2))
    room = room_around(short[0], engine.spec.max_length)
    each = engine.lanes.bytes_needed(short[0].kind, 1, room)
    assert each > 2 * engine.spec.n_layers * engine.spec.kv_width * room.length * 4
    scheduler = scheduler_of(engine, slots=4, most=4, memory=int(3.5 * each))
    for row in short:
        scheduler.submit(row)
    scheduler.step()
    assert (scheduler.running, scheduler.waiting) == (2, 3), "four slots do not fit, two do"
    other = [replace_kind(engine, row, SlowFast(k_max=7)) for row in long]
    scheduler.submit(other[0])
    scheduler.step()
    assert scheduler.lanes == 2 and scheduler.running == 3, "there was room for one more slot"
    run_out(scheduler)
    assert all(row.over for row in (*short, other[0]))


def replace_kind(engine: Engine, row: Row, sampler) -> Row:
    kind = row.kind._replace(sampler=sampler.form())
    return Row(kind, sampler, row.canvas, row.start, row.seed, engine.spec.mask_id)


def test_what_can_never_fit_is_refused_and_nothing_else(engines):
    engine, rng = engine_with(engines["llada-mha"]), random.Random(9)
    (row,) = rows_of(engine, asked(rng, 1, engine.spec.mask_id), policy="region")
    scheduler = scheduler_of(engine, slots=4, memory=1000)
    scheduler.submit(row)
    with pytest.raises(OutOfDeviceMemory, match="1 canvases of 256 positions with cache='region'"):
        scheduler.step()
    assert scheduler.fallen == [row] and scheduler.waiting == 0 and scheduler.step() == []


@pytest.mark.parametrize(
    ("length", "start", "policy", "room"),
    [
        (30, 6, "none", Room(256, (0, 256), 256, 256)),
        (257, 200, "region", Room(500, (0, 500), 500, 500)),
        (300, 200, "prefix", Room(500, (128, 500), 500, 500)),
        (300, 0, "refresh", Room(500, (0, 500), 500, 500)),
    ],
)
def test_lanes_are_made_for_rows_alike(engines, length, start, policy, room):
    canvas = [5] * start + [engines["llada-mha"].spec.mask_id] * (length - start)
    sampler = Threshold(block_length=8) if policy == "prefix" else SlowFast()
    (row,) = rows_of(engines["llada-mha"], [(canvas, start, 0)], sampler, policy)
    assert room_around(row, 500) == room and room.holds(row)


def test_rows_that_are_watched_share_a_lane_with_others(engines):
    """A batch publishes the data that one of its sequences needs; sequences that did not ask for it get no trace."""
    engine, rng = engine_with(engines["llada-mha"]), random.Random(16)
    given = asked(rng, 3, engine.spec.mask_id, 16)
    plain, other = rows_of(engine, given[:2])
    (watched,) = rows_of(engine, given[2:], trace=True, frames=True)
    assert watched.kind.serves(plain.kind) and not plain.kind.serves(watched.kind)
    scheduler = scheduler_of(engine, slots=3, most=2)
    for row in (watched, plain, other):
        scheduler.submit(row)
    scheduler.step()
    assert scheduler.lanes == 1 and len(watched.tracer.steps) == 1 and plain.tokens is plain.canvas
    run_out(scheduler)
    assert_same(
        [row.result(engine.spec, None) for row in (watched, plain)], [alone(engine, r) for r in (watched, plain)]
    )


def test_a_longer_row_gets_a_longer_lane(engines):
    engine = engine_with(engines["llada-mha"])
    mask = engine.spec.mask_id
    short, long = [5] * 8 + [mask] * 8, [7] * 300 + [mask] * 8
    rows = rows_of(engine, [(short, 8, 1), (long, 300, 2), (short, 8, 3)])
    scheduler = scheduler_of(engine, slots=2, most=2)
    for row in rows:
        scheduler.submit(row)
    scheduler.step()
    assert sorted(each.lane.length for each in scheduler._open) == [256, 512]
    run_out(scheduler)
    assert_same([row.result(engine.spec, None) for row in rows], [alone(engine, row) for row in rows])


# ---------------------------------------------------------------------------------------------- rows that end otherwise


@pytest.mark.parametrize("loop", LOOPS)
def test_a_dropped_row_makes_room(engines, loop):
    engine = engine_with(engines["llada-mha"], loop)
    rows = rows_of(engine, asked(random.Random(11), 4, engine.spec.mask_id), policy="region")
    scheduler = scheduler_of(engine, rows, slots=2)
    for row in rows:
        scheduler.submit(row)
    scheduler.step(), scheduler.step()
    scheduler.drop(rows[0]), scheduler.drop(rows[3]), scheduler.drop(rows[0])
    assert rows[3].over and not rows[3].running and scheduler.waiting == 1
    run_out(scheduler)
    assert rows[0].over and rows[0].steps == 2 and rows[3].steps == 0
    assert rows[3].result(engine.spec, None).masks_left == rows[3].masks
    assert_same([row.result(engine.spec, None) for row in rows[1:3]], [alone(engine, row) for row in rows[1:3]])


def test_a_row_that_breaks_leaves_its_slot_to_others(engines):
    model = Transformer(engines["llada-mha"].spec, engines["llada-mha"].model.weights)
    scatter = model.ops.scatter_choices

    def spoiled(state, *given, **named):
        scatter(state, *given, **named)
        if state.seed[0] == 100 and state.step[0] == 2:
            state.score[0] = torch.nan

    model.ops = replace(model.ops, scatter_choices=spoiled)
    engine = Engine(model)
    rows = rows_of(engine, asked(random.Random(12), 4, engine.spec.mask_id))
    scheduler = scheduler_of(engine, rows, slots=2)
    for row in rows:
        scheduler.submit(row)
    run_out(scheduler)
    assert [row.fault for row in rows] == [3, 0, 0, 0]
    wanted = [alone(engines["llada-mha"], row) for row in rows[1:]]
    assert_same([row.result(engine.spec, None) for row in rows[1:]], wanted)


def test_a_list_with_a_broken_row_still_gives_the_others(engines):
    model = Transformer(engines["llada-mha"].spec, engines["llada-mha"].model.weights)
    scatter = model.ops.scatter_choices

    def spoiled(state, *given, **named):
        scatter(state, *given, **named)
        state.score[1] = torch.nan

    model.ops = replace(model.ops, scatter_choices=spoiled)
    with pytest.raises(NumericalFault, match="row 1 at step 0") as caught:
        Engine(model).generate([[5, 6], [7, 8], [9, 10]], gen_length=8)
    assert sorted(caught.value.finished) == [0, 2]


def test_rows_that_ran_begin_again_where_a_loop_fails(engines):
    """Later sequences join the fallback loop; none reports a step twice."""

    class Failing(EagerLoop):
        def run(self, step):
            for number, report in enumerate(super().run(step)):
                if number == 5:
                    raise RuntimeError("CUDA error")
                yield report

    engine = engine_with(engines["llada-mha"], Failing(tight=True))
    rows = rows_of(engine, asked(random.Random(13), 5, engine.spec.mask_id), policy="region", trace=True)
    scheduler = scheduler_of(engine, rows, slots=3)
    for row in rows:
        scheduler.submit(row)
        scheduler.step()
    run_out(scheduler)
    assert engine.loop == "eager"
    assert_same([row.result(engine.spec, None) for row in rows], [alone(engines["llada-mha"], row) for row in rows])


def test_a_lane_that_fails_is_lost_with_its_rows_and_no_other(engines, monkeypatch):
    engine, rng = engine_with(engines["llada-mha"]), random.Random(14)
    fine = rows_of(engine, asked(rng, 2, engine.spec.mask_id))
    bad = rows_of(engine, asked(rng, 2, engine.spec.mask_id), VANILLA)
    scheduler = scheduler_of(engine, slots=2, most=2)
    for row in (*fine, *bad):
        scheduler.submit(row)
    scheduler.step(), scheduler.step()
    run = Step.run

    def broken(step, *given, **named):
        if isinstance(step.sampler, FixedSteps):
            raise ZeroDivisionError("in this lane")
        run(step, *given, **named)

    monkeypatch.setattr(Step, "run", broken)
    with pytest.raises(ZeroDivisionError):
        scheduler.step(), scheduler.step()
    assert set(scheduler.fallen) == set(bad) and scheduler.running == 2
    run_out(scheduler)
    assert_same([row.result(engine.spec, None) for row in fine], [alone(engine, row) for row in fine])


def test_what_is_closed_is_used_again(engines):
    engine = engine_with(engines["llada-mha"])
    given = asked(random.Random(15), 3, engine.spec.mask_id)
    for _ in range(2):
        rows = rows_of(engine, given, policy="region")
        scheduler = scheduler_of(engine, rows, slots=2)
        for row in rows:
            scheduler.submit(row)
        scheduler.step(), scheduler.step()
        scheduler.close()
    (lane,) = engine.lanes.spare
    again = rows_of(engine, given, policy="region")
    scheduler = scheduler_of(engine, again, slots=2)
    for row in again:
        scheduler.submit(row)
    scheduler.step()
    assert scheduler._open[0].lane is lane
    run_out(scheduler)
    assert_same([row.result(engine.spec, None) for row in again], [alone(engine, row) for row in again])
