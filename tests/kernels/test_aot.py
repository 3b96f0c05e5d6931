"""Kernel variants are compiled for every kind of GPU, in a process without the interpreter.

``make test`` compiles representative variants, ``make test-slow`` every one that ships.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from filelock import FileLock  # noqa: E402

from bench.kernels.resources import (  # noqa: E402
    SHARED_LIMIT,
    TABLE,
    TABLE_TARGET,
    TARGETS,
    differences,
    faults,
    operations,
    sources,
)
from tests.support.paths import ROOT  # noqa: E402
from tests.support.variants import SHARED_MEMORY  # noqa: E402

KERNELS = ROOT / "kernels" / "triton"


def _run(*command: str | Path) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )


Usage = dict[int, dict[str, dict[str, int]]]  # by target and variant


def _compile_once(tmp_path_factory, operation: str, name: str, *command: str | Path) -> Usage:
    """Compile by ``command``, half of all operations in each of two processes, and for all workers."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # that of this run, which holds a folder for each worker
    half = next(half for half in (operations()[::2], operations()[1::2]) if operation in half)
    path = folder / f"{name}-{half[0]}.json"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            done = _run(*command, *half, "--json", path)
            assert path.exists(), done.stderr[-3000:]
    return {
        int(target): {name: usage for name, usage in variants.items() if name.startswith(f"{operation}.")}
        for target, variants in json.loads(path.read_text()).items()
    }


@pytest.fixture(scope="session")
def representatives(tmp_path_factory):
    """``representatives(operation)``: what some variants use (``tests/support/variants.py`` says which)."""
    script = ROOT / "tests" / "support" / "variants.py"
    return lambda operation: _compile_once(tmp_path_factory, operation, "some", script)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """``compiled(operation)``: what all variants use."""
    command = ("-m", "bench.kernels.resources", "--processes", "1")
    return lambda operation: _compile_once(tmp_path_factory, operation, "all", *command)


@pytest.fixture(scope="session")
def table() -> dict:
    return json.loads(TABLE.read_text())


def _check_faults(found: Usage) -> None:
    wrong = [
        f"sm_{target} {name} {fault}"
        for target, variants in found.items()
        for name, usage in variants.items()
        for fault in faults(usage, target)
    ]
    assert not wrong, "\n".join(wrong)


def _rows(table: dict, operation: str) -> dict[str, dict[str, int]]:
    installed = importlib.metadata.version("triton")
    if installed != table["triton"]:
        pytest.skip(f"kernels/resources.json is of triton {table['triton']}, installed is {installed}")
    return {name: usage for name, usage in table["variants"].items() if name.startswith(f"{operation}.")}


@pytest.mark.parametrize("operation", operations())
def test_representative_variants_fit_their_gpu(representatives, operation):
    found = representatives(operation)
    compiled_for = [target for target in TARGETS if found[target]]
    assert TABLE_TARGET in compiled_for and len(compiled_for) == (len(TARGETS) if operation in SHARED_MEMORY else 2)
    _check_faults(found)


@pytest.mark.parametrize("operation", operations())
def test_representative_variants_are_in_the_table(representatives, table, operation):
    """Their names may differ: a variant has the name of the first case that launches it."""
    known = [(name.split(".")[1], usage) for name, usage in _rows(table, operation).items()]
    for name, usage in representatives(operation)[TABLE_TARGET].items():
        assert (name.split(".")[1], usage) in known, f"{name} is now {usage}: run `make resources`"


def test_table_is_of_these_sources(table):
    """Compiling all variants takes minutes, which ``make test-slow`` has."""
    assert table["sources"] == sources(), "kernels or cases changed after kernels/resources.json: run `make resources`"


@pytest.mark.slow
@pytest.mark.parametrize("operation", operations())
def test_every_variant_fits_its_gpu(compiled, operation):
    found = compiled(operation)
    assert sorted(found) == list(TARGETS) and found[TABLE_TARGET]
    _check_faults(found)


@pytest.mark.slow
@pytest.mark.parametrize("operation", operations())
def test_table_is_up_to_date(compiled, table, operation):
    stale = differences(_rows(table, operation), compiled(operation)[TABLE_TARGET])
    assert not stale, "\n".join(["kernels/resources.json is out of date, run `make resources`:", *stale])


def test_table_and_kernels_are_of_one_mind(table):
    """Every kernel there is was compiled by some case, and the table holds no kernel that is gone."""
    sources = "\n".join(path.read_text() for path in KERNELS.glob("*.py"))
    kernels = set(re.findall(r"^def _(\w+)_kernel\(", sources, re.MULTILINE))
    assert {name.split(".")[1] for name in table["variants"]} == kernels
    assert {name.split(".")[0] for name in table["variants"]} == set(operations())


def test_a_spill_is_found():
    done = _run(ROOT / "tests" / "support" / "spilling.py", *map(str, TARGETS))
    assert done.returncode == 0, done.stderr[-3000:]
    for target, found in json.loads(done.stdout).items():
        spills, fits = (found[f"spilling.scale.{case}"] for case in ("spills", "fits"))
        assert spills["stack"] > 0 and faults(spills, int(target))
        assert fits["stack"] == 0 and not faults(fits, int(target))


USAGE = {"registers": 40, "stack": 0, "shared": 1024, "tensor_memory": 0, "num_warps": 4}


def test_faults():
    assert faults(USAGE, 80) == []
    assert faults(USAGE | {"stack": 16}, 80) == ["spills: 16 B of stack"]
    large = USAGE | {"shared": 200 * 1024}
    assert faults(large, 90) == [] and "204800 B of shared memory, there are 166912" in faults(large, 80)[0]
    assert faults(USAGE | {"shared": SHARED_LIMIT[90] + 1}, 90) and not faults(USAGE | {"shared": SHARED_LIMIT[90]}, 90)
    assert faults(USAGE | {"tensor_memory": 1024}, 100)


def test_a_stale_table_is_found():
    table = {"norm.a": USAGE, "norm.gone": USAGE}
    assert differences(table, dict(table)) == []
    assert differences(table, {"norm.a": USAGE | {"registers": 41}, "norm.new": USAGE}) == [
        "norm.new is not in the table",
        "norm.gone is in the table and nowhere else",
        "norm.a: registers 40 is now 41",
    ]


def test_command_refuses():
    for arguments, message in {
        ("nothing",): "unknown operations ['nothing']",
        ("norm", "--write"): "--write takes the whole table",
        ("--processes", "0"): "--processes 0",
    }.items():
        done = _run("-m", "bench.kernels.resources", *arguments)
        assert done.returncode == 2 and message in done.stderr
