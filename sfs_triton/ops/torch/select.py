"""Block-wise selection: confidence thresholds (Fast-dLLM) and fixed counts per step (LLaDA's and Dream's samplers)."""

from __future__ import annotations

import torch

from ...kernels.rules import BlockRules
from .commit import candidate_scores, commit, finish_step, first_masked, mark_faults, rank_by_score, waiting
from .cycle import enter_block
from .selection import best_of_first_block, best_of_runs, near_anchors, over, within_bound


def _share(state) -> torch.Tensor:
    """Return the share of undecided positions that each row's schedule commits at this step."""
    return state.shares.gather(1, state.stage_step.clamp(max=state.shares.shape[1] - 1)[:, None])[:, 0]


def _count(state, candidate: torch.Tensor, moves: torch.Tensor, rules: BlockRules) -> torch.Tensor:
    """Count the positions that each row commits in this step of a fixed schedule."""
    left = candidate.sum(1)
    if rules.select == "shares":
        count = torch.where(state.stage_step == state.block_steps - 1, left, (left.float() * _share(state)).long())
        return torch.where(state.stage_step < state.block_steps, count, 0)
    done = 1 if rules.opening == "first" else 0  # the opening forward is not one of the steps that share the rest
    steps, k = (state.block_steps - done).clamp(min=1), state.stage_step - done
    torch.where(moves & (k == 0), left, state.quota, out=state.quota)
    return torch.where(k < steps, state.quota // steps + (k < state.quota % steps), 0)


def _fill(state, candidate: torch.Tensor, scores: torch.Tensor, moves: torch.Tensor, rules: BlockRules) -> torch.Tensor:
    """Mark the best positions, and those that the rule of selection adds; with a quota, only that many of the best."""
    if rules.counted:
        count = _count(state, candidate, moves, rules)
        fill = (rank_by_score(scores) < count[:, None]) & candidate
        lowest = torch.where(fill, scores, float("inf")).amin(1)
        return fill | near_anchors(state, scores, lowest, rules)
    if rules.least == 1:
        fill = state.position == scores.argmax(1, keepdim=True)
    else:
        fill = rank_by_score(scores) < rules.least
    if rules.select == "bound":
        fill |= within_bound(state, scores)
    else:
        fill |= over(scores, state.tau, rules)
    if rules.select == "leap":
        fill |= near_anchors(state, scores, scores.new_full((len(scores),), float("-inf")), rules)
    elif rules.select == "runs":
        fill |= best_of_runs(state, scores)
    fill &= candidate
    if rules.select == "open":
        fill |= best_of_first_block(state, scores, fill, rules)
    if rules.paced_steps is not None:
        base = (state.end - state.start + rules.paced_steps - 1) // rules.paced_steps
        quota = base + state.quota
        fill &= rank_by_score(scores) < quota[:, None]
        torch.where(moves, quota - fill.sum(1), state.quota, out=state.quota)
    return fill


def _random_fill(state, candidate: torch.Tensor, rules: BlockRules) -> torch.Tensor:
    """Mark each masked position with the schedule's probability, from the row's own stream of uniform numbers.

    The stream advances by the number of masked positions, in their order, as a host generator would be read.
    """
    place = candidate.cumsum(1) - 1 + state.quota[:, None]
    drawn = state.uniform.gather(1, place.clamp(0, state.uniform.shape[1] - 1))
    state.quota.add_(candidate.sum(1))
    last = state.stage_step >= state.block_steps - 1
    return candidate & (last[:, None] | (drawn < _share(state)[:, None]))


def decide_block(state, rules: BlockRules, *, slow: bool = True) -> None:
    """Take one step on ``state``, whose ``token`` and ``score`` hold the model's choices at the candidates.

    ``slow`` is ignored: it matches the signature of the cycle machine; blocks have no stages.
    """
    candidate, scores = state.candidate, candidate_scores(state)
    mark_faults(state, scores)
    moves = state.done == 0
    if rules.partial:
        moves &= ~waiting(state, state.block_start, state.block_end)
    if not rules.scheduled:
        fill = _fill(state, candidate, scores, moves, rules)
    elif rules.select == "random":
        fill = _random_fill(state, candidate, rules)
    else:
        fill = (rank_by_score(scores) < _count(state, candidate, moves, rules)[:, None]) & candidate
    if rules.opening == "first":
        lowest = torch.where(candidate, state.position, state.length).amin(1, keepdim=True)
        opening = candidate & (state.position == lowest)
        fill = torch.where((state.stage_step == 0)[:, None], opening, fill)
    fill &= moves[:, None]
    if state.events is not None:
        state.record_event(state.control.clone(), state.history.clone())
    commit(state, fill, eos_stop=rules.eos_stop)
    _advance(state, moves, rules)


def _advance(state, moves: torch.Tensor, rules: BlockRules) -> None:
    """Move rows to the next step of the block, the next block that has masks, or the end."""
    running = state.done == 0
    state.step.add_(running)
    state.stage_step.add_(moves)
    if rules.select == "open":
        if rules.delay is not None:
            _cache_blocks(state, moves, rules)
        _open_block(state, moves, rules)
        return finish_step(state, running, moves & (first_masked(state, state.block_start) >= state.length))
    over = first_masked(state, state.block_start) >= state.block_end
    if rules.opening != "normal":
        over &= (state.stage_step >= 2) | rules.eos_stop
    elif rules.scheduled and not rules.eos_stop:
        over &= state.stage_step >= state.block_steps  # the references run every step of their schedule
    if rules.scheduled:
        over |= state.stage_step >= (state.block_steps.clamp(min=2) if rules.opening == "first" else state.block_steps)
    over &= moves
    following = first_masked(state, state.block_end)
    finish_step(state, running, over & (following >= state.length))
    state.stage_step.masked_fill_(over, 0)
    if rules.block_length is not None:
        enter_block(state, over, following, rules.block_length)


def _open_block(state, moves: torch.Tensor, rules: BlockRules) -> None:
    """Open the next block of the rows whose last open one has few enough masks."""
    size = rules.block_length
    begin = state.start + (state.block_end - state.start - 1) // size * size
    last = (state.position >= begin[:, None]) & (state.position < state.block_end[:, None])
    opens = moves & ((state.masked & last).sum(1) <= rules.open_masks)
    torch.where(opens, torch.minimum(state.block_end + size, state.end), state.block_end, out=state.block_end)


def _cache_blocks(state, moves: torch.Tensor, rules: BlockRules) -> None:
    """Choose the positions of the next step: those from ``block_start`` on, or with ``stage_step`` 0 the whole canvas.

    The blocks before ``block_start`` are cached when that step begins, those before ``span_start`` when it ends.
    ``quota`` counts the steps, with that one, for which the block at ``span_start`` has waited.
    """
    number = state.step + 1  # of the next step, from 1
    finished = (first_masked(state, state.block_start) - state.span_start) // rules.block_length
    waited = state.quota + ((number >= rules.delay) & (finished > 0))  # blocks wait once the prompt is cached
    joins = waited > rules.delay
    joined = torch.where(joins, finished.clamp(max=1) if rules.delay else finished, 0)
    waited = torch.where(joins, (finished > joined).long(), waited)
    whole = waited > 0
    if rules.refresh_every is not None:
        whole |= number % rules.refresh_every == 0
    whole = (whole & ~joins) | (number <= rules.delay)
    stage_step = torch.where(whole, 0, state.stage_step)
    values = {"stage_step": stage_step, "block_start": state.span_start, "quota": waited}
    values["span_start"] = state.span_start + joined * rules.block_length
    for name, value in values.items():
        column = getattr(state, name)
        torch.where(moves, value, column, out=column)
