"""Processes with a limit: in a group of their own, watched for signs of life, and ended with all that they started."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

POLL = 0.1
GRACE = 3.0  # seconds between asking a group to end and ending it
DEAD_WITHIN = 10.0  # a process in the middle of a call into a driver that hangs may never die


class Ended(NamedTuple):
    """Ending of a process: ``"exit"``, ``"limit"`` (its time was over) or ``"stall"`` (no sign of life for too long);
    its exit status, negative for a signal, None if it did not die; and its output."""

    how: str
    returncode: int | None
    seconds: float
    output: str


def run(
    command: Sequence[str],
    *,
    limit: float,
    stall: float,
    output: Path,
    environment: Mapping[str, str],
    folder: Path,
    life: Callable[[], int] = lambda: 0,
) -> Ended:
    """Run ``command`` for at most ``limit`` seconds.

    Args:
        stall: it is ended after so many seconds in which it printed nothing and ``life`` returned the same.
        output: what it prints is appended here.
    """
    before = output.stat().st_size if output.exists() else 0
    began = time.monotonic()
    with output.open("ab") as sink:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            cwd=folder,
            start_new_session=True,
        )
    how = "stall"  # unless the loop below finds otherwise
    try:
        how = _watch(process, began + limit, stall, lambda: (output.stat().st_size, life()))
    finally:
        returncode = end_group(process)
    with output.open("rb") as told:
        told.seek(before)
        text = told.read().decode(errors="replace")
    return Ended(how, returncode, time.monotonic() - began, text)


def _watch(process: subprocess.Popen, deadline: float, stall: float, sign: Callable[[], tuple]) -> str:
    last, since = sign(), time.monotonic()
    while process.poll() is None:
        now = time.monotonic()
        if now > deadline:
            return "limit"
        if now > since + stall:
            return "stall"
        time.sleep(POLL)
        if (seen := sign()) != last:
            last, since = seen, time.monotonic()
    return "exit"


def end_group(process: subprocess.Popen) -> int | None:
    """End a process and all that it started; its exit status, None if it does not die."""
    if process.poll() is None:
        _signal(process.pid, signal.SIGTERM)
        _wait(process, GRACE)
    _signal(process.pid, signal.SIGKILL)  # whatever it has left running, too
    _wait(process, DEAD_WITHIN)
    return process.poll()


def _signal(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        pass  # nobody is left


def _wait(process: subprocess.Popen, seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        pass
