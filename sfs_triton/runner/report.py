"""Output of a step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy

from ..decoding.caching import RowView


class Report(NamedTuple):
    """A step that has been decided: the rows that took it, as they were before; the control numbers of all slots after
    it; and what else was posted. ``last`` says that every row that ran has had its turn, so that a round is over.
    ``letter`` may be overwritten once the loop goes on."""

    rows: list[RowView]
    control: list[list[int]]
    letter: dict[str, numpy.ndarray]
    last: bool


Reports = Iterator[Report]
