"""Generations under way: streamed, in another thread, one inside another, stopped midway; and long canvases."""

from __future__ import annotations

import gc
import threading
import time
from collections import deque
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from sfs_triton import (
    ArgumentError,
    Engine,
    FixedSteps,
    Frame,
    NumericalFault,
    OutOfDeviceMemory,
    RefreshCache,
    RegionCache,
    SlowFast,
    StepCapExceeded,
    Threshold,
)
from sfs_triton.models import Transformer
from sfs_triton.models.cache import KVCache
from sfs_triton.runner import Eager
from tests.support.combinations import (
    EXECUTIONS,
    PROMPTS,
    RAGGED,
    SAMPLERS,
    SOME_PAIRS,
    Roomy,
    assert_same,
    engine_with,
    pairwise,
)

ONE = {"prompts": PROMPTS[0], "gen_length": 16}


@pytest.fixture
def engine(engines) -> Engine:
    return engine_with(engines["llada-mha"])


# ------------------------------------------------------------------------------------------------------------ streams


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("sampler", "policy", "execution"), pairwise(SOME_PAIRS, EXECUTIONS))
def test_frames_show_each_step(engines, sampler, policy, execution):
    options = {**RAGGED, "sampler": sampler, "cache": policy}
    stream = engine_with(engines["dream-gqa"], Roomy(EXECUTIONS[execution](), 5)).stream(**options)
    frames: list[Frame] = list(stream)
    done = stream.result()
    assert_same(done, engine_with(engines["dream-gqa"]).generate(**options))
    assert [frame.step for frame in frames] == list(range(max(result.nfe for result in done)))
    for index, result in enumerate(done):
        end = len(result.canvas)
        committed = [place for frame in frames for place in frame.committed[index]]
        assert sorted(committed) == list(range(result.prompt_length, end)), "not each position once"
        settled = [frame.settled[index] for frame in frames]
        assert settled == sorted(settled) and settled[-1] == end
        assert frames[-1].tokens[index] == result.canvas and frames[-1].commit_step[index] == result.commit_step
        before = PROMPTS[index] + [engines["dream-gqa"].spec.mask_id] * (end - result.prompt_length)
        for frame in frames:
            assert all(result.commit_step[place] == frame.step for place in frame.committed[index])
            changed = [p for p in range(end) if frame.tokens[index][p] != before[p]]
            assert set(changed) <= set(frame.committed[index])
            assert all(frame.commit_step[index][p] >= 0 for p in range(result.prompt_length, frame.settled[index]))
            before = frame.tokens[index]
        assert [frame.running[index] for frame in frames] == [step < result.nfe - 1 for step in range(len(frames))]


def test_settled_moves_right_past_an_early_stop(engines):
    plain = engine_with(engines["llada-mha"]).generate(**ONE, sampler=FixedSteps())
    first = min(range(10, 26), key=lambda place: plain.commit_step[place])
    shared = engines["llada-mha"]
    ending = Engine(Transformer(replace(shared.spec, eos_id=plain.canvas[first]), shared.model.weights))
    stream = ending.stream(**ONE, sampler=FixedSteps(eos_stop=True))
    settled = [frame.settled[0] for frame in stream]
    assert settled == sorted(settled) and settled[-1] == 26
    assert set(stream.result().canvas[first:]) == {plain.canvas[first]}


def test_a_stream_starts_with_its_first_frame(engine, monkeypatch):
    taken, take = [], engine.batches.take
    monkeypatch.setattr(engine.batches, "take", lambda *given: taken.append(take(*given)) or taken[-1])
    stream = engine.stream(**ONE)
    assert not taken
    with pytest.raises(ArgumentError, match="gen_length=0"):
        engine.stream(PROMPTS[0], gen_length=0)
    next(stream)
    assert len(taken) == 1


@pytest.mark.parametrize("taken", [0, 1, 3, 1000])
def test_the_result_of_a_stream(engine, taken):
    """after some frames, or all, or none, is that of a call; it can be had again, and from a list is a list."""
    wanted = engine.generate(**ONE)
    stream = engine.stream(**ONE)
    for _ in zip(range(taken), stream, strict=False):
        pass
    assert_same(stream.result(), wanted)
    assert_same(stream.result(), wanted)
    assert list(stream) == []
    several = engine.stream([PROMPTS[0]], gen_length=16).result()
    assert isinstance(several, list)
    assert_same(several[0], wanted)


def test_a_stream_that_ended_gives_its_result_when_it_is_closed(engine):
    wanted = engine.generate(**ONE)
    with engine.stream(**ONE) as stream:
        for _ in stream:
            pass
    assert_same(stream.result(), wanted)


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_a_closed_stream_has_no_result(engine, taken):
    stream = engine.stream(**ONE)
    for _ in range(taken):
        next(stream)
    stream.close()
    stream.close()
    assert list(stream) == []
    with pytest.raises(RuntimeError, match="closed before its end"):
        stream.result()


def _leave_stream(engine, options):
    stream = engine.stream(**options)
    next(stream), next(stream)
    stream.close()


def _drop_stream(engine, options):
    stream = engine.stream(**options)
    next(stream), next(stream)
    del stream
    gc.collect()
    assert engine.batches.spare == [], "the device was used as it was collected"
    engine.generate(PROMPTS[1], gen_length=8)
    engine.batches.spare.pop()


def _break_out(engine, options):
    with pytest.raises(ZeroDivisionError), engine.stream(**options) as stream:
        for frame in stream:
            1 / (2 - frame.step)


def _raise_in_on_step(engine, options):
    def on_step(frame):
        if frame.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(**options, on_step=on_step)


def _cancel(engine, options):
    pending = []
    started = threading.Event()

    def on_step(frame):
        started.wait(10)
        pending[0].cancel()

    pending.append(engine.generate_async(**options, on_step=on_step))
    started.set()
    with pytest.raises(CancelledError):
        pending[0].result(10)
    assert pending[0].done()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("stop", [_leave_stream, _drop_stream, _break_out, _raise_in_on_step, _cancel])
@pytest.mark.parametrize(
    ("name", "policy", "execution"),
    [("paper", "region", "graphs"), ("threshold", "prefix", "graphs"), ("paper", "none", "exact")],
)
def test_a_run_stopped_midway_leaves_the_engine_usable(engines, name, policy, execution, stop):
    options = {**RAGGED, "sampler": SAMPLERS[name], "cache": policy}
    wanted = engine_with(engines["llada-mha"]).generate(**options)
    engine = engine_with(engines["llada-mha"], execution)
    stop(engine, options)
    (batch,) = engine.batches.spare
    assert_same(engine.generate(**options, on_step=lambda frame: None), wanted)
    assert engine.batches.spare == [batch], "the batch that was stopped is not used again"


def test_a_stream_that_is_collected_uses_neither_lock_nor_device(engine):
    """Collection may come in any thread, and where a lock is held already. What it leaves ends at the next use."""
    first, second = (engine.stream(prompt, gen_length=16, cache="region") for prompt in PROMPTS[:2])
    next(first), next(second)
    with engine.batches._lock:
        del first
        thread = threading.Thread(target=lambda streams: streams.clear(), args=([second],))
        del second
        thread.start()
        thread.join(10)
        assert not thread.is_alive()
    assert engine.batches.spare == []
    wanted = engine.generate(PROMPTS[2], gen_length=16, cache="region")
    assert len(engine.batches.spare) == 3
    assert_same(engine.generate(PROMPTS[2], gen_length=16, cache="region"), wanted)


def test_another_thread_may_end_the_last_dropped_stream_first(engine, monkeypatch):
    class Emptied(deque):
        def __bool__(self) -> bool:
            return True

    monkeypatch.setattr(engine, "_abandoned", Emptied())
    assert engine.generate(PROMPTS[0], gen_length=8).nfe


# ---- streams that fail


def test_a_stream_whose_sequence_has_a_fault(engines):
    model = Transformer(engines["llada-mha"].spec, engines["llada-mha"].model.weights)
    scatter = model.ops.scatter_choices

    def spoiled(state, *given, **named):
        scatter(state, *given, **named)
        if state.step[0] == 2:
            state.score[0] = torch.nan

    model.ops = replace(model.ops, scatter_choices=spoiled)
    wanted = engine_with(engines["llada-mha"]).generate(PROMPTS[:2], gen_length=16)
    stream = Engine(model).stream(PROMPTS[:2], gen_length=16)
    assert len(list(stream)) == wanted[1].nfe
    for _ in range(2):
        with pytest.raises(NumericalFault, match="sequence 0 at step 2") as caught:
            stream.result()
        assert_same(caught.value.finished[1], wanted[1])


def test_a_stream_that_failed_has_no_result(engine):
    """A part of a result is none."""

    class Broken(Eager):
        def run(self, planner, runner):
            for number, output in enumerate(super().run(planner, runner)):
                if number == 3:
                    raise RuntimeError("CUDA error: unspecified launch failure")
                yield output

    engine._execution.current = engine._execution._eager = Broken(exact=True)
    stream = engine.stream(**ONE)
    with pytest.raises(RuntimeError, match="launch failure"):
        for _ in stream:
            pass
    assert list(stream) == []
    with pytest.raises(RuntimeError, match="launch failure"):
        stream.result()


def test_a_stream_without_memory(engine, monkeypatch):
    def full(*given):
        raise torch.OutOfMemoryError("full")

    stream = engine.stream(**ONE, sampler=Threshold(block_length=8), cache="prefix")
    monkeypatch.setattr(KVCache, "__init__", full)
    for _ in range(2):
        with pytest.raises(OutOfDeviceMemory):
            stream.result()
    monkeypatch.undo()
    engine.generate(**ONE)


# ---- sequences that are dropped


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("sampler", "policy", "execution"), pairwise(SOME_PAIRS, EXECUTIONS))
def test_a_dropped_sequence_takes_no_further_step_and_changes_no_other(engines, sampler, policy, execution):
    options = {**RAGGED, "sampler": sampler, "cache": policy}
    wanted = engine_with(engines["llada-mha"]).generate(**options)
    stream = engine_with(engines["llada-mha"], execution).stream(**options)
    next(stream)
    left = next(stream)
    stream.drop(1)
    for frame in stream:
        assert frame.committed[1] == [] and not frame.running[1]
    done = stream.result()
    assert_same([done[0], done[2]], [wanted[0], wanted[2]])
    queued = 1 if execution == "graphs" and policy.name == "region" else 0
    steps = min(2 + queued, wanted[1].nfe)
    assert min(2, steps) == len(done[1].forward_lengths) <= done[1].nfe <= steps
    kept = [at if at < done[1].nfe else -1 for at in wanted[1].commit_step]
    assert done[1].commit_step == kept and (done[1].canvas == left.tokens[1] or done[1].nfe > 2)
    mask = engines["llada-mha"].spec.mask_id
    assert done[1].masks_left == done[1].canvas.count(mask)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_stream_whose_sequences_are_all_dropped_ends(engines, execution):
    engine = engine_with(engines["llada-mha"], execution)
    wanted = engine_with(engines["llada-mha"]).generate(**RAGGED)
    stream = engine.stream(**RAGGED)
    next(stream)
    for index in (0, 1, 2, 1):
        stream.drop(index)
    assert list(stream) == []
    assert [result.nfe for result in stream.result()] == [1, 1, 1]
    assert_same(engine.stream(**RAGGED).result(), wanted)


def test_sequences_are_dropped_between_the_first_frame_and_the_end(engine):
    stream = engine.stream(**RAGGED)
    with pytest.raises(RuntimeError, match="between the first frame"):
        stream.drop(0)
    next(stream)
    for index in (-1, 3):
        with pytest.raises(ArgumentError, match=f"index={index} is not an integer from 0 to 2"):
            stream.drop(index)
    stream.result()
    with pytest.raises(RuntimeError, match="between the first frame"):
        stream.drop(0)


@pytest.mark.parametrize("policy", ["none", "region"])
def test_a_dropped_sequence_stays_dropped_after_a_fall_back(engines, policy):
    """An execution that fails is followed by one that repeats the steps it had done."""

    class Fragile(Eager):
        def run(self, planner, runner):
            for number, output in enumerate(super().run(planner, runner)):
                if number == 4:
                    raise RuntimeError("CUDA error")
                yield output

    engine = engine_with(engines["llada-mha"], Fragile(exact=True))
    options = {**RAGGED, "cache": policy}
    wanted = engine_with(engines["llada-mha"]).generate(**options)
    stream = engine.stream(**options)
    next(stream), next(stream)
    stream.drop(0)
    rest = list(stream)
    assert not rest[-1].running[0] and not any(frame.running[0] for frame in rest)
    assert_same(stream.result()[1:], wanted[1:])


def test_traces_that_were_taken_are_not_kept(engine):
    sequences, _ = engine.sequences(**RAGGED, trace=True, frames=True)
    wanted = engine.generate(**RAGGED, trace=True)
    with engine._run(sequences) as run:
        taken = [[sequence.take_trace() for sequence in sequences] for _ in run.frames()]
        assert [sequence.take_trace() for sequence in sequences] == [None] * 3
        done = run.results()
    for index, result in enumerate(wanted):
        mine = [step for steps in taken if (step := steps[index]) is not None]
        assert done[index].trace == []
        assert [replace(s, confidence=[]) for s in mine] == [replace(s, confidence=[]) for s in result.trace]


# -------------------------------------------------------------------------------------------------- in another thread


def test_pending_generations_end_in_order(engine):
    lengths, ended = [8, 24, 16], []
    wanted = [engine.generate(PROMPTS[0], gen_length=n) for n in lengths]

    def on_step(length):
        return lambda frame: ended.append(length) if not any(frame.running) else None

    pending = [engine.generate_async(PROMPTS[0], gen_length=n, on_step=on_step(n)) for n in lengths]
    assert_same([p.result(30) for p in pending], wanted)
    assert ended == lengths and all(p.done() for p in pending)


def test_a_queued_generation_is_cancelled_before_it_starts(engine):
    held, started, frames = threading.Event(), threading.Event(), []

    def hold(frame):
        started.set()
        held.wait(20)

    first = engine.generate_async(**ONE, on_step=hold)
    second = engine.generate_async(**ONE, on_step=frames.append)
    third = engine.generate_async(**ONE)
    started.wait(20)
    second.cancel()
    assert second.done() and not first.done()
    with pytest.raises(CancelledError):
        second.result(0)
    with pytest.raises(TimeoutError):
        first.result(0.01)
    held.set()
    wanted = engine_with(engine).generate(**ONE)
    assert_same([first.result(30), third.result(30)], [wanted, wanted])
    assert frames == []


def test_cancelling_what_is_done_changes_nothing(engine):
    pending = engine.generate_async(**ONE)
    wanted = pending.result(30)
    pending.cancel()
    assert_same(pending.result(0), wanted)


def test_bad_arguments_are_named_at_once(engine):
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'foo'"):
        engine.generate_async([1, 2], foo=1)
    pending = engine.generate_async([1, 2], gen_length=4)
    for timeout in ("a", True):
        with pytest.raises(ArgumentError, match=f"timeout={timeout!r}"):
            pending.result(timeout)
    late = engine.generate_async([1, 2], gen_length=200, sampler=FixedSteps())
    with pytest.raises(TimeoutError, match="not finished after 0.001 s"):
        late.result(0.001)
    late.cancel()
    assert len(pending.result(60).response) == 4


def test_pending_generations_raise_what_calls_raise(engine, monkeypatch):
    with pytest.raises(ArgumentError, match="gen_length=0"):
        engine.generate_async(PROMPTS[0], gen_length=0)
    for sampler, cache, named in (
        (SlowFast(), "prefix", "works by block"),
        (SlowFast.preset("dream-reference"), RegionCache(look_ahead=4), "look_ahead=4"),
        (FixedSteps(block_length=8), RegionCache(capacity=16), "below 8"),
    ):
        with pytest.raises(ArgumentError, match=named):
            engine.generate_async(**ONE, sampler=sampler, cache=cache)
    monkeypatch.setattr(SlowFast, "step_cap", lambda self, n: 2)
    with pytest.raises(StepCapExceeded, match="sequence 0 at step 2"):
        engine.generate_async(**ONE).result(30)


def test_a_handle_comes_at_once(engine, monkeypatch):
    """Before anything of the generation has been done but the checks."""
    held, run = threading.Event(), engine._run

    def slow(sequences):
        held.wait(20)
        return run(sequences)

    monkeypatch.setattr(engine, "_run", slow)
    began = time.monotonic()
    pending = engine.generate_async(**ONE)
    assert time.monotonic() - began < 2 and not pending.done()
    held.set()
    assert pending.result(30).nfe > 0


# ------------------------------------------------------------------------------------ beside and inside one another


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_generation_inside_another(engines, execution):
    outer = {**RAGGED, "sampler": SAMPLERS["threshold"], "cache": "prefix"}
    same, other = outer, {"prompts": PROMPTS[1], "gen_length": 24, "sampler": SAMPLERS["paper"], "cache": "region"}
    wanted = [engine_with(engines["llada-gqa"]).generate(**options) for options in (outer, same, other)]
    engine, inner = engine_with(engines["llada-gqa"], execution), {}

    def on_step(frame):
        if frame.step in (1, 2):
            inner[frame.step] = engine.generate(**(same, other)[frame.step - 1])

    assert_same(engine.generate(**outer, on_step=on_step), wanted[0])
    assert_same(inner[1], wanted[1])
    assert_same(inner[2], wanted[2])
    assert len(engine.batches.spare) == 3


def test_streams_side_by_side(engine):
    wanted = [engine.generate(prompt, gen_length=16) for prompt in PROMPTS]
    streams = [engine.stream(prompt, gen_length=16) for prompt in PROMPTS]
    for _ in range(3):
        for stream in streams:
            next(stream)
    assert_same([stream.result() for stream in streams], wanted)


@pytest.mark.parametrize("execution", ["exact", "graphs"])
def test_generations_in_two_threads(engines, execution):
    kinds = [("paper", "none"), ("threshold", "dual"), ("origin", "refresh"), ("paper", "region")]
    options = [
        {**RAGGED, "sampler": SAMPLERS[s], "cache": RefreshCache(3, 2, 0.0) if p == "refresh" else p} for s, p in kinds
    ]
    wanted = [engine_with(engines["llada-mha"]).generate(**each) for each in options]
    model = Transformer(engines["llada-mha"].spec, engines["llada-mha"].model.weights)  # whose tables are yet to grow
    engine, done, failed = engine_with(Engine(model), execution), {}, []

    def work(name, order):
        try:
            done[name] = {index: engine.generate(**options[index]) for index in order}
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(n, order)) for n, order in enumerate(([0, 1, 2, 3], [3, 2, 0, 1]))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failed
    for mine in done.values():
        for index, results in mine.items():
            assert_same(results, wanted[index])


@contextmanager
def _wide_floats():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "settings",
    [torch.inference_mode, torch.no_grad, lambda: torch.device("meta"), _wide_floats],
    ids=["inference_mode", "no_grad", "default-device", "default-dtype"],
)
@pytest.mark.parametrize(("name", "policy"), [("origin", "none"), ("paper", "region"), ("threshold", "dual")])
def test_what_the_caller_has_set_does_not_matter(engine, settings, name, policy):
    """The caller's settings affect neither the generation nor the next one in its batch."""
    options = {**RAGGED, "sampler": SAMPLERS[name], "cache": policy}
    wanted = engine_with(engine, "padded").generate(**options)
    engine = engine_with(engine, "padded")
    with settings():
        done = engine.generate(**options)
    assert_same(done, wanted)
    assert_same(engine.generate(**options), wanted)


# ------------------------------------------------------------------------------------------------------ long canvases


@pytest.mark.parametrize("execution", ["exact", "padded"])
@pytest.mark.parametrize(
    ("sampler", "cache", "length"),
    [
        pytest.param(FixedSteps(steps=2), "none", 4000, id="fixed-none"),
        pytest.param(FixedSteps(steps=2, block_length=16), "prefix", 16, id="fixed-prefix"),
        pytest.param(SlowFast(), RegionCache(capacity=64), 16, id="paper-region"),
        pytest.param(Threshold(block_length=4, tau=0.5), RefreshCache(4, 4, 0.0), 4, id="threshold-refresh"),
    ],
)
def test_a_canvas_of_4096(engines, sampler, cache, length, execution):
    shared = engines["llada-mha"]
    engine = engine_with(Engine(Transformer(replace(shared.spec, max_length=4096), shared.model.weights)), execution)
    prompt = torch.randint(0, 400, (4096 - length,), generator=torch.Generator().manual_seed(0)).tolist()
    done = engine.generate(prompt, gen_length=length, sampler=sampler, cache=cache)
    assert len(done.canvas) == 4096 and done.masks_left == 0 and done.canvas[: len(prompt)] == prompt
    assert shared.spec.mask_id not in done.response
    with pytest.raises(ArgumentError, match="= 4097 positions, the model allows 4096"):
        engine.generate([1, *prompt], gen_length=length, sampler=sampler, cache=cache)


def test_a_pending_generation_cannot_wait_for_another(engine):
    errors = []

    def on_step(frame):
        if frame.step == 0:
            try:
                engine.generate_async(PROMPTS[0], gen_length=8).result()
            except RuntimeError as error:
                errors.append(str(error))

    engine.generate_async(PROMPTS[0], gen_length=8, on_step=on_step).result(60)
    assert len(errors) == 1 and "one after another" in errors[0]


@pytest.mark.parametrize("cache", ["none", "region", "refresh"])
def test_autocast_of_the_caller_does_not_matter(engine, cache):
    wanted = engine.generate(PROMPTS[0], gen_length=16, cache=cache)
    with torch.autocast("cpu", torch.bfloat16):
        done = engine.generate(PROMPTS[0], gen_length=16, cache=cache)
    assert done.canvas == wanted.canvas


def test_a_stream_that_two_threads_share_gives_each_frame_once(engine):
    stream = engine.stream(PROMPTS[0], gen_length=24, sampler=FixedSteps())
    seen, errors = [], []

    def read():
        try:
            seen.extend(frame.step for frame in stream)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors and sorted(seen) == list(range(24))
    assert stream.result().nfe == 24


def test_an_on_step_that_cannot_be_called_is_refused_at_once(engine):
    for generate in (engine.generate, engine.generate_async):
        with pytest.raises(ArgumentError, match="on_step=5 cannot be called"):
            generate(PROMPTS[0], gen_length=8, on_step=5)
