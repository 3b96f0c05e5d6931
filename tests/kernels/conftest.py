"""Kernel tests run on a GPU where there is one, else in Triton's interpreter (where bfloat16 is wrong)."""

from __future__ import annotations

import pytest
import torch

from bench.common.testing import Guards, brisk_interpreter, guarded_loads


@pytest.fixture(scope="session", autouse=True)
def interpreter():
    with brisk_interpreter(), guarded_loads():
        yield


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(
    params=[torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)],
    ids=["float32", "float16", "bfloat16"],
)
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture
def guards(device) -> Guards:
    """Places for inputs and outputs between guard bands; reads and writes outside are found."""
    bands = Guards(device)
    yield bands
    bands.check()
