"""Bidirectional attention of some queries over cached keys and values, in plain torch."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F

_HALF = (torch.float16, torch.bfloat16)


def sdpa_kernel(dtype: torch.dtype, head_dim: int, *, masked: bool, capability: tuple[int, int], flash: bool) -> str:
    """Name the kernel of torch to call on a GPU: ``"flash"``, ``"efficient"``, or ``"any"``, which leaves it to torch.

    torch itself may take cuDNN, which builds a plan for every new shape (0.04 to 0.4 s), and exact steps have new
    shapes nearly always.

    Args:
        masked: flash attention takes no mask.
        capability: compute capability of the GPU.
        flash: this build of torch has flash attention.
    """
    tensor_cores = dtype in _HALF and capability >= (8, 0)
    if tensor_cores and flash and not masked and head_dim % 8 == 0 and head_dim <= 256:
        return "flash"
    if dtype == torch.float32 and head_dim % 4 == 0:
        return "efficient"
    if (tensor_cores or dtype == torch.float16) and head_dim % 8 == 0:
        return "efficient"
    return "any"


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cache_row: torch.Tensor | None = None,
    key_range: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """``softmax(q k^T scale) v`` for every head, ``[b, n, H, D]``; without a causal mask, grouped-query if ``H > Hkv``.

    Args:
        q: ``[b, n, H, D]``.
        k, v: ``[B, L, Hkv, D]``.
        cache_row: index ``[b]`` of each batch row in ``k`` and ``v``; None is ``0..b-1``.
        key_range: ``[b, 4]``; a batch row's keys are the union of ``[r[0], r[1])`` and ``[r[2], r[3])`` within
            ``[0, L)``. None: all. A query without any key gives zeros. What other keys and values hold has no effect.
        count: only the first ``count[b]`` queries of a batch row are wanted (all are computed here).
        counters: of no use here.
        scale: ``D ** -0.5`` if None.
    """
    if cache_row is not None:
        k, v = k[cache_row], v[cache_row]
    elif k.shape[0] > q.shape[0]:
        k, v = k[: q.shape[0]], v[: q.shape[0]]
    inside = None
    if key_range is not None:
        at = torch.arange(k.shape[1], device=q.device)
        first, stop, first_2, stop_2 = key_range[:, :, None].unbind(1)
        inside = ((at >= first) & (at < stop)) | ((at >= first_2) & (at < stop_2))
        k, v = (x.masked_fill(~inside[:, :, None, None], 0) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.is_cuda:
        out = attend_on_gpu(q, k, v, inside, scale, _kernel(q, inside is not None))
    else:
        mask = None if inside is None else inside[:, None, None, :]
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
    if inside is not None:
        out = out.masked_fill(~inside.any(-1)[:, None, None, None], 0)  # some of torch's kernels give NaN
    return out.transpose(1, 2)


def _kernel(q: torch.Tensor, masked: bool) -> str:
    capability, flash = _gpu(q.device)
    return sdpa_kernel(q.dtype, q.shape[-1], masked=masked, capability=capability, flash=flash)


@lru_cache
def _gpu(device: torch.device) -> tuple[tuple[int, int], bool]:
    if torch.version.hip:
        return (0, 0), False
    return torch.cuda.get_device_capability(device), torch.backends.cuda.is_flash_attention_available()


def attend_on_gpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    inside: torch.Tensor | None,
    scale: float | None,
    kernel: str,
) -> torch.Tensor:
    """:func:`attention` of ``q [b, H, n, D]`` over ``k, v [b, Hkv, L, D]`` by a kernel that :func:`sdpa_kernel` names.

    ``inside`` ``[b, L]`` marks the keys of each batch row; None: all.
    """
    empty = not q.numel() or not k.numel()
    if kernel == "flash" and not empty:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0]
    if q.shape[1] != k.shape[1]:  # the other kernels know no groups, and torch's own choice would be its slowest
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    if kernel == "any" or empty:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=None if inside is None else inside[:, None, None, :], scale=scale
        )
    bias = None
    if inside is not None:
        bias = torch.zeros(inside.shape, dtype=q.dtype, device=q.device).masked_fill_(~inside, float("-inf"))
        n_keys = bias.shape[1]
        bias = F.pad(bias, (0, -n_keys % 16))[:, :n_keys]  # the kernel reads aligned rows
        bias = bias[:, None, None, :].expand(q.shape[0], q.shape[1], q.shape[2], n_keys)
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, False, scale=scale)[0]
