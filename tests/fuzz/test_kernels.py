"""Generations through the Triton kernels beside torch: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from bench.common.testing import brisk_interpreter
from tests.fuzz.cases import LOOPS, Case, assert_outcomes, cases, ended, models
from tests.support.combinations import engine_with

pytest.importorskip("triton")

HEAD_DIMS = (16, 32)  # the attention kernel takes no smaller ones
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("loop", ["tight", "fixed", "replay"])
def test_kernels_are_torch(fuzz, loop):
    """Forward sequences in one launch (fixed, replay) and alone (tight)."""
    shapes = models(head_dims=HEAD_DIMS)

    def check(case: Case) -> None:
        wanted = case.run(case.model.engine(), trace=True)
        engine = engine_with(case.model.engine("triton", DEVICE), loop if loop == "tight" else LOOPS[loop]())
        with brisk_interpreter(overflow_checks=False):
            found = case.run(engine, trace=True)
        assert_outcomes(found, wanted)

    fuzz(check, ended(cases(rows=2, longest=6, made=shapes)), examples=2, share=0.01)
