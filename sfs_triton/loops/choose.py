"""Which loop steps the generations of an engine."""

from __future__ import annotations

import logging
import threading
from typing import NamedTuple, Protocol

import torch

from ..errors import require
from .eager import EagerLoop
from .replay import ReplayLoop
from .report import Reports
from .step import Step

logger = logging.getLogger("sfs_triton")

LOOPS = ("eager", "replay")


class Record(NamedTuple):
    """A run on a GPU, under ``bench/results/``, in which a loop passed its tests and was faster than the others."""

    loop: str
    path: str


# The loops that may be chosen without being asked for, best first. No GPU has shown any of them to pass yet.
RECORDS: tuple[Record, ...] = ()


class Loop(Protocol):
    """Who turns the crank. All loops give the same tokens, the same number of steps and the same trace."""

    name: str

    def canvas_length(self, longest: int, most: int) -> int:
        """Length of the canvas for rows of at most ``longest`` positions, of a model that has at most ``most``."""

    def prepare(self, step: Step) -> None:
        """Do what must be done before the rows are put into the step's state."""

    def run(self, step: Step) -> Reports:
        """Step to the end; yields a report a step."""


def check_loop(name: str | None, device: torch.device) -> None:
    """Raise :class:`~sfs_triton.errors.ArgumentError` unless ``device`` has a loop of this name, or None."""
    require(name is None or name in LOOPS, f"loop={name!r} is not one of {LOOPS}")
    on_gpu = device.type == "cuda"
    require(name != "replay" or on_gpu, f"loop='replay' needs a GPU: device {str(device)!r} has no CUDA graphs")


class LoopChoice:
    """The loop of an engine: the one asked for, or what the records say; and what comes after it fails."""

    def __init__(self, name: str | None, device: torch.device):
        check_loop(name, device)
        on_gpu, why = device.type == "cuda", "asked for"
        if name is None and not on_gpu:
            name, why = "eager", f"device {str(device)!r} has no CUDA graphs"
        elif name is None:
            name, why = (RECORDS[0].loop, RECORDS[0].path) if RECORDS else ("eager", "no other has a record on a GPU")
        self._eager = EagerLoop(tight=not on_gpu, alone=True)
        self.loop: Loop = ReplayLoop() if name == "replay" else self._eager
        self._lock = threading.Lock()
        logger.info("loop %s: %s", name, why)

    def fall_back(self, failed: Loop, error: RuntimeError) -> bool:
        """Take the loop below ``failed`` after ``error``, once for all generations; whether there was one."""
        if failed is self._eager:
            return False
        with self._lock:
            if self.loop is failed:
                logger.warning("loop %s failed, going on with loop eager: %s", failed.name, error)
                self.loop = self._eager
        return True
