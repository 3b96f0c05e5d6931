"""Plot of a generation: confidence per position and step, and committed positions."""

from __future__ import annotations

from pathlib import Path

from ..decoding.samplers import Sampler, SlowFast
from ..engine import Generation
from ..errors import MissingDependencyError, require
from ..scheduling.trace import StepTrace
from .pictures import check_path, whole_picture

try:
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise MissingDependencyError(f'sfs plot needs matplotlib ({error}): pip install "sfs_triton[cli]"') from error

SUFFIXES = (".png", ".svg", ".pdf")
DECIDED, UNSEEN = "#d9d9d9", "#ffffff"
SPAN, CYCLE = "#d62728", "#222222"
# colour, hatch of the strip beside the map, and marker of committed cells: stages differ in more than hue
STAGES = {
    "slow": ("#b3367f", "////", "o"),
    "fast": ("#0072b2", "", "s"),
    "block": ("#0072b2", "", "s"),
}


def save(figure: Figure, out: Path) -> None:
    """Write ``figure`` to ``out``, whole or not at all."""
    check_path("out", out, SUFFIXES)
    with whole_picture("out", out) as file:
        figure.savefig(file, format=out.suffix.lower()[1:])


def confidence_map(result: Generation, sampler: Sampler, *, title: str) -> Figure:
    """Draw the confidence map of a traced generation.

    Args:
        result: result of ``Engine.generate(..., trace=True)``.
        sampler: sampler of the generation; its blocks place the spans.
        title: description of the generation's parameters.
    """
    require(result.trace is not None, "the generation has no trace; generate it with trace=True")
    trace, length, staged = result.trace, len(result.response), isinstance(sampler, SlowFast)
    width = min(16.0, max(8.0, 3.2 + 0.085 * length))
    height = min(14.0, max(4.2, 2.2 + 0.085 * len(trace)))
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    if staged:
        strip, axes = figure.subplots(1, 2, sharey=True, width_ratios=(0.16, width - 2.0))
        _draw_strip(strip, trace)
    else:
        axes = strip = figure.subplots()
    _draw_cells(figure, axes, trace, length)
    _draw_commits(axes, trace, length)
    _draw_spans(axes, trace, sampler, length)
    strip.set_ylabel("step")
    _label(figure, axes, length, staged)
    figure.suptitle(f"{title}   |   NFE {result.nfe}   |   TPF {result.tokens_per_forward:.2f}", fontsize=11)
    return figure


def _draw_cells(figure: Figure, axes: Axes, trace: list[StepTrace], length: int) -> None:
    """Draw confidences as colours; grey: decided before; white: no confidence in this step."""
    values = np.array([[np.nan if c is None else c for c in step.confidence] for step in trace], dtype=float)
    decided = np.zeros((len(trace), length), dtype=bool)
    for row, step in enumerate(trace):
        decided[row + 1 :, step.committed] = True
    ground = np.where(decided[..., None], _rgb(DECIDED), _rgb(UNSEEN))
    extent = (-0.5, length - 0.5, len(trace) + 0.5, 0.5)
    axes.imshow(ground, aspect="auto", interpolation="nearest", extent=extent)
    image = axes.imshow(
        np.ma.masked_invalid(values),
        aspect="auto",
        interpolation="nearest",
        extent=extent,
        cmap=colormaps["viridis"],
        vmin=0.0,
        vmax=1.0,
    )
    figure.colorbar(image, ax=axes, label="confidence of the chosen token", pad=0.01, fraction=0.04, aspect=30)


def _rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])


def _draw_commits(axes: Axes, trace: list[StepTrace], length: int) -> None:
    size = float(np.clip(900 / max(length, len(trace)), 2, 16))  # leaves the cell's colour visible around it
    for stage, (colour, _, marker) in STAGES.items():
        cells = [(p, row + 1) for row, step in enumerate(trace) if step.phase == stage for p in step.committed]
        if cells:
            x, y = zip(*cells, strict=True)
            axes.scatter(
                x, y, s=size, marker=marker, facecolor=colour, edgecolor="white", linewidth=size**0.5 / 5, zorder=4
            )


def _draw_spans(axes: Axes, trace: list[StepTrace], sampler: Sampler, length: int) -> None:
    """Draw the edges of ``[s, e)`` per step, and a line at the start of each cycle (or block)."""
    block_length = sampler.block_length or length
    for name, dashes in (("s", "solid"), ("e", "dashed")):
        lines: list[list[tuple[float, float]]] = []
        for row, step in enumerate(trace, start=1):
            if (edge := getattr(step, name)) is None:
                continue
            x = min(step.block * block_length + edge, length) - 0.5
            if lines and lines[-1][1] == (x, row - 0.5):  # one long line: dashes would restart at each step
                lines[-1][1] = (x, row + 0.5)
            else:
                lines.append([(x, row - 0.5), (x, row + 0.5)])
        axes.add_collection(LineCollection(lines, colors=SPAN, linewidths=1.8, linestyles=dashes))
    for row, (before, step) in enumerate(zip(trace, trace[1:], strict=False), start=1):
        if (before.block, before.cycle) != (step.block, step.cycle):
            axes.axhline(row + 0.5, color=CYCLE, linewidth=0.9)


def _draw_strip(strip: Axes, trace: list[StepTrace]) -> None:
    """Draw the stage of each step, in a narrow column beside the map."""
    for row, step in enumerate(trace, start=1):
        colour, hatch, _ = STAGES[step.phase]
        strip.bar(0, 1, bottom=row - 0.5, width=1, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
    strip.set_xlim(-0.5, 0.5)
    strip.set_xticks([0], ["stage"])
    strip.tick_params(axis="x", length=0)


def _label(figure: Figure, axes: Axes, length: int, staged: bool) -> None:
    axes.set_xlim(-0.5 - 0.008 * length, length - 0.5 + 0.008 * length)  # room for edges at the ends
    axes.set_xlabel("position in the response")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12, steps=(1, 2, 5, 10)))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=12, steps=(1, 2, 5, 10)))
    if staged:  # the strip has the step numbers
        axes.tick_params(axis="y", left=False, labelleft=False)
    handles = []
    for stage in ("slow", "fast") if staged else ("block",):
        colour, hatch, marker = STAGES[stage]
        if staged:
            handles.append(Patch(facecolor=colour, hatch=hatch, edgecolor="white", label=f"{stage} step"))
        label = f"committed in a {stage} step" if staged else "committed"
        handles.append(Line2D([], [], linestyle="", marker=marker, color=colour, label=label))
    edges = ("span start s", "span end e") if staged else ("block start", "block end")
    handles += [
        Line2D([], [], color=SPAN, linewidth=1.8, label=edges[0]),
        Line2D([], [], color=SPAN, linewidth=1.8, linestyle="dashed", label=edges[1]),
        Line2D([], [], color=CYCLE, linewidth=0.9, label="new cycle" if staged else "new block"),
        Patch(facecolor=DECIDED, edgecolor="#888888", label="decided before"),
        Patch(facecolor=UNSEEN, edgecolor="#888888", label="not looked at"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5 if staged else 6, fontsize=8, frameon=False)
