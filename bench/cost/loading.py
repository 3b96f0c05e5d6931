"""Measure memory and time of loading a checkpoint on a CPU, per format of its weights, each in a process of its own.

    python -m bench.shapes.inflate --geometry llada-8b DIR
    python -m bench.cost.loading DIR --formats bfloat16,fp8,int4 --json OUT

Memory is the process's own: pages of the checkpoint's files, which the system may drop at any time, are given apart.
Weights that are used as they are stored lie in such pages.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

import sfs_triton
from bench.common.figures import machine
from sfs_triton.ops.dispatch import FORMATS

DTYPES = ("float32", "bfloat16", "float16")
FIELDS = {"RssAnon": "own", "RssFile": "files"}  # of /proc/self/status, which Linux has
EVERY = 0.02  # seconds between two looks


def resident() -> dict[str, int]:
    """Return the bytes of this process that are in memory: its own, and pages of files."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {FIELDS[words[0][:-1]]: int(words[1]) * 1024 for words in lines if words and words[0][:-1] in FIELDS}


class Peak:
    """The most memory that this process has had at once while the context was open."""

    def __init__(self) -> None:
        self.before, self.most, self._end = resident(), resident(), threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._end.wait(EVERY):
            self.most = {name: max(size, self.most[name]) for name, size in resident().items()}

    def __enter__(self) -> Peak:
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._watch.join()


def measure(folder: str, form: str) -> dict:
    """Load a checkpoint in this process, in a dtype or a format of weights; formats compute in bfloat16."""
    how = {"dtype": form} if form in DTYPES else {"dtype": "bfloat16", "quantization": form}
    with Peak() as peak:
        began = time.perf_counter()
        engine = sfs_triton.load(folder, "cpu", **how)
        seconds = time.perf_counter() - began
    weights = engine.model.weights
    tensors = {t.data_ptr(): t for part in (weights, *weights.layers) for t in _tensors(part)}
    held = resident()
    return {
        "format": form,
        "seconds": seconds,
        "weights": sum(t.untyped_storage().nbytes() for t in tensors.values()),
        "peak": peak.most["own"] - peak.before["own"],
        "after": held["own"] - peak.before["own"],
        "peak_files": peak.most["files"] - peak.before["files"],
    }


def _tensors(record: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a record of weights, and of the quantised matrices in it."""
    for each in fields(record):
        value = getattr(record, each.name)
        if isinstance(value, torch.Tensor):
            yield value
        elif is_dataclass(value):
            yield from _tensors(value)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--formats", default="bfloat16,fp8,int4")
    parser.add_argument("--json", type=Path, help="write the record of the table")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # in a process of its own
    arguments = parser.parse_args(argv)
    for form in arguments.formats.split(","):
        if form not in (*DTYPES, *FORMATS):
            parser.error(f"--formats {form!r} is not one of {', '.join((*DTYPES, *FORMATS))}")
    if arguments.alone:
        print(json.dumps(measure(arguments.folder, arguments.formats)))
        return 0
    shards = [file.stat().st_size for file in Path(arguments.folder).glob("*.safetensors")]
    rows = []
    print("format     seconds   weights GB   peak GB   after GB   pages of files GB")
    for form in arguments.formats.split(","):
        command = [sys.executable, "-m", "bench.cost.loading", arguments.folder, "--formats", form, "--alone"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        row = json.loads(done.stdout)
        rows.append(row)
        sizes = "".join(f"{row[name] / 1e9:11.2f}" for name in ("weights", "peak", "after", "peak_files"))
        print(f"{form:9}{row['seconds']:9.1f}{sizes}", flush=True)
    if arguments.json:
        record = {"machine": machine(torch.device("cpu")), "shards": sorted(shards), "rows": rows}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
