"""transformers classes of LLaDA, iLLaDA and Dream: plain modules under the checkpoints' own tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from functools import partial
from reprlib import repr
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MaskedLMOutput
from transformers.utils.generic import can_return_tuple

from ...errors import UnsupportedConfigError, require
from ...models import ModelSpec, read_spec
from ...models.names import LLADA_NAMES, LLAMA_NAMES
from ...models.packed import read_packing
from ...ops.dispatch import rope_tables
from ...ops.torch.norm import rms_norm
from .generate import Drafts, custom_generate

ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta")
STANDARD_NAMES = {  # transformers' configuration names, and those of LLaDA's config.json
    "hidden_size": "d_model",
    "intermediate_size": "mlp_hidden_size",
    "max_position_embeddings": "max_sequence_length",
    "num_attention_heads": "n_heads",
    "num_hidden_layers": "n_layers",
    "num_key_value_heads": "n_kv_heads",
    "tie_word_embeddings": "weight_tying",
}


class MaskedDiffusionConfig(PreTrainedConfig):
    """A checkpoint's unchanged ``config.json``: no key is renamed or gets a default, so it can be written back.

    If the file has LLaDA's own keys, the standard ones (``hidden_size``, ...) read and write those.
    """

    def __post_init__(self, **kwargs: Any) -> None:
        rope = {key: kwargs.pop(key) for key in ROPE_KEYS if key in kwargs}
        super().__post_init__(**kwargs)
        self.__dict__.update(rope)  # bypasses the base class, which would rename them

    def __getattr__(self, name: str) -> Any:
        present = self.__dict__
        for key in (name, STANDARD_NAMES.get(name)):
            if key in present:
                return present[key]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        own = STANDARD_NAMES.get(name)
        super().__setattr__(own if own in self.__dict__ else name, value)


class LLaDAConfig(MaskedDiffusionConfig):
    model_type = "llada"


class ILLaDAConfig(MaskedDiffusionConfig):
    model_type = "illada"


class DreamConfig(MaskedDiffusionConfig):
    model_type = "Dream"


class RMSNorm(nn.Module):
    """:func:`sfs_triton.ops.torch.norm.rms_norm` with a weight ``[d]``."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


def _set_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Register ``module`` under ``root`` so that its weight is named ``name``, or ``name`` + ``.weight``."""
    *path, last = name.removesuffix(".weight").split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    root.add_module(last, module)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply the rotary embedding to ``x [B, H, L, D]``, from float32 tables ``[L, D / 2]``."""
    low, high = (x if x.dtype == torch.float64 else x.float()).chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1).to(x.dtype)


class MaskedDiffusionLayer(GradientCheckpointingLayer):
    """One transformer layer: ``[B, L, d]`` to ``[B, L, d]``."""

    def __init__(self, spec: ModelSpec, names: Mapping[str, str]):
        super().__init__()
        self.spec, self.names = spec, names
        d, kv, mlp = spec.d_model, spec.kv_width, spec.mlp
        for part, width in {"q": d, "k": kv, "v": kv}.items():
            _set_module(self, names[part], nn.Linear(d, width, bias=spec.qkv_bias))
        _set_module(self, names["o"], nn.Linear(d, d, bias=False))
        for part in ("gate", "up"):
            _set_module(self, names[part], nn.Linear(d, mlp, bias=False))
        _set_module(self, names["down"], nn.Linear(mlp, d, bias=False))
        for part in ("attn_norm", "mlp_norm"):
            _set_module(self, names[part], RMSNorm(d, spec.norm_eps))

    def _apply_part(self, part: str, x: torch.Tensor) -> torch.Tensor:
        return self.get_submodule(self.names[part].removesuffix(".weight"))(x)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        h = self._apply_part("attn_norm", x)
        q, k, v = (
            self._apply_part(part, h).unflatten(-1, (-1, self.spec.head_dim)).transpose(1, 2)
            for part in ("q", "k", "v")
        )
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        groups = self.spec.n_heads // self.spec.n_kv_heads
        if groups > 1 and mask is not None:  # kernels that take a mask know no groups
            k, v = (each.repeat_interleave(groups, dim=1) for each in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=k.shape[1] != q.shape[1])
        x = x + self._apply_part("o", mixed.transpose(1, 2).flatten(2))
        h = self._apply_part("mlp_norm", x)
        return x + self._apply_part("down", F.silu(self._apply_part("gate", h)) * self._apply_part("up", h))


class MaskedDiffusionModel(PreTrainedModel, GenerationMixin):
    """A bidirectional masked-diffusion model of the family, for training and for :func:`sfs_triton.accelerate`.

    Raises:
        CheckpointError, UnsupportedConfigError: the configuration lacks a key, or needs an unsupported feature.
    """

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["MaskedDiffusionLayer"]

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        if read_packing(config.to_dict()) is not None:
            raise UnsupportedConfigError(
                "config.json: quantization_config: only sfs_triton.load takes weights in 4 bits"
            )
        self.spec = spec = read_spec(config.to_dict())
        self.names = names = LLADA_NAMES if spec.family == "llada" else LLAMA_NAMES
        _set_module(self, names["embedding"], nn.Embedding(spec.vocab_size, spec.d_model))
        layers = nn.ModuleList(MaskedDiffusionLayer(spec, names) for _ in range(spec.n_layers))
        _set_module(self, names["layer"].removesuffix(".{layer}."), layers)
        _set_module(self, names["norm"], RMSNorm(spec.d_model, spec.norm_eps))
        _set_module(self, names["head"], nn.Linear(spec.d_model, spec.vocab_size, bias=False))
        if spec.tied_head:
            self._tied_weights_keys = {names["head"]: names["embedding"]}
        self.post_init()

    def _at(self, part: str) -> nn.Module:
        return self.get_submodule(self.names[part].removesuffix(".weight"))

    def get_input_embeddings(self) -> nn.Module:
        return self._at("embedding")

    def set_input_embeddings(self, value: nn.Module) -> None:
        _set_module(self, self.names["embedding"], value)

    def get_output_embeddings(self) -> nn.Module:
        return self._at("head")

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        _set_module(self, self.names["head"], new_embeddings)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Resize as the base class does, and update LLaDA's second size key."""
        embedding = super().resize_token_embeddings(*args, **kwargs)
        if "embedding_size" in self.config.__dict__:
            self.config.embedding_size = embedding.num_embeddings
        self.spec = read_spec(self.config.to_dict())
        return embedding

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Return False: ``generate`` must not make a K/V cache, which ``forward`` does not use. Since 5.24 it is passed
        as ``cache``, here the name of a cache policy."""
        return False

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save as the base class does. Dream's ``generation_config.json`` sets the temperature to 0, which means
        the default here, and which some versions of transformers refuse to write."""
        if self.generation_config.temperature == 0:
            self.generation_config.temperature = None
        return super().save_pretrained(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> MaskedLMOutput:
        """Return logits ``[B, L, V]`` as the checkpoint's own code does: Dream's at ``i`` predict position ``i + 1``.

        Args:
            input_ids: ``[B, L]``, with mask ids where tokens are to be predicted; or ``inputs_embeds [B, L, d]``.
            attention_mask: ``[B, L]``, 0 at positions that are not attended to; or boolean ``[B, 1, L, L]``.
            labels: ``[B, L]``, the token at each position, -100 to ignore a position; shifted for Dream to match its
                logits. The loss is the mean cross entropy, without the weights by mask ratio of diffusion training.
        """
        require((input_ids is None) != (inputs_embeds is None), "give either input_ids or inputs_embeds")
        x = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        spec, mask = self.spec, attention_mask
        if mask is not None:
            mask = (mask if mask.dim() == 4 else mask[:, None, None, :]).bool()
        tables = rope_tables(x.shape[1], spec.head_dim, spec.rope_theta, x.device)
        cos, sin = (table[:, : spec.head_dim // 2] for table in tables)
        for layer in self.get_submodule(self.names["layer"].removesuffix(".{layer}.")):
            x = layer(x, cos, sin, mask)
        logits = self._at("head")(self._at("norm")(x))
        loss = None
        if labels is not None:
            predicted, targets = (logits[:, :-1], labels[:, 1:]) if spec.shifted else (logits, labels)
            loss = F.cross_entropy(predicted.flatten(0, 1).float(), targets.flatten())
        return MaskedLMOutput(loss=loss, logits=logits)

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        streamer: Any = None,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Call ``GenerationMixin.generate``, by default with :func:`sfs_triton.custom_generate`."""
        if kwargs.setdefault("custom_generate", custom_generate) is not custom_generate:
            if tokenizer is not None:
                kwargs["tokenizer"] = tokenizer
            return super().generate(inputs, generation_config, streamer=streamer, **kwargs)
        ids = kwargs.get("input_ids", inputs)
        valid = ids is None or isinstance(ids, torch.Tensor) and ids.dim() == 2
        require(valid, f"input_ids={repr(ids)} is not a tensor of token ids [B, L]")
        require(
            kwargs.get("assistant_model") is None,
            "assistant_model is not supported: a diffusion model decodes without drafts",
        )
        kwargs["custom_generate"] = partial(custom_generate, tokenizer=tokenizer)
        if streamer is not None:
            require(kwargs.get("on_step") is None, "give either streamer or on_step")
            kwargs["on_step"] = Drafts(streamer)
        own = self.generation_config.stop_strings
        require(own is None, f"model.generation_config.stop_strings={own!r}: pass them to generate instead")
        stops = getattr(generation_config, "stop_strings", None)
        if stops is not None:  # generate would need a tokenizer, and not pass it on
            generation_config = copy(generation_config)
            generation_config.stop_strings = None
            if kwargs.get("stop_strings") is None:
                kwargs["stop_strings"] = stops
        return super().generate(inputs, generation_config, **kwargs)


class LLaDAModelLM(MaskedDiffusionModel):
    config_class = LLaDAConfig


class ILLaDAModelLM(MaskedDiffusionModel):
    config_class = ILLaDAConfig


class DreamModel(MaskedDiffusionModel):
    config_class = DreamConfig


def register() -> None:
    """Register the classes with transformers' automatic classes: those named in LLaDA's files, and masked LM."""
    for model in (LLaDAModelLM, ILLaDAModelLM, DreamModel):
        config = model.config_class
        AutoConfig.register(config.model_type, config, exist_ok=True)
        for auto in (AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM):
            auto.register(config, model, exist_ok=True)
