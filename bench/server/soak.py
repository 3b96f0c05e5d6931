"""Run mixed requests for a long time and check that the server's state is unchanged: ``make soak``.

    python -m bench.server.soak --minutes 30      # half an hour; writes a record below bench/results/
    python -m bench.server.soak --minutes 5 --out soak.json

Starts a server of its own on loopback. Clients ask for chats and completions, whole and streamed, with frames, stop
strings and gaps to fill in, with several samplers, caches, temperatures and lengths; some leave, some send invalid
requests, some ask for more than the time limit leaves time for. Once a minute all pause: with nothing to do, and with
the same few batches open each time, the server's resident memory is compared with what it was. Prints the findings; the
exit status is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np

from bench import ROOT
from bench.common.pages import replace_file

from .loopback import RESIDENT, Server, counted, environment, own_server, quantiles
from .soak_requests import CHAT, FIXED, Ask, any_of_all, garbage

RECORDS = ROOT / "bench" / "results" / "amd-epyc-2-cores"
MAX_BATCH, MAX_BATCHES, TIME_LIMIT = 8, 4, 15.0
SLOPE_BOUND = 0.5  # MiB a minute: a kilobyte or two for each request, less than its canvas and its text take
WARM_UP = 1 / 3  # of the time, after which memory must be flat
# Freed memory returns to the system at once, so that resident memory is held memory.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}
_GAUGES = ("sfs_running_sequences", "sfs_waiting_requests")
_LOOK = 10.0  # seconds between two looks at the memory under load
_REST = 60.0  # and between two at rest
_NO_HTTP = "WARNING:  Invalid HTTP request received."  # which the log says of garbage
_ENOUGH = 20  # failures that are printed in full


@dataclass
class SoakCounts:
    """Counts of all clients' outcomes."""

    outcomes: Counter = field(default_factory=Counter)  # by kind and outcome
    failures: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    minutes: Counter = field(default_factory=Counter)  # requests that were over in each
    compared: int = 0
    loaded: list[tuple[float, float]] = field(default_factory=list)  # seconds, and MiB that are resident
    rested: list[tuple[float, float]] = field(default_factory=list)

    def fail(self, text: str) -> None:
        self.outcomes["", "failure"] += 1
        if len(self.failures) < _ENOUGH:
            self.failures.append(text)


class Soak:
    """Clients of one server, and what they keep in mind."""

    def __init__(self, client: httpx.AsyncClient, options: argparse.Namespace):
        self.client, self.options, self.tally = client, options, SoakCounts()
        self.first: dict[int, dict] = {}  # first answer to each fixed request
        self.began = time.perf_counter()
        self._go, self._busy = asyncio.Event(), 0
        self._go.set()

    # ---------------------------------------------------------------------------------------------------- one request

    async def ask(self, ask: Ask, rng: random.Random) -> None:
        began = time.perf_counter()
        outcome = await self._garbage(rng) if ask.kind == "malformed" and rng.random() < 0.2 else None
        outcome = outcome or await self._request(ask, rng)
        took = time.perf_counter() - began
        self.tally.outcomes[ask.kind, outcome] += 1
        self.tally.minutes[int((time.perf_counter() - self.began) / 60)] += 1
        if outcome == "200" and ask.kind in ("whole", "streamed", "fixed"):
            self.tally.seconds.append(took)
        early = outcome == "time limit" and took < TIME_LIMIT
        if early or outcome not in (*_EXPECTED[ask.kind], _CHANGED):
            self.tally.fail(f"{ask.kind} {ask.path} {str(ask.body)[:200]}: {outcome} after {took:.1f} s")

    async def _request(self, ask: Ask, rng: random.Random) -> str:
        """Return the outcome: a status, or a substitute for it."""
        if ask.kind == "state":
            return str((await self.client.get(ask.path)).status_code)
        if ask.kind == "leaves" and not ask.body.get("stream"):
            return await self._impatient(ask, rng)
        content = ask.body if isinstance(ask.body, bytes) else json.dumps(ask.body).encode()
        how = {"content": content, "headers": {"Content-Type": "application/json"}}
        async with self.client.stream("POST", ask.path, **how) as response:
            if response.status_code == 429:
                await asyncio.sleep(float(response.headers["retry-after"]))
            if response.status_code != 200:
                return _refusal(response.status_code, await response.aread())
            if ask.kind == "leaves":
                return await self._leave(response, rng.randint(0, 12))
            if ask.body.get("stream"):
                return await _to_the_end(response)
            return self._whole(ask, json.loads(await response.aread()))

    async def _impatient(self, ask: Ask, rng: random.Random) -> str:
        try:
            response = await self.client.post(ask.path, json=ask.body, timeout=rng.uniform(0.02, 1.5))
        except httpx.TimeoutException:
            return "left"
        return str(response.status_code)

    async def _leave(self, response: httpx.Response, lines: int) -> str:
        async for _ in response.aiter_lines():
            lines -= 1
            if lines < 0:
                return "left"
        return "200"

    def _whole(self, ask: Ask, body: dict) -> str:
        (choice,) = body["choices"]
        usage = body["usage"]
        said = {"text": choice.get("text", choice.get("message")), "reason": choice["finish_reason"]}
        said |= {name: usage[name] for name in ("prompt_tokens", "completion_tokens", "nfe")}
        if ask.kind == "fixed":
            number = FIXED.index(ask)
            wanted = self.first.setdefault(number, said)
            self.tally.compared += 1
            if said != wanted:
                self.tally.fail(f"fixed request {number} was answered with {wanted}, and now with {said}")
                return _CHANGED
        return "200"

    async def _garbage(self, rng: random.Random) -> str:
        """Send bytes that are no request, then disconnect; return the outcome."""
        url = urlsplit(self.options.url)
        reader, writer = await asyncio.open_connection(url.hostname, url.port)
        try:
            writer.write(garbage(rng))
            await writer.drain()
            try:
                said = await asyncio.wait_for(reader.read(64), rng.uniform(0.05, 0.5))
            except (TimeoutError, asyncio.TimeoutError):
                return "hung up"
            return said.split(b" ")[1].decode() if said.startswith(b"HTTP/1.1 ") else "hung up"
        finally:
            writer.close()

    # ---------------------------------------------------------------------------------------------------- the whole

    async def one_client(self, number: int, end: float) -> None:
        rng = random.Random(self.options.seed + number)
        while time.perf_counter() < end:
            await self._go.wait()
            ask = any_of_all(rng)
            self._busy += 1
            try:
                await self.ask(ask, rng)
            except (httpx.HTTPError, OSError, ValueError, KeyError) as error:
                self.tally.fail(f"{ask.kind} {ask.path} {str(ask.body)[:200]}: {type(error).__name__}: {error}")
            finally:
                self._busy -= 1

    async def fixed_set(self) -> None:
        """All fixed requests, one after another, on their own."""
        for ask in FIXED:
            await self.ask(ask, random.Random(0))

    async def look(self) -> dict[str, float]:
        return counted((await self.client.get("/metrics")).text)

    async def resident(self) -> tuple[float, float]:
        """Now, and MiB."""
        values = await self.look()
        return round(time.perf_counter() - self.began, 1), round(values[RESIDENT] / 2**20, 2)

    async def watch(self) -> None:
        while True:
            self.tally.loaded.append(await self.resident())
            await asyncio.sleep(_LOOK)

    async def pause(self, end: float) -> None:
        """Once per minute, pause all clients until nothing runs, and measure the memory."""
        while time.perf_counter() + _REST < end:
            await asyncio.sleep(_REST)
            await self.rest()
        self._go.set()

    async def rest(self) -> None:
        self._go.clear()
        while self._busy:
            await asyncio.sleep(0.02)
        await self.at_rest()
        await self.fill(1, 8)  # which closes other batches, with caches of all sizes
        self.tally.rested.append(await self.resident())
        self._go.set()

    async def fill(self, each: int = MAX_BATCH, steps: int = 12) -> int:
        """Fill as many batches as the limit allows with ``each`` sequences; return how many had a slot at once."""
        kinds = [{"sampler": {"kind": "vanilla", "top_k": number}} for number in range(1, MAX_BATCHES + 1)]
        said = [{"role": "user", "content": "15,44,79,50"}]
        asks = [Ask("whole", CHAT, {"messages": said, "max_tokens": steps, **kind}) for kind in kinds * each]
        sent = [asyncio.create_task(self.ask(ask, random.Random(0))) for ask in asks]
        most = 0
        while not all(task.done() for task in sent):
            most = max(most, int((await self.look())["sfs_running_sequences"]))
            await asyncio.sleep(0.1)
        for task in sent:
            task.result()
        return most

    async def at_rest(self, seconds: float = 30.0) -> dict[str, float]:
        """Return the server's counters once nothing runs or waits, or after a timeout."""
        deadline = time.perf_counter() + seconds
        while True:
            values = await self.look()
            if not any(values[name] for name in _GAUGES) or time.perf_counter() > deadline:
                return values
            await asyncio.sleep(0.1)


_CHANGED = "another answer"  # than the first time, which is told of where it is found
_ANSWERS = {"200", "429", "time limit"}
_EXPECTED = {
    **dict.fromkeys(("whole", "streamed", "fixed", "late"), _ANSWERS),
    "leaves": _ANSWERS | {"left"},
    "malformed": {"400", "404", "413", "415", "429", "hung up"},
    "state": {"200"},
}


def _refusal(status: int, body: bytes) -> str:
    """A status, unless it is the time limit's; its body must have the shape of errors."""
    error = json.loads(body)["error"]
    return "time limit" if status == 504 and error["code"] == "time_limit" else str(status)


async def _to_the_end(response: httpx.Response) -> str:
    last = ""
    async for line in response.aiter_lines():
        last = line or last
    if last == "data: [DONE]":
        return "200"
    error = json.loads(last.removeprefix("data: ")).get("error", {})
    return "time limit" if error.get("code") == "time_limit" else f"a stream that ended with {last[:200]}"


async def run(server: Server, options: argparse.Namespace) -> dict:
    """Run the whole soak; return a record without the results known only when the server ends."""
    options.url = server.url
    limits = httpx.Limits(max_connections=options.clients + MAX_BATCH * MAX_BATCHES + 2)
    async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=120) as client:
        soak = Soak(client, options)
        await soak.fixed_set()
        slots = [await soak.fill()]
        soak.began = time.perf_counter()
        soak.tally.minutes.clear()
        watch = asyncio.create_task(soak.watch())
        end = soak.began + 60 * options.minutes
        await asyncio.gather(soak.pause(end), *(soak.one_client(number, end) for number in range(options.clients)))
        rest = await soak.at_rest()
        watch.cancel()
        slots.append(await soak.fill())
        await soak.fixed_set()
        rest = {**rest, **{name: value for name, value in (await soak.at_rest()).items() if name in _GAUGES}}
    return report(options, soak.tally, rest, slots)


def slope(samples: Sequence[tuple[float, float]], warm_up: float) -> tuple[float, float]:
    """MiB a minute after ``warm_up`` seconds by least squares, and half the width of its 95% interval as if samples
    were independent.

    Raises:
        ValueError: fewer than three samples are left.
    """
    there = [(seconds / 60, mib) for seconds, mib in samples if seconds >= warm_up]
    if len(there) < 3:
        raise ValueError(f"{len(there)} samples after {warm_up:g} s are too few for a slope")
    x, y = np.array(there).T
    x = x - x.mean()
    fitted = float(x @ y / (x @ x))
    spread = y - y.mean() - fitted * x
    error = float(np.sqrt(spread @ spread / (len(x) - 2) / (x @ x)))
    return fitted, 1.96 * error


def report(options: argparse.Namespace, tally: SoakCounts, rest: dict[str, float], slots: list[int]) -> dict:
    warm_up = 60 * options.minutes * WARM_UP
    fitted, half = slope(tally.rested, warm_up)
    kinds: dict[str, dict[str, int]] = {}
    for (kind, outcome), number in sorted(tally.outcomes.items()):
        if kind:
            kinds.setdefault(kind, {})[outcome] = number
    server_errors = sum(n for (_, outcome), n in tally.outcomes.items() if re.fullmatch(r"5\d\d", outcome))
    return {
        "date": date.today().isoformat(),
        "minutes": options.minutes,
        "clients": options.clients,
        "requests": sum(sum(of.values()) for of in kinds.values()),
        "outcomes": kinds,
        "server_errors": server_errors,
        "failures": tally.outcomes["", "failure"],
        "first_failures": tally.failures,
        "fixed_requests": len(FIXED),
        "fixed_compared": tally.compared - len(FIXED),
        "fixed_different": tally.outcomes["fixed", _CHANGED],
        "slots": MAX_BATCH * MAX_BATCHES,
        "slots_taken_first": slots[0],
        "slots_taken_last": slots[1],
        "running_at_end": int(rest[_GAUGES[0]]),
        "waiting_at_end": int(rest[_GAUGES[1]]),
        "sequences": int(rest["sfs_joined_sequences_total"]),
        "steps": int(rest["sfs_step_sequences_count"]),
        "sequences_per_step": round(rest["sfs_step_sequences_sum"] / rest["sfs_step_sequences_count"], 2),
        "tokens": int(rest["sfs_tokens_total"]),
        "latency_s": quantiles(tally.seconds),
        "requests_by_minute": [tally.minutes[minute] for minute in range(int(options.minutes))],
        "warm_up_minutes": round(warm_up / 60, 2),
        "slope_mib_per_minute": round(fitted, 4),
        "slope_interval": round(half, 4),
        "slope_bound": SLOPE_BOUND,
        "resident_at_rest_mib": tally.rested,
        "resident_under_load_mib": tally.loaded,
        "time_limit_s": TIME_LIMIT,
        "seed": options.seed,
        "load_averages": [options.load, [round(load, 1) for load in os.getloadavg()]],
        "note": options.note,
    }


def judge(record: dict) -> dict[str, bool]:
    """List the checks of a soak, each with its result."""
    return {
        "memory is flat": record["slope_mib_per_minute"] <= record["slope_bound"],
        "no sequence is stuck": record["running_at_end"] == record["waiting_at_end"] == 0,
        "no slot is lost": record["slots_taken_first"] == record["slots_taken_last"] == record["slots"],
        "no answer of the server's fault (5xx)": record["server_errors"] == 0,
        "fixed requests get the same answers": record["fixed_compared"] > 0 and record["fixed_different"] == 0,
        "everything else was as expected": record["failures"] == 0,
        "nothing in the log": record["log"] == "",
        "SIGTERM ends it with exit code 0": record["exit_code"] == 0,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--note", default="", help="what else the machine was doing, for the record")
    parser.add_argument("--out", type=Path, default=RECORDS / f"{date.today().isoformat()}-soak.json")
    options = parser.parse_args()
    if not (5 <= options.minutes <= 24 * 60 and 0 < options.clients <= 256):
        parser.error("5 minutes to a day, and 1 to 256 clients")
    if not options.out.parent.is_dir():
        parser.error(f"--out {options.out}: there is no folder {options.out.parent}")
    return options


def as_text(record: dict) -> str:
    """JSON with the samples' pairs on a line each."""
    text = json.dumps(record, indent=1, ensure_ascii=False)
    return re.sub(r"\[\s+([-\d.]+),\s+([-\d.]+)\s+\]", r"[\1, \2]", text) + "\n"


def main() -> int:
    options = arguments()
    options.load, where = [round(load, 1) for load in os.getloadavg()], environment()
    limits = {"--max-batch": MAX_BATCH, "--max-batches": MAX_BATCHES, "--time-limit": TIME_LIMIT}
    given = [str(word) for pair in limits.items() for word in pair]
    with own_server(options.model, *given, environment=_MALLOC) as server:
        record = asyncio.run(run(server, options))
    said = server.log.splitlines()[1:]  # after where it is
    told = [line for line in said if line != _NO_HTTP]
    record |= {
        **where,
        "log": "\n".join(told)[:4000],
        "log_no_http": len(said) - len(told),
        "environment": _MALLOC,
        "exit_code": server.exit_code,
    }
    record["checks"] = judge(record)
    replace_file(options.out, as_text(record))
    for name, fine in record["checks"].items():
        print(f"{'ok    ' if fine else 'FAILED'} {name}")
    for text in record["first_failures"]:
        print(f"  {text}")
    print(f"{record['requests']} requests; {record['slope_mib_per_minute']:+.3f} MiB a minute; {options.out}")
    return 0 if all(record["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
