"""A call with limits: in a copy of this process that may take only so much time and memory, and may crash."""

from __future__ import annotations

import os
import resource
import signal
import traceback
from collections.abc import Callable
from pathlib import Path

from sfs_triton import SfsError

SECONDS, ROOM = 20, 2**30  # what a hostile file of some kilobytes may cost


def confined(call: Callable[[], object], seconds: int = SECONDS, room: int = ROOM) -> str:
    """``"done"``, or the name of a documented error; else a description of the outcome.

    The copy has ``room`` bytes of address space more than it has now.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            _limit(seconds, room)
            os.write(write, _outcome(call).encode(errors="replace")[-60_000:])
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        outcome = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    return outcome or f"killed by {signal.Signals(os.WTERMSIG(status)).name} after at most {seconds} s"


def _limit(seconds: int, room: int) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)
    present = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (present + room, resource.RLIM_INFINITY))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a library that panics prints pages


def _outcome(call: Callable[[], object]) -> str:
    try:
        call()
    except SfsError as error:
        return type(error).__name__
    except BaseException:  # what must not happen is what this looks for
        return traceback.format_exc()
    return "done"
