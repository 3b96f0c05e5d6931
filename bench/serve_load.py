"""Load on a server of this package: clients that ask again and again for a while, and what they met with.

    python -m bench.serve_load --clients 8 --seconds 120 --out load.json            # starts a server of its own
    python -m bench.serve_load --url http://127.0.0.1:8000 --clients 8 --seconds 10  # asks one that runs

Prints one JSON object: requests, errors by kind, latency, tokens, and the server's resident memory along the way.
Only loopback is loaded.
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import torch

import sfs_triton

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("Ann", "Bob", "Kim", "Leo", "Mia", "Tom")
MAX_CLIENTS, MAX_SECONDS = 256, 600


@dataclass
class Tally:
    """What all clients met with."""

    seconds: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)  # seconds to the first text of streams
    errors: Counter = field(default_factory=Counter)
    refused: int = 0  # 429: asked again after Retry-After
    tokens: int = 0
    nfe: int = 0
    memory: list[tuple[float, int]] = field(default_factory=list)


def prompt(rng: random.Random) -> str:
    """A table to rewrite, of a random length."""
    rows = [f"{n},{rng.choice(NAMES)},{rng.randint(10, 99)}" for n in range(1, rng.randint(2, 6))]
    return "Rewrite as JSON:\nid,name,age\n" + "\n".join(rows)


async def ask(client: httpx.AsyncClient, options: argparse.Namespace, rng: random.Random, tally: Tally) -> None:
    """One request, streamed or not, counted."""
    stream = rng.random() < options.streams
    body = {"messages": [{"role": "user", "content": prompt(rng)}], "max_tokens": rng.choice(options.lengths)}
    body |= {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    body |= {"sampler": options.sampler, "cache": options.cache}
    began, usage = time.perf_counter(), None
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        if answer.status_code == 429:
            tally.refused += 1
            await asyncio.sleep(float(answer.headers["retry-after"]))
            return
        if answer.status_code != 200:
            tally.errors[str(answer.status_code)] += 1
            return
        if stream:
            usage = await read_stream(answer, began, tally)
        else:
            usage = json.loads(await answer.aread())["usage"]
    if usage is None:
        tally.errors["stream without an end"] += 1
        return
    tally.seconds.append(time.perf_counter() - began)
    tally.tokens += usage["completion_tokens"]
    tally.nfe += usage["nfe"]


async def read_stream(answer: httpx.Response, began: float, tally: Tally) -> dict | None:
    """The usage of a stream that came to its end."""
    usage, shown, done = None, False, False
    async for line in answer.aiter_lines():
        if line == "data: [DONE]":
            done = True
        elif line.startswith("data: "):
            chunk = json.loads(line[6:])
            if not shown and chunk.get("choices") and chunk["choices"][0]["delta"].get("content"):
                tally.first.append(time.perf_counter() - began)
                shown = True
            usage = chunk.get("usage") or usage
    return usage if done else None


async def one_client(client: httpx.AsyncClient, number: int, options, tally: Tally, end: float) -> None:
    rng = random.Random(options.seed + number)
    while time.perf_counter() < end:
        try:
            await ask(client, options, rng, tally)
        except (httpx.HTTPError, ValueError, KeyError) as error:
            tally.errors[type(error).__name__] += 1


async def watch_memory(client: httpx.AsyncClient, tally: Tally, every: float) -> None:
    began = time.perf_counter()
    while True:
        page = (await client.get("/metrics")).text
        bytes_ = next((float(line.split()[1]) for line in page.splitlines() if line.startswith(_RESIDENT)), 0)
        tally.memory.append((round(time.perf_counter() - began, 1), int(bytes_)))
        await asyncio.sleep(every)


_RESIDENT = "process_resident_memory_bytes"


async def load(url: str, options: argparse.Namespace) -> dict:
    """All clients at once, for as long as was asked."""
    headers = {"Authorization": f"Bearer {os.environ['SFS_API_KEY']}"} if os.environ.get("SFS_API_KEY") else {}
    limits = httpx.Limits(max_connections=options.clients + 1)
    tally = Tally()
    async with httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=120) as client:
        await ask(client, options, random.Random(0), Tally())  # warm
        watch = asyncio.create_task(watch_memory(client, tally, max(0.5, options.seconds / 24)))
        began = time.perf_counter()
        end = began + options.seconds
        await asyncio.gather(*(one_client(client, n, options, tally, end) for n in range(options.clients)))
        took = time.perf_counter() - began
        watch.cancel()
        page = (await client.get("/metrics")).text
    return report(options, tally, took, page)


def report(options: argparse.Namespace, tally: Tally, took: float, page: str) -> dict:
    values = {line.split()[0]: float(line.split()[1]) for line in page.splitlines() if line and line[0] != "#"}
    memory = [size for _, size in tally.memory]
    half = memory[len(memory) // 2 :]
    return {
        "clients": options.clients,
        "seconds": round(took, 2),
        "requests": len(tally.seconds),
        "requests_per_second": round(len(tally.seconds) / took, 2),
        "errors": sum(tally.errors.values()),
        "errors_by_kind": dict(tally.errors),
        "refused_429": tally.refused,
        "latency_s": quantiles(tally.seconds),
        "first_text_s": quantiles(tally.first),
        "tokens": tally.tokens,
        "tokens_per_second": round(tally.tokens / took, 1),
        "tokens_per_forward": round(tally.tokens / max(1, tally.nfe), 2),
        "rows_per_batch": round(values["sfs_batch_rows_sum"] / max(1, values["sfs_batch_rows_count"]), 2),
        "resident_mib": [[at, round(size / 2**20, 1)] for at, size in tally.memory],
        "resident_growth_second_half_mib": round((half[-1] - half[0]) / 2**20, 2) if half else None,
        "sampler": options.sampler,
        "cache": options.cache,
        "max_tokens": options.lengths,
        "share_streamed": options.streams,
        "model": options.model,
        "seed": options.seed,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "sfs_triton": sfs_triton.__version__,
        "commit": commit(),
    }


def quantiles(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    ordered = sorted(values)
    at = {name: ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)] for name, share in _SHARES}
    return {name: round(value, 4) for name, value in {**at, "mean": statistics.fmean(values)}.items()}


_SHARES = (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))


def commit() -> str | None:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or None


@contextmanager
def own_server(model: str):
    """A server of its own on a free port, stopped in the end as an operator would stop it."""
    command = [sys.executable, "-m", "sfs_triton.cli", "serve", "--model", model, "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stderr.readline()
            if " at http" not in line:
                sys.exit(f"error: the server did not start: {line}{process.stderr.read()}")
            url = line.split(" at ")[1].strip().removesuffix("/v1")
            for _ in range(200):
                try:
                    if httpx.get(url + "/ready").status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.05)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", help="of a server that runs; default: start one")
    parser.add_argument("--model", default="embedded", help="of the server that is started")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 64, 96], help="max_tokens to draw from")
    parser.add_argument("--streams", type=float, default=0.5, help="share of requests that stream")
    parser.add_argument("--sampler", default="slowfast")
    parser.add_argument("--cache", default="none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    if not (0 < options.clients <= MAX_CLIENTS and 0 < options.seconds <= MAX_SECONDS):
        parser.error(f"at most {MAX_CLIENTS} clients and {MAX_SECONDS} seconds")
    host = urlsplit(options.url).hostname if options.url else "127.0.0.1"
    if host != "localhost" and not (host and ipaddress.ip_address(host).is_loopback):
        parser.error(f"--url {options.url}: only loopback is loaded")
    return options


def main() -> None:
    options = arguments()
    if options.url:
        result = asyncio.run(load(options.url, options))
    else:
        with own_server(options.model) as url:
            result = asyncio.run(load(url, options))
    text = json.dumps(result, indent=1)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
