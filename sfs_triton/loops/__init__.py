"""Who turns the crank of a generation."""

from .choose import Loop, LoopChoice, check_loop
from .eager import EagerLoop
from .replay import ReplayLoop
from .report import Report
from .step import Step

__all__ = ["EagerLoop", "Loop", "LoopChoice", "ReplayLoop", "Report", "Step", "check_loop"]
