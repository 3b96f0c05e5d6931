"""Publishing to the host ring, in plain torch: for tensors that are in host memory anyway."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def publish(
    sources: Sequence[torch.Tensor], rings: Sequence[torch.Tensor], tick: torch.Tensor, bell: torch.Tensor
) -> None:
    """``ring[tick % depth] = source`` for each, ``rings[i]`` being ``[depth, *sources[i].shape]``; then ``tick += 1``
    and ``bell = tick``. Both are int64 ``[1]``. All are on one device: torch has no store to host memory that is
    ordered with a GPU's work, so a GPU takes the kernel."""
    for source, ring in zip(sources, rings, strict=True):
        ring.index_copy_(0, tick % ring.shape[0], source[None])
    tick.add_(1)
    bell.copy_(tick)
