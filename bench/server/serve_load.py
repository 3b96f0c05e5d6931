"""Load on a server of this package: clients that ask again and again for a while, and what they met with.

    python -m bench.server.serve_load --clients 8 --seconds 120 --out load.json            # starts a server of its own
    python -m bench.server.serve_load --url http://127.0.0.1:8000 --clients 8 --seconds 10  # asks one that runs

Prints one JSON object: requests, errors by kind, latency, tokens, and the server's resident memory along the way.
Only loopback is loaded.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from bench.common.pages import replace_file

from .loopback import RESIDENT, check_loopback, counted, environment, own_server, quantiles, table_prompt

MAX_CLIENTS, MAX_SECONDS = 256, 600


@dataclass
class LoadCounts:
    """Counts of all clients' outcomes."""

    seconds: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)  # seconds to the first text of streams
    errors: Counter = field(default_factory=Counter)
    refused: int = 0  # 429: asked again after Retry-After
    tokens: int = 0
    nfe: int = 0
    memory: list[tuple[float, int]] = field(default_factory=list)


async def ask(client: httpx.AsyncClient, options: argparse.Namespace, rng: random.Random, tally: LoadCounts) -> None:
    """One request, streamed or not, counted."""
    stream = rng.random() < options.streams
    body = {"messages": [{"role": "user", "content": table_prompt(rng)}], "max_tokens": rng.choice(options.lengths)}
    body |= {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    body |= {"sampler": options.sampler, "cache": options.cache}
    if options.mixed:
        body["temperature"] = round(rng.uniform(0.2, 1.2), 2)
        body["sampler"] = {"kind": "slowfast", "tau_min": rng.uniform(0.1, 0.5), "tau_high": rng.uniform(0.6, 0.99)}
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


async def read_stream(answer: httpx.Response, began: float, tally: LoadCounts) -> dict | None:
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


async def one_client(client: httpx.AsyncClient, number: int, options, tally: LoadCounts, end: float) -> None:
    rng = random.Random(options.seed + number)
    while time.perf_counter() < end:
        try:
            await ask(client, options, rng, tally)
        except (httpx.HTTPError, ValueError, KeyError) as error:
            tally.errors[type(error).__name__] += 1


async def watch_memory(client: httpx.AsyncClient, tally: LoadCounts, every: float) -> None:
    began = time.perf_counter()
    while True:
        page = (await client.get("/metrics")).text
        tally.memory.append((round(time.perf_counter() - began, 1), int(counted(page)[RESIDENT])))
        await asyncio.sleep(every)


async def load(url: str, options: argparse.Namespace) -> dict:
    """All clients at once, for as long as was asked."""
    headers = {"Authorization": f"Bearer {os.environ['SFS_API_KEY']}"} if os.environ.get("SFS_API_KEY") else {}
    limits = httpx.Limits(max_connections=options.clients + 1)
    tally = LoadCounts()
    async with httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=120) as client:
        await ask(client, options, random.Random(0), LoadCounts())  # warm
        watch = asyncio.create_task(watch_memory(client, tally, max(0.5, options.seconds / 24)))
        began = time.perf_counter()
        end = began + options.seconds
        await asyncio.gather(*(one_client(client, n, options, tally, end) for n in range(options.clients)))
        took = time.perf_counter() - began
        watch.cancel()
        page = (await client.get("/metrics")).text
    return report(options, tally, took, page)


def report(options: argparse.Namespace, tally: LoadCounts, took: float, page: str) -> dict:
    values = counted(page)
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
        "sequences_per_step": round(values["sfs_step_sequences_sum"] / max(1, values["sfs_step_sequences_count"]), 2),
        "resident_mib": [[at, round(size / 2**20, 1)] for at, size in tally.memory],
        "resident_growth_second_half_mib": round((half[-1] - half[0]) / 2**20, 2) if half else None,
        "sampler": options.sampler,
        "mixed": options.mixed,
        "cache": options.cache,
        "max_tokens": options.lengths,
        "share_streamed": options.streams,
        "model": options.model,
        "seed": options.seed,
        **environment(),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", help="of a server that runs; default: start one")
    parser.add_argument("--model", default="embedded", help="of the server that is started")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 64, 96], help="max_tokens to draw from")
    parser.add_argument("--streams", type=float, default=0.5, help="share of requests that stream")
    parser.add_argument("--sampler", default="slowfast")
    parser.add_argument("--mixed", action="store_true", help="slowfast, at a temperature and thresholds of each's own")
    parser.add_argument("--cache", default="none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    if not (0 < options.clients <= MAX_CLIENTS and 0 < options.seconds <= MAX_SECONDS):
        parser.error(f"at most {MAX_CLIENTS} clients and {MAX_SECONDS} seconds")
    if options.mixed and options.sampler != "slowfast":
        parser.error("--mixed goes with --sampler slowfast")
    if (wrong := check_loopback(options.url)) is not None:
        parser.error(wrong)
    return options


def main() -> None:
    options = arguments()
    if options.url:
        result = asyncio.run(load(options.url, options))
    else:
        with own_server(options.model) as server:
            result = asyncio.run(load(server.url, options))
    text = json.dumps(result, indent=1)
    if options.out:
        replace_file(options.out, text + "\n")
    print(text)


if __name__ == "__main__":
    main()
