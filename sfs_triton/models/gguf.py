"""GGUF files of llama.cpp: their configuration, and their tensors decoded a few rows at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from ..distributed import ALONE, Group
from ..errors import CheckpointError, MissingDependencyError, UnsupportedConfigError
from ..gguf_file import GgufFile, Place

AT_ONCE = 2**22  # elements decoded at a time: float32 and the decoder's own arrays are several times that
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
PARTS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LAYER = re.compile(r"blk\.(\d{1,4})\.([a-z_]+)\.(weight|bias)")
# key of a configuration, by family -> GGUF's, without the architecture's name
KEYS = {
    "llada": {
        **{"d_model": "embedding_length", "n_layers": "block_count", "n_heads": "attention.head_count"},
        **{"n_kv_heads": "attention.head_count_kv", "mlp_hidden_size": "feed_forward_length"},
        **{"max_sequence_length": "context_length", "vocab_size": "vocab_size"},
    },
    "dream": {
        **{"hidden_size": "embedding_length", "num_hidden_layers": "block_count"},
        **{"num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv"},
        **{"intermediate_size": "feed_forward_length", "max_position_embeddings": "context_length"},
        **{"vocab_size": "vocab_size"},
    },
}
TOKEN_KEYS = {"mask": "mask", "eos": "eos", "pad": "padding", "bos": "bos"}
SHIFTED = {"llada": False, "dream": True}


def config_of(file: GgufFile) -> dict[str, Any]:
    """Return the configuration of a GGUF file with the keys of its family's ``config.json``.

    Raises:
        CheckpointError: names the key at fault.
        UnsupportedConfigError: the architecture, or a value that changes the computation, is not supported.
    """
    architecture = file.get("general.architecture", str, "")
    if architecture not in KEYS:
        raise UnsupportedConfigError(
            f"{file.path}: general.architecture={architecture!r} is not supported, only {' and '.join(KEYS)}"
        )
    _refuse_unsupported(file, architecture)
    config: dict[str, Any] = {"model_type": architecture}
    for key, name in KEYS[architecture].items():
        config[key] = file.get(f"{architecture}.{name}", int)
    if config["vocab_size"] is None:  # optional in the format
        place = file.tensors.get("token_embd.weight")
        config["vocab_size"] = None if place is None else place.shape[0]
    missing = [name for key, name in KEYS[architecture].items() if config[key] is None and name != "vocab_size"]
    if missing:
        raise CheckpointError(f"{file.path}: metadata lack {architecture}.{missing[0]}")
    config["rope_theta"] = file.get(f"{architecture}.rope.freq_base", (int, float), 10000.0)
    eps = f"{architecture}.attention.layer_norm_rms_epsilon"
    config["rms_norm_eps"] = file.get(eps, (int, float))
    if config["rms_norm_eps"] is None:
        raise CheckpointError(f"{file.path}: metadata lack {eps}")
    config["rms_norm_eps"] = float(f"{config['rms_norm_eps']:.6g}")  # stored as float32
    for key, name in TOKEN_KEYS.items():
        config[f"{key}_token_id"] = file.get(f"tokenizer.ggml.{name}_token_id", int)
    turn = file.get("tokenizer.ggml.eot_token_id", int)
    ends = [token for token in (config["eos_token_id"], turn) if token is not None]
    config["eos_token_id"] = ends or None
    config["weight_tying" if architecture == "llada" else "tie_word_embeddings"] = "output.weight" not in file.tensors
    return config


def _refuse_unsupported(file: GgufFile, architecture: str) -> None:
    at = f"{architecture}."
    heads, width = (file.get(at + key, int) or 1 for key in ("attention.head_count", "embedding_length"))
    allowed = {
        at + "attention.causal": (False,),
        at + "rope.scaling.type": ("none",),
        at + "expert_count": (0,),
        at + "rope.dimension_count": (width // max(1, heads),),
        at + "attention.key_length": (width // max(1, heads),),
        at + "attention.value_length": (width // max(1, heads),),
        "diffusion.shift_logits": (SHIFTED[architecture],),
    }
    for key, values in allowed.items():
        value = file.metadata.get(key)
        if value is not None and value not in values:
            raise UnsupportedConfigError(f"{file.path}: {key}={value!r} is not supported (allowed: {values})")


class GgufReader:
    """The tensors of a GGUF file by their checkpoint names, decoded by the package ``gguf``.

    Whole tensors are returned as ``dtype``, decoded piece by piece, so that memory holds the result and one piece.
    """

    def __init__(self, file: GgufFile, config: Mapping[str, Any], dtype: torch.dtype):
        try:
            import gguf
        except ImportError:
            raise MissingDependencyError('GGUF files need the package gguf: pip install "sfs_triton[gguf]"') from None
        self._gguf, self.folder, self._dtype = gguf, file.path, dtype
        self._data = np.memmap(file.path, dtype=np.uint8, mode="r")
        self._places = {_name(name): place for name, place in file.tensors.items()}
        for name, place in file.tensors.items():
            self._row_bytes(name, place)
        # llama.cpp rotates neighbouring channels in LLaDA, and permutes the rows of q and k for it
        heads = (config["n_heads"], config["n_kv_heads"]) if config["model_type"] == "llada" else None
        self._heads = {} if heads is None else {"self_attn.q_proj": heads[0], "self_attn.k_proj": heads[1]}

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def rename(self, stored: Mapping[str, str]) -> None:
        """Keep those tensors only; the names are the checkpoint's already."""
        self._places = {name: self._places[old] for name, old in stored.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name].shape

    def read(self, name: str, axis: int | None = None, group: Group = ALONE) -> torch.Tensor:
        """Read a tensor, or only this rank's share of its rows (``axis=0``) or columns (1)."""
        shape = self.shape(name)
        if len(shape) == 1:
            whole = self._decoded(name, slice(0, 1)).view(-1).to(self._dtype)
            return whole if axis is None or group.size == 1 else whole[slice(*group.share(shape[0]))]
        rows, columns = (group.share(size) if axis == n else (0, size) for n, size in enumerate(shape))
        result = torch.empty((rows[1] - rows[0], columns[1] - columns[0]), dtype=self._dtype)
        most = max(1, AT_ONCE // shape[1])
        for first in range(*rows, most):
            last = min(first + most, rows[1])
            result[first - rows[0] : last - rows[0]] = self.rows(name, first, last)[:, slice(*columns)]
        return result

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Read only rows ``[first, last)`` of a matrix, in float32."""
        part = name.removesuffix(".weight").split(".", 3)[-1]
        if part not in self._heads:
            return self._decoded(name, slice(first, last))
        half = self.shape(name)[0] // self._heads[part] // 2
        row = np.arange(first, last)
        head, channel = row // (2 * half), row % (2 * half)
        return self._decoded(name, head * 2 * half + channel % half * 2 + channel // half)

    def _row_bytes(self, name: str, place: Place) -> int:
        """Return the bytes of a row; refuse types that cannot be decoded, and tensors beyond the file's end."""
        try:
            kind = self._gguf.GGMLQuantizationType(place.type)
            block, size = self._gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise UnsupportedConfigError(f"{self.folder}: tensor {name} has the unknown type {place.type}") from None
        if place.shape[-1] % block:
            raise CheckpointError(f"{self.folder}: tensor {name} is {kind.name}, and its rows have {place.shape[-1]}")
        row, rows = place.shape[-1] // block * size, int(np.prod(place.shape[:-1], dtype=object))
        if place.offset + rows * row > len(self._data):
            raise CheckpointError(f"{self.folder}: tensor {name} reaches beyond the file's end")
        return row

    def _decoded(self, name: str, rows: slice | np.ndarray) -> torch.Tensor:
        """Decode rows of a tensor to float32 ``[n, width]``."""
        place = self._places[name]
        row = self._row_bytes(name, place)
        count = place.shape[0] if len(place.shape) > 1 else 1
        raw = self._data[place.offset : place.offset + count * row].reshape(count, row)[rows]
        kind = self._gguf.GGMLQuantizationType(place.type)
        try:
            values = self._gguf.dequantize(np.ascontiguousarray(raw), kind)
        except NotImplementedError:
            raise UnsupportedConfigError(
                f"{self.folder}: tensor {name} has the type {kind.name}, which the package gguf does not decode"
            ) from None
        return torch.from_numpy(np.array(values, dtype=np.float32).reshape(len(raw), place.shape[-1]))


def _name(name: str) -> str:
    """Return the checkpoint's name of a tensor; unknown ones keep theirs, and are refused later."""
    match = LAYER.fullmatch(name)
    if match is None or match[2] not in PARTS:
        return NAMES.get(name, name)
    return f"model.layers.{match[1]}.{PARTS[match[2]]}.{match[3]}"
