"""transformers: engines on the weights of a loaded model, ``generate(custom_generate=...)``, and registered classes.

Importing this module registers the classes of :mod:`.transformers_models`, so that ``AutoModelForMaskedLM`` and the
other automatic classes load LLaDA, iLLaDA and Dream checkpoints without code from a checkpoint. Those need version 5;
the rest works with version 4 too, which is where the checkpoints' own code runs.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.dlpack import from_dlpack, to_dlpack

from ..caching import CachePolicy
from ..engine import DTYPES, Engine
from ..errors import ArgumentError, CheckpointError, MissingDependencyError, require
from ..generation import Frame, Generation
from ..loops import check_loop
from ..models import ModelSpec, Transformer, Weights, read_spec
from ..models.weights import LLADA_NAMES, LLAMA_NAMES, LayerWeights, expected_shapes
from ..ops import implementation
from ..samplers import Sampler, SlowFast
from ..text import TextCodec

try:
    import transformers
    from transformers import GenerationConfig, MaxLengthCriteria
    from transformers.generation import (
        EosTokenCriteria,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )
    from transformers.utils import ModelOutput
except ImportError as error:
    raise MissingDependencyError(f'this needs transformers ({error}): pip install "sfs_triton[hf]"') from error

HONOURED = {  # settings of a GenerationConfig that custom_generate reads, or that change nothing about its result
    *("max_length", "max_new_tokens", "do_sample", "temperature", "top_p", "top_k"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
    *("use_cache", "return_dict_in_generate", "disable_compile", "transformers_version"),
}
INSTEAD = {
    "guidance_scale": "sampler.cfg_scale (guidance_scale - 1) guides by a masked prompt",
    "num_return_sequences": "repeat the prompt, each row draws its own noise",
}
IGNORED = {"attention_mask", "logits_to_keep", "past_key_values", "position_ids", "use_cache"}  # or read by name
WARPERS = {TemperatureLogitsWarper: "temperature", TopKLogitsWarper: "top_k", TopPLogitsWarper: "top_p"}

if int(transformers.__version__.split(".")[0]) >= 5:
    from .transformers_models import register

    register()


# ------------------------------------------------------------------------------------------------------- accelerate


class _Known(NamedTuple):
    """An engine on a model's weights, and where those were then."""

    engine: Engine
    places: tuple[int, ...]
    impl: str | None
    loop: str | None


_ENGINES: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()
_LOCK = threading.RLock()


def accelerate(hf_model: nn.Module, impl: str | None = None, loop: str | None = None, tokenizer: Any = None) -> Engine:
    """An :class:`Engine` on the weights of a loaded LLaDA, iLLaDA or Dream model: its remote-code class, or ours.

    No weight exists twice. The engine wants q, k, v of a layer in one tensor, and gate and up in another; those are
    laid out anew, one at a time, and the model's own parameters then lie in them. So model and engine go on reading
    the same memory, and training changes it for both. ``hf_model.to(...)`` parts the two again.

    Args:
        hf_model: the model itself, on one device, without adapters, not quantised.
        impl, loop: as for :func:`sfs_triton.load`. :func:`custom_generate` uses this engine from then on.
        tokenizer: a tokenizer of transformers, or a :class:`TextCodec`; without it, prompts are token ids.

    Raises:
        ArgumentError: what ``hf_model`` is cannot be used as it is.
        CheckpointError: its configuration or parameters are not those of the family; names class and key.
    """
    _refuse_wrapped(hf_model)
    codec = tokenizer if tokenizer is None or isinstance(tokenizer, TextCodec) else TokenizerCodec(tokenizer)
    with _LOCK, torch.inference_mode(False), torch.no_grad():
        spec = _spec(hf_model)
        llada = any(name == LLADA_NAMES["embedding"] for name, _ in hf_model.named_parameters())
        names = LLADA_NAMES if llada else LLAMA_NAMES
        parameters = _parameters(hf_model, spec, names)
        device = parameters[names["embedding"]].device
        implementation(impl, device)  # refused before anything is laid out anew
        check_loop(loop, device)
        known = _ENGINES.get(hf_model)
        if known is not None and known.places == _places(hf_model):
            weights = known.engine.model.weights
        else:
            weights = _share(parameters, spec, names)
            if device.type == "cuda":
                torch.cuda.empty_cache()  # of what q, k, v and gate, up lay in: nothing else has such sizes
        engine = Engine(Transformer(spec, weights, impl), codec, loop)
        _ENGINES[hf_model] = _Known(engine, _places(hf_model), impl, loop)
    return engine


def _engine(model: nn.Module) -> Engine:
    """The model's engine; a new one where its parameters have moved since."""
    with _LOCK:
        known = _ENGINES.get(model)
        if known is None:
            return accelerate(model)
        if known.places != _places(model):
            return accelerate(model, known.impl, known.loop, known.engine.text)
        return known.engine


def _places(model: nn.Module) -> tuple[int, ...]:
    return tuple(p.data_ptr() for p in model.parameters())


def _refuse_wrapped(model: Any) -> None:
    """Refuse what is no plain model."""
    name = type(model).__name__
    require(isinstance(model, nn.Module), f"hf_model={model!r} is no torch module")
    require(
        not hasattr(model, "peft_config") and not getattr(model, "_hf_peft_config_loaded", False),
        f"hf_model is a {name} with adapters, which are not computed here: merge them into the weights first "
        "(peft: merge_and_unload())",
    )
    inner = next((n for n in ("module", "_orig_mod") if isinstance(getattr(model, n, None), nn.Module)), None)
    require(inner is None, f"hf_model is a {name} around a model: pass hf_model.{inner}")
    config = getattr(model, "config", None)
    require(callable(getattr(config, "to_dict", None)), f"hf_model is a {name} without a config that has to_dict()")
    quantised = getattr(config, "quantization_config", None) or getattr(model, "quantization_method", None)
    require(
        not quantised and not getattr(model, "is_quantized", False),
        f"hf_model is a {name} with quantised weights ({quantised}), which are not computed here: load it in "
        f"one of {tuple(DTYPES)}",
    )


def _spec(model: nn.Module) -> ModelSpec:
    try:
        return read_spec(model.config.to_dict())
    except CheckpointError as error:
        text = str(error).removeprefix("config.json: ").removeprefix("config.json ")
        raise type(error)(f"the config of {type(model).__name__}: {text}") from None


def _parameters(model: nn.Module, spec: ModelSpec, names: Mapping[str, str]) -> dict[str, nn.Parameter]:
    """The model's parameters by the names of a checkpoint, all that there must be and no others."""
    kind, wanted = type(model).__name__, expected_shapes(spec, names)
    present = dict(model.named_parameters(remove_duplicate=False))
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
        require(plain, f"{kind}: {name} is a {type(parameter.data).__name__}, spread or packed, no plain tensor")
        where = parameter.device
        require(where.type != "meta", f"{kind}: {name} is on the device 'meta': it is offloaded, or was never loaded")
        require(where == first.device, f"{kind}: {name} is on {str(where)!r}, others on {str(first.device)!r}")
        dtype = parameter.dtype
        require(dtype in DTYPES.values(), f"{kind}: {name} has dtype {dtype}, not one of {tuple(DTYPES)}")
        require(
            dtype == first.dtype, f"{kind}: {name} has dtype {dtype}, others {first.dtype}: hf_model.to(dtype) first"
        )
    return present


def _share(parameters: Mapping[str, nn.Parameter], spec: ModelSpec, names: Mapping[str, str]) -> Weights:
    """Weights in the memory of the parameters, some of which are moved to where the fused ones lie."""

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
        )

    embedding = _fuse([parameters[names["embedding"]]])
    return Weights(
        embedding=embedding,
        layers=tuple(layer(i) for i in range(spec.n_layers)),
        norm=_fuse([parameters[names["norm"]]]),
        head=embedding if spec.tied_head else _fuse([parameters[names["head"]]]),
    )


def _fuse(parts: Sequence[nn.Parameter]) -> torch.Tensor:
    """All parts in one tensor, along their first dimension; from then on they lie in its memory.

    Each keeps a storage of its own, which begins at its first element: of several tensors in one storage, what saves a
    model makes copies, or drops all but one.
    """
    if len(parts) == 1:
        parts[0].data = whole = parts[0].data.contiguous()
        return whole
    whole = torch.cat([p.data for p in parts])
    for part, view in zip(parts, whole.split([len(p) for p in parts]), strict=True):
        part.data = from_dlpack(to_dlpack(view))
    return whole


class TokenizerCodec(TextCodec):
    """A tokenizer of transformers, fast or not, as a :class:`TextCodec`."""

    def __init__(self, tokenizer: Any):
        fine = all(callable(getattr(tokenizer, n, None)) for n in ("encode", "decode", "apply_chat_template"))
        require(fine, f"tokenizer={tokenizer!r} is neither a tokenizer of transformers nor a TextCodec")
        super().__init__(tokenizer, getattr(tokenizer, "chat_template", None), {})

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def token_id(self, token: str) -> int | None:
        return self.tokenizer.get_vocab().get(token)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        try:
            return self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # whatever a stranger's template does wrong
            raise ArgumentError(f"the tokenizer's chat template refused messages={messages!r}: {error}") from None


# -------------------------------------------------------------------------------------------------- custom_generate


@dataclass
class MaskedDiffusionOutput(ModelOutput):
    """What :func:`custom_generate` gives.

    ``sequences [B, L + n]`` hold the prompts as given, then the responses up to and including their end-of-text, then
    padding. ``tokens_per_forward [B]`` are response tokens for each step, ``nfe [B]`` the steps.
    """

    sequences: torch.Tensor | None = None
    tokens_per_forward: torch.Tensor | None = None
    nfe: torch.Tensor | None = None


class Drafts:
    """Lets a streamer of transformers follow a generation: ``on_step=Drafts(streamer)``.

    It gets the prompt (``put``), the response's canvas after each step (``put_draft``, if it has one), and at the end
    the response (``put``, ``end``). With :meth:`Engine.stream`, call :meth:`begin`, then this with each frame, then
    :meth:`end`.
    """

    def __init__(self, streamer: Any):
        fine = all(callable(getattr(streamer, name, None)) for name in ("put", "end"))
        require(fine, f"streamer={streamer!r} has no put() and end()")
        require(
            not getattr(streamer, "_takes_logits", False), f"streamer={streamer!r} wants logits, which no step keeps"
        )
        self._streamer, self._starts = streamer, None

    def begin(self, prompts: torch.Tensor, starts: Sequence[int] | None = None) -> None:
        """Show prompts ``[B, L]``. ``starts``: where the canvases' responses begin, if some prompts are padded."""
        self._starts = [prompts.shape[1]] * len(prompts) if starts is None else list(starts)
        self._streamer.put(prompts.cpu())

    def __call__(self, frame: Frame) -> None:
        if callable(getattr(self._streamer, "put_draft", None)):
            starts = [0] * len(frame.tokens) if self._starts is None else self._starts
            rows = [row[start:] for row, start in zip(frame.tokens, starts, strict=True)]
            lengths = sorted({len(row) for row in rows})
            require(len(lengths) == 1, f"on_step: a streamer takes rows of one length, these have {lengths} positions")
            self._streamer.put_draft(torch.tensor(rows))

    def end(self, response: torch.Tensor) -> None:
        """Show responses ``[B, n]`` for good."""
        self._streamer.put(response.cpu())
        self._streamer.end()


def custom_generate(
    model: nn.Module,
    input_ids: torch.Tensor,
    logits_processor: Iterable[Any] | None = None,
    stopping_criteria: Iterable[Any] | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    sampler: Sampler | None = None,
    cache: str | CachePolicy = "none",
    seed: int | Sequence[int] = 0,
    gen_length: int | Sequence[int] | None = None,
    on_step: Callable[[Frame], None] | None = None,
    **model_kwargs: Any,
) -> MaskedDiffusionOutput:
    """For ``hf_model.generate(..., custom_generate=sfs_triton.custom_generate, sampler=...)``.

    Args:
        model: what :func:`accelerate` takes, which is called with it unless it was before.
        input_ids: prompts ``[B, L]``, padded on the left where ``attention_mask`` is 0.
        generation_config: its ``max_new_tokens`` or ``max_length`` says how long responses are; with ``do_sample`` its
            ``temperature``, ``top_p`` and ``top_k`` replace the sampler's. What it asks for beyond that is refused.
        sampler, cache, seed, on_step: as for :meth:`Engine.generate`; ``on_step`` may be a :class:`Drafts`.
        gen_length: response positions, instead of the configuration's; one number, or one a prompt.

    Raises:
        ArgumentError: names the argument or setting and its value.
    """
    settings = GenerationConfig() if generation_config is None else generation_config
    _refuse_settings(model, settings)
    _refuse_processors(settings, logits_processor, stopping_criteria)
    sampler = _sampling(sampler, settings)
    prompts = _prompts(input_ids, model_kwargs)
    if gen_length is None:
        room, width = settings.max_length, input_ids.shape[1]
        gen_length = settings.max_new_tokens if settings.max_new_tokens is not None or room is None else room - width
    require(gen_length is not None, "max_new_tokens=None: say how long the response is")
    engine = _engine(model)
    if isinstance(on_step, Drafts):
        on_step.begin(input_ids, [len(prompt) for prompt in prompts])
    rows = engine.generate(prompts, gen_length=gen_length, sampler=sampler, cache=cache, seed=seed, on_step=on_step)
    done = _output(input_ids, rows, settings, engine.spec)
    if isinstance(on_step, Drafts):
        on_step.end(done.sequences[:, input_ids.shape[1] :])
    return done


def _refuse_settings(model: nn.Module, settings: GenerationConfig) -> None:
    """Refuse what a configuration asks for and would not get. A checkpoint's own additions are passed over."""
    usual = GenerationConfig().to_dict()
    if hasattr(settings, "_get_default_generation_params"):  # transformers 5 fills them in when it generates
        usual |= settings._get_default_generation_params()
    own = getattr(model, "generation_config", None)
    own = {} if own is None else own.to_dict()
    asked = settings.to_dict()
    for name in sorted(asked, key=lambda name: name == "min_length"):  # which transformers derives from min_new_tokens
        value = asked[name]
        if name in HONOURED or name.startswith("_") or value is None or value == usual.get(name):
            continue
        if name not in usual and name in own and value == own[name]:
            continue
        hint = INSTEAD.get(name, "settings of a sampler go into sampler=" if name not in usual else "leave it out")
        raise ArgumentError(f"{name}={value!r} is not supported: {hint}")


def _refuse_processors(
    settings: GenerationConfig, processors: Iterable[Any] | None, criteria: Iterable[Any] | None
) -> None:
    """Refuse logits processors and stopping criteria but for those that ``generate`` makes of the configuration."""
    for processor in processors or ():
        setting = WARPERS.get(type(processor))
        mine = settings.do_sample and setting and getattr(processor, setting) == getattr(settings, setting)
        require(mine, f"logits_processor={processor!r} is not supported: a step of a diffusion model has no next token")
    for criterion in criteria or ():
        if type(criterion) is MaxLengthCriteria:
            fine = criterion.max_length == settings.max_length
        else:
            fine = type(criterion) is EosTokenCriteria and set(criterion.eos_token_id.tolist()) <= _ends(settings)
        require(fine, f"stopping_criteria={criterion!r} is not supported: use max_new_tokens, or sampler.eos_stop")


def _sampling(sampler: Sampler | None, settings: GenerationConfig) -> Sampler | None:
    """The sampler, with the configuration's temperature, top-p and top-k where it samples."""
    if not settings.do_sample:
        return sampler
    base = SlowFast() if sampler is None else sampler
    require(isinstance(base, Sampler), f"sampler={sampler!r} is not a SlowFast, Threshold or FixedSteps")
    for name in ("temperature", "top_p", "top_k"):
        value = getattr(base, name)
        require(not value, f"do_sample=True and sampler.{name}={value!r} are both given: which one is meant?")
    draw = {"temperature": 1.0 if settings.temperature is None else float(settings.temperature)}
    if settings.top_p is not None and settings.top_p < 1:
        draw["top_p"] = float(settings.top_p)
    if settings.top_k:
        draw["top_k"] = int(settings.top_k)
    return base.replace(**draw)


def _prompts(input_ids: torch.Tensor, model_kwargs: Mapping[str, Any]) -> list[list[int]]:
    """Token ids of each row, without what pads it on the left."""
    for name, value in model_kwargs.items():
        require(name in IGNORED or value is None, f"{name}={value!r} is not supported")
    past = model_kwargs.get("past_key_values")
    require(past is None or not past.get_seq_length(), "past_key_values holds positions: give the whole prompt instead")
    require(input_ids.dim() == 2, f"input_ids is a tensor of {input_ids.dim()} dimensions, not of 2")
    mask = model_kwargs.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(input_ids)
    fine = mask.shape == input_ids.shape
    require(fine, f"attention_mask is {list(mask.shape)}, input_ids {list(input_ids.shape)}")
    real = mask.bool()
    for row, given in enumerate(real.tolist()):
        require(given == sorted(given), f"attention_mask: row {row} is not padded on the left alone")
    positions = model_kwargs.get("position_ids")
    if positions is not None:
        usual = (real.long().cumsum(-1) - 1).to(positions.device)
        fine = positions.shape[-1] == usual.shape[-1] and ((positions == usual) | ~real.to(positions.device)).all()
        require(bool(fine), f"position_ids={positions.tolist()!r} do not count the prompt's tokens from 0")
    return [ids[keep].tolist() for ids, keep in zip(input_ids, real.to(input_ids.device), strict=True)]


def _ends(settings: GenerationConfig) -> set[int]:
    """The configuration's ends of text."""
    ids = settings.eos_token_id
    return set() if ids is None else set(torch.as_tensor(ids).flatten().tolist())


def _output(
    input_ids: torch.Tensor, rows: Sequence[Generation], settings: GenerationConfig, spec: ModelSpec
) -> MaskedDiffusionOutput:
    ends = _ends(settings) or {spec.eos_id}
    pad = spec.pad_id if settings.pad_token_id is None else int(settings.pad_token_id)
    responses = []
    for row in rows:
        stop = next((i + 1 for i, token in enumerate(row.response) if token in ends), len(row.response))
        responses.append(row.response[:stop])
    width, device = max(map(len, responses)), input_ids.device
    padded = [tokens + [pad] * (width - len(tokens)) for tokens in responses]
    nfe = torch.tensor([row.nfe for row in rows], device=device)
    tokens = torch.tensor([len(tokens) for tokens in responses], device=device)
    return MaskedDiffusionOutput(
        sequences=torch.cat((input_ids, torch.tensor(padded, device=device, dtype=input_ids.dtype)), 1),
        tokens_per_forward=tokens / nfe.clamp(min=1),
        nfe=nfe,
    )
