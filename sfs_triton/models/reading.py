"""Read a checkpoint's safetensors, one tensor at a time. No code of a checkpoint runs and no pickle is opened."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..distributed import ALONE, Group
from ..errors import CheckpointError
from ..files import lfs_hint, read_json

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


def _shards(folder: Path, single: str) -> dict[str, list[str] | None]:
    """Return the files to open, and the tensors that the index expects in each (None: any)."""
    if (folder / single).is_file():
        return {single: None}
    if single != SINGLE_FILE or not (folder / INDEX_FILE).is_file():
        pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt"))
        hint = f"; {pickles[0]} is a pickle, which is never opened: convert it to safetensors" if pickles else ""
        names = f"neither {SINGLE_FILE} nor {INDEX_FILE}" if single == SINGLE_FILE else f"no {single}"
        raise CheckpointError(f"{folder} has {names}{hint}")
    index = read_json(folder / INDEX_FILE)
    mapping = index.get("weight_map") if isinstance(index, Mapping) else None
    if not isinstance(mapping, Mapping) or not mapping:
        raise CheckpointError(f"{folder / INDEX_FILE} has no 'weight_map'")
    shards: dict[str, list[str] | None] = {}
    for name, file in mapping.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{folder / INDEX_FILE}: {name} points to {file!r}, not a .safetensors file beside it"
            )
        shards.setdefault(file, []).append(name)
    return shards


class TensorReader:
    """The tensors of a checkpoint by name, read one at a time."""

    def __init__(self, folder: Path, stack: ExitStack, single: str = SINGLE_FILE):
        self.folder = folder
        self._files: dict[str, Any] = {}
        self._stored: dict[str, str] = {}  # names in the files, by other names
        for file, expected in _shards(folder, single).items():
            try:
                handle = stack.enter_context(safe_open(folder / file, framework="pt", device="cpu"))
                names = list(handle.keys())
            except (SafetensorError, OSError, ValueError) as error:
                raise CheckpointError(f"{folder / file} cannot be read: {lfs_hint(folder / file) or error}") from None
            if expected is not None and (missing := sorted(set(expected) - set(names))):
                raise CheckpointError(f"{folder / file} lacks tensors its index promises: {listed(missing)}")
            for name in expected if expected is not None else names:
                self._files[name] = handle

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def rename(self, stored: Mapping[str, str]) -> None:
        """Give tensors other names; ``stored`` has their names in the files."""
        self._files = {name: self._files[old] for name, old in stored.items()}
        self._stored = dict(stored)

    def _slice(self, name: str) -> Any:
        return self._files[name].get_slice(self._stored.get(name, name))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, axis: int | None = None, group: Group = ALONE) -> torch.Tensor:
        """Read a tensor, or only this rank's share of its rows (``axis=0``) or columns (1)."""
        if axis is None or group.size == 1:
            tensor = self.stored(name)
        else:
            start, stop = group.share(self.shape(name)[axis])
            part = self._slice(name)
            tensor = part[start:stop] if axis == 0 else part[:, start:stop]
        return self._floating(name, tensor)

    def stored(self, name: str) -> torch.Tensor:
        """Read a tensor of any dtype."""
        return self._files[name].get_tensor(self._stored.get(name, name))

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Read only rows ``[first, last)`` of a matrix."""
        return self._floating(name, self._slice(name)[first:last])

    def _floating(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype not in DTYPES:
            raise CheckpointError(
                f"{self.folder}: tensor {name} has dtype {tensor.dtype}, not one of float64, float32, bfloat16, float16"
                ": it is quantised, without scales that could be read"
            )
        return tensor


def listed(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
