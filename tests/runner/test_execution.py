"""All executions give the same tokens, number of steps and trace, whatever else runs before, beside and after."""

from __future__ import annotations

import time
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import sfs_triton
from sfs_triton import ArgumentError, Engine, FixedSteps, LoopTimeout, RefreshCache, Threshold
from sfs_triton.decoding.step_plan import StepOutput, StepPlan
from sfs_triton.models import Transformer
from sfs_triton.runner import CudaGraphs, Eager
from sfs_triton.runner.host_ring import HostRing
from tests.support.combinations import (
    EVERY_PAIR,
    EXECUTIONS,
    POLICIES,
    PROMPTS,
    RAGGED,
    SAMPLERS,
    SOME_PAIRS,
    Roomy,
    assert_same,
    engine_with,
    few_of,
    some_of_every,
    stand_in,
)

OTHERS = {"padded": EXECUTIONS["padded"], "graphs": lambda: CudaGraphs(ahead=2, capture=stand_in)}

# Both kinds of models, those whose logits are shifted and those whose are not, meet each sampler and each policy.
SHARED = some_of_every(
    [
        pytest.param("llada-mha" if number % 2 else "dream-gqa", *pair.values, id=pair.id)
        for number, pair in enumerate(EVERY_PAIR)
    ]
)
OPTIONS = {
    "drawn": {"cfg_scale": 0.5, "temperature": 0.7},
    "filtered": {"temperature": 0.8, "top_p": 0.9, "top_k": 20},
}


def _ending(engine: Engine, **options) -> Engine:
    """The engine, but its end of text is the token that it commits first."""
    row = engine_with(engine).generate(**options)[0]
    first = min(range(row.prompt_length, len(row.canvas)), key=lambda place: (row.commit_step[place], place))
    spec = replace(engine.spec, eos_id=row.canvas[first])
    return Engine(Transformer(spec, engine.model.weights))


def _assert_executions_agree(engine, executions=OTHERS, call="generate", **options):
    wanted = getattr(engine_with(engine, "exact"), call)(trace=True, **options)
    for execution in executions.values():
        assert_same(getattr(engine_with(engine, execution()), call)(trace=True, **options), wanted)
    return wanted


@pytest.mark.parametrize(("model", "sampler", "policy"), SHARED)
def test_executions_agree(engines, model, sampler, policy):
    _assert_executions_agree(engines[model], **RAGGED, sampler=sampler, cache=policy)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("sampler", "policy", "option"), few_of(SOME_PAIRS, OPTIONS))
def test_executions_agree_on_options(engines, sampler, policy, option):
    engine = engines["dream-gqa" if len(option) % 2 else "llada-mha"]
    sampler = sampler.replace(**OPTIONS[option])
    _assert_executions_agree(engine, {"graphs": EXECUTIONS["graphs"]}, **RAGGED, sampler=sampler, cache=policy)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("sampler", "policy"), SOME_PAIRS)
def test_executions_agree_on_early_stops(engines, sampler, policy):
    options = {**RAGGED, "cache": policy}
    engine = _ending(engines["dream-gqa"], sampler=sampler, **options)
    done = _assert_executions_agree(
        engine, {"graphs": EXECUTIONS["graphs"]}, sampler=sampler.replace(eos_stop=True), **options
    )
    assert any(commit < 0 for row in done for commit in row.commit_step[row.prompt_length :]), "nothing was cut off"


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("sampler", "policy", "model"), few_of(SOME_PAIRS, ["llada-mha", "dream-gqa"]))
def test_executions_agree_on_infilling(engines, model, sampler, policy):
    mask = engines[model].spec.mask_id
    listed = (
        policy.name == "region" and engines[model].spec.shifted
    )  # such a model predicts a position from the one before it
    canvases = [
        PROMPTS[0] + [mask] * 12 + [7, 8] + [mask] * 5 + PROMPTS[1],
        [4 if listed else mask, 5, 6, mask, mask, *PROMPTS[2], mask],
        [*PROMPTS[1], mask],
    ]
    _assert_executions_agree(engines[model], OTHERS, "infill", canvases=canvases, sampler=sampler, cache=policy)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("ratio", [0.25, 1.0])
@pytest.mark.parametrize("name", ["paper", "threshold", "origin"])
@pytest.mark.parametrize("model", ["llada-mha", "dream-gqa"])
def test_executions_agree_on_partial_refreshes(engines, monkeypatch, model, name, ratio):
    """Loops agree once rounding no longer decides which of the unchanged positions are refreshed."""

    def likeness(a, b, dim):
        close = cosine_similarity(a.double(), b.double(), dim=dim)
        return (close * 1e3).round() + torch.arange(close.shape[-1]) * 1e-6

    cosine_similarity = F.cosine_similarity
    monkeypatch.setattr(F, "cosine_similarity", likeness)
    _assert_executions_agree(
        engines[model],
        {"padded": EXECUTIONS["padded"]},
        **RAGGED,
        sampler=SAMPLERS[name],
        cache=RefreshCache(7, 4, ratio),
    )


# ------------------------------------------------------------------------------------- sessions that are used again


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("sampler", "policy", "execution"),
    few_of(
        [*SOME_PAIRS, pytest.param(SAMPLERS["origin"], POLICIES["refresh"], id="origin-refresh")], ["exact", "graphs"]
    ),
)
def test_a_used_session_gives_what_a_new_one_gives(engines, sampler, policy, execution):
    """Two requests with one batch key, whose prompts, seeds and prompt lengths differ."""
    sampler = sampler.replace(cfg_scale=0.3)
    same = {"sampler": sampler, "cache": policy, "gen_length": [24, 8, 32], "trace": True}
    first = {"prompts": [[7] * 11, PROMPTS[2], PROMPTS[0][:3]], "seed": 11}
    second = {"prompts": [PROMPTS[0], PROMPTS[1], PROMPTS[2]], "seed": [5, 6, 7]}
    used = engine_with(engines["llada-mha"], Roomy(EXECUTIONS[execution](), 64))
    used.generate(**first, **same)
    (session,) = used.batches.spare
    again = used.generate(**second, **same)
    assert used.batches.spare == [session], "the second request had another session"
    assert_same(again, engine_with(engines["llada-mha"], "exact").generate(**second, **same))


def test_requests_of_another_kind_have_other_sessions(engines):
    engine = engine_with(engines["llada-mha"])
    options = {"prompts": PROMPTS[0], "gen_length": 16}
    kinds = [
        {},
        {"sampler": Threshold(block_length=8)},
        {"cache": "refresh"},
        {"cache": RefreshCache(2, 2)},
        {"trace": True},
        {"on_step": lambda frame: None},
        {"gen_length": 8},
        {"prompts": [PROMPTS[0]] * 2},
        {"sampler": FixedSteps(steps=4)},
    ]
    seen = []
    for changed in kinds:
        engine.generate(**{**options, **changed})
        seen.append(engine.batches.spare[-1])
    assert len({id(session) for session in seen}) == len(kinds)


@pytest.mark.parametrize(("sampler", "policy", "execution"), few_of(SOME_PAIRS, EXECUTIONS))
def test_spare_length_does_not_matter(engines, sampler, policy, execution):
    options = {**RAGGED, "sampler": sampler, "cache": policy, "trace": True}
    wanted = engine_with(engines["dream-gqa"], "exact").generate(**options)
    assert_same(engine_with(engines["dream-gqa"], Roomy(EXECUTIONS[execution](), 37)).generate(**options), wanted)


def test_replays_have_canvases_of_round_lengths():
    graphs = CudaGraphs(capture=stand_in)
    assert [graphs.canvas_length(n, 512) for n in (1, 64, 65, 500, 512)] == [64, 64, 128, 512, 512]
    assert [graphs.canvas_length(n, 4096) for n in (513, 1024, 1025, 2047, 2049, 4000)] == [
        *(576, 1024, 1152, 2048, 2304, 4096)
    ]
    assert len({graphs.canvas_length(n, 1 << 17) for n in range(1, 1 << 17)}) == 16 + 8 * 7
    assert [graphs.canvas_length(n, 100) for n in (65, 99, 100)] == [100, 100, 100]


# ------------------------------------------------------------------------------------------------- plans and outputs


class Recorded:
    """An execution that keeps a copy of every plan and output."""

    def __init__(self, execution):
        self._execution, self.plans, self.outputs = execution, [], []

    def __getattr__(self, name: str):
        return getattr(self._execution, name)

    def run(self, planner, runner):
        launch, collect = runner.launch, runner.collect

        def kept(plan: StepPlan) -> None:
            self.plans.append(plan)
            launch(plan)

        def copied(plan: StepPlan, limit: float) -> StepOutput:
            output = collect(plan, limit)
            published = {name: page.copy() for name, page in output.published.items()}
            self.outputs.append(replace(output, published=published))
            return output

        runner.launch, runner.collect = kept, copied
        yield from self._execution.run(planner, runner)

    def taken(self) -> list[tuple[dict, dict]]:
        """Steps and progress of each plan, without the sequences that had ended before it and without surplus plans."""
        ended, found = set(), []
        for plan, output in zip(self.plans, self.outputs, strict=False):  # a surplus plan at the end is not collected
            left = {slot: step for slot, step in plan.steps.items() if slot not in ended}
            ended |= {slot for slot in left if output.progress[slot].done}
            if left:
                found.append((left, {slot: output.progress[slot] for slot in left}))
        return found


def _recorded(engine, execution, **options) -> Recorded:
    recorded = Recorded(execution)
    engine_with(engine, recorded).generate(**options)
    return recorded


@pytest.mark.parametrize(("sampler", "policy", "ahead"), few_of(SOME_PAIRS, [0, 1, 2]))
def test_plans_do_not_depend_on_the_execution(engines, sampler, policy, ahead):
    """Plans and outputs of padded eager steps and of replayed graphs are equal, one by one."""
    options = {**RAGGED, "sampler": sampler, "cache": policy, "trace": True}
    length = {"canvas_length": lambda longest, most: 64}
    padded, graphs = Eager(exact=False), CudaGraphs(ahead=ahead, capture=stand_in)
    vars(padded).update(length), vars(graphs).update(length)
    eager, replayed = (_recorded(engines["dream-gqa"], execution, **options) for execution in (padded, graphs))
    assert len(eager.plans) == len(eager.outputs) > 4
    assert eager.taken() == replayed.taken()
    if not ahead:  # plans made ahead hold sequences that may have ended
        assert eager.plans == replayed.plans
        for one, other in zip(eager.outputs, replayed.outputs, strict=True):
            assert one.progress == other.progress and one.completes_round == other.completes_round
            for name, page in one.published.items():
                assert page.tobytes() == other.published[name].tobytes(), name


def test_a_plan_is_what_the_runner_does(engines):
    """A recorded list of plans, launched on a fresh runner without a planner, gives the same outputs."""
    options = {**RAGGED, "cache": "region", "sampler": SAMPLERS["paper"]}
    recorded = _recorded(engines["llada-mha"], Eager(exact=False), **options)

    class Replayed(Recorded):
        def run(self, planner, runner):
            for plan in recorded.plans:
                runner.launch(plan)
                output = runner.collect(plan, 60.0)
                self.outputs.append(output.progress)
                yield output, planner.update(output)

    again = Replayed(Eager(exact=False))
    engine_with(engines["llada-mha"], again).generate(**options)
    assert again.outputs == [output.progress for output in recorded.outputs]


# ----------------------------------------------------------------------------------------------------------- replays


class Counting:
    """Makes replays that are counted, and steps that are captured."""

    def __init__(self):
        self.captured, self.replayed = [], 0

    def __call__(self, runner, shape):
        self.captured.append(shape)
        run = stand_in(runner, shape)

        def replay():
            self.replayed += 1
            run()

        return replay


@pytest.mark.parametrize(
    ("policy", "ahead"), [*(("region", ahead) for ahead in range(4)), ("none", 0), ("refresh", 2), ("prefix", 3)]
)
def test_replays_are_queued_ahead_and_no_further(engines, policy, ahead):
    sampler = SAMPLERS["threshold" if policy == "prefix" else "paper"]
    options = {**RAGGED, "sampler": sampler, "cache": POLICIES[policy], "trace": True}
    wanted = engine_with(engines["llada-mha"]).generate(**options)
    count = Counting()
    engine = engine_with(engines["llada-mha"], CudaGraphs(ahead=ahead, capture=count))
    assert_same(engine.generate(**options), wanted)
    steps, surplus = max(row.nfe for row in wanted), 0
    while surplus < ahead and POLICIES[policy].lists(steps + surplus):  # nothing but short lists is queued
        surplus += 1
    assert surplus or policy != "region" or not ahead
    # the first step of each shape is launched one operation at a time, and then captured
    assert len(set(count.captured)) == len(count.captured) > 0
    assert count.replayed == steps + surplus - len(count.captured)
    shapes, sizes = {"none": 1, "refresh": 4, "region": 2, "prefix": 1}, 3  # for one, two and all three canvases
    assert len(count.captured) <= shapes[policy] * sizes
    assert_same(engine.generate(**options), wanted)
    assert len(set(count.captured)) == len(count.captured), "captured again"


def test_outputs_are_not_overwritten_before_they_are_read(engines):
    """An execution that queues more steps ahead than the host ring holds would read a later output."""
    with pytest.raises(ArgumentError, match="ahead=4"):
        engine_with(engines["llada-mha"], CudaGraphs(ahead=4, capture=stand_in)).generate(PROMPTS[0], gen_length=8)


def test_a_shape_is_captured_once_a_session(engines):
    count = Counting()
    engine = engine_with(engines["llada-mha"], CudaGraphs(capture=count))
    for prompt in PROMPTS:
        engine.generate(prompt, gen_length=16, sampler=Threshold(block_length=8), cache="dual")
    assert len(count.captured) == 2


def test_tables_live_as_long_as_what_was_captured_with_them(golden):
    """A generation inside another may need larger ones."""
    base = sfs_triton.load(golden / "models" / "llada-mha", "cpu", "float32")
    wanted, inner = base.generate(PROMPTS[0], gen_length=16), base.generate(PROMPTS[0], gen_length=300)
    fresh = sfs_triton.load(golden / "models" / "llada-mha", "cpu", "float32")
    captured = []

    def capture(runner, shape):
        model = runner.model
        captured.extend(weakref.ref(table) for table in (model._cos, model._sin, model._position))
        return stand_in(runner, shape)

    engine = engine_with(fresh, CudaGraphs(capture=capture))
    results, alive = [], []

    def on_step(frame):
        if frame.step == 1:
            results.append(fresh.generate(PROMPTS[0], gen_length=300))
            alive.extend(table() is not None for table in captured)

    done = engine.generate(PROMPTS[0], gen_length=16, on_step=on_step)
    assert done.canvas == wanted.canvas and results[0].canvas == inner.canvas
    assert alive and all(alive), "a replay would read memory that is somebody else's by now"


# ------------------------------------------------------------------------------------------------ a device that hangs


@pytest.mark.parametrize(
    "execution",
    [
        lambda: Eager(exact=True, step_limit=0.3),
        lambda: Eager(exact=False, step_limit=0.3),
        lambda: CudaGraphs(step_limit=0.3, capture=stand_in),
    ],
    ids=["exact", "padded", "graphs"],
)
@pytest.mark.parametrize("after", [1, 5])
def test_output_that_does_not_come(engines, monkeypatch, execution, after):
    """A missing step output ends the generation within the limit of a step, and leaves the engine as it was."""
    engine = engine_with(engines["llada-mha"], execution())
    publish, published = HostRing.publish, 0

    def lose(ring):
        nonlocal published
        published += 1
        if published <= after:
            publish(ring)

    monkeypatch.setattr(HostRing, "publish", lose)
    began = time.monotonic()
    with pytest.raises(LoopTimeout, match=r"step \d+ within 0\.3 s"):
        engine.generate(PROMPTS[0], gen_length=16)
    assert time.monotonic() - began < 2 * 0.3
    monkeypatch.undo()
    wanted = engine_with(engines["llada-mha"]).generate(PROMPTS[0], gen_length=16)
    for _ in range(2):
        assert_same(engine.generate(PROMPTS[0], gen_length=16), wanted)
