"""The kernel benchmarks' machinery, and every benchmark's kernels at toy sizes against their twins."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from bench.common.figures import percentile  # noqa: E402
from bench.kernels import harness, timing  # noqa: E402
from bench.kernels.case import Case  # noqa: E402
from bench.kernels.resources import operations  # noqa: E402
from bench.kernels.structure import leaves, with_tensors  # noqa: E402
from sfs_triton.kernels.cost import Cost  # noqa: E402
from tests.support.paths import ROOT  # noqa: E402

CPU = torch.device("cpu")
CEILINGS = timing.Ceilings(bytes_per_second=4e12, flops_per_second=8e14)


@dataclass(slots=True)
class State:
    count: torch.Tensor
    name: str = "x"


def _add(x: torch.Tensor, state: State) -> tuple[torch.Tensor, torch.Tensor]:
    """Float result, integer result, and a state that is changed in place."""
    state.count += 1
    return x + x, state.count * 2


def _build(device: torch.device) -> dict:
    count = torch.arange(4, device=device)
    return {"x": torch.randn(8, 6, device=device)[:, :4], "state": State(count)}


CASE = Case("sum", _add, _add, _build, Cost(bytes=8_000_000, flops=4_000_000))


def _modules() -> list:
    return [importlib.import_module(f"bench.kernels.test_{operation}") for operation in operations()]


def _toys() -> list:
    return [pytest.param(case, id=f"{m.__name__[19:]}-{case.name}") for m in _modules() for case in m.cases(toy=True)]


@pytest.mark.parametrize("case", _toys())
def test_toy_cases_equal_their_twins(case):
    torch.manual_seed(0)
    arguments = case.build(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for name in harness.implementations(case, toy=True):
        harness.check(case, harness.implementation_of(case, name), arguments)


@pytest.mark.parametrize("module", _modules(), ids=lambda module: module.__name__.rpartition(".")[2])
def test_every_file_has_cases_and_a_benchmark(module):
    for cases in (module.cases(), module.cases(toy=True)):
        names = [case.name for case in cases]
        assert names and len(set(names)) == len(names)
        assert all(case.cost.bytes > 0 and case.cost.flops >= 0 for case in cases)
    assert callable(getattr(module, module.__name__.rpartition(".")[2]))
    assert all(case.name.startswith("toy") for case in module.cases(toy=True))


def test_leaves_of_a_structure():
    x, y, z = torch.zeros(1), torch.ones(2), torch.ones(3)
    value = {"a": x, "b": [y, 5, None], "state": State(z)}
    assert {name: len(leaf) for name, leaf in leaves(value).items()} == {"a": 1, "b.0": 2, "state.count": 3}
    changed = with_tensors(value, lambda leaf: leaf + 1)
    assert [leaf.sum() for leaf in leaves(changed).values()] == [1, 4, 6] and changed["b"][1:] == [5, None]
    assert x.sum() == 0 and leaves(x) == {"": x}


def test_check_finds_what_a_call_changes():
    arguments = _build(CPU)
    before = arguments["state"].count.clone()
    assert harness.check(CASE, _add, arguments) == {"state.count"}
    assert torch.equal(arguments["state"].count, before)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (lambda x, state: (_add(x, state)[0] * 1.01, state.count * 2), "result.0"),
        (lambda x, state: (_add(x, state)[0], state.count), "result.1"),
        (lambda x, state: (x + x, (state.count + 1) * 2), "state.count"),
        (lambda x, state: (_add(x, state)[0].double(), state.count * 2), "result.0"),
        (lambda x, state: (_add(x, state)[0], (state.count * 2).int()), "result.1"),
        (lambda x, state: (_add(x, state)[0] * float("nan"), state.count * 2), "result.0"),
        (lambda x, state: _add(x, state)[0], "returns"),
    ],
    ids=["float", "integer", "in place", "dtype", "integer dtype", "nan", "structure"],
)
def test_wrong_results_are_never_timed(wrong, named):
    def stopwatch(*_):
        raise RuntimeError("was timed")

    stopwatch.device, stopwatch.capability = CPU, 90
    with pytest.raises(AssertionError, match=named):
        harness.measure(replace(CASE, kernel=wrong), "triton", stopwatch)


def test_half_precision_may_err_as_torch_does():
    def build(device):
        return {"x": torch.randn(64, device=device).half()}

    case = Case("square", None, lambda x: (x * 3).sin(), build, Cost(1, 1))
    x = build(CPU)
    assert harness.check(case, lambda x: (x.float() * 3).sin().half(), x) == set()
    with pytest.raises(AssertionError):
        harness.check(case, lambda x: ((x.float() * 3).sin() + 0.01).half(), x)


def test_integers_are_those_of_either_precision():
    """A token may be the one that torch finds in the same dtype or in a wider one: rounding can make a tie."""
    either = harness.compare
    either(torch.tensor([1, 2]), truth=torch.tensor([1, 5]), same=torch.tensor([7, 2]))
    with pytest.raises(AssertionError, match="1 of 2 values differ"):
        either(torch.tensor([1, 3]), truth=torch.tensor([1, 5]), same=torch.tensor([7, 2]))


def test_copies_give_each_call_what_it_changes():
    arguments = _build(CPU)
    own = timing.Copies(arguments, {"state.count"}, 3, shared=False)
    shared = timing.Copies(arguments, {"state.count"}, 3, shared=True)
    assert len({each["x"].data_ptr() for each in own.all}) == 3
    assert {each["x"].data_ptr() for each in shared.all} == {arguments["x"].data_ptr()}
    assert own.all[1]["x"].stride() == arguments["x"].stride() == (6, 1)
    for copies in (own, shared):
        counts = [each["state"].count for each in copies.all]
        assert len({count.data_ptr() for count in counts} | {arguments["state"].count.data_ptr()}) == 4
        for each in copies.all:
            _add(**each)
        assert all(count.tolist() == [1, 2, 3, 4] for count in counts)
        copies.restore()
        assert all(count.tolist() == [0, 1, 2, 3] for count in counts)


def test_percentiles():
    assert percentile([5.0], 0.2) == 5.0
    assert percentile([4.0, 1.0, 3.0, 2.0, 5.0], 0.5) == 3.0
    assert percentile([0.0, 10.0], 0.2) == pytest.approx(2.0)


def test_l2_state():
    memory, arithmetic = Cost(bytes=4_000, flops=8_000), Cost(bytes=4_000, flops=8_000_000)
    assert (
        timing.l2_state(memory, CEILINGS, "auto") == "cold" and timing.l2_state(arithmetic, CEILINGS, "auto") == "warm"
    )
    assert (
        timing.l2_state(memory, CEILINGS, "warm") == "warm" and timing.l2_state(arithmetic, CEILINGS, "cold") == "cold"
    )
    with pytest.raises(ValueError, match="SFS_TRITON_L2='hot'"):
        timing.l2_state(memory, CEILINGS, "hot")


def test_launches_in_a_replay():
    assert timing.launches_for(5e-6, 1_000, 10**11) == 256
    assert timing.launches_for(20e-6, 1_000, 10**11) == 100
    assert timing.launches_for(20e-6, 10**9, 10**11) == 50
    assert timing.launches_for(3e-3, 1_000, 10**11) == 1
    assert timing.launches_for(20e-6, 10**11, 10**11) == 1
    assert timing.launches_for(20e-6, 0, 10**11) == 100


def test_rates():
    cost = Cost(bytes=8_000_000, flops=4_000_000)
    rates = harness.rates(cost, 4e-6, CEILINGS)
    assert rates["gb_per_s"] == pytest.approx(2000) and rates["tflops"] == pytest.approx(1)
    assert rates["roofline_share"] == pytest.approx(0.5) and rates["copy_gb_per_s"] == 4000
    assert harness.rates(Cost(bytes=8, flops=4_000_000_000), 1e-5, CEILINGS)["roofline_share"] == pytest.approx(0.5)
    assert set(harness.rates(cost, 4e-6, None).values()) == {None}


def test_a_toy_record_names_no_rate():
    record = harness.measure(CASE, "torch", timing.Stopwatch(CPU))
    assert record["toy"] and record["gb_per_s"] is None and record["roofline_share"] is None and record["gpu"] is None
    assert record["p20_us"] <= record["p50_us"] <= record["p80_us"] and len(record["samples"]) == timing.TOY_SAMPLES
    assert record["tensors"] == {"x": "float32[8, 4]", "state.count": "int64[4]"}
    assert {"torch", "triton", "commit", "bytes", "flops"} <= record.keys()
    about = {"operation": "op", "case": "a", "implementation": "triton"}
    assert harness.summary([about | record]) == []


def test_summary_of_what_was_measured():
    about = {"operation": "norm", "case": "llada-8b-128", "implementation": "triton", "toy": False}
    record = harness.describe(
        CASE, _build(CPU), timing.Timing([4e-6, 4e-6], "graph replay", 100, "cold"), CEILINGS, CPU
    )
    (line,) = harness.summary([record | about])
    assert line.split() == (
        "norm llada-8b-128 triton 4.0/4.0/4.0 us 2000 GB/s 50.0% of the roofline graph replay, L2 cold".split()
    )


def test_twins_are_compiled_on_a_gpu_only():
    case = replace(CASE, libraries={"other": _add})
    assert harness.implementations(case, toy=True) == ["triton", "torch", "other"]
    assert harness.implementations(case, toy=False) == ["triton", "torch", "compile", "other"]
    assert harness.implementation_of(case, "other") is _add


def test_samples_become_rounds():
    class Benchmark:
        def pedantic(self, target, rounds):
            marks = [harness.CLOCK()]
            for _ in range(rounds):
                target()
                marks.append(harness.CLOCK())
            self.rounds = [end - start for start, end in zip(marks, marks[1:], strict=False)]

    benchmark = Benchmark()
    harness.report(benchmark, [1.0, 2.0, 4.0])
    assert benchmark.rounds == [1.0, 2.0, 4.0]


@pytest.mark.gpu
@pytest.mark.parametrize("l2", ["cold", "warm"])
def test_gpu_clock(l2):
    device = torch.device("cuda")
    source = torch.randn(1 << 24, device=device)
    arguments = {"x": source, "y": torch.zeros_like(source)}
    taken = timing.gpu_clock(lambda x, y: y.add_(x), arguments, {"y"}, device=device, l2=l2)
    assert taken.method == "graph replay" and taken.launches > 1 and len(taken.samples) == timing.SAMPLES
    assert 1e-6 < percentile(taken.samples, 0.5) < 1e-3 and not arguments["y"].any()
    waits = timing.gpu_clock(lambda x, y: x.sum().item(), arguments, set(), device=device, l2=l2)
    assert waits.method == "events" and waits.launches == 1


def _pytest(*arguments: str | Path) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(torch.cuda.is_available(), reason="toy sizes are for machines without a GPU")
def test_as_a_pytest_benchmark(tmp_path):
    out = tmp_path / "norm.json"
    done = _pytest("bench/kernels/test_norm.py", f"--benchmark-json={out}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "say nothing about a GPU" in done.stdout
    rows = json.loads(out.read_text())["benchmarks"]
    assert {row["params"]["implementation"] for row in rows} == {"triton", "torch"}
    for row in rows:
        info = row["extra_info"]
        assert info["toy"] and info["gb_per_s"] is None and info["timed_by"] == "wall clock"
        assert row["group"] == f"norm {info['case']}"
        assert row["stats"]["median"] * 1e6 == pytest.approx(info["p50_us"])
