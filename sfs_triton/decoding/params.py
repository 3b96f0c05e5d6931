"""Decoding parameters of one request: one record for every front end, from names and options or from JSON and back."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

from ..errors import ArgumentError, as_plain, check_integer, make_plain, require
from .caching import POLICIES, CachePolicy, NoCache
from .samplers import SAMPLERS, Sampler, SlowFast

SEEDS = 2**63  # seeds are below it: kernels take them as int64


# old names of arguments, and what to use instead
RENAMED = {
    "raw": "apply_chat_template=False, an argument of generate()",
    "impl": "backend=, an argument of load()",
    "loop": "cuda_graphs=True or False, an argument of load()",
    "weights": "quantization=, an argument of load()",
}
FIELDS = ("sampler", "cache", "gen_length", "seed")


class BatchKey(NamedTuple):
    """Batch key: the settings that all sequences of a persistent batch share.

    ``sampler`` has its per-sequence parameters blanked. ``trace``, ``frames``: publish the inputs of each decision, and
    the canvases after each step. ``embeds``: prompts may have vectors in place of tokens.
    """

    sampler: Sampler
    cache: CachePolicy
    trace: bool = False
    frames: bool = False
    embeds: bool = False

    def serves(self, other: BatchKey) -> bool:
        """Return whether sequences of another key can join this batch: at least as much is published."""
        alike = (self.sampler, self.cache) == (other.sampler, other.cache)
        return alike and self.trace >= other.trace and self.frames >= other.frames and self.embeds >= other.embeds


@dataclass(frozen=True, kw_only=True)
class DecodingParams:
    """Decoding parameters of one request. Combinations that do not work together are refused as a whole.

    Args:
        sampler, cache: a sampler and a cache policy.
        gen_length: response positions.
        seed: of the noise, for temperatures above 0.

    Raises:
        ArgumentError: names the argument and its value.
    """

    sampler: Sampler = field(default_factory=SlowFast)
    cache: CachePolicy = field(default_factory=NoCache)
    gen_length: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        make_plain(self)
        check_integer("gen_length", self.gen_length)
        check_integer("seed", self.seed, 0, SEEDS - 1)
        check_pair(self.sampler, self.cache)
        self.sampler.check_length(self.gen_length)

    @classmethod
    def parse(
        cls,
        sampler: str | Mapping | Sampler | None = None,
        cache: str | Mapping | CachePolicy | None = None,
        **numbers: Any,
    ) -> DecodingParams:
        """Build from names, from ``{"kind": name, option: value}`` or from records; :meth:`to_dict` is the inverse.

        None is the default: the paper's SlowFast, without a cache.
        """
        records = {
            "sampler": parse_sampler("slowfast" if sampler is None else sampler),
            "cache": parse_cache("none" if cache is None else cache),
        }
        return cls(**records, **numbers)

    @classmethod
    def per_prompt(
        cls, count: int, params: DecodingParams | Sequence[DecodingParams] | None = None, **fields: Any
    ) -> list[DecodingParams]:
        """Return the parameters of ``count`` prompts: from one record, from a list of them, or from ``fields``.

        One record or seed serves all prompts, with ``seed + i`` for prompt ``i``; ``gen_length`` and ``seed`` may be
        lists with one number per prompt.
        """
        _refuse_options(fields)
        refuse_unknown(fields.keys() - {*FIELDS}, FIELDS)
        if params is not None:
            require(not fields, f"params goes without {', '.join(map(repr, fields))}: they are fields of the record")
            listed = list(params) if isinstance(params, Sequence) and not isinstance(params, str) else None
            fits = listed is None or len(listed) == count
            require(fits, f"params has {len(listed or ())} entries for {count} prompts")
            for index, each in enumerate([params] if listed is None else listed):
                name = "params" if listed is None else f"params[{index}]"
                require(isinstance(each, DecodingParams), f"{name}={each!r} is not a DecodingParams")
            return listed or [replace(params, seed=params.seed + index) for index in range(count)]
        seeds = _listed("seed", fields.pop("seed", 0), count, least=0, increment=1)
        lengths = _listed("gen_length", fields.pop("gen_length", 128), count)
        base = cls.parse(**fields, gen_length=lengths[0], seed=seeds[0])
        return [replace(base, gen_length=n, seed=s) for n, s in zip(lengths, seeds, strict=True)]

    def batch_key(self, trace: bool = False, frames: bool = False) -> BatchKey:
        """Return the key of the persistent batches in which these parameters can be decoded."""
        return BatchKey(self.sampler.blanked(), self.cache, trace, frames)

    def to_dict(self) -> dict[str, Any]:
        """Return all parameters, ready for JSON."""
        return {
            "sampler": sampler_to_dict(self.sampler),
            "cache": cache_to_dict(self.cache),
            "gen_length": self.gen_length,
            "seed": self.seed,
        }


def check_pair(sampler: Sampler, cache: CachePolicy) -> None:
    """Raise ArgumentError unless the two are a sampler and a cache policy that work together."""
    known = isinstance(sampler, Sampler) and type(sampler) is not Sampler  # one of a user's own has no name
    require(known, f"sampler={sampler!r} is not a sampler; DecodingParams.parse takes names")
    require(isinstance(cache, tuple(POLICIES.values())), f"cache={cache!r} is not a policy or its name")
    sampler.check_cache(cache)
    sampler.rules(**cache.rules)  # the rules of both together are checked where they are built


def parse_sampler(value: str | Mapping[str, Any] | Sampler, **options: Any) -> Sampler:
    """Return a sampler from its name, from ``{"kind": name, option: value}``, or as it is given.

    ``options`` are fields of the sampler, and ``preset`` where its class has presets.

    Raises:
        ArgumentError: names the option and its value.
    """
    if isinstance(value, Sampler) and not options:
        return value
    kind, given = named("sampler", value, SAMPLERS)
    options = given | options
    check_options(f"sampler {kind!r}", options, sampler_options(kind))
    if SAMPLERS[kind].presets:
        return SAMPLERS[kind].preset(options.pop("preset", None), **options)
    return SAMPLERS[kind](**options)


def parse_cache(value: str | Mapping[str, Any] | CachePolicy, **options: Any) -> CachePolicy:
    """Return a cache policy from its name, from ``{"kind": name, option: value}``, or as it is given.

    Raises:
        ArgumentError: names the option and its value.
    """
    if isinstance(value, CachePolicy) and not options:
        return value
    kind, given = named("cache", value, POLICIES)
    options = given | options
    check_options(f"cache {kind!r}", options, cache_options(kind))
    return POLICIES[kind](**options)


def sampler_options(kind: str) -> set[str]:
    """Return the names that may be set for a kind of sampler. ``vanilla`` has one token per step, so no ``steps``."""
    names = {f.name for f in fields(SAMPLERS[kind])}
    if SAMPLERS[kind].presets:
        return names | {"preset"}
    return names - {"steps"} if kind == "vanilla" else names


def cache_options(kind: str) -> set[str]:
    """Return the names that may be set for a kind of cache policy."""
    return {f.name for f in fields(POLICIES[kind])}


def sampler_kind(sampler: Sampler) -> str:
    """Return the name that every front end has for a sampler's class."""
    return next(name for name, known in SAMPLERS.items() if type(sampler) is known)


def sampler_to_dict(sampler: Sampler) -> dict[str, Any]:
    """Return a sampler as :func:`parse_sampler` reads it."""
    options = {f.name: getattr(sampler, f.name) for f in fields(sampler)}
    preset = {} if sampler.name is None else {"preset": sampler.name}
    return {"kind": sampler_kind(sampler), **preset, **options}


def cache_to_dict(cache: CachePolicy) -> dict[str, Any]:
    """Return a cache policy as :func:`parse_cache` reads it."""
    return {"kind": cache.name, **{f.name: getattr(cache, f.name) for f in fields(cache)}}


def named(argument: str, value: Any, known: Mapping[str, type]) -> tuple[str, dict[str, Any]]:
    """Return a kind and its options, from a name or from ``{"kind": name, option: value}``."""
    options = dict(value) if isinstance(value, Mapping) else {"kind": value}
    kind = options.pop("kind", None)
    fine = isinstance(kind, str) and kind in known
    other = "" if isinstance(value, str) else ", nor an object with one of them as its 'kind'"
    require(fine, f"{argument}={value!r} is not one of {tuple(known)}{other}")
    return kind, options


def from_words(text: str, kind: bool = True) -> dict[str, Any]:
    """Return options from words as people type them: ``name=value``, and with ``kind`` first the kind's name.

    Values are JSON; other values are text.

    Raises:
        ArgumentError: names the word.
    """
    options: dict[str, Any] = {}
    for number, word in enumerate(text.split()):
        name, sign, value = word.partition("=")
        if kind and number == 0 and not sign:
            options["kind"] = word
            continue
        require(bool(name and value), f"{word!r} is not name=value")
        require(name not in options, f"{word!r} sets {name} a second time")
        try:
            options[name] = json.loads(value)
        except (ValueError, RecursionError):
            options[name] = value
    return options


def check_options(owner: str, options: Mapping[str, Any], allowed: set[str]) -> None:
    """Raise ArgumentError for an option that ``owner`` does not have."""
    has = f"it has {', '.join(sorted(allowed))}" if allowed else "it has none"
    for name in options:
        require(name in allowed, f"{owner} has no option {name!r}; {has}")


def refuse_unknown(names: Iterable[str], known: Collection[str]) -> None:
    """Raise for keyword arguments that a function does not have: ArgumentError for an old name, else TypeError.

    ``known`` are those that it has."""
    refuse_renamed(names)
    for name in sorted(names):
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
        raise TypeError(f"unexpected keyword argument {name!r}: {hint}")


def _refuse_options(fields: Mapping[str, Any]) -> None:
    """Raise TypeError for an option of a sampler or cache among ``fields``, with an example of where it goes."""
    for owner, every, options in (("sampler", SAMPLERS, sampler_options), ("cache", POLICIES, cache_options)):
        given = fields.get(owner)
        kinds = [given, *every] if isinstance(given, str) and given in every else every
        for name in sorted(fields.keys() - {*FIELDS}):
            kind = next((kind for kind in kinds if name in options(kind)), None)
            if kind is not None:
                example = f"{owner}={ {'kind': kind, name: fields[name]} }"
                raise TypeError(f"unexpected keyword argument {name!r}: it is an option of a {owner}, as in {example}")


def refuse_renamed(names: Iterable[str]) -> None:
    """Raise ArgumentError that says what to use instead if one of ``names`` is an old one."""
    for name in sorted(RENAMED.keys() & names):
        raise ArgumentError(f"argument {name!r} has a new name: use {RENAMED[name]}")


def _listed(name: str, value: Any, count: int, least: int = 1, increment: int = 0) -> list[Any]:
    """Return one value per prompt: the given ones, which the records check, or one integer with its increments."""
    value = as_plain(value)
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        require(len(value) == count, f"{name}={value!r} has {len(value)} entries for {count} prompts")
        return list(value)
    check_integer(name, value, least)
    return [value + increment * index for index in range(count)]
