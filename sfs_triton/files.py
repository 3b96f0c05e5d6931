"""Files: JSON of a checkpoint, and files that are written whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .errors import CheckpointError

LFS = b"version https://git-lfs.github.com/spec/"


def read_json(path: Path) -> Any:
    """Parse a JSON file, or raise :class:`CheckpointError` that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {lfs_hint(path) or error}") from None


def lfs_hint(path: Path) -> str | None:
    """Return a hint if a file is only Git LFS's pointer to it."""
    try:
        with open(path, "rb") as file:
            pointer = file.read(len(LFS)) == LFS
    except OSError:
        return None
    return (
        "it is a pointer of Git LFS, not the file: run git lfs pull, or download it from the hub" if pointer else None
    )


@contextmanager
def whole_file(path: Path, folder: Path | None = None) -> Iterator[IO[bytes]]:
    """Open a file to write, which is moved to ``path`` once it is complete and on the disk, and removed on failure.

    Until then it is in ``folder``, on the same file system; default: beside ``path``.
    """
    partial = (folder or path.parent) / f".{path.name}.{secrets.token_hex(4)}.partial"
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Sync a folder's directory entries to the disk, if the system supports it."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
