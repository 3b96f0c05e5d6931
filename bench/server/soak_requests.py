"""Requests of a soak: answers of every kind, a fixed set that must not change, and invalid requests."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

from .loopback import table_prompt

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
Body = dict[str, Any]

# Samplers with a cache that they go with.
SETTINGS: list[tuple[Any, Any]] = [
    ("slowfast", "none"),
    ("slowfast", "region"),
    ({"kind": "slowfast", "preset": "fast"}, {"kind": "region", "capacity": 64}),
    ({"kind": "slowfast", "preset": "llada-reference", "block_length": 16}, "none"),
    ({"kind": "slowfast", "eos_stop": True}, "region"),
    ({"kind": "slowfast", "cfg_scale": 0.5}, "none"),
    ({"kind": "threshold", "tau": 0.8, "block_length": 16}, "prefix"),
    ({"kind": "threshold", "tau": 0.9, "block_length": 16}, "dual"),
    ({"kind": "threshold", "block_length": 16}, {"kind": "refresh", "prompt_interval": 8, "response_interval": 4}),
    ({"kind": "fixed", "steps": 8}, "none"),
    ({"kind": "fixed", "steps": 16, "metric": "topk_margin"}, "none"),
    ({"kind": "vanilla", "block_length": 16}, "region"),
]
STORY = "Ann has 12 apples. Ann buys 7 more apples. Then Ann loses 4 apples. How many apples does Ann have?"
_LENGTHS = (16, 32, 48, 64, 96, 160)
_TEMPERATURES = (0, 0, 0, 0.4, 1.0)
_SHARED = 0.5  # of the requests have the first setting and no noise, so that sequences share batches


class Ask(NamedTuple):
    """A request. ``kind`` is the expected outcome."""

    kind: str
    path: str
    body: Body


def answer(rng: random.Random) -> Ask:
    """A chat or a completion, whole or streamed, with or without frames, stop strings and a suffix."""
    shared = rng.random() < _SHARED
    sampler, cache = SETTINGS[0] if shared else rng.choice(SETTINGS)
    body: Body = {"sampler": sampler, "cache": cache, "max_tokens": rng.choice(_LENGTHS)}
    body |= {"temperature": 0 if shared else rng.choice(_TEMPERATURES), "seed": rng.randrange(2**31)}
    if body["temperature"] and rng.random() < 0.3:
        body["top_p"] = 0.9
    if rng.random() < 0.25:
        body["stop"] = rng.choice(['"age"', ["}", "nowhere"], "\n", ["answer", "Ann"]])
    if rng.random() < 0.5:
        body |= {"stream": True, "frames": rng.random() < 0.5, "stream_options": {"include_usage": True}}
    kind = "streamed" if body.get("stream") else "whole"
    form = rng.random()
    if form < 0.6:
        return Ask(kind, CHAT, {**body, "messages": _conversation(rng)})
    if form < 0.85:
        return Ask(kind, COMPLETIONS, {**body, "prompt": _text(rng) if form < 0.75 else _ids(rng)})
    gap = {"prompt": rng.choice(["", "id,name\n1,Ann\n"]), "suffix": "\n3,Kim", "max_tokens": rng.randint(1, 12)}
    return Ask(kind, COMPLETIONS, {**body, **gap})


def _conversation(rng: random.Random) -> list[Body]:
    said = [{"role": "user", "content": _text(rng)}]
    if rng.random() < 0.2:
        said = [{"role": "system", "content": "Sums."}, *said, {"role": "assistant", "content": "79-44=35"}, *said]
    return said


def _text(rng: random.Random) -> str:
    sums = ",".join(str(rng.randint(1, 99)) for _ in range(4))
    return rng.choice([table_prompt(rng), table_prompt(rng), sums, STORY])


def _ids(rng: random.Random) -> list[int]:
    return [rng.randrange(300, 700) for _ in range(rng.randint(1, 40))]


def leaving(rng: random.Random) -> Ask:
    """A request whose client goes away before its end."""
    path, body = answer(rng)[1:]
    body = {**body, "sampler": "vanilla", "cache": "none"}
    if not body.get("stream"):
        return Ask("leaves", path, body)
    return Ask("leaves", path, {**body, "frames": rng.random() < 0.5})


def late(rng: random.Random) -> Ask:
    """More steps than the time limit leaves time for on a slow machine."""
    body = {"messages": [{"role": "user", "content": STORY}], "max_tokens": 440, "sampler": "vanilla"}
    return Ask("late", CHAT, {**body, "stream": rng.random() < 0.5})


_USER = [{"role": "user", "content": "hi"}]
_REFUSED: list[tuple[str, Any]] = [
    (CHAT, b"{"),
    (CHAT, b"\xff\xfe"),
    (CHAT, b"[" * 5000),
    (CHAT, b'{"messages": "' + b"a" * (1 << 20) + b'"}'),
    (CHAT, {}),
    (CHAT, {"messages": []}),
    (CHAT, {"messages": [{"role": "king", "content": "hi"}]}),
    (CHAT, {"messages": _USER, "max_tokens": "5"}),
    (CHAT, {"messages": _USER, "max_tokens": 100_000}),
    (CHAT, {"messages": _USER, "temperature": -1}),
    (CHAT, {"messages": _USER, "sampler": "fastest"}),
    (CHAT, {"messages": _USER, "cache": {"kind": "region", "capacity": -3}}),
    (CHAT, {"messages": _USER, "sampler": {"kind": "threshold", "block_length": 0}}),
    (CHAT, {"messages": _USER, "tools": [{}]}),
    (CHAT, {"messages": _USER, "frames": True}),
    (CHAT, {"messages": _USER, "model": "another"}),
    (CHAT, {"messages": [{"role": "user", "content": "<|mdm_mask|>"}]}),
    (CHAT, {"messages": [{"role": "user", "content": "Ann " * 2000}]}),
    (COMPLETIONS, {"prompt": ["7", "8"]}),
    (COMPLETIONS, {"prompt": [1, -1]}),
    (COMPLETIONS, {"prompt": [10**9]}),
    (COMPLETIONS, {"prompt": ["a", "b"]}),
    (COMPLETIONS, {"prompt": "a", "seed": -1}),
    (COMPLETIONS, {"prompt": "a", "unknown": 1}),
    ("/v1/nothing", {"prompt": "a"}),
]


def malformed(rng: random.Random) -> Ask:
    """Make a request that is refused with a status from 400 to 499."""
    return Ask("malformed", *rng.choice(_REFUSED))


def look(rng: random.Random) -> Ask:
    """A page about the server."""
    return Ask("state", rng.choice(["/health", "/ready", "/metrics", "/v1/models", "/", "/openapi.json"]), {})


def garbage(rng: random.Random) -> bytes:
    """Bytes that are no whole HTTP request."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    some = [b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", head, head + b'Content-Length: 900\r\n\r\n{"prompt": "a']
    return rng.choice([*some, rng.randbytes(200) + b"\r\n\r\n"])


_MIX: list[tuple[float, Callable[[random.Random], Ask]]] = [
    (0.62, answer),
    (0.14, lambda rng: rng.choice(FIXED)),
    (0.08, leaving),
    (0.10, malformed),
    (0.05, look),
    (0.01, late),
]


def any_of_all(rng: random.Random) -> Ask:
    """The next request of a client."""
    shares, makers = zip(*_MIX, strict=True)
    (make,) = rng.choices(makers, shares)
    return make(rng)


def _fixed() -> list[Ask]:
    """One request for each setting, with a seed and noise of its own, and two that fill in a gap."""
    rng, asks = random.Random(77), []
    for number, (sampler, cache) in enumerate(SETTINGS):
        said = [{"role": "user", "content": STORY if number % 3 == 0 else table_prompt(rng)}]
        body = {"messages": said, "max_tokens": 64, "sampler": sampler, "cache": cache, "seed": 1000 + number}
        asks.append(Ask("fixed", CHAT, {**body, "temperature": (0, 0.7)[number % 2]}))
    for number, cache in enumerate(("none", "region")):
        gap = {"prompt": "id,name\n1,Ann\n", "suffix": "\n3,Kim", "max_tokens": 9, "seed": number, "temperature": 1.0}
        asks.append(Ask("fixed", COMPLETIONS, {**gap, "cache": cache}))
    return asks


FIXED = _fixed()
