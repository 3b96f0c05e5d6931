"""Run the main benchmark: vanilla decoding and the parallel samplers, on problems whose answers can be checked.

    python bench/throughput.py                                   the embedded model, records task, under three minutes
    python bench/throughput.py --samplers vanilla,slowfast --limit 100 --json run.json
    python bench/throughput.py --by sfs_triton --cache none,region --batch 1,4
    python bench/throughput.py --model GSAI-ML/LLaDA-8B-Instruct --prompts questions.jsonl
    python bench/throughput.py --geometry llada-8b --prompt-length 1100 --gen-length 1024 --batch 1,4,16
    torchrun --nproc-per-node 2 bench/throughput.py --tensor-parallel 2 --model GSAI-ML/LLaDA-8B-Instruct

The line with --geometry runs the embedded model in LLaDA-8B's sizes (``bench/shapes/inflate.py``), with solved problems
before each one. Under torchrun only rows by sfs_triton are run, by all processes together.

Rows by "plain torch" are the baselines of ``bench/baselines``, which decode one prompt at a time. All run in one
process, and alternate batch by batch. Tokens are response tokens up to and including the end-of-text, counted the same
way for all. Rows marked "~" are extrapolated: only some of their steps were taken.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from rich.console import Console  # noqa: E402
from rich.progress import Progress  # noqa: E402
from rich.table import Table  # noqa: E402

import sfs_triton  # noqa: E402
from bench.common import chart, rows, summary  # noqa: E402
from bench.common.figures import machine  # noqa: E402
from bench.common.tally import Tally  # noqa: E402
from bench.cost.visits import Bench  # noqa: E402
from bench.embedded import problems  # noqa: E402
from bench.quality.work import Work, read_work  # noqa: E402
from bench.shapes.geometry import GEOMETRIES  # noqa: E402
from bench.shapes.inflate import dense, inflate  # noqa: E402
from sfs_triton import distributed as parallel  # noqa: E402
from sfs_triton.ops.dispatch import BACKENDS  # noqa: E402
from sfs_triton.runner import CudaGraphs, Eager  # noqa: E402

RESULTS = ROOT / "bench" / "results"
SAMPLED_STEPS = 32


def select(arguments: argparse.Namespace) -> list[rows.Row]:
    """Select the requested rows. In sizes at which vanilla decoding is only sampled, it is the baselines' alone."""
    found = rows.every_row(arguments.gen_length)
    if arguments.sampled_steps:
        found = [row for row in found if row.who != rows.OURS or not isinstance(row.settings, sfs_triton.FixedSteps)]
    if not arguments.geometry:
        found = [row for row in found if row.who != rows.AUTOREGRESSIVE]
    if arguments.tensor_parallel > 1:  # nobody else shares a model
        found = [row for row in found if row.who == rows.OURS]
    wanted = {flag: getattr(arguments, flag) for flag in rows.FLAGS}
    return rows.spread_out(rows.chosen(found, wanted), arguments.backend or [None], arguments.executions or [None])


def load(arguments: argparse.Namespace) -> sfs_triton.Engine:
    """The checkpoint, or the embedded model in other sizes. Rows choose backend and execution for themselves."""
    if not arguments.geometry:
        shared = {"tensor_parallel": arguments.tensor_parallel}
        return sfs_triton.load(arguments.model, arguments.device, arguments.dtype, **shared)
    make = dense if arguments.weights == "dense" else inflate
    small = sfs_triton.load("embedded", "cpu", "float32")
    return make(small, arguments.geometry, arguments.device, arguments.dtype)


def measure(bench: Bench, work: Work, chosen: list[rows.Row], batch: int, console: Console) -> list[Tally]:
    """Run every row on every batch of questions, row after row within a batch; extrapolated rows come last.

    Only sfs_triton decodes several prompts at once.
    """
    mine = [row for row in chosen if row.who == rows.OURS or batch == 1]
    tallies = [Tally(row, batch, bench.extrapolates(row)) for row in mine]
    with Progress(console=console, transient=True) as progress:
        total = progress.add_task("decoding", total=len(work.questions) * len(tallies))
        for at in range(0, len(work.questions), batch):
            part, like = work.questions[at : at + batch], None
            for tally in sorted(tallies, key=lambda tally: tally.extrapolated):
                progress.update(total, description=f"batch {batch}: {tally.row.name}")
                visit = bench.visit(tally.row, [question.prompt for question in part], like)
                if tally.extrapolated:
                    tally.add(visit, [])
                else:
                    like = visit.done[0]
                    tally.add(visit, [q.right(d.text) for q, d in zip(part, visit.done, strict=True)])
                progress.advance(total, len(part))
    return tallies


def vanilla_rate(tallies: list[Tally]) -> float | None:
    """Return tokens per second at one token per step: the baseline's or, without one, sfs_triton's."""
    found = [tally for tally in tallies if tally.row.sampler == "vanilla" and tally.batch == 1]
    return min(found, key=lambda tally: rows.WHO.index(tally.row.who)).rate if found else None


# --------------------------------------------------------------------------------------------------------------- output


def show(record: dict, console: Console) -> None:
    """Print a table for each batch size."""
    where = record["machine"]["gpu"] or f"{record['machine']['cpu']}, {record['machine']['threads']} threads"
    for batch in dict.fromkeys(row["batch"] for row in record["rows"]):
        table = Table(
            title=f"{record['model']}, {record['prompts']} x {record['problems']}, "
            f"gen_length {record['gen_length']}, batch {batch}; {where}",
            title_justify="left",
        )
        for name in ("by", "sampler", "cache"):
            table.add_column(name)
        for name in ("tokens/s", "speed-up", "NFE", "TPF", "ms/step", "full forwards", "positions forwarded"):
            table.add_column(name, justify="right")
        table.add_column("GiB", justify="right")
        table.add_column("accuracy (95%)", justify="right")
        for row in record["rows"]:
            if row["batch"] == batch:
                table.add_row(*_cells(row))
        console.print(table)


def _cells(row: dict) -> list[str]:
    ways = " ".join(filter(None, (row["backend"], row["execution"])))
    mark = "~" if row["extrapolated"] else ""
    accuracy, memory = row["accuracy"], row["peak_memory_bytes"]
    return [
        f"{row['by']} {ways}".strip(),
        f"{row['sampler']} ({row['label']})",
        row["cache"],
        f"{mark}{row['tokens_per_second']:.1f}",
        "" if row["speedup"] is None else f"{row['speedup']:.2f}x",
        f"{row['nfe']:.1f}",
        f"{row['tpf']:.2f}",
        f"{row['ms_per_forward']:.1f}",
        f"{row['full_forwards']:.1f}",
        f"{row['positions_forwarded']:.0f}",
        "" if memory is None else f"{memory / 2**30:.1f}",
        "" if accuracy is None else f"{accuracy:.1%} ({row['accuracy_low']:.0%}-{row['accuracy_high']:.0%})",
    ]


def show_summary(record: dict, console: Console) -> None:
    """Print the table in five rows that the README has, and what it means."""
    if len(chosen := summary.chosen(record["rows"])) < 2:  # nothing to compare
        return
    table = Table()
    for name, justify in zip(summary.HEAD, ("left", "left", "right", "right", "right"), strict=True):
        table.add_column(name, justify=justify)
    for row in chosen:
        table.add_row(*summary.cells(row))
    console.print(table)
    console.print(summary.meaning(chosen), highlight=False)


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


# --------------------------------------------------------------------------------------------------------- command line


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not positive numbers, separated by commas")
    return counts


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder, hub id, or 'embedded' (default)")
    parser.add_argument("--geometry", choices=GEOMETRIES, help="the embedded model in these sizes")
    parser.add_argument("--weights", choices=("inflated", "dense"), default="inflated", help="dense: random ones")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--backend", type=_names, help=f"of {BACKENDS}, comma-separated; default: see sfs_triton.load")
    graphs = {"dest": "executions", "action": "append_const"}
    parser.add_argument("--cuda-graphs", **graphs, const=CudaGraphs.name, help="replay captured steps")
    parser.add_argument("--no-cuda-graphs", **graphs, const=Eager.name, help="launch each step; both: each row twice")
    parser.add_argument("--batch", type=_counts, default=[1], help="prompts decoded at a time, comma-separated")
    parser.add_argument("--by", type=_names, help=f"of {rows.WHO}, comma-separated; default all")
    parser.add_argument("--samplers", type=_names, help="comma-separated; default all")
    parser.add_argument("--cache", type=_names, help="comma-separated cache policies; default all")
    parser.add_argument("--gen-length", type=int, default=128)
    parser.add_argument("--prompt-length", type=int, help="tokens that solved problems before each one fill up")
    parser.add_argument("--prompts", default="records", help=f"one of {tuple(problems.DIFFICULTY)}, or a JSONL file")
    parser.add_argument("--limit", type=int, default=16, help="problems")
    parser.add_argument("--seed", type=int, default=0, help="of the problems")
    parser.add_argument(
        "--sampled-steps",
        type=int,
        help="of plain vanilla decoding and of the autoregressive model; the rest is extrapolated. 0: take all. "
        f"Default {SAMPLED_STEPS} with --geometry, else 0",
    )
    parser.add_argument(
        "--tensor-parallel", type=int, default=1, help="processes that share the model, started by torchrun"
    )
    parser.add_argument("--json", type=Path, help="default bench/results/throughput.json, chart beside it")
    arguments = parser.parse_args(argv)
    for name in ("gen_length", "limit", "prompt_length"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(arguments, name)} is not positive")
    if arguments.sampled_steps is None:
        arguments.sampled_steps = SAMPLED_STEPS if arguments.geometry else 0
    if not 0 <= arguments.sampled_steps <= arguments.gen_length:
        parser.error(f"--sampled-steps {arguments.sampled_steps} of a generation that has {arguments.gen_length}")
    if arguments.model and arguments.geometry:
        parser.error(f"--model {arguments.model} has its own sizes; --geometry is for the embedded model")
    if arguments.tensor_parallel != 1 and arguments.geometry:
        parser.error("--tensor-parallel is for checkpoints; --geometry makes whole weights in every process")
    if arguments.weights == "dense" and not arguments.geometry:
        parser.error("--weights dense needs a --geometry")
    if arguments.json and arguments.json.suffix != ".json":
        parser.error(f"--json {arguments.json} does not end in .json; the chart goes beside it as .png")
    arguments.model = arguments.model or "embedded"
    return arguments


def run(arguments: argparse.Namespace, console: Console) -> dict:
    """Measure, and describe what was measured."""
    chosen = select(arguments)
    engine = load(arguments)
    bench = Bench(engine, arguments.gen_length, sampled_steps=arguments.sampled_steps)
    for row in chosen:
        if reason := bench.lacks(row):
            console.print(f"{row.name}: left out: {reason}", highlight=False)
    chosen = [row for row in chosen if not bench.lacks(row)]
    work = read_work(
        engine,
        arguments.prompts,
        limit=arguments.limit,
        seed=arguments.seed,
        gen_length=arguments.gen_length,
        prompt_length=arguments.prompt_length,
    )
    if arguments.weights == "dense":
        work = work.unanswered()
    tallies = [tally for batch in arguments.batch for tally in measure(bench, work, chosen, batch, console)]
    rate = vanilla_rate(tallies)
    name = f"{arguments.geometry} ({arguments.weights})" if arguments.geometry else arguments.model
    return {
        "machine": machine(engine.model.device),
        "model": name,
        "dtype": str(engine.model.dtype),
        "tensor_parallel": engine.model.group.size,
        "execution": engine.execution,  # of rows that name none
        "prompts": work.name,
        "prompt_tokens": [len(question.prompt) for question in work.questions],
        "problems": len(work.questions),
        "gen_length": arguments.gen_length,
        "seed": arguments.seed,
        "rows": [tally.summary(rate) for tally in tallies],
    }


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    path = arguments.json or RESULTS / "throughput.json"
    rank, _ = parallel.world()
    console = Console(width=None if sys.stdout.isatty() else 160, quiet=rank > 0)  # a log has room for the whole table
    try:
        parallel.check_started(arguments.tensor_parallel)
        if rank == 0:
            check_writable(path)
        record = run(arguments, console)
    except (sfs_triton.SfsError, ValueError, ImportError) as error:
        console.print(f"error: {error}", style="red", highlight=False, markup=False)
        return 2
    if rank > 0:
        return 0
    write_json(record, path)
    picture = chart.draw_throughput(record, path.with_suffix(".png"))
    show(record, console)
    show_summary(record, console)
    console.print(f"record {path}\npicture {picture}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
