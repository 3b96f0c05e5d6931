"""Updates of loaded weights: new values at the same addresses, which captured graphs keep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ..distributed import ALONE, Group
from ..errors import CheckpointError, require
from ..ops.dispatch import GROUPS
from .names import expected_shapes, resolve
from .packed import PackedReader
from .reading import DTYPES, TensorReader
from .spec import ModelSpec
from .weights import HEADS, Weights, assemble, open_reader

CHECKED_AT_ONCE = 2**24  # elements


class StateReader:
    """The tensors of a state dictionary, with the interface of :class:`TensorReader`."""

    folder = "state_dict"

    def __init__(self, state: Mapping[str, Any]):
        for name, tensor in state.items():
            plain = isinstance(name, str) and type(tensor) in (torch.Tensor, torch.nn.Parameter)
            require(plain, f"state_dict: {name!r} is a {type(tensor).__name__}, not a plain tensor")
            require(tensor.device.type != "meta", f"state_dict: {name!r} is on the device 'meta', without values")
            if tensor.dtype not in DTYPES:
                raise CheckpointError(f"state_dict: tensor {name} has dtype {tensor.dtype}, not one of {DTYPES}")
        self._tensors = {name: tensor.detach() for name, tensor in state.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def rename(self, stored: Mapping[str, str]) -> None:
        self._tensors = {name: self._tensors[old] for name, old in stored.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str, axis: int | None = None, group: Group = ALONE) -> torch.Tensor:
        tensor = self._tensors[name]
        return tensor if axis is None else tensor.narrow(axis, *_span(group, tensor.shape[axis]))

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        return self._tensors[name][first:last]


def _span(group: Group, size: int) -> tuple[int, int]:
    start, stop = group.share(size)
    return start, stop - start


@torch.no_grad()
def update_weights(weights: Weights, source: Mapping[str, Any] | Path, spec: ModelSpec, group: Group = ALONE) -> None:
    """Give loaded weights the values of a state dictionary, folder or GGUF file, in place, layer by layer.

    Everything is checked before the first value changes: names, shapes, dtypes, and that all values are finite.

    Raises:
        CheckpointError: names each missing, extra or misshapen tensor, or one with NaN; nothing has changed then.
        ArgumentError: the loaded weights, or the new ones, are as a checkpoint in 4 bits has them.
    """
    dtype, form = weights.embedding.dtype, weights.quantization
    require(_as_quantised(weights, form), "weights that a checkpoint had in 4 bits take no new values: load it anew")
    with ExitStack() as stack:
        reader = StateReader(source) if isinstance(source, Mapping) else open_reader(source, stack, dtype)
        taken = not isinstance(reader, PackedReader)
        require(taken, f"{reader.folder}: new values in 4 bits are not taken: load the checkpoint anew")
        names = resolve(reader, spec)
        for name, shape in expected_shapes(spec, names).items():
            _check_finite(reader, name, shape)
        how = {"quantization": weights.quantization, "into": weights}
        assemble(reader, names, spec, weights.embedding.device, dtype, group, **how)


def _as_quantised(weights: Weights, form: str | None) -> bool:
    """Return whether weights have the layout that quantising new ones to ``form`` gives, None: no format."""
    *layers, head = (
        None if isinstance(x, torch.Tensor) else (x.form, x.group, x.zero is None) for x in weights.matrices()
    )
    wanted, wanted_head = (None if x is None else (x, GROUPS.get(x), True) for x in (form, HEADS.get(form, form)))
    return head == wanted_head and all(each == wanted for each in layers)


def _check_finite(reader: TensorReader | StateReader, name: str, shape: tuple[int, ...]) -> None:
    most = max(1, CHECKED_AT_ONCE // shape[1]) if len(shape) > 1 else shape[0]
    for first in range(0, shape[0] if len(shape) > 1 else 1, most):
        values = reader.rows(name, first, min(first + most, shape[0])) if len(shape) > 1 else reader.read(name)
        if not values.isfinite().all():
            raise CheckpointError(f"{reader.folder}: tensor {name} has NaN or infinities")
