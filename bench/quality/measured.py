"""Helpers shared by measurements on held-out problems: variants, decoding, and records that grow by line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import sfs_triton
from bench.common.figures import wilson_interval
from bench.common.pages import replace_file
from bench.embedded import problems, tasks
from sfs_triton.decoding.caching import CachePolicy

GEN_LENGTH, BATCH, SEED = 128, 16, 1  # a sequence of a batch decodes as it would alone


class Variant(NamedTuple):
    """A line of a table: the group it is compared within, its name there, and how it decodes."""

    group: str
    label: str
    sampler: sfs_triton.Sampler
    cache: CachePolicy


def choose(engine: sfs_triton.Engine, kind: str, limit: int) -> list[tasks.Problem]:
    """``limit`` held-out problems, sorted by length, so that alike ones are forwarded together."""
    chosen = problems.held_out(kind, limit, engine.text, seed=SEED, gen_length=GEN_LENGTH)
    return sorted(chosen, key=lambda p: len(engine.text.encode(p.question)))


def decode(engine: sfs_triton.Engine, variant: Variant, chosen: list[tasks.Problem]) -> list[sfs_triton.Generation]:
    """Every problem's answer."""
    how = {"gen_length": GEN_LENGTH, "sampler": variant.sampler, "cache": variant.cache}
    batches = (chosen[at : at + BATCH] for at in range(0, len(chosen), BATCH))
    return [done for batch in batches for done in engine.generate([p.question for p in batch], **how)]


def count(right: Sequence[bool]) -> dict:
    """Count a line's correct answers, with Wilson's interval of their share."""
    low, high = wilson_interval(sum(right), len(right))
    return {"n": len(right), "correct": sum(right), "interval": [round(low, 4), round(high, 4)]}


def read(path: Path, n: int | None = None, **agreed) -> dict:
    """A record that is there already; of ``n`` problems a line, and with the entries ``agreed``, where given."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record["lines"], list):
            raise TypeError("'lines' is no list")
        sizes = {line["n"] for line in record["lines"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"error: --json {path} is no record: {type(error).__name__}: {error}") from None
    if n is not None and sizes - {n}:
        raise SystemExit(f"error: --limit {n}, but {path} has lines of {sorted(sizes - {n})}; use another file")
    for name, value in agreed.items():
        if record.get(name) != value:
            raise SystemExit(f"error: --{name} {value}, but {path} is of {record.get(name)!r}; use another file")
    return record


def missing(record: dict, task: str, variants: Sequence[Variant]) -> Iterator[Variant]:
    """List the variants for which the record has no line of the task."""
    there = {(line["task"], line["group"], line["label"]) for line in record["lines"]}
    return (v for v in variants if (task, v.group, v.label) not in there)


def keep(record: dict, line: dict, path: Path) -> None:
    """Add a line to the record and write it, whole or not at all, each line of it on one line of the file."""
    record["lines"].append(line)
    rest = {name: value for name, value in record.items() if name != "lines"}
    head = json.dumps({**rest, "lines": []}, indent=1).removesuffix("]\n}")
    lines = ",\n".join("  " + json.dumps(line) for line in record["lines"])
    replace_file(path, f"{head}\n{lines}\n ]\n}}\n")
