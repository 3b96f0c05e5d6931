"""Predict the cost of a step at given ceilings, and the fastest cache policy. Nothing is timed.

    python -m bench.cost.cost_model --geometry llada-8b --policy region --capacity 128 --prompt 1100 --response 1024
    python -m bench.cost.cost_model --slow 3 --fast 2 --tokens 20 --refresh-cycles 8 --batch 1 --json out.json
    python -m bench.cost.cost_model --write-doc          the tables of docs/cost-model.md

:mod:`bench.cost.step_count` counts a step's launches; this module converts them to time.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from bench import ROOT
from bench.common.pages import replace_file
from bench.shapes.geometry import REAL
from sfs_triton.cards import CARDS, QUANTIZATIONS
from sfs_triton.kernels.cost import Cost
from sfs_triton.ops.dispatch import BACKENDS

from .step_count import NAMES, PARTS, STYLES, Count, KernelTotals, Kind, Setting, count_vanilla, kinds, steps_of

DOC = ROOT / "docs" / "cost-model.md"


@dataclass(frozen=True)
class Ceilings:
    """Peak rates of a machine, and the source of these numbers."""

    bytes_per_second: float
    flops_per_second: float  # of matrix products in bfloat16
    seconds_per_launch: float  # what a kernel takes beyond its work
    source: str

    def part_seconds(self, part: KernelTotals) -> float:
        """Return the time of a part: its work at the roofline, plus its launches."""
        floor = Cost(part.bytes, part.flops).floor(self.bytes_per_second, self.flops_per_second)
        return floor + part.launches * self.seconds_per_launch

    def seconds(self, step: Count) -> float:
        return sum(map(self.part_seconds, step.parts.values()))


# A full forward of 2,124 rows, 34.2 T operations with the head on all rows, then takes 43 ms.
CEILINGS = {
    "h200": Ceilings(
        bytes_per_second=CARDS["h200"].bandwidth,
        flops_per_second=CARDS["h200"].flops,
        seconds_per_launch=1.2e-6,
        source=f"{CARDS['h200'].source}, 1.2 us per kernel of a replayed graph",
    )
}


# ------------------------------------------------------------------------------------------------------ which one wins


@dataclass(frozen=True)
class Cycle:
    """Average cycle of slow and fast steps."""

    slow: float = 3
    fast: float = 2
    tokens: float = 20  # that a cycle commits
    refresh_cycles: float | None = 8  # region: cycles from one full forward to the next; None: only the first

    def __post_init__(self) -> None:
        for name in ("slow", "tokens", "refresh_cycles"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value!r} is not positive")
        if not (math.isfinite(self.fast) and self.fast >= 0):
            raise ValueError(f"fast={self.fast!r} is negative")


class Forecast(NamedTuple):
    """A generation by one policy. ``tokens_per_second`` is of the batch."""

    policy: str
    steps: float
    seconds: float
    tokens_per_second: float
    speedup: float


def shares(setting: Setting, name: str, cycle: Cycle) -> dict[Kind, float]:
    """Count the steps of each kind per generation. Every policy is assumed to need the same number of steps."""
    period, cycles = kinds(setting, name), setting.response / cycle.tokens
    steps = cycles * (cycle.slow + cycle.fast)
    if name == "refresh":
        return {kind: steps * often / sum(period.values()) for kind, often in period.items()}
    first, later = period
    if name == "none":
        few = cycles * max(cycle.fast - 1, 0)
        return {first: steps - few, later: few}
    if name == "region":
        full = max(1.0, cycles / (cycle.refresh_cycles or math.inf))
        return {first: full, later: max(steps - full, 0.0)}
    blocks = math.ceil(setting.response / setting.block_length)
    return {first: float(blocks), later: max(steps, 2.0 * blocks) - blocks}  # a block takes two forwards or more


def forecast(setting: Setting, backend: str, cycle: Cycle, ceilings: Ceilings) -> list[Forecast]:
    """Predict vanilla decoding (one token per step, one sequence at a time) and all policies, the fastest first."""
    tokens = setting.response * setting.batch
    vanilla = tokens * ceilings.seconds(count_vanilla(setting))
    found = []
    for name in NAMES:
        steps, often = steps_of(setting, backend, name), shares(setting, name, cycle)
        seconds = sum(times * ceilings.seconds(steps.count(kind)) for kind, times in often.items() if times)
        found.append(Forecast(name, sum(often.values()), seconds, tokens / seconds, vanilla / seconds))
    found.sort(key=lambda row: row.seconds)
    return [Forecast("vanilla", float(tokens), vanilla, tokens / vanilla, 1.0), *found]


# -------------------------------------------------------------------------------------------------------------- tables


def table(head: str, rows: Iterable[Iterable[Any]]) -> str:
    """Render a Markdown table; ``head`` names the columns, between bars."""
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def part_table(steps: Iterable[tuple[str, Count]], ceilings: Ceilings) -> str:
    """Steps, each by its parts."""
    rows = []
    for name, step in steps:
        parts = [(PARTS[part], tally, ceilings.part_seconds(tally)) for part, tally in step.parts.items()]
        for part, tally, seconds in [*parts, ("all", step.total, ceilings.seconds(step))]:
            work = f"{tally.bytes / 1e9:.2f}", f"{tally.flops / 1e12:.3f}", f"{1e3 * seconds:.2f}", ""
            rows.append((name, part, tally.launches, *work))
    return table("| step | part | kernels | GB | TFLOP | ms | measured |", rows)


def forecast_table(rows: Iterable[Forecast]) -> str:
    cells = (
        (row.policy, *(f"{x:.{digits}f}" for x, digits in zip(row[1:], (0, 2, 0, 1), strict=True)), "") for row in rows
    )
    return table("| policy | steps | s a generation | tokens/s | times vanilla | measured |", cells)


CYCLES = (Cycle(3, 5, 8), Cycle(3, 2, 20), Cycle(4, 4, 64), Cycle(4, 6, 128), Cycle(3, 2, 20, 1), Cycle(3, 2, 20, None))


def _winner_table(ceilings: Ceilings) -> str:
    """Compare policies with Triton's kernels, by the average cycle."""
    rows = []
    for cycle in CYCLES:
        setting = Setting(span_cap=max(64, math.ceil(cycle.tokens)))
        _, best, *_ = found = forecast(setting, "triton", cycle, ceilings)
        speedups = {row.policy: f"{row.speedup:.1f}x" for row in found}
        numbers = cycle.slow, cycle.fast, cycle.tokens, cycle.refresh_cycles or "never (0)"
        rows.append((*numbers, *(speedups[name] for name in NAMES), best.policy))
    return table(f"| slow | fast | tokens | cycles a refresh | {' | '.join(NAMES)} | wins |", rows)


CAPACITIES, BATCHES = (32, 64, 128, 256), (1, 2, 4, 16)


def _batch_table(ceilings: Ceilings) -> str:
    """Milliseconds of a region step by capacity and batch."""
    _, listed = kinds(Setting(), "region")
    rows = []
    for capacity in CAPACITIES:
        settings = (Setting(capacity=capacity, batch=batch) for batch in BATCHES)
        times = [ceilings.seconds(steps_of(setting, "triton", "region").count(listed)) for setting in settings]
        rows.append((capacity, *(f"{1e3 * seconds:.2f}" for seconds in times)))
    return table("| capacity | " + " | ".join(f"batch {batch}" for batch in BATCHES) + " |", rows)


# ------------------------------------------------------------------------------------------------------------ document


def doc_tables() -> dict[str, str]:
    """Render the counted tables of the document: llada-8b, a prompt of 1,100 and a response of 1,024."""
    ceilings = CEILINGS["h200"]
    return {
        "ceilings": f"Ceilings, **assumed**: {ceilings.source}. Counted with torch {minor(torch.__version__)}.",
        "winners": _winner_table(ceilings),
        "batches": _batch_table(ceilings),
    }


def rendered(text: str, tables: dict[str, str]) -> str:
    """``text`` with its tables, each between two marks, replaced."""
    for name, body in tables.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"the document has no place, or more than one, for table {name!r}")
        text = pattern.sub(lambda _, new=begin + body + end: new, text)
    return text


def minor(version: str) -> str:
    """Return torch's minor release: the kernels of an operation may differ between releases."""
    return ".".join(version.split(".")[:2])


# -------------------------------------------------------------------------------------------------------- command line


def record(setting: Setting, names: Iterable[str], backends: Iterable[str], cycle: Cycle, ceilings: Ceilings) -> dict:
    """All of it as JSON has it. What a GPU would have to measure is None."""
    steps, forecasts = [], {}
    for backend in backends:
        forecasts[backend] = [row._asdict() for row in forecast(setting, backend, cycle, ceilings)]
        for name in names:
            for kind in kinds(setting, name):
                steps.append(
                    {"backend": backend, "policy": name, **_step_record(setting, backend, name, kind, ceilings)}
                )
    return {
        "prediction": "nothing here was measured",
        "setting": asdict(setting),
        "cycle": asdict(cycle),
        "ceilings": asdict(ceilings),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "steps": steps,
        "forecasts": forecasts,
        "winner": {backend: rows[1]["policy"] for backend, rows in forecasts.items()},
    }


def _step_record(setting: Setting, backend: str, name: str, kind: Kind, ceilings: Ceilings) -> dict[str, Any]:
    steps = steps_of(setting, backend, name)
    step = steps.count(kind)
    parts = {
        part: {**tally._asdict(), "milliseconds": 1e3 * ceilings.part_seconds(tally)}
        for part, tally in step.parts.items()
    }
    return {
        "step": kind.name,
        "shapes": [{**shape._asdict(), "positions": shape.positions.value} for shape in steps.shapes(kind)],
        "parts": parts,
        "total": {**step.total._asdict(), "milliseconds": 1e3 * ceilings.seconds(step)},
        "host_copies": step.host_copies,
        "kernels": dict(Counter(kernel.name for kernel in step.kernels).most_common()),
        "measured_milliseconds": None,
    }


def show(setting: Setting, names: Iterable[str], backends: Iterable[str], cycle: Cycle, ceilings: Ceilings) -> None:
    print(f"A prediction: nothing here was measured. Ceilings, ASSUMED: {ceilings.source}.\n")
    steps = [
        (f"{name} {kind.name}, {backend}", steps_of(setting, backend, name).count(kind))
        for backend in backends
        for name in names
        for kind in kinds(setting, name)
    ]
    print(part_table(steps, ceilings))
    often = "never" if cycle.refresh_cycles is None else f"every {cycle.refresh_cycles:g} cycles"
    for backend in backends:
        rows = forecast(setting, backend, cycle, ceilings)
        print(
            f"\noperations by {backend}; a cycle of {cycle.slow:g} slow and {cycle.fast:g} fast steps commits "
            f"{cycle.tokens:g} tokens, in every policy; region refreshes {often}:\n"
        )
        print(forecast_table(rows))
        print(
            f"\nwinner: {rows[1].policy}, {rows[1].speedup:.1f}x vanilla, {rows[2].seconds / rows[1].seconds:.2f}x "
            f"the next ({rows[2].policy})"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    default, cycle = Setting(), Cycle()
    parser.add_argument("--geometry", choices=tuple(REAL), default=default.geometry)
    parser.add_argument("--policy", choices=NAMES, action="append", help="whose steps to show; may be repeated")
    parser.add_argument("--backend", choices=BACKENDS, action="append", help="of the operations; default: both")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="as for sfs_triton.load; default: bfloat16")
    parser.add_argument("--style", choices=STYLES, default=default.style, help="of the shapes: captured or eager")
    for name in ("prompt", "response", "batch", "capacity", "block-length"):
        parser.add_argument(f"--{name}", type=int, default=getattr(default, name.replace("-", "_")))
    parser.add_argument("--span-cap", type=int, help="of region; default: 64, or a cycle's tokens if those are more")
    for name, what in (("slow", "slow steps"), ("fast", "fast steps"), ("tokens", "tokens committed")):
        parser.add_argument(f"--{name}", type=float, default=getattr(cycle, name), help=f"{what} of a cycle")
    parser.add_argument(
        "--refresh-cycles", type=float, default=cycle.refresh_cycles, help="of region, 0: only the first step is full"
    )
    parser.add_argument("--ceilings", choices=tuple(CEILINGS), default="h200")
    parser.add_argument("--json", type=Path, help="write everything, with each step's kernels by name")
    parser.add_argument("--write-doc", action="store_true", help=f"only renew the tables of {DOC.name}")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    given = parser.parse_args(argv)
    if given.write_doc:
        replace_file(DOC, rendered(DOC.read_text(), doc_tables()))
        return 0
    try:
        cycle = Cycle(given.slow, given.fast, given.tokens, given.refresh_cycles or None)
        sizes = {name: getattr(given, name) for name in ("prompt", "response", "batch", "capacity", "block_length")}
        span = math.ceil(cycle.tokens)
        span_cap = max(64, span) if given.span_cap is None else given.span_cap
        shape = {"span_cap": span_cap, "style": given.style, "span": span}
        setting = Setting(given.geometry, **sizes, **shape, quantization=given.quantization)
    except ValueError as error:
        parser.error(str(error))
    what = setting, given.policy or ("region",), given.backend or BACKENDS, cycle, CEILINGS[given.ceilings]
    if given.json:
        text = json.dumps(record(*what), indent=1) + "\n"
        try:
            replace_file(given.json, text)
        except OSError as error:
            parser.error(f"--json {given.json}: {error.strerror}")
    show(*what)
    return 0


if __name__ == "__main__":
    sys.exit(main())
