"""Selection of the kernels' tests on a GPU."""

from __future__ import annotations

import pytest

from tests.kernels.conftest import mark_gpu_tests


@pytest.mark.parametrize("cuda", [True, False])
def test_a_gpu_runs_the_kernels_of_every_dtype(cuda):
    marked = []

    class Item:
        def __init__(self, *fixturenames: str):
            self.fixturenames = fixturenames

        def add_marker(self, mark):
            marked.append((self.fixturenames, mark.name))

    mark_gpu_tests([Item("guards", "dtype"), Item("tmp_path"), Item("device")], cuda)
    assert marked == ([(("guards", "dtype"), "gpu"), (("device",), "gpu")] if cuda else [])
