"""Run the parts of a step's process, one after another, each with a line in the record.

A part that fails does not end the step. Where it leaves the GPU in a state in which no later result can be trusted,
the process ends with ``AGAIN``, and its parent starts another for the parts that are left.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .record import AGAIN, BAD, DEADLINE, RECORD, RUN, STEP, TOY, Log, ended, tail

if TYPE_CHECKING:
    import torch  # at run time where it is needed: to find that no part is left does not take seconds

SPARE = 3.0  # seconds before the deadline at which no part is begun any more

Part = Callable[[], Mapping[str, Any] | None]


class Skip(Exception):
    """A part cannot be done here; says why."""


class Incomplete(Exception):
    """A part failed, but not before it found ``values``."""

    def __init__(self, values: Mapping[str, Any], cause: BaseException):
        super().__init__(str(cause))
        self.values, self.__cause__ = dict(values), cause


def is_toy() -> bool:
    """Return True if the step only has to show that it runs."""
    return os.environ.get(TOY) == "1"


def device() -> torch.device:
    """Return the device of the step."""
    import torch

    return torch.device("cpu") if is_toy() else torch.device("cuda", torch.cuda.current_device())


def run(parts: Mapping[str, Part]) -> int:
    """Run the parts that this run's record does not have yet; the exit status.

    The environment says where the record is, and when the step's time is over: parts that are left then are ``late``.
    """
    step, log, deadline = os.environ[STEP], here(), float(os.environ[DEADLINE])
    if is_toy():
        import torch

        torch.set_num_threads(1)
    over = ended(log.lines(step))
    for name, work in parts.items():
        if name in over:
            continue
        if time.time() > deadline - SPARE:
            log.write(step, "late", name)
            continue
        log.write(step, "begun", name)
        began = time.perf_counter()
        status, values = attempt(work)
        log.write(step, status, name, part_seconds=round(time.perf_counter() - began, 2), **values)
        print(f"{step}: {name}: {status} {values.get('error', '')[-300:]}", flush=True)
        if status == "failed" and not gpu_is_well():
            return AGAIN
    return int(any(status in BAD for status in ended(log.lines(step)).values()))


def here() -> Log:
    """The record that this process writes to."""
    return Log(Path(os.environ[RECORD]), os.environ[RUN])


def attempt(work: Part) -> tuple[str, dict[str, Any]]:
    """Run a part; return its status and its findings."""
    try:
        return "ok", dict(work() or {})
    except Skip as reason:
        return "skipped", {"reason": str(reason)}
    except Incomplete as part:
        return "failed", {**part.values, "error": _told(part.__cause__)}
    except Exception as error:
        return "failed", {"error": _told(error)}


def _told(error: BaseException) -> str:
    return tail("".join(traceback.format_exception(error)))


def gpu_is_well() -> bool:
    """Return True if the GPU, and torch's state for it, are as they were before a part."""
    import torch

    if is_toy() or not torch.cuda.is_available():
        return True
    try:
        current = torch.cuda.current_stream()
        if torch.cuda.is_current_stream_capturing() or current != torch.cuda.default_stream():
            return False  # a capture that failed leaves its own stream current
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return bool((torch.ones(8, device="cuda") * 2).sum().item() == 16)
    except RuntimeError:
        return False
