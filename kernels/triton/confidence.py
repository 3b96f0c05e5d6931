"""Chosen token and its score from logits, in one read of the logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .check import FLOATS, check_tensor, refuse_unless
from .cost import Cost
from .launch import launch
from .philox import gumbel, noise_arguments
from .softmax_partial import LOG2E, NO_TOKEN, finite_or_zero, largest, max_of, result_of, runner_up, sum_of, value_of

METRICS = ("confidence", "margin", "entropy")
_FIELDS = tl.constexpr(5)
_LOG2E = tl.constexpr(LOG2E)
_LN2 = tl.constexpr(1 / LOG2E)


@triton.jit
def _part(x, ids, noise, chunk, scale, METRIC: tl.constexpr, HAS_NOISE: tl.constexpr, GROUP: tl.constexpr):
    """Reduce a chunk: largest logit, sum, extra (runner-up, or sum of weight times exponent), key, logit and winner.

    Without noise the winner is a group of GROUP columns, which lie in one thread: a search for the column in every one
    would cost a quarter of all instructions, and `_finish` searches one group per row.
    """
    if HAS_NOISE:
        top = max_of(x)
        key, winner = largest(x + noise, ids)
        logit = value_of(x, ids, winner)
    else:
        groups: tl.constexpr = x.shape[0] // GROUP
        top, winner = largest(tl.max(tl.reshape(x, [groups, GROUP]), axis=1), chunk * groups + tl.arange(0, groups))
        key, logit = top, top
    exponent = (x - finite_or_zero(top)) * scale
    weight = tl.exp2(exponent)
    total = sum_of(weight)
    extra = total
    if METRIC == "margin":
        extra = runner_up(x, top, float("-inf"))
    if METRIC == "entropy":
        extra = sum_of(weight * tl.where(weight > 0, exponent, 0.0))
    return top, total, extra, key, logit, winner


@triton.jit
def _store_part(at, winner_at, n_chunks, part, METRIC: tl.constexpr, HAS_NOISE: tl.constexpr):
    top, total, extra, key, logit, winner = part
    tl.store(at, top)
    tl.store(at + n_chunks, total)
    if METRIC != "confidence":
        tl.store(at + 2 * n_chunks, extra)
    if HAS_NOISE:
        tl.store(at + 3 * n_chunks, key)
        tl.store(at + 4 * n_chunks, logit)
    tl.store(winner_at, winner)


@triton.jit
def _merged(at, winner_at, n_chunks, scale, METRIC: tl.constexpr, HAS_NOISE: tl.constexpr, BLOCK_C: tl.constexpr):
    """Merge the chunks of a row into the values of `_part`. Parts are read past L1: other programs wrote them."""
    chunk = tl.arange(0, BLOCK_C)
    there = chunk < n_chunks
    tops = tl.load(at + chunk, mask=there, other=float("-inf"), cache_modifier=".cg")
    totals = tl.load(at + n_chunks + chunk, mask=there, other=0.0, cache_modifier=".cg")
    winners = tl.load(winner_at + chunk, mask=there, other=NO_TOKEN, cache_modifier=".cg")
    if HAS_NOISE:
        keys = tl.load(at + 3 * n_chunks + chunk, mask=there, other=float("-inf"), cache_modifier=".cg")
        logits = tl.load(at + 4 * n_chunks + chunk, mask=there, other=float("-inf"), cache_modifier=".cg")
        top = max_of(tops)
        key, winner = largest(keys, winners)
        logit = value_of(logits, winners, winner)
    else:
        top, winner = largest(tops, winners)
        key, logit = top, top
    exponent = (tops - finite_or_zero(top)) * scale
    weight = tl.exp2(exponent)
    total = sum_of(weight * totals)
    extra = total
    if METRIC != "confidence":
        extras = tl.load(at + 2 * n_chunks + chunk, mask=there, other=0.0, cache_modifier=".cg")
    if METRIC == "margin":
        extra = runner_up(tops, top, extras)
    if METRIC == "entropy":
        extra = sum_of(weight * (extras + tl.where(weight > 0, exponent, 0.0) * totals))
    return top, total, extra, key, logit, winner


@triton.jit
def _finish(
    row_ptr,
    token_at,
    score_at,
    n_columns,
    found,
    scale,
    METRIC: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Store a row's token and score from its merged values. A row of NaN has no winner."""
    top, total, extra, _, logit, winner = found
    if not HAS_NOISE:
        ids = tl.minimum(winner, n_columns // GROUP) * GROUP + tl.arange(0, GROUP)
        group = tl.load(row_ptr + ids, mask=ids < n_columns, other=float("-inf")).to(tl.float32)
        winner = tl.min(tl.where(group == top, ids, NO_TOKEN))
    base = finite_or_zero(top)
    if METRIC == "margin":
        score = (tl.exp2((top - base) * scale) - tl.exp2((extra - base) * scale)) / total
    elif METRIC == "entropy":
        score = extra / total * _LN2 - tl.log(total)
    else:
        score = tl.exp2((logit - base) * scale) / total
    tl.store(token_at, tl.minimum(winner, n_columns - 1))
    tl.store(score_at, score)


@triton.jit(do_not_specialize=["sequence_length"])
def _confidence_kernel(
    logits_ptr,
    temperature_ptr,
    seed_ptr,
    position_ptr,
    step_ptr,
    token_ptr,
    score_ptr,
    part_ptr,
    winner_ptr,
    counter_ptr,
    n_columns,
    sequence_length,
    stride_logits_row,
    METRIC: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    IS_TEMPERED: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    n_chunks = tl.num_programs(1)
    source = row
    if HAS_SHIFT:
        source = tl.where(row % sequence_length == 0, row, row - 1)
    row_ptr = logits_ptr + source * stride_logits_row
    ids = chunk * BLOCK_V + tl.arange(0, BLOCK_V)
    x = tl.load(row_ptr + ids, mask=ids < n_columns, other=float("-inf")).to(tl.float32)
    noise, scale = x, _LOG2E
    if HAS_NOISE:
        temperature = tl.load(temperature_ptr + row)
        if IS_TEMPERED:
            scale = _LOG2E / temperature
        seed, position, step = tl.load(seed_ptr + row), tl.load(position_ptr + row), tl.load(step_ptr + row)
        noise = gumbel(seed, ids, position, step) * temperature
    part = _part(x, ids, noise, chunk, scale, METRIC, HAS_NOISE, GROUP)
    token_at, score_at = token_ptr + row, score_ptr + row
    if BLOCK_C == 1:
        _finish(row_ptr, token_at, score_at, n_columns, part, scale, METRIC, HAS_NOISE, GROUP)
    else:
        part_ptr += row * _FIELDS * n_chunks
        winner_ptr += row * n_chunks
        _store_part(part_ptr + chunk, winner_ptr + chunk, n_chunks, part, METRIC, HAS_NOISE)
        tl.debug_barrier()
        if tl.atomic_add(counter_ptr + row, 1, sem="acq_rel") == n_chunks - 1:  # all other parts are stored
            whole = _merged(part_ptr, winner_ptr, n_chunks, scale, METRIC, HAS_NOISE, BLOCK_C)
            _finish(row_ptr, token_at, score_at, n_columns, whole, scale, METRIC, HAS_NOISE, GROUP)
            tl.store(counter_ptr + row, 0)


@dataclass(frozen=True)
class ConfidenceConfig:
    BLOCK_V: int
    num_warps: int


def confidence_config(n_columns: int, noise: bool = False) -> ConfidenceConfig:
    """One chunk per program, sized by the vocabulary alone: a row's bits must not depend on the number of rows.

    Loads are in flight only in the first part of a program's short life, so throughput depends on the bytes that all
    resident programs hold. 4,096 logits in four warps (32 per thread) take 48 registers per thread: ten programs per
    multiprocessor, 80 KB of bf16. With 16 per thread the fixed work (reductions, address arithmetic) weighs twice as
    much, with 64 registers run short. One row of 126,464 still makes 31 programs. Noise is bound by arithmetic: 16 per
    thread, or its registers leave too few warps.
    """
    most = 2048 if noise else 4096
    block = min(most, max(128, triton.next_power_of_2(n_columns)))
    return ConfidenceConfig(BLOCK_V=block, num_warps=max(1, block * 4 // most))


def _workspace(
    n_rows: int, n_chunks: int, counters: torch.Tensor | None, device: torch.device
) -> dict[str, torch.Tensor]:
    """Allocate scratch memory for the results of chunks and the count of finished ones."""
    if counters is None:
        counters = torch.zeros(n_rows, dtype=torch.int32, device=device)
    check_tensor("counters", counters, dtype=torch.int32, shape=[None], device=device)
    refuse_unless(counters.shape[0] >= n_rows, f"counters has {counters.shape[0]} entries for {n_rows} rows")
    return {
        "part_ptr": torch.empty(n_rows * _FIELDS.value * n_chunks, dtype=torch.float32, device=device),
        "winner_ptr": torch.empty(n_rows * n_chunks, dtype=torch.int32, device=device),
        "counter_ptr": counters,
    }


def confidence(
    logits: torch.Tensor,
    *,
    metric: str = "confidence",
    temperature: torch.Tensor | None = None,
    tempered: bool = False,
    seed: torch.Tensor | None = None,
    position: torch.Tensor | None = None,
    step: torch.Tensor | None = None,
    sequence_length: int | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    counters: torch.Tensor | None = None,
    config: ConfidenceConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token for each row, ``argmax(logits + temperature * gumbel)``, and its score, in float32.

    With ``p = softmax(logits)``, or ``softmax(logits / temperature)`` if ``tempered``, the score is ``p[token]``
    (``metric="confidence"``), the difference of the two largest of ``p`` (``"margin"``) or ``sum(p * log(p))``
    (``"entropy"``; Dream's sampler and the torch twin have ``log(p + 1e-10)``, which is larger by at most V * 1e-10).

    Args:
        logits: ``[T, V]``, float32, float16 or bfloat16, with any row stride; V at most 2^20.
        temperature: float32 ``[T]``, each above 0 (not checked). None: no noise, and ``tempered`` changes nothing.
        seed, position, step: int64 ``[T]``, the noise's keys beside the token id; needed with a temperature.
        sequence_length: for models whose logits are shifted by one: rows are sequences of that many, and row ``t``
            looks at logits row ``t - 1``, the first row of a sequence at its own.
        out: token int32 ``[T]`` and score float32 ``[T]``, dense; allocated if None.
        counters: int32, at least T zeros, and left zero: not for two launches at once. Allocated if None.

    Ties go to the lowest token id. Minus infinity is a logit like others. A row with a NaN or plus infinity, or with
    minus infinity alone, has a NaN score and some valid token; others are untouched. A row's bits depend on itself
    alone. Logits are read once, but for the 16 bytes around a row's winner.
    """
    check_tensor("logits", logits, dtype=FLOATS, shape=[None, None])
    n_rows, n_columns = logits.shape
    refuse_unless(0 < n_columns <= 2**20, f"logits has {n_columns} columns, not 1 to 2^20")
    refuse_unless(metric in METRICS, f"metric={metric!r} is not one of {METRICS}")
    noise = noise_arguments(temperature, {"seed": seed, "position": position, "step": step}, n_rows, logits.device)
    if sequence_length is not None:
        divides = sequence_length > 0 and n_rows % sequence_length == 0
        refuse_unless(divides, f"sequence_length={sequence_length} does not divide the {n_rows} rows of logits")
    token, score = result_of(out, n_rows, logits.device)
    config = config or confidence_config(n_columns, noise=temperature is not None)
    n_chunks = triton.cdiv(n_columns, config.BLOCK_V)
    workspace = {"part_ptr": None, "winner_ptr": None, "counter_ptr": None}
    if n_chunks > 1:
        workspace = _workspace(n_rows, n_chunks, counters, logits.device)
    if n_rows == 0:
        return token, score
    launch(
        _confidence_kernel,
        (n_rows, n_chunks),
        logits_ptr=logits,
        **noise,
        token_ptr=token,
        score_ptr=score,
        **workspace,
        n_columns=n_columns,
        sequence_length=sequence_length or 1,
        stride_logits_row=logits.stride(0),
        METRIC=metric,
        HAS_NOISE=temperature is not None,
        IS_TEMPERED=tempered and temperature is not None,
        HAS_SHIFT=sequence_length is not None,
        GROUP=16 // logits.element_size(),
        BLOCK_V=config.BLOCK_V,
        BLOCK_C=triton.next_power_of_2(n_chunks),
        num_warps=config.num_warps,
    )
    return token, score


def confidence_cost(n_rows: int, n_columns: int, itemsize: int) -> Cost:
    """The logits once, and a token and a score per row. About eight operations per logit, without noise."""
    return Cost(bytes=n_rows * (n_columns * itemsize + 8), flops=8 * n_rows * n_columns)
