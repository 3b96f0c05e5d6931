"""Facts about this machine: the card, versions, the compiler, the CPU."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import sysconfig
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import kernels
from ..version import __version__

# environment variables that change what kernels are compiled to, or what torch's libraries compute
_RELEVANT = ("CUBLAS_", "CUDA_LAUNCH_BLOCKING", "CUDNN_", "NVIDIA_TF32_OVERRIDE", "PYTORCH_", "TORCH_", "TRITON_")
_PATHS = ("_DIR", "_HOME", "_PATH")  # where files are changes nothing
_DRIVER = Path("/proc/driver/nvidia/version")


def card(device: torch.device) -> dict[str, Any]:
    """Return name and limits of a device."""
    if device.type != "cuda":
        return {"name": cpu_name()}
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "shared_memory": found.shared_memory_per_block_optin,
        "memory": found.total_memory,
    }


@cache
def versions() -> dict[str, str | None]:
    """Return versions of all that takes part in a step."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    return {
        "sfs_triton": __version__,
        "kernels": _kernels_hash(),
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda,
        "driver": _driver(),
    }


def _kernels_hash() -> str:
    found = hashlib.sha256()
    for folder in kernels.__path__:
        for path in sorted(Path(folder).glob("*.py")):
            found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def _driver() -> str | None:
    try:
        first = _DRIVER.read_text().splitlines()[0]
    except (OSError, IndexError):
        first = None
    return first.partition(":")[2].strip() if first else None


def compiler() -> dict[str, Any]:
    """Return the C compiler that Triton would call when it loads its first kernel, and whether Python's headers are
    there."""
    found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    headers = (Path(sysconfig.get_path("include")) / "Python.h").exists()
    return {"path": found, "python_headers": headers}


def environment() -> dict[str, str]:
    """Return the environment variables that can change results or times."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(_RELEVANT) and not name.endswith(_PATHS)
    }


def cpu_name() -> str:
    """Return the CPU's name, as the system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def cpu() -> dict[str, Any]:
    """Return what plain torch has on this CPU."""
    return {
        "name": cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }
