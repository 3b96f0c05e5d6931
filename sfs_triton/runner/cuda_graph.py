"""Capture of a step as a CUDA graph."""

from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ..decoding.step_plan import Forward

if TYPE_CHECKING:
    from .model_runner import ModelRunner


_CAPTURE = threading.Lock()  # a capture disturbs others: all share a stream, and warm-ups synchronise the device


def capture_graph(runner: ModelRunner, shape: Forward) -> Callable[[], None]:
    """Capture a step of this shape and return its replay; all sequences of the runner must be done.

    Warm-up and capture share a stream and with it the workspace that cuBLAS keeps per stream. Workspaces are freed
    before and after: one from a graph's pool must not outlive the graph by use in others. Inference mode is off when
    the capture starts, since it would mark the random state that torch shares between graphs.
    """
    with _CAPTURE:
        return _capture(runner, shape)


def _capture(runner: ModelRunner, shape: Forward) -> Callable[[], None]:
    device = runner.state.tokens.device
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        runner.warm_up(shape)  # a capture must not load or compile anything
    torch.cuda.synchronize(device)
    gc.collect()  # destroying a graph during a capture may invalidate the capture
    torch._C._cuda_clearCublasWorkspaces()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    how = {"pool": runner.pool, "stream": stream, "capture_error_mode": "thread_local"}
    try:
        # the outer context restores the stream: a failed capture leaves its own as the current one
        with torch.cuda.stream(torch.cuda.current_stream(device)), torch.inference_mode(False):
            with torch.cuda.graph(graph, **how):
                runner.run_padded(shape)
            graph.instantiate()
    finally:
        torch._C._cuda_clearCublasWorkspaces()
    return graph.replay


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
