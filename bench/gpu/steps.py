"""Steps of a run, in order: the commands and the time limit of each."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ENVIRONMENT = "environment"
WORKERS = 6

PLUGIN = ("-p", "bench.gpu.pytest_lines", "-p", "no:cacheprovider", "-q")
KERNELS = (
    *("lm_head", "confidence", "attention", "norm", "mlp", "rope_cache", "gather"),
    *("mark_candidates", "list_positions", "cycle", "select"),
)
MORE_KERNELS = ("scatter_choices", "publish", "position_ranges", "linear", "dequantise")
# What a run has time for: one geometry, batches of few rows, and no twins that are compiled for minutes.
LEFT_OUT = ("compile", "illada-8b", "dream-7b", "8192", "256x2124", "16x")


@dataclass(frozen=True)
class Step:
    """A step of a run.

    Args:
        commands: started one after another, each after the interpreter.
        least, most: seconds. It gets what steps after it leave of the time, if they get their least.
        stall: seconds without a line or other output after which it counts as hung.
        resumes: started again after it died, it does what is left: its lines say what that is.
        needs: packages without which it is skipped.
    """

    name: str
    does: str
    commands: tuple[tuple[str, ...], ...]
    least: float
    most: float
    stall: float = 60.0
    resumes: bool = True
    needs: tuple[str, ...] = ()
    toy: bool = True  # whether there is something of it that a CPU can show


def _module(name: str) -> tuple[tuple[str, ...], ...]:
    return (("-m", f"bench.gpu.{name}"),)


def parallel_tests() -> tuple[str, ...]:
    return ("-n", str(WORKERS)) if importlib.util.find_spec("xdist") else ()


def _steps() -> tuple[Step, ...]:
    install = ("-m", "pip", "install", "--no-build-isolation", "--no-deps", "--disable-pip-version-check", "-e", ".")
    tests = ("-m", "pytest", *PLUGIN, "-m", "gpu", "tests", *parallel_tests())
    files = [f"bench/kernels/test_{name}.py" for name in (*KERNELS, *MORE_KERNELS)]
    kernels = (
        "-m",
        "pytest",
        *PLUGIN,
        "-k",
        " and ".join(f"not {name}" for name in LEFT_OUT),
        "--benchmark-json={out}.kernels.json",
        *files,
    )
    pytest = ("pytest", "hypothesis", "filelock")
    return (
        Step("install", "the checkout, as it is, into this Python", (install,), 10, 60, resumes=False, toy=False),
        Step(ENVIRONMENT, "GPU, driver, versions, clocks", _module("environment"), 15, 45),
        Step("warm-up", "compile and load every kernel, many at a time", _module("warm_up"), 40, 120, stall=120),
        Step("smoke", "one shape of every kernel; the embedded model by every execution", _module("smoke"), 35, 90),
        Step("sync", "calls, copies and waits of a generation", _module("generation"), 20, 60),
        Step("engine", "the engine's steps and generations at 8B, beside the prediction", _module("engine"), 90, 170),
        Step("baseline", "cuBLAS and SDPA under plain graphs at 8B; ceilings", _module("baseline"), 35, 75),
        Step("faults", "faults, threads, modes, memory, a card of 24 GB", _module("faults"), 25, 75, stall=100),
        # six workers may compile inside a test that has many examples, without a line for so long
        Step("tests", "pytest -m gpu", (tests,), 50, 120, stall=150, needs=pytest, toy=False),
        Step("conformance", "recorded cases through the kernels", _module("conformance"), 20, 60),
        Step("throughput", "generations at 8B by every sampler, policy and execution", _module("throughput"), 40, 90),
        Step("kernels", "every kernel, checked and timed", (kernels,), 50, 240, needs=("pytest_benchmark",), toy=False),
    )


STEPS = _steps()


def missing(step: Step) -> list[str]:
    """List the packages that a step needs and this Python lacks."""
    return [name for name in step.needs if importlib.util.find_spec(name) is None]


def allotted(step: Step, later: Sequence[Step], left: float) -> float:
    """Allot seconds to a step: the remaining time less the least that later steps need, within bounds.

    Where time is short, steps get what they need in their order; 0 where that is not half of what this one needs.
    """
    spare = left - sum(other.least for other in later)
    seconds = min(step.most, max(step.least, spare), left)
    return seconds if seconds >= step.least / 2 else 0.0


def interpreted(command: Sequence[str], out: Path) -> list[str]:
    """A command as it is started."""
    return [sys.executable, *(part.replace("{out}", str(out.with_suffix(""))) for part in command)]
