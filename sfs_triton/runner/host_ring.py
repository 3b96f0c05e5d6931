"""Host ring: copies of device tensors that the host reads without a call to the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy
import torch

from ..errors import LoopTimeout

_SPINS = 200  # reads of the count before the host yields the GIL between reads
_BUSY = 0.01  # seconds until it sleeps between reads


class HostRing:
    """Host ring: the last ``depth`` copies of some tensors in host memory, written by the device in stream order.

    On a GPU the memory is pinned, the copies are stores of a kernel, and the count of copies is stored after them:
    reading takes no CUDA call, and a copy is valid until ``depth`` more are published. On a CPU publishing is
    synchronous.
    """

    def __init__(
        self, sources: Mapping[str, torch.Tensor], depth: int, publish: Callable[..., None], device: torch.device
    ):
        pinned = device.type == "cuda"
        self._sources, self._publish, self.depth = list(sources.values()), publish, depth
        self._rings = [torch.zeros((depth, *x.shape), dtype=x.dtype, pin_memory=pinned) for x in self._sources]
        self._count = torch.zeros(1, dtype=torch.int64, pin_memory=pinned)  # copies published, for the host
        self._counter = torch.zeros(1, dtype=torch.int64, device=device)  # the same, on the device
        self._pages = dict(zip(sources, (ring.numpy() for ring in self._rings), strict=True))
        self._published = self._count.numpy()
        self.launched = 0  # copies that the host has launched, by itself or as the end of a graph

    def publish(self) -> None:
        """Queue a copy of the tensors, in stream order, without counting it: a graph that holds it is replayed."""
        self._publish(self._sources, self._rings, self._counter, self._count)

    def forget_sources(self) -> None:
        """Let go of the device tensors; nothing is published any more, and the host memory stays."""
        self._sources = []

    def count_launch(self) -> int:
        """Count a copy that has just been queued or replayed; return its number, from 1."""
        self.launched += 1
        return self.launched

    def read(self, number: int, limit: float) -> dict[str, numpy.ndarray]:
        """Return copy ``number``; wait for it at most ``limit`` seconds.

        Raises:
            LoopTimeout: it has not been published by then.
        """
        self.wait(number, limit)
        return {name: page[(number - 1) % self.depth] for name, page in self._pages.items()}

    def has(self, number: int) -> bool:
        """Return whether copy ``number`` has been published."""
        return bool(self._published[0] >= number)

    def wait(self, number: int, limit: float) -> None:
        """Wait until copy ``number`` has been published; raise as :meth:`read`."""
        start, spins = time.monotonic(), 0
        while self._published[0] < number:
            spins += 1
            if spins > _SPINS:
                waited = time.monotonic() - start
                time.sleep(0.0 if waited < _BUSY else 2e-5)  # a sleep would outlast a short step
                if waited > limit:
                    raise LoopTimeout(f"the device has not finished step {number - 1} within {limit:g} s")
