"""Products whose results lie in memory that is kept."""

from __future__ import annotations

import threading

import pytest
import torch

from sfs_triton.ops.torch.fused_linear import Scratch, linear_heads, linear_normed, linear_silu_mul, product
from sfs_triton.ops.torch.rope_cache import rope_tables


def some(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bias", [None, some(24, seed=3)], ids=["", "bias"])
@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("x", [some(1, 9, 16, seed=1), some(2, 9, 16, seed=1)[:, 2:7], some(0, 16, seed=1)])
def test_results_are_those_without_it(x, by_column, bias):
    weight, scratch = some(24, 16, seed=2), Scratch()
    if by_column:
        weight = weight.t().contiguous().t()
    wanted = product(x, weight, bias)
    for _ in range(2):
        torch.testing.assert_close(product(x, weight, bias, scratch=scratch, name="x"), wanted)


def test_every_fused_product_takes_it():
    x, scratch = some(1, 6, 16, seed=1), Scratch()
    heads, gate_up, down = some(3 * 16, 16, seed=2), some(40, 16, seed=3), some(16, 20, seed=4)
    tables = rope_tables(6, 8, 1e4, x.device)

    def results(**own: Scratch) -> list[torch.Tensor]:
        attended = linear_heads(x, heads, None, *tables, None, n_heads=2, n_kv_heads=2, **own)
        gated = linear_silu_mul(x, gate_up, **own)
        return [*attended, gated, linear_normed(gated, down, x.clone(), x[0, 0], 1e-5, **own)]

    torch.testing.assert_close(results(scratch=scratch), results())


def test_memory_is_kept_by_name_and_by_thread():
    scratch, like = Scratch(), torch.empty(0)
    with torch.inference_mode():
        first = scratch.take("a", 4, 6, like)
    assert scratch.take("a", 2, 5, like).data_ptr() == first.data_ptr()
    assert scratch.take("b", 4, 6, like).data_ptr() != first.data_ptr()
    scratch.take("a", 4, 6, like).fill_(1)  # outside of inference mode
    assert scratch.take("a", 4, 6, like.double()).dtype == torch.float64
    mine, theirs = scratch.take("a", 4, 6, like), []
    thread = threading.Thread(target=lambda: theirs.append(scratch.take("a", 4, 6, like)))
    thread.start()
    thread.join()
    assert theirs[0].data_ptr() != mine.data_ptr()
