"""A persistent batch: fixed device buffers whose slots hold sequences that share one batch key."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..decoding.caching import BatchBounds
from ..decoding.params import BatchKey
from ..decoding.step_plan import StepOutput
from ..errors import OutOfDeviceMemory
from ..kernels.control import Progress
from ..models import Transformer
from ..runner import ExecutionChoice, ModelRunner, Outputs
from ..runner.faults import is_lack_of_memory
from ..runner.stream import working
from .planner import StepPlanner
from .sequence import Sequence

_PATIENCE = 60.0  # seconds to wait for the final state of a sequence
_GPU_TARGETS = 32  # targets of exact shapes on a GPU are a multiple of this


class PersistentBatch:
    """A persistent batch: a fixed number of slots for canvases of at most ``bounds.length`` positions.

    Sequences join and leave between steps. This changes values on the device only, so nothing is captured again, and
    the others get the results that they would get alone. A free slot holds a sequence that is done.
    """

    def __init__(self, model: Transformer, key: BatchKey, slots: int, bounds: BatchBounds, choice: ExecutionChoice):
        self.key, self.slots, self.length, self._choice = key, slots, bounds.length, choice
        self._response = bounds.response
        self._sequences: list[Sequence | None] = [None] * slots
        self._ending: list[int] = []  # slots of done sequences whose final state has not been read
        self._released: list[Sequence] = []  # sequences that have left their slots, not returned yet
        self._outputs: Outputs | None = None  # of the execution, while it runs
        self.healthy = True  # False: must not be used again
        self.model, self._execution = choice.now()
        with self._at_work(wait=True):
            self.runner = self._allocate()

    def _allocate(self) -> ModelRunner:
        """Return a runner for the present model and execution.

        Raises:
            OutOfDeviceMemory: its tensors do not fit, on this rank or on another.
        """
        runner, captures = None, self._execution.captures
        try:
            runner = ModelRunner(self.model, self.key, self.slots, self.length, self._response, captures=captures)
        except RuntimeError as error:
            if not is_lack_of_memory(error):
                raise
        if self.model.group.any(runner is None):  # partial allocations are free again here
            raise OutOfDeviceMemory(self._no_memory())
        return runner

    def _no_memory(self) -> str:
        model, needed = self.model, ModelRunner.bytes_needed(self.model, self.key, self.slots, self.length)
        text = (
            f"{self.slots} canvases of {self.length} positions with cache={self.key.cache.name!r} need "
            f"{needed / 2**30:.2f} GiB on {str(model.device)!r}"
        )
        if model.device.type != "cuda":
            return text + "; use fewer or shorter canvases"
        kept = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)  # by torch, unused
        free = torch.cuda.mem_get_info(model.device)[0] + kept
        text += f", and {free / 2**30:.2f} GiB are free"
        fits = min(int(self.length * free / needed), model.spec.max_length)
        if self.key.cache.store is None or not 0 < fits < self.length:
            return text  # no cache takes the memory that a shorter canvas would leave
        return f"{text}: {self.slots} canvases of up to {fits} positions would fit"

    @contextmanager
    def _at_work(self, wait: bool = False) -> Iterator[None]:
        """Use the device as the engine does, whatever stream the caller has made the current one.

        ``wait``: behind the caller's work on its own stream. A failure of the device is raised as what it is.
        """
        device = self.model.device
        try:
            with working(device, wait):
                yield
        except RuntimeError as error:
            self._choice.check(error)
            raise

    # ---------------------------------------------------------------------------------------------- joining, leaving

    def matches(self, key: BatchKey, slots: int, bounds: BatchBounds) -> bool:
        """Return whether a new persistent batch with these arguments would be equal to this one."""
        responses_fit = not key.sampler.schedule_sizes(1) or self._response == bounds.response
        same = (self.key, self.slots, self.length) == (key, slots, bounds.length)
        return same and responses_fit and self.is_current

    @property
    def is_current(self) -> bool:
        """True while no fall-back has replaced the back end or the execution that it was made for."""
        return self.model is self._choice.model and self.runner.captures == self._choice.current.captures

    @property
    def bytes(self) -> int:
        """Bytes of its caches, canvases and graphs."""
        return ModelRunner.bytes_needed(self.model, self.key, self.slots, self.length) + self.runner.graph_bytes

    def prepare(self, bounds: BatchBounds) -> None:
        """Prepare for sequences within these bounds. All slots must be free."""
        self.bounds = bounds
        with self._at_work(wait=True):
            self._start_planner()
            self._execution.prepare(self._planner, self.runner)

    def capture_all(self) -> None:
        """Capture all graphs that sequences within the bounds can need, if the execution has any."""
        with self._at_work(), torch.inference_mode(), torch.device("cpu"):
            try:
                self._execution.capture_all(self._planner, self.runner)
            except RuntimeError as error:
                self._choice.replace_failed(self.model, self._execution, error)

    def _start_planner(self) -> None:
        """Take the engine's present execution, and start a planner of the shapes that it needs."""
        self._execution = self._choice.current
        exact, bounds = self._execution.is_exact(self.slots), self.bounds._replace(length=self.length)
        multiple = _GPU_TARGETS if self.model.device.type == "cuda" else 1
        self._planner = StepPlanner(self.key.sampler, self.key.cache, self.slots, bounds, exact, multiple)

    @property
    def sequences(self) -> list[Sequence]:
        """Return the sequences that hold a slot."""
        return [sequence for sequence in self._sequences if sequence is not None]

    @property
    def free(self) -> int:
        """Return the number of free slots."""
        return self._sequences.count(None)

    def join(self, sequence: Sequence) -> bool:
        """Put a sequence into a free slot; return whether it has steps to take. The next round then includes it."""
        slot = self._sequences.index(None)
        with self._at_work():
            has_steps = self._put(slot, sequence)
        self._sequences[slot] = sequence
        return has_steps

    def _put(self, slot: int, sequence: Sequence) -> bool:
        params = sequence.params
        sequence.begin()
        response = sequence.prompt_length, sequence.bound - sequence.prompt_length
        how = (params.sampler, params.seed, sequence.step_cap, sequence.embeds, response)
        progress = self.runner.put(slot, sequence.canvas, sequence.start, *how)
        self._planner.join(slot, progress)
        if progress.done:
            sequence.progress = progress
            self._end(slot)
        return not progress.done

    def drop(self, sequence: Sequence) -> None:
        """End a running sequence before its next step; the others are not affected.

        A step that is already queued still runs: what it commits is in the final state, but is not reported.
        """
        slot = self._sequences.index(sequence)
        with self._at_work():
            self.runner.end(slot)
            self._end(slot)

    def _end(self, slot: int) -> None:
        self._planner.leave(slot)
        self.runner.publish_final(slot)
        self._ending.append(slot)

    def release(self, wait: bool) -> list[Sequence]:
        """Read the final states that have arrived, or all with ``wait``; free the slots and return the sequences."""
        released = []
        for slot in list(self._ending):
            if wait or self.runner.has_final(slot):
                sequence = self._sequences[slot]
                sequence.finish(self.runner.read_final(slot, _PATIENCE))
                self._sequences[slot] = None
                self._ending.remove(slot)
                released.append(sequence)
        return released

    # ---------------------------------------------------------------------------------------------------------- steps

    def advance(self) -> tuple[list[Sequence], list[Sequence]]:
        """Run one round, in which every running sequence takes a step.

        Returns the sequences that took one, and those whose final state has been read: they have left their slots.
        """
        start, here, stepped = time.perf_counter(), self.sequences, []
        try:
            with self._at_work():
                while (step := self._next_output()) is not None:
                    output, before = step
                    stepped += self._record(output, before)
                    if output.completes_round and stepped:
                        break
                # all ranks of a group must free slots at the same step, whenever the copies arrive
                wait = self.model.group.size > 1 or len(self._ending) == len(self.sequences)
                released = self._released + self.release(wait)
        except BaseException:
            self._abandon()
            raise
        self._released = []
        seconds = time.perf_counter() - start
        for sequence in here:
            sequence.seconds += seconds
        return stepped, released

    def _record(self, output: StepOutput, before: dict[int, Progress]) -> list[Sequence]:
        """Record the step of the sequences that took it; return those that have not reported it before a restart."""
        updated = []
        for slot, earlier in before.items():
            sequence = self._sequences[slot]
            if sequence.record(slot, earlier, output):
                updated.append(sequence)
            if output.progress[slot].done:
                self._end(slot)
        return updated

    def _next_output(self) -> tuple[StepOutput, dict[int, Progress]] | None:
        """Return the next step's output and the progress before it; None if nothing runs.

        If the back end or the execution fails, restart all running sequences on those below it.
        """
        while True:
            if self._outputs is None:
                self._outputs = self._execution.run(self._planner, self.runner)
            try:
                step = next(self._outputs, None)
            except RuntimeError as error:  # torch raises CUDA errors as this
                self._choice.replace_failed(self.model, self._execution, error)
            else:
                if step is None:
                    self._outputs = None
                return step
            self._restart()  # the error is gone, and with it what its traceback holds of the runner

    def _restart(self) -> None:
        """Start all running sequences again, on the present model and execution."""
        self._outputs = None
        self._released += self.release(wait=True)
        self.runner.abandon()
        del self.runner  # before the next is allocated
        self.model, self._execution = self._choice.now()
        self.runner = self._allocate()
        self._start_planner()
        for slot, sequence in enumerate(self._sequences):
            if sequence is not None:
                self._put(slot, sequence)

    def close(self) -> None:
        """Stop at any point: sequences keep their present state, and all slots become free."""
        try:
            self._choice.now()  # a device that has failed is not waited for
            with self._at_work():
                if self._outputs is not None:
                    self._outputs.close()
                for slot in range(self.slots):  # no copy may be in flight when this batch is freed
                    self.runner.read_final(slot, _PATIENCE)
                self.runner.end()
        except BaseException:
            self._abandon()
            raise
        self._outputs = None
        for slot in range(self.slots):
            self._planner.leave(slot)
        self._ending, self._sequences = [], [None] * self.slots

    def _abandon(self) -> None:
        """Give this batch up: the device may still write to its memory."""
        if self.healthy:
            self.healthy = False
            if hasattr(self, "runner"):
                self.runner.abandon()
