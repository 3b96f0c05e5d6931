"""A pytest plug-in: launches of Triton kernels are compiled for a GPU and executed as PTX (``-p tests.ptx.plugin``).

A test in which the execution finds something fails. Tests in bfloat16, which Triton's interpreter gets wrong, run too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from .library import compiler, folder

# Before triton is imported: its own functions are compiled or interpreted from then on. What it caches lacks cubins.
os.environ.pop("TRITON_INTERPRET", None)
os.environ["TRITON_CACHE_DIR"] = str(folder() / "triton")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import CUDABackend  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402

from .machine import Machine  # noqa: E402
from .memory import watched_empty  # noqa: E402
from .record import Record  # noqa: E402

ENOUGH = 12  # launches of a kernel in the slice, which takes its time to compile
MULTIPROCESSORS = 6  # that launchers see: few, so that programs share work and meet at counters


class Driver:
    """Stands in for Triton's driver of a GPU: says what to compile for."""

    def __init__(self, capability: int):
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ptx")
    group.addoption("--ptx", type=int, default=80, choices=(80, 89, 90), help="compute capability to compile for")
    group.addoption("--ptx-schedules", type=int, default=2, help="adversarial schedules of every launch")
    group.addoption("--ptx-slice", action="store_true", help="of every test one case that launches something")
    group.addoption("--ptx-records", type=Path, help="folder for a JSON file of counts and errors")


def pytest_configure(config: pytest.Config) -> None:
    if compiler() is None:
        raise pytest.UsageError("the executor of PTX needs g++")
    config.pluginmanager.register(Execution(config), "ptx-execution")


class Execution:
    """Launches of one session, each executed."""

    def __init__(self, config: pytest.Config):
        self.config, self.capability = config, config.getoption("--ptx")
        self.machine = Machine(config.getoption("--ptx-schedules"))
        self._record = Record()
        self._functions: set[object] = set()  # tests of which a case was executed
        triton.knobs.runtime.interpret = False
        CUDABackend.make_cubin = lambda *_: b""  # a quarter of the time to compile
        driver.set_active(Driver(self.capability))
        self._replace_launches()
        self._record.measure_errors()

    def _replace_launches(self) -> None:
        """Before any module imports them by name."""
        from sfs_triton.kernels import launch as module

        real = module.launch

        def launch(kernel, grid, **arguments) -> None:
            if module.is_recording():
                return real(kernel, grid, **arguments)
            if arguments.get("NATIVE_FP8") and self.capability < 89:
                pytest.skip(f"sm_{self.capability} does not convert float8")
            if self.config.getoption("--ptx-slice") and self._record.kernels[kernel.__name__] >= ENOUGH:
                pytest.skip("its kernel was executed in other cases")
            self._record.add_launch(kernel.__name__, arguments)
            self.machine.launch(kernel, grid, {**arguments, "enable_fp_fusion": True})

        module.launch = launch
        module.multiprocessors = lambda device: 132 if device.type == "meta" else MULTIPROCESSORS

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        return True if collection_path.name == "test_aot.py" else None  # only compiles

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            if torch.bfloat16 in getattr(getattr(item, "callspec", None), "params", {}).values():
                item.own_markers = [mark for mark in item.own_markers if mark.name != "skip"]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if not self.config.getoption("--ptx-slice"):
            return
        if item.function in self._functions:
            pytest.skip("another case was executed")
        if hasattr(item.function, "hypothesis"):
            pytest.skip("many cases")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        self.machine.findings.clear()
        self.machine.launches = 0  # a test's schedules do not depend on the tests before it
        try:
            with nullcontext() if item.get_closest_marker("whole_generation") else watched_empty():
                return (yield)
        finally:
            if self._record.end_case(item.path.stem.removeprefix("test_")):
                self._functions.add(item.function)
            if self.machine.findings:
                pytest.fail("\n".join(map(str, self.machine.findings)), pytrace=False)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._record.failed.append(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        folder = self.config.getoption("--ptx-records")
        if folder is None:
            return
        known = {"sm": self.capability, "schedules": self.machine.n_schedules, "variants": len(self.machine.kernels)}
        found = self._record.to_dict()
        path = folder / f"{found['date']}-ptx-sm{self.capability}.json"
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known | found, indent=1) + "\n")
