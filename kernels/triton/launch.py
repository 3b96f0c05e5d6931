"""Launch of kernels: one function, which can record launches instead of running them.

A recorded launch holds the arguments that the launcher built, so that a compiler test or a cost model sees the real
launch and not a list kept by hand. Launchers accept tensors on the meta device while recording.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from triton.errors import TritonError

from .errors import KernelError

H200_SHARED_MEMORY = 227 * 1024


class Launch(NamedTuple):
    """One launch as recorded: the jit function, its grid, and its arguments and options by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]


class _Recorder(NamedTuple):
    launches: list[Launch]
    shared_memory: int


_recorders: list[_Recorder] = []


@contextmanager
def recording(shared_memory: int = H200_SHARED_MEMORY) -> Iterator[list[Launch]]:
    """Collect launches instead of running them, as for a GPU whose blocks may have ``shared_memory`` bytes.

    Not for use from several threads.
    """
    recorder = _Recorder([], shared_memory)
    _recorders.append(recorder)
    try:
        yield recorder.launches
    finally:
        _recorders.pop()


def is_recording() -> bool:
    return bool(_recorders)


def launch(kernel, grid: tuple[int, ...], **arguments: Any) -> None:
    """Launch ``kernel`` with keyword ``arguments`` (options such as ``num_warps`` among them) on its tensors' device.

    Raises:
        ValueError: tensors are on the CPU and the kernel is compiled, not interpreted.
        KernelError: Triton cannot compile or start the kernel.
    """
    arguments["enable_fp_fusion"] = True  # triton's own default is about to change
    if _recorders:
        _recorders[-1].launches.append(Launch(kernel, grid, arguments))
        return
    device = next(value.device for value in arguments.values() if isinstance(value, torch.Tensor))
    try:
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                kernel[grid](**arguments)
        elif device.type == "cuda" or not isinstance(kernel, triton.JITFunction):
            kernel[grid](**arguments)
        else:
            raise ValueError(
                f"tensors are on device {str(device)!r}: kernels need a GPU, or TRITON_INTERPRET=1 set before triton "
                "is imported"
            )
    except TritonError as error:
        raise KernelError(_account(kernel, arguments, device, error)) from error


def _account(kernel, arguments: dict[str, Any], device: torch.device, error: TritonError) -> str:
    """Describe a launch that failed, by its shapes and configuration."""
    card = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    shapes = [f"{name}={list(x.shape)}" for name, x in arguments.items() if isinstance(x, torch.Tensor)]
    config = [f"{name}={x}" for name, x in arguments.items() if name.isupper() or name in ("num_warps", "num_stages")]
    name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.__name__}"
    return (
        f"kernel {name} does not run on device {str(device)!r}{card}: {type(error).__name__}: {error}; "
        f"shapes {', '.join(shapes)}; configuration {', '.join(config)}"
    )


def cdiv(a: int, b: int) -> int:
    """``ceil(a / b)``. Triton's own function is one of its language, ten times slower on the host."""
    return -(-a // b)


@cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU.

    On the CPU 1, since the interpreter runs programs one after another; on the meta device those of an H200, whose
    variants are compiled ahead of time.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 1 if device.type == "cpu" else 132


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block of a GPU may ask for; while recording, those of the recorder's target."""
    if _recorders:
        return _recorders[-1].shared_memory
    return _shared_memory_of(device) if device.type == "cuda" else H200_SHARED_MEMORY


@cache
def _shared_memory_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
