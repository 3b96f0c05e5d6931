"""Eager execution: Python calls each operation. The CPU product path, and the oracle for loops on a GPU."""

from __future__ import annotations

from .report import Report, Reports
from .step import Step


class EagerLoop:
    """Launch each step after the output of the one before it is known.

    With ``tight``, steps have exact shapes, and sequences of equal scope are forwarded together, others separately: no
    sequence pays for another's length, and each gets the bits that it would get alone or in its group. Otherwise steps
    have the padded shapes of a captured loop; ``alone`` makes them exact if there is only one slot.
    """

    name = "eager"

    def __init__(self, tight: bool, alone: bool = False, step_limit: float = 600.0):
        self.tight, self._alone, self._step_limit = tight, alone, step_limit

    def canvas_length(self, longest: int, most: int) -> int:
        return longest

    def prepare(self, step: Step) -> None:
        """Do nothing: eager steps need no preparation."""

    def run(self, step: Step) -> Reports:
        """Step until no sequence runs; yield one report per step."""
        tight = self.tight or self._alone and step.slots == 1
        while rows := step.running():
            turns = step.tight_turns(rows) if tight else step.fixed_turns(rows)
            for planned in turns:
                if (turn := step.still(planned)) is None:
                    continue
                number = step.mailbox.posted + 1
                takers = step.takers(turn, number)
                step.aim(turn)
                step.run(turn.shapes, slow=turn.slow)
                step.started(turn)
                letter = step.hear(number, self._step_limit)
                yield Report(takers, step.control, letter, last=planned is turns[-1])
