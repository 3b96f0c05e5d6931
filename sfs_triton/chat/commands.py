"""Commands of a chat: their arguments, and their effect on the conversation."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..decoding.caching import POLICIES, CachePolicy
from ..decoding.params import parse_cache, parse_sampler
from ..decoding.samplers import LARGEST, PRESETS, SAMPLERS, Sampler, SlowFast
from ..errors import ArgumentError, require
from ..scheduling.outputs import Generation
from .conversation import Chat, kind, shown

WORDS = {"none": None, "true": True, "false": False}


@dataclass(frozen=True, slots=True)
class Action:
    """A command and its checked argument; a line without a slash is the command ``say``."""

    name: str
    value: Any = None


def parse(line: str) -> Action:
    """Parse a line. Commands start with a slash; two slashes start a message with one slash.

    Raises:
        ArgumentError: unknown command or invalid argument; names command and value.
    """
    if not line.startswith("/"):
        return Action("say", line)
    if line.startswith("//"):
        return Action("say", line[1:])
    name, rest = re.fullmatch(r"/(\S*)\s*(.*?)\s*", line, re.DOTALL).groups()
    require(name in COMMANDS, f"{shown('/' + name)} is not a command; /help lists them, // begins a message with /")
    return Action(name, COMMANDS[name].read(name, rest))


def perform(chat: Chat, action: Action) -> str:
    """Perform a command that needs no terminal, and return its message.

    Raises:
        ArgumentError: names command and value; nothing is changed.
    """
    try:
        return _PERFORM[action.name](chat, action.value)
    except ArgumentError as error:
        raise ArgumentError(f"/{action.name}: {error}") from None


def label(sampler: Sampler, cache: CachePolicy) -> str:
    """Return a short description of sampler and cache."""
    return f"{_changed(sampler)}, cache {cache.name}"


def _changed(sampler: Sampler) -> str:
    """Return a sampler's name and its settings that differ from the defaults."""
    staged = isinstance(sampler, SlowFast)
    usual = PRESETS[sampler.name] if staged else type(sampler)()
    changed = [f" {key}={_word(v)}" for key, v in _fields(sampler).items() if v != getattr(usual, key)]
    return kind(sampler) + (f" ({sampler.name})" if staged else "") + "".join(changed)


def summary(made: Generation, room: int) -> str:
    """Return one line of figures of a finished answer; ``room`` is the model's number of positions."""
    return (
        f"{_figures(made.nfe, len(made.tokens), made.seconds)} | "
        f"{made.prompt_length + len(made.tokens)} of {room} positions"
    )


def _figures(nfe: int, tokens: int, seconds: float) -> str:
    return f"NFE {nfe} | TPF {tokens / max(1, nfe):.2f} | {tokens / max(seconds, 1e-9):,.1f} tokens/s"


def _fields(settings: Any) -> dict[str, Any]:
    """Return the fields that can be set; a sampler's ``name`` is its preset's."""
    return {f.name: getattr(settings, f.name) for f in fields(settings) if f.name != "name"}


def _word(value: Any) -> str:
    """Format a setting as it is typed."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _value(text: str) -> Any:
    """Parse a typed setting: none, true, false, a number, or else text."""
    if text in WORDS:
        return WORDS[text]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _pairs(command: str, words: Sequence[str]) -> dict[str, Any]:
    pairs = {}
    for word in words:
        key, sign, value = word.partition("=")
        require(bool(key and sign), f"/{command}: {shown(word)} is not key=value")
        require(key not in pairs, f"/{command}: {shown(word)} sets {key} again")
        pairs[key] = _value(value)
        fine = not isinstance(pairs[key], int) or abs(pairs[key]) <= LARGEST
        require(fine, f"/{command}: {shown(word)} is beyond {LARGEST:,}")
    return pairs


def _nothing(name: str, rest: str) -> None:
    require(not rest, f"/{name} takes no argument, not {shown(rest)}")


def _integer(name: str, rest: str) -> int | None:
    if not rest:
        return None
    try:
        return int(rest)
    except ValueError:
        raise ArgumentError(f"/{name} {shown(rest)}: not an integer") from None


def _switch(name: str, rest: str) -> bool | None:
    require(rest in ("on", "off", ""), f"/{name} {shown(rest)}: neither on nor off")
    return {"on": True, "off": False}.get(rest)


def _text(name: str, rest: str) -> str | None:
    return None if not rest else "" if rest == '""' else rest


def _path(name: str, rest: str) -> Path:
    require(bool(rest), f"/{name} needs a file")
    try:
        return Path(rest).expanduser()
    except (RuntimeError, ValueError) as error:
        raise ArgumentError(f"/{name} {shown(rest)}: {error}") from None


def _named(known: Mapping[str, Any]) -> Callable[[str, str], tuple[str | None, dict[str, Any]] | None]:
    """Return a parser of ``NAME [key=value ...]`` or ``key=value ...``."""

    def read(name: str, rest: str) -> tuple[str | None, dict[str, Any]] | None:
        words = rest.split()
        if not words:
            return None
        chosen = None if "=" in words[0] else words.pop(0)
        require(chosen is None or chosen in known, f"/{name} {shown(chosen)} is not one of {', '.join(known)}")
        return chosen, _pairs(name, words)

    return read


@dataclass(frozen=True, slots=True)
class Command:
    """Usage of a command, its help text, and the parser of its argument."""

    usage: str
    does: str
    read: Callable[[str, str], Any]


COMMANDS = {
    "help": Command("", "this list", _nothing),
    "reset": Command("", "forget all exchanges; settings and system message stay", _nothing),
    "undo": Command("", "forget the last exchange", _nothing),
    "retry": Command("", "answer the last message again, with the next seed", _nothing),
    "history": Command("", "what has been said", _nothing),
    "system": Command("[TEXT]", 'show or set the system message; "" removes it', _text),
    "sampler": Command("[NAME] [key=value ...]", f"show or set it: {', '.join(SAMPLERS)}", _named(SAMPLERS)),
    "cache": Command("[NAME] [key=value ...]", f"show or set it: {', '.join(POLICIES)}", _named(POLICIES)),
    "length": Command("[N]", "show or set the positions of an answer", _integer),
    "seed": Command("[N]", "show or set the next answer's seed", _integer),
    "forget": Command("[on|off]", "whether the oldest exchanges go where a turn does not fit", _switch),
    "watch": Command("[on|off]", "whether the canvas is shown live", _switch),
    "stats": Command("", "NFE, TPF and tokens/s of the last answer and of the session", _nothing),
    "save": Command("FILE", "write the history, a JSON message a line", _path),
    "load": Command("FILE", "replace the history by a saved one", _path),
    "quit": Command("", "leave", _nothing),
}


def help_text() -> str:
    """Return the help of all commands, one per line."""
    typed = {f"/{name} {command.usage}".rstrip(): command.does for name, command in COMMANDS.items()}
    width = max(map(len, typed))
    lines = [f"{usage:<{width}}  {does}" for usage, does in typed.items()]
    return "\n".join([*lines, "A line that ends with \\ goes on in the next. // begins a message with a slash."])


def _set_sampler(chat: Chat, value: tuple[str | None, dict[str, Any]] | None) -> str:
    if value is not None:
        chat.change(sampler=_sampler(chat.settings.sampler, *value))
        return f"sampler {_changed(chat.settings.sampler)}"
    sampler = chat.settings.sampler
    head = f"{kind(sampler)} preset={sampler.name}" if isinstance(sampler, SlowFast) else kind(sampler)
    return f"sampler {head} " + " ".join(f"{key}={_word(v)}" for key, v in _fields(sampler).items())


def _sampler(current: Sampler, name: str | None, pairs: dict[str, Any]) -> Sampler:
    """Return the sampler ``name`` with the settings ``pairs``, or the current one with these changed.

    Raises:
        ArgumentError: names setting and value.
    """
    cls = type(current) if name is None else SAMPLERS[name]
    called = name or kind(current)
    staged = cls is SlowFast
    known = [f.name for f in fields(cls) if f.name != "name"]
    known = ["preset", *known] if staged else [k for k in known if (called, k) != ("vanilla", "steps") or name is None]
    for key, value in pairs.items():
        require(key in known, f"{shown(f'{key}={_word(value)}')} is no setting of {called}; it has {', '.join(known)}")
    pairs = dict(pairs)
    if name is not None or "preset" in pairs:
        return parse_sampler(called, **pairs)
    return current.replace(**pairs)


def _set_cache(chat: Chat, value: tuple[str | None, dict[str, Any]] | None) -> str:
    if value is not None:
        name, pairs = value
        current = chat.settings.cache
        known = [f.name for f in fields(POLICIES[name or current.name])]
        for key, given in pairs.items():
            has = f"it has {', '.join(known)}" if known else "it has none"
            require(key in known, f"{shown(f'{key}={_word(given)}')} is no setting of {name or current.name}; {has}")
        chat.change(cache=replace(current, **pairs) if name is None else parse_cache(name, **pairs))
    cache = chat.settings.cache
    return " ".join([f"cache {cache.name}", *(f"{key}={_word(v)}" for key, v in _fields(cache).items())])


def _set_number(name: str) -> Callable[[Chat, int | None], str]:
    def set_number(chat: Chat, value: int | None) -> str:
        if value is not None:
            chat.change(**{name: value})
        return f"{name} {getattr(chat.settings, name)}"

    return set_number


def _set_forget(chat: Chat, value: bool | None) -> str:
    if value is not None:
        chat.change(forget=value)
    return f"forget {'on' if chat.settings.forget else 'off'}"


def _set_system(chat: Chat, text: str | None) -> str:
    if text is not None:
        chat.set_system(text)
    return f"system: {chat.system}" if chat.system else "no system message"


def _reset(chat: Chat, _: None) -> str:
    gone = len(chat.exchanges)
    chat.reset()
    return f"forgot {_exchanges(gone)}" + ("; the system message stays" if chat.system else "")


def _undo(chat: Chat, _: None) -> str:
    chat.undo()
    return f"forgot the last exchange; {_exchanges(len(chat.exchanges))} left"


def _history(chat: Chat, _: None) -> str:
    return "\n".join(f"{m['role']}: {m['content']}" for m in chat.messages) or "nothing has been said"


def _save(chat: Chat, path: Path) -> str:
    chat.save(path)
    return f"wrote {len(chat.messages)} messages to {path}"


def _load(chat: Chat, path: Path) -> str:
    chat.load(path)
    return (
        f"loaded {len(chat.messages)} messages from {path}: {chat.count()} of {chat.engine.spec.max_length} positions"
    )


def _stats(chat: Chat, _: None) -> str:
    totals = chat.totals
    last = "none" if chat.last is None else summary(chat.last.generation, chat.engine.spec.max_length)
    return (
        f"last answer: {last}\n"
        f"session: {_figures(totals.nfe, totals.tokens, totals.seconds)} | "
        f"{totals.answers} answered, {totals.stopped} not"
    )


def _exchanges(count: int) -> str:
    return f"{count} exchange" + ("" if count == 1 else "s")


_PERFORM: dict[str, Callable[[Chat, Any], str]] = {
    "help": lambda chat, _: help_text(),
    "reset": _reset,
    "undo": _undo,
    "history": _history,
    "system": _set_system,
    "sampler": _set_sampler,
    "cache": _set_cache,
    "length": _set_number("gen_length"),
    "seed": _set_number("seed"),
    "forget": _set_forget,
    "stats": _stats,
    "save": _save,
    "load": _load,
}
