"""Run of one request: its sequences, from the first step to the results."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import check_integer
from ..models import ModelSpec
from ..text.codec import TextCodec
from .outputs import Frame, Generation
from .scheduler import Scheduler
from .sequence import Sequence, fault_of


class Run:
    """Run the sequences of one request on their own scheduler: one frame per round with steps, then :meth:`results`."""

    def __init__(self, scheduler: Scheduler, sequences: list[Sequence], spec: ModelSpec, text: TextCodec | None):
        self._scheduler, self._sequences, self._spec, self._text = scheduler, sequences, spec, text
        for sequence in sequences:
            scheduler.submit(sequence)

    def close(self) -> None:
        """Stop at any point."""
        self._scheduler.close()

    def advance(self) -> list[Sequence] | None:
        """Run the next round; return the sequences that took a step, None at the end."""
        while not all(sequence.finished for sequence in self._sequences):
            if stepped := self._scheduler.step():
                return stepped
        return None

    def drop(self, index: int) -> None:
        """End a sequence between two steps: it takes no further step. The others are not affected.

        Its result is its present canvas, with ``masks_left`` positions undecided. A step that is already queued still
        runs, but no frame shows the sequence in it.

        Raises:
            ArgumentError: there is no such sequence.
        """
        check_integer("index", index, 0, len(self._sequences) - 1)
        self._scheduler.drop(self._sequences[index])

    def frames(self) -> Iterator[Frame]:
        while (stepped := self.advance()) is not None:
            yield self._frame(set(stepped))

    def _frame(self, stepped: set[Sequence]) -> Frame:
        every = self._sequences
        return Frame(
            step=max(sequence.steps for sequence in stepped) - 1,
            tokens=[sequence.tokens for sequence in every],
            commit_step=[sequence.commit_step for sequence in every],
            running=[sequence.running for sequence in every],
            fast=[sequence.fast for sequence in every],
            span=[sequence.span for sequence in every],
            committed=[sequence.last_committed if sequence in stepped else [] for sequence in every],
            settled=[sequence.settled for sequence in every],
        )

    def results(self) -> list[Generation]:
        """Return the results of a finished run.

        Raises:
            NumericalFault, StepCapExceeded: some sequences failed; ``finished`` has the others, by index.
        """
        every = enumerate(self._sequences)
        done = {index: each.result(self._spec, self._text) for index, each in every if not each.fault}
        if (error := fault_of(self._sequences, done)) is not None:
            raise error
        return list(done.values())
