"""Load a checkpoint and generate with it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import Any

import torch

from .decoding.caching import CachePolicy
from .decoding.params import parse_cache, parse_sampler
from .decoding.samplers import Sampler
from .distributed import Group, join, own_device
from .errors import ArgumentError, CheckpointError, require
from .files import read_json
from .models import Transformer, load_weights, read_spec
from .ops.dispatch import implementation
from .runner import LoopChoice, check_loop
from .scheduling.handles import Pending, Stream
from .scheduling.outputs import Frame, Generation
from .scheduling.request import Request
from .scheduling.run import Run
from .scheduling.scheduler import Lanes, Scheduler, room_for
from .scheduling.sequence import Row
from .text.codec import TextCodec

EMBEDDED = Path(__file__).parent / "embedded"
WEIGHTS = ("fp8",)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Prompt = str | Sequence[int] | torch.Tensor | Sequence[Mapping[str, Any]]


def load(
    path_or_hub_id: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    impl: str | None = None,
    loop: str | None = None,
    *,
    weights: str | None = None,
    tensor_parallel: int | Group = 1,
) -> Engine:
    """Load a checkpoint folder, a hub id, or ``"embedded"`` (the small model in this package) as an :class:`Engine`.

    Args:
        path_or_hub_id: a folder with ``config.json`` and safetensors, or a hub id (``GSAI-ML/LLaDA-8B-Instruct``),
            optionally at a revision (``GSAI-ML/LLaDA-8B-Instruct@08b83a6``: a branch, tag or commit).
        device: default: a GPU if there is one.
        dtype: default: bfloat16 on a GPU, float32 on a CPU.
        impl: ``"torch"`` or ``"triton"`` for all operations; default: torch.
        loop: ``"eager"`` or ``"replay"`` (captured CUDA graphs); default: eager.
        weights: ``"fp8"`` keeps matrices as float8 with a scale per row, decoded in every product; all other tensors
            and activations stay in ``dtype``. Default: all in ``dtype``.
        tensor_parallel: processes that share the model, started by ``torchrun --nproc-per-node N``; each loads its part
            only, and all must then make the same calls. Or the group that :func:`sfs_triton.distributed.join` gave.

    Raises:
        ArgumentError: names the argument and its value.
        RankFailure: another process could not load its part, or has not come.
        CheckpointError: names the file, key or tensor at fault. Code and pickles in a checkpoint are never touched.
    """
    group = tensor_parallel if isinstance(tensor_parallel, Group) else join(tensor_parallel, device)
    with group.together("loading the model"):
        engine = _load(path_or_hub_id, device, dtype, impl, loop, weights, group)
    model = engine.model
    group.agree("models", f"{model.spec}, {model.dtype}, {weights}, {impl}, {model.device.type}")
    return engine


def _load(
    path_or_hub_id: str | Path,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    impl: str | None,
    loop: str | None,
    weights: str | None,
    group: Group,
) -> Engine:
    device = _device(device if group.size == 1 else own_device(device))
    implementation(impl, device)  # fail before gigabytes are read
    check_loop(loop, device)
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if isinstance(dtype, str):
        require(dtype in DTYPES, f"dtype={dtype!r} is not one of {tuple(DTYPES)}")
        dtype = DTYPES[dtype]
    require(dtype in DTYPES.values(), f"dtype={dtype!r} is not one of {tuple(DTYPES)}")
    require(weights in (None, *WEIGHTS), f"weights={weights!r} is not one of {WEIGHTS}, or None")
    named = isinstance(path_or_hub_id, (str, Path)) and str(path_or_hub_id) not in ("", ".")
    require(named, f"path_or_hub_id={path_or_hub_id!r} is neither a folder nor a hub id")
    folder = _folder(path_or_hub_id)
    spec = read_spec(read_json(folder / "config.json"))
    spec.shard(group.size)  # fail before anything is read
    loaded = load_weights(folder, spec, device, dtype, group, quantised=weights == "fp8")
    return Engine(Transformer(spec, loaded, impl, group), TextCodec.from_folder(folder), loop)


def _folder(path_or_hub_id: str | Path) -> Path:
    """Return the folder of the checkpoint; fetch it if it is a hub id."""
    folder = EMBEDDED if str(path_or_hub_id) == "embedded" else Path(path_or_hub_id)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or folder.exists():
        raise CheckpointError(f"{str(folder)!r} is not a folder")
    return _download(str(path_or_hub_id))


def _device(device: str | torch.device | None) -> torch.device:
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)  # a well-formed name may mean an absent device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ArgumentError(f"device={str(device)!r} cannot be used: {str(error).splitlines()[0]}") from None
    require(device.type != "meta", f"device={str(device)!r} cannot be used: it computes nothing")
    return device


def _download(hub_id: str) -> Path:
    """Download a hub repository: JSON, text and safetensors files only."""
    from huggingface_hub import snapshot_download

    name, at, revision = hub_id.partition("@")
    require(bool(revision) == bool(at), f"path_or_hub_id={hub_id!r} names no revision after its @")
    wanted = ["*.json", "*.jinja", "*.safetensors"]
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted))
    except Exception as error:  # the hub client raises many kinds, network errors included
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{hub_id!r} is not a local folder, and could not be fetched as a hub id: {reason}"
        ) from None


class Engine:
    """A loaded model with its text codec. Generations may run concurrently, in threads or nested."""

    def __init__(self, model: Transformer, text: TextCodec | None = None, loop: str | None = None):
        self.model, self.text = model, text
        if model.group.size > 1:
            # with another loop each rank could queue a different number of steps, depending on timing
            require(loop in (None, "eager"), f"loop={loop!r} does not go with tensor_parallel={model.group.size}")
            loop = "eager"
        self._loops = LoopChoice(loop, model.device)
        self.lanes = Lanes(model, self._loops)
        self._lock = threading.Lock()
        self._worker: ThreadPoolExecutor | None = None

    @property
    def spec(self):
        return self.model.spec

    @property
    def loop(self) -> str:
        """Name of the loop that runs generations."""
        return self._loops.loop.name

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        gen_length: int | Sequence[int] = 128,
        sampler: str | Sampler | None = None,
        cache: str | CachePolicy = "none",
        seed: int | Sequence[int] = 0,
        raw: bool = False,
        trace: bool = False,
        on_step: Callable[[Frame], None] | None = None,
    ) -> Generation | list[Generation]:
        """Generate for one prompt (returns a :class:`Generation`) or a list of prompts (returns a list of them).

        Args:
            prompts: text, token ids (a list or a tensor), or chat messages; or a list of those. Text becomes a user
                turn in the checkpoint's chat template if it has one, unless ``raw``.
            gen_length: response positions; one number, or one per prompt.
            sampler: a sampler, or its name (``"slowfast"``, ``"threshold"``, ``"fixed"``, ``"vanilla"``); default:
                ``SlowFast()``, the paper's settings.
            cache: a policy or its name.
            seed: of the noise, for temperatures above 0; one number (row i then uses ``seed + i``) or one per prompt.
            trace: keep a :class:`StepTrace` for every step.
            on_step: called with a :class:`Frame` after every step.

        Raises:
            ArgumentError: names the argument and its value.
            OutOfDeviceMemory: says how much is needed, and what would fit.
            NumericalFault: the model produced NaN; names row and step. ``finished`` has the results of the others.
        """
        options = {"gen_length": gen_length, "sampler": sampler, "cache": cache, "seed": seed, "raw": raw}
        request, single = self.request(prompts, **options, trace=trace, frames=_frames_for(on_step))
        return self._finish(request, single, on_step)

    def infill(
        self,
        canvases: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        *,
        sampler: str | Sampler | None = None,
        cache: str | CachePolicy = "none",
        seed: int | Sequence[int] = 0,
        trace: bool = False,
        on_step: Callable[[Frame], None] | None = None,
    ) -> Generation | list[Generation]:
        """Fill in the masks of a canvas, wherever they are. Text marks them with the checkpoint's mask token.

        Arguments as for :meth:`generate`. ``prompt_length`` of the result is 0: the whole canvas is the response.
        """
        single = _is_single(canvases)
        rows = [self.encode(c, True, i) for i, c in enumerate([canvases] if single else canvases)]
        for index, ids in enumerate(rows):
            require(self.spec.mask_id in ids, f"canvas {index} holds no mask (id {self.spec.mask_id})")
            self.check_room(index, len(ids), 0)
        request = _request(rows, [0] * len(rows), sampler, cache, seed, trace, _frames_for(on_step))
        lost = [i for i, row in enumerate(rows) if row[0] == self.spec.mask_id]
        require(
            not (lost and self.spec.shifted and request.policy.name == "region"),
            f"cache='region': canvas {lost and lost[0]} begins with a mask, which this model predicts from no row of a "
            "list; use 'none'",
        )
        return self._finish(request, single, on_step)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        gen_length: int | Sequence[int] = 128,
        sampler: str | Sampler | None = None,
        cache: str | CachePolicy = "none",
        seed: int | Sequence[int] = 0,
        raw: bool = False,
        trace: bool = False,
    ) -> Stream:
        """Iterate over one :class:`Frame` per step, computed on demand; arguments as for :meth:`generate`.

        ``Stream.result()`` runs the remaining steps and returns the same as :meth:`generate`; a stream that is closed
        or dropped before its end leaves the engine unchanged.
        """
        options = {"gen_length": gen_length, "sampler": sampler, "cache": cache, "seed": seed, "raw": raw}
        request, single = self.request(prompts, **options, trace=trace, frames=True)
        return Stream(self._run(request), single)

    def generate_async(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        gen_length: int | Sequence[int] = 128,
        sampler: str | Sampler | None = None,
        cache: str | CachePolicy = "none",
        seed: int | Sequence[int] = 0,
        raw: bool = False,
        trace: bool = False,
        on_step: Callable[[Frame], None] | None = None,
    ) -> Pending:
        """Run :meth:`generate` in another thread, which also calls ``on_step``; return a handle at once. Arguments are
        checked before it returns; pending generations run one after another."""
        options = {"gen_length": gen_length, "sampler": sampler, "cache": cache, "seed": seed, "raw": raw}
        request, single = self.request(prompts, **options, trace=trace, frames=_frames_for(on_step))
        name = f"sfs_triton-{id(self):x}"
        with self._lock:
            if self._worker is None:
                self._worker = ThreadPoolExecutor(1, name)
            return Pending(self._worker, name, lambda halt: self._finish(request, single, on_step, halt))

    def request(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        gen_length: int | Sequence[int] = 128,
        sampler: str | Sampler | None = None,
        cache: str | CachePolicy = "none",
        seed: int | Sequence[int] = 0,
        raw: bool = False,
        trace: bool = False,
        frames: bool = False,
    ) -> tuple[Request, bool]:
        """Return the request that :meth:`generate` would run, and whether it was one prompt, not a list.

        ``frames``: publish the canvases after each step.
        """
        single = _is_single(prompts)
        rows = [self.encode(p, raw, i) for i, p in enumerate([prompts] if single else prompts)]
        require(bool(rows), "prompts=[] holds no prompt")
        lengths = _per_row("gen_length", gen_length, len(rows))
        canvases = []
        for index, (ids, length) in enumerate(zip(rows, lengths, strict=True)):
            require(length > 0, f"gen_length={length} is not positive" + (f" (row {index})" if len(rows) > 1 else ""))
            self.check_room(index, len(ids), length)
            if self.spec.mask_id in ids:
                raise ArgumentError(
                    f"prompt {index} holds the mask id {self.spec.mask_id} at position "
                    f"{ids.index(self.spec.mask_id)}; use Engine.infill to fill in masks"
                )
            canvases.append(ids + [self.spec.mask_id] * length)
        request = _request(canvases, [len(ids) for ids in rows], sampler, cache, seed, trace, frames)
        for length in lengths:
            request.sampler.check_length(length)
        return request, single

    def check_room(self, index: int, given: int, length: int) -> None:
        """Raise ArgumentError if ``given`` and ``length`` more positions exceed the model's limit."""
        require(
            given + length <= self.spec.max_length,
            f"row {index} has {given} + {length} = {given + length} positions, the model allows {self.spec.max_length}",
        )

    def encode(self, prompt: Prompt, raw: bool = False, index: int = 0) -> list[int]:
        """Return the checked token ids of a prompt; errors name it by ``index``."""
        if isinstance(prompt, torch.Tensor):
            prompt = prompt.tolist()
        fine = isinstance(prompt, (str, Sequence)) and not isinstance(prompt, (bytes, bytearray))
        require(fine, f"prompt {index} is {prompt!r}, neither text nor a sequence of token ids")
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], Mapping)):
            require(self.text is not None, f"prompt {index} is text, but this engine has no tokenizer: give token ids")
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

    def _finish(
        self,
        request: Request,
        single: bool,
        on_step: Callable[[Frame], None] | None,
        halt: threading.Event | None = None,
    ) -> Generation | list[Generation]:
        """Run a request to completion, or until ``halt`` is set."""
        with self._run(request) as run:
            steps = iter(run.advance, None) if on_step is None else run.frames()
            for step in steps:
                if on_step is not None:
                    on_step(step)
                if halt is not None and halt.is_set():
                    raise CancelledError
            done = run.results()
        return done[0] if single else done

    @contextmanager
    def _run(self, request: Request) -> Iterator[Run]:
        """Start a request on its own scheduler, with all its sequences in one batch if memory allows."""
        rows = Row.of(request, self.spec.mask_id)
        room = room_for(rows)
        with self.model.group.generation(lambda: repr(request)):
            run = Run(Scheduler(self.lanes, lambda row: room, slots=len(rows)), rows, self.spec, self.text)
            try:
                yield run
            finally:
                run.close()


def _request(
    canvases: list[list[int]],
    starts: list[int],
    sampler: Sampler | None,
    cache: str | CachePolicy,
    seed: int | Sequence[int],
    trace: bool,
    frames: bool,
) -> Request:
    seeds = _per_row("seed", seed, len(canvases))
    if isinstance(seed, int):
        seeds = [seed + index for index in range(len(canvases))]
    sampler = parse_sampler("slowfast" if sampler is None else sampler)
    return Request(canvases, starts, sampler, parse_cache(cache), seeds, trace, frames)


def _frames_for(on_step: Callable[[Frame], None] | None) -> bool:
    """Return whether frames are wanted."""
    require(on_step is None or callable(on_step), f"on_step={on_step!r} cannot be called")
    return on_step is not None


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
