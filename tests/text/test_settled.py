"""Text that later steps cannot change: incomplete characters and starts of stop strings are held back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from sfs_triton.text.codec import TextCodec
from sfs_triton.text.settled import SettledText
from tests.support.dream import write_tokenizer

SUMS = "15,44,79,50"


def test_settled_text_holds_back_what_may_change(embedded):
    codec = embedded.text
    ids = codec.encode("Bob \u00e4\u00f6 \U0001f642 end")
    text, given = SettledText(codec), ""
    for count in range(len(ids) + 1):
        given += text.take(ids[:count], final=count == len(ids))
        assert codec.decode(ids).startswith(given)
    assert given == codec.decode(ids)


@pytest.mark.parametrize(
    ("stops", "wanted"),
    [
        (("79",), "15,44,"),
        (("44,7",), "15,"),
        (("9,50!", "44,79,50?"), "15,44,79,50"),
        (("79,50", "44"), "15,"),
        (("1",), ""),
    ],
)
@pytest.mark.parametrize("stride", [1, 3, 100])
def test_stop_strings_are_found_wherever_tokens_end(embedded, stops, wanted, stride):
    ids = embedded.text.encode(SUMS)
    text, given = SettledText(embedded.text, stops), ""
    counts = [*range(0, len(ids), stride), len(ids)]
    for count in counts:
        given += text.take(ids[:count], final=count == len(ids))
        assert wanted.startswith(given), "what a stop string cuts was given"
        if text.stopped_at is not None:
            break
    assert given == wanted
    if text.stopped_at is not None:
        upto, before = (embedded.text.decode(ids[:n]) for n in (text.stopped_at, text.stopped_at - 1))
        assert any(stop in upto for stop in stops) and not any(stop in before for stop in stops)


# ------------------------------------------------------------------------------------------------ random tokens

MERGED = ["▁a", "▁b", "ab", "é", "▁", "!"]


def sentencepiece_like() -> TextCodec:
    """A byte-fallback tokenizer with the decoder of Llama's."""
    tokens = ["<unk>", *(f"<0x{value:02X}>" for value in range(256)), *MERGED]
    tokenizer = Tokenizer(models.BPE({t: n for n, t in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens(["<|eot|>"])
    return TextCodec(tokenizer, None, {})


@pytest.fixture(scope="module")
def codecs(embedded, tmp_path_factory) -> dict[str, TextCodec]:
    byte_level = TextCodec.from_folder(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    return {"byte-fallback": embedded.text, "byte-level": byte_level, "sentencepiece": sentencepiece_like()}


def tokens_of(codec: TextCodec):
    """Token ids of which many are bytes: of whole characters, of parts of them, and of none."""
    size, special = codec.tokenizer.get_vocab_size(), sorted(codec.special_ids().values())
    alphabet = sorted(codec.byte_ids) or list(range(256))  # the byte-level vocabulary starts with its bytes
    some = st.sampled_from(alphabet) | st.integers(0, size + 1) | st.sampled_from(special)
    return st.lists(some, max_size=24)


def deltas(codec: TextCodec, ids: list[int], strides: list[int], stops: list[str]) -> tuple[list[str], SettledText]:
    """Return the parts of a text whose tokens are settled in steps of these strides, and its state."""
    text, given, count = SettledText(codec, stops), [], 0
    for stride in [*strides, len(ids)]:
        count = min(len(ids), count + stride)
        given.append(text.take(ids[:count], count == len(ids)))
        if text.stopped_at is not None:
            break
    return given, text


@pytest.mark.parametrize("kind", ["byte-fallback", "byte-level", "sentencepiece"])
def test_parts_of_any_tokens_add_up_to_their_text(codecs, kind):
    codec = codecs[kind]

    @given(ids=tokens_of(codec), strides=st.lists(st.integers(0, 3), max_size=24))
    def check(ids, strides):
        given, text = deltas(codec, ids, strides, [])
        assert "".join(given) == text.text == codec.decode(ids)

    check()


@pytest.mark.parametrize("kind", ["byte-fallback", "byte-level", "sentencepiece"])
def test_stops_cut_any_tokens_where_they_cut_the_whole(codecs, kind):
    codec = codecs[kind]
    named = sorted(codec.special_ids())[-1]
    stops = st.sampled_from(["a", "ab", "e", "\ufffd", "\u00e9", " ", named])

    @given(tokens_of(codec), st.lists(st.integers(0, 3), max_size=24), st.lists(stops, min_size=1, max_size=2))
    def check(ids, strides, stops):
        given, text = deltas(codec, ids, strides, stops)
        at = ids.index(codec.special_ids()[named]) if named in stops and codec.special_ids()[named] in ids else None
        whole = codec.decode(ids[:at])
        ends = [(whole.index(stop) + len(stop), whole.index(stop)) for stop in stops if stop in whole]
        assert "".join(given) == text.text == whole[: min(ends)[1] if ends else None]
        assert (text.stopped_at is None) == (at is None and not ends)

    check()


def test_an_invalid_byte_costs_nothing_that_follows(embedded):
    """A byte run is text when it has ended: its last byte may make all of it invalid."""
    codec = embedded.text
    ids = [codec.token_id("<0x72>"), codec.token_id("<0xAA>"), *codec.encode(" after that")]
    given, _ = deltas(codec, ids, [1] * len(ids), [])
    assert given[:2] == ["", ""] and given[2].startswith("\ufffd\ufffd")
    assert "".join(given) == codec.decode(ids) == "\ufffd\ufffd after that"


def test_a_special_token_stops_at_its_token(embedded):
    codec = embedded.text
    ids = [*codec.encode("one"), codec.token_id("<|eot_id|>"), *codec.encode("two")]
    given, text = deltas(codec, ids, [1] * len(ids), ["<|eot_id|>", "w"])
    assert "".join(given) == "one" and ids[text.stopped_at - 1] == codec.token_id("<|eot_id|>")
