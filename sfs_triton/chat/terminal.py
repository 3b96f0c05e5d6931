"""Chat in a terminal or a pipe: read lines, show answers as they are decoded, handle Ctrl-C.

Answers go to stdout, everything else to stderr. All text of models, files and errors is made printable first.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from ..errors import ArgumentError, SfsError, require
from ..scheduling.outputs import Frame
from ..view.printable import printable, printable_json
from .commands import label, parse, perform, summary
from .conversation import Chat, Turn

try:
    import readline
except ImportError:  # a Python without readline: no line editing
    readline = None

LONGEST_ERROR = 1000
LARGEST_MESSAGE = 16 * 2**20  # bytes or characters: more than any context holds


class InputHistory:
    """History of typed lines, recalled with the arrow keys, and appended to the file ``path`` if it is given."""

    def __init__(self, path: Path | None):
        self.path = path
        if path is None:
            return
        try:
            require(path.is_file() or not path.exists(), f"--history {str(path)!r} is not a file")
            os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600))
            lines = path.read_text(encoding="utf-8").splitlines()
        except ArgumentError:
            raise
        except (OSError, ValueError) as error:
            raise self._unusable(error) from None
        for line in lines if readline is not None else ():
            readline.add_history(printable(line))

    def add(self, line: str) -> None:
        """Add a line.

        Raises:
            ArgumentError: the file cannot be written. It is not tried again.
        """
        if self.path is None:
            return
        try:
            with self.path.open("a", encoding="utf-8", errors="replace") as file:
                file.write(line + "\n")
        except OSError as error:
            failure, self.path = self._unusable(error), None
            raise failure from None

    def _unusable(self, error: Exception) -> ArgumentError:
        return ArgumentError(f"--history {str(self.path)!r} cannot be used: {getattr(error, 'strerror', 0) or error}")


class Interrupts:
    """Ctrl-C handler for a generation: the first stops it after the step, a second within the step is raised."""

    def __init__(self):
        self.noted = False

    def _note(self, *_: object) -> None:
        if self.noted:
            raise KeyboardInterrupt
        self.noted = True

    @contextmanager
    def heard(self) -> Iterator[None]:
        before = signal.getsignal(signal.SIGINT)
        interrupted = threading.current_thread() is threading.main_thread()
        if not interrupted or before in (signal.SIG_IGN, None):  # None: a handler that Python cannot put back
            yield
            return
        signal.signal(signal.SIGINT, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


class ChatTerminal:
    """Front end of a conversation: runs until its input ends."""

    def __init__(
        self,
        chat: Chat,
        *,
        model: str,
        as_json: bool = False,
        watch: bool = False,
        delay: float = 0.03,
        history: InputHistory | None = None,
    ):
        self.chat, self.model, self.as_json, self.watch, self.delay = chat, model, as_json, watch, delay
        self._history = InputHistory(None) if history is None else history
        self._typed = sys.stdin.isatty()
        self._edited = self._typed and sys.stdout.isatty()  # readline writes to stdout
        self._live = sys.stdout.isatty() and not as_json
        self._failed = False

    def run(self) -> int:
        """Read and answer until the input ends. Return the exit code: 2 if any input from a pipe was refused."""
        if self._typed:
            settings, room = self.chat.settings, self.chat.engine.spec.max_length
            how = label(settings.sampler, settings.cache)
            self._note(f"{self.model}: {how}, {settings.gen_length} of {room} positions an answer")
            self._note("/help lists commands; Ctrl-C stops an answer, Ctrl-D leaves")
        presses = 0
        while True:
            try:
                if not self._next():
                    break
                presses = 0
            except KeyboardInterrupt:
                presses += 1
                if not self._typed or presses > 1:
                    self._note("")
                    return 0 if self._typed else 128 + signal.SIGINT
                self._note("\nCtrl-C again, or Ctrl-D, leaves")
        return 2 if self._failed and not self._typed else 0

    def _next(self) -> bool:
        """Read and process a message or command. Return whether to continue."""
        try:
            text = self._read()
            if text is None:
                return False
            action = parse(text)
            if action.name == "quit":
                return False
            if action.name == "watch":
                self._set_watch(action.value)
            elif action.name in ("say", "retry"):
                self._turn(lambda: self.chat.retry() if action.name == "retry" else self.chat.say(action.value))
            else:
                self._note(perform(self.chat, action))
        except SfsError as error:
            self._failed = True
            self._note("error: " + _one_line(error))
        except (RuntimeError, ArithmeticError, MemoryError) as error:  # raised by torch: keep the conversation
            if not self._typed:
                raise
            self._note(f"error: {type(error).__name__}: {_one_line(error)}; the conversation goes on")
        return True

    # Input

    def _read(self) -> str | None:
        """Read a message; a backslash at a line's end continues it. Return None at the end of the input."""
        lines, size = [], 0
        while True:
            line = self._line("... " if lines else "> ")
            size += len(line or "")
            if line is None:
                return "\n".join(lines) if lines else None
            if not lines and not line.strip():
                continue
            if self._typed:
                self._record(line)
            if not line.endswith("\\"):
                require(size <= LARGEST_MESSAGE, f"this message is longer than {LARGEST_MESSAGE:,} characters")
                return "\n".join([*lines, line])
            if size <= LARGEST_MESSAGE:  # the rest of a longer one is read and discarded
                lines.append(line[:-1])

    def _record(self, line: str) -> None:
        try:
            self._history.add(line)
        except ArgumentError as error:
            self._note("error: " + _one_line(error))

    def _line(self, prompt: str) -> str | None:
        try:
            if self._edited:
                return input(prompt)
            if self._typed:
                _write(sys.stderr, prompt)
            line = sys.stdin.buffer.readline(LARGEST_MESSAGE + 1)
            if len(line) > LARGEST_MESSAGE:
                while line and not line.endswith(b"\n"):
                    line = sys.stdin.buffer.readline(LARGEST_MESSAGE)
                raise ArgumentError(f"this line is longer than {LARGEST_MESSAGE:,} bytes")
            return line.decode(sys.stdin.encoding).rstrip("\r\n") if line else None
        except EOFError:
            self._note("")
            return None
        except UnicodeError as error:
            raise ArgumentError(f"this line is not valid text: {error}") from None

    # Output

    def _turn(self, begin: Callable[[], Turn]) -> None:
        """Show the answer to a message. If it is stopped or fails, the conversation is unchanged."""
        try:
            with begin() as turn:
                if turn.forgotten:
                    count = f"{turn.forgotten} oldest exchange" + ("" if turn.forgotten == 1 else "s")
                    self._note(f"{turn.over} tokens over: forgets the {count}")
                stopped = self._follow(turn)
        except SfsError as error:
            if self.as_json:
                _write(sys.stdout, printable_json({"error": _one_line(error)}) + "\n")
            raise
        if not stopped:
            self._note(summary(turn.answer.generation, self.chat.engine.spec.max_length))
            return
        if not self._typed:
            raise KeyboardInterrupt
        if self.as_json:
            _write(sys.stdout, printable_json({"error": f"stopped after step {turn.steps}"}) + "\n")
        self._note(f"stopped after step {turn.steps}; the unfinished answer is not kept in the history")

    def _follow(self, turn: Turn) -> bool:
        """Show the frames of an answer in progress, then the answer. Return whether Ctrl-C stopped it."""
        interrupts, told = Interrupts(), ""
        with interrupts.heard():
            try:
                with self._watcher(turn) as watch:
                    for frame in turn:
                        if watch is not None:
                            watch(frame)
                        elif self._live:
                            _write(sys.stdout, printable(turn.text[len(told) :]))
                            told = turn.text
                        if interrupts.noted:
                            break
            except KeyboardInterrupt:
                pass
            finally:
                if turn.answer is None and told:
                    _write(sys.stdout, "\n")
            if turn.answer is None:
                return True
            said = {"model": self.model, **turn.answer.as_dict()}
            text = printable_json(said) if self.as_json else printable(turn.text[len(told) :])
            _write(sys.stdout, text + "\n")
        return False

    @contextmanager
    def _watcher(self, turn: Turn) -> Iterator[Callable[[Frame], None] | None]:
        if not self.watch:
            yield None
            return
        from ..view.canvas import Watcher

        settings = turn.settings
        title = f"sfs: {label(settings.sampler, settings.cache)}"
        watcher = Watcher(self.chat.engine, settings.sampler, settings.gen_length, delay=self.delay, title=title)
        with watcher:
            yield watcher

    def _set_watch(self, wanted: bool | None) -> None:
        if wanted:
            from ..view import canvas as render  # noqa: F401  names the extra if rich is missing
        if wanted is not None:
            self.watch = wanted
        self._note(f"watch {'on' if self.watch else 'off'}")

    def _note(self, text: str) -> None:
        _write(sys.stderr, printable(text) + "\n")


def _write(stream: TextIO, text: str) -> None:
    """Write and flush; characters that the stream's encoding lacks become question marks."""
    encoding = stream.encoding or "utf-8"
    stream.write(text.encode(encoding, "replace").decode(encoding))
    stream.flush()


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= LONGEST_ERROR else text[: LONGEST_ERROR - 3] + "..."
