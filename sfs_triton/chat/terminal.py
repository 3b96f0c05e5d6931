"""Chat in a terminal or a pipe. Answers go to stdout, everything else to stderr."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress

from ..decoding.params import sampler_kind
from ..engine import Frame
from ..errors import SfsError
from ..view.printable import printable
from . import commands
from .conversation import Conversation

LONGEST_ERROR = 1000  # characters: errors may quote a whole message


def run(conversation: Conversation, model: str, watch: bool = False) -> int:
    """Read and answer messages until the input ends. Return the exit code: 2 if a line of a pipe was refused.

    Args:
        model: name of the model, to be shown.
        watch: show the canvas on stderr while an answer is decoded.
    """
    typed, refused = sys.stdin.isatty(), False
    sys.stdin.reconfigure(errors="surrogateescape")  # a message that is not valid text is refused, not the end
    if typed:
        with suppress(ImportError):  # a Python without it has no line editing
            import readline  # noqa: F401  gives input() line editing and a history
        params, room = conversation.params, conversation.engine.spec.max_length
        how = f"{sampler_kind(params.sampler)}, cache {params.cache.name}"
        _note(f"{model}: {how}, {params.gen_length} of {room} positions per answer")
        _note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends the chat")
    while True:
        try:
            line = _read("> " if typed and sys.stdout.isatty() else "")
            if line.startswith("/") and not line.startswith("//"):
                _note(commands.run(conversation, line))
            elif line.strip():
                _answer(conversation, line.removeprefix("/"), watch)
        except EOFError:
            if typed:
                _note("")
            return 2 if refused else 0
        except KeyboardInterrupt:
            if not typed:
                return 128 + signal.SIGINT
            _note("\ninterrupted; an unfinished answer is not kept. /quit ends the chat")
        except (SfsError, RuntimeError, MemoryError) as error:  # torch raises the latter two: the chat continues
            refused = not typed
            text = " ".join(str(error).split()) or type(error).__name__
            half = LONGEST_ERROR // 2
            _note("error: " + (text if len(text) <= LONGEST_ERROR else f"{text[:half]} ... {text[-half:]}"))


def _read(prompt: str) -> str:
    """Read a message; a backslash at the end of a line continues it."""
    line = input(prompt)
    while line.endswith("\\"):
        line = line[:-1] + "\n" + input(prompt and "... ")
    return line


def _answer(conversation: Conversation, message: str, watch: bool) -> None:
    """Print the answer to a message: on a terminal as it is decoded, else when it is complete."""
    live, whole, steps = sys.stdout.isatty() and not watch, "", conversation.answer(message)
    try:
        with _noting_interrupts() as pressed, closing(steps), _canvas(conversation, watch) as see:
            for text, frame in steps:
                whole += text
                if live:
                    print(printable(text), end="", flush=True)
                if frame is not None:
                    see(frame)
                    if pressed:
                        raise KeyboardInterrupt
    finally:
        if live:
            print(flush=True)
    if not live:
        print(printable(whole), flush=True)
    made = conversation.last
    _note(
        f"NFE {made.nfe} | TPF {made.tokens_per_forward:.2f} | {len(made.tokens) / max(made.seconds, 1e-9):,.1f} "
        f"tokens/s | {made.prompt_length + len(made.tokens)} of {conversation.engine.spec.max_length} positions"
    )


def _canvas(conversation: Conversation, watch: bool) -> AbstractContextManager[Callable[[Frame], None]]:
    """Return the view of the canvas, or nothing in its place."""
    if not watch:
        return nullcontext(lambda frame: None)
    from ..view.canvas import Watcher

    params = conversation.params
    return Watcher(conversation.engine, params.sampler, params.gen_length, title="sfs chat")


@contextmanager
def _noting_interrupts() -> Iterator[list[int]]:
    """Note the first Ctrl-C, so that the step that runs is completed; a second one raises as usual."""
    pressed: list[int] = []

    def note(number: int, _: object) -> None:
        pressed.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else: ignored, or the program's own
    if usual:
        signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        if usual:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _note(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)
