"""The slow/fast cycle machine of SlowFast Sampling (arXiv 2506.10848), for all rows of a batch at once.

``decide_cycle`` is one step: estimate the candidate horizon, test its stability, choose and commit positions, and move
on to the fast stage, the next cycle or the next block. It reads and writes tensors of a ``DecodeState`` and never reads
their values on the host.
"""

from __future__ import annotations

import torch

from ...kernels.control import FAST, SLOW
from ...kernels.rules import CycleRules
from .commit import candidate_scores, commit, finish_step, first_masked, mark_faults, waiting
from .mark_candidates import stage_range


def spread_of(history: torch.Tensor, count: torch.Tensor, kind: str) -> torch.Tensor:
    """Variance of the ``count`` values in each row of ``history [B, W]`` (unused slots are zero), in float64.

    From integers, ``count * sum(x^2) - sum(x)^2`` is exact, and one division is rounded alike on every device. A square
    root is not: torch's may be off by one unit in the last place.
    """
    total, squares = history.sum(1), history.square().sum(1)
    numerator = (count * squares - total.square()).double()
    if kind == "unbiased":
        return torch.where(count > 1, numerator / (count * (count - 1)).clamp(min=1), 0.0)
    return numerator / (count * count).clamp(min=1)


def _over(scores: torch.Tensor, tau: torch.Tensor, rules: CycleRules) -> torch.Tensor:
    """Mark the ``scores [B, L]`` that pass the threshold of their row, ``tau [B]``."""
    return scores > tau[:, None] if rules.strict else scores >= tau[:, None]


def _furthest(state, scores: torch.Tensor, rules: CycleRules) -> torch.Tensor:
    """Return the highest position among ``scores [B, L]`` that can set the candidate horizon, -1 if there is none."""
    candidate = _over(scores, state.tau_min, rules)
    if not rules.eos_horizon:
        candidate &= state.token != state.eos_id
    return torch.where(candidate, state.position, -1).amax(1)


def _horizon(state, scores: torch.Tensor, moves: torch.Tensor, rules: CycleRules) -> torch.Tensor:
    """Push the candidate horizon of this slow step; update stability and the span's end ``e``.

    ``state.estimate`` is -1 before. Returns the rows that became stable in this step.
    """
    furthest = _furthest(state, scores, rules)
    estimate = torch.where(furthest >= 0, furthest, state.span_start) + 1
    estimating = moves & (state.stage == SLOW) & (state.determined == 0)

    slot = (state.history_slot == (state.n_history % rules.window)[:, None]) & estimating[:, None]
    torch.where(slot, (estimate - state.block_start)[:, None], state.history, out=state.history)
    state.n_history.add_(estimating)

    count = state.n_history.clamp(max=rules.window)
    if rules.zero_history:
        count = torch.full_like(count, rules.window)
    spread = spread_of(state.history, count, rules.spread)
    full = count >= rules.window
    stable = (spread <= rules.spread_limit if rules.inclusive else spread < rules.spread_limit) & full
    total = state.history.sum(1)
    if rules.rounding == "even":
        mean = (total / count.clamp(min=1).double()).round().long().clamp(min=1)
    else:
        mean = total // count.clamp(min=1)
    span_end = torch.where(stable, estimate, mean + state.block_start)
    last = state.stage_step == rules.k_max - 1
    torch.where(estimating & (full | last), span_end, state.span_end, out=state.span_end)
    state.determined.masked_fill_(estimating & full & (stable | last), 1)
    torch.where(estimating, estimate, state.estimate, out=state.estimate)
    state.spread.copy_(torch.where(estimating & full, spread, float("nan")))
    return estimating & stable


def _fill(state, scores: torch.Tensor, rules: CycleRules) -> torch.Tensor:
    """Mark the positions to commit: all over the threshold if there are enough, else the best one."""
    slow = state.stage == SLOW
    enough = torch.where(slow, rules.min_parallel_slow, rules.min_parallel)
    high = _over(scores, torch.where(slow, state.tau_slow, state.tau), rules)
    best = state.position == scores.argmax(1, keepdim=True)
    return torch.where((high.sum(1) >= enough)[:, None], high, best) & state.candidate


def _shared_fill(state, scores: torch.Tensor, stable: torch.Tensor, rules: CycleRules) -> torch.Tensor:
    """Mark the positions that the fast stage would commit in the spans of ``stable`` rows, without its fall-back.

    Positions undecided before this step count, so those that the slow fill takes are among the ``min_parallel``.
    """
    # the slow window that was scored reaches past the span, whose end ``e`` this step has just set
    high = _over(scores, state.tau, rules)
    high &= state.position < state.span_end[:, None]
    return high & (stable & (high.sum(1) >= rules.min_parallel))[:, None]


def _seed(state, seeding: torch.Tensor, rules: CycleRules) -> None:
    """Start the history of the ``seeding`` rows with the horizon found in the look-ahead beyond ``e``."""
    stop = torch.minimum(state.span_end + rules.look_ahead, state.block_end)
    ahead = state.masked & (state.position >= state.span_end[:, None]) & (state.position < stop[:, None])
    furthest = _furthest(state, state.score.masked_fill(~ahead, float("-inf")), rules)
    seeding = seeding & (furthest >= 0)
    state.n_history.masked_fill_(seeding, 1)
    first = seeding[:, None] & (state.history_slot == 0)
    torch.where(first, (furthest + 1 - state.block_start)[:, None], state.history, out=state.history)


def _advance(state, moves: torch.Tensor, rules: CycleRules) -> None:
    """Move rows to the fast stage, the next cycle, the next block or the end, from the masks left."""
    running = state.done == 0
    slow = state.stage == SLOW
    state.step.add_(running)
    state.stage_step.add_(moves)
    first = first_masked(state, state.span_start)
    nothing_left = first >= state.length
    slow_over = state.stage_step >= rules.k_max
    if rules.slow_end != "fixed":
        slow_over = slow_over | (first >= state.block_end)
    if rules.slow_end == "stable":
        slow_over = slow_over | (state.determined == 1)
    stage_over = moves & torch.where(slow, slow_over, first >= state.span_end)
    to_fast = stage_over & slow & (first < state.span_end)
    cycle_over = stage_over & ~to_fast
    block_over = cycle_over & (first >= state.block_end)
    following = first
    if rules.max_cycles is not None:
        exhausted = cycle_over & (state.cycle + 1 >= rules.max_cycles)
        following = torch.where(exhausted & ~block_over, first_masked(state, state.block_end), first)
        block_over = block_over | exhausted
    over = (block_over & (following >= state.length)) | (running & nothing_left & rules.eos_stop)
    finish_step(state, running, over)

    state.stage.masked_fill_(to_fast, FAST).masked_fill_(cycle_over, SLOW)
    state.stage_step.masked_fill_(to_fast | cycle_over, 0)
    torch.where(cycle_over, state.span_end, state.span_start, out=state.span_start)
    state.cycle.add_(cycle_over)
    state.determined.masked_fill_(to_fast, 1).masked_fill_(cycle_over, 0)
    state.n_history.masked_fill_(cycle_over, 0)
    state.history.masked_fill_(cycle_over[:, None], 0)
    if rules.look_ahead:
        _seed(state, cycle_over & ~slow & ~block_over & (state.done == 0), rules)
    state.span_end.masked_fill_(cycle_over, -1)
    if rules.block_length is not None:
        enter_block(state, block_over, following, rules.block_length)


def enter_block(state, entering: torch.Tensor, position: torch.Tensor, block_length: int) -> None:
    """Move the ``entering`` rows to the block that holds ``position [B]``."""
    index = (position - state.start) // block_length
    begin = state.start + index * block_length
    torch.where(entering, index, state.block, out=state.block)
    torch.where(entering, begin, state.block_start, out=state.block_start)
    torch.where(entering, torch.minimum(begin + block_length, state.end), state.block_end, out=state.block_end)
    torch.where(entering, begin, state.span_start, out=state.span_start)
    state.cycle.masked_fill_(entering, 0)


def decide_cycle(state, rules: CycleRules, *, slow: bool = True) -> None:
    """Take one step of the cycle machine on ``state``, whose ``token`` and ``score`` hold the model's choices at the
    candidates. ``slow=False``: no row is in its slow stage, so no horizon is estimated.

    With ``look_ahead``, rows in their fast stage also have choices at positions from ``e`` on, and ``score`` is -inf
    wherever there is none; NaN is no candidate there.
    """
    scores = candidate_scores(state)
    mark_faults(state, scores)
    moves = state.done == 0
    if rules.partial:
        moves &= ~waiting(state, *stage_range(state, by_stage=True, span_cap=rules.span_cap))
    state.estimate.fill_(-1)
    fill = _fill(state, scores, rules)
    if slow:
        stable = _horizon(state, scores, moves, rules)
        if rules.share_stable:
            fill |= _shared_fill(state, scores, stable, rules)
    fill &= moves[:, None]
    if state.events is not None:
        state.record_event(state.control.clone(), state.history.clone())
    commit(state, fill, eos_stop=rules.eos_stop)
    _advance(state, moves, rules)
