"""Copies of tensors in host memory to a device."""

from __future__ import annotations

from itertools import cycle

import torch

STAGED = 2**26  # bytes of a pinned buffer


class Upload:
    """Copy tensors in host memory to ``device``.

    On the way to a GPU they pass through two pinned buffers, so that filling one, which may read a file, overlaps with
    sending the other. A copy that changes the dtype sends the narrower of both.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._staging = cycle(_pinned() for _ in range(2)) if device.type == "cuda" else None

    def new(self, values: torch.Tensor) -> torch.Tensor:
        """Return ``values`` on the device; on a CPU they are not copied."""
        if self.device.type == "cpu":
            return values
        return self.copy(torch.empty(values.shape, dtype=values.dtype, device=self.device), values)

    def copy(self, target: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Copy ``values`` into ``target``, a dense tensor of the device, and return that."""
        if self.device.type == "cpu":
            return target.copy_(values)
        dtype = min(values.dtype, target.dtype, key=lambda dtype: dtype.itemsize)
        parts = (x.reshape(-1).split(STAGED // dtype.itemsize) for x in (target, values))
        for part, chunk in zip(*parts, strict=True):
            part.copy_(self._send(chunk, dtype))
        return target

    def _send(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if self._staging is None:
            return values.to(dtype).to(self.device)
        buffer, sent = next(self._staging)
        sent.synchronize()  # its last content has left
        there = buffer[: values.numel() * dtype.itemsize].view(dtype).copy_(values).to(self.device, non_blocking=True)
        sent.record(torch.cuda.current_stream(self.device))
        return there


def _pinned() -> tuple[torch.Tensor, torch.cuda.Event]:
    return torch.empty(STAGED, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()
