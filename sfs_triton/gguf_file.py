"""Header of a GGUF file: metadata, and where each tensor is. Every count and offset is checked before it is used.

The reader of the package ``gguf`` trusts them; :mod:`sfs_triton.models.gguf` uses that package to decode tensors.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CheckpointError

MAGIC, VERSIONS = b"GGUF", (2, 3)
MOST_HEADER = 2**28  # bytes
MOST_KEYS, MOST_TENSORS = 2**16, 2**16
MOST_VALUES, MOST_STRING = 2**20, 2**24  # of an array; bytes
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
ALIGNMENT = 32  # of tensors, unless general.alignment says otherwise


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor in the file: number of its type, shape (rows first), and offset from the file's start."""

    type: int
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The parsed header of a GGUF file."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Place]

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """Return a metadata value of a type; ``default`` if it is absent.

        Raises:
            CheckpointError: it has another type.
        """
        value = self.metadata.get(key)
        if value is None:
            return default
        if not isinstance(value, kind) or isinstance(value, bool) and kind is not bool:
            raise CheckpointError(f"{self.path}: {key}={str(value)[:40]!r} is a {type(value).__name__}")
        return value


def read_header(path: Path) -> GgufFile:
    """Parse the header of a GGUF file.

    Raises:
        CheckpointError: names what is wrong with it, and where.
    """
    with _mapped(path) as data:
        cursor = _Cursor(path, data)
        if bytes(data[:4]) != MAGIC:
            raise CheckpointError(f"{path} is not a GGUF file: it starts with {bytes(data[:4])!r}")
        cursor.at = 4
        version, n_tensors, n_values = cursor.numbers("IQQ", "version and counts")
        if version not in VERSIONS:
            raise CheckpointError(f"{path}: version {version} is not one of {VERSIONS} (little-endian)")
        cursor.limit("tensors", n_tensors, MOST_TENSORS)
        cursor.limit("metadata values", n_values, MOST_KEYS)
        metadata: dict[str, Any] = {}
        for _ in range(n_values):
            key = cursor.string("a metadata key")
            (kind,) = cursor.numbers("I", key)
            metadata[key] = cursor.value(kind, key)
        places = cursor.places(n_tensors)
        alignment = metadata.get("general.alignment", ALIGNMENT)
        fine = isinstance(alignment, int) and not isinstance(alignment, bool) and 0 < alignment <= 2**20
        if not fine or alignment & (alignment - 1):
            raise CheckpointError(f"{path}: general.alignment={alignment!r} is not a power of two up to 2**20")
        start = -(-cursor.at // alignment) * alignment
        for name, place in places.items():
            if place.offset % alignment or start + place.offset > len(data):
                raise CheckpointError(
                    f"{path}: tensor {name} has offset {place.offset}, which is not a multiple of {alignment} within "
                    "the file"
                )
        moved = {name: Place(p.type, p.shape, start + p.offset) for name, p in places.items()}
        return GgufFile(path, metadata, moved)


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise CheckpointError(f"{path} cannot be read: {error}") from None


class _Cursor:
    """A position in the header; each read is checked against the file's end."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at = path, data, 0

    def limit(self, what: str, count: int, most: int) -> None:
        if count > most:
            raise CheckpointError(f"{self.path}: {count:,} {what}, over {most:,}")

    def take(self, size: int, what: str) -> bytes:
        end = self.at + size
        if end > min(len(self.data), MOST_HEADER):
            raise CheckpointError(f"{self.path}: {what} reaches byte {end:,}, beyond the header's end")
        found = self.data[self.at : end]
        self.at = end
        return found

    def numbers(self, form: str, what: str) -> tuple:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form), what))

    def string(self, what: str) -> str:
        (size,) = self.numbers("Q", what)
        self.limit(f"bytes in {what}", size, MOST_STRING)
        try:
            return self.take(size, what).decode()
        except UnicodeError as error:
            raise CheckpointError(f"{self.path}: {what} is not UTF-8: {error}") from None

    def value(self, kind: int, key: str) -> Any:
        if kind == STRING:
            return self.string(key)
        if kind in NUMBERS:
            return self.numbers(NUMBERS[kind], key)[0]
        if kind != ARRAY:
            raise CheckpointError(f"{self.path}: {key} has the unknown type {kind}")
        inner, count = self.numbers("IQ", key)
        self.limit(f"values in {key}", count, MOST_VALUES)
        if inner == STRING:
            return [self.string(key) for _ in range(count)]
        if inner not in NUMBERS:
            raise CheckpointError(f"{self.path}: {key} is an array of the unknown type {inner}")
        return list(self.numbers(f"{count}{NUMBERS[inner]}", key))

    def places(self, count: int) -> dict[str, Place]:
        places: dict[str, Place] = {}
        for _ in range(count):
            name = self.string("a tensor's name")
            (n_dims,) = self.numbers("I", name)
            if not 1 <= n_dims <= 4:
                raise CheckpointError(f"{self.path}: tensor {name} has {n_dims} dimensions")
            *sizes, kind, offset = self.numbers(f"{n_dims}QIQ", name)
            if name in places:
                raise CheckpointError(f"{self.path}: tensor {name} is there twice")
            if math.prod(sizes) > 2**40 or 0 in sizes:
                raise CheckpointError(f"{self.path}: tensor {name} has the impossible shape {sizes[::-1]}")
            places[name] = Place(kind, tuple(sizes[::-1]), offset)
        return places
