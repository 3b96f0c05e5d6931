"""Step output."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy

from ..decoding.caching import RowView


class Report(NamedTuple):
    """Step output: the sequences that took the step, in their state before it; the control numbers of all slots after
    it; and all published tensors. ``last``: every running sequence has taken its step, so the round is complete.
    ``letter`` may be overwritten once the loop continues."""

    rows: list[RowView]
    control: list[list[int]]
    letter: dict[str, numpy.ndarray]
    last: bool


Reports = Iterator[Report]
