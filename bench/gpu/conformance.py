"""Run recorded cases through the kernels on the GPU: as many as time allows, spread over every file.

``tests/conformance.py`` defines a pass, and runs all of its cases in one go.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from collections import Counter
from types import ModuleType
from typing import Any

import torch

import sfs_triton
from bench import ROOT
from bench.common.testing import brisk_interpreter

from . import parts

GOLDEN = ROOT / "tests" / "golden"
STRIDE = 60  # part number i has cases i, i + 60, ... of every file
TOY_STRIDE = 2000


def load_checker() -> ModuleType:
    """``tests/conformance.py``, which is no package's."""
    spec = importlib.util.spec_from_file_location("sfs_conformance", ROOT / "tests" / "conformance.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look
    spec.loader.exec_module(module)
    return module


class Suite:
    """Cases by part, and the models they need."""

    def __init__(self, backend: str, toy: bool):
        self.backend, self.stride, self.checker = backend, TOY_STRIDE if toy else STRIDE, load_checker()

    @functools.cached_property
    def engines(self) -> dict[str, sfs_triton.Engine]:
        folders = sorted((GOLDEN / "models").iterdir())
        return {folder.name: sfs_triton.load(folder, parts.device(), "float32", self.backend) for folder in folders}

    def logits(self) -> dict[str, Any]:
        found = [
            wrong
            for path in sorted((GOLDEN / "logits").glob("*.safetensors"))
            for wrong in self.checker.check_logits(self.engines[path.stem], path)
        ]
        return _verdict(Counter(passed=found.count(None)), [wrong for wrong in found if wrong])

    def cases(self, part: int) -> dict[str, Any]:
        passed, wrong = Counter(), []
        for path in sorted((GOLDEN / "cases").glob("*.jsonl")):
            engine = self.engines[path.name.split(".")[0]]
            for line in path.read_text(encoding="utf-8").splitlines()[part :: self.stride]:
                case = json.loads(line)
                told = self._check(engine, case)
                passed["passed"] += told is None
                if told:
                    wrong.append(f"{case['id']}: {told}"[:300])
        return _verdict(passed, wrong)

    def _check(self, engine: sfs_triton.Engine, case: dict) -> str | None:
        try:
            return self.checker.check(engine, case, self.checker.METHODS[case["method"]](case["settings"]))
        except sfs_triton.SfsError as error:
            refused = "error" in case and isinstance(error, sfs_triton.ArgumentError)
            return None if refused else f"{type(error).__name__}: {error}"


def _verdict(passed: Counter, wrong: list[str]) -> dict[str, Any]:
    values = {"passed": passed["passed"], "wrong": len(wrong), "first": wrong[:5]}
    if wrong:
        raise parts.Incomplete(values, AssertionError(f"{len(wrong)} are not as recorded; {wrong[0]}"))
    return values


def every_part() -> dict[str, parts.Part]:
    toy = parts.is_toy()
    suite = Suite("torch" if toy else "triton", toy)
    torch.set_num_threads(1)
    found: dict[str, parts.Part] = {"logits": suite.logits}
    for part in range(1 if toy else suite.stride):
        found[f"cases {part} of every {suite.stride}"] = functools.partial(suite.cases, part)
    return found


if __name__ == "__main__":
    with brisk_interpreter():
        sys.exit(parts.run(every_part()))
