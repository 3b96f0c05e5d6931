"""Measure options of the region cache and of the delayed cache, on the embedded model: accuracy, steps, positions.

    python -m bench.quality.policies --limit 200 --json bench/results/policies.json
    python -m bench.quality.policies --json bench/results/policies.json --write-doc docs/sweep.md

The first line measures; the second puts the tables into a page, between its markers.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

import sfs_triton
from bench.common import pages
from bench.common.figures import machine
from bench.embedded import problems, tasks
from sfs_triton import DelayedCache, MultiBlock, NoCache, RefreshCache, RegionCache, SlowFast, Threshold

from . import measured
from .measured import GEN_LENGTH, Variant, decode


def variants() -> list[Variant]:
    """List each option alone with its counterpart without it, at three sizes of the position list."""
    paper = SlowFast()
    lines = [
        Variant("whole canvas", "none", paper, NoCache()),
        Variant("whole canvas", "refresh", paper, RefreshCache()),
        Variant("region, C = 128", "as it is", paper, RegionCache()),
    ]
    for capacity in (64, 32):
        base = RegionCache(capacity=capacity)
        half = capacity // 2
        options = {
            "as it is": (paper, base),
            "no rotation": (paper, RegionCache(capacity=capacity, rotate=False)),
            f"span_cap {half}": (paper, RegionCache(capacity=capacity, span_cap=half)),
            f"span_cap {half}, look_ahead {half}": (
                paper,
                RegionCache(capacity=capacity, span_cap=half, look_ahead=half),
            ),
            "refresh_every 8": (paper, RegionCache(capacity=capacity, refresh_every=8)),
            "refresh_every 4": (paper, RegionCache(capacity=capacity, refresh_every=4)),
            "share_stable": (paper.replace(share_stable=True), base),
            "tau_slow 0.85": (paper.replace(tau_slow=0.85), base),
            "eos_stop": (paper.replace(eos_stop=True), base),
            "eos_stop, eos_horizon off": (paper.replace(eos_stop=True, eos_horizon=False), base),
        }
        lines += [Variant(f"region, C = {capacity}", label, *option) for label, option in options.items()]
    for group, sampler in (("preset fast", SlowFast.preset("fast")), ("Threshold", Threshold())):
        lines.append(Variant(group, "none", sampler, NoCache()))
        lines += [Variant(group, f"region, C = {c}", sampler, RegionCache(capacity=c)) for c in (128, 64)]
    group, sampler = "MultiBlock, blocks of 16", MultiBlock(entropy=0.2, block_length=16)
    lines.append(Variant(group, "none", sampler, NoCache()))
    lines += [Variant(group, f"delayed, delay {d}", sampler, DelayedCache(delay=d)) for d in (0, 1, 2, 4)]
    return lines


def measure(engine: sfs_triton.Engine, variant: Variant, chosen: list[tasks.Problem], exact: list[list[int]]) -> dict:
    """Decode every problem; ``exact`` are the responses of the same sampler without a cache, where known."""
    done = decode(engine, variant, chosen)
    n = len(done)
    right = [tasks.correct(p, d.text) for p, d in zip(chosen, done, strict=True)]
    same = sum(d.tokens == wanted for d, wanted in zip(done, exact, strict=True))
    return {
        "group": variant.group,
        "label": variant.label,
        **measured.count(right),
        "same_as_none": same / n,
        "nfe": sum(d.nfe for d in done) / n,
        "tokens": sum(len(d.tokens) for d in done) / n,
        "positions_forwarded": sum(d.positions_forwarded for d in done) / n,
        "full_forwards": sum(d.full_forwards for d in done) / n,
    }


def run(limit: int, kinds: list[str], path: Path) -> None:
    """Measure all variants on all tasks; results are saved after every line and not measured again."""
    engine = sfs_triton.load("embedded", "cpu", "float32")
    record = {"machine": machine(engine.model.device), "model": "embedded", "gen_length": GEN_LENGTH, "lines": []}
    if path.exists():
        record = measured.read(path, limit)
    for kind in kinds:
        chosen = measured.choose(engine, kind, limit)
        exact: dict[str, list[list[int]]] = {}  # of each sampler without a cache
        for variant in measured.missing(record, kind, variants()):
            key = type(variant.sampler).__name__
            if key not in exact:
                plain = Variant("", "", SlowFast() if key == "SlowFast" else variant.sampler, NoCache())
                exact[key] = [d.tokens for d in decode(engine, plain, chosen)]
            line = {"task": kind, **measure(engine, variant, chosen, exact[key])}
            print(json.dumps(line), flush=True)
            measured.keep(record, line, path)


def tables(record: dict) -> str:
    """Markdown tables of a record, one a task."""
    pieces = []
    for kind in dict.fromkeys(line["task"] for line in record["lines"]):
        lines = [line for line in record["lines"] if line["task"] == kind]
        pieces.append(f"**{kind}**, {lines[0]['n']} held-out problems:\n")
        pieces.append("| | option | right (95%) | as without a cache | NFE | full forwards | positions forwarded |")
        pieces.append("|---|---|---|---|---|---|---|")
        group = None
        for line in lines:
            low, high = line["interval"]
            share = line["correct"] / line["n"]
            first = line["group"] if line["group"] != group else ""
            group = line["group"]
            pieces.append(
                f"| {first} | {line['label']} | {share:.1%} ({low:.0%}-{high:.0%}) | {line['same_as_none']:.0%} "
                f"| {line['nfe']:.2f} | {line['full_forwards']:.2f} | {line['positions_forwarded']:.0f} |"
            )
        pieces.append("")
    return "\n".join(pieces)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=200, help="problems a task")
    parser.add_argument("--tasks", default="records,words")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--write-doc", type=Path, metavar="PAGE", help="write the tables of --json; measure nothing")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    if arguments.threads < 1:
        parser.error(f"--threads {arguments.threads} is not positive")
    torch.set_num_threads(arguments.threads)
    if arguments.write_doc:
        record = measured.read(arguments.json)
        pages.write_doc(arguments.write_doc, "policies", lambda: tables(record))
        return 0
    for kind in arguments.tasks.split(","):
        if kind not in problems.DIFFICULTY:
            parser.error(f"--tasks {kind!r} is not one of {tuple(problems.DIFFICULTY)}")
    if arguments.limit < 1:
        parser.error(f"--limit {arguments.limit} is not positive")
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    run(arguments.limit, arguments.tasks.split(","), arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
