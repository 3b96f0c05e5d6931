"""The rows of one request, step by step, up to their results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..errors import require
from ..models import ModelSpec
from ..text.codec import TextCodec
from .outputs import Frame, Generation
from .scheduler import Scheduler
from .sequence import Row, fault_of


class Run:
    """One request on a scheduler of its own: its frames, one a round in which rows stepped, then :meth:`results`."""

    def __init__(self, scheduler: Scheduler, rows: Sequence[Row], spec: ModelSpec, text: TextCodec | None):
        self._scheduler, self._rows, self._spec, self._text = scheduler, rows, spec, text
        self._begun = False
        for row in rows:
            scheduler.submit(row)

    def close(self) -> None:
        """Stop, wherever it is."""
        self._scheduler.close()

    def advance(self) -> list[Row] | None:
        """The rows that took a step in the next round; None at the end."""
        self._begun = True
        while not all(row.over for row in self._rows):
            if moved := self._scheduler.step():
                return moved
        return None

    def drop(self, index: int) -> None:
        """End a row between two steps: it takes none any more, and costs none. The others go on as they would have.

        Its result is the row as it then stands, ``masks_left`` of it undecided. A step that a loop has queued ahead is
        still taken, but no frame tells of the row in it.

        Raises:
            RuntimeError: no step has been taken yet.
            ArgumentError: there is no such row.
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
        """The rows of a run that is over.

        Raises:
            NumericalFault, StepCapExceeded: for some rows; the others are in its ``finished``, by row.
        """
        done = {index: row.result(self._spec, self._text) for index, row in enumerate(self._rows) if not row.fault}
        if (error := fault_of(self._rows, done)) is not None:
            raise error
        return list(done.values())
