"""Kernel benchmarks: each case's implementations, first compared with the torch twin, then timed.

A file needs ``cases(toy=False)`` and the line ``test_norm = benchmark_of(cases)``. On a GPU the cases are of real size;
elsewhere they are toys for Triton's interpreter, whose times say nothing about a GPU and are marked so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
import triton

from bench.common.figures import machine, percentile
from bench.common.testing import assert_within_budget
from sfs_triton.kernels.cost import Cost

from .case import Case
from .structure import leaves, with_tensors
from .timing import Ceilings, Stopwatch, Timing

# How far floats may be off beyond torch's error in the same dtype, as a share of the largest value: float32 sums in
# another order differ by as much.
TOLERANCE = 1e-5


class Clock:
    """A clock that is moved by hand, so that pytest-benchmark's rounds last as long as the samples that were taken."""

    __name__ = "gpu_or_wall_clock"

    def __init__(self):
        self._now = 0.0

    def __call__(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        self._now += seconds


CLOCK = Clock()
RECORDS: list[dict[str, Any]] = []  # of this session, for the summary at its end


def implementations(case: Case, *, toy: bool) -> list[str]:
    """Name the implementations to compare; the twin is compiled only on a GPU."""
    return ["triton", "torch", *([] if toy else ["compile"]), *case.libraries]


def implementation_of(case: Case, name: str) -> Callable[..., Any]:
    if name == "compile":
        torch.compiler.reset()  # else each case counts as a recompilation, and after a few the twin runs uncompiled
        return torch.compile(case.twin, dynamic=False)
    return {"triton": case.kernel, "torch": case.twin, **case.libraries}[name]


def benchmark_of(cases: Callable[..., list[Case]]) -> Callable[..., None]:
    """A pytest function that checks and times every implementation of every case."""
    operation = cases.__module__.rpartition("test_")[2]
    toy = not torch.cuda.is_available()
    by_name = {case.name: case for case in cases(toy=toy)}
    rows = [
        pytest.param(name, other, marks=pytest.mark.benchmark(timer=CLOCK, group=f"{operation} {name}"))
        for name, case in by_name.items()
        for other in implementations(case, toy=toy)
    ]

    @pytest.mark.parametrize(("case", "implementation"), rows)
    def run(benchmark, stopwatch: Stopwatch, case: str, implementation: str) -> None:
        about = {"operation": operation, "case": case, "implementation": implementation}
        benchmark.extra_info |= about | measure(by_name[case], implementation, stopwatch)
        RECORDS.append(benchmark.extra_info)
        report(benchmark, benchmark.extra_info.pop("samples"))

    return run


def measure(case: Case, implementation: str, stopwatch: Stopwatch) -> dict[str, Any]:
    """Check and time an implementation.

    Raises:
        AssertionError: its result is wrong, and no time is taken.
    """
    if stopwatch.capability < case.min_capability:
        pytest.skip(f"needs sm_{case.min_capability}")
    function = implementation_of(case, implementation)
    torch.manual_seed(0)
    arguments = case.build(stopwatch.device)
    changed = check(case, function, arguments)
    timing = stopwatch(function, arguments, changed, case.cost)
    return {"samples": timing.samples} | describe(case, arguments, timing, stopwatch.ceilings, stopwatch.device)


def report(benchmark, samples: list[float]) -> None:
    """Hand samples to pytest-benchmark, a round each."""
    left: Iterator[float] = iter(samples)
    benchmark.pedantic(lambda: CLOCK.advance(next(left)), rounds=len(samples))


def _wider(x: torch.Tensor) -> torch.Tensor:
    return x.to({torch.float32: torch.float64, torch.float16: torch.float32, torch.bfloat16: torch.float32}[x.dtype])


def truth_of(case: Case, arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Run the twin on ``arguments`` in float32, or in float64 where nothing is narrower; by :func:`leaves`."""
    narrow = {x.dtype for x in leaves(arguments).values()} & {torch.float16, torch.bfloat16} or {torch.float32}
    wide = with_tensors(arguments, lambda x: _wider(x) if x.dtype in narrow else x.clone())
    return leaves({"result": case.twin(**wide), **wide})


def check(case: Case, function: Callable[..., Any], arguments: dict[str, Any]) -> set[str]:
    """Compare ``function`` with the twin: what it returns, and what both make of their arguments.

    Floats may err as much as the twin does in the same dtype, integers are those of the twin in the same dtype or in a
    wider one. ``arguments`` stay as they are; the names of those that the call changes in place are returned.

    Raises:
        AssertionError: a result is wrong; it names the tensor.
    """
    mine_in, same_in = deepcopy(arguments), deepcopy(arguments)
    mine = leaves({"result": function(**mine_in), **mine_in})
    same = leaves({"result": case.twin(**same_in), **same_in})
    truth = truth_of(case, arguments)
    assert mine.keys() == same.keys(), f"returns {sorted(mine)}, the twin {sorted(same)}"
    for name, x in mine.items():
        try:
            compare(x, truth[name], same[name])
        except AssertionError as error:
            raise AssertionError(f"{case.name}: {name} is not what the twin computes: {error}") from None
    before = leaves(arguments)
    return {name for name, x in before.items() if not _equal(x, mine[name])}


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def compare(actual: torch.Tensor, truth: torch.Tensor, same: torch.Tensor) -> None:
    """Raise AssertionError unless ``actual`` is within the budget (floats) or is one of the others (integers)."""
    if actual.is_floating_point() and actual.dtype.itemsize > 1:
        assert_within_budget(actual, truth, same, tolerance=TOLERANCE)
        return
    is_, wanted = describe_tensor(actual), describe_tensor(same)
    assert is_ == wanted, f"{is_}, not {wanted}"
    if actual.is_floating_point():  # fp8: stored, never computed
        actual, truth, same = (x.view(torch.uint8) for x in (actual, truth, same))
    wrong = ~((actual == same) | (actual == truth.to(actual.dtype)))
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} values differ"


def describe_tensor(x: torch.Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"


def describe(
    case: Case, arguments: dict[str, Any], timing: Timing, ceilings: Ceilings | None, device: torch.device
) -> dict[str, Any]:
    """The record of a timed case. Rates are None where there are no ceilings to hold them against, as on a CPU."""
    p20, p50, p80 = (percentile(timing.samples, share) for share in (0.2, 0.5, 0.8))
    return {
        "toy": device.type == "cpu",
        "tensors": {name: describe_tensor(x) for name, x in leaves(arguments).items()},
        "p20_us": 1e6 * p20,
        "p50_us": 1e6 * p50,
        "p80_us": 1e6 * p80,
        "timed_by": timing.method,
        "launches_per_sample": timing.launches,
        "l2": timing.l2,
        "bytes": case.cost.bytes,
        "flops": case.cost.flops,
        **rates(case.cost, p50, ceilings),
        **machine(device),
        "triton": triton.__version__,
    }


def rates(cost: Cost, seconds: float, ceilings: Ceilings | None) -> dict[str, Any]:
    """GB/s of the bytes that had to move, TFLOP/s, and the share of the roofline."""
    if ceilings is None:
        return dict.fromkeys(("gb_per_s", "tflops", "roofline_share", "copy_gb_per_s", "matmul_tflops"))
    return {
        "gb_per_s": cost.bytes / seconds / 1e9,
        "tflops": cost.flops / seconds / 1e12,
        "roofline_share": cost.floor(*ceilings) / seconds,
        "copy_gb_per_s": ceilings.bytes_per_second / 1e9,
        "matmul_tflops": ceilings.flops_per_second / 1e12,
    }


def summary(records: list[dict[str, Any]]) -> list[str]:
    """Lines for the terminal. Toy times are not repeated there."""
    lines = []
    for r in records:
        if r["toy"]:
            continue
        name = f"{r['operation']} {r['case']} {r['implementation']}"
        times = "/".join(f"{r[key]:.1f}" for key in ("p20_us", "p50_us", "p80_us"))
        rate = f"{r['gb_per_s']:7.0f} GB/s {r['roofline_share']:6.1%} of the roofline"
        lines.append(f"{name:60} {times:>24} us {rate}  {r['timed_by']}, L2 {r['l2']}")
    return lines
