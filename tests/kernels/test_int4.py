"""Products with weights in 4 bits, alone and with each ending, against the matrix multiplied out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.common.testing import assert_within_budget
from sfs_triton.kernels.dequantise import dequantise
from sfs_triton.kernels.launch import recording
from sfs_triton.kernels.linear import (
    LinearConfig,
    linear,
    linear_config,
    linear_heads,
    linear_normed,
    linear_silu_mul,
)
from sfs_triton.ops.torch import linear as twin
from sfs_triton.ops.torch.int4 import pack
from sfs_triton.ops.torch.linear import Quantised
from sfs_triton.ops.torch.mlp import silu_mul
from sfs_triton.ops.torch.norm import rms_norm
from sfs_triton.ops.torch.rope_cache import rope_cache, rope_tables

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = LinearConfig(BLOCK_M=16, BLOCK_N=32, BLOCK_K=32, n_splits=1, num_stages=2, num_warps=4)
CONFIGS = {
    "own": None,
    "part of a group": SMALL,
    "split": replace(SMALL, n_splits=3),
    "wide": replace(SMALL, BLOCK_N=256),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
two_configs = pytest.mark.parametrize("config", [None, CONFIGS["split"]], ids=["own", "split"])
EPS = 1e-5


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def matrix(n_out: int, n_in: int, group: int = 32, zeros: bool = True) -> Quantised:
    """All codes and all zero points, and scales of both signs."""
    generator = torch.Generator().manual_seed(n_out + n_in)
    values = torch.randint(0, 16, (n_out, n_in), generator=generator, dtype=torch.uint8)
    scale = torch.randn(n_in // group, n_out, generator=generator) / 8 / n_in**0.5
    zero = torch.randint(0, 17, scale.shape, generator=generator, dtype=torch.uint8) if zeros else None
    return Quantised(pack(values, group).to(DEVICE), scale.to(DEVICE), None if zero is None else zero.to(DEVICE))


@pytest.mark.sampled(3)
@configs
@pytest.mark.parametrize(
    ("n_rows", "n_out", "n_in", "group", "zeros"),
    [(1, 1, 32, 32, True), (3, 17, 192, 64, False), (33, 130, 384, 128, True), (20, 70, 256, 128, False)],
)
def test_equals_its_twin(guards, dtype, n_rows, n_out, n_in, group, zeros, config):
    weight = matrix(n_out, n_in, group, zeros)
    x, residual = random(n_rows, n_in, dtype=dtype), random(n_rows, n_out, dtype=dtype, seed=2)
    codes, scale, zero = (None if t is None else guards.copy(t) for t in (weight.codes, weight.scale, weight.zero))
    out = guards.empty(n_rows, n_out, dtype=dtype)
    given = {"residual": guards.copy(residual), "out": out, "config": config}
    assert linear(guards.copy(x), codes, scale, zero, **given) is out
    truth = x.double() @ weight.values(torch.float64).T + residual.double()
    assert_within_budget(out, truth, twin.linear(x, weight.codes, weight.scale, weight.zero, residual=residual))


@pytest.mark.parametrize("block_k", [32, 128], ids=["parts of a group", "whole groups"])
def test_every_code_is_exact(dtype, block_k):
    """Each of 16 codes less each of 17 zero points, times a scale with few digits."""
    codes = torch.arange(16, dtype=torch.uint8, device=DEVICE).repeat(17, 8)
    zero = torch.arange(17, dtype=torch.uint8, device=DEVICE)[None]
    scale = torch.tensor([[-0.375] * 17], device=DEVICE)
    config = replace(SMALL, BLOCK_K=block_k)
    out = linear(torch.eye(128, device=DEVICE, dtype=dtype), pack(codes, 128), scale, zero, config=config)
    assert torch.equal(out.T.float(), (codes.float() - zero.T) * -0.375)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zero points"])
def test_a_matrix_multiplied_out(guards, dtype, group, zeros):
    """Bits are those of torch, of some rows too, whose scales have the stride of the whole."""
    whole = matrix(70, 256, group, zeros)
    for part in (whole, whole[3:61], whole[:0]):
        codes, scale, zero = (
            None if t is None else t if len(part.codes) < 70 else guards.copy(t)
            for t in (part.codes, part.scale, part.zero)
        )
        assert torch.equal(dequantise(codes, scale, zero, dtype), part.values(dtype))
    with pytest.raises(ValueError, match="dtype is torch.float64"):
        dequantise(whole.codes, whole.scale, whole.zero, torch.float64)
    with pytest.raises(ValueError, match="codes has dtype float32"):
        dequantise(whole.codes.float(), whole.scale, whole.zero, dtype)


def test_rows_of_a_matrix(guards, dtype):
    """Scales of some rows have the stride of the whole."""
    part = matrix(48, 128, 64)[16:40]
    x = random(5, 128, dtype=dtype)
    out = linear(x, part.codes, part.scale, part.zero)
    truth = x.double() @ part.values(torch.float64).T
    assert_within_budget(out, truth, twin.linear(x, part.codes, part.scale, part.zero))


@two_configs
def test_a_norm_is_finished_by_the_next_product(guards, dtype, config):
    n_rows, width, n_in, n_out = 20, 96, 64, 50
    x, residual = random(n_rows, n_in, dtype=dtype), random(n_rows, width, dtype=dtype, seed=2)
    first, second, gain = matrix(width, n_in), matrix(n_out, width), 1 + random(width, dtype=dtype, seed=4) / 4
    place = guards.copy(residual)
    middle = linear_normed(
        x, first.codes, first.scale, gain, EPS, zero=first.zero, residual=place, config=config
    )  # fmt: skip
    wide = x.double() @ first.values(torch.float64).T + residual.double()
    assert_within_budget(place, wide, x @ first.values(dtype).T + residual)
    out = linear(middle, second.codes, second.scale, second.zero, config=config)
    truth = rms_norm(place.double(), gain.double(), EPS) @ second.values(torch.float64).T
    assert_within_budget(out, truth, rms_norm(place, gain, EPS) @ second.values(dtype).T)


@two_configs
def test_gated(dtype, config):
    weight, x = matrix(2 * 135, 64), random(20, 64, dtype=dtype)
    out = linear_silu_mul(x, weight.codes, weight.scale, zero=weight.zero, config=config)
    truth = silu_mul(x.double() @ weight.values(torch.float64).T)
    assert_within_budget(out, truth, silu_mul(x @ weight.values(dtype).T))


@two_configs
def test_heads(guards, dtype, config):
    (n_heads, n_kv_heads), (batch, n, width, length, n_in) = (4, 2), (2, 7, 16, 30, 64)
    n_all = n_heads + 2 * n_kv_heads
    weight, x = matrix(n_all * width, n_in), random(batch * n, n_in, dtype=dtype)
    bias = random(n_all * width, dtype=dtype, seed=3)
    cos, sin = rope_tables(length, width, 1e4, DEVICE)
    position = torch.stack([torch.randperm(length)[:n] for _ in range(batch)]).int().to(DEVICE)
    caches = [random(batch, length, n_kv_heads, width, dtype=dtype, seed=s) for s in (7, 8)]
    mine = [guards.copy(each) for each in caches]
    heads = {"n_heads": n_heads, "n_kv_heads": n_kv_heads, "n_positions": n, "zero": weight.zero, "config": config}
    places = {"k_cache": mine[0], "v_cache": mine[1]}
    out = linear_heads(x, weight.codes, weight.scale, bias, cos, sin, position, **heads, **places)

    def one_by_one(kind: torch.dtype) -> tuple[torch.Tensor, ...]:
        whole = x.to(kind) @ weight.values(kind).T + bias.to(kind)
        q, k, v = whole.view(batch, n, n_all, width).split((n_heads, n_kv_heads, n_kv_heads), 2)
        stores = {"k_cache": caches[0].to(kind), "v_cache": caches[1].to(kind)}
        return rope_cache(q.clone(), k.clone(), v.clone(), cos, sin, position, **stores)

    got = (out.view(batch, n, n_heads, width), *mine)
    for each, truth, same in zip(got, one_by_one(torch.float64), one_by_one(dtype), strict=True):
        assert_within_budget(each, truth, same)


def test_blocks_of_k_are_in_one_group():
    for group in (32, 64, 128):
        for n_rows in (16, 128):
            for wide in (False, True):
                config = linear_config(n_rows, 4096, 4096, 132, weight_itemsize=0.5, group=group, wide=wide)
                assert group % config.BLOCK_K == 0 and config.num_stages >= 3
    x, weight = random(3, 128).to("meta"), matrix(70, 128, 64)
    with recording() as recorded:
        linear(x, weight.codes.to("meta"), weight.scale.to("meta"))
    found = recorded[0].arguments
    assert (found["FORMAT"], found["GROUP"], found["HAS_ZERO"]) == ("int4", 64, False)


def test_refuses_what_it_cannot_take():
    x, weight = random(4, 128), matrix(8, 128, 64)
    codes, scale, zero = weight.codes, weight.scale, weight.zero
    for message, call in {
        "weight has shape": lambda: linear(x[:, :64].contiguous(), codes, scale),
        "scale is a NoneType": lambda: linear(x, codes),
        r"scale has shape \[8, 2\], not": lambda: linear(x, codes, scale.T.contiguous()),
        r"scale has shape \[3, 8\]: 128 weights are no such groups": lambda: linear(x, codes, scale[[0, 0, 0]]),
        "scale has dtype float16": lambda: linear(x, codes, scale.half()),
        "zero has shape": lambda: linear(x, codes, scale, zero[:1]),
        "zero has dtype int64": lambda: linear(x, codes, scale, zero.long()),
        "zero has strides": lambda: linear(x, codes, scale, zero.repeat(1, 2)[:, :8]),
        "zero is given, and weight is not in 4 bits": lambda: linear(x, random(8, 128), None, zero),
        "BLOCK_K=128, which does not divide groups of 64": lambda: linear(
            x, codes, scale, config=replace(SMALL, BLOCK_K=128)
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
