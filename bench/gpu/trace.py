"""Summarise a profile: the host's calls, the kernels with their times, copies, and waits."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

Event = Mapping[str, Any]

SPAN = "decode"
CALLS = ("cuda_runtime", "cuda_driver")
WORK = ("kernel", "gpu_memcpy", "gpu_memset")

# By name, in this order. Kernels of ours have the names of their functions.
FAMILIES = {
    "head": r"^_(lm_head|merge|confidence)\w*_kernel",
    "machine": (
        r"^_(mark_candidates|list_positions|position_ranges|scatter_choices|decide|publish|copy|compact|count_flags)"
        r"_kernel"
    ),
    "attention": r"^_attention|flash|fmha|sdpa|mha_|cudnn",
    "products": r"gemm|gemv|cutlass|nvjet|xmma|cublas|splitK|split_k|^_linear|\bsm\d+_",
    "sorts": r"sort|radix|scan|topk|TopK",
}
REST = "elementwise"


def profiled(work: Callable[[], object]) -> list[Event]:
    """The trace of ``work``, whose span is marked; of the host alone where there is no GPU."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profile:
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return json.loads(path.read_text(encoding="utf-8"))["traceEvents"]


def within(events: Iterable[Event], name: str = SPAN) -> list[Event]:
    """Select the events that start inside the host's span of this name.

    Raises:
        ValueError: there is not exactly one.
    """
    events = list(events)
    spans = [event for event in events if event.get("cat") == "user_annotation" and event["name"] == name]
    if len(spans) != 1:
        raise ValueError(f"the profile has {len(spans)} spans {name!r}, not 1")
    (span,) = spans
    return [event for event in events if span["ts"] <= event.get("ts", -1) < span["ts"] + span["dur"]]


def family(kernel: str) -> str:
    """Classify a kernel by its name."""
    return next((name for name, pattern in FAMILIES.items() if re.search(pattern, kernel)), REST)


def summary(events: Iterable[Event], top: int = 12) -> dict[str, Any]:
    """Counts of calls, kernels, copies and waits; milliseconds on the GPU by family, and the kernels that take most."""
    events = list(events)
    calls = Counter(event["name"] for event in events if event.get("cat") in CALLS)
    kernels = [event for event in events if event.get("cat") == "kernel"]
    names = Counter(event["name"] for event in kernels)
    times: Counter[str] = Counter()
    families: Counter[str] = Counter()
    for event in kernels:
        times[event["name"]] += event.get("dur", 0) / 1e3
        families[family(event["name"])] += event.get("dur", 0) / 1e3
    copies = Counter(event["name"].split(" (")[0] for event in events if event.get("cat") == "gpu_memcpy")
    return {
        "calls": dict(calls.most_common()),
        "waits": waits(events),
        "kernels": len(kernels),
        "copies": dict(copies),
        "memsets": sum(event.get("cat") == "gpu_memset" for event in events),
        "gpu_ms": sum(times.values()),
        "span_ms": busy_span(events),
        "family_ms": {name: round(ms, 4) for name, ms in families.most_common()},
        "family_kernels": dict(Counter(family(event["name"]) for event in kernels)),
        "top": [
            {"kernel": name[:120], "count": names[name], "ms": round(ms, 4)} for name, ms in times.most_common(top)
        ],
    }


def waits(events: Iterable[Event]) -> dict[str, int]:
    """Count calls in which the host waits for the device, and copies of pageable memory, for which it waits as well.

    A copy of pinned memory is queued like a kernel; where the host waits for its end, it makes a call that counts.
    """
    found: Counter[str] = Counter()
    for event in events:
        category, name = event.get("cat"), event.get("name", "")
        if category in CALLS and (name == "cudaMemcpy" or "Synchronize" in name):
            found[name] += 1
        elif category == "gpu_memcpy" and ("DtoH" in name or "HtoD" in name) and "Pageable" in name:
            found[name.split(" (")[0]] += 1
    return dict(found)


def busy_span(events: Iterable[Event]) -> float:
    """Return the milliseconds from the start of the first to the end of the last work on the GPU."""
    work = [event for event in events if event.get("cat") in WORK]
    if not work:
        return 0.0
    return (max(event["ts"] + event.get("dur", 0) for event in work) - min(event["ts"] for event in work)) / 1e3
