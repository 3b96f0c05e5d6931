"""Capture of a step as a CUDA graph."""

from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch

from ..decoding.step_plan import Forward

if TYPE_CHECKING:
    from .model_runner import ModelRunner


# torch allows one capture at a time in a process. Steps that are launched one operation at a time hold it too: a
# capture frees the workspaces of cuBLAS, which another thread may be about to use
LAUNCHING = threading.RLock()


@contextmanager
def launching(device: str) -> Iterator[None]:
    """Launch operations on a type of device while no graph is captured, and outside a caller's autocast: it would mix
    dtypes in the caches, and a graph would keep it."""
    exact = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
    with LAUNCHING if device == "cuda" else nullcontext(), exact:
        yield


@contextmanager
def capturing() -> Iterator[None]:
    """Hold the process's captures, with automatic garbage collection off: to destroy a graph may invalidate one."""
    with LAUNCHING:
        enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if enabled:
                gc.enable()


def capture_graph(runner: ModelRunner, shape: Forward) -> Callable[[], None]:
    """Capture a step of this shape, which this thread has launched before, and return its replay. Nothing runs.

    A step launched before has loaded, compiled and allocated all that a capture must not. Workspaces of cuBLAS, kept
    per stream, are freed before and after: one from a graph's pool must not outlive the graph by use in others.
    Inference mode is off when the capture starts, since it would mark the random state that torch shares between
    graphs.
    """
    device = runner.state.tokens.device
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()  # so that the growth of what is reserved is the graph's
    torch._C._cuda_clearCublasWorkspaces()
    reserved = torch.cuda.memory_reserved(device)
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    how = {"pool": runner.pool, "stream": _capture_stream(device), "capture_error_mode": "thread_local"}
    try:
        # the outer context restores the stream: a failed capture leaves its own as the current one
        with torch.cuda.stream(torch.cuda.current_stream(device)), torch.inference_mode(False):
            with torch.cuda.graph(graph, **how):
                runner.run_padded(shape)
            graph.instantiate()
    except BaseException:
        _end_allocation(device, runner.pool)
        raise
    finally:
        torch._C._cuda_clearCublasWorkspaces()
    runner.graph_bytes += max(0, torch.cuda.memory_reserved(device) - reserved)
    return graph.replay


def _end_allocation(device: torch.device, pool: tuple[int, int]) -> None:
    """End the allocation to a graph's pool, which some versions of torch leave on when a capture is invalidated."""
    try:
        torch._C._cuda_endAllocateToPool(device.index, pool)
    except RuntimeError:
        pass  # it has ended


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
