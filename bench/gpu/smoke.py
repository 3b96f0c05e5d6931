"""Check one shape of every kernel against its twin, the host ring, and the embedded model by every execution.

A failure here would spoil all later steps, so these run first and small.
"""

from __future__ import annotations

import functools
import importlib
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import sfs_triton
from bench.kernels import harness
from bench.kernels.case import Case
from bench.kernels.resources import operations
from sfs_triton import SlowFast, Threshold
from sfs_triton.models import Transformer
from sfs_triton.ops import torch_backend
from sfs_triton.ops.dispatch import BACKENDS
from sfs_triton.runner.host_ring import HostRing

from . import clock, parts
from .generation import EXECUTIONS, embedded, warnings, with_execution

QUESTION, LENGTH = "15,44,79,50", 32
PUBLISHED = 20
SETTINGS = {
    "paper-none": {"sampler": SlowFast(), "cache": "none"},
    "paper-region": {"sampler": SlowFast(), "cache": "region"},
    "threshold-dual": {"sampler": Threshold(block_length=16), "cache": "dual"},
}


def check_case(case: Case) -> dict[str, Any]:
    """The kernel's results beside its twin's, by the benchmarks' own rules."""
    torch.manual_seed(0)
    device = parts.device()
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if 10 * major + minor < case.min_capability:
            raise parts.Skip(f"needs sm_{case.min_capability}")
    changed = harness.check(case, case.kernel, case.build(device))
    return {"case": case.name, "changes": sorted(changed)}


def check_host_ring() -> dict[str, Any]:
    """Check copies that a kernel publishes to the host, launched and from a graph; time one on its way."""
    device = parts.device()
    source = torch.arange(2 * 22, device=device).view(2, 22)
    publish = torch_backend.publish
    if device.type == "cuda":
        from sfs_triton.kernels.publish import publish
    ring = HostRing({"control": source}, 4, publish, device)
    launched = _published(ring, source, ring.publish)
    replay = clock.graph_of(ring.publish, device)
    ring.count_launch()  # of its warm-up
    return {"us_launched": launched, "us_replayed": _published(ring, source, replay)}


def _published(ring: HostRing, source: torch.Tensor, publish: Callable[[], object]) -> float:
    """Return the microseconds from the call until the copy can be read, the least of some."""
    taken = []
    for _ in range(PUBLISHED):
        source += 1
        if source.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        publish()
        number = ring.count_launch()
        copy = ring.read(number, 5.0)["control"]
        taken.append(1e6 * (time.perf_counter() - began))
        if copy.tolist() != source.tolist():
            raise AssertionError(f"copy {number} is not what was published")
    return round(min(taken), 1)


@functools.cache
def wanted(name: str) -> tuple[list[int], int]:
    """Return the CPU's result for the question."""
    engine = sfs_triton.load("embedded", "cpu", "float32")
    done = engine.generate(QUESTION, gen_length=LENGTH, **SETTINGS[name])
    return done.canvas, done.nfe


def generate(backend: str, execution: str, name: str) -> dict[str, Any]:
    """Generate by the embedded model in float32, twice in one persistent batch, and compare with the CPU's result."""
    engine = sfs_triton.Engine(Transformer(embedded().spec, embedded().model.weights, backend), embedded().text)
    engine = with_execution(engine, execution)
    began = time.perf_counter()
    with warnings() as told:
        done = [engine.generate(QUESTION, gen_length=LENGTH, **SETTINGS[name]) for _ in range(2)]
    values = {"nfe": done[0].nfe, "seconds": round(time.perf_counter() - began, 3)}
    if told or engine.execution != execution:
        raise parts.Incomplete(values, RuntimeError(f"execution by {execution} did not last: {'; '.join(told)}"))
    for number, each in enumerate(done):
        if (each.canvas, each.nfe) != wanted(name):
            raise parts.Incomplete(values, AssertionError(f"run {number} is not what the CPU gives: {each.text!r}"))
    return values


def every_part() -> dict[str, parts.Part]:
    """List the checks by name, in the order in which they run."""
    toy = parts.is_toy()
    found: dict[str, parts.Part] = {"host ring": check_host_ring}
    for operation in operations():
        cases = importlib.import_module(f"bench.kernels.test_{operation}").cases(toy=toy)
        found[operation] = functools.partial(check_case, cases[0])
    for name in SETTINGS:
        for backend in BACKENDS:
            for execution in reversed(EXECUTIONS):
                if not (toy and backend == "triton"):  # the interpreter would take minutes
                    found[f"{name}, {backend}, {execution}"] = functools.partial(generate, backend, execution, name)
    return found


if __name__ == "__main__":
    sys.exit(parts.run(every_part()))
