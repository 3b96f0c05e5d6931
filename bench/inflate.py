"""Write the embedded model into the exact shapes of a large one, with the function that it has.

    python bench/inflate.py --geometry llada-8b OUT     a checkpoint that sfs_triton.load(OUT) reads
    engine = inflate(sfs_triton.load("embedded", "cpu", "float32"), "llada-8b")     in a GPU's memory, without a file

The large model computes what the small one does, so a benchmark at its size has a trained model's slow and fast stages,
and answers that can be checked. With d and D for the two widths and f = sqrt(D / d):

* The model's residual channels are the first d of D; the others hold zeros. What is written to them (embedding,
  ``attn_out``, ``ff_out``) is scaled by f and every norm's gain by 1 / f, so mean squares over D channels, eps and all
  that follows a norm come out as they were.
* Rotary pair i of a head is pair k i of a head that is k times as wide, which turns at the same rate. Queries are
  scaled by sqrt(k), the ratio of the softmax scales, and are zero in all other channels.
* Key/value head j stays head j. Number r of the queries that share it stays number r of those that share it now.
* The last layers are the model's. All others, and all heads and MLP units that it does not have, add exact zeros: their
  rows of ``v`` and ``up`` read only residual channels that hold zeros. (Zero columns of ``attn_out`` and ``ff_out``
  would do as well, but that is a quarter of all weights; and dLLM-Cache compares values, which must stay as they are.)
* Ids that the model does not have get a logit far below all others by the residual channel that was kept constant in
  training: of the model's channels their rows of the head read only that one, with a weight from the largest rms seen
  over real generations.

All other weights meet only zeros, and are random; ``docs/inflation.md`` says what is still zero. In float32 the two
models differ by rounding alone, as sums are taken in another order. Below float32 all factors must be powers of two, so
that no weight is rounded a second time.

**A tied head** (``illada-8b``) works for the logits of masked positions, which are all that decoding reads. One matrix
holds embeddings in d channels and head rows in the next d. The head rows are scaled down until what they put into the
residual stream is lost in rounding, and the final norm's gain there makes up for it; it is zero where embeddings are.
What layers add is written to both places, to the second scaled by 2^-12, which leaves every mean square as it was. Only
the token's own embedding is missing there, and no layer can copy it, because layers see it after a norm. But at a mask
it is always the same: the MLP of an extra first layer writes it.

**Left out: ``dream-7b``.** Its rotary base has none of the frequencies the model has learned to use, its 4 key/value
heads cannot hold the model's 8, and it wants a position's logits from the row before, where the model has none. A model
for it would have to be trained. :func:`dense` has its shapes with random weights, for times alone.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors import SafetensorError  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import sfs_triton  # noqa: E402
from bench.embedded import problems  # noqa: E402
from bench.kernels import case  # noqa: E402
from sfs_triton import ArgumentError, CheckpointError, Engine  # noqa: E402
from sfs_triton.engine import DTYPES, EMBEDDED  # noqa: E402
from sfs_triton.loops import check_loop  # noqa: E402
from sfs_triton.models import ModelSpec, Transformer, Weights  # noqa: E402
from sfs_triton.models.cache import Scope  # noqa: E402
from sfs_triton.models.weights import (  # noqa: E402
    INDEX_FILE,
    LLADA_NAMES,
    LLAMA_NAMES,
    LayerWeights,
    expected_shapes,
)
from sfs_triton.ops import implementation  # noqa: E402

UNUSED_LOGIT = -200.0  # or less, of ids that the model does not have: float32 has no smaller exponential than of -104
RMS_HEADROOM = 4.0  # it holds up to so many times the largest rms seen
SHARD_BYTES = 2 * 10**9
README = """The embedded model of sfs_triton (Apache-2.0) in the shapes of a large model, for measurements.

It knows what the embedded model knows and nothing more; most of its weights are random and have no effect.
"""

# A tied head: what layers add is written a second time, times COPY; head rows are scaled by TIED.
COPY, TIED = 2.0**-12, 2.0**-40
SUPPLY = 32.0  # silu(32) is 32, in float32 and below

_LLADA = {"family": "llada", "rope_theta": 500000.0, "norm_eps": 1e-5, "max_length": 4096}
_ILLADA = {**_LLADA, "family": "illada", "tied_head": True}
_DREAM = {"family": "dream", "rope_theta": 1e6, "norm_eps": 1e-6, "max_length": 2048, "qkv_bias": True, "shifted": True}


def _sizes(name: str) -> dict[str, int]:
    sizes = asdict(case.GEOMETRIES[name])
    return {"vocab_size": sizes.pop("vocab"), **{key: size for key, size in sizes.items() if key != "head_dim"}}


def _toy(n_layers: int, d_model: int, n_heads: int, n_kv_heads: int, **rest) -> dict:
    sizes = {"n_layers": n_layers, "d_model": d_model, "n_heads": n_heads, "n_kv_heads": n_kv_heads}
    return {**_LLADA, **sizes, "mlp": 896, "vocab_size": 2000, **rest}


# What ModelSpec takes, but for the special tokens' ids: those stay what they are. The toys are for tests. Nobody
# here has seen iLLaDA's rotary base, eps and greatest length; they are taken to be LLaDA's.
GEOMETRIES: dict[str, dict] = {
    "llada-8b": {**_LLADA, "n_layers": 32, **_sizes("llada-8b")},
    "illada-8b": {**_ILLADA, "n_layers": 32, **_sizes("illada-8b")},
    "dream-7b": {**_DREAM, "n_layers": 28, **_sizes("dream-7b")},
    "toy-512": _toy(4, 512, 16, 16),  # no layer more
    "toy-768": _toy(5, 768, 12, 12),  # more of everything
    "toy-1024": _toy(5, 1024, 8, 8),  # all factors are powers of two, as in the real ones
    "toy-tied": _toy(5, 1024, 32, 16, **_ILLADA),
}


def geometry_spec(geometry: str | ModelSpec, small: ModelSpec) -> ModelSpec:
    """The spec of a geometry by name, with the special tokens of ``small``; one that is a spec already stays it."""
    if isinstance(geometry, ModelSpec):
        return geometry
    if geometry not in GEOMETRIES:
        raise ArgumentError(f"geometry={geometry!r} is not one of {tuple(GEOMETRIES)}")
    ids = {key: getattr(small, key) for key in ("mask_id", "eos_id", "pad_id", "bos_id")}
    return ModelSpec(**GEOMETRIES[geometry], **ids)


# ---------------------------------------------------------------------------------------------------- what goes where

LAYER_PARTS = ("attn_norm", "q", "k", "v", "o", "mlp_norm", "gate", "up", "down")
Index = torch.Tensor | slice | int
Fill = Callable[[torch.Tensor, str, int | None], None]  # write a part of a layer into a tensor
ALL = slice(None)


class Block(NamedTuple):
    """What stands at some rows (and columns) of a tensor instead of random numbers."""

    at: tuple[Index, ...]
    value: torch.Tensor | float


def layout(spec: ModelSpec) -> dict[tuple[str, int | None], tuple[str, tuple[int, ...]]]:
    """For every part of every layer (None: of the model) its tensor's name in a checkpoint, and its shape."""
    names = LLADA_NAMES if spec.family == "llada" else LLAMA_NAMES
    found = {(part, None): names[part] for part in ("embedding", "norm", "head")}
    for layer in range(spec.n_layers):
        for part in LAYER_PARTS:
            name = names["layer"].format(layer=layer) + names[part]
            bare = part in ("q", "k", "v")
            found[part, layer] = f"{name}.weight" if bare else name
            if bare:
                found[f"{part}_bias", layer] = f"{name}.bias"
    shapes = expected_shapes(spec, names)
    return {place: (name, shapes[name]) for place, name in found.items() if name in shapes}


def randomise(out: torch.Tensor, part: str, layer: int | None, seed: int) -> None:
    """Random weights of usual size: the same for the same seed, part and layer on the same kind of device."""
    if out.is_meta:
        return
    generator = torch.Generator(out.device).manual_seed(zlib.crc32(f"{seed} {part} {layer}".encode()))
    if "norm" in part:
        out.uniform_(0.5, 1.5, generator=generator)
    else:
        out.normal_(0.0, out.shape[-1] ** -0.5, generator=generator)


class Plan:
    """How the weights of ``source`` go into the tensors of the spec ``big``, in ``dtype``.

    Raises:
        ArgumentError: they do not fit; says everything that stands against it, with both numbers.
    """

    def __init__(self, source: Engine, big: ModelSpec, dtype: torch.dtype, seed: int = 0):
        self.source, self.small, self.big, self.dtype, self.seed = source, source.spec, big, dtype, seed
        reasons = [reason for holds, reason in self._conditions() if not holds]
        if reasons:
            raise ArgumentError(f"the model does not fit the geometry: {'; '.join(reasons)}")
        most = torch.finfo(dtype).max
        if self._needs_constant and -self.unused_weight > most:
            raise ArgumentError(f"{dtype} holds numbers up to {most:g}, one of the weights is {self.unused_weight:.4g}")

    @property
    def _needs_constant(self) -> bool:
        return self.big.tied_head or self.big.vocab_size > self.small.vocab_size

    def _conditions(self) -> Iterator[tuple[bool, str]]:
        """Everything that must hold, and what to say where it does not."""
        small, big = self.small, self.big
        for name in ("n_layers", "d_model", "n_heads", "n_kv_heads", "mlp", "vocab_size"):
            mine, room = getattr(small, name), getattr(big, name)
            yield mine <= room, f"{name} is {room}, the model has {mine}"
        mine, room = (spec.n_heads // spec.n_kv_heads for spec in (small, big))
        yield mine <= room, f"{room} query heads share a key/value head, in the model {mine}"
        yield big.head_dim % small.head_dim == 0, f"head_dim {big.head_dim} is no multiple of {small.head_dim}"
        yield (
            big.rope_theta == small.rope_theta,
            f"rope_theta is {big.rope_theta:g}, the frequencies of the model are those of {small.rope_theta:g}",
        )
        yield big.norm_eps == small.norm_eps, f"norm_eps is {big.norm_eps:g}, the model has {small.norm_eps:g}"
        yield not (big.qkv_bias or small.qkv_bias), "qkv biases are not handled"
        yield big.shifted == small.shifted, "logits are for the next row, those of the model for their own"
        if self.dtype.itemsize < 4:
            for what in ("d_model", "head_dim"):
                mine, room = getattr(small, what), getattr(big, what)
                yield (
                    math.log2(room / mine) % 2 == 0,
                    f"{what}: sqrt({room} / {mine}) is no power of two, which would round weights of {self.dtype} "
                    "again (float32 will do)",
                )
        if big.tied_head:
            layers, width = small.n_layers + 1, 2 * small.d_model
            yield big.n_layers >= layers, f"n_layers is {big.n_layers}, a tied head needs {layers}"
            yield big.d_model >= width, f"d_model is {big.d_model}, a tied head needs {width}"
        if self._needs_constant:
            yield self.constant is not None, "no residual channel of the model is constant"
            yield self.source.text is not None, "the model has no tokenizer for the problems that its rms is taken from"

    # ------------------------------------------------------------------------------------------------ numbers to apply

    @property
    def f(self) -> float:
        """What the residual stream is scaled by."""
        return math.sqrt(self.big.d_model / self.small.d_model)

    @property
    def q_scale(self) -> float:
        """The ratio of the softmax scales."""
        return math.sqrt(self.big.head_dim / self.small.head_dim)

    @property
    def offset(self) -> int:
        """The layer that is the model's first."""
        return self.big.n_layers - self.small.n_layers

    @functools.cached_property
    def weights(self) -> Weights:
        """The model's, in float64 on the host, so that factors and weights are rounded once, together."""

        def host(t: torch.Tensor | None) -> torch.Tensor | None:
            return None if t is None else t.detach().to("cpu", torch.float64)

        given = self.source.model.weights
        layers = (LayerWeights(*(host(getattr(x, f.name)) for f in fields(x))) for x in given.layers)
        return Weights(host(given.embedding), tuple(layers), host(given.norm), host(given.head))

    @functools.cached_property
    def constant(self) -> int | None:
        """The residual channel that holds the same positive number at every token, after every layer."""
        rows = self.weights.embedding
        fine = (rows == rows[:1]).all(0) & (rows[0] > 0) & (self.weights.norm > 0)
        for layer in self.weights.layers:
            fine &= (layer.out == 0).all(1) & (layer.down == 0).all(1)
        return int(fine.byte().argmax()) if fine.any() else None

    @functools.cached_property
    def unused_weight(self) -> float:
        """What the head's rows of ids that the model does not have read the constant channel with."""
        at = self.constant
        value = float(self.weights.embedding[0, at] * self.weights.norm[at])
        return UNUSED_LOGIT * RMS_HEADROOM * largest_rms(self.source, at) / value

    # ------------------------------------------------------------------------------------------------- rows and columns

    @property
    def channels(self) -> torch.Tensor:
        """For every channel of a head of the model its channel in a wider head: rotary pair i is pair k i."""
        pairs = torch.arange(self.small.head_dim // 2) * (self.big.head_dim // self.small.head_dim)
        return torch.cat((pairs, self.big.head_dim // 2 + pairs))

    @property
    def q_rows(self) -> torch.Tensor:
        """For every row of the model's ``q``, and column of its ``attn_out``, where it is."""
        own, wide = (spec.n_heads // spec.n_kv_heads for spec in (self.small, self.big))
        head = torch.arange(self.small.n_heads)
        return self._rows(head // own * wide + head % own, self.channels)

    @property
    def kv_rows(self) -> torch.Tensor:
        """The same for ``k`` and ``v``."""
        return self._rows(torch.arange(self.small.n_kv_heads), self.channels)

    @property
    def spare_queries(self) -> torch.Tensor:
        """Rows of ``q`` in heads of the model, but not among its channels: zero, since ``k`` is random there."""
        heads = (self.q_rows // self.big.head_dim).unique()
        return _without(self._rows(heads, torch.arange(self.big.head_dim)), self.q_rows)

    @property
    def spare_values(self) -> torch.Tensor:
        """Rows of ``v`` that the model does not have: zero, since ``attn_out`` is random there."""
        return _without(torch.arange(self.big.kv_width), self.kv_rows)

    @property
    def echoes(self) -> torch.Tensor:
        """Columns of ``attn_out`` that get the model's values from query heads that it does not have."""
        sharing = self.small.n_kv_heads * self.big.n_heads // self.big.n_kv_heads
        return _without(self._rows(torch.arange(sharing), self.channels), self.q_rows)

    def _rows(self, heads: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
        return (heads[:, None] * self.big.head_dim + channels).flatten()

    # ---------------------------------------------------------------------------------------------------------- blocks

    def fill(self, out: torch.Tensor, part: str, layer: int | None) -> None:
        """Write one tensor, in place."""
        randomise(out, part, layer, self.seed)
        for at, value in self.blocks(part, layer):
            at = tuple(i.to(out.device) if isinstance(i, torch.Tensor) else i for i in at)
            out[at] = value.to(device=out.device, dtype=out.dtype) if isinstance(value, torch.Tensor) else value

    def blocks(self, part: str, layer: int | None) -> Iterator[Block]:
        """What is not random in a tensor. Blocks do not overlap."""
        if layer is None:
            return getattr(self, f"_{part}")()
        if layer >= self.offset:
            return self._own_layer(part, self.weights.layers[layer - self.offset])
        return self._supply(part) if layer == 0 and self.big.tied_head else self._extra_layer(part)

    @property
    def zeros(self) -> int:
        """How many of the weights are zeros that keep the model apart from what is random."""
        count = 0
        for place, (_, shape) in layout(self.big).items():
            blank = torch.empty(shape, device="meta")
            count += sum(blank[b.at].numel() for b in self.blocks(*place) if isinstance(b.value, float) and not b.value)
        return count

    @property
    def _model(self) -> slice:
        """Residual channels of the model."""
        return slice(self.small.d_model)

    @property
    def _copy(self) -> slice:
        """With a tied head: residual channels of head rows, and where layers write a second time."""
        return slice(self.small.d_model, 2 * self.small.d_model)

    @property
    def _free(self) -> slice:
        """Residual channels that are zero throughout."""
        return slice((1 + self.big.tied_head) * self.small.d_model, None)

    def _embedding(self) -> Iterator[Block]:
        used = slice(self.small.vocab_size)
        yield Block((used, self._model), self.f * self.weights.embedding)
        yield Block((used, self._free), 0.0)
        if self.big.tied_head:
            yield Block((used, self._copy), TIED * self.weights.head)
            yield from self._unused_ids(self._copy.start, TIED)

    def _head(self) -> Iterator[Block]:
        yield Block((slice(self.small.vocab_size), self._model), self.weights.head)
        yield from self._unused_ids(0, 1.0)

    def _unused_ids(self, first: int, scale: float) -> Iterator[Block]:
        if self.big.vocab_size > self.small.vocab_size:
            unused, at = slice(self.small.vocab_size, None), first + self.constant
            yield Block((unused, slice(first, at)), 0.0)
            yield Block((unused, at), scale * self.unused_weight)
            yield Block((unused, slice(at + 1, first + self.small.d_model)), 0.0)

    def _norm(self) -> Iterator[Block]:
        gain = self.weights.norm / self.f
        if self.big.tied_head:
            gain = gain / (COPY * TIED)
            yield Block((self._model,), 0.0)
        yield Block((self._copy if self.big.tied_head else self._model,), gain)

    def _own_layer(self, part: str, own: LayerWeights) -> Iterator[Block]:
        small = self.small
        q, k, v = own.qkv.split((small.d_model, small.kv_width, small.kv_width))
        gate, up = own.gate_up.chunk(2)
        units, spare_units = slice(small.mlp), slice(small.mlp, None)
        if part in ("attn_norm", "mlp_norm"):
            yield Block((self._model,), getattr(own, part) / self.f)
            if self.big.tied_head:
                yield Block((self._copy,), 0.0)
        elif part == "q":
            yield Block((self.q_rows, self._model), self.q_scale * q)
            yield Block((self.spare_queries, self._model), 0.0)
        elif part == "k":
            yield Block((self.kv_rows, self._model), k)
        elif part == "v":
            yield Block((self.kv_rows, self._model), v)
            yield Block((self.spare_values, self._model), 0.0)
        elif part == "o":
            yield from self._written(self.q_rows, own.out)
            yield Block((ALL, self.echoes), 0.0)
        elif part == "gate":
            yield Block((units, self._model), gate)
        elif part == "up":
            yield Block((units, self._model), up)
            yield Block((spare_units, self._model), 0.0)
        elif part == "down":
            yield from self._written(units, own.down)

    def _written(self, columns: Index, weight: torch.Tensor) -> Iterator[Block]:
        """What layers add to the residual stream."""
        yield Block((self._model, columns), self.f * weight)
        if self.big.tied_head:
            yield Block((self._copy, columns), self.f * COPY * weight)
        yield Block((self._free, columns), 0.0)

    def _extra_layer(self, part: str) -> Iterator[Block]:
        """Values and MLP units are zero; the rest is random."""
        if part in ("v", "up"):
            yield Block((ALL, self._model), 0.0)
        elif part in ("attn_norm", "mlp_norm") and self.big.tied_head:
            yield Block((self._copy,), 0.0)

    def _supply(self, part: str) -> Iterator[Block]:
        """An extra layer whose first MLP unit adds, at a mask, the embedding of the mask to the copy."""
        mask, at = self.weights.embedding[self.small.mask_id], self.constant
        value = float(mask[at])
        if part in ("gate", "up"):  # the constant channel, normalised, is 1 at a mask, and the unit's output too
            reads = torch.zeros(1, self.small.d_model)
            reads[0, at] = SUPPLY if part == "gate" else 1 / SUPPLY
            yield Block((slice(1), self._model), reads)
            if part == "up":
                yield Block((slice(1, None), self._model), 0.0)
        elif part == "down":
            yield Block((self._model, 0), 0.0)
            yield Block((self._copy, 0), self.f * COPY * mask)
            yield Block((self._free, 0), 0.0)
        else:
            yield from self._extra_layer(part)
            if part == "mlp_norm":
                rms = math.sqrt(float(mask.square().mean()) + self.small.norm_eps)
                yield Block((at,), rms / (self.f * value))


def _without(these: torch.Tensor, those: torch.Tensor) -> torch.Tensor:
    return these[~torch.isin(these, those)]


@functools.lru_cache(maxsize=4)
def largest_rms(source: Engine, constant: int) -> float:
    """The largest rms of the residual stream before the final norm, over every canvas of a few generations.

    The constant channel itself tells: after the norm it is its value times its gain over the rms.
    """
    model, smallest = source.model, math.inf
    for kind in problems.DIFFICULTY:
        chosen = problems.held_out(kind, 2, source.text, seed=1)
        for done in source.generate([p.question for p in chosen], gen_length=128):
            canvas, filled = torch.tensor(done.canvas), torch.tensor(done.commit_step)
            at_step = torch.arange(done.nfe)[:, None]
            canvases = canvas.where(filled < at_step, source.spec.mask_id).to(model.device)
            hidden = model.forward(canvases, Scope(0, len(canvas), len(canvas)))
            smallest = min(smallest, hidden[..., constant].min().item())
    weights = model.weights
    return float(weights.embedding[0, constant] * weights.norm[constant]) / smallest


# ------------------------------------------------------------------------------------------------------------ in memory


def inflate(
    source: Engine,
    geometry: str | ModelSpec,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
    *,
    impl: str | None = None,
    loop: str | None = None,
) -> Engine:
    """An engine of the given shapes that does what ``source`` does, made in ``device``'s memory.

    Args:
        source: the embedded model, as :func:`sfs_triton.load` gives it.
        geometry: a name of :data:`GEOMETRIES`, or a spec.
        device, dtype, impl, loop: as :func:`sfs_triton.load` has them.
        seed: of the random weights.

    Raises:
        ArgumentError: the model does not fit the geometry; says why, with both numbers.
    """
    spec = geometry_spec(geometry, source.spec)
    device, dtype = _where(device, dtype, impl, loop)
    weights = assemble(spec, Plan(source, spec, dtype, seed).fill, device, dtype)
    return Engine(Transformer(spec, weights, impl), source.text, loop)


def dense(
    source: Engine,
    geometry: str | ModelSpec,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
    *,
    impl: str | None = None,
    loop: str | None = None,
) -> Engine:
    """As :func:`inflate`, for any geometry, but with all weights random: for what a step costs without any zeros."""
    spec = geometry_spec(geometry, source.spec)
    device, dtype = _where(device, dtype, impl, loop)
    weights = assemble(spec, functools.partial(randomise, seed=seed), device, dtype)
    return Engine(Transformer(spec, weights, impl), source.text, loop)


def _where(
    device: str | torch.device | None, dtype: str | torch.dtype | None, impl: str | None, loop: str | None
) -> tuple[torch.device, torch.dtype]:
    """The defaults of ``load``, and its refusals before gigabytes are made."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    implementation(impl, device)
    check_loop(loop, device)
    dtype = DTYPES.get(dtype, dtype) or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    if not isinstance(dtype, torch.dtype):
        raise ArgumentError(f"dtype={dtype!r} is not one of {tuple(DTYPES)}")
    return device, dtype


def assemble(spec: ModelSpec, fill: Fill, device: torch.device, dtype: torch.dtype) -> Weights:
    """The fused weights of a spec, each allocated once and filled part by part in place."""
    places = layout(spec)

    def make(layer: int | None, *parts: str) -> torch.Tensor:
        shapes = [places[part, layer][1] for part in parts]
        out = torch.empty((sum(s[0] for s in shapes), *shapes[0][1:]), device=device, dtype=dtype)
        for piece, part in zip(out.split([s[0] for s in shapes]), parts, strict=True):
            fill(piece, part, layer)
        return out

    def layer(i: int) -> LayerWeights:
        return LayerWeights(
            attn_norm=make(i, "attn_norm"),
            qkv=make(i, "q", "k", "v"),
            qkv_bias=make(i, "q_bias", "k_bias", "v_bias") if spec.qkv_bias else None,
            out=make(i, "o"),
            mlp_norm=make(i, "mlp_norm"),
            gate_up=make(i, "gate", "up"),
            down=make(i, "down"),
        )

    embedding = make(None, "embedding")
    return Weights(
        embedding=embedding,
        layers=tuple(layer(i) for i in range(spec.n_layers)),
        norm=make(None, "norm"),
        head=embedding if spec.tied_head else make(None, "head"),
    )


# ------------------------------------------------------------------------------------------------------------- as files


def config_dict(spec: ModelSpec, dtype: torch.dtype) -> dict:
    """The ``config.json`` that reads as ``spec``, with the keys of its family."""
    common = {
        "vocab_size": spec.vocab_size,
        "rope_theta": spec.rope_theta,
        "rms_norm_eps": spec.norm_eps,
        "mask_token_id": spec.mask_id,
        "eos_token_id": spec.eos_id,
        "pad_token_id": spec.pad_id,
        "bos_token_id": spec.bos_id,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if spec.family == "llada":
        return json.loads((EMBEDDED / "config.json").read_text(encoding="utf-8")) | {
            "d_model": spec.d_model,
            "n_heads": spec.n_heads,
            "n_kv_heads": spec.n_kv_heads,
            "n_layers": spec.n_layers,
            "mlp_hidden_size": spec.mlp,
            "embedding_size": spec.vocab_size,
            "max_sequence_length": spec.max_length,
            "weight_tying": spec.tied_head,
            **common,
        }
    return {
        "model_type": spec.family,
        "hidden_size": spec.d_model,
        "num_attention_heads": spec.n_heads,
        "num_key_value_heads": spec.n_kv_heads,
        "num_hidden_layers": spec.n_layers,
        "intermediate_size": spec.mlp,
        "max_position_embeddings": spec.max_length,
        "hidden_act": "silu",
        "tie_word_embeddings": spec.tied_head,
        **common,
    }


def shards(spec: ModelSpec, dtype: torch.dtype, most: int = SHARD_BYTES) -> list[list[tuple[str, int | None]]]:
    """The parts that go into each file, of at most ``most`` bytes unless a single tensor is larger."""
    files: list[list[tuple[str, int | None]]] = []
    room = 0
    for place, (_, shape) in layout(spec).items():
        size = math.prod(shape) * dtype.itemsize
        if not files or size > room:
            files.append([])
            room = most
        files[-1].append(place)
        room -= size
    return files


def write(
    out: Path, geometry: str | ModelSpec = "llada-8b", dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Plan:
    """Write the embedded model in the given shapes as a checkpoint folder: all of it, or nothing.

    Raises:
        ArgumentError: the model does not fit the geometry, or the folder is not empty.
        CheckpointError: it does not fit the disk, or cannot be written.
    """
    source = sfs_triton.load("embedded", "cpu", "float32")
    spec = geometry_spec(geometry, source.spec)
    out = Path(out).resolve()
    partial = Path(f"{out}.partial")
    try:
        _check_place(out, partial, parameters(spec) * dtype.itemsize)
        plan = Plan(source, spec, dtype, seed)
        partial.mkdir()
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error}") from None
    try:
        _write_files(plan, partial)
        partial.replace(out)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{out} cannot be written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return plan


def parameters(spec: ModelSpec) -> int:
    """How many weights a checkpoint of the spec holds."""
    return sum(math.prod(shape) for _, shape in layout(spec).values())


def _check_place(out: Path, partial: Path, size: int) -> None:
    if os.path.ismount(out) or out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ArgumentError(f"OUT={str(out)!r} is not a new or empty folder")
    if partial.exists():
        raise ArgumentError(f"{str(partial)!r} exists: another run writes it, or was killed and left it; remove it")
    if not out.parent.is_dir():
        raise ArgumentError(f"OUT={str(out)!r}: {str(out.parent)!r} is not a folder")
    free = shutil.disk_usage(out.parent).free
    if size + 2**24 > free:  # and a little for the tokenizer and the file system
        raise CheckpointError(f"{out} needs {size / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB left")


def _write_files(plan: Plan, folder: Path) -> None:
    spec, dtype, places = plan.big, plan.dtype, layout(plan.big)
    files, weight_map = shards(spec, dtype), {}
    for number, parts in enumerate(files, 1):
        tensors = {}
        for place in parts:
            name, shape = places[place]
            tensors[name] = torch.empty(shape, dtype=dtype)
            plan.fill(tensors[name], *place)
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": parameters(spec) * dtype.itemsize}, "weight_map": weight_map}
    tokenizer = json.loads((EMBEDDED / "tokenizer_config.json").read_text(encoding="utf-8"))
    for name, content in (
        (INDEX_FILE, index),
        ("config.json", config_dict(spec, dtype)),
        ("tokenizer_config.json", tokenizer | {"model_max_length": spec.max_length}),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(EMBEDDED / "tokenizer.json", folder / "tokenizer.json")
    (folder / "README.md").write_text(README, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder that is empty or not there yet")
    parser.add_argument("--geometry", choices=tuple(GEOMETRIES), default="llada-8b")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    arguments = parser.parse_args(argv)
    try:
        plan = write(arguments.out, arguments.geometry, DTYPES[arguments.dtype], arguments.seed)
    except sfs_triton.SfsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    count = parameters(plan.big)
    print(
        f"{arguments.geometry}: {count / 1e9:.2f} G weights, {plan.zeros / count:.1%} of them zero, "
        f"{count * plan.dtype.itemsize / 1e9:.2f} GB in {arguments.out}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
