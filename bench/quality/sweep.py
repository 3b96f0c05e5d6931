"""Accuracy under parallelism: tokens per forward of each sampler, and their cost in correct answers.

    python -m bench.quality.sweep --limit 500 --json bench/results/sweep.json
    python -m bench.quality.sweep --json bench/results/sweep.json --write-doc docs/sweep.md

The first line measures: an interrupted run resumes where it stopped. The second puts tables into a page, between its
markers, and pictures beside it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import sfs_triton
from bench.common import pages
from bench.common.figures import machine
from bench.embedded import tasks
from bench.embedded.carried import carried
from sfs_triton import (
    KLASS,
    WINO,
    Credit,
    DualCache,
    EntropyBound,
    FixedSteps,
    Hierarchy,
    LocalLeap,
    MultiBlock,
    NoCache,
    PrefixCache,
    RegionCache,
    SlowFast,
    Threshold,
)

from . import measured, sweep_chart, sweep_summary
from .measured import Variant

Check = Callable[[tasks.Problem, str], bool]  # whether an answer is right
TASKS: dict[str, tuple[str, Check]] = {  # kind of problems, and their check
    "records": ("records", tasks.correct),
    "carried": ("words", carried),
}


def variants(most_steps: int = 32) -> list[Variant]:
    """Each sampler at several values of the setting that trades accuracy for speed, and caches at some of them.

    ``most_steps`` leaves out larger values of ``FixedSteps(steps=)``, whose time grows with them.
    """
    paper, fast, llada = (SlowFast.preset(name) for name in ("paper", "fast", "llada-reference"))
    lines: list[Variant] = []

    def add(group: str, setting: str, values: tuple, make: Callable[..., sfs_triton.Sampler], cache=None) -> None:
        for value in values:
            lines.append(Variant(group, f"{setting} {value:g}", make(value), cache or NoCache()))

    def high(tau: float) -> SlowFast:
        return paper.replace(tau_high=tau)

    def both(preset: SlowFast) -> Callable[[float], SlowFast]:
        return lambda tau: preset.replace(tau_high=tau, tau_slow=tau)

    def blocks(tau: float) -> Threshold:
        return Threshold(tau=tau, block_length=32)

    steps = tuple(count for count in (1, 2, 3, 4, 6, 8, 16, 32, 64, 128) if count <= most_steps)
    add("SlowFast paper", "tau_high", (0.1, 0.3, 0.5, 0.85, 0.99), high)
    add("SlowFast fast", "tau", (0.05, 0.1, 0.3, 0.5, 0.7, 0.85, 0.95, 0.99), both(fast))
    add("SlowFast llada-reference", "tau", (0.1, 0.5, 0.9), both(llada))
    add("Threshold, blocks of 32", "tau", (0.1, 0.3, 0.5, 0.9, 0.99), blocks)
    add("Threshold, one block", "tau", (0.05, 0.1, 0.5, 0.9, 0.99), lambda t: Threshold(tau=t, block_length=None))
    add("FixedSteps, one block", "steps", steps, lambda n: FixedSteps(steps=n))
    in_blocks = tuple(count for count in steps if count in (4, 8, 16, 32, 64, 128))
    add("FixedSteps, blocks of 32", "steps", in_blocks, lambda n: FixedSteps(steps=n, block_length=32))
    add("MultiBlock", "entropy", (0.1, 0.3, 0.5, 1.0), lambda entropy: MultiBlock(entropy=entropy))
    add("LocalLeap", "tau", (0.6, 0.9, 0.99), lambda tau: LocalLeap(tau=tau, tau_near=0.8 * tau))
    add("EntropyBound", "bound", (0.01, 0.1, 0.5, 1.0), lambda bound: EntropyBound(bound=bound))
    add("Hierarchy", "tau", (0.6, 0.92, 0.99), lambda tau: Hierarchy(tau=tau, tau_low=tau - 0.3))
    add("Credit", "tau", (0.6, 0.9, 0.99), lambda tau: Credit(tau=tau))
    add("KLASS", "tau", (0.6, 0.9, 0.99), lambda tau: KLASS(tau=tau))
    add("WINO", "tau", (0.5, 0.6, 0.8), lambda tau: WINO(tau=tau))
    alone = {"tau_slow": (0.85,), "tau_min": (0.3, 0.6), "k_max": (1, 2, 4)}
    lines.append(Variant(sweep_summary.ALONE, "share_stable", paper.replace(share_stable=True), NoCache()))
    for name, values in alone.items():
        add(sweep_summary.ALONE, name, values, lambda value, name=name: paper.replace(**{name: value}))
    add("SlowFast paper, region", "tau_high", (0.5, 0.85), high, RegionCache())
    add("SlowFast fast, region", "tau", (0.5, 0.85), both(fast), RegionCache())
    for cache in (PrefixCache(), DualCache(), RegionCache()):
        add(f"Threshold, blocks of 32, {cache.name}", "tau", (0.5, 0.9), blocks, cache)
    return lines


def measure(
    engine: sfs_triton.Engine,
    variant: Variant,
    chosen: list[tasks.Problem],
    check: Callable[[tasks.Problem, str], bool],
) -> dict:
    """Decode every problem. ``right``, ``tokens`` and ``nfe`` are by problem, in the order of ``chosen``."""
    done = measured.decode(engine, variant, chosen)
    right = [check(p, d.text) for p, d in zip(chosen, done, strict=True)]
    return {
        "group": variant.group,
        "label": variant.label,
        **measured.count(right),
        "full_forwards": sum(d.full_forwards for d in done) / len(done),
        "positions_forwarded": sum(d.positions_forwarded for d in done) / len(done),
        "right": "".join("01"[r] for r in right),
        "tokens": [len(d.tokens) for d in done],
        "nfe": [d.nfe for d in done],
    }


def run(arguments: argparse.Namespace) -> None:
    """Measure what the record lacks; results are saved after every line."""
    engine = sfs_triton.load(arguments.model, arguments.device, arguments.dtype)
    engine.codec(f"--model {arguments.model}: a set of problems")
    agreed = {"model": arguments.model, "dtype": arguments.dtype}
    fixed = {"gen_length": measured.GEN_LENGTH, "seed": measured.SEED}
    record = {"machine": machine(engine.model.device), **agreed, **fixed, "lines": []}
    if arguments.json.exists():
        record = measured.read(arguments.json, arguments.limit, **agreed)
    for task in arguments.tasks.split(","):
        kind, check = TASKS[task]
        chosen = measured.choose(engine, kind, arguments.limit)
        for variant in measured.missing(record, task, variants(arguments.most_steps)):
            line = {"task": task, **measure(engine, variant, chosen, check)}
            measured.keep(record, line, arguments.json)
            pace = sum(line["tokens"]) / sum(line["nfe"])
            print(
                f"{task}: {variant.group}, {variant.label}: {line['correct']} right, {pace:.2f} a forward", flush=True
            )


def write_doc(record: dict, page: Path) -> None:
    """Tables between the page's markers, pictures beside it."""
    found = sweep_summary.summaries(record)
    pages.write_doc(page, "sweep", lambda: sweep_summary.tables(found))
    sweep_chart.draw_accuracy(found, page.with_name(f"{page.stem}-accuracy.png"))
    sweep_chart.draw_aup(found, page.with_name(f"{page.stem}-aup.png"))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="checkpoint folder, hub id, or 'embedded'")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--limit", type=int, default=500, help="problems a task")
    parser.add_argument("--tasks", default=",".join(TASKS), help=f"comma-separated, of {tuple(TASKS)}")
    parser.add_argument("--most-steps", type=int, default=32, help="largest FixedSteps(steps=); 128 takes an hour")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--write-doc", type=Path, metavar="PAGE", help="write the tables of --json; measure nothing")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    for name in ("limit", "most_steps", "threads"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(arguments, name)} is not positive")
    for task in arguments.tasks.split(","):
        if task not in TASKS:
            parser.error(f"--tasks {task!r} is not one of {tuple(TASKS)}")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    if arguments.write_doc:
        write_doc(measured.read(arguments.json), arguments.write_doc)
        return 0
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    try:
        run(arguments)
    except (sfs_triton.SfsError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
