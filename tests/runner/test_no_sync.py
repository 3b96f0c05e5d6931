"""The host never waits for the device within a generation: no step depends on a value that the host would read."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sfs_triton
from bench.common.testing import no_host_reads
from sfs_triton import WINO, Engine, FixedSteps, NoCache, RefreshCache, Sampler, SlowFast, Threshold
from sfs_triton.decoding.caching import CachePolicy
from sfs_triton.decoding.params import BatchKey
from sfs_triton.decoding.step_plan import Forward, Positions
from sfs_triton.models import Transformer
from sfs_triton.runner import CudaGraphs, Execution, ModelRunner
from sfs_triton.runner.cuda_graph import capture_graph
from sfs_triton.runner.host_ring import HostRing
from sfs_triton.scheduling.planner import StepPlanner
from sfs_triton.scheduling.scheduler import bounds_of
from tests.support.combinations import (
    EVERY_PAIR,
    POLICIES,
    PROMPTS,
    assert_same,
    engine_with,
    few_of,
    pairwise,
    some_of_every,
)

# ---------------------------------------------------------------------------------------------------- the watch itself

X = torch.arange(12.0).view(4, 3)
MASK, AT, META = X > 5, torch.tensor([0, 1]), torch.empty(3, device="meta")
READS = {
    "item": lambda: X[0, 0].item(),
    "bool": lambda: bool(X[0, 0] > 0),
    "if": lambda: 1 if MASK.any() else 0,
    "int": lambda: int(X[0, 0]),
    "float": lambda: float(X[0, 0]),
    "index": lambda: PROMPTS[AT[1]],
    "range": lambda: range(AT[1]),
    "slice": lambda: X[: AT[1]],
    "one-index": lambda: X[AT[1]],
    "size": lambda: torch.arange(AT[1]),
    "tolist": lambda: X.tolist(),
    "numpy": lambda: X.numpy(),
    "array": lambda: numpy.asarray(X),
    "contains": lambda: 3.0 in X,
    "format": lambda: f"{X[0, 0]:.1f}",
    "nonzero": lambda: X.nonzero(),
    "argwhere": lambda: torch.argwhere(MASK),
    "where": lambda: torch.where(MASK),
    "equal": lambda: torch.equal(X, X),
    "allclose": lambda: torch.allclose(X, X),
    "is_nonzero": lambda: X[0, 0].is_nonzero(),
    "masked_select": lambda: X.masked_select(MASK),
    "mask-index": lambda: X[MASK],
    "mask-row-index": lambda: X[MASK[:, 0]],
    "mask-assign": lambda: X.clone().__setitem__(MASK, 0.0),
    "mask-assign-tensor": lambda: X.clone().__setitem__(MASK[:, 0], X[:2]),
    "byte-index": lambda: X[MASK.byte()],
    "unique": lambda: X.unique(),
    "unique-rows": lambda: X.unique(dim=0),
    "unique-consecutive": lambda: X.unique_consecutive(),
    "bincount": lambda: torch.bincount(AT),
    "repeat_interleave": lambda: torch.repeat_interleave(AT, AT),
    "one_hot": lambda: torch.nn.functional.one_hot(AT),
    "narrow": lambda: X.narrow(0, AT[0], 1),
    "index_fill": lambda: X.index_fill(0, AT, X[0, 0]),
    "cpu": lambda: X.cpu(),
    "to-host": lambda: META.to("cpu"),
    "to-host-and-dtype": lambda: META.to("cpu", torch.float64),
    "copy-to-host": lambda: X[0].copy_(META),
    "synchronize": lambda: torch.cuda.synchronize(),
    "event": lambda: torch.cuda.Event.synchronize(None),
    "stream": lambda: torch.cuda.Stream.synchronize(None),
}
FINE = {
    "from-host": lambda: torch.tensor([1, 2], device="meta"),
    "from-host-here": lambda: torch.tensor([1, 2]),
    "index": lambda: X[AT],
    "index-pair": lambda: X[AT[:, None], AT],
    "assign": lambda: X.clone().__setitem__((AT, AT), X[0, :2]),
    "where": lambda: torch.where(MASK, X, 0),
    "masked_fill": lambda: X.masked_fill(MASK, 0),
    "cast": lambda: X.to(torch.float64),
    "move": lambda: X.to("meta"),
    "copy": lambda: X.clone().copy_(X),
    "linear": lambda: torch.nn.functional.linear(X, X),
    "attention": lambda: torch.nn.functional.scaled_dot_product_attention(*(X.view(1, 1, 4, 3),) * 3),
    "repeat_interleave": lambda: torch.repeat_interleave(AT, AT, output_size=1),
    "sort": lambda: X.sort(),
    "length": lambda: (len(X), X.shape, [row.shape for row in X]),
}


@pytest.mark.parametrize("inference", [False, True], ids=["", "inference"])
@pytest.mark.parametrize("read", READS)
def test_the_watch_sees(read, inference):
    with torch.inference_mode(inference), no_host_reads(), pytest.raises(AssertionError, match="host"):
        READS[read]()


@pytest.mark.parametrize("inference", [False, True], ids=["", "inference"])
@pytest.mark.parametrize("work", FINE)
def test_the_watch_lets_pass(work, inference):
    with torch.inference_mode(inference):
        with no_host_reads():
            FINE[work]()


def test_the_watch_ends():
    methods = {name: getattr(torch.Tensor, name) for name in ("item", "tolist", "__bool__", "numpy")}
    with pytest.raises(AssertionError), no_host_reads():
        X.sum().item()
    assert X[MASK].tolist() == [6.0, 7.0, 8.0, 9.0, 10.0, 11.0] and bool(MASK.any())
    assert all(getattr(torch.Tensor, name) is method for name, method in methods.items())


# ---------------------------------------------------------------------------------------------------- watched steps


def _watch(monkeypatch) -> Counter:
    """Run steps, and the ends of sequences, under the watch; count forwards by positions."""
    found: Counter = Counter()

    def watched(name: str) -> Callable[..., Any]:
        method = getattr(ModelRunner, name)

        def call(runner: ModelRunner, *given, **named):
            if name == "launch":
                found.update(shape.positions for shape in given[0].forwards)
            with no_host_reads():
                return method(runner, *given, **named)

        return call

    for name in ("launch", "warm_up", "end", "publish_final"):
        monkeypatch.setattr(ModelRunner, name, watched(name))
    return found


@pytest.mark.parametrize(("sampler", "policy", "execution"), some_of_every(pairwise(EVERY_PAIR, ["padded", "exact"])))
def test_steps_read_nothing(engines, monkeypatch, sampler, policy, execution):
    found, exact = _watch(monkeypatch), execution == "exact"
    engine = engine_with(engines["dream-gqa"], execution)
    engine.generate(PROMPTS[:2], gen_length=8, sampler=sampler, cache=policy, trace=True)
    later = Positions.RANGE if exact else Positions.BLOCK if policy.by_block else Positions.PREFIX
    listed = policy.name == "region"
    first = Positions.PREFIX if listed and not exact else later
    assert set(found) == {first, Positions.LIST if listed else later}


OPTIONS = {
    "drawn": {"temperature": 0.7, "cfg_scale": 0.5, "eos_stop": True},
    "filtered": {"temperature": 0.7, "top_k": 9, "top_p": 0.9},
    "ends": {"temperature": 0.7, "eos": "last", "eos_penalty": 0.5},
    "think": {"end_think_token_ids": (3, 4), "end_think_logit_boost": 9.0},
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("option", "execution"), few_of(OPTIONS, ["exact", "padded"]))
@pytest.mark.parametrize(
    ("sampler", "cache"),
    [(SlowFast(), "none"), (SlowFast(), "region"), (Threshold(block_length=8), "dual")],
    ids=["paper-none", "paper-region", "threshold-dual"],
)
def test_steps_with_options_read_nothing(engines, monkeypatch, sampler, cache, execution, option):
    found = _watch(monkeypatch)
    engine = engine_with(engines["llada-mha"], execution)
    engine.generate(PROMPTS, gen_length=8, sampler=sampler.replace(**OPTIONS[option]), cache=cache)
    assert found


@pytest.mark.parametrize("execution", ["exact", "padded"])
@pytest.mark.parametrize("ratio", [0.25, 1.0])
def test_partial_refreshes_read_nothing(engines, monkeypatch, ratio, execution):
    found = _watch(monkeypatch)
    options = {"gen_length": [8, 8, 16], "sampler": Threshold(block_length=8), "cache": RefreshCache(5, 3, ratio)}
    engine_with(engines["llada-mha"], execution).generate(PROMPTS, **options)
    assert found


@pytest.mark.parametrize(("execution", "cache"), [("exact", "none"), ("padded", "region"), ("graphs", "refresh")])
def test_steps_with_vectors_read_nothing(engines, monkeypatch, execution, cache):
    found = _watch(monkeypatch)
    engine = engine_with(engines["llada-mha"], execution)
    embeds = [([1], torch.zeros(1, engine.spec.d_model)), None, None]
    assert engine.generate(PROMPTS, gen_length=[8, 8, 16], cache=cache, prompt_embeds=embeds) and found


@pytest.mark.parametrize(("execution", "cache"), [("exact", "none"), ("padded", "region")])
def test_steps_that_take_positions_back_read_nothing(engines, monkeypatch, execution, cache):
    found = _watch(monkeypatch)
    engine = engine_with(engines["llada-mha"], execution)
    sampler = WINO(tau=0.05, block_length=8)
    assert engine.generate(PROMPTS, gen_length=[8, 8, 16], sampler=sampler, cache=cache) and found


def test_captured_steps_and_dropped_sequences_read_nothing(engines, monkeypatch):
    found = _watch(monkeypatch)
    stream = engine_with(engines["llada-mha"], "graphs").stream(PROMPTS, gen_length=[8, 16, 24], cache="region")
    next(stream)
    stream.drop(1)
    assert list(stream) and found[Positions.LIST]


def test_a_read_in_a_step_is_seen(engines, monkeypatch):
    """At any depth."""
    _watch(monkeypatch)
    model = Transformer(engines["llada-mha"].spec, engines["llada-mha"].model.weights)
    attention = model.ops.attention
    model.ops = replace(model.ops, attention=lambda q, *a, **n: attention(q, *a, **n) * float(q.norm() > 0))
    with pytest.raises(AssertionError, match="__float__"):
        Engine(model).generate(PROMPTS[0], gen_length=8)


# ------------------------------------------------------------------------------------- steps where there are no values


class Nowhere(TorchDispatchMode):
    """Refuse tensors made in host memory, from which a GPU could read only by a blocking copy."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            assert not isinstance(made, torch.Tensor) or made.device.type == "meta", f"{func} is done on the host"
        return result


def _on_meta(x):
    if isinstance(x, torch.Tensor):
        return x.to("meta")
    if isinstance(x, tuple):
        return tuple(map(_on_meta, x))
    if is_dataclass(x):
        return replace(x, **{field.name: _on_meta(getattr(x, field.name)) for field in fields(x)})
    return x


@pytest.fixture
def on_meta(engines, monkeypatch):
    """Make a runner with three sequences where tensors have shapes and no values, and the shapes of its steps."""
    monkeypatch.setattr(HostRing, "publish", lambda ring: None)  # host memory cannot take what is not there
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # raises for this device

    def make(sampler: Sampler, policy: CachePolicy, **more: Any) -> tuple[ModelRunner, list[Forward]]:
        engine = engines["llada-mha" if isinstance(sampler, WINO) else "dream-gqa"]
        model = Transformer(engine.spec, _on_meta(engine.model.weights))
        options = {"gen_length": [16, 8, 48], "sampler": sampler, "cache": policy, "seed": [1, 2, 3], **more}
        sequences, _ = engine.sequences(PROMPTS, trace=True, **options)
        key: BatchKey = sequences[0].batch_key
        bounds = bounds_of(sequences)
        runner = ModelRunner(model, key, len(sequences), bounds.length, bounds.response)
        for slot, each in enumerate(sequences):
            embeds = each.embeds and replace(each.embeds, vectors=each.embeds.vectors.to("meta"))
            runner.put(slot, each.canvas, each.start, each.params.sampler, each.params.seed, each.step_cap, embeds)
        return runner, StepPlanner(key.sampler, key.cache, len(sequences), bounds, exact=False).shapes()

    return make


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("sampler", "policy"), some_of_every(EVERY_PAIR))
def test_steps_run_without_values(on_meta, sampler, policy):
    """Steps run on tensors without data, where reading a value raises an error, and on no others."""
    runner, shapes = on_meta(sampler.replace(temperature=0.5, eos_stop=True), policy)
    assert {shape.canvases for shape in shapes} == {1, 2, 3}
    assert runner.state.tokens.device.type == "meta"
    assert all(cache.k.device.type == "meta" for cache in runner.caches)
    for shape in shapes:
        with Nowhere():
            runner.run_padded(shape)


@pytest.mark.parametrize("policy", ["none", "region"])
def test_steps_that_take_positions_back_run_without_values(on_meta, policy):
    runner, shapes = on_meta(WINO(block_length=8), POLICIES[policy])
    for shape in shapes:
        with Nowhere():
            runner.run_padded(shape)


@pytest.mark.parametrize("policy", ["none", "region", "refresh"])
def test_steps_with_vectors_run_without_values(on_meta, engines, policy):
    embeds = [([1], torch.zeros(1, engines["dream-gqa"].spec.d_model)), None, None]
    runner, shapes = on_meta(SlowFast(), POLICIES[policy], prompt_embeds=embeds)
    for shape in shapes:
        with Nowhere():
            runner.run_padded(shape)


def test_steps_with_a_boost_run_without_values(on_meta):
    sampler = SlowFast(end_think_token_ids=(3, 4), end_think_logit_boost=9.0)
    runner, shapes = on_meta(sampler, POLICIES["region"])
    for shape in shapes:
        with Nowhere():
            runner.run_padded(shape)


@pytest.mark.parametrize(
    ("spoil", "error"),
    [(lambda x: x * float(x.max()), "meta"), (lambda x: x * torch.tensor([2.0]).to(x.device), "done on the host")],
    ids=["read", "host"],
)
def test_steps_without_values_can_fail(on_meta, spoil, error):
    runner, shapes = on_meta(SlowFast(), NoCache())
    attention = runner.model.ops.attention
    runner.model.ops = replace(runner.model.ops, attention=lambda *a, **n: spoil(attention(*a, **n)))
    with Nowhere(), pytest.raises((RuntimeError, AssertionError), match=error):
        runner.run_padded(shapes[0])


# ------------------------------------------------------------------------------------------------------------- on a GPU

QUESTIONS = ["15,44,79,50", "3,1,2", "99,98,97,12,7"]
ON_GPU = [
    pytest.param({"sampler": SlowFast()}, id="paper-none"),
    pytest.param({"sampler": SlowFast(), "cache": "region"}, id="paper-region"),
    pytest.param(
        {"sampler": SlowFast(end_think_token_ids=(3, 4), end_think_logit_boost=9.0), "cache": "region"}, id="think"
    ),
    pytest.param({"sampler": SlowFast(), "cache": RefreshCache(6, 3, 0.0)}, id="paper-refresh"),
    pytest.param({"sampler": Threshold(block_length=16), "cache": "prefix"}, id="threshold-prefix"),
    pytest.param({"sampler": Threshold(block_length=16), "cache": "dual"}, id="threshold-dual"),
    pytest.param({"sampler": FixedSteps(steps=16, metric="origin")}, id="origin-none"),
    pytest.param({"sampler": SlowFast(cfg_scale=0.5, temperature=0.5, eos_stop=True)}, id="guided-drawn"),
]


def waits(events: list[dict]) -> Counter:
    """List, from a profiler's trace, calls that wait for the device and copies that may, while decoding.

    A copy from or to pinned memory does not wait: the runner sends the slots of a plan so, and plain torch publishes.
    """
    (span,) = (event for event in events if event.get("cat") == "user_annotation" and event["name"] == "decode")
    within = (event for event in events if span["ts"] <= event.get("ts", -1) < span["ts"] + span["dur"])
    return Counter(
        event["name"]
        for event in within
        if event.get("cat") in ("cuda_runtime", "cuda_driver")
        and (event["name"] == "cudaMemcpy" or "Synchronize" in event["name"])
        or event.get("cat") == "gpu_memcpy"
        and "Pageable" in event["name"]
    )


def test_waits_are_counted_while_decoding():
    def event(name, category, at):
        return {"name": name, "cat": category, "ts": at, "dur": 1}

    span = {"name": "decode", "cat": "user_annotation", "ts": 10, "dur": 10}
    inside = [
        event("cudaStreamSynchronize", "cuda_runtime", 11),
        event("cudaStreamSynchronize", "cuda_runtime", 12),
        event("cuEventSynchronize", "cuda_driver", 13),
        event("Memcpy DtoH (Device -> Pageable)", "gpu_memcpy", 14),
        event("Memcpy HtoD (Pageable -> Device)", "gpu_memcpy", 15),
    ]
    fine = [
        event("cudaLaunchKernel", "cuda_runtime", 11),
        event("cudaMemcpyAsync", "cuda_runtime", 12),
        event("Memcpy DtoD (Device -> Device)", "gpu_memcpy", 12),
        event("Memcpy HtoD (Pinned -> Device)", "gpu_memcpy", 12),
        event("Memcpy DtoH (Device -> Pinned)", "gpu_memcpy", 12),
        event("cudaDeviceSynchronize", "cuda_runtime", 9),
        event("cudaDeviceSynchronize", "cuda_runtime", 21),
        {"name": "no time"},
    ]
    assert waits([span, *fine]) == {}
    assert sorted(waits([span, *fine, *inside]).values()) == [1, 1, 1, 2]


class Marked:
    """An execution whose steps, from the first to the last, are a span of the profiler's trace."""

    def __init__(self, execution: Execution):
        self._execution = execution

    def __getattr__(self, name: str):
        return getattr(self._execution, name)

    def run(self, planner, runner):
        with torch.profiler.record_function("decode"):
            yield from self._execution.run(planner, runner)


BY_NAME = {"eager": False, "cuda_graphs": True}


@pytest.fixture(scope="module")
def on_gpu() -> Callable[..., Engine]:
    loaded = sfs_triton.load("embedded", "cuda", "float32")

    def make(execution: str | Execution) -> Engine:
        if not isinstance(execution, str):
            return engine_with(loaded, execution)
        return Engine(loaded.model, loaded.text, cuda_graphs=BY_NAME[execution])

    return make


def _profiled(engine: Engine, path: Path, **options) -> Counter:
    name = engine.execution
    wanted = engine.generate(QUESTIONS, gen_length=32, **options)  # compiles, captures, allocates
    engine._execution.current = Marked(engine._execution.current)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        done = engine.generate(QUESTIONS, gen_length=32, **options)
    assert_same(done, wanted)
    assert engine.execution == name, "it fell back"
    profile.export_chrome_trace(str(path))
    return waits(json.loads(path.read_text())["traceEvents"])


@pytest.mark.gpu
@pytest.mark.parametrize("execution", BY_NAME)
@pytest.mark.parametrize("options", ON_GPU)
def test_nothing_waits_between_the_first_and_the_last_step(on_gpu, tmp_path, options, execution):
    assert _profiled(on_gpu(execution), tmp_path / "trace.json", **options) == {}


@pytest.mark.gpu
def test_a_wait_between_steps_is_counted(on_gpu, tmp_path):
    device = torch.ones(1, device="cuda")
    counted = _profiled(on_gpu("eager"), tmp_path / "trace.json", on_step=lambda frame: device.item())
    assert counted["cudaStreamSynchronize"] > 3


@pytest.mark.gpu
@pytest.mark.parametrize("options", ON_GPU)
def test_steps_on_a_gpu_may_not_wait(on_gpu, monkeypatch, options):
    """Checked by torch's own sync debugging, and by this package's."""
    launch = ModelRunner.launch

    def watched(runner, plan):
        torch.cuda.set_sync_debug_mode("error")
        try:
            with no_host_reads():
                launch(runner, plan)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    engine = on_gpu("eager")
    wanted = engine.generate(QUESTIONS, gen_length=32, **options)
    monkeypatch.setattr(ModelRunner, "launch", watched)
    assert_same(engine.generate(QUESTIONS, gen_length=32, **options), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("options", ON_GPU)
def test_replays_on_a_gpu_equal_eager_steps(on_gpu, options, ahead):
    engine = on_gpu(CudaGraphs(ahead=ahead))
    for prompts, length in ((QUESTIONS, [32, 16, 48]), (QUESTIONS[::-1], 32), (QUESTIONS[0], 64)):
        for _ in range(2):
            done = engine.generate(prompts, gen_length=length, trace=True, **options)
            assert_same(done, on_gpu("eager").generate(prompts, gen_length=length, trace=True, **options))
    assert engine.execution == "cuda_graphs", "it fell back"


@pytest.mark.gpu
@pytest.mark.parametrize("cache", ["none", "region", RefreshCache(6, 3, 0.0)], ids=str)
def test_replays_on_a_gpu_read_vectors(on_gpu, cache):
    engine, ids = on_gpu("cuda_graphs"), [on_gpu("eager").encode(question) for question in QUESTIONS]
    pair = ([2, 3], engine.model.weights.embedding[ids[0][2:4]])
    hidden = [ids[0][:2] + [1, 1] + ids[0][4:], *ids[1:]]
    for _ in range(2):
        done = engine.generate(hidden, gen_length=32, cache=cache, prompt_embeds=[pair, None, None])
        wanted = on_gpu("eager").generate(ids, gen_length=32, cache=cache)
        assert [row.response for row in done] == [row.response for row in wanted]
    assert engine.execution == "cuda_graphs", "it fell back"


@pytest.mark.gpu
@pytest.mark.parametrize("execution", BY_NAME)
def test_a_handle_comes_before_the_device_has_started(on_gpu, execution):
    engine = on_gpu(execution)
    wanted = engine.generate(QUESTIONS, gen_length=32)
    torch.cuda.synchronize()
    held = torch.cuda.Event()
    torch.cuda._sleep(4_000_000_000)  # clock cycles, so some two seconds
    held.record()
    began = time.monotonic()
    pending = engine.generate_async(QUESTIONS, gen_length=32)
    took, waiting = time.monotonic() - began, not held.query()
    assert waiting and took < 0.5
    assert not pending.done()
    assert_same(pending.result(120), wanted)
    assert engine.execution == execution, "it fell back"


@pytest.mark.gpu
@pytest.mark.parametrize("options", ON_GPU)
def test_nothing_is_compiled_or_captured_after_a_warm_up(on_gpu, monkeypatch, options):
    from triton.runtime.jit import JITFunction

    captured = []
    engine = on_gpu(CudaGraphs(capture=lambda runner, shape: captured.append(shape) or capture_graph(runner, shape)))
    engine.generate(QUESTIONS, gen_length=32, **options)
    warm, compiled, compile_ = len(captured), [], JITFunction._do_compile

    def noted(kernel, *given, **named):
        compiled.append(kernel)
        return compile_(kernel, *given, **named)

    monkeypatch.setattr(JITFunction, "_do_compile", noted)
    for _ in range(3):
        engine.generate(QUESTIONS[::-1], gen_length=32, **options)
    assert warm > 0 and len(captured) == warm and compiled == []
