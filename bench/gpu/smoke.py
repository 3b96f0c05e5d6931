"""One shape of every kernel against its twin, the host ring in pinned memory, and the embedded model by every loop.

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
from sfs_triton.ops import torch_backend as torch_impl
from sfs_triton.runner.host_ring import Mailbox

from . import clock, parts
from .generation import warnings, with_loop

QUESTION, LENGTH = "15,44,79,50", 32
POSTS = 20
IMPLS = ("torch", "triton")
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


def check_mailbox() -> dict[str, Any]:
    """Letters that a kernel posts to the host, launched and from a graph; and how long one is under way."""
    device = parts.device()
    source = torch.arange(2 * 22, device=device).view(2, 22)
    publish = torch_impl.publish
    if device.type == "cuda":
        from sfs_triton.kernels.publish import publish
    box = Mailbox({"control": source}, 4, publish, device)
    launched = _posts(box, source, box.post)
    replayed = _posts(box, source, clock.graph_of(box.post, device), warm=1)
    return {"us_launched": launched, "us_replayed": replayed}


def _posts(box: Mailbox, source: torch.Tensor, post: Callable[[], object], warm: int = 0) -> float:
    """Microseconds from the call to the bell, the least of some."""
    box.posted += warm
    taken = []
    for _ in range(POSTS):
        source += 1
        if source.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        post()
        box.posted += 1
        letter = box.read(box.posted, 5.0)["control"]
        taken.append(1e6 * (time.perf_counter() - began))
        if letter.tolist() != source.tolist():
            raise AssertionError(f"letter {box.posted} is not what was posted")
    return round(min(taken), 1)


@functools.cache
def wanted(name: str) -> tuple[list[int], int]:
    """Return the CPU's result for the question."""
    engine = sfs_triton.load("embedded", "cpu", "float32")
    done = engine.generate(QUESTION, gen_length=LENGTH, **SETTINGS[name])
    return done.canvas, done.nfe


@functools.cache
def embedded() -> sfs_triton.Engine:
    return sfs_triton.load("embedded", parts.device(), "float32")


def generate(impl: str, loop: str, name: str) -> dict[str, Any]:
    """A generation of the embedded model in float32, twice on one session, as the CPU does it."""
    engine = with_loop(
        sfs_triton.Engine(Transformer(embedded().spec, embedded().model.weights, impl), embedded().text), loop
    )
    began = time.perf_counter()
    with warnings() as told:
        done = [engine.generate(QUESTION, gen_length=LENGTH, **SETTINGS[name]) for _ in range(2)]
    values = {"nfe": done[0].nfe, "seconds": round(time.perf_counter() - began, 3)}
    if told or engine.loop != loop:
        raise parts.Incomplete(values, RuntimeError(f"loop {loop} did not last: {'; '.join(told)}"))
    for number, row in enumerate(done):
        if (row.canvas, row.nfe) != wanted(name):
            raise parts.Incomplete(values, AssertionError(f"run {number} is not what the CPU gives: {row.text!r}"))
    return values


def every_part() -> dict[str, parts.Part]:
    """List the checks by name, in the order in which they run."""
    toy = parts.is_toy()
    found: dict[str, parts.Part] = {"mailbox": check_mailbox}
    for operation in operations():
        cases = importlib.import_module(f"bench.kernels.test_{operation}").cases(toy=toy)
        found[operation] = functools.partial(check_case, cases[0])
    for name in SETTINGS:
        for impl in IMPLS:
            for loop in ("eager", "replay"):
                if not (toy and impl == "triton"):  # the interpreter would take minutes
                    found[f"{name}, {impl}, {loop}"] = functools.partial(generate, impl, loop, name)
    return found


if __name__ == "__main__":
    sys.exit(parts.run(every_part()))
