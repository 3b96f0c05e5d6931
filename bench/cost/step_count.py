"""Count the GPU work of a step without a GPU: its kernels, and the bytes and operations of each.

The engine's own planner and :class:`~sfs_triton.runner.ModelRunner` run on meta tensors, which hold no data. So the
count cannot drift from the code, and a value that the host reads is an error here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bench.baselines import PlainModel, vanilla
from bench.shapes.geometry import REAL
from sfs_triton.cards import QUANTIZATIONS
from sfs_triton.decoding.caching import BatchBounds, CachePolicy
from sfs_triton.decoding.params import BatchKey, parse_cache
from sfs_triton.decoding.samplers import Sampler, SlowFast, Threshold
from sfs_triton.decoding.step_plan import Forward, StepPlan
from sfs_triton.kernels.attention import attention_cost
from sfs_triton.kernels.confidence import confidence_cost
from sfs_triton.kernels.control import CONTROL, FAST, SLOW, Progress
from sfs_triton.kernels.cost import Cost
from sfs_triton.kernels.cycle import decide_cycle_cost
from sfs_triton.kernels.dequantise import dequantise_cost
from sfs_triton.kernels.gather import compact_cost, embedding_cost
from sfs_triton.kernels.launch import Launch, recording
from sfs_triton.kernels.linear import linear_cost
from sfs_triton.kernels.list_positions import list_positions_cost
from sfs_triton.kernels.lm_head import lm_head_cost
from sfs_triton.kernels.mark_candidates import mark_candidates_cost
from sfs_triton.kernels.mlp import silu_mul_cost
from sfs_triton.kernels.norm import rms_norm_cost
from sfs_triton.kernels.partials import merge_partials_cost
from sfs_triton.kernels.position_ranges import position_ranges_cost
from sfs_triton.kernels.publish import publish_cost
from sfs_triton.kernels.rope_cache import rope_cache_cost
from sfs_triton.kernels.scatter_choices import scatter_choices_cost
from sfs_triton.kernels.select import decide_block_cost
from sfs_triton.models import Transformer
from sfs_triton.models.spec import ModelSpec
from sfs_triton.models.weights import HEADS, LayerWeights, Weights
from sfs_triton.ops import triton_backend
from sfs_triton.ops.dispatch import Matrix, Quantised
from sfs_triton.runner import CudaGraphs, ModelRunner
from sfs_triton.scheduling.planner import StepPlanner

META, DTYPE = torch.device("meta"), torch.bfloat16
STYLES, NAMES = ("padded", "exact"), ("none", "region", "prefix", "dual", "refresh")
PARTS = {
    "products": "projections and MLP",
    "attention": "attention",
    "head": "head",
    "elementwise": "embedding, norms, rotary, other elementwise",
    "machine": "step machine",
}
_PART_OF = {
    **{"attention": "attention", "confidence": "head", "lm_head": "head"},
    **{"linear": "products", "dequantise": "products"},
    **dict.fromkeys(("linear_heads", "linear_normed", "linear_silu_mul"), "forward"),  # by what they launch
    **dict.fromkeys(("embedding", "rms_norm", "rope_cache", "silu_mul"), "elementwise"),
}


class Kernel(NamedTuple):
    """A kernel that would be launched: its part of the step, and its work."""

    part: str
    name: str
    bytes: int
    flops: int


class KernelTotals(NamedTuple):
    """Sums over some kernels."""

    launches: int
    bytes: int
    flops: int


@dataclass(frozen=True)
class Count:
    """All launches of a step, and the number of tensors that it copies from the host."""

    kernels: tuple[Kernel, ...]
    host_copies: int = 0

    @cached_property
    def parts(self) -> dict[str, KernelTotals]:
        return {part: _totals(kernel for kernel in self.kernels if kernel.part == part) for part in PARTS}

    @property
    def total(self) -> KernelTotals:
        return _totals(self.kernels)


def _totals(kernels: Iterable[Kernel]) -> KernelTotals:
    kernels = list(kernels)
    return KernelTotals(len(kernels), sum(kernel.bytes for kernel in kernels), sum(kernel.flops for kernel in kernels))


_NO_KERNEL = {"empty", "new_empty", "empty_like", "empty_strided", "_unsafe_view", "_reshape_alias"}
_FROM_HOST = {"detach_", "lift_fresh"}  # what torch.tensor ends with, once it has copied
_TAKES = {"embedding", "index", "gather", "index_select"}  # these read as much of their first tensor as they return
_PUTS = {"index_put_", "_index_put_impl_", "index_copy_", "scatter_"}  # and these write their source tensor
_OVERWRITES = {"copy_", "fill_", "zero_"}  # without reading the old values


class Meter(TorchDispatchMode):
    """Counts what would be launched on a GPU by operations on meta tensors, and by recorded launchers.

    An operation of torch that is neither a view nor an allocation is one kernel. Some are more on a GPU (a sort, a
    long cumulative sum), so counts of torch's are low.
    """

    def __init__(self):
        super().__init__()
        self._kernels: list[Kernel] = []
        self._host_copies = 0
        self._part: str | None = None

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Attribute launches inside the block to a part of the step, or of the ``"forward"``."""
        outer, self._part = self._part, name
        try:
            yield
        finally:
            self._part = outer

    def take(self) -> Count:
        """Return the counts since the last call."""
        count = Count(tuple(self._kernels), self._host_copies)
        self._kernels, self._host_copies = [], 0
        return count

    def wrap(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """``function`` with its launches counted for ``part``."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.part(part), recording() as launches:
                result = function(*args, **kwargs)
            for launch in launches:
                name = launch_name(launch)
                of = _PART_OF[name.partition(".")[2]] if part == "forward" else part
                self._kernels.append(Kernel(of, name, *launch_cost(launch)))
            return result

        return run

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._overloadpacket.__name__
        if name == "scaled_dot_product_attention":
            return self._attend(*args, **kwargs)
        if name == "rms_norm" and args[0].dtype == args[2].dtype:  # one kernel on a GPU
            out = torch.empty_like(args[0])
            self._note("elementwise", name, sum(map(_bytes, (args[0], args[2], out))), 0)
            return out
        with self:
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        out = func(*args, **kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.device == META and x.numel()]
        if made and not func.is_view and name not in _NO_KERNEL:
            taken = [x for x in tree_leaves(_inputs(func, args, kwargs)) if isinstance(x, torch.Tensor)]
            self._host_copies += name in _FROM_HOST or any(x.device != META for x in taken)
            product = func._overloadpacket in flop_registry
            flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out) if product else 0
            if product:
                _check_dtypes(name, taken)
            self._note("products" if product else "elementwise", name, _traffic(name, taken, made), flops)
        return out

    def _attend(self, q, k, v, attn_mask=None, **_options) -> torch.Tensor:
        """One kernel, with results laid out as those of the fused ones."""
        _check_dtypes("scaled_dot_product_attention", (q, k, v))
        batch, heads, rows, width = q.shape
        out = q.new_empty((batch, rows, heads, width)).transpose(1, 2)
        moved = sum(_bytes(x) for x in (q, k, v, attn_mask, out) if x is not None)
        self._note("attention", "scaled_dot_product_attention", moved, 4 * q.numel() * k.shape[2])
        return out

    def _note(self, kind: str, name: str, moved: int, flops: int) -> None:
        """``kind`` says which part of the forward it is; elsewhere the part is known."""
        outside = "head" if kind == "products" else "machine"
        part = kind if self._part == "forward" else self._part or outside
        self._kernels.append(Kernel(part, name, moved, flops))


def _check_dtypes(name: str, taken: Iterable[torch.Tensor]) -> None:
    """Meta tensors do not mind, a GPU does."""
    dtypes = {x.dtype for x in taken}
    if len(dtypes) > 1:
        raise TypeError(f"{name} of tensors of {sorted(map(str, dtypes))}")


def _inputs(func, args: tuple, kwargs: dict[str, Any]) -> tuple:
    written = {argument.name for argument in func._schema.arguments if argument.is_out}
    return args, [value for name, value in kwargs.items() if name not in written]


def _bytes(x: torch.Tensor) -> int:
    """Return a tensor's bytes in memory: values repeated along an axis count once."""
    return x.element_size() * math.prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride or not n)


def _traffic(name: str, taken: list[torch.Tensor], made: list[torch.Tensor]) -> int:
    """Bytes that an operation reads and writes, each value once."""
    read, written = sum(map(_bytes, taken)), sum(map(_bytes, made))
    if name in _TAKES:
        return read - _bytes(taken[0]) + 2 * written
    if name in _PUTS:
        return read - _bytes(taken[0]) + taken[-1].numel() * taken[0].element_size()
    return read - (_bytes(taken[0]) if name in _OVERWRITES else 0) + written


# -------------------------------------------------------------------------------------------------- launches of kernels

COSTS: dict[str, Callable[[dict[str, Any], tuple[int, ...]], Cost]] = {
    "attention.attention": lambda a, grid: attention_cost(
        grid[2], a["n_queries"], grid[1] * a["GROUP"], grid[1], a["n_keys"], a["HEAD_DIM"], a["q_ptr"].itemsize
    ),
    "confidence.confidence": lambda a, grid: confidence_cost(grid[0], a["n_columns"], a["logits_ptr"].itemsize),
    "cycle.decide": lambda a, grid: decide_cycle_cost(grid[0], a["length"]),
    "dequantise.dequantise": lambda a, grid: dequantise_cost(a["n_rows"], a["n_in"], a["GROUP"], a["out_ptr"].itemsize),
    "gather.compact": lambda a, grid: compact_cost(grid[0], a["n"], a["capacity"]),
    "gather.embedding": lambda a, grid: embedding_cost(a["n_rows"], a["n_columns"], a["table_ptr"].itemsize),
    "linear.linear": lambda a, grid: linear_cost(
        a["n_rows"],
        a["n_out"],
        a["n_in"],
        a["x_ptr"].itemsize,
        weight_itemsize=0.5 if a["GROUP"] else a["weight_ptr"].itemsize,
        group=a["GROUP"] or None,
        ending={"plain": "sum" if a["HAS_RESIDUAL"] else "product"}.get(a["ENDING"], a["ENDING"]),
    ),
    "lm_head.lm_head": lambda a, grid: lm_head_cost(
        a["n_rows"], a["n_columns"], a["n_features"], a["hidden_ptr"].itemsize, a["HAS_SCALE"]
    ),
    "mlp.silu_mul": lambda a, grid: silu_mul_cost(a["n_rows"], a["n_columns"], a["out_ptr"].itemsize),
    "norm.rms_norm": lambda a, grid: rms_norm_cost(
        a["n_rows"], a["n_columns"], a["x_ptr"].itemsize, a["residual_ptr"] is not None
    ),
    "partials.merge": lambda a, grid: merge_partials_cost(a["n_programs"], a["n_rows"]),
    "scatter_choices.scatter_choices": lambda a, grid: scatter_choices_cost(a["n_entries"]),
    "mark_candidates.mark_candidates": lambda a, grid: mark_candidates_cost(grid[0], a["length"]),
    "list_positions.list_positions": lambda a, grid: list_positions_cost(grid[0], a["length"], a["capacity"]),
    "publish.copy": lambda a, grid: publish_cost(_bytes(a["source_ptr"])),
    "publish.publish": lambda a, grid: publish_cost(0 if a["source_ptr"] is None else _bytes(a["source_ptr"])),
    "position_ranges.position_ranges": lambda a, grid: position_ranges_cost(grid[0], a["capacity"]),
    "rope_cache.rope_cache": lambda a, grid: rope_cache_cost(
        a["n_rows"] * grid[1],
        a["n_heads"] if a["HAS_Q"] else 0,
        a["n_kv_heads"] if a["HAS_K"] else 0,
        2 * a["HALF"],
        (a["q_ptr"] if a["HAS_Q"] else a["k_ptr"]).itemsize,
        a["HAS_CACHE"],
    ),
    "select.decide": lambda a, grid: decide_block_cost(grid[0], a["length"]),
}


def launch_name(launch: Launch) -> str:
    """``file.kernel``."""
    function = launch.kernel.fn
    return f"{function.__module__.rpartition('.')[2]}.{function.__name__.strip('_').removesuffix('_kernel')}"


def launch_cost(launch: Launch) -> Cost:
    """Count by the kernel's own cost function; without one, count each tensor among its arguments once."""
    cost = COSTS.get(launch_name(launch))
    if cost is not None:
        return cost(launch.arguments, launch.grid)
    return Cost(sum(_bytes(x) for x in launch.arguments.values() if isinstance(x, torch.Tensor)), 0)


# ---------------------------------------------------------------------------------------------------------- counting


@dataclass(frozen=True)
class Setting:
    """Decoding setup and step shapes: ``padded``, as graphs are captured, or ``exact``, as eager execution plans them
    from the progress of the sequences: half of the response is decided, and a fast span has ``span`` positions."""

    geometry: str = "llada-8b"
    prompt: int = 1100
    response: int = 1024
    batch: int = 1
    capacity: int = 128
    span_cap: int = 64
    block_length: int = 32
    style: str = "padded"
    span: int = 20
    quantization: str | None = None  # as load() takes it; the products' weights are then of that size

    def __post_init__(self) -> None:
        if self.quantization not in (None, *QUANTIZATIONS):
            raise ValueError(f"quantization={self.quantization!r} is not one of {QUANTIZATIONS}, or None")
        for name in ("prompt", "response", "batch", "capacity", "span_cap", "block_length", "span"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not positive")
        most = REAL[self.geometry].max_length
        if self.prompt + self.response > most:
            raise ValueError(f"prompt={self.prompt} and response={self.response} exceed {self.geometry}'s {most}")

    def policy(self, name: str) -> CachePolicy:
        options = {"capacity": self.capacity, "span_cap": self.span_cap} if name == "region" else {}
        return parse_cache(name, **options)

    def sampler(self, policy: CachePolicy) -> Sampler:
        return Threshold(block_length=self.block_length) if policy.by_block else SlowFast()

    def key(self, name: str) -> BatchKey:
        """Return the batch key of a policy with its sampler."""
        policy = self.policy(name)
        return BatchKey(self.sampler(policy).blanked(), policy)

    @property
    def middle(self) -> int:
        """Return the position up to which the response is decided, in the middle of a generation."""
        return self.prompt + self.response // 2 // self.block_length * self.block_length

    def plan(self, key: BatchKey, length: int, kind: Kind) -> StepPlan:
        """Return the plan of a step of this kind, amid a generation, in canvases of ``length`` positions."""
        bounds = BatchBounds(length, self.prompt, self.prompt, self.response, self.response)
        planner = StepPlanner(key.sampler, key.cache, self.batch, bounds, exact=self.style == "exact")
        for slot in range(self.batch):
            planner.join(slot, self.progress(kind, key.sampler.by_stage))
        return planner.next()

    def progress(self, kind: Kind, by_stage: bool) -> Progress:
        """Return a sequence's progress before a step of this kind: half of the response is decided, from the left."""
        start, end, block = self.prompt, self.prompt + self.response, self.block_length
        half = self.middle
        values = {
            **{"start": start, "end": end, "limit": end, "cap": 2**31 - 1, "estimate": -1},
            "block": 0 if by_stage else (half - start) // block,
            "block_start": start if by_stage else half,
            "block_end": end if by_stage else min(half + block, end),
            "span_start": half,
            "span_end": min(half + self.span, end) if kind.fast else -1,
            "stage": FAST if kind.fast else SLOW,
            **{"stage_step": kind.stage_step, "step": kind.step, "masks_left": end - half},
        }
        return Progress(*(values.get(column, 0) for column in CONTROL))


class Kind(NamedTuple):
    """Kind of step that a policy has, with the place of its first one in a generation."""

    name: str
    step: int
    stage_step: int
    fast: bool


def kinds(setting: Setting, name: str) -> dict[Kind, int]:
    """Return a policy's kinds of steps and, for those that follow from the step number alone, the count per period."""
    policy = setting.policy(name)
    if name == "none":
        return {Kind("full", 0, 0, False): 1, Kind("later fast", 1, 1, True): 1}
    if name == "region":
        return {Kind("full", 0, 0, False): 1, Kind("list", 1, 1, False): 1}
    if policy.by_block:
        return {Kind("opening", 0, 0, False): 1, Kind("block", 1, 1, False): 1}
    due = [(step % policy.prompt_interval == 0, step % policy.response_interval == 0) for step in range(policy.period)]
    named = {(True, True): "all", (True, False): "prompt", (False, True): "response", (False, False): "moved"}
    return {Kind(named[pair], due.index(pair), 1, False): count for pair, count in Counter(due).items()}


def meta_model(spec: ModelSpec, backend: str, meter: Meter, quantization: str | None = None) -> Transformer:
    """A model without data whose work is counted. As on every GPU, ``publish`` is a kernel."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=DTYPE, device=META)

    def matrix(*shape: int, form: str | None = quantization) -> Matrix:
        return empty(*shape) if form is None else Quantised.empty(*shape, form, META)

    d, qkv = spec.d_model, spec.d_model + 2 * spec.kv_width
    bias = empty(qkv) if spec.qkv_bias else None
    layer = LayerWeights(
        empty(d), matrix(qkv, d), bias, matrix(d, d), empty(d), matrix(2 * spec.mlp, d), matrix(d, spec.mlp)
    )
    embedding = empty(spec.vocab_size, d)
    form = HEADS.get(quantization, quantization)
    head = embedding if spec.tied_head and form is None else matrix(spec.vocab_size, d, form=form)
    model = Transformer(spec, Weights(embedding, (layer,) * spec.n_layers, empty(d), head), "torch")
    ops = {op.name: getattr(model.ops, op.name) for op in fields(model.ops)}
    names = ops if backend == "triton" else ("publish",)
    ops |= {name: getattr(triton_backend, name) for name in names}
    wrapped = {name: meter.wrap(op, _PART_OF.get(name, "machine")) for name, op in ops.items()}
    model.backend, model.ops = backend, replace(model.ops, **wrapped)
    model.forward = meter.wrap(model.forward, "forward")
    return model


class Steps:
    """Steps of one policy by one backend, as :func:`steps_of` has them."""

    def __init__(self, setting: Setting, backend: str, name: str):
        self._setting, self._key, self._meter, self._done = setting, setting.key(name), Meter(), {}
        spec, length = REAL[setting.geometry], setting.prompt + setting.response
        if setting.style == "padded":
            length = CudaGraphs().canvas_length(length, spec.max_length)
        model = meta_model(spec, backend, self._meter, setting.quantization)
        self._runner = ModelRunner(model, self._key, setting.batch, length, setting.response)
        ring = self._runner.ring  # of memory of the host, where a meta tensor cannot be copied to
        ring._rings, ring._count = [each.to(META) for each in ring._rings], ring._count.to(META)

    def plan(self, kind: Kind) -> StepPlan:
        """Return the plan of a step of this kind."""
        return self._setting.plan(self._key, self._runner.length, kind)

    def shapes(self, kind: Kind) -> tuple[Forward, ...]:
        """Return the shapes of the forwards of a step of this kind."""
        return self.plan(kind).forwards

    def count(self, kind: Kind) -> Count:
        """Count the launches of a step of this kind."""
        plan = self.plan(kind)
        if (plan.forwards, plan.slow) not in self._done:
            # the meta device has no autocast, and torch raises when it is asked about it
            with self._meter, mock.patch.object(torch, "is_autocast_enabled", lambda device: False):
                self._runner.launch(plan)
            self._done[plan.forwards, plan.slow] = self._meter.take()
        return self._done[plan.forwards, plan.slow]


_steps = cache(Steps)


def steps_of(setting: Setting, backend: str, name: str) -> Steps:
    """Return the steps of a policy; those of other policies than ``region`` are shared whatever its options are."""
    return _steps(setting if name == "region" else replace(setting, capacity=1, span_cap=1), backend, name)


@cache
def count_vanilla(setting: Setting) -> Count:
    """Count the launches of a step of plain PyTorch: all logits of the canvas, the softmax of all, and no cache."""
    meter = Meter()
    with torch.device(META):
        model = PlainModel(meta_model(REAL[setting.geometry], "torch", meter))
        canvas = torch.empty(setting.prompt + setting.response, dtype=torch.int64)
        model.ensure_rope_length(len(canvas))
    with torch.inference_mode(), meter, meter.part("forward"):
        vanilla.step(model, canvas, setting.prompt, len(canvas), 1)
    return meter.take()
