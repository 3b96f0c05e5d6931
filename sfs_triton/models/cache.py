"""Caches between forwards, and the part of the canvas that a forward covers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from .spec import ModelSpec


class Features(NamedTuple):
    """A forward over cached features (dLLM-Cache): whether prompts and responses are recomputed as a whole, or else
    the share ``ratio`` of a response's rows. ``shortest`` and ``longest`` are the batch's extreme prompt lengths."""

    prompt: bool
    response: bool
    ratio: float
    shortest: int
    longest: int

    def moved(self, length: int) -> int:
        """Return the most response rows that a step recomputes when responses are not due, for ``length`` positions."""
        return int((length - self.shortest) * self.ratio)


@dataclass(frozen=True, eq=False)
class Scope:
    """Positions of each canvas that one forward covers, and the keys that they attend to.

    The host knows ``[first, stop)`` and ``[0, keys)``, which are equal for the whole batch. Values unknown to the host
    are in tensors that kernels read by pointer; they never change a shape.

    Args:
        first, stop: the positions, if there is no list of them.
        keys: one past the last position whose keys may be read.
        rows: int32 ``[b, n]``, a list of rows, -1 idle; their keys and values are stored.
        count: int32 ``[b]``, number of rows that are not idle; results of idle rows are undefined.
        key_range: int32 ``[b, 4]``, two ranges of keys of each canvas; None: ``[0, keys)``.
        counters: int32 zeros for counts of finished parts, left zero; concurrent forwards must not share them.
            Attention needs ``b * n_kv_heads * ceil(n * group / 16)`` of them, products of few rows one per 128 columns.
        batch: int64 ``[b]``, the canvases' rows in the cache; None: all of it.
        store: put the rows' keys and values into the cache, from which those of all other positions are read.
        features: recompute from a :class:`FeatureCache` instead.
        prompt: int64 ``[b]``, prompt lengths, for ``features``.
    """

    first: int
    stop: int
    keys: int
    rows: torch.Tensor | None = None
    count: torch.Tensor | None = None
    key_range: torch.Tensor | None = None
    counters: torch.Tensor | None = None
    batch: torch.Tensor | None = None
    store: bool = False
    features: Features | None = None
    prompt: torch.Tensor | None = None


class Vectors(NamedTuple):
    """Vectors that replace the embeddings of tokens: ``vectors [b, L, d]`` at positions ``here``, bool ``[b, L]``."""

    here: torch.Tensor
    vectors: torch.Tensor

    def of(self, batch: torch.Tensor | None) -> Vectors:
        """Return those of the canvases ``batch``, or all if that is None."""
        return self if batch is None else Vectors(self.here[batch], self.vectors[batch])

    def replace_in(self, x: torch.Tensor, rows: torch.Tensor | None, first: int) -> torch.Tensor:
        """Return embeddings ``x [b, n, d]``, of listed rows or those from ``first`` on, with the replaced ones."""
        if rows is None:
            part = slice(first, first + x.shape[1])
            here, vectors = self.here[:, part], self.vectors[:, part]
        else:
            at = rows.clamp(min=0).long()
            here = self.here.gather(1, at) & (rows >= 0)
            vectors = self.vectors.gather(1, at[..., None].expand_as(x))
        return torch.where(here[..., None], vectors, x)


class KVCache:
    """Keys (rotated) and values of every layer and position, ``[layers, B, Hkv, L, D]`` each, allocated once."""

    def __init__(self, spec: ModelSpec, batch: int, length: int, device: torch.device, dtype: torch.dtype):
        shape = (spec.n_layers, batch, spec.n_kv_heads, length, spec.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)

    @staticmethod
    def values(spec: ModelSpec, length: int) -> int:
        """Count the values that a canvas of ``length`` takes."""
        return 2 * spec.n_layers * spec.kv_width * length

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's keys and values, ``[B, L, Hkv, D]``."""
        return self.k[index].transpose(1, 2), self.v[index].transpose(1, 2)


class FeatureCache:
    """dLLM-Cache's store: keys (rotated) and values, attention and MLP outputs of every layer and position.

    ``[layers, B, L + 1, width]`` each; idle rows are written to the spare place at the end.
    """

    def __init__(self, spec: ModelSpec, batch: int, length: int, device: torch.device, dtype: torch.dtype):
        def empty(width: int) -> torch.Tensor:
            return torch.zeros((spec.n_layers, batch, length + 1, width), device=device, dtype=dtype)

        self.spare = length
        self.k, self.v = empty(spec.kv_width), empty(spec.kv_width)
        self.attention, self.mlp = empty(spec.d_model), empty(spec.d_model)

    @staticmethod
    def values(spec: ModelSpec, length: int) -> int:
        """Count the values that a canvas of ``length`` takes."""
        return 2 * spec.n_layers * (spec.kv_width + spec.d_model) * (length + 1)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.k, self.v, self.attention, self.mlp
