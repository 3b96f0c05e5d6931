"""Products with an ending of their own in the same launch, against the operations one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.common.testing import Guards, assert_within_budget
from sfs_triton.kernels import linear as module
from sfs_triton.kernels.linear import LinearConfig, Normed, linear, linear_heads, linear_normed, linear_silu_mul
from sfs_triton.ops.torch.linear import dequantise, quantize
from sfs_triton.ops.torch.mlp import silu_mul
from sfs_triton.ops.torch.norm import rms_norm
from sfs_triton.ops.torch.rope_cache import rope_cache, rope_tables

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = LinearConfig(BLOCK_M=16, BLOCK_N=32, BLOCK_K=32, n_splits=1, num_stages=2, num_warps=4)
WIDE = replace(SMALL, BLOCK_N=256)  # whose endings take a slice at a time
CONFIGS = {
    "own": None,
    "small": SMALL,
    "split": replace(SMALL, n_splits=3),
    "wide": WIDE,
    "wide split": replace(WIDE, n_splits=2),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
formats = pytest.mark.parametrize("form", ["plain", "fp8"])
EPS = 1e-5


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def matrix(n_out: int, n_in: int, form: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    weight = random(n_out, n_in, seed=1) / n_in**0.5
    return quantize(weight) if form == "fp8" else (weight.to(dtype), None)


def dense(weight: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    return weight.to(dtype) if scale is None else dequantise(weight, scale, dtype)


def normed(n_rows: int, width: int, dtype: torch.dtype) -> tuple[Normed, torch.Tensor]:
    """Rows with a norm that is to be finished, in three parts, and the values that it is of."""
    x, gain = random(n_rows, width, dtype=dtype, seed=5) * 4, 1 + random(width, dtype=dtype, seed=6) / 4
    squares = torch.stack([part.float().square().sum(1) for part in x.tensor_split(3, 1)])
    return Normed(x * gain, squares, EPS), rms_norm(x.double(), gain.double(), EPS)


@pytest.mark.sampled(3)
@configs
@pytest.mark.parametrize(("n_rows", "n_out", "n_in"), [(1, 1, 1), (3, 17, 40), (33, 130, 96), (20, 70, 100)])
def test_plain_weights(guards, dtype, n_rows, n_out, n_in, config):
    x, (weight, _), residual = (
        random(n_rows, n_in, dtype=dtype),
        matrix(n_out, n_in, "plain", dtype),
        random(n_rows, n_out, dtype=dtype, seed=2),
    )
    bias, out = random(n_out, dtype=dtype, seed=3), guards.empty(n_rows, n_out, dtype=dtype)
    linear(
        guards.copy(x),
        guards.copy(weight),
        bias=guards.copy(bias),
        residual=guards.copy(residual),
        out=out,
        config=config,
    )
    same = torch.nn.functional.linear(x, weight, bias) + residual
    assert_within_budget(out, torch.nn.functional.linear(x.double(), weight.double(), bias.double()) + residual, same)


@configs
@formats
def test_a_norm_is_finished_by_the_next_product(guards, dtype, form, config):
    """Sums are those of one product, and the norm of another gives what both operations give one by one."""
    n_rows, width, n_in, n_out = 20, 72, 96, 50
    x, residual = random(n_rows, n_in, dtype=dtype), random(n_rows, width, dtype=dtype, seed=2)
    (first, first_scale), (second, second_scale) = matrix(width, n_in, form, dtype), matrix(n_out, width, form, dtype)
    gain = 1 + random(width, dtype=dtype, seed=4) / 4
    place = guards.copy(residual)
    middle = linear_normed(x, first, first_scale, gain, EPS, residual=place, config=config)
    wide = x.double() @ dense(first, first_scale, torch.float64).T + residual.double()
    assert_within_budget(place, wide, x @ dense(first, first_scale, dtype).T + residual)
    assert middle.squares.shape[1] == n_rows and middle.eps == EPS
    torch.testing.assert_close(middle.squares.sum(0), place.float().square().sum(1))
    out = linear(middle, second, second_scale, config=config)
    truth = rms_norm(place.double(), gain.double(), EPS) @ dense(second, second_scale, torch.float64).T
    assert_within_budget(out, truth, rms_norm(place, gain, EPS) @ dense(second, second_scale, dtype).T)


@pytest.mark.sampled(3)
@configs
@formats
@pytest.mark.parametrize(("n_rows", "width", "n_in", "with_norm"), [(1, 1, 16, False), (20, 135, 40, True)])
def test_gated(dtype, n_rows, width, n_in, with_norm, form, config):
    weight, scale = matrix(2 * width, n_in, form, dtype)
    x, truth_x = normed(n_rows, n_in, dtype) if with_norm else (random(n_rows, n_in, dtype=dtype),) * 2
    out = linear_silu_mul(x, weight, scale, config=config)
    truth = silu_mul(truth_x.double() @ dense(weight, scale, torch.float64).T)
    assert_within_budget(out, truth, silu_mul(truth_x.to(dtype) @ dense(weight, scale, dtype).T))


HEADS = {"all": (4, 2), "queries": (3, 0), "keys and values": (0, 2), "one each": (1, 1)}


@configs
@formats
def test_heads_by_every_config(guards, dtype, form, config):
    assert_heads(guards, dtype, HEADS["all"], "cache rows", form, config)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("store", ["rows", "positions", "cache", "cache rows"])
def test_heads(guards, dtype, heads, store):
    assert_heads(guards, dtype, heads, store, "plain", None)


def assert_heads(guards, dtype, heads, store, form, config) -> None:
    (n_heads, n_kv_heads), (batch, n, width, length, n_in) = heads, (2, 7, 16, 30, 40)
    n_all = n_heads + 2 * n_kv_heads
    weight, scale = matrix(n_all * width, n_in, form, dtype)
    bias = random(n_all * width, dtype=dtype, seed=3)
    x, truth_x = normed(batch * n, n_in, dtype)
    cos, sin = rope_tables(length, width, 1e4, DEVICE)
    cached = store.startswith("cache") and n_kv_heads > 0
    position = None
    if store != "rows":
        position = torch.stack([torch.randperm(length)[:n] for _ in range(batch)]).int().to(DEVICE)
        position[0, 3] = position[1, 0] = -1
    else:
        cos, sin = cos[5 : 5 + n], sin[5 : 5 + n]
    options = {}
    if cached:
        caches = [random(3, length, n_kv_heads, width, dtype=dtype, seed=s) for s in (7, 8)]
        options = {"k_cache": guards.copy(caches[0]), "v_cache": guards.copy(caches[1])}
        if store == "cache rows":
            options["cache_row"] = torch.tensor([2, 0], device=DEVICE)

    def one_by_one(kind: torch.dtype) -> tuple[torch.Tensor, ...]:
        out = truth_x.to(kind) @ dense(weight, scale, kind).T + bias.to(kind)
        parts = out.view(batch, n, n_all, width).split((n_heads, n_kv_heads, n_kv_heads), 2)
        stores = {"k_cache": caches[0].to(kind), "v_cache": caches[1].to(kind)} if cached else {}
        stores |= {"cache_row": options["cache_row"]} if "cache_row" in options else {}
        q = parts[0].clone() if n_heads else None
        k, v = (part.clone() if n_kv_heads else None for part in parts[1:])
        return rope_cache(q, k, v, cos, sin, position, **stores)

    out = linear_heads(
        x, weight, scale, bias, cos, sin, position,
        n_heads=n_heads, n_kv_heads=n_kv_heads, n_positions=n, **options, config=config,
    )  # fmt: skip
    n_stored = n_heads if cached else n_all
    mine = [None] * 3
    if out is None:
        assert n_stored == 0
    else:
        parts = out.view(batch, n, n_stored, width)
        mine = list(parts.split((n_heads, *[n_stored - n_heads >> 1] * 2), 2))
    if cached:
        mine[1:] = options["k_cache"], options["v_cache"]
    for got, truth, same in zip(mine, one_by_one(torch.float64), one_by_one(dtype), strict=True):
        if truth is not None and truth.numel():
            assert_within_budget(got, truth, same)


def test_positions_may_be_shared_by_all_batch_rows():
    x, (weight, _) = random(6, 16), matrix(3 * 8, 16, "plain", torch.float32)
    cos, sin = rope_tables(9, 8, 1e4, DEVICE)
    place = torch.tensor([4, 8, 0], device=DEVICE)
    heads = {"n_heads": 1, "n_kv_heads": 1, "n_positions": 3}
    shared, each = (linear_heads(x, weight, None, None, cos, sin, p, **heads) for p in (place, place.expand(2, 3)))
    assert torch.equal(shared, each)


def test_counters_are_used_where_they_are_enough(monkeypatch):
    x, (weight, _) = random(20, 96), matrix(70, 96, "plain", torch.float32)
    made = []
    zeros = torch.zeros
    monkeypatch.setattr(module.torch, "zeros", lambda *a, **k: (made.append(a), zeros(*a, **k))[1])
    for n, allocated in ((6, 0), (5, 1), (None, 1)):
        made.clear()
        counters = None if n is None else zeros(n, dtype=torch.int32, device=DEVICE)
        linear(x, weight, counters=counters, config=CONFIGS["split"])
        assert len(made) == allocated and (counters is None or not counters.any())


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 40), st.integers(1, 50), st.integers(1, 70), st.integers(1, 4))
def test_any_shape(n_rows, width, n_in, n_splits):
    guards, config = Guards(DEVICE), replace(SMALL, n_splits=n_splits)
    weight, _ = matrix(2 * width, n_in, "plain", torch.float32)
    x = guards.copy(random(n_rows, n_in))
    truth = silu_mul(x.double() @ weight.double().T)
    assert_within_budget(linear_silu_mul(x, guards.copy(weight), config=config), truth, silu_mul(x @ weight.T))
    residual = guards.copy(random(n_rows, 2 * width, seed=2))
    linear_normed(x, guards.copy(weight), None, weight[:, 0].contiguous(), EPS, residual=residual, config=config)
    guards.check()


def test_refuses_what_it_cannot_take():
    x, (weight, _) = random(6, 16), matrix(24, 16, "plain", torch.float32)
    cos, sin = rope_tables(9, 8, 1e4, DEVICE)
    place, cache = torch.zeros(2, 3, dtype=torch.int32, device=DEVICE), random(2, 9, 1, 8)
    heads = {"n_heads": 1, "n_kv_heads": 1, "n_positions": 3}
    for message, call in {
        "bias has shape": lambda: linear(x, weight, bias=weight[0]),
        "weight has dtype float16": lambda: linear(x, weight.half()),
        "scale is a NoneType": lambda: linear(x, weight.to(torch.float8_e4m3fn)),
        "squares has shape": lambda: linear(Normed(x, x[:, :2].contiguous(), EPS), weight),
        "gain has shape": lambda: linear_normed(x, weight, None, x[0], EPS, residual=random(6, 24)),
        "residual has shape": lambda: linear_normed(x, weight, None, weight[:, 0], EPS, residual=x),
        "weight has 23 rows": lambda: linear_silu_mul(x, weight[:23]),
        "n_positions=4 for 6 rows": lambda: linear_heads(
            x, weight, None, None, cos, sin, place, **heads | {"n_positions": 4}
        ),
        "weight has 24 rows, which are not 5 heads": lambda: linear_heads(
            x, weight, None, None, cos, sin, place, **heads | {"n_kv_heads": 2}
        ),
        "cos has shape": lambda: linear_heads(x, weight, None, None, cos[:, :4].contiguous(), sin, place, **heads),
        "position has shape": lambda: linear_heads(x, weight, None, None, cos, sin, place[:, :2], **heads),
        "k_cache is given without position": lambda: linear_heads(
            x, weight, None, None, cos, sin, None, **heads, k_cache=cache, v_cache=cache
        ),
        "k_cache has shape": lambda: linear_heads(
            x, weight, None, None, cos, sin, place, **heads, k_cache=cache[0], v_cache=cache
        ),
        "one is None": lambda: linear_heads(x, weight, None, None, cos, sin, place, **heads, k_cache=cache),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
