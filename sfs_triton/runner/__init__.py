"""Execution of steps: one step as device work, and the loops that launch it."""

from .choose import Loop, LoopChoice, check_loop
from .cuda_graph import ReplayLoop
from .eager import EagerLoop
from .report import Report
from .step import Step

__all__ = ["EagerLoop", "Loop", "LoopChoice", "ReplayLoop", "Report", "Step", "check_loop"]
