"""Engines on the weights of loaded models: :func:`accelerate`. Does not import transformers."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Mapping, Sequence
from reprlib import repr  # values may be as long as a vocabulary
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.dlpack import from_dlpack, to_dlpack

from ...checkpoint import spec_of
from ...decoding.params import refuse_unknown
from ...engine import DTYPES, Engine, check_runs, choice_for
from ...errors import ArgumentError, CheckpointError, require
from ...models import ModelSpec, Transformer, Weights
from ...models.names import LLADA_NAMES, LLAMA_NAMES, expected_shapes, of_tower
from ...models.weights import LayerWeights
from ...text.codec import TextCodec, check_unicode


class _SharedEngine(NamedTuple):
    """An engine on a model's weights, and the weights' addresses at its creation."""

    engine: Engine
    addresses: tuple[int, ...]
    backend: str | None
    cuda_graphs: bool | None


_ENGINES: weakref.WeakKeyDictionary[nn.Module, _SharedEngine] = weakref.WeakKeyDictionary()
_LOCK = threading.RLock()


def accelerate(
    hf_model: nn.Module,
    backend: str | None = None,
    cuda_graphs: bool | None = None,
    tokenizer: Any = None,
    **unknown: Any,
) -> Engine:
    """Create an :class:`Engine` on the weights of a loaded LLaDA, iLLaDA or Dream model, remote-code or ours.

    No weight is stored twice. The engine needs q, k, v of a layer in one tensor, and gate and up in another; those are
    copied, one at a time, and the model's own parameters become views of them. So model and engine read
    the same memory, and training changes it for both. ``hf_model.to(...)`` separates the two again. A vision tower and
    its projector stay as they are: their vectors go into ``prompt_embeds=`` of :meth:`Engine.generate`.

    Args:
        hf_model: the model itself, on one device, without adapters, not quantised.
        backend, cuda_graphs: as for :func:`sfs_triton.load`. :func:`custom_generate` then uses this engine.
        tokenizer: a tokenizer of transformers, or a :class:`TextCodec`; without it, prompts are token ids.

    Raises:
        ArgumentError: ``hf_model`` is not supported in its present form.
        CheckpointError: its configuration or parameters do not match the family; names class and key.
    """
    refuse_unknown(unknown, [*inspect.signature(accelerate).parameters][:-1])  # without itself
    _refuse_wrapped(hf_model)
    codec = as_codec(tokenizer)
    valid = backend is None or isinstance(backend, str)
    require(valid, f"backend={repr(backend)} is not the name of a back end; a tokenizer goes into tokenizer=")
    with _LOCK, torch.inference_mode(False), torch.no_grad():
        spec = _spec(hf_model, codec)
        llada = any(name == LLADA_NAMES["embedding"] for name, _ in hf_model.named_parameters())
        names = LLADA_NAMES if llada else LLAMA_NAMES
        parameters = _parameters(hf_model, spec, names)
        device = parameters[names["embedding"]].device
        check_runs(backend, cuda_graphs, device)  # before any weight is copied
        known = _ENGINES.get(hf_model)
        if known is not None and known.addresses == _addresses(hf_model):
            weights = known.engine.model.weights
        else:
            weights = _shared_weights(parameters, spec, names)
            if device.type == "cuda":
                torch.cuda.empty_cache()  # memory of the unfused weights: no other tensor has these sizes
        runs = choice_for(backend, cuda_graphs, spec, device, parameters[names["embedding"]].dtype, None)
        model, pinned = Transformer(spec, weights, runs.backend), backend is not None
        how = {"reason": runs.reason, "distrust": runs.distrust}
        engine = Engine(model, codec, runs.cuda_graphs, pinned=pinned, **how)
        _ENGINES[hf_model] = _SharedEngine(engine, _addresses(hf_model), backend, cuda_graphs)
    return engine


def engine_of(model: nn.Module) -> Engine:
    """Return the model's engine; create a new one if its parameters have moved."""
    with _LOCK:
        known = _ENGINES.get(model)
        if known is None:
            return accelerate(model)
        if known.addresses != _addresses(model):
            return accelerate(model, known.backend, known.cuda_graphs, known.engine.text)
        return known.engine


def _addresses(model: nn.Module) -> tuple[int, ...]:
    return tuple(p.data_ptr() for p in model.parameters())


def _refuse_wrapped(model: Any) -> None:
    """Refuse anything but a plain model."""
    name = type(model).__name__
    require(isinstance(model, nn.Module), f"hf_model={repr(model)} is not a torch module")
    require(
        not hasattr(model, "peft_config") and not getattr(model, "_hf_peft_config_loaded", False),
        f"hf_model is a {name} with adapters, which are not supported: merge them into the weights first "
        "(peft: merge_and_unload())",
    )
    inner = next((n for n in ("module", "_orig_mod") if isinstance(getattr(model, n, None), nn.Module)), None)
    require(inner is None, f"hf_model is a {name} around a model: pass hf_model.{inner}")
    config = getattr(model, "config", None)
    require(callable(getattr(config, "to_dict", None)), f"hf_model is a {name} without a config that has to_dict()")
    quantised = getattr(config, "quantization_config", None) or getattr(model, "quantization_method", None)
    require(
        not quantised and not getattr(model, "is_quantized", False),
        f"hf_model is a {name} with quantised weights ({quantised}), which are not supported: load it in "
        f"one of {tuple(DTYPES)}",
    )


def _spec(model: nn.Module, codec: TextCodec | None) -> ModelSpec:
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    try:
        return spec_of(model.config.to_dict(), codec, "generation_config: eos_token_id", ends)
    except CheckpointError as error:
        text = str(error).removeprefix("config.json: ").removeprefix("config.json ")
        raise type(error)(f"the config of {type(model).__name__}: {text}") from None


def _parameters(model: nn.Module, spec: ModelSpec, names: Mapping[str, str]) -> dict[str, nn.Parameter]:
    """Return the model's parameters by checkpoint name; refuse missing and additional ones."""
    kind, wanted = type(model).__name__, expected_shapes(spec, names)
    named = model.named_parameters(remove_duplicate=False)
    present = {name: parameter for name, parameter in named if not of_tower(name)}
    if spec.tied_head and (head := present.pop(names["head"], None)) is not None:
        require(
            head is present.get(names["embedding"]),
            f"{kind}: its config ties {names['head']} to {names['embedding']}, the model does not: tie_weights() does",
        )
    for title, those in (("lacks", wanted.keys() - present.keys()), ("has no place for", present.keys() - wanted)):
        if those:
            more = f" and {len(those) - 4} more" if len(those) > 4 else ""
            raise CheckpointError(f"{kind} {title} parameters: {', '.join(sorted(those)[:4])}{more}")
    for name, shape in wanted.items():
        if tuple(present[name].shape) != shape:
            found = list(present[name].shape)
            raise CheckpointError(f"{kind}: {name} has shape {found}, the configuration says {list(shape)}")
    first = present[names["embedding"]]
    for name, parameter in present.items():
        plain = type(parameter.data) is torch.Tensor
        require(
            plain,
            f"{kind}: {name} is a {type(parameter.data).__name__}, not a plain tensor: it is distributed or packed",
        )
        where = parameter.device
        require(where.type != "meta", f"{kind}: {name} is on the device 'meta': it is offloaded, or was never loaded")
        require(where == first.device, f"{kind}: {name} is on {str(where)!r}, others on {str(first.device)!r}")
        dtype = parameter.dtype
        require(dtype in DTYPES.values(), f"{kind}: {name} has dtype {dtype}, not one of {tuple(DTYPES)}")
        require(
            dtype == first.dtype, f"{kind}: {name} has dtype {dtype}, others {first.dtype}: hf_model.to(dtype) first"
        )
    return present


def _shared_weights(parameters: Mapping[str, nn.Parameter], spec: ModelSpec, names: Mapping[str, str]) -> Weights:
    """Return weights that share the parameters' memory; parameters of fused weights are moved into these."""

    def layer(index: int) -> LayerWeights:
        at = names["layer"].format(layer=index)

        def take(*parts: str) -> torch.Tensor:
            return _fuse([parameters[at + part] for part in parts])

        qkv = [names[part] for part in ("q", "k", "v")]
        return LayerWeights(
            attn_norm=take(names["attn_norm"]),
            qkv=take(*(f"{part}.weight" for part in qkv)),
            qkv_bias=take(*(f"{part}.bias" for part in qkv)) if spec.qkv_bias else None,
            out=take(names["o"]),
            mlp_norm=take(names["mlp_norm"]),
            gate_up=take(names["gate"], names["up"]),
            down=take(names["down"]),
            **{part: take(names[part]) for part in ("q_norm", "k_norm") if spec.qk_norm},
        )

    embedding = _fuse([parameters[names["embedding"]]])
    return Weights(
        embedding=embedding,
        layers=tuple(layer(i) for i in range(spec.n_layers)),
        norm=_fuse([parameters[names["norm"]]]),
        head=embedding if spec.tied_head else _fuse([parameters[names["head"]]]),
    )


def _fuse(parts: Sequence[nn.Parameter]) -> torch.Tensor:
    """Concatenate the parts along their first dimension; they become views of the result.

    Each keeps its own storage, which starts at its first element: for several tensors in one storage, functions
    that save a model write copies, or drop all but one.
    """
    if len(parts) == 1:
        parts[0].data = whole = parts[0].data.contiguous()
        return whole
    whole = torch.cat([p.data for p in parts])
    for part, view in zip(parts, whole.split([len(p) for p in parts]), strict=True):
        part.data = from_dlpack(to_dlpack(view))
    return whole


def as_codec(tokenizer: Any) -> TextCodec | None:
    """Return a codec for a transformers tokenizer; a codec or None is returned unchanged."""
    return tokenizer if tokenizer is None or isinstance(tokenizer, TextCodec) else TokenizerCodec(tokenizer)


class TokenizerCodec(TextCodec):
    """A :class:`TextCodec` of a transformers tokenizer, fast or slow."""

    def __init__(self, tokenizer: Any):
        valid = all(callable(getattr(tokenizer, n, None)) for n in ("encode", "decode", "apply_chat_template"))
        require(valid, f"tokenizer={repr(tokenizer)} is neither a tokenizer of transformers nor a TextCodec")
        names = getattr(tokenizer, "special_tokens_map", {}).items()
        special = {name: str(token) for name, token in names if isinstance(token, str)}
        super().__init__(tokenizer, getattr(tokenizer, "chat_template", None), special)

    def encode(self, text: str) -> list[int]:
        check_unicode("text", text)
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def token_id(self, token: str) -> int | None:
        return self.tokenizer.get_vocab().get(token)

    def token_of(self, index: int) -> str | None:
        return self.tokenizer.convert_ids_to_tokens(index)

    def special_ids(self) -> dict[str, int]:
        added = self.tokenizer.added_tokens_decoder
        return {token.content: index for index, token in added.items() if token.special}

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        try:
            return self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template can raise anything
            raise ArgumentError(f"the tokenizer's chat template refused messages={messages!r}: {error}") from None
