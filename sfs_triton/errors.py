"""Exceptions of the package. Each message names the argument, key or tensor at fault and its value."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields
from typing import Any


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


class DeviceFault(SfsError, RuntimeError):
    """The device has failed, and does no more work for this process; says what it reported. Start a new process."""


class BackendError(SfsError, RuntimeError):
    """A kernel of the back end that was asked for does not compile, fit or run; names it and says why."""


class OutOfDeviceMemory(SfsError, MemoryError):
    """The tensors of a generation do not fit; says how much they need and which canvas would fit."""


class RankFailure(SfsError, RuntimeError):
    """Another process of the group has failed, or this one has left the group; says which and why."""


class MissingDependencyError(SfsError, ImportError):
    """An optional dependency is missing; names the extra that installs it."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its class if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def require(condition: bool, message: str) -> None:
    """Raise :class:`ArgumentError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ArgumentError(message)


def as_plain(value: Any) -> Any:
    """Return an array, a tensor or one of their numbers as Python's own numbers and lists; others as they are."""
    return value.tolist() if hasattr(value, "tolist") else value


def make_plain(record: Any) -> None:
    """Make the fields of a frozen record Python's own numbers, so that NumPy's compare, print and go into JSON."""
    for each in fields(record):
        object.__setattr__(record, each.name, as_plain(getattr(record, each.name)))


def check_integer(
    name: str, value: Any, least: int = 1, most: int | None = None, error: type[SfsError] = ArgumentError
) -> None:
    """Raise ``error`` unless ``value`` is an integer from ``least`` to ``most``. True and False are no integers."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least or most is not None and value > most:
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise error(f"{name}={value!r} is not an integer {limits}")


def check_number(name: str, value: Any, least: float = 0.0, most: float = 1e30) -> None:
    """Raise :class:`ArgumentError` unless ``value`` is a number from ``least`` to ``most``, which fits float32."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fine = number and least <= value <= most
    require(fine, f"{name}={value!r} is not a number from {least:g} to {most:g}")


def check_flag(name: str, value: Any, error: type[SfsError] = ArgumentError) -> None:
    """Raise ``error`` unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise error(f"{name}={value!r} is neither True nor False")


def check_choice(name: str, value: Any, allowed: Collection) -> None:
    """Raise :class:`ArgumentError` unless ``value`` is one of ``allowed``."""
    require(value in tuple(allowed), f"{name}={value!r} is not one of {tuple(allowed)}")
