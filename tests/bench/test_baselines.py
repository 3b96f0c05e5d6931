"""The benchmarks' baselines equal the recordings of the code that they mirror, in tokens and in forwards."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from bench.baselines import (
    AUTOREGRESSIVE,
    BASELINES,
    Decoded,
    PlainModel,
    autoregressive,
    dllm_cache,
    fast_dllm,
    vanilla,
)
from bench.common.testing import no_host_reads
from sfs_triton import FixedSteps, RefreshCache, SlowFast, Threshold, load
from tests.conformance import MARGIN, METHODS, Setup, recorded_margin
from tests.support.margins import assert_logits_close

PROMPT = [7, 99, 13, 250, 31, 8, 120, 64, 5, 77]


@pytest.fixture(scope="module")
def models(engines) -> dict[str, PlainModel]:
    return {name: PlainModel(engine.model) for name, engine in engines.items()}


def _decoder(method: str, setup: Setup) -> Callable[..., Decoded]:
    """The baseline that mirrors a recorded case."""
    if method.startswith("fastdllm"):
        return partial(fast_dllm.decode, cache=setup.cache)
    if isinstance(setup.cache, RefreshCache):
        return partial(dllm_cache.decode, cache=setup.cache)
    return BASELINES[method.split("_")[0]].decode


def _cases(golden: Path, family: str, method: str, every: int) -> Iterator[tuple[str, dict, Setup]]:
    """Sample a family's recorded single-sequence cases among those that the baselines implement."""
    for path in sorted((golden / "cases").glob(f"*.{family}.jsonl")):
        cases = [json.loads(line) for line in path.read_text().splitlines()]
        fit = [c for c in cases if c["method"] == method and "error" not in c and len(c["prompt"]) == 1]
        for case in [c for c in fit if not c["settings"].get("cfg_scale")][::every]:
            yield path.name.split(".")[0], case, METHODS[method](case["settings"])


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("family", "method", "every", "least"),
    [
        ("slowfast", "slowfast_llada", 24, 10),
        ("slowfast", "slowfast_dream", 24, 8),
        ("vanilla", "vanilla_llada", 6, 10),
        ("fastdllm", "fastdllm_llada", 12, 10),
        ("cache", "slowfast_llada+dllm_cache", 8, 6),
        ("cache", "vanilla_llada+dllm_cache", 1, 4),
    ],
)
def test_recorded_cases(golden, models, family, method, every, least):
    """Stable ones equal the recording; the others, which rounding decides, are finished within the sampler's bounds."""
    equal = 0
    for name, case, setup in _cases(golden, family, method, every):
        done = _decoder(method, setup)(models[name], case["prompt"][0], setup.gen_length, setup.sampler)
        same = (done.response, done.nfe) == (case["out"][0], case["nfe"])
        if case["stable"] and recorded_margin(case) >= MARGIN:
            assert same, case["id"]
        else:
            assert models[name].spec.mask_id not in done.response, case["id"]
        if same and setup.cache == "none":
            assert done.positions_forwarded == sum(length * count for length, count in case["fwd_lens"]), case["id"]
        equal += same
    assert equal >= least


@pytest.mark.parametrize("name", ["llada-gqa", "dream-gqa", "dream-r7"])
@pytest.mark.parametrize("preset", ["paper", "llada-reference", "dream-reference"])
def test_presets_count_as_the_engine_does(engines, models, name, preset):
    sampler = SlowFast.preset(preset, block_length=24 if preset == "llada-reference" else None)
    theirs = engines[name].generate(PROMPT, gen_length=48, sampler=sampler)
    mine = BASELINES["slowfast"].decode(models[name], PROMPT, 48, sampler)
    assert mine == (theirs.response, theirs.nfe, theirs.full_forwards, theirs.positions_forwarded)


@pytest.mark.parametrize(
    ("name", "sampler", "cache"),
    [
        ("vanilla", FixedSteps(steps=16, block_length=16), "none"),
        ("vanilla + dLLM-Cache", FixedSteps(steps=16, block_length=16), RefreshCache(7, 3, 0.0)),
        ("slowfast + dLLM-Cache", SlowFast(), RefreshCache(7, 3, 0.0)),
        ("fast-dllm", Threshold(block_length=16), "none"),
        ("fast-dllm prefix", Threshold(block_length=16), "prefix"),
        ("fast-dllm dual", Threshold(block_length=16), "dual"),
    ],
)
def test_caches_count_as_the_engine_does(engines, models, name, sampler, cache):
    options = {"cache": cache} if isinstance(cache, RefreshCache) else {}
    theirs = engines["llada-gqa"].generate(PROMPT, gen_length=48, sampler=sampler, cache=cache)
    mine = BASELINES[name].decode(models["llada-gqa"], PROMPT, 48, sampler, **options)
    assert mine == (theirs.response, theirs.nfe, theirs.full_forwards, theirs.positions_forwarded)


def test_moved_rows_are_counted(models):
    """With ratio 1 and intervals that never come, all but the first forward compute the response alone."""
    cache = RefreshCache(prompt_interval=1000, response_interval=1000, ratio=1.0)
    done = dllm_cache.decode(models["llada-mha"], PROMPT, 16, FixedSteps(), cache)
    assert done[1:] == (16, 1, len(PROMPT) + 16 * 16)
    always = RefreshCache(prompt_interval=1000, response_interval=1, ratio=0.0)
    assert done == dllm_cache.decode(models["llada-mha"], PROMPT, 16, FixedSteps(), always)


def test_a_single_step_fills_so_many_of_its_block(models):
    model = models["llada-mha"]
    canvas = torch.tensor(PROMPT + [model.spec.mask_id] * 16)
    model.ensure_rope_length(len(canvas))
    with no_host_reads():
        vanilla.step(model, canvas, 10, 18, 3)
    filled = (canvas != model.spec.mask_id).nonzero()[:, 0].tolist()
    assert filled[:10] == list(range(10)) and len(filled) == 13 and max(filled) < 18


@pytest.mark.parametrize("name", ["llada-gqa", "dream-r7"])
def test_logits_are_the_engines(engines, models, name):
    tokens = torch.tensor(PROMPT)
    wanted = engines[name].model.logits(tokens[None])[0]
    if models[name].spec.shifted:
        wanted = torch.cat((wanted[:1], wanted[:-1]))
    assert_logits_close(models[name](tokens), wanted)


@pytest.mark.parametrize("checkpoint", ["llada-gqa", "dream-gqa"])
def test_bfloat16(golden, checkpoint):
    model = PlainModel(load(golden / "models" / checkpoint, "cpu", "bfloat16").model)
    logits = model(torch.tensor(PROMPT))
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    samplers = {"vanilla": FixedSteps(steps=8), "slowfast": SlowFast(), "fast-dllm": Threshold(block_length=8)}
    for name, baseline in BASELINES.items():
        if model.spec.shifted and name in ("fast-dllm prefix", "fast-dllm dual"):
            continue
        sampler = next(sampler for start, sampler in samplers.items() if name.startswith(start))
        done = baseline.decode(model, PROMPT, 16, sampler)
        assert model.spec.mask_id not in done.response and len(done.response) == 16, name


@pytest.mark.parametrize(
    ("name", "sampler", "named"),
    [
        ("vanilla", FixedSteps(metric="entropy"), "metric='entropy'"),
        ("vanilla", FixedSteps(temperature=0.5), "temperature=0.5"),
        ("vanilla", SlowFast(), "SlowFast"),
        ("vanilla", FixedSteps(block_length=7), "block_length=7"),
        ("slowfast", SlowFast(cfg_scale=1.0), "cfg_scale=1.0"),
        ("slowfast", SlowFast(eos_stop=True), "eos_stop=True"),
        ("slowfast", SlowFast(eos="last"), "eos='last'"),
        ("slowfast", SlowFast(end_think_token_ids=[1], end_think_logit_boost=2.0), "end_think_logit_boost=2.0"),
        ("slowfast", SlowFast(share_stable=True), "share_stable=True"),
        ("slowfast", SlowFast(eos_horizon=False), "eos_horizon=False"),
        ("slowfast + dLLM-Cache", SlowFast(top_p=0.9), "top_p=0.9"),
        ("vanilla + dLLM-Cache", Threshold(block_length=16), "Threshold"),
        ("fast-dllm", Threshold(block_length=16, steps=4), "steps=4"),
        ("fast-dllm", FixedSteps(metric="origin"), "metric='origin'"),
        ("fast-dllm prefix", FixedSteps(steps=1), "steps=1"),
        ("fast-dllm dual", SlowFast(), "SlowFast"),
    ],
)
def test_what_is_not_written_out_is_refused(models, name, sampler, named):
    with pytest.raises(ValueError, match=named):
        BASELINES[name].decode(models["llada-mha"], PROMPT, 16, sampler)


def test_a_cache_that_is_not_written_out_is_refused(models):
    with pytest.raises(ValueError, match="cache='prefix'.* not shifted"):
        BASELINES["fast-dllm prefix"].decode(models["dream-gqa"], PROMPT, 16, Threshold(block_length=16))
    with pytest.raises(ValueError, match="cache='both'"):
        fast_dllm.decode(models["llada-mha"], PROMPT, 16, Threshold(block_length=16), cache="both")


def test_a_model_that_predicts_the_mask_ends(models, monkeypatch):
    model = models["llada-mha"]
    monkeypatch.setattr(PlainModel, "head", lambda self, x: torch.eye(512)[[self.spec.mask_id]].expand(x.shape[1], -1))
    for name, sampler in (("slowfast", SlowFast()), ("fast-dllm", Threshold(block_length=16))):
        with pytest.raises(RuntimeError, match="keeps predicting the mask"):
            BASELINES[name].decode(model, PROMPT, 16, sampler)


@pytest.mark.parametrize("about", [*BASELINES.values(), AUTOREGRESSIVE], ids=lambda about: about.name)
def test_what_they_have_and_lack_is_said(about):
    assert about.name and about.what and about.has and about.lacks
    assert not set(about.has) & set(about.lacks)
    assert len(set(about.has)) == len(about.has) and len(set(about.lacks)) == len(about.lacks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autoregressive_decodes_as_transformers_does(dtype):
    pytest.importorskip("transformers")
    model = autoregressive.build(autoregressive.TOY, "cpu", dtype, seed=3)
    assert model.dtype == dtype and model.lm_head.weight.isfinite().all()
    decoder = autoregressive.Decoder(model, 40)
    for prompt in (PROMPT, PROMPT[:3], PROMPT):  # the cache is used anew
        done = decoder.generate(prompt, 12)
        wanted = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
        assert done.tokens == wanted[0, len(prompt) :].tolist()
        assert done.prefill_seconds > 0 and len(done.token_seconds) == 11 and min(done.token_seconds) > 0
        assert not done.captured and done.reason == "on cpu"


def test_autoregressive_weights_follow_from_the_seed():
    pytest.importorskip("transformers")
    state = torch.random.get_rng_state()
    first, same, other = (autoregressive.build(autoregressive.TOY, "cpu", torch.float32, seed) for seed in (1, 1, 2))
    assert torch.equal(first.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert torch.equal(state, torch.random.get_rng_state())


def test_autoregressive_goes_on_without_a_graph():
    pytest.importorskip("transformers")
    if torch.cuda.is_available():
        pytest.skip("there, a graph can be captured")
    decoder = autoregressive.Decoder(autoregressive.build(autoregressive.TOY, "cpu", torch.float32), 32)
    wanted = decoder.generate(PROMPT, 8).tokens
    decoder._try_capture()
    done = decoder.generate(PROMPT, 8)
    assert done.tokens == wanted and not done.captured and "Error" in done.reason


@pytest.mark.gpu
def test_autoregressive_replays_a_graph():
    pytest.importorskip("transformers")
    model = autoregressive.build(autoregressive.TOY, "cuda", torch.bfloat16)
    graphed, eager = (autoregressive.Decoder(model, 64, capture) for capture in (True, False))
    done = graphed.generate(PROMPT, 20)
    assert done.captured, done.reason
    assert done.tokens == eager.generate(PROMPT, 20).tokens


@pytest.mark.parametrize(("prompt", "n", "named"), [(PROMPT, 0, "n=0"), ([], 4, "prompt of 0"), (PROMPT, 24, "n=24")])
def test_autoregressive_names_what_does_not_fit(prompt, n, named):
    pytest.importorskip("transformers")
    decoder = autoregressive.Decoder(autoregressive.build(autoregressive.TOY, "cpu", torch.float32), 32)
    with pytest.raises(ValueError, match=named):
        decoder.generate(prompt, n)


def test_autoregressive_says_that_transformers_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install"):
        autoregressive.build(autoregressive.TOY, "cpu", torch.float32)
