"""A server in a thread whose steps a test can hold, and the requests and responses of its tests."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import openai
import uvicorn
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from sfs_triton import Engine
from sfs_triton.serve.app import create_app
from sfs_triton.serve.settings import ServeSettings

TABLE = "Rewrite as JSON:\nid,name,age\n1,Ann,31\n2,Bob,45\n3,Kim,77\n4,Leo,12"
SUMS = "15,44,79,50"
STORY = (
    "Ann has 12 apples. Ann buys 7 more apples at the market. Then Ann loses 4 apples. How many apples does Ann have?"
)
KEY = "correct-horse-battery"


class Gate:
    """Let a server's steps through one at a time, once it is closed."""

    def __init__(self, app: FastAPI):
        self._permits, self._open, self._held = threading.Semaphore(0), True, False
        self.rows: list[int] = []  # that took each step
        inner = app.state.metrics.step

        def step(rows: int) -> None:
            inner(rows)
            self.rows.append(rows)
            if not self._open:
                self._held = not self._permits.acquire(blocking=False)
                assert not self._held or self._permits.acquire(timeout=30)
                self._held = False

        app.state.metrics.step = step

    @property
    def taken(self) -> int:
        return len(self.rows)

    @property
    def held(self) -> bool:
        """Return True if a step has run and the engine is held until :meth:`let`."""
        return self._held

    def close(self) -> None:
        self._open = False

    def let(self, steps: int = 1) -> None:
        self._permits.release(steps)

    def open(self) -> None:
        self._open = True
        self.let(10_000)


class Running:
    """A server on a free port of loopback, in a thread."""

    def __init__(self, engine: Engine, **settings):
        self.app = create_app(engine, ServeSettings(**settings))
        self.gate = Gate(self.app)
        self.worker = self.app.state.worker
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._server = uvicorn.Server(uvicorn.Config(self.app, log_level="warning", timeout_graceful_shutdown=5))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()
        wait_for(lambda: self._server.started)

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + "/v1", api_key=key, max_retries=0, timeout=60)

    def post(self, body, path: str = "/v1/chat/completions", **options) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, **options)

    def metrics(self) -> dict[str, float]:
        """Unlabelled samples by name, and generations by how they ended."""
        page, values = httpx.get(self.url + "/metrics").text, {}
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                if not sample.labels or "how" in sample.labels and sample.name.endswith("_total"):
                    values[sample.labels.get("how", sample.name)] = sample.value
        return values

    def stop(self) -> None:
        self.gate.open()
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()


def wait_for(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Poll ``condition`` until it holds; fail after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.005)


@contextmanager
def serving(engine: Engine, **settings) -> Iterator[Running]:
    """Run a server on ``engine``; ``settings`` are those of :class:`ServeSettings`."""
    running = Running(engine, **settings)
    try:
        yield running
    finally:
        running.stop()


def chat(text: str = SUMS, **more) -> dict:
    """Return the body of a chat request of one message."""
    return {"model": "embedded", "messages": [{"role": "user", "content": text}], "max_tokens": 32, **more}


def error_of(response: httpx.Response) -> dict:
    """Return the error of a refusal; its shape is checked."""
    assert 400 <= response.status_code < 600, response.text
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}, body
    assert body["error"]["message"] and isinstance(body["error"]["message"], str)
    return body["error"]


def chunks_of(response: httpx.Response) -> list[dict]:
    """Return the objects of a stream, without ``[DONE]``."""
    return [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]


def text_of(response: httpx.Response) -> str:
    """Return the text of a complete chat response."""
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def answers(url: str) -> bool:
    """Return True if a GET of ``url`` succeeds."""
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def gauge(url: str, headers: dict, name: str) -> float:
    """Return a metric of the server whose API is at ``url``, which ends in ``/v1``."""
    page = httpx.get(url[:-3] + "/metrics", headers=headers).text
    return next(s.value for f in text_string_to_metric_families(page) for s in f.samples if s.name == name)
