"""Exceptions of the package. Each message names the argument, key or tensor at fault and its value."""

from __future__ import annotations


class SfsError(Exception):
    """Base class of the package's errors."""


class ArgumentError(SfsError, ValueError):
    """An argument is out of range or of the wrong type."""


class CheckpointError(SfsError):
    """A checkpoint cannot be used: a file is missing, unreadable, or does not hold what the configuration says."""


class UnsupportedConfigError(CheckpointError):
    """The checkpoint's configuration needs a computation that this package does not support."""


class SequenceFault(SfsError):
    """Some sequences could not be finished. ``finished`` has the :class:`Generation` of each of the others."""

    def __init__(self, message: str, finished: dict | None = None):
        super().__init__(message)
        self.finished = finished or {}


class NumericalFault(SequenceFault, ArithmeticError):
    """The model produced NaN; names the sequence and the step."""


class StepCapExceeded(SequenceFault, RuntimeError):
    """A generation took more steps than its sampler can need. A bug, or a sampler that makes no progress."""


class LoopTimeout(SfsError, TimeoutError):
    """The device did not finish a step within its time limit."""


class OutOfDeviceMemory(SfsError, MemoryError):
    """The tensors of a generation do not fit; says how much they need and which canvas would fit."""


class RankFailure(SfsError, RuntimeError):
    """Another process of the group has failed, or this one has left the group; says which and why."""


class MissingDependencyError(SfsError, ImportError):
    """An optional dependency is missing; names the extra that installs it."""


def require(condition: bool, message: str) -> None:
    """Raise :class:`ArgumentError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ArgumentError(message)
