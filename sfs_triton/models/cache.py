"""What a model keeps between forwards, and which part of the canvas a forward covers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .spec import ModelSpec


@dataclass(frozen=True)
class Scope:
    """One forward over the rows ``[first, stop)`` of a canvas, attending to the keys ``[0, keys)``.

    ``store`` writes the rows' keys and values to the cache, from which those of all other keys are read. ``features``
    asks for a forward over cached features instead (dLLM-Cache): whether prompt and response are recomputed.
    """

    first: int
    stop: int
    keys: int
    store: bool = False
    features: tuple[bool, bool] | None = None

    @property
    def rows(self) -> int:
        return self.stop - self.first

    def recomputed(self, prompt: int, ratio: float) -> int:
        """How many rows go through the layers; over cached features, those of the parts that are due."""
        if self.features is None:
            return self.rows
        response = self.stop - prompt
        return prompt * self.features[0] + (response if self.features[1] else int(response * ratio))


class KVCache:
    """Keys (rotated) and values of every layer, ``[layers, B, Hkv, L, D]`` each, allocated once."""

    def __init__(self, spec: ModelSpec, batch: int, length: int, device: torch.device, dtype: torch.dtype):
        shape = (spec.n_layers, batch, spec.n_kv_heads, length, spec.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)

    def store(self, layer: int, batch_rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Where ``rope_cache`` stores a layer's keys and values, ``[B, L, Hkv, D]``, for these rows of the batch."""
        return {
            "k_cache": self.k[layer].transpose(1, 2),
            "v_cache": self.v[layer].transpose(1, 2),
            "cache_row": batch_rows,
        }


class FeatureCache:
    """dLLM-Cache's store: keys (unrotated) and values, attention and MLP outputs of every layer and position."""

    def __init__(self, spec: ModelSpec, batch: int, length: int, device: torch.device, dtype: torch.dtype):
        def empty(width: int) -> torch.Tensor:
            return torch.zeros((spec.n_layers, batch, length, width), device=device, dtype=dtype)

        self.k, self.v = empty(spec.kv_width), empty(spec.kv_width)
        self.attention, self.mlp = empty(spec.d_model), empty(spec.d_model)
