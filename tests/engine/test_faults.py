"""Faults in a generation: NaN, step caps, no memory, executions that fail, checkpoints that change."""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import sfs_triton
from sfs_triton import (
    ArgumentError,
    CheckpointError,
    Engine,
    LoopTimeout,
    NumericalFault,
    OutOfDeviceMemory,
    SfsError,
    SlowFast,
    StepCapExceeded,
    Threshold,
)
from sfs_triton.decoding.params import BatchKey
from sfs_triton.models import Transformer, reading, weights
from sfs_triton.models.cache import FeatureCache, KVCache
from sfs_triton.runner import CudaGraphs, Eager, ModelRunner
from sfs_triton.scheduling.persistent_batch import PersistentBatch
from tests.support.combinations import (
    EXECUTIONS,
    POLICIES,
    PROMPTS,
    RAGGED,
    SAMPLERS,
    SOME_PAIRS,
    Failing,
    assert_same,
    engine_with,
    pairwise,
    stand_in,
)

OPTIONS = {"prompts": PROMPTS[0], "gen_length": 16}


def _own(engine: Engine, execution="exact", **changes) -> Engine:
    """An engine whose operations or spec can be changed, since no other shares its model."""
    model = Transformer(replace(engine.spec, **changes), engine.model.weights)
    return engine_with(Engine(model, engine.text), execution)


# ------------------------------------------------------------------------------------------- sequences with a fault


def _break_sequence(engine: Engine, index: int, step: int) -> None:
    """Make the model return NaN at every position of this sequence at this step."""
    scatter = engine.model.ops.scatter_choices

    def spoiled(state, *given, **named):
        scatter(state, *given, **named)
        if state.step[index] == step:
            state.score[index] = torch.nan

    engine.model.ops = replace(engine.model.ops, scatter_choices=spoiled)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("sampler", "policy", "execution"), pairwise(SOME_PAIRS, ["graphs", "exact"]))
def test_a_sequence_of_nan_is_named_and_the_others_finish(engines, sampler, policy, execution):
    options = {**RAGGED, "sampler": sampler, "cache": policy, "trace": True}
    wanted = engine_with(engines["llada-mha"]).generate(**options)
    assert wanted[1].nfe > 3, "the sequence is done before it breaks"
    engine = _own(engines["llada-mha"], execution)
    _break_sequence(engine, index=1, step=3)
    with pytest.raises(NumericalFault, match="NaN logits: sequence 1 at step 3$") as caught:
        engine.generate(**options)
    assert sorted(caught.value.finished) == [0, 2]
    assert_same([caught.value.finished[0], caught.value.finished[2]], [wanted[0], wanted[2]])
    engine.model.ops = engines["llada-mha"].model.ops
    assert_same(engine.generate(**options), wanted)  # in the same batch


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_nan_in_one_canvas_stays_there(engines, execution):
    """Put a token that the model cannot read into one sequence."""
    weights = engines["llada-mha"].model.weights
    spoiled = replace(weights, embedding=weights.embedding.clone())
    spoiled.embedding[77] = torch.nan
    engine = engine_with(Engine(Transformer(engines["llada-mha"].spec, spoiled)), execution)
    prompts = [PROMPTS[0], [1, 77, 3], PROMPTS[2]]
    wanted = engine_with(engines["llada-mha"]).generate(**{**RAGGED, "prompts": prompts})
    for cache in ("none", "refresh", "region"):
        with pytest.raises(NumericalFault, match="sequence 1 at step 0$") as caught:
            engine.generate(**{**RAGGED, "prompts": prompts}, cache=cache)
        assert sorted(caught.value.finished) == [0, 2]
        if cache == "none":
            assert_same(list(caught.value.finished.values()), [wanted[0], wanted[2]])


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["paper", "threshold", "fixed-blocks"])
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_sequence_at_its_step_cap_is_named_and_the_others_finish(engines, monkeypatch, execution, name):
    sampler = SAMPLERS[name]
    wanted = engine_with(engines["llada-mha"]).generate(**RAGGED, sampler=sampler)
    caps = {RAGGED["gen_length"][0]: 4}
    step_cap = type(sampler).step_cap
    monkeypatch.setattr(type(sampler), "step_cap", lambda self, n: caps.get(n) or step_cap(self, n))
    engine = engine_with(engines["llada-mha"], execution)
    with pytest.raises(StepCapExceeded, match="step cap of their sampler: sequence 0 at step 4$") as caught:
        engine.generate(**RAGGED, sampler=sampler)
    assert sorted(caught.value.finished) == [1, 2]
    assert_same(list(caught.value.finished.values()), wanted[1:])
    monkeypatch.undo()
    assert_same(engine.generate(**RAGGED, sampler=sampler), wanted)


def test_every_sequence_is_named_or_finished(engines, monkeypatch):
    """Sequences break in different ways."""
    engine = _own(engines["llada-mha"])
    _break_sequence(engine, index=1, step=3)
    step_cap = SlowFast.step_cap
    monkeypatch.setattr(SlowFast, "step_cap", lambda self, n: 2 if n == RAGGED["gen_length"][2] else step_cap(self, n))
    with pytest.raises(NumericalFault) as caught:
        engine.generate(**RAGGED)
    assert sorted(caught.value.finished) == [0]
    assert "sequence 1 at step 3" in str(caught.value) and "sequence 2 at step 2" in str(caught.value)


def test_all_sequences_have_a_fault(engines):
    engine = _own(engines["llada-mha"])
    for index in range(3):
        _break_sequence(engine, index, step=index)
    named = "sequence 0 at step 0, sequence 1 at step 1, sequence 2 at step 2"
    with pytest.raises(NumericalFault, match=named) as caught:
        engine.generate(**RAGGED)
    assert caught.value.finished == {}


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_nan_in_one_layer_is_a_fault_of_every_sequence(engines, execution):
    """All sequences read the same weights. Restored weights work again: no NaN stays in a cache."""
    weights = engines["llada-mha"].model.weights
    layers = list(weights.layers)
    layers[-1] = replace(layers[-1], down=layers[-1].down.clone())
    layers[-1].down[3, 5] = torch.nan
    model = Transformer(engines["llada-mha"].spec, replace(weights, layers=tuple(layers)))
    engine = engine_with(Engine(model), execution)
    named = "NaN logits: sequence 0 at step 0, sequence 1 at step 0, sequence 2 at step 0$"
    for cache in ("none", "refresh", "region"):
        with pytest.raises(NumericalFault, match=named) as caught:
            engine.generate(**RAGGED, cache=cache)
        assert caught.value.finished == {}
    layers[-1].down[3, 5] = weights.layers[-1].down[3, 5]
    for cache in ("region", "none"):
        wanted = engine_with(engines["llada-mha"]).generate(**RAGGED, cache=cache)
        assert_same(engine.generate(**RAGGED, cache=cache), wanted)


# ------------------------------------------------------------------------------------------- memory that is not there


@pytest.mark.parametrize(("cache", "store"), [("prefix", KVCache), ("refresh", FeatureCache)])
@pytest.mark.parametrize(
    "failure",
    [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_out_of_memory_says_how_much_is_needed(engines, monkeypatch, cache, store, failure):
    engine, sampler = engine_with(engines["llada-mha"]), Threshold(block_length=8)
    wanted = engine.generate(**OPTIONS, sampler=sampler, cache=cache)

    def full(*given):
        raise failure

    monkeypatch.setattr(store, "__init__", full)
    with pytest.raises(OutOfDeviceMemory) as caught:
        engine.generate(prompts=PROMPTS, gen_length=32, sampler=sampler, cache=cache)
    text = str(caught.value)
    assert "1 canvases of 45 positions" in text and f"cache={cache!r}" in text and "GiB" in text and "'cpu'" in text
    monkeypatch.undo()
    assert_same(engine.generate(**OPTIONS, sampler=sampler, cache=cache), wanted)


def test_a_model_that_is_far_too_large(engines):
    """Its cache would take more than any address space holds, so that asking for it costs nothing."""
    engine = _own(engines["llada-mha"], n_layers=2**36)
    needed = 2 * 2**36 * engine.spec.kv_width * 4 * 26 / 2**30
    with pytest.raises(OutOfDeviceMemory, match=f"need {needed:.0f}"):
        engine.generate(**OPTIONS, sampler=Threshold(block_length=8), cache="prefix")


def test_other_errors_of_allocation_are_not_called_lack_of_memory(engines, monkeypatch):
    def broken(*given):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(KVCache, "__init__", broken)
    with pytest.raises(RuntimeError, match="no kernel image"):
        engine_with(engines["llada-mha"]).generate(**OPTIONS, sampler=Threshold(block_length=8), cache="prefix")


@pytest.mark.parametrize(("most", "there"), [(0, [0, 0, 0]), (1 << 30, [0, 1, 2])])
def test_caches_that_no_one_uses_make_room(engines, monkeypatch, most, there):
    """Those of earlier generations are gone before others are allocated, if all would take more than may be kept."""
    engine, alive, allocate = engine_with(engines["llada-mha"]), [], KVCache.__init__
    engine.batches._spare_bytes = most

    def note(self, *given):
        alive.append(len(engine.batches.spare))
        allocate(self, *given)

    monkeypatch.setattr(KVCache, "__init__", note)
    for length in (8, 16, 24):
        engine.generate(PROMPTS[0], gen_length=length, sampler=Threshold(block_length=8), cache="prefix")
    assert alive == there


def _crowded(most: int, at: int = 2):
    """Make a launch fail for want of memory with more sequences than that, once one is at step ``at``."""
    launch = ModelRunner.launch

    def crowded(runner, plan):
        if len(plan.steps) + len(plan.paused) > most and max(plan.steps.values()) == at:
            raise torch.OutOfMemoryError("no room for activations")
        launch(runner, plan)

    return crowded


@pytest.mark.sampled(2)
@pytest.mark.parametrize("most", [1, 2])
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_no_memory_for_a_step_takes_fewer_sequences_at_a_time(engines, monkeypatch, caplog, execution, most):
    """Sequences restart, and no step is reported twice."""
    engine, frames = engine_with(engines["llada-mha"], execution), []
    before = engine.execution
    wanted = engine_with(engines["llada-mha"]).generate(**RAGGED, cache="region", trace=True)
    monkeypatch.setattr(ModelRunner, "launch", _crowded(most))
    done = engine.generate(**RAGGED, cache="region", trace=True, on_step=frames.append)
    assert_same(done, wanted)
    assert "at most 1 slots for now: no memory for a step: no room for activations" in caplog.text
    for index, result in enumerate(wanted):
        committed = [place for frame in frames for place in frame.committed[index]]
        assert len(committed) == len(set(committed)) == sum(step >= 0 for step in result.commit_step)
    assert engine.execution == before, "it fell back"


@pytest.mark.parametrize("execution", ["padded", "graphs"])
def test_no_memory_for_a_later_plan_of_a_round_loses_no_frame(engines, monkeypatch, execution):
    """Steps of the plans before it are in a frame, although their sequences restart."""
    options = {**RAGGED, "sampler": Threshold(block_length=8, tau=0.3), "cache": "dual"}
    wanted = engine_with(engines["llada-mha"]).generate(**options)
    launch, frames, failed, inside = ModelRunner.launch, [], [], False

    def crowded(runner, plan):
        nonlocal inside
        if inside and runner.slots > 1:
            failed.append(plan)
            raise torch.OutOfMemoryError("no room for activations")
        launch(runner, plan)
        inside = not plan.completes_round

    monkeypatch.setattr(ModelRunner, "launch", crowded)
    done = engine_with(engines["llada-mha"], execution).generate(**options, on_step=frames.append)
    assert len(failed) == 1, "no round had a second plan"
    assert_same(done, wanted)
    for index, result in enumerate(wanted):
        committed = [place for frame in frames for place in frame.committed[index]]
        assert sorted(committed) == [place for place, step in enumerate(result.commit_step) if step >= 0]


def test_no_memory_for_one_sequence_is_an_error(engines, monkeypatch):
    """The next generation may have room again."""
    engine = engine_with(engines["llada-mha"])
    wanted = engine.generate(**OPTIONS, cache="region")
    monkeypatch.setattr(ModelRunner, "launch", _crowded(0))
    for given in (OPTIONS, RAGGED):
        with pytest.raises(
            OutOfDeviceMemory, match=r"for a step of a canvas of \d+ positions with cache='region': no room"
        ):
            engine.generate(**given, cache="region")
    monkeypatch.undo()
    assert_same(engine.generate(**OPTIONS, cache="region"), wanted)


@pytest.mark.parametrize("at", [None, 3])
def test_no_memory_is_no_failure_of_an_execution(engines, at):
    """Eager execution needs as much."""
    engine = engine_with(engines["llada-mha"], Failing(at, torch.OutOfMemoryError("CUDA out of memory.")))
    with pytest.raises(OutOfDeviceMemory):
        engine.generate(**RAGGED)
    assert engine.execution == "cuda_graphs"


@pytest.mark.parametrize(
    ("policy", "free", "said"),
    [
        (
            "region",
            0.75,
            r"need 4\.\d\d GiB on 'cuda', and 3\.\d\d GiB are free: 8 canvases of up to 307\d positions would fit",
        ),
        ("region", 1000.0, r"need 4\.\d\d GiB on 'cuda', and \d+\.\d\d GiB are free"),
        ("none", 0.75, r"need 0\.00 GiB on 'cuda', and 0\.00 GiB are free"),
    ],
    ids=["less", "enough", "no-cache"],
)
def test_what_would_fit_is_said_where_caches_take_the_memory(engines, monkeypatch, policy, free, said):
    """Elsewhere the memory is that of activations and graphs, of which shorter canvases may need as much."""
    spec = replace(engines["llada-mha"].spec, n_layers=512, max_length=4096)
    model = SimpleNamespace(spec=spec, local=spec, device=torch.device("cuda"), dtype=torch.bfloat16)
    batch = PersistentBatch.__new__(PersistentBatch)
    batch.model, batch.slots, batch.length, batch.key = model, 8, 4096, BatchKey(SlowFast(), POLICIES[policy])
    needed = ModelRunner.bytes_needed(model, batch.key, 8, 4096)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 << 20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 << 20)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free * needed) - (1 << 20), 24 << 30))
    assert re.fullmatch(f"8 canvases of 4096 positions with cache='{policy}' {said}", batch._no_memory())


@pytest.mark.gpu
def test_out_of_memory_on_a_gpu():
    small = sfs_triton.load("embedded", "cuda")
    options = {"prompts": "15,44,79,50", "gen_length": 32, "cache": "region"}
    wanted = small.generate(**options)
    large = Engine(Transformer(replace(small.spec, n_layers=2**26), small.model.weights), small.text)
    with pytest.raises(OutOfDeviceMemory, match=r"GiB are free: 1 canvases of up to \d+ positions would fit"):
        large.generate(**options)
    assert_same(small.generate(**options), wanted)


# ---------------------------------------------------------------------------------------------- executions that fail


@pytest.mark.parametrize("value", ["replay", "", 3])
def test_cuda_graphs_is_a_flag(engines, golden, value):
    named = re.escape(f"cuda_graphs={value!r} is neither True nor False")
    with pytest.raises(ArgumentError, match=named):
        sfs_triton.load(golden / "models" / "llada-mha", "cpu", cuda_graphs=value)
    with pytest.raises(ArgumentError, match=named):
        Engine(engines["llada-mha"].model, cuda_graphs=value)


def test_cuda_graphs_need_a_gpu(engines, golden):
    for make in (
        lambda: sfs_triton.load(golden / "models" / "llada-mha", "cpu", cuda_graphs=True),
        lambda: Engine(engines["llada-mha"].model, cuda_graphs=True),
    ):
        with pytest.raises(ArgumentError, match="cuda_graphs=True needs a GPU: device 'cpu'"):
            make()


@pytest.mark.parametrize("cuda_graphs", [None, False])
def test_the_choice_of_an_execution_is_logged_once(golden, caplog, cuda_graphs):
    with caplog.at_level(logging.INFO, "sfs_triton"):
        engine = sfs_triton.load(golden / "models" / "llada-mha", "cpu", cuda_graphs=cuda_graphs)
        engine.generate(**OPTIONS)
    assert engine.execution == "eager"
    (line,) = (record.getMessage() for record in caplog.records if "execution" in record.getMessage())
    assert line == "execution: eager"


def _warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("at", [None, 0, 1, 4])
@pytest.mark.parametrize("policy", ["none", "refresh", "region"])
def test_an_execution_that_fails_is_replaced_once(engines, caplog, at, policy):
    options = {**RAGGED, "cache": POLICIES[policy], "trace": True}
    wanted = engine_with(engines["llada-mha"]).generate(**options)
    engine = engine_with(engines["llada-mha"], Failing(at))
    assert engine.execution == "cuda_graphs"
    assert_same(engine.generate(**options), wanted)
    assert engine.execution == "eager"
    assert _warnings(caplog) == [
        "(torch, CUDA graphs) failed, going on with (torch, eager): CUDA error: an illegal address"
    ]
    assert_same(engine.generate(**options), wanted)
    assert len(_warnings(caplog)) == 1


@pytest.mark.parametrize("at", [None, 1, 4])
def test_frames_are_not_repeated_after_a_failure(engines, at):
    wanted = list(engine_with(engines["llada-mha"]).stream(**RAGGED))
    stream = engine_with(engines["llada-mha"], Failing(at)).stream(**RAGGED)
    assert list(stream) == wanted
    assert_same(stream.result(), engine_with(engines["llada-mha"]).generate(**RAGGED))


@pytest.mark.parametrize("at", [None, 2])
def test_a_second_failure_is_raised(engines, monkeypatch, caplog, at):
    class Broken(Eager):
        def run(self, planner, runner):
            raise RuntimeError("CUDA error: unspecified launch failure")
            yield

    engine = engine_with(engines["llada-mha"], Failing(at))
    engine._execution._eager = Broken(exact=True)
    with pytest.raises(RuntimeError, match="unspecified launch failure"):
        engine.generate(**OPTIONS)
    assert len(_warnings(caplog)) == 1
    with pytest.raises(RuntimeError, match="unspecified launch failure"):
        engine.generate(**OPTIONS)
    assert len(_warnings(caplog)) == 1, "fell back twice"


@pytest.mark.parametrize(
    "error", [LoopTimeout("late"), SfsError("odd"), ArgumentError("bad"), StepCapExceeded("stuck"), KeyError("a bug")]
)
@pytest.mark.parametrize("at", [None, 2])
def test_other_errors_are_raised(engines, caplog, at, error):
    engine = engine_with(engines["llada-mha"], Failing(at, error))
    with pytest.raises(type(error)) as caught:
        engine.generate(**OPTIONS)
    assert caught.value is error
    assert engine.execution == "cuda_graphs" and not _warnings(caplog)


def test_an_error_of_on_step_is_no_failure_of_an_execution(engines, caplog):
    engine = engine_with(engines["llada-mha"], "graphs")

    def on_step(frame):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        engine.generate(**OPTIONS, on_step=on_step)
    assert engine.execution == "cuda_graphs" and not _warnings(caplog)


def test_generations_side_by_side_fall_back_together(engines, caplog):
    """The execution fails in both of them, and both go on."""
    wanted = engine_with(engines["llada-mha"]).generate(**OPTIONS)
    both = threading.Barrier(2, timeout=20)

    class Fragile(CudaGraphs):
        def run(self, planner, runner):
            both.wait()
            raise RuntimeError("CUDA error: an illegal address")
            yield

    engine, done = engine_with(engines["llada-mha"], Fragile(capture=stand_in)), []
    threads = [threading.Thread(target=lambda: done.append(engine.generate(**OPTIONS))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 2 and engine.execution == "eager" and len(_warnings(caplog)) == 1
    for one in done:
        assert_same(one, wanted)


@pytest.mark.parametrize("error", [LoopTimeout("late"), KeyboardInterrupt(), RuntimeError("CUDA error")])
def test_a_batch_that_failed_is_not_used_again(engines, error):
    """Its device may still run, so the host memory that it writes to is not freed either; its own memory is."""
    engine = engine_with(engines["llada-mha"], Failing(2, error))
    engine._execution._eager = execution = engine._execution.current
    rings, tensors, prepare = [], [], execution.prepare

    def noted(planner, runner):
        rings.append(weakref.ref(runner.ring))
        tensors.extend(map(weakref.ref, (runner.state.tokens, runner.state.control, runner._lists)))
        prepare(planner, runner)

    execution.prepare = noted
    with pytest.raises(type(error)):
        engine.generate(**OPTIONS)
    error.__traceback__ = None  # its frames hold all that they have used
    gc.collect()
    assert engine.batches.spare == [] and rings[0]() is not None
    assert [tensor() for tensor in tensors] == [None] * 3


# ----------------------------------------------------------------------------- checkpoints that change as they are read


def _sharded(folder: Path) -> list[Path]:
    """Split a checkpoint's one file into two, with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, its in parts.items():
        save_file({name: tensors[name] for name in its}, folder / file)
    index = {"weight_map": {name: file for file, its in parts.items() for name in its}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return [folder / file for file in parts]


def test_a_shard_that_vanishes_is_named(checkpoint, monkeypatch):
    """After the index and the first shard were read."""
    _, second = _sharded(checkpoint)
    opened = reading.safe_open

    def vanish(path, **how):
        second.unlink(missing_ok=True)
        return opened(path, **how)

    sfs_triton.load(checkpoint, "cpu")
    monkeypatch.setattr(reading, "safe_open", vanish)
    with pytest.raises(CheckpointError, match=re.escape(str(second))):
        sfs_triton.load(checkpoint, "cpu")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_is_gone_before_it_is_read_is_named(checkpoint, name):
    (checkpoint / name).unlink()
    with pytest.raises(CheckpointError, match=re.escape(name)):
        sfs_triton.load(checkpoint, "cpu")


@pytest.mark.parametrize("how", [Path.unlink, lambda path: os.replace(_garbage(path), path)], ids=["gone", "replaced"])
def test_a_file_that_is_open_is_read_to_its_end(checkpoint, engines, monkeypatch, how):
    """Deleting or replacing the file does not affect the open one."""
    open_reader = weights.open_reader

    def change(*given):
        reader = open_reader(*given)
        how(checkpoint / "model.safetensors")
        return reader

    monkeypatch.setattr(weights, "open_reader", change)
    engine = sfs_triton.load(checkpoint, "cpu")
    assert_same(engine.generate(**OPTIONS), engines["llada-mha"].generate(**OPTIONS))


def _garbage(path: Path) -> Path:
    other = path.with_name("other")
    other.write_bytes(b"garbage")
    return other


CUT = """
import os, sys
import sfs_triton
from sfs_triton.models import weights

open_reader = weights.open_reader

def cut(*given):
    reader = open_reader(*given)
    os.truncate(sys.argv[1] + "/model.safetensors", int(sys.argv[2]))
    return reader

weights.open_reader = cut
try:
    sfs_triton.load(sys.argv[1], "cpu")
except sfs_triton.CheckpointError as error:
    print("refused:", error)
else:
    print("loaded")
"""


def test_a_file_that_is_cut_as_it_is_read_gives_no_engine(checkpoint):
    """The file is mapped into memory, and the system kills a process that reads beyond its new end."""
    command = [sys.executable, "-c", CUT, str(checkpoint)]
    size = (checkpoint / "model.safetensors").stat().st_size
    whole = subprocess.run([*command, str(size)], capture_output=True, text=True, timeout=120)
    assert (whole.returncode, whole.stdout) == (0, "loaded\n"), whole.stderr
    done = subprocess.run([*command, str(size // 4)], capture_output=True, text=True, timeout=120)
    refused = done.returncode == 0 and done.stdout.startswith("refused: ") and str(checkpoint) in done.stdout
    assert refused or done.returncode == -signal.SIGBUS, (done.returncode, done.stdout, done.stderr)
