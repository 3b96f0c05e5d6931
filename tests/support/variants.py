"""Compile representative kernel variants ahead of time: ``python tests/support/variants.py OP... --json PATH``.

In a process of its own: that of the tests runs kernels in the interpreter. ``python -m bench.kernels.resources``
compiles all variants.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from bench.kernels.case import Case
from bench.kernels.resources import TABLE, TABLE_TARGET, TARGETS, compile_cases, operations
from sfs_triton.kernels.launch import recording

SHARED_MEMORY = ("attention", "linear", "lm_head")  # tiles as large as the chip holds, which GPUs differ in


def values_of(case: Case) -> set[tuple]:
    """Return each constexpr value, type of tensor and launch option of the kernels that a case launches."""
    found, arguments = set(), case.build(torch.device("meta"))
    with recording() as launches:
        case.kernel(**arguments)
    for launch in launches:
        varying = {parameter.name for parameter in launch.kernel.params if not parameter.is_constexpr}
        for name, value in launch.arguments.items():
            if isinstance(value, torch.Tensor):
                value = str(value.dtype)
            elif name in varying and value is not None:
                continue
            found.add((launch.kernel.__name__, name, value))
    return found


def representatives(cases: list[Case]) -> list[Case]:
    """Return as few cases as hold every value that occurs in ``cases``."""
    values = [values_of(case) for case in cases]
    missing, chosen = set().union(*values), []
    while missing:
        best = max(range(len(cases)), key=lambda index: len(values[index] & missing))
        missing -= values[best]
        chosen.append(cases[best])
    return chosen


def largest(operation: str, cases: list[Case]) -> list[Case]:
    """Return the cases whose variants use the most shared memory, and the most registers, according to the table."""
    table = json.loads(TABLE.read_text())["variants"]
    rows = {name.split(".")[2]: row for name, row in table.items() if name.startswith(f"{operation}.")}
    rows = {case.name: rows[case.name] for case in cases if case.name in rows}
    names = {max(rows, key=lambda name: rows[name][use]) for use in ("shared", "registers")}
    return [case for case in cases if case.name in names]


def sample(operation: str) -> Iterator[tuple[int, list[Case]]]:
    """Yield targets with cases: representatives for one target, the largest for others.

    What depends on the size of shared memory is compiled for every target, the rest for two.
    """
    module = importlib.import_module(f"bench.kernels.test_{operation}")
    cases = [*module.cases(), *module.cases(toy=True)]
    yield TABLE_TARGET, representatives(cases)
    others = [target for target in TARGETS if target != TABLE_TARGET]
    for target in others if operation in SHARED_MEMORY else [others[operations().index(operation) % len(others)]]:
        yield target, largest(operation, [case for case in cases if case.min_capability <= target])


if __name__ == "__main__":
    *chosen, _, path = sys.argv[1:]
    found: dict[int, dict] = {target: {} for target in TARGETS}
    for operation in chosen:
        for target, cases in sample(operation):
            found[target] |= compile_cases(operation, cases, target)
    Path(path).write_text(json.dumps(found))
