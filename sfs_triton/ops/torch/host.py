"""Reads of values by the host, which plain torch makes on a CPU alone."""

from __future__ import annotations

import torch


def reads_are_free(x: torch.Tensor) -> bool:
    """Return True if the host may read ``x`` without waiting for a device."""
    return x.device.type == "cpu"
