"""The command line: ``sfs generate``, ``plot``, ``chat``, ``serve``. Results go to stdout, all else to stderr."""

from __future__ import annotations

import functools
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from . import __version__
from .caching import POLICIES, CachePolicy, cache_policy
from .engine import DTYPES, Engine, Generation, load
from .errors import ArgumentError, MissingDependencyError, SfsError, require
from .loops.choose import LOOPS
from .ops import IMPLEMENTATIONS
from .samplers import PRESETS, SAMPLERS, FixedSteps, Sampler, SlowFast, Threshold

try:
    import typer
except ImportError:  # main() names the extra in one line, where an error raised here would be a traceback
    typer = None

DELAY = 0.03
# The options that only some samplers have; one that was given for another sampler is refused by name.
BELONGS_TO = {
    "preset": ("slowfast",),
    "tau_min": ("slowfast",),
    "tau_high": ("slowfast",),
    "k_max": ("slowfast",),
    "window": ("slowfast",),
    "tau": ("threshold",),
    "steps": ("threshold", "fixed"),
    "block_length": SAMPLERS,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to generate and how: the prompt and the options that ``generate`` and ``plot`` share."""

    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from stdin.", show_default=False)]
    model: Annotated[str, typer.Option(help="'embedded', a checkpoint folder, or a hub id.")] = "embedded"
    sampler: Annotated[str, typer.Option(metavar="|".join(SAMPLERS), help="vanilla: one token a step.")] = "slowfast"
    preset: Annotated[str | None, typer.Option(metavar="|".join(PRESETS), help="slowfast: default paper.")] = None
    tau_min: Annotated[float | None, typer.Option(help="slowfast: confidence of a horizon candidate.")] = None
    tau_high: Annotated[float | None, typer.Option(help="slowfast: confidence to commit in fast steps.")] = None
    k_max: Annotated[int | None, typer.Option(help="slowfast: most slow steps of a cycle.")] = None
    window: Annotated[int | None, typer.Option(help="slowfast: horizons the stability test looks at.")] = None
    tau: Annotated[float | None, typer.Option(help="threshold: confidence to commit.")] = None
    steps: Annotated[int | None, typer.Option(help="fixed: steps in all; threshold: sets a quota a step.")] = None
    block_length: Annotated[int | None, typer.Option(help="Decode block by block (threshold: 32).")] = None
    cache: Annotated[str, typer.Option(metavar="|".join(POLICIES), help="Cache policy.")] = "none"
    gen_length: Annotated[int, typer.Option(help="Response positions.")] = 128
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0
    cfg_scale: Annotated[float, typer.Option(help="Classifier-free guidance; 0 is off.")] = 0.0
    eos_stop: Annotated[bool, typer.Option(help="Stop decoding at the first end-of-text.")] = False
    seed: Annotated[int, typer.Option(help="Of the noise, for temperatures above 0.")] = 0
    raw: Annotated[bool, typer.Option("--raw", help="Use the prompt as it is, without the chat template.")] = False
    device: Annotated[str | None, typer.Option(help="Default: a GPU if there is one.", show_default=False)] = None
    dtype: Annotated[str | None, typer.Option(metavar="|".join(DTYPES), help="Default: by device.")] = None
    impl: Annotated[
        str | None, typer.Option(metavar="|".join(IMPLEMENTATIONS), help="Of the operations. Default: by device.")
    ] = None

    loop: Annotated[str | None, typer.Option(metavar="|".join(LOOPS), help="Default: by device and record.")] = None

    def text(self) -> str:
        """The prompt itself, read from stdin if it is ``-``."""
        try:
            text = sys.stdin.read().rstrip("\n") if self.prompt == "-" else self.prompt
            text.encode()  # bytes that the terminal's encoding could not decode arrive as lone surrogates
        except UnicodeError as error:
            raise ArgumentError(f"the prompt is not valid text: {error}") from None
        require(bool(text), "the prompt is empty")
        return text

    def make_sampler(self) -> Sampler:
        """The sampler's settings; refuses options of another sampler."""
        require(self.sampler in SAMPLERS, f"--sampler {self.sampler} is not one of {', '.join(SAMPLERS)}")
        given = {name: getattr(self, name) for name in BELONGS_TO if getattr(self, name) is not None}
        for name in given:
            owners = BELONGS_TO[name]
            option, only = "--" + name.replace("_", "-"), " and ".join(owners)
            require(self.sampler in owners, f"{option} does not apply to --sampler {self.sampler}, only to {only}")
        given |= {"temperature": self.temperature, "cfg_scale": self.cfg_scale, "eos_stop": self.eos_stop}
        if self.sampler == "slowfast":
            return SlowFast.preset(given.pop("preset", "paper"), **given)
        return Threshold(**given) if self.sampler == "threshold" else FixedSteps(**given)

    def label(self) -> str:
        """Sampler and cache in a few words, for summaries and titles."""
        preset = f" ({self.preset or 'paper'})" if self.sampler == "slowfast" else ""
        return f"{self.sampler}{preset}, cache {self.cache}"


@dataclass(frozen=True, slots=True)
class Job:
    """A request that has been checked, and its loaded model."""

    request: Request
    prompt: str
    sampler: Sampler
    policy: CachePolicy
    engine: Engine

    @classmethod
    def prepare(cls, request: Request) -> Job:
        """Check everything that can be checked before a checkpoint of many gigabytes is loaded, then load it."""
        sampler, policy = request.make_sampler(), cache_policy(request.cache)
        sampler.check_cache(policy)
        require(request.gen_length > 0, f"gen_length={request.gen_length} is not positive")
        sampler.check_length(request.gen_length)
        require(0 <= request.seed < 2**63, f"seed={request.seed} is not in [0, 2**63)")
        prompt = request.text()
        engine = load(request.model, request.device, request.dtype, request.impl, request.loop)
        require(engine.text is not None, f"model={request.model!r} has no tokenizer.json, which a text prompt needs")
        room = engine.spec.max_length
        require(request.gen_length < room, f"gen_length={request.gen_length}: the model has only {room} positions")
        return cls(request, prompt, sampler, policy, engine)

    def run(self, **options: Any) -> Generation:
        request = self.request
        return self.engine.generate(
            self.prompt,
            gen_length=request.gen_length,
            sampler=self.sampler,
            cache=self.policy,
            seed=request.seed,
            raw=request.raw,
            **options,
        )


def _summary(result: Generation, label: str) -> str:
    rate = len(result.tokens) / max(result.seconds, 1e-9)
    return (
        f"NFE {result.nfe} | TPF {result.tokens_per_forward:.2f} | {rate:,.1f} tokens/s | "
        f"{result.rows_forwarded:,} rows forwarded | {len(result.tokens)} tokens in {result.seconds:.2f} s | {label}"
    )


def _as_json(job: Job, result: Generation) -> str:
    return json.dumps(
        {
            "text": result.text,
            "tokens": result.tokens,
            "prompt_tokens": result.prompt_length,
            "response_tokens": len(result.tokens),
            "nfe": result.nfe,
            "forwards": result.forwards,
            "tokens_per_forward": result.tokens_per_forward,
            "rows_forwarded": result.rows_forwarded,
            "seconds": result.seconds,
            "tokens_per_second": len(result.tokens) / max(result.seconds, 1e-9),
            "model": job.request.model,
            "sampler": {"kind": job.request.sampler, **asdict(job.sampler)},
            "cache": {"kind": job.policy.name, **asdict(job.policy)},
            "gen_length": job.request.gen_length,
            "seed": job.request.seed,
        },
        ensure_ascii=False,
    )


def generate(
    request: Request,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the text.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show the canvas live, on stderr.")] = False,
    delay: Annotated[float | None, typer.Option(help=f"Seconds per frame of --watch; default {DELAY}.")] = None,
) -> None:
    """Answer a prompt. The text goes to stdout, a one-line summary to stderr."""
    require(watch or delay is None, "--delay applies only with --watch")
    delay = DELAY if delay is None else delay
    require(math.isfinite(delay) and delay >= 0, f"--delay {delay} is not a number of seconds")
    if watch:
        from .render import Watcher
    job = Job.prepare(request)
    if watch:
        with Watcher(job.engine, job.sampler, request.gen_length, delay=delay, title=f"sfs: {request.label()}") as show:
            result = job.run(on_step=show)
    else:
        result = job.run()
    typer.echo(_as_json(job, result) if as_json else result.text)
    typer.echo(_summary(result, request.label()), err=True)


def plot(
    request: Request,
    out: Annotated[Path, typer.Argument(help="Picture to write: .png, .svg or .pdf.", show_default=False)],
) -> None:
    """Draw the confidence map of a generation: position by step, with stages, cycles and spans."""
    from .plot import check_path, confidence_map, save

    check_path(out)
    job = Job.prepare(request)
    result = job.run(trace=True)
    save(confidence_map(result, job.sampler, title=request.label()), out)
    typer.echo(f"{_summary(result, request.label())} | wrote {out}", err=True)


def chat(
    request: Request,
    system: Annotated[str, typer.Option(help="A system message.", show_default=False)] = "",
    forget: Annotated[bool, typer.Option("--forget", help="Drop oldest exchanges where a turn has no room.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object for each answer.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show the canvas live, on stderr.")] = False,
    delay: Annotated[float, typer.Option(help="Seconds per frame of --watch.")] = DELAY,
    history: Annotated[Path | None, typer.Option(help="A file to keep typed lines in.", show_default=False)] = None,
) -> None:
    """Talk to a model, turn by turn. Lines that begin with / are commands: /help lists them."""
    from .chat import Chat, Settings
    from .chat_terminal import ChatTerminal, InputHistory

    require(math.isfinite(delay) and delay >= 0, f"--delay {delay} is not a number of seconds")
    if watch:
        from . import render  # noqa: F401  which names the extra where rich is missing
    settings = Settings(
        sampler=request.make_sampler(),
        cache=cache_policy(request.cache),
        gen_length=request.gen_length,
        seed=request.seed,
        forget=forget,
    )
    typed = InputHistory(history)
    engine = load(request.model, request.device, request.dtype, request.impl, request.loop)
    terminal = ChatTerminal(
        Chat(engine, settings, system), model=request.model, as_json=as_json, watch=watch, delay=delay, history=typed
    )
    raise typer.Exit(terminal.run())


def _takes_request(command: Callable[..., None], **fixed: Any) -> Callable[..., None]:
    """Give ``command`` one option per field of :class:`Request`, and turn package errors into one line and exit code 2.

    Fields that are ``fixed`` are no options. The others stand in one place that way, and the bodies stay free of twenty
    parameters.
    """
    hints = get_type_hints(Request, include_extras=True)
    shared = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, annotation=hints[f.name], default=_default(f))
        for f in fields(Request)
        if f.name not in fixed
    ]
    own_hints = get_type_hints(command, include_extras=True)
    own = [
        p.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=own_hints[p.name])
        for p in inspect.signature(command).parameters.values()
        if p.name != "request"
    ]

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        request = {f.name: fixed[f.name] if f.name in fixed else values.pop(f.name) for f in fields(Request)}
        with _refusals():
            command(Request(**request), **values)

    parameters = [shared[0], *own, *shared[1:]]  # arguments in the order they are typed: the prompt, then the rest
    wrapper.__signature__ = inspect.Signature(parameters)
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapper


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn package errors into one line and exit code 2."""
    try:
        yield
    except SfsError as error:
        typer.echo(_error_line(error), err=True)
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


def _build_app() -> typer.Typer:
    built = typer.Typer(name="sfs", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    built.callback()(_root)
    for command in (generate, plot):
        built.command()(_takes_request(command))
    built.command()(_takes_request(chat, prompt="", raw=False))
    from .serve.command import serve

    built.command()(_refusals()(serve))
    return built


app = None if typer is None else _build_app()


def main() -> None:
    """Entry point of the console script ``sfs``."""
    if app is None:
        missing = MissingDependencyError('the command line needs typer: pip install "sfs_triton[cli]"')
        print(_error_line(missing), file=sys.stderr)
        sys.exit(2)
    app()


if __name__ == "__main__":
    main()
