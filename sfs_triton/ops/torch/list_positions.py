"""List of positions that a step forwards, in plain torch."""

from __future__ import annotations

import torch

from .mark_candidates import stage_range


def list_positions(
    state,
    rows: torch.Tensor,
    target: torch.Tensor,
    count: torch.Tensor,
    *,
    by_stage: bool,
    span_cap: int | None = None,
    look_ahead: int = 0,
    shift: int = 0,
    stale: bool = True,
) -> None:
    """List the positions of a step, in place: ``rows``, ``target`` int32 ``[B, C]``, ``count`` int32 ``[B]``.

    At most ``C`` positions of each running row, in this order of claim: dirty ones; those that the step decides (and,
    with ``shift``, the rows before them, which predict them); ``look_ahead`` positions beyond; with ``stale`` all
    others, those that were not listed for longest first. Within a class positions ascend; of equally old ones the
    lowest are taken. ``target`` is the position that a listed row predicts, if that is to be decided or looked ahead
    at. Listed positions are no longer dirty and are noted in ``state.forwarded``; ``state.candidate`` marks the
    positions that the step decides.
    """
    batch, length = state.masked.shape
    capacity, place = rows.shape[1], state.position
    limit = torch.where(state.done == 0, state.limit, 0)[:, None]
    first, stop = (bound[:, None] for bound in stage_range(state, by_stage, span_cap))
    stop = torch.minimum(stop, limit)
    ahead = torch.minimum(stop + look_ahead, limit)

    decided = state.masked & (place >= first) & (place < stop)
    seen = state.masked & (place >= first) & (place < ahead)
    predicts, shows = decided, seen  # by the row of the model, not by position
    if shift:
        blank = torch.zeros((batch, shift), dtype=torch.bool, device=place.device)
        predicts, shows = (torch.cat((flags[:, shift:], blank), 1) for flags in (decided, seen))

    here = place < limit
    kind = torch.where(decided | predicts, 1, torch.where(seen | shows, 2, 3))
    kind = torch.where(state.dirty, 0, kind)
    if not stale:
        here = here & (kind < 3)
    # one sort key per position: class, then age for stale ones, then index; positions outside the row come last
    age = torch.where(kind == 3, state.forwarded + 1, 0)
    key = torch.where(here, (kind * (state.step[:, None] + 2) + age) * length + place, torch.iinfo(torch.int64).max)
    chosen = torch.zeros_like(here).scatter_(1, key.argsort(1)[:, :capacity], True) & here
    order = torch.where(chosen, kind * length + place, torch.iinfo(torch.int64).max).argsort(1)[:, :capacity]

    count.copy_(chosen.sum(1))
    order = torch.nn.functional.pad(order, (0, capacity - order.shape[1]))
    used = torch.arange(capacity, device=place.device) < count[:, None]
    rows.copy_(torch.where(used, order, -1))
    target.copy_(torch.where(used & shows.gather(1, order), order + shift, -1))
    decides = chosen & predicts
    state.candidate.copy_(decides.roll(shift, 1) if shift else decides)  # the last row predicts nothing: none wraps
    state.dirty.logical_and_(~chosen)
    torch.where(chosen, state.step[:, None], state.forwarded, out=state.forwarded)
