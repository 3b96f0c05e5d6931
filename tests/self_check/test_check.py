"""The check of operations and whole steps, with the interpreter as the card and faults put into kernels."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import islice
from typing import NamedTuple

import pytest
import torch

from bench.common.testing import brisk_interpreter
from sfs_triton.decoding.samplers import Threshold
from sfs_triton.kernels.control import COLUMN
from sfs_triton.ops import torch_backend, triton_backend
from sfs_triton.ops.dispatch import Ops, operations
from sfs_triton.self_check import check as checks
from sfs_triton.self_check import steps
from sfs_triton.self_check.check import Request, check
from sfs_triton.self_check.twins import Finding, Twins
from tests.support.check_request import REQUEST, SIZES, SPEC

OF_RANKS = {"lm_head_partials", "merge_partials"}  # tensor parallelism has no CUDA graphs, and so no check
# no layer calls these where others have their work; the host ring shows what ``publish`` wrote
OF_OTHERS = {"linear", "publish", "silu_mul"}


@pytest.fixture(scope="module", autouse=True)
def interpreter():
    with brisk_interpreter(overflow_checks=False):
        yield


def records_of(request: Request) -> list[dict]:
    records: list[dict] = []
    check(request, records.append)
    return records


def faults_of(records: list[dict]) -> list[str]:
    return [f"{r.get('operation', r['record'])}: {r['fault']}" for r in records if r.get("fault") is not None]


def _only(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Compare the operations of only some steps, and no whole steps."""
    every = steps.compared_steps
    monkeypatch.setattr(steps, "compared_steps", lambda spec, sizes: islice(every(spec, sizes), count))
    monkeypatch.setattr(checks, "_check_steps", lambda *_: 0)
    monkeypatch.setattr(checks, "_time_steps", lambda *_: None)


def test_right_kernels_pass():
    """Every operation that an engine on one card can reach is compared; all agree, and both pairs are timed."""
    records = records_of(REQUEST)
    assert not faults_of(records)
    compared = {r["operation"] for r in records if r["record"] == "finding"}
    assert {f.name for f in fields(Ops)} - compared <= OF_RANKS | OF_OTHERS
    times = {r["cache"]: r for r in records if r["record"] == "times"}
    assert times.keys() == {"none", "region"} and all(r["torch"] > 0 and r["triton"] > 0 for r in times.values())
    assert records[-1] == {"record": "end"}


@pytest.mark.parametrize(
    "spec",
    [replace(SPEC, family="dream", qkv_bias=True, shifted=True), replace(SPEC, qk_norm=True, head_size=32)],
    ids=["shifted", "normed heads"],
)
def test_operations_of_other_families_pass(monkeypatch, spec):
    _only(monkeypatch, 1)
    assert not faults_of(records_of(replace(REQUEST, spec=spec)))


@pytest.mark.parametrize("quantization", ["fp8", "int4-64"])
def test_quantised_products_are_compared(monkeypatch, quantization):
    _only(monkeypatch, 1)
    spec = replace(SPEC, d_model=64, mlp=64)  # whole groups of 64
    model = steps.random_model(spec, torch.device("cpu"), torch.float32, quantization, 1)
    assert model.weights.quantization == quantization
    records = records_of(replace(REQUEST, spec=spec, quantization=quantization))
    assert not faults_of(records)
    assert any(r["operation"].startswith("linear") for r in records if r["record"] == "finding")


def test_values_that_mean_nothing_are_not_compared(monkeypatch):
    """Kernels leave the rows of a sequence that is done alone; the twin writes them."""
    decide = triton_backend.decide_block

    def leaves_other_values(state, rules, **kwargs):
        decide(state, rules, **kwargs)
        state.fill.logical_not_()
        state.quota.add_(state.done)
        state.choice_score[-1] = 7.0

    monkeypatch.setattr(triton_backend, "decide_block", leaves_other_values)
    blocks = [each for each in steps.compared_steps(SPEC, SIZES) if isinstance(each.sampler, Threshold)]
    _only(monkeypatch, 0)
    monkeypatch.setattr(
        steps, "compared_steps", lambda spec, _: [replace(each, count=7) for each in blocks if spec is SPEC]
    )
    records = records_of(REQUEST)
    assert not faults_of(records) and "decide_block" in {r["operation"] for r in records if r["record"] == "finding"}


def test_a_token_may_differ_where_logits_are_equal():
    """The head may choose another of equal logits: sums of another order decide. One that is lower is a fault."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 16), torch.randn(20, 16)
    weight[7] = weight[4] = 2 * hidden.sum(0)
    found: list[Finding] = []

    def choosing(token: int) -> Finding:
        def lm_head(hidden, weight, **options):
            logits = hidden @ weight.T
            chosen = torch.full((3,), token, dtype=torch.int32)
            return chosen, logits.softmax(-1)[:, token].float()

        ops = operations("torch", torch.device("cpu"))
        twins = Twins(replace(ops, lm_head=lm_head), ops, set(), lambda *_: None, found.append, False)
        twins.ops().lm_head(hidden, weight)
        return found[-1]

    assert operations("torch", torch.device("cpu")).lm_head(hidden, weight)[0].tolist() == [4, 4, 4]
    assert choosing(4).fault is None and choosing(7).fault is None
    assert "token: row 0 has 5" in choosing(5).fault


def _scaled(function):
    return lambda *args, **kwargs: function(*args, **kwargs) * 1.001


def _other_token(function):
    def wrong(*args, **kwargs):
        token, score = function(*args, **kwargs)
        return (token + 1) % SPEC.vocab_size, score

    return wrong


def _other_score(function):
    def wrong(*args, **kwargs):
        token, score = function(*args, **kwargs)
        return token, score + 0.01

    return wrong


def _one_more_candidate(function):
    def wrong(state, **kwargs):
        function(state, **kwargs)
        state.candidate[0, 0] ^= True
        return state.candidate

    return wrong


def _other_column(function):
    def wrong(state, rules, **kwargs):
        function(state, rules, **kwargs)
        state.control[:, COLUMN["cycle"]] += 1

    return wrong


def _other_list(function):
    def wrong(state, rows, target, count, **kwargs):
        function(state, rows, target, count, **kwargs)
        rows[0, 0] += 1

    return wrong


def _nan(function):
    return lambda *args, **kwargs: function(*args, **kwargs) * float("nan")


def _writes_outside(function):
    def wrong(x, *args, **kwargs):
        result = function(x, *args, **kwargs)
        span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        x.as_strided((1,), (1,), x.storage_offset() + span).fill_(1.0)
        return result

    return wrong


@pytest.mark.parametrize(
    ("operation", "fault", "said"),
    [
        ("attention", _scaled, "error"),
        ("attention", _nan, "NaN"),
        ("lm_head", _other_token, "token: row 0"),
        ("lm_head", _other_score, "score: error"),
        ("mark_candidates", _one_more_candidate, "values differ"),
        ("decide_cycle", _other_column, "control: "),
        ("decide_block", _other_column, "control: "),
        ("list_positions", _other_list, "rows: "),
        ("attention", _writes_outside, "wrote outside a float32 tensor"),
    ],
)
def test_a_wrong_kernel_is_found(monkeypatch, operation, fault, said):
    """The finding names operation and shape; without ``thorough`` no step runs after the one that shows it."""
    monkeypatch.setattr(triton_backend, operation, fault(getattr(triton_backend, operation)))
    records = records_of(REQUEST)
    wrong, *others = [r for r in records if r.get("fault") is not None]
    assert wrong["operation"] == operation and said in wrong["fault"] and "[" in wrong["shape"]
    assert {r["operation"] for r in others} <= {operation}
    assert not any(r["record"] in ("step", "times", "end") for r in records)


def _fails_with(error: Exception):
    def fails(*args, **kwargs):
        raise error

    return fails


def test_a_kernel_that_does_not_fit_or_compile_is_found(monkeypatch):
    """With ``thorough`` the others are compared all the same."""
    from triton.runtime.errors import OutOfResources

    monkeypatch.setattr(triton_backend, "attention", _fails_with(OutOfResources(147456, 101376, "shared memory")))
    monkeypatch.setattr(triton_backend, "compact", _fails_with(RuntimeError("Failed to find C compiler.")))
    _only(monkeypatch, 1)
    records = records_of(replace(REQUEST, thorough=True))
    first = {r["operation"]: r["fault"] for r in records if r.get("fault") is not None}
    assert first.keys() == {"attention", "compact"}
    assert "OutOfResources" in first["attention"] and "101376" in first["attention"]
    assert first["compact"] == "RuntimeError: Failed to find C compiler."
    assert "decide_cycle" in {r["operation"] for r in records if r["record"] == "finding"}


def test_lack_of_memory_is_no_fault_of_a_kernel(monkeypatch):
    monkeypatch.setattr(triton_backend, "attention", _fails_with(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        records_of(REQUEST)


def _unpublished(sources, rings, counter, published):
    counter.add_(1)
    published.copy_(counter)  # the count is raised, the copy is missing


def _drifting():
    """Return an operation that computes something else at each call."""
    calls = iter(range(10**6))

    def drift(x, weight, eps, *, residual=None):
        return torch_backend.rms_norm(x, weight, eps, residual=residual) * (1 + 1e-6 * next(calls))

    return drift


class _Unfit(Exception):
    """An error as Triton's are: not a RuntimeError."""


@pytest.mark.parametrize(
    ("operation", "fault", "said"),
    [
        ("publish", _unpublished, "host ring"),
        ("rms_norm", _drifting(), "two replays of a step differ"),
        ("rms_norm", _fails_with(_Unfit("too large")), "_Unfit: too large"),
    ],
    ids=["unpublished", "drifting", "failing"],
)
def test_wrong_whole_steps_are_found(monkeypatch, operation, fault, said):
    """Faults that no comparison of one operation shows."""
    monkeypatch.setattr(checks, "_check_operations", lambda *_: 0)
    monkeypatch.setattr(triton_backend, operation, fault)
    faults = faults_of(records_of(REQUEST))
    assert len(faults) == 2 and all(said in fault for fault in faults), faults


def test_a_wrong_capture_is_found(monkeypatch):
    """A replay that leaves out the step."""
    monkeypatch.setattr(checks, "_check_operations", lambda *_: 0)
    monkeypatch.setattr(steps, "capture_by", lambda device: lambda runner, shape: runner.ring.publish)
    faults = faults_of(records_of(REQUEST))
    assert faults and "the captured step" in faults[0]


def test_the_choice_of_a_token_does_not_hang_on_rounding():
    """The random model's probabilities are far from 0 and 1, and each token is ahead of the others."""
    model = steps.random_model(SPEC, torch.device("cpu"), torch.float32, None, 2)
    canvas = torch.tensor([steps.canvas_of(SPEC, 8, 8)])
    probabilities = model.logits(canvas).softmax(-1)
    first, second = probabilities.topk(2).values.unbind(-1)
    assert probabilities.argmax(-1).tolist() == ((canvas + 1) % SPEC.vocab_size).tolist()
    assert 0.05 < first.min() and first.max() < 0.9999 and (first / second).min() > 1.1


class _Normed(NamedTuple):
    """A norm whose factors per row are left to the product that takes it."""

    values: torch.Tensor
    squares: torch.Tensor
    eps: float


def test_an_unfinished_result_goes_to_the_operation_that_finishes_it():
    """A kernel gets what another left to it; both are compared as if it were finished."""
    taken: list[type] = []
    x, weight = torch.linspace(-1, 2, 24).view(1, 3, 8), torch.linspace(0.5, 1.5, 8)
    twin = operations("torch", torch.device("cpu"))

    def unfinished(x, weight, eps, *, residual=None):
        return _Normed(x * weight, x.square().sum(-1).view(1, -1), eps)

    def finishing(gate_up):
        taken.append(type(gate_up))
        factor = (gate_up.squares.sum(0) / 8 + gate_up.eps).rsqrt().view(1, 3, 1)
        return twin.silu_mul(gate_up.values * factor)

    found: list[Finding] = []
    ops = replace(twin, rms_norm=unfinished, silu_mul=finishing)
    compared = Twins(ops, twin, set(), lambda *_: None, found.append, False).ops()
    compared.silu_mul(compared.rms_norm(x, weight, 1e-5))
    assert [each.fault for each in found] == [None, None] and taken == [_Normed]


def test_requests_survive_json():
    assert Request.from_json(REQUEST.to_json()) == REQUEST
