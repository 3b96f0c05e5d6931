"""Fall-backs of a back end, an execution or a device that fails, and reports of them."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

import sfs_triton
from sfs_triton import BackendError, DeviceFault, Engine, SfsError
from sfs_triton.kernels.errors import KernelError
from sfs_triton.models import Transformer, weights
from sfs_triton.runner import CudaGraphs, ModelRunner, Pair, faults
from tests.support.combinations import EXECUTIONS, PROMPTS, RAGGED, Failing, assert_same, engine_with, stand_in

FAILURE = "kernel attention.attention does not run on device 'cuda': OutOfResources: shared memory; shapes x=[3, 8]"


def kernels(engine: Engine, at: int, execution: str = "exact", pinned: bool = False, spoil: bool = False) -> Engine:
    """An engine whose back end is called triton, and whose ``attention`` does not run at the call of that number.

    ``spoil``: it decides otherwise than plain torch.
    """
    model, calls = Transformer(engine.spec, engine.model.weights), 0
    by_torch = model.ops

    def attention(*given, **named):
        nonlocal calls
        calls += 1
        if calls > at:
            raise KernelError(FAILURE)
        return by_torch.attention(*given, **named)

    def scatter_choices(state, token, *given, **named):
        by_torch.scatter_choices(state, (token + 1) % 100 if spoil else token, *given, **named)

    model.backend, model.ops = "triton", replace(by_torch, attention=attention, scatter_choices=scatter_choices)
    mine = Engine(model, engine.text, pinned=pinned)
    if execution != "exact":
        mine._execution.current = EXECUTIONS[execution]()
    return mine


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize("at", [0, 15])
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_kernel_that_fails_gives_way_to_plain_torch(engines, caplog, execution, at):
    """Sequences restart, and no frame comes twice; one warning says what failed, why, and what is used now."""
    wanted = engine_with(engines["llada-mha"]).generate(**RAGGED, cache="region", trace=True)
    engine, frames = kernels(engines["llada-mha"], at, execution), []
    graphs = "CUDA graphs" if execution == "graphs" else "eager"
    assert engine.describe()["backend"] == "triton" and engine.describe()["fallback"] is None
    assert_same(engine.generate(**RAGGED, cache="region", trace=True, on_step=frames.append), wanted)
    assert [frame.step for frame in frames] == list(range(max(result.nfe for result in wanted)))
    assert warnings(caplog) == [f"(triton, {graphs}) failed, going on with (torch, eager): {FAILURE}"]
    about = engine.describe()
    assert (about["backend"], about["execution"], about["fallback"]) == ("torch", "eager", FAILURE)
    assert engine._execution.pair == Pair("torch", cuda_graphs=False)
    assert engine.model.weights is engines["llada-mha"].model.weights
    assert_same(engine.generate(**RAGGED, cache="region", trace=True), wanted)
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_kernel_that_was_asked_for_is_not_replaced(engines, caplog, execution):
    engine = kernels(engines["llada-mha"], 3, execution, pinned=True)
    for _ in range(2):
        with pytest.raises(BackendError, match="kernel attention.attention does not run") as caught:
            engine.generate(PROMPTS[0], gen_length=16)
        assert isinstance(caught.value, SfsError) and isinstance(caught.value.__cause__, KernelError)
    assert engine.describe()["backend"] == "triton" and not warnings(caplog)


@pytest.mark.parametrize(("pinned", "left"), [(True, "triton"), (False, "torch")])
def test_graphs_that_fail_are_replaced_together_with_the_back_end_unless_that_was_asked_for(engines, pinned, left):
    wanted = engine_with(engines["llada-mha"]).generate(**RAGGED)
    engine = kernels(engines["llada-mha"], 10**9, pinned=pinned)
    engine._execution.current = Failing(3)
    assert_same(engine.generate(**RAGGED), wanted)
    assert engine._execution.pair == Pair(left, cuda_graphs=False)


def test_the_kernel_that_publishes_for_a_graph_gives_way_too(engines, monkeypatch):
    """Plain torch in graphs needs it; eager plain torch does not."""
    wanted = engine_with(engines["llada-mha"]).generate(PROMPTS[0], gen_length=16)
    model = Transformer(engines["llada-mha"].spec, engines["llada-mha"].model.weights)

    def publish(*given):
        raise KernelError("no compiler")

    model.ops = replace(model.ops, publish=publish)
    engine = engine_with(Engine(model), "graphs")
    assert_same(engine.generate(PROMPTS[0], gen_length=16), wanted)
    assert engine.describe()["fallback"] == "no compiler"


def test_a_batch_of_what_was_given_up_is_not_used_again(engines):
    """Nor kept."""
    engine = kernels(engines["llada-mha"], 10**9, "graphs")
    engine.generate(PROMPTS[0], gen_length=16)
    (batch,) = engine.batches.spare
    engine._execution.fall_back(engine.model, engine._execution.current, KernelError("late"))
    engine.generate(PROMPTS[0], gen_length=16)
    assert len(engine.batches.spare) == 1 and batch not in engine.batches.spare


@pytest.mark.parametrize("execution", ["exact", "graphs"])
def test_what_another_back_end_decides_otherwise_is_reported_again(engines, execution):
    """Whoever follows the commits of the frames, or their canvases, ends with the result."""
    wanted = engine_with(engines["llada-mha"]).generate(**RAGGED)
    engine, frames = kernels(engines["llada-mha"], 15, execution, spoil=True), []
    done = engine.generate(**RAGGED, on_step=frames.append)
    assert_same(done, wanted)
    canvases = [list(row) for row in frames[0].tokens]
    for frame in frames:
        for canvas, places, shown in zip(canvases, frame.committed, frame.tokens, strict=True):
            for place in places:
                canvas[place] = shown[place]
    assert canvases == [result.canvas for result in done] == frames[-1].tokens
    replaced = [len(places) for places in frames[0].committed]
    assert any(sum(len(frame.committed[i]) for frame in frames) > sum(at >= 0 for at in wanted[i].commit_step)
               for i in range(3)), f"the first back end decided nothing otherwise: {replaced}"  # fmt: skip
    assert [result.forwards for result in done] == [result.nfe for result in wanted]


# ---------------------------------------------------------------------------------------------------------- the device


def break_device(monkeypatch) -> str:
    text = "'cuda:0' has failed and does no more work for this process: CUDA error: device-side assert triggered"

    def failed(device):
        raise DeviceFault(text)

    monkeypatch.setattr(faults, "is_idle", failed)
    return text


@pytest.mark.parametrize("at", [0, 4])
@pytest.mark.parametrize("execution", ["padded", "graphs"])
def test_a_device_that_has_failed_is_named_and_not_used_again(engines, monkeypatch, caplog, execution, at):
    """An error of any launch may come from it; it is no failure of an execution."""
    engine, launch, launched = engine_with(engines["llada-mha"], execution), ModelRunner.launch, []

    def broken(runner, plan):
        launched.append(plan)
        if len(launched) > at:
            raise RuntimeError("CUDA error: device-side assert triggered")
        launch(runner, plan)

    monkeypatch.setattr(ModelRunner, "launch", broken)
    text = break_device(monkeypatch)
    for _ in range(2):
        with pytest.raises(DeviceFault) as caught:
            engine.generate(**RAGGED)
        assert str(caught.value) == text
    with pytest.raises(DeviceFault):
        list(engine.stream(**RAGGED))
    assert len(launched) == at + 1, "the device was used again"
    assert engine.describe()["fault"] == text and engine.describe()["fallback"] is None
    assert not warnings(caplog) and engine.batches.spare == []


def test_a_device_that_fails_as_a_sequence_joins(engines, monkeypatch):
    engine = engine_with(engines["llada-mha"])

    def put(runner, *given, **named):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(ModelRunner, "put", put)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        engine.generate(**RAGGED)
    assert engine.describe()["fault"] is None, "the device answers"
    text = break_device(monkeypatch)
    with pytest.raises(DeviceFault):
        engine.generate(**RAGGED)
    assert engine.describe()["fault"] == text


def test_a_device_that_is_silent_ends_the_generation(engines, monkeypatch):
    """It is idle, and a step was not published."""
    engine = engine_with(engines["llada-mha"])
    monkeypatch.setattr(faults, "is_idle", lambda device: True)
    monkeypatch.setattr(engine.model, "ops", replace(engine.model.ops))
    monkeypatch.setattr(sfs_triton.runner.host_ring.HostRing, "publish", lambda ring: None)
    with pytest.raises(DeviceFault, match="is idle and has published nothing of step 0"):
        engine.generate(**RAGGED)
    monkeypatch.undo()
    with pytest.raises(DeviceFault, match="is idle and has published nothing"):
        engine.generate(**RAGGED)


# ------------------------------------------------------------------------------------------------------------- loading


def test_a_missing_compiler_is_reported_before_weights_are_read(golden, monkeypatch):
    kernel = pytest.importorskip("sfs_triton.kernels.publish")

    def no_compiler(*given):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    monkeypatch.setattr(kernel, "publish", no_compiler)
    monkeypatch.setattr(weights, "load_weights", lambda *given, **named: pytest.fail("weights were read"))
    monkeypatch.setattr(sfs_triton.engine, "load_weights", weights.load_weights)
    with pytest.raises(BackendError, match="cannot run on device 'cpu': Failed to find C compiler"):
        sfs_triton.load(golden / "models" / "llada-mha", "cpu", backend="triton")


def test_graphs_need_triton(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(sfs_triton.MissingDependencyError, match="cuda_graphs=True needs the package triton"):
        sfs_triton.runner.check_cuda_graphs(True, torch.device("cuda"))


def test_a_capture_that_fails_once_is_tried_again(engines, caplog):
    """Another program may have taken the memory, or disturbed it."""
    attempts = []

    def capture(runner, shape):
        attempts.append(shape)
        if len(attempts) == 1:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        return stand_in(runner, shape)

    engine = engine_with(engines["llada-mha"], CudaGraphs(capture=capture))
    wanted = engine_with(engines["llada-mha"]).generate(PROMPTS[0], gen_length=16)
    assert_same(engine.generate(PROMPTS[0], gen_length=16), wanted)
    assert engine.execution == "cuda_graphs" and not warnings(caplog) and len(attempts) == 2
