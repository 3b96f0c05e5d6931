"""Captures: one at a time, undisturbed, and cleaned up after; the modes and the stream of whoever calls."""

from __future__ import annotations

import gc
import threading
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sfs_triton import Engine, OutOfDeviceMemory, SlowFast
from sfs_triton.decoding.params import BatchKey
from sfs_triton.models import Transformer
from sfs_triton.runner import CudaGraphs, ModelRunner, cuda_graph, stream
from sfs_triton.scheduling.scheduler import Scheduler, least_bounds
from tests.support.combinations import EXECUTIONS, POLICIES, PROMPTS, RAGGED, assert_same, engine_with, stand_in


def test_captures_of_a_process_come_one_after_another(engines):
    """Without garbage collection, which may destroy another graph."""
    inside, most, collecting = 0, 0, []

    def capture(runner, shape):
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        collecting.append(gc.isenabled())
        time.sleep(0.02)
        inside -= 1
        return stand_in(runner, shape)

    made = [engine_with(engines[name], CudaGraphs(capture=capture)) for name in ("llada-mha", "dream-gqa")]
    wanted = [engine_with(engine).generate(**RAGGED, cache="region") for engine in made]
    done = [None, None]

    def generate(index: int) -> None:
        done[index] = made[index].generate(**RAGGED, cache="region")

    threads = [threading.Thread(target=generate, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for index in range(2):
        assert_same(done[index], wanted[index])
    assert most == 1 and len(collecting) > 4 and not any(collecting) and gc.isenabled()


def test_garbage_is_collected_again_after_a_capture_that_fails():
    with pytest.raises(KeyError), cuda_graph.capturing():
        raise KeyError
    assert gc.isenabled()
    gc.disable()
    try:
        with cuda_graph.capturing():
            pass
        assert not gc.isenabled(), "it was off before"
    finally:
        gc.enable()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("policy", ["none", "region"])
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_callers_autocast_is_in_no_step_and_no_graph(engines, execution, policy):
    options = {**RAGGED, "cache": POLICIES[policy]}
    wanted = engine_with(engines["llada-mha"]).generate(**options)
    model, seen = Transformer(engines["llada-mha"].spec, engines["llada-mha"].model.weights), []
    attention = model.ops.attention

    def watched(*given, **named):
        seen.append(torch.is_autocast_enabled("cpu"))
        return attention(*given, **named)

    model.ops = replace(model.ops, attention=watched)
    engine = engine_with(Engine(model), execution)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(engine.generate(**options), wanted)
    assert seen and not any(seen)
    assert_same(engine.generate(**options), wanted)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("policy", ["none", "region", "refresh"])
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_batch_that_was_made_in_inference_mode_is_used_outside_of_it(engines, execution, policy):
    options = {**RAGGED, "cache": POLICIES[policy], "trace": True}
    wanted = engine_with(engines["llada-mha"]).generate(**options)
    engine = engine_with(engines["llada-mha"], execution)
    with torch.inference_mode():
        assert_same(engine.generate(**options), wanted)
    (batch,) = engine.batches.spare
    assert_same(engine.generate(**options), wanted)
    with torch.inference_mode():
        assert_same(engine.generate(**options), wanted)
    assert engine.batches.spare == [batch]


def test_lack_of_memory_in_a_capture_says_so(engines):
    def capture(runner, shape):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    engine = engine_with(engines["llada-mha"], CudaGraphs(capture=capture))
    with pytest.raises(OutOfDeviceMemory) as caught:
        engine.generate(PROMPTS[0], gen_length=16, cache="region")
    assert str(caught.value) == (
        "no memory while capturing a step of 1 canvases of 64 positions with cache='region': "
        "CUDA out of memory. Tried to allocate 2.00 GiB."
    )


def test_graphs_can_be_captured_before_anyone_needs_them(engines):
    captured = []

    def capture(runner, shape):
        captured.append(shape)
        return stand_in(runner, shape)

    engine = engine_with(engines["llada-mha"], CudaGraphs(capture=capture))
    bounds = least_bounds(engine.spec.max_length)
    scheduler = Scheduler(engine.batches, lambda sequence: bounds, slots=3)
    (sequences, _) = engine.sequences(**RAGGED, cache=POLICIES["region"], frames=True)
    scheduler.capture(BatchKey(SlowFast().blanked(), POLICIES["region"], frames=True), bounds)
    assert len(captured) == len(set(captured)) == 2 * 3
    (batch,) = engine.batches.spare
    for sequence in sequences:
        scheduler.submit(sequence)
    while scheduler.waiting or scheduler.running:
        scheduler.step()
    scheduler.close()
    assert len(captured) == 6 and engine.batches.spare == [batch]
    wanted = engine_with(engines["llada-mha"]).generate(**RAGGED, cache=POLICIES["region"])
    assert_same([sequence.result(engine.spec, None) for sequence in sequences], wanted)


# ------------------------------------------------------------------------------------- without a GPU, by what is called


class Gpu:
    """Stands for torch's functions on a GPU, and notes their calls."""

    def __init__(self, monkeypatch, fails: str | None = None):
        self.calls, self.reserved, self.fails = [], 1000, fails
        for name in ("synchronize", "empty_cache", "current_stream", "Stream"):
            monkeypatch.setattr(torch.cuda, name, self._noted(name))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: self.reserved)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "graph", self._graph)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda keep_graph: self)
        for name in ("_cuda_clearCublasWorkspaces", "_cuda_endAllocateToPool"):
            monkeypatch.setattr(torch._C, name, self._noted(name), raising=False)
        monkeypatch.setattr(cuda_graph, "_capture_stream", lambda device: "side")

    def _noted(self, name: str):
        def call(*given):
            self.calls.append(name)
            if name == "_cuda_endAllocateToPool" and self.fails != "left open":
                raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

        return call

    @contextmanager
    def _graph(self, graph, pool, stream, capture_error_mode):
        assert (pool, stream, capture_error_mode) == ((0, 7), "side", "thread_local")
        self.calls.append("capture")
        self.reserved += 500
        yield
        if self.fails is not None:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def instantiate(self) -> None:
        self.calls.append("instantiate")

    def replay(self) -> None:
        self.calls.append("replay")


def _runner() -> SimpleNamespace:
    tokens = SimpleNamespace(device=torch.device("cuda", 0))
    return SimpleNamespace(
        state=SimpleNamespace(tokens=tokens), pool=(0, 7), graph_bytes=0, run_padded=lambda shape: None
    )


def test_a_capture_frees_workspaces_before_and_after_and_counts_its_memory(monkeypatch):
    gpu, runner = Gpu(monkeypatch), _runner()
    cuda_graph.capture_graph(runner, "shape")()
    clear = "_cuda_clearCublasWorkspaces"
    left = [call for call in gpu.calls if call not in ("current_stream", "empty_cache")]
    assert left == ["synchronize", clear, "capture", "instantiate", clear, "replay"]
    assert runner.graph_bytes == 500


@pytest.mark.parametrize("fails", ["left open", "closed"])
def test_a_capture_that_is_invalidated_leaves_no_allocation_to_its_pool(monkeypatch, fails):
    """Whether this version of torch has ended it or not; the error is the capture's."""
    gpu, runner = Gpu(monkeypatch, fails), _runner()
    with pytest.raises(RuntimeError, match="previous error during capture"):
        cuda_graph.capture_graph(runner, "shape")
    assert gpu.calls[-2:] == ["_cuda_endAllocateToPool", "_cuda_clearCublasWorkspaces"] and runner.graph_bytes == 0


def test_work_has_a_stream_of_its_own_behind_the_callers(monkeypatch):
    waited, entered = [], []
    own = SimpleNamespace(wait_stream=waited.append)
    monkeypatch.setattr(stream, "_own_stream", lambda device: own)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the caller's")
    monkeypatch.setattr(torch.cuda, "stream", lambda given: entered.append(given) or nullcontext())
    for wait in (True, False):
        with stream.working(torch.device("cuda"), wait):
            pass
    assert waited == ["the caller's"] and entered == [own, own]
    with stream.working(torch.device("cpu"), True):
        pass
    assert len(entered) == 2


# ------------------------------------------------------------------------------------------------------------- closing


def test_no_copy_is_in_flight_when_a_batch_is_closed(engines, monkeypatch):
    """Neither a step's nor a final state's: the memory that it is written to may be freed then."""
    read, waited = ModelRunner.read_final, []

    def noted(runner, slot, limit):
        waited.append(slot)
        return read(runner, slot, limit)

    monkeypatch.setattr(ModelRunner, "read_final", noted)
    stream_ = engine_with(engines["llada-mha"], "graphs").stream(**RAGGED, cache="region")
    next(stream_)
    stream_.drop(1)
    stream_.close()
    assert {0, 1, 2} <= set(waited)
