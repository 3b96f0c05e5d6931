"""The host ring: copies by plain torch, waiting, and a device that fails."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from sfs_triton import DeviceFault, LoopTimeout, OutOfDeviceMemory
from sfs_triton.runner import ModelRunner, faults, host_ring, model_runner
from sfs_triton.runner.faults import is_lack_of_memory
from sfs_triton.runner.host_ring import HostRing
from sfs_triton.scheduling.planner import StepPlanner
from sfs_triton.scheduling.scheduler import bounds_of

CPU = torch.device("cpu")


class Event:
    """An event of a device that fails, or has done its work, at ``time.monotonic() == at``."""

    def __init__(self, at: float = 0.0, error: str | None = None):
        self.at, self.error, self.queries = at, error, 0

    def query(self) -> bool:
        self.queries += 1
        if self.error is not None:
            raise RuntimeError(self.error)
        return time.monotonic() >= self.at


def ring_of(*events: Event) -> HostRing:
    """A ring without a kernel, one copy launched for each event."""
    ring = HostRing({"x": torch.arange(3)}, 4, None, CPU)
    for _ in events:
        ring.publish()
        ring.count_launch()
    ring._events = list(events)
    ring._published[0] = 0
    return ring


def test_copies_by_plain_torch():
    """No kernel takes part; the last ``depth`` copies can be read."""
    source, flag = torch.zeros(2, dtype=torch.int64), torch.zeros(3, dtype=torch.bool)
    ring = HostRing({"source": source, "flag": flag}, 3, None, CPU)
    for number in range(1, 8):
        source += number
        flag[number % 3] = True
        assert not ring.has(number)
        ring.publish()
        assert ring.count_launch() == number and ring.has(number)
        copy = ring.read(number, 1.0)
        assert copy["source"].tolist() == source.tolist() and copy["flag"].tolist() == flag.tolist()
    sums = [sum(range(n + 1)) for n in (5, 6, 7)]
    assert [ring.read(n, 1.0)["source"][0] for n in (5, 6, 7)] == sums


def test_copies_by_plain_torch_have_arrived_with_their_event():
    late = time.monotonic() + 0.05
    ring = ring_of(Event(), Event(late), Event(late + 60))
    assert ring.has(1) and not ring.has(2)
    ring.wait(2, 5.0)
    assert time.monotonic() >= late and ring.has(2) and not ring.has(3)


def test_a_failure_that_an_event_reports_is_named():
    ring = ring_of(Event(error="CUDA error: an illegal memory access was encountered\nand so on"))
    with pytest.raises(DeviceFault, match="^'cpu' has failed and .*: CUDA error: an illegal memory access was enc.*d$"):
        ring.wait(1, 5.0)


# ------------------------------------------------------------------------------------------- a device that has failed


def waited(ring: HostRing, error: type[Exception], text: str, limit: float = 30.0) -> float:
    began = time.monotonic()
    with pytest.raises(error, match=text):
        ring.wait(ring.launched + 1, limit)
    return time.monotonic() - began


def test_a_device_that_fails_is_noticed_within_a_second(monkeypatch):
    def failed(device):
        raise DeviceFault("CUDA error: device-side assert triggered")

    monkeypatch.setattr(faults, "is_idle", failed)
    assert waited(HostRing({}, 4, None, CPU), DeviceFault, "device-side assert") < 1


def test_a_device_that_is_idle_and_publishes_nothing_is_noticed_within_a_second(monkeypatch):
    asked = []
    monkeypatch.setattr(faults, "is_idle", lambda device: asked.append(device) or True)
    assert waited(HostRing({}, 4, None, CPU), DeviceFault, "'cpu' is idle and has published nothing of step 0") < 1
    assert asked == [CPU, CPU], "one more look after the first"


def test_what_is_published_as_the_device_becomes_idle_is_read(monkeypatch):
    ring = HostRing({"x": torch.arange(3)}, 4, None, CPU)
    monkeypatch.setattr(faults, "is_idle", lambda device: ring.publish() or True)
    assert ring.read(1, 30.0)["x"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("answers", [[False], [True, False]], ids=["busy", "at times"])
def test_a_device_that_works_is_waited_for_to_the_limit(monkeypatch, answers):
    monkeypatch.setattr(faults, "is_idle", lambda device: answers.append(answers.pop(0)) or answers[-1])
    assert waited(HostRing({}, 4, None, CPU), LoopTimeout, r"step 0 within 0\.4 s", 0.4) < 1


def test_the_device_is_asked_without_waiting(monkeypatch):
    """By a query of the stream, which reports what has failed; a CPU is not asked."""
    assert faults.is_idle(CPU) is False
    stream = Event(error="CUDA error: unspecified launch failure")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    with pytest.raises(DeviceFault, match="'cuda:1' has failed .*: CUDA error: unspecified launch failure"):
        faults.is_idle(torch.device("cuda", 1))


# -------------------------------------------------------------------------------------------------------------- sleep


def test_a_step_is_slept_through_and_then_polled(monkeypatch):
    slept, sleep = [], time.sleep
    monkeypatch.setattr(host_ring.time, "sleep", lambda seconds: slept.append(seconds) or sleep(seconds))
    now = time.monotonic()
    ring = ring_of(Event(now + 0.1))
    ring.wait(1, 5.0, until=now + 0.09)
    assert 0.05 < slept[0] <= 0.09 and time.monotonic() >= now + 0.1


@pytest.mark.parametrize("ahead", [-1.0, 0.0, 1e-4])
def test_what_is_there_or_due_is_not_slept_for(monkeypatch, ahead):
    monkeypatch.setattr(host_ring.time, "sleep", lambda seconds: pytest.fail(f"slept {seconds} s"))
    ring_of(Event()).wait(1, 5.0, until=time.monotonic() + ahead)
    ring_of(Event()).wait(1, 5.0, until=time.monotonic() + 60)


def test_a_runner_sleeps_by_the_last_step_of_a_shape(engines, monkeypatch):
    """80 % of it, from the launch or the output before it on, and not after a pause of seconds."""
    asked = _collected(engines, monkeypatch, took=[0.010, 0.020, 0.020, 9.0, 0.01])
    assert [round(until - start, 6) for start, until in asked] == [0.0, 0.008, 0.016, 0.016, 0.05]


def _collected(engines, monkeypatch, took: list[float]) -> list[tuple[float, float]]:
    """Launch and collect steps that take so long; return when each was launched, and until when it was slept."""
    (sequence,), _ = engines["llada-mha"].sequences([5, 6], gen_length=16)
    bounds = bounds_of([sequence])
    runner = ModelRunner(engines["llada-mha"].model, sequence.batch_key, 1, bounds.length, bounds.response)
    planner = StepPlanner(sequence.params.sampler, sequence.params.cache, 1, bounds, exact=False)
    progress = runner.put(0, sequence.canvas, sequence.start, sequence.params.sampler, 0, sequence.step_cap)
    planner.join(0, progress)
    now, asked, read = [100.0], [], runner.ring.read
    monkeypatch.setattr(model_runner, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def timed(number, limit, until):
        asked.append((now[0], until))
        now[0] += took[len(asked) - 1]
        return read(number, limit)

    runner.ring.read = timed
    for _ in took:
        plan = planner.next()
        runner.launch(plan)
        planner.update(runner.collect(plan, 1.0))
    return asked


# ----------------------------------------------------------------------------------------------------- lack of memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported asynchronously"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("cudaHostAlloc failed: cudaErrorMemoryAllocation"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
        OutOfDeviceMemory("1 canvases are too many"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_lack_of_memory_is_recognised(error):
    assert is_lack_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("out of resource: shared memory, Required: 147456, Hardware limit: 101376"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
        RuntimeError("no kernel image is available for execution on the device"),
        LoopTimeout("late"),
        DeviceFault("'cuda' has failed"),
        KeyError("out of memory"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_other_errors_are_no_lack_of_memory(error):
    assert not is_lack_of_memory(error)
