"""LoRA adapters as PEFT saves them, merged into a checkpoint's matrices as these are read."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..distributed import ALONE, Group
from ..errors import CheckpointError, UnsupportedConfigError, check_flag, check_integer
from ..files import read_json
from .names import plain_name
from .reading import TensorReader, listed

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MOST_RANK = 2**16
# keys that change what an adapter computes; allowed are absent, null, false and empty values
REFUSED = (
    *("use_dora", "use_qalora", "lora_bias", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "layer_replication"),
    *("modules_to_save", "trainable_token_indices", "target_parameters", "megatron_config", "use_bdlora"),
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "velora_config"),
)
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that alter the base's own weights
PART = re.compile(r"(.+)\.lora_([AB])(?:\.[^.]+)?\.weight")


class LowRank(NamedTuple):
    """One matrix's change: ``scale * b @ a``, ``a [r, in]`` and ``b [out, r]`` in float32."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


class AdaptedReader:
    """A :class:`TensorReader` whose matrices have an adapter added, computed in float32."""

    def __init__(self, base: TensorReader, adapter: Path, stack: ExitStack):
        self.folder, self._base = base.folder, base
        scale, rank = _read_config(adapter / CONFIG)
        self._changes = _read_changes(TensorReader(adapter, stack, WEIGHTS), base, scale, rank)

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._base.shape(name)

    def read(self, name: str, axis: int | None = None, group: Group = ALONE) -> torch.Tensor:
        """As :meth:`TensorReader.read`."""
        found, change = self._base.read(name, axis, group), self._changes.get(name)
        if change is None:
            return found
        rows, columns = (
            slice(*(group.share(size) if axis == n else (0, size))) for n, size in enumerate(self.shape(name))
        )
        return _added(found, change._replace(a=change.a[:, columns], b=change.b[rows]))

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """As :meth:`TensorReader.rows`."""
        found, change = self._base.rows(name, first, last), self._changes.get(name)
        return found if change is None else _added(found, change._replace(b=change.b[first:last]))


def _added(matrix: torch.Tensor, change: LowRank) -> torch.Tensor:
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32), copy=True)
    return wide.add_((change.b @ change.a).to(wide.dtype), alpha=change.scale)


def _read_config(path: Path) -> tuple[float, int]:
    """Return scale and rank of an adapter; refuse what is no plain LoRA."""
    config = read_json(path)
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{path} holds a {type(config).__name__}, not an object")
    kind, how = config.get("peft_type"), config.get("init_lora_weights")
    if kind != "LORA":
        raise UnsupportedConfigError(f"{path}: peft_type={kind!r} is not supported, only 'LORA'")
    for key in REFUSED:
        if config.get(key):
            raise UnsupportedConfigError(f"{path}: {key}={config[key]!r} is not supported: merge the adapter with peft")
    if config.get("bias") not in (None, "none"):
        raise UnsupportedConfigError(f"{path}: bias={config['bias']!r} is not supported: merge the adapter with peft")
    if isinstance(how, str) and how.startswith(CHANGES_BASE):
        raise UnsupportedConfigError(
            f"{path}: init_lora_weights={how!r} alters the base's weights, to which the adapter belongs: merge it with "
            "peft"
        )
    rank, alpha, root = config.get("r"), config.get("lora_alpha"), config.get("use_rslora") or False
    check_integer(f"{path}: r", rank, 1, MOST_RANK, CheckpointError)
    check_flag(f"{path}: use_rslora", root, CheckpointError)
    number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
    if not number or not 0 < alpha <= 1e6:
        raise CheckpointError(f"{path}: lora_alpha={alpha!r} is not a number above 0, up to 1e6")
    return alpha / (math.sqrt(rank) if root else rank), rank


def _read_changes(adapter: TensorReader, base: Any, scale: float, rank: int) -> dict[str, LowRank]:
    """Read all pairs of matrices; refuse those that do not go with the base.

    Raises:
        CheckpointError: names the tensor and what the base has.
    """
    parts: dict[str, dict[str, str]] = {}
    for stored in adapter:
        match = PART.fullmatch(plain_name(stored))
        if match is None:
            raise UnsupportedConfigError(
                f"{adapter.folder}: tensor {stored} is no lora_A or lora_B of a linear layer, which is not supported: "
                "merge the adapter with peft"
            )
        module, part = match.groups()
        name = next((n for n in (f"{module}.weight", f"model.{module}.weight") if n in base), None)
        if name is None:
            raise CheckpointError(f"{adapter.folder}: tensor {stored} is for a layer that the base does not have")
        if parts.setdefault(name, {}).setdefault(part, stored) != stored:
            raise CheckpointError(f"{adapter.folder}: {parts[name][part]} and {stored} are for the same layer")
    if not parts:
        raise CheckpointError(f"{adapter.folder} holds no LoRA tensors")
    changes = {}
    for name, pair in parts.items():
        if len(pair) < 2:
            raise CheckpointError(f"{adapter.folder}: {listed(list(pair.values()))} has no partner, lora_A or lora_B")
        out, width = base.shape(name) if len(base.shape(name)) == 2 else (0, 0)
        for part, shape in (("A", (rank, width)), ("B", (out, rank))):
            if (found := adapter.shape(pair[part])) != shape:
                raise CheckpointError(
                    f"{adapter.folder}: tensor {pair[part]} has shape {list(found)}; r={rank} and the base's {name} "
                    f"need {list(shape)}"
                )
        changes[name] = LowRank(*(adapter.read(pair[part]).float() for part in "AB"), scale)
    return changes
