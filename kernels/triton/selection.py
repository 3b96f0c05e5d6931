"""Selection rules of the block machine, for one row per program: which candidates a step commits beside the best ones.

Each ``add`` function sets elements of ``fill``, which holds the best positions already. Loops go over the canvas in
tiles, with what crosses a tile's edge carried on.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_keys(score_ptr, candidate_ptr, place, length):
    """Scores as integers in the same order, the least integer where there is no candidate; and the candidates."""
    candidate = tl.load(candidate_ptr + place, mask=place < length, other=0) != 0
    score = tl.load(score_ptr + place, mask=candidate, other=0.0) + 0.0  # -0.0 and 0.0 are the same score
    bits = score.to(tl.int32, bitcast=True)
    return tl.where(candidate, bits ^ ((bits >> 31) & 0x7FFFFFFF), -0x80000000), candidate


@triton.jit
def scan_candidates(score_ptr, candidate_ptr, length, BLOCK_L: tl.constexpr):
    """Scan the candidates: their number, the lowest, the lowest with the largest score, whether one is NaN."""
    left = tl.zeros([BLOCK_L], tl.int32)
    bad = tl.zeros([BLOCK_L], tl.int32)
    lowest = tl.zeros([BLOCK_L], tl.int32) + length
    best_key = tl.full([BLOCK_L], -0x80000000, tl.int32)
    best_place = tl.zeros([BLOCK_L], tl.int32) + length
    for begin in range(0, length, BLOCK_L):
        place = begin + tl.arange(0, BLOCK_L)
        key, candidate = load_keys(score_ptr, candidate_ptr, place, length)
        score = tl.load(score_ptr + place, mask=candidate, other=0.0)
        left += candidate.to(tl.int32)
        bad |= (score != score).to(tl.int32)
        lowest = tl.minimum(lowest, tl.where(candidate, place, length))
        better = key > best_key
        best_key = tl.where(better, key, best_key)
        best_place = tl.where(better, place, best_place)
    top = tl.max(best_key, axis=0)
    best = tl.min(tl.where(best_key == top, best_place, length), axis=0)
    return tl.sum(left, axis=0), tl.min(lowest, axis=0), best, tl.max(bad, axis=0) != 0


@triton.jit
def count_above(score_ptr, candidate_ptr, length, bound, BLOCK_L: tl.constexpr):
    """Count the candidates whose key exceeds ``bound``."""
    total = tl.zeros([BLOCK_L], tl.int32)
    for begin in range(0, length, BLOCK_L):
        key, candidate = load_keys(score_ptr, candidate_ptr, begin + tl.arange(0, BLOCK_L), length)
        total += (candidate & (key > bound)).to(tl.int32)
    return tl.sum(total, axis=0)


@triton.jit
def kth_largest(score_ptr, candidate_ptr, length, count, BLOCK_L: tl.constexpr):
    """The key of the ``count``-th largest score (at least 1), by bisection, and how many positions of that very key
    belong to the ``count`` largest."""
    low = tl.full([], -0x80000000, tl.int64)  # int64, so that the sum of two does not overflow
    high = tl.full([], 0x7FFFFFFF, tl.int64)
    while low < high:  # the smallest key that fewer than ``count`` exceed
        middle = (low + high) >> 1
        fewer = count_above(score_ptr, candidate_ptr, length, middle.to(tl.int32), BLOCK_L) < count
        high = tl.where(fewer, middle, high)
        low = tl.where(fewer, low, middle + 1)
    bound = low.to(tl.int32)
    return bound, count - count_above(score_ptr, candidate_ptr, length, bound, BLOCK_L)


@triton.jit
def add_over(score_ptr, candidate_ptr, fill_ptr, length, tau, STRICT: tl.constexpr, BLOCK_L: tl.constexpr):
    """Add all that reach ``tau``, or exceed it with STRICT."""
    for begin in range(0, length, BLOCK_L):
        place = begin + tl.arange(0, BLOCK_L)
        candidate = tl.load(candidate_ptr + place, mask=place < length, other=0) != 0
        score = tl.load(score_ptr + place, mask=candidate, other=0.0)
        over = score > tau if STRICT else score >= tau
        tl.store(fill_ptr + place, candidate, mask=candidate & over)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b)


@triton.jit
def _load_anchors(score_ptr, candidate_ptr, place, length, tau, tau_low, lowest):
    """Load the candidates that are anchors, and those that may follow one. ``lowest`` is the least key of an anchor."""
    key, candidate = load_keys(score_ptr, candidate_ptr, place, length)
    score = tl.load(score_ptr + place, mask=candidate, other=0.0)
    return candidate & (score >= tau) & (key >= lowest), candidate & (score >= tau_low)


@triton.jit
def add_near_anchors(score_ptr, candidate_ptr, fill_ptr, length, tau, tau_low, lowest, radius, BLOCK_L: tl.constexpr):
    """Add all that reach ``tau_low`` within ``radius`` of an anchor: one over ``tau`` with at least key ``lowest``."""
    far = radius + length + 1
    last = tl.zeros([], tl.int32) - far  # the last anchor before the tile
    for begin in range(0, length, BLOCK_L):
        place = begin + tl.arange(0, BLOCK_L)
        anchor, may = _load_anchors(score_ptr, candidate_ptr, place, length, tau, tau_low, lowest)
        at = tl.where(anchor, place, -far)
        before = tl.maximum(tl.associative_scan(at, 0, _larger), last)
        tl.store(fill_ptr + place, may, mask=may & (place - before <= radius))
        last = tl.maximum(last, tl.max(at, axis=0))
    following = tl.zeros([], tl.int32) + length + far
    n_tiles = tl.cdiv(length, BLOCK_L)
    for tile in range(0, n_tiles):
        place = (n_tiles - 1 - tile) * BLOCK_L + tl.arange(0, BLOCK_L)
        anchor, may = _load_anchors(score_ptr, candidate_ptr, place, length, tau, tau_low, lowest)
        at = tl.where(anchor, place, length + far)
        after = tl.minimum(tl.associative_scan(at, 0, _smaller, reverse=True), following)
        tl.store(fill_ptr + place, may, mask=may & (after - place <= radius))
        following = tl.minimum(following, tl.min(at, axis=0))


@triton.jit
def _entropy_above(score_ptr, entropy_ptr, candidate_ptr, length, bound, BLOCK_L: tl.constexpr):
    """Sum the entropies of the candidates whose key exceeds ``bound``, in float64."""
    total = tl.zeros([BLOCK_L], tl.float64)
    for begin in range(0, length, BLOCK_L):
        place = begin + tl.arange(0, BLOCK_L)
        key, candidate = load_keys(score_ptr, candidate_ptr, place, length)
        above = candidate & (key > bound)
        total += tl.load(entropy_ptr + place, mask=above, other=0.0).to(tl.float64)
    return tl.sum(total, axis=0)


@triton.jit
def add_within_bound(score_ptr, entropy_ptr, candidate_ptr, fill_ptr, length, most, BLOCK_L: tl.constexpr):
    """Add the best positions as long as the entropies before them sum to at most ``most``."""
    low = tl.full([], -0x80000000, tl.int64)  # int64, so that the sum of two does not overflow
    high = tl.full([], 0x7FFFFFFF, tl.int64)
    while low < high:  # the smallest key above which the entropies sum to at most ``most``
        middle = (low + high) >> 1
        fits = _entropy_above(score_ptr, entropy_ptr, candidate_ptr, length, middle.to(tl.int32), BLOCK_L) <= most
        high = tl.where(fits, middle, high)
        low = tl.where(fits, low, middle + 1)
    bound = low.to(tl.int32)
    total = _entropy_above(score_ptr, entropy_ptr, candidate_ptr, length, bound, BLOCK_L)
    for begin in range(0, length, BLOCK_L):
        place = begin + tl.arange(0, BLOCK_L)
        key, candidate = load_keys(score_ptr, candidate_ptr, place, length)
        tie = candidate & (key == bound)  # of equal scores the lowest position comes first
        entropy = tl.load(entropy_ptr + place, mask=tie, other=0.0).to(tl.float64)
        before = total + (tl.cumsum(entropy, axis=0) - entropy)
        chosen = candidate & ((key > bound) | (tie & (before <= most)))
        tl.store(fill_ptr + place, chosen, mask=chosen)
        total += tl.sum(entropy, axis=0)


@triton.jit
def _better_of_run(starts_a, key_a, place_a, starts_b, key_b, place_b):
    """Combine two neighbouring stretches of positions: the best position of the run that the later one ends in."""
    take_b = (starts_b != 0) | (key_b > key_a) | ((key_b == key_a) & (place_b < place_a))
    return starts_a | starts_b, tl.where(take_b, key_b, key_a), tl.where(take_b, place_b, place_a)


@triton.jit
def _best_so_far(score_ptr, candidate_ptr, masked_ptr, place, length, key_before, place_before, REVERSE: tl.constexpr):
    """Return key and place of the best position of each position's run up to there, and the same at the tile's end."""
    key, candidate = load_keys(score_ptr, candidate_ptr, place, length)
    masked = tl.load(masked_ptr + place, mask=place < length, other=0) != 0
    starts = (masked == 0).to(tl.int32)  # a decided position ends a run
    starts, key, best = tl.associative_scan((starts, key, place), 0, _better_of_run, reverse=REVERSE)
    before = (starts == 0) & ((key_before > key) | ((key_before == key) & (place_before < best)))
    return tl.where(before, key_before, key), tl.where(before, place_before, best)


@triton.jit
def _at_edge(values, place, edge):
    """Return the value at the position ``edge`` of a tile."""
    return tl.sum(tl.where(place == edge, values, 0), axis=0)


@triton.jit
def fill_runs(score_ptr, candidate_ptr, masked_ptr, fill_ptr, length, tau, tau_low, best, BLOCK_L: tl.constexpr):
    """Mark ``best``, all over ``tau``, and the best of each run of undecided positions if it is over ``tau_low``."""
    key_before = tl.full([], -0x80000000, tl.int32)
    place_before = tl.zeros([], tl.int32) + length
    for begin in range(0, length, BLOCK_L):  # ``fill`` holds the best of the run's part up to each position
        place = begin + tl.arange(0, BLOCK_L)
        key, so_far = _best_so_far(score_ptr, candidate_ptr, masked_ptr, place, length, key_before, place_before, False)
        tl.store(fill_ptr + place, so_far == place, mask=place < length)
        key_before = _at_edge(key, place, begin + BLOCK_L - 1)
        place_before = _at_edge(so_far, place, begin + BLOCK_L - 1)
    tl.debug_barrier()
    key_before = tl.full([], -0x80000000, tl.int32)
    place_before = tl.zeros([], tl.int32) + length
    n_tiles = tl.cdiv(length, BLOCK_L)
    for tile in range(0, n_tiles):
        begin = (n_tiles - 1 - tile) * BLOCK_L
        place = begin + tl.arange(0, BLOCK_L)
        key, so_far = _best_so_far(score_ptr, candidate_ptr, masked_ptr, place, length, key_before, place_before, True)
        candidate = tl.load(candidate_ptr + place, mask=place < length, other=0) != 0
        score = tl.load(score_ptr + place, mask=candidate, other=0.0)
        top = (tl.load(fill_ptr + place, mask=place < length, other=0) != 0) & (so_far == place) & (score > tau_low)
        tl.store(fill_ptr + place, candidate & (top | (score > tau) | (place == best)), mask=place < length)
        key_before = _at_edge(key, place, begin)
        place_before = _at_edge(so_far, place, begin)


@triton.jit
def add_best_of_block(score_ptr, candidate_ptr, fill_ptr, length, first, stop, BLOCK_L: tl.constexpr):
    """Add the best candidate of ``[first, stop)`` unless ``fill`` has one of them."""
    taken = tl.zeros([BLOCK_L], tl.int32)
    best_key = tl.full([BLOCK_L], -0x80000000, tl.int32)
    best_place = tl.zeros([BLOCK_L], tl.int32) + length
    for begin in range(0, length, BLOCK_L):
        place = begin + tl.arange(0, BLOCK_L)
        key, candidate = load_keys(score_ptr, candidate_ptr, place, length)
        own = candidate & (place >= first) & (place < stop)
        taken |= (own & (tl.load(fill_ptr + place, mask=own, other=0) != 0)).to(tl.int32)
        better = own & ((key > best_key) | (best_place == length))
        best_key = tl.where(better, key, best_key)
        best_place = tl.where(better, place, best_place)
    found = best_place < length
    top = tl.max(tl.where(found, best_key, -0x80000000), axis=0)
    best = tl.min(tl.where(found & (best_key == top), best_place, length), axis=0)
    tl.debug_barrier()
    if (tl.max(taken, axis=0) == 0) & (best < length):
        tl.store(fill_ptr + best, True)


@triton.jit
def count_masks(masked_ptr, length, first, stop, BLOCK_L: tl.constexpr):
    """Count the undecided positions in ``[first, stop)``."""
    total = tl.zeros([BLOCK_L], tl.int32)
    for begin in range(0, length, BLOCK_L):
        place = begin + tl.arange(0, BLOCK_L)
        masked = tl.load(masked_ptr + place, mask=(place < length) & (place >= first) & (place < stop), other=0) != 0
        total += masked.to(tl.int32)
    return tl.sum(total, axis=0)
