"""Embedding rows and compaction against their torch twins: exact."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.common.testing import Guards
from sfs_triton.kernels.gather import (
    CompactConfig,
    EmbeddingConfig,
    compact,
    compact_config,
    embedding,
    embedding_config,
)
from sfs_triton.kernels.launch import recording
from sfs_triton.ops.torch import gather as twin

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(n_tokens: int, n_columns: int, batch: int, length: int, n: int, *, dtype=torch.float32, kind=torch.int64):
    """Make a table, a canvas, and positions of which about a third are idle."""
    generator = torch.Generator().manual_seed(n_tokens + length)
    table = torch.randn(n_tokens, n_columns, generator=generator).to(dtype)
    tokens = torch.randint(n_tokens, (batch, length), generator=generator, dtype=kind)
    position = torch.randint(length, (batch, n), generator=generator, dtype=kind)
    return table, tokens, position.masked_fill(torch.rand(batch, n, generator=generator) < 0.3, -1)


def assert_rows(guards: Guards, table: torch.Tensor, tokens: torch.Tensor, position: torch.Tensor | None, **options):
    n = tokens.shape[1] if position is None else position.shape[1]
    inputs = [None if x is None else guards.copy(x) for x in (table, tokens, position)]
    out = guards.empty(tokens.shape[0], n, table.shape[1], dtype=table.dtype)
    assert embedding(*inputs, out=out, **options) is out
    assert torch.equal(out, twin.embedding(*inputs))
    for before, after in zip((table, tokens, position), inputs, strict=True):
        assert before is None or torch.equal(before, after.cpu())


def assert_compact(guards: Guards, flag: torch.Tensor, capacity: int | None = None, **options):
    flag = guards.copy(flag)
    before, (batch, n) = flag.clone(), flag.shape
    room = n if capacity is None else capacity
    outs = [(guards.empty(batch, room, dtype=torch.int32), guards.empty(batch, dtype=torch.int32)) for _ in range(2)]
    wanted = [[i for i, value in enumerate(row) if value][:room] for row in flag.tolist()]
    for out, (rows, count) in (
        (outs[0], compact(flag, capacity=capacity, out=outs[0], **options)),
        (outs[1], twin.compact(flag, capacity=capacity, out=outs[1])),
        ((None, None), twin.compact(flag, capacity=capacity)),
    ):
        assert rows.shape == (batch, room) and rows.dtype == count.dtype == torch.int32 and rows.is_contiguous()
        assert count.tolist() == [len(row) for row in wanted]
        assert rows.tolist() == [row + [-1] * (room - len(row)) for row in wanted]
        assert out[0] is None or (rows is out[0] and count is out[1])
    assert torch.equal(flag, before)


@pytest.mark.parametrize("fetch", [False, True], ids=["canvas", "positions"])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize(("batch", "length", "n"), [(1, 1, 1), (2, 37, 11), (3, 5, 9)])
def test_embedding_equals_its_twin(guards, dtype, kind, batch, length, n, fetch):
    table, tokens, position = make(53, 40, batch, length, n, dtype=dtype, kind=kind)
    assert_rows(guards, table, tokens, position if fetch else None)


@pytest.mark.parametrize("n_tokens", [126464, 155136])
def test_embedding_at_real_vocabularies(guards, n_tokens):
    table = torch.arange(n_tokens * 8, dtype=torch.float32).view(n_tokens, 8)
    tokens = torch.tensor([[n_tokens - 1, 0, n_tokens // 2]])
    assert_rows(guards, table, tokens, torch.tensor([[2, 0, -1, 0, 1]]))


@pytest.mark.parametrize(("batch", "length", "n"), [(0, 4, 2), (2, 4, 0), (2, 4, 3)])
def test_embedding_of_no_rows_and_of_idle_ones(guards, batch, length, n):
    table, tokens = torch.ones(7, 16), torch.zeros(batch, length, dtype=torch.int64)
    assert_rows(guards, table, tokens, torch.full((batch, n), -1))
    assert_rows(guards, table, tokens[:, :0], None)


def test_embedding_copies_nan_and_keeps_idle_rows_zero(device):
    table = torch.tensor([[math.nan, -math.inf], [1.0, 2.0]], device=device)
    tokens = torch.tensor([[0, 1]], device=device)
    out = embedding(table, tokens, torch.tensor([[-1, 0, 1]], device=device))
    assert torch.equal(out.isnan(), torch.tensor([[[False, False], [True, False], [False, False]]], device=device))
    assert out[0, 0].tolist() == [0.0, 0.0] and out[0, 1, 1] == -math.inf and out[0, 2].tolist() == [1.0, 2.0]


def test_embedding_takes_row_strides(device):
    table, tokens, position = (x.to(device) for x in make(20, 24, 3, 12, 10))
    views = table[::2, 3:17], tokens[:, :9] // 2, position[:, 1:8].clamp(max=8)
    assert torch.equal(embedding(*views), twin.embedding(*views))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 6), st.integers(1, 300), st.sampled_from([1, 2, 4, 32]))
def test_embedding_of_any_shape_and_tile(batch, length, n, n_columns, rows_a_program):
    guards = Guards(DEVICE)
    table, tokens, position = make(31, n_columns, batch, length, n)
    block = embedding_config(1, n_columns, 132).BLOCK_N * 2
    for where in (position, None):
        assert_rows(guards, table, tokens, where, config=EmbeddingConfig(rows_a_program, block, num_warps=4))
    guards.check()


@pytest.mark.parametrize("n_multiprocessors", [1, 132])
@pytest.mark.parametrize("n_columns", [16, 1000, 4096])
def test_embedding_in_tiles_of_a_gpu_and_of_the_interpreter(guards, n_columns, n_multiprocessors):
    config = embedding_config(2 * 70, n_columns, n_multiprocessors)
    assert_rows(guards, *make(53, n_columns, 2, 37, 70), config=config)


def test_embedding_configuration():
    """One row per program where rows are wide; on one processor, one program for all."""
    for n_rows in (1, 128, 2124):
        assert embedding_config(n_rows, 4096, 132) == embedding_config(n_rows, 3584, 132) == EmbeddingConfig(1, 4096, 8)
    assert embedding_config(2124, 64, 132) == EmbeddingConfig(32, 64, 4)
    assert embedding_config(1, 64, 132) == EmbeddingConfig(1, 64, 1)
    assert embedding_config(130, 128, 1) == EmbeddingConfig(256, 128, 16)


def flags(batch: int, n: int, share: float = 0.5) -> torch.Tensor:
    return torch.rand(batch, n, generator=torch.Generator().manual_seed(n)) < share


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8], ids=["bool", "uint8"])
@pytest.mark.parametrize(
    ("batch", "n"),
    [(0, 5), (1, 0), (3, 0), (1, 1), (4, 2), (5, 63), (2, 1024), (3, 1025), (1, 8192), (2, 8193), (3, 20000)],
)
def test_compact_equals_its_twin(guards, batch, n, kind):
    flag = flags(batch, n, 0.4)
    assert_compact(guards, flag if kind == torch.bool else flag.to(kind) * 7)


@pytest.mark.parametrize("n", [1, 1000, 9000])
def test_compact_of_none_and_of_all(guards, n):
    assert_compact(guards, torch.tensor([[False], [True], [False]]).expand(3, n))


@pytest.mark.parametrize("capacity", [0, 1, 7, 500, 4000])
@pytest.mark.parametrize("n", [2050, 600, 0])
def test_compact_keeps_the_first(guards, n, capacity):
    assert_compact(guards, flags(3, n), capacity, config=CompactConfig(256, 1))


def test_compact_of_two_million_flags(guards):
    """Compact them as one list, and as 256."""
    flag = flags(256, 8192, 0.01)
    assert_compact(guards, flag.view(1, -1), 50_000)
    assert_compact(guards, flag, 128)


@settings(max_examples=40 if DEVICE == "cuda" else 20, deadline=None)
@given(
    st.integers(1, 4).flatmap(
        lambda n: st.lists(st.lists(st.booleans(), min_size=25 * n, max_size=25 * n), max_size=4)
    ),
    st.none() | st.integers(0, 120),
    st.sampled_from([1, 4, 16, 128]),
)
def test_compact_of_any_flags_in_any_chunks(rows, capacity, block):
    guards = Guards(DEVICE)
    flag = torch.tensor(rows, dtype=torch.bool).view(len(rows), -1 if rows else 3)
    assert_compact(guards, flag, capacity, config=CompactConfig(block, 1))
    guards.check()


@pytest.mark.parametrize(("n", "launches"), [(0, 1), (1024, 1), (8192, 1), (8193, 2)])
def test_compact_launches_once_while_a_block_holds_a_row(n, launches):
    with recording() as recorded:
        compact(torch.empty((3, n), dtype=torch.bool, device="meta"))
    assert len(recorded) == launches and recorded[-1].grid == (3, launches)
    assert compact_config(n).BLOCK_N == (1024 if n <= 1024 else 8192)


def test_compact_takes_its_capacity_from_out(device):
    flag = torch.tensor([[True, False, True, True], [False, False, False, True]], device=device)
    for ops in (compact, twin.compact):
        out = torch.empty((2, 2), dtype=torch.int32, device=device), torch.empty(2, dtype=torch.int32, device=device)
        rows, count = ops(flag, out=out)
        assert rows.tolist() == [[0, 2], [3, -1]] and count.tolist() == [2, 1]


def test_indices_are_checked_in_debug_mode(device, monkeypatch):
    monkeypatch.setenv("SFS_TRITON_DEBUG", "1")
    table, tokens = torch.ones(4, 8, device=device), torch.tensor([[0, 3]], device=device)
    embedding(table, tokens, torch.tensor([[-1, 1]], device=device))
    with pytest.raises(ValueError, match=r"tokens holds values in \[0, 4\]"):
        embedding(table, tokens.clamp(min=0) + tokens // 3)
    with pytest.raises(ValueError, match=r"position holds values in \[0, 2\]"):
        embedding(table, tokens, torch.tensor([[0, 2]], device=device))
    with pytest.raises(ValueError, match=r"position holds values in \[-2, 0\]"):
        embedding(table, tokens, torch.tensor([[0, -2]], device=device))


def test_embedding_refuses_what_it_cannot_take(device):
    table, tokens = torch.ones(4, 8, device=device), torch.zeros(2, 3, dtype=torch.int64, device=device)
    for message, call in {
        "table has shape": lambda: embedding(table[0], tokens),
        "table has dtype int64": lambda: embedding(table.long(), tokens),
        "table has 0 rows": lambda: embedding(table[:0], tokens),
        "table has 0 columns": lambda: embedding(table[:, :0], tokens),
        "table has strides": lambda: embedding(torch.ones(8, 4, device=device).T, tokens),
        "tokens has dtype float32": lambda: embedding(table, tokens.float()),
        "tokens has shape": lambda: embedding(table, tokens[0]),
        "tokens is on device 'meta'": lambda: embedding(table, tokens.to("meta")),
        "tokens has 0 columns, and positions": lambda: embedding(table, tokens[:, :0], tokens),
        "position has shape": lambda: embedding(table, tokens, tokens[:1]),
        "position has dtype bool": lambda: embedding(table, tokens, tokens.bool()),
        "out has shape": lambda: embedding(table, tokens, out=table),
        "out has dtype float16": lambda: embedding(table, tokens, out=torch.ones(2, 3, 8, device=device).half()),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_compact_refuses_what_it_cannot_take(device):
    flag = torch.ones((2, 4), dtype=torch.bool, device=device)
    rows, count = (torch.ones(shape, dtype=torch.int32, device=device) for shape in ((2, 4), (2,)))
    for message, call in {
        "flag has dtype int32": lambda: compact(rows),
        "flag has shape": lambda: compact(flag[0]),
        "flag has strides": lambda: compact(flag[:, ::2]),
        "flag is a list": lambda: compact([True]),
        "capacity is -1": lambda: compact(flag, capacity=-1),
        "capacity is 268435457": lambda: compact(flag, capacity=2**28 + 1),
        r"out\[0\] has shape": lambda: compact(flag, capacity=3, out=(rows, count)),
        r"out\[0\] has dtype int64": lambda: compact(flag, out=(rows.long(), count)),
        r"out\[0\] has strides": lambda: compact(flag, out=(rows.T.contiguous().T, count)),
        r"out\[1\] has shape": lambda: compact(flag, out=(rows, rows)),
        r"out\[1\] is on device 'meta'": lambda: compact(flag, out=(rows, count.to("meta"))),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
