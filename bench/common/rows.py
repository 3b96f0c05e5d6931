"""Rows of the main benchmark: implementation, sampler and cache policy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from sfs_triton import FixedSteps, Sampler, SlowFast, Threshold

PLAIN, OURS, AUTOREGRESSIVE = "plain torch", "sfs_triton", "transformers"
WHO = (PLAIN, OURS, AUTOREGRESSIVE)
FLAGS = {"by": "who", "samplers": "sampler", "cache": "cache"}  # of the command line, and what they choose by


@dataclass(frozen=True)
class Row:
    """One line of the table. ``backend`` and ``execution`` are those of sfs_triton; None: its default."""

    who: str
    sampler: str
    label: str
    settings: Sampler | None
    cache: str = "none"
    backend: str | None = None
    execution: str | None = None

    @property
    def name(self) -> str:
        parts = (self.who, self.sampler, self.cache, self.backend, self.execution)
        return ", ".join(part for part in parts if part)

    @property
    def a_token_a_step(self) -> bool:
        """Return True if the number of steps is known before the first."""
        return self.settings is None or isinstance(self.settings, FixedSteps) and self.settings.steps is None


def every_row(gen_length: int) -> list[Row]:
    """All that is compared; blocks are 32 positions where a response has a multiple of them."""
    block = 32 if gen_length % 32 == 0 else gen_length
    vanilla = ("vanilla", "one token a step", FixedSteps())
    blocks = ("semi-autoregressive", f"blocks of {block}", FixedSteps(block_length=block))
    threshold = ("threshold", "tau 0.9", Threshold(block_length=block))
    slowfast = ("slowfast", "paper", SlowFast())
    table = (  # caches of the baselines, and of sfs_triton
        (vanilla, ("none",), ("none",)),
        (blocks, (), ("none",)),
        (threshold, ("none", "prefix", "dual"), ("none", "prefix", "dual", "region")),
        (slowfast, ("none", "refresh"), ("none", "refresh", "region")),
    )
    rows = [
        Row(who, *what, cache)
        for what, plain, ours in table
        for who, caches in ((PLAIN, plain), (OURS, ours))
        for cache in caches
    ]
    return [*rows, Row(AUTOREGRESSIVE, "autoregressive", "LLaMA, static cache", None)]


def chosen(rows: Iterable[Row], wanted: dict[str, Sequence[str] | None]) -> list[Row]:
    """Select the rows that match one of the values of each flag; None matches all.

    Raises:
        ValueError: names a value that no row has, or reports that no row is left.
    """
    rows = list(rows)
    left = rows
    for flag, values in wanted.items():
        if values is None:
            continue
        known = sorted({getattr(row, FLAGS[flag]) for row in rows})
        for value in values:
            if value not in known:
                raise ValueError(f"--{flag} {value!r} is not one of {known}")
        left = [row for row in left if getattr(row, FLAGS[flag]) in values]
    if not left:
        told = " ".join(f"--{flag} {','.join(values)}" for flag, values in wanted.items() if values)
        raise ValueError(f"{told} leaves no row")
    return left


def spread_out(rows: Iterable[Row], backends: Sequence[str | None], executions: Sequence[str | None]) -> list[Row]:
    """Return every row of sfs_triton once for each backend and execution; others as they are."""
    found = []
    for row in rows:
        ours = [(backend, execution) for execution in executions for backend in backends]
        ways = ours if row.who == OURS else [(None, None)]
        found += [replace(row, backend=backend, execution=execution) for backend, execution in ways]
    return found
