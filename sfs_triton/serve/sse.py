"""Server-sent events: delivery from the engine's thread to a client, and detection of disconnected clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.responses import JSONResponse, Response

from .answers import ResponseFormatter
from .errors import ApiError
from .guard import refuse
from .jobs import Event, Failed, Finished, Job
from .worker import Worker

_QUIET = 15.0  # seconds after which a comment keeps a silent stream open
_STALLED = 60.0  # seconds that a client may leave a chunk unread


class EventQueue:
    """Queue of the events of a request's jobs, read by the event loop that created it."""

    def __init__(self) -> None:
        self._loop, self._events = asyncio.get_running_loop(), asyncio.Queue()

    def put(self, choice: int, event: Event) -> None:
        """Add an event of a choice; called in the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (choice, event))
        except RuntimeError:  # the loop is closed: the event has no receiver
            pass

    async def get(self, timeout: float | None = None) -> tuple[int, Event] | None:
        """Return the next event and its choice; None if there is none within ``timeout`` seconds."""
        try:
            return await asyncio.wait_for(self._events.get(), timeout)
        except (asyncio.TimeoutError, TimeoutError):
            return None


class Answering(Response):
    """The response to queued jobs, one per choice: one JSON object at their end, or a stream from their start.

    Nothing is sent before the first event, so that an earlier failure has its own status. The jobs are cancelled, and
    their slots freed, when one of them fails, the client disconnects or the server cancels the response.
    """

    def __init__(self, jobs: Sequence[Job], queue: EventQueue, formatter: ResponseFormatter, worker: Worker):
        super().__init__()
        self._jobs, self._queue, self._formatter, self._worker = jobs, queue, formatter, worker

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        watch = asyncio.create_task(self._watch(receive))
        try:
            first = await self._queue.get()
            if isinstance(first[1], (Failed, Finished)):
                await (await self._whole(first))(scope, receive, send)
            else:
                await self._stream(first, send)
        finally:
            watch.cancel()
            self._leave()

    def _leave(self) -> None:
        for job in self._jobs:
            if not job.finished:
                self._worker.leave(job)

    async def _watch(self, receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._leave()
        self._queue.put(0, Failed(ApiError(499, "the client has left")))  # wakes a reader that would wait for ever

    async def _whole(self, first: tuple[int, Event]) -> Response:
        """Wait for all choices; the first failure is the answer instead."""
        done, (choice, event) = {}, first
        while not isinstance(event, Failed):
            done[choice] = event
            if len(done) == len(self._jobs):
                return JSONResponse(self._formatter.whole([done[n] for n in sorted(done)]))
            choice, event = await self._queue.get()
        return refuse(event.error)

    async def _stream(self, first: tuple[int, Event], send: Any) -> None:
        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store"}
        headers["x-accel-buffering"] = "no"  # a proxy must not hold chunks back
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": pairs})
        async for event in self._events(first):
            lines = [": keep-alive"] if event is None else map("data: {}".format, self._formatter.chunks(*event))
            body = "".join(line + "\n\n" for line in lines).encode()
            try:
                await asyncio.wait_for(send({"type": "http.response.body", "body": body, "more_body": True}), _STALLED)
            except (asyncio.TimeoutError, TimeoutError):  # connected but not reading: treated as disconnected
                return
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self, first: tuple[int, Event]) -> AsyncIterator[tuple[int, Event] | None]:
        """Yield events up to the last; None after a while without one."""
        item: tuple[int, Event] | None = first
        running = len(self._jobs)
        while True:
            yield item
            running -= item is not None and isinstance(item[1], Finished)
            if not running or item is not None and isinstance(item[1], Failed):
                return
            item = await self._queue.get(_QUIET)
