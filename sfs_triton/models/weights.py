"""Fused weight tensors of a checkpoint, cast and placed on a device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ..distributed import ALONE, Group
from ..errors import CheckpointError, UnsupportedConfigError, require
from ..files import read_json
from ..gguf_file import read_header
from ..ops.dispatch import GROUPS, Matrix, Quantised, quantize
from ..ops.torch import int4
from .adapters import AdaptedReader
from .gguf import GgufReader, config_of
from .names import resolve
from .packed import PackedReader, read_packing
from .reading import TensorReader
from .spec import ModelSpec
from .upload import Upload

AT_ONCE = 2**24  # elements quantised at a time, which bounds the unquantised copy in memory
HEADS = dict.fromkeys(GROUPS, "fp8")  # formats of the head, which decides between tokens, where it is another


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer; q, k, v and gate, up are fused along their output dimension."""

    attn_norm: torch.Tensor  # [d]
    qkv: Matrix  # [q + 2 kv, d]
    qkv_bias: torch.Tensor | None  # [q + 2 kv]
    out: Matrix  # [d, q]
    mlp_norm: torch.Tensor  # [d]
    gate_up: Matrix  # [2 mlp, d]
    down: Matrix  # [d, mlp]
    q_norm: torch.Tensor | None = None  # [head_dim], of each head before the rotary embedding
    k_norm: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Weights:
    """All weights of a model, or of one rank's part of it: sizes are then its own, and ``embedding`` ends with zeros.

    ``head`` is ``embedding`` itself, but for those zeros, where the checkpoint ties them and nothing is quantised.
    """

    embedding: torch.Tensor  # [V, d]
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor  # [d]
    head: Matrix  # [V, d]

    @property
    def quantization(self) -> str | None:
        """Name of the matrices' format, of the first that has one; None: all are plain."""
        return next((matrix.form for matrix in self.matrices() if isinstance(matrix, Quantised)), None)

    def matrices(self) -> Iterator[Matrix]:
        """Yield the matrices of all layers, then the head."""
        for layer in self.layers:
            yield from (layer.qkv, layer.out, layer.gate_up, layer.down)
        yield self.head

    def plain(self, what: str) -> Weights:
        """Return these weights for code that needs plain tensors; errors call that code ``what``.

        Raises:
            ArgumentError: they are quantised.
        """
        form = self.quantization
        require(form is None, f"{what} takes no quantised weights: load without quantization={form!r}")
        return self.by_row()

    def by_row(self) -> Weights:
        """Return these weights with plain matrices row by row in memory, as kernels and checkpoints have them."""

        def dense(x: Any) -> Any:
            return x.contiguous() if isinstance(x, torch.Tensor) else x

        names = ("qkv", "out", "gate_up", "down")
        layers = tuple(replace(x, **{name: dense(getattr(x, name)) for name in names}) for x in self.layers)
        return replace(self, layers=layers, head=dense(self.head))


def _fused(tensors: Sequence[torch.Tensor], upload: Upload, dtype: torch.dtype) -> torch.Tensor:
    """Stack tensors along their first dimension, as ``dtype``, on the device: each is copied to its place there."""
    if len(tensors) == 1 and upload.device.type == "cpu":
        return tensors[0].to(dtype).contiguous()  # of a file's own dtype: its pages in memory, not a copy
    heights = [len(tensor) for tensor in tensors]
    whole = torch.empty((sum(heights), *tensors[0].shape[1:]), dtype=dtype, device=upload.device)
    for part, tensor in zip(whole.split(heights), tensors, strict=True):
        upload.copy(part, tensor)
    return whole


def _by_column(matrix: torch.Tensor) -> torch.Tensor:
    """Return a matrix with its columns dense in memory: its products on a CPU take 10 to 30% less time than by rows.

    Measured with MKL in float32, for 32 to 232 rows of ``x``, on an Intel Xeon: it need not transpose what it packs.
    """
    return matrix.t().contiguous().t()


def _quantised(
    reader: TensorReader, parts: Sequence[str], axis: int, group: Group, upload: Upload, form: str
) -> Quantised:
    """Quantise matrices of one width, stacked, on the device; of each this rank's rows or columns.

    The checkpoint's own values are quantised, a few rows at a time. In 8 bits a scale is that of the whole row,
    whichever columns a rank keeps, so that the codes do not depend on the number of ranks.

    Raises:
        CheckpointError: names the tensor that has NaN or infinities, or rows that are no whole groups.
    """
    heights, width = [reader.shape(part)[0] for part in parts], reader.shape(parts[0])[1]
    mine = [group.share(height) if axis == 0 else (0, height) for height in heights]
    columns = slice(*(group.share(width) if axis == 1 else (0, width)))
    hint = "quantization='int4-64' has groups of 64" if form == "int4" else "quantization='fp8' has none"
    check_groups(reader, parts[0], columns, GROUPS.get(form), hint)
    n_rows, at, most = sum(stop - start for start, stop in mine), 0, max(1, AT_ONCE // width)
    made = Quantised.empty(n_rows, columns.stop - columns.start, form, upload.device)
    for part, (start, stop) in zip(parts, mine, strict=True):
        for first in range(start, stop, most):
            rows = upload.new(reader.rows(part, first, min(first + most, stop)))
            place = made[at : at + len(rows)]
            if made.group is None:
                codes, scale = quantize(rows, form)
                codes = codes[:, columns]
            else:
                codes, scale = quantize(rows[:, columns], form)
            place.codes.copy_(codes)
            place.scale.copy_(scale)
            at += len(rows)
    _check_finite(reader, parts, mine, made.scale)
    return made


def check_groups(reader: TensorReader, name: str, columns: slice, group: int | None, hint: str) -> None:
    """Refuse columns of a tensor that are no whole groups of as many."""
    if group is not None and (columns.start % group or columns.stop % group):
        span = f"columns {columns.start} to {columns.stop}" if columns.start else f"{columns.stop} columns"
        raise CheckpointError(
            f"{reader.folder}: tensor {name} has {span}, which are no whole groups of {group}: {hint}"
        )


def _check_finite(
    reader: TensorReader, parts: Sequence[str], mine: Sequence[tuple[int, int]], scale: torch.Tensor
) -> None:
    """Refuse tensors with NaN or infinities, which :func:`quantize` leaves in the scales. Reads the device once."""
    finite = scale.isfinite()
    finite = (finite if scale.dim() == 1 else finite.all(0)).cpu()
    for part, flags, (start, _) in zip(parts, finite.split([b - a for a, b in mine]), mine, strict=True):
        if not flags.all():
            where = start + int(flags.int().argmin())
            raise CheckpointError(f"{reader.folder}: tensor {part} has NaN or infinities, the first in row {where}")


def _stored(reader: PackedReader, parts: Sequence[str], axis: int, group: Group, upload: Upload) -> Quantised:
    """Take matrices of one width that a checkpoint has in 4 bits, stacked, on the device; of each this rank's part.

    Raises:
        CheckpointError: names the tensor that does not fit, or matrices whose groups differ.
    """
    width, size = reader.shape(parts[0])[1], reader.group(parts[0])
    columns = slice(*(group.share(width) if axis == 1 else (0, width)))
    check_groups(reader, parts[0], columns, size, "fewer processes have wider parts")
    groups = slice(columns.start // size, columns.stop // size)
    heights = [reader.shape(part)[0] for part in parts]
    mine = [group.share(height) if axis == 0 else (0, height) for height in heights]
    n_rows, at, most = sum(stop - start for start, stop in mine), 0, max(1, AT_ONCE // width)
    codes = torch.empty(n_rows, (columns.stop - columns.start) // 2, dtype=torch.uint8, device=upload.device)
    scales, zeros = [], []
    for part, (start, stop) in zip(parts, mine, strict=True):
        scale, zero = reader.scales(part)
        scales.append(scale[groups, start:stop])
        zeros.append(
            torch.full_like(scales[-1], int4.ZERO, dtype=torch.uint8) if zero is None else zero[groups, start:stop]
        )
        for first in range(start, stop, most):
            values = reader.codes(part, first, min(first + most, stop))[:, columns]
            upload.copy(codes[at : at + len(values)], int4.pack(values, size))
            at += len(values)
    scale, zero = torch.cat(scales, 1), torch.cat(zeros, 1)
    symmetric = bool((zero == int4.ZERO).all())
    return Quantised(codes, upload.new(scale), None if symmetric else upload.new(zero))


def _all_packed(reader: TensorReader, parts: Sequence[str]) -> bool:
    """Return whether a checkpoint has matrices that belong together in 4 bits; refuse it if it has some of them."""
    packed = [isinstance(reader, PackedReader) and reader.is_packed(part) for part in parts]
    if any(packed) and not all(packed):
        listed = ", ".join(parts)
        raise UnsupportedConfigError(f"{reader.folder}: of {listed} some are in 4 bits and some are not")
    return all(packed)


def open_reader(path: Path, stack: ExitStack, dtype: torch.dtype) -> TensorReader | GgufReader | PackedReader:
    """Open a folder of safetensors or a GGUF file."""
    if not path.is_file():
        packing = read_packing(read_json(path / "config.json"))
        return TensorReader(path, stack) if packing is None else PackedReader(path, stack, packing)
    file = read_header(path)
    return GgufReader(file, config_of(file), dtype)


def load_weights(
    folder: Path,
    spec: ModelSpec,
    device: torch.device,
    dtype: torch.dtype,
    group: Group = ALONE,
    *,
    quantization: str | None = None,
    by_column: bool = False,
    adapter: Path | None = None,
) -> Weights:
    """Read and check every tensor of a folder or GGUF file, fused and cast, on ``device``.

    With ``quantization``, matrices become codes with scales as they are read, so that memory holds the result and one
    tensor at most. The embedding, of which a step reads few rows, and vectors keep ``dtype``. A tied head becomes a
    separate matrix, since every step reads all of it. With matrices in 4 bits the head is in float8.

    A checkpoint that has matrices in 4 bits keeps them as they are, unless ``quantization`` names 8 bits.

    With ``by_column``, plain matrices are stored by columns, which torch's products on a CPU are faster with; a tied
    head is not. Kernels do not take them.

    An ``adapter`` is a folder with a LoRA adapter of PEFT; its matrices are added to those of the checkpoint.

    In a group, each rank reads its part: whole heads of q, k and v, the same share of the MLP, the columns of ``out``
    and ``down`` that multiply those, and a part of the vocabulary.

    Raises:
        CheckpointError: names each missing, extra or misshapen tensor, or the file that cannot be read.
    """
    with ExitStack() as stack:
        reader = open_reader(folder, stack, dtype)
        names = resolve(reader, spec)
        if adapter is not None:
            if isinstance(reader, PackedReader):
                raise UnsupportedConfigError(f"{folder}: an adapter cannot be merged into weights in 4 bits")
            reader = AdaptedReader(reader, adapter, stack)
        return assemble(reader, names, spec, device, dtype, group, quantization=quantization, by_column=by_column)


def assemble(
    reader: TensorReader | AdaptedReader | GgufReader,
    names: Mapping[str, str],
    spec: ModelSpec,
    device: torch.device,
    dtype: torch.dtype,
    group: Group = ALONE,
    *,
    quantization: str | None = None,
    by_column: bool = False,
    into: Weights | None = None,
) -> Weights:
    """Fuse and cast the tensors of a reader on ``device``; or copy them ``into`` weights of the same form."""

    upload = Upload(device)
    head = names["embedding" if spec.tied_head else "head"]

    def take(*parts: str, axis: int | None = None) -> torch.Tensor:
        return _fused([reader.read(part, axis, group) for part in parts], upload, dtype)

    def matrix(*parts: str, axis: int, form: str | None = quantization) -> Matrix:
        if (form is None or form in GROUPS) and parts[0] != head and _all_packed(reader, parts):
            return _stored(reader, parts, axis, group, upload)
        if form is not None:
            return _quantised(reader, parts, axis, group, upload, form)
        return _by_column(take(*parts, axis=axis)) if by_column else take(*parts, axis=axis)

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
            **{part: take(at + names[part]) for part in ("q_norm", "k_norm") if spec.qk_norm},
        )

    embedding = tied = take(names["embedding"], axis=0)
    if group.size > 1:  # a row of zeros, for ids of other ranks
        embedding = F.pad(embedding, (0, 0, 0, 1))
        tied = embedding[:-1]
    tied_head = spec.tied_head and quantization is None
    return Weights(
        embedding=_placed(embedding, into and into.embedding),
        layers=tuple(_placed(layer(i), into and into.layers[i]) for i in range(spec.n_layers)),
        norm=_placed(take(names["norm"]), into and into.norm),
        head=_placed(
            tied if tied_head else matrix(head, axis=0, form=HEADS.get(quantization, quantization)),
            into and into.head,
        ),
    )


def _placed(new: Any, old: Any) -> Any:
    """Return ``new``; or ``old``, with the values of ``new`` copied into its tensors."""
    if old is None or new is None:
        return new
    if isinstance(new, torch.Tensor):
        return old.copy_(new)
    for field in fields(new):
        _placed(getattr(new, field.name), getattr(old, field.name))
    return old
