"""The stream on which an engine works."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def working(device: torch.device, wait: bool = False) -> Iterator[None]:
    """Make the package's own stream of a GPU the current one, so that all its work there has one order.

    Callers may have any current stream, and another one at each call. ``wait``: work comes behind the caller's.
    """
    if device.type != "cuda":
        yield
        return
    stream, callers = _own_stream(device), torch.cuda.current_stream(device)
    if wait and callers != stream:
        stream.wait_stream(callers)
    with torch.cuda.stream(stream):
        yield


@functools.cache
def _own_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
