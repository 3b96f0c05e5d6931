"""The engine's single thread and its requests."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from ..decoding.params import BatchKey
from ..engine import Engine
from ..errors import DeviceFault, OutOfDeviceMemory, require
from ..runner import CudaGraphs
from ..scheduling.scheduler import Scheduler, bounds_around, least_bounds
from ..scheduling.sequence import Sequence as InFlight
from ..scheduling.sequence import fault_of
from .errors import ApiError, busy, device_failed, from_failure, stopped, stopping, too_late
from .jobs import Failed, Finished, Job, OutputProcessor
from .settings import ServeSettings

logger = logging.getLogger("sfs_triton")

_MEMORY = Path("/proc/meminfo")
_SMOOTH = 0.1  # weight of the newest answer in the mean that Retry-After is estimated from
_LOOK = 0.05  # seconds between an idle thread's checks for requests past their time limit


class EngineObserver:
    """Observer interface; this one ignores all events. Called in the engine's thread, ``ended`` in others as well."""

    def joined(self) -> None:
        """A sequence has got its slot."""

    def step(self, sequences: int) -> None:
        """This many sequences took a step together."""

    def ended(self, how: str, tokens: int, nfe: int) -> None:
        """A job has finished: "stop" or "length" with its answer; else "left", "late" or "failed"."""


class Worker:
    """Run requests concurrently, in the order of arrival as far as slots allow (:mod:`sfs_triton.scheduling`).

    A request joins a running batch as soon as a slot of its batch key is free, between any two steps, and its tokens
    equal those of a run alone. A sequence leaves before the next step when its answer is complete, its client has
    disconnected, or its time limit has passed.
    """

    def __init__(self, engine: Engine, settings: ServeSettings, observer: EngineObserver | None = None):
        self._engine, self._settings, self._observer = engine, settings, observer or EngineObserver()
        most = engine.spec.max_length
        memory = settings.cache_memory or _half_of_what_is_free(engine.model.device)
        self._key = BatchKey(settings.sampler.blanked(), settings.cache, trace=False, frames=True)  # of the defaults
        least = engine.batches.bytes_needed(self._key, 1, least_bounds(most))
        require(memory is None or least <= memory, f"cache_memory={memory}: the shortest canvas takes {least} bytes")
        self._scheduler = Scheduler(
            engine.batches,
            lambda sequence: bounds_around(sequence, most),
            slots=settings.max_batch,
            most=settings.max_batches,
            memory=memory,
            joined=self._joined,
        )
        self._arrived: deque[Job] = deque()  # not yet received by the engine's thread
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="sfs_triton-serve", daemon=True)
        self._closed, self._last_call = False, float("inf")
        self.failure: ApiError | None = None  # for all requests, once the thread has failed
        self._mean = 1.0  # seconds per answer, from its sequence's start
        self._pieces: dict[int, str] = {}
        self._processors: dict[InFlight, OutputProcessor] = {}  # of unfinished jobs

    @property
    def waiting(self) -> int:
        """Number of requests without a slot."""
        return len(self._arrived) + self._scheduler.waiting

    @property
    def jobs(self) -> list[Job]:
        """Unfinished jobs that have a slot."""
        return [processor.job for processor in list(self._processors.values()) if processor.started]

    @property
    def running(self) -> int:
        """Number of running sequences."""
        return len(self.jobs)

    @property
    def ready(self) -> bool:
        """True if new requests are accepted."""
        return self._thread.is_alive() and not self._closed and self._last_call == float("inf")

    def start(self) -> None:
        self._thread.start()

    def check_room(self) -> None:
        """Raise ApiError if a request would be refused now: 429 if the queue is full, 503 at shutdown or if the
        engine's thread has failed."""
        if not self.ready:
            raise self.failure or stopping()
        waiting = self.waiting
        if waiting >= self._settings.max_queue:
            raise busy(waiting, self._mean * (1 + waiting / self._settings.max_batch))

    def submit(self, *jobs: Job) -> None:
        """Queue the jobs of a request; their events start to be emitted. Raises as :meth:`check_room`."""
        with self._change:
            self.check_room()
            self._arrived.extend(jobs)
            self._change.notify()

    def leave(self, job: Job) -> None:
        """Cancel a job whose client has disconnected: drop it if it waits, end its sequence before the next step."""
        job.left = True
        with self._change:
            if job in self._arrived:
                self._arrived.remove(job)
                self._end(job, None, "left")

    def drain(self, seconds: float) -> None:
        """Accept no more requests; current ones have ``seconds`` to finish. Safe in a signal handler."""
        self._last_call = min(self._last_call, time.monotonic() + seconds)

    def close(self, timeout: float = 10.0) -> None:
        """End all jobs before their next step, then the thread; wait for it at most ``timeout`` seconds."""
        with self._change:
            self._closed = True
            self._change.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)

    # ------------------------------------------------------------------------------------- in the engine's thread

    def _work(self) -> None:
        try:
            self._capture_defaults()
            while self._receive():
                try:
                    stepped = self._scheduler.step()
                except Exception as error:
                    self._recover(error)
                else:
                    self._after_step(stepped)
        except BaseException as error:
            self.failure = device_failed() if isinstance(error, DeviceFault) else stopped()
            logger.critical("the engine's thread has failed; no more requests are accepted", exc_info=True)
        finally:  # however this thread ends, no client may keep waiting
            self._closed = True
            with self._change:
                left = [*self._arrived, *(processor.job for processor in self._processors.values())]
                self._arrived.clear()
            for job in left:
                self._end(job, self.failure or stopping(), "failed" if self.failure else "late")
            self._processors.clear()
            with suppress(DeviceFault):  # which is in the log already
                self._scheduler.close()

    def _capture_defaults(self) -> None:
        """Capture the graphs for short requests with the server's defaults, so that no client waits for that."""
        if self._engine.execution != CudaGraphs.name:
            return
        bounds = least_bounds(self._engine.spec.max_length, 2 * self._settings.default_tokens)
        try:
            self._scheduler.capture(self._key, bounds)
        except OutOfDeviceMemory as error:
            logger.warning("graphs are captured when they are needed: %s", error)

    def _receive(self) -> bool:
        """Receive new jobs, end late and abandoned ones; wait while there are none. Return False if closed."""
        with self._change:
            while not self._closed and not self._arrived and not self._processors:
                self._change.wait(_LOOK if self._last_call < float("inf") else None)
            arrived, closed = list(self._arrived), self._closed
            self._arrived.clear()
        if closed:
            self._arrived.extend(arrived)
            return False
        engine = self._engine
        for job in arrived:
            sequence = job.request.sequence
            self._processors[sequence] = OutputProcessor(job, engine.text, engine.spec, self._piece)
            self._scheduler.submit(sequence)
        for sequence, processor in list(self._processors.items()):
            if processor.job.left:
                self._part(sequence, None, "left")
            elif (error := self._late(processor.job)) is not None:
                self._part(sequence, error, "late")
        return True

    def _joined(self, sequence: InFlight) -> None:
        self._processors[sequence].start()
        self._observer.joined()

    def _after_step(self, stepped: list[InFlight]) -> None:
        """Emit the steps of ``stepped`` sequences, and the answers of finished ones."""
        if stepped:
            self._observer.step(len(stepped))
        for sequence in stepped:
            if (processor := self._processors.get(sequence)) is not None and not sequence.fault:
                with self._blamed(sequence):
                    processor.process(sequence)
                    if processor.job.finished:
                        self._part(sequence, None, "left")
        for sequence, processor in list(self._processors.items()):
            if sequence.finished and sequence.fault:
                error = fault_of([sequence], {})
                logger.error("%s", error)
                self._part(sequence, from_failure(error), "failed")
            elif sequence.finished:  # with undecided positions, by its sampler's own limits
                with self._blamed(sequence):
                    processor.end(sequence.result(self._engine.spec, None))
                    self._part(sequence, None, "left")

    @contextmanager
    def _blamed(self, sequence: InFlight) -> Iterator[None]:
        """On an error while a sequence's output is emitted, end only that sequence."""
        try:
            yield
        except Exception as error:
            logger.error("the output of a sequence could not be emitted", exc_info=error)
            if sequence in self._processors:
                self._part(sequence, from_failure(error), "failed")

    def _part(self, sequence: InFlight, error: ApiError | None, how: str) -> None:
        """Remove a sequence. Its job gets ``error`` unless it has its answer; None: there is no client left."""
        job = self._processors.pop(sequence).job
        if isinstance(job.outcome, Finished):
            self._observer.ended(job.outcome.reason, job.outcome.tokens, job.outcome.nfe)
            self._mean += _SMOOTH * (job.outcome.seconds - self._mean)
        self._end(job, error, how)
        if not sequence.finished:
            self._scheduler.drop(sequence)

    def _recover(self, error: Exception) -> None:
        """End the sequences whose persistent batch failed; nothing recovers from a device that has failed."""
        if isinstance(error, DeviceFault):
            raise error
        if isinstance(error, OutOfDeviceMemory):
            logger.warning("a generation was refused: %s", error)
        else:
            logger.error("a generation failed", exc_info=error)
        for sequence in self._scheduler.failed:
            if sequence in self._processors:
                self._part(sequence, from_failure(error), "failed")

    def _late(self, job: Job) -> ApiError | None:
        """Return the error for a job past its time limit, else None."""
        now = time.monotonic()
        if now > self._last_call:
            return stopping()
        return too_late(self._settings.time_limit) if now > job.deadline else None

    def _end(self, job: Job, error: ApiError | None, how: str) -> None:
        """End a job without an answer; ``error`` is None if there is no client left."""
        if not job.finished:
            job.emit(Failed(error or ApiError(499, "the client has left")))
            self._observer.ended(how, 0, 0)

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            self._pieces[token] = self._engine.text.piece(token)
        return self._pieces[token]


def _half_of_what_is_free(device: torch.device) -> int | None:
    """Return half of the host's free memory in bytes, on Linux; None for a GPU, which reports when it is full."""
    if device.type != "cpu" or not _MEMORY.exists():
        return None
    free = re.search(r"^MemAvailable:\s*(\d+) kB", _MEMORY.read_text(), re.MULTILINE)
    return int(free[1]) * 512 if free else None
