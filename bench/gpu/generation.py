"""Whole generations: their host cost, their launches, and their waits.

As a step it counts a generation's host calls and copies, between its first step and its last and in total: by the
embedded model in float32, by every execution, with a sampler for each cache policy.
"""

from __future__ import annotations

import functools
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

import sfs_triton
from sfs_triton import Engine, Generation, RefreshCache, SlowFast, Threshold
from sfs_triton.models import Transformer
from sfs_triton.ops.dispatch import BACKENDS
from sfs_triton.runner import CudaGraphs, Execution, ModelRunner, Outputs
from sfs_triton.runner.execution import Planner

from . import parts, trace
from .model import stand_in

EXECUTIONS = ("cuda_graphs", "eager")
QUESTIONS = ["15,44,79,50", "3,1,2", "99,98,97,12,7"]
LENGTH = 32
SETTINGS = {
    "none": {"sampler": SlowFast(), "cache": "none"},
    "region": {"sampler": SlowFast(), "cache": "region"},
    "refresh": {"sampler": SlowFast(), "cache": RefreshCache(6, 3, 0.0)},
    "prefix": {"sampler": Threshold(block_length=16), "cache": "prefix"},
    "dual": {"sampler": Threshold(block_length=16), "cache": "dual"},
}


class Marked:
    """Execution whose steps, from the first to the last, are a span of the profile."""

    def __init__(self, execution: Execution):
        self._execution, self.name, self.captures = execution, execution.name, execution.captures
        self.is_exact, self.canvas_length, self.prepare = execution.is_exact, execution.canvas_length, execution.prepare

    def run(self, planner: Planner, runner: ModelRunner) -> Outputs:
        with torch.profiler.record_function(trace.SPAN):
            yield from self._execution.run(planner, runner)


def with_execution(engine: Engine, name: str | None) -> Engine:
    """Return another engine on the same model with the execution of this name; without a GPU, nothing is captured."""
    if name == CudaGraphs.name and engine.model.device.type != "cuda":
        mine = Engine(engine.model, engine.text)
        mine._execution.current = CudaGraphs(capture=stand_in)
        return mine
    return Engine(engine.model, engine.text, None if name is None else name == CudaGraphs.name)


@contextmanager
def warnings() -> Iterator[list[str]]:
    """Collect the package's warnings inside the block: an execution failed, and another continued."""
    told: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())
    logger = logging.getLogger("sfs_triton")
    logger.addHandler(handler)
    try:
        yield told
    finally:
        logger.removeHandler(handler)


def profile(engine: Engine, prompts: list, **options: Any) -> dict[str, Any]:
    """Counts of one generation, after another has warmed up, and the time of a third without a profiler.

    Raises:
        Incomplete: its execution failed on the way, or results differ; with the findings.
    """
    with warnings() as told:
        first = engine.generate(prompts, **options)
        began = time.perf_counter()
        again = engine.generate(prompts, **options)
        seconds = time.perf_counter() - began
        choice = engine._execution
        execution = choice.current
        choice.current = Marked(execution)
        try:
            events = trace.profiled(lambda: engine.generate(prompts, **options))
        finally:
            choice.current = execution
    steps = max(done.nfe for done in again)
    decode, whole = trace.summary(trace.within(events), top=6), trace.summary(events, top=0)
    values = {
        "nfe": steps,
        "seconds": seconds,
        "ms_per_step": 1e3 * seconds / steps,
        "full_forwards": sum(done.full_forwards for done in again),
        "positions_forwarded": sum(done.positions_forwarded for done in again),
        "decode": decode,
        "generation": {key: whole[key] for key in ("calls", "waits", "kernels", "copies")},
        "calls_per_step": round(sum(decode["calls"].values()) / steps, 1),
        "kernels_per_step": round(decode["kernels"] / steps, 1),
    }
    if told:
        raise parts.Incomplete(values, RuntimeError(f"the execution failed: {'; '.join(told)}"))
    if not _same(first, again):
        raise parts.Incomplete(values, AssertionError("the second generation gave other tokens than the first"))
    return values


def _same(mine: list[Generation], others: list[Generation]) -> bool:
    return [each.canvas for each in mine] == [each.canvas for each in others]


@functools.cache
def embedded() -> Engine:
    return sfs_triton.load("embedded", parts.device(), "float32", "torch")


def count_waits(backend: str, execution: str, policy: str) -> dict[str, Any]:
    """Count the waits: none is allowed between the steps, and one in all, for the result."""
    model = embedded().model
    engine = with_execution(Engine(Transformer(model.spec, model.weights, backend), embedded().text), execution)
    values = profile(engine, QUESTIONS, gen_length=LENGTH, **SETTINGS[policy])
    values = {"backend": backend, "execution": execution, "policy": policy, **values}
    if values["decode"]["waits"]:
        raise parts.Incomplete(values, AssertionError(f"waits between steps: {values['decode']['waits']}"))
    return values


def every_part() -> dict[str, parts.Part]:
    toy = parts.is_toy()
    backends = ("torch",) if toy else BACKENDS
    return {
        f"{policy}, {backend}, {execution}": functools.partial(count_waits, backend, execution, policy)
        for backend in backends
        for policy in list(SETTINGS)[: 2 if toy else None]
        for execution in EXECUTIONS
    }


if __name__ == "__main__":
    sys.exit(parts.run(every_part()))
