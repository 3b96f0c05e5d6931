"""Everything that can be measured without a GPU, in under a quarter of an hour: ``make bench-all``.

    python -m bench.all                          into bench/results/<machine>/<date>-<commit>/
    python -m bench.all --only table,sizes --out DIR

Each job is a process of its own, and one that fails does not end the others; the exit status is then 1. ``run.json``
says how each ended. What a GPU can show: ``python -m bench.gpu``.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from bench import ROOT
from bench.common.figures import machine
from bench.common.pages import replace_file

RESULTS = ROOT / "bench" / "results"
RAW = "benchmark.json"  # what pytest-benchmark writes, of which the figures are kept
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", f"--benchmark-json={{out}}/{RAW}")


class Job(NamedTuple):
    """Command line of a benchmark, without the interpreter; ``{out}`` is the folder of the results."""

    name: str
    does: str
    command: tuple[str, ...]
    limit: float = 600.0  # seconds


JOBS = (
    Job("table", "every sampler and cache, and the baselines", ("bench/throughput.py", "--json", "{out}/table.json")),
    Job(
        "sizes",
        "the same at other sizes: few-shot prompts, batches, an autoregressive model",
        (
            *("bench/throughput.py", "--geometry", "toy-512", "--prompt-length", "400", "--batch", "1,4"),
            *("--limit", "4", "--sampled-steps", "8", "--json", "{out}/sizes.json"),
        ),
    ),
    Job(
        "sweep",
        "accuracy against tokens a forward, on a few problems",
        (
            *("-m", "bench.quality.sweep", "--tasks", "records", "--limit", "8", "--most-steps", "8"),
            *("--json", "{out}/sweep.json"),
        ),
    ),
    Job(
        "cost-model",
        "what a step should cost at 8B",
        ("-m", "bench.cost.cost_model", "--json", "{out}/cost-model.json"),
    ),
    Job("speed", "eager execution beside plain PyTorch", (*PYTEST, "bench/test_speed.py")),
    Job("kernels", "every kernel against its twin, at toy sizes", (*PYTEST, "bench/kernels")),
    Job("suite", "the steps of the GPU suite, as toys, which leave no record", ("-m", "bench.gpu", "--toy")),
)


def folder_name(about: dict) -> str:
    """Format a machine's name as GPU folder names are formatted."""
    return re.sub(r"[^a-z0-9]+", "-", f"{about['cpu']} {about['cores']} cores".lower()).strip("-")


def start(job: Job, out: Path) -> dict:
    """Run a job; how it ended. Its output goes to the terminal."""
    command = [sys.executable, *(part.replace("{out}", str(out)) for part in job.command)]
    began = time.perf_counter()
    try:
        status = subprocess.run(command, cwd=ROOT, timeout=job.limit).returncode
    except subprocess.TimeoutExpired:
        status = None
    return {"job": job.name, "status": status, "seconds": round(time.perf_counter() - began, 1)}


def condense(raw: Path, to: Path) -> None:
    """Keep the figures of pytest-benchmark's file: the median in seconds per test, and the test's notes."""
    if not raw.exists():
        return
    found = json.loads(raw.read_text(encoding="utf-8"))["benchmarks"]
    lines = [{"test": b["name"], "median_s": b["stats"]["median"], **b["extra_info"]} for b in found]
    replace_file(to, "[\n" + ",\n".join(json.dumps(line) for line in lines) + "\n]\n")
    raw.unlink()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    names = [job.name for job in JOBS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"comma-separated; of {', '.join(names)}")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default bench/results/<machine>/<date>-<commit>")
    arguments = parser.parse_args(argv)
    wanted = arguments.only.split(",") if arguments.only else names
    unknown = [name for name in wanted if name not in names]
    if unknown:
        parser.error(f"--only {','.join(unknown)}: jobs are {', '.join(names)}")
    arguments.jobs = [job for job in JOBS if job.name in wanted]
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    about = machine(torch.device("cpu"))
    out = arguments.out or RESULTS / folder_name(about) / f"{time.strftime('%Y-%m-%d')}-{about['commit'] or 'unknown'}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        ended = []
        for job in arguments.jobs:
            print(f"\n{job.name}: {job.does}", flush=True)
            ended.append(start(job, out.resolve()))
            condense(out / RAW, out / f"{job.name}.json")
            record = {"machine": about, "date": time.strftime("%Y-%m-%d %H:%M"), "jobs": ended}
            replace_file(out / "run.json", json.dumps(record, indent=1) + "\n")
    except OSError as error:
        print(f"error: {out}: {error.strerror}", file=sys.stderr)
        return 2
    for end in ended:
        how = {0: "ok", None: "took too long"}.get(end["status"], f"failed with status {end['status']}")
        print(f"{end['job']:12} {end['seconds']:7.1f} s  {how}")
    print(f"wrote {out}")
    return int(any(end["status"] != 0 for end in ended))


if __name__ == "__main__":
    sys.exit(main())
