"""Launch of kernels: one function, which can record launches instead of running them.

A recorded launch holds the arguments that the launcher built, so that a compiler test or a cost model sees the real
launch and not a list kept by hand. Launchers accept tensors on the meta device while recording.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton


class Launch(NamedTuple):
    """One launch as recorded: the jit function, its grid, and its arguments and options by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]


_recorders: list[list[Launch]] = []


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect launches instead of running them. Not for use from several threads."""
    launches: list[Launch] = []
    _recorders.append(launches)
    try:
        yield launches
    finally:
        _recorders.pop()


def is_recording() -> bool:
    return bool(_recorders)


def launch(kernel, grid: tuple[int, ...], **arguments: Any) -> None:
    """Launch ``kernel`` with keyword ``arguments`` (options such as ``num_warps`` among them) on its tensors' device.

    Raises:
        ValueError: tensors are on the CPU and the kernel is compiled, not interpreted.
    """
    arguments["enable_fp_fusion"] = True  # triton's own default is about to change
    if _recorders:
        _recorders[-1].append(Launch(kernel, grid, arguments))
        return
    device = next(value.device for value in arguments.values() if isinstance(value, torch.Tensor))
    if device.type != "cuda" and isinstance(kernel, triton.JITFunction):
        raise ValueError(
            f"tensors are on device {str(device)!r}: kernels need a GPU, or TRITON_INTERPRET=1 set before triton is "
            "imported"
        )
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](**arguments)


@cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU.

    On the CPU 1, since the interpreter runs programs one after another; on the meta device those of an H200, whose
    variants are compiled ahead of time.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 1 if device.type == "cpu" else 132
