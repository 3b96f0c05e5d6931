"""Kernel benchmarks run at real sizes on a GPU, else at toy sizes in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, so before anything imports it

from bench.kernels import harness, timing  # noqa: E402

TOY = "toy sizes on a CPU, kernels in Triton's interpreter: these times say nothing about a GPU"


@pytest.fixture(scope="session")
def stopwatch() -> timing.Stopwatch:
    return timing.Stopwatch(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def pytest_terminal_summary(terminalreporter) -> None:
    if not harness.RECORDS:
        return
    terminalreporter.section("kernels")
    if any(record["toy"] for record in harness.RECORDS):
        terminalreporter.write_line(TOY)
    for line in harness.summary(harness.RECORDS):
        terminalreporter.write_line(line)
