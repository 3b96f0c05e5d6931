"""Verdict of a check, and the file that keeps it until the card, a version, the kernels or the geometry change."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from ..files import whole_file
from . import machine
from .check import Request

logger = logging.getLogger("sfs_triton")

FORMAT = 1
LOCK_WAIT = 60.0  # seconds
_UNSTORED = "the verdict of the check cannot be stored, so each process makes its own: %s"
_THIS_PROCESS: dict[str, Verdict] = {}  # verdicts that are in no file


@dataclass(frozen=True)
class Verdict:
    """Back end and execution for a card, and the reason.

    ``fault``: the check found something wrong, or could not end. ``lasting`` is False where another check may say
    something else: not stored. ``findings`` are the records of the check, for ``sfs doctor``.
    """

    backend: str
    cuda_graphs: bool
    reason: str
    fault: bool = False
    lasting: bool = True
    seconds: float = 0.0
    findings: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def torch(cls, reason: str, **rest: Any) -> Verdict:
        """The fall-back: plain torch, launched operation by operation."""
        return cls("torch", False, reason, **rest)


def key_of(request: Request) -> dict[str, Any]:
    """Return all that a verdict depends on."""
    spec = asdict(request.spec)
    sizes = {name: value for name, value in spec.items() if not name.endswith(("_id", "_ends"))}
    sizes["max_length"] = min(sizes["max_length"], 2 * request.sizes.canvas)  # no canvas of a check is longer
    return {
        "card": machine.card(torch.device(request.device)),
        "versions": machine.versions(),
        "compiler": machine.compiler(),  # a verdict without one must not outlast its installation
        "environment": machine.environment(),
        "geometry": sizes,
        "dtype": request.dtype,
        "quantization": request.quantization,
    }


def folder() -> Path:
    """Return the folder of verdict files."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sfs_triton" / "checks"


def obtain(request: Request, run: Callable[[Request], Verdict], force: bool = False) -> Verdict:
    """Return the stored verdict, or run the check and store what it says.

    One process at a time checks; one that does not get its turn in time goes on with torch. ``force`` ignores a stored
    verdict and the mark of a check that did not end.
    """
    key = json.loads(json.dumps(key_of(request)))  # as a file has it
    name = _name_of(key)
    if not force and name in _THIS_PROCESS:
        return _THIS_PROCESS[name]
    try:
        path = folder() / f"{name}.json"
        if not force and (stored := read(path, key)) is not None:
            return stored
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock"))
        lock.acquire(timeout=LOCK_WAIT)
    except Timeout:
        return Verdict.torch(f"another process has been checking this card for {LOCK_WAIT:g} s", lasting=False)
    except (OSError, RuntimeError, NotImplementedError) as error:  # no home, one without write access, or without locks
        logger.info(_UNSTORED, error)
        return _keep(name, run(request))
    try:
        stored = None if force else read(path, key)  # another process may have made it meanwhile
        return stored or _make(request, run, path, key, force)
    finally:
        lock.release()


def distrust(request: Request, failure: str) -> None:
    """Replace the stored verdict by torch's: a kernel has failed in use, and would again after each start."""
    key = json.loads(json.dumps(key_of(request)))
    name = _name_of(key)
    text = f"a kernel that had passed the check failed in use: {failure}"
    found = Verdict.torch(f"{text}; SFS_TRITON_CHECK=force checks again", fault=True)
    try:
        path = folder() / f"{name}.json"
        stored = read(path, key)
        write(path, key, found if stored is None else replace(found, findings=stored.findings))
        _THIS_PROCESS.pop(name, None)
    except (OSError, RuntimeError) as error:  # no home, or one without write access
        logger.info(_UNSTORED, error)
        _keep(name, found)


def _name_of(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def _make(request: Request, run: Callable[[Request], Verdict], path: Path, key: dict[str, Any], force: bool) -> Verdict:
    """Run the check and store its verdict. While it runs there is a mark: a fault can take the machine down, and would
    do so again at each start."""
    mark = path.with_suffix(".trying")
    if mark.exists() and not force:
        logger.warning("the mark of the check that did not end is %s", mark)
        text = f"a check took the machine or its own process down ({_first_line(mark)})"
        return Verdict.torch(f"{text}; SFS_TRITON_CHECK=force tries again", fault=True)
    try:
        with whole_file(mark) as file:
            file.write(f"process {os.getpid()}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
    except OSError as error:
        logger.info(_UNSTORED, error)
        return _keep(path.stem, run(request))
    try:
        verdict = run(request)
    finally:
        mark.unlink(missing_ok=True)
    if not verdict.lasting:
        return _keep(path.stem, verdict)
    try:
        write(path, key, verdict)
    except OSError as error:
        logger.info(_UNSTORED, error)
        _keep(path.stem, verdict)
    return verdict


def _keep(name: str, verdict: Verdict) -> Verdict:
    """Keep a verdict for this process only."""
    _THIS_PROCESS[name] = verdict
    return verdict


def read(path: Path, key: dict[str, Any]) -> Verdict | None:
    """Return the verdict of a file, or None: it is missing, unreadable, of another format or for another key."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT or found["key"] != key:
            return None
        verdict = Verdict(**found["verdict"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    pairs = (verdict.backend, verdict.cuda_graphs) in (("torch", False), ("triton", True))
    typed = isinstance(verdict.reason, str) and isinstance(verdict.findings, list)
    return verdict if pairs and typed and isinstance(verdict.fault, bool) else None


def write(path: Path, key: dict[str, Any], verdict: Verdict) -> None:
    """Store a verdict with its key; raise OSError if that is impossible."""
    text = json.dumps({"format": FORMAT, "key": key, "verdict": asdict(replace(verdict, lasting=True))}, indent=1)
    with whole_file(path) as file:
        file.write(text.encode())


def _first_line(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").partition("\n")[0][:80]
    except OSError:
        return "unreadable"
