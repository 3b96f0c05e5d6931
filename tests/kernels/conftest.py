"""Kernel tests run on a GPU where there is one, else in Triton's interpreter (where bfloat16 is wrong)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.common.testing import Guards, brisk_interpreter, guarded_loads


def mark_gpu_tests(items: list[pytest.Item], cuda: bool) -> None:
    """Mark every test of a kernel as one for a GPU where there is one, whatever its dtype."""
    for item in items:
        if cuda and {"device", "guards"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.gpu)


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    mark_gpu_tests([item for item in items if here in item.path.parents], torch.cuda.is_available())


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
