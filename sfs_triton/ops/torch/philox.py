"""Counter-based random numbers (Philox 4x32-10; Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).

A draw depends only on its key and counter, never on batch composition, tile sizes or the order of evaluation.
"""

from __future__ import annotations

import torch

from . import blocks

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _multiply(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32-bit words of ``a * b`` for 32-bit values held in int64, where the product's 64 bits wrap."""
    product = a * b
    high = (product >> 32).bitwise_and_(_MASK)
    return high, product.bitwise_and_(_MASK)


def philox(seed: torch.Tensor, c0: torch.Tensor, c1: torch.Tensor, c2: torch.Tensor) -> torch.Tensor:
    """First output word in ``[0, 2**32)`` for 64-bit ``seed`` and counter ``(c0, c1, c2, 0)``; arguments broadcast, no
    sooner than they have to."""
    words = [c0 & _MASK, c1 & _MASK, c2 & _MASK, torch.zeros_like(c0)]
    key = [seed & _MASK, (seed >> 32) & _MASK]
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], words[0])
        high1, low1 = _multiply(_MULTIPLIERS[1], words[2])
        words = [high1 ^ (words[1] ^ key[0]), low1, high0 ^ (words[3] ^ key[1]), low0]
        key = [(k + w) & _MASK for k, w in zip(key, _WEYL, strict=True)]
    return words[0]


def gumbel(seed: torch.Tensor, token: torch.Tensor, position: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise in float32, keyed by (sequence seed, token id, position, step); arguments broadcast."""
    uniform = (philox(seed, token, position, step) >> 8).float().add_(0.5).mul_(2.0**-24)
    uniform.clamp_(max=1 - 2.0**-24)  # the largest word and a half rounds to 2**24, and 1 would be infinite noise
    return uniform.log_().neg_().log_().neg_()


def gumbel_max(
    logits: torch.Tensor,
    *,
    temperature: torch.Tensor | None,
    seed: torch.Tensor,
    position: torch.Tensor,
    step: torch.Tensor,
    vocab_start: int = 0,
    skip_nan: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest of ``logits [T, v] + temperature * noise`` in each row, and its column, int64 ``[T]``.

    The noise of column ``c`` is that of token id ``vocab_start + c``; without ``temperature [T]`` it is added as it is.
    Ties go to the first column. NaN counts as the largest number, or with ``skip_nan`` as minus infinity.
    """
    best = column = None
    for at in blocks.blocks(logits.shape[1], logits.shape[0], blocks.NOISE):
        ids = torch.arange(vocab_start + at.start, vocab_start + at.stop, device=logits.device)
        noise = gumbel(seed[:, None], ids, position[:, None], step[:, None])
        keys = logits[:, at] + (noise if temperature is None else noise * temperature[:, None])
        if skip_nan:
            keys.masked_fill_(keys.isnan(), float("-inf"))
        largest, index = keys.max(-1)
        if best is None:
            best, column = largest, index
            continue
        better = (largest > best) | (largest.isnan() & ~best.isnan())
        best, column = torch.where(better, largest, best), torch.where(better, at.start + index, column)
    return best, column
