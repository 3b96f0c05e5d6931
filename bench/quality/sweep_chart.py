"""Pictures of a sweep: accuracy against tokens per forward, and the areas."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from bench.common.chart import save

from .sweep_summary import DEFAULT, Method, Summary

LOOKS = {  # colour, marker and its size, one hue a sampler
    "SlowFast paper": ("#d95f02", "o", 5.5),
    "SlowFast fast": ("#a6180a", "D", 8.0),  # larger: what lies upon it leaves a rim
    "SlowFast llada-reference": ("#f2a65a", "^", 5.5),
    "Threshold, blocks of 32": ("#1f77b4", "o", 5.5),
    "Threshold, one block": ("#17becf", "D", 4.5),
    "MultiBlock": ("#2ca02c", "s", 5.0),
    "LocalLeap": ("#98df8a", "v", 5.5),
    "EntropyBound": ("#9467bd", "o", 5.0),
    "Hierarchy": ("#c5b0d5", "^", 5.5),
    "Credit": ("#e377c2", "P", 6.0),
    "KLASS": ("#8c564b", "X", 6.0),
    "WINO": ("#bcbd22", "*", 8.0),
    "FixedSteps, one block": ("#7f7f7f", "D", 5.5),
    "FixedSteps, blocks of 32": ("#444444", "o", 5.5),
}


def _look(method: Method) -> tuple[str, str, float]:
    return LOOKS.get(method.name, ("#333333", "s", 5.5))


def draw_accuracy(found: list[Summary], path: Path) -> Path:
    """Draw one panel per task, one line per method; hollow points lie below the method's cut, outside its area."""
    figure = Figure(figsize=(6.4 * len(found), 5.8), layout="constrained")
    lines = {}
    for axis, summary in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        for method in summary.swept:
            lines[method.name] = _line(axis, method)
        axis.set_title(f"{summary.task}, {summary.n} problems", fontsize=10)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda pace, _: f"{pace:g}"))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlabel("tokens per forward")
        axis.set_ylabel("right, % (95% intervals)")
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return save(figure, path)


def _line(axis, method: Method):
    """Draw a method; returns what a legend shows of it."""
    points = sorted(method.points, key=lambda p: p.pace)
    colour, marker, size = _look(method)
    paces, accuracies = [p.pace for p in points], [p.accuracy for p in points]
    axis.plot(paces, accuracies, color=colour, linewidth=1.3, alpha=0.8)
    for p in points:
        across = [[p.pace - p.pace_interval[0]], [p.pace_interval[1] - p.pace]]
        along = [[p.accuracy - p.accuracy_interval[0]], [p.accuracy_interval[1] - p.accuracy]]
        axis.errorbar(
            p.pace,
            p.accuracy,
            xerr=across,
            yerr=along,
            fmt=marker,
            color=colour,
            markerfacecolor=colour if p.accuracy >= method.cut else "white",
            markersize=size,
            capsize=2,
            elinewidth=0.9,
        )
        if (method.name, p.label) == DEFAULT:
            pointer = {"arrowstyle": "-", "color": "#333333", "shrinkB": 4}
            where = {"xytext": (44, 3), "textcoords": "offset points", "fontsize": 9}
            axis.annotate("the default", (p.pace, p.accuracy), **where, arrowprops=pointer)
    axis.plot([paces[0], paces[-1]], [method.cut] * 2, color=colour, linewidth=0.9, linestyle=(0, (1, 2)))
    return Line2D([], [], color=colour, marker=marker, markersize=size, linewidth=1.3)


def draw_aup(found: list[Summary], path: Path) -> Path:
    """Draw one panel per task, one bar per method, with 95% intervals."""
    names = list(dict.fromkeys(method.name for summary in found for method in summary.swept))
    figure = Figure(figsize=(6.4 * len(found), 0.42 * len(names) + 1.4), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
    for axis, summary in zip(panels, found, strict=True):
        for method in summary.swept:
            _bar(axis, names.index(method.name), method)
        axis.set_xlim(0, 1.15 * max((m.area_interval[1] for m in summary.swept), default=1))
        axis.set_xlabel("AUP (95% interval)")
        axis.set_title(f"{summary.task}, {summary.n} problems", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    return save(figure, path)


def _bar(axis, place: int, method: Method) -> None:
    low, high = method.area_interval
    spread = [[max(0.0, method.area - low)], [max(0.0, high - method.area)]]
    axis.barh(place, method.area, color=_look(method)[0], xerr=spread, capsize=3, error_kw={"elinewidth": 1})
    axis.text(max(method.area, high), place, f"  {method.area:.0f}", va="center", fontsize=8)
