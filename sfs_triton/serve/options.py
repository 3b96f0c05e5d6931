"""Convert the fields of a request to a sampler, a cache policy and a checked one-sequence engine request."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from ..decoding.caching import CachePolicy
from ..decoding.params import SEEDS, DecodingParams, parse_cache, parse_sampler
from ..decoding.samplers import Sampler
from ..engine import Engine
from ..errors import ArgumentError, require
from ..models.spec import ModelSpec
from ..scheduling.sequence import Sequence as InFlight
from ..text.codec import CHARACTERS
from .errors import ApiError, from_argument, too_long
from .protocol import ChatRequest, Common
from .settings import ServeSettings

_OWN = ("temperature", "top_p")  # sampler settings that are fields of a request
_INTERVAL, _NUMBER = 256, 1e4  # largest refresh interval, and largest number that is not an integer


@dataclass(frozen=True)
class PreparedRequest:
    """A checked request for the engine: one sequence, of whose canvas ``[first, stop)`` is the answer.

    ``suffix`` is the number of tokens given after it. Without one, the last block may reach beyond the answer.
    """

    sequence: InFlight
    first: int
    stop: int
    suffix: int

    @property
    def given(self) -> int:
        """Number of tokens given by the prompt and the suffix."""
        return self.first + self.suffix

    @property
    def cut(self) -> bool:
        """True if positions after the answer are decoded as well."""
        return self.stop + self.suffix < self.sequence.bound


def prepare(engine: Engine, settings: ServeSettings, body: Common) -> list[PreparedRequest]:
    """Encode the prompt and run all of the engine's checks; return one sequence per choice, with seeds in a row.

    Raises:
        ApiError, ArgumentError: name the field.
    """
    if body.model is not None and body.model != settings.model:
        message = f"there is no model {body.model!r} here, only {settings.model!r}"
        raise ApiError(404, message, param="model", code="model_not_found")
    _check_stops(engine, body.stops)
    sampler = sampler_for(body, settings.sampler, engine.spec)
    metric = sampler.draw().metric
    if body.scored and metric != "confidence":
        message = f"'logprobs' needs probabilities, and the scores of {type(sampler).__name__} are of metric={metric!r}"
        raise ApiError(400, message, param="logprobs")
    for field, wanted in (("frames", body.frames), ("logprobs", body.scored)):
        if wanted and sampler.grow is not None:
            message = f"{field!r} does not go with grow={sampler.grow} of the sampler: positions count from a part"
            raise ApiError(400, message, param=field)
    cache = cache_for(body, settings.cache, engine.spec)
    prompt, suffix = _given(engine, body)
    with _blamed("cache", when=body.cache is not None):
        sampler.check_cache(cache)
    length, positions = _length(engine, settings, body, (len(prompt), len(suffix)), sampler)
    seed, choices = secrets.randbelow(2**31) if body.seed is None else body.seed, body.n or 1
    if seed > SEEDS - choices:
        raise ApiError(400, f"seed={seed} and n={choices}: the last choice has a seed over {SEEDS - 1}", param="seed")
    # with a suffix, blocks count from the canvas' first position, and any length goes
    gen_length = sampler.least_length if suffix else positions
    with _blamed("cache" if body.sampler is None else "sampler", length=body.tokens_wanted[0]):  # their compatibility
        params = DecodingParams(sampler=sampler, cache=cache, gen_length=gen_length, seed=seed)
    if not prompt:
        with _blamed("prompt"):
            engine.check_first("'prompt' is empty", cache)
    first, mask = len(prompt), engine.spec.mask_id
    start, canvas = 0 if suffix else first, prompt + [mask] * positions + suffix
    how = {"trace": bool(body.frames) or body.scored, "frames": True, "infilled": bool(suffix)}
    each = (replace(params, seed=seed + choice) for choice in range(choices))
    grown = sampler.grow is not None  # such a canvas has a prompt, and nothing behind it
    with _blamed(("suffix" if suffix else "prompt") if grown else "sampler", when=grown or body.sampler is not None):
        sequences = [engine.in_flight(one, list(canvas), start, **how) for one in each]
    return [PreparedRequest(sequence, first, first + length, len(suffix)) for sequence in sequences]


def sampler_for(body: Common, default: Sampler, spec: ModelSpec) -> Sampler:
    """Return the sampler of a request, its own or the server's, at the request's temperature."""
    sampler = default
    if body.sampler is not None:
        with _blamed("sampler"):
            for name in _OWN:
                fine = isinstance(body.sampler, str) or name not in body.sampler
                require(fine, f"sampler.{name}: {name!r} is a field of the request itself, beside 'sampler'")
            sampler = parse_sampler(body.sampler)
            _check_limits(body.sampler, spec)
    changes = {"temperature": body.temperature, "top_p": None if body.top_p == 1 else body.top_p}
    return sampler.replace(**{name: value for name, value in changes.items() if value is not None})


def cache_for(body: Common, default: CachePolicy, spec: ModelSpec) -> CachePolicy:
    """Return the cache policy of a request, its own or the server's."""
    if body.cache is None:
        return default
    with _blamed("cache"):
        policy = parse_cache(body.cache)
        _check_limits(body.cache, spec)
        return policy


@contextmanager
def _blamed(field: str, when: bool = True, length: str = "max_tokens") -> Iterator[None]:
    """Attribute refusals to this field of the request; ``length`` is its name of the response length."""
    try:
        yield
    except ArgumentError as error:
        raise from_argument(error, field if when else None, length) from None


def _check_limits(wanted: str | dict[str, Any], spec: ModelSpec) -> None:
    """Refuse valid options that would take too much time or memory of a server."""
    most = {"top_k": spec.vocab_size, "prompt_interval": _INTERVAL, "response_interval": _INTERVAL}
    most |= dict.fromkeys(("eos_penalty", "end_think_logit_boost", "end_think_boost_power"), _NUMBER)
    for name, value in wanted.items() if isinstance(wanted, dict) else ():
        if isinstance(value, (int, float)):
            limit = most.get(name, _NUMBER if isinstance(value, float) else spec.max_length)
            require(value <= limit, f"{name}={value} is over {limit:g}")


def _given(engine: Engine, body: Common) -> tuple[list[int], list[int]]:
    """Return the token ids before the answer, and those after it."""
    if isinstance(body, ChatRequest):
        messages = [message.plain() for message in body.messages]
        _check_size("messages", sum(len(message["content"]) for message in messages), engine, CHARACTERS)
        return _ids(engine, "messages", messages), []
    given, suffix = body.only_prompt, body.suffix or ""
    _check_size("prompt", len(given), engine, CHARACTERS if isinstance(given, str) else 1)
    _check_size("suffix", len(suffix), engine, CHARACTERS)
    before = _ids(engine, "prompt", given) if given else []
    return before, _ids(engine, "suffix", suffix) if suffix else []


def _check_stops(engine: Engine, stops: Sequence[str]) -> None:
    """Refuse stop strings that no answer can hold: special tokens beside other text, and the mask token."""
    special = engine.text.special_ids()
    for stop in stops:
        inside = next((token for token in special if token in stop and stop not in special), None)
        if inside is not None:
            message = f"'stop': {stop!r} holds the special token {inside!r} beside other text, which no answer can hold"
            raise ApiError(400, message, param="stop")
        if special.get(stop) == engine.spec.mask_id:
            raise ApiError(400, f"'stop': {stop!r} is the mask token, which no answer can hold", param="stop")


def _check_size(field: str, size: int, engine: Engine, most: int) -> None:
    """Refuse oversized input before it is encoded, which would delay other requests; ``most`` is per position."""
    context = engine.spec.max_length
    if size > context * most:
        unit = "characters" if most > 1 else "token ids"
        raise too_long(f"{field!r} has {size} {unit}, over {context * most}: the context is {context} tokens", field)


def _ids(engine: Engine, field: str, given: str | Sequence[int] | Sequence[dict[str, str]]) -> list[int]:
    """Return the token ids of a field, which may not hold the mask id."""
    try:
        ids = engine.encode(given, apply_chat_template=False, name=repr(field))
    except ArgumentError as error:
        message = str(error)
        if field == "messages":  # a template's error quotes the whole conversation
            message = f"the checkpoint's chat template refused 'messages': {error.__context__ or error}"
        raise ApiError(400, message, param=field) from None
    with _blamed(field):
        hint = "; to fill in a gap, send the text after it as 'suffix' of /v1/completions"
        engine.check_no_mask(repr(field), ids, hint)
    return ids


def _length(
    engine: Engine, settings: ServeSettings, body: Common, given: tuple[int, int], sampler: Sampler
) -> tuple[int, int]:
    """Return the length of the answer, as requested or the default, and the number of positions to decode for it.

    ``given``: token counts before and after the response. Blocks count from the response's first position, and a
    length within a block is rounded up; with a suffix they count from the canvas' first, and the last may be partial.
    """
    context, (field, wanted) = engine.spec.max_length, body.tokens_wanted
    before, after = given
    room = context - before - after
    first = "messages" if isinstance(body, ChatRequest) else "prompt"
    what = f"{first!r} has {before} tokens" + (f" and 'suffix' {after}" if after else "")
    if room < 1:
        message = f"{what}, which leaves no room for an answer: the context is {context}"
        raise too_long(message, "suffix" if after > before else first)
    most = min(room, settings.max_tokens or room)
    unit = "block_length" if sampler.grow is None else "grow"
    block = None if after else getattr(sampler, unit)
    if wanted is None:
        wanted = min(most, settings.default_tokens)
        if block is None:
            return wanted, wanted
        wanted = max(block, wanted // block * block)
        if wanted > most:
            message = f"no block of {unit}={block} fits into {most} positions: {what}, the context is {context}"
            raise ApiError(400, message, param="sampler" if body.sampler else first)
        return wanted, wanted
    if wanted > room:
        message = f"{what}, and with {field}={wanted} that makes {before + after + wanted}: the context is {context}"
        raise too_long(message, field)
    positions = -(-wanted // (block or 1)) * (block or 1)
    with _blamed(field):
        require(wanted <= most, f"{field}={wanted} is over the server's limit of {most}")
        limit = f"the context of {context} leaves" if most == room else "the server allows"
        message = f"{field}={wanted} takes {positions} positions in blocks of {unit}={block}, and {limit} {most}"
        require(positions <= most, message)
    return wanted, positions
