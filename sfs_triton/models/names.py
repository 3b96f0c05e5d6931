"""Tensor names of a checkpoint by family, and the shapes that a spec gives them."""

from __future__ import annotations

from collections.abc import Mapping

from .spec import ModelSpec

LLADA_NAMES = {
    "embedding": "model.transformer.wte.weight",
    "norm": "model.transformer.ln_f.weight",
    "head": "model.transformer.ff_out.weight",
    "layer": "model.transformer.blocks.{layer}.",
    "attn_norm": "attn_norm.weight",
    "mlp_norm": "ff_norm.weight",
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "o": "attn_out.weight",
    "gate": "ff_proj.weight",
    "up": "up_proj.weight",
    "down": "ff_out.weight",
}
LLAMA_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
    "layer": "model.layers.{layer}.",
    "attn_norm": "input_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}


def expected_shapes(spec: ModelSpec, names: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """Return every tensor name that a checkpoint of this spec must hold, with its shape."""
    d, kv, mlp = spec.d_model, spec.kv_width, spec.mlp
    shapes: dict[str, tuple[int, ...]] = {names["embedding"]: (spec.vocab_size, d), names["norm"]: (d,)}
    if not spec.tied_head:
        shapes[names["head"]] = (spec.vocab_size, d)
    widths = {"q": spec.q_width, "k": kv, "v": kv}
    for layer in range(spec.n_layers):
        prefix = names["layer"].format(layer=layer)
        for part in ("attn_norm", "mlp_norm"):
            shapes[prefix + names[part]] = (d,)
        for part, width in widths.items():
            shapes[f"{prefix}{names[part]}.weight"] = (width, d)
            if spec.qkv_bias:
                shapes[f"{prefix}{names[part]}.bias"] = (width,)
        for part in ("q_norm", "k_norm") if spec.qk_norm else ():
            shapes[prefix + names[part]] = (spec.head_dim,)
        shapes[prefix + names["o"]] = (d, spec.q_width)
        shapes[prefix + names["gate"]] = shapes[prefix + names["up"]] = (mlp, d)
        shapes[prefix + names["down"]] = (d, mlp)
    return shapes
