"""Host ring: copies of device tensors that the host reads without waiting for the device."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

import numpy
import torch

from ..errors import DeviceFault, LoopTimeout
from . import faults

_SPINS = 200  # looks at the count before the host yields the GIL between looks
_BUSY = 0.01  # seconds until it sleeps between looks
_SHORT = 5e-4  # seconds that are not worth a sleep
_CHECK = 0.05  # seconds between questions to the device, which may have failed


class HostRing:
    """Host ring: the last ``depth`` copies of some tensors in host memory, written by the device in stream order.

    A copy is valid until ``depth`` more are published. On a GPU the memory is pinned.

    Args:
        publish: operation that stores the copies in host memory and then their count, captured in a graph or not;
            reading then takes no CUDA call. None: the copies are torch's, an event tells that they have arrived, and
            no kernel of this package is needed; such a copy cannot be captured.
    """

    def __init__(
        self, sources: Mapping[str, torch.Tensor], depth: int, publish: Callable[..., None] | None, device: torch.device
    ):
        pinned = device.type == "cuda"
        self._sources, self._publish, self.depth, self._device = list(sources.values()), publish, depth, device
        self._rings = [torch.zeros((depth, *x.shape), dtype=x.dtype, pin_memory=pinned) for x in self._sources]
        self._count = torch.zeros(1, dtype=torch.int64, pin_memory=pinned)  # copies published, for the host
        self._counter = torch.zeros(1, dtype=torch.int64, device=device)  # the same, on the device
        self._events = [torch.cuda.Event() for _ in range(depth if pinned and publish is None else 0)]
        self._pages = dict(zip(sources, (ring.numpy() for ring in self._rings), strict=True))
        self._published, self._fence = self._count.numpy(), threading.Lock()
        self.launched = 0  # copies that the host has launched, by itself or as the end of a graph

    def publish(self) -> None:
        """Queue a copy of the tensors, in stream order, without counting it: a graph that holds it is replayed."""
        if self._publish is not None:
            self._publish(self._sources, self._rings, self._counter, self._count)
            return
        slot = self.launched % self.depth
        for source, ring in zip(self._sources, self._rings, strict=True):
            ring[slot].copy_(source, non_blocking=True)
        if self._events:
            self._events[slot].record(torch.cuda.current_stream(self._device))
        else:
            self._published[0] = self.launched + 1

    def forget_sources(self) -> None:
        """Let go of the device tensors; nothing is published any more, and the host memory stays."""
        self._sources = []

    def count_launch(self) -> int:
        """Count a copy that has just been queued or replayed; return its number, from 1."""
        self.launched += 1
        return self.launched

    def read(self, number: int, limit: float, until: float = 0.0) -> dict[str, numpy.ndarray]:
        """Return copy ``number``; wait for it as :meth:`wait`, and raise as it does."""
        self.wait(number, limit, until)
        with self._fence:  # a lock between the reads of the count and of the copy orders them, as Arm alone does not
            pass
        return {name: page[(number - 1) % self.depth] for name, page in self._pages.items()}

    def has(self, number: int) -> bool:
        """Return whether copy ``number`` has been published."""
        if self._events and self._published[0] < number:
            if faults.asked(self._events[(number - 1) % self.depth].query, self._device):
                self._published[0] = number
        return bool(self._published[0] >= number)

    def wait(self, number: int, limit: float, until: float = 0.0) -> None:
        """Wait until copy ``number`` has been published, at most ``limit`` seconds.

        ``until``: a time, by ``time.monotonic()``, before which it is not expected: it is slept through, not polled.

        Raises:
            DeviceFault: the device has failed, or it is idle and has not published the copy.
            LoopTimeout: the copy has not been published by then.
        """
        start = time.monotonic()
        if until - start > _SHORT and not self.has(number):
            time.sleep(until - start)
        start, spins, idle = time.monotonic(), 0, 0
        check = start + _CHECK
        while not self.has(number):
            spins += 1
            if spins > _SPINS:
                now = time.monotonic()
                time.sleep(0.0 if now - start < _BUSY else 2e-5)  # a sleep would outlast a short step
                if now > check:
                    check, idle = now + _CHECK, idle + 1 if faults.is_idle(self._device) else 0
                    if idle > 1 and not self.has(number):  # one more look: it may have become idle since the last
                        raise DeviceFault(
                            f"{str(self._device)!r} is idle and has published nothing of step {number - 1}"
                        )
                if now - start > limit:
                    raise LoopTimeout(f"the device has not finished step {number - 1} within {limit:g} s")
