"""The linear layer with float8 weights against its torch twin, and how such weights are made."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.common.testing import Guards, assert_within_budget
from bench.kernels.resources import SHARED_LIMIT
from sfs_triton.kernels import linear as module
from sfs_triton.kernels.launch import recording
from sfs_triton.kernels.linear import LinearConfig, linear, linear_config
from sfs_triton.ops.torch import linear as twin

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = LinearConfig(BLOCK_M=16, BLOCK_N=64, BLOCK_K=32, n_splits=1, num_stages=2, num_warps=4)
SPLIT = replace(SMALL, n_splits=3)
SHAPES = {  # (N, K) of the projections of LLaDA-8B, iLLaDA-8B and Dream-7B
    "llada-8b": [(12288, 4096), (4096, 4096), (24576, 4096), (4096, 12288)],
    "illada-8b": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)],
    "dream-7b": [(4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)],
}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make(n_rows: int, n_out: int, n_in: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """``x``, codes, scales and a residual on the CPU."""
    weight, scale = twin.quantize(random(n_out, n_in, seed=1) / n_in**0.5)
    return random(n_rows, n_in, dtype=dtype), weight, scale, random(n_rows, n_out, dtype=dtype, seed=2)


def true_linear(x, weight, scale, residual=None) -> torch.Tensor:
    return twin.linear(x.double(), weight, scale.double(), residual=None if residual is None else residual.double())


def assert_linear(guards: Guards, x, weight, scale, residual=None, *, count: int | None = None, **options) -> None:
    """Rows below ``count`` are right, the others are not touched, and no input has changed."""
    given_ = [x, weight, scale, residual]
    inputs = [None if each is None else guards.copy(each) for each in given_]
    limit = None if count is None else guards.copy(torch.tensor([count], dtype=torch.int32))
    out = guards.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
    assert linear(*inputs[:3], residual=inputs[3], count=limit, out=out, **options) is out
    n = x.shape[0] if count is None else min(max(count, 0), x.shape[0])
    first = [inputs[0][:n], *inputs[1:3], None if residual is None else inputs[3][:n]]
    assert_within_budget(out[:n], true_linear(*first), twin.linear(*first[:3], residual=first[3]))
    assert out[n:].isnan().all()
    for before, after in zip(given_, inputs, strict=True):
        assert before is None or torch.equal(before.view(torch.uint8), after.cpu().view(torch.uint8))


def skip_without_conversion(config: LinearConfig) -> None:
    if config.NATIVE_FP8 and DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU does not convert float8")


@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize(
    ("n_rows", "n_out", "n_in"),
    [(0, 8, 8), (1, 1, 1), (3, 17, 40), (16, 128, 128), (33, 130, 384), (130, 65, 300), (150, 200, 256)],
)
def test_equals_its_twin(guards, dtype, n_rows, n_out, n_in, with_residual):
    x, weight, scale, residual = make(n_rows, n_out, n_in, dtype)
    assert_linear(guards, x, weight, scale, residual if with_residual else None)


def test_equals_its_twin_over_a_real_width(guards):
    x, weight, scale, residual = make(16, 512, 18944, torch.float16)
    assert_linear(guards, x, weight, scale, residual)


@pytest.mark.parametrize("native", [None, False, True], ids=["own", "bits", "native"])
@pytest.mark.parametrize("n_in", [128, 100], ids=["even", "ragged"])
@pytest.mark.parametrize(("blocks", "n_splits"), [((32, 128, 32), 1), ((16, 64, 64), 2), ((64, 64, 32), 6)])
def test_every_path(guards, dtype, blocks, n_splits, n_in, native):
    config = LinearConfig(*blocks, n_splits=n_splits, num_stages=2, num_warps=4, NATIVE_FP8=native)
    skip_without_conversion(config)
    x, weight, scale, residual = make(20, 70, n_in, dtype)
    with recording() as recorded:
        linear(*(each.to("meta") for each in (x, weight, scale)), config=config)
    taken = {name: recorded[0].arguments[name] for name in ("HAS_SPLITS", "EVEN_K", "NATIVE_FP8", "BLOCK_M")}
    wanted = {"HAS_SPLITS": n_splits > 1, "EVEN_K": n_in == 128, "NATIVE_FP8": native, "BLOCK_M": blocks[0]}
    assert taken == wanted
    assert_linear(guards, x, weight, scale, residual, config=config)


@pytest.mark.parametrize("native", [False, True], ids=["bits", "native"])
def test_all_codes_are_exact(dtype, native):
    config = replace(SMALL, NATIVE_FP8=native)
    skip_without_conversion(config)
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    weight = codes.view(torch.float8_e4m3fn)[None]
    number = ~weight[0].float().isnan()
    assert number.sum() == 254
    one = torch.ones(1, device=DEVICE)
    # a NaN would spoil every row through 0 * NaN, so those codes stay out of the dot product
    out = linear(torch.eye(254, device=DEVICE, dtype=dtype), weight[:, number].contiguous(), one, config=config)
    assert torch.equal(out[:, 0].float(), weight[0, number].float())
    if not native:
        nans = weight[:, ~number].contiguous()
        out = linear(torch.eye(2, device=DEVICE, dtype=dtype), nans, one, config=config)
        assert out[:, 0].tolist() == [480.0, -480.0]


@pytest.mark.parametrize("config", [None, SMALL, SPLIT], ids=["own", "small", "split"])
@pytest.mark.parametrize("count", [-1, 0, 16, 37, 1000])
def test_only_counted_rows_are_computed(guards, count, config):
    x, weight, scale, residual = make(40, 70, 96)
    assert_linear(guards, x, weight, scale, residual, count=count, config=config)


@pytest.mark.parametrize("config", [SMALL, SPLIT], ids=["small", "split"])
def test_a_row_has_the_same_bits_whatever_the_count(config):
    x, weight, scale, _ = (each.to(DEVICE) for each in make(40, 70, 96))
    whole = linear(x, weight, scale, config=config)
    for count in (1, 17, 40):
        some = linear(x, weight, scale, count=torch.tensor([count], dtype=torch.int32, device=DEVICE), config=config)
        assert torch.equal(some[:count], whole[:count])


@pytest.mark.parametrize("config", [SMALL, SPLIT], ids=["small", "split"])
def test_result_may_take_the_residuals_place(guards, dtype, config):
    x, weight, scale, residual = make(20, 70, 96, dtype)
    x, weight, scale, place = (guards.copy(each) for each in (x, weight, scale, residual))
    residual = place.clone()
    linear(x, weight, scale, residual=place, out=place, config=config)
    assert_within_budget(
        place, true_linear(x, weight, scale, residual), twin.linear(x, weight, scale, residual=residual)
    )


def test_row_strides_are_free(device):
    x, weight, scale, residual = (each.to(device) for each in make(20, 30, 48))
    wide_x, wide_residual = (torch.nn.functional.pad(each, (3, 5), value=math.nan) for each in (x, residual))
    wide_out = torch.full_like(wide_residual, 7.0)
    out = linear(wide_x[:, 3:-5], weight, scale, residual=wide_residual[:, 3:-5], out=wide_out[:, 3:-5])
    torch.testing.assert_close(out, twin.linear(x, weight, scale, residual=residual))
    assert (wide_out[:, :3] == 7).all() and (wide_out[:, -5:] == 7).all()


@pytest.mark.parametrize("n_programs", [1, 4])
@pytest.mark.parametrize("config", [SMALL, SPLIT], ids=["small", "split"])
def test_few_programs_do_all_the_work(guards, monkeypatch, config, n_programs):
    monkeypatch.setattr(module, "multiprocessors", lambda device: n_programs)
    x, weight, scale, residual = make(20, 130, 100)
    with recording() as recorded:
        linear(*(each.to("meta") for each in (x, weight, scale)), config=config)
    assert recorded[0].grid == (n_programs,)
    assert_linear(guards, x, weight, scale, residual, config=config)


def test_counters_survive_any_number_of_launches(guards):
    x, weight, scale, _ = (guards.copy(each) for each in make(1, 1, 17))
    counters = guards.copy(torch.zeros(1, dtype=torch.int32))
    config = LinearConfig(BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, n_splits=2, num_stages=1, num_warps=1)
    want = linear(x, weight, scale, config=config)
    out = guards.empty(1, 1)
    for _ in range(1000 if DEVICE.type == "cuda" else 100):
        linear(x, weight, scale, counters=counters, out=out.fill_(math.nan), config=config)
        assert torch.equal(out, want)
    assert not counters.any()


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # the interpreter computes with numpy
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("config", [SMALL, SPLIT], ids=["small", "split"])
def test_bad_values_stay_in_their_row(device, bad, config):
    x, weight, scale, _ = (each.to(device) for each in make(20, 30, 40))
    x[18, 7] = bad
    out = linear(x, weight, scale, config=config)
    assert not out[18].isfinite().any() and out[:18].isfinite().all() and out[19].isfinite().all()


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(1, 100), st.integers(1, 100), st.integers(1, 4), st.none() | st.integers(0, 45))
def test_any_shape(n_rows, n_out, n_in, n_splits, count):
    guards = Guards(DEVICE)
    x, weight, scale, residual = make(n_rows, n_out, n_in)
    assert_linear(guards, x, weight, scale, residual, count=count, config=replace(SMALL, n_splits=n_splits))
    guards.check()


@pytest.mark.parametrize("n_rows", [1, 16, 32, 64, 128, 256])
@pytest.mark.parametrize(("target", "n_multiprocessors"), [(80, 108), (86, 84), (89, 128), (90, 132), (100, 148)])
def test_config_fills_the_gpu_and_fits_its_memory(n_rows, target, n_multiprocessors):
    for n_out, n_in in sum(SHAPES.values(), []):
        for wide, width in product((False, True), (1, 2)):
            sizes = {"shared": SHARED_LIMIT[target], "weight_itemsize": width, "wide": wide}
            config = linear_config(n_rows, n_out, n_in, n_multiprocessors, **sizes)
            assert config.BLOCK_M == {1: 16, 256: 128}.get(n_rows, n_rows)
            units = math.ceil(n_rows / config.BLOCK_M) * math.ceil(n_out / config.BLOCK_N) * config.n_splits
            rounds = math.ceil(units / n_multiprocessors)
            assert units / (rounds * n_multiprocessors) > 0.55
            weights = config.BLOCK_N * config.BLOCK_K * width
            stage = weights + 2 * config.BLOCK_M * config.BLOCK_K
            assert config.num_stages >= 3
            more = stage if target == 90 else 0  # where products read shared memory, one more stage may be held
            assert (config.num_stages - 1) * stage + more <= SHARED_LIMIT[target] - 4096
            assert 24 * 1024 <= (config.num_stages - 1) * weights
            assert wide or config.BLOCK_N == 128


def test_config_splits_k_where_tiles_are_few():
    assert linear_config(128, 4096, 4096, 132) == LinearConfig(128, 128, 128, n_splits=4, num_stages=4, num_warps=8)
    assert linear_config(16, 28672, 4096, 132) == LinearConfig(16, 128, 128, n_splits=1, num_stages=6, num_warps=8)
    assert linear_config(128, 24576, 4096, 132).BLOCK_N == 128  # decoding takes registers, 256 rows of sums take half
    bf16 = linear_config(128, 24576, 4096, 132, weight_itemsize=2)
    assert bf16 == LinearConfig(128, 256, 64, n_splits=1, num_stages=4, num_warps=8)
    assert linear_config(64, 64, 128, 132).n_splits == 1  # there is one block of K


@pytest.mark.parametrize("arguments", [{"itemsize": 4}, {"n_in": 200}], ids=["float32", "ragged"])
def test_config_is_small_where_code_is_wide(arguments):
    sizes = {"n_rows": 128, "n_out": 4096, "n_in": 4096, "n_multiprocessors": 132} | arguments
    config = linear_config(**sizes)
    assert (config.BLOCK_M, config.BLOCK_N, config.BLOCK_K, config.n_splits) == (32, 64, 32, 1)


def test_refuses_what_it_cannot_take(device):
    x, weight, scale, residual = (each.to(device) for each in make(4, 8, 16))
    count, counters = (torch.zeros(n, dtype=torch.int32, device=device) for n in (1, 0))
    for message, call in {
        "x has dtype float64": lambda: linear(x.double(), weight, scale),
        "x has shape": lambda: linear(x[None], weight, scale),
        "x has strides": lambda: linear(torch.ones(16, 4, device=device).T, weight, scale),
        "weight has dtype float32": lambda: linear(x, weight.float(), scale),
        "weight has shape": lambda: linear(x, weight[:, :8].contiguous(), scale),
        "weight has strides": lambda: linear(x[:, :8], weight[:, :8], scale),
        r"weight has shape \[0, 16\], and no elements": lambda: linear(x, weight[:0], scale[:0]),
        r"weight has shape \[8, 0\], and no elements": lambda: linear(x[:, :0], weight[:, :0], scale),
        "weight is on device 'meta'": lambda: linear(x, weight.to("meta"), scale),
        "scale has dtype float16": lambda: linear(x, weight, scale.half()),
        "scale has shape": lambda: linear(x, weight, scale[:4]),
        "residual has shape": lambda: linear(x, weight, scale, residual=residual[:2]),
        "residual has dtype float16": lambda: linear(x, weight, scale, residual=residual.half()),
        "count has dtype int64": lambda: linear(x, weight, scale, count=count.long()),
        "count has shape": lambda: linear(x, weight, scale, count=counters),
        "counters has dtype int64": lambda: linear(x, weight, scale, counters=count.long()),
        "out has shape": lambda: linear(x, weight, scale, out=residual[:2]),
        "out has dtype float16": lambda: linear(x, weight, scale, out=residual.half()),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 40), st.sampled_from([1e-40, 1e-6, 1.0, 1e30]))
def test_quantize_is_within_its_bound(seed, n_out, n_in, size):
    weight = random(n_out, n_in, seed=seed) * size
    codes, scale = twin.quantize(weight)
    assert codes.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32 and (scale > 0).all()
    error = (codes.double() * scale.double()[:, None] - weight.double()).abs()
    bound = torch.maximum(weight.double().abs() / 16, scale.double()[:, None] / 1024)
    assert (error <= bound * (1 + 1e-6)).all()
    if size >= 1e-6:
        assert (codes.float().abs().amax(1) == 448).all()


def test_quantize_of_zeros_and_of_nothing():
    codes, scale = twin.quantize(torch.tensor([[0.0, -0.0], [3.0, -448.0]], dtype=torch.bfloat16))
    assert scale.tolist() == [1.0, 1.0]
    assert codes.float().tolist() == [[0.0, 0.0], [3.0, -448.0]]
    for shape in ((0, 4), (4, 0)):
        codes, scale = twin.quantize(torch.ones(shape))
        assert codes.shape == shape and scale.tolist() == [1.0] * shape[0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_scale_of_a_row_without_codes_is_not_finite(bad):
    weight = torch.ones(3, 5)
    weight[2, 4] = bad
    assert twin.quantize(weight)[1].isfinite().tolist() == [True, True, False]


def test_quantize_refuses_other_tensors():
    for bad in (torch.ones(4), torch.ones(4, 4, dtype=torch.int32)):
        with pytest.raises(ValueError, match="not a float matrix"):
            twin.quantize(bad)
