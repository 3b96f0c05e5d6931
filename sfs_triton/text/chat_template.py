"""Rendering of untrusted chat templates: in jinja's sandbox, in a process with limits on memory and time.

The sandbox keeps a template from reaching anything outside of it, but not from running forever or exhausting memory,
and neither could be stopped in a thread of this process.
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
START_SECONDS = 60.0  # limit of the process start, on a busy machine
BYTES = 512 * 2**20  # of address space
CHARACTERS = 16 * 2**20  # of a rendered conversation: beyond any model's context

PROGRAM = Path(__file__).with_name("template_worker.py")
_RUN = "import sys, runpy; file, sys.path[:] = sys.argv[2], sys.argv[3:]; runpy.run_path(file, run_name='__main__')"


class TemplateError(SfsError):
    """A template failed or exceeded a limit."""


class Renderer:
    """Render conversations one after another, in a process started for the first of them. Thread-safe."""

    def __init__(self, seconds: float = SECONDS):
        self.seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """Render ``template`` to text; ``variables`` must be JSON values.

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
        reply = json.loads(answer)
        if "error" in reply:
            raise TemplateError(reply["error"])
        return reply["text"]

    def close(self) -> None:
        """End the process; the next conversation starts a new one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            with contextlib.suppress(OSError):  # from unread input
                process.stdin.close()
            process.stdout.close()

    def forget(self) -> None:
        """Drop the process without ending it: after a fork, where it still belongs to the parent."""
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
        """Send ``line`` to the process and return its next line; None, and the process ends, if none comes in time."""
        process = self._process
        limit = threading.Timer(seconds, process.kill)
        limit.daemon = True
        limit.start()
        answer = b""
        try:
            process.stdin.write(line)
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:  # it ended before reading all
            answer = b""
        finally:
            limit.cancel()
            if not answer.endswith(b"\n"):  # or interrupted, with an answer still to come
                self.close()
        return answer if answer.endswith(b"\n") else None


_renderer = Renderer()
render = _renderer.render
atexit.register(_renderer.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renderer.forget)
