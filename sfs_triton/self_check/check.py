"""The check itself, as it runs in a process of its own: operations, whole steps, times."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from ..decoding.caching import NoCache, RegionCache
from ..models import ModelSpec
from ..ops.dispatch import operations
from ..runner import Eager
from ..runner.faults import is_lack_of_memory
from . import steps
from .steps import Sizes
from .twins import Finding, Twins

CACHES = (NoCache(), RegionCache())
Emit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Request:
    """Request of a check: a geometry on a device. ``thorough``: go on after a fault, so that all of them are found."""

    spec: ModelSpec
    device: str
    dtype: str
    quantization: str | None = None
    sizes: Sizes = field(default_factory=Sizes)
    thorough: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Request:
        given = json.loads(text)
        given["sizes"] = Sizes(**given["sizes"] | {"rows": tuple(given["sizes"]["rows"])})
        spec = {name: tuple(value) if isinstance(value, list) else value for name, value in given["spec"].items()}
        return cls(**given | {"spec": ModelSpec(**spec)})


def check(request: Request, emit: Emit) -> None:
    """Run the check and emit its findings one by one: records ``start``, ``finding``, ``step``, ``times``, ``end``."""
    torch.manual_seed(0)
    device = torch.device(request.device)
    if device.index is not None:
        torch.cuda.set_device(device)
    faults = _check_operations(request, device, emit)
    if faults and not request.thorough:
        return
    faults += _check_steps(request, device, emit)
    if not faults:
        _time_steps(request, device, emit)
        emit({"record": "end"})


def _check_operations(request: Request, device: torch.device, emit: Emit) -> int:
    """Compare all operations with their twins, at the model's sizes and at small odd ones; count the faults."""
    faults = 0

    def found(finding: Finding) -> None:
        nonlocal faults
        faults += finding.fault is not None
        emit({"record": "finding", **asdict(finding)})
        if finding.fault is not None and device.type == "cuda":
            torch.cuda.synchronize(device)  # raises if the fault has ended the context: nothing more can be found

    def start(operation: str, shape: str) -> None:
        emit({"record": "start", "doing": f"{operation} at {shape}"})

    for spec in (request.spec, steps.odd(request.spec)):
        model = _model(request, spec, device, steps.SHARED_LAYERS)
        shared = steps.memory_of(model.weights)
        kernels, twins = operations("triton", device), operations("torch", device)
        real = spec is request.spec
        sizes = request.sizes if real else Sizes(rows=(7,), canvas=37)
        for each in steps.compared_steps(spec, sizes):
            # one set of findings per kind of step: what a step does is new even where shapes are not
            model.ops = Twins(kernels, twins, shared, start, found, timed=request.thorough and real).ops()
            for _ in steps.run(model, each, Eager(exact=False, step_limit=steps.STEP_LIMIT)):  # shapes of graphs
                if faults and not request.thorough:
                    return faults
    return faults


def _check_steps(request: Request, device: torch.device, emit: Emit) -> int:
    model, faults = _model(request, request.spec, device, steps.SHARED_LAYERS), 0
    for cache in CACHES:
        fault = None
        try:
            steps.check_whole_steps(
                model, cache, request.sizes, lambda doing: emit({"record": "start", "doing": doing})
            )
        except Exception as error:  # of the comparison, of compilers, of drivers
            if is_lack_of_memory(error):
                raise
            fault = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
            faults += 1
        emit({"record": "step", "cache": cache.name, "fault": fault})
    return faults


def _time_steps(request: Request, device: torch.device, emit: Emit) -> None:
    model = _model(request, request.spec, device, request.spec.n_layers)
    for cache in CACHES:
        emit({"record": "start", "doing": f"timing of steps, cache {cache.name}"})
        emit({"record": "times", **asdict(steps.time_steps(model, cache, request.sizes))})


def _model(request: Request, spec: ModelSpec, device: torch.device, layers: int):
    layers = min(layers, spec.n_layers)
    dtype = getattr(torch, request.dtype)
    return steps.random_model(replace(spec, n_layers=layers), device, dtype, request.quantization, layers)
