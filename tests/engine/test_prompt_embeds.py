"""Prompt positions given as vectors: equal to ids when the vectors are those ids' embeddings."""

from __future__ import annotations

from dataclasses import replace

import numpy
import pytest
import torch

from sfs_triton import ArgumentError, Engine, Threshold
from sfs_triton.models import Transformer
from tests.support.combinations import (
    EXECUTIONS,
    POLICIES,
    RAGGED,
    SOME_PAIRS,
    Failing,
    Roomy,
    assert_same,
    engine_with,
)

PLACES = [[1, 2, 7], None, [2, 0, 1]]  # of RAGGED's prompts: some, none, and all of a prompt
HIDDEN = 9  # id in the places of vectors


def given(engine: Engine, places=PLACES, prompts=RAGGED["prompts"]) -> dict:
    """The prompts with other ids in some places, and the vectors of their own ids for these."""
    hidden, pairs = [], []
    for ids, some in zip(prompts, places, strict=True):
        hidden.append([HIDDEN if place in (some or []) else token for place, token in enumerate(ids)])
        vectors = None if some is None else engine.model.weights.embedding[[ids[place] for place in some]]
        pairs.append(None if some is None else (some, vectors.clone()))
    return {"prompts": hidden, "prompt_embeds": pairs}


def assert_equal(found, wanted, prompts=RAGGED["prompts"]) -> None:
    """Compare results but for the ids in the places of vectors, which the first have as given."""
    shown = [replace(row, canvas=ids + row.response) for row, ids in zip(found, prompts, strict=True)]
    assert_same(shown, wanted)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize(("sampler", "policy"), SOME_PAIRS)
def test_vectors_of_ids_are_those_ids(engines, sampler, policy, execution):
    engine = engines["dream-gqa" if execution == "padded" else "llada-mha"]
    options = {**RAGGED, "sampler": sampler, "cache": policy, "trace": True}
    wanted = engine_with(engine, execution).generate(**options)
    found = engine_with(engine, execution).generate(**options | given(engine))
    assert_equal(found, wanted)
    assert found[2].canvas[:3] == [HIDDEN] * 3


@pytest.mark.parametrize("policy", ["prefix", "region"])
def test_any_vectors_are_those_of_a_table_that_holds_them(engines, policy):
    engine, prompts = engines["llada-mha"], [[3, 505, 15, 506], [507, 8]]  # ids that are never predicted
    vectors = torch.randn(3, engine.spec.d_model, generator=torch.Generator().manual_seed(1))
    weights = engine.model.weights
    table = weights.embedding.index_copy(0, torch.tensor([505, 506, 507]), vectors)
    other = Engine(Transformer(engine.spec, replace(weights, embedding=table)))
    options = {"gen_length": 16, "sampler": Threshold(block_length=8), "cache": policy}
    wanted = other.generate(prompts, **options)
    found = engine.generate(prompts, prompt_embeds=[([1, 3], vectors[:2]), ([0], vectors[2:])], **options)
    assert_equal(found, wanted, prompts)


@pytest.mark.parametrize("policy", ["none", "region", "refresh"])
def test_other_vectors_give_other_tokens(engines, policy):
    engine, options = engines["llada-mha"], {**RAGGED, "cache": policy}
    embeds = given(engine)
    plain, kept = (
        engine.generate(**options | {"prompts": embeds["prompts"], "prompt_embeds": e})
        for e in (None, embeds["prompt_embeds"])
    )
    assert plain[1].response == kept[1].response
    assert plain[0].response != kept[0].response and plain[2].response != kept[2].response


def test_guidance_masks_vectors(engines):
    engine = engines["llada-mha"]
    options = {**RAGGED, "sampler": Threshold(block_length=8, cfg_scale=0.7), "cache": "dual"}
    assert_equal(engine.generate(**options | given(engine)), engine.generate(**options))


def test_through_the_kernels(engines):
    engine, prompts = Engine(engines["llada-gqa"].model.by("triton")), [[3, 14, 15], [200, 201]]
    options = {"gen_length": 2, "cache": POLICIES["region"], "sampler": Threshold(block_length=2, tau=0.5)}
    found = engine.generate(**options | given(engine, [[1], None], prompts))
    assert_equal(found, engines["llada-gqa"].generate(prompts, **options), prompts)


@pytest.mark.parametrize("execution", ["exact", "graphs"])
def test_a_slot_forgets_its_vectors(engines, execution):
    engine = engine_with(engines["llada-mha"], Roomy(EXECUTIONS[execution](), 64))
    options = {**RAGGED, "cache": POLICIES["region"]}
    engine.generate(**options | given(engine))
    (batch,) = engine.batches.spare
    again = engine.generate(**options | given(engine, [None, [4], [0]]))
    assert engine.batches.spare == [batch], "the second request had another batch"
    assert_equal(again, engine_with(engines["llada-mha"]).generate(**options))


@pytest.mark.parametrize("at", [None, 2])
def test_a_restart_keeps_them(engines, at):
    engine = Engine(engines["llada-mha"].model, pinned=False)
    engine._execution.current = Failing(at)
    options = {**RAGGED, "cache": POLICIES["region"]}
    found = engine.generate(**options | given(engine))
    assert engine.describe()["fallback"] is not None
    assert_equal(found, engine_with(engines["llada-mha"]).generate(**options))


def test_streams_and_threads_take_them(engines):
    engine, (ids, *_) = engines["llada-mha"], RAGGED["prompts"]
    embeds = given(engine, PLACES[:1], [ids])
    (hidden,), (pair,) = embeds.values()
    wanted = engine.generate(ids, gen_length=8).response
    assert engine.stream(hidden, prompt_embeds=pair, gen_length=8).result().response == wanted
    assert engine.generate_async(hidden, prompt_embeds=pair, gen_length=8).result().response == wanted
    assert engine.generate([hidden], prompt_embeds=[pair], gen_length=8)[0].response == wanted


def test_vectors_become_the_models_dtype(engines):
    model = engines["llada-mha"].model
    pair = ([1], torch.randn(1, model.spec.d_model, generator=torch.Generator().manual_seed(0)))
    found = engines["llada-mha"].generate([3, 4, 5], prompt_embeds=pair, gen_length=8).canvas
    doubled = ([1], pair[1].double().requires_grad_())
    assert engines["llada-mha"].generate([3, 4, 5], prompt_embeds=doubled, gen_length=8).canvas == found
    arrays = (numpy.array([1]), pair[1].numpy())
    assert engines["llada-mha"].generate([3, 4, 5], prompt_embeds=arrays, gen_length=8).canvas == found


WIDTH = 64
FINE = torch.zeros(1, WIDTH)


@pytest.mark.parametrize(
    ("embeds", "match"),
    [
        (([1], torch.zeros(1, 32)), r"prompt_embeds of prompt 0: the vectors have shape \[1, 32\], not \[1, 64\]"),
        (([1, 2], FINE), r"shape \[1, 64\], not \[2, 64\]"),
        (([1], FINE[None]), r"shape \[1, 1, 64\], not \[1, 64\]"),
        (([1], FINE.long()), "dtype torch.int64, which is no float"),
        (([0, 1], torch.stack((FINE[0], FINE[0] / 0))), r"the vectors at places \[1\] have NaN or infinities"),
        (([3], FINE), "prompt_embeds of prompt 0: place=3 is not an integer from 0 to 2"),
        (([-1], FINE), "place=-1 is not an integer from 0 to 2"),
        (([True], FINE), "place=True is not an integer"),
        (([1, 1], FINE.expand(2, -1)), "place 1 is given twice"),
        (([1], [[0.0] * WIDTH]), "the vectors are a list, not a tensor"),
        ((1, FINE), "the places are 1, not a list of positions"),
        (FINE, "prompt_embeds of prompt 0 is a Tensor, not a pair of places and vectors"),
        (([1],), "is a tuple, not a pair"),
    ],
)
def test_refusals(engines, embeds, match):
    with pytest.raises(ArgumentError, match=match):
        engines["llada-mha"].generate([3, 4, 5], prompt_embeds=embeds, gen_length=8)


def test_one_entry_per_prompt(engines):
    with pytest.raises(ArgumentError, match="prompt_embeds is no list with a pair, or None, for each of 3 prompts"):
        engines["llada-mha"].generate([[3], [4], [5]], prompt_embeds=([0], FINE))
    with pytest.raises(ArgumentError, match="prompt_embeds is no list with a pair, or None, for each of 2 prompts"):
        engines["llada-mha"].generate([[3], [4]], prompt_embeds=([0], FINE))
    with pytest.raises(ArgumentError, match="prompt 0 holds the mask token"):
        engines["llada-mha"].generate([500, 4], prompt_embeds=([0], FINE))
    with pytest.raises(ArgumentError, match="prompt_embeds is no list with a pair, or None, for each of 2 prompts"):
        engines["llada-mha"].generate([[3], [4]], prompt_embeds=([0], FINE))
