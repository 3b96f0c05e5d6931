"""Execution of step plans: eager, or by replayed CUDA graphs; and the choice between the two."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from ..decoding.step_plan import Forward, StepOutput, StepPlan
from ..errors import check_flag, require
from ..kernels.control import Progress
from .cuda_graph import capture_graph
from .model_runner import ModelRunner

logger = logging.getLogger("sfs_triton")

_LENGTHS = 64  # canvases are rounded up to a multiple, so that prompts of similar length share graphs

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

    def run(self, planner: Planner, runner: ModelRunner) -> Outputs:
        """Step until no sequence runs; yield after every step."""
        runner.graphs.clear()  # of an execution that has failed
        while (plan := planner.next()) is not None:
            runner.launch(plan)
            output = runner.collect(plan, self._step_limit)
            yield output, planner.update(output)


class CudaGraphs:
    """Replay one captured graph per step. It has not run on a GPU yet.

    Graphs exist for each padded shape at one, two, four... up to all canvases. Sequences that join or leave change
    values in the buffers that graphs read, and need no new graphs.

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

    def is_exact(self, slots: int) -> bool:
        return False

    def canvas_length(self, longest: int, most: int) -> int:
        return min(-(-longest // _LENGTHS) * _LENGTHS, max(longest, most))

    def prepare(self, planner: Planner, runner: ModelRunner) -> None:
        """Capture the graphs that these plans can need and the runner does not have."""
        depth = runner.ring.depth
        require(self._ahead < depth, f"ahead={self._ahead} is not below {depth}, the outputs that the host ring holds")
        for shape in planner.shapes():
            if shape not in runner.graphs:
                runner.graphs[shape] = self._capture(runner, shape)

    def run(self, planner: Planner, runner: ModelRunner) -> Outputs:
        """Step until no sequence runs; yield after every step."""
        in_flight: deque[StepPlan] = deque()
        try:
            while (plan := planner.next(in_flight)) is not None or in_flight:
                if plan is not None:  # launch before waiting, so that the device has work while the host reads
                    runner.launch(plan)
                    in_flight.append(plan)
                if plan is None or len(in_flight) > self._ahead:
                    output = runner.collect(in_flight.popleft(), self._step_limit)
                    yield output, planner.update(output)
        except GeneratorExit:  # after an error the device is not waited for: this runner is not used again
            runner.drain(self._step_limit)
            raise


Execution = Eager | CudaGraphs


def check_cuda_graphs(cuda_graphs: bool | None, device: torch.device) -> None:
    """Raise :class:`~sfs_triton.errors.ArgumentError` if CUDA graphs are asked for and ``device`` has none."""
    if cuda_graphs is not None:
        check_flag("cuda_graphs", cuda_graphs)
    require(not cuda_graphs or device.type == "cuda", f"cuda_graphs=True needs a GPU: device {str(device)!r} has none")


class ExecutionChoice:
    """The execution of an engine: CUDA graphs if they were asked for, and eager if they fail. Thread-safe."""

    def __init__(self, cuda_graphs: bool | None, device: torch.device):
        check_cuda_graphs(cuda_graphs, device)
        self._eager = Eager(exact=None if device.type == "cuda" else True)
        self.current: Execution = CudaGraphs() if cuda_graphs else self._eager
        self._lock = threading.Lock()
        logger.info("execution: %s", self.current.name)

    def fall_back(self, failed: Execution, error: RuntimeError) -> bool:
        """Replace ``failed`` by eager execution for all generations; return False if it is that already."""
        if failed is self._eager:
            return False
        with self._lock:
            if self.current is failed:
                logger.warning("execution by %s failed, going on with eager: %s", failed.name, error)
                self.current = self._eager
        return True
