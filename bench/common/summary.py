"""The main benchmark in five rows: the table of the README, which the benchmark also prints last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .rows import OURS, PLAIN

HEAD = ("decoding", "by", "forwards per answer", "tokens/s", "right")
SAMPLERS = {"vanilla": "one token per forward", "threshold": "Fast-dLLM's threshold", "slowfast": "SlowFast"}
# By, sampler and cache of each row; without a cache, the fastest of that sampler.
WANTED = ((PLAIN, "vanilla", None), (PLAIN, "threshold", None), (PLAIN, "slowfast", None)) + tuple(
    (OURS, sampler, "region") for sampler in ("threshold", "slowfast")
)

Line = dict[str, Any]


def chosen(rows: Sequence[Line]) -> list[Line]:
    """Select the rows of the short table among those of single prompts; a record may lack some."""
    found = []
    for by, sampler, cache in WANTED:
        fitting = [
            row
            for row in rows
            if (row["by"], row["sampler"], row["batch"]) == (by, sampler, 1) and cache in (None, row["cache"])
        ]
        found += sorted(fitting, key=lambda row: -row["tokens_per_second"])[:1]
    return found


def name(row: Line) -> str:
    """Describe the sampler and the cache of a row."""
    cache = "" if row["cache"] == "none" else f", {row['cache']} cache"
    return SAMPLERS[row["sampler"]] + cache


def cells(row: Line) -> list[str]:
    """Format a row of the short table."""
    rate = f"{'~' if row['extrapolated'] else ''}{row['tokens_per_second']:,.0f}"
    return [
        name(row),
        row["by"],
        f"{row['nfe']:.0f}",
        rate if row["speedup"] is None else f"{rate} ({row['speedup']:.0f}x)",
        f"{row['correct']} of {row['checked']}" if row["checked"] else "",
    ]


def meaning(rows: Sequence[Line]) -> str:
    """Explain the short table: what the samplers save, what is compared, and which row is the fastest."""
    slow, others = rows[0], rows[1:]
    saved = ""
    if slow["sampler"] == "vanilla" and others:
        least, most = (f"{pick(row['nfe'] for row in others):.0f}" for pick in (min, max))
        many = least if least == most else f"{least} to {most}"
        saved = f"The parallel samplers take {many} forwards for an answer instead of {slow['nfe']:.0f}. "
    fastest = max(rows, key=lambda row: row["tokens_per_second"])
    return (
        f"{saved}Rows by {PLAIN} are the published algorithms in eager PyTorch, with their fastest cache. The fastest "
        f"of these rows: {name(fastest)}, by {fastest['by']}."
    )
