"""Ray: batch runs with workers (Ray Data), and the server with replicas (Ray Serve).

A cluster that this module starts listens on loopback only and sends no usage statistics; an existing one, or one
named by ``address``, is used unchanged.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..batch import run as batch
from ..batch.files import Row
from ..batch.run import BatchError, BatchSettings, Finished, Summary
from ..engine import load
from ..errors import MissingDependencyError, SfsError, check_integer, first_line, require
from ..serve.settings import ServeSettings

try:
    import ray
    import ray.data
    from ray import serve
except ImportError as error:
    raise MissingDependencyError(f'this needs Ray ({error}): pip install "sfs_triton[ray]"') from error

_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # 0: a cluster listens on loopback only, on any system
RETRIES = 3  # of a chunk whose worker died; Ray itself would retry for ever
_START = "start"  # key of worker starts in Attempts
_BLOCKS = 4096  # most pieces of a run; a failed worker or driver loses one piece


def run_batch(
    source: str | Path,
    out: str | Path,
    settings: BatchSettings | None = None,
    *,
    workers: int = 2,
    address: str | None = None,
    gpus: float | None = None,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Run :func:`sfs_triton.batch.run_batch` with ``workers`` processes, each with its own engine.

    The grouping of rows does not depend on the workers, so the output is the same for any number of them.
    Only this process reads and writes files; a chunk whose worker dies goes to another.

    Args:
        workers: number of engines; one CPU each.
        address: cluster to use (``"auto"``: one on this machine). Default: the one this process is connected to, or
            a new one on this machine, which ends with the run.
        gpus: GPUs per worker, or a fraction of one. Default: 1 if the cluster has any, unless ``device`` is not a GPU.

    Raises:
        ArgumentError: the cluster has no room for the workers; or as :func:`sfs_triton.batch.run_batch`.
        BatchError: a chunk failed repeatedly; or as :func:`sfs_triton.batch.run_batch`.
    """
    check_integer("workers", workers)
    settings = settings or BatchSettings()

    def execute(chunks: Iterator[list[Row]]) -> Iterator[Finished]:
        todo = list(chunks)
        if todo:
            with _cluster(address, workers, gpus):
                share = _gpus(settings.device, gpus)
                _check_room(workers, share)
                yield from _answers(todo, settings, workers, share)

    return batch.run_batch(source, out, settings, execute, overwrite=overwrite, on_progress=on_progress)


class Attempts:
    """Counter of the attempts of all workers: an actor that outlives them."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def begin(self, what: str) -> int:
        """Count an attempt, and return the number of attempts since the last success."""
        self._counts[what] += 1
        return self._counts[what]

    def done(self, *whats: str) -> None:
        for what in whats:
            del self._counts[what]


class Worker:
    """An engine in its own process. Errors are returned as data: Ray would wrap them and retry.

    Args:
        attempts: handle of :class:`Attempts`.
        starts: maximum number of worker starts before any chunk is done.
    """

    def __init__(self, settings: BatchSettings, attempts: Any, starts: int):
        self.settings, self.attempts, self.refusal = settings, attempts, None
        if ray.get(attempts.begin.remote(_START)) > starts:
            self.refusal = "workers died again and again while they started"
            return
        try:
            self.engine = settings.open_engine()
        except SfsError as error:
            self.refusal = str(error)

    def __call__(self, pieces: dict[str, Any]) -> dict[str, list[str]]:
        return {"finished": [json.dumps(self._answer(piece)) for piece in pieces["rows"]]}

    def _answer(self, piece: str) -> dict[str, Any]:
        if self.refusal is not None:
            return {"refusal": self.refusal}
        rows = [Row(**row) for row in json.loads(piece)]
        lines = f"lines {rows[0].line} to {rows[-1].line}"
        if ray.get(self.attempts.begin.remote(lines)) > RETRIES + 1:
            return {"refusal": f"{RETRIES + 1} workers died at {lines}"}
        try:
            finished = batch.answer(self.engine, self.settings, rows)
        except SfsError as error:
            return {"refusal": str(error)}
        self.attempts.done.remote(lines, _START)
        return {"finished": finished}


def _answers(todo: list[list[Row]], settings: BatchSettings, workers: int, gpus: float) -> Iterator[Finished]:
    """Yield the workers' results in any order. An item of the data is a chunk of rows, as JSON."""
    attempts = ray.remote(num_cpus=0)(Attempts).remote()
    with _quiet_data():
        pieces = [{"rows": json.dumps([asdict(row) for row in rows])} for rows in todo]
        data = ray.data.from_items(pieces, override_num_blocks=min(len(pieces), _BLOCKS)).map_batches(
            Worker,
            fn_constructor_args=(settings, attempts, workers + RETRIES),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
            num_cpus=1,
            num_gpus=gpus,
        )
        try:
            for piece in data.iter_rows():
                came = json.loads(piece["finished"])
                if "refusal" in came:
                    raise BatchError(came["refusal"])
                yield [(key, row) for key, row in came["finished"]]
        except ray.exceptions.RayError as error:
            raise BatchError(
                f"the workers could not go on ({first_line(error)}); run it again to go on from here"
            ) from error


@contextmanager
def _quiet_data() -> Iterator[None]:
    """Disable Ray Data's progress bars and log messages within this context."""
    context, log = ray.data.DataContext.get_current().copy(), logging.getLogger("ray.data")
    context.enable_progress_bars = False
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with ray.data.DataContext.current(context):
            yield
    finally:
        log.setLevel(level)


@contextmanager
def _cluster(address: str | None, workers: int, gpus: float | None) -> Iterator[None]:
    """Use a cluster within this context: the connected one, the one at ``address``, or a new one."""
    with ExitStack() as stack:
        if not ray.is_initialized():
            stack.callback(ray.shutdown)
            start(workers, address=address)
        yield


def start(cpus: int, *, address: str | None = None, **options: Any) -> None:
    """Connect this process to the cluster at ``address``, or start one on this machine, on loopback.

    ``ray.shutdown()`` ends it. ``options`` are those of ``ray.init``.

    Raises:
        ArgumentError: there is no cluster at ``address``.
    """
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": False}
    if address is not None:
        del quiet["include_dashboard"]
        try:
            ray.init(address=address, **quiet | options)
        except (ConnectionError, ValueError) as error:
            require(False, f"address={address!r}: {first_line(error)}")
    else:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        with _on_loopback():
            ray.init(address="local", num_cpus=cpus, **quiet | options)


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Make clusters started in this context listen on loopback only. Ray reads its variable at import."""
    from ray._private import ray_constants

    known, given = ray_constants.ENABLE_RAY_CLUSTER, os.environ.get(_LOOPBACK)
    os.environ[_LOOPBACK], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = known
        if given is None:
            del os.environ[_LOOPBACK]
        else:
            os.environ[_LOOPBACK] = given


def _gpus(device: str | None, asked: float | None) -> float:
    """Return the number of GPUs per worker."""
    if asked is not None:
        return asked
    named = device is not None and str(device).startswith("cuda")
    if not ray.is_initialized():
        return float(named)  # what there will be is not known
    return float((named or device is None) and ray.cluster_resources().get("GPU", 0) >= 1)


def _check_room(workers: int, gpus: float) -> None:
    """Refuse resources that the cluster does not have: Ray would wait for ever."""
    there = ray.cluster_resources()
    for kind, needed in (("CPU", workers), ("GPU", workers * gpus)):
        found = there.get(kind, 0)
        require(found >= needed, f"workers={workers} need {needed:g} {kind}s, the cluster has {found:g}")


# ---------------------------------------------------------------------------------------------------------------- serve


class Replica:
    """A complete server in its own process: engine, worker thread and application."""

    def __init__(self, load_options: dict[str, Any], settings: ServeSettings):
        from ..serve.app import create_app

        self._application = create_app(load(**load_options), settings)

    def __serve_build_asgi_app__(self) -> Any:
        return self._application

    def check_health(self) -> None:
        """Raise if the replica accepts no more requests; Ray then replaces it."""
        if not self._application.state.worker.ready:
            raise RuntimeError("this replica takes no requests")


def deployment(
    model: str = "embedded",
    *,
    replicas: int = 2,
    settings: ServeSettings | None = None,
    cpus: float = 1,
    gpus: float | None = None,
    device: str | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
    backend: str | None = None,
    cuda_graphs: bool | None = None,
    mask_token_id: int | None = None,
    max_length: int | None = None,
    adapter: str | None = None,
) -> serve.Application:
    """Return the server of ``sfs serve`` as an application for ``ray.serve.run``, with ``replicas`` replicas.

    Each replica has its own engine and queue; Ray sends a request to the less loaded one. ``host`` and
    ``port`` of the settings are for :func:`serve_on`: Ray's proxy listens, not the replicas.

    Args:
        model, device, dtype, quantization, backend, cuda_graphs, mask_token_id, max_length, adapter: as for
            :func:`sfs_triton.load`, in each replica.
        settings: settings of each replica; default: the server's defaults, for a model of this name.
        cpus, gpus: resources per replica; ``gpus`` by default 1 if the connected cluster has any, unless ``device`` is
            not a GPU. Without a cluster yet, 1 for a ``device`` that is a GPU, else 0.
    """
    check_integer("replicas", replicas)
    settings = settings or ServeSettings(model=model.rstrip("/").rpartition("/")[2] or model)
    settings.sampler.check_cache(settings.cache)
    gpus = _gpus(device, gpus)
    ours = settings.max_batch + settings.max_queue
    options = {
        "path_or_hub_id": model,
        "device": device,
        "dtype": dtype,
        "backend": backend,
        "cuda_graphs": cuda_graphs,
        "quantization": quantization,
        "mask_token_id": mask_token_id,
        "max_length": max_length,
        "adapter": adapter,
    }
    return serve.deployment(
        serve.ingress()(Replica),
        name="sfs_triton",
        num_replicas=replicas,
        max_ongoing_requests=ours + 16,  # with room for health checks and for refusals with 429
        graceful_shutdown_timeout_s=settings.grace + 5,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
    ).bind(options, settings)


def serve_on(application: serve.Application, settings: ServeSettings | None = None) -> str:
    """Run an application on the connected cluster; return its address once it responds.

    Ray's proxy listens on ``settings``' host and port (default: loopback, 8000), unless Serve was started before.
    ``ray.serve.shutdown()`` ends it.
    """
    settings = settings or ServeSettings()
    serve.start(proxy_location="HeadOnly", http_options={"host": settings.host, "port": settings.port})
    serve.run(application, name="sfs_triton", route_prefix="/")
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{settings.port}"
