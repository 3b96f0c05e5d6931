"""Renders ``docs/benchmarks.md``, and tables of the README and ``docs/cost-model.md``: ``python -m bench.report``.

A record is a file ``bench/results/<gpu>/<date>-<commit>.jsonl`` as ``python -m bench.gpu`` writes it; of lines about
the same part of the same step the last counts. What no record says stays empty. Only figures of the same machine are
compared with each other; what others have published stands beside them with its conditions, and ratios to it are
marked.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median

from bench import ROOT
from bench.baselines import AUTOREGRESSIVE, BASELINES
from bench.common.figures import wilson_interval
from bench.common.pages import marked, replace_file, table
from bench.gpu.record import BAD
from bench.gpu.targets import PUBLISHED, RESULTS, Line, Record, best_step, gaps, records, target_rows

from . import gpu_charts
from .card_page import cards_table
from .cpu_pages import CpuRun, cpu_section, newest, readme_part

DOC, README = ROOT / "docs" / "benchmarks.md", ROOT / "README.md"
CARDS_PAGE = "cost-model.md"


# -------------------------------------------------------------------------------------------------------------- tables


def number(value: float | None, digits: int = 2, unit: str = "") -> str:
    return "" if value is None else f"{value:,.{digits}f}{unit}"


def _change(now: float | None, before: float | None) -> str:
    return "" if not now or not before else f"{now / before - 1:+.1%}"


def targets_section(new: Record, old: Record | None) -> str:
    before = {row.quantity: row for row in target_rows(old)} if old else {}
    rows = []
    for row in target_rows(new):
        met = "" if row.ratio is None or "assumed" in row.quantity else "yes" if row.ratio <= 1 else "no"
        change = _change(row.ratio, before[row.quantity].ratio if row.quantity in before else None)
        rows.append((row.quantity, row.target, row.value, met, number(row.ratio), change))
    head = ("quantity", "target", "measured", "met", "measured / target", "since the last record")
    return table(head, rows)


def machines_section(found: Sequence[Record]) -> str:
    rows = []
    for record in found:
        machine, smi = record.part("environment", "machine"), record.part("environment", "nvidia-smi")
        packages = machine.get("packages", {})
        ended = Counter(
            line["status"] for (_, part), line in record.latest.items() if part is None and line["step"] != "suite"
        )
        steps = ", ".join(f"{count} {how}" for how, count in ended.items())
        versions = machine.get("torch", ""), packages.get("triton") or ""
        header = record.header
        rows.append(
            (
                header.get("gpu"),
                header.get("date"),
                header.get("commit"),
                smi.get("driver_version", ""),
                *versions,
                steps,
            )
        )
    return table(("GPU", "date", "commit", "driver", "torch", "triton", "steps"), rows)


def steps_section(new: Record, old: Record | None) -> str:
    before = {line["part"]: line.get("ms") for line in old.of("engine")} if old else {}
    rows = []
    for line in new.of("engine"):
        if "kind" not in line:
            continue
        kernels, ms = (line.get("profile") or {}).get("kernels"), line.get("ms")
        rows.append(
            (
                *(line["policy"], line["kind"], line["backend"], line["positions"]),
                *(number(line.get("eager_ms")), number(ms), number(line.get("predicted_ms"))),
                number(ms / line["predicted_ms"] if ms and line.get("predicted_ms") else None),
                f"{kernels} / {line['predicted_kernels']}" if kernels else "",
                number(100 * line["machine_share"], 1, "%") if line.get("machine_share") is not None else "",
                *(_change(ms, before.get(line["part"])), "" if line["status"] == "ok" else line["status"]),
            )
        )
    head = (
        "policy",
        "step",
        "backend",
        "positions",
        "launched, ms",
        "replayed, ms",
        "predicted, ms",
        "measured / predicted",
    )
    return table((*head, "kernels / predicted", "outside the model", "since the last record", ""), rows)


def baseline_section(new: Record, old: Record | None) -> str:
    before = {line["part"]: line.get("ms") for line in old.of("baseline")} if old else {}
    rows = [
        (
            line["part"],
            line["rows"],
            number(line["ms"]),
            number(line.get("launched_ms")),
            _change(line["ms"], before.get(line["part"])),
        )
        for line in sorted(new.of("baseline"), key=lambda line: line.get("rows", 0))
        if line.get("ms")
    ]
    text = table(("plain torch under a graph", "rows", "ms", "launched, ms", "since the last record"), rows)
    products = [line for line in new.of("baseline") if line["part"].startswith("products") and "qkv" in line]
    if products:
        names = ("qkv", "out", "gate_up", "down", "head")
        cells = (
            (line["rows"], *(f"{line[name]['gb_per_s']:,.0f} / {line[name]['tflops']:,.0f}" for name in names))
            for line in sorted(products, key=lambda line: line["rows"])
        )
        text += "\n\nProducts alone, GB/s / TFLOP/s:\n\n" + table(("rows", *names), cells)
    attention = [line for line in new.of("baseline") if line["part"].startswith("attention")]
    if attention:
        cells = (
            (line["rows"], name, number(each["us_each"], 1) if isinstance(each, dict) else each)
            for line in attention
            for name, each in line.items()
            if name.split(" ")[0] in ("default", "flash", "efficient", "cudnn")
        )
        text += "\n\nAttention of a layer by SDPA's backends:\n\n" + table(("rows", "backend", "us"), cells)
    return text


def generations_section(new: Record, old: Record | None) -> str:
    rows = []
    for step, model in (("engine", "8B, random weights"), ("sync", "embedded, float32")):
        for line in new.of(step):
            if "decode" in line:
                calls = ", ".join(f"{name} {count}" for name, count in list(line["decode"]["calls"].items())[:3])
                waits = sum(line["decode"]["waits"].values())
                about = (model, line["policy"], line["backend"], line["execution"], line["nfe"])
                rows.append(
                    (
                        *about,
                        number(line["ms_per_step"]),
                        line["kernels_per_step"],
                        line["calls_per_step"],
                        waits,
                        calls,
                    )
                )
    head = (
        "model",
        "cache",
        "backend",
        "execution",
        "steps",
        "ms/step",
        "kernels/step",
        "calls/step",
        "waits",
        "most frequent calls",
    )
    return table(head, rows)


def _merged(record: Record | None) -> dict[str, Line]:
    """Merge the visits (one per problem) of each row of the throughput step."""
    by_row: dict[str, list[Line]] = {}
    for line in record.of("throughput") if record else ():
        if "row" in line and line.get("ms_per_forward"):
            by_row.setdefault(line["row"], []).append(line)
    found = {}
    for name, lines in by_row.items():
        first, checked = lines[0], sum(line["checked"] for line in lines)
        correct = sum(line["correct"] for line in lines)
        low, high = wilson_interval(correct, checked)
        middles = ("ms_per_forward", "tokens_per_second", "nfe", "tpf", "full_forwards")
        found[name] = {
            **{key: first[key] for key in ("by", "sampler", "cache", "backend", "execution", "extrapolated", "note")},
            "real": "random" not in first["weights"],
            **{key: median(line[key] for line in lines) for key in middles},
            "memory": max((line["peak_memory_bytes"] or 0 for line in lines), default=0),
            "right": f"{correct} of {checked}" if checked else "",
            **{"problems": len(lines), "batch": 1, "accuracy": correct / checked if checked else None},
            **{"accuracy_low": low, "accuracy_high": high},
        }
    return found


def throughput_section(new: Record, old: Record | None) -> str:
    mine, before, rows = _merged(new), _merged(old), []
    for name, row in mine.items():
        mark = "~" if row["extrapolated"] else ""
        ops = " ".join(filter(None, (row["backend"], row["execution"], row["note"])))
        rows.append(
            (
                *(row["by"], row["sampler"], row["cache"], ops),
                *(number(row["ms_per_forward"]), number(row["nfe"], 1)),
                number(row["full_forwards"], 1),
                *((number(row["tpf"]), mark + number(row["tokens_per_second"], 1)) if row["real"] else ("", "")),
                *(number(row["memory"] / 2**30 or None, 1), row["right"]),
                _change(row["ms_per_forward"], before.get(name, {}).get("ms_per_forward")),
            )
        )
    zeros = new.part("throughput", "zeros")
    weights = sorted({line["weights"] for line in new.of("throughput") if "weights" in line})
    told = [f"Weights: {'; '.join(weights)}."] if weights else []
    if "dense_over_inflated_list" in zeros:
        shares = (f"{zeros[f'dense_over_inflated_{kind}']:.3f} of {kind}" for kind in ("list", "full"))
        told.append(f"Milliseconds of a step with dense random weights over those with these: {', '.join(shares)}.")
    if mine:
        told.append("Medians over problems; ~ is extrapolated from some of a generation's steps.")
    head = (
        "by",
        "sampler",
        "cache",
        "backend, execution",
        "ms/step",
        "NFE",
        "full forwards",
        "TPF",
        "tokens/s",
        "GiB",
        "right",
    )
    return "\n\n".join(filter(None, (" ".join(told), table((*head, "ms/step since the last record"), rows))))


def kernels_section(new: Record, old: Record | None) -> str:
    before = {line["part"]: line.get("p50_us") for line in old.of("kernels")} if old else {}
    torch = {
        (line.get("operation"), line.get("case")): line.get("p50_us")
        for line in new.of("kernels", implementation="torch")
    }
    rows = []
    for line in new.of("kernels", implementation="triton"):
        if not line.get("p50_us"):
            continue
        twin = torch.get((line["operation"], line["case"]))
        rows.append(
            (
                *(line["operation"], line["case"], number(line["p50_us"], 1), number(twin, 1)),
                number(twin / line["p50_us"] if twin else None),
                number(line.get("gb_per_s"), 0),
                number(100 * line["roofline_share"], 0, "%") if line.get("roofline_share") else "",
                *(line.get("l2") or "", _change(line["p50_us"], before.get(line["part"]))),
            )
        )
    head = (
        "kernel",
        "case",
        "us",
        "torch, us",
        "times torch",
        "GB/s",
        "of the roofline",
        "L2",
        "since the last record",
    )
    return table(head, rows)


def checks_section(new: Record, old: Record | None) -> str:
    rows = []
    for step in ("warm-up", "smoke", "tests", "conformance", "sync"):
        counts = Counter(line["status"] for line in new.of(step))
        wrong = [line["part"] for line in new.of(step) if line["status"] in BAD]
        if counts:
            told = ", ".join(f"{count} {how}" for how, count in counts.items())
            rows.append((step, told, "; ".join(wrong[:5]) + (" ..." if len(wrong) > 5 else "")))
    return table(("step", "parts", "failed"), rows)


# ---------------------------------------------------------------------------------------------------- published figures


def published_section(record: Record | None) -> str:
    """Compare by milliseconds per forward, since tokens per forward depend on the text and the model."""
    step = best_step(record) if record else {}
    ours = step.get("ms")
    rows = [
        (
            p.what,
            p.figure,
            p.conditions,
            p.hardware,
            number(p.ms, 1),
            number(p.ms / ours if p.ms and ours else None, 1, " †" if p.ms and ours else ""),
        )
        for p in PUBLISHED
    ]
    here = f" ({ours:.2f} ms: {record.header.get('gpu')}, region, 128 positions)" if ours else ""
    return table(("what", "figure", "conditions", "hardware", "ms per forward", f"over ours{here}"), rows)


def baselines_section() -> str:
    """Every baseline with the optimisations that it has and lacks; what all masked-diffusion ones share comes first."""
    every = list(BASELINES.values())

    def told(what: str, items: Iterable[str]) -> str:
        return f"\n  - {what}: {'; '.join(items)}." if items else ""

    shared = {
        kind: [item for item in getattr(every[0], kind) if all(item in getattr(b, kind) for b in every)]
        for kind in ("has", "lacks")
    }
    lines = ["- **all but the last**" + told("have", shared["has"]) + told("lack", shared["lacks"])]
    for b in (*every, AUTOREGRESSIVE):
        of_all = shared if b in every else {"has": (), "lacks": ()}
        own = (told(kind, [item for item in getattr(b, kind) if item not in of_all[kind]]) for kind in ("has", "lacks"))
        lines.append(f"- **{b.name}**: {b.what}.{''.join(own)}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------ document

HEAD = """\
# Benchmarks

Rendered from the records under `bench/results/` by `python -m bench.report`; do not edit. One run of a command
is one record:

```
python -m bench.gpu --minutes 9           # on a machine with a GPU: bench/results/<gpu>/<date>-<commit>.jsonl
make bench-all                            # on any: bench/results/<machine>/<date>-<commit>/
```

A cell without a measurement is empty.
"""

NONE = "**There is no record of a GPU yet.**"

ABOUT_CPUS = """\
From `make bench-all`. On a CPU the time of a step follows the positions that it forwards, so these tables show the
positions and steps that samplers and caches save; they say nothing about kernels, CUDA graphs and the sizes of real
models. "plain torch" are the baselines below, in the same process, in turns with sfs_triton. ~ is extrapolated from
some of a generation's steps. Behind few-shot prompts the embedded model, which was trained on single turns, answers
wrongly and takes more steps; the work per step is the same.
"""

ABOUT_BASELINES = """\
`bench/baselines/` has the published samplers in eager PyTorch, written from their papers. They equal the recorded runs
of their authors' code in tokens and forwards (`tests/bench/test_baselines.py`).
"""

ABOUT_PUBLISHED = """\
Each under its own conditions, as its authors give it. Tokens per second depend on the text, on the tokens per forward
that it allows, and on the model; *ms per forward* compares engines of models of the same size. It is derived here as
tokens per forward over tokens per second (first row: of vanilla decoding, one token per forward). A ratio marked † is
**across machines**, canvases and kinds of forward: it does not rank engines.
"""

SECTIONS: dict[str, Callable[[Record, Record | None], str]] = {
    "Steps at 8B": steps_section,
    "Plain torch at 8B": baseline_section,
    "Generations": generations_section,
    "Throughput at 8B": throughput_section,
    "Kernels": kernels_section,
    "Checks": checks_section,
}


def render(found: Sequence[Record], cpus: Sequence[CpuRun] = (), root: Path = ROOT) -> str:
    """Render the page from records of GPUs and of CPUs, whose paths are given relative to ``root``."""
    by_gpu: dict[str, list[Record]] = {}
    for record in found:
        by_gpu.setdefault(record.header["gpu"], []).append(record)
    parts = [HEAD]
    if not found:
        empty = Record(Path("none"), ())
        parts += [NONE, "## Targets (one H200, bfloat16, LLaDA-8B)", targets_section(empty, None)]
    else:
        parts += ["## Records", machines_section(found)]
    for gpu, its in by_gpu.items():
        new, old = its[-1], its[-2] if len(its) > 1 else None
        parts += [f"## {gpu}", f"The last record, `{new.name}`{f', beside `{old.name}`' if old else ''}."]
        parts += ["### Targets", targets_section(new, old)]
        for name, file in gpu_charts.names(new, _merged(new)).items():
            parts.append(f"![{gpu_charts.TITLES[name]}]({file})")
        if missed := gaps(new):
            parts += ["### The largest gaps", "\n".join(f"{i}. {line}" for i, line in enumerate(missed, 1))]
        for title, section in SECTIONS.items():
            text = section(new, old)
            if text.count("\n") > 1:  # more than a table's head
                parts += [f"### {title}", text]
    last = max((its[-1] for its in by_gpu.values()), key=lambda r: r.header.get("date", ""), default=None)
    if cpus:
        parts += ["## Without a GPU", ABOUT_CPUS, *(part for run in cpus for part in cpu_section(run, root))]
    parts += ["## What others have published", ABOUT_PUBLISHED, published_section(last)]
    parts += ["## The baselines", ABOUT_BASELINES, baselines_section()]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def pages(results: Path, out: Path, readme: Path) -> dict[Path, str]:
    """Render the pages, by path. A README stays as it is where there is no CPU's run; the page of cards is beside
    ``out``, if it is there."""
    if not results.is_dir():
        raise ValueError(f"--results {results} is no folder")
    cpus, root = newest(results), results.parent.parent
    found = {out: render(records(results), cpus, root)}
    if (cards := out.with_name(CARDS_PAGE)).is_file():
        found[cards] = marked(cards.read_text(encoding="utf-8"), "cards", cards_table(records(results)))
    if cpus:
        part = readme_part(cpus[-1], root)
        found[readme] = marked(readme.read_text(encoding="utf-8"), "table", part)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--out", type=Path, default=DOC)
    parser.add_argument("--readme", type=Path, default=README, help="whose main table is renewed")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; the exit status is 1 if a page is not current"
    )
    arguments = parser.parse_args(argv)
    try:
        results = arguments.results.resolve()
        wanted = pages(results, arguments.out, arguments.readme)
        stale = [p for p, text in wanted.items() if not p.is_file() or p.read_text(encoding="utf-8") != text]
        for path in wanted:
            if not arguments.check:
                replace_file(path, wanted[path])
            told = ("not current" if path in stale else "current") if arguments.check else "written"
            print(f"{path} is {told}")
        if not arguments.check:
            for record in {record.header["gpu"]: record for record in records(results)}.values():
                gpu_charts.draw(record, _merged(record), arguments.out.parent)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return int(arguments.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
