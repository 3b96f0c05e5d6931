"""The slow/fast cycle machine of SlowFast Sampling (arXiv 2506.10848): one launch per step for all rows of a batch.

One program per canvas. It scans the scores of the step's candidates, estimates the candidate horizon and its
stability, selects and commits positions, and moves its row to the fast stage, the next cycle, the next block or the
end. The host reads nothing.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
import triton
import triton.language as tl

from .check import check_tensor, refuse_unless
from .commit import (
    BLOCK,
    BLOCK_END,
    BLOCK_START,
    CAP,
    CYCLE,
    DETERMINED,
    DONE,
    END,
    ESTIMATE,
    FAULT,
    LIMIT,
    MASKS_LEFT,
    MAX_LENGTH,
    MAX_REGISTERS,
    N_CONTROL,
    N_HISTORY,
    N_SAMPLING,
    SPAN_END,
    SPAN_START,
    STAGE,
    STAGE_STEP,
    START,
    STEP,
    TAU,
    TAU_MIN,
    TAU_SLOW,
    ScanConfig,
    block_at,
    check_state,
    commit_row,
    other_ends,
    row_waits,
    scan_config,
    state_pointers,
)
from .control import CONTROL
from .cost import Cost
from .launch import launch
from .rules import CycleRules

MAX_WINDOW = 1024  # the sum of as many horizons still fits an int32


@triton.jit
def _reaches(score, tau, STRICT: tl.constexpr):
    """Compare scores with a threshold."""
    return (score > tau) if STRICT else (score >= tau)


@triton.jit
def _may_end(token_ptr, place, there, score, tau_min, eos_id, STRICT: tl.constexpr, EOS_HORIZON: tl.constexpr):
    """Mark the positions, of those that are ``there``, at which the horizon may end."""
    found = there & _reaches(score, tau_min, STRICT)
    if not EOS_HORIZON:
        found = found & (tl.load(token_ptr + place, mask=found, other=0) != eos_id)
    return found


@triton.jit
def _scan(
    token_ptr,
    score_ptr,
    candidate_ptr,
    length,
    eos_id,
    tau_min,
    tau,
    STRICT: tl.constexpr,
    EOS_HORIZON: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Scan the candidates: the highest one that can set the horizon (-1: none), how many reach ``tau``, the
    lowest with the largest score, and whether a score is NaN."""
    furthest = tl.full([BLOCK_L], -1, tl.int32)
    high = tl.zeros([BLOCK_L], tl.int32)
    bad = tl.zeros([BLOCK_L], tl.int32)
    best_score = tl.full([BLOCK_L], float("-inf"), tl.float32)
    best_place = tl.zeros([BLOCK_L], tl.int32)
    for begin in range(0, length, BLOCK_L):
        place = begin + tl.arange(0, BLOCK_L)
        candidate = tl.load(candidate_ptr + place, mask=place < length, other=0) != 0
        score = tl.load(score_ptr + place, mask=candidate, other=float("-inf"))
        ends = _may_end(token_ptr, place, candidate, score, tau_min, eos_id, STRICT, EOS_HORIZON)
        furthest = tl.maximum(furthest, tl.where(ends, place, -1))
        high += (candidate & _reaches(score, tau, STRICT)).to(tl.int32)
        bad |= (score != score).to(tl.int32)
        better = score > best_score
        best_score = tl.where(better, score, best_score)
        best_place = tl.where(better, place, best_place)
    top = tl.max(best_score, axis=0)
    best = tl.min(tl.where(best_score == top, best_place, length), axis=0)
    return tl.max(furthest, axis=0), tl.sum(high, axis=0), best, tl.max(bad, axis=0) != 0


@triton.jit
def _spread_and_mean(history, count, SPREAD: tl.constexpr, ROUNDING: tl.constexpr):
    """Variance (float64) and rounded mean of ``count`` integers; unused slots are zero. Sums are exact."""
    wide = history.to(tl.int64)
    total = tl.sum(wide, axis=0)
    numerator = (count * tl.sum(wide * wide, axis=0) - total * total).to(tl.float64)
    if SPREAD == "unbiased":
        spread = numerator / tl.maximum(count * (count - 1), 1).to(tl.float64)  # of one value it is 0
    else:
        spread = numerator / tl.maximum(count * count, 1).to(tl.float64)
    count = tl.maximum(count, 1)
    total = total.to(tl.int32)
    mean = total // count
    if ROUNDING == "even":  # halves go to the even neighbour
        twice = 2 * (total - mean * count)
        up = (twice > count) | ((twice == count) & (mean % 2 == 1))
        mean = tl.maximum(mean + up.to(tl.int32), 1)
    return spread, mean


@triton.jit
def _horizon(
    history,
    n_history,
    estimate,
    origin,
    e,
    last,
    estimating,
    window,
    spread_limit,
    SPREAD: tl.constexpr,
    INCLUSIVE: tl.constexpr,
    ROUNDING: tl.constexpr,
    ZERO_HISTORY: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Push a slow step's candidate horizon: new history and its size, spread (NaN until the window is full), the span's
    end, whether the window is stable and whether the end is final. ``last``: this is the cycle's last slow step."""
    slot = tl.arange(0, BLOCK_W)
    history = tl.where(estimating & (slot == n_history % window), estimate - origin, history)
    n_history += estimating.to(tl.int32)
    count = tl.minimum(n_history, window)
    if ZERO_HISTORY:
        count = count * 0 + window
    spread, mean = _spread_and_mean(history, count, SPREAD, ROUNDING)
    full = estimating & (count >= window)
    stable = full & ((spread <= spread_limit) if INCLUSIVE else (spread < spread_limit))
    e = tl.where(full | (estimating & last), tl.where(stable, estimate, mean + origin), e)
    return history, n_history, tl.where(full, spread, float("nan")), e, stable, stable | (full & last)


@triton.jit
def _count_high(score_ptr, candidate_ptr, first, stop, tau, STRICT: tl.constexpr, BLOCK_L: tl.constexpr):
    """Count the candidates in ``[first, stop)`` that reach ``tau``."""
    high = tl.zeros([BLOCK_L], tl.int32)
    for begin in range(first, stop, BLOCK_L):
        place = begin + tl.arange(0, BLOCK_L)
        candidate = tl.load(candidate_ptr + place, mask=place < stop, other=0) != 0
        score = tl.load(score_ptr + place, mask=candidate, other=float("-inf"))
        high += (candidate & _reaches(score, tau, STRICT)).to(tl.int32)
    return tl.sum(high, axis=0)


@triton.jit
def _fill(
    score_ptr,
    candidate_ptr,
    fill_ptr,
    length,
    tau,
    best,
    all_high,
    tau_shared,
    shared_stop,
    STRICT: tl.constexpr,
    SHARE_STABLE: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Mark the positions to commit: every candidate that reaches ``tau``, or only the best position; with
    SHARE_STABLE also what reaches ``tau_shared`` before ``shared_stop``."""
    for begin in range(0, length, BLOCK_L):
        place = begin + tl.arange(0, BLOCK_L)
        there = place < length
        candidate = tl.load(candidate_ptr + place, mask=there, other=0) != 0
        score = tl.load(score_ptr + place, mask=candidate, other=float("-inf"))
        chosen = (all_high & _reaches(score, tau, STRICT)) | ((all_high == 0) & (place == best))
        if SHARE_STABLE:
            chosen = chosen | (_reaches(score, tau_shared, STRICT) & (place < shared_stop))
        tl.store(fill_ptr + place, candidate & chosen, mask=there)


@triton.jit
def _horizon_ahead(
    token_ptr,
    score_ptr,
    masked_ptr,
    first,
    stop,
    eos_id,
    tau_min,
    STRICT: tl.constexpr,
    EOS_HORIZON: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """One past the highest candidate for the horizon among the undecided positions of ``[first, stop)``; 0: none.
    ``first`` is -1 where the span has no end yet."""
    furthest = tl.full([BLOCK_L], -1, tl.int32)
    for begin in range(tl.maximum(first, 0), stop, BLOCK_L):
        place = begin + tl.arange(0, BLOCK_L)
        masked = tl.load(masked_ptr + place, mask=place < stop, other=0) != 0
        score = tl.load(score_ptr + place, mask=masked, other=float("-inf"))
        ends = _may_end(token_ptr, place, masked, score, tau_min, eos_id, STRICT, EOS_HORIZON)
        furthest = tl.maximum(furthest, tl.where(ends, place, -1))
    return tl.max(furthest, axis=0) + 1


@triton.jit
def _stage_end(
    moves,
    slow,
    determined,
    k,
    cycle,
    e,
    block_end,
    first,
    first_after_block,
    length,
    k_max,
    max_cycles,
    SLOW_END: tl.constexpr,
    HAS_MAX_CYCLES: tl.constexpr,
    EOS_STOP: tl.constexpr,
):
    """Derive the end of stages from the masks left: whether the row moves to its fast stage; whether its
    cycle, its block and the row itself are over; and the first undecided position of the block that comes next."""
    slow_over = k >= k_max
    if SLOW_END != "fixed":
        slow_over = slow_over | (first >= block_end)
    if SLOW_END == "stable":
        slow_over = slow_over | determined
    stage_over = moves & tl.where(slow, slow_over, first >= e)
    to_fast = stage_over & slow & (first < e)
    cycle_over = stage_over & (to_fast == 0)
    block_over = cycle_over & (first >= block_end)
    following = first
    if HAS_MAX_CYCLES:
        exhausted = cycle_over & (cycle + 1 >= max_cycles)
        following = tl.where(exhausted & (block_over == 0), first_after_block, first)
        block_over = block_over | exhausted
    over = block_over & (following >= length)
    if EOS_STOP:
        over = over | (first >= length)
    return to_fast, cycle_over, block_over, following, over


@triton.jit(
    do_not_specialize=[
        "length",
        "eos_id",
        "min_parallel_slow",
        "min_parallel",
        "k_max",
        "window",
        "spread_limit_bits",
        "block_length",
        "max_cycles",
        "look_ahead",
        "span_cap",
    ]
)
def _decide_kernel(
    token_ptr,
    score_ptr,
    candidate_ptr,
    tokens_ptr,
    masked_ptr,
    commit_step_ptr,
    dirty_ptr,
    fill_ptr,
    history_ptr,
    spread_ptr,
    control_ptr,
    sampling_ptr,
    event_control_ptr,
    event_history_ptr,
    ends_ptr,
    length,
    eos_id,
    min_parallel_slow,
    min_parallel,
    k_max,
    window,
    spread_limit_bits,
    block_length,
    max_cycles,
    look_ahead,
    span_cap,
    SPREAD: tl.constexpr,
    INCLUSIVE: tl.constexpr,
    STRICT: tl.constexpr,
    SLOW_END: tl.constexpr,
    ROUNDING: tl.constexpr,
    ZERO_HISTORY: tl.constexpr,
    EOS_STOP: tl.constexpr,
    N_ENDS: tl.constexpr,
    SHARE_STABLE: tl.constexpr,
    EOS_HORIZON: tl.constexpr,
    PARTIAL: tl.constexpr,
    HAS_BLOCKS: tl.constexpr,
    HAS_MAX_CYCLES: tl.constexpr,
    HAS_LOOK_AHEAD: tl.constexpr,
    HAS_SPAN_CAP: tl.constexpr,
    HAS_EVENT: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = row * length
    control_ptr += row * N_CONTROL
    tl.store(control_ptr + ESTIMATE, -1)
    tl.store(spread_ptr + row, float("nan"))
    if tl.load(control_ptr + DONE) != 0:
        return
    step = tl.load(control_ptr + STEP).to(tl.int32)
    slow = tl.load(control_ptr + STAGE) == 0
    determined = tl.load(control_ptr + DETERMINED) != 0
    n_history = tl.load(control_ptr + N_HISTORY).to(tl.int32)
    s, e, k = (
        tl.load(control_ptr + SPAN_START).to(tl.int32),
        tl.load(control_ptr + SPAN_END).to(tl.int32),
        tl.load(control_ptr + STAGE_STEP).to(tl.int32),
    )
    origin, block_end = tl.load(control_ptr + BLOCK_START).to(tl.int32), tl.load(control_ptr + BLOCK_END).to(tl.int32)
    limit, cycle = tl.load(control_ptr + LIMIT).to(tl.int32), tl.load(control_ptr + CYCLE).to(tl.int32)
    slot = tl.arange(0, BLOCK_W)
    history = tl.load(history_ptr + row * window + slot, mask=slot < window, other=0).to(tl.int32)
    column = tl.arange(0, BLOCK_COLUMNS)
    # without the estimate, which another lane may be storing: the event gets it below
    numbers = tl.load(control_ptr + column, mask=(column < N_CONTROL) & (column != ESTIMATE), other=0)

    sampling_ptr += row * N_SAMPLING
    tau_min, tau_slow, tau_fast = (
        tl.load(sampling_ptr + TAU_MIN),
        tl.load(sampling_ptr + TAU_SLOW),
        tl.load(sampling_ptr + TAU),
    )
    tau = tl.where(slow, tau_slow, tau_fast)
    furthest, n_high, best, bad = _scan(
        token_ptr + at, score_ptr + at, candidate_ptr + at, length, eos_id, tau_min, tau, STRICT, EOS_HORIZON, BLOCK_L
    )
    moves = tl.full([], True, tl.int1)
    if PARTIAL:  # a waiting row has no candidates and commits nothing; only its step counts
        stop = tl.minimum(block_end, s + span_cap) if HAS_SPAN_CAP else block_end
        stop = tl.where(slow, stop, e)
        moves = row_waits(candidate_ptr + at, masked_ptr + at, length, s, stop, BLOCK_L) == 0
    tl.debug_barrier()
    if bad:
        tl.store(control_ptr + FAULT, step + 1)
        tl.store(control_ptr + DONE, 1)
        return
    estimating = moves & slow & (determined == 0)
    estimate = tl.where(furthest >= 0, furthest + 1, s + 1)
    spread_limit = spread_limit_bits.to(tl.int64).to(tl.float64, bitcast=True)
    history, n_history, spread, e, stable, final = _horizon(
        history, n_history, estimate, origin, e, k == k_max - 1, estimating, window, spread_limit,
        SPREAD, INCLUSIVE, ROUNDING, ZERO_HISTORY, BLOCK_W,
    )  # fmt: skip
    determined = determined | final
    estimate = tl.where(estimating, estimate, -1)
    if HAS_EVENT:
        numbers = tl.where(column == ESTIMATE, estimate, numbers)
        numbers = tl.where(column == SPAN_END, e, numbers)
        numbers = tl.where(column == DETERMINED, determined.to(tl.int32), numbers)
        numbers = tl.where(column == N_HISTORY, n_history, numbers)
        tl.store(event_control_ptr + row * N_CONTROL + column, numbers, mask=column < N_CONTROL)
        tl.store(event_history_ptr + row * window + slot, history, mask=slot < window)

    all_high = n_high >= tl.where(slow, min_parallel_slow, min_parallel)
    shared_stop = 0
    if SHARE_STABLE:
        shared_stop = tl.where(stable, e, 0)
        n_shared = _count_high(score_ptr + at, candidate_ptr + at, s, shared_stop, tau_fast, STRICT, BLOCK_L)
        shared_stop = tl.where(n_shared >= min_parallel, shared_stop, 0)
    _fill(
        score_ptr + at, candidate_ptr + at, fill_ptr + at, length, tau, best, all_high, tau_fast, shared_stop,
        STRICT, SHARE_STABLE, BLOCK_L,
    )  # fmt: skip
    tl.debug_barrier()
    limit, masks_left, first, first_after_block = commit_row(
        tokens_ptr + at, masked_ptr + at, commit_step_ptr + at, dirty_ptr + at, token_ptr + at, fill_ptr + at,
        ends_ptr, length, limit, step, eos_id, s, block_end, EOS_STOP, N_ENDS, BLOCK_L,
    )  # fmt: skip

    k += moves.to(tl.int32)
    step += 1
    to_fast, cycle_over, block_over, following, over = _stage_end(
        moves, slow, determined, k, cycle, e, block_end, first, first_after_block, length, k_max, max_cycles,
        SLOW_END, HAS_MAX_CYCLES, EOS_STOP,
    )  # fmt: skip
    if (over == 0) & (step >= tl.load(control_ptr + CAP).to(tl.int32)):
        tl.store(control_ptr + FAULT, -step)
        over = over | True
    history = tl.where(cycle_over, 0, history)
    n_history = tl.where(cycle_over, 0, n_history)
    if HAS_LOOK_AHEAD:  # it starts the history of the next cycle of this block
        seeding = cycle_over & (slow == 0) & (block_over == 0) & (over == 0)
        stop = tl.where(seeding, tl.minimum(e + look_ahead, block_end), 0)
        tl.debug_barrier()  # remaining masks are stored before they are loaded
        ahead = _horizon_ahead(
            token_ptr + at, score_ptr + at, masked_ptr + at, e, stop, eos_id, tau_min, STRICT, EOS_HORIZON, BLOCK_L
        )
        history = tl.where((ahead > 0) & (slot == 0), ahead - origin, history)
        n_history = tl.where(ahead > 0, 1, n_history)

    tl.store(spread_ptr + row, spread)
    tl.store(history_ptr + row * window + slot, history, mask=slot < window)
    tl.store(control_ptr + ESTIMATE, estimate)
    tl.store(control_ptr + LIMIT, limit)
    tl.store(control_ptr + STEP, step)
    tl.store(control_ptr + MASKS_LEFT, masks_left)
    tl.store(control_ptr + DONE, over.to(tl.int32))
    tl.store(control_ptr + N_HISTORY, n_history)
    tl.store(control_ptr + STAGE_STEP, tl.where(to_fast | cycle_over, 0, k))
    tl.store(control_ptr + STAGE, tl.where(to_fast, 1, tl.where(slow | cycle_over, 0, 1)))
    tl.store(control_ptr + DETERMINED, ((determined | to_fast) & (cycle_over == 0)).to(tl.int32))
    tl.store(control_ptr + SPAN_END, tl.where(cycle_over, -1, e))
    s = tl.where(cycle_over, e, s)
    cycle += cycle_over.to(tl.int32)
    if HAS_BLOCKS:
        start, end = tl.load(control_ptr + START).to(tl.int32), tl.load(control_ptr + END).to(tl.int32)
        index, begin, stop = block_at(start, end, following, block_length)
        s = tl.where(block_over, begin, s)
        cycle = tl.where(block_over, 0, cycle)
        if block_over:
            tl.store(control_ptr + BLOCK, index)
            tl.store(control_ptr + BLOCK_START, begin)
            tl.store(control_ptr + BLOCK_END, stop)
    tl.store(control_ptr + SPAN_START, s)
    tl.store(control_ptr + CYCLE, cycle)


def decide_cycle(state, rules: CycleRules, *, slow: bool = True, config: ScanConfig | None = None) -> None:
    """Take one step of the cycle machine for all rows of a decode state, in place. Rows that are done do not change.

    Beside the tensors of :func:`~sfs_triton.kernels.commit.check_state` it takes ``state.history``, int64 ``[B, W]``,
    candidate horizons counted from the block's start, and ``state.spread``, float64 ``[B]``. A state with a trace
    records its event: control numbers and history after the horizon was estimated, before anything is committed.

    Of equal scores the lowest position is best. A NaN score ends its row with a fault and commits nothing; in a
    look-ahead, where ``score`` must be -inf at all other positions, it is no candidate. ``slow`` matches the twin's
    signature: the kernel reads each row's stage.
    """
    batch, length = check_state(state)
    device = state.control.device
    check_tensor("history", state.history, dtype=torch.int64, shape=[batch, rules.window], device=device, dense=True)
    check_tensor("spread", state.spread, dtype=torch.float64, shape=[batch], device=device, dense=True)
    refuse_unless(rules.window <= MAX_WINDOW, f"window={rules.window} is more than {MAX_WINDOW}")
    if batch == 0 or length == 0:
        return
    event = None if state.events is None else (state.control.clone(), state.history.clone())
    config = config or scan_config(length)
    launch(
        _decide_kernel,
        (batch,),
        **state_pointers(state),
        history_ptr=state.history,
        spread_ptr=state.spread,
        event_control_ptr=None if event is None else event[0],
        event_history_ptr=None if event is None else event[1],
        length=length,
        eos_id=state.eos_id,
        **other_ends(state, rules.eos_stop),
        **_arguments(rules),
        HAS_EVENT=event is not None,
        BLOCK_COLUMNS=triton.next_power_of_2(len(CONTROL)),
        BLOCK_L=config.BLOCK_L,
        num_warps=config.num_warps,
        maxnreg=MAX_REGISTERS,
    )
    if event is not None:
        state.record_event(*event)


def _arguments(rules: CycleRules) -> dict[str, Any]:
    """The rules as scalars and compile-time constants of the kernel."""
    return {
        "min_parallel_slow": rules.min_parallel_slow,
        "min_parallel": rules.min_parallel,
        "k_max": rules.k_max,
        "window": rules.window,
        # Triton passes floats as float32, and a constant would be compiled anew for each value of a request
        "spread_limit_bits": struct.unpack("<q", struct.pack("<d", rules.spread_limit))[0],
        "block_length": min(rules.block_length or 0, MAX_LENGTH + 1),  # of which a canvas has one; sums fit 32 bits
        "max_cycles": rules.max_cycles or 0,
        "look_ahead": min(rules.look_ahead, MAX_LENGTH),  # positions are added up in 32 bits
        "span_cap": min(rules.span_cap or 0, MAX_LENGTH),
        "SPREAD": rules.spread,
        "INCLUSIVE": rules.inclusive,
        "STRICT": rules.strict,
        "SLOW_END": rules.slow_end,
        "ROUNDING": rules.rounding,
        "ZERO_HISTORY": rules.zero_history,
        "EOS_STOP": rules.eos_stop,
        "SHARE_STABLE": rules.share_stable,
        "EOS_HORIZON": rules.eos_horizon,
        "PARTIAL": rules.partial,
        "HAS_BLOCKS": rules.block_length is not None,
        "HAS_MAX_CYCLES": rules.max_cycles is not None,
        "HAS_LOOK_AHEAD": rules.look_ahead > 0,
        "HAS_SPAN_CAP": rules.span_cap is not None,
        "BLOCK_W": 16 if rules.window <= 16 else MAX_WINDOW,
    }


def decide_cycle_cost(batch: int, length: int) -> Cost:
    """Scores, flags and tokens once; the canvas is written where something is committed, at most everywhere."""
    return Cost(bytes=batch * length * (8 + 4 + 1 + 1 + 8 + 8 + 1), flops=8 * batch * length)
