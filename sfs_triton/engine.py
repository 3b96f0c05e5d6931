"""Load a checkpoint, generate with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import torch

from .caching import CachePolicy, cache_policy
from .errors import ArgumentError, CheckpointError, require
from .loops import EagerLoop
from .models import Transformer, load_weights, read_spec
from .models.weights import read_json
from .ops import implementation
from .samplers import FixedSteps, Sampler, SlowFast, Threshold
from .state import DecodeState
from .text import TextCodec
from .trace import StepTrace, Tracer

EMBEDDED = Path(__file__).parent / "embedded"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Prompt = str | Sequence[int] | torch.Tensor | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Frame:
    """The canvases after a step, for :meth:`Engine.generate`'s ``on_step``. Lists hold one entry a row."""

    step: int
    tokens: list[list[int]]
    commit_step: list[list[int]]
    running: list[bool]
    fast: list[bool]
    span: list[tuple[int, int]]  # [s, e) of each row; e is -1 while it is not known


@dataclass(frozen=True)
class Generation:
    """One finished row.

    ``tokens`` is the response up to and including its first end-of-text; ``canvas`` the whole row, prompt included.
    ``nfe`` counts steps of the sampler, ``forwards`` calls of the model (two a step under guidance),
    ``rows_forwarded`` positions that went through the layers; ``forward_lengths`` is what each step's forward covered.
    """

    text: str | None
    tokens: list[int]
    canvas: list[int]
    prompt_length: int
    nfe: int
    forwards: int
    rows_forwarded: int
    forward_lengths: list[int]
    commit_step: list[int]  # for each canvas position: the step that filled it, -1 if it was given
    masks_left: int  # 0 but where a sampler's own bounds leave some (``max_cycles``, Dream's one-step blocks)
    seconds: float  # of the whole batch, without the time spent in on_step
    trace: list[StepTrace] | None = None

    @property
    def tokens_per_forward(self) -> float:
        """Response tokens, end-of-text included, for each step."""
        return len(self.tokens) / max(1, self.nfe)

    @property
    def response(self) -> list[int]:
        """Everything decoded, padding after the end-of-text included."""
        return self.canvas[self.prompt_length :]


def load(
    path_or_hub_id: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    impl: str | None = None,
) -> Engine:
    """An :class:`Engine` for a checkpoint folder, a hub id, or ``"embedded"`` (the small model in this package).

    Args:
        path_or_hub_id: a folder with ``config.json`` and safetensors, or a hub id (``GSAI-ML/LLaDA-8B-Instruct``).
        device: default: a GPU if there is one.
        dtype: default: bfloat16 on a GPU, float32 on a CPU.
        impl: ``"torch"`` or ``"triton"`` for all operations; default: torch on a CPU, on a GPU whatever a committed
            record shows to be faster.

    Raises:
        ArgumentError: names the argument and its value.
        CheckpointError: names the file, key or tensor at fault. Code and pickles in a checkpoint are never touched.
    """
    device = _device(device)
    implementation(impl, device)  # refused before gigabytes are read
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if isinstance(dtype, str):
        require(dtype in DTYPES, f"dtype={dtype!r} is not one of {tuple(DTYPES)}")
        dtype = DTYPES[dtype]
    require(dtype in DTYPES.values(), f"dtype={dtype!r} is not one of {tuple(DTYPES)}")
    named = isinstance(path_or_hub_id, (str, Path)) and str(path_or_hub_id) not in ("", ".")
    require(named, f"path_or_hub_id={path_or_hub_id!r} is neither a folder nor a hub id")
    embedded = str(path_or_hub_id) == "embedded"
    folder = EMBEDDED if embedded else Path(path_or_hub_id)
    if not embedded and not folder.is_dir():
        if folder.is_absolute() or folder.exists():
            raise CheckpointError(f"{str(folder)!r} is not a folder")
        folder = _download(str(path_or_hub_id))
    spec = read_spec(read_json(folder / "config.json"))
    weights = load_weights(folder, spec, device, dtype)
    return Engine(Transformer(spec, weights, impl), TextCodec.from_folder(folder))


def _device(device: str | torch.device | None) -> torch.device:
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)  # a name may be well-formed and still mean a device that is not there
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ArgumentError(f"device={str(device)!r} cannot be used: {str(error).splitlines()[0]}") from None
    require(device.type != "meta", f"device={str(device)!r} cannot be used: it computes nothing")
    return device


def _download(hub_id: str) -> Path:
    """A local copy of a hub repository: JSON, text and safetensors files only."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.jinja", "*.safetensors"]))
    except Exception as error:  # the hub client raises many kinds, network errors included
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{hub_id!r} is not a local folder, and could not be fetched as a hub id: {reason}"
        ) from None


class Engine:
    """A loaded model with its text codec. Not thread-safe; use one a thread."""

    def __init__(self, model: Transformer, text: TextCodec | None = None):
        self.model, self.text = model, text

    @property
    def spec(self):
        return self.model.spec

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        gen_length: int | Sequence[int] = 128,
        sampler: Sampler | None = None,
        cache: str | CachePolicy = "none",
        seed: int | Sequence[int] = 0,
        raw: bool = False,
        trace: bool = False,
        on_step: Callable[[Frame], None] | None = None,
    ) -> Generation | list[Generation]:
        """Answer one prompt (returns a :class:`Generation`) or a list of prompts (returns a list of them).

        Args:
            prompts: text, token ids (a list or a tensor), or chat messages; or a list of those. Text becomes a user
                turn in the checkpoint's chat template if it has one, unless ``raw``.
            gen_length: response positions; one number, or one a prompt.
            sampler: default: ``SlowFast()``, the paper's settings.
            cache: a policy or its name.
            seed: of the noise, for temperatures above 0; one number (row i then uses ``seed + i``) or one a prompt.
            trace: keep a :class:`StepTrace` for every step.
            on_step: called with a :class:`Frame` after every step.

        Raises:
            ArgumentError: names the argument and its value.
            NumericalFault: the model produced NaN; names row and step.
        """
        single = _is_single(prompts)
        rows = [self._encode(p, raw, i) for i, p in enumerate([prompts] if single else prompts)]
        require(bool(rows), "prompts=[] holds no prompt")
        lengths = _per_row("gen_length", gen_length, len(rows))
        canvases = []
        for index, (ids, length) in enumerate(zip(rows, lengths, strict=True)):
            require(length > 0, f"gen_length={length} is not positive")
            self._check_room(index, len(ids), length)
            if self.spec.mask_id in ids:
                raise ArgumentError(
                    f"prompt {index} holds the mask id {self.spec.mask_id} at position "
                    f"{ids.index(self.spec.mask_id)}; use Engine.infill to fill in masks"
                )
            canvases.append(ids + [self.spec.mask_id] * length)
        sampler = _checked(sampler)
        for length in lengths:
            sampler.check_length(length)
        done = self._run(canvases, [len(ids) for ids in rows], sampler, cache_policy(cache), seed, trace, on_step)
        return done[0] if single else done

    def infill(
        self,
        canvases: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        *,
        sampler: Sampler | None = None,
        cache: str | CachePolicy = "none",
        seed: int | Sequence[int] = 0,
        trace: bool = False,
        on_step: Callable[[Frame], None] | None = None,
    ) -> Generation | list[Generation]:
        """Fill in the masks of a canvas, wherever they are. Text marks them with the checkpoint's mask token.

        Arguments as for :meth:`generate`. ``prompt_length`` of the result is 0: the whole canvas is the response.
        """
        single = _is_single(canvases)
        rows = [self._encode(c, True, i) for i, c in enumerate([canvases] if single else canvases)]
        for index, ids in enumerate(rows):
            require(self.spec.mask_id in ids, f"canvas {index} holds no mask (id {self.spec.mask_id})")
            self._check_room(index, len(ids), 0)
        sampler = _checked(sampler)
        done = self._run(rows, [0] * len(rows), sampler, cache_policy(cache), seed, trace, on_step)
        return done[0] if single else done

    def _check_room(self, index: int, given: int, length: int) -> None:
        require(
            given + length <= self.spec.max_length,
            f"row {index} has {given} + {length} = {given + length} positions, the model allows {self.spec.max_length}",
        )

    def _encode(self, prompt: Prompt, raw: bool, index: int) -> list[int]:
        if isinstance(prompt, torch.Tensor):
            prompt = prompt.tolist()
        fine = isinstance(prompt, (str, Sequence)) and not isinstance(prompt, (bytes, bytearray))
        require(fine, f"prompt {index} is {prompt!r}, neither text nor a sequence of token ids")
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], Mapping)):
            require(self.text is not None, f"prompt {index} is text, but the checkpoint has no tokenizer.json")
            require(bool(prompt), f"prompt {index} is empty: {prompt!r}")
            if isinstance(prompt, str) and not raw and self.text.template is not None:
                prompt = [{"role": "user", "content": prompt}]
            ids = self.text.encode(prompt if isinstance(prompt, str) else self.text.render(prompt))
        else:
            ids = [int(token) if isinstance(token, Integral) else token for token in prompt]
        require(bool(ids), f"prompt {index} is empty: {prompt!r}")
        for position, token in enumerate(ids):
            require(
                isinstance(token, int) and 0 <= token < self.spec.vocab_size,
                f"prompt {index}: {token!r} at position {position} is no token id below {self.spec.vocab_size}",
            )
        return ids

    def _run(
        self,
        canvases: list[list[int]],
        starts: list[int],
        sampler: Sampler,
        policy: CachePolicy,
        seed: int | Sequence[int],
        trace: bool,
        on_step: Callable[[Frame], None] | None,
    ) -> list[Generation]:
        sampler.check_cache(policy)
        seeds = _per_row("seed", seed, len(canvases))
        if isinstance(seed, int):
            seeds = [seed + index for index in range(len(canvases))]
        for value in seeds:
            require(0 <= value < 2**63, f"seed={value} is not in [0, 2**63)")
        state = DecodeState.allocate(
            canvases,
            starts,
            mask_id=self.spec.mask_id,
            eos_id=self.spec.eos_id,
            window=getattr(sampler, "window", 1),
            block_length=getattr(sampler, "block_length", None),
            seeds=seeds,
            caps=[sampler.step_cap(len(c) - s) for c, s in zip(canvases, starts, strict=True)],
            device=self.model.device,
            trace=trace,
        )
        if isinstance(sampler, FixedSteps):
            _set_schedule(state, sampler, [len(c) - s for c, s in zip(canvases, starts, strict=True)], seeds)
        loop = EagerLoop(self.model, sampler, policy)
        tracer = Tracer(state, sampler)
        began = time.perf_counter()
        loop.start(state)
        while (report := loop.step(state)) is not None:
            tracer.after(report)
            if on_step is not None:
                paused = time.perf_counter()
                on_step(_frame(state, report.step))
                began += time.perf_counter() - paused
        return self._collect(state, tracer, canvases, starts, sampler, time.perf_counter() - began)

    def _collect(
        self,
        state: DecodeState,
        tracer: Tracer,
        canvases: list[list[int]],
        starts: list[int],
        sampler: Sampler,
        seconds: float,
    ) -> list[Generation]:
        steps, masks_left = state.step.tolist(), state.masked.sum(1).tolist()
        branches = 2 if sampler.cfg_scale else 1
        results = []
        for index, (row, commits) in enumerate(zip(state.tokens.tolist(), state.commit_step.tolist(), strict=True)):
            row, commits = row[: len(canvases[index])], commits[: len(canvases[index])]
            response = row[starts[index] :]
            eos = self.spec.eos_id
            generated = starts[index] > 0 and eos in response  # a canvas that was filled in is kept whole
            tokens = response[: response.index(eos) + 1] if generated else response
            lengths = tracer.forward_lengths[index]
            results.append(
                Generation(
                    text=None if self.text is None else self.text.decode(tokens),
                    tokens=tokens,
                    canvas=row,
                    prompt_length=starts[index],
                    nfe=steps[index],
                    forwards=branches * len(lengths),
                    rows_forwarded=branches * tracer.rows_forwarded[index],
                    forward_lengths=lengths,
                    commit_step=commits,
                    masks_left=masks_left[index],
                    seconds=seconds,
                    trace=tracer.rows[index] if state.events is not None else None,
                )
            )
        return results


def _checked(sampler: Sampler | None) -> Sampler:
    sampler = SlowFast() if sampler is None else sampler
    known = isinstance(sampler, (SlowFast, Threshold, FixedSteps))
    require(known, f"sampler={sampler!r} is not a SlowFast, Threshold or FixedSteps")
    return sampler


def _is_single(prompts: Any) -> bool:
    if isinstance(prompts, torch.Tensor):
        require(prompts.dim() in (1, 2), f"prompts is a tensor of {prompts.dim()} dimensions, not of 1 or 2")
        return prompts.dim() == 1
    fine = isinstance(prompts, (str, Sequence)) and not isinstance(prompts, (bytes, bytearray))
    require(fine, f"prompts={prompts!r} is neither text nor a sequence")
    return isinstance(prompts, str) or bool(prompts) and not isinstance(prompts[0], (str, Sequence, torch.Tensor))


def _per_row(name: str, value: int | Sequence[int], rows: int) -> list[int]:
    listed = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    require(isinstance(value, int) or listed, f"{name}={value!r} is neither an integer nor a sequence of them")
    values = [value] * rows if isinstance(value, int) else list(value)
    require(len(values) == rows, f"{name}={value!r} has {len(values)} entries for {rows} prompts")
    for v in values:
        require(isinstance(v, int) and not isinstance(v, bool), f"{name}={v!r} is not an integer")
    return values


def _set_schedule(state: DecodeState, sampler: FixedSteps, lengths: list[int], seeds: list[int]) -> None:
    """Write each row's steps a block, its time schedule and, for random positions, its stream of uniform numbers."""
    device = state.tokens.device
    steps = [sampler.block_steps(length) for length in lengths]
    state.block_steps.copy_(torch.tensor(steps))
    shares = [sampler.shares(length) for length in lengths]
    state.shares = torch.tensor([row + [0.0] * (max(steps) - len(row)) for row in shares], device=device)
    if sampler.metric == "origin":
        draws = max(n * length for n, length in zip(steps, lengths, strict=True))
        streams = [torch.rand(draws, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        state.uniform = torch.stack(streams).to(device)


def _frame(state: DecodeState, step: int) -> Frame:
    done, phase, s, e = (t.tolist() for t in (state.done, state.phase, state.s, state.e))
    return Frame(
        step=step,
        tokens=state.tokens.tolist(),
        commit_step=state.commit_step.tolist(),
        running=[not d for d in done],
        fast=[p == 1 for p in phase],
        span=list(zip(s, e, strict=True)),
    )
