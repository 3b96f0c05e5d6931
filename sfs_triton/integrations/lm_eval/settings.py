"""Parsing of lm-eval's ``model_args`` and ``gen_kwargs``: sampler, cache and lengths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from lm_eval.models.utils import normalize_gen_kwargs

from ...decoding.caching import POLICIES, CachePolicy
from ...decoding.likelihood import METHODS, LikelihoodParams
from ...decoding.params import (
    DecodingParams,
    cache_options,
    check_pair,
    named,
    parse_cache,
    parse_sampler,
    refuse_renamed,
    sampler_kind,
    sampler_options,
)
from ...decoding.samplers import SAMPLERS, Sampler
from ...errors import ArgumentError, check_flag, check_integer, require
from .reference import check_known


def parse_model_args(sampler: str, cache: str, options: Mapping[str, Any]) -> tuple[Sampler, CachePolicy]:
    """Return a sampler and a cache policy from their names and the options of either, which ``model_args`` mixes.

    Raises:
        ArgumentError: names the argument or option and its value.
    """
    refuse_renamed(options)
    kind, _ = named("model_args: sampler", sampler, SAMPLERS)
    policy, _ = named("model_args: cache", cache, POLICIES)
    of_sampler, of_cache = sampler_options(kind), cache_options(policy)
    check_known(f"model_args: sampler {kind!r} with cache {policy!r}", options, of_sampler | of_cache)
    parsed = (
        parse_sampler(sampler, **{name: value for name, value in options.items() if name in of_sampler}),
        parse_cache(cache, **{name: value for name, value in options.items() if name in of_cache}),
    )
    check_pair(*parsed)
    return parsed


def parse_likelihood(method: str | None, given: Mapping[str, Any], cfg_scale: float) -> LikelihoodParams | None:
    """Return the parameters of likelihoods, from ``given`` ones that are not None; None without a ``method``.

    Greedy decoding is checked by default, since the scores of some tasks are made of it.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if method is None:
        for name, value in given.items():
            raise ArgumentError(f"model_args: {name}={value!r} goes with likelihood= only, which is one of {METHODS}")
        return None
    for name in given.keys() & {"mc_num", "mc_batch"}:
        given[name] = integer(name, given[name], 1)
    try:
        return LikelihoodParams(method=method, cfg_scale=cfg_scale, **{"check_greedy": True, **given})
    except ArgumentError as error:
        raise ArgumentError(f"model_args: likelihood={method!r}: {error}") from None


def integer(name: str, value: Any, least: int) -> int:
    """Return ``value`` as an integer of at least ``least``; the command line passes some integers as text."""
    whole = not isinstance(value, (bool, float)) and str(value).removeprefix("-").isdecimal()
    check_integer(f"model_args: {name}", int(value) if whole else value, least)
    return int(value)


def flag(name: str, value: Any) -> bool:
    check_flag(f"model_args: {name}", value)
    return value


class GenKwargs(NamedTuple):
    """Parsed ``gen_kwargs`` of one request. Its seed is not among the parameters: each repeat has its own."""

    params: DecodingParams
    until: tuple[str, ...]


def parse_gen_kwargs(
    task: str, given: Mapping[str, Any], sampler: Sampler, cache: CachePolicy, gen_length: int
) -> GenKwargs:
    """Parse the ``gen_kwargs`` of a request; defaults are the model's ``sampler`` and ``gen_length``.

    A request that samples (``do_sample``) sets its own temperature, top-p and top-k; for others the model's
    are kept. All other options of the sampler are accepted as well.

    Raises:
        ArgumentError: names task, argument and value.
    """
    try:
        options = dict(normalize_gen_kwargs(dict(given), gen_length))
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"task {task!r}: gen_kwargs {dict(given)!r}: {error}") from None
    until, gen_length, samples = options.pop("until"), options.pop("max_gen_toks"), options.pop("do_sample")
    for stop in until:
        require(isinstance(stop, str), f"task {task!r}: until={until!r} holds {stop!r}, which is not a string")
    require(gen_length > 0, f"task {task!r}: max_gen_toks={gen_length} is not positive")
    beams = options.pop("num_beams", 1)
    require(beams == 1, f"task {task!r}: num_beams={beams!r} is not supported: a diffusion model has no beams")
    draw = {name: options.pop(name) for name in ("temperature", "top_p", "top_k") if name in options}
    if samples and draw["temperature"] > 0:
        top_p, top_k = draw.get("top_p"), draw.get("top_k")
        options["temperature"] = float(draw["temperature"])
        options["top_p"] = None if top_p is None or top_p >= 1 else float(top_p)
        options["top_k"] = None if top_k is None or top_k <= 0 else int(top_k)
    try:
        kind = sampler_kind(sampler)
        check_known(f"sampler {kind!r}", options, sampler_options(kind) - {"preset"})  # a preset sets all options
        params = DecodingParams(sampler=sampler.replace(**options), cache=cache, gen_length=gen_length)
    except ArgumentError as error:
        raise ArgumentError(f"task {task!r}: {error}") from None
    return GenKwargs(params, tuple(stop for stop in until if stop))
