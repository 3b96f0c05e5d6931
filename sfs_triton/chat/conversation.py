"""A conversation with a model, independent of a terminal: history, decoding parameters, files."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..decoding.params import DecodingParams, sampler_kind
from ..decoding.samplers import FixedSteps, Sampler
from ..engine import Engine
from ..errors import ArgumentError, require
from ..scheduling.outputs import Frame, Generation
from ..text.codec import UNFINISHED, check_size

ROLES = ("system", "user", "assistant")
LARGEST_FILE = 16 * 2**20  # bytes; larger files are refused


class ContextOverflow(ArgumentError):
    """A message and its answer exceed the model's positions by ``over``."""

    def __init__(self, message: str, over: int):
        super().__init__(message)
        self.over = over


@dataclass(frozen=True, kw_only=True)
class Settings(DecodingParams):
    """Decoding parameters of the next answer; each answer increments the seed.

    Args:
        forget: drop the oldest exchanges if the next one does not fit otherwise.
    """

    forget: bool = False


@dataclass(frozen=True)
class Answer:
    """A finished exchange: message, answer, and decoding parameters."""

    message: str
    generation: Generation
    settings: Settings  # with the seed of this answer
    forgotten: int  # exchanges that were dropped to make room

    @property
    def text(self) -> str:
        return self.generation.text

    def as_dict(self) -> dict[str, Any]:
        """Return all fields, ready for JSON."""
        made, how = self.generation.as_dict(), self.settings.to_dict()
        return {"message": self.message, **made, **how, "forgotten": self.forgotten}


@dataclass(slots=True)
class Totals:
    """Sums over all finished answers of a session; ``stopped`` counts messages without an answer."""

    answers: int = 0
    tokens: int = 0
    nfe: int = 0
    seconds: float = 0.0
    stopped: int = 0

    def add(self, made: Generation) -> None:
        self.answers += 1
        self.tokens += len(made.tokens)
        self.nfe += made.nfe
        self.seconds += made.seconds


class Turn(Iterator[Frame]):
    """A message and its answer in progress: one frame per step. Nothing runs between two frames.

    The exchange is added to the history with the last frame, and not at all if this is closed before.
    """

    def __init__(self, chat: Chat, message: str, kept: list[tuple[str, str]], dropped: tuple[int, int], prompt: list):
        self.message, self.settings = message, chat.settings
        self.over, self.forgotten = dropped  # tokens that did not fit, and the exchanges dropped for them
        self.prompt_tokens = len(prompt)
        self.text = ""  # of the answer's leading decided positions
        self.steps = 0
        self.answer: Answer | None = None
        self._chat, self._kept, self._open = chat, kept, True
        settings = self.settings
        self._stream = chat.engine.stream(
            prompt,
            gen_length=settings.gen_length,
            sampler=settings.sampler,
            cache=settings.cache,
            seed=settings.seed,
        )

    def __next__(self) -> Frame:
        if not self._open:
            raise StopIteration
        frame = next(self._stream, None)
        if frame is None:
            made = self._stream.result()
            self._open = False
            self.text = made.text if made.text.startswith(self.text) else self.text + "\n" + made.text
            self.answer = Answer(self.message, made, self.settings, self.forgotten)
            self._chat._keep(self.answer, self._kept)
            raise StopIteration
        self.steps = frame.step + 1
        self.text = self._settled(frame)
        return frame

    def _settled(self, frame: Frame) -> str:
        """Return the text that later steps cannot change; a character is held back until its bytes are complete."""
        engine = self._chat.engine
        tokens = frame.tokens[0][self.prompt_tokens : frame.settled[0]]
        eos = engine.spec.eos_id
        text = engine.text.decode(tokens[: tokens.index(eos)] if eos in tokens else tokens).rstrip(UNFINISHED)
        return text if text.startswith(self.text) else self.text

    def close(self) -> None:
        """Stop the generation. An unfinished answer is dropped, and the history is unchanged."""
        self._stream.close()
        if self._open:
            self._open = False
            self._chat.totals.stopped += 1

    def __enter__(self) -> Turn:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Chat:
    """A conversation in the checkpoint's own chat template.

    Raises:
        ArgumentError: the checkpoint has no tokenizer or no chat template; a setting is out of the model's range.
    """

    def __init__(self, engine: Engine, settings: Settings | None = None, system: str = ""):
        require(engine.text is not None, "the checkpoint has no tokenizer.json, which a chat needs")
        require(engine.text.template is not None, "the checkpoint has no chat template; `sfs generate` needs none")
        self.engine = engine
        self.system = ""
        self.exchanges: list[tuple[str, str]] = []  # messages and their answers, oldest first
        self.last: Answer | None = None
        self.totals = Totals()
        self.settings = self._fitting(Settings() if settings is None else settings)
        self._unanswered: tuple[str, list[tuple[str, str]]] | None = None  # the last message, the exchanges before
        self._turn: Turn | None = None
        self.set_system(system)

    @property
    def messages(self) -> list[dict[str, str]]:
        """Return the history in the format of chat templates."""
        return self._messages(self.exchanges)

    def set_system(self, text: str) -> None:
        """Set the system message, or remove it if ``text`` is empty.

        Raises:
            ArgumentError: not valid Unicode, or refused by the template; the previous one is kept.
        """
        _check_unicode("system message", text)
        check_size("system message", text, self.engine.spec.max_length)
        before, self.system = self.system, text
        try:
            self.count()
        except ArgumentError:
            self.system = before
            raise

    def count(self) -> int:
        """Count the tokens of the history and an empty message after it, in the template."""
        return len(self._encode(self._messages(self.exchanges, "")))

    def say(self, text: str) -> Turn:
        """Start the answer to ``text``, to be iterated. An answer in progress is closed.

        Raises:
            ContextOverflow: history, message and answer do not fit, and ``forget`` is off or would not help.
            ArgumentError: the text is empty, not valid Unicode, or holds the mask token.
        """
        return self._begin(text, self.exchanges)

    def retry(self) -> Turn:
        """Answer the last message again; the old answer, if there is one, stays until the new one is complete.

        Raises:
            ArgumentError: there is no message yet; otherwise as :meth:`say`.
        """
        if self._unanswered is not None:
            return self._begin(*self._unanswered)
        require(bool(self.exchanges), "there is no message to answer again")
        return self._begin(self.exchanges[-1][0], self.exchanges[:-1])

    def change(self, **changes: Any) -> None:
        """Change settings: all of them, or none if they are incompatible.

        Raises:
            ArgumentError: names setting and value.
        """
        self.settings = self._fitting(replace(self.settings, **changes))

    def reset(self) -> None:
        """Drop all exchanges; settings and system message are kept."""
        self.exchanges, self._unanswered = [], None

    def undo(self) -> None:
        """Drop the last exchange."""
        require(bool(self.exchanges), "there is no exchange to forget")
        self.exchanges, self._unanswered = self.exchanges[:-1], None

    def load(self, path: Path) -> None:
        """Replace the history and the system message by saved ones.

        Raises:
            ArgumentError: names the file and, if there is one, the line at fault; the history is unchanged.
        """
        before = self.system, self.exchanges
        self.system, self.exchanges = read_messages(path)
        try:
            self.count()
        except ArgumentError as error:
            self.system, self.exchanges = before
            raise ArgumentError(f"{str(path)!r}: {error}") from None
        self._unanswered = None

    def save(self, path: Path) -> None:
        """Write the history, one message per line; see :func:`write_messages`."""
        write_messages(path, self.messages)

    def _messages(self, exchanges: Sequence[tuple[str, str]], asked: str | None = None) -> list[dict[str, str]]:
        said = [("system", self.system)] if self.system else []
        for message, answer in exchanges:
            said += [("user", message), ("assistant", answer)]
        if asked is not None:
            said.append(("user", asked))
        return [{"role": role, "content": content} for role, content in said]

    def _encode(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        codec, mask = self.engine.text, self.engine.spec.mask_id
        try:
            text = codec.render(messages)
        except ArgumentError as error:  # its text quotes the whole conversation; its cause names the fault
            raise ArgumentError(f"the checkpoint's chat template refused this: {error.__context__ or error}") from None
        ids = codec.encode(text)
        require(mask not in ids, f"the conversation holds the model's mask token (id {mask}), which no prompt may hold")
        return ids

    def _fitting(self, settings: Settings) -> Settings:
        room, length = self.engine.spec.max_length, settings.gen_length
        require(length < room, f"gen_length={length}: the model has only {room} positions")
        return settings

    def _begin(self, text: str, exchanges: list[tuple[str, str]]) -> Turn:
        if self._turn is not None:
            self._turn.close()
        settings, room = self.settings, self.engine.spec.max_length
        require(bool(text.strip()), "the message is empty")
        _check_unicode("message", text)
        check_size("message", text, room)
        self._unanswered = (text, exchanges)
        prompt = self._encode(self._messages(exchanges, text))
        over, forgotten = len(prompt) + settings.gen_length - room, 0
        while len(prompt) + settings.gen_length > room and settings.forget and forgotten < len(exchanges):
            forgotten += 1
            prompt = self._encode(self._messages(exchanges[forgotten:], text))
        if len(prompt) + settings.gen_length > room:
            raise _overflow(len(prompt), settings.gen_length, room, alone=forgotten == len(exchanges))
        self._turn = Turn(self, text, exchanges[forgotten:], (max(0, over), forgotten), prompt)
        self.settings = replace(settings, seed=(settings.seed + 1) % 2**63)
        return self._turn

    def _keep(self, answer: Answer, kept: list[tuple[str, str]]) -> None:
        self.exchanges = [*kept, (answer.message, answer.text)]
        self.last, self._unanswered = answer, None
        self.totals.add(answer.generation)


def _overflow(prompt: int, length: int, room: int, alone: bool) -> ContextOverflow:
    over = prompt + length - room
    advice = "/reset begins anew, /forget on (--forget) drops the oldest exchanges"
    return ContextOverflow(
        f"this turn is {over} tokens over: {prompt} of conversation and gen_length={length} make {prompt + length}, "
        f"the model has {room} positions; {'say less, or take a shorter answer (/length)' if alone else advice}",
        over,
    )


def _check_unicode(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeError as error:
        raise ArgumentError(f"the {name} is not valid text: {error}") from None


# Files of messages


def write_messages(path: Path, messages: Sequence[Mapping[str, str]]) -> None:
    """Write one JSON object per line, atomically: a failure leaves an older file unchanged and no partial one.

    Raises:
        ArgumentError: names the path.
    """
    partial = None
    try:
        require(not path.is_dir(), f"{str(path)!r} is a folder")
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        lines = [json.dumps({k: m[k] for k in ("role", "content")}, ensure_ascii=False) + "\n" for m in messages]
        partial.write_text("".join(lines), encoding="utf-8", newline="\n")
        os.replace(partial, path)
    except (OSError, ValueError) as error:
        if isinstance(error, ArgumentError):
            raise
        raise ArgumentError(f"{str(path)!r} cannot be written: {getattr(error, 'strerror', None) or error}") from None
    finally:
        if partial is not None and os.path.lexists(partial):
            partial.unlink()


def read_messages(path: Path) -> tuple[str, list[tuple[str, str]]]:
    """Read a file of messages. Return the system message ("" if there is none) and the exchanges.

    Raises:
        ArgumentError: names the path and, if there is one, the line at fault.
    """
    try:
        require(path.is_file(), f"{str(path)!r} is not a file")
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
        require(len(data) <= LARGEST_FILE, f"{str(path)!r} is larger than {LARGEST_FILE:,} bytes")
        lines = data.decode().split("\n")
    except (OSError, ValueError) as error:
        if isinstance(error, ArgumentError):
            raise
        raise ArgumentError(f"{str(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    system, said = "", []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        role, content = _message(f"{str(path)!r}, line {number}", line)
        if role == "system":
            require(not (said or system), f"{str(path)!r}, line {number}: a system message that is not the first")
            system = content
            continue
        due = ("user", "assistant")[len(said) % 2]
        require(role == due, f"{str(path)!r}, line {number}: role={role!r} where {due!r} is due")
        said.append(content)
    require(len(said) % 2 == 0, f"{str(path)!r} ends with a message that has no answer")
    return system, list(zip(said[::2], said[1::2], strict=True))


def _message(where: str, line: str) -> tuple[str, str]:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"{where} is not JSON: {error}") from None
    require(isinstance(message, dict), f"{where} holds a {type(message).__name__}, not an object")
    require(
        set(message) == {"role", "content"},
        f"{where} has the keys {shown(sorted(message))}, not 'role' and 'content'",
    )
    role, content = message["role"], message["content"]
    require(role in ROLES, f"{where}: role={shown(role)} is not one of {ROLES}")
    require(isinstance(content, str), f"{where}: content={shown(content)} is not text")
    _check_unicode(f"content of {where}", content)
    return role, content


def shown(value: Any) -> str:
    """Return ``repr(value)``, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def kind(sampler: Sampler) -> str:
    """Return the command-line name of a sampler."""
    plain = isinstance(sampler, FixedSteps) and sampler.steps is None and sampler.metric == "confidence"
    return "vanilla" if plain else sampler_kind(sampler)
