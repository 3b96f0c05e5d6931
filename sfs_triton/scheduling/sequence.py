"""A sequence: one canvas from its request to its result."""

from __future__ import annotations

from collections.abc import Sequence

from ..decoding.caching import RowView
from ..decoding.samplers import Sampler
from ..errors import NumericalFault, RowFault, StepCapExceeded
from ..kernels.control import COLUMN, FAST
from ..models import ModelSpec
from ..runner import Report
from ..text.codec import TextCodec
from .outputs import Generation
from .request import Kind, Request
from .trace import StepTrace, Tracer


class Row:
    """A sequence: its canvas and its progress, as read by the host. It takes steps once it has a slot of a batch."""

    def __init__(self, kind: Kind, sampler: Sampler, canvas: list[int], start: int, seed: int, mask_id: int):
        self.kind, self.sampler = kind, sampler
        self.canvas, self.start, self.seed, self._mask_id = canvas, start, seed, mask_id
        self.masks = canvas.count(mask_id)
        self.tracer = Tracer(sampler, kind.policy, start, len(canvas), kind.trace)
        self.tokens, self.commit_step = canvas, [-1] * len(canvas)  # as last read
        self.control: list[int] | None = None  # likewise; None before the first step
        self.seconds = 0.0  # duration of its batch's rounds while it held a slot
        self.dropped = self.over = False  # over: final tokens and counters have reached the host

    @classmethod
    def of(cls, request: Request, mask_id: int) -> list[Row]:
        """Build the sequences of a request."""
        given = zip(request.canvases, request.starts, request.seeds, strict=True)
        return [cls(request.kind, request.sampler, *row, mask_id) for row in given]

    @property
    def response_length(self) -> int:
        return len(self.canvas) - self.start

    @property
    def step_cap(self) -> int:
        """Step limit: more steps than it can take."""
        return self.sampler.step_cap(self.response_length) + self.kind.policy.extra_steps(self.response_length)

    @property
    def steps(self) -> int:
        """Number of its steps that have been reported."""
        return len(self.tracer.forward_lengths)

    @property
    def running(self) -> bool:
        """True if it has steps left, whether it holds a slot yet or not."""
        return not self.dropped and not self.over and (self.control is None or not self.control[COLUMN["done"]])

    @property
    def fast(self) -> bool:
        """True in the fast stage."""
        return self.control is not None and self.control[COLUMN["stage"]] == FAST

    @property
    def span(self) -> tuple[int, int]:
        """Span ``[s, e)`` of its cycle; ``e`` is -1 until it is known."""
        if self.control is None:
            return self.start, -1
        return self.control[COLUMN["span_start"]], self.control[COLUMN["span_end"]]

    @property
    def settled(self) -> int:
        """Position before which everything is decided."""
        limit = len(self.canvas) if self.control is None else self.control[COLUMN["limit"]]
        given, commits = self.canvas, self.commit_step
        return next((p for p in range(self.start, limit) if given[p] == self._mask_id and commits[p] < 0), len(given))

    @property
    def last_committed(self) -> list[int]:
        """Positions that its last step committed."""
        return [p for p, step in enumerate(self.commit_step) if step == self.steps - 1]

    def take_trace(self) -> StepTrace | None:
        """Remove and return the trace of its last step, if it is still there. Results lack the removed ones."""
        return self.tracer.steps.pop() if self.tracer.steps else None

    def take(self, view: RowView, report: Report) -> None:
        """Record a step it has taken; ``view`` is its state before the step."""
        self.tracer.after(view, report)
        self.control = report.control[view.index]
        if self.kind.frames:
            size = len(self.canvas)
            self.tokens, self.commit_step = (
                report.letter[name][view.index, :size].tolist() for name in ("tokens", "commit_step")
            )

    @property
    def fault(self) -> int:
        """Fault code: 0 none, 1 + the step whose logits held NaN, or -1 - the step at which its cap was reached."""
        return self.control[COLUMN["fault"]] if self.control else 0

    def result(self, spec: ModelSpec, text: TextCodec | None) -> Generation:
        """Return the result from its final state."""
        canvas, tracer = self.tokens, self.tracer
        nfe, left = (self.control[COLUMN[name]] for name in ("step", "masks_left")) if self.control else (0, self.masks)
        response = canvas[self.start :]
        generated = self.start > 0 and spec.eos_id in response  # an infilled canvas is not cut at end-of-text
        tokens = response[: response.index(spec.eos_id) + 1] if generated else response
        branches = 2 if self.sampler.cfg_scale else 1
        return Generation(
            text=None if text is None else text.decode(tokens),
            tokens=tokens,
            canvas=canvas,
            prompt_length=self.start,
            nfe=nfe,
            forwards=branches * len(tracer.forward_lengths),
            rows_forwarded=branches * tracer.rows_forwarded,
            full_forwards=branches * tracer.full_forwards,
            forward_lengths=tracer.forward_lengths,
            commit_step=self.commit_step,
            masks_left=left,
            seconds=self.seconds,
            trace=tracer.steps if self.kind.trace else None,
        )


def fault_of(rows: Sequence[Row], finished: dict[int, Generation]) -> RowFault | None:
    """Return the error for the faults of some sequences, or None; ``finished`` are the results of the others."""
    faults = {index: row.fault for index, row in enumerate(rows) if row.fault}
    if not faults:
        return None
    broken = ", ".join(f"row {index} at step {fault - 1}" for index, fault in faults.items() if fault > 0)
    stuck = ", ".join(f"row {index} at step {-fault}" for index, fault in faults.items() if fault < 0)
    kinds = {"the model produced NaN logits": broken, "still undecided at the step cap of their sampler": stuck}
    text = "; ".join(f"{kind}: {rows}" for kind, rows in kinds.items() if rows)
    return (NumericalFault if broken else StepCapExceeded)(text, finished)
