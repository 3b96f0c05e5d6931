"""The command line ``sfs``. Results go to stdout, all else to stderr."""

from __future__ import annotations

import functools
import inspect
import io
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, TextIO, get_type_hints

from ..decoding.caching import POLICIES
from ..decoding.params import DecodingParams, from_words, parse_cache, parse_sampler, sampler_options
from ..decoding.samplers import ENDS, PRESET_NAMES, SAMPLERS, Sampler
from ..distributed import Group, check_started, join, joined, world
from ..engine import DTYPES, Engine, Frame, Generation, load
from ..errors import ArgumentError, MissingDependencyError, SfsError, require
from ..ops.dispatch import BACKENDS, FORMATS
from ..text.codec import check_size, check_unicode
from ..version import __version__
from ..view.printable import printable, printable_json

try:
    import typer
    import typer.core
except ImportError:  # main() names the extra in one line; raising here would print a traceback
    typer = None

DELAY = 0.03
LARGEST_INPUT = 16 * 2**20  # characters read from stdin: more than any context holds
# Options of some samplers only; given for another sampler, they are refused by name.
_SOME = (
    "preset",
    "tau_min",
    "tau_high",
    "k_max",
    "window",
    "tau",
    "entropy",
    "bound",
    "divergence",
    "steps",
    "block_length",
)
BELONGS_TO = {name: tuple(kind for kind in SAMPLERS if name in sampler_options(kind)) for name in _SOME}
_BLOCKS = ", ".join(f"{kind} {sampler.block_length}" for kind, sampler in SAMPLERS.items() if sampler.block_length)
_STEPS = f"{', '.join(BELONGS_TO['steps'])}: steps in all, which set how many positions one commits."


class Output(io.TextIOWrapper):
    """Wrapper of a text stream that records the first write error.

    Characters that its encoding lacks become question marks, as in a chat.
    """

    def __init__(self, stream: TextIO):
        how = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
        errors = "replace" if stream.errors == "strict" else stream.errors
        super().__init__(stream.buffer, stream.encoding, errors, **how)
        self.failure: OSError | None = None
        self.before = stream  # kept: its finalizer would close the shared buffer

    def write(self, text: str) -> int:
        with self._noting():
            return super().write(text)

    def flush(self) -> None:
        with self._noting():
            super().flush()

    @contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failure = error
            raise


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandOptions:
    """Prompt and options that the commands share."""

    prompt: Annotated[str, typer.Argument(help="Prompt; - reads it from stdin.", show_default=False)]
    model: Annotated[str, typer.Option(help="Model: 'embedded', a checkpoint folder, or a hub id.")] = "embedded"
    sampler: Annotated[
        str,
        typer.Option(
            metavar="|".join(SAMPLERS), help="May have options: 'klass history=3'. vanilla: one token per step."
        ),
    ] = "slowfast"
    preset: Annotated[str | None, typer.Option(metavar="NAME", help=f"Named settings, of {PRESET_NAMES}.")] = None
    tau_min: Annotated[float | None, typer.Option(help="slowfast: confidence of a candidate for the horizon.")] = None
    tau_high: Annotated[float | None, typer.Option(help="slowfast: confidence to commit in the fast stage.")] = None
    k_max: Annotated[int | None, typer.Option(help="slowfast: maximum number of slow steps per cycle.")] = None
    window: Annotated[int | None, typer.Option(help="slowfast: number of horizons in the stability test.")] = None
    tau: Annotated[float | None, typer.Option(help="Confidence to commit, of samplers with one threshold.")] = None
    entropy: Annotated[float | None, typer.Option(help="multi-block: highest entropy to commit.")] = None
    bound: Annotated[float | None, typer.Option(help="entropy-bound: of the sum of entropies per step.")] = None
    divergence: Annotated[float | None, typer.Option(help="klass: from the step before, to stay below.")] = None
    steps: Annotated[int | None, typer.Option(help=_STEPS)] = None
    block_length: Annotated[int | None, typer.Option(help=f"Decode block by block: {_BLOCKS}.")] = None
    cache: Annotated[
        str, typer.Option(metavar="|".join(POLICIES), help="Cache policy. With options: 'region capacity=64'.")
    ] = "none"
    gen_length: Annotated[int, typer.Option(help="Number of response positions.")] = 128
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 takes the most likely token.")] = 0.0
    cfg_scale: Annotated[float, typer.Option(help="Scale of classifier-free guidance; 0 is off.")] = 0.0
    eos_stop: Annotated[bool, typer.Option(help="Stop decoding at the first end-of-text.")] = False
    eos: Annotated[str, typer.Option(metavar="|".join(ENDS), help="When an end-of-text may be committed.")] = "free"
    eos_penalty: Annotated[float, typer.Option(help="Subtracted from the logit of end-of-text.")] = 0.0
    grow: Annotated[int | None, typer.Option(help="Grow by so many positions until end-of-text.")] = None
    end_think_token_ids: Annotated[
        str | None, typer.Option(metavar="ID,ID...", help="Tokens that end the thinking.", show_default=False)
    ] = None
    end_think_logit_boost: Annotated[float, typer.Option(help="iLLaDA: raises the next of these tokens.")] = 0.0
    end_think_boost_power: Annotated[float, typer.Option(help="Of the place in the response, in that boost.")] = 2.0
    seed: Annotated[int, typer.Option(help="Random seed, used at temperatures above 0.")] = 0
    apply_chat_template: Annotated[
        bool, typer.Option("--chat-template/--no-chat-template", help="Use the prompt as a user message, or as it is.")
    ] = True
    device: Annotated[str | None, typer.Option(help="Device. Default: a GPU, if any.", show_default=False)] = None
    dtype: Annotated[str | None, typer.Option(metavar="|".join(DTYPES), help="Data type. Default: by device.")] = None
    quantization: Annotated[str | None, typer.Option(metavar="|".join(FORMATS), help="Weights. Default: none.")] = None
    backend: Annotated[
        str | None, typer.Option(metavar="|".join(BACKENDS), help="Kernel back end. Default: see sfs doctor.")
    ] = None
    cuda_graphs: Annotated[bool | None, typer.Option(help="Replay CUDA graphs. Default: see sfs doctor.")] = None
    mask_token_id: Annotated[int | None, typer.Option(help="Mask token. Default: the checkpoint's.")] = None
    max_length: Annotated[int | None, typer.Option(help="Limit of positions. Default: the checkpoint's.")] = None
    adapter: Annotated[str | None, typer.Option(help="LoRA adapter: folder or hub id.", show_default=False)] = None
    tensor_parallel: Annotated[int, typer.Option(help="Processes per model, started by torchrun.")] = 1

    def text(self) -> str:
        """Return the prompt, read from stdin if it is ``-``."""
        text = self.prompt
        if text == "-":
            sys.stdin.reconfigure(errors="surrogateescape")  # undecodable bytes are refused below, as in an argument
            text = sys.stdin.read(LARGEST_INPUT + 1)
            require(len(text) <= LARGEST_INPUT, f"the prompt on stdin is larger than {LARGEST_INPUT:,} characters")
            text = text.rstrip("\n")
        check_unicode("the prompt", text)
        unprompted = self.prompt == "" and not self.apply_chat_template
        require(unprompted or bool(text.strip()), "the prompt is empty; '' is none at all with --no-chat-template")
        return text

    @property
    def kind(self) -> str | None:
        """Name of the sampler, without its options."""
        return from_words(self.sampler).pop("kind", None)

    def make_sampler(self) -> Sampler:
        """Build the sampler; refuse options of other samplers."""
        words = from_words(self.sampler)
        kind = words.pop("kind", None)
        require(kind in SAMPLERS, f"--sampler {self.sampler} is not one of {', '.join(SAMPLERS)}")
        given = {name: getattr(self, name) for name in BELONGS_TO if getattr(self, name) is not None}
        for name in given:
            owners = BELONGS_TO[name]
            option, only = "--" + name.replace("_", "-"), " and ".join(owners)
            require(kind in owners, f"{option} does not apply to --sampler {kind}, only to {only}")
            require(name not in words, f"{option} is also in --sampler {self.sampler!r}")
        shared = ("temperature", "cfg_scale", "eos_stop", "eos", "eos_penalty", "grow")
        shared += ("end_think_logit_boost", "end_think_boost_power")
        for name in (*shared, "end_think_token_ids"):
            require(name not in words, f"--sampler {self.sampler!r}: {name} is an option of its own")
        given |= {name: getattr(self, name) for name in shared}
        if self.end_think_token_ids is not None:
            given["end_think_token_ids"] = _ids("--end-think-token-ids", self.end_think_token_ids)
        return parse_sampler(kind, **given, **words)

    def with_sampler(self, name: str) -> CommandOptions:
        """Return the same options for another sampler, with its own defaults."""
        return replace(self, sampler=name, **dict.fromkeys(BELONGS_TO))

    def params(self) -> DecodingParams:
        """Return decoding parameters, checked as far as possible without a checkpoint."""
        sampler, policy = self.make_sampler(), parse_cache(from_words(self.cache))
        return DecodingParams(sampler=sampler, cache=policy, gen_length=self.gen_length, seed=self.seed)

    def load(self, group: Group | int = 1) -> Engine:
        how = {name: getattr(self, name) for name in ("quantization", "mask_token_id", "max_length", "adapter")}
        how["tensor_parallel"] = group
        return load(self.model, self.device, self.dtype, self.backend, self.cuda_graphs, **how)

    def label(self) -> str:
        """Return a short description of sampler and cache, for summaries and titles."""
        base, name = self.preset or next(iter(SAMPLERS[self.kind].presets), None), self.make_sampler().name
        preset = "" if base is None else f" ({name or base + ', changed'})"
        return f"{self.sampler}{preset}, cache {self.cache}"


@dataclass(frozen=True, slots=True)
class PreparedCommand:
    """Checked options, the prompt, and the loaded model."""

    options: CommandOptions
    prompt: str
    params: DecodingParams
    engine: Engine

    @classmethod
    def prepare(cls, options: CommandOptions) -> PreparedCommand:
        """Check the options as far as possible before a checkpoint of many gigabytes is loaded, then load it."""
        params = options.params()
        group = join(options.tensor_parallel, options.device)
        prompt = group.first(options.text)
        engine = options.load(group)
        engine.codec(f"model={options.model!r}: a text prompt")
        room = engine.spec.max_length
        require(options.gen_length < room, f"gen_length={options.gen_length}: the model has only {room} positions")
        check_size("prompt", prompt, room)
        return cls(options, prompt, params, engine)

    def run(self, **arguments: Any) -> Generation:
        arguments["apply_chat_template"] = self.options.apply_chat_template
        return self.engine.generate(self.prompt, self.params, **arguments)


def _ids(option: str, text: str) -> list[int]:
    """Return token ids separated by commas."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ArgumentError(f"{option} {text!r} is not token ids separated by commas") from None


def _summary(result: Generation, label: str) -> str:
    rate = len(result.tokens) / max(result.seconds, 1e-9)
    return (
        f"NFE {result.nfe} | TPF {result.tokens_per_forward:.2f} | {rate:,.1f} tokens/s | "
        f"{result.positions_forwarded:,} positions forwarded | {len(result.tokens)} tokens in {result.seconds:.2f} s | "
        f"{label}"
    )


def _as_json(command: PreparedCommand, result: Generation) -> str:
    return printable_json({**result.as_dict(), "model": command.options.model, **command.params.to_dict()})


def generate(
    options: CommandOptions,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the text.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show the canvas live, on stderr.")] = False,
    delay: Annotated[float | None, typer.Option(help=f"Seconds per frame of --watch. Default: {DELAY}.")] = None,
    record: Annotated[Path | None, typer.Option(help="Animated picture (.gif) of the canvas.")] = None,
    beside: Annotated[str | None, typer.Option(help="Other samplers in --record, comma-separated.")] = None,
) -> None:
    """Answer a prompt. The text goes to stdout, a one-line summary to stderr."""
    require(watch or delay is None, "--delay applies only with --watch")
    require(record is not None or beside is None, "--beside applies only with --record")
    fixed = options.grow is None or not watch and record is None
    require(fixed, f"--grow {options.grow} does not go with --watch or --record, which draw a canvas of one length")
    delay = DELAY if delay is None else delay
    require(math.isfinite(delay) and delay >= 0, f"--delay {delay} is not a number of seconds")
    others = [options.with_sampler(name.strip()) for name in beside.split(",")] if beside is not None else []
    for other in others:
        other.params()
    if watch:
        from ..view.canvas import Watcher
    if record is not None:
        from ..view import record as recorder
        from ..view.pictures import check_path

        check_path("record", record, recorder.SUFFIXES)
    command = PreparedCommand.prepare(options)
    rank = command.engine.model.group.rank
    with ExitStack() as stack:
        callbacks = []
        if watch and rank == 0:
            title = f"sfs: {options.label()}"
            watcher = Watcher(command.engine, command.params.sampler, options.gen_length, delay=delay, title=title)
            callbacks.append(stack.enter_context(watcher))
        if record is not None:
            titles = [each.label().removesuffix(", cache none") for each in (options, *others)]
            recordings = [recorder.Recording(title, options.gen_length) for title in titles]
            callbacks.append(recordings[0])
        # ranks make the same calls
        result = command.run(on_step=_each(callbacks)) if watch or callbacks else command.run()
    if record is not None:
        for other, recording in zip(others, recordings[1:], strict=True):
            replace(command, options=other, params=other.params()).run(on_step=recording)
    if rank > 0:
        return
    text = printable(result.text) if sys.stdout.isatty() else result.text  # a file gets the text unescaped
    typer.echo(_as_json(command, result) if as_json else text)
    typer.echo(_summary(result, options.label()), err=True)
    if record is not None:
        recorder.Animation(command.engine, recordings).save(record)
        typer.echo(f"wrote {record}", err=True)


def _each(callbacks: list[Callable[[Frame], None]]) -> Callable[[Frame], None]:
    """Return a callback that calls all of them."""

    def call(frame: Frame) -> None:
        for callback in callbacks:
            callback(frame)

    return call


def plot(
    options: CommandOptions,
    out: Annotated[Path, typer.Argument(help="Picture to write: .png, .svg or .pdf.", show_default=False)],
) -> None:
    """Draw the confidence map of a generation: position by step, with stages, cycles and spans."""
    from ..view.plot import SUFFIXES, check_path, confidence_map, save

    check_path("out", out, SUFFIXES)
    command = PreparedCommand.prepare(options)
    result = command.run(trace=True)
    save(confidence_map(result, command.params.sampler, title=options.label()), out)
    typer.echo(f"{_summary(result, options.label())} | wrote {out}", err=True)


def chat(
    options: CommandOptions,
    system: Annotated[str, typer.Option(help="System message.", show_default=False)] = "",
    watch: Annotated[bool, typer.Option("--watch", help="Show the canvas live, on stderr.")] = False,
) -> None:
    """Chat with a model. Lines that start with / are commands: /help lists them."""
    from ..chat.conversation import Conversation
    from ..chat.terminal import run

    if watch:
        from ..view import canvas as render  # noqa: F401  names the extra if rich is missing
    params = options.params()
    raise typer.Exit(run(Conversation(options.load(), params, system), options.model, watch))


def _takes_options(command: Callable[..., None], **fixed: Any) -> Callable[..., None]:
    """Add an option per field of :class:`CommandOptions` to ``command``; report errors in one line, exit code 2.

    ``fixed`` fields are no options. This defines the options once, and keeps twenty parameters out of each command.
    """
    hints = get_type_hints(CommandOptions, include_extras=True)
    shared = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, annotation=hints[f.name], default=_default(f))
        for f in fields(CommandOptions)
        if f.name not in fixed
    ]
    own_hints = get_type_hints(command, include_extras=True)
    own = [
        p.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=own_hints[p.name])
        for p in inspect.signature(command).parameters.values()
        if p.name != "options"
    ]

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        options = {f.name: fixed[f.name] if f.name in fixed else values.pop(f.name) for f in fields(CommandOptions)}
        with _refusals():
            check_started(options["tensor_parallel"])
            command(CommandOptions(**options), **values)

    parameters = [shared[0], *own, *shared[1:]]  # typed order: the prompt, then the rest
    wrapper.__signature__ = inspect.Signature(parameters)
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapper


@contextmanager
def _refusals() -> Iterator[None]:
    """Report package errors in one line, with exit code 2."""
    try:
        yield
    except SfsError as error:
        rank, _ = world()
        if rank == 0 or not joined():
            typer.echo(f"rank {rank}: " * (rank > 0) + _error_line(error), err=True)
        raise typer.Exit(2) from None


def _default(field: Any) -> Any:
    return inspect.Parameter.empty if field.default is MISSING else field.default


def _error_line(error: SfsError) -> str:
    return "error: " + " ".join(str(error).split())


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sfs_triton {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Fast decoding for full-attention masked-diffusion language models."""


def _prompt_command() -> type:
    """Return the command class for prompts: usage errors explain how to pass a prompt that starts with a dash."""

    class PromptCommand(typer.core.TyperCommand):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            given = list(args)
            try:
                return super().parse_args(ctx, args)
            except typer.BadParameter.__base__ as error:  # usage errors of the parser
                if any(arg.startswith("-") and (" " in arg or arg[1:2].isdigit()) for arg in given):
                    error.message += "\nA prompt that starts with a dash goes last, after --, as in: -- '-5 apples'"
                raise

    return PromptCommand


def _build_app() -> typer.Typer:
    built = typer.Typer(name="sfs", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    built.callback()(_root)
    alone = {"tensor_parallel": 1}
    built.command(cls=_prompt_command())(_takes_options(generate))
    built.command(cls=_prompt_command())(_takes_options(plot, **alone))
    built.command()(_takes_options(chat, prompt="", apply_chat_template=True, **alone))
    from ..serve.command import serve
    from .batch import batch
    from .doctor import doctor

    built.command()(_takes_options(batch, prompt="", **alone))
    built.command()(_refusals()(serve))
    built.command()(_refusals()(doctor))
    return built


app = None if typer is None else _build_app()


def main() -> None:
    """Entry point of the console script ``sfs``."""
    if app is None:
        missing = MissingDependencyError('the command line needs typer: pip install "sfs_triton[cli]"')
        print(_error_line(missing), file=sys.stderr)
        sys.exit(2)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the parent process
            setattr(sys, name, open(os.devnull, mode))
    sys.stdout = out = Output(sys.stdout)
    try:
        app()
        out.flush()
    except OSError:
        if out.failure is None:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())  # or the interpreter would flush it again at exit
        print(f"error: stdout cannot be written: {out.failure.strerror or out.failure}", file=sys.stderr)
        sys.exit(1)
