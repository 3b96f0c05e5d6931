"""Numbers that a sampler keeps of earlier steps, per slot and position. Most samplers keep none."""

from __future__ import annotations

import torch

from ..ops.dispatch import Credits, Draw


class EarlierSteps:
    """Tensors of earlier steps, at fixed addresses, for canvases of ``length`` positions in ``slots`` slots.

    They are flat, with a spare place behind the last canvas, where rows of the head write that decide nothing.
    """

    def __init__(self, draw: Draw, block_length: int | None, slots: int, length: int, device: torch.device):
        self._length, self._spare, self.credits = length, slots * length, None
        if draw.credit is not None:
            shape = (slots * length + 1, _looks(block_length, length))
            token = torch.full(shape, -1, dtype=torch.int32, device=device)
            self.credits = Credits(token, torch.zeros(shape, device=device))

    def tensors(self) -> list[torch.Tensor]:
        """Return all of them."""
        return [*(self.credits or ())]

    @staticmethod
    def bytes_needed(draw: Draw, block_length: int | None, length: int) -> int:
        """Return the bytes per slot."""
        return 0 if draw.credit is None else length * _looks(block_length, length) * 8  # an id and a float32

    def forget(self, slot: int) -> None:
        """Blank what is kept of a slot, in stream order."""
        if self.credits is not None:
            at = slice(slot * self._length, (slot + 1) * self._length)
            self.credits.token[at].fill_(-1)
            self.credits.amount[at].fill_(0)

    def place(
        self, candidate: torch.Tensor, target: torch.Tensor, batch: torch.Tensor | None, which: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the flat place of each row of the head, int64 ``[R]``, the spare one where it decides nothing.

        ``candidate`` bool ``[B, L]``; ``target`` int32 ``[b, T]`` is the position that each slot of a list predicts,
        -1 where none, in canvases ``batch [b]`` (None: all); row ``r`` is slot ``r`` of the flattened list, or
        ``which[r]``, -1 where none.
        """
        canvas = torch.arange(target.shape[0], device=target.device) if batch is None else batch
        at = canvas[:, None] * self._length + target.clamp(min=0)
        decides = (target >= 0) & candidate.flatten()[at]  # positions looked ahead at are not decided
        at = torch.where(decides, at, self._spare).flatten()
        return at if which is None else torch.where(which >= 0, at[which.clamp(min=0)], self._spare)


def _looks(block_length: int | None, length: int) -> int:
    """Return how often a position is looked at: each step that does so commits at least one of its block."""
    return min(block_length or length, length)
