"""Text codec of a checkpoint: its tokenizer and its chat template."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..errors import ArgumentError, CheckpointError, SfsError, require
from ..files import read_json
from .byte_level import MOST_TOKENS, check_size_of, read_gguf, read_qwen2
from .chat_template import TemplateError, render

MASK_TOKENS = ("<[MASK]>", "<|mdm_mask|>", "[MDM_MASK]", "<|mask|>")  # where the tokenizer names none
SPECIAL = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]  # names in a template
BYTE_TOKENS = [f"<0x{value:02X}>" for value in range(256)]  # of byte-fallback tokenizers
_PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that byte-level tokenizers write as they are
_OTHERS = [value for value in range(256) if value not in _PRINTED]
BYTE_LEVEL = {chr(value): value for value in _PRINTED} | {chr(256 + n): value for n, value in enumerate(_OTHERS)}
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # decoded from a character with missing bytes
GROWTH = 64  # of a text in its tokenizer: Unicode's own normal forms make a character 18 at most
CHARACTERS = 64  # of text per position of a context; encoding far more than fits takes long


def check_size(name: str, text: str, context: int) -> None:
    """Refuse a text too long for a context of so many positions, before it is encoded."""
    most = context * CHARACTERS
    require(
        len(text) <= most,
        f"the {name} has {len(text):,} characters, over {most:,}: the model has only {context:,} positions",
    )


def check_unicode(name: str, text: str) -> None:
    """Refuse halves of surrogate pairs, which no tokenizer takes; undecodable bytes of a file are read as such."""
    try:
        text.encode()
    except UnicodeError as error:  # quotes the characters and their position
        raise ArgumentError(f"{name} is not valid Unicode: {error}") from None


class TextCodec:
    """A tokenizer and, where the checkpoint has one, a chat template rendered in a sandbox."""

    def __init__(self, tokenizer: Tokenizer, template: str | None, special: Mapping[str, str]):
        self.tokenizer, self.template, self.special = tokenizer, template, dict(special)

    @classmethod
    def from_folder(cls, folder: Path) -> TextCodec | None:
        """Load the codec of a checkpoint folder: of ``tokenizer.json``, or of ``vocab.json`` and ``merges.txt``.

        None if it has neither.
        """
        path, config_path = folder / "tokenizer.json", folder / "tokenizer_config.json"
        parts = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
        if not path.is_file() and not parts:
            return None
        config = read_json(config_path) if config_path.is_file() else {}
        if not isinstance(config, Mapping):
            raise CheckpointError(f"{config_path} holds a {type(config).__name__}, not an object")
        if path.is_file():
            check_size_of(path)
            with _refusing(CheckpointError, f"{path} is not a readable tokenizer"):
                tokenizer = Tokenizer.from_file(str(path))
            for name in ("normalizer", "decoder"):
                _check_growth(path, name, getattr(tokenizer, name))
        else:
            tokenizer = read_qwen2(folder, config)
        template = _default_template(config.get("chat_template"), config_path)
        jinja = folder / "chat_template.jinja"
        if jinja.is_file():
            try:
                template = jinja.read_text(encoding="utf-8")
            except (OSError, UnicodeError) as error:
                raise CheckpointError(f"{jinja} cannot be read: {error}") from None
        special = {}
        for name in SPECIAL:
            token = config.get(name)
            token = token.get("content") if isinstance(token, Mapping) else token
            if isinstance(token, str):
                special[name] = token
        return cls(tokenizer, template, special)

    @classmethod
    def from_gguf(cls, path: Path, get: Callable[..., Any]) -> TextCodec | None:
        """Make the codec of a GGUF file, of which ``get(key, type)`` reads metadata; None if it has no tokenizer."""
        if get("tokenizer.ggml.model", str, "none") == "none":
            return None
        tokenizer = read_gguf(path, get)
        special = {}
        for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"), ("mask_token", "mask")):
            index = get(f"tokenizer.ggml.{key}_token_id", int)
            token = None if index is None or not 0 <= index < MOST_TOKENS else tokenizer.id_to_token(index)
            if token is not None:
                special[name] = token
        return cls(tokenizer, get("tokenizer.chat_template", str), special)

    def encode(self, text: str) -> list[int]:
        """Encode ``text`` to token ids, without added tokens."""
        check_unicode("text", text)
        with _refusing(ArgumentError, f"the checkpoint's tokenizer fails on text={text!r}"):
            return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_pair(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """Encode a prompt and its answer as one text, whose tokens behind the prompt's number are the answer's.

        Space at the end of the prompt goes to the answer: tokens hold the space before a word, not after.
        """
        stripped = prompt.rstrip()
        before = self.encode(stripped)
        return before, self.encode(prompt + answer)[len(before) :]

    def decode(self, ids: Sequence[int]) -> str:
        """Decode token ids to text, without special tokens, and without ids that the tokenizer does not define."""
        return self._decode(list(ids), skip_special_tokens=True)

    def _decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        def decode(ids: list[int]) -> str:
            with _refusing(CheckpointError, f"the checkpoint's tokenizer fails on ids={ids!r}"):
                return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

        def defined(token: int) -> bool:
            with suppress(CheckpointError):
                return decode([token]) is not None
            return False

        try:
            return decode(ids)
        except CheckpointError:  # models have more ids than tokenizers; fast ones leave the others out themselves
            known = [token for token in ids if defined(token)]
            if len(known) == len(ids):
                raise
            return decode(known)

    def piece(self, token: int) -> str:
        """Return the text that ``token`` adds. Decoded alone, many tokenizers drop the space before it."""
        decode = self._decode
        anchor = self.encode("a")[-1:]
        before, both = (decode([*anchor, *more], skip_special_tokens=False) for more in ([], [token]))
        return both[len(before) :] if both.startswith(before) else decode([token], skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        """Return the id of a token by its exact text."""
        return self.tokenizer.token_to_id(token)

    @cached_property
    def byte_ids(self) -> dict[int, int]:
        """Bytes by the ids of byte tokens, of which a byte-fallback decoder makes text when their run has ended."""
        vocabulary = self.tokenizer.get_vocab()
        return {vocabulary[token]: value for value, token in enumerate(BYTE_TOKENS) if token in vocabulary}

    def bytes_of(self, token: int) -> bytes | None:
        """Return the bytes of a token that may be a part of a character; None where its tokenizer does not say."""
        if token in self.byte_ids:
            return bytes([self.byte_ids[token]])
        written = self.token_of(token) or ""
        return bytes(BYTE_LEVEL[c] for c in written) if written and all(c in BYTE_LEVEL for c in written) else None

    def token_of(self, index: int) -> str | None:
        """Return the exact text of the token with this id."""
        return self.tokenizer.id_to_token(index)

    def mask_id(self) -> int | None:
        """Return the id of the mask token: the one that the tokenizer names, else an added token of a usual name."""
        named = self.special.get("mask_token")
        if named is not None:
            return self.token_id(named)
        special = self.special_ids()
        return next((special[name] for name in MASK_TOKENS if name in special), None)

    def end_id(self) -> int | None:
        """Return the id of the end-of-text token that the tokenizer names."""
        named = self.special.get("eos_token")
        return None if named is None else self.token_id(named)

    def written_ids(self, tokens: Sequence[str]) -> list[int]:
        """Return the ids of those special tokens that the chat template writes."""
        special = self.special_ids() if self.template else {}
        return [special[token] for token in tokens if token in special and token in self.template]

    def special_ids(self) -> dict[str, int]:
        """Return the ids of special tokens by their text."""
        added = self.tokenizer.get_added_tokens_decoder()
        return {token.content: index for index, token in added.items() if token.special}

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Render the prompt of a conversation, up to the assistant's answer.

        The template runs in a sandbox, with limits on time, memory and output.
        """
        if self.template is None:
            raise ArgumentError("the checkpoint has no chat template; pass a string or token ids")
        for message in messages:
            fine = isinstance(message, Mapping) and all(isinstance(message.get(k), str) for k in ("role", "content"))
            require(fine, f"message {message!r} is not a mapping with a text 'role' and a text 'content'")
        # transformers defines all of these, and templates ask whether some are none
        variables = {"tools": None, "documents": None, "add_generation_prompt": True, **self.special}
        try:
            return render(self.template, {**variables, "messages": [dict(message) for message in messages]})
        except TemplateError as error:
            raise ArgumentError(f"the checkpoint's chat template refused messages={messages!r}: {error}") from None


@contextmanager
def _refusing(kind: type[SfsError], what: str) -> Iterator[None]:
    """Convert failures of the tokenizer library (plain Exception and panics) to errors of this package."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        raise kind(f"{what}: {error}") from None


def _check_growth(path: Path, name: str, part: Any) -> None:
    """Refuse a normalizer or decoder that could make a text :data:`GROWTH` times as long and exhaust memory."""
    growth = 1 if part is None else _growth(json.loads(part.__getstate__()))
    if growth > GROWTH:
        raise CheckpointError(f"{path}: its {name} may make a text {growth:,.0f} times as long, over {GROWTH}")


def _growth(part: Mapping[str, Any]) -> float:
    if part["type"] == "Sequence":
        return math.prod(map(_growth, part.get("normalizers") or part.get("decoders") or []))
    if part["type"] != "Replace":
        return 1
    matched = len(part["pattern"].get("String", ""))  # 0: an expression may match the empty string, everywhere
    return max(1, len(part["content"]) / matched if matched else 1 + len(part["content"]))


def _default_template(template: Any, path: Path) -> str | None:
    """Return the template itself, or the one named "default" in a list."""
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, Mapping)}
        template = named.get("default", template)
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{path}: chat_template is a {type(template).__name__} without a 'default' text")
    return template
