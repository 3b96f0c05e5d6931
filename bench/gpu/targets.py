"""Design targets for one H200, in bfloat16 and at LLaDA-8B's sizes, compared with records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from bench import ROOT

from .record import BAD, read

RESULTS = ROOT / "bench" / "results"
Line = dict[str, Any]

STEP_BYTES, STEP_FACTOR = 16.1e9, 1.25  # of a step of 128 positions at 2,124 keys; over the time of a copy of as many
STEP_MS, STRETCH_MS, MACHINE_SHARE, COPY_SHARE, HEAD_FACTOR = 4.7, 4.1, 0.02, 0.85, 1.15
FIRST_FACTOR = 1.5  # the first answer to a prompt of a new length, over the second
ASSUMED_COPY, ASSUMED_TFLOPS, ASSUMED_FULL_MS = 4300.0, 791.0, 44.0


class Published(NamedTuple):
    """A published figure, with milliseconds per forward where they follow from it."""

    what: str
    figure: str
    conditions: str
    hardware: str
    ms: float | None = None


_D3LLM = "GSM8K-CoT 0-shot"
PUBLISHED = (
    Published(
        "SlowFast Sampling (arXiv 2506.10848), LLaDA-8B",
        "1.60 tokens/s vanilla, 25.00 with SlowFast, 54.75 with dLLM-Cache as well",
        "GPQA 8-shot, response 1,024",
        "RTX 4090",
        1e3 / 1.60,
    ),
    Published(
        "Fast-dLLM, LLaDA-8B",
        "114 tokens/s, which its users dispute: the count seems to include the prompt (NVlabs/Fast-dLLM#15), and one "
        "of them measured 82 on an A800 (#49)",
        "HumanEval 0-shot",
        "A100",
    ),
    Published(
        "Fast-dLLM, LLaDA-8B, rerun by the authors of d3LLM",
        "114 tokens/s at 2.77 tokens per forward (2.56 on HumanEval)",
        "GSM8K-CoT 0-shot",
        "H100",
        2770 / 114,
    ),
    Published("ES-dLLM, training-free", "227 tokens/s (LLaDA), 309 (Dream)", "as published", "H200"),
    Published("d3LLM-LLaDA in SGLang", "545 tokens/s at 9.91 tokens per forward", _D3LLM, "H100", 9910 / 545),
    Published("d3LLM-LLaDA in SGLang", "1,241 tokens/s, as many per forward", _D3LLM, "B200", 9910 / 1241),
    Published("d3LLM-LLaDA in SGLang, batch 4", "1,310 tokens/s at 8.56 tokens per forward", _D3LLM, "B200"),
    Published("d3LLM-Dream in SGLang", "280 tokens/s at 4.89 tokens per forward", _D3LLM, "H100", 4890 / 280),
    Published("d3LLM-Dream in SGLang", "587 tokens/s, as many per forward", _D3LLM, "B200", 4890 / 587),
    Published("Qwen2.5-7B, autoregressive, in SGLang", "109 tokens/s", "batch 1", "H100", 1e3 / 109),
    Published("Qwen2.5-7B, autoregressive, in SGLang", "275 tokens/s", "batch 1", "B200", 1e3 / 275),
    Published("DiffusionGemma 26B-A4B, FP8, in vLLM", "1,288 tokens/s", "as published; another model", "H200"),
)


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
    return [
        *_step_targets(record),
        _wait_target(record),
        _first_answer_target(record),
        *_kernel_targets(record),
        *_assumptions(record),
    ]


def page(record: Record) -> list[str]:
    """Return the page of a run: every target and every record to beat with its verdict, and the parts that failed."""
    lines = ["targets"]
    for row in target_rows(record):
        verdict = "not measured" if not row.value else "" if row.ratio is None else _verdict(row.ratio)
        lines.append(f"  {row.quantity}: {row.value or '-'} ({row.target}) {verdict}".rstrip())
    mine = best_step(record).get("ms")
    lines += ["records to beat", f"  this card: {_rate(record)}"]
    for each in PUBLISHED:
        if each.ms is None:
            verdict = "milliseconds per forward not published"
        elif mine is None:
            verdict = "not measured"
        else:
            verdict = f"{each.ms:.1f} ms per forward, {each.ms / mine:.2f} x this card's step: {_ahead(mine, each.ms)}"
        lines.append(f"  {each.what}, {each.hardware}: {each.figure}; {verdict}")
    failed = [f"  {step}: {part}" for (step, part), line in record.latest.items() if part and line["status"] in BAD]
    return [*lines, "parts that failed", *(failed or ["  none"])]


def _verdict(ratio: float) -> str:
    return "met" if ratio <= 1 else f"MISSED by {ratio:.2f} x"


def _ahead(mine: float, published: float) -> str:
    return "ahead" if mine < published else "BEHIND"


def _rate(record: Record) -> str:
    """Report the fastest step, and the fastest generation."""
    step, lines = best_step(record), [line for line in record.of("throughput") if line.get("tokens_per_second")]
    best = max(lines, key=lambda line: line["tokens_per_second"], default=None)
    told = f"{step['ms']:.2f} ms per step of {step['positions']} positions" if step else "no step measured"
    return told + (f"; {best['tokens_per_second']:.0f} tokens/s ({best['row']}, {best['weights']})" if best else "")


def _first_answer_target(record: Record) -> TargetRow:
    lines = [line for line in record.of("engine") if line.get("first_over_again")]
    told = ", ".join(f"{line['first_over_again']:.2f} x ({line['backend']}, {line['execution']})" for line in lines)
    worst = max((line["first_over_again"] for line in lines), default=None)
    return TargetRow(
        "first answer to a prompt of a new length, beside a second",
        f"<= {FIRST_FACTOR} x its time",
        told,
        worst and worst / FIRST_FACTOR,
    )


def step_target(record: Record) -> float:
    """Return the milliseconds that a step may take: 1.25 times the time of a copy of its bytes, on this card."""
    copy = record.part("baseline", "ceilings").get("copy_gb_per_s")
    if not copy or "H200" in (record.header.get("gpu") or "H200"):
        return STEP_MS
    return round(STEP_FACTOR * 1e3 * STEP_BYTES / (copy * 1e9), 1)


def _step_targets(record: Record) -> list[TargetRow]:
    step, most = best_step(record), step_target(record)
    ms, share = step.get("ms"), step.get("machine_share")
    stretch = f"; stretch {STRETCH_MS}" if most == STEP_MS else ""
    told = f"{ms:.2f} ms ({step['backend']}, replayed)" if ms else ""
    return [
        TargetRow(
            "step of 128 positions at 2,124 keys, bf16",
            f"<= {most} ms{stretch}",
            told,
            ms / most if ms else None,
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
