"""Exceptions of the package. Each message names the argument, key or tensor at fault and its value."""

from __future__ import annotations


class SfsError(Exception):
    """Base of every error this package raises on purpose."""


class ArgumentError(SfsError, ValueError):
    """An argument is out of its range or of the wrong kind."""


class CheckpointError(SfsError):
    """A checkpoint cannot be used: a file is missing, unreadable, or does not hold what the configuration says."""


class UnsupportedConfigError(CheckpointError):
    """The checkpoint's configuration asks for something this package does not compute."""


class RowFault(SfsError):
    """Some rows of a batch could not be finished. ``finished`` has the :class:`Generation` of each other row."""

    def __init__(self, message: str, finished: dict | None = None):
        super().__init__(message)
        self.finished = finished or {}


class NumericalFault(RowFault, ArithmeticError):
    """The model produced NaN; names the row and the step."""


class StepCapExceeded(RowFault, RuntimeError):
    """A generation took more steps than its sampler can need. A bug, or a sampler that makes no progress."""


class LoopTimeout(SfsError, TimeoutError):
    """The device did not finish a step in the time that is set for it."""


class OutOfDeviceMemory(SfsError, MemoryError):
    """The tensors of a generation do not fit; says how much they need and which canvas would fit."""


class RankFailure(SfsError, RuntimeError):
    """Another process that shares the model has failed, or this one has left them; says which and why."""


class MissingDependencyError(SfsError, ImportError):
    """An optional dependency is needed for what was asked; names the extra that brings it."""


def require(condition: bool, message: str) -> None:
    """Raise :class:`ArgumentError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ArgumentError(message)
