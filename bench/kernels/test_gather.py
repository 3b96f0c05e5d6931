"""Embedding rows for a scope and compaction of flags: kernel, eager torch and torch.compile."""

from __future__ import annotations

from functools import partial

import torch

from sfs_triton.kernels.gather import compact, compact_cost, embedding, embedding_cost
from sfs_triton.ops.torch import gather as twin

from .case import Case, geometries, random
from .harness import benchmark_of


def _build_embedding(device: torch.device, *, geometry, length: int, n_rows: int | None, dtype: torch.dtype) -> dict:
    scope = {} if n_rows is None else {"position": torch.randint(length, (1, n_rows), device=device, dtype=torch.int32)}
    return {
        "table": random(geometry.vocab_size, geometry.d_model, device=device, dtype=dtype),
        "tokens": torch.randint(geometry.vocab_size, (1, length), device=device),
        **scope,
    }


def _build_compact(device: torch.device, *, batch: int, n: int, capacity: int) -> dict:
    return {"flag": torch.rand((batch, n), device=device) < 0.5, "capacity": capacity}


def cases(toy: bool = False) -> list[Case]:
    length, n_rows = (40, 8) if toy else (2124, 128)
    dtype = torch.float32 if toy else torch.bfloat16
    rows = [
        Case(
            name=f"{name}-embedding-{'canvas' if n is None else n}",
            kernel=embedding,
            twin=twin.embedding,
            build=partial(_build_embedding, geometry=geometry, length=length, n_rows=n, dtype=dtype),
            cost=embedding_cost(n or length, geometry.d_model, dtype.itemsize),
        )
        for name, geometry in geometries(toy).items()
        for n in (None, n_rows)
    ]
    sizes = [(1, 100, 16), (3, 40, 40)] if toy else [
        (1, 1024, 128), (1, 8192, 8192), (16, 4096, 128), (1, 256 * 8192, 256 * 128)
    ]  # fmt: skip
    lists = [
        Case(
            name=f"{'toy-' if toy else ''}compact-{batch}x{n}-{capacity}",
            kernel=compact,
            twin=twin.compact,
            build=partial(_build_compact, batch=batch, n=n, capacity=capacity),
            cost=compact_cost(batch, n, capacity),
        )
        for batch, n, capacity in sizes
    ]
    return rows + lists


test_gather = benchmark_of(cases)
