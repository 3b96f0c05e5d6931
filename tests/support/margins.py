"""Tolerances for results that differ only in summation order, and the margin of a decision from a tie."""

from __future__ import annotations

import torch

from sfs_triton import Generation, Sampler, SlowFast
from tests.conformance import logits_tolerance

BOTH_WAYS = 128  # units of rounding between two orders of summation; over 64 were seen with MKL_CBWR=COMPATIBLE


def assert_logits_close(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    """Compare logits of two orders of summation, to what rounding may change in values of their size."""
    torch.testing.assert_close(actual, wanted, rtol=0, atol=logits_tolerance(wanted, BOTH_WAYS))


def decision_margin(done: Generation, sampler: Sampler) -> float:
    """Return the smallest change of a confidence that may change a decision of a traced generation.

    For samplers with a threshold and without noise. It covers which positions are committed and where horizons end. A
    trace has no second-best token, so near-ties between tokens of one position are not covered.
    """
    sampling, gaps = sampler.sampling_values(), [float("inf")]
    for step in done.trace:
        slow = step.phase == "slow"
        tau = sampling["tau_slow" if slow else "tau"]
        thresholds = [tau, sampling["tau_min"]] if slow else [tau]
        if slow and sampler.share_stable:
            thresholds.append(sampling["tau"])
        scores = sorted((c for c in step.confidence if c is not None), reverse=True)
        gaps += [abs(score - threshold) for score in scores for threshold in thresholds]
        fewest = 1
        if isinstance(sampler, SlowFast):
            fewest = sampler.min_parallel_slow if slow else sampler.min_parallel
        if sum(score > tau for score in scores) < fewest and len(scores) > 1:  # only the best is committed
            gaps.append(scores[0] - scores[1])
    return min(gaps)
