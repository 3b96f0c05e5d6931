"""Processes that share a model over gloo on this machine, and their work in tests."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

import sfs_triton
from sfs_triton import Engine
from sfs_triton import distributed as parallel
from sfs_triton.decoding.step_plan import StepPlan
from sfs_triton.models import weights
from sfs_triton.models.cache import KVCache
from sfs_triton.runner import ModelRunner

_STARTER = multiprocessing.get_context("forkserver")  # a process that has imported it all, and forks
_STARTER.set_forkserver_preload(["tests.support.ranks", "torch.distributed"])
_ENGINES: dict[tuple, Engine] = {}


class Failed(NamedTuple):
    """Exception raised by a rank."""

    kind: str
    text: str
    seconds: float


class World:
    """``size`` ranks that wait for work; each waits at most ``patience`` seconds for the others."""

    def __init__(self, size: int, folder: Path, patience: float = 30.0):
        self.size, self._ranks, self._pipes = size, [], []
        store = folder / f"store-{time.monotonic_ns()}"
        for rank in range(size):
            mine, theirs = _STARTER.Pipe()
            process = _STARTER.Process(target=_serve, args=(rank, size, store, theirs, patience), daemon=True)
            process.start()
            theirs.close()  # so that a rank that dies is seen
            self._ranks.append(process)
            self._pipes.append(mine)

    def run(self, work: Callable, *arguments: Any, limit: float = 90.0, **options: Any) -> list[Any]:
        """Return the results of ``work(*arguments, **options)`` on each rank: :class:`Failed` if it raised, None if it
        died."""
        for pipe in self._pipes:
            pipe.send((work, arguments, options))
        deadline, results = time.monotonic() + limit, []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                raise TimeoutError(f"rank {rank} of {self.size} has not finished {work.__name__} in {limit:g} s")
            try:
                results.append(pipe.recv())
            except EOFError:
                results.append(None)
        return results

    def __enter__(self) -> World:
        return self

    def __exit__(self, *exception: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._ranks:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()


def _serve(rank: int, size: int, store: Path, pipe: Connection, patience: float) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), parallel.PATIENCE: str(patience)}
    if "lo" in [name for _, name in socket.if_nameindex()]:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while True:
        try:
            work, arguments, options = pipe.recv()
        except EOFError:
            break
        began = time.monotonic()
        try:
            done = work(*arguments, **options)
        except Exception as error:
            done = Failed(type(error).__name__, str(error), time.monotonic() - began)
            if not isinstance(error, sfs_triton.SfsError):
                traceback.print_exc()
        pipe.send(done)
    parallel.close()


# ----------------------------------------------------------------------------------------------------- work of ranks


def engine(model: str | Path, backend: str | None = None, quantization: str | None = None) -> Engine:
    """Return the model that all ranks of this world share; it is loaded once."""
    key, size = (model, backend, quantization), torch.distributed.get_world_size()
    if key not in _ENGINES:
        options = {"backend": backend, "quantization": quantization, "tensor_parallel": size}
        _ENGINES[key] = sfs_triton.load(model, "cpu", "float32", **options)
    return _ENGINES[key]


def generate(model: str | Path, given: list[dict], **how: str) -> list:
    """Return the results of several calls of ``Engine.generate``."""
    return [engine(model, **how).generate(**options) for options in given]


def likelihoods(model: str | Path, pairs: list, options: list[dict]) -> list[list[sfs_triton.Likelihood]]:
    return [engine(model).likelihood(pairs, **given) for given in options]


def infill(model: str | Path, **options: Any) -> Any:
    return engine(model).infill(**options)


def logits(model: str | Path, tokens: list[list[int]]) -> torch.Tensor:
    with torch.inference_mode():
        return engine(model).model.logits(torch.tensor(tokens))


def die(model: str | Path, rank: int, step: int, how: str, **options: Any) -> int:
    """Generate; one rank exits, sleeps or raises before that step. Return the number of steps taken."""
    taken = 0

    def count(frame: sfs_triton.Frame) -> None:
        nonlocal taken
        taken += 1
        if torch.distributed.get_rank() == rank and taken == step:
            if how == "exits":
                os._exit(1)
            if how == "sleeps":
                time.sleep(6)
            if how == "raises":
                raise KeyError("on purpose")

    engine(model).generate(**options, on_step=count)
    return taken


def die_in_a_stream(model: str | Path, rank: int, step: int, **options: Any) -> None:
    """Stream; a step fails on one rank."""
    launch, launched = ModelRunner.launch, 0

    def failing(runner: ModelRunner, plan: StepPlan) -> None:
        nonlocal launched
        launched += 1
        if torch.distributed.get_rank() == rank and launched == step:
            raise KeyError("on purpose")
        launch(runner, plan)

    ModelRunner.launch = failing
    try:
        for _ in engine(model).stream(**options):
            pass
    finally:
        ModelRunner.launch = launch


def load_own(models: list[str | Path]) -> str:
    """Load a model; each rank has its own."""
    rank, size = parallel.world()
    return type(sfs_triton.load(models[rank], "cpu", tensor_parallel=size)).__name__


def generate_own(model: str | Path, options: list[dict]) -> Any:
    """Generate; each rank has a request of its own."""
    return engine(model).generate(**options[torch.distributed.get_rank()])


def after(model: str | Path, **options: Any) -> Any:
    """Generate on an engine whose group may have ended."""
    return engine(model).generate(**options)


class Counting(parallel.Group):
    """A group that counts the data that this rank sends: bytes by kind of call, and the shapes gathered."""

    def __init__(self, group: parallel.Group):
        self._group, self.rank, self.size = group, group.rank, group.size
        self.sent: dict[str, int] = {"all_reduce": 0, "all_gather": 0}
        self.gathered: list[tuple[int, ...]] = []

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self.sent["all_reduce"] += x.numel() * 4
        return self._group.all_reduce(x)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        self.sent["all_gather"] += x.nbytes
        self.gathered.append(tuple(x.shape))
        return self._group.all_gather(x)

    def generation(self, request):
        return self._group.generation(request)

    def exchange(self, text: str) -> list[str]:
        return self._group.exchange(text)


def traffic(model: str | Path, **options: Any) -> tuple[sfs_triton.Generation, list[tuple[int, ...]], dict[str, int]]:
    """Run a generation and count its traffic to other ranks: shapes that were gathered, and bytes."""
    shared = engine(model).model
    counting = Counting(shared.group)
    model = type(shared)(shared.spec, shared.weights, "torch", counting)
    done = Engine(model).generate(**options)
    return done, counting.gathered, counting.sent


def parts(model: str | Path) -> dict[str, Any]:
    """Return the parts of a model that a rank has read and keeps."""
    read: dict[str, int] = {}
    whole = weights.TensorReader.read

    def counted(self, name, *rest):
        tensor = whole(self, name, *rest)
        read[name] = tensor.numel()
        return tensor

    weights.TensorReader.read = counted
    try:
        loaded = sfs_triton.load(model, "cpu", "float32", tensor_parallel=torch.distributed.get_world_size()).model
    finally:
        weights.TensorReader.read = whole
    kept: dict[int, int] = {}  # by address: a tied head is a part of the embedding
    for tensor in _tensors(loaded.weights):
        kept[tensor.data_ptr()] = max(tensor.numel(), kept.get(tensor.data_ptr(), 0))
    return {"read": read, "kept": sum(kept.values()), "layer": loaded.weights.layers[0].qkv.shape}


def _tensors(held: weights.Weights) -> list[torch.Tensor]:
    layers = [getattr(layer, name) for layer in held.layers for name in layer.__slots__]
    return [t for t in (held.embedding, held.norm, held.head, *layers) if t is not None]


def caches(model: str | Path) -> tuple[int, int]:
    """Return the key/value heads in a rank's cache of 64 positions, and the number of values that it holds."""
    shared = engine(model).model
    cache = KVCache(shared.local, 1, 64, shared.device, shared.dtype)
    return cache.k.shape[2], cache.k.numel() * 2


def with_cuda_graphs(model: str | Path) -> None:
    Engine(engine(model).model, cuda_graphs=True)


def nested(model: str | Path) -> None:
    mine = engine(model)
    with mine.stream([3, 14, 15], gen_length=8) as stream:
        next(stream)
        mine.generate([3, 14, 15], gen_length=8)


def evaluate(prompts: list[str], together: int) -> tuple[list[str], list[float], int, int] | str:
    """Return the answers to this group's share of the prompts, the likelihoods of the answer "7", the group's number
    and the number of groups."""
    from lm_eval.api.instance import Instance

    from sfs_triton.integrations.lm_eval import DiffusionLM
    from sfs_triton.integrations.lm_eval.ranks import leave

    try:
        shared = {"device": "cpu", "tensor_parallel": together, "batch_size": 2}
        made = DiffusionLM("embedded", cache="region", likelihood="confidence", **shared)
    except SystemExit as end:
        return f"ended with {end.code}"
    mine = prompts[made.rank :: made.world_size]
    gen_kwargs = [{"until": [], "max_gen_toks": 32, "tau_high": 0.9}] * len(mine)
    requests = [
        Instance("generate_until", {}, given, index, ("t", index, 1))
        for index, given in enumerate(zip(mine, gen_kwargs, strict=True))
    ]
    answers = made.generate_until(requests, disable_tqdm=True)
    pairs = [Instance("loglikelihood", {}, (given, "7"), index, ("l", index, 1)) for index, given in enumerate(mine)]
    values = [value for value, _ in made.loglikelihood(pairs, disable_tqdm=True)]
    leave()
    return answers, values, made.rank, made.world_size


def short_of_memory(model: str | Path, **options: Any) -> list:
    """Generate on a model for which the last rank has memory for one sequence at a time, and the others for all."""
    init, last = ModelRunner.__init__, torch.distributed.get_world_size() - 1

    def refuse(self, model, key, slots, *given, **named):
        if torch.distributed.get_rank() == last and slots > 1:
            raise torch.OutOfMemoryError("no room")
        init(self, model, key, slots, *given, **named)

    ModelRunner.__init__ = refuse
    try:
        return engine(model).generate(**options)
    finally:
        ModelRunner.__init__ = init
