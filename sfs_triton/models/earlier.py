"""Numbers that a sampler keeps of earlier steps, per slot and position. Most samplers keep none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..ops.dispatch import Credits, Draw
from .cache import Scope

if TYPE_CHECKING:
    from .transformer import Transformer


class EarlierSteps:
    """Tensors of earlier steps, at fixed addresses, for canvases of ``length`` positions in ``slots`` slots.

    Rows are flat, with a spare one behind the last canvas, where rows of the head write that decide nothing.
    ``credits`` are those of tokens. ``hidden [P, d]`` is the state that the head last read at a position, from which
    the distribution can be made again; ``known [P]`` is where there is one. ``divergence [B, L]`` is that of the last
    look, and ``calm [B, L]`` counts the looks since it was last too large. ``probability [B, L]`` is that of the token
    that a position of the block has, given all others.
    """

    def __init__(self, model: Transformer, draw: Draw, block_length: int | None, slots: int, length: int):
        self._length, self._spare, device = length, slots * length, model.device
        self.credits = self.hidden = self.probability = None
        self.shadow = _looks(block_length, length) if draw.verify else 0  # positions of a block
        if draw.credit is not None:
            shape = (slots * length + 1, _looks(block_length, length))
            token = torch.full(shape, -1, dtype=torch.int32, device=device)
            self.credits = Credits(token, torch.zeros(shape, device=device))
        if draw.divergence:
            self.hidden = torch.zeros((slots * length + 1, model.spec.d_model), dtype=model.dtype, device=device)
            self.known = torch.zeros(slots * length + 1, dtype=torch.bool, device=device)
            self._divergence = torch.zeros(slots * length + 1, device=device)
            self.divergence = self._divergence[:-1].view(slots, length)
            self.calm = torch.zeros((slots, length), dtype=torch.int32, device=device)
        if draw.verify:
            self._probability = torch.zeros(slots * length + 1, device=device)
            self.probability = self._probability[:-1].view(slots, length)

    def tensors(self) -> list[torch.Tensor]:
        """Return all of them."""
        watched = [] if self.hidden is None else [self.hidden, self.known, self._divergence, self.calm]
        verified = [] if self.probability is None else [self._probability]
        return [*(self.credits or ()), *watched, *verified]

    @staticmethod
    def bytes_needed(model: Transformer, draw: Draw, block_length: int | None, length: int) -> int:
        """Return the bytes per slot."""
        credits = 0 if draw.credit is None else _looks(block_length, length) * 8  # an id and a float32
        watched = model.spec.d_model * model.dtype.itemsize + 1 + 4 + 4 if draw.divergence else 0
        return length * (credits + watched + 4 * draw.verify)

    def forget(self, slot: int) -> None:
        """Blank what is kept of a slot, in stream order."""
        at = slice(slot * self._length, (slot + 1) * self._length)
        if self.credits is not None:
            self.credits.token[at].fill_(-1)
            self.credits.amount[at].fill_(0)
        if self.hidden is not None:
            self.known[at].fill_(False)
            self.calm[slot].fill_(0)

    def rows(
        self, candidate: torch.Tensor, target: torch.Tensor, batch: torch.Tensor | None, which: torch.Tensor | None
    ) -> dict[str, torch.Tensor | Credits]:
        """Return arguments of ``Ops.choose``: the tensors to update, and the place there of each row of the head.

        ``candidate`` bool ``[B, L]``; ``target`` int32 ``[b, T]`` is the position that each slot of a list predicts,
        -1 where none, in canvases ``batch [b]`` (None: all); row ``r`` is slot ``r`` of the flattened list, or
        ``which[r]``, -1 where none.
        """
        at = _canvas(target, batch) * self._length + target.clamp(min=0)
        decides = (target >= 0) & candidate.flatten()[at]  # positions looked ahead at are not decided
        at = torch.where(decides, at, self._spare).flatten()
        place = at if which is None else torch.where(which >= 0, at[which.clamp(min=0)], self._spare)
        kept = {"credits": self.credits} if self.hidden is None else {"divergences": self._divergence}
        return {"place": place, **kept}

    def replace_hidden(
        self, hidden: torch.Tensor, scope: Scope, select: torch.Tensor, batch: torch.Tensor | None, runs: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Keep the hidden states of a scope, ``[b, n, d]``, in place of earlier ones where a canvas ``runs [b]``.

        Return those that ``select`` int64 ``[b, m]`` says, ``[b, m, d]``, and of the same rows, flat, the earlier ones
        and whether they are known.
        """
        first = torch.arange(scope.first, scope.first + hidden.shape[1], device=hidden.device)
        position = first.expand(hidden.shape[:2]) if scope.rows is None else scope.rows
        at = _canvas(position, batch) * self._length + position
        at = torch.where((position >= 0) & runs[:, None], at, self._spare)
        place = at.gather(1, select).flatten()
        before = {"before": self.hidden[place], "known": self.known[place]}
        chosen = hidden.gather(1, select[..., None].expand(-1, -1, hidden.shape[-1]))
        self.hidden.index_copy_(0, at.flatten(), hidden.flatten(0, 1))
        self.known.index_fill_(0, at.flatten(), True)
        return chosen, before

    def put_probability(self, position: torch.Tensor, batch: torch.Tensor | None, values: torch.Tensor) -> None:
        """Put ``values [b, n]`` at positions int64 ``[b, n]``, -1 idle, of the canvases ``batch``."""
        at = _canvas(position, batch) * self._length + position
        self._probability.index_copy_(0, torch.where(position >= 0, at, self._spare).flatten(), values.flatten())


def _canvas(positions: torch.Tensor, batch: torch.Tensor | None) -> torch.Tensor:
    """Return the slot of each row of ``positions [b, ...]``, int64 ``[b, 1]``."""
    return (torch.arange(positions.shape[0], device=positions.device) if batch is None else batch)[:, None]


def _looks(block_length: int | None, length: int) -> int:
    """Return how often a position is looked at: each step that does so commits at least one of its block."""
    return min(block_length or length, length)
