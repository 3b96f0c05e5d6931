"""What the compiler makes of every shipped kernel, without a GPU: ``python -m bench.kernels.resources [--write]``.

Launchers are called on meta tensors at the shapes of :mod:`bench.kernels`, their launches are recorded, and each
distinct variant is compiled by triton's own path for sm_80, sm_90 and sm_100. Registers, stack (a spill) and shared
memory of the sm_90 variants are kept in ``kernels/resources.json``, with the triton that made them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "kernels" / "resources.json"
TARGETS = (80, 90, 100)
TABLE_TARGET = 90


class CompilingDriver:
    """Stands in for triton's GPU driver: says what to compile for, and can launch nothing."""

    def __init__(self, capability: int):
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch  # triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


def operations() -> list[str]:
    """The benchmark files, one an operation."""
    return sorted(path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py"))


def launches(operation: str) -> Iterator[tuple[str, Any]]:
    """Every launch that ``operation`` makes at the shipped shapes, with the name of its case."""
    import torch

    from sfs_triton.kernels.launch import recording

    for case in importlib.import_module(f"bench.kernels.test_{operation}").cases():
        arguments = case.build(torch.device("meta"))
        with recording() as recorded:
            case.kernel(**arguments)
        for launch in recorded:
            yield case.name, launch


def _usage(cubin: bytes) -> dict[str, int]:
    """Registers, stack and static shared memory by triton's own cuobjdump."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    numbers = dict(re.findall(r"(REG|STACK):(\d+)", text))
    return {"registers": int(numbers["REG"]), "stack": int(numbers["STACK"])}


def compile_operation(operation: str, capability: int) -> dict[str, dict[str, Any]]:
    """Compile all variants of an operation; what each uses, by a name made of kernel and first case."""
    from triton.runtime.driver import driver

    driver.set_active(CompilingDriver(capability))
    found: dict[str, dict[str, Any]] = {}
    variants: dict[str, str] = {}  # by hash
    for case, launch in launches(operation):
        compiled = launch.kernel.warmup(grid=launch.grid, **launch.arguments)
        name = f"{operation}.{launch.kernel.__name__.strip('_').removesuffix('_kernel')}.{case}"
        if variants.setdefault(compiled.hash, name) == name:
            shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
            found[name] = {**_usage(compiled.asm["cubin"]), "shared": shared, "num_warps": warps}
    return found


def compile_all(operations_: list[str], targets: tuple[int, ...] = TARGETS, workers: int | None = None) -> dict:
    """``{capability: {variant: usage}}`` for the given operations, over several processes."""
    os.environ.pop("TRITON_INTERPRET", None)  # for the workers, which import triton anew
    jobs = [(operation, target) for operation in operations_ for target in targets]
    with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        results = list(pool.map(compile_operation, *zip(*jobs, strict=True)))
    table: dict[int, dict] = {target: {} for target in targets}
    for (_, target), result in zip(jobs, results, strict=True):
        table[target].update(result)
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("operations", nargs="*", metavar="OP", help=f"default: all of {', '.join(operations())}")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.relative_to(ROOT)}")
    arguments = parser.parse_args()
    unknown = set(arguments.operations) - set(operations())
    if unknown:
        parser.error(f"unknown operations {sorted(unknown)}")
    if arguments.write and arguments.operations:
        parser.error("--write takes the whole table, not some operations")
    table = compile_all(arguments.operations or operations())
    for target, variants in table.items():
        for name, usage in variants.items():
            spill = "  SPILLS" if usage["stack"] else ""
            print(f"sm_{target} {name:60} {usage['registers']:4} registers {usage['shared']:7} B shared{spill}")
    if arguments.write:
        import triton

        document = {"triton": triton.__version__, "target": TABLE_TARGET, "variants": table[TABLE_TARGET]}
        TABLE.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    return int(any(usage["stack"] for variants in table.values() for usage in variants.values()))


if __name__ == "__main__":
    sys.exit(main())
