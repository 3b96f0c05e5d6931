"""Refusals of the server: in its own terms, with the field at fault in ``param``."""

from __future__ import annotations

import json
import socket

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")
pytest.importorskip("typer")

import httpx  # noqa: E402

import sfs_triton  # noqa: E402
from sfs_triton import FixedSteps, SlowFast, Threshold  # noqa: E402
from sfs_triton.serve.errors import ApiError  # noqa: E402
from sfs_triton.serve.options import PreparedRequest, prepare  # noqa: E402
from sfs_triton.serve.protocol import ChatRequest, CompletionRequest, parse  # noqa: E402
from sfs_triton.serve.settings import ServeSettings  # noqa: E402
from tests.support.combinations import by_pairs  # noqa: E402
from tests.support.dream import write_checkpoint  # noqa: E402
from tests.support.server import SUMS, chat, error_of, serving  # noqa: E402

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
JSON = {"Content-Type": "application/json"}
USER = {"role": "user", "content": "hi"}
LONG = "Ann " * 600  # 601 tokens of the embedded model, whose context is 512
BEFORE, AFTER = "id,name\n1,Ann\n", "\n3,Kim"


def said_of(content: str) -> list[dict]:
    return [{"role": "user", "content": content}]


CHATS = {
    "a-prompt": ({"prompt": "hi"}, "prompt", "'prompt' is not known here: chat takes 'messages'"),
    "a-suffix": ({"suffix": "hi"}, "suffix", "'suffix' is not known here: /v1/completions takes it"),
    "a-prompt-alone": ({"prompt": "hi", "messages": ...}, "prompt", "chat takes 'messages'"),
    "no-messages": ({"messages": []}, "messages", "'messages' must hold 1 to 1024 messages"),
    "too-many": ({"messages": [USER] * 1025}, "messages", "'messages' must hold 1 to 1024 messages"),
    "nothing-said": ({"messages": said_of(" \n")}, "messages", "'messages.0' is empty: a user message needs text"),
    "no-parts": ({"messages": [USER, {"role": "user", "content": []}]}, "messages", "'messages.1' is empty"),
    "empty-system": ({"messages": [{"role": "system", "content": ""}, USER]}, "messages", "a system message needs"),
    "only-system": ({"messages": [{"role": "system", "content": "Sums."}]}, "messages", "no user message"),
    "mask": ({"messages": said_of("a <|mdm_mask|>")}, "messages", "holds the mask token (id 5, at position 7"),
    "over-context": ({"messages": said_of(LONG)}, "messages", "'messages' has 610 tokens, which leaves no room"),
    "far-over": ({"messages": said_of("a" * 40_000)}, "messages", "'messages' has 40000 characters, over 32768"),
    "no-room": ({"max_tokens": 500}, "max_tokens", "max_tokens=500"),
    "no-room-by-other-name": (
        {"max_tokens": ..., "max_completion_tokens": 500},
        "max_completion_tokens",
        "max_completion_tokens=500",
    ),
    "temperature-inside": (
        {"sampler": {"kind": "slowfast", "temperature": 1}},
        "sampler",
        "'temperature' is a field of the request itself",
    ),
    "top-p-inside": (
        {"sampler": {"kind": "vanilla", "top_p": 0.5}},
        "sampler",
        "'top_p' is a field of the request itself",
    ),
    "huge": ({"sampler": {"kind": "threshold", "tau": 1e5}}, "sampler", "tau=100000.0 is over 10000"),
    "block": (
        {"sampler": {"kind": "threshold", "block_length": 300}, "max_tokens": 310},
        "max_tokens",
        "max_tokens=310 takes 600 positions in blocks of block_length=300, and the context of 512 leaves 495",
    ),
    "cache-option": ({"cache": {"kind": "none", "capacity": 4}}, "cache", "has no option 'capacity'; it has none"),
    "cache-flag": ({"cache": {"kind": "region", "rotate": "x"}}, "cache", "rotate='x' is neither True nor False"),
    "cache-pair": ({"cache": "prefix"}, "cache", "does not go with SlowFast"),
    "sampler-pair": (
        {"sampler": {"kind": "slowfast", "zero_history": True}, "cache": {"kind": "region", "look_ahead": 2}},
        "sampler",
        "look_ahead=2 does not go with zero_history=True",
    ),
    "eos": ({"sampler": {"kind": "fixed", "eos": "always"}}, "sampler", "eos='always' is not one of"),
    "eos-penalty": (
        {"sampler": {"kind": "fixed", "eos_penalty": 1e5}},
        "sampler",
        "eos_penalty=100000.0 is not a number",
    ),
    "think": (
        {"sampler": {"kind": "fixed", "end_think_token_ids": [7, 10**6], "end_think_logit_boost": 4}},
        "sampler",
        "end_think_token_ids[1]=1000000 is no token id below",
    ),
    "stop-mixed": ({"stop": ["x", "a<|eot_id|>"]}, "stop", "'a<|eot_id|>' holds the special token '<|eot_id|>' beside"),
    "stop-mask": ({"stop": "<|mdm_mask|>"}, "stop", "'<|mdm_mask|>' is the mask token, which no answer can hold"),
    "trace": ({"trace": "x"}, "trace", "'trace' is not known here"),
    "grow-blocks": (
        {"sampler": {"kind": "threshold", "grow": 24}, "max_tokens": 40},
        "sampler",
        "grow=24 is not a multiple of block_length=32",
    ),
    "grow-logprobs": (
        {"sampler": {"kind": "slowfast", "grow": 8}, "logprobs": True},
        "logprobs",
        "'logprobs' does not go with grow=8 of the sampler",
    ),
    "grow-frames": (
        {"sampler": {"kind": "slowfast", "grow": 8}, "stream": True, "frames": True},
        "frames",
        "'frames' does not go with grow=8 of the sampler",
    ),
}
for name in ("strict", "eos_stop", "share_stable", "inclusive", "zero_history", "eos_horizon"):
    for value in ("x", "true", 1):
        CHATS[f"{name}-{value}"] = ({"sampler": {"kind": "slowfast", name: value}}, "sampler", f"{name}={value!r}")
for name in ("stream", "frames", "parallel_tool_calls"):
    for value in ("x", "true", 1):
        CHATS[f"{name}-{value}"] = ({name: value}, name, f"'{name}': Input should be a valid boolean")


@pytest.mark.parametrize("name", CHATS)
def test_chats(server, name):
    changes, param, words = CHATS[name]
    body = {field: value for field, value in chat(**changes).items() if value is not ...}
    answer = server.post(body)
    error = error_of(answer)
    assert (answer.status_code, error["param"]) == (400, param) and words in error["message"], error
    assert "Engine." not in error["message"] and "prompt 0" not in error["message"]


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"prompt": [1, 896]}, "prompt", "'prompt': 896 at position 1 is no token id below 896"),
        ({"prompt": "a <|mdm_mask|>"}, "prompt", "send the text after it as 'suffix'"),
        ({"prompt": [9, 5]}, "prompt", "holds the mask token (id 5, at position 1"),
        ({"suffix": "<|mdm_mask|>"}, "suffix", "'suffix' holds the mask token (id 5, at position 0"),
        ({"prompt": LONG}, "prompt", "'prompt' has 601 tokens, which leaves no room"),
        ({"suffix": LONG}, "suffix", "and 'suffix' 601, which leaves no room"),
        ({"prompt": LONG, "suffix": "x"}, "prompt", "which leaves no room"),
        ({"suffix": "a" * 40_000}, "suffix", "'suffix' has 40000 characters, over 32768"),
        ({"prompt": [9] * 513}, "prompt", "'prompt' has 513 token ids, over 512"),
        ({"suffix": "x", "max_tokens": 511}, "max_tokens", "with max_tokens=511 that makes 514"),
        ({"messages": [USER]}, "messages", "'messages' is not known here: give a 'prompt'"),
        ({"sampler": {"kind": "fixed", "block_length": 511}}, "max_tokens", "max_tokens=4 takes 511 positions"),
        ({"prompt": [["a"]]}, "prompt", "'prompt' must be one text or one list of token ids, alone or as a list of"),
        ({"prompt": [[9], [9]]}, "prompt", "several take several requests"),
        ({"prompt": [[9, 5]]}, "prompt", "holds the mask token (id 5, at position 1"),
        ({"prompt": [True]}, "prompt", "'prompt' must be one text"),
        ({"suffix": "x", "sampler": {"kind": "slowfast", "grow": 4}}, "suffix", "grow=4 goes with a prompt"),
        ({"prompt": "", "sampler": {"kind": "slowfast", "grow": 4}}, "prompt", "grow=4 goes with a prompt"),
    ],
)
def test_completions(server, changes, param, words):
    answer = server.post({"prompt": "1,", "max_tokens": 4, **changes}, COMPLETIONS)
    error = error_of(answer)
    assert (answer.status_code, error["param"]) == (400, param) and words in error["message"], error
    assert "Engine." not in error["message"] and "prompt 0" not in error["message"]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"tool_calls": [{"id": "1"}]}, "'messages.1.tool_calls' is not supported: this server calls no tools"),
        ({"function_call": {"name": "f"}}, "'messages.1.function_call' is not supported: this server calls no tools"),
        ({"refusal": "No."}, "'messages.1.refusal' is not supported: this server takes and gives text only"),
        ({"annotations": [{}]}, "'messages.1.annotations' is not supported"),
        ({"audio": {"id": "1"}}, "'messages.1.audio' is not supported"),
        ({"name": 5}, "'messages.1.name'"),
        ({"reasoning": "so"}, "'messages.1.reasoning' is not known here"),
        ({"content": [{"type": "text", "text": "a", "hidden": "b"}]}, "'messages.1.content' must be a text, or a list"),
        ({"content": [{"type": "refusal", "refusal": "No."}]}, "'messages.1.content' must be a text, or a list"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_an_answer_of_this_server_never_holds(server, message, words):
    answer = server.post({"messages": [USER, {"role": "assistant", "content": "a", **message}, USER]})
    error = error_of(answer)
    assert (answer.status_code, error["param"]) == (400, "messages") and words in error["message"], error


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none(server, number):
    body = json.dumps(chat(sampler={"kind": "slowfast", "tau_min": 7})).replace("7", number)
    error = error_of(httpx.post(server.url + CHAT, content=body, headers=JSON))
    assert error["param"] == "sampler" and error["message"].startswith("tau_min=")
    assert "is not a number from 0 to" in error["message"]


@pytest.mark.parametrize("text", [r"\ud800", r"a\udc00b", r"\ud800\ud800", r"\udbff\u0041", r"\ud83d\ude00\ud83d"])
def test_half_of_a_surrogate_pair(server, text):
    body = json.dumps(chat("WORDS")).replace("WORDS", text)
    answer = httpx.post(server.url + CHAT, content=body, headers=JSON)
    error = error_of(answer)
    assert answer.status_code == 400 and error["code"] == "invalid_json", error
    assert "is half of a surrogate pair, and stands alone" in error["message"], error


@pytest.mark.parametrize("body", [r'{"prompt": "\u12', r'{"prompt": "\ud83d\ude00 \u1"}', r'{"prompt": "\x"}'])
def test_other_broken_escapes_are_not_called_that(body):
    with pytest.raises(ApiError, match="not valid JSON") as refused:
        parse(CompletionRequest, body.encode())
    assert "surrogate" not in str(refused.value)
    whole = parse(ChatRequest, rb'{"messages": [{"role": "user", "content": "\ud83d\ude00"}]}')
    assert whole.messages[0].content == "\N{GRINNING FACE}"


def test_bodies_that_are_encoded(server):
    body = json.dumps(chat(max_tokens=4))
    for coding in ("gzip", "deflate, br", "x" * 500):
        answer = httpx.post(server.url + CHAT, content=body, headers={**JSON, "Content-Encoding": coding})
        error = error_of(answer)
        assert answer.status_code == 415 and error["code"] == "unsupported_content_encoding"
        assert f"Content-Encoding: {coding[:40]} " in error["message"]
    answer = httpx.post(server.url + CHAT, content=body, headers={**JSON, "Content-Encoding": "identity"})
    assert answer.status_code == 200


def test_who_sends_too_much_is_told_so(server):
    """The client is not cut off while sending, however slowly; one that sends ``Expect`` is refused at once."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    part = b"10000\r\n" + b"a" * 0x10000 + b"\r\n"
    for body in (
        b"Content-Length: 6291456\r\n\r\n" + b"a" * 6291456,
        b"Transfer-Encoding: chunked\r\n\r\n" + part * 60,
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sending:
            sending.sendall(head + body)
            assert sending.recv(100).startswith(b"HTTP/1.1 413 ")
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as asking:
        asking.sendall(head + b"Content-Length: 9999999\r\nExpect: 100-continue\r\n\r\n")
        assert asking.recv(100).startswith(b"HTTP/1.1 413 ")


def test_pages_of_other_origins_get_nothing(server):
    """As documented in docs/serving.md: no preflight is granted, and no response may be read."""
    asked = {"Origin": "http://127.0.0.1:9", "Access-Control-Request-Method": "POST"}
    for path in (CHAT, COMPLETIONS):
        answer = httpx.options(server.url + path, headers={**asked, "Access-Control-Request-Headers": "content-type"})
        assert answer.status_code == 405
        assert not [name for name in answer.headers if name.startswith("access-control-")]
    for path in ("/v1/models", "/health", "/metrics", "/openapi.json", "/"):
        answer = httpx.get(server.url + path, headers={"Origin": "http://127.0.0.1:9"})
        assert answer.status_code == 200 and answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_an_answer_may_have_been_empty(server, embedded):
    said = [USER, {"role": "assistant", "content": ""}, {"role": "user", "content": SUMS}]
    wanted = embedded.generate(said, gen_length=8)
    answer = server.post({"messages": said, "max_tokens": 8})
    assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"] == wanted.text


# ------------------------------------------------------------------------------------------------------------ suffixes


SAMPLERS = {
    "slowfast": ("slowfast", SlowFast()),
    "threshold": ({"kind": "threshold", "block_length": 32}, Threshold(block_length=32)),
    "fixed": ({"kind": "fixed", "block_length": 4}, FixedSteps(block_length=4)),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("name", "before", "length"), by_pairs(SAMPLERS, ["", [], BEFORE], [5, 32, None]))
def test_gaps_of_any_length_anywhere(server, embedded, name, before, length):
    """Blocks count from the canvas' start, as in the engine; a prompt may be empty where there is a suffix."""
    sampler, mine = SAMPLERS[name]
    ids = embedded.text.encode(before) if before else []
    size = length or ServeSettings().default_tokens
    wanted = embedded.infill(ids + [embedded.spec.mask_id] * size + embedded.text.encode(AFTER), sampler=mine)
    hole = wanted.canvas[len(ids) : len(ids) + size]
    hole = hole[: hole.index(embedded.spec.eos_id)] if embedded.spec.eos_id in hole else hole
    body = {"prompt": before, "suffix": AFTER, "sampler": sampler, "max_tokens": length}
    answer = server.post({name: value for name, value in body.items() if value is not None}, COMPLETIONS)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["text"] == embedded.text.decode(hole)
    assert answer.json()["usage"]["nfe"] == wanted.nfe


def test_token_ids_leave_room_for_the_text_of_a_suffix(server):
    """150 tokens of more than 512 characters, which were once counted as if they were token ids."""
    body = {"prompt": [9] * 10, "suffix": "Ann " * 150, "max_tokens": 4}
    assert server.post(body, COMPLETIONS).status_code == 200


def test_shifted_models_predict_no_first_position_from_a_list(tmp_path, embedded):
    dream = sfs_triton.load(write_checkpoint(tmp_path / "dream"), "cpu", "float32")

    def asked(engine, **more) -> PreparedRequest:
        body = json.dumps({"prompt": "", "max_tokens": 8, "cache": "region", **more}).encode()
        return prepare(engine, ServeSettings(), parse(CompletionRequest, body))[0]

    for suffix in ("", "hello"):
        with pytest.raises(ApiError, match="'prompt' is empty, and this model predicts the first position") as refused:
            asked(dream, suffix=suffix)
        assert (refused.value.status, refused.value.param) == (400, "prompt")
        for request in (asked(dream, suffix=suffix, cache="none"), asked(embedded, suffix=suffix)):
            assert request.first == 0 and request.suffix == len(request.sequence.canvas) - 8
    assert asked(dream, prompt="x").first == 1


def test_default_lengths_are_blocks(embedded):
    with serving(embedded, default_tokens=20, max_tokens=40) as server:
        sampler = {"kind": "fixed", "block_length": 16, "steps": 1}

        def frames(**changes) -> dict:
            body = chat(sampler={**sampler, **changes}, stream=True, frames=True)
            del body["max_tokens"]
            return json.loads(server.post(body).text.split("data: ")[2].partition("\n")[0])["diffusion"]

        assert frames()["response_length"] == 16
        assert frames(block_length=32)["response_length"] == 32, "a block is the least"
        body = chat(sampler={**sampler, "block_length": 64})
        del body["max_tokens"]
        error = error_of(server.post(body))
        assert error["param"] == "sampler" and "no block of block_length=64 fits into 40 positions" in error["message"]
