"""The oracle equals what the reference implementations were recorded to do."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sfs_triton
from sfs_triton.reference import ReferenceRun, Step, decode, look
from sfs_triton.reference.slowfast import choose, passes
from sfs_triton.samplers import Sampler, SlowFast

GOLDEN = Path(__file__).parent / "golden"
PER_SETTING = 2
MARGIN = 1e-5  # what another order of summation may change (README of the recorded cases)


def _conformance():
    spec = importlib.util.spec_from_file_location("conformance", Path(__file__).parent / "conformance.py")
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["conformance"] = module
    spec.loader.exec_module(module)
    return module


conformance = _conformance()


@cache
def engine(name: str) -> sfs_triton.Engine:
    return sfs_triton.load(GOLDEN / "models" / name, device="cpu", dtype="float32")


def shifted_logits(name: str, ids: list[int]) -> torch.Tensor:
    """Logits about each position: for models that predict the next one, row ``i - 1``, and row 0 twice."""
    logits = engine(name).model.logits(torch.tensor([ids]))[0]
    return torch.cat([logits[:1], logits[:-1]]) if engine(name).spec.shifted else logits


def run_reference(name: str, canvas: list[int], start: int, sampler: Sampler, **more) -> ReferenceRun:
    spec = engine(name).spec
    given = [i for i, token in enumerate(canvas) if token != spec.mask_id]

    def logits_fn(ids: list[int]) -> torch.Tensor:
        logits = shifted_logits(name, ids)
        if not sampler.cfg_scale:
            return logits
        blank = [spec.mask_id if i in given else token for i, token in enumerate(ids)]  # LLaDA 9
        return logits + sampler.cfg_scale * (logits - shifted_logits(name, blank))

    return decode(logits_fn, canvas, start, sampler, spec.mask_id, spec.eos_id, **more)


def recorded(family: str) -> list:
    """A few stable single rows of every setting of every model."""
    cases, seen = [], Counter()
    for path in sorted((GOLDEN / "cases").glob(f"*.{family}.jsonl")):
        model = path.name.split(".")[0]
        for case in map(json.loads, path.read_text().splitlines()):
            key = (model, json.dumps(case["settings"], sort_keys=True))
            cached = case["settings"].get("cache", "none") != "none"
            near_tie = min((case.get("margin") or {"none": 1.0}).values()) < MARGIN
            if "error" in case or cached or near_tie or not case["stable"] or len(case["prompt"]) > 1:
                continue
            seen[key] += 1
            if seen[key] <= PER_SETTING:
                cases.append(pytest.param(model, case, id=case["id"]))
    return cases


def same_step(mine: Step, wanted: list, dream: bool) -> bool:
    entry = list(mine)
    if mine.phase == "F" and dream:
        entry[9] = True  # Dream's recordings call every fast step determined
    spread, other = entry.pop(8), wanted[8]
    close = spread == other or None not in (spread, other) and abs(spread - other) <= 1e-5 * max(1.0, other)
    return close and entry == wanted[:8] + wanted[9:]


@pytest.mark.parametrize(("model", "case"), recorded("slowfast") + recorded("vanilla") + recorded("fastdllm"))
def test_equals_the_recordings(model: str, case: dict):
    setup = conformance.METHODS[case["method"]](case["settings"])
    prompt = case["prompt"][0]
    canvas = prompt + [engine(model).spec.mask_id] * setup.gen_length
    run = run_reference(
        model, canvas, len(prompt), setup.sampler, **({} if isinstance(setup.sampler, SlowFast) else {})
    )
    assert run.tokens == case["out"][0]
    assert run.nfe == case["nfe"]
    if "trace" in case:
        dream = engine(model).spec.shifted
        for mine, wanted in zip(run.trace, case["trace"], strict=True):
            assert same_step(mine, wanted, dream), f"{mine} is not {wanted}"
