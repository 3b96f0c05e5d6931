"""Several tokens that end a response: where they come from, and that all front ends end at any of them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import sfs_triton
from sfs_triton import CheckpointError, Engine, FixedSteps, SlowFast, Threshold
from sfs_triton.checkpoint import EMBEDDED
from sfs_triton.models import Transformer, read_spec

PROMPT = [3, 14, 15, 92, 65, 35, 89, 79]
SAMPLERS = [SlowFast(), Threshold(block_length=16), FixedSteps(block_length=16)]


@pytest.fixture
def folder(tmp_path):
    """The embedded model's files, to be changed."""
    return shutil.copytree(EMBEDDED, tmp_path / "checkpoint")


def _write(path, **changes):
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.is_file() else {}), **changes}))


def _engine(shared: Engine, *ends: int) -> Engine:
    return Engine(Transformer(replace(shared.spec, other_ends=ends), shared.model.weights))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: type(sampler).__name__)
def test_the_sequence_ends_at_any_of_them(engines, sampler):
    shared = engines["llada-mha"]
    plain = shared.generate(PROMPT, gen_length=32, sampler=sampler)
    first = min(range(32), key=lambda n: plain.commit_step[len(PROMPT) + n])  # committed before all others
    other = plain.response[first]
    engine = _engine(shared, 7, other)
    done = engine.generate(PROMPT, gen_length=32, sampler=sampler.replace(eos_stop=True))
    end = done.response.index(other)
    assert end <= first and done.tokens == done.response[: end + 1]
    assert set(done.response[end + 1 :]) <= {496}, "what follows is filled with eos_id"
    assert engine.generate(PROMPT, gen_length=32, sampler=sampler).canvas == plain.canvas, "no effect without the stop"


def test_without_a_stop_the_text_ends_all_the_same(engines):
    shared = engines["llada-mha"]
    plain = shared.generate(PROMPT, gen_length=32, sampler=FixedSteps())
    other = plain.response[20]
    done = _engine(shared, other).generate(PROMPT, gen_length=32, sampler=FixedSteps())
    assert done.canvas == plain.canvas and done.tokens == plain.response[: plain.response.index(other) + 1]


def test_where_ends_come_from(folder):
    """The configuration's first fills the canvas; more come from generation_config.json and from the chat template."""
    load = lambda: sfs_triton.load(folder, "cpu").spec.end_ids  # noqa: E731
    assert load() == (1, 4)  # <|eot_id|> ends turns in its template
    _write(folder / "generation_config.json", eos_token_id=[7, 1])
    assert load() == (1, 7, 4)
    _write(folder / "config.json", eos_token_id=[8, 1])
    assert load() == (8, 1, 7, 4)
    _write(folder / "config.json", eos_token_id=None)
    assert load() == (7, 1, 4)
    _write(folder / "generation_config.json", eos_token_id=None)
    assert load() == (1, 4)  # the tokenizer's eos_token
    _write(folder / "tokenizer_config.json", chat_template=None)
    assert load() == (1,)
    _write(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(CheckpointError, match="'eos_token_id'"):
        load()


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ("1", r"generation_config\.json: eos_token_id='1' is not an integer"),
        ([1, None], r"generation_config\.json: eos_token_id=None is not an integer"),
        ([[1]], r"generation_config\.json: eos_token_id=\[1\] is not an integer"),
        (True, r"generation_config\.json: eos_token_id=True"),
        (10**40, r"generation_config\.json: eos_token_id=1"),
        (896, r"generation_config\.json: eos_token_id=896 is outside the vocabulary of 896"),
        ([5], r"generation_config\.json: eos_token_id=5 is the mask token"),
        (list(range(10, 100)), r"generation_config\.json: eos_token_id lists 90 ids, over 16"),
    ],
    ids=str,
)
def test_nonsense_in_generation_config(folder, value, match):
    _write(folder / "generation_config.json", eos_token_id=value)
    with pytest.raises(CheckpointError, match=match):
        sfs_triton.load(folder, "cpu")


@pytest.mark.parametrize("text", ["[1]", "{", "\xff"])
def test_generation_config_that_is_no_object(folder, text):
    (folder / "generation_config.json").write_bytes(text.encode("latin1"))
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        sfs_triton.load(folder, "cpu")


def test_lists_in_the_configuration_are_checked():
    config = json.loads((EMBEDDED / "config.json").read_text())
    assert read_spec({**config, "eos_token_id": [4, 1]}).eos_id == 4
    for value, match in (([5, 1], "both 5"), ([], "'eos_token_id'"), ([1, 896], "outside the vocabulary")):
        with pytest.raises(CheckpointError, match=match):
            read_spec({**config, "eos_token_id": value})


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """The embedded model with random weights, which runs on after the end of a turn."""
    folder = shutil.copytree(EMBEDDED, tmp_path_factory.mktemp("random") / "checkpoint")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(t.shape, generator=generator) * 0.02 if t.dim() > 1 else torch.ones_like(t, dtype=torch.float)
        for name, t in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors")
    return sfs_triton.load(folder, "cpu", "float32")


def test_chat_and_server_end_at_the_end_of_the_turn(talker):
    testclient = pytest.importorskip("fastapi.testclient")
    from sfs_triton.chat import Conversation
    from sfs_triton.decoding.params import DecodingParams
    from sfs_triton.serve.app import create_app
    from sfs_triton.serve.settings import ServeSettings

    sampler = FixedSteps(steps=1, temperature=1.0)

    def answer(seed: int) -> sfs_triton.Generation:
        return talker.generate("hi", gen_length=384, sampler=sampler, seed=seed)

    seed = next(s for s in range(40) if 4 in answer(s).response[:-8] and answer(s).tokens[-1] == 4)
    done = answer(seed)
    end = done.response.index(4)
    assert done.tokens == done.response[: end + 1]
    text = talker.text.decode(done.response[:end])
    assert done.text == text
    params = DecodingParams(sampler=sampler, gen_length=384, seed=seed)
    assert "".join(piece for piece, _ in Conversation(talker, params).answer("hi")) == text
    body = {
        "messages": [{"role": "user", "content": "hi"}], "max_tokens": 384, "temperature": 1, "seed": seed,
        "sampler": {"kind": "fixed", "steps": 1},
    }  # fmt: skip
    with testclient.TestClient(create_app(talker, ServeSettings(model="m")), base_url="http://127.0.0.1") as client:
        choice = client.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")
