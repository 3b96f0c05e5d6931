"""GGUF files put together from their parts, so that any part can lie."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data


def header(values: Sequence[bytes] = (), tensors: Sequence[bytes] = (), version: int = 3, counts=None) -> bytes:
    n_tensors, n_values = counts or (len(tensors), len(values))
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_values) + b"".join(values) + b"".join(tensors)


def tensor(name: str = "x", sizes: Sequence[int] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def value(key: str, found: Any) -> bytes:
    """One entry of the metadata; the type follows from the value, 32 bits for numbers."""
    return text(key) + _typed(found)


def _typed(found: Any) -> bytes:
    if isinstance(found, bool):
        return struct.pack("<I?", 7, found)
    if isinstance(found, int):
        return struct.pack("<IQ", 10, found % 2**64)
    if isinstance(found, float):
        return struct.pack("<Id", 12, found)
    if isinstance(found, str):
        return struct.pack("<I", 8) + text(found)
    kind = 8 if not found or isinstance(found[0], str) else 4
    items = [text(str(one)) if kind == 8 else struct.pack("<I", int(one) % 2**32) for one in found]
    return struct.pack("<IIQ", 9, kind, len(items)) + b"".join(items)


def whole(metadata: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> bytes:
    """A file of float32 tensors."""
    places, data = [], b""
    for name, one in tensors.items():
        places.append(tensor(name, tuple(one.shape)[::-1], 0, len(data)))
        found = one.float().contiguous().numpy().tobytes()
        data += found + b"\0" * (-len(found) % 32)
    begin = header([value(key, found) for key, found in metadata.items()], places)
    return begin + b"\0" * (-len(begin) % 32) + data
