"""Whole generations of the embedded model, every kernel executed as PTX: the tokens of plain torch."""

from __future__ import annotations

import importlib

import pytest

import sfs_triton
from sfs_triton import DualCache, Engine, FixedSteps, NoCache, RegionCache, SlowFast, Threshold
from sfs_triton.ops import dispatch

PROMPTS = [[15, 44, 79, 50], [7, 8, 9, 10, 11, 12, 13]]
COMBINATIONS = {
    "slow-fast": (SlowFast(), NoCache()),
    "slow-fast-region": (SlowFast(), RegionCache(capacity=24, refresh_every=5)),
    "slow-fast-look-ahead": (
        SlowFast(block_length=8, strict=False),
        RegionCache(capacity=12, span_cap=8, look_ahead=4),
    ),
    "threshold-dual": (Threshold(block_length=8), DualCache()),
    "noise-region": (FixedSteps(steps=8, block_length=8, temperature=0.7), RegionCache()),
}


@pytest.fixture(scope="module")
def executed() -> Engine:
    with pytest.MonkeyPatch.context() as patch:  # it asks for a GPU, or the interpreter
        patch.setattr(
            dispatch, "_module", lambda name, device: importlib.import_module(f"sfs_triton.ops.{name}_backend")
        )
        return sfs_triton.load("embedded", "cpu", "float32", backend="triton")


@pytest.mark.whole_generation
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_tokens_are_those_of_torch(executed, embedded, combination):
    sampler, cache = COMBINATIONS[combination]
    how = {"gen_length": 16, "sampler": sampler, "cache": cache, "seed": 3}
    wanted = embedded.generate(PROMPTS, **how)
    found = executed.generate(PROMPTS, **how)
    assert [list(each.tokens) for each in found] == [list(each.tokens) for each in wanted]
    assert [each.nfe for each in found] == [each.nfe for each in wanted]
