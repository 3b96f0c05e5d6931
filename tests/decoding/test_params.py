"""Decoding parameters: from names, from JSON and back."""

from __future__ import annotations

import json
import math
import re

import numpy
import pytest
import torch

import sfs_triton
from sfs_triton import ArgumentError, FixedSteps, LikelihoodParams, RefreshCache, RegionCache, SlowFast, Threshold
from sfs_triton.decoding.caching import POLICIES
from sfs_triton.decoding.params import (
    RENAMED,
    DecodingParams,
    cache_options,
    from_words,
    parse_cache,
    parse_sampler,
    sampler_options,
    sampler_to_dict,
)
from sfs_triton.decoding.samplers import PRESETS, SAMPLERS, MultiBlock

PARAMS = [
    DecodingParams(),
    DecodingParams(sampler=SlowFast.preset("fast", tau_high=0.8), cache=RegionCache(capacity=64), seed=7),
    DecodingParams(sampler=SlowFast.preset("llada-reference", block_length=16), gen_length=64),
    DecodingParams(sampler=Threshold(tau=0.7, block_length=8), cache=POLICIES["dual"](), gen_length=16),
    DecodingParams(sampler=FixedSteps(steps=4, metric="entropy", temperature=0.5), cache=RefreshCache(ratio=0.0)),
]


@pytest.mark.parametrize("params", PARAMS, ids=lambda p: type(p.sampler).__name__)
def test_json_and_back(params):
    assert DecodingParams.parse(**json.loads(json.dumps(params.to_dict()))) == params


@pytest.mark.parametrize("kind", SAMPLERS)
def test_every_sampler_has_one_name(kind):
    sampler = parse_sampler(kind)
    assert type(sampler) is SAMPLERS[kind]
    assert parse_sampler({"kind": kind}) == sampler == parse_sampler(sampler)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset):
    assert parse_sampler("slowfast", preset=preset) == SlowFast.preset(preset)
    assert parse_sampler({"kind": "slowfast", "preset": preset}, k_max=3) == SlowFast.preset(preset, k_max=3)


@pytest.mark.parametrize(
    ("sampler", "name"),
    [
        (SlowFast(temperature=0.5, eos_stop=True), "paper"),
        (SlowFast.preset("fast"), "fast"),
        (SlowFast.preset("fast", tau_high=0.5), None),
        (SlowFast(block_length=32), None),
        (MultiBlock.preset("d3llm-dream"), "d3llm-dream"),
        (Threshold(), None),
    ],
)
def test_a_preset_is_named_where_no_setting_of_it_is_changed(sampler, name):
    assert sampler.name == name and sampler_to_dict(sampler).get("preset") == name
    assert parse_sampler(sampler_to_dict(sampler)) == sampler


def test_options():
    assert parse_cache("region", capacity=32) == parse_cache({"kind": "region", "capacity": 32})
    assert "steps" not in sampler_options("vanilla") and "steps" in sampler_options("fixed")
    assert cache_options("none") == set()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: parse_sampler("slow"), "sampler='slow' is not one of"),
        (lambda: parse_sampler({"preset": "fast"}), "nor an object with one of them as its 'kind'"),
        (lambda: parse_sampler(3), "sampler=3 is not one of"),
        (lambda: parse_sampler("threshold", k_max=4), "sampler 'threshold' has no option 'k_max'"),
        (lambda: parse_sampler("slowfast", preset=["fast"]), r"preset=\['fast'\]"),
        (lambda: parse_cache("ram"), r"^cache='ram' is not one of \('none', [^()]*\)$"),
        (lambda: parse_cache("none", capacity=1), "cache 'none' has no option 'capacity'; it has none"),
        (lambda: DecodingParams(sampler="slowfast"), "sampler='slowfast' is not a sampler"),
        (lambda: DecodingParams(cache="none"), "cache='none' is not a policy"),
        (lambda: DecodingParams.parse(cache="dual"), "cache='dual' works by block"),
        (lambda: DecodingParams.parse("multi-block", "prefix"), "cache='prefix' works by block"),
        (lambda: DecodingParams.parse(cache="delayed"), "cache='delayed' works by block"),
        (lambda: DecodingParams.parse("local-leap", "delayed"), "cache='delayed' does not go with LocalLeap"),
        (lambda: DecodingParams.parse("threshold", "delayed"), "cache='delayed' does not go with Threshold"),
        (lambda: parse_cache("delayed", delay=-1), "delay=-1 is not an integer from 0"),
        (lambda: parse_cache("delayed", delay=2**62), "delay=4611686018427387904 is not an integer from 0"),
        (lambda: parse_cache("delayed", delay=True), "delay=True is not an integer"),
        (lambda: parse_cache("delayed", refresh_every=0), "refresh_every=0 is not an integer from 1"),
        (lambda: parse_cache("delayed", refresh_every=2.0), "refresh_every=2.0 is not an integer"),
        (lambda: DecodingParams(gen_length=0), "gen_length=0 is not an integer of at least 1"),
        (lambda: DecodingParams(gen_length=1.5), "gen_length=1.5 is not an integer"),
        (lambda: DecodingParams(seed=-1), "seed=-1 is not an integer from 0 to 9223372036854775807"),
        (lambda: DecodingParams(seed=True), "seed=True is not an integer"),
        (lambda: DecodingParams.parse("threshold", gen_length=33), "gen_length=33 is not a multiple"),
        (lambda: Threshold(eos="first"), r"eos='first' is not one of"),
        (lambda: Threshold(eos_penalty=-1), "eos_penalty=-1 is not a number from 0 to 10000"),
        (lambda: Threshold(eos_penalty=True), "eos_penalty=True is not a number"),
        (lambda: Threshold(end_think_logit_boost=-1), "end_think_logit_boost=-1 is not a number from 0 to 10000"),
        (lambda: Threshold(end_think_logit_boost=math.nan), "end_think_logit_boost=nan is not a number"),
        (lambda: Threshold(end_think_logit_boost=8.0), "end_think_logit_boost=8.0 needs end_think_token_ids"),
        (lambda: Threshold(end_think_boost_power=0), "end_think_boost_power=0 is not above 0"),
        (lambda: Threshold(end_think_token_ids=[]), r"end_think_token_ids=\[\] is no list of 1 to 64 token ids"),
        (lambda: Threshold(end_think_token_ids="x"), "end_think_token_ids='x' is no list"),
        (lambda: Threshold(end_think_token_ids=[3, -1]), r"end_think_token_ids\[1\]=-1 is not an integer"),
        (lambda: Threshold(end_think_token_ids=[True]), r"end_think_token_ids\[0\]=True is not an integer"),
        (lambda: FixedSteps(metric="origin", eos="last"), "eos='last' does not go with metric='origin'"),
    ],
    ids=lambda v: v.replace(" ", "_")[:24] if isinstance(v, str) else "",
)
def test_refusals(build, message):
    with pytest.raises(ArgumentError, match=message):
        build()


def test_the_engine_takes_names(embedded):
    named = embedded.generate("15,44,79,50", gen_length=32, sampler="threshold", cache="none")
    assert named.tokens == embedded.generate("15,44,79,50", gen_length=32, sampler=Threshold()).tokens


@pytest.mark.parametrize("old", RENAMED)
def test_renamed_arguments_are_refused_with_the_new_name(embedded, old):
    for call in (embedded.generate, sfs_triton.load):
        with pytest.raises(ArgumentError, match=re.escape(f"argument '{old}' has a new name: use {RENAMED[old]}")):
            call("embedded", **{old: None})


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ({"tau": 0.5}, "it is an option of a sampler, as in sampler={'kind': 'threshold', 'tau': 0.5}"),
        ({"sampler": "vanilla", "temperature": 1}, "as in sampler={'kind': 'vanilla', 'temperature': 1}"),
        ({"sampler": SlowFast(), "capacity": 64}, "option of a cache, as in cache={'kind': 'region', 'capacity': 64}"),
        ({"smapler": "fixed"}, "did you mean 'sampler'?"),
        ({"foo": 1}, "known are sampler, cache, gen_length, seed"),
    ],
)
def test_unknown_arguments_say_where_options_go(embedded, given, hint):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{[*given][-1]}': .*{re.escape(hint)}"):
        embedded.generate("1,2", **given)


def test_a_misspelt_argument_of_load():
    with pytest.raises(TypeError, match="'quantisation': did you mean 'quantization'"):
        sfs_triton.load("embedded", quantisation="fp8")


def test_numbers_of_numpy_become_pythons():
    sampler = Threshold(tau=numpy.float32(0.5), top_k=numpy.int64(3), eos_stop=numpy.bool_(True))
    cache = RegionCache(capacity=numpy.int32(64), rotate=torch.tensor(False))
    (made,) = DecodingParams.per_prompt(
        1, sampler=sampler, cache=cache, gen_length=numpy.array([64]), seed=numpy.int8(3)
    )
    wanted = DecodingParams(
        sampler=Threshold(tau=0.5, top_k=3, eos_stop=True),
        cache=RegionCache(capacity=64, rotate=False),
        gen_length=64,
        seed=3,
    )
    assert made == wanted and json.dumps(made.to_dict()) == json.dumps(wanted.to_dict())
    assert LikelihoodParams(mc_num=numpy.int64(64)) == LikelihoodParams(mc_num=64)
    with pytest.raises(ArgumentError, match=r"tau=\[0.5\] is not a number"):
        Threshold(tau=numpy.array([0.5]))


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("klass", {"kind": "klass"}),
        (" klass  history=3 take=calm ", {"kind": "klass", "history": 3, "take": "calm"}),
        ("slowfast end_think_token_ids=[7,9]", {"kind": "slowfast", "end_think_token_ids": [7, 9]}),
        ("capacity=null", {"capacity": None}),
        ("", {}),
    ],
)
def test_words(text, options):
    assert from_words(text) == options


@pytest.mark.parametrize(
    ("text", "words"),
    [("klass calm", "'calm' is not name=value"), ("klass take= ", "'take='"), ("x a=1 a=2", "a second")],
)
def test_words_that_are_refused(text, words):
    with pytest.raises(ArgumentError, match=words):
        from_words(text)


def test_parameters_per_prompt():
    one = DecodingParams(gen_length=8, seed=3)
    assert [each.seed for each in DecodingParams.per_prompt(3, one)] == [3, 4, 5]
    two = [one, DecodingParams(cache=parse_cache("region"))]
    assert DecodingParams.per_prompt(2, two) == two
    listed = DecodingParams.per_prompt(2, gen_length=[8, 16], seed=[5, 5], sampler="fixed", cache=None)
    assert [(each.gen_length, each.seed, each.cache.name) for each in listed] == [(8, 5, "none"), (16, 5, "none")]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"params": DecodingParams(), "seed": 1}, "params goes without 'seed'"),
        ({"params": [DecodingParams()]}, "params has 1 entries for 2 prompts"),
        ({"params": [DecodingParams(), "slowfast"]}, r"params\[1\]='slowfast' is not a DecodingParams"),
        ({"params": "slowfast"}, "params='slowfast' is not a DecodingParams"),
        ({"gen_length": [8]}, r"gen_length=\[8\] has 1 entries for 2 prompts"),
        ({"seed": "x"}, "seed='x' is not an integer of at least 0"),
        ({"gen_length": [8, 8.0]}, "gen_length=8.0 is not an integer of at least 1"),
    ],
)
def test_parameters_per_prompt_that_are_refused(given, words):
    with pytest.raises(ArgumentError, match=words):
        DecodingParams.per_prompt(2, **given)
