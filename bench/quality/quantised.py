"""Measure weights in 8 and 4 bits on the embedded model: tokens, right answers, steps, and the choices of one forward.

    python -m bench.quality.quantised --limit 100 --json bench/results/quantised.json
    python -m bench.quality.quantised --json bench/results/quantised.json --write-doc docs/quantised.md

The first line measures, with float32 as the reference; an interrupted run resumes where it stopped.
The second puts its tables, and what :mod:`bench.cost.cost_model` predicts, into a page, between markers.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import torch

import sfs_triton
from bench.common import pages
from bench.common.figures import machine
from bench.cost.cost_model import CEILINGS
from bench.cost.step_count import Setting, kinds, steps_of
from bench.embedded import tasks
from bench.embedded.carried import carried
from sfs_triton import NoCache, SlowFast
from sfs_triton.models.weights import Weights
from sfs_triton.ops.dispatch import GROUPS
from sfs_triton.ops.torch.int8 import int8_speed

from . import measured
from .measured import GEN_LENGTH, Variant, decode

TASKS = {"records": ("records", tasks.correct), "carried": ("words", carried)}
FORWARD = "one forward"


class Numbers(NamedTuple):
    """Number formats in which a model's weights are stored and computed."""

    label: str
    dtype: str
    quantization: str | None = None


EXACT = Numbers("float32", "float32")
OTHERS = (
    Numbers("bfloat16", "bfloat16"),
    Numbers("fp8, float32", "float32", "fp8"),
    Numbers("fp8, bfloat16", "bfloat16", "fp8"),
    Numbers("int8, int8", "float32", "int8"),
    *(Numbers(f"{form}, {dtype}", dtype, form) for form in GROUPS for dtype in ("float32", "bfloat16")),
)


def variants() -> list[Variant]:
    return [Variant("SlowFast paper", "none", SlowFast(), NoCache())]


def same_tokens(a: Sequence[int], b: Sequence[int]) -> int:
    """Positions at which two responses have the same token."""
    return sum(x == y for x, y in zip(a, b, strict=False))


@torch.inference_mode()
def choices(engine: sfs_triton.Engine, chosen: list[tasks.Problem]) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest token and its probability at every response position ``[n, GEN_LENGTH]`` before any is decided."""
    found = []
    for problem in chosen:
        prompt = engine.text.encode(problem.question)
        canvas = torch.tensor([prompt + [engine.spec.mask_id] * GEN_LENGTH], device=engine.model.device)
        found.append(engine.model.logits(canvas)[0, len(prompt) :].float().softmax(-1).max(-1))
    return torch.stack([each.indices for each in found]), torch.stack([each.values for each in found])


class Line(NamedTuple):
    """A line of the record: how it decodes (None: a single forward is looked at), and in which numbers."""

    group: str
    label: str
    numbers: Numbers
    variant: Variant | None


def lines() -> list[Line]:
    others = [each for each in OTHERS if each.quantization != "int8" or int8_speed()]  # a CPU may not have it
    decoded = [
        Line(f"{variant.group}, cache {variant.label}", numbers.label, numbers, variant)
        for variant in variants()
        for numbers in (EXACT, *others)
    ]
    return decoded + [Line(FORWARD, numbers.label, numbers, None) for numbers in others]


@functools.cache
def engine_of(numbers: Numbers) -> sfs_triton.Engine:
    return sfs_triton.load("embedded", "cpu", numbers.dtype, quantization=numbers.quantization)


class Task:
    """Problems with their check, and the float32 model's answers to them, each found once and only if asked for."""

    def __init__(self, kind: str, limit: int, check: Callable[[tasks.Problem, str], bool]):
        self.exact, self.check = engine_of(EXACT), check
        self.chosen = measured.choose(self.exact, kind, limit)
        self._answers: dict[str, list[sfs_triton.Generation]] = {}
        self._choices: tuple[torch.Tensor, torch.Tensor] | None = None

    def answers(self, line: Line) -> list[sfs_triton.Generation]:
        if line.group not in self._answers:
            self._answers[line.group] = decode(self.exact, line.variant, self.chosen)
        return self._answers[line.group]

    def measure(self, line: Line) -> dict:
        """Decode every problem, and compare with float32's responses: tokens by position, and which are right."""
        exact = self.answers(line)
        done = exact if line.numbers is EXACT else decode(engine_of(line.numbers), line.variant, self.chosen)
        right, was_right = (
            [self.check(p, each.text) for p, each in zip(self.chosen, some, strict=True)] for some in (done, exact)
        )
        pairs = list(zip(done, exact, strict=True))
        length = sum(max(len(d.tokens), len(e.tokens)) for d, e in pairs)
        return {
            **measured.count(right),
            "lost": sum(was and not now for was, now in zip(was_right, right, strict=True)),
            "gained": sum(now and not was for was, now in zip(was_right, right, strict=True)),
            "same_responses": sum(d.tokens == e.tokens for d, e in pairs) / len(pairs),
            "same_tokens": sum(same_tokens(d.tokens, e.tokens) for d, e in pairs) / length,
            "nfe": sum(d.nfe for d in done) / len(done),
        }

    def compare_choices(self, line: Line) -> dict:
        """A forward over undecided responses: at how many positions the same token is likeliest, and how sure it is."""
        if self._choices is None:
            self._choices = choices(self.exact, self.chosen)
        (token, score), (exact, sure) = choices(engine_of(line.numbers), self.chosen), self._choices
        same, certain = token == exact, sure > 0.85
        mine, theirs = times((engine_of(line.numbers), self.exact), self.chosen[len(self.chosen) // 2])
        return {
            "n": len(self.chosen),
            "positions": same.numel(),
            "same_choice": same.double().mean().item(),
            "sure_positions": int(certain.sum()),
            "same_where_sure": same[certain].double().mean().item(),
            "score_difference": (score - sure)[same].abs().double().mean().item(),
            "cpu_ms": 1e3 * mine,
            "float32_cpu_ms": 1e3 * theirs,
        }


@torch.inference_mode()
def times(engines: Sequence[sfs_triton.Engine], problem: tasks.Problem, rounds: int = 30) -> list[float]:
    """Return CPU seconds per forward of each: the least of several interleaved runs. Other work is excluded."""
    ids = engines[0].text.encode(problem.question) + [engines[0].spec.mask_id] * GEN_LENGTH
    best = [math.inf] * len(engines)
    for _ in range(rounds):
        for index, engine in enumerate(engines):
            begin = time.process_time()
            engine.model.logits(torch.tensor([ids], device=engine.model.device))
            best[index] = min(best[index], time.process_time() - begin)
    return best


def weight_bytes(weights: Weights) -> int:
    """Bytes of all weights; a tied head is counted once."""
    layers = [getattr(layer, name.name) for layer in weights.layers for name in fields(layer)]
    each = {id(x): x.nbytes for x in (weights.embedding, weights.norm, weights.head, *layers) if x is not None}
    return sum(each.values())


def run(limit: int, names: list[str], path: Path) -> None:
    """Measure what the record lacks; results are saved after every line."""
    device = engine_of(EXACT).model.device
    record = {"machine": machine(device), "model": "embedded", "gen_length": GEN_LENGTH, "lines": []}
    if path.exists():
        record = measured.read(path, limit)
    for name in names:
        kind, check = TASKS[name]
        task = Task(kind, limit, check)
        for line in measured.missing(record, name, lines()):
            found = task.compare_choices(line) if line.variant is None else task.measure(line)
            size = weight_bytes(engine_of(line.numbers).model.weights)
            whole = {"task": name, "group": line.group, "label": line.label, "bytes": size, **found}
            print(json.dumps(whole), flush=True)
            measured.keep(record, whole, path)


def tables(record: dict) -> str:
    """Markdown tables of a record: for each task one of decoding, then one of single forwards."""
    pieces = []
    for task in dict.fromkeys(line["task"] for line in record["lines"]):
        mine = [line for line in record["lines"] if line["task"] == task]
        pieces.append(f"**{task}**, {mine[0]['n']} held-out problems:\n")
        head = "| decoding | weights, computed in | right (95%) | lost, gained | same responses | same tokens | NFE |"
        pieces += [head, "|---|---|---|---|---|---|---|"]
        group = None
        for line in (line for line in mine if line["group"] != FORWARD):
            low, high = line["interval"]
            first = "" if line["group"] == group else line["group"]
            group = line["group"]
            pieces.append(
                f"| {first} | {line['label']} | {line['correct'] / line['n']:.1%} ({low:.0%}-{high:.0%}) "
                f"| {line['lost']}, {line['gained']} | {line['same_responses']:.1%} | {line['same_tokens']:.1%} "
                f"| {line['nfe']:.2f} |"
            )
        pieces.append("")
    head = (
        "| one forward | weights, computed in | MB | same choice | where float32 is sure | score differs by | CPU ms |"
    )
    pieces += [head, "|---|---|---|---|---|---|---|"]
    for line in (line for line in record["lines"] if line["group"] == FORWARD):
        pieces.append(
            f"| {line['task']} | {line['label']} | {line['bytes'] / 1e6:.2f} | {line['same_choice']:.2%} of "
            f"{line['positions']:,} | {line['same_where_sure']:.2%} of {line['sure_positions']:,} "
            f"| {line['score_difference']:.4f} | {line['cpu_ms']:.1f}, float32 {line['float32_cpu_ms']:.1f} |"
        )
    return "\n".join([*pieces, ""])


def costs() -> str:
    """Predict the products and the head of a step of LLaDA-8B by the cost model, by kernel. Nothing is timed."""
    head = "| step | positions | weights | GB moved | TFLOP | ms, predicted | measured |"
    pieces = [head, "|---|---|---|---|---|---|---|"]
    for capacity, number in ((32, 1), (64, 1), (128, 1), (128, 0)):
        for quantization in (None, "fp8", "int4"):
            setting = Setting(capacity=capacity, span_cap=min(64, capacity), quantization=quantization)
            kind = list(kinds(setting, "region"))[number]
            steps = steps_of(setting, "triton", "region")
            parts = steps.count(kind).parts
            both = [parts["products"], parts["head"]]
            pieces.append(
                f"| region {kind.name} | {steps.shapes(kind)[0].size} | {quantization or 'bfloat16'} "
                f"| {sum(part.bytes for part in both) / 1e9:.2f} | {sum(part.flops for part in both) / 1e12:.2f} "
                f"| {1e3 * sum(map(CEILINGS['h200'].part_seconds, both)):.2f} |  |"
            )
    return "\n".join([*pieces, ""])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=100, help="problems a task")
    parser.add_argument("--tasks", default=",".join(TASKS), help=f"comma-separated, of {tuple(TASKS)}")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--write-doc", type=Path, metavar="PAGE", help="write the tables of --json; measure nothing")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    for name in ("limit", "threads"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)} is not positive")
    torch.set_num_threads(arguments.threads)
    if arguments.write_doc:
        record = measured.read(arguments.json)
        pages.write_doc(arguments.write_doc, "quantised", lambda: tables(record))
        pages.write_doc(arguments.write_doc, "costs", costs)
        return 0
    for task in arguments.tasks.split(","):
        if task not in TASKS:
            parser.error(f"--tasks {task!r} is not one of {tuple(TASKS)}")
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    run(arguments.limit, arguments.tasks.split(","), arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
