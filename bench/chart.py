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
    """Tokens a second as bars and, where answers were checked, accuracy against tokens a second."""
    rows = record["rows"]
    checked = [row for row in rows if row["accuracy"] is not None]
    figure = Figure(figsize=(11 if checked else 6.5, 0.45 * len(rows) + 1.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if checked else 1, squeeze=False)[0]
    _bars(axes[0], rows)
    if checked:
        _scatter(axes[1], checked)
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


def _scatter(axis, rows: list[dict]) -> None:
    for row in rows:
        low, high = row["accuracy"] - row["accuracy_low"], row["accuracy_high"] - row["accuracy"]
        axis.errorbar(
            row["tokens_per_second"],
            100 * row["accuracy"],
            yerr=[[100 * low], [100 * high]],
            fmt="o",
            color=COLOURS.get(row["sampler"], "#333333"),
            capsize=3,
        )
        axis.annotate(
            _label(row),
            (row["tokens_per_second"], 100 * row["accuracy"]),
            xytext=(5, 5),
            textcoords="offset points",
            fontsize=8,
        )
    axis.set_xlabel("tokens/s")
    axis.set_ylabel("accuracy, % (95% interval)")
    axis.set_ylim(-3, 106)
    axis.margins(x=0.2)
    axis.spines[["top", "right"]].set_visible(False)
