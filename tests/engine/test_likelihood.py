"""Likelihoods of answers: the recordings of two evaluations, batches, bounded memory, refusals."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F

import sfs_triton
from sfs_triton import ArgumentError, LikelihoodParams, NumericalFault, OutOfDeviceMemory
from sfs_triton.models import Transformer
from sfs_triton.ops.torch import blocks
from sfs_triton.runner.likelihood import draw_masks
from tests import conformance
from tests.support.paths import GOLDEN

PAIRS = [([3, 7, 200, 41, 9], [12, 30, 44]), ([8, 9], [5]), ([100, 4, 77], [6, 20, 31, 300, 2])]
BY_METHOD = {"monte-carlo": {"mc_num": 6, "mc_batch": 3}, "confidence": {}}
METHODS = pytest.mark.parametrize("method", BY_METHOD)


def recorded(model: str) -> list[dict]:
    return [json.loads(line) for line in (GOLDEN / "likelihoods" / f"{model}.jsonl").read_text().splitlines()]


def values(engine: sfs_triton.Engine, pairs=PAIRS, **options) -> list[float]:
    return [each.value for each in engine.likelihood(pairs, **options)]


@pytest.mark.parametrize("model", ["llada-mha", "llada-gqa"])
def test_recorded_likelihoods(engines, model):
    cases = recorded(model)
    assert {case["method"] for case in cases} == set(conformance.LIKELIHOODS) and len(cases) == 16
    assert [wrong for case in cases if (wrong := conformance.check_likelihood(engines[model], case))] == []


def test_a_changed_recording_fails(engines):
    sampled, revealed = (next(c for c in recorded("llada-gqa") if c["method"] == m) for m in conformance.LIKELIHOODS)
    flipped = sampled["batches"][0]["masks"][0].translate(str.maketrans("01", "10"))
    sampled["batches"][0]["masks"][0] = flipped
    assert "sets of masks differ" in conformance.check_likelihood(engines["llada-gqa"], sampled)
    other = revealed | {"value": revealed["value"] * 1.001}
    assert "likelihood" in conformance.check_likelihood(engines["llada-gqa"], other)
    other = revealed | {"greedy": not revealed["greedy"]}
    assert "greedy is" in conformance.check_likelihood(engines["llada-gqa"], other)


@METHODS
@pytest.mark.parametrize("model", ["llada-gqa", "dream-gqa"])
def test_batches_of_different_lengths_change_nothing(engines, method, model):
    options = {"method": method, "cfg_scale": 0.5, "check_greedy": True, "seed": [4, 5, 6], **BY_METHOD[method]}
    together = engines[model].likelihood(PAIRS, batch_size=7, **options)
    alone = [
        engines[model].likelihood([pair], batch_size=1, **options | {"seed": seed})[0]
        for pair, seed in zip(PAIRS, (4, 5, 6), strict=True)
    ]
    torch.testing.assert_close([each.value for each in together], [each.value for each in alone], rtol=1e-5, atol=1e-5)
    for mine, other, (_, answer) in zip(together, alone, PAIRS, strict=True):
        assert (mine.greedy, mine.forwards) == (other.greedy, other.forwards)
        params = LikelihoodParams(method=method, cfg_scale=0.5, **BY_METHOD[method])
        assert params.forwards(len(answer)) < mine.forwards <= params.forwards(len(answer)) + 2 * len(answer)


def test_a_model_with_shifted_logits_looks_one_position_back(engines):
    engine, (prompt, answer) = engines["dream-gqa"], PAIRS[0]
    canvas = torch.tensor([*prompt, *answer])
    (places,) = draw_masks(len(answer), 1, 1, 9)
    at = torch.tensor(places) + len(prompt)
    logits = engine.model.logits(canvas.index_fill(0, at, engine.spec.mask_id)[None])[0]
    wanted = -F.cross_entropy(logits[at - 1], canvas[at], reduction="sum").item() * len(answer) / len(places)
    assert values(engine, [(prompt, answer)], mc_num=1, mc_batch=1, seed=9) == [pytest.approx(wanted, rel=1e-5)]


def test_greedy_decoding_is_the_samplers(engines):
    engine, prompt = engines["llada-mha"], PAIRS[0][0]
    answer = engine.generate(prompt, sampler="vanilla", gen_length=6).response
    pairs = [(prompt, answer), (prompt, [answer[0] ^ 1, *answer[1:]])]
    found = engine.likelihood(pairs, method="confidence", check_greedy=True)
    assert [each.greedy for each in found] == [True, False]
    assert found[0].forwards == 12 and found[0].value > found[1].value
    assert [each.greedy for each in engine.likelihood(pairs, method="confidence")] == [None, None]


@METHODS
def test_through_the_kernels(engines, method):
    options = {"method": method, "check_greedy": method == "confidence", **dict.fromkeys(BY_METHOD[method], 1)}
    engine, pairs = sfs_triton.Engine(engines["llada-gqa"].model.by("triton")), [([8, 9], [5]), ([4, 7], [6, 20])]
    mine, wanted = (e.likelihood(pairs, batch_size=2, **options) for e in (engine, engines["llada-gqa"]))
    torch.testing.assert_close([each.value for each in mine], [each.value for each in wanted], rtol=1e-4, atol=1e-4)
    assert [each.greedy for each in mine] == [each.greedy for each in wanted]


@METHODS
def test_few_logits_at_a_time(engines, monkeypatch, method):
    engine, made, head = engines["llada-mha"], [], Transformer.head
    wanted = values(engine, method=method, **BY_METHOD[method])
    monkeypatch.setattr(blocks, "LOGITS", 2 * engine.spec.vocab_size)
    monkeypatch.setattr(Transformer, "head", lambda self, rows: made.append(rows.shape[0]) or head(self, rows))
    torch.testing.assert_close(values(engine, method=method, **BY_METHOD[method]), wanted, rtol=1e-5, atol=1e-5)
    assert max(made) == 2


def test_an_answer_without_a_prompt(engines):
    (value,) = values(engines["llada-mha"], [([], [5, 6])], method="confidence")
    assert math.isfinite(value)
    with pytest.raises(ArgumentError, match="pair 0 has an empty prompt"):
        values(engines["dream-gqa"], [([], [5, 6])])


def test_arguments_that_do_not_exist(engines):
    with pytest.raises(TypeError, match="'mc_nun': did you mean 'mc_num'"):
        engines["llada-mha"].likelihood(PAIRS, mc_nun=32)
    with pytest.raises(ArgumentError, match="length=-1 is not an integer of at least 1"):
        LikelihoodParams().forwards(-1)


def test_text_goes_in_as_one(embedded):
    before, answer = embedded.text.encode_pair("15, 44 ", "7*8")
    assert before == embedded.text.encode("15, 44") and before + answer == embedded.text.encode("15, 44 7*8")
    options = {"method": "confidence"}
    assert values(embedded, [("15, 44 ", "7*8")], **options) == values(embedded, [(before, answer)], **options)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"pairs": [([3], [4] * 512)]}, r"pair 0 has 1 \+ 512 = 513 positions, the model allows"),
        ({"pairs": [([3] * 510, [4, 4])], "method": "confidence", "pad_eos": True}, r"510 \+ 3 = 513 positions"),
        ({"pairs": [([3], [])]}, "pair 0 has an empty answer"),
        ({"pairs": [([3], [4]), ([3], [500])]}, r"pair 1 holds the mask token \(id 500, at position 1"),
        ({"pairs": [([3], [512])]}, "pair 0: 512 at position 1 is no token id below 512"),
        ({"pairs": [("a", [3])]}, "both parts must be text, or both token ids"),
        ({"pairs": [[3, 4, 5]]}, r"pair 0 is \[3, 4, 5\], not a prompt and an answer"),
        ({"pairs": [(1, 2)]}, r"pair 0 is \(1, 2\): its parts are neither text nor sequences of token ids"),
        ({"pairs": [([3], {4: 5})]}, "its parts are neither text nor"),
        ({"pairs": [([3], b"45")]}, "its parts are neither text nor"),
        ({"pairs": [(torch.tensor(3), [4])]}, "its parts are neither text nor"),
        ({"pairs": "ab"}, "pairs='ab' is no list of pairs"),
        ({"seed": [1]}, r"seed=\[1\] has 1 entries for 3 pairs"),
        ({"seed": -1}, "seed=-1 is not an integer from 0"),
        ({"seed": "a"}, "seed='a' is not an integer from 0"),
        ({"batch_size": 0}, "batch_size=0 is not an integer"),
        ({"method": "exact"}, "method='exact' is not one of"),
        ({"mc_num": 100}, "mc_num=100 is not a multiple of mc_batch=32"),
        ({"pad_eos": True}, "pad_eos=True goes with method='confidence'"),
        ({"cfg_scale": -1}, "cfg_scale=-1 is not a number"),
        ({"params": "confidence"}, "params='confidence' is no LikelihoodParams"),
        ({"params": LikelihoodParams(), "mc_num": 32}, "params goes without 'mc_num'"),
    ],
)
def test_refusals(engines, given, match):
    engine = engines["llada-mha"]
    assert engine.spec.max_length == 512
    with pytest.raises(ArgumentError, match=match):
        engine.likelihood(**{"pairs": PAIRS, **given})


def test_nan_names_the_answer(engines, monkeypatch):
    engine = engines["llada-mha"]
    healthy = Transformer.cross_entropy
    monkeypatch.setattr(
        Transformer,
        "cross_entropy",
        lambda self, hidden, tokens: healthy(self, hidden, tokens).masked_fill(tokens == 5, float("nan")),
    )
    with pytest.raises(NumericalFault, match=r"NaN logits: answers \[1\]") as caught:
        values(engine, method="confidence")
    monkeypatch.undo()
    assert {i: each.value for i, each in caught.value.finished.items()} == pytest.approx(
        {i: value for i, value in enumerate(values(engine, method="confidence")) if i != 1}, rel=1e-4
    )


def test_lack_of_memory_names_the_batch_size(engines, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(Transformer, "forward", fail)
    with pytest.raises(OutOfDeviceMemory, match="batch_size=16 canvases of up to 8 positions do not fit .*smaller"):
        values(engines["llada-mha"], batch_size=16)
