"""Pictures of benchmark records."""

from __future__ import annotations

import os
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

COLOURS = {
    "vanilla": "#7f7f7f",
    "semi-autoregressive": "#a6a6a6",
    "threshold": "#1f77b4",
    "slowfast": "#d95f02",
    "autoregressive": "#6a51a3",
}
OTHERS = 0.45  # opacity of what is not this package's


def save(figure: Figure, path: Path) -> Path:
    """Write a picture whole or not at all."""
    FigureCanvasAgg(figure)
    partial = path.with_name(path.name + ".partial")
    try:
        figure.savefig(partial, format="png", dpi=140)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def draw_throughput(record: dict, path: Path) -> Path:
    """Draw tokens per second as bars and, where answers were checked, accuracy against them beside it."""
    rows = record["rows"]
    checked = [row for row in rows if row["accuracy"] is not None]
    figure = Figure(figsize=(13 if checked else 7.5, max(3.2, 0.36 * len(rows) + 1.6)), layout="constrained")
    axes = figure.subplots(1, 2 if checked else 1, squeeze=False, width_ratios=(3, 2) if checked else None)[0]
    _bars(axes[0], rows)
    if checked:
        _accuracies(axes[1], rows)
    where = record["machine"]["gpu"] or f"{record['machine']['cpu']}, {record['machine']['threads']} threads"
    figure.suptitle(
        f"{record['model']} model, {record['problems']} x {record['prompts']}, "
        f"gen_length {record['gen_length']}  ({where})",
        fontsize=10,
    )
    return save(figure, path)


def _label(row: dict) -> str:
    parts = [row["sampler"] if row["cache"] == "none" else f"{row['sampler']}, {row['cache']}"]
    parts += [part for part in (row["backend"], row["execution"]) if part]
    parts += [f"batch {row['batch']}"] if row["batch"] > 1 else []
    return f"{', '.join(parts)}  [{row['by']}]"


def _look(row: dict) -> dict:
    return {"color": COLOURS.get(row["sampler"], "#333333"), "alpha": 1 if row["by"] == "sfs_triton" else OTHERS}


def _bars(axis, rows: list[dict]) -> None:
    rates = [row["tokens_per_second"] for row in rows]
    for place, row in enumerate(rows):
        axis.barh(place, rates[place], **_look(row))
        note = "extrapolated" if row["extrapolated"] else f"NFE {row['nfe']:.0f}"
        axis.text(rates[place], place, f"  {rates[place]:.0f}  ({note})", va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), [f"{_label(row)}  {number}" for number, row in enumerate(rows, 1)], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.28 * max(rates))
    axis.set_xlabel("tokens/s")
    axis.spines[["top", "right"]].set_visible(False)


def _accuracies(axis, rows: list[dict]) -> None:
    """A dot and its interval for each row that was checked, with the row's number; dots too close share a label."""
    taken: list[tuple[float, float, list[int]]] = []
    for number, row in enumerate(rows, 1):
        if row["accuracy"] is None:
            continue
        low, high = row["accuracy"] - row["accuracy_low"], row["accuracy_high"] - row["accuracy"]
        x, y = row["tokens_per_second"], 100 * row["accuracy"]
        axis.errorbar(x, y, yerr=[[100 * low], [100 * high]], fmt="o", capsize=3, **_look(row))
        near = next((t for t in taken if abs(t[0] / x - 1) < 0.12 and abs(t[1] - y) < 4), None)
        if near:
            near[2].append(number)
        else:
            taken.append((x, y, [number]))
    for x, y, numbers in taken:
        axis.annotate("\n".join(map(str, numbers)), (x, y), (0, 7), textcoords="offset points", ha="center", fontsize=7)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_ylim(-3, 103 + 5 * max((len(numbers) for *_, numbers in taken), default=0))
    axis.set_yticks(range(0, 101, 20))
    axis.set_xlabel("tokens/s")
    axis.set_ylabel("accuracy, % (95% interval)")
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
