"""Summarise a record of :mod:`.sweep`: tokens per forward, accuracies and areas with intervals, and tables."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import aup

ALONE = "one change to paper"  # settings that are no sweep: they have no area
DEFAULT = ("SlowFast paper", "tau_high 0.85")  # the setting with which the others are compared
SWEPT = 3  # fewest settings whose area a picture shows


@dataclass(frozen=True)
class Point:
    """A setting. ``pace`` is tokens per forward; accuracies are percents; intervals are of 95%.

    ``lost`` is by how much its accuracy is below the default's on the same problems, with its interval. ``paces`` and
    ``accuracies`` are by resample.
    """

    label: str
    accuracy: float
    accuracy_interval: tuple[float, float]
    pace: float
    pace_interval: tuple[float, float]
    lost: float
    lost_interval: tuple[float, float]
    nfe: float
    full_forwards: float
    positions_forwarded: float
    paces: np.ndarray
    accuracies: np.ndarray

    @property
    def no_loss(self) -> bool:
        """Return True if these problems show no loss against the default."""
        return self.lost_interval[0] <= 0


@dataclass(frozen=True)
class Method:
    """A sampler and its settings, as they were measured; ``area`` is None where they are no sweep."""

    name: str
    points: tuple[Point, ...]
    area: float | None
    area_interval: tuple[float, float] | None

    @property
    def cut(self) -> float:
        """The accuracy below which a point does not count for the area."""
        return aup.cut([(p.pace, p.accuracy) for p in self.points])

    @property
    def fastest(self) -> Point | None:
        """Return the setting with the most tokens per forward that shows no loss against the default."""
        return max((p for p in self.points if p.no_loss), key=lambda p: p.pace, default=None)


@dataclass(frozen=True)
class Summary:
    """A task: how many problems it has, and its methods in the order of the record."""

    task: str
    n: int
    methods: tuple[Method, ...]

    @property
    def swept(self) -> list[Method]:
        """The methods with enough settings for a line in a picture."""
        return [m for m in self.methods if m.area is not None and len(m.points) >= SWEPT]


def summaries(record: dict, times: int = 1000) -> list[Summary]:
    """Each task of a record. All settings of a task are resampled together: the same problems for all of them."""
    names = dict.fromkeys(line["task"] for line in record["lines"])
    return [_summary(task, [line for line in record["lines"] if line["task"] == task], times) for task in names]


def _summary(task: str, lines: list[dict], times: int) -> Summary:
    n = lines[0]["n"]
    drawn = aup.resamples(n, times).T
    default = next((line for line in lines if (line["group"], line["label"]) == DEFAULT), None)
    if default is None:
        raise SystemExit(f"error: the record has no line {', '.join(DEFAULT)!r} for task {task!r}")
    reference = _right(default)
    groups: dict[str, list[Point]] = {}
    for line in lines:
        groups.setdefault(line["group"], []).append(_point(line, reference, drawn))
    best = max(p.accuracy for points in groups.values() for p in points)
    bests = np.max([p.accuracies for points in groups.values() for p in points], axis=0)
    return Summary(task, n, tuple(_method(name, points, best, bests) for name, points in groups.items()))


def _right(line: dict) -> np.ndarray:
    return np.array([character == "1" for character in line["right"]], dtype=np.int64)


def _point(line: dict, reference: np.ndarray, drawn: np.ndarray) -> Point:
    """``reference`` is what the default has right, ``[n]``, ``drawn`` how often problems are drawn, ``[n, times]``."""
    n, right = line["n"], _right(line)
    tokens, nfe = np.array(line["tokens"]), np.array(line["nfe"])
    paces, accuracies = (tokens @ drawn) / (nfe @ drawn), 100 * (right @ drawn) / n
    return Point(
        label=line["label"],
        accuracy=100 * line["correct"] / n,
        accuracy_interval=tuple(100 * limit for limit in line["interval"]),
        pace=tokens.sum() / nfe.sum(),
        pace_interval=aup.interval(paces),
        lost=100 * (reference.sum() - right.sum()) / n,
        lost_interval=aup.interval(100 * ((reference - right) @ drawn) / n),
        nfe=nfe.mean(),
        full_forwards=line["full_forwards"],
        positions_forwarded=line["positions_forwarded"],
        paces=paces,
        accuracies=accuracies,
    )


def _method(name: str, points: list[Point], best: float, bests: np.ndarray) -> Method:
    """``best`` is the task's best accuracy, ``bests`` that of each resample, ``[times]``."""
    if name == ALONE:
        return Method(name, tuple(points), None, None)
    area = aup.aup([(p.pace, p.accuracy) for p in points], best)
    paces, accuracies = (np.stack(values, 1) for values in zip(*((p.paces, p.accuracies) for p in points), strict=True))
    areas = [aup.aup(list(zip(*pair, strict=True)), top) for *pair, top in zip(paces, accuracies, bests, strict=True)]
    return Method(name, tuple(points), area, aup.interval(areas))


def tables(found: list[Summary]) -> str:
    """Markdown: for each task the methods, then all settings."""
    return "\n".join(piece for summary in found for piece in (*_methods(summary), "", *_settings(summary), ""))


def _methods(summary: Summary) -> list[str]:
    rows = [
        f"**{summary.task}**, {summary.n} held-out problems, by sampler:\n",
        "| | settings | AUP (95%) | most tokens per forward without a measurable loss | right |",
        "|---|---|---|---|---|",
    ]
    for method in summary.methods:
        area = "" if method.area is None else f"{method.area:.0f} ({_range(method.area_interval, 0)})"
        point = method.fastest
        fastest = f"{point.label}: {point.pace:.1f}" if point else "none"
        right = f"{point.accuracy:.1f}%" if point else ""
        rows.append(f"| {method.name} | {len(method.points)} | {area} | {fastest} | {right} |")
    return rows


def _settings(summary: Summary) -> list[str]:
    rows = [
        f"**{summary.task}**, all settings:\n",
        "| | setting | right (95%) | lost against the default (95%) | tokens per forward (95%) | NFE | full forwards "
        "| positions |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in summary.methods:
        for place, p in enumerate(method.points):
            rows.append(
                f"| {method.name if place == 0 else ''} | {p.label} "
                f"| {p.accuracy:.1f}% ({_range(p.accuracy_interval, 1)}) "
                f"| {p.lost:+.1f} ({_range(p.lost_interval, 1, '+')}){'' if p.no_loss else ' **loss**'} "
                f"| {p.pace:.2f} ({_range(p.pace_interval, 2)}) "
                f"| {p.nfe:.2f} | {p.full_forwards:.2f} | {p.positions_forwarded:.0f} |"
            )
    return rows


def _range(limits: tuple[float, float], digits: int, sign: str = "") -> str:
    low, high = (f"{limit:{sign}.{digits}f}" for limit in limits)
    return f"{low} to {high}"
