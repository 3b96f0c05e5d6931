"""Handles of running generations: streamed, or in another thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import AbstractContextManager, ExitStack

from ..errors import SequenceFault, require
from .outputs import Frame, Generation
from .run import Run


class Stream(Iterator[Frame]):
    """Frames of a generation, one per step. It starts with the first frame and runs only while one is requested.

    Args:
        run: context of the generation.
        single: it is of one prompt, not of a list.
        abandon: called with the end of a generation that is dropped while it runs, to be called later. A stream may be
            collected in any thread and at any time, where neither a lock may be waited for nor the device be used.
    """

    def __init__(self, run: AbstractContextManager[Run], single: bool, abandon: Callable[[Callable[[], None]], None]):
        self._context, self._single, self._abandon = run, single, abandon
        self._stack = ExitStack()
        self._run: Run | None = None
        self._frames: Iterator[Frame] | None = None
        self._done: list[Generation] | None = None
        self._failure: BaseException | None = None
        self._closed = False
        self._lock = threading.RLock()

    def __next__(self) -> Frame:
        with self._lock:
            return self._next()

    def _next(self) -> Frame:
        if self._closed:
            raise StopIteration
        try:
            if self._run is None:
                self._run = self._stack.enter_context(self._context)
                self._frames = self._run.frames()
            if (frame := next(self._frames, None)) is not None:
                return frame
            self._done = self._run.results()
        except SequenceFault as fault:
            self._failure = fault  # raised by result(); iteration itself ends normally
        except BaseException as failure:
            self._failure, self._closed = failure, True
            self._stack.__exit__(type(failure), failure, failure.__traceback__)  # ranks of a group must learn of it
            raise
        self.close()
        raise StopIteration

    def result(self) -> Generation | list[Generation]:
        """Run the remaining steps; return the same as :meth:`Engine.generate`.

        Raises:
            RuntimeError: the stream was closed before its end.
        """
        for _ in self:
            pass
        if self._failure is not None:
            raise self._failure
        if self._done is None:
            raise RuntimeError("this stream was closed before its end")
        return self._done[0] if self._single else self._done

    def drop(self, index: int) -> None:
        """End one sequence before its next step; the others continue. Its result is its present canvas.

        A step that is already queued still runs.

        Raises:
            RuntimeError: the stream has not yielded its first frame yet, or has ended.
            ArgumentError: there is no such sequence.
        """
        with self._lock:
            if self._run is None or self._closed:
                raise RuntimeError("a sequence can be dropped between the first frame of a stream and its end")
            self._run.drop(index)

    def close(self) -> None:
        """Stop, after a step that another thread may be running. Closing again has no effect."""
        with self._lock:
            self._closed = True
            self._stack.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self._run is not None and not self._closed:
            self._abandon(self._stack.close)


class Pending:
    """Handle of a generation that is queued or runs in another thread."""

    def __init__(
        self,
        worker: futures.Executor,
        worker_name: str,
        work: Callable[[threading.Event], Generation | list[Generation]],
    ):
        self._halt, self._name = threading.Event(), worker_name
        self._future = worker.submit(work, self._halt)

    def done(self) -> bool:
        """Return whether it has finished, failed or been cancelled."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> Generation | list[Generation]:
        """Wait at most ``timeout`` seconds; return or raise as :meth:`Engine.generate`.

        Raises:
            ArgumentError: ``timeout`` is not a number.
            TimeoutError: the generation has not finished by then.
            concurrent.futures.CancelledError: it was cancelled.
            RuntimeError: called by an ``on_step``, in the thread that runs the generation.
        """
        fine = timeout is None or isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
        require(fine, f"timeout={timeout!r} is not a number of seconds")
        if not self.done() and threading.current_thread().name.startswith(self._name):
            raise RuntimeError(
                "a pending generation cannot wait for another: they run in one thread, one after another"
            )
        try:
            return self._future.result(timeout)
        except futures.TimeoutError as error:  # not the built-in class before Python 3.11
            if self.done() and self._future.exception() is error:
                raise  # raised by the generation itself
        raise TimeoutError(f"the generation is not finished after {timeout} s")

    def cancel(self) -> None:
        """Cancel the generation before its next step."""
        self._halt.set()
        self._future.cancel()
