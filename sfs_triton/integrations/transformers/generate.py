"""``hf_model.generate(custom_generate=...)``: check its settings, generate with an engine, return its output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache, GenerationConfig, MaxLengthCriteria
from transformers.generation import (
    EosTokenCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils import ModelOutput

from ...decoding.caching import CachePolicy
from ...decoding.params import parse_sampler
from ...decoding.samplers import Sampler
from ...errors import ArgumentError, require
from ...models import ModelSpec
from ...scheduling.outputs import Frame, Generation
from ...text.codec import TextCodec
from .engines import as_codec, engine_of

SUPPORTED = {  # settings of a GenerationConfig that custom_generate reads, or that do not affect its result
    *("max_length", "max_new_tokens", "do_sample", "temperature", "top_p", "top_k"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
    *("use_cache", "return_dict_in_generate", "disable_compile", "transformers_version"),
}
INSTEAD = {
    "guidance_scale": "sampler.cfg_scale (guidance_scale - 1) guides by a masked prompt",
    "num_return_sequences": "repeat the prompt, each sequence draws its own noise",
}
IGNORED = {"attention_mask", "logits_to_keep", "past_key_values", "position_ids", "use_cache"}  # or read separately
WARPERS = {TemperatureLogitsWarper: "temperature", TopKLogitsWarper: "top_k", TopPLogitsWarper: "top_p"}


@dataclass
class MaskedDiffusionOutput(ModelOutput):
    """Output of :func:`custom_generate`.

    ``sequences [B, L + n]`` hold the prompts as given, then the responses up to and including their end-of-text or
    the token that completes a stop string, then padding. ``tokens_per_forward [B]``: response tokens per step,
    including those after a stop string; ``nfe [B]``: steps.
    """

    sequences: torch.Tensor | None = None
    tokens_per_forward: torch.Tensor | None = None
    nfe: torch.Tensor | None = None


class Drafts:
    """Adapter of a transformers streamer to a generation: ``on_step=Drafts(streamer)``.

    The streamer gets the prompt (``put``), the response's canvas after each step (``put_draft``, if it has one), and at
    the end the response (``put``, ``end``). With :meth:`Engine.stream`, call :meth:`begin`, then this object with each
    frame, then :meth:`end`.
    """

    def __init__(self, streamer: Any):
        valid = all(callable(getattr(streamer, name, None)) for name in ("put", "end"))
        require(valid, f"streamer={streamer!r} has no put() and end()")
        takes_logits = getattr(streamer, "_takes_logits", False)
        require(not takes_logits, f"streamer={streamer!r} takes logits, which no step keeps")
        self._streamer, self._starts = streamer, None

    def begin(self, prompts: torch.Tensor, starts: Sequence[int] | None = None) -> None:
        """Show prompts ``[B, L]``. ``starts``: first response position of each canvas, if some prompts are padded."""
        self._starts = [prompts.shape[1]] * len(prompts) if starts is None else list(starts)
        self._streamer.put(prompts.cpu())

    def __call__(self, frame: Frame) -> None:
        if callable(getattr(self._streamer, "put_draft", None)):
            starts = [0] * len(frame.tokens) if self._starts is None else self._starts
            responses = [canvas[start:] for canvas, start in zip(frame.tokens, starts, strict=True)]
            lengths = sorted({len(response) for response in responses})
            require(len(lengths) == 1, f"on_step: a streamer takes responses of one length, these have {lengths}")
            self._streamer.put_draft(torch.tensor(responses))

    def end(self, response: torch.Tensor) -> None:
        """Show the final responses ``[B, n]``."""
        self._streamer.put(response.cpu())
        self._streamer.end()


def custom_generate(
    model: nn.Module,
    input_ids: torch.Tensor,
    logits_processor: Iterable[Any] | None = None,
    stopping_criteria: Iterable[Any] | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    sampler: str | Sampler | None = None,
    cache: str | CachePolicy = "none",
    seed: int | Sequence[int] = 0,
    gen_length: int | Sequence[int] | None = None,
    on_step: Callable[[Frame], None] | None = None,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    **model_kwargs: Any,
) -> MaskedDiffusionOutput:
    """Generate with the model's engine: ``hf_model.generate(..., custom_generate=sfs_triton.custom_generate)``.

    Args:
        model: a model for :func:`accelerate`, which is called unless it was before.
        input_ids: prompts ``[B, L]``, padded on the left where ``attention_mask`` is 0.
        generation_config: its ``max_new_tokens`` or ``max_length`` sets the response length; with ``do_sample`` its
            ``temperature``, ``top_p`` and ``top_k`` replace the sampler's. Other non-default settings are refused.
        sampler, cache, seed, on_step: as for :meth:`Engine.generate`; ``on_step`` may be a :class:`Drafts`.
        gen_length: response positions, instead of the configuration's; one number, or one per prompt.
        stop_strings: cut each response after the token that completes the first of these. All positions are decoded.
        tokenizer: decodes responses to find the stop strings; default: the one given to :func:`accelerate`.
            ``generate`` does not pass its own ``tokenizer=`` to a ``custom_generate``, except in the classes of this
            package.

    Raises:
        ArgumentError: names the argument or setting and its value.
    """
    if isinstance(cache, Cache):  # created by generate
        _refuse_past("cache", cache)
        cache = "none"
    settings = GenerationConfig() if generation_config is None else generation_config
    _refuse_settings(model, settings)
    _refuse_processors(settings, logits_processor, stopping_criteria)
    sampler = _sampling(sampler, settings)
    prompts = _prompts(input_ids, model_kwargs)
    if gen_length is None:
        gen_length = settings.max_new_tokens
        if gen_length is None and settings.max_length is not None:
            gen_length = settings.max_length - input_ids.shape[1]
    require(gen_length is not None, "max_new_tokens=None: the response needs a length")
    engine = engine_of(model)
    stops = None if stop_strings is None else StopStrings(stop_strings, as_codec(tokenizer) or engine.text)
    if isinstance(on_step, Drafts):
        on_step.begin(input_ids, [len(prompt) for prompt in prompts])
    done = engine.generate(prompts, gen_length=gen_length, sampler=sampler, cache=cache, seed=seed, on_step=on_step)
    output = _output(input_ids, done, settings, engine.spec, stops)
    if isinstance(on_step, Drafts):
        on_step.end(output.sequences[:, input_ids.shape[1] :])
    return output


def _refuse_settings(model: nn.Module, settings: GenerationConfig) -> None:
    """Refuse non-default settings that would have no effect. A checkpoint's own additions are ignored."""
    defaults = GenerationConfig().to_dict()
    if hasattr(settings, "_get_default_generation_params"):  # transformers 5 fills them in at generation
        defaults |= settings._get_default_generation_params()
    own = getattr(model, "generation_config", None)
    own = {} if own is None else own.to_dict()
    given = settings.to_dict()
    for name in sorted(given, key=lambda name: name == "min_length"):  # last: derived from min_new_tokens
        value = given[name]
        if name in SUPPORTED or name.startswith("_") or value is None or value == defaults.get(name):
            continue
        if name not in defaults and name in own and value == own[name]:
            continue
        hint = INSTEAD.get(name, "settings of a sampler go into sampler=" if name not in defaults else "leave it out")
        raise ArgumentError(f"{name}={value!r} is not supported: {hint}")


def _refuse_processors(
    settings: GenerationConfig, processors: Iterable[Any] | None, criteria: Iterable[Any] | None
) -> None:
    """Refuse logits processors and stopping criteria except those that ``generate`` derives from ``settings``."""
    for processor in processors or ():
        setting = WARPERS.get(type(processor))
        derived = settings.do_sample and setting and getattr(processor, setting) == getattr(settings, setting)
        require(
            derived, f"logits_processor={processor!r} is not supported: a step of a diffusion model has no next token"
        )
    for criterion in criteria or ():
        if type(criterion) is MaxLengthCriteria:
            derived = criterion.max_length == settings.max_length
        else:
            derived = type(criterion) is EosTokenCriteria and set(criterion.eos_token_id.tolist()) <= _ends(settings)
        require(derived, f"stopping_criteria={criterion!r} is not supported: use max_new_tokens, or sampler.eos_stop")


def _sampling(sampler: str | Sampler | None, settings: GenerationConfig) -> str | Sampler | None:
    """Return the sampler; with ``do_sample``, with the configuration's temperature, top-p and top-k."""
    if not settings.do_sample:
        return sampler
    base = parse_sampler("slowfast" if sampler is None else sampler)
    for name in ("temperature", "top_p", "top_k"):
        value = getattr(base, name)
        require(not value, f"do_sample=True and sampler.{name}={value!r} are both given: leave one out")
    draw = {"temperature": 1.0 if settings.temperature is None else float(settings.temperature)}
    if settings.top_p is not None and settings.top_p < 1:
        draw["top_p"] = float(settings.top_p)
    if settings.top_k:
        draw["top_k"] = int(settings.top_k)
    return base.replace(**draw)


def _refuse_past(name: str, past: Any) -> None:
    require(past is None or not past.get_seq_length(), f"{name} holds cached positions: pass the whole prompt instead")


def _prompts(input_ids: torch.Tensor, model_kwargs: Mapping[str, Any]) -> list[list[int]]:
    """Return the token ids of each prompt, without its left padding."""
    for name, value in model_kwargs.items():
        require(name in IGNORED or value is None, f"{name}={value!r} is not supported")
    _refuse_past("past_key_values", model_kwargs.get("past_key_values"))
    require(input_ids.dim() == 2, f"input_ids is a tensor of {input_ids.dim()} dimensions, not of 2")
    mask = model_kwargs.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(input_ids)
    same = mask.shape == input_ids.shape
    require(same, f"attention_mask is {list(mask.shape)}, input_ids {list(input_ids.shape)}")
    real = mask.bool()
    for index, given in enumerate(real.tolist()):
        require(any(given), f"attention_mask: prompt {index} is empty")
        require(given == sorted(given), f"attention_mask: prompt {index} is padded elsewhere than on the left")
    positions = model_kwargs.get("position_ids")
    if positions is not None:
        counted = (real.long().cumsum(-1) - 1).to(positions.device)
        same = positions.shape[-1] == counted.shape[-1] and ((positions == counted) | ~real.to(positions.device)).all()
        require(bool(same), f"position_ids={positions.tolist()!r} do not count the prompt's tokens from 0")
    return [ids[keep].tolist() for ids, keep in zip(input_ids, real.to(input_ids.device), strict=True)]


def _ends(settings: GenerationConfig) -> set[int]:
    """Return the configuration's end-of-text ids."""
    ids = settings.eos_token_id
    return set() if ids is None else set(torch.as_tensor(ids).flatten().tolist())


class StopStrings:
    """Stop strings, and the tokenizer to find them in a response's tokens."""

    def __init__(self, strings: str | Sequence[str], codec: TextCodec | None):
        valid = isinstance(strings, (str, list, tuple))
        require(valid, f"stop_strings={strings!r} is neither a string nor a list of strings")
        self.strings = (strings,) if isinstance(strings, str) else tuple(strings)
        for text in self.strings:
            valid = isinstance(text, str) and text != ""
            require(valid, f"stop_strings={strings!r} holds {text!r}, which is not a non-empty string")
        require(
            codec is not None,
            f"stop_strings={strings!r} cannot be found without a tokenizer: call sfs_triton.accelerate(hf_model, "
            "tokenizer=tokenizer) first (generate does not pass its tokenizer= on)",
        )
        self._decode = codec.tokenizer.decode

    def cut(self, tokens: list[int]) -> list[int]:
        """Return the tokens up to and including the one that completes the first stop string, or all tokens.

        Special tokens count as text.
        """
        if self._stops_in(tokens):
            return tokens[: next(n for n in range(1, len(tokens) + 1) if self._stops_in(tokens[:n]))]
        return tokens

    def _stops_in(self, tokens: list[int]) -> bool:
        text = self._decode(tokens, skip_special_tokens=False)
        return any(stop in text for stop in self.strings)


def _output(
    input_ids: torch.Tensor,
    generations: Sequence[Generation],
    settings: GenerationConfig,
    spec: ModelSpec,
    stops: StopStrings | None,
) -> MaskedDiffusionOutput:
    """Build the output: responses cut at their end-of-text and stop strings, then padded to one length."""
    ends = _ends(settings) or set(spec.end_ids)
    pad = spec.pad_id if settings.pad_token_id is None else int(settings.pad_token_id)
    responses = []
    for done in generations:
        end = next((i + 1 for i, token in enumerate(done.response) if token in ends), len(done.response))
        responses.append(done.response[:end])
    device = input_ids.device
    nfe = torch.tensor([done.nfe for done in generations], device=device)
    lengths = torch.tensor([len(tokens) for tokens in responses], device=device)
    if stops is not None:
        responses = [stops.cut(tokens) for tokens in responses]
    width = max(map(len, responses))
    padded = [tokens + [pad] * (width - len(tokens)) for tokens in responses]
    return MaskedDiffusionOutput(
        sequences=torch.cat((input_ids, torch.tensor(padded, device=device, dtype=input_ids.dtype)), 1),
        tokens_per_forward=lengths / nfe.clamp(min=1),
        nfe=nfe,
    )
