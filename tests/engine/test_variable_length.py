"""Canvases that grow until end-of-text."""

from __future__ import annotations

import dataclasses

import pytest

from sfs_triton import KLASS, WINO, ArgumentError, Engine, FixedSteps, SlowFast, Threshold
from sfs_triton.decoding.params import DecodingParams
from sfs_triton.models import Transformer
from tests.support.combinations import EXECUTIONS, PROMPTS, engine_with

SAMPLERS = [
    (SlowFast(), "none"),
    (SlowFast(), "region"),
    (Threshold(block_length=8), "dual"),
    (FixedSteps(steps=6), "none"),
    (KLASS(tau=0.1, divergence=0.5, history=1, block_length=8), "none"),
    (WINO(tau=0.05, tau_back=0.5, block_length=8), "region"),
]


def with_end(engine: Engine, end: int) -> Engine:
    return Engine(Transformer(dataclasses.replace(engine.spec, eos_id=end), engine.model.weights))


def in_parts(engine: Engine, prompt: list[int], length: int, grow: int, **options) -> tuple[list[int], int, list[int]]:
    """Response, steps and commit steps by generations that each continue the one before."""
    response, nfe, commits = [], 0, []
    while len(response) < length and engine.spec.end_of(response) is None:
        done = engine.generate(prompt + response, gen_length=grow, **options)
        commits += [nfe + step for step in done.commit_step[done.prompt_length :]]
        response, nfe = response + done.response, nfe + done.nfe
    return response, nfe, commits


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("sampler", "cache"), SAMPLERS)
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_parts_are_responses_of_their_own(engines, execution, sampler, cache):
    """Sequences of a batch grow apart, and one does not grow."""
    engine = engine_with(engines["llada-mha"], execution)
    grown = DecodingParams.parse(sampler.replace(grow=8), cache, gen_length=24)
    plain = DecodingParams.parse(sampler, cache, gen_length=16)
    batch = engine.generate([*PROMPTS, PROMPTS[0]], [grown, grown, grown, plain])
    for done, prompt in zip(batch, PROMPTS, strict=False):
        response, nfe, commits = in_parts(engine, prompt, 24, 8, sampler=sampler, cache=cache)
        assert (done.response, done.nfe, done.commit_step[len(prompt) :]) == (response, nfe, commits)
        assert len(done.forward_lengths) == nfe and done.prompt_length == len(prompt) and done.masks_left == 0
    assert batch[3].canvas == engine.generate(PROMPTS[0], plain).canvas


def test_end_of_think_counts_the_whole_response(engines):
    """In a batch of different lengths, captured too; for a sequence that no response of the model holds."""
    shared, length = engines["llada-mha"], [16, 24, 32]
    sampler = FixedSteps(grow=8, end_think_token_ids=(21, 22, 21, 23), end_think_logit_boost=40.0)
    options = {"sampler": sampler, "gen_length": length}
    batch = shared.generate(PROMPTS, **options)
    for done, prompt, n in zip(batch, PROMPTS, length, strict=True):
        assert done.canvas == shared.generate(prompt, gen_length=n, sampler=sampler).canvas
    assert all("21, 22, 21, 23" in str(done.response) for done in batch)
    parts = in_parts(shared, PROMPTS[2], 32, 8, sampler=sampler.replace(grow=None))
    assert parts[0] != batch[2].response  # each would end its own thinking
    again = engine_with(shared, "graphs").generate(PROMPTS, **options)
    assert [done.canvas for done in again] == [done.canvas for done in batch]


def test_memory_grows_with_the_answer(engines):
    shared = engines["llada-mha"]
    first = shared.generate(PROMPTS[0], gen_length=8, sampler=FixedSteps())
    engine = with_end(shared, first.response[5])
    most = (engine.spec.max_length - len(PROMPTS[0])) // 8 * 8
    done = engine.generate(PROMPTS[0], gen_length=most, sampler=FixedSteps(grow=8))
    assert (
        done.response == first.response
        and done.tokens == first.response[: first.response.index(engine.spec.eos_id) + 1]
    )
    assert [batch.length for batch in engine.batches.spare] == [256] and most > 256


def test_frames_show_the_canvas_grow(engines):
    with engines["llada-mha"].stream(PROMPTS[0], gen_length=24, sampler=FixedSteps(grow=8)) as stream:
        frames = list(stream)
        done = stream.result()
    assert [len(frame.tokens[0]) - len(PROMPTS[0]) for frame in frames] == [8] * 8 + [16] * 8 + [24] * 8
    assert [frame.running[0] for frame in frames] == [True] * 23 + [False]
    assert [frame.step for frame in frames] == list(range(24)) and frames[-1].tokens[0] == done.canvas


def test_a_dropped_sequence_grows_no_more(engines):
    stream = engines["llada-mha"].stream([PROMPTS[0], PROMPTS[1]], gen_length=16, sampler=FixedSteps(grow=8))
    for frame in stream:
        if frame.step == 7:  # decides the last position of the first part
            stream.drop(0)
    first, second = stream.result()
    assert len(first.response) == 8 and len(second.response) == 16 and first.masks_left == second.masks_left == 0


def test_refusals(engines):
    engine = engines["llada-mha"]
    for options, said in (
        ({"sampler": {"kind": "fixed", "grow": 0}}, "grow=0 is not an integer"),
        ({"sampler": FixedSteps(grow=16), "gen_length": 24}, "gen_length=24 is not a multiple of grow=16"),
        (
            {"sampler": Threshold(block_length=16, grow=8), "gen_length": 32},
            "grow=8 is not a multiple of block_len",
        ),
        ({"sampler": FixedSteps(grow=8), "gen_length": 8, "trace": True}, "grow=8 does not go with a trace"),
        ({"sampler": FixedSteps(end_think_token_ids=[512])}, r"end_think_token_ids\[0\]=512 is no token id below 512"),
        ({"sampler": FixedSteps(end_think_token_ids=[9, 500])}, r"end_think_token_ids\[1\]=500 is the mask token"),
    ):
        with pytest.raises(ArgumentError, match=said):
            engine.generate(PROMPTS[0], **options)
    with pytest.raises(ArgumentError, match="grow=8 .* not with infilling"):
        engine.infill([1, engine.spec.mask_id, 2], sampler=FixedSteps(grow=8))
