"""AUP, accuracy under parallelism, as d3LLM's authors define it (arXiv 2601.07568), and intervals by resampling."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np

ALPHA = 3.0  # how fast a point loses weight as its accuracy falls behind the best
DROP = 5.0  # percent that a counted point may be below the first one


def curve(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Sort points ``(tokens per forward, accuracy in percent)`` by tokens; of equal ones keep the most accurate."""
    best: dict[float, float] = {}
    for pace, accuracy in points:
        best[pace] = max(accuracy, best.get(pace, 0.0))
    return sorted(best.items())


def cut(points: Sequence[tuple[float, float]]) -> float:
    """Return the accuracy in percent below which a point does not count: :data:`DROP` under that of the slowest."""
    return curve(points)[0][1] - DROP


def aup(points: Sequence[tuple[float, float]], best: float) -> float:
    """Compute the weighted area under accuracy against tokens per forward.

    Args:
        points: ``(tokens per forward, accuracy in percent)`` of one method's settings, in any order.
        best: the best accuracy of all methods on the task, in percent.

    Left of the slowest point the area is ``tokens * accuracy``, right of it that of the trapezoids between the points
    that count, with accuracies times ``min(exp(-ALPHA * (1 - accuracy / best)), 1)``. Points that do not count are left
    out, as if they had not been measured.
    """
    ordered = curve(points)
    limit = cut(points)
    counted = [(pace, accuracy) for pace, accuracy in ordered if accuracy >= limit]
    area = counted[0][0] * counted[0][1]
    for (before, low), (pace, accuracy) in zip(counted, counted[1:], strict=False):
        area += (pace - before) * (_weighed(low, best) + _weighed(accuracy, best)) / 2
    return area


def _weighed(accuracy: float, best: float) -> float:
    return accuracy * min(math.exp(-ALPHA * (1 - accuracy / best)), 1.0) if best else 0.0


def resamples(n: int, times: int = 1000, seed: int = 0) -> np.ndarray:
    """Draw bootstrap counts of ``n`` problems, with replacement, for each of ``times`` samples: ``[times, n]``."""
    rng = random.Random(f"resamples-{seed}")  # whose draws, unlike numpy's, stay the same from version to version
    drawn = (rng.choices(range(n), k=n) for _ in range(times))
    return np.stack([np.bincount(sample, minlength=n) for sample in drawn])


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The middle 95% of resampled values."""
    low, high = np.percentile(np.asarray(values, dtype=float), (2.5, 97.5))
    return float(low), float(high)
