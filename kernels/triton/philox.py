"""Counter-based random numbers for kernels (Philox 4x32-10; Salmon et al., "Parallel random numbers: as easy as 1, 2,
3", 2011). A draw depends only on its key and counter, never on tiles, grids or the order of evaluation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .check import check_tensor, refuse_unless

_MULTIPLIER_0 = tl.constexpr(0xD2511F53)
_MULTIPLIER_1 = tl.constexpr(0xCD9E8D57)
_WEYL_0 = tl.constexpr(0x9E3779B9)
_WEYL_1 = tl.constexpr(0xBB67AE85)
_LARGEST_BELOW_ONE = tl.constexpr(1 - 2.0**-24)


@triton.jit
def philox(seed, token, position, step):
    """First output word (uint32) for 64-bit ``seed`` and counter ``(token, position, step, 0)``.

    Counters count modulo 2^32. Shapes broadcast; products that need one row's values only are computed once per row.
    """
    key0, key1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    word0, word1, word2 = token.to(tl.uint32), position.to(tl.uint32), step.to(tl.uint32)
    word3 = key0 ^ key0
    for _ in tl.static_range(10):
        high0, high1 = tl.umulhi(word0, _MULTIPLIER_0), tl.umulhi(word2, _MULTIPLIER_1)
        low0, low1 = word0 * _MULTIPLIER_0, word2 * _MULTIPLIER_1
        word0, word1 = high1 ^ word1 ^ key0, low1
        word2, word3 = high0 ^ word3 ^ key1, low0
        key0, key1 = key0 + _WEYL_0, key1 + _WEYL_1
    return word0


@triton.jit
def gumbel(seed, token, position, step):
    """Standard Gumbel noise in float32, keyed by (sequence seed, token id, position, step). Always finite."""
    uniform = ((philox(seed, token, position, step) >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08  # 2^-24
    # the addition rounds the largest word up to 1, whose noise would be infinite and win over any logit
    uniform = tl.minimum(uniform, _LARGEST_BELOW_ONE)
    return -tl.log(-tl.log(uniform))


def noise_arguments(
    temperature: torch.Tensor | None,
    keys: dict[str, torch.Tensor | None],
    n_rows: int,
    device: torch.device,
) -> dict[str, torch.Tensor | None]:
    """A launch's ``temperature_ptr``, float32 ``[n_rows]``, and ``seed_ptr``, ``position_ptr`` and ``step_ptr``, int64
    ``[n_rows]``; all None where there is no temperature, and so no noise.

    Raises:
        ValueError: there is a temperature, and it or a key is not as it must be.
    """
    if temperature is None:
        return {"temperature_ptr": None, **{f"{name}_ptr": None for name in keys}}
    check_tensor("temperature", temperature, dtype=torch.float32, shape=[n_rows], device=device)
    for name, key in keys.items():
        refuse_unless(key is not None, f"{name} is None: a temperature needs it")
        check_tensor(name, key, dtype=torch.int64, shape=[n_rows], device=device)
    return {"temperature_ptr": temperature, **{f"{name}_ptr": key for name, key in keys.items()}}
