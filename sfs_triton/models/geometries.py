"""Specs of the family's large models, by name."""

from __future__ import annotations

from .spec import ModelSpec

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


# iLLaDA's rotary base, eps and greatest length are taken to be LLaDA's: its configuration was not at hand.
REAL = {
    "llada-8b": _spec("llada", 4096, (32, 32), 12288, 126464, **_LLADA, **_LLADA_IDS),
    "illada-8b": _spec("illada", 4096, (32, 8), 14336, 155136, **_LLADA, **_ILLADA_IDS, tied_head=True),
    "dream-7b": _spec("dream", 3584, (28, 4), 18944, 152064, **_DREAM, **_DREAM_IDS),
}
