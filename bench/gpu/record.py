"""The record of a run on a GPU: JSON lines, each written at once, so that an interrupted run loses nothing.

A line says of which run and step it is, when it was written, and how it ended (:data:`STATUSES`). Most are of one part
of a step; the last of a step has no part. A ``begun`` line with no line after it names the part that was running.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = 1
STATUSES = ("begun", "ok", "failed", "crashed", "hung", "skipped", "late")
BAD = ("failed", "crashed", "hung")
TAIL = 3000  # characters of an output that are kept
AGAIN = 75  # exit status of a step's process: the parts that are left need another

# Environment variables that pass the run and the step to a step's process.
RECORD, RUN, STEP, DEADLINE, TOY = (f"SFS_GPU_{name}" for name in ("RECORD", "RUN", "STEP", "DEADLINE", "TOY"))


@dataclass(frozen=True)
class Log:
    """Writes the lines of one run, and reads them."""

    path: Path
    run: str

    def write(self, step: str, status: str, part: str | None = None, **values: Any) -> None:
        """Append a line, whole."""
        line = {"run": self.run, "step": step, "part": part, "status": status, "at": round(time.time(), 2), **values}
        data = (json.dumps(_plain(line), allow_nan=False) + "\n").encode()
        target = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(target, data)
        finally:
            os.close(target)

    def lines(self, step: str | None = None) -> list[dict[str, Any]]:
        """This run's lines so far, or those of a step."""
        return [line for line in read(self.path) if line["run"] == self.run and step in (None, line["step"])]


def _plain(value: Any) -> Any:
    """``value`` as JSON has it: numbers that are not finite become None, and what JSON does not know becomes text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, bool, int)) else str(value)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file. One that was cut off in the middle is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and {"run", "step", "status"} <= line.keys():
            lines.append(line)
    return lines


def ended(lines: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Map each part among the lines of a step, by name, to its ending."""
    return {line["part"]: line["status"] for line in lines if line["part"] and line["status"] != "begun"}


def under_way(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    """List the parts that started and did not end."""
    lines = list(lines)
    over = ended(lines)
    begun = (line["part"] for line in lines if line["part"] and line["status"] == "begun")
    return [part for part in dict.fromkeys(begun) if part not in over]


def tail(text: str) -> str:
    """The end of an output."""
    text = text.strip()
    return text if len(text) <= TAIL else "..." + text[-TAIL:]
