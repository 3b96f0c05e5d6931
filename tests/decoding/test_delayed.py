"""The delayed block cache: the positions that steps forward. ``tests/engine/test_conformance.py`` compares tokens."""

from __future__ import annotations

import itertools
import json

import pytest

from sfs_triton import DelayedCache, MultiBlock
from tests.conformance import METHODS
from tests.support.combinations import PROMPTS, RAGGED, SAMPLERS, assert_same
from tests.support.paths import GOLDEN

RECORDED = [  # without an early stop: the recorded ones go on behind an end-of-text
    pytest.param(path.name.split(".")[0], case, id=case["id"])
    for path in sorted((GOLDEN / "cases").glob("*.d3llm_cache.jsonl"))
    for case in map(json.loads, path.read_text().splitlines())
    if "early_stop" not in case["settings"]
]
ONE_BY_ONE = {"entropy": 0.0, "keep_best": False}  # a step commits one position


@pytest.mark.parametrize(("model", "case"), RECORDED)
def test_forwards_are_as_long_as_recorded(engines, model, case):
    setup = METHODS[case["method"]](case["settings"])
    how = {"gen_length": setup.gen_length, "sampler": setup.sampler, "cache": setup.cache}
    (done,) = engines[model].generate(case["prompt"], **how)
    lengths = [[length, len(list(same))] for length, same in itertools.groupby(done.forward_lengths)]
    assert lengths == case["fwd_lens"]


@pytest.mark.parametrize("model", ["llada-mha", "dream-gqa"])
def test_nothing_is_cached_before_the_prompt_has_waited(engines, model):
    how = {**RAGGED, "sampler": SAMPLERS["open"]}
    assert_same(engines[model].generate(**how, cache=DelayedCache(delay=1000)), engines[model].generate(**how))


def test_given_blocks_before_the_first_mask_are_cached_with_the_prompt(engines):
    canvas = PROMPTS[0][:10] + [engines["llada-mha"].spec.mask_id] * 2
    sampler = MultiBlock(block_length=4, **ONE_BY_ONE)
    assert engines["llada-mha"].infill(canvas, sampler=sampler, cache=DelayedCache(delay=2)).forward_lengths == [12, 12]
    assert engines["llada-mha"].infill(canvas, sampler=sampler, cache=DelayedCache(delay=1)).forward_lengths == [12, 4]


def test_a_canvas_that_grows_is_forwarded_as_a_whole(engines):
    sampler = MultiBlock(block_length=2, grow=4, **ONE_BY_ONE)
    done = engines["llada-mha"].generate([7] * 9, gen_length=8, sampler=sampler, cache=DelayedCache(delay=0))
    assert done.forward_lengths == [13, 4, 4, 2, 17, 4, 4, 2]


@pytest.mark.parametrize("every", [1, 3, None])
def test_refreshes_are_of_the_whole_canvas(engines, every):
    how = {"sampler": MultiBlock(block_length=8, **ONE_BY_ONE), "cache": DelayedCache(delay=1, refresh_every=every)}
    done = engines["llada-mha"].generate([7] * 9, gen_length=8, **how)
    whole = {0} if every is None else {0, *range(every - 1, 8, every)}
    assert done.forward_lengths == [17 if step in whole else 8 for step in range(8)]
