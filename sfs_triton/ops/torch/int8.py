"""Products with int8 weights on a CPU: activations are rounded to int8 as well, and sums are exact in 32 bits."""

from __future__ import annotations

import functools
import time

import torch

from . import blocks

LARGEST = 127
_SUMS = 2**20  # sums of a block: they are scaled while they are in the cache


def int8_linear(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Near ``x @ (codes * scale[:, None])^T`` for ``x [T, K]``, int8 ``codes [N, K]`` and float32 ``scale [N]``.

    Each row of ``x`` is rounded to 255 steps of its own, so an element is off by at most a 254th of the row's largest
    magnitude. Sums of codes are exact; two float32 products scale them. A row with NaN or infinities gives NaN.
    """
    steps, size = quantise_rows(x)
    out = x.new_empty(x.shape[0], codes.shape[0])
    for rows in blocks.blocks(codes.shape[0], x.shape[0], _SUMS):
        out[:, rows].copy_(torch._int_mm(steps, codes[rows].t())).mul_(size).mul_(scale[rows])
    return out


def quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 ``[T, K]`` and a float32 size of their steps ``[T, 1]``: ``x`` is near the product."""
    wide = x.float()
    size = wide.abs().amax(-1, keepdim=True).div_(LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)
    return (wide / size).round_().to(torch.int8), size


@functools.cache
def int8_speed() -> float | None:
    """Return how many times as fast as float32's an int8 product is on this CPU, None if its sums are not exact.

    Without instructions for them (VNNI, AMX), oneDNN adds pairs of products in 16 bits, which saturate.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    x, codes = (
        torch.randint(-LARGEST, LARGEST + 1, (n, 512), generator=generator, device="cpu").char() for n in (64, 512)
    )
    x[0], codes[0], codes[1] = LARGEST, LARGEST, -LARGEST
    wide, weights = x.float(), codes.float()
    if not torch.equal(torch._int_mm(x, codes.t()).double(), wide.double() @ weights.double().t()):
        return None

    def least(product) -> float:
        taken = []
        for _ in range(5):
            began = time.perf_counter()
            product()
            taken.append(time.perf_counter() - began)
        return min(taken)

    return least(lambda: wide @ weights.t()) / least(lambda: torch._int_mm(x, codes.t()))
