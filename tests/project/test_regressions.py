"""Failures that fuzzing found, each by name, as small as they could be made (``tests/fuzz``)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import sfs_triton
from sfs_triton import ArgumentError, CheckpointError
from sfs_triton.text.codec import TextCodec

EMBEDDED = Path(sfs_triton.__file__).parent / "embedded"


def _codec(folder: Path, **changes) -> TextCodec:
    """The embedded tokenizer with some parts of its file replaced."""
    made = {**json.loads((EMBEDDED / "tokenizer.json").read_text()), **changes}
    (folder / "tokenizer.json").write_text(json.dumps(made))
    return TextCodec.from_folder(folder)


def _replace(pattern: dict, content: str) -> dict:
    return {"type": "Replace", "pattern": pattern, "content": content}


def test_a_tokenizer_that_panics_is_an_error(tmp_path):
    """Its library's panics do not derive from Exception, so handlers of Exception missed them."""
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    codec = _codec(tmp_path, pre_tokenizer=split)
    with pytest.raises(ArgumentError, match="tokenizer fails on text='aaa.*retry-limit"):
        codec.encode("a" * 40 + "b")


def test_a_tokenizer_that_is_not_readable_names_its_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a readable tokenizer: "):
        _codec(
            tmp_path,
            pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a"}, "behavior": "Isolated", "invert": False},
        )


@pytest.mark.parametrize(
    "part",
    [
        {"type": "Sequence", "normalizers": [_replace({"String": "a"}, "a" * 100)] * 4},
        _replace({"String": "a"}, "b" * 65),
        _replace({"Regex": "x*"}, "b" * 64),
        _replace({"String": ""}, "b" * 1000),
    ],
)
def test_a_normalizer_may_not_make_text_much_longer(tmp_path, part):
    """One character could fill the memory."""
    with pytest.raises(CheckpointError, match="normalizer may make a text .* times as long, over 64"):
        _codec(tmp_path, normalizer=part)


def test_usual_normalizers_are_fine(tmp_path):
    steps = [
        {"type": "NFKC"},
        {"type": "Prepend", "prepend": "_"},
        _replace({"String": " "}, "_"),
        {"type": "Lowercase"},
    ]
    codec = _codec(tmp_path, normalizer={"type": "Sequence", "normalizers": steps})
    assert codec.encode("A b") == codec.encode("a B") != []
