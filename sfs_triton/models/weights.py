"""Read a checkpoint's safetensors into fused weight tensors. No code of a checkpoint runs and no pickle is opened."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from ..distributed import ALONE, Group
from ..errors import CheckpointError, require
from ..files import read_json
from ..ops.dispatch import Matrix, Quantised, quantize
from .spec import ModelSpec

AT_ONCE = 2**24  # elements quantised at a time, which bounds the unquantised copy in memory
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"

LLADA_NAMES = {
    "embedding": "model.transformer.wte.weight",
    "norm": "model.transformer.ln_f.weight",
    "head": "model.transformer.ff_out.weight",
    "layer": "model.transformer.blocks.{layer}.",
    "attn_norm": "attn_norm.weight",
    "mlp_norm": "ff_norm.weight",
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "o": "attn_out.weight",
    "gate": "ff_proj.weight",
    "up": "up_proj.weight",
    "down": "ff_out.weight",
}
LLAMA_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
    "layer": "model.layers.{layer}.",
    "attn_norm": "input_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer; q, k, v and gate, up are fused along their output dimension."""

    attn_norm: torch.Tensor  # [d]
    qkv: Matrix  # [d + 2 kv, d]
    qkv_bias: torch.Tensor | None  # [d + 2 kv]
    out: Matrix  # [d, d]
    mlp_norm: torch.Tensor  # [d]
    gate_up: Matrix  # [2 mlp, d]
    down: Matrix  # [d, mlp]


@dataclass(frozen=True, slots=True)
class Weights:
    """All weights of a model, or of one rank's part of it: sizes are then its own, and ``embedding`` ends with zeros.

    ``head`` is ``embedding`` itself, but for those zeros, where the checkpoint ties them and nothing is quantised.
    """

    embedding: torch.Tensor  # [V, d]
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor  # [d]
    head: Matrix  # [V, d]

    def plain(self, what: str) -> Weights:
        """Return these weights for code that needs plain tensors; errors call that code ``what``.

        Raises:
            ArgumentError: they are quantised.
        """
        require(
            isinstance(self.head, torch.Tensor), f"{what} takes no quantised weights: load without quantization='fp8'"
        )
        return self


def _shards(folder: Path) -> dict[str, list[str] | None]:
    """Return the files to open, and the tensors that the index expects in each (None: any)."""
    if (folder / SINGLE_FILE).is_file():
        return {SINGLE_FILE: None}
    if not (folder / INDEX_FILE).is_file():
        pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt"))
        hint = f"; {pickles[0]} is a pickle, which is never opened: convert it to safetensors" if pickles else ""
        raise CheckpointError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")
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

    def __init__(self, folder: Path, stack: ExitStack):
        self.folder = folder
        self._files: dict[str, Any] = {}
        for file, expected in _shards(folder).items():
            try:
                handle = stack.enter_context(safe_open(folder / file, framework="pt", device="cpu"))
                names = list(handle.keys())
            except (SafetensorError, OSError, ValueError) as error:
                raise CheckpointError(f"{folder / file} cannot be read: {error}") from None
            if expected is not None and (missing := sorted(set(expected) - set(names))):
                raise CheckpointError(f"{folder / file} lacks tensors its index promises: {_listed(missing)}")
            for name in expected if expected is not None else names:
                self._files[name] = handle

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def read(self, name: str, axis: int | None = None, group: Group = ALONE) -> torch.Tensor:
        """Read a tensor, or only this rank's share of its rows (``axis=0``) or columns (1)."""
        if axis is None or group.size == 1:
            tensor = self._files[name].get_tensor(name)
        else:
            start, stop = group.share(self.shape(name)[axis])
            part = self._files[name].get_slice(name)
            tensor = part[start:stop] if axis == 0 else part[:, start:stop]
        return self._floating(name, tensor)

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Read only rows ``[first, last)`` of a matrix."""
        return self._floating(name, self._files[name].get_slice(name)[first:last])

    def _floating(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            raise CheckpointError(f"{self.folder}: tensor {name} has dtype {tensor.dtype}, not a floating-point one")
        return tensor


def _listed(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def expected_shapes(spec: ModelSpec, names: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """Return every tensor name that a checkpoint of this spec must hold, with its shape."""
    d, kv, mlp = spec.d_model, spec.kv_width, spec.mlp
    shapes: dict[str, tuple[int, ...]] = {names["embedding"]: (spec.vocab_size, d), names["norm"]: (d,)}
    if not spec.tied_head:
        shapes[names["head"]] = (spec.vocab_size, d)
    widths = {"q": d, "k": kv, "v": kv}
    for layer in range(spec.n_layers):
        prefix = names["layer"].format(layer=layer)
        for part in ("attn_norm", "mlp_norm"):
            shapes[prefix + names[part]] = (d,)
        for part, width in widths.items():
            shapes[f"{prefix}{names[part]}.weight"] = (width, d)
            if spec.qkv_bias:
                shapes[f"{prefix}{names[part]}.bias"] = (width,)
        shapes[prefix + names["o"]] = (d, d)
        shapes[prefix + names["gate"]] = shapes[prefix + names["up"]] = (mlp, d)
        shapes[prefix + names["down"]] = (d, mlp)
    return shapes


def _check(reader: TensorReader, spec: ModelSpec, names: Mapping[str, str]) -> None:
    wanted = expected_shapes(spec, names)
    present = {name for name in reader if not name.endswith("rotary_emb.inv_freq")}
    if spec.tied_head:
        present -= {names["head"]}  # some writers store the tied head as well
    if missing := sorted(set(wanted) - present):
        raise CheckpointError(f"{reader.folder}: tensors missing: {_listed(missing)}")
    if extra := sorted(present - set(wanted)):
        raise CheckpointError(f"{reader.folder}: tensors the configuration has no place for: {_listed(extra)}")
    for name, shape in wanted.items():
        if reader.shape(name) != shape:
            raise CheckpointError(
                f"{reader.folder}: tensor {name} has shape {list(reader.shape(name))}, "
                f"the configuration says {list(shape)}"
            )


def _quantised(reader: TensorReader, parts: Sequence[str], axis: int, group: Group, device: torch.device) -> Quantised:
    """Quantise matrices of one width, stacked, to float8 on ``device``; of each this rank's rows or columns.

    The checkpoint's own values are quantised, a few rows at a time. A scale is that of the whole row, whichever columns
    a rank keeps, so that the codes do not depend on the number of ranks.

    Raises:
        CheckpointError: names the tensor that has NaN or infinities.
    """
    heights, width = [reader.shape(part)[0] for part in parts], reader.shape(parts[0])[1]
    mine = [group.share(height) if axis == 0 else (0, height) for height in heights]
    columns = slice(*(group.share(width) if axis == 1 else (0, width)))
    n_rows = sum(stop - start for start, stop in mine)
    codes = torch.empty(n_rows, columns.stop - columns.start, dtype=torch.float8_e4m3fn, device=device)
    scale = torch.empty(n_rows, dtype=torch.float32, device=device)
    at, most = 0, max(1, AT_ONCE // width)
    for part, (start, stop) in zip(parts, mine, strict=True):
        for first in range(start, stop, most):
            rows = reader.rows(part, first, min(first + most, stop)).to(device=device, dtype=torch.float32)
            bad = (~rows.isfinite()).any(1)
            if bad.any():
                where = first + int(bad.nonzero()[0])
                raise CheckpointError(f"{reader.folder}: tensor {part} has NaN or infinities, the first in row {where}")
            end = at + len(rows)
            whole, scale[at:end] = quantize(rows)
            codes[at:end] = whole[:, columns]
            at = end
    return Quantised(codes, scale)


def load_weights(
    folder: Path,
    spec: ModelSpec,
    device: torch.device,
    dtype: torch.dtype,
    group: Group = ALONE,
    *,
    quantised: bool = False,
) -> Weights:
    """Read and check every tensor, fused and cast, on ``device``.

    With ``quantised``, matrices become float8 codes with a scale per row as they are read, so that memory holds the
    result and one tensor at most. The embedding, of which a step reads few rows, and vectors keep ``dtype``. A tied
    head becomes a separate matrix, since every step reads all of it.

    In a group, each rank reads its part: whole heads of q, k and v, the same share of the MLP, the columns of ``out``
    and ``down`` that multiply those, and a part of the vocabulary.

    Raises:
        CheckpointError: names each missing, extra or misshapen tensor, or the file that cannot be read.
    """
    with ExitStack() as stack:
        reader = TensorReader(folder, stack)
        names = LLADA_NAMES if LLADA_NAMES["embedding"] in reader else LLAMA_NAMES
        _check(reader, spec, names)

        def take(*parts: str, axis: int | None = None) -> torch.Tensor:
            tensors = [reader.read(part, axis, group) for part in parts]
            whole = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
            return whole.to(device=device, dtype=dtype).contiguous()

        def matrix(*parts: str, axis: int) -> Matrix:
            return _quantised(reader, parts, axis, group, device) if quantised else take(*parts, axis=axis)

        def layer(index: int) -> LayerWeights:
            at = names["layer"].format(layer=index)
            qkv = [at + names[part] for part in ("q", "k", "v")]
            return LayerWeights(
                attn_norm=take(at + names["attn_norm"]),
                qkv=matrix(*(f"{p}.weight" for p in qkv), axis=0),
                qkv_bias=take(*(f"{p}.bias" for p in qkv), axis=0) if spec.qkv_bias else None,
                out=matrix(at + names["o"], axis=1),
                mlp_norm=take(at + names["mlp_norm"]),
                gate_up=matrix(at + names["gate"], at + names["up"], axis=0),
                down=matrix(at + names["down"], axis=1),
            )

        embedding = tied = take(names["embedding"], axis=0)
        if group.size > 1:  # a row of zeros, for ids of other ranks
            embedding = F.pad(embedding, (0, 0, 0, 1))
            tied = embedding[:-1]
        tied_head = spec.tied_head and not quantised
        return Weights(
            embedding=embedding,
            layers=tuple(layer(i) for i in range(spec.n_layers)),
            norm=take(names["norm"]),
            head=tied if tied_head else matrix(names["embedding" if spec.tied_head else "head"], axis=0),
        )
