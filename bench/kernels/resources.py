"""Report the compiled resources of shipped kernels, without a GPU: ``python -m bench.kernels.resources [--write]``.

Launchers are called on meta tensors at the shapes of :mod:`bench.kernels`, their launches are recorded, and each
distinct variant is compiled by triton's own path for every target. Registers, stack (a spill) and shared
memory of the sm_90 variants are kept in ``kernels/resources.json``, with the largest of each target and the triton that
made them. The exit status is 1 if a variant cannot ship: it spills, or asks for more memory on the chip than there is.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from bench import ROOT

if TYPE_CHECKING:
    from sfs_triton.kernels.launch import Launch

    from .case import Case

TABLE = ROOT / "kernels" / "resources.json"
TARGETS = (80, 86, 89, 90, 100, 120)
TABLE_TARGET = 90
# bytes that a block can ask for
SHARED_LIMIT = {target: 99 * 1024 for target in (86, 89, 120)} | {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_MEMORY_LIMIT = 512  # columns; only sm_100 has such memory


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


def launches(cases: list[Case], shared_memory: int) -> Iterator[tuple[str, Launch]]:
    """Every launch that the cases make where a block may have that much shared memory, with the name of the case."""
    import torch

    from sfs_triton.kernels.launch import recording

    for case in cases:
        arguments = case.build(torch.device("meta"))
        with recording(shared_memory) as recorded:
            case.kernel(**arguments)
        for launch in recorded:
            yield case.name, launch


def _usage(compiled) -> dict[str, int]:
    """Registers and stack by triton's own cuobjdump, the rest as triton says. Registers spill to the stack."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        text = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    numbers = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {
        "registers": numbers["REG"],
        "stack": numbers["STACK"] + numbers["LOCAL"],
        "shared": compiled.metadata.shared,
        "tensor_memory": getattr(compiled.metadata, "tmem_size", None) or 0,
        "num_warps": compiled.metadata.num_warps,
    }


def sources() -> dict[str, str]:
    """Return a digest of each kernel file and of each file of cases; comments and spaces do not count."""
    plain = {tokenize.INDENT: "{", tokenize.DEDENT: "}", tokenize.NEWLINE: "\n", tokenize.COMMENT: "", tokenize.NL: ""}
    digests = {}
    for path in sorted([*(ROOT / "kernels" / "triton").glob("*.py"), *Path(__file__).parent.glob("test_*.py")]):
        with tokenize.open(path) as file:
            code = "".join(plain.get(token.type, token.string) for token in tokenize.generate_tokens(file.readline))
        digests[path.name] = hashlib.sha256(code.replace(" ", "").encode()).hexdigest()[:12]
    return digests


def faults(usage: dict[str, int], target: int) -> list[str]:
    """List the reasons why a variant cannot ship for a target; empty if it can."""
    found = []
    if usage["stack"]:
        found.append(f"spills: {usage['stack']} B of stack")
    if usage["shared"] > SHARED_LIMIT[target]:
        found.append(f"asks for {usage['shared']} B of shared memory, there are {SHARED_LIMIT[target]}")
    if usage["tensor_memory"] > TENSOR_MEMORY_LIMIT:
        found.append(f"asks for {usage['tensor_memory']} columns of tensor memory, there are {TENSOR_MEMORY_LIMIT}")
    return found


def largest(variants: dict[str, dict[str, int]]) -> dict[str, int]:
    """Return the number of a target's variants and the most that one of them uses."""
    most = {key: max(usage[key] for usage in variants.values()) for key in ("registers", "stack", "shared")}
    return {"variants": len(variants)} | most


def differences(table: dict[str, dict], compiled: dict[str, dict]) -> list[str]:
    """List the differences between a table of variants and their compilation, one line each."""
    lines = [f"{name} is not in the table" for name in sorted(compiled.keys() - table.keys())]
    lines += [f"{name} is in the table and nowhere else" for name in sorted(table.keys() - compiled.keys())]
    for name in sorted(table.keys() & compiled.keys()):
        old, new = table[name], compiled[name]
        changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
        lines += [f"{name}: {key} {old.get(key)} is now {new.get(key)}" for key in changed]
    return lines


def compile_cases(operation: str, cases: list[Case], target: int) -> dict[str, dict[str, int]]:
    """Compile all variants that the cases launch; what each uses, by a name made of kernel and first case."""
    from triton.runtime.driver import driver

    driver.set_active(CompilingDriver(target))
    found: dict[str, dict[str, int]] = {}
    variants: set[str] = set()
    able = [case for case in cases if target >= case.min_capability]
    for case, launch in launches(able, SHARED_LIMIT[target]):
        compiled = launch.kernel.warmup(grid=launch.grid, **launch.arguments)
        if compiled.hash in variants:
            continue
        variants.add(compiled.hash)
        kernel = launch.kernel.__name__.strip("_").removesuffix("_kernel")
        name, number = f"{operation}.{kernel}.{case}", 1
        while name in found:
            number += 1
            name = f"{operation}.{kernel}.{case}.{number}"
        found[name] = _usage(compiled)
    return found


def compile_operation(operation: str, target: int) -> dict[str, dict[str, int]]:
    """:func:`compile_cases` of an operation's file: in bfloat16 at real sizes, in float32 at those of tests."""
    module = importlib.import_module(f"bench.kernels.test_{operation}")
    return compile_cases(operation, [*module.cases(), *module.cases(toy=True)], target)


def compile_all(operations_: list[str], processes: int) -> dict[int, dict[str, dict[str, int]]]:
    """``{target: {variant: usage}}`` for the given operations."""
    os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported, which nothing here has done yet
    jobs = [(operation, target) for operation in operations_ for target in TARGETS]
    if processes == 1:
        results = [compile_operation(*job) for job in jobs]
    else:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            results = list(pool.map(compile_operation, *zip(*jobs, strict=True)))
    table: dict[int, dict] = {target: {} for target in TARGETS}
    for (_, target), result in zip(jobs, results, strict=True):
        table[target].update(result)
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("operations", nargs="*", metavar="OP", help=f"default: all of {', '.join(operations())}")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.relative_to(ROOT)}")
    parser.add_argument("--json", type=Path, help="write what was found for all targets")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    unknown = set(arguments.operations) - set(operations())
    if unknown:
        parser.error(f"unknown operations {sorted(unknown)}")
    if arguments.write and arguments.operations:
        parser.error("--write takes the whole table, not some operations")
    if arguments.processes < 1:
        parser.error(f"--processes {arguments.processes} is not positive")
    table = compile_all(arguments.operations or operations(), arguments.processes)
    wrong = 0
    for target, variants in table.items():
        for name, usage in variants.items():
            found = faults(usage, target)
            wrong += len(found)
            numbers = f"{usage['registers']:4} registers {usage['shared']:7} B shared"
            print(f"sm_{target} {name:60} {numbers}  {', '.join(found).upper()}".rstrip())
    if arguments.json:
        arguments.json.write_text(json.dumps(table))
    if arguments.write:
        import triton

        document = {"triton": triton.__version__, "target": TABLE_TARGET, "variants": table[TABLE_TARGET]}
        document |= {"sources": sources(), "targets": {target: largest(table[target]) for target in TARGETS}}
        TABLE.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
