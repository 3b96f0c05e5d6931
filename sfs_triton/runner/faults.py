"""Faults of a device: has it failed, and is an error lack of memory?"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

from ..errors import DeviceFault, OutOfDeviceMemory, SfsError, first_line

# texts of torch's allocators, of the CUDA runtime and driver (through torch or Triton), of cuBLAS and of cuDNN
_LACK = re.compile(r"out of memory|allocate memory|cudaErrorMemoryAllocation|_ALLOC(ATION)?_FAILED", re.I)


def is_lack_of_memory(error: BaseException) -> bool:
    """Return whether an error reports lack of memory, of the device or of the host: by its class, or by its text."""
    if isinstance(error, (torch.OutOfMemoryError, OutOfDeviceMemory)):
        return True
    return isinstance(error, RuntimeError) and not isinstance(error, SfsError) and bool(_LACK.search(str(error)))


def is_idle(device: torch.device) -> bool:
    """Return whether a GPU has done all work of the current stream; False for other devices. It does not wait.

    Drivers of Windows keep launches back until a call such as this one.

    Raises:
        DeviceFault: the GPU has failed.
    """
    return device.type == "cuda" and asked(torch.cuda.current_stream(device).query, device)


def asked(query: Callable[[], bool], device: torch.device) -> bool:
    """Return the answer of a query of a stream or an event; raise DeviceFault if it reports an earlier failure."""
    try:
        return query()
    except RuntimeError as error:
        raise DeviceFault(
            f"{str(device)!r} has failed and does no more work for this process: {first_line(error)}"
        ) from error


def check_device(device: torch.device, error: BaseException) -> None:
    """Raise DeviceFault if ``error``, which is none of the package's, has left a GPU that does no more work."""
    if not isinstance(error, SfsError):
        is_idle(device)
