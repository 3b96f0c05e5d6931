"""Bytes that tensors hold at one time, on any device, the meta device included."""

from __future__ import annotations

import weakref
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Measure the most bytes that tensors made within held at one time: ``most``."""

    def __init__(self):
        super().__init__()
        self.most, self._held = 0, 0
        self._tensors: Counter[int] = Counter()  # live tensors of each storage

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and (_storage(x) not in given or _storage(x) in self._tensors):
                self.note(x)  # not a view of a tensor from outside
        return result

    def note(self, x: torch.Tensor) -> torch.Tensor:
        """Count a tensor that no operation within has made."""
        storage, size = _storage(x), x.untyped_storage().nbytes()
        if not self._tensors[storage]:
            self._held += size
        self._tensors[storage] += 1
        self.most = max(self.most, self._held)
        weakref.finalize(x, self._drop, storage, size)
        return x

    def _drop(self, storage: int, size: int) -> None:
        self._tensors[storage] -= 1
        if not self._tensors[storage]:
            del self._tensors[storage]
            self._held -= size


def _storage(x: torch.Tensor) -> int:
    """Identify the memory of ``x``: pages of a file may have several storages, and meta tensors have no address."""
    storage = x.untyped_storage()
    return storage._cdata if x.is_meta else storage.data_ptr()
