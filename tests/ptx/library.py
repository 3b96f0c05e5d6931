"""The executor: execute.cpp, compiled once by g++ into a cache folder, and its structures."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from ctypes import POINTER, c_int, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from functools import cache
from pathlib import Path

from filelock import FileLock

from .program import ROW

SOURCES = Path(__file__).parent
OPTIONS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-std=c++17", "-shared", "-fPIC")


class Region(ctypes.Structure):
    _fields_ = [("base", c_uint64), ("size", c_uint64), ("valid", c_void_p), ("written", c_void_p)] + [
        (name, c_int32) for name in ("grain", "tracked", "changed", "unused")
    ]


class Report(ctypes.Structure):
    _fields_ = [(name, c_int32) for name in ("kind", "pc", "other_pc", "space")] + [
        ("address", c_uint64),
        *((name, c_int32) for name in ("cta", "thread", "other_cta", "other_thread")),
        ("count", c_int64),
    ]


class Schedule(ctypes.Structure):
    _fields_ = [("seed", c_uint64)] + [
        (name, c_int64) for name in ("resident", "burst", "priorities", "order", "races", "split", "late", "limit")
    ]


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def folder() -> Path:
    """``SFS_PTX_CACHE``, or one in the folder for temporary files."""
    default = Path(tempfile.gettempdir()) / f"sfs-triton-ptx-{os.getuid()}"
    return Path(os.environ.get("SFS_PTX_CACHE", default))


@cache
def library() -> ctypes.CDLL:
    """Load the executor. The first process compiles it into :func:`folder`."""
    sources = sorted(path for path in SOURCES.iterdir() if path.suffix in (".cpp", ".h", ".def"))
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sources) + _processor()).hexdigest()[:16]
    path = folder() / f"execute-{key}.so"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            new = path.with_suffix(".partial")
            subprocess.run([compiler(), *OPTIONS, "-o", str(new), str(SOURCES / "execute.cpp")], check=True)
            new.rename(path)
    loaded = ctypes.CDLL(str(path))
    loaded.ptx_kernel.restype = c_void_p
    loaded.ptx_kernel.argtypes = [c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int64]
    loaded.ptx_run.argtypes = [
        *(c_void_p, POINTER(Schedule), c_void_p, c_void_p, c_int, c_uint32, c_int, c_void_p, c_int, c_void_p, c_int),
        *(POINTER(c_int), POINTER(c_int64)),
    ]
    assert loaded.ptx_instruction_size() == ROW.itemsize
    return loaded


def _processor() -> bytes:
    """The instruction sets, which ``-march=native`` depends on."""
    info = Path("/proc/cpuinfo")
    flags = [line for line in info.read_bytes().splitlines() if line.startswith(b"flags")] if info.exists() else []
    return flags[0] if flags else b""
