"""The server: results for OpenAI's client, refusals, batching, and shutdown."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")
pytest.importorskip("typer")

import httpx  # noqa: E402
import openai  # noqa: E402
import torch  # noqa: E402
from prometheus_client.parser import text_string_to_metric_families  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import sfs_triton  # noqa: E402
from sfs_triton import ArgumentError, Engine, FixedSteps, OutOfDeviceMemory, SlowFast, Threshold  # noqa: E402
from sfs_triton.cli import main as cli  # noqa: E402
from sfs_triton.decoding.samplers import SAMPLERS  # noqa: E402
from sfs_triton.engine import ASKED  # noqa: E402
from sfs_triton.models import Transformer  # noqa: E402
from sfs_triton.runner import ModelRunner  # noqa: E402
from sfs_triton.serve import app as app_module  # noqa: E402
from sfs_triton.serve import sse  # noqa: E402
from sfs_triton.serve.errors import ApiError  # noqa: E402
from sfs_triton.serve.jobs import Failed, Started  # noqa: E402
from sfs_triton.serve.settings import ServeSettings  # noqa: E402
from tests.support.dream import vocabulary, write_checkpoint  # noqa: E402
from tests.support.paths import ROOT  # noqa: E402
from tests.support.server import (  # noqa: E402
    KEY,
    STORY,
    SUMS,
    TABLE,
    Running,
    answers,
    chat,
    chunks_of,
    error_of,
    gauge,
    serving,
    text_of,
    wait_for,
)


def streamed(server: Running, **request) -> tuple[str, list[dict], object]:
    """Text, frames and the last chunk of a stream through the official client."""
    extra = {name: request.pop(name) for name in ("sampler", "cache", "frames") if name in request}
    chunks = list(server.client().chat.completions.create(**request, stream=True, extra_body=extra))
    frames = [chunk.diffusion for chunk in chunks if "diffusion" in (chunk.model_extra or {})]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    return text, frames, chunks[-1]


# ------------------------------------------------------------------------------------------------ the official client


@pytest.mark.parametrize("text", [SUMS, TABLE])
def test_chat_is_what_the_engine_generates(server, embedded, text):
    wanted = embedded.generate(text, gen_length=64)
    answer = server.client().chat.completions.create(**chat(text, max_tokens=64))
    assert answer.choices[0].message.content == wanted.text and answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop" and answer.model == "embedded"
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (wanted.prompt_length, len(wanted.tokens))
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.nfe == wanted.nfe and usage.tokens_per_forward == pytest.approx(wanted.tokens_per_forward, abs=1e-4)


def test_a_conversation_goes_through_the_template(server, embedded):
    messages = [
        {"role": "system", "content": "Sums."},
        {"role": "user", "content": SUMS},
        {"role": "assistant", "content": "79-44=35"},
        {"role": "user", "content": [{"type": "text", "text": "15,"}, {"type": "text", "text": "44"}]},
    ]
    plain = [*messages[:3], {"role": "user", "content": "15,44"}]
    wanted = embedded.generate(plain, gen_length=16)
    answer = server.client().chat.completions.create(model="embedded", messages=messages, max_completion_tokens=16)
    assert answer.choices[0].message.content == wanted.text and answer.usage.prompt_tokens == wanted.prompt_length


def test_a_message_comes_back_in_every_form_that_clients_give_it(server, embedded):
    """Nulls, names and empty lists change nothing; null content is an empty answer."""
    nulls = dict.fromkeys(("refusal", "annotations", "audio", "function_call", "tool_calls", "name", "reasoning"))
    empty = {"annotations": [], "tool_calls": [], "name": "sfs"}
    parts = [{"type": "text", "text": "79-", "cache_control": None}, {"type": "text", "text": "44=35"}]
    forms = [nulls | {"content": "79-44=35"}, empty | {"content": "79-44=35"}, {"content": parts}]
    ask, again = {"role": "user", "content": SUMS}, {"role": "user", "content": "15,44", "name": "Ann"}

    def said(answer: dict) -> str:
        body = {"messages": [ask, {"role": "assistant", **answer}, again], "max_tokens": 8}
        return text_of(server.post(body))

    for content, given in (("79-44=35", forms), ("", [nulls | {"content": None}, {}])):
        messages = [ask, {"role": "assistant", "content": content}, {"role": "user", "content": "15,44"}]
        wanted = embedded.generate(messages, gen_length=8).text
        assert [said(answer) for answer in given] == [wanted] * len(given)


@pytest.mark.parametrize("prompt", ["id,name\n1,", [629, 538, 465], ["id,name\n1,"], [[629, 538, 465]]])
def test_completions_take_the_prompt_as_it_is(server, embedded, prompt):
    only = prompt[0] if isinstance(prompt, list) and not isinstance(prompt[0], int) else prompt
    wanted = embedded.generate(only, gen_length=16, apply_chat_template=False)
    answer = server.client().completions.create(model="embedded", prompt=prompt, max_tokens=16)
    assert answer.choices[0].text == wanted.text and answer.usage.nfe == wanted.nfe


CHOICES = [
    ({"kind": "slowfast", "preset": "fast", "tau_high": 0.7}, "region"),
    ({"kind": "threshold", "tau": 0.8, "block_length": 16}, {"kind": "dual"}),
    ({"kind": "fixed", "steps": 8}, {"kind": "refresh", "prompt_interval": 3, "response_interval": 2, "ratio": 0.0}),
    ("vanilla", "none"),
    ({"kind": "fixed", "steps": 8, "eos": "last", "eos_penalty": 10000}, "none"),
    ({"kind": "slowfast", "eos_stop": True}, {"kind": "region", "capacity": 24, "refresh_every": 4}),
]
GROWING = [
    ({"kind": "slowfast", "grow": 8}, "region"),
    ({"kind": "fixed", "steps": 8, "grow": 16, "end_think_token_ids": [7, 9], "end_think_logit_boost": 30}, "none"),
]


def as_settings(sampler, cache):
    """Return the same parameters for the engine."""
    from sfs_triton.decoding.params import parse_cache

    options = dict(sampler) if isinstance(sampler, dict) else {"kind": sampler}
    kind = options.pop("kind")
    made = SlowFast.preset(options.pop("preset", "paper"), **options) if kind == "slowfast" else None
    caching = dict(cache) if isinstance(cache, dict) else {"kind": cache}
    return made or SAMPLERS[kind](**options), parse_cache(caching.pop("kind"), **caching)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("sampler", "cache"), CHOICES + GROWING)
def test_samplers_and_caches_by_request_whole_and_streamed(server, embedded, sampler, cache):
    mine, policy = as_settings(sampler, cache)
    wanted = embedded.generate(TABLE, gen_length=64, sampler=mine, cache=policy)
    extra = {"sampler": sampler, "cache": cache}
    whole = server.client().chat.completions.create(**chat(TABLE, max_tokens=64), extra_body=extra)
    assert whole.choices[0].message.content == wanted.text and whole.usage.nfe == wanted.nfe
    request = chat(TABLE, max_tokens=64, stream_options={"include_usage": True}, **extra)
    text, frames, last = streamed(server, **request)
    assert text == wanted.text and frames == []
    assert last.usage.nfe == wanted.nfe and last.usage.completion_tokens == len(wanted.tokens) and last.choices == []


def test_a_stream_is_text_in_order(server, embedded):
    """Every piece is a part that was decided from the left."""
    wanted = embedded.generate(SUMS, gen_length=32, trace=True)
    chunks = list(server.client().chat.completions.create(**chat(), stream=True))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert len(pieces) > 1 and "".join(pieces) == wanted.text
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert chunks[0].choices[0].delta.role == "assistant" and len({chunk.id for chunk in chunks}) == 1
    completion = server.client().completions.create(model="embedded", prompt="id,name\n1,", max_tokens=16, stream=True)
    wanted = embedded.generate("id,name\n1,", gen_length=16, apply_chat_template=False)
    assert "".join(chunk.choices[0].text for chunk in completion) == wanted.text


@pytest.mark.sampled(3)
@pytest.mark.parametrize("text", [SUMS, STORY])
@pytest.mark.parametrize(("sampler", "cache"), CHOICES)
def test_frames_rebuild_every_step(server, embedded, text, sampler, cache):
    mine, policy = as_settings(sampler, cache)
    wanted = embedded.generate(text, gen_length=32, sampler=mine, cache=policy, trace=True)
    said, frames, _ = streamed(server, **chat(text, sampler=sampler, cache=cache, frames=True))
    first, *steps, last = frames
    assert [frame["type"] for frame in frames] == ["start"] + ["step"] * wanted.nfe + ["end"]
    assert (first["prompt_length"], first["response_length"], first["suffix_length"]) == (wanted.prompt_length, 32, 0)
    assert first["sampler"]["kind"] in ("slowfast", "threshold", "fixed") and first["cache"]["kind"] == policy.name
    canvas, closed = [first["mask_id"]] * 32, None
    for frame, step in zip(steps, wanted.trace, strict=True):
        assert (frame["step"], frame["phase"], frame["cycle"]) == (step.step, step.phase, step.cycle)
        offset = step.block * (mine.block_length or 0)
        assert frame["span"] == [offset + step.s, None if step.e is None else offset + step.e]
        assert [c["position"] for c in frame["committed"]] == step.committed
        for commit in frame["committed"]:
            assert commit["confidence"] == pytest.approx(step.confidence[commit["position"]], abs=1e-4)
            canvas[commit["position"]] = commit["token"]
            assert commit["text"] == embedded.text.piece(commit["token"])
        closed = frame["closed_from"] or closed
        if closed is not None:
            canvas[closed:] = [first["eos_id"]] * (32 - closed)
        assert frame["masks_left"] == canvas.count(first["mask_id"])
        assert first["mask_id"] not in canvas[: frame["settled"]]
    assert canvas == wanted.response and (closed is not None) == (mine.eos_stop and 1 in wanted.response)
    assert last["text"] == said == wanted.text and last["nfe"] == wanted.nfe


@pytest.mark.parametrize("eos_stop", [False, True])
def test_suffixes_are_filled_in_before(server, embedded, eos_stop):
    before, after = "id,name\n1,Ann\n", "\n3,Kim"
    ids = [embedded.text.encode(text) for text in (before, after)]
    canvas = ids[0] + [embedded.spec.mask_id] * 6 + ids[1]
    sampler = SlowFast(eos_stop=eos_stop)
    wanted = embedded.infill(canvas, sampler=sampler)
    hole = wanted.canvas[len(ids[0]) : len(ids[0]) + 6]
    hole = hole[: hole.index(embedded.spec.eos_id)] if embedded.spec.eos_id in hole else hole
    extra = {"sampler": {"kind": "slowfast", "eos_stop": eos_stop}}
    request = {"model": "embedded", "prompt": before, "suffix": after, "max_tokens": 6}
    whole = server.client().completions.create(**request, extra_body=extra)
    assert whole.choices[0].text == embedded.text.decode(hole)
    assert whole.usage.prompt_tokens == len(ids[0]) + len(ids[1]) and whole.usage.nfe == wanted.nfe
    chunks = list(server.client().completions.create(**request, stream=True, extra_body={**extra, "frames": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    frames = [chunk.diffusion for chunk in chunks if "diffusion" in (chunk.model_extra or {})]
    assert frames[0]["prompt_length"] == len(ids[0]) and frames[0]["suffix_length"] == len(ids[1])
    committed = {c["position"]: c["token"] for frame in frames[1:-1] for c in frame["committed"]}
    assert all(wanted.canvas[len(ids[0]) + place] == token for place, token in committed.items())


def test_stop_strings_cut_and_end_the_row(server, embedded):
    wanted = embedded.generate(TABLE, gen_length=96, sampler=FixedSteps(block_length=8))
    before = wanted.text[: wanted.text.index('"name"')]
    request = chat(TABLE, max_tokens=96, stop=["nowhere", '"name"'])
    sampler = {"kind": "vanilla", "block_length": 8}
    whole = server.client().chat.completions.create(**request, extra_body={"sampler": sampler})
    assert whole.choices[0].message.content == before and whole.choices[0].finish_reason == "stop"
    assert whole.usage.nfe < 24 < wanted.nfe and whole.usage.completion_tokens < len(wanted.tokens)
    request = {**request, "sampler": sampler, "stream_options": {"include_usage": True}}
    text, _, last = streamed(server, **request)
    assert text == before and last.usage.nfe == whole.usage.nfe
    assert last.usage.completion_tokens == whole.usage.completion_tokens


def test_a_text_is_whole_where_a_sampler_leaves_masks(server):
    """Stop strings, streams and neither give the same text of a sequence that ends with undecided positions."""
    sampler = {"kind": "slowfast", "block_length": 16, "max_cycles": 1, "tau_high": 0.999, "k_max": 1}
    asked = chat(STORY, max_tokens=64, sampler=sampler)
    text = text_of(server.post(asked))
    assert text_of(server.post({**asked, "stop": ["never said"]})) == text
    assert streamed(server, **asked)[0] == streamed(server, **asked, stop="never said")[0] == text
    assert streamed(server, **asked, frames=True)[1][-2]["masks_left"] > 0
    assert text_of(server.post({**asked, "stop": ["never said", text[-3:]]})) == text[: text.index(text[-3:])]


def test_a_special_token_is_a_stop(tmp_path):
    """Special tokens are no part of a text; as a stop they end it."""
    folder, sampler = write_checkpoint(tmp_path / "checkpoint"), FixedSteps(steps=2)
    first = sfs_triton.load(folder, "cpu", "float32").generate("hello", gen_length=16, sampler=sampler)
    token = next(t for t in first.tokens[1:] if t != first.tokens[0])
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    stop = next(name for name, index in vocabulary().items() if index == token)
    settings["added_tokens_decoder"][str(token)] = {"content": stop, "special": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    engine = sfs_triton.load(folder, "cpu", "float32")
    at = engine.generate("hello", gen_length=16, sampler=sampler).tokens.index(token)
    with serving(engine) as server:
        asked = chat("hello", max_tokens=16, sampler={"kind": "fixed", "steps": 2}, stop=[stop])
        answer = server.post(asked).json()
        assert answer["choices"][0]["message"]["content"] == engine.text.decode(first.tokens[:at])
        assert (answer["choices"][0]["finish_reason"], answer["usage"]["completion_tokens"]) == ("stop", at + 1)
        assert streamed(server, **asked)[0] == engine.text.decode(first.tokens[:at])


@pytest.mark.parametrize("prompt", ["", [], [""], [[]]])
def test_completions_without_a_prompt(server, embedded, prompt):
    wanted = embedded.generate("", gen_length=16, apply_chat_template=False)
    answer = server.post({"prompt": prompt, "max_tokens": 16}, "/v1/completions").json()
    assert answer["choices"][0]["text"] == wanted.text and answer["usage"]["prompt_tokens"] == 0
    assert answer["usage"]["nfe"] == wanted.nfe


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", [kind for kind in SAMPLERS if kind != "slowfast"])
@pytest.mark.parametrize("length", [5, 20])
def test_a_length_within_a_block_is_rounded_up_and_cut(server, embedded, kind, length):
    sampler, size = SAMPLERS[kind](block_length=16), -(-length // 16) * 16
    wanted = embedded.generate(TABLE, gen_length=size, sampler=sampler, trace=True)
    tokens = wanted.response[:length]
    assert embedded.spec.eos_id not in tokens
    asked = chat(TABLE, max_tokens=length, sampler={"kind": kind, "block_length": 16})
    whole = server.post(asked).json()
    assert whole["choices"][0]["message"]["content"] == embedded.text.decode(tokens)
    assert whole["choices"][0]["finish_reason"] == "length"
    assert whole["usage"]["completion_tokens"] == length and whole["usage"]["nfe"] <= wanted.nfe
    text, frames, _ = streamed(server, **asked, frames=True)
    assert text == embedded.text.decode(tokens) and frames[0]["suffix_length"] == 0
    assert frames[0]["response_length"] == length and frames[-2]["masks_left"] == 0
    committed = {c["position"]: c["token"] for frame in frames[1:-1] for c in frame["committed"]}
    assert committed == dict(enumerate(tokens))


@pytest.mark.parametrize("length", [None, 20])
def test_a_length_within_a_part_that_grows_is_rounded_and_cut(server, embedded, length):
    whole = embedded.generate(TABLE, gen_length=120 if length is None else 24, sampler=SlowFast(grow=24))
    answer = server.post(chat(TABLE, max_tokens=length, sampler={"kind": "slowfast", "grow": 24})).json()
    assert answer["choices"][0]["message"]["content"] == embedded.text.decode(whole.response[:length])


def test_length_is_the_reason_where_nothing_ended(server):
    answer = server.client().chat.completions.create(**chat(TABLE, max_tokens=8))
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 8


# ----------------------------------------------------------------------------------------------------- seeds, batches


def test_the_same_seed_gives_the_same_tokens(server, embedded):
    ask = server.client().chat.completions.create
    request = chat(STORY, temperature=1.5)
    wanted = embedded.generate(STORY, gen_length=32, sampler=SlowFast(temperature=1.5), seed=7)
    once, again, other = (ask(**request, seed=seed) for seed in (7, 7, 8))
    assert once.choices[0].message.content == again.choices[0].message.content == wanted.text and once.seed == 7
    assert other.choices[0].message.content != wanted.text
    unseeded = ask(**request)
    repeated = ask(**request, seed=unseeded.seed)
    assert repeated.choices[0].message.content == unseeded.choices[0].message.content


def test_requests_that_wait_are_decoded_together_and_get_what_they_get_alone(embedded):
    sampler = SlowFast(temperature=0.7)
    asked = [(SUMS, 16, 3), (TABLE, 64, 4), (STORY, 40, 5), (SUMS, 32, 2**62), (SUMS, 16, 3)]
    wanted = [embedded.generate(t, gen_length=n, sampler=sampler, seed=s) for t, n, s in asked]
    with serving(embedded) as server, ThreadPoolExecutor(8) as pool:
        server.gate.close()
        first = pool.submit(server.post, chat(max_tokens=8))
        wait_for(lambda: server.gate.taken == 1)
        sent = [pool.submit(server.post, chat(t, max_tokens=n, seed=s, temperature=0.7)) for t, n, s in asked]
        other = pool.submit(server.post, chat(sampler="vanilla", max_tokens=8))
        wait_for(lambda: server.worker.waiting == 6)
        assert server.metrics()["sfs_waiting_requests"] == 6
        server.gate.open()
        answers = [future.result().json() for future in sent]
        assert first.result().status_code == other.result().status_code == 200
        for answer, alone in zip(answers, wanted, strict=True):
            assert answer["choices"][0]["message"]["content"] == alone.text
            assert answer["usage"]["nfe"] == alone.nfe and answer["usage"]["completion_tokens"] == len(alone.tokens)
        counted = server.metrics()
        assert counted["sfs_joined_sequences_total"] == 7 and max(server.gate.rows) == len(asked)
        assert counted["sfs_running_sequences"] == counted["sfs_waiting_requests"] == 0


def test_a_short_answer_does_not_wait_for_a_long_one(embedded):
    with serving(embedded) as server, ThreadPoolExecutor(4) as pool:
        server.gate.close()
        held = pool.submit(server.post, chat(max_tokens=4))
        wait_for(lambda: server.gate.taken == 1)
        lengths = (4, 60)
        short, long = (pool.submit(server.post, chat(sampler="vanilla", max_tokens=n)) for n in lengths)
        wait_for(lambda: server.worker.waiting == 2)
        server.gate.let(20)
        assert short.result().status_code == held.result().status_code == 200
        wait_for(lambda: server.worker.running == 1)  # an answer is there before its row is forgotten
        assert not long.done()
        server.gate.open()
        assert long.result().json()["usage"]["nfe"] == 60


# ----------------------------------------------------------------------------------------- limits, and clients that go


def test_a_full_queue_is_said_so(embedded):
    with serving(embedded, max_queue=2) as server, ThreadPoolExecutor(4) as pool:
        server.gate.close()
        sent = [pool.submit(server.post, chat(max_tokens=8))]
        wait_for(lambda: server.gate.taken == 1)
        sent += [pool.submit(server.post, chat(max_tokens=8)) for _ in range(2)]
        wait_for(lambda: server.worker.waiting == 2)
        refused = server.post(chat())
        assert refused.status_code == 429 and 1 <= int(refused.headers["retry-after"]) <= 60
        assert error_of(refused)["code"] == "queue_full"
        with pytest.raises(openai.RateLimitError):
            server.client().chat.completions.create(**chat())
        server.gate.open()
        assert [future.result().status_code for future in sent] == [200] * 3
        assert server.post(chat(max_tokens=8)).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row_before_the_next_step(embedded, stream):
    wanted = embedded.generate(STORY, gen_length=64, sampler=FixedSteps())
    with serving(embedded) as server, ThreadPoolExecutor(4) as pool:
        server.gate.close()
        held = pool.submit(server.post, chat(max_tokens=4))
        wait_for(lambda: server.gate.taken == 1)
        request = json.dumps(chat(sampler="vanilla", max_tokens=100, stream=stream, frames=stream)).encode()
        leaving = socket.create_connection(("127.0.0.1", server.port))
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(request)}\r\n"
        leaving.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + request)
        wait_for(lambda: server.worker.waiting == 1)
        staying = pool.submit(server.post, chat(STORY, sampler="vanilla", max_tokens=64))
        wait_for(lambda: server.worker.waiting == 2)
        server.gate.let(20)
        wait_for(lambda: held.done())
        wait_for(lambda: server.worker.running == 2 and server.gate.held)
        leaving.close()
        wait_for(lambda: any(job.left for job in jobs_of(server)))
        taken = server.gate.taken
        server.gate.let(1)
        wait_for(lambda: server.worker.running == 1)
        wait_for(lambda: server.gate.held and server.gate.taken == taken + 1)
        assert server.gate.rows[taken - 1 :] == [2, 1] and server.metrics()["left"] == 1
        server.gate.open()
        answer = staying.result().json()
        assert answer["choices"][0]["message"]["content"] == wanted.text and answer["usage"]["nfe"] == wanted.nfe
        assert sum(server.gate.rows[taken:]) == 64 - server.gate.rows[:taken].count(2)


def jobs_of(server: Running) -> list:
    return server.worker.jobs


def test_a_client_that_leaves_the_queue_makes_room(embedded):
    with serving(embedded, max_queue=1) as server, ThreadPoolExecutor(2) as pool:
        server.gate.close()
        held = pool.submit(server.post, chat(max_tokens=4))
        wait_for(lambda: server.gate.taken == 1)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.url + "/v1/chat/completions", json=chat(), timeout=0.3)
        wait_for(lambda: server.worker.waiting == 0)
        server.gate.open()
        assert held.result().status_code == 200 and server.metrics()["left"] == 1


@pytest.mark.parametrize("stream", [False, True])
def test_the_time_limit_ends_a_row(embedded, stream):
    with serving(embedded, time_limit=0.4) as server:
        began = time.monotonic()
        answer = server.post(chat(sampler="vanilla", max_tokens=400, stream=stream))
        assert time.monotonic() - began < 3
        if stream:
            assert answer.status_code == 200 and "[DONE]" not in answer.text
            last = [line for line in answer.text.splitlines() if line.startswith("data: ")][-1]
            assert json.loads(last[6:])["error"]["code"] == "time_limit"
            with pytest.raises(openai.APIError, match="not finished within 0.4 s"):
                streamed(server, **chat(sampler="vanilla", max_tokens=400))
        else:
            assert answer.status_code == 504 and error_of(answer)["code"] == "time_limit"
        wait_for(lambda: server.worker.running == 0)
        assert server.post(chat(max_tokens=4)).status_code == 200


def test_the_time_limit_holds_in_the_queue(embedded):
    with serving(embedded, time_limit=1.0) as server, ThreadPoolExecutor(2) as pool:
        server.gate.close()
        held = pool.submit(server.post, chat(sampler="vanilla", max_tokens=400))
        wait_for(lambda: server.gate.taken == 1)
        waiting = pool.submit(server.post, chat())
        wait_for(lambda: server.worker.waiting == 1)
        time.sleep(1.1)
        server.gate.open()
        for future in (held, waiting):
            assert future.result().status_code == 504


def sent_by(monkeypatch, stalls: bool) -> tuple[list[bytes], list]:
    """Return the data sent to a client that reads, or does not, while the engine is silent; and the dropped streams."""
    monkeypatch.setattr(sse, "_STALLED", 0.05)
    monkeypatch.setattr(sse, "_QUIET", 0.02)
    sent, given_up = [], []
    job = SimpleNamespace(finished=False)
    style = SimpleNamespace(chunks=lambda choice, event: ["x"])

    async def receive():
        await asyncio.sleep(30)

    async def send(message):
        sent.append(message.get("body"))
        await asyncio.sleep(30 if stalls and len(sent) > 1 else 0)
        if len(sent) == 4:
            queue.put(0, Failed(ApiError(500, "enough")))

    async def run():
        nonlocal queue
        queue = sse.EventQueue()
        queue.put(0, Started(None))
        await asyncio.wait_for(
            sse.Answering([job], queue, style, SimpleNamespace(leave=given_up.append))({}, receive, send), 20
        )

    queue = None
    asyncio.run(run())
    return sent, given_up


def test_a_client_that_does_not_read_is_given_up(monkeypatch):
    sent, given_up = sent_by(monkeypatch, stalls=True)
    assert sent == [None, b"data: x\n\n"] and len(given_up) == 1


def test_a_silent_stream_is_kept_open(monkeypatch):
    sent, _ = sent_by(monkeypatch, stalls=False)
    assert sent == [None, b"data: x\n\n", b": keep-alive\n\n", b": keep-alive\n\n", b"data: x\n\n", b""]


# ----------------------------------------------------------------------------------------------------------- access


def test_an_api_key_is_asked_for(embedded):
    with serving(embedded, api_key=KEY) as server:
        for headers in ({}, {"Authorization": f"Bearer {KEY}x"}, {"Authorization": KEY}, {"Authorization": "Bearer"}):
            for method, path in (("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/metrics")):
                refused = httpx.request(method, server.url + path, headers=headers)
                assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
                assert error_of(refused)["code"] == "invalid_api_key" and KEY not in refused.text
        with pytest.raises(openai.AuthenticationError):
            server.client("wrong-key-altogether").models.list()
        assert [model.id for model in server.client(KEY).models.list()] == ["embedded"]
        assert server.client(KEY).chat.completions.create(**chat(max_tokens=4)).usage.nfe > 0
        assert httpx.get(server.url + "/health").status_code == httpx.get(server.url + "/ready").status_code == 200


def test_names_of_other_sites_are_not_served(embedded):
    with serving(embedded, allowed_hosts=("box.local",)) as server:
        for name, status in (("evil.example", 421), ("localhost:1", 200), ("box.local:80", 200), ("[::1]:5", 200)):
            answer = httpx.get(server.url + "/v1/models", headers={"Host": name})
            assert answer.status_code == status, name
        assert error_of(httpx.get(server.url + "/health", headers={"Host": "evil"}))["code"] == "unknown_host"


def test_forms_of_other_sites_are_not_read(server):
    """Requests that a page of another origin can send without a preflight are refused."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        answer = httpx.post(
            server.url + "/v1/chat/completions", content=json.dumps(chat()), headers={"Content-Type": kind}
        )
        assert answer.status_code == 415 and error_of(answer)["code"] == "unsupported_media_type"


def test_bodies_that_are_too_large_or_too_slow(embedded):
    with serving(embedded, max_body=2048, body_seconds=0.3) as server:
        assert error_of(server.post(chat("x" * 3000)))["code"] == "too_large"
        parts = (b" " * 500 for _ in range(20))
        url, kind = server.url + "/v1/chat/completions", {"Content-Type": "application/json"}
        chunked = httpx.post(url, content=parts, headers=kind)
        assert chunked.status_code == 413 and error_of(chunked)["code"] == "too_large"
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as slow:
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            slow.sendall(head + b"Content-Length: 100\r\n\r\n{")
            assert slow.recv(100).startswith(b"HTTP/1.1 408 ")
        assert server.post(chat(max_tokens=4)).status_code == 200


def test_where_it_may_listen():
    for host in ("127.0.0.1", "localhost", "::1", "127.8.9.1"):
        assert ServeSettings(host=host).loopback
    for host in ("0.0.0.0", "::", "", "192.168.1.5", "example.org"):
        with pytest.raises(ArgumentError, match="other machines"):
            ServeSettings(host=host)
        ServeSettings(host=host, api_key=KEY)
        ServeSettings(host=host, without_key=True)
    for key in ("", "short", "with a space in it", "schl\u00fcssel-lang"):
        with pytest.raises(ArgumentError, match="API key") as refused:
            ServeSettings(api_key=key)
        assert not key or key not in str(refused.value)
    assert KEY not in repr(ServeSettings(api_key=KEY))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--host", "0.0.0.0"), ("host='0.0.0.0'", "API key", "--without-key")),
        (("--port", "70000"), ("port=70000",)),
        (("--sampler", "greedy"), ("greedy", "slowfast")),
        (("--sampler", "vanilla", "--preset", "fast"), ("'preset'", "vanilla")),
        (("--cache", "prefix"), ("prefix", "SlowFast")),
        (("--max-batch", "0"), ("max_batch=0",)),
        (("--max-batch", "2000"), ("max_batch=2000 is not an integer from 1 to 1024",)),
        (("--cache-memory", "0"), ("--cache-memory 0.0", "positive")),
        (("--cache-memory", "0.000001"), ("cache_memory=1073", "the shortest canvas takes")),
        (("--time-limit", "-1"), ("time_limit=-1",)),
        (("--api-key-file", "/nowhere/key"), ("/nowhere/key",)),
        (("--model", "/nowhere/model"), ("/nowhere/model",)),
        (("--host", "198.51.100.7", "--without-key"), ("198.51.100.7", "cannot be listened on")),
    ],
)
def test_the_command_refuses_by_name(options, words):
    result = CliRunner().invoke(cli.app, ["serve", "--port", "0", *options])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert all(word in result.stderr for word in words), result.stderr


def test_a_key_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    from sfs_triton.serve.command import _api_key

    (tmp_path / "key").write_text(KEY + "\n")
    monkeypatch.setenv("SFS_API_KEY", "another-key")
    assert _api_key(tmp_path / "key") == KEY and _api_key(None) == "another-key"
    monkeypatch.setenv("SFS_API_KEY", "")
    with pytest.raises(ArgumentError, match="API key"):
        ServeSettings(api_key=_api_key(None))


# ------------------------------------------------------------------------------------------------------- bad requests

USER = {"role": "user", "content": "hi"}
BAD_CHATS = {
    "unknown-model": ({"model": "gpt-9"}, 404, "gpt-9"),
    "unknown-field": ({"foo": 1}, 400, "'foo'"),
    "no-messages": ({"messages": []}, 400, "messages"),
    "a-string-of-messages": ({"messages": "hi"}, 400, "messages"),
    "unknown-role": ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role"),
    "null-content": ({"messages": [{"role": "user", "content": None}]}, 400, "'messages.0' is empty"),
    "image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "must be a text"),
    "mask-in-prompt": ({"messages": [{"role": "user", "content": "a <|mdm_mask|>"}]}, 400, "mask token"),
    "n": ({"n": 9}, 400, "1 to 8 choices"),
    "n-0": ({"n": 0}, 400, "1 to 8 choices"),
    "n-seed": ({"n": 2, "seed": 2**63 - 1}, 400, f"seed={2**63 - 1} and n=2: the last choice has a seed over"),
    "n-frames": ({"n": 2, "stream": True, "frames": True}, 400, "'frames' shows one choice, and n=2"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "calls no tools"),
    "tool-choice": ({"tool_choice": "auto"}, 400, "calls no tools"),
    "json-mode": ({"response_format": {"type": "json_object"}}, 400, "constrains no formats"),
    "json-schema": ({"response_format": {"type": "json_schema", "json_schema": {}}}, 400, "constrains no formats"),
    "logprobs": ({"logprobs": 1}, 400, "of chosen tokens only"),
    "top-logprobs": ({"logprobs": True, "top_logprobs": 2}, 400, "'top_logprobs' is not supported"),
    "logprobs-margin": (
        {"logprobs": True, "sampler": {"kind": "threshold", "metric": "margin"}},
        400,
        "'logprobs' needs probabilities, and the scores of Threshold are of metric='margin'",
    ),
    "penalty": ({"frequency_penalty": 0.5}, 400, "no penalties"),
    "bias": ({"logit_bias": {"5": 1}}, 400, "biases no tokens"),
    "tokens-0": ({"max_tokens": 0}, 400, "max_tokens"),
    "tokens-text": ({"max_tokens": "5"}, 400, "max_tokens"),
    "tokens-bool": ({"max_tokens": True}, 400, "max_tokens"),
    "tokens-over-context": ({"max_tokens": 510}, 400, "the context is 512"),
    "tokens-huge": ({"max_tokens": 10**30}, 400, "max_tokens"),
    "tokens-twice": ({"max_completion_tokens": 5}, 400, "not both"),
    "prompt-over-context": ({"messages": [{"role": "user", "content": "Ann " * 600}]}, 400, "the context is 512"),
    "prompt-huge": ({"messages": [{"role": "user", "content": "a" * 40_000}]}, 400, "the context is 512"),
    "temperature": ({"temperature": 3}, 400, "temperature"),
    "temperature-tiny": ({"temperature": 1e-9}, 400, "temperature=1e-09"),
    "top-p": ({"top_p": 0}, 400, "top_p"),
    "seed": ({"seed": -1}, 400, "seed"),
    "seed-huge": ({"seed": 2**63}, 400, "seed"),
    "stops": ({"stop": ["a"] * 5}, 400, "at most 4"),
    "stop-empty": ({"stop": ""}, 400, "1 to 256"),
    "frames": ({"frames": True}, 400, "'frames' needs 'stream'"),
    "usage": ({"stream_options": {"include_usage": True}}, 400, "'stream_options' needs 'stream'"),
    "sampler": ({"sampler": "greedy"}, 400, "sampler='greedy'"),
    "sampler-list": ({"sampler": ["slowfast"]}, 400, "'kind'"),
    "sampler-option": ({"sampler": {"kind": "threshold", "k_max": 4}}, 400, "'k_max'"),
    "sampler-type": ({"sampler": {"kind": "threshold", "tau": "high"}}, 400, "tau='high'"),
    "sampler-huge": ({"sampler": {"kind": "slowfast", "window": 600}}, 400, "window=600 is over 512"),
    "sampler-number": ({"sampler": {"kind": "slowfast", "tau_min": 10**400}}, 400, "tau_min=1000"),
    "preset": ({"sampler": {"kind": "slowfast", "preset": "draft"}}, 400, "draft"),
    "cache": ({"cache": "disk"}, 400, "disk"),
    "cache-pair": ({"cache": "prefix"}, 400, "SlowFast"),
    "cache-interval": ({"cache": {"kind": "refresh", "prompt_interval": 400}}, 400, "over 256"),
}


@pytest.mark.parametrize("name", BAD_CHATS)
def test_bad_chats_are_refused_by_name(server, name):
    changes, status, words = BAD_CHATS[name]
    answer = server.post(chat(**changes))
    assert answer.status_code == status and words in error_of(answer)["message"], answer.text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": ["a", "b"]}, "several take several requests"),
        ({"prompt": [1, 896]}, "no token id below 896"),
        ({"prompt": [5]}, "mask token"),
        ({"prompt": [-1]}, "no token id"),
        ({"prompt": [1] * 513}, "the context is 512"),
        ({"prompt": None}, "prompt"),
        ({"suffix": "a<|mdm_mask|>"}, "mask token"),
        ({"suffix": "Ann " * 600}, "the context is 512"),
        ({"echo": True}, "does not repeat"),
        ({"best_of": 2}, "'best_of' is not supported"),
        ({"logprobs": 1}, "of chosen tokens only"),
        ({"logprobs": True}, "of chosen tokens only"),
        ({"logprobs": 0, "sampler": "multi-block"}, "the scores of MultiBlock are of metric='entropy'"),
        ({"messages": [USER]}, "'messages'"),
    ],
)
def test_bad_completions_are_refused_by_name(server, changes, words):
    answer = server.post({"prompt": "1,", "max_tokens": 4, **changes}, "/v1/completions")
    assert answer.status_code == 400 and words in error_of(answer)["message"], answer.text


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"messages": [{"role": "user", "content": "a\x00b"}]}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "hi"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "hi"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "hi"}], "seed": ' + b"9" * 5000 + b"}",
    ],
)
def test_malformed_bodies(server, body):
    answer = httpx.post(server.url + "/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert error_of(answer)["type"] == "invalid_request_error"


def test_control_characters_in_a_prompt_are_text(server):
    answer = server.post(chat("a\x00b\x1b[31m\u202e\u0007", max_tokens=4))
    assert answer.status_code == 200, answer.text
    assert "\\x1b" in error_of(server.post(chat(model="\x1b[31m")))["message"]


def test_values_that_ask_for_nothing_are_accepted(server):
    harmless = {
        "n": 1,
        "user": "me",
        "tools": [],
        "tool_choice": "none",
        "parallel_tool_calls": True,
        "response_format": {"type": "text"},
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "logprobs": False,
        "store": False,
        "top_p": 1,
        "stop": None,
    }
    assert server.post(chat(max_tokens=4, **harmless)).status_code == 200


def test_routes_that_are_not_there(server):
    for method, path, status in (("GET", "/nope", 404), ("GET", "/v1/completions", 405), ("DELETE", "/health", 405)):
        answer = httpx.request(method, server.url + path)
        assert answer.status_code == status and error_of(answer)["type"] == "invalid_request_error"
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert error_of(httpx.get(server.url + "/v1/models/other"))["code"] == "model_not_found"
    assert server.client().models.retrieve("embedded").context_length == 512


def test_default_length_follows_the_context(embedded):
    with serving(embedded, default_tokens=100, max_tokens=120) as server:
        request = {"messages": [USER], "sampler": {"kind": "fixed", "steps": 1}}
        assert server.post(request).json()["usage"]["completion_tokens"] <= 100
        assert "limit of 120" in error_of(server.post({**request, "max_tokens": 121}))["message"]
        long = {**request, "messages": [{"role": "user", "content": "Ann " * 245}]}
        used = server.post({**long, "sampler": {"kind": "threshold", "tau": 0.0, "block_length": 8}})
        assert used.status_code == 200, used.text


# ------------------------------------------------------------------------------------------------------ internal errors


def test_a_row_that_breaks_fails_alone(embedded):
    model = Transformer(embedded.spec, embedded.model.weights)
    scatter = model.ops.scatter_choices

    def spoiled(state, *given, **named):
        scatter(state, *given, **named)
        if state.history.shape[1] == 1 and state.step[0] == 2:  # not in the lane of the first request
            state.score[0] = torch.nan

    model.ops = replace(model.ops, scatter_choices=spoiled)
    engine = Engine(model, embedded.text)
    wanted = embedded.generate(SUMS, gen_length=16, sampler=Threshold(block_length=8)).text
    with serving(engine) as server, ThreadPoolExecutor(4) as pool:
        server.gate.close()
        held = pool.submit(server.post, chat(max_tokens=4))
        wait_for(lambda: server.gate.taken == 1)
        sent = []
        for index in (1, 2):
            request = chat(max_tokens=16, sampler={"kind": "threshold", "block_length": 8})
            sent.append(pool.submit(server.post, request))
            wait_for(lambda index=index: server.worker.waiting == index)
        server.gate.open()
        broken, fine = (future.result() for future in sent)
        assert broken.status_code == 500 and "NaN" in error_of(broken)["message"]
        assert fine.json()["choices"][0]["message"]["content"] == wanted
        assert held.result().status_code == 200 and server.metrics()["failed"] == 1


def test_a_batch_that_fails_does_not_end_the_server(embedded, monkeypatch):
    engine = Engine(embedded.model, embedded.text)
    with serving(engine) as server:
        with monkeypatch.context() as patch:
            patch.setattr(engine.batches, "take", lambda *given: 1 / 0)
            answer = server.post(chat())
            assert answer.status_code == 500 and "ZeroDivision" not in answer.text
            assert error_of(answer)["type"] == "server_error"
        assert server.post(chat(max_tokens=4)).status_code == 200


def test_an_error_outside_of_the_engine_is_told_in_shape(embedded, monkeypatch):
    with serving(embedded) as server:
        monkeypatch.setattr(app_module, "prepare", lambda *given: 1 / 0)
        answer = server.post(chat())
        assert answer.status_code == 500 and error_of(answer)["code"] == "internal_error"


@pytest.mark.parametrize("where", ["caches", "step"])
def test_what_does_not_fit_together_runs_in_parts(embedded, monkeypatch, where):
    engine = Engine(embedded.model, embedded.text)
    take, launch = engine.batches.take, ModelRunner.launch

    def narrow(key, slots, bounds):
        if where == "caches" and slots > 2:
            raise OutOfDeviceMemory(f"{slots} canvases are too many")
        return take(key, slots, bounds)

    def crowded(runner, plan):
        if where == "step" and len(plan.steps) > 2:
            raise torch.OutOfMemoryError("no room for activations")
        launch(runner, plan)

    monkeypatch.setattr(engine.batches, "take", narrow)
    monkeypatch.setattr(ModelRunner, "launch", crowded)
    wanted = embedded.generate(SUMS, gen_length=16).text
    with serving(engine) as server, ThreadPoolExecutor(8) as pool:
        server.gate.close()
        held = pool.submit(server.post, chat(max_tokens=4))
        wait_for(lambda: server.gate.taken == 1)
        sent = [pool.submit(server.post, chat(max_tokens=16)) for _ in range(4)]
        sent.append(pool.submit(server.post, chat(max_tokens=16, stream=True)))
        wait_for(lambda: server.worker.waiting == 5)
        server.gate.open()
        *answers, streamed_answer = (future.result() for future in sent)
        assert [answer.json()["choices"][0]["message"]["content"] for answer in answers] == [wanted] * 4
        chunks = chunks_of(streamed_answer)
        assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"]) == wanted
        assert held.result().status_code == 200 and max(server.gate.rows) == (2 if where == "caches" else 1)


def test_what_can_never_fit_is_refused_in_one_line(embedded, caplog):
    engine = Engine(embedded.model, embedded.text)
    with serving(engine, cache_memory=2**20) as server:
        refused = server.post(chat(max_tokens=400, cache="region"))
        assert refused.status_code == 400 and "caches may take 1.0 MiB" in error_of(refused)["message"]
        assert server.post(chat(max_tokens=8)).status_code == 200
    assert len(caplog.records) == 1 and caplog.records[0].exc_info is None


# --------------------------------------------------------------------------------------------------- state and the end


def test_state_pages(server):
    about = {"status": "ok", "backend": "torch", "execution": "eager", "reason": ASKED, "fallback": None}
    about["quantization"] = None
    assert httpx.get(server.url + "/health").json() == about
    assert httpx.get(server.url + "/ready").json() == {"status": "ready"}
    assert [httpx.head(server.url + path).status_code for path in ("/health", "/ready")] == [200, 200]
    page = httpx.get(server.url + "/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    names = {family.name for family in text_string_to_metric_families(page.text)}
    assert {
        "sfs_http_requests",
        "sfs_tokens",
        "sfs_step_sequences",
        "sfs_waiting_requests",
        "sfs_running_sequences",
    } <= names


def test_a_folder_of_the_page_is_served(embedded, tmp_path, monkeypatch):
    (tmp_path / "index.html").write_text("<title>canvas</title>")
    monkeypatch.setattr(app_module, "PAGE", tmp_path)
    with serving(embedded) as server:
        assert httpx.get(server.url + "/").text == "<title>canvas</title>"
        assert httpx.get(server.url + "/v1/models").status_code == 200
        assert error_of(httpx.get(server.url + "/../setup.py"))
        assert httpx.get(server.url + "/%2e%2e/setup.py").status_code == 404


def test_draining_takes_nothing_new(embedded):
    with serving(embedded) as server, ThreadPoolExecutor(2) as pool:
        server.gate.close()
        held = pool.submit(server.post, chat(max_tokens=8))
        wait_for(lambda: server.gate.taken == 1)
        server.worker.drain(30)
        assert httpx.get(server.url + "/ready").status_code == 503
        refused = server.post(chat())
        assert refused.status_code == 503 and refused.headers["retry-after"]
        assert error_of(refused)["code"] == "shutting_down"
        server.gate.open()
        assert held.result().status_code == 200


def test_grace_ends(embedded):
    with serving(embedded) as server, ThreadPoolExecutor(2) as pool:
        server.gate.close()
        held = pool.submit(server.post, chat(sampler="vanilla", max_tokens=400))
        wait_for(lambda: server.gate.taken == 1)
        server.worker.drain(0.1)
        time.sleep(0.2)
        server.gate.open()
        assert held.result().status_code == 503


def test_a_signal_lets_running_and_waiting_work_finish(embedded):
    """SIGTERM to ``sfs serve``: answers that were begun come whole, then the process ends."""
    command = [sys.executable, "-m", "sfs_triton.cli", "serve", "--port", "0", "--device", "cpu", "--dtype", "float32"]
    command += ["--max-batch", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SFS_API_KEY": KEY}
    wanted = embedded.generate(SUMS, gen_length=96, sampler=FixedSteps())
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stderr.readline()
            assert line.startswith("serving 'embedded' at http://127.0.0.1:"), line
            url, headers = line.split(" at ")[1].strip(), {"Authorization": f"Bearer {KEY}"}
            wait_for(lambda: answers(url[:-3] + "/ready"))

            def ask(**more) -> httpx.Response:
                body = chat(sampler="vanilla", max_tokens=96, **more)
                return httpx.post(url + "/chat/completions", json=body, headers=headers, timeout=60)

            with ThreadPoolExecutor(3) as pool:
                running = pool.submit(ask)
                wait_for(lambda: gauge(url, headers, "sfs_running_sequences") == 1)
                waiting = [pool.submit(ask), pool.submit(ask, stream=True)]
                wait_for(lambda: gauge(url, headers, "sfs_waiting_requests") == 2)
                process.send_signal(signal.SIGTERM)
                for future in (running, waiting[0]):
                    assert future.result().json()["choices"][0]["message"]["content"] == wanted.text
                assert waiting[1].result().text.rstrip().endswith("data: [DONE]")
            assert process.wait(20) == 0
            with pytest.raises(httpx.ConnectError):
                httpx.get(url + "/models")
        finally:
            process.kill()


def test_the_package_and_the_command_line_need_none_of_it():
    code = (
        "import sys\n"
        "for name in ('fastapi', 'uvicorn', 'prometheus_client', 'starlette'): sys.modules[name] = None\n"
        "import sfs_triton.cli.main\n"
        "from typer.testing import CliRunner\n"
        "print(CliRunner().invoke(sfs_triton.cli.main.app, ['serve', '--port', '0']).stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert 'pip install "sfs_triton[cli,serve]"' in done.stdout, done.stderr
