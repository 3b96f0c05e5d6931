"""Checkpoints in 4 bits that others wrote: GPTQ, AWQ (GEMM) and compressed-tensors (pack-quantized).

All three store ``(code - zero) * scale`` with a scale and a zero point for a group of a row, eight codes per int32,
each in an order of its own. Codes are put into this package's order as they are read; nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..distributed import ALONE, Group
from ..errors import CheckpointError, UnsupportedConfigError
from ..ops.dispatch import Quantised
from ..ops.torch import int4
from .reading import TensorReader

INSTEAD = "load the checkpoint that it was made from; quantization='fp8' or 'int4' quantises that while loading"
KEYS = ("quantization_config", "quantization", "compression_config")  # of config.json
CODES = {"gptq": "qweight", "awq": "qweight", "compressed-tensors": "weight_packed"}
BESIDE = {  # what must and what may be stored beside the codes
    "gptq": (("qzeros", "scales"), ("g_idx",)),
    "awq": (("qzeros", "scales"), ("g_idx",)),
    "compressed-tensors": (("weight_scale",), ("weight_shape", "weight_zero_point", "weight_g_idx")),
}
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of eight columns in an int32, in fours of bits
GROUPS = (128, 64, 32)  # that are kept; larger ones become several with the same scale
SCALES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True)
class Packing:
    """Layout of the matrices that a checkpoint has in 4 bits."""

    layout: str
    group: int | None  # None: a whole row has one scale
    symmetric: bool = False  # codes of zero are 8, and not stored
    zeros_less_one: bool = False  # stored zero points are one less than those meant
    needs_order: bool = False  # each matrix says which group a column is of

    @property
    def form(self) -> str:
        """Name of the format that is nearest."""
        return "int4-64" if self.group == 64 else "int4"


def read_packing(config: Mapping[str, Any]) -> Packing | None:
    """Return how a checkpoint with this ``config.json`` stores 4 bits; None: it is not quantised.

    Raises:
        UnsupportedConfigError: it is quantised in another way; names the key at fault.
    """
    key = next((key for key in KEYS if config.get(key) is not None), None)
    if key is None:
        return None
    given = config[key]
    method = given.get("quant_method", given) if isinstance(given, Mapping) else given
    readers = {"gptq": _read_gptq, "awq": _read_awq, "compressed-tensors": _read_compressed}
    known = isinstance(given, Mapping) and isinstance(method, str) and method in readers
    if key == "quantization" or not known:
        raise UnsupportedConfigError(
            f"config.json: {key} says that the weights are quantised ({method!r}), which is not supported: {INSTEAD}"
        )
    return readers[method](given, f"config.json: {key}")


def _only(given: Mapping[str, Any], where: str, key: str, *allowed: Any) -> None:
    """Refuse a value that is not one of those allowed; ``True`` is no 1 here."""
    value = given.get(key)
    if not any(type(value) is type(each) and value == each for each in allowed):
        raise UnsupportedConfigError(f"{where}: {key}={value!r} is not supported (allowed: {allowed}): {INSTEAD}")


def _group_of(given: Mapping[str, Any], where: str, key: str, *rows: int | None) -> int | None:
    value = given.get(key)
    if any(type(value) is type(each) and value == each for each in rows):
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or value % min(GROUPS):
        raise UnsupportedConfigError(f"{where}: {key}={value!r} is not a multiple of {min(GROUPS)}: {INSTEAD}")
    return value


def _read_gptq(given: Mapping[str, Any], where: str) -> Packing:
    _only(given, where, "bits", 4)
    _only(given, where, "checkpoint_format", None, "gptq", "gptq_v2")
    _only(given, where, "is_marlin_format", None, False)
    _only(given, where, "pack_dtype", None, "int32")
    _only(given, where, "dynamic", None, {})
    _only(given, where, "desc_act", None, True, False)
    how = {"zeros_less_one": given.get("checkpoint_format") != "gptq_v2", "needs_order": given.get("desc_act") is True}
    return Packing("gptq", _group_of(given, where, "group_size", -1), **how)


def _read_awq(given: Mapping[str, Any], where: str) -> Packing:
    named = {"bits": "w_bit", "group_size": "q_group_size"}
    given = {**given, **{key: given.get(key, given.get(old)) for key, old in named.items()}}
    _only(given, where, "bits", 4)
    for key in ("version", "checkpoint_format"):
        _only(given, where, key, None, "gemm", "GEMM")
    _only(given, where, "zero_point", None, True)
    return Packing("awq", _group_of(given, where, "group_size", -1))


def _read_compressed(given: Mapping[str, Any], where: str) -> Packing:
    _only(given, where, "format", "pack-quantized")
    for key in ("kv_cache_scheme", "transform_config"):
        _only(given, where, key, None, {})
    sparse = given.get("sparsity_config")
    _only(
        sparse if isinstance(sparse, Mapping) else {"format": sparse},
        f"{where}: sparsity_config",
        "format",
        None,
        "dense",
    )
    groups = given.get("config_groups")
    scheme = next(iter(groups.values())) if isinstance(groups, Mapping) and len(groups) == 1 else None
    how = scheme.get("weights") if isinstance(scheme, Mapping) else None
    if not isinstance(how, Mapping):
        raise UnsupportedConfigError(f"{where}: config_groups={groups!r} is not one group with 'weights': {INSTEAD}")
    where = f"{where}: weights"
    for key in ("input_activations", "output_activations"):
        _only(scheme, where, key, None)
    _only(how, where, "num_bits", 4)
    _only(how, where, "type", None, "int")
    _only(how, where, "strategy", "group", "channel")
    _only(how, where, "dynamic", None, False)
    _only(how, where, "symmetric", None, True, False)
    _only(how, where, "actorder", None, False, "weight", "static")
    rows = how.get("strategy") == "channel"
    group = None if rows else _group_of(how, where, "group_size", -1)
    return Packing("compressed-tensors", group, symmetric=how.get("symmetric") is not False)


class PackedReader:
    """A :class:`TensorReader` of a checkpoint in 4 bits. A matrix has the name that it would have in 16 bits."""

    def __init__(self, folder: Path, stack: ExitStack, packing: Packing):
        self._base, self.folder, self.packing = TensorReader(folder, stack), folder, packing
        self._modules: dict[str, str] = {}
        must, may = BESIDE[packing.layout]
        ends = (CODES[packing.layout], *must, *may)
        names = set(self._base)
        self._parts = {name for name in names if name.rpartition(".")[2] in ends}
        for name in sorted(self._parts):
            module = name.rpartition(".")[0]
            for part in (CODES[packing.layout], *must):
                if f"{module}.{part}" not in names:
                    raise CheckpointError(f"{folder}: {name} has no {module}.{part} beside it")
            if f"{module}.weight" in names:
                raise CheckpointError(f"{folder}: {module}.weight and {name} are both there")
            self._modules[f"{module}.weight"] = module
        if not self._modules:
            ending = CODES[packing.layout]
            raise CheckpointError(f"{folder}: config.json says {packing.layout}, but no tensor is named *.{ending}")

    def __iter__(self) -> Iterator[str]:
        yield from (name for name in self._base if name not in self._parts)
        yield from self._modules

    def __contains__(self, name: str) -> bool:
        return name in self._modules or name in self._base and name not in self._parts

    def rename(self, stored: Mapping[str, str]) -> None:
        """As :meth:`TensorReader.rename`."""
        self._base.rename(
            {name: old for name, old in stored.items() if old not in self._modules} | {p: p for p in self._parts}
        )
        self._modules = {name: self._modules[old] for name, old in stored.items() if old in self._modules}

    def is_packed(self, name: str) -> bool:
        return name in self._modules

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._modules:
            return self._base.shape(name)
        codes = self._name(name, CODES[self.packing.layout])
        shape = self._base.shape(codes)
        if len(shape) != 2:
            raise CheckpointError(f"{self.folder}: tensor {codes} has shape {list(shape)}, not two dimensions")
        if self.packing.layout == "compressed-tensors":
            return shape[0], 8 * shape[1]
        rows, columns = (shape[1], 8 * shape[0]) if self.packing.layout == "gptq" else (8 * shape[1], shape[0])
        scales = self._base.shape(self._name(name, "scales"))
        if scales[-1:] != (rows,):  # both layouts name their tensors alike
            raise CheckpointError(
                f"{self.folder}: tensor {codes} has shape {list(shape)} and its scales {list(scales)}, "
                f"which is not how {self.packing.layout} stores them"
            )
        return rows, columns

    def read(self, name: str, axis: int | None = None, group: Group = ALONE) -> torch.Tensor:
        """As :meth:`TensorReader.read`, of what is not in 4 bits."""
        if name in self._modules:
            codes = self._name(name, CODES[self.packing.layout])
            raise UnsupportedConfigError(
                f"{self.folder}: {codes} is in 4 bits, which is supported for matrices of layers alone: {INSTEAD}"
            )
        return self._base.read(name, axis, group)

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Read only rows ``[first, last)`` of a matrix; of one in 4 bits their values, in float32."""
        if name not in self._modules:
            return self._base.rows(name, first, last)
        scale, zero = (None if each is None else each[:, first:last] for each in self.scales(name))
        codes = int4.pack(self.codes(name, first, last), self.group(name))
        return Quantised(codes, scale, zero).values(torch.float32)

    def group(self, name: str) -> int:
        """Return how many weights share a scale, as they are kept."""
        n_in = self.shape(name)[1]
        group = self.packing.group or n_in
        kept = next((size for size in GROUPS if group % size == 0), None)
        if kept is None or n_in % group:
            named = self._name(name, CODES[self.packing.layout])
            raise CheckpointError(f"{self.folder}: tensor {named} has {n_in} columns, which are no groups of {group}")
        return kept

    def codes(self, name: str, first: int, last: int) -> torch.Tensor:
        """Read rows of codes from 0 to 15, uint8 ``[n, K]``."""
        shape = self.shape(name)
        packed = self._integers(name, CODES[self.packing.layout], None)
        if self.packing.layout == "gptq":
            return _unpacked(packed[:, first:last].t())
        if self.packing.layout == "awq":  # rows in eights
            words = packed[:, first // 8 : -(-last // 8)]
            return _unpacked(words, AWQ_PLACES)[:, first % 8 :][:, : last - first].t()
        return _unpacked(packed[first:last])[:, : shape[1]]

    def scales(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Read scales, float32 ``[groups, N]``, and the codes of zero, uint8 of that shape or None: all are 8.

        Raises:
            CheckpointError: a tensor beside the codes is missing or does not fit them.
            UnsupportedConfigError: columns are in the order of another file (``desc_act`` of GPTQ).
        """
        n_out, n_in = self.shape(name)
        stored = self.packing.group or n_in
        kept, n_groups = self.group(name), n_in // stored
        compressed = self.packing.layout == "compressed-tensors"
        if compressed and self._name(name, "weight_shape") in self._base:
            said = self._stored(name, "weight_shape", (2,), (torch.int32, torch.int64)).tolist()
            if said != [n_out, n_in]:
                raise CheckpointError(
                    f"{self.folder}: tensor {self._name(name, 'weight_shape')} is {said}, the codes say {[n_out, n_in]}"
                )
        end, shape = ("weight_scale", (n_out, n_groups)) if compressed else ("scales", (n_groups, n_out))
        scale = self._stored(name, end, shape, SCALES).float()
        if not scale.isfinite().all():
            raise CheckpointError(f"{self.folder}: tensor {self._name(name, end)} has NaN or infinities")
        scale = scale.t() if compressed else scale
        zero = self._zeros(name, n_out, n_groups)
        self._check_order(name, stored)  # after the shapes, which show a wrong group size
        if stored != kept:
            scale = scale.repeat_interleave(stored // kept, 0)
            zero = None if zero is None else zero.repeat_interleave(stored // kept, 0)
        return scale.contiguous(), zero

    def _zeros(self, name: str, n_out: int, n_groups: int) -> torch.Tensor | None:
        if self.packing.layout == "compressed-tensors":
            part = "weight_zero_point"
            there = self._name(name, part) in self._base
            if there == self.packing.symmetric:
                state = "is there, though weights are symmetric" if there else "is missing"
                raise CheckpointError(f"{self.folder}: tensor {self._name(name, part)} {state}")
            if not there:
                return None
            zero = _unpacked(self._integers(name, part, (-(-n_out // 8), n_groups)).t())[:, :n_out]
        else:
            packed = self._integers(name, "qzeros", (n_groups, -(-n_out // 8)))
            zero = _unpacked(packed, AWQ_PLACES if self.packing.layout == "awq" else range(8))[:, :n_out]
        if self.packing.zeros_less_one:
            if (zero == 15).any():  # one writer's 0, whose bits spill into neighbours, or another's 16
                raise CheckpointError(
                    f"{self.folder}: tensor {self._name(name, 'qzeros')} has zero points of 15 plus one, which GPTQ's "
                    "writers do not agree on: store it as checkpoint_format='gptq_v2'"
                )
            zero = zero + 1
        return None if (zero == int4.ZERO).all() else zero.contiguous()

    def _check_order(self, name: str, stored: int) -> None:
        part = "weight_g_idx" if self.packing.layout == "compressed-tensors" else "g_idx"
        if self._name(name, part) not in self._base:
            if self.packing.needs_order:
                named = self._name(name, part)
                raise CheckpointError(f"{self.folder}: tensor {named} is missing, and config.json says desc_act")
            return
        n_in = self.shape(name)[1]
        if not torch.equal(self._integers(name, part, (n_in,)).long(), torch.arange(n_in) // stored):
            raise UnsupportedConfigError(
                f"{self.folder}: {self._name(name, part)} puts columns into groups in another order than theirs "
                f"(desc_act, act_order), which is not supported: {INSTEAD}"
            )

    def _name(self, name: str, part: str) -> str:
        return f"{self._modules[name]}.{part}"

    def _stored(
        self, name: str, part: str, shape: tuple[int, ...] | None, dtypes: tuple[torch.dtype, ...]
    ) -> torch.Tensor:
        """Read one of a matrix's tensors; check its shape and dtype."""
        found = self._base.stored(self._name(name, part))
        where = f"{self.folder}: tensor {self._name(name, part)}"
        if found.dtype not in dtypes:
            raise CheckpointError(f"{where} has dtype {found.dtype}, not one of {dtypes}")
        if shape is not None and tuple(found.shape) != shape:
            raise CheckpointError(f"{where} has shape {list(found.shape)}, the codes and config.json say {list(shape)}")
        return found

    def _integers(self, name: str, part: str, shape: tuple[int, ...] | None) -> torch.Tensor:
        return self._stored(name, part, shape, (torch.int32,))


def _unpacked(words: torch.Tensor, places: tuple[int, ...] | range = range(8)) -> torch.Tensor:
    """Unpack int32 ``[n, m]`` to uint8 ``[n, 8 m]``: of each word the numbers at these fours of bits."""
    shifts = torch.tensor([4 * place for place in places], dtype=torch.int32)
    return (words[..., None] >> shifts).bitwise_and_(15).to(torch.uint8).flatten(1)
