"""Graphs of some work, and how long the GPU takes for it. On a CPU work is done at once, and times mean nothing."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from bench.common.figures import percentile

Work = Callable[[], object]

_HELD: list[Work] = []
HEAD_START = 2_000_000  # clock cycles, a millisecond or so, in which the host enqueues what is then timed


def graph_of(work: Work, device: torch.device) -> Work:
    """A replay of ``work``, which is done once before, on the stream that captures it."""
    if device.type != "cuda":
        work()
        return work
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.inference_mode(False), torch.cuda.stream(side):
        _inferring(work)
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(False), torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        _inferring(work)
    return graph.replay


def hold(device: torch.device) -> None:
    """Capture something outside of inference mode, and keep it.

    The first live graph creates torch's random-number state for graphs. Created in inference mode, where the engine
    captures, it refuses captures outside of it in releases that lack the fix of pytorch/pytorch#166792.
    """
    _HELD.append(graph_of(lambda: torch.zeros(1, device=device), device))


@torch.inference_mode()
def _inferring(work: Work) -> None:
    work()


def seconds(
    run: Work, device: torch.device, *, before: Work | None = None, samples: int = 20, budget: float = 1.5
) -> list[float]:
    """GPU time of ``run``: as many samples as the budget has room for, at least three, at most ``samples``.

    ``before`` is done ahead of each sample, and not timed; nor is a first ``run``. The GPU is kept busy until all of a
    sample is enqueued.
    """
    taken: list[float] = []
    run()
    deadline = time.monotonic() + (budget if device.type == "cuda" else budget / 10)  # on a CPU: toys
    while len(taken) < 3 or len(taken) < samples and time.monotonic() < deadline:
        if before is not None:
            before()
        taken.append(_sample(run, device))
    return taken


def _sample(run: Work, device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(HEAD_START)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def spread(samples: list[float], name: str = "ms") -> dict[str, float]:
    """The 20th, 50th and 80th of 100 samples, in milliseconds: ``name_p20``, ``name``, ``name_p80``."""
    low, middle, high = (1e3 * percentile(samples, share) for share in (0.2, 0.5, 0.8))
    return {f"{name}_p20": low, name: middle, f"{name}_p80": high, f"{name}_samples": len(samples)}
