"""Contiguous ranges of positions that a step forwards, and of their keys, in plain torch."""

from __future__ import annotations

import torch

from ...kernels.control import FAST


def position_ranges(
    state,
    rows: torch.Tensor | None,
    count: torch.Tensor,
    key_range: torch.Tensor,
    *,
    to_span_end: bool,
    block: str | None,
) -> None:
    """The positions ``[first, stop)`` that each canvas row forwards and the keys ``[0, keys)`` they see, in place.

    ``count`` int32 ``[B]`` is ``stop - first``, at least 0. ``rows``, int32 ``[B, C]`` or None, holds the first ``C``
    of these positions, then -1, and bounds the count. ``key_range`` int32 ``[B, 4]`` is ``(0, keys, 0, 0)``.

    ``stop`` and ``keys`` are the row's limit and ``first`` is 0, but in all steps after the first of a stage (or block)

    * with ``to_span_end`` both end with the span in the fast stage, if that is before the limit;
    * with ``block="rest"`` positions start with the block, and with ``"own"`` they end with it, too.

    A row that is done has no positions and no keys.
    """
    running, later = state.done == 0, state.stage_step > 0
    limit = torch.where(running, state.limit, 0)
    first, stop, keys = torch.zeros_like(limit), limit, limit
    if to_span_end:
        stop = keys = torch.where(running & later & (state.stage == FAST), torch.minimum(state.span_end, limit), limit)
    if block is not None:
        first = torch.where(later, state.block_start, first)
        if block == "own":
            stop = torch.where(later, torch.minimum(state.block_end, limit), stop)
    count.copy_((stop - first).clamp(min=0, max=None if rows is None else rows.shape[1]))
    none = torch.zeros_like(keys)
    key_range.copy_(torch.stack((none, keys, none, none), 1))
    if rows is not None:
        slot = torch.arange(rows.shape[1], device=rows.device)
        rows.copy_(torch.where(slot < count[:, None], first[:, None] + slot, -1))
