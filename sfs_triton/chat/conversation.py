"""A conversation with a model: its messages, and the decoding parameters of the next answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..decoding.params import SEEDS, DecodingParams
from ..engine import Engine, Frame, Generation
from ..errors import require
from ..scheduling.handles import Stream
from ..text.codec import check_size, check_unicode
from ..text.settled import SettledText


class Conversation:
    """Messages in the checkpoint's own chat template.

    Args:
        engine: a model with a tokenizer and a chat template.
        params: decoding parameters of the next answer. Each answer increments the seed.
        system: a message that the conversation starts with, also after :meth:`reset`.

    Raises:
        ArgumentError: names the argument and its value.
    """

    def __init__(self, engine: Engine, params: DecodingParams | None = None, system: str = ""):
        require(engine.codec("a chat").template is not None, "the checkpoint has no chat template, which a chat needs")
        self.engine = engine
        self.params = DecodingParams() if params is None else params
        self.last: Generation | None = None  # of the last answer
        self._start = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = list(self._start)
        self.change()
        if system:
            self._encode("system", system, "")

    def change(self, **fields: Any) -> None:
        """Change fields of the decoding parameters: all, or none if they do not work together.

        Raises:
            ArgumentError: names the field and its value.
        """
        changed = replace(self.params, **fields)
        room = self.engine.spec.max_length
        require(changed.gen_length < room, f"gen_length={changed.gen_length}: the model has only {room} positions")
        self.params = changed

    def reset(self) -> None:
        """Drop all messages but the system message."""
        self.messages = list(self._start)

    def answer(self, text: str) -> Iterator[tuple[str, Frame | None]]:
        """Return an iterator over the answer to ``text``: the text that each step adds, and the frame of the step.

        Text once given does not change; the last item is the rest of it, without a frame. The message and its answer
        are kept once the last step is done. If a step fails, or the iterator is closed before, nothing changes.

        Raises:
            ArgumentError: names the argument and its value.
        """
        require(bool(text.strip()), f"the message {text!r} is empty")
        prompt = self._encode("message", text, text)
        length, room = self.params.gen_length, self.engine.spec.max_length
        over = len(prompt) + length - room
        require(
            over <= 0,
            f"the conversation has {len(prompt)} tokens; with gen_length={length} it is {over} over the model's {room} "
            "positions: reset it, or set a smaller gen_length",
        )
        return self._steps(text, len(prompt), self.engine.stream(prompt, self.params))

    def _steps(self, text: str, start: int, stream: Stream) -> Iterator[tuple[str, Frame | None]]:
        settled, spec = SettledText(self.engine.text), self.engine.spec
        with stream:
            for frame in stream:
                tokens = frame.tokens[0][start : frame.settled[0]]
                yield settled.take(tokens[: spec.end_of(tokens)], final=False), frame
            made = stream.result()
        self.last = made
        exchange = [{"role": "user", "content": text}, {"role": "assistant", "content": made.text}]
        self.messages = [*self.messages, *exchange]
        self.params = replace(self.params, seed=(self.params.seed + 1) % SEEDS)
        yield settled.take(made.tokens, final=True), None

    def _encode(self, name: str, new: str, question: str) -> list[int]:
        """Return the checked token ids of the messages and a question; errors about ``new`` call it ``name``."""
        check_unicode(f"the {name}", new)
        check_size(name, new, self.engine.spec.max_length)
        ids = self.engine.encode([*self.messages, {"role": "user", "content": question}])
        self.engine.check_no_mask(f"the {name} {new!r}", ids)
        return ids
