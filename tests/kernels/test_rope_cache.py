"""Rotary embedding fused with storing keys and values, against its torch twin."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.common.testing import Guards, assert_within_budget
from sfs_triton.kernels.rope_cache import RopeCacheConfig, rope_cache, rope_cache_config, rope_cache_cost
from sfs_triton.ops.torch.rope_cache import rope_cache as twin
from sfs_triton.ops.torch.rope_cache import rope_tables, store_read, store_unread


class Inputs:
    """A fused projection, tables, and caches with heads outside positions, all between guard bands."""

    def __init__(self, guards, dtype, batch, n, heads, kv_heads, head_dim, length=0, rows=None, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.shape = (batch, n, heads, kv_heads, head_dim)
        fused = torch.randn(batch, n, (heads + 2 * kv_heads) * head_dim, generator=generator)
        self.fused = guards.copy(fused.to(dtype))
        self.cos, self.sin = (guards.copy(t) for t in rope_tables(64, head_dim, 1e4, torch.device("cpu")))
        store = (rows or batch, kv_heads, length, head_dim)
        self.stores = [guards.empty(*store, dtype=dtype) for _ in range(2)] if length else []
        self.guards = guards

    @property
    def qkv(self) -> tuple[torch.Tensor, ...]:
        """Views of the projection."""
        heads, kv_heads, head_dim = self.shape[2:]
        return self.fused.unflatten(-1, (-1, head_dim)).split((heads, kv_heads, kv_heads), 2)

    def check(self, position, *, cache_row=None, config=None) -> None:
        """Run the kernel and compare everything it may write, bit by bit where nothing may change."""
        position = self.guards.copy(position.to(self.fused.device))
        options = {} if cache_row is None else {"cache_row": self.guards.copy(cache_row.to(self.fused.device))}
        caches = {name: s.transpose(1, 2) for name, s in zip(("k_cache", "v_cache"), self.stores, strict=False)}
        before = self.fused.clone()
        expected = self._expected(before, position, caches, options)
        result = rope_cache(*self.qkv, self.cos, self.sin, position, **caches, **options, config=config)
        for got, given_ in zip(result, (self.qkv[0], *(caches.values() or self.qkv[1:])), strict=True):
            assert got.data_ptr() == given_.data_ptr() and got.shape == given_.shape
        idle = (position < 0).expand(self.shape[:2])
        assert torch.equal(self.fused[idle], before[idle]), "touched an idle row"
        if self.stores:
            assert torch.equal(self.fused[..., -2 * self._kv_width :], before[..., -2 * self._kv_width :])
        else:
            assert torch.equal(self.fused[..., -self._kv_width :], before[..., -self._kv_width :])
        for got, (truth, same) in zip(result, expected, strict=True):
            assert torch.equal(got.isnan(), same.isnan())
            assert_within_budget(got.nan_to_num(), truth.nan_to_num(), same.nan_to_num())
        assert torch.equal(result[2].nan_to_num(), expected[2][1].nan_to_num()), "values are copied as they are"

    @property
    def _kv_width(self) -> int:
        return self.shape[3] * self.shape[4]

    def _expected(self, fused, position, caches, options):
        """The twin's results in float64 and in the kernel's dtype."""
        results = []
        for dtype in (torch.float64, fused.dtype):
            q, k, v = (
                x.clone().to(dtype) for x in fused.unflatten(-1, (-1, self.shape[4])).split(list(self._split), 2)
            )
            own = {name: cache.clone().to(dtype) for name, cache in caches.items()}
            cos, sin = (t.double() if dtype == torch.float64 else t for t in (self.cos, self.sin))
            results.append(twin(q, k, v, cos, sin, position, **own, **options))
        return list(zip(*results, strict=True))

    @property
    def _split(self) -> tuple[int, int, int]:
        return (self.shape[2], self.shape[3], self.shape[3])


SHAPES = [(1, 1, 1, 1, 2), (2, 3, 4, 2, 16), (1, 5, 7, 1, 128), (1, 2, 9, 3, 96), (2, 1, 2, 2, 10), (1, 2, 3, 3, 256)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rotates_in_place(guards, dtype, shape):
    batch, n = shape[:2]
    Inputs(guards, dtype, *shape).check(torch.arange(batch * n).view(batch, n) * 7)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stores_at_positions(guards, dtype, shape):
    """Cache rows permuted, one row idle, the rest of the cache untouched (it holds NaN)."""
    batch, n = shape[:2]
    position = torch.stack([torch.randperm(20, generator=torch.Generator().manual_seed(n))[:n] for _ in range(batch)])
    position[-1, n // 2] = -1
    inputs = Inputs(guards, dtype, *shape, length=20, rows=batch + 1)
    inputs.check(position.int(), cache_row=torch.arange(batch, 0, -1))
    assert inputs.stores[0][0].isnan().all()


@pytest.mark.parametrize("cached", [False, True], ids=["alone", "cached"])
def test_positions_may_be_shared(guards, dtype, cached):
    Inputs(guards, dtype, 3, 4, 2, 2, 16, length=9 if cached else 0).check(torch.tensor([8, 0, 5, 3]))


@pytest.mark.parametrize("cached", [False, True], ids=["alone", "cached"])
def test_idle_rows_are_left_alone(guards, dtype, cached):
    Inputs(guards, dtype, 2, 3, 2, 1, 16, length=5 if cached else 0).check(torch.tensor([[-1] * 3, [-1, 4, -1]]))


@pytest.mark.parametrize("cached", [False, True], ids=["alone", "cached"])
@pytest.mark.parametrize("block", [1, 2, 4, 8, 64])
def test_any_number_of_heads_a_program(guards, dtype, block, cached):
    """Programs end within a row, at its end, or hold several rows, an idle one among them."""
    inputs = Inputs(guards, dtype, 2, 3, 5, 3, 32, length=6 if cached else 0)
    inputs.check(torch.tensor([[2, -1, 0], [5, 1, 3]]), config=RopeCacheConfig(block, num_warps=4 if block > 8 else 1))


@pytest.mark.parametrize(("n", "heads", "kv_heads"), [(1, 4, 2), (2, 28, 4), (3, 3, 7)])
@pytest.mark.parametrize("n_multiprocessors", [1, 132])
def test_configurations(guards, dtype, n, heads, kv_heads, n_multiprocessors):
    """Those of a GPU and of the interpreter, on either."""
    config = rope_cache_config(n, max(heads, kv_heads), 16, n_multiprocessors)
    Inputs(guards, dtype, 1, n, heads, kv_heads, 16, length=5).check(torch.arange(n)[None] + 1, config=config)


def test_queries_or_keys_alone(device, dtype):
    q, k, v = torch.randn(3, 2, 3, 4, 16, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    cos, sin = rope_tables(9, 16, 1e4, device)
    position = torch.tensor([[1, 2, 8]], device=device).expand(2, 3)
    same_q, same_k, _ = twin(q.clone(), k.clone(), v, cos, sin, position)
    alone = rope_cache(q.clone(), None, None, cos, sin, position)
    assert alone[1] is None and alone[2] is None
    torch.testing.assert_close(alone[0], same_q)
    old = k.clone()
    cache = torch.zeros(2, 2, 9, 4, 16, device=device, dtype=dtype)
    nothing, *caches = rope_cache(None, k, v, cos, sin, position, k_cache=cache[0], v_cache=cache[1])
    assert nothing is None and torch.equal(k, old)
    torch.testing.assert_close(caches[0][:, [1, 2, 8]], same_k)
    assert torch.equal(caches[1][:, [1, 2, 8]], v)
    assert rope_cache(None, None, None, cos, sin, position) == (None, None, None)
    assert twin(None, None, None, cos, sin, position) == (None, None, None)


@pytest.mark.parametrize(("batch", "n"), [(0, 3), (2, 0)])
def test_nothing_to_do(guards, dtype, batch, n):
    Inputs(guards, dtype, batch, n, 2, 2, 16, length=4, rows=2).check(torch.zeros(batch, n, dtype=torch.int64))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_values_stay_in_their_pair(device, bad):
    q = torch.ones(1, 2, 2, 16, device=device)
    q[0, 1, 0, 3] = bad
    cos, sin = rope_tables(4, 16, 1e4, device)
    out, _, _ = rope_cache(q, None, None, cos, sin, torch.tensor([[2, 3]], device=device))
    touched = torch.zeros_like(out, dtype=torch.bool)
    touched[0, 1, 0, [3, 11]] = True
    assert not out[touched].isfinite().any() and out[~touched].isfinite().all()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_shape_and_positions(data):
    draw = data.draw
    guards = Guards("cuda" if torch.cuda.is_available() else "cpu")
    batch, n, length = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(5, 30))
    shape = (batch, n, draw(st.integers(1, 9)), draw(st.integers(1, 9)), 2 * draw(st.integers(1, 20)))
    position = torch.tensor([draw(st.permutations(range(length)))[:n] for _ in range(batch)])
    idle = draw(st.lists(st.booleans(), min_size=batch * n, max_size=batch * n))
    position[torch.tensor(idle).view(batch, n)] = -1
    cached = draw(st.booleans())
    cache_row = draw(st.none() | st.permutations(range(batch + 1))) if cached else None
    Inputs(guards, torch.float32, *shape, length=cached * length, rows=batch + 1).check(
        position, cache_row=None if cache_row is None else torch.tensor(cache_row[:batch])
    )
    guards.check()


def test_twin_reads_nothing_on_the_host():
    """Positions stay on the device: a meta tensor has no values to read."""
    x = torch.empty(2, 3, 2, 8, device="meta")
    cos, position = torch.empty(9, 8, device="meta"), torch.empty(2, 3, dtype=torch.int64, device="meta")
    cache = torch.empty(2, 9, 2, 8, device="meta")
    twin(x, x, x, cos, cos, position, k_cache=cache, v_cache=cache.clone())


def test_configuration_and_cost():
    for n_heads in (28, 32):
        for n_rows in (1, 128, 2124):
            assert rope_cache_config(n_rows, n_heads, 128, 132) == RopeCacheConfig(8, 2)
    assert rope_cache_config(1, 1, 16, 132) == RopeCacheConfig(1, 1)
    assert rope_cache_config(500, 4, 16, 132) == RopeCacheConfig(64, 2)
    assert rope_cache_config(130, 4, 32, 1) == RopeCacheConfig(1024, 4)
    assert rope_cache_config(130, 32, 128, 1) == RopeCacheConfig(512, 4)
    alone, cached = (rope_cache_cost(10, 4, 2, 64, 2, cached=c) for c in (False, True))
    assert cached.bytes - alone.bytes == 10 * 2 * 2 * 64 * 2 and cached.flops == alone.flops == 3 * 10 * 6 * 64


def test_without_positions_the_tables_are_the_rows_own(guards, dtype):
    first, n = 5, 7
    named, unnamed = (Inputs(guards, dtype, 2, n, 3, 1, 16) for _ in range(2))
    position = torch.arange(first, first + n, device=named.fused.device)
    rope_cache(*named.qkv, named.cos, named.sin, position)
    rope_cache(*unnamed.qkv, unnamed.cos[first : first + n], unnamed.sin[first : first + n], None)
    assert torch.equal(named.fused, unnamed.fused)
    plain = Inputs(guards, dtype, 2, n, 3, 1, 16)
    rotated = twin(*plain.qkv, plain.cos[first : first + n], plain.sin[first : first + n], None)
    torch.testing.assert_close(rotated, unnamed.qkv)


@pytest.mark.parametrize("cache_row", [None, torch.tensor([3, 0, 2])], ids=["in order", "rows"])
def test_stores_are_equal_with_and_without_a_read_of_the_live_rows(cache_row):
    position = torch.tensor([[2, -1, 0, 5], [-1, -1, -1, -1], [-1, 3, 6, 1]])
    fresh, kept = torch.randn(2, 4, 7, 2, 8, generator=torch.Generator().manual_seed(0)).split((4, 3), 2)
    stores = []
    for store in (store_read, store_unread):
        caches = torch.cat((kept, kept, kept), 2).clone()
        store(tuple(zip(caches, fresh[:, :3], strict=True)), position.int(), cache_row)
        stores.append(caches)
    assert torch.equal(*stores) and not torch.equal(stores[0], torch.cat((kept, kept, kept), 2))


def test_refuses_what_it_cannot_take(device, monkeypatch):
    q, k = torch.ones(2, 3, 4, 16, device=device), torch.ones(2, 3, 2, 16, device=device)
    cos, sin = rope_tables(9, 16, 1e4, device)
    at = torch.zeros(2, 3, dtype=torch.int64, device=device)
    cache = torch.zeros(2, 9, 2, 16, device=device)
    both = {"k_cache": cache, "v_cache": cache.clone()}
    odd = torch.ones(1, 3, 1, 7, device=device)
    many = q[:1, :1, :1].expand(1, 2**15, 2**15, 16)
    monkeypatch.setenv("SFS_TRITON_DEBUG", "1")
    for message, call in {
        "k and v go together": lambda: rope_cache(q, k, None, cos, sin, at),
        "k_cache and v_cache go together": lambda: rope_cache(q, k, k, cos, sin, at, k_cache=cache),
        "k_cache is given without k": lambda: rope_cache(q, None, None, cos, sin, at, **both),
        "cache_row is given without": lambda: rope_cache(q, k, k, cos, sin, at, cache_row=at[:, 0]),
        "q is a list": lambda: rope_cache([1.0], None, None, cos, sin, at),
        "q has dtype float64": lambda: rope_cache(q.double(), None, None, cos, sin, at),
        "q has head_dim 7": lambda: rope_cache(odd, None, None, cos, sin, at),
        "k has head_dim 7": lambda: rope_cache(None, odd, odd, cos, sin, at),
        "q has 65536 batch rows": lambda: rope_cache(q[:1].expand(2**16, 3, 4, 16), None, None, cos, sin, at),
        "q has 32768 rows with 1073741824 heads": lambda: rope_cache(many, None, None, cos, sin, at),
        "k has 32768 rows with 1073741824 heads": lambda: rope_cache(None, many, many, cos, sin, at),
        "q has strides": lambda: rope_cache(q.mT.contiguous().mT, None, None, cos, sin, at),
        "k has shape": lambda: rope_cache(q, k[:1], k[:1], cos, sin, at),
        "k has dtype float16": lambda: rope_cache(q, k.half(), k, cos, sin, at),
        "v has shape": lambda: rope_cache(q, k, k[:, :, :1], cos, sin, at),
        "cos has shape": lambda: rope_cache(q, k, k, cos[:, :8], sin, at),
        "cos has dtype float16": lambda: rope_cache(q, k, k, cos.half(), sin, at),
        "cos has no rows": lambda: rope_cache(q, k, k, cos[:0], sin[:0], at),
        "sin has shape": lambda: rope_cache(q, k, k, cos, sin[:5], at),
        "position has shape": lambda: rope_cache(q, k, k, cos, sin, at[:, :2]),
        "position has dtype float32": lambda: rope_cache(q, k, k, cos, sin, at.float()),
        r"position holds values in \[9, 9\]": lambda: rope_cache(q, k, k, cos, sin, at + 9),
        r"position holds values in \[-2, -2\]": lambda: rope_cache(q, k, k, cos, sin, at - 2),
        r"position holds values in \[-1, -1\]": lambda: rope_cache(q, k, k, cos, sin, at[0] - 1),
        "k_cache has shape": lambda: rope_cache(q, k, k, cos, sin, at, k_cache=cache[0], v_cache=cache),
        "v_cache has dtype float16": lambda: rope_cache(q, k, k, cos, sin, at, k_cache=cache, v_cache=cache.half()),
        "k_cache has 1 batch rows": lambda: rope_cache(q, k, k, cos, sin, at, k_cache=cache[:1], v_cache=cache[:1]),
        "k_cache holds nothing": lambda: rope_cache(q, k, k, cos, sin, at, k_cache=cache[:, :0], v_cache=cache[:, :0]),
        "cache_row has shape": lambda: rope_cache(q, k, k, cos, sin, at, **both, cache_row=at),
        r"cache_row holds values in \[2, 2\]": lambda: rope_cache(
            q, k, k, cos, sin, at, **both, cache_row=at[:, 0] + 2
        ),
        "k_cache is given without position": lambda: rope_cache(q, k, k, cos, sin, None, **both),
        "cos has 2 rows, fewer than q's 3": lambda: rope_cache(q, k, k, cos[:2], sin[:2], None),
        "k is on device 'meta'": lambda: rope_cache(q, k.to("meta"), k, cos, sin, at),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    assert not cache.any()
