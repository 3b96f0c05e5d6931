"""Products with the weights of a layer and the operations next to them, in plain torch: one operation after another."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .linear import Matrix, linear
from .norm import rms_norm
from .rope_cache import rope_cache

Heads = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


class Scratch(threading.local):
    """Memory for results that the next layer replaces, of each thread: a CPU's page faults cost 7% of a step.

    The C library returns large blocks to the system whenever they are freed, and gets them again page by page.
    """

    def __init__(self) -> None:
        self._kept: dict[object, tuple[torch.Tensor, torch.Tensor]] = {}

    def take(self, name: object, rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
        """Return ``[rows, columns]``, undefined, in the memory of the last result of this name."""
        kept, last = self._kept.get(name, (None, None))
        if last is not None and last.shape == (rows, columns) and last.dtype == like.dtype:
            return last  # that of the layer before, mostly
        with torch.inference_mode(False):  # a tensor of inference mode cannot be written to outside of it
            if kept is None or kept.numel() < rows * columns or kept.dtype != like.dtype:
                kept = torch.empty(rows * columns, dtype=like.dtype, device=like.device)
            last = kept[: rows * columns].view(rows, columns)
        self._kept[name] = kept, last
        return last


def product(
    x: torch.Tensor,
    matrix: Matrix,
    bias: torch.Tensor | None = None,
    *,
    quantised: Callable[..., torch.Tensor] = linear,
    scratch: Scratch | None = None,
    name: object = None,
) -> torch.Tensor:
    """``x @ matrix^T``, plus ``bias``: ``[..., K]`` to ``[..., N]``.

    A plain matrix is multiplied by torch's libraries, a quantised one by the function ``quantised``. With ``scratch``,
    the result of a plain one is valid until the next of this ``name``.
    """
    if isinstance(matrix, torch.Tensor):
        if scratch is not None:
            flat = x.reshape(-1, x.shape[-1])
            out = scratch.take(name, len(flat), len(matrix), x)
            if bias is None:
                torch.mm(flat, matrix.t(), out=out)
            else:
                torch.addmm(bias, flat, matrix.t(), out=out)
            return out.view(*x.shape[:-1], len(matrix))
        if x.dim() == 3 and x.shape[0] == 1:  # torch multiplies a slice of three dimensions by its slow batched product
            return F.linear(x[0], matrix, bias)[None]
        return F.linear(x, matrix, bias)
    flat = x.reshape(-1, x.shape[-1])
    added = None if bias is None else bias.expand(flat.shape[0], -1)
    out = quantised(flat, matrix.codes, matrix.scale, matrix.zero, residual=added)
    return out.view(*x.shape[:-1], out.shape[-1])


def linear_heads(
    x: torch.Tensor,
    matrix: Matrix,
    bias: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position: torch.Tensor | None,
    *,
    n_heads: int,
    n_kv_heads: int,
    counters: torch.Tensor | None = None,
    scratch: Scratch | None = None,
    **store: torch.Tensor | None,
) -> Heads:
    """Queries, keys and values of ``x [b, n, d]``, rotated, and stored in caches if there are any.

    Args:
        x: ``[b, n, d]``, or what :func:`linear_normed` returns.
        matrix, bias: of ``(n_heads + 2 n_kv_heads) D`` rows: queries, keys, values. Either number may be 0.
        cos, sin, position, store: as for :func:`~sfs_triton.ops.torch.rope_cache.rope_cache`.
        counters: of no use here.
        scratch: results are valid until the next of as many heads.

    Returns:
        As ``rope_cache`` does.
    """
    x = product(x, matrix, bias, scratch=scratch, name=(n_heads, n_kv_heads))
    return rotated_heads(x, rope_cache, cos, sin, position, n_heads, n_kv_heads, **store)


def rotated_heads(
    x: torch.Tensor,
    rotate: Callable[..., Heads],
    cos: torch.Tensor,
    sin: torch.Tensor,
    position: torch.Tensor | None,
    n_heads: int,
    n_kv_heads: int,
    **store: torch.Tensor | None,
) -> Heads:
    """Split ``x [b, n, heads D]`` into heads; ``rotate`` those of queries and keys, and store keys and values."""
    x = x.unflatten(-1, (n_heads + 2 * n_kv_heads, -1))
    if n_kv_heads == 0:
        return rotate(x, None, None, cos, sin, position)
    if n_heads and not store:  # queries and keys in one call
        qk, v = x.split((n_heads + n_kv_heads, n_kv_heads), 2)
        q, k = rotate(qk, None, None, cos, sin, position)[0].split((n_heads, n_kv_heads), 2)
        return q, k, v
    q, k, v = x.split((n_heads, n_kv_heads, n_kv_heads), 2)
    return rotate(q if n_heads else None, k, v, cos, sin, position, **store)


def linear_normed(
    x: torch.Tensor,
    matrix: Matrix,
    residual: torch.Tensor,
    gain: torch.Tensor,
    eps: float,
    *,
    to_product: bool = False,
    counters: torch.Tensor | None = None,
    scratch: Scratch | None = None,
) -> torch.Tensor:
    """``residual += x @ matrix^T``; return ``rms_norm(residual, gain, eps)``.

    Args:
        x: ``[..., K]``.
        residual: ``[..., N]``, dense; changed in place.
        to_product: the result goes to :func:`linear_heads` or :func:`linear_silu_mul` alone, so the norm may be left
            to them to finish. Here it is finished.
        counters: of no use here.
        scratch: for a product that is not added at once; the result is of its own.
    """
    if not isinstance(matrix, torch.Tensor) or x.dtype.itemsize < 4:  # rounded alike, whatever the matrix is
        return rms_norm(product(x, matrix, scratch=scratch, name="added"), gain, eps, residual=residual)
    residual.view(-1, len(matrix)).addmm_(x.reshape(-1, x.shape[-1]), matrix.t())  # a pass over memory less
    return rms_norm(residual, gain, eps)


def linear_silu_mul(
    x: torch.Tensor, matrix: Matrix, *, counters: torch.Tensor | None = None, scratch: Scratch | None = None
) -> torch.Tensor:
    """``silu(gate) * up`` for ``gate, up = (x @ matrix^T).chunk(2, -1)``; ``x`` as for :func:`linear_heads`.

    With ``scratch``, the result is valid until the next.
    """
    gate, up = product(x, matrix, scratch=scratch, name="gate_up").chunk(2, -1)
    return F.silu(gate, inplace=True).mul_(up)  # in place: a new result leaves the cache for memory
