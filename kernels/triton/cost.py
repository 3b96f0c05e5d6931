"""Least work of an operation: the two numbers of a roofline."""

from __future__ import annotations

from typing import NamedTuple


class Cost(NamedTuple):
    """Bytes through device memory, each input read once and each output written once, and arithmetic operations."""

    bytes: int
    flops: int

    def floor(self, bytes_per_second: float, flops_per_second: float) -> float:
        """Return the least time in seconds at these ceilings."""
        return max(self.bytes / bytes_per_second, self.flops / flops_per_second)
