"""Paths of pictures: checked before anything is computed, and written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ..errors import ArgumentError, require
from ..files import whole_file


def check_path(name: str, path: Path, suffixes: Sequence[str]) -> None:
    """Refuse a ``path``, the argument ``name``, that cannot be written or has another suffix."""
    told = f"{name}={str(path)!r}"
    require(path.suffix.lower() in suffixes, f"{told}: {path.suffix or 'no suffix'!r} is not one of {tuple(suffixes)}")
    require(not path.is_dir(), f"{told} is a folder")
    require(path.parent.is_dir(), f"{told}: the folder {str(path.parent)!r} does not exist")
    require(os.access(path.parent, os.W_OK), f"{told}: the folder {str(path.parent)!r} is not writable")


@contextmanager
def whole_picture(name: str, path: Path) -> Iterator[IO[bytes]]:
    """Open a file that replaces ``path`` once it is complete: a failure leaves an older file and no partial one."""
    try:
        with whole_file(path) as file:
            yield file
    except OSError as error:
        raise ArgumentError(f"{name}={str(path)!r} cannot be written: {error.strerror or error}") from None
