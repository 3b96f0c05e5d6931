"""Rotary embedding of queries and keys, and storing keys and values at their positions, in plain torch."""

from __future__ import annotations

import torch

from . import host


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
    run = None if position is None else _run(position)
    if run is not None:
        cos, sin = cos[run], sin[run]
    elif position is not None:
        at = position.clamp(min=0).flatten()  # idle rows are rotated by the angle of position 0, which is 0
        cos, sin = (table.index_select(0, at).view(*position.shape, table.shape[1]) for table in (cos, sin))
    cos, sin = cos.unsqueeze(-2), sin.narrow(-1, 0, sin.shape[-1] // 2).unsqueeze(-2)
    if q is not None:
        _turn(q, cos, sin)
    if k_cache is None:
        if k is not None:
            _turn(k, cos, sin)
        return q, k, v
    if run is not None and cache_row is None:  # a slice takes a third of the time of an index
        _turned(k, cos, sin, out=k_cache[: k.shape[0], run])
        v_cache[: v.shape[0], run].copy_(v)
        return q, k_cache, v_cache
    pairs = (k_cache, _turned(k, cos, sin)), (v_cache, v)
    if position.dim() == 1 and cache_row is None:
        for cache, fresh in pairs:
            cache[: k.shape[0]].index_copy_(1, position, fresh)
    elif position.dim() == 1:
        for cache, fresh in pairs:
            cache[cache_row[:, None], position] = fresh
    elif v.numel():
        store = store_read if host.reads_are_free(position) else store_unread
        store(pairs, position, cache_row)
    return q, k_cache, v_cache


Pairs = tuple[tuple[torch.Tensor, torch.Tensor], ...]


def _run(position: torch.Tensor) -> slice | None:
    """Return the range of positions that ``[n]`` are one by one; None if they are not, or the host may not read."""
    if position.dim() != 1 or not len(position) or not host.reads_are_free(position):
        return None
    first, last = int(position[0]), int(position[-1])
    return slice(first, last + 1) if bool((position.diff() == 1).all()) else None


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``x``, rotated in float32 (or wider), in ``out`` if that is given; ``sin`` has the first half only."""
    if out is not None and out.dtype not in (torch.float32, torch.float64):
        return out.copy_(_turned(x, cos, sin))
    low, high = x.chunk(2, -1)
    turned = torch.mul(x, cos, out=out)
    low_turned, high_turned = turned.chunk(2, -1)
    low_turned.addcmul_(high, sin, value=-1)
    high_turned.addcmul_(low, sin)
    return turned.to(x.dtype)


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """:func:`_turned`, in place."""
    if x.dtype not in (torch.float32, torch.float64):
        x.copy_(_turned(x, cos, sin))
        return
    (low, high), cos = x.chunk(2, -1), cos.narrow(-1, 0, sin.shape[-1])
    turned = torch.addcmul(low * cos, high, sin, value=-1)
    torch.addcmul(high * cos, low, sin, out=high)
    low.copy_(turned)


def store_read(pairs: Pairs, position: torch.Tensor, cache_row: torch.Tensor | None) -> None:
    """``cache[cache_row, position] = fresh`` for each pair but for idle rows, which the host reads: free on a CPU."""
    for each, places in enumerate(position.long()):
        row = each if cache_row is None else int(cache_row[each])
        live = (places >= 0).nonzero()[:, 0]
        places = places[live]
        for cache, fresh in pairs:
            cache[row].index_copy_(0, places, fresh[each].index_select(0, live))


def store_unread(pairs: Pairs, position: torch.Tensor, cache_row: torch.Tensor | None) -> None:
    """:func:`store_read` without a read by the host.

    An idle row repeats what the first live row of its batch row stores. In a batch row without any, position 0 is
    rewritten with its own values.
    """
    live = position >= 0
    each, itself = (torch.arange(size, device=position.device) for size in position.shape)
    source = torch.where(live, itself, live.byte().argmax(1, keepdim=True))
    target = position.gather(1, source).clamp_(min=0).long()
    any_live = live.any(1)[:, None, None, None]
    row = (each if cache_row is None else cache_row)[:, None]
    for cache, fresh in pairs:
        cache[row, target] = torch.where(any_live, fresh[each[:, None], source], cache[row, target])
