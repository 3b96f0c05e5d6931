"""Number of cases drawn, and their record.

Without anything set each property draws the same few dozen cases in every run: they are part of the test suite.

* ``FUZZ_CASES=5000`` draws so many in all, shared out among the properties, from ``FUZZ_SEED`` (default: the time).
* ``FUZZ_REPORT=path.json`` writes how many cases each property passed.
* ``FUZZ_SHRINK=0`` prints a case that fails as it was drawn, which takes less time than a small one.

A case that fails is printed; it can be pasted into ``tests/project/test_regressions.py`` as it stands.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import sfs_triton

TOTAL = int(os.environ.get("FUZZ_CASES", "0"))
SEED = int(os.environ.get("FUZZ_SEED") or time.time())
REPORT = os.environ.get("FUZZ_REPORT")
PHASES = [Phase.generate, *([Phase.shrink] if os.environ.get("FUZZ_SHRINK", "1") == "1" else [])]

_found: dict[str, dict[str, Any]] = {}  # by property, of this run
_began = time.time()

Fuzz = Callable[..., None]


@pytest.fixture
def fuzz(record_property) -> Fuzz:
    """Try a property on cases: ``fuzz(check, strategy, examples=40, share=0.2)``.

    ``examples`` are drawn in the test suite, ``share`` of ``FUZZ_CASES`` otherwise. Cases that ``check`` rejects by
    ``hypothesis.assume`` do not count.
    """

    def run(check: Callable[[Any], None], strategy: st.SearchStrategy, *, examples: int, share: float) -> None:
        passed, began = 0, time.time()

        @settings(
            max_examples=max(1, round(share * TOTAL)) if TOTAL else examples,
            deadline=None,
            database=None,
            derandomize=not TOTAL,
            phases=PHASES,
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def tried(case: Any) -> None:
            nonlocal passed
            check(case)
            passed += 1

        try:
            (seed(SEED)(tried) if TOTAL else tried)()
        finally:
            record_property("fuzz_cases", passed)
            record_property("fuzz_seconds", round(time.time() - began, 1))
        assert passed >= examples // 2, f"only {passed} cases could be checked"

    return run


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collect the tests' records from all workers."""
    recorded = dict(report.user_properties)
    if report.when == "call" and "fuzz_cases" in recorded:
        name = report.nodeid.split("::", 1)[1].removeprefix("test_")
        _found[name] = {
            "cases": recorded["fuzz_cases"],
            "seconds": recorded["fuzz_seconds"],
            "outcome": report.outcome,
        }


def pytest_sessionfinish(session: pytest.Session) -> None:
    if REPORT and _found and not hasattr(session.config, "workerinput"):
        Path(REPORT).write_text(json.dumps(_record(), indent=1) + "\n")


def _record() -> dict[str, Any]:
    return {
        "command": f"FUZZ_CASES={TOTAL} FUZZ_SEED={SEED} python -m pytest tests/fuzz",
        "date": date.today().isoformat(),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {
            "sfs_triton": sfs_triton.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "hypothesis": hypothesis.__version__,
        },
        "seconds": round(time.time() - _began, 1),
        "cases": sum(one["cases"] for one in _found.values()),
        "failed": sorted(name for name, one in _found.items() if one["outcome"] == "failed"),
        "properties": dict(sorted(_found.items())),
    }
