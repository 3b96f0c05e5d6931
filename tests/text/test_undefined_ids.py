"""Ids that a tokenizer does not define: left out of the text, and never the loss of a result."""

from __future__ import annotations

import logging

import pytest

import sfs_triton
from sfs_triton import CheckpointError, FixedSteps
from sfs_triton.text.settled import SettledText

pytest.importorskip("transformers")

from sfs_triton.integrations.transformers.engines import TokenizerCodec  # noqa: E402


class Slow:
    """A tokenizer of transformers without a fast form: ``decode`` joins tokens, and fails on an id without one."""

    chat_template, special_tokens_map, added_tokens_decoder = None, {}, {}

    def __init__(self, size: int):
        self._tokens = {index: f"{index} " for index in range(size)}

    def encode(self, text: str, **_) -> list[int]:
        return [len(text)]

    def decode(self, ids: list[int], **_) -> str:
        return "".join(self._tokens.get(token) for token in ids)

    def get_vocab(self) -> dict[str, int]:
        return {token: index for index, token in self._tokens.items()}

    def apply_chat_template(self, *_, **__):
        raise ValueError


class Broken(Slow):
    """Fails on every text of several tokens."""

    def decode(self, ids: list[int], **_) -> str:
        return "".join(None if len(ids) > 1 else "x" for _ in ids)


def test_they_are_left_out_of_the_text():
    codec = TokenizerCodec(Slow(300))
    assert codec.decode([5, 400, 6, 301]) == "5 6 " and codec.decode([400]) == ""
    assert (codec.piece(7), codec.piece(400)) == ("7 ", "")
    text = SettledText(codec, stops=("6",))
    assert text.take([5, 400], final=False) + text.take([5, 400, 6], final=False) == "5 "


def test_a_fast_tokenizer_leaves_them_out_itself(embedded):
    ids = embedded.text.encode("15,44")
    assert embedded.text.decode([*ids[:2], embedded.spec.vocab_size - 1, *ids[2:]]) == embedded.text.decode(ids)


def test_a_failure_on_defined_ids_is_an_error():
    codec = TokenizerCodec(Broken(512))
    with pytest.raises(CheckpointError, match=r"fails on ids=\[1, 2\]"):
        codec.decode([1, 2])


@pytest.mark.parametrize("tokenizer", [Slow(300), Broken(512)], ids=["slow", "broken"])
def test_results_are_whole(engines, caplog, tokenizer):
    """A result of which no text can be made has None for it, and the tokens of all sequences are there."""
    shared, broken = engines["llada-mha"], isinstance(tokenizer, Broken)
    engine = sfs_triton.Engine(shared.model, TokenizerCodec(tokenizer))
    how = {"gen_length": [8, 16], "sampler": FixedSteps(temperature=1.5, steps=4), "seed": 3}
    with caplog.at_level(logging.WARNING, "sfs_triton"):
        found = engine.generate([[3, 14], [15, 92]], **how)
    wanted = shared.generate([[3, 14], [15, 92]], **how)
    assert [done.tokens for done in found] == [done.tokens for done in wanted]
    assert any(token >= 300 for done in found for token in done.tokens)
    for done in found:
        whole = "".join(f"{token} " for token in done.tokens if token < 300)
        assert done.text == (whole if not broken else None if len(done.tokens) > 1 else "x")
    assert broken == ("a result has no text: the checkpoint's tokenizer fails on ids=[" in caplog.text)
