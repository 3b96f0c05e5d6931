"""Costs of an evaluation: requests, tokens, steps and seconds per task, over all ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(slots=True)
class TaskCost:
    """Costs of one task's requests. ``seconds`` is the time in ``generate`` of one rank, or of its likelihoods, whose
    ``nfe`` are forwards of one canvas."""

    requests: int = 0
    tokens: int = 0
    nfe: int = 0
    seconds: float = 0.0
    truncated: int = 0


@dataclass
class EvaluationCosts:
    """Costs per task, of this rank and, once gathered, of all ranks. ``started``: decoding has started."""

    started: bool = False
    own: dict[str, TaskCost] = field(default_factory=lambda: defaultdict(TaskCost))
    gathered: list[dict[str, TaskCost]] | None = None

    def add(self, task: str, cost: TaskCost) -> None:
        self.own[task] = _total({"before": self.own[task], "now": cost})

    def summary(self) -> dict[str, dict[str, Any]]:
        """Return figures per task, and their totals under ``"all"``, summed over the ranks.

        Ranks run concurrently, so ``seconds`` is the slowest rank's and ``tokens_per_second`` the tokens of all ranks
        over that time.
        """
        ranks = [self.own] if self.gathered is None else self.gathered
        tasks = list(dict.fromkeys(task for rank in ranks for task in rank))
        figures = {task: _figures([rank.get(task, TaskCost()) for rank in ranks]) for task in tasks}
        return figures | {"all": _figures([_total(rank) for rank in ranks])}

    def table(self) -> str:
        """Return the summary as a Markdown table in lm-eval's format."""
        heads = ("Task", "requests", "tokens/s", "NFE", "TPF", "tokens", "seconds")
        rows = [
            (
                task,
                f"{f['requests']}",
                f"{f['tokens_per_second']:.1f}",
                f"{f['nfe_per_request']:.1f}",
                f"{f['tokens_per_forward']:.2f}",
                f"{f['tokens']}",
                f"{f['seconds']:.1f}",
            )
            for task, f in self.summary().items()
        ]
        widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
        lines = ["|".join(["", *(cell.rjust(w) for cell, w in zip(row, widths, strict=True)), ""]) for row in rows]
        head = "|".join(["", *(cell.rjust(w) for cell, w in zip(heads, widths, strict=True)), ""])
        return "\n".join([head, "|".join(["", *("-" * (w - 1) + ":" for w in widths), ""]), *lines])


def _total(costs: Mapping[str, TaskCost]) -> TaskCost:
    return TaskCost(*(sum(getattr(cost, f.name) for cost in costs.values()) for f in fields(TaskCost)))


def _figures(ranks: Sequence[TaskCost]) -> dict[str, Any]:
    requests, tokens, nfe = (sum(getattr(rank, name) for rank in ranks) for name in ("requests", "tokens", "nfe"))
    seconds = max(rank.seconds for rank in ranks)
    return {
        "requests": requests,
        "tokens": tokens,
        "nfe": nfe,
        "seconds": seconds,
        "tokens_per_second": tokens / max(seconds, 1e-9),
        "nfe_per_request": nfe / max(requests, 1),
        "tokens_per_forward": tokens / max(nfe, 1),
        "truncated": sum(rank.truncated for rank in ranks),
        "requests_by_rank": [rank.requests for rank in ranks],
    }


ALL_COSTS: list[EvaluationCosts] = []  # of every model of this process, printed by sfs-eval at the end
