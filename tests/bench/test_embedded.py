"""The embedded model's tasks, tokenizer, training and checkpoint."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch

import sfs_triton
from bench.embedded import export, problems, tasks, train, vocabulary
from bench.embedded.model import CONSTANT_CHANNEL, CONSTANT_VALUE, LLaDA
from sfs_triton.checkpoint import EMBEDDED
from tests.support.margins import assert_logits_close

KINDS = ("records", "words", "countdown", "drill")


@pytest.fixture(scope="module")
def tokenizer():
    return vocabulary.build_tokenizer()


# ------------------------------------------------------------------------------------------------------------ tasks


@pytest.mark.parametrize("kind", KINDS)
def test_reference_answers_are_correct_and_spoilt_ones_are_not(kind):
    rng = random.Random(3)
    for _ in range(100):
        problem = tasks.GENERATORS[kind](rng)
        assert tasks.correct(problem, problem.answer)
        assert tasks.correct(problem, problem.answer + "\n")
        assert not tasks.correct(problem, problem.answer + "1")
        assert not tasks.correct(problem, "")


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("44-15=29,79-29=50", True),
        ("79-44=35,35+15=50", True),
        ("44-15=28,79-28=51", False),
        ("44-15=29", False),
        ("50-0=50", False),
        ("44-15=29,79-29=50,50-0=50", False),
        ("79-29=50", False),
        ("44-15=29,80-30=50", False),
        ("15*44=660,660/79=50", False),
        ("", False),
        ("44-15=29;79-29=50", False),
    ],
)
def test_countdown_answers_are_checked_by_the_rules(answer, right):
    problem = tasks.Problem("countdown", "15,44,79,50", "44-15=29,79-29=50", "15,44,79,50")
    assert tasks.correct(problem, answer) is right


def test_third_party_answers_pass_and_are_all_held_out():
    assert len(tasks.third_party_countdown()) == 500
    for problem in tasks.third_party_countdown():
        assert tasks.correct(problem, problem.answer) and problem.held_out


def test_training_never_draws_a_test_problem():
    """Nothing that training samples is held out, and nothing that evaluation samples is not."""
    rng = random.Random(0)
    for kind in ("records", "words", "countdown"):
        trained = {tasks.sample(kind, rng, held_out=False).key for _ in range(1500)}
        tested = {tasks.sample(kind, rng, held_out=True).key for _ in range(60)}
        assert not trained & tested
    easy = {tasks.sample("countdown", rng, held_out=False, largest=9).key for _ in range(3000)}
    assert not easy & tasks.third_party_keys()


def test_training_batches_hold_no_test_problem(tokenizer):
    batches = train.Batches(tokenizer, replace(train.RECIPES["cpu"], steps=100), seed=0)
    tested = {p.question for p in problems.held_out("records", 40, _codec(tokenizer), gen_length=128)}
    tested |= {p.question for p in tasks.third_party_countdown()}
    for step in (0, 20, 50, 90):
        ids, prompt = batches[step]
        assert (ids[:, -1] == tokenizer.token_to_id(vocabulary.EOS)).all()
        for row, length in zip(ids.tolist(), prompt.tolist(), strict=True):
            text = tokenizer.decode(row[:length], skip_special_tokens=False)
            turns = [turn.partition("<|end_header_id|>\n\n")[2] for turn in text.split("<|eot_id|>")]
            asked = {q for turn in turns for q in turn.split(train.SEPARATOR)}
            assert not asked & tested


def _codec(tokenizer):
    return sfs_triton.engine.TextCodec(tokenizer, vocabulary.CHAT_TEMPLATE, {})


def test_batches_repeat(tokenizer):
    first, again = (train.Batches(tokenizer, train.RECIPES["gpu"], seed=1)[19999] for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_held_out_problems_fit_and_differ(embedded):
    for kind in problems.DIFFICULTY:
        chosen = problems.held_out(kind, 30, embedded.text, gen_length=128)
        assert len({p.key for p in chosen}) == 30 and all(p.held_out for p in chosen)
        sizes = [len(embedded.text.encode(p.answer)) for p in chosen]
        assert problems.SHORTEST_ANSWER[kind] <= min(sizes) and max(sizes) < 128
    with pytest.raises(ValueError, match="gen_length=8"):
        problems.held_out("records", 1, embedded.text, gen_length=8)


# -------------------------------------------------------------------------------------------------------- tokenizer


@pytest.mark.parametrize(
    "text",
    [
        "Ann has 12 apples.",
        '{"id":7,"name":"Zoe"}',
        "0,007 250 6720",
        " two  spaces\t\n",
        "wörld \N{GRINNING FACE}",
        "",
    ],
)
def test_tokenizer_is_lossless(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_numbers_up_to_199_are_one_token(tokenizer):
    assert all(len(tokenizer.encode(str(n)).ids) == 1 for n in range(200))


def test_template_and_function_agree(embedded):
    question = "  15,44,79,50 "
    assert embedded.text.render([{"role": "user", "content": question}]) == vocabulary.chat(question)


# --------------------------------------------------------------------------------------------------------- training


@pytest.fixture
def tiny(monkeypatch, tokenizer) -> train.Recipe:
    """A run of a few seconds: one layer, short batches, the real loop."""
    monkeypatch.setattr(train, "build_tokenizer", lambda: tokenizer)
    monkeypatch.setattr(train.Run, "evaluate", lambda self: {})
    phase = train.Phase(1.0, ((96, 1.0),), 384, {"records": 0.5, "drill": 0.5}, rows=(1, 2), columns=(1, 1))
    return train.Recipe((phase,), steps=6, rate=1e-3, layers=1, max_length=128)


def test_an_interrupted_run_resumes_to_the_same_weights(tiny, tmp_path):
    whole = train.Run(_folder(tmp_path / "whole"), tiny)
    whole.train()
    first = train.Run(_folder(tmp_path / "parts"), tiny)
    original = first.train_step

    def interrupted(ids, prompt):
        if first.step == 5:
            raise KeyboardInterrupt
        return original(ids, prompt)

    first.train_step = interrupted
    with pytest.raises(KeyboardInterrupt):
        first.train(save_every=2)
    second = train.Run(tmp_path / "parts", tiny)
    second.resume()
    assert second.step == 4
    second.train()
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[name], value, atol=0, rtol=0)


def _folder(path):
    path.mkdir()
    return path


def test_training_learns_and_keeps_the_constant_channel(tiny, tmp_path):
    run = train.Run(tmp_path, replace(tiny, steps=60, rate=1e-2, warm_up=5))
    batches = train.Batches(run.tokenizer, run.recipe, 0)
    losses = [run.train_step(*batches[step % 3]).item() for step in range(60)]
    assert sum(losses[-6:]) < 0.7 * sum(losses[:6])
    _assert_constant_channel(run.model.state_dict())


def _assert_constant_channel(tensors):
    assert (tensors["model.transformer.wte.weight"][:, CONSTANT_CHANNEL] == CONSTANT_VALUE).all()
    for name, tensor in tensors.items():
        if ".blocks." in name and name.endswith(("attn_out.weight", "ff_out.weight")):
            assert (tensor[CONSTANT_CHANNEL] == 0).all()
    assert tensors["model.transformer.ln_f.weight"][CONSTANT_CHANNEL] > 0


def test_masking_spares_the_prompt():
    ids, prompt = torch.arange(8 * 40).view(8, 40), torch.full((8,), 15)
    noised, masked = train.mask_response(ids, prompt, -1, torch.Generator().manual_seed(0))
    assert not masked[:, :15].any() and masked.any()
    assert torch.equal(noised == -1, masked) and torch.equal(noised[~masked], ids[~masked])


def test_exported_checkpoint_has_the_trained_models_logits(tiny, tmp_path):
    run = train.Run(tmp_path, tiny)
    torch.nn.init.normal_(run.model.model["transformer"]["ff_out"].weight)
    export.export(run, tmp_path / "out")
    engine = sfs_triton.load(tmp_path / "out", "cpu", "float32")
    rounded = LLaDA(run.config)
    rounded.load_state_dict({n: t.to(torch.bfloat16).float() for n, t in run.model.state_dict().items()})
    ids = torch.randint(0, 800, (2, 70), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_logits_close(engine.model.logits(ids), rounded(ids))


# ------------------------------------------------------------------------------------------------- the shipped model


def test_shipped_checkpoint_has_the_promised_shape(embedded):
    spec = embedded.spec
    assert (spec.family, spec.d_model, spec.head_dim) == ("llada", 256, 32)
    assert (spec.rope_theta, spec.norm_eps, spec.qkv_bias, spec.tied_head) == (500000.0, 1e-5, False, False)
    assert sum(p.stat().st_size for p in EMBEDDED.iterdir()) < 16 * 2**20
    from safetensors.torch import load_file

    _assert_constant_channel(load_file(EMBEDDED / "model.safetensors"))


def test_shipped_tokenizer_is_the_builders(tokenizer):
    assert json.loads((EMBEDDED / "tokenizer.json").read_text()) == json.loads(tokenizer.to_str())


def test_shipped_model_answers(embedded):
    """Most held-out records come out exactly right, in far fewer steps than tokens."""
    chosen = problems.held_out("records", 8, embedded.text, seed=1)
    done = embedded.generate([p.question for p in chosen], gen_length=128)
    right = sum(tasks.correct(p, d.text) for p, d in zip(chosen, done, strict=True))
    assert right >= 6
    assert sum(d.nfe for d in done) < sum(len(d.tokens) for d in done) / 3
