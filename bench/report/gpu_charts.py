"""Pictures of a GPU's record: steps beside their prediction, and tokens per second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from bench.common.chart import COLOURS, draw_throughput, save
from bench.gpu.targets import Line, Record

TITLES = {"steps": "steps at 8B, replayed", "throughput": "tokens a second and accuracy"}


def names(record: Record, rows: Mapping[str, Line]) -> dict[str, str]:
    """List the pictures that a record has figures for, with file names; ``rows`` are its throughput rows."""
    there = {"steps": bool(steps(record)), "throughput": any(row["real"] for row in rows.values())}
    return {name: f"benchmarks-{record.path.parent.name}-{name}.png" for name, fine in there.items() if fine}


def steps(record: Record) -> list[Line]:
    """The steps that were replayed and timed."""
    return [line for line in record.of("engine") if line.get("ms") and line.get("predicted_ms")]


def draw(record: Record, rows: Mapping[str, Line], folder: Path) -> list[Path]:
    """Write the record's pictures into ``folder``."""
    files = names(record, rows)
    drawn = []
    if "steps" in files:
        drawn.append(_draw_steps(steps(record), record.header.get("gpu", ""), folder / files["steps"]))
    if "throughput" in files:
        real = [row for row in rows.values() if row["real"]]
        about = {
            **{"rows": real, "model": "embedded, in LLaDA-8B's sizes", "machine": {"gpu": record.header.get("gpu")}},
            **{"problems": max(row["problems"] for row in real), "prompts": "records", "gen_length": 128},
        }
        drawn.append(draw_throughput(about, folder / files["throughput"]))
    return drawn


def _draw_steps(lines: Sequence[Line], gpu: str, path: Path) -> Path:
    """Draw a bar per step in milliseconds, the range of 60 of 100 samples, and a mark at the prediction."""
    figure = Figure(figsize=(9, 0.34 * len(lines) + 1.4), layout="constrained")
    axis = figure.subplots()
    for place, line in enumerate(lines):
        ms, predicted = line["ms"], line["predicted_ms"]
        around = [[ms - line.get("ms_p20", ms)], [line.get("ms_p80", ms) - ms]]
        colour = COLOURS["slowfast"] if line["backend"] == "triton" else COLOURS["threshold"]
        axis.barh(place, ms, color=colour, xerr=around, error_kw={"elinewidth": 1})
        axis.plot([predicted] * 2, [place - 0.4, place + 0.4], color="black", linewidth=2)
        axis.text(max(ms, predicted), place, f"  {ms:.2f} ({ms / predicted:.2f} x predicted)", va="center", fontsize=8)
    axis.set_yticks(range(len(lines)), [f"{x['policy']}, {x['kind']}, {x['backend']}" for x in lines], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.35 * max(max(x["ms"], x["predicted_ms"]) for x in lines))
    axis.set_xlabel("milliseconds; the black mark is the prediction")
    axis.set_title(f"steps of LLaDA-8B's sizes ({gpu})", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    return save(figure, path)
