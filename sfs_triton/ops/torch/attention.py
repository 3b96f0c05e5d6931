"""Bidirectional attention of some queries over cached keys and values, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


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
    mask = None
    if key_range is not None:
        at = torch.arange(k.shape[1], device=q.device)
        first, stop, first_2, stop_2 = key_range[:, :, None].unbind(1)
        inside = ((at >= first) & (at < stop)) | ((at >= first_2) & (at < stop_2))
        k, v = (x.masked_fill(~inside[:, :, None, None], 0) for x in (k, v))
        mask = inside[:, None, None, :]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    if mask is not None:
        out = out.masked_fill(~mask.any(-1, keepdim=True), 0)  # some of torch's backends give NaN
    return out.transpose(1, 2)
