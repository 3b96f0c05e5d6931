"""Parsing of lm-eval's ``model_args`` and ``gen_kwargs``: sampler, cache and lengths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from lm_eval.models.utils import normalize_gen_kwargs

from ...decoding.caching import POLICIES, CachePolicy
from ...decoding.params import cache_options, parse_cache, parse_sampler, sampler_options
from ...decoding.samplers import SAMPLERS, Sampler
from ...errors import ArgumentError, require


def make_settings(sampler: str, cache: str, given: Mapping[str, Any]) -> tuple[Sampler, CachePolicy]:
    """Return a sampler and a cache policy by name, with their settings from ``model_args``.

    Raises:
        ArgumentError: names the argument, its value, and its sampler or cache policy.
    """
    require(sampler in SAMPLERS, f"model_args: sampler={sampler!r} is not one of {tuple(SAMPLERS)}")
    require(cache in POLICIES, f"model_args: cache={cache!r} is not one of {tuple(POLICIES)}")
    of_sampler, of_cache = sampler_options(sampler), cache_options(cache)
    for name, value in given.items():
        if name in of_sampler | of_cache:
            continue
        owners = [f"sampler={other}" for other in SAMPLERS if name in sampler_options(other)]
        owners += [f"cache={other}" for other in POLICIES if name in cache_options(other)]
        why = f"goes with {', '.join(owners)}" if owners else "is not known"
        raise ArgumentError(f"model_args: {name}={value!r} {why}; given are sampler={sampler}, cache={cache}")
    chosen = {name: value for name, value in given.items() if name in of_sampler}
    settings = parse_sampler(sampler, **chosen)
    policy = parse_cache(cache, **{name: value for name, value in given.items() if name in of_cache})
    settings.check_cache(policy)
    return settings, policy


def whole(name: str, value: Any, least: int) -> int:
    """Return ``value`` as an integer of at least ``least``; the command line passes some integers as text."""
    fine = not isinstance(value, (bool, float)) and str(value).lstrip("-").isdecimal() and int(value) >= least
    require(fine, f"model_args: {name}={value!r} is not an integer of at least {least}")
    return int(value)


def flag(name: str, value: Any) -> bool:
    require(isinstance(value, bool), f"model_args: {name}={value!r} is neither True nor False")
    return value


class Wish(NamedTuple):
    """Parsed ``gen_kwargs`` of one request."""

    length: int
    until: tuple[str, ...]
    sampler: Sampler


def read_wish(task: str, given: Mapping[str, Any], sampler: Sampler, length: int) -> Wish:
    """Parse the ``gen_kwargs`` of a request; defaults are the model's ``sampler`` and response ``length``.

    A request that samples (``do_sample``) sets its own temperature, top-p and top-k; for others the model's
    are kept. All other settings of the sampler are accepted as well.

    Raises:
        ArgumentError: names task, argument and value.
    """
    try:
        wish = dict(normalize_gen_kwargs(dict(given), length))
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"task {task!r}: gen_kwargs {dict(given)!r}: {error}") from None
    until, length, samples = wish.pop("until"), wish.pop("max_gen_toks"), wish.pop("do_sample")
    for stop in until:
        require(isinstance(stop, str), f"task {task!r}: until={until!r} holds {stop!r}, which is no text")
    require(length > 0, f"task {task!r}: max_gen_toks={length} is not positive")
    beams = wish.pop("num_beams", 1)
    require(beams == 1, f"task {task!r}: num_beams={beams!r} is not supported: a diffusion model has no beams")
    draw = {name: wish.pop(name) for name in ("temperature", "top_p", "top_k") if name in wish}
    if samples and draw["temperature"] > 0:
        top_p, top_k = draw.get("top_p"), draw.get("top_k")
        wish["temperature"] = float(draw["temperature"])
        wish["top_p"] = None if top_p is None or top_p >= 1 else float(top_p)
        wish["top_k"] = None if top_k is None or top_k <= 0 else int(top_k)
    known = {f.name for f in fields(sampler)} - {"name"}
    for name, value in wish.items():
        require(name in known, f"task {task!r}: gen_kwargs {name}={value!r} is no setting of {type(sampler).__name__}")
    wanted = sampler.replace(**wish) if wish else sampler
    wanted.check_length(length)
    return Wish(length, tuple(stop for stop in until if stop), wanted)
