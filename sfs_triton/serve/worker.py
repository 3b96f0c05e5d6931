"""The engine's one thread, and the requests that wait for it."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import replace

from ..engine import Engine
from ..errors import OutOfDeviceMemory, RowFault
from ..generation import Frame
from ..session import Request, Run
from ..trace import StepTrace
from .errors import ApiError, busy, from_failure, stopping, too_late
from .rows import Failed, Finished, Job, Row
from .settings import ServeSettings

logger = logging.getLogger("sfs_triton")

_SMOOTH = 0.3  # weight of the newest batch in the mean that Retry-After is estimated from


class Watch:
    """Who is told what happens; this one does nothing. Called in the engine's thread, ``ended`` in others as well."""

    def batch(self, rows: int) -> None:
        """So many rows begin."""

    def step(self, rows: int) -> None:
        """So many rows took a step."""

    def ended(self, how: str, tokens: int, nfe: int) -> None:
        """A job is over: "stop" or "length" with its answer; else "left", "late" or "failed"."""


class Scheduler:
    """Runs waiting requests in batches, one batch at a time, in the order of arrival.

    The oldest request and those behind it that have the same sampler settings and cache policy make a batch; what comes
    later waits for the next one. Rows need not have anything else in common, and each gets the tokens that it would get
    alone. A row whose client has left, or whose time is over, is out of the batch before the next step.
    """

    def __init__(self, engine: Engine, settings: ServeSettings, watch: Watch | None = None):
        self._engine, self._settings, self._watch = engine, settings, watch or Watch()
        self._waiting: deque[Job] = deque()
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="sfs_triton-serve", daemon=True)
        self._closed, self._last_call = False, float("inf")
        self._most = settings.max_batch
        self._mean = 1.0  # seconds of a batch
        self._pieces: dict[int, str] = {}
        self.rows: list[Row] = []  # of the batch that runs

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Rows that take steps."""
        return sum(not row.job.over for row in self.rows)

    @property
    def ready(self) -> bool:
        """Whether new requests are taken."""
        return self._thread.is_alive() and not self._closed and self._last_call == float("inf")

    def start(self) -> None:
        self._thread.start()

    def check_room(self) -> None:
        """Raise ApiError if a request would not be taken now: 429 where the queue is full, 503 at shutdown."""
        if not self.ready:
            raise stopping()
        waiting = len(self._waiting)
        if waiting >= self._settings.max_queue:
            raise busy(waiting, self._mean * (1 + waiting / self._most))

    def submit(self, job: Job) -> None:
        """Queue a job, whose events begin to come; raises as :meth:`check_room`."""
        with self._change:
            self.check_room()
            self._waiting.append(job)
            self._change.notify()

    def leave(self, job: Job) -> None:
        """Its client has gone: forget the job if it waits, end its row before the next step if it runs."""
        job.left = True
        with self._change:
            if job in self._waiting:
                self._waiting.remove(job)
                self._end(job, None, "left")

    def drain(self, seconds: float) -> None:
        """Take no more requests; those that there are have ``seconds`` to finish. Safe in a signal handler."""
        self._last_call = min(self._last_call, time.monotonic() + seconds)

    def close(self, timeout: float = 10.0) -> None:
        """End everything before its next step, and the thread with it; waits for that at most ``timeout`` seconds."""
        with self._change:
            self._closed = True
            self._change.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)

    # ------------------------------------------------------------------------------------- in the engine's thread

    def _work(self) -> None:
        while jobs := self._next_batch():
            began = time.monotonic()
            try:
                self._run(jobs)
            except OutOfDeviceMemory as error:
                self._split(jobs, error)
            except Exception as error:  # one bad batch must not end the server
                logger.exception("a batch of %d requests failed", len(jobs))
                self._end_all(jobs, from_failure(error), "failed")
            finally:
                self.rows = []
            self._mean += _SMOOTH * (time.monotonic() - began - self._mean)
        with self._change:
            self._end_all(list(self._waiting), stopping(), "late")
            self._waiting.clear()

    def _next_batch(self) -> list[Job]:
        """Wait for requests, take those that can run together; none at the end."""
        with self._change:
            while not self._closed:
                self._end_late()
                if self._waiting:
                    return self._take()
                self._change.wait()
        return []

    def _take(self) -> list[Job]:
        """The oldest request and those that can go along with it."""
        kind = _kind(self._waiting[0])
        jobs = [job for job in self._waiting if _kind(job) == kind][: self._most]
        for job in jobs:
            self._waiting.remove(job)
        return jobs

    def _run(self, jobs: list[Job]) -> None:
        engine, spec = self._engine, self._engine.spec
        with engine._run(_merge([job.wanted.request for job in jobs])) as run:
            self._watch.batch(len(jobs))
            rows = [Row(job, engine.text, spec.mask_id, spec.eos_id, self._piece) for job in jobs]
            self.rows = rows
            for frame in run.frames():
                self._watch.step(self.running)
                traces = run.take_traces()
                for index, row in enumerate(rows):
                    self._after_step(run, row, index, frame, traces[index])
                if not self.running:
                    return
                with self._change:
                    self._end_late()
            self._end_rest(run, rows)

    def _after_step(self, run: Run, row: Row, index: int, frame: Frame, trace: StepTrace | None) -> None:
        """Let a row see a step, and drop it if it is over before its canvas is full."""
        job = row.job
        if job.over:
            return
        if job.left:
            self._end(job, None, "left")
        elif (error := self._late(job)) is not None:
            self._end(job, error, "late")
        else:
            row.see(frame, index, trace)
            self._count(job)
        if job.over and frame.running[index]:
            run.drop(index)

    def _end_rest(self, run: Run, rows: list[Row]) -> None:
        """Rows that are over with undecided positions: by their sampler's own bounds, or because they broke."""
        open_rows = {index: row for index, row in enumerate(rows) if not row.job.over}
        try:
            done = dict(enumerate(run.results()))
        except RowFault as fault:
            logger.error("%s", fault)
            done, error = fault.finished, from_failure(fault)
        for index, row in open_rows.items():
            if index in done:
                row.end(done[index])
                self._count(row.job)
            else:
                self._end(row.job, error, "failed")

    def _split(self, jobs: list[Job], error: OutOfDeviceMemory) -> None:
        """What does not fit together may fit in parts; batches stay smaller from now on."""
        rest = [job for job in jobs if not job.over]
        if len(rest) == 1 or not rest:
            self._end_all(rest, from_failure(error), "failed")
            return
        self._most = max(1, len(rest) // 2)
        logger.warning("batches have at most %d rows from now on: %s", self._most, error)
        with self._change:
            self._waiting.extendleft(reversed(rest))

    def _late(self, job: Job) -> ApiError | None:
        """What to tell a job whose time is over."""
        now = time.monotonic()
        if self._closed or now > self._last_call:
            return stopping()
        return too_late(self._settings.time_limit) if now > job.deadline else None

    def _end_late(self) -> None:
        """Drop waiting jobs whose time is over; the caller holds the lock."""
        for job in [job for job in self._waiting if self._late(job)]:
            self._waiting.remove(job)
            self._end(job, self._late(job), "late")

    def _end_all(self, jobs: list[Job], error: ApiError, how: str) -> None:
        for job in jobs:
            self._end(job, error, how)

    def _end(self, job: Job, error: ApiError | None, how: str) -> None:
        """End a job without an answer; ``error`` is None where nobody is left to hear it."""
        if not job.over:
            job.tell(Failed(error or ApiError(499, "the client has left")))
            self._watch.ended(how, 0, 0)

    def _count(self, job: Job) -> None:
        """Count a job that has just got its answer."""
        if isinstance(job.outcome, Finished):
            self._watch.ended(job.outcome.reason, job.outcome.tokens, job.outcome.nfe)

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            self._pieces[token] = self._engine.text.piece(token)
        return self._pieces[token]


def _kind(job: Job) -> tuple:
    """What jobs of one batch have in common."""
    request = job.wanted.request
    return request.sampler, request.policy


def _merge(requests: list[Request]) -> Request:
    """One request for the rows of several; they are traced if one of them is."""
    return replace(
        requests[0],
        canvases=[row for request in requests for row in request.canvases],
        starts=[start for request in requests for start in request.starts],
        seeds=[seed for request in requests for seed in request.seeds],
        trace=any(request.trace for request in requests),
    )
