"""Tensor names of a checkpoint by family, the shapes that a spec gives them, and what else a file may hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..errors import CheckpointError, UnsupportedConfigError
from .packed import INSTEAD
from .reading import TensorReader, listed
from .spec import ModelSpec

WRAPPERS = ("base_model.model.", "module.", "_orig_mod.")  # of peft, of torch's parallel modules, of torch.compile
UNNAMED = " without a quantization_config in config.json that says so"
# ends of names in quantised checkpoints, and what writes them
QUANTISED = {
    **dict.fromkeys(("qweight", "qzeros", "g_idx", "scales"), f"GPTQ or AWQ{UNNAMED}"),
    **dict.fromkeys(("absmax", "quant_map", "nested_absmax", "SCB", "weight_format"), "bitsandbytes"),
    **dict.fromkeys(
        ("weight_packed", "weight_shape", "weight_zero_point", "weight_global_scale"),
        f"compressed-tensors{UNNAMED}",
    ),
    **dict.fromkeys(("weight_scale", "weight_scale_inv", "input_scale", "activation_scale"), "fp8 with scales"),
}

# parts of names of parameters that turn images or sound into vectors: left to the library that the model comes from
TOWERS = {
    *("vision_tower", "vision_model", "vision_resampler", "visual", "audio_tower"),
    *("mm_projector", "multi_modal_projector", "image_newline", "faster_token"),
}

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


def plain_name(name: str) -> str:
    """Strip the prefixes that wrappers of a module add to a tensor's name."""
    name = name.replace("._orig_mod.", ".")
    while (wrapper := next((w for w in WRAPPERS if name.startswith(w)), None)) is not None:
        name = name[len(wrapper) :]
    return name


def of_tower(name: str) -> bool:
    """Return whether a tensor belongs to a tower or a projector beside the language model."""
    return not TOWERS.isdisjoint(name.split("."))


def resolve(reader: TensorReader, spec: ModelSpec) -> Mapping[str, str]:
    """Return the table of names that a checkpoint uses, and rename the reader's tensors to those of the table.

    Raises:
        CheckpointError: names each missing, extra or misshapen tensor, and what the file holds instead.
        UnsupportedConfigError: the tensors are quantised.
    """
    stored = [name for name in reader if not name.endswith("rotary_emb.inv_freq") and not of_tower(name)]
    _refuse_quantised(reader, stored)
    tables = (LLADA_NAMES, LLAMA_NAMES) if spec.family == "llada" else (LLAMA_NAMES, LLADA_NAMES)
    if spec.qk_norm:  # which LLaDA's names have no place for
        tables = (LLAMA_NAMES,)
    found = [_matched(reader, stored, expected_shapes(spec, names)) for names in tables]
    best = max(range(len(tables)), key=lambda n: len(found[n]))  # the family's own if equal
    names, matched = tables[best], found[best]
    wanted, own = expected_shapes(spec, names), set(matched.values())
    extra = sorted(name for name in stored if name not in own)
    if missing := sorted(set(wanted) - set(matched)):
        held = f"; instead it holds {listed(extra)}" if extra else ""
        raise CheckpointError(f"{reader.folder}: tensors missing: {listed(missing)}{held}")
    if spec.tied_head:  # some writers store the tied head as well
        extra = [name for name in extra if plain_name(name) != names["head"]]
    if extra:
        raise CheckpointError(f"{reader.folder}: tensors the configuration has no place for: {listed(extra)}")
    reader.rename(matched)
    for name, shape in wanted.items():
        if reader.shape(name) != shape:
            raise CheckpointError(
                f"{reader.folder}: tensor {matched[name]} has shape {list(reader.shape(name))}, "
                f"the configuration says {list(shape)}"
            )
    return names


def _matched(reader: TensorReader, stored: Iterable[str], wanted: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Return the stored name of each wanted tensor that is there, with or without a wrapper's prefix or ``model.``."""
    matched: dict[str, str] = {}
    for name in stored:
        plain = plain_name(name)
        if plain not in wanted:
            plain = f"model.{plain}"
        if plain in wanted and matched.setdefault(plain, name) != name:
            raise CheckpointError(f"{reader.folder}: {matched[plain]} and {name} are both {plain}")
    return matched


def _refuse_quantised(reader: TensorReader, stored: Iterable[str]) -> None:
    for name in stored:
        last = name.rpartition(".")[2]
        if last in QUANTISED or ".weight.quant_state" in name:
            kind = QUANTISED.get(last, "bitsandbytes")
            raise UnsupportedConfigError(f"{reader.folder}: {name} is of {kind}, which is not supported: {INSTEAD}")
        if "lora_" in name:
            raise CheckpointError(
                f"{reader.folder}: {name} is of a LoRA adapter that is not merged: load(base, adapter=) merges it"
            )
