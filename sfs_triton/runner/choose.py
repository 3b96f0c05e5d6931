"""Choice of the loop that launches an engine's steps."""

from __future__ import annotations

import logging
import threading
from typing import Protocol

import torch

from ..errors import require
from .cuda_graph import ReplayLoop
from .eager import EagerLoop
from .report import Reports
from .step import Step

logger = logging.getLogger("sfs_triton")

LOOPS = ("eager", "replay")


class Loop(Protocol):
    """Interface of a loop. All loops give the same tokens, the same number of steps and the same trace."""

    name: str

    def canvas_length(self, longest: int, most: int) -> int:
        """Return the canvas length for sequences of at most ``longest`` positions and a model limit of ``most``."""

    def prepare(self, step: Step) -> None:
        """Prepare ``step`` before sequences are put into its state."""

    def run(self, step: Step) -> Reports:
        """Step to the end; yield one report per step."""


def check_loop(name: str | None, device: torch.device) -> None:
    """Raise :class:`~sfs_triton.errors.ArgumentError` unless ``device`` has a loop of this name, or None."""
    require(name is None or name in LOOPS, f"loop={name!r} is not one of {LOOPS}")
    on_gpu = device.type == "cuda"
    require(name != "replay" or on_gpu, f"loop='replay' needs a GPU: device {str(device)!r} has no CUDA graphs")


class LoopChoice:
    """The loop of an engine: the requested one, else ``eager``; and the loop to fall back to if it fails."""

    def __init__(self, name: str | None, device: torch.device):
        check_loop(name, device)
        on_gpu = device.type == "cuda"
        self._eager = EagerLoop(tight=not on_gpu, alone=True)
        self.loop: Loop = ReplayLoop() if name == "replay" else self._eager
        self._lock = threading.Lock()
        default = "the default" if on_gpu else f"device {str(device)!r} has no CUDA graphs"
        logger.info("loop %s: %s", self.loop.name, "asked for" if name else default)

    def fall_back(self, failed: Loop, error: RuntimeError) -> bool:
        """Replace ``failed`` by the loop below it for all generations; return whether there is one."""
        if failed is self._eager:
            return False
        with self._lock:
            if self.loop is failed:
                logger.warning("loop %s failed, going on with loop eager: %s", failed.name, error)
                self.loop = self._eager
        return True
