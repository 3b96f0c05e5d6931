"""Check a worked solution for self-consistency, which parallel decoding breaks in a model that cannot do the sums."""

from __future__ import annotations

import re

from .tasks import Problem

_EQUATION = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")
_BOXES = "The boxes hold "  # such an equation is of given numbers alone, and the next one adds its result


def carried(problem: Problem, answer: str) -> bool:
    """Return True if ``answer`` carries its numbers through a word problem, be the sums right or wrong.

    It must have the equations of the reference answer, in order, with the same operators and the same given numbers;
    operands taken from an earlier equation, and the number after ``####``, must equal that equation's result.
    The text around the equations is ignored.
    """
    wanted, found = list(_EQUATION.finditer(problem.answer)), list(_EQUATION.finditer(answer))
    if len(wanted) != len(found):
        return False
    have = total = None
    for model, equation in zip(wanted, found, strict=True):
        boxes = problem.answer[: model.start()].endswith(_BOXES)
        left = model[1] if boxes or have is None else have
        right = model[3] if total is None else total
        if (equation[1], equation[2], equation[3]) != (left, model[2], right):
            return False
        have, total = (have, equation[4]) if boxes else (equation[4], None)
    return answer.rpartition("####")[2].strip() == have
