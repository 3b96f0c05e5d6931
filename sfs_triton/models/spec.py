"""Model spec from a checkpoint's ``config.json``: dimensions, flags and special token ids.

Two sets of key names are read: LLaDA's own (``d_model``, ``n_heads``, ...) and the Llama/Qwen2 one (``hidden_size``,
``num_attention_heads``, ...) that Dream and iLLaDA use. Anything that would change the computation and is not supported
is refused by name, never ignored.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import CheckpointError, UnsupportedConfigError, check_flag, check_integer, require


@dataclass(frozen=True)
class ModelSpec:
    """Dimensions and flags of one bidirectional transformer (docs/architecture.md: one shape covers the family)."""

    family: str  # "llada", "illada" or "dream"
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    mlp: int
    vocab_size: int
    max_length: int
    rope_theta: float
    norm_eps: float
    mask_id: int
    eos_id: int
    pad_id: int
    bos_id: int | None = None
    qkv_bias: bool = False
    tied_head: bool = False
    shifted: bool = False  # logits for position i come from row i - 1
    shards: int = 1  # ranks that share the heads and the MLP; ``n_heads``, ``n_kv_heads`` and ``mlp`` are of one

    @property
    def head_dim(self) -> int:
        return self.d_model // (self.n_heads * self.shards)

    @property
    def q_width(self) -> int:
        return self.n_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.n_kv_heads * self.head_dim

    def shard(self, size: int) -> ModelSpec:
        """Return the spec of one of ``size`` ranks: whole key/value heads with their queries, and a part of the MLP.

        Raises:
            ArgumentError: ``size`` does not divide them; says which sizes do.
        """
        if size == 1:
            return self
        fits = [n for n in range(1, self.n_kv_heads + 1) if not self.n_kv_heads % n and not self.mlp % n]
        require(
            size in fits,
            f"tensor_parallel={size} does not divide the model's {self.n_kv_heads} key/value heads and MLP width "
            f"{self.mlp} into equal parts; possible are {', '.join(map(str, fits))}",
        )
        return replace(
            self,
            n_heads=self.n_heads // size,
            n_kv_heads=self.n_kv_heads // size,
            mlp=self.mlp // size,
            shards=size * self.shards,
        )


MOST_LAYERS = 1024

# key -> values that leave the computation as this package does it; an absent key is fine
LLADA_ALLOWED: dict[str, tuple] = {
    "alibi": (False, None),
    "attention_layer_norm": (False, None),
    "bias_for_layer_norm": (False, None),
    "block_group_size": (1, None),
    "block_type": ("llama",),
    "activation_type": ("silu",),
    "clip_qkv": (None,),
    "rope_full_precision": (True, None),
    "rope_scaling": (None,),
    "sliding_window": (None,),
    "include_bias": (False,),
    "input_emb_norm": (False, None),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True, None),
    "rope": (True,),
    "scale_logits": (False, None),
}
LLAMA_ALLOWED: dict[str, tuple] = {
    "hidden_act": ("silu",),
    "rope_scaling": (None,),
    "use_mrope": (False, None),
    "use_sliding_window": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1.0, None),
    "use_qk_norm": (False, None),
    "qk_layernorm": (False, None),
}


def _number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = default if config.get(key) is None else config[key]
    if value is None:
        raise CheckpointError(f"config.json lacks the required key {key!r}")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
        raise CheckpointError(f"config.json: {key}={value!r} is not a positive number")
    return float(value)


def _integer(config: Mapping[str, Any], key: str, default: int | None = None, least: int = 1, most: int = 2**24) -> int:
    value = default if config.get(key) is None else config[key]
    if value is None:
        raise CheckpointError(f"config.json lacks the required key {key!r}")
    check_integer(f"config.json: {key}", value, least, most, CheckpointError)
    return value


def _flag(config: Mapping[str, Any], key: str) -> bool:
    """Read a boolean; an absent key is false."""
    value = config.get(key)
    if value is not None:
        check_flag(f"config.json: {key}", value, CheckpointError)
    return bool(value)


def _refuse_unsupported(config: Mapping[str, Any], allowed: Mapping[str, tuple]) -> None:
    for key, values in allowed.items():
        if key in config and not any(config[key] is v or config[key] == v for v in values):
            raise UnsupportedConfigError(f"config.json: {key}={config[key]!r} is not supported (allowed: {values})")


def _special_ids(config: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    mask, eos = _integer(config, "mask_token_id", least=0), _integer(config, "eos_token_id", least=0)
    pad = _integer(config, "pad_token_id", default=eos, least=0)
    bos = None if config.get("bos_token_id") is None else _integer(config, "bos_token_id", least=0)
    for key, value in (("mask", mask), ("eos", eos), ("pad", pad), ("bos", bos)):
        if value is not None and value >= vocab_size:
            raise CheckpointError(f"config.json: {key}_token_id={value} is outside the vocabulary of {vocab_size}")
    if mask == eos:
        raise CheckpointError(f"config.json: mask_token_id and eos_token_id are both {mask}")
    return {"mask_id": mask, "eos_id": eos, "pad_id": pad, "bos_id": bos}


def _llada_spec(config: Mapping[str, Any]) -> ModelSpec:
    _refuse_unsupported(config, LLADA_ALLOWED)
    heads = _integer(config, "n_heads")
    kv_heads = 1 if _flag(config, "multi_query_attention") else _integer(config, "n_kv_heads", default=heads)
    d_model = _integer(config, "d_model")
    rows = _integer(config, "embedding_size", default=_integer(config, "vocab_size"))
    return ModelSpec(
        family="llada",
        n_layers=_integer(config, "n_layers", most=MOST_LAYERS),
        d_model=d_model,
        n_heads=heads,
        n_kv_heads=kv_heads,
        mlp=_integer(config, "mlp_hidden_size", default=d_model * _integer(config, "mlp_ratio", default=4)),
        vocab_size=rows,
        max_length=_integer(config, "max_sequence_length"),
        rope_theta=_number(config, "rope_theta", 10000.0),
        norm_eps=_number(config, "rms_norm_eps", 1e-5),
        qkv_bias=_flag(config, "include_qkv_bias"),
        tied_head=_flag(config, "weight_tying"),
        **_special_ids(config, rows),
    )


def _llama_spec(config: Mapping[str, Any], family: str) -> ModelSpec:
    _refuse_unsupported(config, LLAMA_ALLOWED)
    rope = config.get("rope_parameters") or {}
    if not isinstance(rope, Mapping) or set(rope) - {"rope_type", "rope_theta"}:
        raise UnsupportedConfigError(f"config.json: rope_parameters={rope!r} is not supported")
    if rope.get("rope_type", "default") != "default":
        raise UnsupportedConfigError(f"config.json: rope_parameters.rope_type={rope['rope_type']!r} is not supported")
    if any(kind != "full_attention" for kind in config.get("layer_types") or []):
        raise UnsupportedConfigError(f"config.json: layer_types={config['layer_types']!r} is not supported")
    d_model, heads = _integer(config, "hidden_size"), _integer(config, "num_attention_heads")
    if config.get("head_dim") not in (None, d_model // heads):
        raise UnsupportedConfigError(f"config.json: head_dim={config['head_dim']!r} is not hidden_size / heads")
    vocab_size = _integer(config, "vocab_size")
    return ModelSpec(
        family=family,
        n_layers=_integer(config, "num_hidden_layers", most=MOST_LAYERS),
        d_model=d_model,
        n_heads=heads,
        n_kv_heads=_integer(config, "num_key_value_heads", default=heads),
        mlp=_integer(config, "intermediate_size"),
        vocab_size=vocab_size,
        max_length=_integer(config, "max_position_embeddings"),
        rope_theta=_number({**rope, **config}, "rope_theta", 10000.0),
        norm_eps=_number(config, "rms_norm_eps", 1e-6),
        qkv_bias=family == "dream" or _flag(config, "attention_bias"),
        tied_head=_flag(config, "tie_word_embeddings"),
        shifted=family == "dream",
        **_special_ids(config, vocab_size),
    )


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Read a parsed ``config.json``.

    Raises:
        CheckpointError: a required key is missing or has an impossible value.
        UnsupportedConfigError: the family or a flag is not one this package computes.
    """
    if not isinstance(config, Mapping):
        raise CheckpointError(f"config.json holds a {type(config).__name__}, not an object")
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list):
        raise CheckpointError(f"config.json: architectures={architectures!r} is not a list")
    names = [str(config.get("model_type", "")), *map(str, architectures)]
    named = " ".join(names).lower()
    if "moe" in named:
        raise UnsupportedConfigError(
            f"config.json: {' '.join(names)!r} is a mixture of experts, which is not supported"
        )
    if "dream" in named:
        spec = _llama_spec(config, "dream")
    elif "llada" in named:
        spec = _llama_spec(config, "illada") if "hidden_size" in config else _llada_spec(config)
    else:
        raise UnsupportedConfigError(
            f"config.json: model_type={config.get('model_type')!r}, architectures={config.get('architectures')!r} "
            "is none of the families LLaDA, iLLaDA, Dream"
        )
    if spec.d_model % spec.n_heads or spec.head_dim % 2:
        raise CheckpointError(f"config.json: {spec.n_heads} heads do not divide d_model {spec.d_model} into even parts")
    if spec.n_heads % spec.n_kv_heads:
        raise CheckpointError(f"config.json: {spec.n_kv_heads} key/value heads do not divide {spec.n_heads} heads")
    return spec
