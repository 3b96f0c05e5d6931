"""From the fields of a request to a sampler, a cache policy and a checked one-row request for the engine."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, fields
from typing import Any

from ..caching import POLICIES, CachePolicy, RefreshCache, cache_policy
from ..engine import Engine
from ..errors import require
from ..models.spec import ModelSpec
from ..samplers import PRESETS, SAMPLERS, Sampler, SlowFast
from ..session import Request
from .errors import ApiError
from .protocol import ChatRequest, Common, CompletionRequest
from .settings import ServeSettings

_ELSEWHERE = ("temperature", "top_p", "name")  # settings that a request has fields of its own for, or none
_INTERVAL, _NUMBER = 256, 1e4  # largest refresh interval, and largest number that is no count
_CHARACTERS = 64  # of a prompt for each position of the context: encoding far more than can fit would hold others up


@dataclass(frozen=True)
class Wanted:
    """A request that the engine can run: one canvas, of which ``[first, stop)`` is the answer."""

    request: Request
    first: int
    stop: int
    sampler: dict[str, Any]  # its kind and settings, for whoever watches
    cache: dict[str, Any]

    @property
    def given(self) -> int:
        """Tokens that are not to be decided."""
        return len(self.request.canvases[0]) - (self.stop - self.first)


def prepare(engine: Engine, settings: ServeSettings, body: Common) -> Wanted:
    """Encode the prompt and check everything that the engine would refuse.

    Raises:
        ApiError, ArgumentError: name the field.
    """
    if body.model is not None and body.model != settings.model:
        message = f"there is no model {body.model!r} here, only {settings.model!r}"
        raise ApiError(404, message, param="model", code="model_not_found")
    sampler = sampler_for(body, settings.sampler, engine.spec)
    cache = settings.cache if body.cache is None else _cache(body.cache, engine.spec)
    _check_size(body, engine.spec.max_length)
    if isinstance(body, ChatRequest):
        prompt, suffix = engine._encode([message.plain() for message in body.messages], False, 0), None
    else:
        prompt, suffix = engine._encode(body.prompt, True, 0), _suffix(engine, body)
    length = _length(engine, settings, body, len(prompt) + len(suffix or ()), sampler)
    seed = secrets.randbelow(2**31) if body.seed is None else body.seed
    how = {"sampler": sampler, "cache": cache, "seed": seed, "trace": bool(body.frames), "frames": True}
    if suffix is None:
        request, _ = engine._request(prompt, gen_length=length, **how)
    else:
        mask = engine.spec.mask_id
        require(mask not in prompt and mask not in suffix, f"prompt and suffix hold the mask id {mask}")
        canvas = prompt + [mask] * length + suffix
        request = Request([canvas], [0], sampler, cache, [seed], bool(body.frames), True)
    first = len(prompt)
    return Wanted(request, first, first + length, _described(sampler, SAMPLERS), _described(cache, POLICIES))


def sampler_for(body: Common, default: Sampler, spec: ModelSpec) -> Sampler:
    """The sampler of a request: its own or the server's, at the request's temperature."""
    sampler = default if body.sampler is None else _sampler(body.sampler, spec)
    changes = {"temperature": body.temperature, "top_p": None if body.top_p == 1 else body.top_p}
    return sampler.replace(**{name: value for name, value in changes.items() if value is not None})


def _sampler(wanted: str | dict[str, Any], spec: ModelSpec) -> Sampler:
    kind, options = _kind("sampler", wanted, SAMPLERS)
    preset = options.pop("preset", "paper") if kind == "slowfast" else None
    allowed = {f.name for f in fields(SAMPLERS[kind])} - {*_ELSEWHERE} - ({"steps"} if kind == "vanilla" else set())
    _check_options(f"sampler {kind!r}", options, allowed, spec)
    if kind == "slowfast":
        require(isinstance(preset, str), f"preset={preset!r} is not one of {tuple(PRESETS)}")
        return SlowFast.preset(preset, **options)
    return SAMPLERS[kind](**options)


def _cache(wanted: str | dict[str, Any], spec: ModelSpec) -> CachePolicy:
    kind, options = _kind("cache", wanted, POLICIES)
    _check_options(f"cache {kind!r}", options, {f.name for f in fields(POLICIES[kind])}, spec)
    policy = cache_policy(kind, **options)
    if isinstance(policy, RefreshCache):
        for name in ("prompt_interval", "response_interval"):
            require(getattr(policy, name) <= _INTERVAL, f"{name}={getattr(policy, name)} is over {_INTERVAL}")
    return policy


def _kind(field: str, wanted: str | dict[str, Any], known: dict[str, type]) -> tuple[str, dict[str, Any]]:
    """A kind and its options, from its name or from ``{"kind": ..., option: ...}``."""
    options = {"kind": wanted} if isinstance(wanted, str) else dict(wanted)
    kind = options.pop("kind", None)
    fine = isinstance(kind, str) and kind in known
    require(fine, f"{field}={wanted!r} is not one of {tuple(known)}, nor an object with one of them as its 'kind'")
    return kind, options


def _check_options(owner: str, options: dict[str, Any], allowed: set[str], spec: ModelSpec) -> None:
    """Refuse options that are not there, and numbers that would only cost time or memory. Classes check their types."""
    for name, value in options.items():
        require(name in allowed, f"{owner} has no option {name!r}; it has {', '.join(sorted(allowed))}")
        require(value is None or isinstance(value, (bool, int, float, str)), f"{name} is a {type(value).__name__}")
        if isinstance(value, int) and not isinstance(value, bool):
            most = spec.vocab_size if name == "top_k" else spec.max_length
            require(abs(value) <= most, f"{name} is over {most}")
        elif isinstance(value, float):
            require(abs(value) <= _NUMBER, f"{name} is over {_NUMBER:g}")


def _check_size(body: Common, context: int) -> None:
    """Refuse what cannot fit before it is encoded."""
    if isinstance(body, ChatRequest):
        field, size = "messages", sum(len(message.plain()["content"]) for message in body.messages)
    else:
        field, size = "prompt", len(body.prompt) + len(body.suffix or "")
    most = context * _CHARACTERS if isinstance(body, ChatRequest) or isinstance(body.prompt, str) else context
    if size > most:
        message = f"{field!r} has a length of {size}, over {most}: the context is {context} tokens"
        raise ApiError(400, message, param=field, code="context_length_exceeded")


def _suffix(engine: Engine, body: CompletionRequest) -> list[int] | None:
    return engine._encode(body.suffix, True, 0) if body.suffix else None


def _length(engine: Engine, settings: ServeSettings, body: Common, given: int, sampler: Sampler) -> int:
    """Response positions: what is asked for, or the default as far as the context leaves room for it."""
    context, wanted = engine.spec.max_length, body.tokens_wanted
    room = context - given
    if room < 1:
        message = f"the prompt has {given} tokens, which leaves no room for an answer: the context is {context}"
        raise ApiError(400, message, param="prompt", code="context_length_exceeded")
    most = min(room, settings.max_tokens or room)
    block = getattr(sampler, "block_length", None)
    if wanted is None:
        wanted = min(most, settings.default_tokens)
        return wanted if block is None else wanted // block * block or block
    if wanted > room:
        message = f"{given} tokens of prompt and max_tokens={wanted} are {given + wanted}: the context is {context}"
        raise ApiError(400, message, param="max_tokens", code="context_length_exceeded")
    require(wanted <= most, f"max_tokens={wanted} is over the server's limit of {most}")
    return wanted


def _described(value: Sampler | CachePolicy, kinds: dict[str, type]) -> dict[str, Any]:
    kind = next(name for name, known in kinds.items() if type(value) is known)
    settings = {f.name: getattr(value, f.name) for f in fields(value) if f.name != "name"}
    if kind == "slowfast":
        settings["preset"] = value.name
    return {"kind": kind, **settings}
