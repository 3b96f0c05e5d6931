"""Run of one request: its sequences, from the first step to the results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..errors import require
from ..models import ModelSpec
from ..text.codec import TextCodec
from .outputs import Frame, Generation
from .scheduler import Scheduler
from .sequence import Row, fault_of


class Run:
    """Run one request on its own scheduler: one frame per round with steps, then :meth:`results`."""

    def __init__(self, scheduler: Scheduler, rows: Sequence[Row], spec: ModelSpec, text: TextCodec | None):
        self._scheduler, self._rows, self._spec, self._text = scheduler, rows, spec, text
        self._begun = False
        for row in rows:
            scheduler.submit(row)

    def close(self) -> None:
        """Stop at any point."""
        self._scheduler.close()

    def advance(self) -> list[Row] | None:
        """Run the next round; return the sequences that took a step, None at the end."""
        self._begun = True
        while not all(row.over for row in self._rows):
            if moved := self._scheduler.step():
                return moved
        return None

    def drop(self, index: int) -> None:
        """End a sequence between two steps: it takes no further step. The others are not affected.

        Its result is its present canvas, with ``masks_left`` positions undecided. A step that is already queued still
        runs, but no frame shows the sequence in it.

        Raises:
            RuntimeError: no step has been taken yet.
            ArgumentError: there is no such sequence.
        """
        require(
            0 <= index < len(self._rows), f"row={index} is not one of the {len(self._rows)} rows of this generation"
        )
        if not self._begun:
            raise RuntimeError(f"row {index} cannot be dropped before the first step")
        self._scheduler.drop(self._rows[index])

    def frames(self) -> Iterator[Frame]:
        while (moved := self.advance()) is not None:
            yield self._frame(set(moved))

    def _frame(self, moved: set[Row]) -> Frame:
        rows = self._rows
        return Frame(
            step=max(row.steps for row in moved) - 1,
            tokens=[row.tokens for row in rows],
            commit_step=[row.commit_step for row in rows],
            running=[row.running for row in rows],
            fast=[row.fast for row in rows],
            span=[row.span for row in rows],
            committed=[row.last_committed if row in moved else [] for row in rows],
            settled=[row.settled for row in rows],
        )

    def results(self) -> list[Generation]:
        """Return the results of a finished run.

        Raises:
            NumericalFault, StepCapExceeded: some sequences failed; ``finished`` has the others, by index.
        """
        done = {index: row.result(self._spec, self._text) for index, row in enumerate(self._rows) if not row.fault}
        if (error := fault_of(self._rows, done)) is not None:
            raise error
        return list(done.values())
