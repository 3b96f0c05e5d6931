"""Host ring: copies of device tensors that the host reads without a call to the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy
import torch

from ..errors import LoopTimeout

_SPINS = 200  # reads of the bell before the host yields the GIL between reads
_WAKE = 0.01  # seconds until it sleeps between reads


class Mailbox:
    """Host ring: ``depth`` copies of some tensors in host memory, written by the device in stream order.

    On a GPU the memory is pinned, the copies are stores of a kernel, and the sequence number (the bell) is stored after
    them: reading takes no CUDA call, and an output is valid until ``depth`` more are published. On a CPU publishing is
    synchronous.
    """

    def __init__(
        self, sources: Mapping[str, torch.Tensor], depth: int, post: Callable[..., None], device: torch.device
    ):
        pinned = device.type == "cuda"
        self._sources, self._post, self.depth = list(sources.values()), post, depth
        self._rings = [torch.zeros((depth, *x.shape), dtype=x.dtype, pin_memory=pinned) for x in self._sources]
        self._bell = torch.zeros(1, dtype=torch.int64, pin_memory=pinned)
        self._tick = torch.zeros(1, dtype=torch.int64, device=device)
        self._pages = dict(zip(sources, (ring.numpy() for ring in self._rings), strict=True))
        self._count = self._bell.numpy()
        self.posted = 0

    def post(self) -> None:
        """Queue a copy of the tensors, in stream order. The caller that launches or replays it counts ``posted``."""
        self._post(self._sources, self._rings, self._tick, self._bell)

    def read(self, number: int, limit: float) -> dict[str, numpy.ndarray]:
        """Return output ``number``, counted from 1; wait for it at most ``limit`` seconds.

        Raises:
            LoopTimeout: it has not been published by then.
        """
        self.wait(number, limit)
        return {name: page[(number - 1) % self.depth] for name, page in self._pages.items()}

    def has(self, number: int) -> bool:
        """Return whether output ``number`` has been published."""
        return bool(self._count[0] >= number)

    def wait(self, number: int, limit: float) -> None:
        began, spins = time.monotonic(), 0
        deadline, nap = began + limit, began + _WAKE
        while self._count[0] < number:
            spins += 1
            if spins > _SPINS:
                now = time.monotonic()
                time.sleep(0.0 if now < nap else 2e-5)  # a sleep would outlast a short step
                if now > deadline:
                    raise LoopTimeout(f"the device has not finished step {number - 1} within {limit:g} s")
