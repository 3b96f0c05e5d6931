"""Generations by the Triton kernels compared with torch: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from bench.common.testing import brisk_interpreter
from tests.fuzz.cases import EXECUTIONS, Case, assert_outcomes, cases, ended, models
from tests.support.combinations import engine_with

pytest.importorskip("triton")

HEAD_DIMS = (16, 32)  # the attention kernel takes no smaller ones
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("execution", ["exact", "padded", "graphs"])
def test_kernels_equal_torch(fuzz, execution):
    """Forward sequences in one launch (padded, graphs) and by length (exact)."""
    shapes = models(head_dims=HEAD_DIMS)

    def check(case: Case) -> None:
        wanted = case.run(case.model.engine(), trace=True)
        engine = engine_with(case.model.engine("triton", DEVICE), EXECUTIONS[execution]())
        with brisk_interpreter(overflow_checks=False):
            found = case.run(engine, trace=True)
        assert_outcomes(found, wanted)

    fuzz(check, ended(cases(most=2, longest=6, made=shapes)), examples=1, share=0.01)
