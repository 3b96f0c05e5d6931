"""Every sampler with every cache policy that it goes with, the executions, and the criterion of equality."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace

import pytest
import torch
from _pytest.mark.structures import ParameterSet

import sfs_triton
from sfs_triton import (
    KLASS,
    ArgumentError,
    Credit,
    DelayedCache,
    DualCache,
    Engine,
    FixedSteps,
    Generation,
    MultiBlock,
    NoCache,
    PrefixCache,
    RefreshCache,
    RegionCache,
    SlowFast,
    Threshold,
)
from sfs_triton.decoding.caching import CachePolicy
from sfs_triton.decoding.step_plan import Forward
from sfs_triton.runner import CudaGraphs, Eager, Execution, ModelRunner

PROMPTS = [
    [3, 14, 15, 92, 65, 35, 89, 79, 32, 38],
    [3, 14, 15, 92, 120, 120, 120, 120, 120, 120, 120, 120, 120],
    [200, 201, 202],
]
LENGTHS = [24, 8, 32]
RAGGED = {"prompts": PROMPTS, "gen_length": LENGTHS, "seed": [5, 6, 7]}

SAMPLERS = {
    "paper": SlowFast(),
    "llada-reference": SlowFast.preset("llada-reference", block_length=8),
    "dream-reference": SlowFast.preset("dream-reference"),
    "threshold": Threshold(block_length=8),
    "factor": Threshold(factor=1.0, sigma=3.0, block_length=8),
    "paced": Threshold(block_length=None, steps=8),
    "fixed": FixedSteps(steps=8),
    "fixed-blocks": FixedSteps(steps=8, block_length=8),
    "entropy": FixedSteps(steps=8, metric="entropy", block_length=8),
    "maskgit": FixedSteps(steps=8, metric="maskgit_plus"),
    "margin": FixedSteps(steps=8, metric="topk_margin"),
    "origin": FixedSteps(steps=8, metric="origin"),
    "credit": Credit(tau=0.5, weight=2.0, block_length=8),
    "klass": KLASS(tau=0.1, divergence=0.5, history=1, block_length=8),
    "open": MultiBlock(entropy=1.5, open_at=0.5, block_length=4),
}
# Which positions dLLM-Cache refreshes in between is decided by rounding (golden/README.md) unless it is none or all.
POLICIES = {
    "none": NoCache(),
    "prefix": PrefixCache(),
    "dual": DualCache(),
    "delayed": DelayedCache(delay=1, refresh_every=5),
    "refresh": RefreshCache(3, 2, 0.0),
    "region": RegionCache(capacity=24, refresh_every=5),
    "region-ahead": RegionCache(capacity=12, span_cap=8, look_ahead=4, rotate=False),
}


def goes_with(sampler: sfs_triton.Sampler, policy: CachePolicy) -> bool:
    try:
        sampler.check_cache(policy)
        sampler.rules(**policy.rules)
    except ArgumentError:
        return False
    return True


PAIRS = [(s, p) for s in SAMPLERS for p in POLICIES if goes_with(SAMPLERS[s], POLICIES[p])]
EVERY_PAIR = [pytest.param(SAMPLERS[s], POLICIES[p], id=f"{s}-{p}") for s, p in PAIRS]
# one that has stages and one that has blocks with each policy
SOME_PAIRS = [
    pytest.param(SAMPLERS[s], POLICIES[p], id=f"{s}-{p}")
    for s, p in PAIRS
    if s == "fixed-blocks" or s == {"none": "dream-reference", "delayed": "open"}.get(p, "paper")
]


def pairwise(cases: Sequence, others: Iterable[str]) -> list:
    """Return cases, each with one of ``others``: as few as hold every pair of values that the full product holds."""
    product = [(case, other) for case in cases for other in others]

    def pairs_of(each: tuple) -> set[frozenset]:
        case, other = each
        return {frozenset(pair) for pair in itertools.combinations((*enumerate(case.values), ("other", other)), 2)}

    missing, chosen = set().union(*map(pairs_of, product)), []
    while missing:
        best = max(product, key=lambda each: len(pairs_of(each) & missing))
        missing -= pairs_of(best)
        chosen.append(best)
    return [pytest.param(*case.values, other, id=f"{case.id}-{other}") for case, other in chosen]


def some_of_every(cases: Sequence) -> list:
    """Return cases: a few that hold each value at least once, and the others, marked slow."""
    missing, chosen = {value for case in cases for value in enumerate(case.values)}, []
    while missing:
        chosen.append(max(cases, key=lambda case: len(missing.intersection(enumerate(case.values)))))
        missing.difference_update(enumerate(chosen[-1].values))
    return [
        case if case in chosen else pytest.param(*case.values, id=case.id, marks=pytest.mark.slow) for case in cases
    ]


def few_of(*sets: Iterable) -> list:
    """Return the product of ``sets``, marked slow but for as few tests as hold each element of each set.

    An element may be a case with values of its own.
    """
    sets = [list(one) for one in sets]
    few = {tuple(i % len(one) for one in sets) for i in range(max(map(len, sets)))}
    found = []
    for at in itertools.product(*(range(len(one)) for one in sets)):
        parts = [one[i] for i, one in zip(at, sets, strict=True)]
        cases = [part if isinstance(part, ParameterSet) else pytest.param(part) for part in parts]
        named = any(case.id for case in cases)
        found.append(
            pytest.param(
                *itertools.chain.from_iterable(case.values for case in cases),
                id="-".join(case.id or str(*case.values) for case in cases) if named else None,
                marks=() if at in few else pytest.mark.slow,
            )
        )
    return found


def by_pairs(*axes: Iterable) -> list:
    """Return the product of ``axes``: a few tests that hold every pair of values, and the others, marked slow."""
    product = list(itertools.product(*axes))
    pairs = [set(itertools.combinations(enumerate(map(str, values)), 2)) for values in product]
    missing, chosen = set().union(*pairs), set()
    while missing:
        best = max(range(len(product)), key=lambda index: len(pairs[index] & missing))
        missing -= pairs[best]
        chosen.add(best)
    return [
        pytest.param(*values, marks=() if index in chosen else pytest.mark.slow) for index, values in enumerate(product)
    ]


def stand_in(runner: ModelRunner, shape: Forward) -> Callable[[], None]:
    """Replace a graph on a GPU: replay by running the step."""
    return lambda: runner.run_padded(shape)


class Roomy:
    """An execution whose canvases are longer than they need to be."""

    def __init__(self, execution: Execution, more: int):
        self._execution, self._more = execution, more

    def __getattr__(self, name: str):
        return getattr(self._execution, name)

    def canvas_length(self, longest: int, most: int) -> int:
        return min(longest + self._more, most)


class Failing(CudaGraphs):
    """Graphs that raise ``error``: at the first capture if ``at`` is None, else at that replay, counted from 0."""

    def __init__(self, at: int | None, error: Exception | None = None):
        super().__init__(ahead=1, capture=self._make)
        self._at, self._replayed, self._error = at, 0, error or RuntimeError("CUDA error: an illegal address")

    def _make(self, runner: ModelRunner, shape: Forward) -> Callable[[], None]:
        if self._at is None:
            raise self._error
        run = stand_in(runner, shape)

        def replay() -> None:
            if self._replayed == self._at:
                raise self._error
            self._replayed += 1
            run()

        return replay


EXECUTIONS: dict[str, Callable[[], Execution]] = {
    "exact": lambda: Eager(exact=True),
    "padded": lambda: Eager(exact=False),
    "graphs": lambda: CudaGraphs(capture=stand_in),
}


def engine_with(engine: Engine, execution: Execution | str = "exact") -> Engine:
    """An engine of its own on the same model, with this execution."""
    mine = Engine(engine.model, engine.text)
    mine._execution.current = EXECUTIONS[execution]() if isinstance(execution, str) else execution
    return mine


def assert_same(mine: Sequence[Generation] | Generation, wanted: Sequence[Generation] | Generation) -> None:
    """Compare all but the time taken; confidences and probabilities to the tolerance of another order of summation."""
    if isinstance(wanted, Generation):
        mine, wanted = [mine], [wanted]
    for index, (one, other) in enumerate(zip(mine, wanted, strict=True)):
        for name in {field.name for field in fields(Generation)} - {"seconds", "trace", "probabilities"}:
            assert getattr(one, name) == getattr(other, name), f"sequence {index}: {name}"
        _assert_close(one.probabilities or [], other.probabilities or [])
        assert (one.trace is None) == (other.trace is None)
        for step, same in zip(one.trace or [], other.trace or [], strict=True):
            assert replace(step, confidence=[]) == replace(same, confidence=[]), f"sequence {index}: step {same.step}"
            _assert_close(step.confidence, same.confidence)


def _assert_close(mine: Sequence[float | None], wanted: Sequence[float | None]) -> None:
    found, there = ([float("nan") if c is None else c for c in values] for values in (mine, wanted))
    torch.testing.assert_close(found, there, rtol=0, atol=1e-4, equal_nan=True)
