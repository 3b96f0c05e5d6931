"""Faults beneath a server: its engine's thread, its weights, its memory, its loop, its process."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")
pytest.importorskip("typer")

import httpx  # noqa: E402
import torch  # noqa: E402

from sfs_triton import DeviceFault, Engine, FixedSteps, SlowFast  # noqa: E402
from sfs_triton.kernels.errors import KernelError  # noqa: E402
from sfs_triton.models import Transformer  # noqa: E402
from sfs_triton.runner import CudaGraphs, ModelRunner, faults  # noqa: E402
from sfs_triton.serve.jobs import OutputProcessor  # noqa: E402
from tests.support.combinations import Failing, engine_with, stand_in  # noqa: E402
from tests.support.paths import ROOT  # noqa: E402
from tests.support.server import (  # noqa: E402
    STORY,
    SUMS,
    TABLE,
    answers,
    chat,
    chunks_of,
    error_of,
    gauge,
    serving,
    text_of,
    wait_for,
)

# -------------------------------------------------------------------------------------------------- the engine's thread


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_a_dead_engine_thread_keeps_nobody_waiting(embedded, monkeypatch, caplog, kind):
    """A BaseException ends the thread. Running, waiting and later requests all get an error."""

    def killed(*given, **named):
        raise kind("killed")

    with serving(Engine(embedded.model, embedded.text), max_batch=2, max_batches=1) as server:
        with ThreadPoolExecutor(8) as pool:
            server.gate.close()
            first = pool.submit(server.post, chat(sampler="vanilla", stream=True))
            wait_for(lambda: server.gate.taken == 1)
            sent = [pool.submit(server.post, chat(sampler="vanilla", seed=n)) for n in range(3)]
            sent.append(pool.submit(server.post, chat()))  # of another kind, for which there is no batch
            wait_for(lambda: server.worker.waiting == 4)
            monkeypatch.setattr(ModelRunner, "run", killed)
            server.gate.open()
            began = time.monotonic()
            answered = [future.result() for future in sent]
            assert time.monotonic() - began < 10
        for response in answered:
            assert response.status_code == 503 and error_of(response)["code"] == "engine_stopped"
        assert chunks_of(first.result())[-1]["error"]["code"] == "engine_stopped"
        assert "[DONE]" not in first.result().text
        assert httpx.get(server.url + "/ready").status_code == 503
        health = httpx.get(server.url + "/health")
        assert health.status_code == 503 and error_of(health)["code"] == "engine_stopped"
        later = server.post(chat())
        assert later.status_code == 503 and error_of(later)["code"] == "engine_stopped"
        counted = server.metrics()
        assert counted["sfs_running_sequences"] == counted["sfs_waiting_requests"] == 0 and counted["failed"] == 5
    (record,) = [record for record in caplog.records if record.levelname == "CRITICAL"]
    assert "engine's thread has failed" in record.getMessage() and record.exc_info[0] is kind


def test_output_that_cannot_be_emitted_fails_alone(embedded, monkeypatch):
    """The fault is between the engine and a client, not in the engine."""
    see = OutputProcessor.process

    def broken(follower, sequence):
        if sequence.params.seed == 13 and sequence.steps == 2:
            raise UnicodeError("no text")
        see(follower, sequence)

    monkeypatch.setattr(OutputProcessor, "process", broken)
    wanted = embedded.generate(SUMS, gen_length=32, sampler=FixedSteps()).text
    with serving(embedded) as server, ThreadPoolExecutor(4) as pool:
        sent = [pool.submit(server.post, chat(sampler="vanilla", seed=seed)) for seed in (12, 13, 14)]
        fine, bad, other = (future.result() for future in sent)
        assert bad.status_code == 500 and error_of(bad)["code"] == "internal_error" and "no text" not in bad.text
        assert text_of(fine) == text_of(other) == wanted
        assert server.metrics()["failed"] == 1 and server.worker.ready


# ------------------------------------------------------------------------------------------------------------- weights


def spoiled(engine: Engine, **changes) -> Engine:
    return Engine(Transformer(engine.spec, replace(engine.model.weights, **changes)), engine.text)


def test_weights_of_nan_in_one_layer(embedded):
    """Every sequence reads them, so every one fails, each with its own error. The server continues."""
    layers = list(embedded.model.weights.layers)
    down = layers[1].down.clone()
    down[5, 7] = torch.nan
    layers[1] = replace(layers[1], down=down)
    with serving(spoiled(embedded, layers=tuple(layers))) as server, ThreadPoolExecutor(4) as pool:
        for response in pool.map(lambda text: server.post(chat(text)), (SUMS, TABLE, STORY)):
            assert response.status_code == 500 and error_of(response)["code"] == "numerical_fault"
            assert error_of(response)["message"] == "the model produced NaN logits: sequence 0 at step 0"
        assert server.worker.ready and server.metrics()["failed"] == 3
        down[5, 7] = embedded.model.weights.layers[1].down[5, 7]
        assert text_of(server.post(chat())) == embedded.generate(SUMS, gen_length=32).text


def test_weights_of_nan_that_one_prompt_reads(embedded):
    """NaN in the embedding of one token: sequences that share the batch get their usual result."""
    others = {text: embedded.generate(text, gen_length=32, sampler=FixedSteps()) for text in (SUMS, STORY)}
    seen = {token for row in others.values() for token in row.canvas}
    (bad, *_) = [token for token in embedded.text.encode(TABLE) if token not in seen]
    embedding = embedded.model.weights.embedding.clone()
    embedding[bad] = torch.nan
    with serving(spoiled(embedded, embedding=embedding)) as server, ThreadPoolExecutor(4) as pool:
        server.gate.close()
        held = pool.submit(server.post, chat(max_tokens=4))
        wait_for(lambda: server.gate.taken == 1)
        sent = {text: pool.submit(server.post, chat(text, sampler="vanilla")) for text in (SUMS, TABLE, STORY)}
        wait_for(lambda: server.worker.waiting == 3)
        server.gate.open()
        assert error_of(sent[TABLE].result())["code"] == "numerical_fault"
        for text, wanted in others.items():
            assert text_of(sent[text].result()) == wanted.text
        assert held.result().status_code == 200 and max(server.gate.rows) == 3


# -------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("at", [1, 3])
def test_rows_that_begin_again_for_want_of_memory_tell_nothing_twice(embedded, monkeypatch, at):
    """Streams with frames and noise, in a batch without memory for a later step with more than one sequence."""
    launch, failed = ModelRunner.launch, []

    def crowded(runner, plan):
        if len(plan.steps) > 1 and runner.slots > 1 and at <= max(plan.steps.values()):
            failed.append(len(plan.steps))
            raise torch.OutOfMemoryError("no room for activations")
        launch(runner, plan)

    monkeypatch.setattr(ModelRunner, "launch", crowded)
    sampler = FixedSteps(temperature=0.8)
    wanted = [embedded.generate(SUMS, gen_length=16, sampler=sampler, seed=seed) for seed in (1, 2, 3)]
    request = {"sampler": "vanilla", "temperature": 0.8, "max_tokens": 16, "stream": True, "frames": True}
    with serving(Engine(embedded.model, embedded.text)) as server, ThreadPoolExecutor(4) as pool:
        server.gate.close()
        held = pool.submit(server.post, chat(max_tokens=4))
        wait_for(lambda: server.gate.taken == 1)
        sent = [pool.submit(server.post, chat(**request, seed=seed)) for seed in (1, 2, 3)]
        wait_for(lambda: server.worker.waiting == 3)
        server.gate.open()
        for future, alone in zip(sent, wanted, strict=True):
            chunks = chunks_of(future.result())
            frames = [chunk["diffusion"] for chunk in chunks if "diffusion" in chunk]
            assert [frame["type"] for frame in frames] == ["start"] + ["step"] * alone.nfe + ["end"]
            assert [frame["step"] for frame in frames[1:-1]] == list(range(alone.nfe))
            canvas = [None] * 16
            for commit in (commit for frame in frames[1:-1] for commit in frame["committed"]):
                assert canvas[commit["position"]] is None
                canvas[commit["position"]] = commit["token"]
            assert canvas == alone.response
            said = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])
            assert said == frames[-1]["text"] == alone.text
        assert failed == [3] and held.result().status_code == 200


# ---------------------------------------------------------------------------------------------------------------- loops


@pytest.mark.parametrize("at", [None, 0, 5])
def test_a_loop_that_fails_is_replaced_under_its_requests(embedded, at, caplog):
    """It fails in preparation or in the middle of an answer; clients see no difference."""
    engine = engine_with(embedded, Failing(at))
    wanted = [embedded.generate(SUMS, gen_length=8, sampler=SlowFast(temperature=0.7), seed=s).text for s in (1, 2, 3)]
    with serving(engine, max_batch=2) as server, ThreadPoolExecutor(4) as pool:
        sent = [
            pool.submit(server.post, chat(max_tokens=8, temperature=0.7, seed=1)),
            pool.submit(server.post, chat(max_tokens=8, temperature=0.7, seed=2, stream=True)),
            pool.submit(server.post, chat(max_tokens=8, temperature=0.7, seed=3)),
        ]
        one, two, three = (future.result() for future in sent)
        assert [text_of(one), text_of(three)] == [wanted[0], wanted[2]]
        said = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks_of(two)]
        assert "".join(said) == wanted[1]
        assert engine.execution == "eager" and "failed" not in server.metrics()
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ["(torch, CUDA graphs) failed, going on with (torch, eager): CUDA error: an illegal address"]


def test_health_says_what_is_used_after_a_fall_back(embedded):
    with serving(engine_with(embedded, Failing(0))) as server:
        before = httpx.get(server.url + "/health").json()
        assert (before["execution"], before["fallback"]) == ("cuda_graphs", None)
        assert server.post(chat(max_tokens=8)).status_code == 200
        after = httpx.get(server.url + "/health").json()
        wanted = {"status": "ok", "backend": "torch", "execution": "eager"}
        assert after == {**after, **wanted, "fallback": "CUDA error: an illegal address"}


def test_graphs_of_the_defaults_are_captured_before_the_first_request(embedded):
    captured = []

    def capture(runner, shape):
        captured.append((runner.length, shape))
        return stand_in(runner, shape)

    with serving(engine_with(embedded, CudaGraphs(capture=capture)), max_batch=2) as server:
        wait_for(lambda: len(captured) == 2)
        assert text_of(server.post(chat(max_tokens=8))) == embedded.generate(SUMS, gen_length=8).text
        assert len(captured) == 2 and {length for length, _ in captured} == {256}


def test_a_stream_that_another_back_end_would_contradict_is_ended(embedded):
    """A client that was sent nothing yet gets the other answer, with its log probabilities."""
    made = embedded.generate(SUMS, gen_length=16, sampler=FixedSteps(), trace=True)
    wanted, logs = made.text, [math.log(p) for p in made.probabilities[: embedded.spec.end_of(made.tokens)]]
    for stream in (True, False):
        model = Transformer(embedded.spec, embedded.model.weights)
        scatter, steps = model.ops.scatter_choices, []

        def spoiled(state, token, *given, scatter=scatter, steps=steps, **named):
            steps.append(token)
            if len(steps) > 5:
                raise KernelError("no shared memory")
            scatter(state, torch.full_like(token, 11), *given, **named)

        model.backend, model.ops = "triton", replace(model.ops, scatter_choices=spoiled)
        with serving(Engine(model, embedded.text, pinned=False)) as server:
            response = server.post(chat(sampler="vanilla", max_tokens=16, stream=stream, logprobs=True))
            if stream:
                assert chunks_of(response)[-1]["error"]["code"] == "restarted"
                assert "[DONE]" not in response.text
            else:
                assert text_of(response) == wanted
                scores = response.json()["choices"][0]["logprobs"]["content"]
                assert [score["logprob"] for score in scores] == pytest.approx(logs, abs=1e-4)
            assert text_of(server.post(chat(sampler="vanilla", max_tokens=16))) == wanted


def test_a_device_that_has_failed_ends_the_server(embedded, monkeypatch, caplog):
    """Every request gets an error that says so, none waits, and nothing is tried again."""
    launched = []

    def broken(runner, plan):
        launched.append(plan)
        raise RuntimeError("CUDA error: device-side assert triggered")

    def failed(device):
        raise DeviceFault("'cuda:0' has failed: CUDA error: device-side assert triggered")

    with serving(Engine(embedded.model, embedded.text), max_batch=2, max_batches=1) as server:
        with ThreadPoolExecutor(4) as pool:
            server.gate.close()
            first = pool.submit(server.post, chat(sampler="vanilla", stream=True))
            wait_for(lambda: server.gate.taken == 1)
            sent = [pool.submit(server.post, chat(sampler="vanilla", seed=n)) for n in range(3)]
            wait_for(lambda: server.worker.waiting == 3)
            monkeypatch.setattr(ModelRunner, "launch", broken)
            monkeypatch.setattr(faults, "is_idle", failed)
            server.gate.open()
            began = time.monotonic()
            for response in (future.result() for future in sent):
                assert response.status_code == 503 and error_of(response)["code"] == "device_failed"
            assert chunks_of(first.result())[-1]["error"]["code"] == "device_failed"
            assert time.monotonic() - began < 10
        for path, code in (("/health", "device_failed"), ("/ready", "not_ready")):
            response = httpx.get(server.url + path)
            assert response.status_code == 503 and error_of(response)["code"] == code
        later = server.post(chat())
        assert later.status_code == 503 and error_of(later)["code"] == "device_failed"
        assert not server.worker.ready and len(launched) == 1
    (record,) = [record for record in caplog.records if record.levelname == "CRITICAL"]
    assert record.exc_info[0] is DeviceFault


# --------------------------------------------------------------------------------------------------------- its process


class Crowd:
    """Clients that send requests repeatedly, each on a connection of its own, and the outcomes."""

    def __init__(self, url: str, clients: int):
        self.url, self.done = url, []  # (when it was sent, what came of it)
        self._end, self._go, self._lock, self._busy = False, threading.Event(), threading.Lock(), 0
        self._go.set()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(clients)]
        for thread in self._threads:
            thread.start()

    def _ask(self, number: int) -> None:
        rng = random.Random(number)
        while self._go.wait() and not self._end:
            with self._lock:
                if not self._go.is_set():
                    continue
                self._busy += 1
            more = {"stream": rng.random() < 0.5, "sampler": rng.choice(["vanilla", "slowfast"])}
            body, sent = chat(max_tokens=rng.choice([8, 24, 64]), **more), time.monotonic()
            try:
                self.done.append((sent, httpx.post(self.url + "/chat/completions", json=body, timeout=60)))
            except httpx.TransportError as error:
                self.done.append((sent, error))
                return
            finally:
                with self._lock:
                    self._busy -= 1

    def hold(self) -> None:
        """Send no more until :meth:`go_on`; returns once the server has taken in all that was sent, and not all is
        answered. What it has not accepted yet would be lost with its socket."""
        for _ in range(50):
            with self._lock:
                self._go.clear()
            seen = 0
            while busy := self._busy:
                counts = [gauge(self.url, {}, f"sfs_{name}") for name in ("waiting_requests", "running_sequences")]
                seen = seen + 1 if sum(counts) == busy == self._busy else 0
                if seen == 2:
                    return
            self._go.set()
            time.sleep(0.2)
        raise AssertionError("the server was never found at work")

    def go_on(self) -> None:
        self._go.set()

    def join(self) -> None:
        self._end = True
        self._go.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), "a client still waits for an answer"


def outcome_of(response: httpx.Response) -> str:
    """ "answered", or the code of the refusal, whose shape is checked."""
    if response.status_code != 200:
        assert response.status_code == 503, response.text
        return error_of(response)["code"]
    if not response.headers["content-type"].startswith("text/event-stream"):
        assert response.json()["choices"][0]["finish_reason"] in ("stop", "length")
        return "answered"
    lines = [line for line in response.text.splitlines() if line]
    if lines[-1] == "data: [DONE]":
        return "answered"
    error = json.loads(lines[-1].removeprefix("data: "))["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error["code"]


@pytest.mark.parametrize("grace", [pytest.param("30", marks=pytest.mark.slow), "0.05"])
def test_a_signal_under_load_leaves_no_one_without_an_answer(grace):
    """SIGTERM to ``sfs serve``: requests are answered, or refused in the documented form if the grace is too short."""
    command = [sys.executable, "-m", "sfs_triton.cli", "serve", "--port", "0", "--device", "cpu", "--dtype", "float32"]
    command += ["--max-batch", "2", "--max-batches", "2", "--grace", grace]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            url = process.stderr.readline().split(" at ")[1].strip()
            wait_for(lambda: answers(url[:-3] + "/ready"), 60)
            crowd = Crowd(url, clients=8)
            wait_for(lambda: len(crowd.done) >= 6, 60)
            crowd.hold()
            told = time.monotonic()
            process.send_signal(signal.SIGTERM)
            crowd.go_on()
            assert process.wait(60) == 0
            crowd.join()
        finally:
            process.kill()
    outcomes: dict[str, int] = {}
    for sent, response in crowd.done:
        if isinstance(response, httpx.TransportError):
            assert sent >= told, f"a request that had come was dropped: {response!r}"
            outcome = "no connection"
        else:
            outcome = outcome_of(response)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    assert set(outcomes) <= {"answered", "shutting_down", "no connection"} and outcomes["answered"] >= 6
    assert (grace == "30") or outcomes.get("shutting_down", 0) > 0, "the grace was long enough"
