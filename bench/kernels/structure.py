"""Tensors inside arguments and results: dictionaries, sequences and dataclasses of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch


def _parts(value: Any) -> dict[Any, Any] | None:
    """Return the items of ``value`` by key; None if it is no container. For a dataclass, its constructor fields."""
    if isinstance(value, dict):
        return value
    if isinstance(value, (list, tuple)):
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
    return None


def leaves(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    """All tensors in ``value``, by the path that leads to each."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    found = {}
    for key, part in (_parts(value) or {}).items():
        found |= leaves(part, f"{name}.{key}" if name else str(key))
    return found


def with_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A copy of ``value`` with ``change(tensor)`` in the place of each tensor; the same one for the same tensor."""
    changed: dict[int, torch.Tensor] = {}

    def rebuilt(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if id(value) not in changed:
                changed[id(value)] = change(value)
            return changed[id(value)]
        parts = _parts(value)
        if parts is None:
            return value
        parts = {key: rebuilt(part) for key, part in parts.items()}
        if isinstance(value, dict):
            return parts
        if isinstance(value, (list, tuple)):
            return type(value)(parts.values())
        return dataclasses.replace(value, **parts)

    return rebuilt(value)
