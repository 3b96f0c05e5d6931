"""Text in and out of a checkpoint: its ``tokenizer.json`` and its chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from .errors import ArgumentError, CheckpointError, require
from .models.weights import read_json

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what tokenizers make of a character whose bytes have not all come


class TextCodec:
    """A tokenizer and, where the checkpoint has one, a chat template rendered in a sandbox."""

    def __init__(self, tokenizer: Tokenizer, template: str | None, special: Mapping[str, str]):
        self.tokenizer, self.template, self.special = tokenizer, template, dict(special)

    @classmethod
    def from_folder(cls, folder: Path) -> TextCodec | None:
        """The codec of a checkpoint folder; None where it has no ``tokenizer.json``."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            return None
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"{path} is not a readable tokenizer: {error}") from None
        config_path = folder / "tokenizer_config.json"
        config = read_json(config_path) if config_path.is_file() else {}
        if not isinstance(config, Mapping):
            raise CheckpointError(f"{config_path} holds a {type(config).__name__}, not an object")
        template = _default_template(config.get("chat_template"), config_path)
        jinja = folder / "chat_template.jinja"
        if jinja.is_file():
            try:
                template = jinja.read_text(encoding="utf-8")
            except (OSError, UnicodeError) as error:
                raise CheckpointError(f"{jinja} cannot be read: {error}") from None
        special = {}
        for name in ("bos_token", "eos_token", "pad_token", "mask_token"):
            token = config.get(name)
            token = token.get("content") if isinstance(token, Mapping) else token
            if isinstance(token, str):
                special[name] = token
        return cls(tokenizer, template, special)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, with nothing added to it."""
        try:
            text.encode()
        except UnicodeError as error:
            raise ArgumentError(f"text={text!r} is not valid Unicode: {error}") from None
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def piece(self, token: int) -> str:
        """What ``token`` adds to a text. Decoded alone, many tokenizers drop the space before it."""
        decode = self.tokenizer.decode
        anchor = self.encode("a")[-1:]
        before, both = (decode([*anchor, *more], skip_special_tokens=False) for more in ([], [token]))
        return both[len(before) :] if both.startswith(before) else decode([token], skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        """The id of a token by its exact text."""
        return self.tokenizer.token_to_id(token)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt of a conversation, ready for the assistant's answer.

        The template runs in a sandbox: it reaches nothing outside, but a hostile one can waste time and memory.
        """
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if self.template is None:
            raise ArgumentError("the checkpoint has no chat template; pass a string or token ids")
        for message in messages:
            fine = isinstance(message, Mapping) and all(isinstance(message.get(k), str) for k in ("role", "content"))
            require(fine, f"message {message!r} is not a mapping with a text 'role' and a text 'content'")

        def raise_exception(message: str) -> None:
            raise ValueError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = raise_exception
        try:
            return environment.from_string(self.template).render(
                messages=[dict(m) for m in messages], add_generation_prompt=True, **self.special
            )
        except Exception as error:  # whatever a stranger's template does wrong
            raise ArgumentError(f"the checkpoint's chat template refused messages={messages!r}: {error}") from None


def _default_template(template: Any, path: Path) -> str | None:
    """The template itself, or the one named "default" of a list of named ones."""
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, Mapping)}
        template = named.get("default", template)
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{path}: chat_template is a {type(template).__name__} without a 'default' text")
    return template
