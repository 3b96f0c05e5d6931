"""Rotary embedding of queries and keys, and storing keys and values at their positions, in plain torch."""

from __future__ import annotations

import torch


def rope_tables(length: int, head_dim: int, theta: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """``(cos, sin)`` in float32, each ``[length, head_dim]``, for the half-split rotary embedding."""
    inverse = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angle = torch.arange(length, dtype=torch.float32, device=device)[:, None] * inverse
    return torch.cat((angle.cos(), angle.cos()), -1), torch.cat((angle.sin(), angle.sin()), -1)


def rope_cache(
    q: torch.Tensor | None,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position: torch.Tensor | None,
    *,
    k_cache: torch.Tensor | None = None,
    v_cache: torch.Tensor | None = None,
    cache_row: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """``x * cos[position] + cat(-x[D/2:], x[:D/2]) * sin[position]`` for ``q`` and ``k``; ``k`` and ``v`` to the cache.

    Args:
        q: queries ``[b, n, H, D]`` or None; overwritten.
        k, v: keys and values ``[b, n, Hkv, D]``, or both None; ``k`` is overwritten unless there are caches.
        cos, sin: float32 tables ``[P, D]``, as :func:`rope_tables` makes them.
        position: canvas positions ``[b, n]``, or ``[n]`` for all batch rows alike. In ``[b, n]`` a row at -1 is idle:
            neither rotated nor stored. No two rows of a batch row have the same position unless they are idle. None:
            the tables ``[n, D]`` are those of the rows, one by one, and there are no caches.
        k_cache, v_cache: ``[B, L, Hkv, D]``; if given, keys and values are stored at ``[cache_row, position]``.
        cache_row: index ``[b]`` of each batch row in the caches; None is ``0..b-1``.

    Returns:
        Rotated queries, keys and values; the last two are the caches if those are given. What is None stays None.
    """
    half = cos.shape[1] // 2
    cos, sin = cos.narrow(1, 0, half), sin.narrow(1, 0, half)
    if position is not None:
        cos, sin = cos[position], sin[position]
        if position.dim() == 2:  # idle rows are rotated by angle 0: cheaper than a selection afterwards
            idle = (position < 0).unsqueeze(-1)
            cos, sin = cos.masked_fill_(idle, 1), sin.masked_fill_(idle, 0)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    if q is not None:
        _turn(q, cos, sin)
    if k is not None and k_cache is None:
        _turn(k, cos, sin)
    if k_cache is None:
        return q, k, v
    pairs = (k_cache, torch.cat(_turned(k, cos, sin), -1).to(k.dtype)), (v_cache, v)
    if position.dim() == 1 and cache_row is None:
        for cache, fresh in pairs:
            cache[: k.shape[0]].index_copy_(1, position, fresh)
    elif position.dim() == 1:
        for cache, fresh in pairs:
            cache[cache_row[:, None], position] = fresh
    elif v.numel():
        _store_live(pairs, position, cache_row)
    return q, k_cache, v_cache


Pairs = tuple[tuple[torch.Tensor, torch.Tensor], ...]


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both halves of ``x``, rotated, in float32 (or wider)."""
    low, high = (x if x.dtype == torch.float64 else x.float()).chunk(2, -1)
    return torch.addcmul(low * cos, high, sin, value=-1), torch.addcmul(high * cos, low, sin)


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """:func:`_turned`, in place."""
    if x.dtype not in (torch.float32, torch.float64):
        x.copy_(torch.cat(_turned(x, cos, sin), -1))
        return
    low, high = x.chunk(2, -1)
    turned = torch.addcmul(low * cos, high, sin, value=-1)
    torch.addcmul(high * cos, low, sin, out=high)
    low.copy_(turned)


def _store_live(pairs: Pairs, position: torch.Tensor, cache_row: torch.Tensor | None) -> None:
    """``cache[cache_row, position] = fresh`` for each pair but for idle rows, without a host read of their number.

    An idle row repeats what the first live row of its batch row stores. In a batch row without any, position 0 is
    rewritten with its own values.
    """
    live = position >= 0
    each, itself = (torch.arange(size, device=position.device) for size in position.shape)
    source = torch.where(live, itself, live.byte().argmax(1, keepdim=True))
    target = position.gather(1, source).clamp_(min=0).long()
    any_live = live.any(1)[:, None, None, None]
    if cache_row is None and len(position) == 1:  # on a CPU a third of the time of an index of two tensors
        for cache, fresh in pairs:
            kept, taken = cache[0].index_select(0, target[0]), fresh[0].index_select(0, source[0])
            cache[0].index_copy_(0, target[0], torch.where(any_live[0], taken, kept))
        return
    row = (each if cache_row is None else cache_row)[:, None]
    for cache, fresh in pairs:
        cache[row, target] = torch.where(any_live, fresh[each[:, None], source], cache[row, target])
