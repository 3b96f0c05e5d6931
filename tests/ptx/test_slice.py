"""A slice of ``make test-ptx``: every kernel is executed as PTX, and planted faults are found."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version

import pytest

from tests.support.paths import ROOT

pytest.importorskip("triton")
from tests.ptx.library import compiler, library  # noqa: E402

KERNELS = ROOT / "kernels" / "triton"


# older ones leave out the fence between copies by cp.async and products by wgmma, which the execution reports
OLD = tuple(map(int, version("triton").split(".")[:2])) < (3, 9)


@pytest.mark.skipif(OLD, reason="what triton before 3.9 compiles lacks fences")
@pytest.mark.skipif(compiler() is None, reason="the executor of PTX needs g++")
def test_every_kernel_executes(tmp_path):
    library()  # compiled here, not within the time limit
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "tests.ptx.plugin", "-q", "-n", "0", "-p", "no:cacheprovider"),
            *("--ptx", "90", "--ptx-slice", "--ptx-schedules", "1", "--ptx-records", str(tmp_path)),
            *("-k", "not two_million and not test_long"),  # two thirds of the time
            *("tests/kernels", "tests/ptx/test_planted.py", "--ignore=tests/kernels/test_launch.py"),
        ],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST")},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    sources = "\n".join(path.read_text() for path in KERNELS.glob("*.py"))
    kernels = set(re.findall(r"^def (_\w+_kernel)\(", sources, re.MULTILINE))
    (record,) = tmp_path.glob("*.json")
    assert not kernels - set(json.loads(record.read_text())["kernels"]), "no case of the slice launches these"
