"""Block-wise selection: confidence thresholds and fixed counts; one launch per step for all rows of a batch.

One program per canvas. The number of positions to take, the k-th largest score, and the ties at it (the lowest
positions win) are computed on the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .check import check_tensor, refuse_unless
from .commit import (
    BLOCK,
    BLOCK_END,
    BLOCK_START,
    BLOCK_STEPS,
    BOUND,
    CAP,
    CYCLE,
    DONE,
    END,
    ESTIMATE,
    FAULT,
    LIMIT,
    MASKS_LEFT,
    MAX_LENGTH,
    MAX_REGISTERS,
    N_CONTROL,
    N_SAMPLING,
    QUOTA,
    SPAN_START,
    STAGE_STEP,
    START,
    STEP,
    TAU,
    TAU_LOW,
    ScanConfig,
    block_at,
    check_state,
    commit_row,
    other_ends,
    row_waits,
    scan_config,
    state_pointers,
)
from .cost import Cost
from .launch import launch
from .rules import BlockRules
from .selection import (
    add_best_of_block,
    add_near_anchors,
    add_over,
    add_within_bound,
    count_masks,
    fill_runs,
    kth_largest,
    load_keys,
    scan_candidates,
)

MAX_STEPS = 2**30  # more than a sequence takes


@triton.jit
def _fill_ranked(
    score_ptr, candidate_ptr, fill_ptr, length, count, left, tau, best, HAS_TAU: tl.constexpr, BLOCK_L: tl.constexpr
):
    """Mark the ``count`` best of ``left`` positions, with HAS_TAU only those of them that reach ``tau`` or are the best
    one; return how many, and the least key of the ``count``."""
    total = tl.zeros([BLOCK_L], tl.int32)
    bound = tl.full([], -0x80000000, tl.int32)  # where all are taken, every one exceeds it
    ties = count
    if (count > 0) & (count < left):
        bound, ties = kth_largest(score_ptr, candidate_ptr, length, count, BLOCK_L)
    for begin in range(0, length, BLOCK_L):
        place = begin + tl.arange(0, BLOCK_L)
        key, candidate = load_keys(score_ptr, candidate_ptr, place, length)
        tie = candidate & (key == bound)
        rank = tl.cumsum(tie.to(tl.int32), axis=0) - 1
        chosen = candidate & ((key > bound) | (tie & (rank < ties))) & (count > 0)
        ties -= tl.sum(tie.to(tl.int32), axis=0)
        if HAS_TAU:
            score = tl.load(score_ptr + place, mask=candidate, other=0.0)
            chosen = chosen & ((score >= tau) | (place == best))
        tl.store(fill_ptr + place, chosen, mask=place < length)
        total += chosen.to(tl.int32)
    return tl.sum(total, axis=0), bound


@triton.jit
def _fill_over(score_ptr, candidate_ptr, fill_ptr, length, tau, best, BLOCK_L: tl.constexpr):
    """Mark all positions that reach ``tau``, and the best one."""
    for begin in range(0, length, BLOCK_L):
        place = begin + tl.arange(0, BLOCK_L)
        candidate = tl.load(candidate_ptr + place, mask=place < length, other=0) != 0
        score = tl.load(score_ptr + place, mask=candidate, other=0.0)
        tl.store(fill_ptr + place, candidate & ((score >= tau) | (place == best)), mask=place < length)


@triton.jit
def _fill_at_random(uniform_ptr, candidate_ptr, fill_ptr, length, n_uniform, drawn, share, BLOCK_L: tl.constexpr):
    """Mark each candidate with probability ``share``, by the row's uniform numbers from index ``drawn`` on."""
    for begin in range(0, length, BLOCK_L):
        place = begin + tl.arange(0, BLOCK_L)
        candidate = tl.load(candidate_ptr + place, mask=place < length, other=0) != 0
        index = tl.cumsum(candidate.to(tl.int32), axis=0) - 1 + drawn
        number = tl.load(uniform_ptr + tl.minimum(index, n_uniform - 1), mask=candidate, other=1.0)
        tl.store(fill_ptr + place, candidate & (number < share), mask=place < length)
        drawn += tl.sum(candidate.to(tl.int32), axis=0)


@triton.jit
def _fill_one(fill_ptr, length, only, BLOCK_L: tl.constexpr):
    """Mark one position."""
    for begin in range(0, length, BLOCK_L):
        place = begin + tl.arange(0, BLOCK_L)
        tl.store(fill_ptr + place, place == only, mask=place < length)


@triton.jit
def _scheduled(left, k, steps, quota, share, TIMESTEPS: tl.constexpr, OPENING_FIRST: tl.constexpr):
    """Return the count that this step of a fixed schedule commits, and the quota it carries on."""
    if TIMESTEPS:
        part = (left.to(tl.float32) * share).to(tl.int32)
        count = tl.where(k == steps - 1, left, part)
        return tl.where(k < steps, count, 0), quota
    if OPENING_FIRST:  # the opening forward is not one of the steps that share the rest
        steps = tl.maximum(steps - 1, 1)
        k = k - 1
    quota = tl.where(k == 0, left, quota)
    return tl.where(k < steps, quota // steps + (k < quota % steps).to(tl.int32), 0), quota


@triton.jit
def _cache_blocks(cached, waited, k, number, first, block_length, delay, refresh_every):
    """Choose the positions of a row's next step, its ``number``-th, from 1; ``first`` is the lowest undecided one.

    ``cached`` is the end of the cached blocks, and the one there has ``waited`` for so many steps. Returns both as they
    are once the next step is done, and ``k``, or 0 if that step forwards the whole canvas.
    """
    finished = (first - cached) // block_length
    waited += ((number >= delay) & (finished > 0)).to(tl.int32)  # blocks wait once the prompt is cached
    joins = waited > delay
    joined = tl.where(joins, tl.where(delay > 0, tl.minimum(finished, 1), finished), 0)
    waited = tl.where(joins, (finished > joined).to(tl.int32), waited)
    whole = ((waited > 0) | (number % refresh_every == 0)) & (joins == 0)
    return cached + joined * block_length, waited, tl.where(whole | (number <= delay), 0, k)


@triton.jit
def _fill_best(
    score_ptr, entropy_ptr, candidate_ptr, masked_ptr, fill_ptr, sampling_ptr, length, left, lowest, best, least,
    radius, start, block_length, SELECT: tl.constexpr, LEAST: tl.constexpr, STRICT: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Mark the ``least`` best positions, and those that the rule of selection adds. Pointers are the row's own."""
    tau, tau_low = tl.load(sampling_ptr + TAU), tl.load(sampling_ptr + TAU_LOW)
    if SELECT == "runs":
        fill_runs(score_ptr, candidate_ptr, masked_ptr, fill_ptr, length, tau, tau_low, best, BLOCK_L)
    else:
        if LEAST == 1:
            _fill_one(fill_ptr, length, tl.where(left > 0, best, length), BLOCK_L)
        else:
            _fill_ranked(
                score_ptr, candidate_ptr, fill_ptr, length, tl.minimum(least, left), left, tau, best, False, BLOCK_L
            )
        tl.debug_barrier()
        if SELECT == "bound":
            bound = tl.load(sampling_ptr + BOUND).to(tl.float64)
            add_within_bound(score_ptr, entropy_ptr, candidate_ptr, fill_ptr, length, bound, BLOCK_L)
        else:
            add_over(score_ptr, candidate_ptr, fill_ptr, length, tau, STRICT, BLOCK_L)
        if SELECT == "leap":
            every = tl.full([], -0x80000000, tl.int32)
            add_near_anchors(score_ptr, candidate_ptr, fill_ptr, length, tau, tau_low, every, radius, BLOCK_L)
        if SELECT == "open":
            tl.debug_barrier()
            first = start + (lowest - start) // block_length * block_length
            add_best_of_block(score_ptr, candidate_ptr, fill_ptr, length, first, first + block_length, BLOCK_L)


@triton.jit(
    do_not_specialize=[
        "length", "eos_id", "paced_steps", "block_length", "n_uniform", "n_shares", "least", "radius", "open_masks",
        "delay", "refresh_every",
    ]
)  # fmt: skip
def _decide_kernel(
    token_ptr,
    score_ptr,
    candidate_ptr,
    entropy_ptr,
    uniform_ptr,
    shares_ptr,
    tokens_ptr,
    masked_ptr,
    commit_step_ptr,
    dirty_ptr,
    fill_ptr,
    control_ptr,
    sampling_ptr,
    ends_ptr,
    length,
    n_uniform,
    n_shares,
    eos_id,
    paced_steps,
    block_length,
    least,
    radius,
    open_masks,
    delay,
    refresh_every,
    SELECT: tl.constexpr,
    LEAST: tl.constexpr,
    STRICT: tl.constexpr,
    COUNTED: tl.constexpr,
    IS_PACED: tl.constexpr,
    OPENING: tl.constexpr,
    EOS_STOP: tl.constexpr,
    N_ENDS: tl.constexpr,
    PARTIAL: tl.constexpr,
    HAS_BLOCKS: tl.constexpr,
    HAS_DELAY: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = row * length
    control_ptr += row * N_CONTROL
    tl.store(control_ptr + ESTIMATE, -1)
    if tl.load(control_ptr + DONE) != 0:
        return
    step, k, quota = (
        tl.load(control_ptr + STEP).to(tl.int32),
        tl.load(control_ptr + STAGE_STEP).to(tl.int32),
        tl.load(control_ptr + QUOTA).to(tl.int32),
    )
    start, end = tl.load(control_ptr + START).to(tl.int32), tl.load(control_ptr + END).to(tl.int32)
    block_start, block_end = (
        tl.load(control_ptr + BLOCK_START).to(tl.int32),
        tl.load(control_ptr + BLOCK_END).to(tl.int32),
    )
    steps, limit = tl.load(control_ptr + BLOCK_STEPS).to(tl.int32), tl.load(control_ptr + LIMIT).to(tl.int32)
    cap, cached = tl.load(control_ptr + CAP).to(tl.int32), tl.load(control_ptr + SPAN_START).to(tl.int32)
    left, lowest, best, bad = scan_candidates(score_ptr + at, candidate_ptr + at, length, BLOCK_L)
    moves = tl.full([], True, tl.int1)
    if PARTIAL:  # a waiting row has no candidates and commits nothing; only its step counts
        moves = row_waits(candidate_ptr + at, masked_ptr + at, length, block_start, block_end, BLOCK_L) == 0
    carried = quota
    tl.debug_barrier()  # all threads have their numbers before one of them stores
    if bad:
        tl.store(control_ptr + FAULT, step + 1)
        tl.store(control_ptr + DONE, 1)
        return

    scheduled: tl.constexpr = SELECT == "even" or SELECT == "shares" or SELECT == "random"
    plain: tl.constexpr = SELECT == "threshold" and LEAST == 1  # one loop does all
    share, tau = 0.0, 0.0
    if plain or COUNTED:
        tau = tl.load(sampling_ptr + row * N_SAMPLING + TAU)
    if SELECT == "shares" or SELECT == "random":
        share = tl.load(shares_ptr + row * n_shares + tl.minimum(k, n_shares - 1))
    if plain and not IS_PACED:
        _fill_over(score_ptr + at, candidate_ptr + at, fill_ptr + at, length, tau, best, BLOCK_L)
    elif not scheduled and not IS_PACED and not COUNTED:
        _fill_best(
            score_ptr + at, entropy_ptr + at, candidate_ptr + at, masked_ptr + at, fill_ptr + at,
            sampling_ptr + row * N_SAMPLING, length, left, lowest, best, least, radius, start, block_length,
            SELECT, LEAST, STRICT, BLOCK_L,
        )  # fmt: skip
    elif SELECT == "random":
        share = tl.where(k >= steps - 1, 1.0, share)  # the last step takes all
        _fill_at_random(
            uniform_ptr + row * n_uniform,
            candidate_ptr + at,
            fill_ptr + at,
            length,
            n_uniform,
            quota,
            share,
            BLOCK_L,
        )
        quota += left
    else:
        if IS_PACED:
            quota += (end - start + paced_steps - 1) // paced_steps
            count = quota
        else:
            count, quota = _scheduled(left, k, steps, quota, share, SELECT == "shares", OPENING == "first")
        taken, least_key = _fill_ranked(
            score_ptr + at, candidate_ptr + at, fill_ptr + at, length, count, left, tau, best, IS_PACED, BLOCK_L
        )
        if IS_PACED:
            quota -= taken
        if COUNTED:
            tau_low = tl.load(sampling_ptr + row * N_SAMPLING + TAU_LOW)
            tau = tl.where(count > 0, tau, float("inf"))  # without chosen positions there is no anchor
            tl.debug_barrier()
            add_near_anchors(
                score_ptr + at, candidate_ptr + at, fill_ptr + at, length, tau, tau_low, least_key, radius, BLOCK_L
            )
    tl.debug_barrier()
    if OPENING == "first":
        if k == 0:
            _fill_one(fill_ptr + at, length, lowest, BLOCK_L)
            tl.debug_barrier()
    limit, masks_left, first, following = commit_row(
        tokens_ptr + at, masked_ptr + at, commit_step_ptr + at, dirty_ptr + at, token_ptr + at, fill_ptr + at,
        ends_ptr, length, limit, step, eos_id, block_start, block_end, EOS_STOP, N_ENDS, BLOCK_L,
    )  # fmt: skip

    k += moves.to(tl.int32)
    step += 1
    quota = tl.where(moves, quota, carried)
    block_over = first >= block_end
    if OPENING != "normal":
        if not EOS_STOP:
            block_over = block_over & (k >= 2)
    elif scheduled and not EOS_STOP:
        block_over = block_over & (k >= steps)  # the references run every step of their schedule
    if scheduled:
        block_over = block_over | (k >= (tl.maximum(steps, 2) if OPENING == "first" else steps))
    block_over = moves & block_over
    over = block_over & (following >= length)
    if SELECT == "open":
        over = moves & (first >= length)
        tl.debug_barrier()
        begin = start + (block_end - start - 1) // block_length * block_length
        if moves & (count_masks(masked_ptr + at, length, begin, block_end, BLOCK_L) <= open_masks):
            block_end = tl.minimum(block_end + block_length, end)
        if HAS_DELAY:
            tl.store(control_ptr + BLOCK_START, cached)
            cached, quota, k = _cache_blocks(cached, quota, k, step + 1, first, block_length, delay, refresh_every)
            tl.store(control_ptr + SPAN_START, cached)
    if (over == 0) & (step >= cap):
        tl.store(control_ptr + FAULT, -step)
        over = over | True
    tl.store(control_ptr + LIMIT, limit)
    tl.store(control_ptr + STEP, step)
    tl.store(control_ptr + QUOTA, quota)
    tl.store(control_ptr + MASKS_LEFT, masks_left)
    tl.store(control_ptr + DONE, over.to(tl.int32))
    if SELECT == "open":
        tl.store(control_ptr + STAGE_STEP, k)
        tl.store(control_ptr + BLOCK_END, block_end)
    else:
        tl.store(control_ptr + STAGE_STEP, tl.where(block_over, 0, k))
    if HAS_BLOCKS and SELECT != "open":
        if block_over:
            index, begin, stop = block_at(start, end, following, block_length)
            tl.store(control_ptr + BLOCK, index)
            tl.store(control_ptr + BLOCK_START, begin)
            tl.store(control_ptr + BLOCK_END, stop)
            tl.store(control_ptr + SPAN_START, begin)
            tl.store(control_ptr + CYCLE, 0)


def decide_block(state, rules: BlockRules, *, slow: bool = True, config: ScanConfig | None = None) -> None:
    """Take one step of the block machine for all rows of a decode state, in place. Rows that are done do not change.

    Beside the tensors of :func:`~sfs_triton.kernels.commit.check_state` it takes ``state.uniform``, float32 ``[B, n]``,
    each row's stream of uniform numbers, read with ``select="random"``, and ``state.shares``, float32 ``[B, n]``, each
    row's schedule, read with that and with ``select="shares"``. A state with a trace records its event: control
    numbers and history before the step.

    With ``select="bound"`` it takes ``state.entropy``, float32 ``[B, L]``.

    Of equal scores the lowest position is best; 0.0 and -0.0 are equal. A NaN score ends its row with a fault and
    commits nothing. ``slow`` matches the signature of the cycle machine; blocks have no stages.
    """
    batch, length = check_state(state)
    for name in ("uniform", "shares"):
        shape, device = [batch, None], state.control.device
        check_tensor(name, getattr(state, name), dtype=torch.float32, shape=shape, device=device, dense=True)
    n_uniform, n_shares = state.uniform.shape[1], state.shares.shape[1]
    if rules.select == "bound":
        device = state.control.device
        check_tensor("entropy", state.entropy, dtype=torch.float32, shape=[batch, length], device=device, dense=True)
    at_random = rules.select == "random"
    refuse_unless(not rules.shared or n_shares > 0, f"shares is empty and select={rules.select!r}")
    refuse_unless(not at_random or n_uniform > 0, "uniform is empty and select='random'")
    if batch == 0 or length == 0:
        return
    event = None if state.events is None else (state.control.clone(), state.history.clone())
    config = config or scan_config(length)
    launch(
        _decide_kernel,
        (batch,),
        **state_pointers(state),
        entropy_ptr=state.entropy if rules.select == "bound" else state.score,
        uniform_ptr=state.uniform if at_random else None,
        shares_ptr=state.shares if rules.shared else None,
        length=length,
        n_uniform=n_uniform,
        n_shares=n_shares,
        eos_id=state.eos_id,
        **other_ends(state, rules.eos_stop),
        paced_steps=min(rules.paced_steps or 0, MAX_LENGTH),  # one position per step; sums fit 32 bits
        block_length=min(rules.block_length or 0, MAX_LENGTH + 1),  # of which a canvas has one
        least=min(rules.least, MAX_LENGTH),
        radius=min(rules.radius, MAX_LENGTH),
        open_masks=min(rules.open_masks, MAX_LENGTH),
        delay=min(rules.delay or 0, MAX_STEPS),
        refresh_every=min(rules.refresh_every or MAX_STEPS, MAX_STEPS),
        SELECT=rules.select,
        LEAST=min(rules.least, 2),
        STRICT=rules.strict,
        COUNTED=rules.counted,
        IS_PACED=rules.paced_steps is not None,
        OPENING=rules.opening,
        EOS_STOP=rules.eos_stop,
        PARTIAL=rules.partial,
        HAS_BLOCKS=rules.block_length is not None,
        HAS_DELAY=rules.delay is not None,
        BLOCK_L=config.BLOCK_L,
        num_warps=config.num_warps,
        maxnreg=MAX_REGISTERS,
    )
    if event is not None:
        state.record_event(*event)


def decide_block_cost(batch: int, length: int) -> Cost:
    """Scores, flags and tokens once; the canvas is written where something is committed, at most everywhere."""
    return Cost(bytes=batch * length * (8 + 4 + 1 + 1 + 8 + 8 + 1), flops=8 * batch * length)
