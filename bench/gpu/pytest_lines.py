"""A plugin for pytest: a line of a run's record for each test as soon as it has ended, and none of them twice.

``pytest -p bench.gpu.pytest_lines``. A benchmark's line has its measurements.
"""

from __future__ import annotations

import os
import time

import pytest

from .parts import SPARE, here
from .record import DEADLINE, RECORD, STEP, ended, tail

OUTCOMES = {"passed": "ok", "failed": "failed", "skipped": "skipped"}
MEASURED, NO_TIME = "measured", "no time is left"


def _active() -> bool:
    return RECORD in os.environ


def _writes() -> bool:
    """Return True if active, except in pytest-xdist's workers."""
    return _active() and "PYTEST_XDIST_WORKER" not in os.environ


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that this run's record has already."""
    if not _active():
        return
    over = ended(here().lines(os.environ[STEP]))
    left = [item for item in items if item.nodeid not in over]
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in over])
    items[:] = left


def pytest_runtest_setup(item: pytest.Item) -> None:
    if _active() and time.time() > float(os.environ[DEADLINE]) - SPARE:
        pytest.skip(NO_TIME)


def pytest_runtest_logstart(nodeid: str) -> None:
    if _writes():
        here().write(os.environ[STEP], "begun", nodeid)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """Pass a benchmark's findings from the process that ran it to the one that writes lines."""
    report = (yield).get_result()
    benchmark = getattr(item, "funcargs", {}).get("benchmark")
    if report.when == "call" and getattr(benchmark, "extra_info", None):
        report.user_properties.append((MEASURED, dict(benchmark.extra_info)))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if not _writes() or not (report.when == "call" or report.when == "setup" and report.outcome != "passed"):
        return
    status, values = OUTCOMES[report.outcome], {"part_seconds": round(report.duration, 2)}
    values |= dict(report.user_properties).get(MEASURED, {})
    if report.failed:
        values["error"] = tail(str(report.longrepr))
    elif report.skipped:
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
        status, values["reason"] = "late" if NO_TIME in str(reason) else status, str(reason)[:200]
    here().write(os.environ[STEP], status, report.nodeid, worker=getattr(report, "worker_id", None), **values)
