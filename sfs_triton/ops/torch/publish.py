"""Publishing to the host ring, in plain torch: for tensors that are in host memory anyway."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def publish(
    sources: Sequence[torch.Tensor], rings: Sequence[torch.Tensor], counter: torch.Tensor, published: torch.Tensor
) -> None:
    """``ring[counter % depth] = source`` for each, then ``counter += 1``, then ``published = counter``.

    ``rings[i]`` is ``[depth, *sources[i].shape]``; both numbers are int64 ``[1]``. All are on one device: torch has no
    store to host memory that is ordered with a GPU's work, so a GPU takes the kernel."""
    for source, ring in zip(sources, rings, strict=True):
        ring.index_copy_(0, counter % ring.shape[0], source[None])
    counter.add_(1)
    published.copy_(counter)
