"""``sfs serve``: parse the options, start the server, stop it on a signal."""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..decoding.caching import POLICIES
from ..decoding.params import from_words, parse_cache, parse_sampler
from ..decoding.samplers import PRESET_NAMES, SAMPLERS
from ..distributed import world
from ..engine import DTYPES, load
from ..errors import ArgumentError, MissingDependencyError, require
from ..ops.dispatch import BACKENDS, FORMATS
from .settings import ServeSettings

KEY_VARIABLE = "SFS_API_KEY"
_LIMITS = ServeSettings()


def serve(
    model: Annotated[str, typer.Option(help="Model: 'embedded', a checkpoint folder, or a hub id.")] = "embedded",
    name: Annotated[str | None, typer.Option(help="Model name for clients. Default: the last part of --model.")] = None,
    host: Annotated[str, typer.Option(help="Listen address; all but loopback need an API key.")] = _LIMITS.host,
    port: Annotated[int, typer.Option(help="Listen port; 0 takes a free one.")] = _LIMITS.port,
    api_key_file: Annotated[
        Path | None, typer.Option(help=f"File with the API key; or set {KEY_VARIABLE}.", show_default=False)
    ] = None,
    without_key: Annotated[
        bool, typer.Option("--without-key", help="Listen on any address without an API key.")
    ] = False,
    allow_host: Annotated[list[str] | None, typer.Option(help="Accept this Host header as well.")] = None,
    sampler: Annotated[
        str, typer.Option(metavar="|".join(SAMPLERS), help="Default; may have options: 'klass history=3'.")
    ] = "slowfast",
    preset: Annotated[str | None, typer.Option(metavar="NAME", help=f"Named settings, of {PRESET_NAMES}.")] = None,
    cache: Annotated[str, typer.Option(metavar="|".join(POLICIES), help="Default cache policy, likewise.")] = "none",
    default_tokens: Annotated[int, typer.Option(help="Default of max_tokens.")] = _LIMITS.default_tokens,
    max_tokens: Annotated[int | None, typer.Option(help="Maximum of max_tokens.", show_default=False)] = None,
    max_batch: Annotated[int, typer.Option(help="Sequences decoded together per batch.")] = _LIMITS.max_batch,
    max_batches: Annotated[int, typer.Option(help="Maximum number of persistent batches.")] = _LIMITS.max_batches,
    cache_memory: Annotated[
        float | None,
        typer.Option(help="GiB for all caches. Default on a CPU: half of the free memory.", show_default=False),
    ] = None,
    max_queue: Annotated[int, typer.Option(help="Maximum number of waiting requests.")] = _LIMITS.max_queue,
    time_limit: Annotated[float, typer.Option(help="Maximum seconds per request.")] = _LIMITS.time_limit,
    max_body: Annotated[int, typer.Option(help="Maximum bytes per request body.")] = _LIMITS.max_body,
    grace: Annotated[float, typer.Option(help="Seconds to finish requests at shutdown.")] = _LIMITS.grace,
    device: Annotated[str | None, typer.Option(help="Device. Default: a GPU, if any.", show_default=False)] = None,
    dtype: Annotated[str | None, typer.Option(metavar="|".join(DTYPES), help="Data type. Default: by device.")] = None,
    quantization: Annotated[str | None, typer.Option(metavar="|".join(FORMATS), help="Weights. Default: none.")] = None,
    backend: Annotated[
        str | None, typer.Option(metavar="|".join(BACKENDS), help="Kernel back end. Default: see sfs doctor.")
    ] = None,
    cuda_graphs: Annotated[bool | None, typer.Option(help="Replay CUDA graphs. Default: see sfs doctor.")] = None,
    mask_token_id: Annotated[int | None, typer.Option(help="Mask token. Default: the checkpoint's.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Limit of positions. Default: the checkpoint's.")] = None,
    adapter: Annotated[str | None, typer.Option(help="LoRA adapter: folder or hub id.", show_default=False)] = None,
) -> None:
    """Serve a model through OpenAI's HTTP interface, until SIGINT or SIGTERM."""
    _need_libraries()
    _, processes = world()
    require(processes == 1, f"sfs serve is one process, and this is one of {processes} (WORLD_SIZE)")
    settings = ServeSettings(
        model=name or model.rstrip("/").rpartition("/")[2] or model,
        host=host,
        port=port,
        api_key=_api_key(api_key_file),
        without_key=without_key,
        allowed_hosts=tuple(allow_host or ()),
        sampler=parse_sampler(from_words(sampler), **({} if preset is None else {"preset": preset})),
        cache=parse_cache(from_words(cache)),
        default_tokens=default_tokens,
        max_tokens=max_tokens,
        max_batch=max_batch,
        max_batches=max_batches,
        cache_memory=_bytes(cache_memory),
        max_queue=max_queue,
        time_limit=time_limit,
        max_body=max_body,
        grace=grace,
    )
    settings.sampler.check_cache(settings.cache)
    with _listen(settings) as listener:  # fail on a busy port before gigabytes are read
        how = {"quantization": quantization, "mask_token_id": mask_token_id, "max_length": max_length}
        how["adapter"] = adapter
        run(load(model, device, dtype, backend, cuda_graphs, **how), settings, listener)


def run(engine: Any, settings: ServeSettings, listener: socket.socket) -> None:
    """Serve on a listening socket until a signal; then finish the requests that were accepted."""
    import uvicorn

    from .app import create_app

    app = create_app(engine, settings)
    worker = app.state.worker

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            worker.drain(settings.grace)
            self.force_exit = self.should_exit and sig == signal.SIGINT  # a second Ctrl-C exits at once
            self.should_exit = True

    config = uvicorn.Config(
        app,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=int(settings.grace) + 5,  # the worker has ended all jobs by then
    )
    where, port = listener.getsockname()[:2]
    where = f"[{where}]" if ":" in where else where
    print(f"serving {settings.model!r} at http://{where}:{port}/v1", file=sys.stderr, flush=True)
    Server(config).run(sockets=[listener])


def _listen(settings: ServeSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=256)
    except OSError as error:
        where = f"host={settings.host!r}, port={settings.port}"
        raise ArgumentError(f"{where} cannot be listened on: {error.strerror or error}") from None


def _need_libraries() -> None:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        message = f'sfs serve needs {error.name}: pip install "sfs_triton[cli,serve]"'
        raise MissingDependencyError(message) from None


def _api_key(path: Path | None) -> str | None:
    """Read the key from a file or the environment; on a command line every user of the machine could read it.

    The settings refuse an empty key; it does not mean "no key".
    """
    if path is None:
        return os.environ.get(KEY_VARIABLE)
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeError) as error:
        raise ArgumentError(f"--api-key-file {str(path)!r} cannot be read: {error}") from None


def _bytes(gib: float | None) -> int | None:
    require(gib is None or 0 < gib < 2**20, f"--cache-memory {gib} is not a positive number of GiB")
    return None if gib is None else max(1, int(gib * 2**30))
