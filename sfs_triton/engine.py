"""Load a checkpoint and generate with it."""

from __future__ import annotations

import inspect
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields as fields_of
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy
import torch

from .checkpoint import find, open_checkpoint
from .decoding.caching import BatchBounds, CachePolicy
from .decoding.likelihood import Likelihood, LikelihoodParams
from .decoding.params import SEEDS, DecodingParams, parse_sampler, refuse_unknown
from .distributed import ALONE, Group, join, own_device
from .errors import ArgumentError, as_plain, check_choice, check_flag, check_integer, first_line, require
from .models import ModelSpec, Transformer, load_weights, update_weights
from .ops.dispatch import FORMATS, check_int8, check_kernels, operations
from .runner import ExecutionChoice, check_cuda_graphs
from .runner.likelihood import LikelihoodRunner, Question
from .runner.prompt_embeds import PromptEmbeds
from .runner.stream import working
from .scheduling.handles import Pending, Stream
from .scheduling.outputs import Frame, Generation
from .scheduling.run import Run
from .scheduling.scheduler import BatchPool, Scheduler, bounds_around, bounds_of
from .scheduling.sequence import Sequence as InFlight
from .self_check.choice import Choice, choose
from .text.codec import TextCodec

logger = logging.getLogger("sfs_triton")

ASKED = "as asked for, or the default of the device"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Prompt = str | Sequence[int] | torch.Tensor | numpy.ndarray | Sequence[Mapping[str, Any]]
_ARRAYS = (torch.Tensor, numpy.ndarray)
_PROMPTS = (str, Sequence, *_ARRAYS)
Places = tuple[Sequence[int], torch.Tensor | numpy.ndarray]  # of a prompt, and the vectors there
Embeds = Places | Sequence[Places | None] | None
Params = DecodingParams | Sequence[DecodingParams] | None


def load(
    path_or_hub_id: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    backend: str | None = None,
    cuda_graphs: bool | None = None,
    *,
    quantization: str | None = None,
    tensor_parallel: int | Group = 1,
    mask_token_id: int | None = None,
    max_length: int | None = None,
    adapter: str | Path | None = None,
    **unknown: Any,
) -> Engine:
    """Load a checkpoint folder, a hub id, or ``"embedded"`` (the small model in this package) as an :class:`Engine`.

    Args:
        path_or_hub_id: a folder with ``config.json`` and safetensors, a ``.gguf`` file, or a hub id
            (``GSAI-ML/LLaDA-8B-Instruct``), optionally at a revision: a branch, tag or commit
            (``GSAI-ML/LLaDA-8B-Instruct@08b83a6``).
        device: default: a GPU if there is one.
        dtype: default: bfloat16 on a GPU (float16 where it has no bfloat16), float32 on a CPU.
        backend: ``"torch"`` or ``"triton"`` for all operations.
        cuda_graphs: replay captured CUDA graphs instead of launching operations one by one. Default on a GPU, where
            neither this nor ``backend`` is given: Triton in CUDA graphs if a check on the card speaks for it
            (docs/doctor.md). Otherwise: torch, no graphs.
        quantization: ``"fp8"`` keeps matrices as float8 with a scale per row, decoded in every product; all other
            tensors and activations stay in ``dtype``. ``"int8"``, on a CPU only, keeps them as int8, and products round
            their inputs to int8, too: several times as fast as float32. ``"int4"`` and ``"int4-64"`` keep them in 4
            bits, decoded in every product, with a scale for 128 or 64 weights of a row, and the head as ``"fp8"``
            does. Default: as the checkpoint has them: GPTQ, AWQ and compressed-tensors may have them in 4 bits.
        tensor_parallel: processes that share the model, started by ``torchrun --nproc-per-node N``; each loads its part
            only, and all must then make the same calls. Or the group that :func:`sfs_triton.distributed.join` gave.
        mask_token_id: id of the mask token, for checkpoints that do not name it in ``config.json`` or the tokenizer.
        max_length: limit of prompt and response in positions; default: the checkpoint's own, which may be more than
            it was trained on (Dream-7B: 131,072 by its configuration, 2,048 by its README).
        adapter: folder or hub id of a LoRA adapter as PEFT saves it, merged into the weights in float32 while loading.

    Raises:
        ArgumentError: names the argument and its value.
        RankFailure: another process could not load its part, or has not come.
        BackendError: ``backend="triton"`` or CUDA graphs were asked for, and kernels cannot run.
        CheckpointError: names the file, key or tensor at fault. Code and pickles in a checkpoint are never touched.
    """
    refuse_unknown(unknown, [*inspect.signature(load).parameters][:-1])  # without itself
    group = tensor_parallel if isinstance(tensor_parallel, Group) else join(tensor_parallel, device)
    with group.together("loading the model"):
        source = {"mask_token_id": mask_token_id, "max_length": max_length, "adapter": adapter}
        engine = _load(path_or_hub_id, device, dtype, backend, cuda_graphs, quantization, group, **source)
    model = engine.model
    group.agree("models", f"{model.spec}, {model.dtype}, {quantization}, {backend}, {model.device.type}")
    return engine


def _load(
    path_or_hub_id: str | Path,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    backend: str | None,
    cuda_graphs: bool | None,
    quantization: str | None,
    group: Group,
    **source: Any,
) -> Engine:
    device = usable_device(device if group.size == 1 else own_device(device))
    check_runs(backend, cuda_graphs, device)  # fail before gigabytes are read
    if dtype is None:
        dtype = default_dtype(device)
    if isinstance(dtype, str):
        check_choice("dtype", dtype, DTYPES)
        dtype = DTYPES[dtype]
    require(dtype in DTYPES.values(), f"dtype={dtype!r} is not one of {tuple(DTYPES)}")
    fine = quantization in (None, *FORMATS)
    require(fine, f"quantization={quantization!r} is not one of {tuple(FORMATS)}, or None")
    if quantization == "int8":
        check_int8(device, backend)
    checkpoint = open_checkpoint(path_or_hub_id, **source)
    spec = checkpoint.spec
    spec.shard(group.size)  # fail before anything is read
    runs = choice_for(backend, cuda_graphs, spec, device, dtype, quantization or checkpoint.stored, group)
    how = {"quantization": quantization, "adapter": checkpoint.adapter}
    how["by_column"] = device.type == "cpu" and dtype == torch.float32 and runs.backend != "triton"
    loaded = load_weights(checkpoint.path, spec, device, dtype, group, **how)
    model, pinned = Transformer(spec, loaded, runs.backend, group), backend is not None
    how = {"reason": runs.reason, "distrust": runs.distrust}
    return Engine(model, checkpoint.text, runs.cuda_graphs, pinned=pinned, **how)


def check_runs(backend: str | None, cuda_graphs: bool | None, device: torch.device) -> None:
    """Raise unless the back end and the execution that were asked for can run on ``device``."""
    operations(backend, device)
    check_cuda_graphs(cuda_graphs, device)
    if backend == "triton" or cuda_graphs:
        check_kernels(device)


def choice_for(
    backend: str | None,
    cuda_graphs: bool | None,
    spec: ModelSpec,
    device: torch.device,
    dtype: torch.dtype,
    quantization: str | None,
    group: Group = ALONE,
) -> Choice:
    """Return the back end and the execution that were asked for; on a GPU, where neither was, what a check chooses."""
    if device.type == "cuda" and backend is None and cuda_graphs is None:
        return choose(spec, device, dtype, quantization, group)
    return Choice(backend, cuda_graphs, ASKED)


def default_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype that a model has on ``device`` unless another is asked for."""
    if device.type != "cuda":
        return torch.float32
    with torch.cuda.device(device):
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        name = torch.cuda.get_device_name()
    logger.warning("%s has no bfloat16: the model is loaded in float16 (dtype='float16')", name)
    return torch.float16


def usable_device(device: str | torch.device | None) -> torch.device:
    """Return the device, by default a GPU if there is one; raise ArgumentError if it cannot be used."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
        torch.zeros(1, device=device)  # a well-formed name may mean an absent device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ArgumentError(f"device={str(device)!r} cannot be used: {first_line(error)}") from None
    require(device.type != "meta", f"device={str(device)!r} cannot be used: it computes nothing")
    return device


class Engine:
    """A loaded model with its text codec. Generations may run concurrently, in threads or nested.

    Args:
        model: the model, with the operations of its back end.
        text: tokenizer and chat template.
        cuda_graphs: replay captured CUDA graphs.
        pinned: raise the error of a kernel that fails. False: plain torch and eager execution take over.
        reason: of back end and execution, for :meth:`describe`.
        distrust: called with the failure of a kernel that gives way to plain torch.
    """

    def __init__(
        self,
        model: Transformer,
        text: TextCodec | None = None,
        cuda_graphs: bool | None = None,
        *,
        pinned: bool = True,
        reason: str = ASKED,
        distrust: Callable[[str], None] | None = None,
    ):
        self.text, self._reason = text, reason
        if model.group.size > 1:
            # a graph would hold collectives, which nothing here captures
            require(not cuda_graphs, f"cuda_graphs=True does not go with tensor_parallel={model.group.size}")
        self._execution = ExecutionChoice(model, cuda_graphs, pinned, distrust)
        self.batches = BatchPool(self._execution)
        self._lock = threading.Lock()
        self._worker: ThreadPoolExecutor | None = None
        self._abandoned: deque[Callable[[], None]] = deque()  # ends of streams that were dropped before their end

    @property
    def model(self) -> Transformer:
        """The model, with the operations in use."""
        return self._execution.model

    @property
    def spec(self):
        return self.model.spec

    def describe(self) -> dict[str, Any]:
        """Return the weights' format, the back end and the execution in use, the reason for them, why another pair was
        given up, if one was, and why nothing runs any more, if the device has failed."""
        choice, model = self._execution, self.model
        fault = None if choice.fault is None else str(choice.fault)
        return {
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "quantization": model.weights.quantization,
            "backend": choice.pair.backend,
            "execution": self.execution,
            "reason": self._reason,
            "fallback": choice.reason,
            "fault": fault,
        }

    @property
    def execution(self) -> str:
        """Name of the execution of steps: ``"eager"`` or ``"cuda_graphs"``."""
        return self._execution.current.name

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params = None,
        *,
        apply_chat_template: bool = True,
        trace: bool = False,
        on_step: Callable[[Frame], None] | None = None,
        prompt_embeds: Embeds = None,
        **fields: Any,
    ) -> Generation | list[Generation]:
        """Generate for one prompt (returns a :class:`Generation`) or a list of prompts (returns a list of them).

        Args:
            prompts: text, token ids (a list, an array or a tensor), or chat messages; or a list of those. Without any
                token ids, or with empty text outside of a chat template, the response has no prompt.
            params: a :class:`DecodingParams`, or a list with one per prompt.
            apply_chat_template: make text a user turn in the checkpoint's chat template, if it has one.
            trace: keep a :class:`StepTrace` for every step.
            on_step: called with a :class:`Frame` after every step.
            prompt_embeds: vectors in place of some of a prompt's tokens: a pair ``(places, vectors [n, d])``. The ids
                there, any but the mask's, mean nothing. With a list of prompts: a pair or None for each.
            fields: instead of ``params``, its fields:

                * ``sampler``, a sampler or its name (``"slowfast"``, ``"threshold"``, ``"fixed"``, ``"vanilla"``);
                  default: ``SlowFast()``, the paper's settings.
                * ``cache``, a policy or its name; default: ``"none"``.
                * ``gen_length``, response positions; one number, or one per prompt; default: 128.
                * ``seed`` of the noise, for temperatures above 0; one number (prompt ``i`` then uses ``seed + i``) or
                  one per prompt; default: 0.

        Raises:
            ArgumentError: names the argument and its value.
            OutOfDeviceMemory: says how much is needed, and what would fit.
            DeviceFault: the device has failed, now or before.
            NumericalFault: the model produced NaN; names sequence and step. ``finished`` has the results of the others.
        """
        options = {"apply_chat_template": apply_chat_template, "trace": trace, "frames": _frames_for(on_step)}
        options["prompt_embeds"] = prompt_embeds
        sequences, single = self.sequences(prompts, params, **options, **fields)
        return self._finish(sequences, single, on_step)

    def infill(
        self,
        canvases: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        params: Params = None,
        *,
        trace: bool = False,
        on_step: Callable[[Frame], None] | None = None,
        **fields: Any,
    ) -> Generation | list[Generation]:
        """Fill in the masks of a canvas, wherever they are. Text marks them with the checkpoint's mask token.

        Arguments as for :meth:`generate`; ``gen_length`` has no meaning. ``prompt_length`` of the result is 0: the
        whole canvas is the response.
        """
        single = _is_single("canvases", canvases)
        every = [self.encode(c, False, f"canvas {i}") for i, c in enumerate([canvases] if single else canvases)]
        require(bool(every), "canvases=[] holds no canvas")
        for index, ids in enumerate(every):
            require(self.spec.mask_id in ids, f"canvas {index} holds no mask (id {self.spec.mask_id})")
            self.check_length(f"canvas {index}", len(ids), 0)
        if params is None:
            require("gen_length" not in fields, "gen_length has no meaning for infill: the canvas has its length")
            sampler = fields.get("sampler")
            sampler = fields["sampler"] = parse_sampler("slowfast" if sampler is None else sampler)
            fields["gen_length"] = sampler.least_length
        listed = DecodingParams.per_prompt(len(every), params, **fields)
        for index, (ids, each) in enumerate(zip(every, listed, strict=True)):
            if ids[0] == self.spec.mask_id:
                self.check_first(f"canvas {index} starts with a mask", each.cache)
        how = {"trace": trace, "frames": _frames_for(on_step), "infilled": True}
        sequences = [self.in_flight(each, ids, 0, **how) for each, ids in zip(listed, every, strict=True)]
        return self._finish(sequences, single, on_step)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params = None,
        *,
        apply_chat_template: bool = True,
        trace: bool = False,
        prompt_embeds: Embeds = None,
        **fields: Any,
    ) -> Stream:
        """Iterate over one :class:`Frame` per step, computed on demand; arguments as for :meth:`generate`.

        ``Stream.result()`` runs the remaining steps and returns the same as :meth:`generate`; a stream that is closed
        or dropped before its end leaves the engine unchanged.
        """
        options = {"apply_chat_template": apply_chat_template, "trace": trace, "frames": True}
        options["prompt_embeds"] = prompt_embeds
        sequences, single = self.sequences(prompts, params, **options, **fields)
        return Stream(self._run(sequences), single, self._abandoned.append)

    def generate_async(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params = None,
        *,
        apply_chat_template: bool = True,
        trace: bool = False,
        on_step: Callable[[Frame], None] | None = None,
        prompt_embeds: Embeds = None,
        **fields: Any,
    ) -> Pending:
        """Run :meth:`generate` in another thread, which also calls ``on_step``; return a handle at once. Arguments are
        checked before it returns; pending generations run one after another."""
        options = {"apply_chat_template": apply_chat_template, "trace": trace, "frames": _frames_for(on_step)}
        options["prompt_embeds"] = prompt_embeds
        sequences, single = self.sequences(prompts, params, **options, **fields)
        name = f"sfs_triton-{id(self):x}"
        with self._lock:
            if self._worker is None:
                self._worker = ThreadPoolExecutor(1, name)
            return Pending(self._worker, name, lambda halt: self._finish(sequences, single, on_step, halt))

    def update_weights(self, source: Mapping[str, torch.Tensor] | str | Path) -> None:
        """Take new values for all weights, in place: from a state dictionary, or a folder, hub id or ``.gguf`` file.

        Shapes must be those of the loaded model, names those of its family. All of it is checked first, so that an
        error leaves every weight as it was. Addresses stay, so captured graphs remain valid. Call it while nothing is
        generated: a sequence in flight would go on with the new weights and the old ones' cache.

        Raises:
            ArgumentError: ``source`` is none of these, or holds something else than plain tensors.
            CheckpointError: names each missing, extra or misshapen tensor, or one with NaN.
        """
        model = self.model
        if not isinstance(source, Mapping):
            source = find("source", source)
        with model.group.together("updating the weights"):
            update_weights(model.weights, source, model.spec, model.group)

    def likelihood(
        self,
        pairs: Sequence[tuple[str, str] | tuple[Sequence[int], Sequence[int]]],
        params: LikelihoodParams | None = None,
        *,
        seed: int | Sequence[int] = 0,
        batch_size: int = 32,
        **fields: Any,
    ) -> list[Likelihood]:
        """Estimate the log-likelihood of each answer after its prompt. ``LikelihoodParams(...).forwards(n)`` is the
        cost of an answer of ``n`` tokens.

        Args:
            pairs: a prompt and an answer each, both text, which is encoded as it is, or both token ids.
            params: a :class:`LikelihoodParams`; default: LLaDA's Monte Carlo estimate from 128 copies.
            seed: of the masks that are drawn; one number for all pairs, or one per pair.
            batch_size: copies of canvases per forward.
            fields: instead of ``params``, its fields: ``method`` (``"monte-carlo"``, ``"confidence"``), ``mc_num``,
                ``mc_batch``, ``cfg_scale``, ``pad_eos``, ``check_greedy``.

        Raises:
            ArgumentError: names the argument and its value; or the pair, of which nothing was computed.
            OutOfDeviceMemory: a forward of ``batch_size`` copies does not fit.
            NumericalFault: the model produced NaN; names the pairs. ``finished`` has the results of the others.
        """
        require(params is None or not fields, f"params goes without {', '.join(map(repr, fields))}, fields of it")
        names = [each.name for each in fields_of(LikelihoodParams)]
        refuse_unknown(fields.keys() - {*names}, names)
        params = LikelihoodParams(**fields) if params is None else params
        require(isinstance(params, LikelihoodParams), f"params={params!r} is no LikelihoodParams")
        check_integer("batch_size", batch_size)
        require(isinstance(pairs, Sequence) and not isinstance(pairs, str), f"pairs={pairs!r} is no list of pairs")
        seed = as_plain(seed)
        seeds = list(seed) if isinstance(seed, (list, tuple)) else [seed] * len(pairs)
        require(len(seeds) == len(pairs), f"seed={seed!r} has {len(seeds)} entries for {len(pairs)} pairs")
        listed = enumerate(zip(pairs, seeds, strict=True))
        questions = [self._question(index, pair, each, params) for index, (pair, each) in listed]
        with self.model.group.generation(lambda: repr([questions, params, batch_size])):
            while True:
                model, execution = self._execution.now()
                try:
                    with working(model.device, wait=True):
                        return LikelihoodRunner(model, questions, params, batch_size).run()
                except RuntimeError as error:
                    self._execution.replace_failed(model, execution, error)

    def _question(self, index: int, pair: tuple[Any, Any], seed: int, params: LikelihoodParams) -> Question:
        """Return a prompt and its answer as checked token ids."""
        check_integer("seed", seed, 0, SEEDS - 1)
        fine = isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2
        require(fine, f"pair {index} is {pair!r}, not a prompt and an answer")
        parts = [as_plain(part) for part in pair]
        fine = all(map(_is_text_or_ids, parts))
        require(fine, f"pair {index} is {pair!r}: its parts are neither text nor sequences of token ids")
        texts = [isinstance(part, str) for part in parts]
        require(texts[0] == texts[1], f"pair {index} is {pair!r}: both parts must be text, or both token ids")
        if all(texts):
            parts = self.codec(f"pair {index} is text, not token ids: it").encode_pair(*parts)
        prompt, answer = parts
        require(bool(answer), f"pair {index} has an empty answer")
        # in a model with shifted logits, the first position is predicted from no other
        require(bool(prompt) or not self.spec.shifted, f"pair {index} has an empty prompt, which this model needs")
        ids = self.encode([*prompt, *answer], False, f"pair {index}")
        self.check_no_mask(f"pair {index}", ids)
        self.check_length(f"pair {index}", len(prompt), len(answer) + params.pad_eos)
        return Question(ids[: len(prompt)], ids[len(prompt) :], seed)

    def sequences(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params = None,
        *,
        apply_chat_template: bool = True,
        trace: bool = False,
        frames: bool = False,
        prompt_embeds: Embeds = None,
        **fields: Any,
    ) -> tuple[list[InFlight], bool]:
        """Return the sequences that :meth:`generate` would run, and whether it was one prompt, not a list.

        ``frames``: publish the canvases after each step.
        """
        check_flag("apply_chat_template", apply_chat_template)
        check_flag("trace", trace)
        single = _is_single("prompts", prompts)
        listed = enumerate([prompts] if single else prompts)
        every = [self.encode(prompt, apply_chat_template, f"prompt {index}") for index, prompt in listed]
        require(bool(every), "prompts=[] holds no prompt; [[]] is one without any token")
        listed = DecodingParams.per_prompt(len(every), params, **fields)
        embeds = self._embeds(every, [prompt_embeds] if single else prompt_embeds)
        mask, sequences = self.spec.mask_id, []
        for index, (ids, each) in enumerate(zip(every, listed, strict=True)):
            self.check_length(f"prompt {index}", len(ids), each.gen_length)
            self.check_no_mask(f"prompt {index}", ids, "; use Engine.infill to fill in masks")
            if not ids:
                self.check_first(f"prompt {index} is empty", each.cache)
            canvas = ids + [mask] * each.gen_length
            how = {"trace": trace, "frames": frames, "embeds": embeds[index]}
            sequences.append(self.in_flight(each, canvas, len(ids), **how))
        return sequences, single

    def in_flight(self, params: DecodingParams, canvas: list[int], start: int, **options: Any) -> InFlight:
        """Return a sequence of this model whose positions from ``start`` on are decoded, on this engine's device."""
        if params.sampler.end_think_token_ids is not None:
            self._check_end_of_think(params.sampler.end_think_token_ids)
        verifies = params.sampler.draw().verify  # a position predicted from the one before it would see its own token
        require(not (verifies and self.spec.shifted), "sampler='wino' does not go with models whose logits are shifted")
        if self.model.device.type == "cpu":
            cache = params.cache.on_cpu(params.sampler, len(canvas) - start)
            params = params if cache is params.cache else replace(params, cache=cache)
        return InFlight(params, canvas, start, self.spec.mask_id, **options)

    def _check_end_of_think(self, ids: tuple[int, ...]) -> None:
        """Raise ArgumentError for ids that no response holds."""
        size, mask = self.spec.vocab_size, self.spec.mask_id
        for index, token in enumerate(ids):
            require(token < size, f"end_think_token_ids[{index}]={token} is no token id below {size}")
            require(token != mask, f"end_think_token_ids[{index}]={token} is the mask token")

    def _embeds(self, prompts: list[list[int]], given: Any) -> list[PromptEmbeds | None]:
        """Return the checked vectors of each prompt. If one has some all have, be it none, to share a batch."""
        if given is None:
            return [None] * len(prompts)
        fine = isinstance(given, Sequence) and len(given) == len(prompts)
        fine = fine and not (len(given) == 2 and isinstance(given[1], _ARRAYS))  # one pair, for two prompts
        require(fine, f"prompt_embeds is no list with a pair, or None, for each of {len(prompts)} prompts")
        if all(pair is None for pair in given):
            return [None] * len(prompts)
        pairs = enumerate(zip(prompts, given, strict=True))
        name = "prompt_embeds of prompt"
        return [PromptEmbeds.parse(f"{name} {i}", pair, len(ids), self.model) for i, (ids, pair) in pairs]

    def check_length(self, name: str, given: int, length: int) -> None:
        """Raise ArgumentError, which says ``name``, if ``given`` and ``length`` more positions exceed the model's
        limit."""
        total, most = given + length, self.spec.max_length
        require(total <= most, f"{name} has {given} + {length} = {total} positions, the model allows {most}")

    def check_first(self, why: str, cache: CachePolicy) -> None:
        """Raise ArgumentError, which says ``why``, if this cache cannot decide a canvas' first position.

        Models with shifted logits predict it from no position that a list could hold.
        """
        fine = not self.spec.shifted or not cache.by_list
        require(fine, f"cache={cache.name!r}: {why}, and this model predicts the first position from none; use 'none'")

    def codec(self, purpose: str) -> TextCodec:
        """Return the text codec; raise ArgumentError if there is none, naming the ``purpose`` that needs it."""
        source = "tokenizer.json, or vocab.json and merges.txt, in the checkpoint; or the tokenizer= of accelerate"
        require(self.text is not None, f"{purpose} needs a tokenizer, but this engine has none ({source})")
        return self.text

    def check_no_mask(self, name: str, ids: Sequence[int], hint: str = "") -> None:
        """Raise ArgumentError if ``ids`` hold the mask token, which marks undecided positions; ``hint`` is appended."""
        mask = self.spec.mask_id
        if mask in ids:
            at = ids.index(mask)
            raise ArgumentError(f"{name} holds the mask token (id {mask}, at position {at} of its tokens){hint}")

    def encode(self, prompt: Prompt, apply_chat_template: bool = True, name: str = "prompt 0") -> list[int]:
        """Return the checked token ids of a prompt; errors say ``name``."""
        prompt = as_plain(prompt)
        require(_is_text_or_ids(prompt), f"{name} is {prompt!r}, neither text nor a sequence of token ids")
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], Mapping)):
            codec = self.codec(f"{name} is text, not token ids: it")
            if isinstance(prompt, str) and apply_chat_template and codec.template is not None:
                hint = "apply_chat_template=False, or no token ids, generates without a prompt"
                require(bool(prompt), f"{name} is empty: {prompt!r}; {hint}")
                prompt = [{"role": "user", "content": prompt}]
            ids = codec.encode(prompt if isinstance(prompt, str) else codec.render(prompt))
            require(bool(ids) or not prompt, f"{name} has no tokens: {prompt!r}")
        else:
            # the exact type first: to ask an abstract class takes longer than all the rest for a prompt
            ids = [t if type(t) in (int, bool) else int(t) if isinstance(t, Integral) else t for t in prompt]
        size = self.spec.vocab_size
        for position, token in enumerate(ids):
            if type(token) is not int or not 0 <= token < size:
                raise ArgumentError(f"{name}: {token!r} at position {position} is no token id below {size}")
        return ids

    def _finish(
        self,
        sequences: list[InFlight],
        single: bool,
        on_step: Callable[[Frame], None] | None,
        halt: threading.Event | None = None,
    ) -> Generation | list[Generation]:
        """Run sequences to completion, or until ``halt`` is set."""
        with self._run(sequences) as run:
            steps = iter(run.advance, None) if on_step is None else run.frames()
            for step in steps:
                if on_step is not None:
                    on_step(step)
                if halt is not None and halt.is_set():
                    raise CancelledError
            done = run.results()
        return done[0] if single else done

    @contextmanager
    def _run(self, sequences: list[InFlight]) -> Iterator[Run]:
        """Start sequences on a scheduler of their own, all in one batch if memory allows."""
        while self._abandoned:
            try:
                end = self._abandoned.popleft()
            except IndexError:  # another thread has taken the last one
                break
            end()
        exact, most = bounds_of(sequences), self.spec.max_length

        def bounds(sequence: InFlight) -> BatchBounds:
            return exact if sequence.params.sampler.grow is None else bounds_around(sequence, most)

        def request() -> str:
            embeds = [s.embeds and s.embeds.digest() for s in sequences]
            return repr([(s.params, s.canvas, s.start, s.batch_key) for s in sequences] + embeds)

        with self.model.group.generation(request):
            scheduler = Scheduler(self.batches, bounds, slots=len(sequences))
            run = Run(scheduler, sequences, self.spec, self.text)
            try:
                yield run
            finally:
                run.close()


def _frames_for(on_step: Callable[[Frame], None] | None) -> bool:
    """Return whether frames are wanted."""
    require(on_step is None or callable(on_step), f"on_step={on_step!r} cannot be called")
    return on_step is not None


def _is_single(name: str, given: Any) -> bool:
    """Return whether ``given``, the argument ``name``, is one prompt and not a list of them."""
    if isinstance(given, _ARRAYS):
        require(given.ndim in (1, 2), f"{name} has {given.ndim} dimensions, not 1 or 2")
        return given.ndim == 1
    require(_is_text_or_ids(given), f"{name}={given!r} is neither text nor a sequence")
    return isinstance(given, str) or bool(given) and not isinstance(given[0], _PROMPTS)


def _is_text_or_ids(given: Any) -> bool:
    """Return whether ``given`` may be text or token ids, of which a tensor is made a list before."""
    return isinstance(given, Sequence) and not isinstance(given, (bytes, bytearray))
