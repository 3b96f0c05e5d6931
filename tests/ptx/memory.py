"""Memory that a launch may touch: the tensors that it was given, to the byte."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from ctypes import c_uint8
from dataclasses import dataclass
from functools import lru_cache
from unittest import mock

import numpy
import torch

from .library import Region

FILL = 0xFB  # what torch.empty holds while it is watched: not written yet
LARGE = 1 << 26  # bytes: a gap in a view that divides it, a region that is neither copied nor checked for races


@dataclass
class Memory:
    """One region: bytes without a large gap, their state before the launch, which of them belong to a tensor."""

    base: int
    bytes: numpy.ndarray
    valid: numpy.ndarray | None
    written: numpy.ndarray | None
    grain: int

    def __post_init__(self) -> None:
        self.before = None if self.bytes.size > LARGE else self.bytes.copy()
        self._written_before = None if self.written is None else self.written.copy()
        places = [None if each is None else each.ctypes.data for each in (self.valid, self.written)]
        self.region = Region(self.base, self.bytes.size, *places, self.grain, 0, 0, 0)

    def restore(self) -> None:
        if self.before is not None:
            self.bytes[:] = self.before
        if self.written is not None:
            self.written[:] = self._written_before


def memories(tensors: Mapping[str, torch.Tensor], least: int) -> list[Memory]:
    """The regions of ``tensors``. ``least``: bytes of the kernel's smallest access."""
    storages: dict[int, list[torch.Tensor]] = {}
    for tensor in tensors.values():
        storages.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
    found = []
    for storage, views in storages.items():
        spans = sorted(
            (part.data_ptr(), _extent(part), part) for view in views for part in _parts(view) if part.numel()
        )
        grain = min(least, *(view.element_size() for view in views))
        while spans:
            low, size, _ = spans[0]
            high = low + size
            inside = [spans.pop(0)]
            while spans and spans[0][0] < high + LARGE:
                inside.append(spans.pop(0))
                high = max(high, inside[-1][0] + inside[-1][1])
            raw = numpy.ctypeslib.as_array((c_uint8 * (high - low)).from_address(low))
            watched = _unwritten.get(storage) == views[0].untyped_storage().nbytes()
            valid = _valid(low, high, inside)
            found.append(Memory(low, raw, valid, _written(raw) if watched else None, 1 if low % grain else grain))
    return found


def place(address: int, tensors: Mapping[str, torch.Tensor]) -> str:
    """The tensor and the element at ``address``, or the nearest tensor."""
    for name, tensor in tensors.items():
        rest, index = (address - tensor.data_ptr()) // tensor.element_size(), [0] * tensor.dim()
        for axis in sorted(range(tensor.dim()), key=tensor.stride, reverse=True):
            if tensor.shape[axis] > 1 and tensor.stride(axis) > 0:
                index[axis], rest = divmod(rest, tensor.stride(axis))
        inside = all(0 <= at < size for at, size in zip(index, tensor.shape, strict=True))
        if address >= tensor.data_ptr() and inside and (rest == 0 and tensor.numel()):
            return f"{name}{index} of {_kind(tensor)}"

    def distance(name: str) -> int:
        start = tensors[name].data_ptr()
        return max(start - address, address - start - _extent(tensors[name]), 0)

    name = min(tensors, key=distance)
    return f"{address - tensors[name].data_ptr():+d} B from the start of {name}, {_kind(tensors[name])}"


@contextmanager
def watched_empty() -> Iterator[None]:
    """Fill what ``torch.empty`` and the like return, so that reads of what nobody has written are found."""

    def watched(real):
        def empty(*args, **kwargs):
            tensor = real(*args, **kwargs)
            if tensor.device.type == "cpu" and tensor.numel():
                storage = tensor.untyped_storage()
                torch.tensor([], dtype=torch.uint8).set_(storage).fill_(FILL)
                _unwritten[storage.data_ptr()] = storage.nbytes()
            return tensor

        return empty

    names = [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]
    patches = [mock.patch.object(owner, name, watched(getattr(owner, name))) for owner, name in names]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


_unwritten: dict[int, int] = {}  # address -> bytes of storages that torch.empty made


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The view, or its slices where it has large gaps."""
    dense = tensor.numel() * tensor.element_size()
    if tensor.numel() == 0 or _extent(tensor) <= max(LARGE, dense):
        return [tensor]
    axis = max((axis for axis in range(tensor.dim()) if tensor.shape[axis] > 1), key=tensor.stride)
    return [part for each in tensor.unbind(axis) for part in _parts(each)]


@lru_cache(maxsize=256)
def _mask(shape: tuple[int, ...], strides: tuple[int, ...], extent: int, itemsize: int) -> numpy.ndarray:
    mask = torch.zeros(extent // itemsize, dtype=torch.uint8)
    mask.as_strided(shape, strides).fill_(1)
    return mask.numpy().repeat(itemsize)


def _valid(low: int, high: int, spans: list[tuple[int, int, torch.Tensor]]) -> numpy.ndarray | None:
    """Bytes that belong to a tensor, 1 each; None: all do."""
    valid = numpy.zeros(high - low, numpy.uint8)
    for base, extent, part in spans:
        dense = part.numel() * part.element_size() == extent
        if dense and extent == high - low:
            return None
        mask = 1 if dense else _mask(tuple(part.shape), part.stride(), extent, part.element_size())
        valid[base - low : base - low + extent] |= mask
    return valid


def _written(raw: numpy.ndarray) -> numpy.ndarray:
    """Bytes that are no longer what torch.empty held, 1 each: by words of four, since one byte may well be FILL."""
    other = (raw != FILL).astype(numpy.uint8)
    whole = raw.size // 4 * 4
    other[:whole] = numpy.repeat(other[:whole].reshape(-1, 4).any(1), 4)
    return other
