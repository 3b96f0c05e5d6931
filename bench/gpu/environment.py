"""Describe the machine: GPU, driver, versions, clocks, and native atomics on host memory."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from typing import Any

import torch

from bench.common.figures import machine

from . import parts

PACKAGES = ("triton", "numpy", "transformers", "safetensors", "tokenizers", "pytest", "flashinfer")
QUERIES = (  # drivers support different fields: the first query that succeeds
    "name,driver_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,"
    "temperature.gpu,memory.used,memory.total,mig.mode.current,ecc.mode.current,clocks_event_reasons.active",
    "name,driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu,memory.used,memory.total",
    "name,driver_version",
)
HOST_ATOMICS = 86  # cudaDevAttrHostNativeAtomicSupported


def smi() -> dict[str, str]:
    """Query ``nvidia-smi`` for the first GPU; empty if there is none."""
    return next(filter(None, map(_asked, QUERIES)), {})


def _asked(query: str) -> dict[str, str]:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", "0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=15)
    except (OSError, subprocess.SubprocessError):
        return {}
    names, values = query.split(","), [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(names, values, strict=True)) if done.returncode == 0 and len(values) == len(names) else {}


def versions() -> dict[str, str | None]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def describe() -> dict[str, Any]:
    """Everything but the clocks."""
    on_gpu = torch.cuda.is_available()
    values = {
        **machine(torch.device("cuda" if on_gpu else "cpu")),
        "cuda": on_gpu,
        "torch_cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "platform": platform.platform(),
        "executable": os.path.basename(sys.executable),
        "packages": versions(),
    }
    if on_gpu:
        about = torch.cuda.get_device_properties(0)
        values |= {
            "gpus": torch.cuda.device_count(),
            "capability": list(torch.cuda.get_device_capability(0)),
            "multiprocessors": about.multi_processor_count,
            "l2_bytes": about.L2_cache_size,
            "memory_bytes": about.total_memory,
            "host_atomics": host_atomics(),
            "bfloat16": torch.cuda.is_bf16_supported(including_emulation=False),
        }
    kernels = ("flash", "mem_efficient", "cudnn", "math")  # of attention, where torch may choose
    values |= {f"{name}_sdp": getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in kernels}
    return values


def host_atomics() -> bool | None:
    """Return True if the bus performs the device's atomics on host memory natively; None if unknown."""
    for name in ("libcudart.so", "libcudart.so.13", "libcudart.so.12"):
        try:
            library, value = ctypes.CDLL(name), ctypes.c_int(0)
            if library.cudaDeviceGetAttribute(ctypes.byref(value), HOST_ATOMICS, 0) == 0:
                return bool(value.value)
        except (OSError, AttributeError):
            continue
    return None


if __name__ == "__main__":
    sys.exit(parts.run({"machine": describe, "nvidia-smi": smi}))
