"""Shapes of large models: their specs, tensors by their parts, random weights, and a model's weights made in place."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import replace

import torch

from sfs_triton import ArgumentError
from sfs_triton.models import ModelSpec, Weights
from sfs_triton.models.weights import LLADA_NAMES, LLAMA_NAMES, LayerWeights, expected_shapes

_LLADA = {"n_layers": 32, "rope_theta": 5e5, "norm_eps": 1e-5, "max_length": 4096}
_DREAM = {"n_layers": 28, "rope_theta": 1e6, "norm_eps": 1e-6, "max_length": 2048, "qkv_bias": True, "shifted": True}
_LLADA_IDS = {"mask_id": 126336, "eos_id": 126081, "pad_id": 126081}
_ILLADA_IDS = {"mask_id": 5, "eos_id": 2, "pad_id": 1}
_DREAM_IDS = {"mask_id": 151666, "eos_id": 151643, "pad_id": 151643}


def _spec(family: str, d_model: int, heads: tuple[int, int], mlp: int, vocab_size: int, **rest) -> ModelSpec:
    """Make a spec; ``heads`` are those of queries, and those of keys and values."""
    return ModelSpec(
        family, d_model=d_model, n_heads=heads[0], n_kv_heads=heads[1], mlp=mlp, vocab_size=vocab_size, **rest
    )


def _toy(family: str, n_layers: int, d_model: int, heads: tuple[int, int], **rest) -> ModelSpec:
    return _spec(family, d_model, heads, 896, 2000, **{**_LLADA, "n_layers": n_layers}, **_ILLADA_IDS, **rest)


# iLLaDA's rotary base, eps and greatest length are taken to be LLaDA's: its configuration was not at hand.
REAL = {
    "llada-8b": _spec("llada", 4096, (32, 32), 12288, 126464, **_LLADA, **_LLADA_IDS),
    "illada-8b": _spec("illada", 4096, (32, 8), 14336, 155136, **_LLADA, **_ILLADA_IDS, tied_head=True),
    "dream-7b": _spec("dream", 3584, (28, 4), 18944, 152064, **_DREAM, **_DREAM_IDS),
}
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
    ids = {key: getattr(small, key) for key in ("mask_id", "eos_id", "pad_id", "bos_id")}
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
