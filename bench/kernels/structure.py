"""Tensors inside arguments and results: dictionaries, sequences and dataclasses of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch


def leaves(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    """All tensors in ``value``, by the path that leads to each."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    if isinstance(value, dict):
        parts = list(value.items())
    elif isinstance(value, (list, tuple)):
        parts = list(enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    else:
        return {}
    return {
        path: leaf for key, part in parts for path, leaf in leaves(part, f"{name}.{key}" if name else str(key)).items()
    }


def with_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A copy of ``value`` with ``change(tensor)`` in the place of each tensor."""
    return deepcopy(value, {id(leaf): change(leaf) for leaf in leaves(value).values()})
