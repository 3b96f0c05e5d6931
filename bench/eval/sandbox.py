"""Runs programs that a model has written, each in a process of its own with limits.

What holds: processor and wall time, address space, file sizes and an empty environment, anywhere; on Linux with
Landlock (5.13, and 6.7 for TCP) also no writing outside a temporary folder, no new programs, no TCP. Elsewhere Python
itself refuses those, which stops accidents and not ill will. Reading is not restricted. So: run it in a container if
the programs come from someone you do not trust.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

INSIDE = Path(__file__).with_name("inside.py")
START = 20.0  # seconds that a loaded machine may take to start Python


@dataclass(frozen=True)
class Limits:
    """Limits of one program: seconds (wall time; CPU time gets one more), bytes of address space, bytes of a file."""

    seconds: float = 3.0
    memory: int = 1 << 30
    file: int = 1 << 20


@dataclass(frozen=True)
class Verdict:
    """``why`` is "passed", "timed out", "ended early", or the name of the exception. ``landlock`` is the version of the
    kernel's own confinement that held; 0: none."""

    passed: bool
    why: str
    landlock: int


def run(program: str, limits: Limits | None = None) -> Verdict:
    """Run ``program`` and say whether it came to its end without an exception.

    Raises:
        OSError: the process could not be confined, so nothing was run.
    """
    limits = limits or Limits()
    nonce = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="sfs-eval-", ignore_cleanup_errors=True) as root:
        order = {"program": program, "nonce": nonce, "root": root, "seconds": limits.seconds}
        order |= {"memory": limits.memory, "file": limits.file}
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(INSIDE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=root,
            env={"PATH": os.defpath, "HOME": root, "TMPDIR": root, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            said, complaint = process.communicate(json.dumps(order).encode(), timeout=limits.seconds + START)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said, complaint = process.communicate()
    lines = [line.split() for line in said.decode(errors="replace").splitlines() if line.startswith(nonce)]
    if not lines:
        raise OSError(f"the sandbox did not start: {complaint.decode(errors='replace').strip()[-500:]}")
    landlock = int(lines[0][2])
    if len(lines) > 1:
        return Verdict(lines[1][1] == "passed", lines[1][1], landlock)
    late = process.returncode in (-signal.SIGALRM, -signal.SIGXCPU, -signal.SIGKILL)
    return Verdict(False, "timed out" if late else "ended early", landlock)
