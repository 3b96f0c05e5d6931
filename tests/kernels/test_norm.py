"""RMSNorm kernels against their torch twin."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.common.testing import Guards, assert_within_budget
from sfs_triton.kernels.norm import NormConfig, norm_config, rms_norm
from sfs_triton.ops.torch import norm as twin

EPS = 1e-5


def random(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize(("n_rows", "n_columns"), [(0, 8), (1, 1), (3, 17), (5, 256), (2, 4096), (1, 5000)])
def test_equals_its_twin(guards, dtype, n_rows, n_columns, residual):
    x = guards.copy(random(n_rows, n_columns, dtype=dtype, device="cpu") * 3)
    weight = guards.copy(random(n_columns, dtype=dtype, device="cpu", seed=1))
    plus = guards.copy(random(n_rows, n_columns, dtype=dtype, device="cpu", seed=2)) if residual else None
    base = None if plus is None else plus.clone()
    out = guards.empty(n_rows, n_columns, dtype=dtype)
    same = twin.rms_norm(x, weight, EPS, residual=None if base is None else base.clone())
    wide = x if base is None else x + base
    truth = twin.rms_norm(wide.double(), weight.double(), EPS)
    assert rms_norm(x, weight, EPS, residual=plus, out=out) is out
    assert_within_budget(out, truth, same)
    if residual:
        assert torch.equal(plus, wide)


def test_leading_dimensions_and_row_strides_are_free(device):
    x = random(2, 3, 40, dtype=torch.float32, device=device)[..., :24]
    weight = torch.ones(24, device=device)
    torch.testing.assert_close(rms_norm(x, weight, EPS), twin.rms_norm(x, weight, EPS))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_values_stay_in_their_row(device, bad):
    x = random(3, 20, dtype=torch.float32, device=device)
    x[1, 7] = bad
    out = rms_norm(x, torch.ones(20, device=device), EPS)
    assert out[1].isnan().any() and out[[0, 2]].isfinite().all()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 700), st.sampled_from([1, 2, 8]), st.sampled_from([1, 4]))
def test_any_shape_and_config(n_rows, n_columns, rows_a_program, num_warps):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    guards = Guards(device)
    x = guards.copy(random(n_rows, n_columns, dtype=torch.float32, device="cpu", seed=n_columns))
    weight = guards.copy(torch.ones(n_columns))
    config = NormConfig(rows_a_program, norm_config(1, n_columns, 132).BLOCK_N * 2, num_warps)
    out = rms_norm(x, weight, EPS, out=guards.empty(n_rows, n_columns), config=config)
    torch.testing.assert_close(out, twin.rms_norm(x, weight, EPS))
    guards.check()


def test_refuses_what_it_cannot_take(device):
    x, weight = torch.ones(2, 8, device=device), torch.ones(8, device=device)
    for message, call in {
        "weight has shape": lambda: rms_norm(x, weight[:4], EPS),
        "x has dtype float64": lambda: rms_norm(x.double(), weight, EPS),
        "x has strides": lambda: rms_norm(torch.ones(8, 8, device=device).T, weight, EPS),
        "x has 0 columns": lambda: rms_norm(x[:, :0], weight, EPS),
        "residual has shape": lambda: rms_norm(x, weight, EPS, residual=weight),
        "out has dtype float16": lambda: rms_norm(x, weight, EPS, out=x.half()),
        "weight is on device 'meta'": lambda: rms_norm(x, weight.to("meta"), EPS),
        "x is a list": lambda: rms_norm([1.0], weight, EPS),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
