"""Launches of Triton kernels on tensors of the CPU: compiled as for a GPU, executed under several schedules."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from .findings import KINDS, PAIRS, Finding, Thread
from .library import Region, Report, Schedule, library
from .memory import LARGE, Memory, memories, place
from .parse import SHARED_BASE
from .program import Program, assemble

MAX_REPORTS = 400
SCALARS = {"fp16": numpy.float16, "fp32": numpy.float32, "fp64": numpy.float64}


class EndedEarly(RuntimeError):
    """An execution that could not go on; its findings say why."""


@dataclass
class Kernel:
    """A compiled kernel: ``types`` of its parameters by name, as Triton has them."""

    name: str
    program: Program
    types: dict[str, str]
    shared_bytes: int

    def __post_init__(self) -> None:
        program = self.program
        arrays = [(array.ctypes.data, len(array)) for array in (program.code, program.constants, program.extra)]
        sizes = program.register_bytes, program.function.n_predicates
        self.handle = library().ptx_kernel(*itertools.chain(*arrays), *sizes)

    def parameters(self, arguments: Mapping[str, Any]) -> numpy.ndarray:
        """The bytes of the parameters. Scratch memory, which Triton adds at the end, is null: no kernel asks for it."""
        places = list(self.program.function.parameters.values())
        blob = numpy.zeros(max(sum(places[-1]), 8), numpy.uint8)
        for (name, kind), (offset, size) in zip(self.types.items(), places, strict=False):
            value = arguments[name]
            if isinstance(value, torch.Tensor):
                raw = numpy.array([value.data_ptr()], numpy.uint64)
            elif kind in SCALARS:
                raw = numpy.array([value], SCALARS[kind])
            else:
                raw = numpy.array([int(value) & (2**64 - 1)], numpy.uint64)
            blob[offset : offset + size] = raw.view(numpy.uint8)[:size]
        return blob


class Machine:
    """Executes launches, once in order and then under ``n_schedules`` adversarial schedules, and collects findings."""

    def __init__(self, n_schedules: int = 2, seed: int = 1, limit: int = 4_000_000_000):
        self.n_schedules, self.seed, self.limit = n_schedules, seed, limit
        self.findings: list[Finding] = []
        self.kernels: dict[str, Kernel] = {}  # by Triton's hash
        self.launches = 0
        self.instructions = ctypes.c_int64(0)

    def compile(self, function, grid: tuple[int, ...], arguments: Mapping[str, Any]) -> Kernel:
        """Compile as Triton does for these arguments."""
        compiled = function.warmup(grid=grid, **arguments)
        if compiled.hash not in self.kernels:
            program = assemble(compiled.asm["ptx"])
            types = {name: kind for name, kind in compiled.src.signature.items() if kind != "constexpr"}
            shared_bytes = max(compiled.metadata.shared, program.function.shared_bytes)
            self.kernels[compiled.hash] = Kernel(function.__name__, program, types, shared_bytes)
        return self.kernels[compiled.hash]

    def launch(self, function, grid: tuple[int, ...], arguments: Mapping[str, Any]) -> None:
        """Compile and execute."""
        self.execute(self.compile(function, grid, arguments), grid, arguments)

    def execute(self, kernel: Kernel, grid: tuple[int, ...], arguments: Mapping[str, Any]) -> None:
        """Execute under all schedules. Tensors keep the bytes that the launch in order leaves.

        Raises EndedEarly where it can not go on.
        """
        self.launches += 1
        if 0 in grid:
            return
        tensors = {name: arguments[name] for name in kernel.types if isinstance(arguments[name], torch.Tensor)}
        for name, tensor in tensors.items():
            if tensor.device.type != "cpu":
                raise ValueError(
                    f"{name} is on device {str(tensor.device)!r}: only tensors of the CPU can be executed on"
                )
        parts = memories(tensors, kernel.program.least_global)
        regions = (Region * max(len(parts), 1))(*(part.region for part in parts))
        shape, parameters = numpy.array([*grid, 1, 1][:3], numpy.uint32), kernel.parameters(arguments)
        wanted: list[numpy.ndarray | None] = []
        for number in range(self.n_schedules + 1):
            for part, region in zip(parts, regions, strict=False):
                region.tracked = number > 0 and region.changed and region.size <= LARGE
                if number and region.changed:
                    part.restore()
            reports = (Report * MAX_REPORTS)()
            count = ctypes.c_int(0)
            whole = library().ptx_run(
                *(kernel.handle, self._schedule(number), parameters.ctypes.data, shape.ctypes.data),
                *(kernel.program.function.threads, kernel.shared_bytes, min(4, kernel.program.least_shared)),
                *(ctypes.addressof(regions), len(parts), ctypes.addressof(reports), MAX_REPORTS, count),
                self.instructions,
            )
            self.findings += [self._finding(kernel, tensors, number, report) for report in reports[: count.value]]
            if not whole:
                raise EndedEarly(f"{kernel.name} ended early:\n{self.findings[-1]}")
            if number == 0:
                compared = [region.changed and region.size <= LARGE for region in regions[: len(parts)]]
                wanted = [part.bytes.copy() if same else None for part, same in zip(parts, compared, strict=True)]
            else:
                self._compare(kernel, tensors, parts, wanted, number)

    def _schedule(self, number: int) -> Schedule:
        """Number 0 runs CTA after CTA: what is written, and what the result is. Number 1 never stays with a warp."""
        if number == 0:
            return Schedule(seed=1, resident=1, burst=1 << 30, order=0, races=0, split=1, late=0, limit=self.limit)
        draw = numpy.random.default_rng([self.seed, number, self.launches])
        return Schedule(
            seed=int(draw.integers(1, 2**62)),
            resident=8 if number == 1 else int(draw.integers(2, 9)),
            burst=1 if number == 1 else int(draw.choice([1, 2, 5, 30, 1000])),
            priorities=int(draw.integers(2)),
            order=int(draw.integers(3)),
            races=1,
            split=int(draw.integers(2)),
            late=int(draw.integers(2)),
            limit=self.limit,
        )

    def _compare(self, kernel: Kernel, tensors, parts: list[Memory], wanted, number: int) -> None:
        for part, bytes_ in zip(parts, wanted, strict=True):
            if bytes_ is not None and not numpy.array_equal(part.bytes, bytes_):
                different = (part.bytes != bytes_).nonzero()[0]
                at = place(part.base + int(different[0]), tensors)
                finding = Finding("depends on the schedule", kernel.name, "", at, None, None, number, len(different))
                self.findings.append(finding)
                part.bytes[:] = bytes_

    def _finding(self, kernel: Kernel, tensors, number: int, report: Report) -> Finding:
        def thread(pc: int, cta: int, lane: int) -> Thread:
            at = kernel.program.statements[pc]
            return Thread(kernel.name, at.line, at.text, at.source, cta, lane)

        kind = list(KINDS)[report.kind]
        access, other = ("read", "write", "atomic")[report.other_pc % 3], None
        if kind in PAIRS:
            access, other = "", thread(report.other_pc, report.other_cta, report.other_thread)
        at = ""
        if report.address:
            shared = report.space == 1
            at = f"shared memory {report.address - SHARED_BASE:#x}" if shared else place(report.address, tensors)
        mine = thread(report.pc, report.cta, report.thread)
        return Finding(kind, kernel.name, access if at else "", at, mine, other, number, report.count)
