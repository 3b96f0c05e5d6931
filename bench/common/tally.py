"""Results of the rows of a benchmark so far, and their summary."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .figures import percentile, wilson_interval
from .rows import Row


class Done(NamedTuple):
    """A decoded prompt. ``tokens`` of its response count up to and including the end-of-text."""

    tokens: int
    nfe: int
    full_forwards: int
    positions_forwarded: int
    text: str | None = None
    response: tuple[int, ...] = ()


class Visit(NamedTuple):
    """Result of a row for a batch of prompts. ``pace`` is seconds per step; memory is None where it is not measured."""

    done: list[Done]
    seconds: float
    pace: float
    memory: int | None = None
    note: str = ""


@dataclass
class Tally:
    """Totals of a row at one batch size; ``extrapolated`` if only a part of its steps was taken."""

    row: Row
    batch: int = 1
    extrapolated: bool = False
    visits: list[Visit] = field(default_factory=list)
    verdicts: list[bool | None] = field(default_factory=list)  # of every prompt; None where nobody knows the answer

    def add(self, visit: Visit, verdicts: Sequence[bool | None]) -> None:
        self.visits.append(visit)
        self.verdicts += verdicts

    @property
    def rate(self) -> float:
        """Tokens per second, the median over batches, so that a hiccup of the machine does not show."""
        return statistics.median(_rates(self.visits))

    def summary(self, vanilla_rate: float | None) -> dict:
        """Counts as means a prompt, speeds as medians over batches with the 20th and 80th of 100."""
        done = [one for visit in self.visits for one in visit.done]
        known = [verdict for verdict in self.verdicts if verdict is not None]
        low, high = wilson_interval(sum(known), len(known))
        n, nfe, tokens = len(done), sum(d.nfe for d in done), sum(d.tokens for d in done)
        rates, paces = _rates(self.visits), [1e3 * visit.pace for visit in self.visits]
        memory = [visit.memory for visit in self.visits if visit.memory is not None]
        row = self.row
        return {
            **{"by": row.who, "sampler": row.sampler, "preset": getattr(row.settings, "name", None)},
            **{"label": row.label, "cache": row.cache, "backend": row.backend, "execution": row.execution},
            "batch": self.batch,
            **{"nfe": nfe / n, "tpf": tokens / nfe, "tokens_per_second": self.rate},
            **{f"tokens_per_second_p{share}": percentile(rates, share / 100) for share in (20, 80)},
            "speedup": self.rate / vanilla_rate if vanilla_rate else None,
            "ms_per_forward": statistics.median(paces),
            **{f"ms_per_forward_p{share}": percentile(paces, share / 100) for share in (20, 80)},
            "accuracy": sum(known) / len(known) if known else None,
            "accuracy_low": low if known else None,
            "accuracy_high": high if known else None,
            **{"correct": sum(known), "checked": len(known), "generations": n, "tokens": tokens},
            "positions_forwarded": sum(d.positions_forwarded for d in done) / n,
            "full_forwards": sum(d.full_forwards for d in done) / n,
            "peak_memory_bytes": max(memory, default=None),
            "extrapolated": self.extrapolated,
            "note": self.visits[-1].note,
            "seconds": sum(visit.seconds for visit in self.visits),
        }


def _rates(visits: Sequence[Visit]) -> list[float]:
    return [sum(done.tokens for done in visit.done) / visit.seconds for visit in visits]
