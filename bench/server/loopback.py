"""Servers of this package on loopback for those who load them: started, asked what they count, stopped."""

from __future__ import annotations

import ipaddress
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx
import torch

import sfs_triton
from bench import ROOT
from bench.common.figures import machine

NAMES = ("Ann", "Bob", "Kim", "Leo", "Mia", "Tom")
RESIDENT = "process_resident_memory_bytes"
_START, _STOP = 120.0, 60.0  # seconds that a server may take to start and to stop
_SHARES = (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))


@dataclass
class Server:
    """A server process. ``exit_code`` is there once it has been stopped, ``log`` is what it has said on stderr."""

    url: str
    pid: int
    log: str = ""
    exit_code: int | None = None


@contextmanager
def own_server(model: str, *options: str, environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    """A server of its own on a free port, stopped in the end as an operator would stop it; ``environment`` has
    variables beside those that there are."""
    command = [sys.executable, "-m", "sfs_triton.cli", "serve", "--model", model, "--port", "0", *options]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:  # a pipe that nobody reads would fill up
        with subprocess.Popen(command, cwd=ROOT, env={**os.environ, **(environment or {})}, stderr=log) as process:
            try:
                server = Server(_address(process, log), process.pid)
                yield server
            finally:
                process.terminate()
                try:
                    code = process.wait(_STOP)
                finally:
                    process.kill()
        server.log, server.exit_code = _read(log), code


def _address(process: subprocess.Popen, log) -> str:
    """Return the server's address, once it accepts requests."""
    deadline, url = time.monotonic() + _START, None
    while time.monotonic() < deadline and process.poll() is None:
        said = _read(log)
        if url is None and " at http" in said and said.endswith("\n"):
            url = said.split(" at ")[1].splitlines()[0].strip().removesuffix("/v1")
        try:
            if url is not None and httpx.get(url + "/ready").status_code == 200:
                return url
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    sys.exit(f"error: the server did not start: {_read(log)}")


def _read(log) -> str:
    return os.pread(log.fileno(), 1 << 20, 0).decode("utf-8", "replace")  # which does not move where it is written


def check_loopback(url: str | None) -> str | None:
    """Return the reason why a URL is not loaded (only loopback is); None if it is valid."""
    host = urlsplit(url).hostname if url else "127.0.0.1"
    try:
        fine = host == "localhost" or bool(host) and ipaddress.ip_address(host).is_loopback
    except ValueError:
        fine = False
    return None if fine else f"--url {url}: only loopback is loaded"


def table_prompt(rng: random.Random) -> str:
    """A table to rewrite, of a random length."""
    rows = [f"{n},{rng.choice(NAMES)},{rng.randint(10, 99)}" for n in range(1, rng.randint(2, 6))]
    return "Rewrite as JSON:\nid,name,age\n" + "\n".join(rows)


def counted(page: str) -> dict[str, float]:
    """A page of ``/metrics``: values by name, labels included."""
    pairs = (line.rsplit(" ", 1) for line in page.splitlines() if line and line[0] != "#")
    return {name: float(value) for name, value in pairs}


def quantiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    ordered = sorted(values)
    at = {name: ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)] for name, share in _SHARES}
    return {name: round(value, 4) for name, value in {**at, "mean": statistics.fmean(values)}.items()}


def environment() -> dict[str, str | None]:
    """Describe the environment of the run."""
    about = machine(torch.device("cpu"))
    return {
        "machine": f"{about['cpu']}, {about['cores']} cores",
        "torch": about["torch"],
        "sfs_triton": sfs_triton.__version__,
        "commit": _commit(),
    }


def _commit() -> str | None:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or None
