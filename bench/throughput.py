"""The main benchmark: vanilla decoding beside the parallel samplers, on problems whose answers can be checked.

    python bench/throughput.py                                   the embedded model, records task, under three minutes
    python bench/throughput.py --samplers vanilla,slowfast --limit 100 --json run.json
    python bench/throughput.py --cache none,region --batch 4
    python bench/throughput.py --model GSAI-ML/LLaDA-8B-Instruct --prompts questions.jsonl

Every row runs in one process, batch by batch in turn, ``--batch`` prompts at a time (one unless asked for). Tokens are
response tokens up to and including the end-of-text, counted the same way for all.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from rich.console import Console  # noqa: E402
from rich.progress import Progress  # noqa: E402
from rich.table import Table  # noqa: E402

import sfs_triton  # noqa: E402
from bench import chart  # noqa: E402
from bench.embedded import problems, tasks  # noqa: E402
from bench.figures import machine, wilson_interval  # noqa: E402
from sfs_triton.loops.choose import LOOPS  # noqa: E402

RESULTS = ROOT / "bench" / "results"


@dataclass(frozen=True)
class Row:
    """One line of the table: a sampler with its cache."""

    sampler: str
    label: str
    settings: sfs_triton.Sampler
    caches: tuple[str, ...]


def rows_for(gen_length: int) -> tuple[Row, ...]:
    """The samplers that are compared; blocks are 32 positions where a response has a multiple of them."""
    block = 32 if gen_length % 32 == 0 else gen_length
    return (
        Row("vanilla", "one token a step", sfs_triton.FixedSteps(), ("none",)),
        Row("semi-autoregressive", f"blocks of {block}", sfs_triton.FixedSteps(block_length=block), ("none",)),
        Row("threshold", "tau 0.9", sfs_triton.Threshold(block_length=block), ("none", "prefix", "dual", "region")),
        Row("slowfast", "paper", sfs_triton.SlowFast(), ("none", "refresh", "region")),
    )


@dataclass
class Tally:
    """What a row has done so far."""

    row: Row
    cache: str
    seconds: list[float] = field(default_factory=list)  # of each batch
    rates: list[float] = field(default_factory=list)  # tokens/s of each
    paces: list[float] = field(default_factory=list)  # seconds a step of each
    nfe: int = 0
    tokens: int = 0
    rows_forwarded: int = 0
    full_forwards: int = 0
    correct: int = 0
    checked: int = 0
    generations: int = 0

    def add(self, batch: list[sfs_triton.Generation], seconds: float, correct: list[bool | None]) -> None:
        """Count a batch; ``correct`` has None where nobody knows the answer."""
        self.seconds.append(seconds)
        self.rates.append(sum(len(done.tokens) for done in batch) / seconds)
        self.paces.append(seconds / max(done.nfe for done in batch))
        self.nfe += sum(done.nfe for done in batch)
        self.tokens += sum(len(done.tokens) for done in batch)
        self.rows_forwarded += sum(done.rows_forwarded for done in batch)
        self.full_forwards += sum(done.full_forwards for done in batch)
        self.generations += len(batch)
        known = [right for right in correct if right is not None]
        self.checked += len(known)
        self.correct += sum(known)

    def summary(self, vanilla_rate: float | None, loop: str) -> dict:
        """Counts as means, speeds as medians over the generations, so that a hiccup of the machine does not show."""
        rate = statistics.median(self.rates)
        low, high = wilson_interval(self.correct, self.checked)
        return {
            "sampler": self.row.sampler,
            "preset": getattr(self.row.settings, "name", None),
            "label": self.row.label,
            "cache": self.cache,
            "loop": loop,
            "nfe": self.nfe / self.generations,
            "tpf": self.tokens / self.nfe,
            "tokens_per_second": rate,
            "speedup": rate / vanilla_rate if vanilla_rate else None,
            "ms_per_forward": 1e3 * statistics.median(self.paces),
            "accuracy": self.correct / self.checked if self.checked else None,
            "accuracy_low": low if self.checked else None,
            "accuracy_high": high if self.checked else None,
            "correct": self.correct,
            "checked": self.checked,
            "generations": self.generations,
            "tokens": self.tokens,
            "rows_forwarded": self.rows_forwarded / self.generations,
            "full_forwards": self.full_forwards / self.generations,
            "seconds": sum(self.seconds),
        }


@dataclass
class Work:
    """The prompts of a run and, where known, what a right answer is."""

    name: str
    prompts: list[str]
    known: list[tasks.Problem | None] = field(default_factory=list)


def read_work(arguments: argparse.Namespace, engine: sfs_triton.Engine) -> Work:
    """The problems that ``--prompts`` names, or the lines of a JSONL file: ``{"prompt": ..., "answer": optional}``."""
    name = arguments.prompts
    if name in problems.DIFFICULTY:
        length = min(engine.spec.max_length, 2 * arguments.gen_length)
        chosen = problems.held_out(
            name, arguments.limit, engine.text, seed=arguments.seed, gen_length=arguments.gen_length, max_length=length
        )
        return Work(name, [p.question for p in chosen], list(chosen))
    path = Path(name)
    if not path.is_file():
        raise SystemExit(f"error: --prompts {name!r} is neither one of {tuple(problems.DIFFICULTY)} nor a file")
    work = Work(path.stem, [])
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()[: arguments.limit], 1):
        try:
            entry = json.loads(line)
            prompt, answer = entry["prompt"], entry.get("answer")
            if not isinstance(prompt, str) or not isinstance(answer, (str, type(None))):
                raise TypeError("'prompt' and 'answer' are text")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise SystemExit(f"error: {path}:{number}: not an object with a 'prompt': {error}") from None
        work.prompts.append(prompt)
        work.known.append(None if answer is None else tasks.Problem("exact", prompt, answer, prompt))
    if not work.prompts:
        raise SystemExit(f"error: {path} holds no prompt")
    return work


def select(arguments: argparse.Namespace) -> list[Tally]:
    """The rows that ``--samplers`` and ``--cache`` leave."""
    rows = rows_for(arguments.gen_length)
    names = [row.sampler for row in rows]
    wanted = arguments.samplers.split(",") if arguments.samplers else names
    for name in wanted:
        if name not in names:
            raise SystemExit(f"error: --samplers {name!r} is not one of {names}")
    known = {cache for row in rows for cache in row.caches}
    caches = [name.strip() for name in arguments.cache.split(",")] if arguments.cache else sorted(known)
    for name in caches:
        if name not in known:
            raise SystemExit(f"error: --cache {name!r} is not one of {sorted(known)}")
    tallies = []
    for row in rows:
        if row.sampler in wanted:
            tallies += [Tally(row, cache) for cache in row.caches if cache in caches]
    if not tallies:
        raise SystemExit(f"error: --cache {arguments.cache!r} leaves no row of {wanted}")
    return tallies


def measure(
    engine: sfs_triton.Engine, work: Work, tallies: list[Tally], gen_length: int, batch: int, console: Console
) -> None:
    """Run every row on every batch of prompts, row after row within a batch, after one warm-up each."""
    for tally in tallies:
        warm = work.prompts[:batch]
        engine.generate(warm, gen_length=gen_length, cache=tally.cache, sampler=tally.row.settings)
    with Progress(console=console, transient=True) as progress:
        total = progress.add_task("decoding", total=len(work.prompts) * len(tallies))
        for at in range(0, len(work.prompts), batch):
            prompts, known = work.prompts[at : at + batch], work.known[at : at + batch]
            for tally in tallies:
                progress.update(total, description=f"{tally.row.sampler}, cache {tally.cache}")
                began = time.perf_counter()
                done = engine.generate(prompts, gen_length=gen_length, sampler=tally.row.settings, cache=tally.cache)
                seconds = time.perf_counter() - began
                pairs = zip(known, done, strict=True)
                tally.add(done, seconds, [None if k is None else tasks.correct(k, d.text or "") for k, d in pairs])
                progress.advance(total, len(prompts))


def show(record: dict, console: Console) -> None:
    """Print the table."""
    where = record["machine"]["gpu"] or f"{record['machine']['cpu']}, {record['machine']['threads']} threads"
    table = Table(
        title=f"{record['model']}, {record['prompts']} x {record['problems']}, "
        f"gen_length {record['gen_length']}, batch {record['batch']}, loop {record['loop']}; {where}",
        title_justify="left",
    )
    for name in ("sampler", "cache"):
        table.add_column(name)
    for name in ("tokens/s", "speed-up", "NFE", "TPF", "ms/step", "full forwards", "rows forwarded", "accuracy (95%)"):
        table.add_column(name, justify="right")
    for row in record["rows"]:
        accuracy = (
            ""
            if row["accuracy"] is None
            else (f"{row['accuracy']:.1%} ({row['accuracy_low']:.0%}-{row['accuracy_high']:.0%})")
        )
        table.add_row(
            f"{row['sampler']} ({row['label']})",
            row["cache"],
            f"{row['tokens_per_second']:.1f}",
            "" if row["speedup"] is None else f"{row['speedup']:.2f}x",
            f"{row['nfe']:.1f}",
            f"{row['tpf']:.2f}",
            f"{row['ms_per_forward']:.1f}",
            f"{row['full_forwards']:.1f}",
            f"{row['rows_forwarded']:.0f}",
            accuracy,
        )
    console.print(table)


def check_writable(path: Path) -> None:
    """Refuse a place for the results that cannot be written, before anything is measured."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.with_name(path.name + ".partial")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise sfs_triton.ArgumentError(f"--json {path} cannot be written: {error.strerror}") from None


def write_json(record: dict, path: Path) -> None:
    """Write the record whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="checkpoint folder, hub id, or 'embedded'")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--impl", choices=("torch", "triton"), help="of the operations; default: see sfs_triton.load")
    parser.add_argument("--loop", choices=LOOPS, help="who steps the generations; default: see sfs_triton.load")
    parser.add_argument("--batch", type=int, default=1, help="prompts that are decoded at a time")
    parser.add_argument("--samplers", help="comma-separated; default all")
    parser.add_argument("--cache", help="comma-separated cache policies; default all")
    parser.add_argument("--gen-length", type=int, default=128)
    parser.add_argument("--prompts", default="records", help=f"one of {tuple(problems.DIFFICULTY)}, or a JSONL file")
    parser.add_argument("--limit", type=int, default=16, help="problems")
    parser.add_argument("--seed", type=int, default=0, help="of the problems")
    parser.add_argument("--json", type=Path, help="default bench/results/throughput.json, chart beside it")
    arguments = parser.parse_args(argv)
    for name in ("gen_length", "limit", "batch"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(arguments, name)} is not positive")
    if arguments.json and arguments.json.suffix != ".json":
        parser.error(f"--json {arguments.json} does not end in .json; the chart goes beside it as .png")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    path = arguments.json or RESULTS / "throughput.json"
    console = Console(width=None if sys.stdout.isatty() else 140)  # a log has room for the whole table
    try:
        tallies = select(arguments)
        check_writable(path)
        engine = sfs_triton.load(arguments.model, arguments.device, arguments.dtype, arguments.impl, arguments.loop)
        if engine.text is None:
            raise sfs_triton.ArgumentError(f"--model {arguments.model} has no tokenizer.json, which the prompts need")
        work = read_work(arguments, engine)
        measure(engine, work, tallies, arguments.gen_length, arguments.batch, console)
    except (sfs_triton.SfsError, ValueError) as error:
        console.print(f"error: {error}", style="red", highlight=False)
        return 2
    vanilla = next((t for t in tallies if t.row.sampler == "vanilla"), None)
    rate = statistics.median(vanilla.rates) if vanilla else None
    record = {
        "machine": machine(engine.model.device),
        "model": arguments.model,
        "dtype": str(engine.model.dtype),
        "impl": arguments.impl or "default",
        "loop": engine.loop,
        "batch": arguments.batch,
        "prompts": work.name,
        "problems": len(work.prompts),
        "gen_length": arguments.gen_length,
        "seed": arguments.seed,
        "rows": [tally.summary(rate, engine.loop) for tally in tallies],
    }
    write_json(record, path)
    picture = chart.draw_throughput(record, path.with_suffix(".png"))
    show(record, console)
    console.print(f"wrote {path} and {picture}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
