"""Execution of step plans: eager, or by replayed CUDA graphs; and the choice between the two."""

from __future__ import annotations

import importlib.util
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch

from ..decoding.step_plan import Forward, StepOutput, StepPlan
from ..errors import (
    BackendError,
    DeviceFault,
    MissingDependencyError,
    OutOfDeviceMemory,
    SfsError,
    check_flag,
    first_line,
    require,
)
from ..kernels.control import Progress
from ..kernels.errors import KernelError
from ..models import Transformer
from .cuda_graph import capture_graph, capturing
from .faults import check_device, is_lack_of_memory
from .model_runner import ModelRunner

logger = logging.getLogger("sfs_triton")

_LENGTHS = 64  # least multiple that canvases are rounded up to

# a step's output, and the progress before it of the sequences that took it, by slot
Outputs = Iterator[tuple[StepOutput, dict[int, Progress]]]


class Planner(Protocol):
    """The part of :class:`~sfs_triton.scheduling.planner.StepPlanner` that execution needs."""

    def next(self, assuming: deque[StepPlan] = ...) -> StepPlan | None: ...

    def update(self, output: StepOutput) -> dict[int, Progress]: ...

    def shapes(self) -> list[Forward]: ...


class Eager:
    """Launch each step after the output of the one before it is known. The CPU's way, and the oracle on a GPU.

    Args:
        exact: plan exact shapes: no sequence pays for another's length, and each gets the bits that it would get
            alone. Otherwise plan the padded shapes of captured graphs. Default: exact for a batch of one slot only.
        step_limit: seconds that a step may take.
    """

    name, captures = "eager", False

    def __init__(self, exact: bool | None = None, step_limit: float = 600.0):
        self._exact, self._step_limit = exact, step_limit

    def is_exact(self, slots: int) -> bool:
        """Return whether steps of a batch have exact shapes."""
        return slots == 1 if self._exact is None else self._exact

    def canvas_length(self, longest: int, most: int) -> int:
        """Return the canvas length for sequences of at most ``longest`` positions and a model limit of ``most``."""
        return longest

    def prepare(self, planner: Planner, runner: ModelRunner) -> None:
        """Prepare a batch for these plans, before sequences are put into it: nothing is needed."""

    def capture_all(self, planner: Planner, runner: ModelRunner) -> None:
        """Capture nothing."""

    def run(self, planner: Planner, runner: ModelRunner) -> Outputs:
        """Step until no sequence runs; yield after every step."""
        while (plan := planner.next()) is not None:
            runner.launch(plan)
            output = runner.collect(plan, self._step_limit)
            yield output, planner.update(output)


class CudaGraphs:
    """Replay one captured graph per step. It has not run on a GPU yet.

    Graphs exist per padded shape and size: one, two, four... up to all canvases. A step is captured when its shape is
    first needed, after it has been launched one operation at a time. Sequences that join or leave change values in the
    buffers that graphs read, and need no new graphs.

    Up to ``ahead`` steps are queued beyond the one that the host waits for, where the planner can plan them without
    its output. Surplus steps find no running sequence and change nothing.

    Args:
        ahead: most steps to queue.
        step_limit: seconds that a step may take.
        capture: function that returns the replay of a step of one shape; tests on a CPU pass another one.
    """

    name, captures = "cuda_graphs", True

    def __init__(
        self,
        ahead: int = 1,
        step_limit: float = 60.0,
        capture: Callable[[ModelRunner, Forward], Callable[[], None]] = capture_graph,
    ):
        self._ahead, self._step_limit, self._capture = ahead, step_limit, capture
        self._failed = 0  # captures in a row

    def is_exact(self, slots: int) -> bool:
        return False

    def canvas_length(self, longest: int, most: int) -> int:
        """Round up to sixteenths of the next power of two, so that many prompts share few batches' graphs.

        A forward of the whole canvas pays for the rest, an eighth at most.
        """
        step = max(_LENGTHS, (1 << (longest - 1).bit_length()) // 16)
        return min(-(-longest // step) * step, max(longest, most))

    def prepare(self, planner: Planner, runner: ModelRunner) -> None:
        """Check that the host ring holds the outputs of the steps in flight."""
        depth = runner.ring.depth
        require(self._ahead < depth, f"ahead={self._ahead} is not below {depth}, the outputs that the host ring holds")

    def capture_all(self, planner: Planner, runner: ModelRunner) -> None:
        """Capture every graph that these plans can need, before any sequence is put into the batch."""
        for shape in planner.shapes():
            if shape not in runner.graphs:
                runner.warm_up(shape)
                self._capture_shape(runner, shape)

    def run(self, planner: Planner, runner: ModelRunner) -> Outputs:
        """Step until no sequence runs; yield after every step."""
        in_flight: deque[StepPlan] = deque()
        try:
            while (plan := planner.next(in_flight)) is not None or in_flight:
                if plan is not None:  # launch before waiting, so that the device has work while the host reads
                    runner.launch(plan)
                    in_flight.append(plan)
                    if plan.forwards[0] not in runner.graphs:
                        self._capture_shape(runner, plan.forwards[0])
                if plan is None or len(in_flight) > self._ahead:
                    output = runner.collect(in_flight.popleft(), self._step_limit)
                    yield output, planner.update(output)
        except GeneratorExit:  # after an error the device is not waited for: this runner is not used again
            runner.drain(self._step_limit)
            raise

    def _capture_shape(self, runner: ModelRunner, shape: Forward) -> None:
        """Capture a step of a shape that has been launched. A first failure may be another program's: steps of this
        shape are launched one operation at a time until the next attempt, and the second failure in a row is raised."""
        try:
            with capturing():
                if shape not in runner.graphs:
                    runner.graphs[shape] = self._capture(runner, shape)
            self._failed = 0
        except RuntimeError as error:
            doing = f"while capturing a step of {shape.canvases} canvases of {runner.length} positions"
            if is_lack_of_memory(error):
                text = f"no memory {doing} with cache={runner.policy.name!r}: {first_line(error)}"
                raise OutOfDeviceMemory(text) from error
            check_device(runner.state.tokens.device, error)
            self._failed += 1
            if self._failed > 1 or isinstance(error, (SfsError, KernelError)):
                raise
            logger.info("an attempt failed %s: %s", doing, error)


Execution = Eager | CudaGraphs


class Pair(NamedTuple):
    """Back end of the operations and execution of the steps: chosen, and replaced, together."""

    backend: str
    cuda_graphs: bool

    def __str__(self) -> str:
        return f"({self.backend}, {'CUDA graphs' if self.cuda_graphs else 'eager'})"


def check_cuda_graphs(cuda_graphs: bool | None, device: torch.device) -> None:
    """Raise unless ``cuda_graphs`` is a flag, or None, that ``device`` can follow.

    Raises:
        ArgumentError: it is no flag, or CUDA graphs are asked for and ``device`` has none.
        MissingDependencyError: they are asked for and triton, whose kernel publishes their outputs, is not installed.
    """
    if cuda_graphs is not None:
        check_flag("cuda_graphs", cuda_graphs)
    require(not cuda_graphs or device.type == "cuda", f"cuda_graphs=True needs a GPU: device {str(device)!r} has none")
    if cuda_graphs and importlib.util.find_spec("triton") is None:
        raise MissingDependencyError("cuda_graphs=True needs the package triton: pip install triton")


class ExecutionChoice:
    """The back end and the execution that an engine uses, as a :class:`Pair`. Thread-safe.

    Args:
        model: model with the operations to use.
        cuda_graphs: replay captured graphs.
        pinned: keep the back end whatever fails. Otherwise plain torch, with eager execution, takes over.
        distrust: called once with the failure of a kernel, if plain torch has taken over for it.
    """

    def __init__(
        self,
        model: Transformer,
        cuda_graphs: bool | None = None,
        pinned: bool = True,
        distrust: Callable[[str], None] | None = None,
    ):
        check_cuda_graphs(cuda_graphs, model.device)
        self.model, self._pinned, self._distrust = model, pinned, distrust
        self._eager = Eager(exact=None if model.device.type == "cuda" else True)
        self.current: Execution = CudaGraphs() if cuda_graphs else self._eager
        self.reason: str | None = None  # of a fall-back
        self.fault: DeviceFault | None = None  # the device has failed, and nothing runs any more
        self._lock = threading.Lock()
        logger.info("execution: %s", self.current.name)

    @property
    def pair(self) -> Pair:
        return Pair(self.model.backend, self.current.captures)

    def now(self) -> tuple[Transformer, Execution]:
        """Return the model and the execution to use.

        Raises:
            DeviceFault: the device has failed.
        """
        with self._lock:
            if self.fault is not None:
                raise DeviceFault(str(self.fault))
            return self.model, self.current

    def check(self, error: RuntimeError) -> None:
        """Raise DeviceFault if the device has failed, and refuse all later work; ``error`` may say so, or the device.

        Raises:
            DeviceFault: says what the device reports.
        """
        if isinstance(error, DeviceFault):
            self.fault = error
            raise error
        try:
            check_device(self.model.device, error)
        except DeviceFault as fault:
            self.fault = fault
            raise fault from error

    def replace_failed(self, model: Transformer, execution: Execution, error: RuntimeError) -> None:
        """Replace a pair that has failed, or raise: ``error`` is no failure of that, or nothing is below it."""
        self.check(error)
        hopeless = isinstance(error, SfsError) or is_lack_of_memory(error)
        if hopeless or not self.fall_back(model, execution, error):
            if isinstance(error, KernelError):
                raise BackendError(str(error)) from error
            raise error

    def fall_back(self, model: Transformer, execution: Execution, error: RuntimeError) -> bool:
        """Replace a pair that has failed by the one below it, for all generations; return False if there is none."""
        pinned = self._pinned or model.backend == "torch"
        bottom = execution is self._eager and pinned
        asked_for = pinned and isinstance(error, KernelError) and model.backend == "triton"
        if bottom or asked_for or model.group.size > 1:
            return False
        with self._lock:
            first = self.model is model and self.current is execution
            if first:
                before, self.reason = self.pair, first_line(error)
                self.model = model if pinned else model.by("torch")
                self.current = self._eager
                logger.warning("%s failed, going on with %s: %s", before, self.pair, error)
        if first and isinstance(error, KernelError) and self._distrust is not None:
            self._distrust(first_line(error))
        return True
