"""Counts of what was executed, and the largest errors that tests saw."""

from __future__ import annotations

import datetime
import time
from collections import Counter, defaultdict
from typing import Any

import numpy
import torch
import triton

from bench.common import testing
from bench.common.figures import machine

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Record:
    """Cases of one session by operation (their test file) and dtype (the narrowest that was launched with)."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self.kernels: Counter[str] = Counter()
        self._rows: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        self._started = time.time()
        self._start_case()

    def _start_case(self) -> None:
        self._launches, self._dtypes, self._error = 0, set(), 0.0

    def add_launch(self, kernel: str, arguments: dict[str, Any]) -> None:
        self.kernels[kernel] += 1
        self._launches += 1
        self._dtypes |= {value.dtype for value in arguments.values() if isinstance(value, torch.Tensor)}

    def end_case(self, operation: str) -> bool:
        """Count a case. Returns False if it launched nothing."""
        launches, error = self._launches, self._error
        if launches:
            dtype = next((str(each) for each in FLOATS if each in self._dtypes), "integers")
            row = self._rows[operation, dtype.removeprefix("torch.")]
            row["cases"] += 1
            row["launches"] += launches
            row["largest_error"] = max(row["largest_error"], error)
        self._start_case()
        return launches > 0

    def measure_errors(self) -> None:
        """Let the assertions of tests note the errors that they see. Before tests import them by name."""

        def measured(real):
            def check(actual, expected, *rest, **how):
                if isinstance(actual, torch.Tensor) and actual.is_floating_point() and actual.shape == expected.shape:
                    error = (actual.double() - expected.double()).abs()
                    error = error[error.isfinite()]
                    self._error = max(self._error, error.max().item() if error.numel() else 0.0)
                real(actual, expected, *rest, **how)

            return check

        testing.assert_within_budget = measured(testing.assert_within_budget)
        torch.testing.assert_close = measured(torch.testing.assert_close)

    def to_dict(self) -> dict[str, Any]:
        rows = [{"operation": name, "dtype": dtype, **row} for (name, dtype), row in sorted(self._rows.items())]
        return {
            "date": datetime.date.today().isoformat(),
            "machine": machine(torch.device("cpu")),
            "versions": {"triton": triton.__version__, "numpy": numpy.__version__},
            "seconds": round(time.time() - self._started, 1),
            "failed": self.failed,
            "kernels": dict(sorted(self.kernels.items())),
            "rows": rows,
        }
