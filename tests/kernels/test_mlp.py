"""The gated activation against its torch twin."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.common.testing import Guards, assert_within_budget
from sfs_triton.kernels.mlp import SiluMulConfig, silu_mul, silu_mul_config
from sfs_triton.ops.torch import mlp as twin


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(4).to(dtype)


@pytest.mark.parametrize(("n_rows", "n_columns"), [(0, 8), (1, 1), (3, 17), (5, 256), (2, 12288), (1, 18944)])
def test_equals_its_twin(guards, dtype, n_rows, n_columns):
    gate_up = guards.copy(random(n_rows, 2 * n_columns, dtype=dtype))
    before = gate_up.clone()
    out = guards.empty(n_rows, n_columns, dtype=dtype)
    assert silu_mul(gate_up, out=out) is out
    assert_within_budget(out, twin.silu_mul(gate_up.double()), twin.silu_mul(gate_up))
    assert torch.equal(gate_up, before)


def test_leading_dimensions_and_row_strides_are_free(device):
    gate_up = random(2, 3, 40).to(device)[..., :24]
    torch.testing.assert_close(silu_mul(gate_up), twin.silu_mul(gate_up))


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # the interpreter computes with numpy
def test_extreme_gates_and_bad_values_stay_at_their_column(device):
    gate = torch.tensor([-math.inf, -1e30, -200.0, -0.0, 200.0, math.inf, math.nan, 1.0, 1.0], device=device)
    up = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, math.nan, -math.inf], device=device)
    out = silu_mul(torch.cat([gate, up])[None])[0]
    assert out.isnan().tolist() == [True, False, False, False, False, False, True, True, False]
    assert out[[1, 2, 3, 4, 5, 8]].tolist() == [0.0, 0.0, 0.0, 200.0, math.inf, -math.inf]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 700), st.sampled_from([1, 2, 8, 16]), st.sampled_from([16, 128, 1024]))
def test_any_shape_and_tile(n_rows, n_columns, rows_a_program, block):
    guards = Guards("cuda" if torch.cuda.is_available() else "cpu")
    gate_up = guards.copy(random(n_rows, 2 * n_columns, seed=n_columns))
    out = silu_mul(gate_up, out=guards.empty(n_rows, n_columns), config=SiluMulConfig(rows_a_program, block, 1))
    torch.testing.assert_close(out, twin.silu_mul(gate_up))
    guards.check()


@pytest.mark.parametrize(("n_rows", "n_columns"), [(1, 1), (7, 96), (130, 256), (3, 1500), (2, 70000)])
@pytest.mark.parametrize("n_multiprocessors", [1, 132])
def test_configurations(guards, n_rows, n_columns, n_multiprocessors):
    """Those of a GPU and of the interpreter, on either."""
    gate_up = guards.copy(random(n_rows, 2 * n_columns))
    config = silu_mul_config(n_rows, n_columns, n_multiprocessors)
    out = silu_mul(gate_up, out=guards.empty(n_rows, n_columns), config=config)
    torch.testing.assert_close(out, twin.silu_mul(gate_up))


def test_config_gives_every_thread_eight_values():
    for n_rows in (1, 128, 2124):
        for n_columns in (12288, 14336, 18944):
            assert silu_mul_config(n_rows, n_columns, 132) == SiluMulConfig(1, 1024, num_warps=4)
    assert silu_mul_config(2124, 256, 132) == SiluMulConfig(8, 256, num_warps=8)
    assert silu_mul_config(2, 256, 132) == SiluMulConfig(2, 256, num_warps=2)
    assert silu_mul_config(1, 1, 132) == SiluMulConfig(1, 1, num_warps=1)
    assert silu_mul_config(130, 96, 1) == SiluMulConfig(256, 128, num_warps=8)
    assert silu_mul_config(2, 12288, 1) == SiluMulConfig(2, 16384, num_warps=8)


def test_refuses_what_it_cannot_take(device):
    gate_up = torch.ones(2, 8, device=device)
    for message, call in {
        "gate_up has 7 columns": lambda: silu_mul(gate_up[:, :7]),
        "gate_up has 0 columns": lambda: silu_mul(gate_up[:, :0]),
        "gate_up has dtype float64": lambda: silu_mul(gate_up.double()),
        "gate_up has strides": lambda: silu_mul(torch.ones(8, 8, device=device).T),
        "gate_up is on device 'meta'": lambda: silu_mul(gate_up.to("meta")),
        "gate_up is a list": lambda: silu_mul([1.0]),
        "out has shape": lambda: silu_mul(gate_up, out=gate_up),
        "out has dtype float16": lambda: silu_mul(gate_up, out=gate_up[:, :4].half()),
        "out has strides": lambda: silu_mul(gate_up, out=torch.ones(2, 8, device=device)[:, :4]),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
