"""Compile and load every kernel before measurement, in parallel: the variants that the benchmarks' cases and the
engine's steps launch at the sizes of 8B models, and in float32 at those of the embedded and the golden models, as
recorded from the launchers on tensors without data.

Triton keeps what it compiles on disk, where all later processes find it. On a GPU each variant is loaded as well: one
that does not fit there fails here, by name.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent import futures
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, NamedTuple
from unittest import mock

import torch

from bench import ROOT
from bench.cost import step_count
from bench.cost.step_count import NAMES, Setting, kinds
from bench.kernels.resources import CompilingDriver, operations
from bench.kernels.resources import launches as launches_of
from sfs_triton.checkpoint import EMBEDDED
from sfs_triton.files import read_json
from sfs_triton.kernels.launch import Launch, recording, shared_memory
from sfs_triton.models import read_spec

from . import parts
from .record import DEADLINE

ENGINE, SMALL = "engine", "small models"
# to compile, so they come first; the small models' are needed soonest
SLOWEST = (SMALL, "attention", "lm_head", "linear", "confidence", "cycle", "select", ENGINE)
SMALL_SETTING = {"prompt": 12, "response": 32, "capacity": 24, "span_cap": 16, "block_length": 16, "span": 8}
LATER = ("illada-8b", "dream-7b")  # geometries that only the kernel benchmarks have
MOST_PROCESSES = 16


class Job(NamedTuple):
    """A launch that represents all launches with the same variant: the ``index``-th of the launches of ``source``."""

    source: str
    index: int
    name: str


class Launches(step_count.Meter):
    """Record the launches of a step; the parent class only counts them."""

    def __init__(self):
        super().__init__()
        self.launches: list[Launch] = []

    def wrap(self, function, part):
        def run(*args: Any, **kwargs: Any) -> Any:
            with recording() as found:
                result = function(*args, **kwargs)
            self.launches += found
            return result

        return run


def small_launches() -> Iterator[tuple[str, Launch]]:
    """Record the launches, in float32, of the models that smoke, tests and conformance decode with."""
    for folder in (EMBEDDED, *sorted((ROOT / "tests" / "golden" / "models").iterdir())):
        spec = read_spec(read_json(folder / "config.json"))
        with (
            mock.patch.dict(step_count.REAL, {folder.name: spec}),
            mock.patch.object(step_count, "DTYPE", torch.float32),
        ):
            for batch in (1, 3):
                setting = Setting(folder.name, batch=batch, **SMALL_SETTING)
                for name, launch in engine_launches(setting):
                    yield f"{name}, {folder.name}", launch


def engine_launches(setting: Setting) -> Iterator[tuple[str, Launch]]:
    """Record the launches of the engine's steps, by policy."""
    for name in NAMES:
        with mock.patch.object(step_count, "Meter", Launches):
            steps = step_count.Steps(setting, "triton", name)
        for kind in kinds(setting, name):
            steps.count(kind)
        for launch in steps._meter.launches:
            yield f"step of {name}", launch


@functools.cache
def launches(source: str, toy: bool) -> list[tuple[str, Launch]]:
    """Record the launches of an operation's cases, or of the engine's steps, each with a name."""
    if source == ENGINE:
        return list(engine_launches(Setting()))
    if source == SMALL:
        return list(small_launches())
    cases = importlib.import_module(f"bench.kernels.test_{source}").cases(toy=toy)
    return list(launches_of(cases, shared_memory(torch.device("cuda" if torch.cuda.is_available() else "meta"))))


def variant(launch: Launch) -> tuple:
    """Return the compilation key of a launch: equal for launches whose arguments select one variant."""
    parameters = {p.name: p for p in launch.kernel.params}
    kinds = ((name, _kind(value, parameters.get(name))) for name, value in launch.arguments.items())
    return launch.kernel.__module__, launch.kernel.__name__, *kinds


def _kind(value: Any, parameter: Any) -> Any:
    if isinstance(value, torch.Tensor):
        free = parameter.do_not_specialize_on_alignment
        return str(value.dtype), free or value.data_ptr() % 16 == 0
    if parameter is None or parameter.is_constexpr or value is None or isinstance(value, (bool, str)):
        return str(value)
    if isinstance(value, int):
        wide = abs(value) >= 2**31
        return wide if parameter.do_not_specialize else (wide, value == 1, value % 16 == 0)
    return type(value).__name__


def jobs_of(source: str, toy: bool) -> dict[tuple, Job]:
    """The first launch of each variant of a source."""
    found: dict[tuple, Job] = {}
    for index, (case, launch) in enumerate(launches(source, toy)):
        kernel = launch.kernel.__name__.strip("_").removesuffix("_kernel")
        found.setdefault(variant(launch), Job(source, index, f"{kernel} {case}"))
    return found


def in_order(found: Iterable[dict[tuple, Job]]) -> list[Job]:
    """Order one job per variant: those that a run needs first, then those that take longest, then the rest."""
    every: dict[tuple, Job] = {}
    for part in found:
        every = part | every

    def place(job: Job) -> tuple[bool, int]:
        later = any(geometry in job.name for geometry in LATER)
        return later, SLOWEST.index(job.source) if job.source in SLOWEST else len(SLOWEST)

    return sorted(every.values(), key=place)


def compile_job(job: Job, toy: bool) -> dict[str, Any]:
    """Compile, and load where there is a GPU."""
    began = time.perf_counter()
    _, launch = launches(job.source, toy)[job.index]
    if not torch.cuda.is_available():
        from triton.runtime.driver import driver

        driver.set_active(CompilingDriver(90))
    compiled = launch.kernel.warmup(grid=launch.grid, **launch.arguments)
    values = {"shared": compiled.metadata.shared}
    if torch.cuda.is_available():
        compiled._init_handles()  # loads it, and builds what launches it
        values |= {"registers": compiled.n_regs, "spills": compiled.n_spills}
    return {"seconds": round(time.perf_counter() - began, 2), **values}


def _start() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    torch.set_num_threads(1)


def main() -> int:
    """A line of the record a variant."""
    os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported, in the processes below
    toy, log = parts.is_toy(), parts.here()
    deadline = min(float(os.environ[DEADLINE]) - parts.SPARE, time.time() + 3600)
    sources = ["norm"] if toy else [SMALL, *operations(), ENGINE]
    processes = max(1, min(MOST_PROCESSES, len(os.sched_getaffinity(0))))
    failed, running = 0, {}
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_start) as pool:
        try:
            listed = pool.map(jobs_of, sources, [toy] * len(sources), timeout=max(1.0, deadline - time.time()))
            running = {pool.submit(compile_job, job, toy): job for job in in_order(listed)}
            print(f"{len(running)} variants, {processes} processes", flush=True)
            for done in as_completed(list(running), timeout=max(1.0, deadline - time.time())):
                job = running.pop(done)
                status, values = parts.attempt(done.result)
                failed += status == "failed"
                log.write("warm-up", status, f"{job.source}: {job.name}", **values)
        except (futures.TimeoutError, BrokenProcessPool) as error:
            crashed = isinstance(error, BrokenProcessPool)
            failed += crashed
            log.write("warm-up", "crashed" if crashed else "late", f"{len(running)} variants")
            for process in list((pool._processes or {}).values()):
                process.kill()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
