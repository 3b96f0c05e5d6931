"""Commit of chosen tokens to the canvas: shared by both machines."""

from __future__ import annotations

import torch


def waiting(state, first: torch.Tensor, stop: torch.Tensor) -> torch.Tensor:
    """Mark the rows ``[B]`` whose list has no undecided position of their stage's range ``[first, stop)``.

    Such a row counts the step and does not change otherwise: only the step cap can end it.
    """
    undecided = state.masked & (state.position >= first[:, None]) & (state.position < stop[:, None])
    return undecided.any(1) & ~state.candidate.any(1)


def commit(state, fill: torch.Tensor, *, eos_stop: bool) -> None:
    """Commit ``state.token`` where ``fill [B, L]`` says, for the rows that are still running.

    With ``eos_stop`` the leftmost end-of-text that was ever committed, ``state.eos_id`` or one of ``state.other_ends``,
    is the row's limit: everything after it becomes ``eos_id``, whether it was decided or not, and leaves the canvas'
    masks. Given positions stay.
    """
    state.fill.copy_(fill)
    state.dirty.logical_or_(fill)
    torch.where(fill, state.token, state.tokens, out=state.tokens)
    state.masked.logical_and_(~fill)
    torch.where(fill, state.step[:, None], state.commit_step, out=state.commit_step)
    if eos_stop:
        ends = state.token == state.eos_id
        if len(state.other_ends):
            ends = ends | (state.token[..., None] == state.other_ends).any(-1)
        ended = torch.where(fill & ends, state.position, state.length).amin(1)
        state.limit.copy_(torch.minimum(state.limit, ended + 1))
        decoded = state.masked | (state.commit_step >= 0)
        beyond = decoded & (state.position >= state.limit[:, None])
        state.tokens.masked_fill_(beyond, state.eos_id)
        state.masked.logical_and_(~beyond)


def finish_step(state, running: torch.Tensor, over: torch.Tensor) -> None:
    """End the rows that are ``over``; other running rows at their step cap end with a fault."""
    torch.sum(state.masked, 1, out=state.masks_left)
    stuck = (state.step >= state.cap) & running & ~over
    state.fault.sub_(state.step * stuck)  # no running row has a fault yet
    state.done.masked_fill_(over | stuck, 1)


def candidate_scores(state) -> torch.Tensor:
    """Return ``state.score`` at candidates, -inf elsewhere."""
    return state.score.masked_fill(~state.candidate, float("-inf"))


def first_masked(state, first: torch.Tensor) -> torch.Tensor:
    """Return the lowest undecided position of each row at or after ``first [B]``; the canvas length if none."""
    return torch.where(state.masked & (state.position >= first[:, None]), state.position, state.length).amin(1)


def mark_faults(state, scores: torch.Tensor) -> None:
    """End rows that have a NaN among ``scores [B, L]`` with a fault."""
    bad = scores.isnan().any(1)
    torch.where(bad, state.step + 1, state.fault, out=state.fault)
    state.done.masked_fill_(bad, 1)


def rank_by_score(scores: torch.Tensor) -> torch.Tensor:
    """Rank of each position in ``scores [B, L]``, 0 for the largest; ties go to the lowest position."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)
