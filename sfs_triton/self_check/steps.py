"""Steps of a model with random weights at the geometry of the one to load: what the check runs, compares and times."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, fields, replace
from itertools import islice
from statistics import median

import torch

from ..decoding.caching import BatchBounds, CachePolicy, DualCache, NoCache, RefreshCache, RegionCache
from ..decoding.params import BatchKey
from ..decoding.samplers import FixedSteps, Sampler, SlowFast, Threshold
from ..decoding.step_plan import Forward
from ..kernels.control import COLUMN, SAMPLING_COLUMN
from ..models import ModelSpec, Transformer, Weights
from ..models.weights import HEADS, LayerWeights
from ..ops.dispatch import GROUPS, Matrix, Quantised, quantize
from ..runner import CudaGraphs, Eager, Execution, ModelRunner
from ..runner.cuda_graph import capture_graph, capturing
from ..runner.state import DecodeState
from ..scheduling.planner import StepPlanner

STEP_LIMIT = 30.0  # seconds
SHARED_LAYERS = 2  # of the model whose operations and steps are compared; the timed one has them all


@dataclass(frozen=True)
class Sizes:
    """Sizes of the steps that the check runs. The default is for a card; a CPU's interpreter needs less."""

    rows: tuple[int, ...] = (16, 64, 128)  # positions per step of ``region``
    canvas: int = 1024  # of the step that covers a whole one
    timed_canvas: int = 256
    warm_up: int = 5
    repeats: int = 20


@dataclass(frozen=True)
class Steps:
    """Some steps of a batch: what to run, and how many of it."""

    sampler: Sampler
    cache: CachePolicy
    canvases: tuple[tuple[int, int], ...]  # prompt and response of each
    count: int


def random_model(
    spec: ModelSpec, device: torch.device, dtype: torch.dtype, quantization: str | None, layers: int
) -> Transformer:
    """Make a model whose layers all hold the same random weights, so that its size is that of one layer and the head.

    Each token predicts the next id with a probability well between 0 and 1, which layers move: so the choice of a token
    does not hang on rounding, its score shows what layers do, and both stages of a sampler occur.
    """
    generator = torch.Generator(device).manual_seed(0)

    def matrix(rows: int, columns: int, size: float) -> torch.Tensor:
        out = torch.empty((rows, columns), device=device, dtype=dtype)
        return out.normal_(0.0, size, generator=generator)

    def stored(weight: torch.Tensor, form: str | None = quantization) -> Matrix:
        if form is None or weight.shape[1] % GROUPS.get(form, 1):  # no whole groups, which are refused on loading
            return weight
        return Quantised(*quantize(weight, form))

    def gain(size: int = spec.d_model) -> torch.Tensor:
        return torch.empty(size, device=device, dtype=dtype).uniform_(0.5, 1.5, generator=generator)

    qkv = spec.q_width + 2 * spec.kv_width
    layer = LayerWeights(
        attn_norm=gain(),
        qkv=stored(matrix(qkv, spec.d_model, spec.d_model**-0.5)),
        qkv_bias=matrix(1, qkv, 0.1)[0] if spec.qkv_bias else None,
        out=stored(matrix(spec.d_model, spec.q_width, spec.q_width**-0.5 / layers)),
        mlp_norm=gain(),
        gate_up=stored(matrix(2 * spec.mlp, spec.d_model, spec.d_model**-0.5)),
        down=stored(matrix(spec.d_model, spec.mlp, spec.mlp**-0.5 / layers)),
        q_norm=gain(spec.head_dim) if spec.qk_norm else None,
        k_norm=gain(spec.head_dim) if spec.qk_norm else None,
    )
    embedding = matrix(spec.vocab_size, spec.d_model, 1.0)
    # a hidden state points along its token's embedding by about 0.8 of its length, and along others' by 1 / sqrt(d)
    logit = 1.25 * (math.log(spec.vocab_size) + 1) * (1 + 3 * spec.d_model**-0.5)
    head = stored(embedding.roll(1, 0).mul_(logit / spec.d_model), HEADS.get(quantization, quantization))
    return Transformer(spec, Weights(embedding, (layer,) * layers, gain(), head), "torch")


def memory_of(weights: Weights) -> set[int]:
    """Return the addresses of all memory that weights occupy."""
    found: set[int] = set()

    def visit(value: object) -> None:
        if isinstance(value, torch.Tensor):
            found.add(value.untyped_storage().data_ptr())
        elif isinstance(value, tuple):
            for each in value:
                visit(each)
        elif isinstance(value, (LayerWeights, Quantised)):
            for field in fields(value):
                visit(getattr(value, field.name))

    visit((weights.embedding, weights.layers, weights.norm, weights.head))
    return found


def odd(spec: ModelSpec) -> ModelSpec:
    """Return a small model of the same kind whose sizes are no multiples of a kernel's blocks."""
    group = spec.n_heads // spec.n_kv_heads
    heads = {"n_heads": group, "n_kv_heads": 1, "d_model": group * spec.head_dim}
    ids = {"vocab_size": 1009, "mask_id": 1008, "eos_id": 1007, "pad_id": 1007, "bos_id": None}
    return replace(spec, n_layers=1, mlp=208, **heads, **ids)


def compared_steps(spec: ModelSpec, sizes: Sizes) -> Iterator[Steps]:
    """Yield the steps whose operations are compared: together they call each operation that a user can reach."""
    most = min(sizes.canvas, spec.max_length)
    for rows in sizes.rows:
        length = most if rows == sizes.rows[-1] else min(2 * rows + 9, most)
        here = ((length // 2, length - length // 2),)
        yield Steps(SlowFast(), RegionCache(capacity=rows, span_cap=max(1, rows // 2)), here, 4)
    length = min(sizes.rows[0] + 21, most)
    ragged = ((length // 3, length // 2), (length // 2, length - length // 2), (3, length // 3))
    yield Steps(SlowFast(), NoCache(), ragged[:1], 5)
    yield Steps(SlowFast(temperature=0.7), RegionCache(capacity=sizes.rows[0], look_ahead=3), ragged, 3)
    yield Steps(Threshold(block_length=8), DualCache(), ragged, 3)
    yield Steps(FixedSteps(steps=4, metric="entropy"), NoCache(), ragged, 2)
    # all rows, some of the response, the response, the prompt and some of the response
    yield Steps(SlowFast(), RefreshCache(prompt_interval=3, response_interval=2, ratio=0.25), ragged, 4)


def run(model: Transformer, steps: Steps, execution: Execution) -> Iterator[ModelRunner]:
    """Run steps; yield the runner after each."""
    key = BatchKey(steps.sampler.blanked(), steps.cache)
    prompts, responses = zip(*steps.canvases, strict=True)
    longest, response = max(map(sum, steps.canvases)), max(responses)
    length = execution.canvas_length(longest, model.spec.max_length)
    bounds = BatchBounds(length, min(prompts), max(prompts), response, response)
    slots = len(steps.canvases)
    runner = ModelRunner(model, key, slots, length, response, captures=execution.captures)
    planner = StepPlanner(steps.sampler, steps.cache, slots, bounds, execution.is_exact(slots))
    with torch.inference_mode():
        execution.prepare(planner, runner)
    for slot in range(slots):
        canvas = canvas_of(model.spec, *steps.canvases[slot])
        cap = steps.sampler.step_cap(response) + steps.cache.extra_steps(response)
        planner.join(slot, runner.put(slot, canvas, prompts[slot], steps.sampler, slot, cap))
    outputs = execution.run(planner, runner)
    with closing(outputs):
        for _ in islice(outputs, steps.count):
            yield runner


def canvas_of(spec: ModelSpec, prompt: int, response: int) -> list[int]:
    """Return a canvas with a prompt of many tokens, none of them special."""
    special = {spec.mask_id, spec.eos_id, spec.pad_id}
    usable = [token for token in range(min(spec.vocab_size, 509)) if token not in special]
    return [usable[7 * i % len(usable)] for i in range(prompt)] + [spec.mask_id] * response


def capture_by(device: torch.device) -> Callable[[ModelRunner, Forward], Callable[[], None]]:
    """Return the function that captures a step: without a GPU, a stand-in that launches its operations."""
    if device.type == "cuda":
        return capture_graph
    return lambda runner, shape: lambda: runner.run_padded(shape)


# --------------------------------------------------------------------------------------------------------- whole steps


def check_whole_steps(model: Transformer, cache: CachePolicy, sizes: Sizes, report: Callable[[str], None]) -> None:
    """Compare whole steps of a policy from equal states: torch's with Triton's, launched and replayed twice.

    Commits hang on which of two scores is larger, so the steps of the two back ends are compared up to their scores;
    the two replays bit for bit.

    Raises:
        AssertionError: names the two that differ, and in what.
    """
    length = min(sizes.timed_canvas, model.spec.max_length)
    canvas = (length // 2, length - length // 2)
    key = BatchKey(SlowFast().blanked(), cache)
    runners = {}
    for backend in ("torch", "triton"):
        by = model.by(backend)
        runners[backend] = ModelRunner(by, key, 1, length, canvas[1], captures=backend == "triton")
        runners[backend].put(0, canvas_of(model.spec, *canvas), canvas[0], SlowFast(), 0, 2**31)
    fresh = snapshot(runners["torch"].state)
    bounds = BatchBounds(length, canvas[0], canvas[0], canvas[1], canvas[1])
    for shape in StepPlanner(SlowFast(), cache, 1, bounds, False).shapes():  # the whole canvas comes first
        report(f"step of {shape.size} positions, cache {cache.name}, torch")
        wanted = _outcome(runners["torch"], lambda: runners["torch"].run_padded(shape), fresh)  # noqa: B023
        report(f"step of {shape.size} positions, cache {cache.name}, triton")
        launched = _outcome(runners["triton"], lambda: runners["triton"].run_padded(shape), fresh)  # noqa: B023
        _assert_same_choices("triton", launched, wanted, model.dtype)
        report(f"step of {shape.size} positions, cache {cache.name}, captured")
        with capturing():
            replay = capture_by(model.device)(runners["triton"], shape)
        first = _outcome(runners["triton"], replay, fresh)
        second = _outcome(runners["triton"], replay, fresh)
        _assert_same_choices("the captured step", first, wanted, model.dtype)
        _assert_identical(first, second)
        if model.device.type == "cuda":
            _assert_allocates_nothing(runners["triton"], replay)
        fresh = wanted


def snapshot(state: DecodeState) -> dict[str, torch.Tensor]:
    """Return a copy of every tensor of a state."""
    views = {*COLUMN, *SAMPLING_COLUMN, "token", "score"}
    found = {f.name: getattr(state, f.name) for f in fields(state) if f.name not in views}
    return {name: x.clone() for name, x in found.items() if isinstance(x, torch.Tensor)}


@torch.inference_mode()
def _outcome(runner: ModelRunner, step: Callable[[], None], fresh: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Run a step from a state; return the state after it, which the host ring must show too."""
    for name, value in fresh.items():
        getattr(runner.state, name).copy_(value)
    step()
    published = runner.ring.read(runner.ring.count_launch(), STEP_LIMIT)["control"]
    found = snapshot(runner.state)
    if published.tolist() != found["control"].tolist():
        raise AssertionError(f"the host ring shows progress {published.tolist()}, not {found['control'].tolist()}")
    return found


def _assert_same_choices(
    who: str, mine: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    """Raise AssertionError unless candidates, listed positions and tokens are equal, and scores nearly."""
    for name in ("candidate", "forwarded"):
        if not torch.equal(mine[name], wanted[name]):
            raise AssertionError(f"{who}: {name} is not what torch computes")
    columns = [COLUMN[name] for name in ("step", "listed", "fault")]
    if not torch.equal(mine["control"][:, columns], wanted["control"][:, columns]):
        raise AssertionError(f"{who}: step, listed or fault in the control matrix is not what torch computes")
    here = wanted["candidate"].flatten()
    tokens, scores = ([found[name][:-1][here] for found in (mine, wanted)] for name in ("choice_token", "choice_score"))
    if not torch.equal(*tokens):
        raise AssertionError(f"{who}: {int((tokens[0] != tokens[1]).sum())} of {len(tokens[0])} tokens differ")
    error, allowed = (scores[0] - scores[1]).abs().amax(), 1e-3 if dtype == torch.float32 else 0.05
    if not error <= allowed:
        raise AssertionError(f"{who}: scores differ by {error:.3e}, allowed {allowed:.0e}")


def _assert_identical(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    for name, x in first.items():
        if not torch.equal(x.nan_to_num(), second[name].nan_to_num()):
            raise AssertionError(f"two replays of a step differ in {name}")


def _assert_allocates_nothing(runner: ModelRunner, replay: Callable[[], None]) -> None:
    before = torch.cuda.memory_stats(runner.model.device)["allocation.all.allocated"]
    replay()
    runner.ring.wait(runner.ring.count_launch(), STEP_LIMIT)
    after = torch.cuda.memory_stats(runner.model.device)["allocation.all.allocated"]
    if before != after:
        raise AssertionError(f"a replay allocated device memory {after - before} times")


# -------------------------------------------------------------------------------------------------------------- timing


@dataclass(frozen=True)
class Times:
    """Seconds per step of the two pairs; ``spread`` is the larger one's, from the 20th to the 80th percentile."""

    cache: str
    torch: float
    triton: float
    spread: float


def time_steps(model: Transformer, cache: CachePolicy, sizes: Sizes) -> Times:
    """Time whole steps by (torch, eager) and by (Triton, CUDA graphs), each as a generation runs them.

    A threshold that nothing reaches commits one position per step, so the shapes of eager execution are new each time.
    """
    length = min(sizes.timed_canvas, model.spec.max_length)
    response = max(length // 2, sizes.warm_up + sizes.repeats + 1)
    sampler = SlowFast(tau_high=1.0)
    steps = Steps(sampler, cache, ((length - response, response),), sizes.warm_up + sizes.repeats)
    graphs = CudaGraphs(step_limit=STEP_LIMIT, capture=capture_by(model.device))
    found = []
    for backend, execution in (("torch", Eager(step_limit=STEP_LIMIT)), ("triton", graphs)):
        taken, began = [], None
        for _ in run(model.by(backend), steps, execution):
            now = time.perf_counter()
            taken += [] if began is None else [now - began]
            began = now
        kept = sorted(taken[max(sizes.warm_up - 1, 0) :])
        middle = median(kept)
        found.append((middle, (kept[-1 - len(kept) // 5] - kept[len(kept) // 5]) / middle))
    (torch_seconds, a), (triton_seconds, b) = found
    return Times(cache.name, torch_seconds, triton_seconds, max(a, b))
