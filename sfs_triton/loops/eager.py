"""The loop in which Python calls each operation: the CPU product path, and the oracle for loops on a GPU."""

from __future__ import annotations

from .report import Report, Reports
from .step import Step


class EagerLoop:
    """Starts each step once it knows how the one before it ended.

    ``tight`` steps are as large as what the rows then need, and rows whose scopes are equal are forwarded together,
    others on their own: no row pays for another's length, and each gets the bits that it would get alone or in its
    group. Otherwise steps have the fixed sizes of a captured loop, and all rows go along; ``alone`` makes them tight
    for a batch of one all the same.
    """

    name = "eager"

    def __init__(self, tight: bool, alone: bool = False, step_limit: float = 600.0):
        self.tight, self._alone, self._step_limit = tight, alone, step_limit

    def canvas_length(self, longest: int, most: int) -> int:
        return longest

    def prepare(self, step: Step) -> None:
        """There is nothing to prepare."""

    def run(self, step: Step) -> Reports:
        """Step to the end; yields a report a step."""
        number = step.mailbox.posted
        before, _ = step.hear(number, self._step_limit)
        tight = self.tight or self._alone and step.state.tokens.shape[0] == 1
        while rows := step.views(before):
            if tight:
                step.run(step.policy.tight(rows, step.canvas), slow=not all(row.fast for row in rows))
            else:
                step.run([step.fixed(rows, rows[0].step)])
            step.mailbox.posted = number = number + 1
            after, letter = step.hear(number, self._step_limit)
            yield Report(rows, after, letter)
            before = after
