"""Attention over a cache, keys split over programs, against its torch twin."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.common.testing import Guards, assert_within_budget
from sfs_triton.kernels.attention import AttentionConfig, attention, attention_config, attention_cost
from sfs_triton.ops.torch.attention import attention as twin


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(guards, dtype, batch, n, heads, kv_heads, head_dim, n_keys, rows=None) -> tuple[torch.Tensor, ...]:
    """Queries as part of a fused projection, and keys and values as a store with heads outside positions."""
    fused = guards.copy(random(batch, n, (heads + 1) * head_dim, dtype=dtype))
    store = (rows or batch, kv_heads, n_keys, head_dim)
    k, v = (guards.copy(random(*store, dtype=dtype, seed=seed)).transpose(1, 2) for seed in (1, 2))
    return fused.unflatten(-1, (-1, head_dim))[:, :, :heads], k, v


def check(guards, q, k, v, *, config=None, count=None, tolerance=1e-6, **options) -> None:
    """The kernel's result is within the budget, and rows beyond ``count`` are as they were."""
    ints = {name: x for name, x in options.items() if isinstance(x, torch.Tensor)}
    ints = {name: guards.copy(x.to(q.device)) for name, x in ints.items()}
    limit = None if count is None else guards.copy(torch.tensor(count, dtype=torch.int32, device=q.device))
    options = {**options, **ints}
    out = guards.empty(*q.shape, dtype=q.dtype)
    assert attention(q, k, v, out=out, config=config, count=limit, **options) is out
    truth = twin(q.double(), k.double(), v.double(), **options)
    same = twin(q, k, v, **options)
    for row, live in enumerate([q.shape[1]] * len(q) if count is None else count):
        assert_within_budget(out[row, :live], truth[row, :live], same[row, :live], tolerance=tolerance)
        assert out[row, live:].isnan().all(), "wrote a row beyond count"


@pytest.mark.parametrize(
    ("batch", "n", "heads", "kv_heads", "head_dim", "n_keys"),
    [
        (2, 0, 2, 2, 16, 5),
        (0, 3, 2, 2, 16, 5),
        (1, 3, 2, 1, 16, 0),
        (1, 1, 1, 1, 16, 1),
        (2, 5, 4, 2, 32, 70),
        (1, 7, 7, 1, 128, 200),
        (1, 129, 1, 1, 64, 300),
        (3, 2, 14, 2, 64, 33),
        (1, 2, 1, 1, 32, 2124),
    ],
)
def test_equals_its_twin(guards, dtype, batch, n, heads, kv_heads, head_dim, n_keys):
    check(guards, *inputs(guards, dtype, batch, n, heads, kv_heads, head_dim, n_keys))


def test_long(guards, dtype):
    q, k, v = inputs(guards, dtype, 1, 256, 1, 1, 16, 8192)
    check(guards, q, k, v, config=AttentionConfig(128, 128, 2, num_warps=8, num_stages=1))


CONFIGS = {
    "one": (331, AttentionConfig(16, 32, 1, num_warps=4, num_stages=2)),
    "two": (331, AttentionConfig(32, 64, 2, num_warps=4, num_stages=2)),
    "seven": (331, AttentionConfig(16, 32, 7, num_warps=4, num_stages=1)),
    "more-than-keys": (9, AttentionConfig(16, 32, 10, num_warps=4, num_stages=2)),
    "more-than-tiles": (70, AttentionConfig(16, 16, 20, num_warps=4, num_stages=2)),
    "wide": (331, AttentionConfig(64, 128, 3, num_warps=4, num_stages=1)),
    "widest": (331, AttentionConfig(128, 64, 3, num_warps=8, num_stages=2)),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("n_keys", "config"), CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("head_dim", [16, 64])
def test_any_tile_and_any_number_of_splits(guards, dtype, n_keys, config, head_dim):
    check(guards, *inputs(guards, dtype, 1, 12, 2, 1, head_dim, n_keys), config=config)


RANGES = {
    "prefix": [[0, 90, 0, 0], [0, 33, 0, 0]],
    "around-a-span": [[0, 37, 60, 97], [0, 64, 70, 71]],
    "first-empty": [[5, 5, 10, 80], [9, 2, 0, 97]],
    "second-empty": [[3, 4, 50, 50], [20, 90, 50, -1]],
    "one-row-without": [[0, 0, 0, 0], [1, 3, 90, 97]],
    "none": [[0, 0, 0, 0], [97, 4, 2, 2]],
    "second-before-first": [[60, 97, 0, 20], [96, 97, 0, 1]],
    "overlapping": [[0, 50, 30, 80], [40, 50, 10, 90]],
    "touching": [[0, 32, 32, 64], [32, 64, 0, 32]],
    "beyond-the-ends": [[-7, 20, 90, 1000], [-(2**31), 2**31 - 1, 500, 600]],
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("splits", "block"), [(1, 32), (3, 16)])
@pytest.mark.parametrize("ranges", RANGES.values(), ids=RANGES)
def test_keys_are_those_in_either_range(guards, dtype, ranges, splits, block):
    """Rows of a permuted cache, some queries idle, and NaN wherever no query may look."""
    q, k, v = inputs(guards, dtype, 2, 5, 4, 2, 16, 97, rows=4)
    cache_row = torch.tensor([3, 1])
    at = torch.arange(97)
    for row, (first, stop, first_2, stop_2) in zip(cache_row.tolist(), ranges, strict=True):
        outside = ~(((at >= first) & (at < stop)) | ((at >= first_2) & (at < stop_2))).to(k.device)
        k[row, outside] = v[row, outside] = math.nan
    k[[0, 2]] = v[[0, 2]] = math.nan
    options = {"cache_row": cache_row, "key_range": torch.tensor(ranges, dtype=torch.int32)}
    check(guards, q, k, v, count=[5, 3], config=AttentionConfig(16, block, splits, 4, 1), **options)


@pytest.mark.parametrize("count", [[0, 0], [1, 9], [8, 17], [16, 0]])
def test_rows_beyond_count_are_left_alone(guards, dtype, count):
    """Counts include a tile's end: 8 queries of two heads fill one."""
    q, k, v = inputs(guards, dtype, 2, 17, 2, 1, 32, 50)
    check(guards, q, k, v, count=count, config=AttentionConfig(16, 16, 2, 4, 1))


def test_scale_and_leading_batch_rows(guards, dtype):
    q, k, v = inputs(guards, dtype, 2, 3, 2, 2, 16, 40, rows=3)
    check(guards, q, k, v, scale=0.7)
    check(guards, q, k, v, cache_row=torch.tensor([2, 2], dtype=torch.int32))


def test_large_scores(guards, dtype):
    """Scores of some hundreds: float32 keeps four digits of the exponent's argument."""
    q, k, v = inputs(guards, dtype, 1, 4, 1, 1, 32, 100)
    check(guards, q * 40, k, v, scale=1.0, config=AttentionConfig(16, 16, 4, 4, 1), tolerance=2e-4)


def test_counters_serve_any_number_of_launches(device):
    """A tile in two splits, of 16 keys and of one."""
    q, k, v = (random(1, rows, 1, 16, dtype=torch.float32).to(device) for rows in (1, 17, 17))
    config = AttentionConfig(16, 16, 2, num_warps=1, num_stages=1)
    counters = torch.zeros(2, dtype=torch.int32, device=device)
    out = torch.empty_like(q)
    run = partial(attention, q, k, v, out=out, counters=counters, config=config)
    once = run().clone()
    torch.testing.assert_close(once, twin(q, k, v))
    for _ in range(1000 if device.type == "cuda" else 100):
        run()
    assert not counters.any() and torch.equal(out, once)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_stays_in_its_query(device):
    q, k, v = (random(1, 40, 2, 16, dtype=torch.float32).to(device) for _ in range(3))
    q[0, 3, 1, 5] = math.nan
    for splits in (1, 3):
        out = attention(q, k, v, config=AttentionConfig(16, 16, splits, 4, 1))
        assert out[0, 3, 1].isnan().all() and out.isnan().sum() == 16


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_any_shape_and_ranges(data):
    draw = data.draw
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    guards = Guards(device)
    batch, n, n_keys = draw(st.integers(1, 3)), draw(st.integers(1, 30)), draw(st.integers(1, 150))
    kv_heads, group = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 3, 7]))
    head_dim = draw(st.sampled_from([16, 32]))
    q, k, v = inputs(guards, torch.float32, batch, n, kv_heads * group, kv_heads, head_dim, n_keys)
    bound = st.integers(-2, n_keys + 2)
    ranges = draw(st.lists(st.lists(bound, min_size=4, max_size=4), min_size=batch, max_size=batch))
    config = AttentionConfig(draw(st.sampled_from([16, 32])), draw(st.sampled_from([16, 64])), 1, 4, 1)
    config = AttentionConfig(config.BLOCK_M, config.BLOCK_N, draw(st.integers(1, 5)), 4, 1)
    count = draw(st.none() | st.lists(st.integers(0, n), min_size=batch, max_size=batch))
    key_range = draw(st.sampled_from([None, torch.tensor(ranges, dtype=torch.int32)]))
    options = {} if key_range is None else {"key_range": key_range}
    cache_row = draw(st.none() | st.permutations(range(batch)))
    options |= {} if cache_row is None else {"cache_row": torch.tensor(cache_row)}
    check(guards, q, k, v, count=count, config=config, **options)
    guards.check()


def test_twin_reads_nothing_on_the_host():
    """Ranges stay on the device: a meta tensor has no values to read."""
    q, k = torch.empty(2, 3, 4, 16, device="meta"), torch.empty(5, 9, 2, 16, device="meta")
    index = torch.empty(2, 4, dtype=torch.int32, device="meta")
    assert twin(q, k, k, cache_row=index[:, 0], key_range=index, count=index[:, 1]).shape == q.shape


@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 32), (32, 8), (28, 4)])
def test_configuration_fills_the_gpu(heads, kv_heads):
    """Nearly all of an H200's 132 SMs have work in a step of 128 rows, most in one of 16, and all in longer ones."""

    def programs(n: int, batch: int = 1) -> tuple[AttentionConfig, int]:
        config = attention_config(batch, n, heads, kv_heads, 2124, 128, 2)
        tiles = -(-n * heads // kv_heads // config.BLOCK_M)
        return config, batch * kv_heads * tiles * config.n_splits

    config, count = programs(128)
    assert config.BLOCK_M == 128 and 112 <= count <= 132
    config, count = programs(16)
    assert config.BLOCK_M == 16 and 200 <= count <= 264
    assert programs(64)[0].BLOCK_M == 64 and programs(32)[0].BLOCK_M == 32
    assert programs(2124)[0].n_splits == programs(128, batch=16)[0].n_splits == 1


def test_configuration_of_small_and_wide_inputs():
    assert attention_config(1, 1, 1, 1, 0, 16, 2).n_splits == 1
    assert attention_config(1, 1, 1, 1, 63, 16, 2).n_splits == 1
    assert attention_config(1, 4, 1, 1, 8192, 128, 2).n_splits > 1
    assert attention_config(1, 2124, 32, 32, 2124, 128, 4).BLOCK_M == 32


def test_cost_counts_keys_in_range_only():
    whole, half = (attention_cost(1, 16, 4, 2, keys, 64, 2) for keys in (1000, 500))
    assert whole.flops == 2 * half.flops == 4 * 16 * 4 * 1000 * 64
    assert whole.bytes - half.bytes == 500 * 2 * 2 * 64 * 2


def test_refuses_what_it_cannot_take(device, monkeypatch):
    q, k = torch.ones(2, 3, 4, 16, device=device), torch.ones(2, 9, 2, 16, device=device)
    index = torch.tensor([0, 2], device=device)
    counters = torch.zeros(3, dtype=torch.int32, device=device)
    wide = torch.ones(1, 3, 1, 24, device=device)
    split = AttentionConfig(16, 16, 2, 4, 1)
    monkeypatch.setenv("SFS_TRITON_DEBUG", "1")
    for message, call in {
        "q is a list": lambda: attention([1.0], k, k),
        "q has dtype float64": lambda: attention(q.double(), k, k),
        "q has shape": lambda: attention(q[0], k, k),
        "q has strides": lambda: attention(q.mT.contiguous().mT, k, k),
        "q has head_dim 24": lambda: attention(wide, wide, wide),
        "q has 65536 batch rows": lambda: attention(q[:1].expand(65536, -1, -1, -1), k, k),
        "k has dtype float16": lambda: attention(q, k.half(), k),
        "k has shape": lambda: attention(q, k[..., :8], k),
        "v has shape": lambda: attention(q, k, k[:, :4]),
        "k has 3 heads": lambda: attention(q, k.new_ones(2, 9, 3, 16), k.new_ones(2, 9, 3, 16)),
        "k has 0 heads": lambda: attention(q, k[:, :, :0], k[:, :, :0]),
        "k has 1 batch rows": lambda: attention(q, k[:1], k[:1]),
        "k is on device 'meta'": lambda: attention(q, k.to("meta"), k),
        "cache_row has dtype float32": lambda: attention(q, k, k, cache_row=index.float()),
        r"cache_row holds values in \[0, 2\]": lambda: attention(q, k, k, cache_row=index),
        "key_range has dtype int64": lambda: attention(q, k, k, key_range=index.new_ones(2, 4)),
        "key_range has shape": lambda: attention(q, k, k, key_range=index.new_ones(2, 2).int()),
        "count has shape": lambda: attention(q, k, k, count=index[:1].int()),
        r"count holds values in \[0, 4\]": lambda: attention(q, k, k, count=2 * index.int()),
        "scale is 0": lambda: attention(q, k, k, scale=0.0),
        "scale is nan": lambda: attention(q, k, k, scale=math.nan),
        "out has strides": lambda: attention(q, k, k, out=torch.ones(2, 3, 8, 16, device=device)[:, :, :4]),
        "counters has dtype": lambda: attention(q, k, k, counters=counters.float(), config=split),
        "counters holds 3": lambda: attention(q, k, k, counters=counters, config=split),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
