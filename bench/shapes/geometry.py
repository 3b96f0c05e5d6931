"""Shapes of large models: tensors by their parts, random weights, and a model's weights made in place."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import asdict

import torch

from bench.kernels import case
from sfs_triton import ArgumentError
from sfs_triton.models import ModelSpec, Weights
from sfs_triton.models.weights import LLADA_NAMES, LLAMA_NAMES, LayerWeights, expected_shapes

_LLADA = {"family": "llada", "rope_theta": 500000.0, "norm_eps": 1e-5, "max_length": 4096}
_ILLADA = {**_LLADA, "family": "illada", "tied_head": True}
_DREAM = {"family": "dream", "rope_theta": 1e6, "norm_eps": 1e-6, "max_length": 2048, "qkv_bias": True, "shifted": True}


def _sizes(name: str) -> dict[str, int]:
    sizes = asdict(case.GEOMETRIES[name])
    return {"vocab_size": sizes.pop("vocab"), **{key: size for key, size in sizes.items() if key != "head_dim"}}


def _toy(n_layers: int, d_model: int, n_heads: int, n_kv_heads: int, **rest) -> dict:
    sizes = {"n_layers": n_layers, "d_model": d_model, "n_heads": n_heads, "n_kv_heads": n_kv_heads}
    return {**_LLADA, **sizes, "mlp": 896, "vocab_size": 2000, **rest}


# What ModelSpec takes, but for the special tokens' ids: those stay what they are. The toys are for tests. Nobody
# here has seen iLLaDA's rotary base, eps and greatest length; they are taken to be LLaDA's.
GEOMETRIES: dict[str, dict] = {
    "llada-8b": {**_LLADA, "n_layers": 32, **_sizes("llada-8b")},
    "illada-8b": {**_ILLADA, "n_layers": 32, **_sizes("illada-8b")},
    "dream-7b": {**_DREAM, "n_layers": 28, **_sizes("dream-7b")},
    "toy-512": _toy(4, 512, 16, 16),  # no layer more
    "toy-768": _toy(5, 768, 12, 12),  # more of everything
    "toy-1024": _toy(5, 1024, 8, 8),  # all factors are powers of two, as in the real ones
    "toy-tied": _toy(5, 1024, 32, 16, **_ILLADA),
}


def geometry_spec(geometry: str | ModelSpec, small: ModelSpec) -> ModelSpec:
    """The spec of a geometry by name, with the special tokens of ``small``; one that is a spec already stays it."""
    if isinstance(geometry, ModelSpec):
        return geometry
    if geometry not in GEOMETRIES:
        raise ArgumentError(f"geometry={geometry!r} is not one of {tuple(GEOMETRIES)}")
    ids = {key: getattr(small, key) for key in ("mask_id", "eos_id", "pad_id", "bos_id")}
    return ModelSpec(**GEOMETRIES[geometry], **ids)


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
