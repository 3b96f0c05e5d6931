"""Choice of back end and execution where the user has asked for neither."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from ..distributed import Group
from ..errors import require
from ..models import ModelSpec
from . import verdict as verdicts
from .check import Request
from .verdict import Verdict

logger = logging.getLogger("sfs_triton")

COMMAND = (sys.executable, "-m", "sfs_triton.self_check")
ROOT = Path(__file__).resolve().parents[2]  # where the command finds the package
VARIABLE, MODES = "SFS_TRITON_CHECK", ("0", "1", "force")
LIMIT = 60.0  # seconds without a sign of life after which a check hangs; compiling one kernel takes far less
LONGEST = 300.0  # seconds of a whole check
_LATE = "was stopped: it took too long"
GAIN = 0.05  # by which Triton's steps must be faster
NOISE = 0.10  # spread of times beyond which a verdict is for this process only


class Choice(NamedTuple):
    """Back end and execution of an engine, None where nothing was asked for, and the reason for them. ``distrust``
    is called with the failure of a kernel that a check had found right, so that it is not chosen again."""

    backend: str | None
    cuda_graphs: bool | None
    reason: str
    distrust: Callable[[str], None] | None = None


def choose(spec: ModelSpec, device: torch.device, dtype: torch.dtype, quantization: str | None, group: Group) -> Choice:
    """Choose for an engine on a GPU: Triton in CUDA graphs if a check on this card speaks for it, else eager torch.

    The check runs in a process of its own, before the weights are there. Its verdict is stored; see
    docs/doctor.md. The environment variable ``SFS_TRITON_CHECK`` is ``1`` (default), ``0`` for torch without a check,
    or ``force`` for a new check.

    Raises:
        ArgumentError: the variable has another value.
    """
    mode, distrust = os.environ.get(VARIABLE, "1"), None
    require(mode in MODES, f"{VARIABLE}={mode!r} in the environment is not one of {MODES}")
    if group.size > 1:  # of all ranks alike, so that they agree
        found = Verdict.torch(f"tensor_parallel={group.size}: CUDA graphs hold no collectives")
    elif mode == "0":
        found = Verdict.torch(f"{VARIABLE}=0: no check")
    elif (missing := _missing(device)) is not None:
        found = Verdict.torch(missing)
    else:
        request = Request(spec, str(device), str(dtype).removeprefix("torch."), quantization)
        found = verdicts.obtain(request, run_check, force=mode == "force")
        distrust = partial(verdicts.distrust, request) if found.backend == "triton" else None
    log = logger.warning if found.fault else logger.info
    log("backend=%r, cuda_graphs=%r: %s", found.backend, found.cuda_graphs, found.reason)
    return Choice(found.backend, found.cuda_graphs, found.reason, distrust)


def _missing(device: torch.device) -> str | None:
    """Return why kernels cannot be compiled for the device at all, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type == "cuda" and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "TRITON_INTERPRET is set: kernels would be interpreted"
    return None


def run_check(request: Request, command: Sequence[str] = COMMAND, limit: float = LIMIT) -> Verdict:
    """Run the check in a child process, which a faulting kernel may take with it; return what follows from it."""
    # seen without any configuration of logs: somebody waits
    logger.warning("checking Triton kernels on %s: once per card, versions and model, a minute or two", request.device)
    began = time.monotonic()
    try:
        records, end = _records_of(request, command, limit)
    except OSError as error:
        return Verdict.torch(f"the check could not be started: {error}", fault=True, lasting=False)
    seconds = round(time.monotonic() - began, 1)
    found = [record for record in records if record["record"] in ("finding", "step", "times")]
    return _verdict_of(records, end, {"seconds": seconds, "findings": found})


def _records_of(request: Request, command: Sequence[str], limit: float) -> tuple[list[dict[str, Any]], str | None]:
    """Return the records of a child, and how it ended if not by itself."""
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryFile() as errors:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
        child = subprocess.Popen([*command], cwd=ROOT, **pipes)
        try:
            threading.Thread(target=_read_lines, args=(child.stdout, lines), daemon=True).start()
            _send(child.stdin, request.to_json())
            deadline = time.monotonic() + LONGEST
            while (line := lines.get(timeout=max(0.0, min(limit, deadline - time.monotonic())))) is not None:
                try:
                    records.append(json.loads(line))
                except ValueError:  # of a child that died in the middle of it
                    continue
            code = child.wait(timeout=limit)
        except (queue.Empty, subprocess.TimeoutExpired):
            return records, _LATE if time.monotonic() >= deadline else f"was stopped: no sign of life for {limit:g} s"
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
        if code == 0:
            return records, None
        errors.seek(0)
        last = (errors.read().decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        return records, f"{how}: {last[:300]}"


def _send(pipe: IO[bytes], text: str) -> None:
    try:
        with pipe:
            pipe.write(text.encode())
    except BrokenPipeError:  # the child has ended; its status says more
        pass


def _read_lines(pipe: IO[bytes], lines: queue.SimpleQueue[str | None]) -> None:
    try:
        for line in pipe:
            lines.put(line.decode(errors="replace"))
    except ValueError:  # closed: the child was stopped
        pass
    lines.put(None)


def _verdict_of(records: list[dict[str, Any]], end: str | None, rest: dict[str, Any]) -> Verdict:
    """Draw the conclusion from the records of a check."""
    doing = next((record["doing"] for record in reversed(records) if record["record"] == "start"), "its start")
    for record in records:
        if record["record"] == "finding" and record["fault"] is not None:
            what = f"{record['operation']} at {record['shape']}: {record['fault']}"
            return Verdict.torch(f"the check found a fault: {what}", fault=True, **rest)
        if record["record"] == "step" and record["fault"] is not None:
            what = f"whole steps with cache {record['cache']!r}: {record['fault']}"
            return Verdict.torch(f"the check found a fault: {what}", fault=True, **rest)
        if record["record"] == "error":
            text = f"the check ended during {doing}: {record['error']}"
            return Verdict.torch(text, fault=True, lasting=not record["memory"], **rest)
    if end == _LATE:
        text = f"the check took more than {LONGEST:g} s; the next is faster, since compiled kernels are kept"
        return Verdict.torch(text, fault=True, lasting=False, **rest)
    if end is not None or not any(record["record"] == "end" for record in records):
        return Verdict.torch(f"the check {end or 'ended early'}, during {doing}", fault=True, **rest)
    times = [record for record in records if record["record"] == "times"]
    eager, graphs = (sum(record[backend] for record in times) for backend in ("torch", "triton"))
    stable = all(record["spread"] <= NOISE for record in times)
    text = f"Triton passed the check, and its steps take {graphs / eager:.2f} of the time of torch's"
    rest["lasting"] = stable
    if graphs <= (1 - GAIN) * eager:
        return Verdict("triton", True, text, **rest)
    return Verdict.torch(f"{text}: less than {GAIN:.0%} is gained", **rest)
