"""Tokenizers from vocab.json and merges.txt: ids, every front end, and files that are not what they seem."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sfs_triton
from sfs_triton import CheckpointError, FixedSteps
from sfs_triton.text import byte_level
from sfs_triton.text.codec import TextCodec
from tests.support.dream import SPECIAL, vocabulary, write_checkpoint, write_tokenizer
from tests.support.paths import REAL, ROOT

TEXTS = ["hello world", "  12 hello\n\nworld ", "<|im_start|>user\nhé<|im_end|>\n", "e\u0301 \u0663 🙂", "I'll DON'T"]
DREAM = REAL / "dream-v0-instruct-7b"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("dream") / "checkpoint")


@pytest.fixture(scope="module")
def engine(checkpoint):
    return sfs_triton.load(checkpoint, "cpu", "float32")


@pytest.mark.skipif(not DREAM.is_dir(), reason="needs the published files of Dream-7B")
def test_the_published_files_give_the_recorded_ids():
    codec = TextCodec.from_folder(DREAM)
    recorded = json.loads((DREAM / "encoded.json").read_text())
    assert len(recorded) >= 15
    for case in recorded:
        assert codec.encode(case["text"]) == case["ids"]
        assert codec.tokenizer.decode(case["ids"], skip_special_tokens=False) == case["decoded"]
    assert (codec.mask_id(), codec.special["eos_token"]) == (151666, "<|endoftext|>")


def test_ids_are_those_of_the_original_tokenizer(tmp_path, engine):
    transformers = pytest.importorskip("transformers")
    original = transformers.Qwen2TokenizerFast.from_pretrained(write_tokenizer(tmp_path))

    @given(st.lists(st.sampled_from([*TEXTS, *SPECIAL.values()]) | st.text(max_size=12), max_size=4).map("".join))
    def check(text: str) -> None:
        ids = original.encode(text, add_special_tokens=False)
        assert engine.text.encode(text) == ids
        assert engine.text.decode(ids) == original.decode(ids, skip_special_tokens=True)

    check()


def test_ids_written_out(engine):
    ids = vocabulary()
    assert engine.text.encode("hello world") == [ids["hello"], ids["Ġworld"]]
    assert engine.text.encode("é e\u0301") == [ids["Ã©"], ids["Ġ"], ids["Ã©"]]  # NFC
    assert engine.text.encode("1212") == [ids["1"], ids["2"]] * 2  # digits are words of their own
    assert engine.text.encode("<|mask|><|im_end|>") == [500, 498]
    assert engine.text.decode([ids["hello"], 505, 498]) == "hello"  # 505 is no token


def test_all_front_ends_take_text(checkpoint, engine):
    """One answer, through Python, the command line, the chat and the server."""
    pytest.importorskip("typer")
    testclient = pytest.importorskip("fastapi.testclient")
    from sfs_triton.chat import Conversation
    from sfs_triton.decoding.params import DecodingParams
    from sfs_triton.serve.app import create_app
    from sfs_triton.serve.settings import ServeSettings

    params = DecodingParams(sampler=FixedSteps(), gen_length=8)
    wanted = engine.generate("hello", params).text
    line = [sys.executable, "-m", "sfs_triton.cli", "generate", "hello", "--model", str(checkpoint), "--device", "cpu"]
    told = subprocess.run(
        [*line, "--dtype", "float32", "--sampler", "fixed", "--gen-length", "8"],
        cwd=ROOT, capture_output=True, encoding="utf-8", timeout=120,
    )  # fmt: skip
    assert told.stdout == wanted + "\n", told.stderr
    assert "".join(piece for piece, _ in Conversation(engine, params).answer("hello")) == wanted
    with testclient.TestClient(create_app(engine, ServeSettings(model="m")), base_url="http://127.0.0.1") as client:
        asked = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "sampler": {"kind": "fixed"}}
        assert client.post("/v1/chat/completions", json=asked).json()["choices"][0]["message"]["content"] == wanted


def test_an_evaluation_takes_text(checkpoint, engine):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from sfs_triton.integrations.lm_eval.model import DiffusionLM

    model = DiffusionLM(str(checkpoint), "fixed", device="cpu", dtype="float32", max_gen_toks=8, max_length=64)
    request = Instance("generate_until", {}, ("hello", {"until": []}), 0)
    wanted = engine.generate("hello", sampler=FixedSteps(), gen_length=8, apply_chat_template=False).text
    assert model.generate_until([request], disable_tqdm=True) == [wanted]
    assert model.engine.spec.max_length == 64


def test_other_tokens_files(tmp_path):
    """``added_tokens.json`` serves where ``tokenizer_config.json`` lists none."""
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "added_tokens.json").write_text(json.dumps({token: index for index, token in SPECIAL.items()}))
    codec = TextCodec.from_folder(tmp_path)
    assert codec.encode("x<|im_end|>")[-1] == 498 and codec.mask_id() == 500


# ---------------------------------------------------------------------------------------------------- hostile files


def _refused(folder, match):
    with pytest.raises(CheckpointError, match=match):
        TextCodec.from_folder(folder)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hello": 3}, r"vocab\.json: .* have the same id 3"),
        ({"new": -1}, r"vocab\.json: id of 'new'=-1"),
        ({"new": 2**40}, r"vocab\.json: id of 'new'"),
        ({"new": True}, r"vocab\.json: id of 'new'=True"),
        ({"new": 498}, r"the added token '<\|im_end\|>' has id 498"),
        ({"<|im_end|>": 505}, r"the added token '<\|im_end\|>' has id 498"),
    ],
)
def test_vocabularies_that_contradict_themselves(tmp_path, change, match):
    write_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({**vocabulary(), **change}))
    _refused(tmp_path, match)


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("vocab.json", "[1]", r"vocab\.json holds a list"),
        ("vocab.json", "{", r"vocab\.json is not readable JSON"),
        ("vocab.json", "{}", r"merges\.txt"),
        ("merges.txt", "a b c\n", r"merges\.txt: line 1"),
        ("merges.txt", "ab\n", r"merges\.txt: line 1"),
        ("merges.txt", "he hello\n", r"merges\.txt does not go with"),
        ("merges.txt", "a b\n" * 1_000_000, r"merges\.txt: 1,000,000 merges for a vocabulary of 501 tokens"),
        ("tokenizer_config.json", '{"tokenizer_class": "GPT2Tokenizer"}', "tokenizer_class='GPT2Tokenizer'"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "added_tokens_decoder is a list"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"-1": {"content": "x"}}}', "added token '-1'"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"7": {"content": 3}}}', "added token '7'"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"9": {"content": "x", "special": 1}}}', "special of 'x'"),
    ],
    ids=lambda value: str(value)[:32],
)
def test_files_that_are_not_what_they_seem(tmp_path, name, text, match):
    write_tokenizer(tmp_path)
    (tmp_path / name).write_text(text)
    _refused(tmp_path, match)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.json"])
def test_files_too_large_to_be_read(tmp_path, name, monkeypatch):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}") if name == "tokenizer.json" else None
    size = (tmp_path / name).stat().st_size
    monkeypatch.setattr(byte_level, "MOST_BYTES", size - 1)
    _refused(tmp_path, "bytes, over")
