"""Step plans and step outputs: the records that pass between the planner on the host and the runner of the device."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import numpy

from ..kernels.control import Progress
from ..models.cache import Features


class Positions(Enum):
    """Source of the positions that a forward covers in each canvas."""

    RANGE = "range"  # [first, first + size), the same in every canvas
    PREFIX = "prefix"  # the first ``size``; the device sets how many of them are in use
    BLOCK = "block"  # a list of ``size`` that holds one contiguous range, found on the device
    LIST = "list"  # a list of ``size``, filled on the device by priority (``region``)


class Forward(NamedTuple):
    """Shape of one forward: all that the host must know to launch it, and the key of a captured graph."""

    positions: Positions
    first: int
    size: int
    keys: int  # attention reads no key at or beyond this position
    targets: int  # capacity for positions to decide, per canvas
    ragged: bool = False  # canvases differ in the keys that they attend to
    features: Features | None = None  # of policy ``refresh``
    canvases: int = 0  # number of canvases to forward


@dataclass(frozen=True)
class StepPlan:
    """One step of a persistent batch: the slots that take it, and the forwards to launch.

    An exact plan has one forward for each distinct range of positions, as large as its sequences need. A padded plan
    has a single forward, of one of the few shapes for which graphs are captured.

    Args:
        number: counted from 1 within a planner.
        steps: step number of each slot that takes the step.
        order: slots in the order in which ``forwards`` take them, padding last; empty if one takes all of the batch.
        paused: running slots that do not take the step. They keep their state.
        slow: some sequences may be in their slow stage.
        completes_round: every sequence that ran at the start of this round has taken a step of it.
    """

    number: int
    steps: dict[int, int]
    forwards: tuple[Forward, ...]
    order: tuple[int, ...]
    paused: frozenset[int]
    padded: bool
    slow: bool
    completes_round: bool


@dataclass(frozen=True)
class StepOutput:
    """Output of a step plan: the progress of its slots after the step, and all published tensors ``[B, ...]``.

    ``published`` is a view of the host ring: a later step overwrites it.
    """

    number: int
    progress: dict[int, Progress]
    published: dict[str, numpy.ndarray]
    completes_round: bool
