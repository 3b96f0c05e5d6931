"""Pictures of benchmark records."""

from __future__ import annotations

import os
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = {"vanilla": "#7f7f7f", "semi-autoregressive": "#a6a6a6", "threshold": "#1f77b4", "slowfast": "#d95f02"}


def _label(row: dict) -> str:
    return row["sampler"] if row["cache"] == "none" else f"{row['sampler']}, {row['cache']}"


def draw_throughput(record: dict, path: Path) -> Path:
    """Tokens a second as bars and, where answers were checked, the accuracy of each row beside them."""
    rows = record["rows"]
    checked = any(row["accuracy"] is not None for row in rows)
    figure = Figure(figsize=(11 if checked else 6.5, 0.45 * len(rows) + 1.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if checked else 1, squeeze=False, sharey=True)[0]
    _bars(axes[0], rows)
    if checked:
        _accuracies(axes[1], rows)
    where = record["machine"]["gpu"] or f"{record['machine']['cpu']}, {record['machine']['threads']} threads"
    figure.suptitle(
        f"{record['model']} model, {record['problems']} x {record['prompts']}, "
        f"gen_length {record['gen_length']}  ({where})",
        fontsize=10,
    )
    partial = path.with_name(path.name + ".partial")
    try:
        figure.savefig(partial, format="png", dpi=140)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _bars(axis, rows: list[dict]) -> None:
    rates = [row["tokens_per_second"] for row in rows]
    axis.barh(range(len(rows)), rates, color=[COLOURS.get(row["sampler"], "#333333") for row in rows])
    axis.set_yticks(range(len(rows)), [_label(row) for row in rows])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.28 * max(rates))
    for place, row in enumerate(rows):
        axis.text(
            row["tokens_per_second"],
            place,
            f"  {row['tokens_per_second']:.0f}  (NFE {row['nfe']:.0f})",
            va="center",
            fontsize=8,
        )
    axis.set_xlabel("tokens/s")
    axis.spines[["top", "right"]].set_visible(False)


def _accuracies(axis, rows: list[dict]) -> None:
    """A dot and its interval for each row, on the lines of the bars beside it."""
    for place, row in enumerate(rows):
        if row["accuracy"] is None:
            continue
        low, high = row["accuracy"] - row["accuracy_low"], row["accuracy_high"] - row["accuracy"]
        colour = COLOURS.get(row["sampler"], "#333333")
        axis.errorbar(100 * row["accuracy"], place, xerr=[[100 * low], [100 * high]], fmt="o", color=colour, capsize=3)
    axis.set_xlabel("accuracy, % (95% interval)")
    axis.set_xlim(-3, 103)
    axis.grid(axis="x", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
