"""Render the CPU results of ``bench/all.py`` as Markdown: for the page of benchmarks and for the README."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.common import summary
from bench.common.pages import table

Line = dict[str, Any]


class CpuRun(NamedTuple):
    """A folder ``bench/results/<machine>/<date>-<commit>`` and the contents of its ``run.json``."""

    folder: Path
    about: Line

    def read(self, name: str) -> Any:
        """A job's result; None if it is not there."""
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def newest(results: Path) -> list[CpuRun]:
    """The last run of each machine, the machine with the latest one last."""
    runs: dict[str, CpuRun] = {}
    found = [CpuRun(path.parent, json.loads(path.read_text(encoding="utf-8"))) for path in results.glob("*/*/run.json")]
    for run in sorted(found, key=lambda run: run.about["date"]):
        runs.pop(run.folder.parent.name, None)
        runs[run.folder.parent.name] = run
    return list(runs.values())


def where(about: Line) -> str:
    """Describe a machine in words."""
    machine = about["machine"]
    return f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}"


def rows_table(record: Line) -> str:
    """Render the rows of a throughput record."""
    batches = len({row["batch"] for row in record["rows"]}) > 1
    head = ["by", "sampler", "cache", *(["batch"] if batches else [])]
    head += [
        "tokens/s",
        "speed-up",
        "NFE",
        "tokens per forward",
        "ms/step",
        "full forwards",
        "positions forwarded",
        "right",
    ]
    return table(head, (_cells(row, batches) for row in record["rows"]))


def _cells(row: Line, batches: bool) -> list[str]:
    mark = "~" if row["extrapolated"] else ""
    right = "" if not row["checked"] else f"{row['correct']} of {row['checked']}"
    return [
        *(row["by"], f"{row['sampler']} ({row['label']})", row["cache"], *([str(row["batch"])] if batches else [])),
        f"{mark}{row['tokens_per_second']:,.0f}",
        "" if row["speedup"] is None else f"{row['speedup']:.1f}x",
        *(f"{row['nfe']:.1f}", f"{row['tpf']:.2f}", f"{row['ms_per_forward']:.1f}"),
        *(f"{row['full_forwards']:.0f}", f"{row['positions_forwarded']:,.0f}", right),
    ]


def about_rows(record: Line) -> str:
    """Describe a throughput record in a sentence."""
    lengths = record["prompt_tokens"]
    return (
        f"{record['model']}, {record['problems']} problems ({record['prompts']}), prompts of {min(lengths)} to "
        f"{max(lengths)} tokens, {record['gen_length']} response positions, {record['dtype'].removeprefix('torch.')}"
    )


def speed_table(lines: Sequence[Line]) -> str:
    """sfs_triton's eager execution over the baselines, on the tiny recorded models."""
    cells = ((line["test"].partition("[")[2].rstrip("]"), f"{line['speed_over_plain']:.2f}") for line in lines)
    return table(("model, sampler", "tokens/s over plain torch's"), cells)


def readme_part(run: CpuRun, root: Path) -> str:
    """The main table in five rows, what it means and where it is from."""
    record, place = run.read("table"), run.folder.relative_to(root)
    rows = summary.chosen(record["rows"])
    told = f"{about_rows(record)}; {where(run.about)} (`{place}/table.json`, commit {record['machine']['commit']})."
    return f"{table(summary.HEAD, map(summary.cells, rows))}\n\n{summary.meaning(rows)}\n\n{told}\n"


def cpu_section(run: CpuRun, root: Path) -> list[str]:
    """The parts of the page of benchmarks about a run."""
    place = run.folder.relative_to(root)
    parts = [f"### {where(run.about)}", f"`{place}`, {run.about['date']}. Sizes are small; the sampler's work is real."]
    for name in ("table", "sizes"):
        if record := run.read(name):
            picture = f"../{place}/{name}.png"
            parts += [
                f"{about_rows(record)}, commit {record['machine']['commit']}:",
                rows_table(record),
                f"![tokens per second and accuracy]({picture})",
            ]
    if lines := run.read("speed"):
        parts += ["One thread, medians of paired ratios; all models but the first are tiny:", speed_table(lines)]
    jobs = ", ".join(f"{job['job']} {job['seconds']:.0f} s" for job in run.about["jobs"])
    return [*parts, f"All of it took {sum(job['seconds'] for job in run.about['jobs']) / 60:.1f} minutes: {jobs}."]
