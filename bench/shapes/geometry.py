"""Shapes of large models: their specs, tensors by their parts, random weights, and a model's weights made in place."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import replace

import torch

from sfs_triton import ArgumentError
from sfs_triton.models import ModelSpec, Weights
from sfs_triton.models.geometries import REAL
from sfs_triton.models.names import LLADA_NAMES, LLAMA_NAMES, expected_shapes
from sfs_triton.models.weights import LayerWeights


def _toy(family: str, n_layers: int, d_model: int, heads: tuple[int, int], **rest) -> ModelSpec:
    sizes = {"d_model": d_model, "n_heads": heads[0], "n_kv_heads": heads[1], "mlp": 896, "vocab_size": 2000}
    ids = {name: getattr(REAL["illada-8b"], name) for name in ("mask_id", "eos_id", "pad_id")}
    return replace(REAL["llada-8b"], family=family, n_layers=n_layers, **sizes, **ids, **rest)


TOYS = {  # for tests of inflation
    "toy-512": _toy("llada", 4, 512, (16, 16)),  # no layer more
    "toy-768": _toy("llada", 5, 768, (12, 12)),  # more of everything
    "toy-1024": _toy("llada", 5, 1024, (8, 8)),  # all factors are powers of two, as in the real ones
    "toy-tied": _toy("illada", 5, 1024, (32, 16), tied_head=True),
}
GEOMETRIES = {**REAL, **TOYS}


def geometry_spec(geometry: str | ModelSpec, small: ModelSpec) -> ModelSpec:
    """The spec of a geometry by name, with the special tokens of ``small``; one that is a spec already stays it."""
    if isinstance(geometry, ModelSpec):
        return geometry
    if geometry not in GEOMETRIES:
        raise ArgumentError(f"geometry={geometry!r} is not one of {tuple(GEOMETRIES)}")
    ids = {key: getattr(small, key) for key in ("mask_id", "eos_id", "pad_id", "bos_id", "other_ends")}
    return replace(GEOMETRIES[geometry], **ids)


LAYER_PARTS = ("attn_norm", "q", "k", "v", "o", "mlp_norm", "gate", "up", "down")
Fill = Callable[[torch.Tensor, str, int | None], None]  # write a part of a layer into a tensor


def layout(spec: ModelSpec) -> dict[tuple[str, int | None], tuple[str, tuple[int, ...]]]:
    """Map every part of every layer (None: of the model) to its tensor's name in a checkpoint, and its shape."""
    names = LLADA_NAMES if spec.family == "llada" else LLAMA_NAMES
    found = {(part, None): names[part] for part in ("embedding", "norm", "head")}
    for layer in range(spec.n_layers):
        for part in LAYER_PARTS:
            name = names["layer"].format(layer=layer) + names[part]
            bare = part in ("q", "k", "v")
            found[part, layer] = f"{name}.weight" if bare else name
            if bare:
                found[f"{part}_bias", layer] = f"{name}.bias"
    shapes = expected_shapes(spec, names)
    return {place: (name, shapes[name]) for place, name in found.items() if name in shapes}


def randomise(out: torch.Tensor, part: str, layer: int | None, seed: int) -> None:
    """Random weights of usual size: the same for the same seed, part and layer on the same kind of device."""
    if out.is_meta:
        return
    generator = torch.Generator(out.device).manual_seed(zlib.crc32(f"{seed} {part} {layer}".encode()))
    if "norm" in part:
        out.uniform_(0.5, 1.5, generator=generator)
    else:
        out.normal_(0.0, out.shape[-1] ** -0.5, generator=generator)


def parameters(spec: ModelSpec) -> int:
    """Count the weights of a checkpoint of the spec."""
    return sum(math.prod(shape) for _, shape in layout(spec).values())


def assemble(spec: ModelSpec, fill: Fill, device: torch.device, dtype: torch.dtype) -> Weights:
    """The fused weights of a spec, each allocated once and filled part by part in place."""
    places = layout(spec)

    def make(layer: int | None, *parts: str) -> torch.Tensor:
        shapes = [places[part, layer][1] for part in parts]
        out = torch.empty((sum(s[0] for s in shapes), *shapes[0][1:]), device=device, dtype=dtype)
        for piece, part in zip(out.split([s[0] for s in shapes]), parts, strict=True):
            fill(piece, part, layer)
        return out

    def layer(i: int) -> LayerWeights:
        return LayerWeights(
            attn_norm=make(i, "attn_norm"),
            qkv=make(i, "q", "k", "v"),
            qkv_bias=make(i, "q_bias", "k_bias", "v_bias") if spec.qkv_bias else None,
            out=make(i, "o"),
            mlp_norm=make(i, "mlp_norm"),
            gate_up=make(i, "gate", "up"),
            down=make(i, "down"),
        )

    embedding = make(None, "embedding")
    return Weights(
        embedding=embedding,
        layers=tuple(layer(i) for i in range(spec.n_layers)),
        norm=make(None, "norm"),
        head=embedding if spec.tied_head else make(None, "head"),
    )
