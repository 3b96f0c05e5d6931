"""Check on the device what a CPU can only simulate: the caller's modes, threads that capture at once, memory over many
batches, a fault of the device, and a card of 24 GB.

Parts that end a process's CUDA context, or limit its memory, are processes of their own: ``python -m bench.gpu.faults
device-fault``.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

import sfs_triton
from sfs_triton import Engine, OutOfDeviceMemory
from sfs_triton.models import Transformer

from . import generation, parts
from .model import prompt_ids, random_weights, sizes

QUESTIONS = ["15,44,79,50", "3,1,2", "99,98,97,12,7"]
LENGTH, TOY_LENGTH, CACHES = 32, 8, ("region", "none")
BATCHES = 10
LEAKED = 64 * 2**20  # bytes; less is what allocators keep
NOTICED = 5.0  # seconds
LIMIT = 60.0  # seconds that a child may take
BUDGET = 24e9  # bytes of an RTX 4090
MARK = "found: "


def engine_of(execution: str) -> Engine:
    """Return a new engine on the embedded model, with nothing captured."""
    small = generation.embedded()
    backend = "torch" if parts.is_toy() else "triton"
    model = Transformer(small.spec, small.model.weights, backend)
    return generation.with_execution(Engine(model, small.text), execution)


def _generate(engine: Engine, cache: str, questions: list[str] | None = None) -> list[list[int]]:
    length = TOY_LENGTH if parts.is_toy() else LENGTH
    return [done.canvas for done in engine.generate(questions or QUESTIONS, gen_length=length, cache=cache)]


def modes(execution: str, mode: Callable[[], Any]) -> dict[str, Any]:
    """Generate inside of one of the caller's modes, then outside, in the same persistent batch: all results agree."""
    values: dict[str, Any] = {"execution": execution}
    for cache in CACHES:
        wanted = _generate(engine_of(execution), cache)
        engine = engine_of(execution)
        with generation.warnings() as told:
            with mode():
                inside = _generate(engine, cache)
            outside = _generate(engine, cache)
        values[cache] = {"inside": inside == wanted, "outside": outside == wanted, "warnings": told}
        if told or inside != wanted or outside != wanted:
            raise parts.Incomplete(values, AssertionError(f"cache={cache!r}: {values[cache]}"))
    return values


def two_captures() -> dict[str, Any]:
    """Generate in two threads on one engine, each of which has to capture: results are those of one thread."""
    wanted = {cache: _generate(engine_of("cuda_graphs"), cache) for cache in CACHES}
    engine, found, barrier = engine_of("cuda_graphs"), {}, threading.Barrier(len(CACHES))

    def work(cache: str) -> None:
        barrier.wait()
        found[cache] = parts.attempt(lambda: {"canvases": _generate(engine, cache)})

    with generation.warnings() as told:
        threads = [threading.Thread(target=work, args=(cache,)) for cache in CACHES]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT)
    errors = {cache: values["error"] for cache, (_, values) in found.items() if "error" in values}
    same = {cache: found.get(cache, ("", {}))[1].get("canvases") == wanted[cache] for cache in CACHES}
    values = {"same": same, "execution": engine.execution, "warnings": told, "errors": errors}
    if told or not all(same.values()):
        raise parts.Incomplete(values, AssertionError(f"two threads: {values}"))
    return values


def memory_over_batches(execution: str) -> dict[str, Any]:
    """Compare free memory after ten batches of different sizes with that after the same ten again."""
    if parts.is_toy():
        raise parts.Skip("needs a GPU")
    engine, free = engine_of(execution), []
    for _ in range(3):  # the first round fills pools
        for number in range(BATCHES):
            _generate(engine, CACHES[number % 2], QUESTIONS[: 1 + number % 3])
        torch.cuda.synchronize()
        free.append(torch.cuda.mem_get_info()[0])
    values = {"execution": execution, "free_bytes": free}
    if free[1] - free[2] > LEAKED:
        raise parts.Incomplete(values, AssertionError(f"{BATCHES} batches cost {free[1] - free[2]} bytes"))
    return values


# ------------------------------------------------------------------------------------------------------------ children


def child(name: str) -> dict[str, Any]:
    """Run one of :data:`CHILDREN` in a process of its own; return what it found."""
    if parts.is_toy():
        raise parts.Skip("needs a GPU")
    command = [sys.executable, "-m", "bench.gpu.faults", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"{name} said nothing for {LIMIT:.0f} s") from error
    return verdict(name, done.stdout, done.stderr, done.returncode)


def verdict(name: str, output: str, errors: str, returncode: int) -> dict[str, Any]:
    """Return what a child printed; raise where it found a failure or died without a word."""
    found = [line.removeprefix(MARK) for line in output.splitlines() if line.startswith(MARK)]
    if not found:
        raise AssertionError(f"{name} ended with status {returncode} and found nothing: {errors[-1000:]}")
    values = json.loads(found[-1])
    if values.get("wrong"):
        raise parts.Incomplete(values, AssertionError(values["wrong"]))
    return values


def device_fault(execution: str) -> dict[str, Any]:
    """Let an assertion fail on the device amid a generation; the generation must end with an error soon after."""
    engine, began = engine_of(execution), [0.0]
    _generate(engine, "region")

    def fault(frame: object) -> None:
        if not began[0]:
            began[0] = time.perf_counter()
            torch._assert_async(torch.zeros(1, device=parts.device(), dtype=torch.bool))

    try:
        engine.generate(QUESTIONS[0], gen_length=LENGTH, cache="region", on_step=fault)
    except Exception as error:
        seconds = time.perf_counter() - began[0]
        values = {"seconds": round(seconds, 2), "error": f"{type(error).__name__}: {error}"[:500]}
        return values | ({"wrong": f"noticed after {seconds:.1f} s"} if seconds > NOTICED else {})
    return {"wrong": "the generation ended as if nothing had happened"}


def small_card() -> dict[str, Any]:
    """Generate at LLaDA-8B's sizes within 24 GB: one prompt fits; what does not fit is refused as such, and costs
    later generations nothing."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, BUDGET / total))
    spec, setting, dtype = sizes(False)
    engine = Engine(Transformer(spec, random_weights(spec, parts.device(), dtype), "torch"))
    prompts = [prompt_ids(spec, setting.prompt, seed) for seed in range(8)]
    values: dict[str, Any] = {"weights_bytes": torch.cuda.memory_allocated()}
    for name, given, options in (
        ("region, 1 prompt", prompts[:1], {"cache": "region"}),
        ("noise, 1 prompt", prompts[:1], {"sampler": sfs_triton.SlowFast(temperature=0.5)}),
        ("region, 8 prompts", prompts, {"cache": "region"}),
        ("region, 1 prompt again", prompts[:1], {"cache": "region"}),
    ):
        torch.cuda.reset_peak_memory_stats()
        try:
            engine.generate(given, gen_length=setting.response // 32, **options)
            values[name] = {"fits": True, "peak_bytes": torch.cuda.max_memory_allocated()}
        except OutOfDeviceMemory as error:
            values[name] = {"fits": False, "error": str(error)[:500]}
    wrong = [name for name, its in values.items() if "1 prompt" in name and not its["fits"]]
    return values | ({"wrong": f"no room for {', '.join(wrong)}"} if wrong else {})


CHILDREN: dict[str, Callable[[], dict[str, Any]]] = {
    "device-fault, eager": functools.partial(device_fault, "eager"),
    "device-fault, cuda_graphs": functools.partial(device_fault, "cuda_graphs"),
    "small-card": small_card,
}


def every_part() -> dict[str, parts.Part]:
    autocast = functools.partial(torch.autocast, parts.device().type, dtype=torch.bfloat16)
    found: dict[str, parts.Part] = {}
    for execution in generation.EXECUTIONS:
        for name, mode in (("inference mode", torch.inference_mode), ("autocast", autocast)):
            found[f"{name}, {execution}"] = functools.partial(modes, execution, mode)
        found[f"memory, {execution}"] = functools.partial(memory_over_batches, execution)
    found["two captures at once"] = two_captures
    return found | {name: functools.partial(child, name) for name in CHILDREN}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(MARK + json.dumps(CHILDREN[sys.argv[1]]()), flush=True)
        sys.exit(0)
    sys.exit(parts.run(every_part()))
