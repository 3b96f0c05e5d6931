"""Generation from outside: bad input, and every option that the samplers share."""

from __future__ import annotations

import math
from contextlib import nullcontext

import numpy
import pytest
import torch

import sfs_triton
from sfs_triton import ArgumentError, FixedSteps, NumericalFault, RefreshCache, SlowFast, Threshold
from sfs_triton.engine import default_dtype
from sfs_triton.ops.dispatch import Draw, operations

PROMPT = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38]
SAMPLERS = [
    pytest.param(SlowFast(), id="paper"),
    pytest.param(SlowFast.preset("llada-reference", block_length=16), id="llada-reference"),
    pytest.param(SlowFast.preset("dream-reference"), id="dream-reference"),
    pytest.param(Threshold(block_length=16), id="threshold"),
    pytest.param(FixedSteps(steps=12), id="fixed"),
    pytest.param(FixedSteps(steps=12, metric="entropy"), id="entropy"),
    pytest.param(FixedSteps(steps=12, metric="origin"), id="origin"),
]


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"tau_min": -0.1}, "tau_min=-0.1"),
        ({"tau_high": math.nan}, "tau_high=nan"),
        ({"share_stable": True, "slow_end": "fixed"}, "share_stable=True does not go with slow_end='fixed'"),
        ({"share_stable": True, "slow_end": "filled"}, "share_stable=True does not go with slow_end='filled'"),
        ({"window": 0}, "window=0"),
        ({"k_max": 0}, "k_max=0"),
        ({"k_max": 10**26}, "is not an integer from 1 to 1000000"),
        ({"k_max": 2.5}, "k_max=2.5"),
        ({"spread": "range"}, "spread='range'"),
        ({"slow_end": "never"}, "slow_end='never'"),
        ({"spread_limit": -1}, "spread_limit=-1"),
        ({"block_length": 0}, "block_length=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"cfg_scale": math.inf}, "cfg_scale=inf"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_k": 0}, "top_k=0"),
        ({"tau_slow": math.nan}, "tau_slow=nan"),
        ({"tau_high": 10**400}, "tau_high=1000"),
        ({"temperature": math.inf}, "temperature=inf is not a number from 0 to 1e\\+30"),
        ({"min_parallel": 0}, "min_parallel=0"),
    ],
)
def test_slowfast_settings(settings, named):
    with pytest.raises(ArgumentError, match=named.replace(".", r"\.")):
        SlowFast(**settings)


def test_thresholds_above_one_and_windows_above_k_max_are_legal():
    SlowFast(tau_min=1.5, tau_high=1.01, window=9, k_max=3)


@pytest.mark.parametrize("settings", [{"tau": -1}, {"tau": math.nan}, {"block_length": -1}, {"steps": 0}])
def test_threshold_settings(settings):
    with pytest.raises(ArgumentError, match=next(iter(settings))):
        Threshold(**settings)


@pytest.mark.parametrize("settings", [{"steps": 0}, {"metric": "loss"}, {"eps": 0.0}, {"eps": 1.0}, {"steps": 1.5}])
def test_fixed_settings(settings):
    with pytest.raises(ArgumentError, match=next(iter(settings))):
        FixedSteps(**settings)


def test_what_a_cache_policy_adds_to_the_rules():
    for sampler in (SlowFast(), Threshold(), FixedSteps()):
        assert sampler.rules("normal", look_ahead=3, partial=True, span_cap=9).partial
        assert not sampler.rules().partial
    rules = SlowFast().rules(look_ahead=3, partial=True, span_cap=9)
    assert (rules.look_ahead, rules.span_cap) == (3, 9)
    with pytest.raises(ArgumentError, match="look_ahead=1 does not go with zero_history=True"):
        SlowFast.preset("dream-reference").rules(look_ahead=1)
    for wrong in ({"look_ahead": -1}, {"span_cap": 0}):
        with pytest.raises(ArgumentError, match=next(iter(wrong))):
            SlowFast().rules(**wrong)


def test_unknown_preset_and_setting():
    with pytest.raises(ArgumentError, match="preset='quick'"):
        SlowFast.preset("quick")
    with pytest.raises(ArgumentError, match="tau_hihg"):
        SlowFast.preset("paper", tau_hihg=0.5)


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ([], "prompts"),
        ([1, 512], "512 at position 1"),
        ([-1], "-1 at position 0"),
        ([1, 500, 2], "mask token .id 500, at position 1"),
        (7, "prompts=7"),
        ([1.5], "1.5"),
        (numpy.array([1.0]), "1.0 at position 0"),
        (torch.tensor([True, False]), "True at position 0"),
        (numpy.array(3), "prompts has 0 dimensions, not 1 or 2"),
        (numpy.zeros((1, 2, 3), int), "prompts has 3 dimensions, not 1 or 2"),
        (torch.zeros(1, 2, 3, dtype=torch.long), "prompts has 3 dimensions, not 1 or 2"),
        ([numpy.array([[1, 2]])], r"\[1, 2\] at position 0"),
    ],
    ids=repr,
)
def test_bad_prompts(engines, prompt, named):
    with pytest.raises(ArgumentError, match=named):
        engines["llada-mha"].generate(prompt, gen_length=8)


def test_text_without_a_tokenizer(engines):
    with pytest.raises(ArgumentError, match="prompt 0 is text, not token ids: it needs a tokenizer"):
        engines["llada-mha"].generate("hello")


@pytest.mark.parametrize("as_array", [numpy.array, torch.tensor, lambda ids: torch.tensor(ids, dtype=torch.int32)])
def test_prompts_as_arrays(engines, as_array):
    engine, ids = engines["dream-gqa"], [[3, 4, 5], [6, 7, 8]]
    one, both = engine.generate(ids[0], gen_length=8), engine.generate(ids, gen_length=8)
    assert engine.generate(as_array(ids[0]), gen_length=8).canvas == one.canvas
    for prompts in (as_array(ids), [as_array(ids[0]), ids[1]], [ids[0], as_array(ids[1])]):
        assert [made.canvas for made in engine.generate(prompts, gen_length=8)] == [made.canvas for made in both]
    canvas = as_array([*ids[0], engine.spec.mask_id])
    assert engine.infill(canvas).canvas == engine.infill(canvas.tolist()).canvas


@pytest.mark.parametrize(("prompt", "match"), [("", "apply_chat_template=False.*generates without"), ([], "no prompt")])
def test_empty_text(embedded, prompt, match):
    with pytest.raises(ArgumentError, match=match):
        embedded.generate(prompt)


UNPROMPTED = [
    (SlowFast(), "none"),
    (SlowFast(), "region"),
    (SlowFast(), "refresh"),
    (Threshold(block_length=8), "dual"),
]
UNPROMPTED += [(FixedSteps(block_length=4), "prefix"), (Threshold(block_length=8, eos_stop=True), "none")]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("model", ["llada-gqa", "dream-gqa"])
@pytest.mark.parametrize(("sampler", "cache"), UNPROMPTED)
def test_generation_without_a_prompt(engines, model, sampler, cache):
    """The canvas is masks alone, as for infill; the response is cut at its end-of-text, and batches mix."""
    engine = engines[model]
    how = {"sampler": sampler, "cache": cache}
    if model == "dream-gqa" and cache == "region":
        with pytest.raises(ArgumentError, match="cache='region': prompt 0 is empty"):
            engine.generate([[]], gen_length=16, **how)
        return
    filled = engine.infill([engine.spec.mask_id] * 16, **how)
    (alone,) = engine.generate([[]], gen_length=16, **how)
    assert (alone.canvas, alone.nfe, alone.prompt_length) == (filled.canvas, filled.nfe, 0)
    end = engine.spec.end_of(alone.canvas)
    assert alone.tokens == alone.canvas[: None if end is None else end + 1]
    mixed = engine.generate([[3, 4, 5], torch.tensor([])], gen_length=16, **how)
    assert (
        mixed[1].canvas == alone.canvas and mixed[0].canvas == engine.generate([3, 4, 5], gen_length=16, **how).canvas
    )


def test_empty_text_without_a_template_is_no_prompt(embedded):
    made = embedded.generate("", gen_length=16, apply_chat_template=False)
    assert made.canvas == embedded.infill([embedded.spec.mask_id] * 16).canvas and made.prompt_length == 0
    assert made.text == embedded.text.decode(made.tokens) and embedded.spec.eos_id not in made.tokens[:-1]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"gen_length": 0}, "gen_length=0"),
        ({"gen_length": -8}, "gen_length=-8"),
        ({"gen_length": 2.5}, "gen_length=2.5"),
        ({"gen_length": "64"}, "gen_length='64'"),
        ({"gen_length": True}, "gen_length=True"),
        ({"gen_length": 600}, r"10 \+ 600 = 610 positions, the model allows 512"),
        (
            {"gen_length": 20, "sampler": Threshold(block_length=16)},
            "gen_length=20 is not a multiple of block_length=16",
        ),
        ({"gen_length": [8, 8]}, r"gen_length=\[8, 8\] has 2 entries for 1"),
        ({"sampler": "greedy"}, "sampler='greedy'"),
        ({"cache": "turbo"}, "cache='turbo'"),
        ({"cache": "prefix"}, "cache='prefix' works by block"),
        ({"cache": 3}, "cache=3"),
        ({"seed": [1, 2]}, "seed=.* has 2 entries"),
    ],
)
def test_bad_options(engines, options, named):
    with pytest.raises(ArgumentError, match=named):
        engines["llada-mha"].generate(PROMPT, **{"gen_length": 16, **options})


@pytest.mark.parametrize(
    "settings", [{"prompt_interval": 0}, {"response_interval": 1.5}, {"ratio": 1.5}, {"ratio": -1}]
)
def test_bad_refresh(settings):
    with pytest.raises(ArgumentError, match=next(iter(settings))):
        RefreshCache(**settings)


def test_prompt_longer_than_the_model_allows(engines):
    with pytest.raises(ArgumentError, match="the model allows 512"):
        engines["llada-mha"].generate([1] * 513, gen_length=1)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_nan_logits_name_row_and_step(golden, sampler):
    engine = sfs_triton.load(golden / "models" / "llada-mha", "cpu")
    engine.model.weights.embedding[77] = torch.nan
    with pytest.raises(NumericalFault, match=r"NaN logits: sequence 1 at step 0"):
        engine.generate([[1, 2, 3], [1, 77, 3]], gen_length=16, sampler=sampler)
    engine.model.weights.embedding[77] = 0.0
    assert engine.generate([1, 77, 3], gen_length=16, sampler=sampler).nfe > 0


# ---------------------------------------------------------------------------------------------------- shared options


@pytest.mark.sampled(3)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("model", ["llada-mha", "dream-gqa"])
def test_ragged_batch_equals_rows_alone(engines, model, sampler):
    prompts = [PROMPT, PROMPT[:4] + [120] * 9, [200, 201, 202]]
    lengths = [32, 16, 48]
    together = engines[model].generate(prompts, gen_length=lengths, sampler=sampler, seed=[5, 6, 7])
    for row, (prompt, length, seed) in enumerate(zip(prompts, lengths, [5, 6, 7], strict=True)):
        alone = engines[model].generate(prompt, gen_length=length, sampler=sampler, seed=seed)
        assert (together[row].canvas, together[row].nfe) == (alone.canvas, alone.nfe)


def test_order_of_rows_does_not_matter(engines):
    prompts = [PROMPT, PROMPT[::-1], PROMPT[2:]]
    forward = engines["llada-gqa"].generate(prompts, gen_length=32)
    backward = engines["llada-gqa"].generate(prompts[::-1], gen_length=32)
    assert [r.canvas for r in forward] == [r.canvas for r in backward[::-1]]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "refresh"])
@pytest.mark.parametrize(
    "sampler", [Threshold(block_length=16), FixedSteps(block_length=16)], ids=["threshold", "fixed"]
)
@pytest.mark.parametrize("model", ["llada-mha", "dream-gqa"])
def test_cached_ragged_batches_equal_rows_alone(engines, model, sampler, cache):
    prompts = [PROMPT, PROMPT[:5]]
    together = engines[model].generate(prompts, gen_length=[32, 16], sampler=sampler, cache=cache)
    for row, length in enumerate((32, 16)):
        alone = engines[model].generate(prompts[row], gen_length=length, sampler=sampler, cache=cache)
        assert together[row].canvas == alone.canvas


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_trivial_refresh_equals_no_cache(engines, sampler):
    plain = engines["llada-mha"].generate(PROMPT, gen_length=32, sampler=sampler)
    cached = engines["llada-mha"].generate(PROMPT, gen_length=32, sampler=sampler, cache=RefreshCache(1, 1, 0.0))
    assert cached.canvas == plain.canvas and cached.nfe == plain.nfe


@pytest.mark.sampled(2)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_early_stop(engines, sampler):
    """The whole tail after the first end-of-text is end-of-text, with no more steps and fewer positions forwarded."""
    engine = engines["llada-mha"]
    stopped = full = rows_stopped = rows_full = 0
    for start in range(0, 60, 12):
        prompt = [(start + 7 * i) % 480 for i in range(12)]
        done = engine.generate(prompt, gen_length=64, sampler=sampler.replace(eos_stop=True))
        plain = engine.generate(prompt, gen_length=64, sampler=sampler)
        if 496 in done.response:
            assert set(done.response[done.response.index(496) :]) == {496}
        stopped, full = stopped + done.nfe, full + plain.nfe
        rows_stopped, rows_full = rows_stopped + done.positions_forwarded, rows_full + plain.positions_forwarded
    assert stopped <= full and rows_stopped <= rows_full


def test_early_stop_saves_work_on_the_embedded_model(embedded):
    question = "15,44,79,50"
    plain = embedded.generate(question, gen_length=128, sampler=FixedSteps(block_length=32))
    stopped = embedded.generate(question, gen_length=128, sampler=FixedSteps(block_length=32, eos_stop=True))
    assert set(stopped.response[len(stopped.tokens) - 1 :]) == {embedded.spec.eos_id}
    assert stopped.nfe < plain.nfe / 2 and stopped.positions_forwarded < plain.positions_forwarded / 2


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("model", ["llada-mha", "dream-gqa"])
def test_infilling_keeps_what_is_given(engines, model, sampler):
    canvas = PROMPT[:5] + [500] * 6 + PROMPT[5:] + [500] * 3 + [42]
    done = engines[model].infill(canvas, sampler=sampler)
    assert 500 not in done.canvas
    assert all(b == a for a, b in zip(canvas, done.canvas, strict=True) if a != 500)
    assert [c >= 0 for c in done.commit_step] == [a == 500 for a in canvas]


def test_infill_needs_a_mask(engines):
    with pytest.raises(ArgumentError, match="holds no mask"):
        engines["llada-mha"].infill(PROMPT)
    with pytest.raises(ArgumentError, match="holds no canvas"):
        engines["llada-mha"].infill([])


@pytest.mark.parametrize(
    ("canvas", "options", "named"),
    [
        ([[500, 3], [500] * 513], {}, r"canvas 1 has 513 \+ 0 = 513 positions"),
        ([[500], [512]], {}, "canvas 1: 512 at position 0 is no token id"),
        ("a", {}, "canvas 0 is text, not token ids: it needs a tokenizer"),
        ([500], {"sampler": ""}, "sampler='' is not one of"),
        ([500], {"sampler": {}}, "sampler={} is not one of"),
    ],
)
def test_canvases_and_samplers_that_infill_refuses(engines, canvas, options, named):
    with pytest.raises(ArgumentError, match=named):
        engines["llada-mha"].infill(canvas, **options)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_temperature_is_keyed_by_seed(engines, sampler):
    engine, hot = engines["llada-mha"], sampler.replace(temperature=1.0)
    first = engine.generate(PROMPT, gen_length=32, sampler=hot, seed=1)
    assert engine.generate(PROMPT, gen_length=32, sampler=hot, seed=1).canvas == first.canvas
    assert engine.generate(PROMPT, gen_length=32, sampler=hot, seed=2).canvas != first.canvas
    pair = engine.generate([PROMPT[:3], PROMPT], gen_length=32, sampler=hot, seed=[9, 1])
    assert pair[1].canvas == first.canvas


def test_vanishing_temperature_and_top_k_one_are_greedy(engines):
    greedy = engines["llada-mha"].generate(PROMPT, gen_length=32)
    for sampler in (
        SlowFast(temperature=1e-6),
        SlowFast(temperature=1.0, top_k=1),
        SlowFast(temperature=1.0, top_p=1e-6),
    ):
        assert engines["llada-mha"].generate(PROMPT, gen_length=32, sampler=sampler, seed=3).canvas == greedy.canvas


def test_guidance_counts_two_forwards_a_step(engines):
    done = engines["llada-mha"].generate(PROMPT, gen_length=32, sampler=SlowFast(cfg_scale=0.5))
    plain = engines["llada-mha"].generate(PROMPT, gen_length=32)
    assert done.forwards == 2 * done.nfe and plain.forwards == plain.nfe
    assert done.positions_forwarded == 2 * sum(done.forward_lengths)


def test_guidance_with_caches_equals_guidance_without(engines):
    sampler = FixedSteps(steps=16, cfg_scale=0.7)
    plain = engines["llada-mha"].generate(PROMPT, gen_length=32, sampler=sampler)
    cached = engines["llada-mha"].generate(PROMPT, gen_length=32, sampler=sampler, cache=RefreshCache(1, 1, 0.0))
    assert cached.canvas == plain.canvas


def test_trace_and_frames_tell_the_same_story(engines):
    frames = []
    done = engines["llada-mha"].generate(PROMPT, gen_length=32, trace=True, on_step=frames.append)
    assert len(done.trace) == len(frames) == done.nfe
    committed = sorted(p for step in done.trace for p in step.committed)
    assert committed == list(range(32))
    assert frames[-1].tokens[0] == done.canvas and not frames[-1].running[0]
    for step in done.trace:
        assert all(done.commit_step[len(PROMPT) + p] == step.step for p in step.committed)
        looked = [c for c in step.confidence if c is not None]
        assert looked and all(0 < c <= 1 for c in looked)


def test_fast_steps_forward_nothing_beyond_the_span(engines):
    done = engines["llada-mha"].generate(PROMPT, gen_length=64, trace=True)
    for step in done.trace:
        if step.phase == "fast" and step.k > 0:
            assert step.forwarded == step.e


def test_tokens_end_with_the_first_end_of_text(embedded):
    done = embedded.generate("15,44,79,50", gen_length=64)
    assert done.tokens.count(embedded.spec.eos_id) <= 1
    assert done.tokens == done.response[: len(done.tokens)]


def test_messages_and_text_are_the_same_turn(embedded):
    text = embedded.generate("15,44,79,50", gen_length=16)
    turn = embedded.generate([{"role": "user", "content": "15,44,79,50"}], gen_length=16)
    assert text.canvas == turn.canvas


def test_bfloat16_runs(golden):
    engine = sfs_triton.load(golden / "models" / "llada-mha", "cpu", "bfloat16")
    assert 500 not in engine.generate(PROMPT, gen_length=32).canvas


def test_tensors_are_token_ids(engines):
    engine = engines["llada-mha"]
    wanted = engine.generate(PROMPT, gen_length=16).canvas
    assert engine.generate(torch.tensor(PROMPT), gen_length=16).canvas == wanted
    assert [r.canvas for r in engine.generate(torch.tensor([PROMPT, PROMPT]), gen_length=16)] == [wanted, wanted]
    assert engine.generate([torch.tensor(PROMPT)], gen_length=16)[0].canvas == wanted


@pytest.mark.sampled(3)
@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize(
    "sampler",
    [
        Threshold(block_length=1),
        FixedSteps(block_length=1),
        FixedSteps(steps=4),
        FixedSteps(),
        FixedSteps(block_length=4),
        Threshold(block_length=8, eos_stop=True),
        FixedSteps(block_length=8, eos_stop=True),
    ],
    ids=["threshold-1", "fixed-1", "four-steps", "fixed", "fixed-4", "threshold-eos", "fixed-eos"],
)
def test_shifted_models_finish_with_block_caches(golden, sampler, cache):
    """Cases include blocks of one position, blocks whose first token ends the text, and given first tokens."""
    engine = sfs_triton.load(golden / "models" / "dream-gqa", "cpu")
    engine.model.weights.head[496] += 0.05
    for prompt in (PROMPT, PROMPT[::-1], [7] * 5):
        done = engine.generate(prompt, gen_length=16, sampler=sampler, cache=cache)
        assert done.masks_left == 0 and 500 not in done.canvas
        filled = engine.infill([*prompt, 3, 500, 500, 4, 500, 500, 500, 9], sampler=sampler, cache=cache)
        assert filled.masks_left == 0 and 500 not in filled.canvas


def test_masks_that_a_bound_leaves_are_counted(engines):
    bounded = SlowFast.preset("llada-reference", block_length=32, max_cycles=1, k_max=1)
    done = engines["llada-mha"].generate(PROMPT, gen_length=64, sampler=bounded)
    assert done.masks_left == done.response.count(500) > 0


def test_filters_change_scores_where_scores_are_tempered():
    logits = torch.tensor([[2.0], [1.9], [1.8], [-1.0]])
    ops = operations("torch", torch.device("cpu"))
    assert ops.choose(torch.ones(1, 1), logits, Draw(top_k=1, tempered=True))[1].item() == 1.0
    assert ops.choose(torch.ones(1, 1), logits, Draw(top_k=1))[1].item() < 0.4


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"seed": 1.5}, "seed=1.5"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**63}, "seed=9223372036854775808"),
        ({"seed": ["1"]}, "seed='1'"),
        ({"sampler": 7}, "sampler=7"),
    ],
)
def test_seeds_and_samplers_are_checked_by_both_ways_in(engines, options, named):
    with pytest.raises(ArgumentError, match=named):
        engines["llada-mha"].generate(PROMPT, gen_length=8, **options)
    with pytest.raises(ArgumentError, match=named):
        engines["llada-mha"].infill([*PROMPT, 500], **options)


@pytest.mark.parametrize("prompt", [torch.tensor(3), torch.ones(2, 2, 2), [[1, 2], 5], [1.0, 2.0], b"12"])
def test_odd_prompts(engines, prompt):
    with pytest.raises(ArgumentError, match="prompt"):
        engines["llada-mha"].generate(prompt, gen_length=8)


def test_positions_forwarded_counts_what_was_recomputed(engines):
    """Prompt every 4 steps, response every 2, and in between a quarter of it."""
    sampler, policy = FixedSteps(steps=8), RefreshCache(4, 2, 0.25)
    done = engines["llada-mha"].generate(PROMPT, gen_length=32, sampler=sampler, cache=policy, trace=True)
    assert [step.positions_forwarded for step in done.trace] == [42, 8, 32, 8, 42, 8, 32, 8]
    assert done.positions_forwarded == 180 and done.forward_lengths == [42] * 8


@pytest.mark.parametrize(("supported", "wanted"), [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_without_bfloat16_gets_float16_and_one_line_says_so(monkeypatch, caplog, supported, wanted):
    asked = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: asked.append(1) or supported)
    assert default_dtype(torch.device("cuda")) == wanted and asked
    assert len(caplog.records) == (not supported)
    assert supported or "Tesla T4 has no bfloat16" in caplog.text
    assert default_dtype(torch.device("cpu")) == torch.float32
