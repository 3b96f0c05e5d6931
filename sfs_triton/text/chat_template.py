"""Chat templates of strangers, rendered with limits: in jinja's sandbox, in a process with little memory and time.

The sandbox keeps a template from reaching anything outside of it, but not from running forever or from filling the
memory, and in a thread of this process neither could be stopped.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from multiprocessing.spawn import get_executable
from pathlib import Path
from typing import Any

from ..errors import SfsError

SECONDS = 5.0  # a conversation takes milliseconds
START_SECONDS = 60.0  # that the process may take to start, on a machine that is busy
BYTES = 512 * 2**20  # of address space
CHARACTERS = 16 * 2**20  # of a rendered conversation, more than any model has room for

PROGRAM = Path(__file__).with_name("template_worker.py")
_RUN = "import sys, runpy; file, sys.path[:] = sys.argv[2], sys.argv[3:]; runpy.run_path(file, run_name='__main__')"


class TemplateError(SfsError):
    """A template failed, or broke a limit."""


class Renderer:
    """Renders conversations one after another, in a process that starts with the first of them. Safe in threads."""

    def __init__(self, seconds: float = SECONDS):
        self.seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """The text of ``template``; ``variables`` are what JSON can hold.

        Raises:
            TemplateError: the template failed; or it took more than ``seconds``, :data:`BYTES` or :data:`CHARACTERS`.
        """
        try:
            asked = json.dumps({"source": template, "variables": dict(variables), "most": CHARACTERS})
        except (TypeError, ValueError, RecursionError) as error:
            raise TemplateError(f"it can be given nothing but what JSON holds: {error}") from None
        line = asked.encode() + b"\n"
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            answer = self._ask(line, self.seconds)
        if answer is None:
            raise TemplateError(f"it took more than {self.seconds:g} s or {BYTES >> 20} MiB, or crashed")
        told = json.loads(answer)
        if "error" in told:
            raise TemplateError(told["error"])
        return told["text"]

    def close(self) -> None:
        """End the process; the next conversation starts another."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            with contextlib.suppress(OSError):  # of what it did not read
                process.stdin.close()
            process.stdout.close()

    def forget(self) -> None:
        """Leave the process to whom it belongs: in a copy of this one, which has neither its lock nor its turn."""
        self._lock, self._process = threading.Lock(), None

    def _start(self) -> None:
        self.close()
        command = [get_executable(), "-S", "-B", "-c", _RUN, str(BYTES), str(PROGRAM), *map(str, sys.path)]
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        except (OSError, TypeError, ValueError) as error:
            raise TemplateError(f"no process to render it can be started: {error}") from None
        if self._ask(b"", START_SECONDS) is None:
            raise TemplateError("the process to render it does not start")

    def _ask(self, line: bytes, seconds: float) -> bytes | None:
        """The process' next line after it was sent ``line``; None where there is none in time, and the process ends."""
        process = self._process
        limit = threading.Timer(seconds, process.kill)
        limit.daemon = True
        limit.start()
        answer = b""
        try:
            process.stdin.write(line)
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:  # it ended before it had read all
            answer = b""
        finally:
            limit.cancel()
            if not answer.endswith(b"\n"):  # or this was interrupted, and its answer is still to come
                self.close()
        return answer if answer.endswith(b"\n") else None


_renderer = Renderer()
render = _renderer.render
atexit.register(_renderer.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renderer.forget)
