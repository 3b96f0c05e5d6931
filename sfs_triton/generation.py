"""What a generation gives: a frame a step while it runs, and its rows when they are done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .kernels.control import COLUMN, FAST
from .loops import Report
from .trace import StepTrace


@dataclass(frozen=True)
class Frame:
    """The canvases after a step. Lists hold one entry a row."""

    step: int
    tokens: list[list[int]]
    commit_step: list[list[int]]
    running: list[bool]
    fast: list[bool]
    span: list[tuple[int, int]]  # [s, e) of each row; e is -1 while it is not known
    committed: list[list[int]] = field(default_factory=list)  # the positions that this step filled
    settled: list[int] = field(default_factory=list)  # all from the row's start to before here is decided


@dataclass(frozen=True)
class Generation:
    """One finished row.

    ``tokens`` is the response up to and including its first end-of-text; ``canvas`` the whole row, prompt included.
    ``nfe`` counts steps of the sampler, ``forwards`` calls of the model (two a step under guidance),
    ``rows_forwarded`` positions that went through the layers, ``full_forwards`` steps that covered the whole canvas;
    ``forward_lengths`` is what each step's forward covered.
    """

    text: str | None
    tokens: list[int]
    canvas: list[int]
    prompt_length: int
    nfe: int
    forwards: int
    rows_forwarded: int
    full_forwards: int
    forward_lengths: list[int]
    commit_step: list[int]  # for each canvas position: the step that filled it, -1 if it was given
    masks_left: int  # 0 but where a sampler's own bounds leave some (``max_cycles``, Dream's one-step blocks)
    seconds: float  # of the whole batch, without the time spent in on_step
    trace: list[StepTrace] | None = None

    @property
    def tokens_per_forward(self) -> float:
        """Response tokens, end-of-text included, for each step."""
        return len(self.tokens) / max(1, self.nfe)

    @property
    def response(self) -> list[int]:
        """Everything decoded, padding after the end-of-text included."""
        return self.canvas[self.prompt_length :]


def frame(report: Report, canvases: Sequence[Sequence[int]], mask_id: int) -> Frame:
    """A report of a loop that posts frames, as its users see it. ``canvases`` are the rows as they were given."""
    step = max(row.step for row in report.rows)
    tokens = [row[: len(given)] for row, given in zip(report.letter["tokens"].tolist(), canvases, strict=True)]
    commits = [row[: len(given)] for row, given in zip(report.letter["commit_step"].tolist(), canvases, strict=True)]
    taken = {row.index: row.step for row in report.rows}
    settled = []
    for given, commit, control in zip(canvases, commits, report.control, strict=True):
        places = range(control[COLUMN["start"]], control[COLUMN["limit"]])
        open_places = (p for p in places if given[p] == mask_id and commit[p] < 0)
        settled.append(next(open_places, len(given)))
    return Frame(
        step=step,
        tokens=tokens,
        commit_step=commits,
        running=[not row[COLUMN["done"]] for row in report.control],
        fast=[row[COLUMN["phase"]] == FAST for row in report.control],
        span=[(row[COLUMN["s"]], row[COLUMN["e"]]) for row in report.control],
        committed=[
            [p for p, at in enumerate(row) if at == taken[index]] if index in taken else []
            for index, row in enumerate(commits)
        ],
        settled=settled,
    )
