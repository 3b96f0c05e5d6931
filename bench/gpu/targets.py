"""Design targets for one H200, in bfloat16 and at LLaDA-8B's sizes, compared with records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from bench import ROOT

from .record import read

RESULTS = ROOT / "bench" / "results"
Line = dict[str, Any]

STEP_MS, STRETCH_MS, MACHINE_SHARE, COPY_SHARE, HEAD_FACTOR = 4.7, 4.1, 0.02, 0.85, 1.15
ASSUMED_COPY, ASSUMED_TFLOPS, ASSUMED_FULL_MS = 4300.0, 791.0, 44.0


@dataclass(frozen=True)
class Record:
    """The lines of a file."""

    path: Path
    lines: Sequence[Line]

    @cached_property
    def latest(self) -> dict[tuple[str, str | None], Line]:
        """The last line of each part that says how it ended; that it was left out only where nothing else does."""
        found: dict[tuple[str, str | None], Line] = {}
        for line in self.lines:
            key = line["step"], line.get("part")
            if line["status"] != "begun" and not (key in found and line["status"] in ("late", "skipped")):
                found[key] = line
        return found

    @cached_property
    def header(self) -> Line:
        """Return the header of the file's last run; empty if the file is another kind of record."""
        begun = [line for line in self.lines if line.get("step") == "suite" and line["status"] == "begun"]
        return begun[-1] if begun else {}

    @property
    def name(self) -> str:
        return f"{self.path.parent.name}/{self.path.stem}"

    def part(self, step: str, part: str) -> Line:
        return self.latest.get((step, part), {})

    def of(self, step: str, **wanted: Any) -> list[Line]:
        """Select the lines of a step's parts that have these values."""
        found = (line for (name, part), line in self.latest.items() if name == step and part is not None)
        return [line for line in found if all(line.get(key) == value for key, value in wanted.items())]


class TargetRow(NamedTuple):
    """A target, its measurement (empty: none), and measured over target, where both are numbers."""

    quantity: str
    target: str
    value: str
    ratio: float | None


def records(folder: Path = RESULTS) -> list[Record]:
    """Every record of a GPU, the oldest first. Toys are none."""
    found = []
    for path in sorted([*folder.glob("*/*.jsonl"), *folder.glob("*/*.json")]):
        if path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            lines = content if isinstance(content, list) else content.get("lines", [])
        else:
            lines = read(path)
        record = Record(path, lines)
        if record.header and not record.header.get("toy") and record.header.get("gpu"):
            found.append(record)
    return sorted(found, key=lambda record: (record.header.get("date", ""), record.path.name))


# ------------------------------------------------------------------------------------------------------------- targets


def best_step(record: Record) -> Line:
    """Return the fastest replayed step of ``region``'s list of positions."""
    timed = [line for line in record.of("engine", policy="region", kind="list") if line.get("ms")]
    return min(timed, key=lambda line: line["ms"], default={})


def kernel(record: Record, operation: str, case: str, implementation: str = "triton") -> Line:
    lines = record.of("kernels", operation=operation, case=case, implementation=implementation)
    return lines[-1] if lines and lines[-1].get("p50_us") else {}


def target_rows(record: Record) -> list[TargetRow]:
    """List every target of the design, and its assumptions about the machine."""
    return [*_step_targets(record), _wait_target(record), *_kernel_targets(record), *_assumptions(record)]


def _step_targets(record: Record) -> list[TargetRow]:
    step = best_step(record)
    ms, share = step.get("ms"), step.get("machine_share")
    told = f"{ms:.2f} ms ({step['backend']}, replayed)" if ms else ""
    return [
        TargetRow(
            "step of 128 positions at 2,124 keys, bf16",
            f"<= {STEP_MS} ms; stretch {STRETCH_MS}",
            told,
            ms / STEP_MS if ms else None,
        ),
        TargetRow(
            "everything in a step that is neither transformer nor head GEMM",
            f"<= {MACHINE_SHARE:.0%} of it",
            f"{share:.1%}" if share is not None else "",
            None if share is None else share / MACHINE_SHARE,
        ),
    ]


def _wait_target(record: Record) -> TargetRow:
    """Report the worst of all generations that were counted with CUDA graphs."""
    counted = [
        line for step in ("sync", "engine") for line in record.of(step, execution="cuda_graphs") if line.get("decode")
    ]
    value, waits = "", 0
    if counted:
        waits = max(sum(line["decode"]["waits"].values()) for line in counted)
        copies = max(_to_host(line["generation"]["copies"]) for line in counted)
        value = f"{waits} between the first step and the last; {copies} copies to the host in all"
    return TargetRow(
        "blocking CUDA calls a generation", "0; copies to the host 1, the result", value, 1.0 + waits if value else None
    )


def _to_host(copies: dict[str, int]) -> int:
    return sum(number for name, number in copies.items() if "DtoH" in name)


def _kernel_targets(record: Record) -> list[TargetRow]:
    large, small = kernel(record, "confidence", "llada-8b-512"), kernel(record, "confidence", "llada-8b-32")
    twin = kernel(record, "confidence", "llada-8b-32", "torch")
    share = large["gb_per_s"] / large["copy_gb_per_s"] if large.get("gb_per_s") else None
    beside = f", torch {twin['p50_us']:.0f} us" if twin else ""
    rows = [
        TargetRow(
            "confidence from logits [512, 126464], cold L2",
            f">= {COPY_SHARE:.0%} of copy bandwidth",
            f"{share:.0%}" if share else "",
            COPY_SHARE / share if share else None,
        ),
        TargetRow(
            "confidence from logits [32, 126464]",
            "in microseconds beside torch",
            f"{small['p50_us']:.1f} us{beside}" if small else "",
            small["p50_us"] / twin["p50_us"] if small and twin else None,
        ),
    ]
    for rows_of_head in (16, 64):
        line = kernel(record, "lm_head", f"llada-8b-{rows_of_head}")
        stream = 1e6 * line["bytes"] / (line["copy_gb_per_s"] * 1e9) if line.get("copy_gb_per_s") else None
        factor = line["p50_us"] / stream if stream else None
        rows.append(
            TargetRow(
                f"fused head, {rows_of_head} rows",
                f"<= {HEAD_FACTOR} x the time to stream its weights",
                f"{line['p50_us']:.0f} us, {factor:.2f} x" if factor else "",
                factor / HEAD_FACTOR if factor else None,
            )
        )
    return rows


def _assumptions(record: Record) -> list[TargetRow]:
    """Compare the assumptions from which the targets were derived."""
    ceilings = record.part("baseline", "ceilings")
    one, many = record.part("baseline", "1 rows").get("ms"), record.part("baseline", "128 rows").get("ms")
    full = record.part("baseline", "full").get("ms")
    copy, rate = ceilings.get("copy_gb_per_s"), ceilings.get("matmul_tflops")
    return [
        TargetRow(
            "copy bandwidth, as assumed",
            f"{ASSUMED_COPY / 1e3:.1f} TB/s",
            f"{copy / 1e3:.2f} TB/s" if copy else "",
            ASSUMED_COPY / copy if copy else None,
        ),
        TargetRow(
            "bf16 product of 8192 x 8192 matrices, as assumed",
            f"{ASSUMED_TFLOPS:.0f} TFLOP/s",
            f"{rate:.0f} TFLOP/s" if rate else "",
            ASSUMED_TFLOPS / rate if rate else None,
        ),
        TargetRow(
            "plain torch, 128 rows beside 1 row, as assumed",
            "equal",
            f"{many:.2f} and {one:.2f} ms" if one and many else "",
            many / one if one and many else None,
        ),
        TargetRow(
            "plain torch, full forward of 2,124 rows, as assumed",
            f"{ASSUMED_FULL_MS:.0f} ms",
            f"{full:.1f} ms" if full else "",
            full / ASSUMED_FULL_MS if full else None,
        ),
    ]


def gaps(record: Record, number: int = 3) -> list[str]:
    """List the targets that were missed by most, each with the profile of its step."""
    missed = [row for row in target_rows(record) if row.ratio and row.ratio > 1 and "assumed" not in row.quantity]
    lines = []
    for row in sorted(missed, key=lambda row: -row.ratio)[:number]:
        lines.append(f"{row.quantity}: {row.value}, {row.ratio:.2f} x the target.{_cause(record, row)}")
    return lines


def _cause(record: Record, row: TargetRow) -> str:
    profile = best_step(record).get("profile") or {}
    if "step" not in row.quantity or not profile.get("gpu_ms"):
        return ""
    whole = profile["gpu_ms"]
    shares = ", ".join(f"{name} {ms / whole:.0%}" for name, ms in profile["family_ms"].items())
    top = ", ".join(f"`{entry['kernel'][:60]}` x {entry['count']} {entry['ms']:.2f} ms" for entry in profile["top"][:3])
    idle = max(0.0, profile["span_ms"] - whole)
    return f" Of {whole:.2f} ms in kernels: {shares}; {idle:.2f} ms between them. Most in: {top}."
