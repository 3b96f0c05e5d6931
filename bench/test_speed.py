"""The eager torch path beside straightforward PyTorch: ``pytest bench/test_speed.py``.

Each pair decodes the same prompts to the same tokens in the same number of steps; the two sides alternate. On the
embedded model the median of the paired ratios of tokens per second must not fall below 1. On the tiny golden models,
whose forwards take a millisecond or two, it is only recorded: there it is mostly the cost of a step in Python.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import pytest
import torch

import sfs_triton
from bench.baselines import BASELINES, PlainModel
from bench.quality.work import read_work

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"
GEN_LENGTH, ROUNDS, FEW = 128, 7, 3  # fewer on the embedded model, whose forwards are longer and vary less
SAMPLERS = {
    "vanilla": ("vanilla", sfs_triton.FixedSteps()),
    "semi-autoregressive": ("vanilla", sfs_triton.FixedSteps(block_length=32)),
    "threshold": ("fast-dllm", sfs_triton.Threshold(block_length=32)),
    "slowfast-paper": ("slowfast", sfs_triton.SlowFast()),
}


@pytest.fixture(scope="module", params=["embedded", "llada-mha", "llada-gqa", "dream-gqa", "dream-r7"])
def subject(request):
    """A model's name, an engine on it, its plain twin, and two prompts."""
    torch.set_num_threads(1)
    name = request.param
    engine = sfs_triton.load(name if name == "embedded" else GOLDEN / "models" / name, "cpu", "float32")
    if name == "embedded":
        prompts = [q.prompt for q in read_work(engine, "records", limit=2, seed=0, gen_length=GEN_LENGTH).questions]
    else:
        lines = (GOLDEN / "cases" / f"{name}.slowfast.jsonl").read_text().splitlines()[:2]
        prompts = [json.loads(line)["prompt"][0] for line in lines]
    return name, engine, PlainModel(engine.model), prompts


@pytest.mark.parametrize("name", SAMPLERS)
def test_eager_is_no_slower_than_plain_torch(benchmark, subject, name):
    model, engine, plain, prompts = subject
    baseline, sampler = SAMPLERS[name]

    def ours():
        return [engine.generate(p, gen_length=GEN_LENGTH, sampler=sampler) for p in prompts]

    def theirs():
        return [BASELINES[baseline].decode(plain, p, GEN_LENGTH, sampler) for p in prompts]

    for mine, other in zip(ours(), theirs(), strict=True):
        assert (mine.response, mine.nfe) == (other.response, other.nfe)
    ratios = []
    for _ in range(FEW if model == "embedded" else ROUNDS):
        marks = [time.perf_counter()]
        for side in (ours, theirs):
            side()
            marks.append(time.perf_counter())
        ratios.append((marks[2] - marks[1]) / (marks[1] - marks[0]))
    benchmark.extra_info["speed_over_plain"] = statistics.median(ratios)
    benchmark.pedantic(ours, rounds=3)
    assert model != "embedded" or statistics.median(ratios) >= 1.0
