"""Model spec from a checkpoint's ``config.json``: dimensions, flags and special token ids.

Two sets of key names are read: LLaDA's own (``d_model``, ``n_heads``, ...) and the Llama/Qwen2 one (``hidden_size``,
``num_attention_heads``, ...) that Dream and iLLaDA use. Anything that would change the computation and is not supported
is refused by name, never ignored.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import CheckpointError, UnsupportedConfigError, check_flag, check_integer, require
from .packed import read_packing


@dataclass(frozen=True)
class ModelSpec:
    """Dimensions and flags of one bidirectional transformer (docs/architecture.md: one shape covers the family)."""

    family: str  # "llada", "illada", "dream" or "a2d"
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
    other_ends: tuple[int, ...] = ()  # tokens that end a response as ``eos_id`` does, which fills what follows
    qkv_bias: bool = False
    tied_head: bool = False
    shifted: bool = False  # logits for position i come from row i - 1
    qk_norm: bool = False  # RMSNorm over each head of q and k, before the rotary embedding
    head_size: int | None = None  # of a head; None: d_model / n_heads
    shards: int = 1  # ranks that share the heads and the MLP; ``n_heads``, ``n_kv_heads`` and ``mlp`` are of one

    @property
    def end_ids(self) -> tuple[int, ...]:
        """All tokens that end a response."""
        return (self.eos_id, *self.other_ends)

    @property
    def head_dim(self) -> int:
        return self.head_size or self.d_model // (self.n_heads * self.shards)

    def end_of(self, tokens: Sequence[int]) -> int | None:
        """Return the index of the first token that ends a response, or None."""
        return next((index for index, token in enumerate(tokens) if token in self.end_ids), None)

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
MOST_ENDS = 16  # tokens that end a response
ILLADA_MASK = 5  # "<[MASK]>", which iLLaDA's config.json does not name
FAMILIES = "LLaDA, iLLaDA, Dream, Tiny-A2D"
BLOCK_DIFFUSION = ("sdar", "llada2", "fast_dllm", "dreamreasoner", "dreamforcausallm", "bd3lm", "blockdiff")
BLOCK_KEYS = ("block_size", "bd_size", "diffusion_block_size")

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
    "layer_norm_eps": (None,),
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
    "layer_norm_eps": (None,),
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


def _refuse_rope_scaling(config: Mapping[str, Any]) -> None:
    """Refuse ``rope_scaling``, except for the form that changes nothing."""
    scaling = config.get("rope_scaling")
    if scaling is None:
        return
    kinds = [scaling.get(key) for key in ("rope_type", "type")] if isinstance(scaling, Mapping) else ["?"]
    fine = all(kind in (None, "default") for kind in kinds)
    if not fine or set(scaling) - {"rope_type", "type", "factor"} or scaling.get("factor", 1) != 1:
        raise UnsupportedConfigError(f"config.json: rope_scaling={scaling!r} is not supported")


def _refuse_block_diffusion(config: Mapping[str, Any], names: str) -> None:
    """Refuse models that attend to finished blocks only: their names and keys resemble those of the family."""
    lower = names.lower()
    found = [name for name in BLOCK_DIFFUSION if name in lower]
    found += [f"{key}={config[key]!r}" for key in BLOCK_KEYS if config.get(key) is not None]
    if found:
        raise UnsupportedConfigError(
            f"config.json: {found[0]} is of a block-diffusion model ({names.strip()!r}), which attends to past blocks "
            "only; this package computes full attention"
        )


def token_ids(name: str, value: Any) -> list[int]:
    """Return a token id or a list of them as a list without repeats; None gives an empty one. Errors say ``name``."""
    listed = value if isinstance(value, list) else [] if value is None else [value]
    if len(listed) > MOST_ENDS:
        raise CheckpointError(f"{name} lists {len(listed)} ids, over {MOST_ENDS}")
    for token in listed:
        check_integer(name, token, 0, 2**24, CheckpointError)
    return list(dict.fromkeys(listed))


def check_in_vocabulary(name: str, tokens: Sequence[int], vocab_size: int) -> None:
    """Raise CheckpointError, which says ``name``, if a token is outside the vocabulary."""
    for token in tokens:
        if token >= vocab_size:
            raise CheckpointError(f"{name}={token} is outside the vocabulary of {vocab_size}")


def _ids(config: Mapping[str, Any], key: str, vocab_size: int) -> list[int]:
    name = f"config.json: {key}"
    ids = token_ids(name, config.get(key))
    check_in_vocabulary(name, ids, vocab_size)
    return ids


def _special_ids(config: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    if config.get("mask_token_id") is None:
        raise CheckpointError(
            "config.json lacks the required key 'mask_token_id', and there is no tokenizer that names a mask token; "
            "load(..., mask_token_id=) gives it"
        )
    mask, pad, bos = (_ids(config, f"{name}_token_id", vocab_size) for name in ("mask", "pad", "bos"))
    ends = _ids(config, "eos_token_id", vocab_size)
    if not ends:
        raise CheckpointError("config.json lacks the required key 'eos_token_id'")
    for key, several in (("mask", mask), ("pad", pad), ("bos", bos)):
        if len(several) > 1:
            raise CheckpointError(f"config.json: {key}_token_id={several} is not an integer")
    if mask[0] in ends:
        raise CheckpointError(f"config.json: mask_token_id and eos_token_id are both {mask[0]}")
    first = {"mask_id": mask[0], "eos_id": ends[0], "pad_id": pad[0] if pad else ends[0]}
    return {**first, "bos_id": bos[0] if bos else None, "other_ends": tuple(ends[1:])}


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


def _llama_spec(config: Mapping[str, Any], family: str, named: str = "") -> ModelSpec:
    _refuse_unsupported(config, LLAMA_ALLOWED)
    rope = config.get("rope_parameters") or {}
    fine = isinstance(rope, Mapping) and not set(rope) - {"rope_type", "rope_theta", "factor"}
    if not fine or rope.get("factor", 1) != 1:
        raise UnsupportedConfigError(f"config.json: rope_parameters={rope!r} is not supported")
    if rope.get("rope_type", "default") != "default":
        raise UnsupportedConfigError(f"config.json: rope_parameters.rope_type={rope['rope_type']!r} is not supported")
    kinds = config.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise UnsupportedConfigError(f"config.json: layer_types={config['layer_types']!r} is not supported")
    d_model, heads = _integer(config, "hidden_size"), _integer(config, "num_attention_heads")
    head_dim, a2d = config.get("head_dim"), family == "a2d"
    if not a2d and head_dim not in (None, d_model // heads):
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
        qkv_bias=family == "dream" or a2d and "qwen2" in named or _flag(config, "attention_bias"),
        qk_norm=a2d and "qwen3" in named,
        head_size=_integer(config, "head_dim") if a2d and head_dim is not None else None,
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
    names = " ".join([str(config.get("model_type", "")), *map(str, architectures)])
    named = names.lower()
    if "moe" in named:
        raise UnsupportedConfigError(f"config.json: {names!r} is a mixture of experts, which is not supported")
    _refuse_block_diffusion(config, names)
    read_packing(config)  # refuses what is quantised otherwise
    _refuse_rope_scaling(config)
    if "dream" in named:
        spec = _llama_spec(config, "dream")
    elif "a2d" in named:
        spec = _llama_spec(config, "a2d", named)
    elif "llada" in named:
        if "illada" in named and config.get("mask_token_id") is None:
            config = {**config, "mask_token_id": ILLADA_MASK}
        spec = _llama_spec(config, "illada") if "hidden_size" in config else _llada_spec(config)
    else:
        raise UnsupportedConfigError(
            f"config.json: model_type={config.get('model_type')!r}, architectures={config.get('architectures')!r} "
            f"is none of the families {FAMILIES}"
        )
    if spec.head_dim % 2 or spec.head_size is None and spec.d_model % spec.n_heads:
        raise CheckpointError(f"config.json: {spec.n_heads} heads do not divide d_model {spec.d_model} into even parts")
    if spec.n_heads % spec.n_kv_heads:
        raise CheckpointError(f"config.json: {spec.n_kv_heads} key/value heads do not divide {spec.n_heads} heads")
    return spec
