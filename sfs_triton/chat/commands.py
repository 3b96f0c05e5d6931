"""Commands of a chat: lines that start with a slash. A command's help text is the docstring of its function."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from ..decoding.params import cache_to_dict, check_options, from_words, parse_cache, parse_sampler, sampler_to_dict
from ..errors import ArgumentError, require
from ..files import whole_file
from .conversation import Conversation


def run(conversation: Conversation, line: str) -> str:
    """Run the command in ``line``, and return its message.

    Raises:
        ArgumentError: names command and argument; nothing is changed.
        EOFError: the command ends the chat.
    """
    name, argument = [*line[1:].strip().split(maxsplit=1), "", ""][:2]
    require(name in COMMANDS, f"unknown command {'/' + name!r}; the commands are /{', /'.join(COMMANDS)}")
    command = COMMANDS[name]
    takes_argument = len(signature(command).parameters) == 2
    require(takes_argument or not argument, f"/{name} takes no argument, not {argument!r}")
    try:
        return command(conversation, argument) if takes_argument else command(conversation)
    except ArgumentError as error:
        raise ArgumentError(f"/{name}: {error}") from None


def reset(conversation: Conversation) -> str:
    """Start anew: drop all messages but the system message."""
    conversation.reset()
    return "dropped all messages"


def sampler(conversation: Conversation, argument: str) -> str:
    """Set the sampler, as in "/sampler slowfast preset=fast k_max=4". Without an argument, show it."""
    if not argument:
        return _shown(sampler_to_dict(conversation.params.sampler))
    conversation.change(sampler=parse_sampler(from_words(argument)))
    return f"set the sampler: {argument}"


def cache(conversation: Conversation, argument: str) -> str:
    """Set the cache policy, as in "/cache region capacity=64". Without an argument, show it."""
    if not argument:
        return _shown(cache_to_dict(conversation.params.cache))
    conversation.change(cache=parse_cache(from_words(argument)))
    return f"set the cache policy: {argument}"


def set_numbers(conversation: Conversation, argument: str) -> str:
    """Set gen_length or seed of the next answer, as in "/set gen_length=64". Without an argument, show them."""
    numbers = from_words(argument, kind=False)
    check_options("the chat", numbers, {"gen_length", "seed"})
    conversation.change(**numbers)
    return _shown({"gen_length": conversation.params.gen_length, "seed": conversation.params.seed})


def save(conversation: Conversation, argument: str) -> str:
    """Write the messages to a file, as in "/save talk.jsonl": one JSON object per line."""
    require(bool(argument), "the file is missing")
    lines = [json.dumps(message, ensure_ascii=False) + "\n" for message in conversation.messages]
    try:
        with whole_file(Path(argument).expanduser()) as file:
            file.write("".join(lines).encode())
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: a null byte; RuntimeError: no home folder
        reason = getattr(error, "strerror", None) or error
        raise ArgumentError(f"file {argument!r} cannot be written: {reason}") from None
    return f"wrote {len(lines)} messages to {argument}"


def show_help(conversation: Conversation) -> str:
    """Show this list."""
    lines = [f"/{name:<8} {command.__doc__}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "A line that ends with \\ continues in the next. A message that starts with / gets two."])


def leave(conversation: Conversation) -> str:
    """End the chat."""
    raise EOFError


COMMANDS: dict[str, Callable[..., str]] = {
    "reset": reset,
    "sampler": sampler,
    "cache": cache,
    "set": set_numbers,
    "save": save,
    "help": show_help,
    "quit": leave,
}


def _shown(options: Mapping[str, Any]) -> str:
    """Return options as they are typed."""
    words = [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in options.items()]
    return " ".join(word.removeprefix("kind=") for word in words)
